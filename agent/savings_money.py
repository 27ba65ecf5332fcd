"""Savings in money: avoided engine time at its price, less what reuse costs (METHOD section 3). Pure.

Everything is in nano-units, and point figures add up exactly: gross = net + stall + store + holding.
"""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from kvtally.agent.facts import Facts
    from kvtally.agent.savings import Estimate, Seconds
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
    """One tier's amounts in nano-units; `holding` is charged whether it served anything or not."""

    gross: NanoEstimate
    holding: int
    net: NanoEstimate


class Money(NamedTuple):
    """A group's amounts in nano-units; rate_nano: what an engine-second costs, the mean over the avoided ones.

    realised    None where nothing tells when capacity was short
    """

    rate_nano: Fraction
    gross: NanoEstimate
    stall: int
    store: int
    holding: int
    net: NanoEstimate
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
    gross = _priced(seconds.avoided, rate_nano)
    stall, store = (round(Fraction(cost.point) * rate_nano) for cost in (seconds.stall, seconds.store))
    holding = sum(held.values())
    point = gross.point - stall - store - holding
    net = _around(point, seconds.net, rate_nano)
    realised = None
    if seconds.bound is not None:
        realised = _around(round(Fraction(seconds.bound.point) * rate_nano) - holding, seconds.bound, rate_nano)
    return Money(rate_nano, gross, stall, store, holding, net, realised, _tiers(seconds, rate_nano, held))


def _tiers(seconds: Seconds, rate_nano: Fraction, held: dict[str, int]) -> dict[str, TierMoney]:
    """Each tier's money; what is held for a tier that is not told apart falls to the outer tiers together."""
    own = {name: held.get(name, 0) if name in seconds.tiers else 0 for name in seconds.tiers}
    rest = sum(held.values()) - sum(own.values())
    if rest and "external" in own:
        own["external"] += rest
    tiers: dict[str, TierMoney] = {}
    for name, tier in seconds.tiers.items():
        point = round(Fraction(tier.net.point) * rate_nano) - own[name]
        tiers[name] = TierMoney(_priced(tier.avoided, rate_nano), own[name], _around(point, tier.net, rate_nano))
    return tiers


def _priced(seconds: Estimate, rate_nano: Fraction) -> NanoEstimate:
    low, point, high = (round(Fraction(bound) * rate_nano) for bound in seconds)
    return NanoEstimate(low, point, high)


def _around(point: int, seconds: Estimate, rate_nano: Fraction) -> NanoEstimate:
    """A point with the interval that the seconds have around theirs."""
    down, up = (round(Fraction(gap) * rate_nano) for gap in (seconds.point - seconds.low, seconds.high - seconds.point))
    return NanoEstimate(point - down, point, point + up)
