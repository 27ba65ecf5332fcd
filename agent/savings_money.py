"""Savings in money: avoided engine time at its price, less what reuse costs (METHOD section 3). Pure.

Everything is in nano-units, and point figures add up exactly: gross = net + stall + store + holding, and the tiers' to
the group's.
"""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, NamedTuple

from kvtally.agent.savings import EXACTLY_NOTHING, Reason
from kvtally.agent.words import REFUSED

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from kvtally.agent.facts import Facts
    from kvtally.agent.savings import Estimate, Seconds, Status, TierSeconds
    from kvtally.agent.worth import Worth

# what an engine-second costs; energy of owned GPUs is left out: what prefill draws beyond decode is not known
TIME_RESOURCES = ("gpu", "server")
HOLDING = {"dram": "dram", "storage": "disk", "network": "external", "platform": "external"}


class NanoEstimate(NamedTuple):
    """An amount in nano-units with its 90 % interval."""

    low: int
    point: int
    high: int


class TierMoney(NamedTuple):
    """One tier's amounts in nano-units; `holding` is charged whether it served anything or not.

    net     None where nothing tells what loading and storing took
    """

    gross: NanoEstimate
    holding: int
    net: NanoEstimate | None


class Money(NamedTuple):
    """A group's amounts in nano-units; rate_nano: what an engine-second costs, the mean over the avoided ones.

    stall, store, net   None where nothing tells what loading and storing took
    realised    None where nothing tells when capacity was short, or net is not known
    """

    rate_nano: Fraction
    gross: NanoEstimate
    stall: int | None
    store: int | None
    holding: int
    net: NanoEstimate | None
    realised: NanoEstimate | None
    tiers: dict[str, TierMoney]


def rate_of(facts: Facts) -> Fraction | None:
    """Nano-units that a second of this replica cost in its period; None where the money is unknown."""
    if facts.lines is None:
        return None
    spent = sum(line.amount_nano for line in facts.lines if line.resource in TIME_RESOURCES)
    length = sum(facts.state_ns.values())  # without the gaps, which nobody pays for
    return Fraction(spent * 10**9, length) if length else None


def weight_of(worth: Worth | None) -> float:
    """Seconds avoided, by which the rate of an hour counts in the mean: the same as in the figure."""
    return 0.0 if worth is None else sum(worth.avoided) / len(worth.avoided)


def mean_rate(rates: Sequence[tuple[Fraction, float]]) -> Fraction:
    """The rate of all, weighted by the seconds avoided at each; by nothing, where none were."""
    weights = [max(Fraction(seconds), Fraction(0)) for _, seconds in rates]
    if not sum(weights):
        weights = [Fraction(1)] * len(rates)
    total = sum(rate * weight for (rate, _), weight in zip(rates, weights, strict=True))
    return Fraction(total) / sum(weights)


def holding_of(facts: Iterable[Facts]) -> dict[str, int]:
    """Nano-units that holding KV cost, by tier, hits or not."""
    held = dict.fromkeys(HOLDING.values(), 0)
    for one in facts:
        for line in one.lines or ():
            if line.resource in HOLDING:
                held[HOLDING[line.resource]] += line.amount_nano
    return held


def money_of(seconds: Seconds, rate_nano: Fraction, held: dict[str, int]) -> Money:
    """A group's seconds in money."""
    gross = _around(round(Fraction(seconds.avoided.point) * rate_nano), seconds.avoided, rate_nano)
    stall, store = (
        None if cost is None else round(Fraction(cost.point) * rate_nano) for cost in (seconds.stall, seconds.store)
    )
    holding = sum(held.values())
    net = realised = taken = None
    if seconds.net is not None and stall is not None and store is not None:
        taken = stall + store
        net = _around(gross.point - taken - holding, seconds.net, rate_nano)
    if seconds.bound is not None:
        realised = _around(round(Fraction(seconds.bound.point) * rate_nano) - holding, seconds.bound, rate_nano)
    return Money(
        rate_nano, gross, stall, store, holding, net, realised, _tiers(seconds, rate_nano, held, gross.point, taken)
    )


def _tiers(
    seconds: Seconds, rate_nano: Fraction, held: dict[str, int], gross: int, taken: int | None
) -> dict[str, TierMoney]:
    """Each tier's money; what is held for a tier that is not told apart falls to the outer tiers together.

    gross, taken    of all tiers; taken by loading and storing, None where that is not known
    """
    own = {name: held.get(name, 0) if name in seconds.tiers else 0 for name in seconds.tiers}
    rest = sum(held.values()) - sum(own.values())
    if rest and "external" in own:
        own["external"] += rest
    points = _parted(gross, {name: Fraction(tier.avoided.point) * rate_nano for name, tier in seconds.tiers.items()})
    costs = dict.fromkeys(own, 0)
    if taken is not None:
        costs = _parted(taken, {name: _taken(tier) * rate_nano for name, tier in seconds.tiers.items()})
    tiers: dict[str, TierMoney] = {}
    for name, tier in seconds.tiers.items():
        net = None
        if tier.net is not None:
            net = _around(points[name] - costs[name] - own[name], tier.net, rate_nano)
        tiers[name] = TierMoney(_around(points[name], tier.avoided, rate_nano), own[name], net)
    return tiers


def _taken(tier: TierSeconds) -> Fraction:
    return Fraction(0) if tier.net is None else Fraction(tier.avoided.point) - Fraction(tier.net.point)


def _parted(total: int, parts: Mapping[str, Fraction]) -> dict[str, int]:
    """Parts of an amount in whole nano-units that sum to it: what rounding leaves over falls to the largest."""
    amounts = {name: round(part) for name, part in parts.items()}
    largest = max(parts, key=lambda name: abs(parts[name]))
    amounts[largest] += total - sum(amounts.values())
    return amounts


def _around(point: int, seconds: Estimate, rate_nano: Fraction) -> NanoEstimate:
    """A point with the interval that the seconds have around theirs."""
    down, up = (round(Fraction(gap) * rate_nano) for gap in (seconds.point - seconds.low, seconds.high - seconds.point))
    return NanoEstimate(point - down, point, point + up)


class _Words(NamedTuple):
    """Why a net is what it is: proven neither way by what is held, or a loss by one of its parts."""

    even: Reason
    unused: Reason
    slow: Reason
    held: Reason


_OF_GROUP = _Words(
    Reason(
        "the interval of net in money contains zero: what is held costs about as much as reuse saved",
        "`kvtally calibrate --probe`, or a longer calibration, narrows it",
    ),
    Reason("nothing was reused, and what is held is charged all the same"),
    Reason("loading and storing took more of the engine than reuse avoided", "`--explain` has each of them"),
    Reason("what is held costs more than reuse saved", "a smaller cache, or one that more engines share, costs less"),
)
_OF_TIER = _Words(
    Reason("its net interval in money contains zero: what is held for it costs about as much as it saved"),
    Reason("it served nothing, and what is held for it is charged all the same"),
    Reason("loading from it and storing to it took more of the engine than its hits avoided"),
    Reason("what is held for it costs more than it saved"),
)


def weighed(seconds: Seconds, money: Money | None) -> Seconds:
    """The same by its money too: a net that may be nothing is not proven, and a loss has its reason."""
    tiers = {}
    for name, tier in seconds.tiers.items():
        own = None if money is None else money.tiers[name]
        found = None if own is None else own.net
        status, why = _weighed(tier.status, tier.net, found, own.holding if own else 0, _OF_TIER)
        tiers[name] = tier._replace(status=status, reasons=(*tier.reasons, *why))
    found, holding = (None, 0) if money is None else (money.net, money.holding)
    status, why = _weighed(seconds.status, seconds.net, found, holding, _OF_GROUP)
    return seconds._replace(status=status, reasons=(*seconds.reasons, *why), tiers=tiers)


def _weighed(
    status: Status, net: Estimate | None, amount: NanoEstimate | None, holding: int, words: _Words
) -> tuple[Status, tuple[Reason, ...]]:
    if net is None or status in REFUSED:
        return status, ()
    if net.high < 0:
        return status, (words.slow,)
    if amount is None or not holding:  # then money says what the seconds say
        return status, ()
    if amount.high < 0:
        return status, (words.unused if net == EXACTLY_NOTHING else words.held,)
    if amount.low <= 0 and status != "not_proven":
        return "not_proven", (words.even,)
    return status, ()
