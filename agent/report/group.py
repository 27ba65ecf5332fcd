"""One group of the cost report as it prints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvtally.agent.commitments import UNUSED
from kvtally.agent.costing import apportioned
from kvtally.agent.price import nano_to_text, rate_text
from kvtally.agent.savings_money import HOLDING
from kvtally.agent.unit_cost import Attributed, Bounds, Shares, Spent, attributed, holding_of, unit_costs
from kvtally.agent.words import OVERHEADS, PARTS, RESOURCES, TOLD_APART

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kvtally.agent.price import Rate
    from kvtally.agent.report.spread import Covariances
    from kvtally.agent.report.sums import Sums
    from kvtally.agent.unit_cost import Tokens


def group_json(by: dict[str, str | None], sums: Sums, covariances: Covariances) -> dict[str, Any]:
    """One group as it prints; `covariances` of the calibrations that divided its time."""
    tokens = sums.counted()
    tiers = _tiers(tokens, sums.tiers)
    occupied = sums.state_ns["occupied"]
    shares = None if None in sums.laws else sums.occupied.shares_of_time(covariances, parted=sums.is_parted)
    rates = sorted({sums.rates[number] for _, _, number in sums.amounts}, key=rate_text)
    modelled = "MODELLED" if sums.is_modelled else "MEASURED"
    basis = _basis(rates)
    if sums.is_shared and basis == "MEASURED":
        basis = "MODELLED"
    return {
        "by": by,
        "tokens": {
            "prompt": tokens.prompt,
            "computed": tokens.computed,
            "cached": tiers,
            "generated": tokens.generated,
        },
        "engine_seconds": {
            **_seconds(shares, parted=sums.is_parted),
            **{state: sums.state_ns[state] / 1e9 for state in ("idle", "asleep", "warm_up", "unallocated")},
            "occupied": occupied / 1e9,
        },
        "engine_seconds_intervals": {name: _interval(shares, name) for name in PARTS},
        "prefill_share": _share(shares, occupied),
        "split_law": _law(sums.laws),
        "split_scale": _scale(sums),
        "calibrations": sorted({"not stored" if isinstance(one, str) else str(one) for one in sums.calibrations}),
        **_money(sums, tokens, tiers, shares, covariances),
        "basis": {
            "tokens": "MODELLED" if tokens.derived or tokens.by_lookups else "MEASURED",
            "tiers": "MODELLED" if sums.estimated_tokens else "MEASURED" if any(sums.tiers.values()) else None,
            "states": modelled,
            "cost": None if not sums.is_priced else basis,
            "active": None if not sums.is_priced else "MODELLED" if sums.is_modelled else basis,
            "split": None if shares is None else "MEASURED" if sums.laws == {"pool"} else "MODELLED",
        },
        "rates": [rate_text(rate) for rate in rates],
        "coverage": _coverage(sums),
    }


def _tiers(tokens: Tokens, told_apart: Mapping[str, int]) -> dict[str, int | None]:
    """Reused tokens by tier; what nobody tells apart is external."""
    outer, apart = tokens.external, sum(told_apart.values())
    if outer is None or (outer and not apart):
        return {"hbm": tokens.hbm, **dict.fromkeys(TOLD_APART), "external": outer}
    # the parts are shares, rounded hour by hour: together they may be a token more than the whole
    parts = apportioned(outer, told_apart) if apart > outer else dict(told_apart)
    return {"hbm": tokens.hbm, **parts, "external": outer - sum(parts.values())}


def _seconds(shares: Shares | None, *, parted: bool) -> dict[str, float | None]:
    if shares is None:
        # without a law nothing is known of prefill and decode, but where nothing is loaded nothing stalls
        return {"prefill": None, "decode": None, **dict.fromkeys(("stall", "store"), 0.0 if parted else None)}
    return {name: None if (part := getattr(shares, name)) is None else part.point / 1e9 for name in PARTS}


def _interval(shares: Shares | None, name: str) -> dict[str, float] | None:
    part: Bounds | None = None if shares is None else getattr(shares, name)
    return None if part is None else {"low": round(part.low) / 1e9, "high": round(part.high) / 1e9}


def _share(shares: Shares | None, occupied: int) -> dict[str, float] | None:
    if shares is None or not occupied:
        return None
    return {name: round(bound / occupied, 4) for name, bound in shares.prefill._asdict().items()}


def _law(laws: set[str | None]) -> str | None:
    """The law behind the group's division: the weakest one where it took several."""
    if None in laws:
        return None
    return next((law for law in ("two costs", "step law", "pool") if law in laws), None)


def _scale(sums: Sums) -> float | None:
    """By what prefill and decode of the step law were multiplied to fill the time that was occupied."""
    divided_ns, law_ns = sums.step_law_ns
    return round(divided_ns / law_ns, 4) if law_ns else None


def _basis(rates: Sequence[Rate]) -> str:
    """ASSUMED if any of the money is; what is charged as 0, inside another price, decides only where it is alone."""
    deciding = [rate for rate in rates if rate.price_nano] or rates
    return "ASSUMED" if any(rate.basis == "ASSUMED" for rate in deciding) or not deciding else "MEASURED"


def _coverage(sums: Sums) -> float | None:
    """Of the time from each replica's first to its last interval, what was covered."""
    expected = sum(high - low for low, high in sums.spans.values())
    return round(min(1.0, sums.covered_ns / expected), 6) if expected else None


def _money(
    sums: Sums,
    tokens: Tokens,
    tiers: Mapping[str, int | None],
    shares: Shares | None,
    covariances: Covariances,
) -> dict[str, Any]:
    """The group's cost, and what a million tokens cost of it, fully loaded and active."""
    if not sums.is_priced:
        return {"cost": None, "orphan_holding": None, "cost_per_million": None}
    active = _active(sums, shares, covariances)
    loaded = _loaded(sums, shares, active)
    _, orphan = holding_of(loaded.holding, tiers)
    known = attributed(loaded, tiers)
    return {
        "cost": {**_cost(sums), "attributed": None if known is None else _attributed_json(known)},
        "orphan_holding": nano_to_text(orphan),
        "cost_per_million": {
            "fully_loaded": unit_costs(tokens, tiers, loaded, outer=sums.is_outer),
            "active": unit_costs(tokens, tiers, active, outer=sums.is_outer),
        },
    }


def _active(sums: Sums, shares: Shares | None, covariances: Covariances) -> Spent:
    """What occupied time cost: each replica's own price times its own division, so that unlike replicas add up."""
    total, held = _spent(sums, {"occupied"})
    if shares is None or not sums.state_ns["occupied"]:
        return Spent(total, None, held)
    return Spent(total, sums.occupied.shares_of_money(covariances, parted=sums.is_parted), held)


def _loaded(sums: Sums, shares: Shares | None, active: Spent) -> Spent:
    """The same with all overhead, which goes pro rata to occupied engine-seconds, never per token (METHOD 2.2)."""
    total, held = _spent(sums, None)
    if shares is None or active.shares is None:
        return Spent(total, None, held)
    overhead = total - sum(held.values()) - (active.total - sum(active.holding.values()))
    occupied = sums.state_ns["occupied"]
    points = apportioned(overhead, sums.occupied.time)

    def loaded(name: str, money: Bounds, time: Bounds) -> Bounds:
        per_ns = overhead / occupied
        return Bounds(money.low + per_ns * time.low, money.point + points[name], money.high + per_ns * time.high)

    own = active.shares
    return Spent(
        total,
        Shares(
            loaded("prefill", own.prefill, shares.prefill),
            loaded("decode", own.decode, shares.decode),
            None if own.stall is None or shares.stall is None else loaded("stall", own.stall, shares.stall),
            None if own.store is None or shares.store is None else loaded("store", own.store, shares.store),
        ),
        held,
    )


def _spent(sums: Sums, states: set[str] | None) -> tuple[int, dict[str, int]]:
    """Nano-units in these states (None: in any), and of them what holding KV cost, by tier."""
    total, held = 0, dict.fromkeys(HOLDING.values(), 0)
    for (resource, state, _), amount in sums.amounts.items():
        if states is None or state in states:
            total += amount
            if resource in HOLDING:
                held[HOLDING[resource]] += amount
    return total, held


def _cost(sums: Sums) -> dict[str, Any]:
    by_resource = dict.fromkeys(RESOURCES, 0)
    overhead = dict.fromkeys(OVERHEADS, 0)
    for (resource, state, _), amount in sums.amounts.items():
        by_resource[resource if state != UNUSED else "unused_commitment"] += amount
        if state in overhead:
            overhead[state] += amount
    texts: dict[str, Any] = {"total": nano_to_text(sum(by_resource.values()))}
    texts |= {resource: nano_to_text(amount) for resource, amount in by_resource.items()}
    texts["of_which"] = {state: nano_to_text(amount) for state, amount in overhead.items()}
    return texts


def _attributed_json(known: Attributed) -> dict[str, Any]:
    return {
        "input_computed": nano_to_text(known.input_computed),
        "input_cached": {tier: nano_to_text(bounds.point) for tier, bounds in known.input_cached.items()},
        "orphan_holding": nano_to_text(known.orphan_holding),
        "orphan_copies": nano_to_text(known.orphan_copies),
        "output": nano_to_text(known.output),
    }
