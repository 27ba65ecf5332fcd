"""Whose work the saving is: each tier behind those before it, last in, and by Shapley (METHOD 3, per tier)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvtally.agent.attribution import last_in, serving, shapley
from kvtally.agent.explain.arithmetic import Worked, rounded
from kvtally.agent.explain.figure import AVOIDED, places_of, reach_lines, spans
from kvtally.agent.savings import EXACTLY_NOTHING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from kvtally.agent.savings import Seconds, TierSeconds

SUBSTITUTES = 0.25  # of a tier's share, by which serving and Shapley differ where tiers stand in for each other
_UNTIMED = "nothing tells how long loading and storing took: what the outer tier is worth alone is not known"
_INCLUSIVE = (
    "inclusive stores, ASSUMED: without HBM the outer tiers would have served HBM's hits too, at their own speed"
)


def tiers_json(seconds: Seconds, loading: str, kv_bytes: float | None) -> dict[str, Any] | None:
    """The three attributions of a group with an outer tier, net; None for one without.

    `kv_bytes` of a token tell the bandwidth behind the seconds; None where the models differ.
    """
    outer = {name: tier for name, tier in seconds.tiers.items() if name != "hbm"}
    if not outer:
        return None
    name = next(iter(outer)) if len(outer) == 1 else "outer"
    lines = Worked()
    places = places_of(seconds.avoided.point)
    about = {"unit": "s", "basis": "MODELLED"}
    lines.given("W_hbm", AVOIDED["hbm"], seconds.tiers["hbm"].avoided.point, places, **about)
    gained = sum(tier.avoided.point for tier in outer.values())
    lines.given("W_out", f"avoided by those of {' and '.join(outer)}, behind HBM", gained, places, **about)
    if seconds.stall is None or seconds.store is None:
        return {"rows": lines.as_json(), "attributions": None, "notes": [_UNTIMED], "substitutes": None}
    lines.given("stall", "for which loading held the engine up", seconds.stall.point, places, **about)
    lines.given("store", "that storing took of it", seconds.store.point, places, **about)
    tokens = sum(tier.tokens for tier in outer.values())
    counted = {"unit": "tokens", "basis": "MEASURED"}
    lines.given("R_hbm", "tokens reused from HBM", seconds.tiers["hbm"].tokens, 0, **counted)
    lines.given("R_out", f"tokens loaded from {' and '.join(outer)}", tokens, 0, **counted)
    unknown = []
    if len(outer) > 1:
        unknown.append(
            f"one clock times the loads of {' and '.join(outer)}: their bandwidths are not told apart, so last-in and "
            "Shapley take them as one"
        )
    if tokens and loading != "asynchronous" and not seconds.stall.point:
        unknown.append("nothing tells how long the loads took: what the outer tier is worth alone is not known")
        return {"rows": lines.as_json(), "attributions": None, "notes": unknown, "substitutes": None}
    _values(lines, places, has_loads=bool(tokens), kv_bytes=kv_bytes)
    found = attributions(("hbm", name), _value_of(lines, name))
    apart = _apart(found["serving"], found["shapley"])
    return {
        "rows": lines.as_json(),
        "attributions": {
            how: {tier: rounded(part, places) for tier, part in own.items()} for how, own in found.items()
        },
        "notes": [_INCLUSIVE, *unknown],
        "substitutes": apart,
    }


def gained_by(seconds: Seconds) -> dict[str, float]:
    """Seconds that HBM's hits ("hbm") and those of the outer tiers ("out") avoided, of those that had any."""
    outer = [tier for name, tier in seconds.tiers.items() if name != "hbm"]
    gained = {"hbm": seconds.tiers["hbm"].avoided.point} if seconds.tiers["hbm"].tokens else {}
    if any(tier.tokens for tier in outer):
        gained["out"] = sum(tier.avoided.point for tier in outer)
    return gained if outer else {}


def tier_lines(seconds: Seconds, known: Mapping[str, str], sds: Mapping[str, str]) -> Worked:
    """The 90 % intervals of the tiers, from those of all and the standard deviations `sds` of W_hbm and W_out."""
    lines = Worked(known)
    places = places_of(seconds.avoided.point)
    for side, sd in sds.items():
        reach_lines(lines, f"_{side}", sd, places)
    served = [name for name, tier in seconds.tiers.items() if name != "hbm" and tier.tokens]
    for name, tier in seconds.tiers.items():
        if name != "hbm" and tier.net is not None and (tier.tokens or tier.net != EXACTLY_NOTHING):
            _net_lines(lines, name, tier, places, is_alone=len(served) <= 1)
    return lines


def _net_lines(lines: Worked, name: str, tier: TierSeconds, places: int, *, is_alone: bool) -> None:
    """The net of an outer tier, and from where to where; among several it bears its tokens' share of the costs."""
    gain = "W_out" if "W_out_low" in lines.printed() and lines["W_out"] else ""
    net, shares = "W_out - stall - store", {}
    if not is_alone:
        lines.given(f"W_{name}", f"of W_out, by those of {name}", tier.avoided.point, places, unit="s")
        lines.given(f"R_{name}", f"of R_out, from {name}", tier.tokens, 0, unit="tokens")
        cost = f"R_{name} / R_out * "
        net, shares = f"W_{name} - {cost}(stall + store)", {"gain_share": f"W_{name} / W_out * ", "cost_share": cost}
    down, up = spans(lines, gain, **shares)
    lines.result(f"net_{name}", f"{name}: net", net, places, unit="s", basis="MODELLED")
    lines.result(f"low_{name}", f"{name}: net, from", f"net_{name} - {down}", places, unit="s")
    lines.result(f"high_{name}", f"{name}: net, to", f"net_{name} + {up}", places, unit="s")


def attributions(order: tuple[str, ...], value: Callable[[frozenset[str]], float]) -> dict[str, dict[str, float]]:
    """Parts by tier under each way of sharing."""
    return {
        "serving": serving(order, value),
        "last_in": last_in(order, value),
        "shapley": shapley(order, value),
    }


def _values(lines: Worked, places: int, *, has_loads: bool, kv_bytes: float | None) -> None:
    """Worth v of each set of tiers, and the three ways of sharing as a calculator does them for two tiers."""
    if has_loads:
        lines.result("l", "engine-seconds that a loaded token held it up", "stall / R_out", None, unit="s")
        if kv_bytes and lines["l"]:
            lines.given("kappa", "KV of a token", kv_bytes, 0, unit="B", basis="MEASURED")
            lines.result("b", "so the loads ran at", "kappa / l / 1e9", None, unit="GB/s", basis="MODELLED")
    else:
        lines.given("l", "a loaded token would hold it up: none was loaded, so unknown and left out", 0.0, 0, unit="s")
    about = {"unit": "s", "basis": "MODELLED"}
    lines.result("v_hbm", "net with HBM alone", "W_hbm", places, **about)
    lines.result(
        "v_out", "net with the outer tier alone", "W_hbm + W_out - l * (R_hbm + R_out) - store", places, **about
    )
    lines.result("v_all", "net with both", "W_hbm + W_out - stall - store", places, **about)
    lines.result("last_hbm", "HBM, last in", "v_all - v_out", places, **about)
    lines.result("last_out", "outer, last in: also what serving gives it", "v_all - v_hbm", places, **about)
    lines.result("shapley_hbm", "HBM, Shapley", "(v_hbm + v_all - v_out) / 2", places, **about)
    lines.result("shapley_out", "outer, Shapley", "(v_out + v_all - v_hbm) / 2", places, **about)


def _value_of(lines: Worked, name: str) -> Callable[[frozenset[str]], float]:
    values = {
        frozenset[str](): 0.0,
        frozenset({"hbm"}): lines["v_hbm"],
        frozenset({name}): lines["v_out"],
        frozenset({"hbm", name}): lines["v_all"],
    }
    return values.__getitem__


def _apart(one: Mapping[str, float], other: Mapping[str, float]) -> bool:
    """Whether two ways of sharing differ by more than SUBSTITUTES of what either gives a tier."""
    return any(abs(one[tier] - other[tier]) > SUBSTITUTES * max(abs(one[tier]), abs(other[tier])) for tier in one)
