"""What a million tokens cost: tokens of a group, and the group's money over them (METHOD 2.5). Pure."""

from __future__ import annotations

from fractions import Fraction
from math import hypot
from typing import TYPE_CHECKING, Any, NamedTuple

from kvtally.agent.costing import apportioned
from kvtally.agent.identity import BY_SOURCE_SINCE, version_of
from kvtally.agent.lookup_tiers import BY_LOOKUPS
from kvtally.agent.price import nano_to_text
from kvtally.agent.words import OUTER

if TYPE_CHECKING:
    from collections.abc import Mapping


_NAMES = ("prompt_tokens", "computed_tokens", "hbm_tokens", "external_tokens", "generated_tokens")
Units = tuple[str | None, str | None, str | None]  # low, point, high


class Tokens(NamedTuple):
    """Tokens of a group; None where no counter tells.

    derived     the engine does not count computed tokens: prompt less what its lookups found
    by_lookups  it counts cached tokens as one: those of HBM are its part of what lookups found
    """

    prompt: int | None
    computed: int | None
    hbm: int | None
    external: int | None
    generated: int | None
    derived: bool
    by_lookups: bool = False


class TokenSums:
    """Adds up tokens; one part that is unknown makes its sum unknown."""

    def __init__(self) -> None:
        self._sums: dict[str, int | None] = dict.fromkeys(_NAMES, 0)
        self._derived = self._by_lookups = False

    def add(self, work: Mapping[str, int | None], version: str | None) -> None:
        """Add what a replica counted in a period."""
        if work.get("computed_tokens") is None:
            work = self._worked_out(work, version)
        self._by_lookups |= bool(work.get(BY_LOOKUPS))
        sums = self._sums
        for name in _NAMES:
            value, total = work.get(name), sums[name]
            sums[name] = None if value is None or total is None else total + value

    def _worked_out(self, work: Mapping[str, int | None], version: str | None) -> Mapping[str, int | None]:
        """Computed tokens of an engine that does not count them: those that its lookups did not find.

        Where nobody tells the version the families do: an engine that counts tokens by source tells them all.
        """
        prompt, hits = work.get("prompt_tokens"), work.get("prefix_hit_tokens")
        known = version_of(version)
        counts = _by_source(work) if known is None else known >= BY_SOURCE_SINCE
        if prompt is None or hits is None or counts:
            return work
        outer = work.get("external_hit_tokens") or 0
        if hits + outer > prompt:
            return work
        self._derived = True
        return {**work, "computed_tokens": prompt - hits - outer, "hbm_tokens": hits, "external_tokens": outer}

    def tokens(self) -> Tokens:
        """The sums."""
        prompt, computed, hbm, external, generated = self._sums.values()
        return Tokens(prompt, computed, hbm, external, generated, self._derived, self._by_lookups)


def _by_source(work: Mapping[str, int | None]) -> bool:
    return any(work.get(name) is not None for name in ("computed_tokens", "hbm_tokens", "external_tokens"))


class Bounds(NamedTuple):
    """A figure with its 90 % interval."""

    low: float
    point: int
    high: float


class Shares(NamedTuple):
    """What occupied time, or its money, went into; stall and store None where they are inside prefill and decode."""

    prefill: Bounds
    decode: Bounds
    stall: Bounds | None
    store: Bounds | None


class Spent(NamedTuple):
    """Nano-units: a total, what the engine's time in it went into, and what holding KV cost, by tier.

    shares      None where prefill and decode cannot be told apart
    """

    total: int
    shares: Shares | None
    holding: Mapping[str, int]


class Attributed(NamedTuple):
    """A total by the tokens that bear it, in nano-units; all together they are the total.

    cached          by tier, what loading, storing and holding cost that tier's tokens, with its 90 % interval
    orphan_holding  what holding cost a tier that served no token
    orphan_copies   what loading and storing cost where no token was served
    """

    input_computed: int
    input_cached: dict[str, Bounds]
    orphan_holding: int
    orphan_copies: int
    output: int


def holding_of(held: Mapping[str, int], tiers: Mapping[str, int | None]) -> tuple[dict[str, int], int]:
    """What holding cost by the tier that bears it, and what none does.

    A tier that served no token lets those bear it that nobody tells apart, if they served any.
    """
    own = {tier: held.get(tier, 0) for tier in OUTER if tiers.get(tier)}
    rest = sum(held.values()) - sum(own.values())
    if "external" in own:
        return own | {"external": own["external"] + rest}, 0
    return own, rest


def attributed(spent: Spent, tiers: Mapping[str, int | None]) -> Attributed | None:
    """A total by the tokens that bear it; None where a part of it is unknown."""
    shares = spent.shares
    if shares is None or shares.stall is None or shares.store is None:
        return None
    own, orphan = holding_of(spent.holding, tiers)
    counts = {tier: tiers[tier] or 0 for tier in own}
    stall, store = (apportioned(part.point, counts) if own else {} for part in (shares.stall, shares.store))
    cached = {"hbm": Bounds(0, 0, 0)} if tiers.get("hbm") else {}  # it takes room only, which is in the batch size
    for tier, held in own.items():
        share = counts[tier] / sum(counts.values())
        point = stall[tier] + store[tier] + held
        down = share * hypot(shares.stall.point - shares.stall.low, shares.store.point - shares.store.low)
        up = share * hypot(shares.stall.high - shares.stall.point, shares.store.high - shares.store.point)
        cached[tier] = Bounds(point - down, point, point + up)
    copies = 0 if own else shares.stall.point + shares.store.point
    return Attributed(shares.prefill.point, cached, orphan, copies, shares.decode.point)


def unit_costs(tokens: Tokens, tiers: Mapping[str, int | None], spent: Spent, *, outer: bool) -> dict[str, Any]:
    """Costs per million tokens, with the intervals of what is estimated; `outer`: an outer tier is at work."""
    both = None if tokens.prompt is None or tokens.generated is None else tokens.prompt + tokens.generated
    prefill = decode = entered = None
    if spent.shares is not None:
        prefill, decode = spent.shares.prefill, spent.shares.decode
        # whatever is not decode went into the prompts: prefill, loading, storing and holding
        entered = Bounds(spent.total - decode.high, spent.total - decode.point, spent.total - decode.low)
    estimates = {
        "input_computed": _units(prefill, tokens.computed),
        "input": _units(entered, tokens.prompt),
        "output": _units(decode, tokens.generated),
    }
    known = attributed(spent, tiers)
    cached: dict[str, Units] = {}
    if tokens.hbm:
        cached["hbm"] = _units(Bounds(0, 0, 0), tokens.hbm)
    if outer:
        served = [tier for tier in OUTER if tiers.get(tier)] or ["external"]
        cached |= {tier: _units(known.input_cached.get(tier) if known else None, tiers.get(tier)) for tier in served}
    return {
        "total": _unit(spent.total, both),
        "input_computed": estimates["input_computed"][1],
        "input_cached": {tier: units[1] for tier, units in cached.items()},
        "input": estimates["input"][1],
        "output": estimates["output"][1],
        "intervals": {
            **{name: _interval(units) for name, units in estimates.items()},
            "input_cached": {tier: _interval(units) for tier, units in cached.items() if tier != "hbm"},
        },
    }


def _units(amount: Bounds | None, tokens: int | None) -> Units:
    low, point, high = (None, None, None) if amount is None else (_unit(each, tokens) for each in amount)
    return low, point, high


def _interval(units: Units) -> dict[str, str] | None:
    low, point, high = units
    return None if low is None or point is None or high is None else {"low": low, "high": high}


def _unit(amount_nano: float | None, tokens: int | None) -> str | None:
    if amount_nano is None or not tokens:
        return None
    return nano_to_text(round(Fraction(amount_nano) * 10**6 / tokens))
