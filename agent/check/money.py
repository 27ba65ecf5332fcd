"""Checks of money: cost per million tokens, cost per hour, and what each tier's reuse is worth. Pure."""

from __future__ import annotations

from decimal import Decimal
from typing import TYPE_CHECKING, Any

from kvtally.agent.check.verdict import Bound, Check, Found, amount_text, is_unheld, money_text, said, worst
from kvtally.agent.words import REFUSED

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from kvtally.agent.check.verdict import Asked, Budget

_WORDS = {
    "total": "tokens",
    "input": "input tokens",
    "input_computed": "computed input tokens",
    "output": "output tokens",
}
_COUNTED_IN = {
    "total": ("prompt", "generated"),
    "input": ("prompt",),
    "input_computed": ("computed",),
    "output": ("generated",),
}
_UNPRICED = ("no_rate", "replica_mapping_unknown")
_UNDIVIDED = ("prefill_elsewhere", "decode_elsewhere", "split_unknown", "step_law_lacking", "tokens_unknown")
_NINE_PLACES, _SIX_PLACES = Decimal("1e-9"), Decimal("1e-6")


def budgets(asked: Asked, cost: Mapping[str, Any]) -> Iterator[Check]:
    """Cost per million tokens of every group against every budget."""
    for group in cost["groups"] if asked.budgets else ():
        if is_unheld(group):
            yield _unheld(group, cost)
            continue
        for budget in asked.budgets:
            yield _budget(asked.view, budget, group, cost)


def _unheld(group: Mapping[str, Any], cost: Mapping[str, Any]) -> Check:
    by = group["by"]
    if group["cost"] is None:
        return Check("budget", by, "unknown", _unpriced(cost, by))
    total, currency = group["cost"]["total"], cost["currency"]
    message = (
        f"GPUs that no engine held cost {money_text(total)} {currency}, with no token to bear it: it is in no cost "
        "per million here"
    )
    hint = "--by '' has it in one figure with all the rest, and --budget-hour counts it"
    found = Found(total, currency)
    return Check("budget", by, "ok", message, "", found, None, group["basis"]["cost"], hint, warning=True)


def _unpriced(cost: Mapping[str, Any], by: Mapping[str, str | None]) -> str:
    return f"no cost without a price: {said(cost['findings'], _UNPRICED, by) or 'a price is missing'}"


def _budget(view: str, budget: Budget, group: Mapping[str, Any], cost: Mapping[str, Any]) -> Check:
    by, currency, units = group["by"], cost["currency"], group["cost_per_million"]
    subject = "" if budget.tokens == "total" else budget.tokens
    bound = Bound("at_most", amount_text(budget.amount))
    if units is None:
        return Check("budget", by, "unknown", _unpriced(cost, by), subject, None, bound)
    point, interval = units[view][budget.tokens], units[view]["intervals"].get(budget.tokens)
    if point is None:
        return Check("budget", by, "unknown", _uncounted(budget, group, cost), subject, None, bound)
    low, high = (interval["low"], interval["high"]) if interval else (None, None)
    found = Found(point, f"{currency} per million {_WORDS[budget.tokens]}", low, high)
    is_over, straddles = Decimal(point) > budget.amount, False
    message = (
        f"{money_text(point)} {found.unit}, {view.replace('_', ' ')}, is {'above' if is_over else 'within'} "
        f"{money_text(budget.amount)}"
    )
    if low is not None and high is not None and Decimal(low) <= budget.amount < Decimal(high):
        straddles = True
        span = f"{money_text(low)} to {money_text(high)}"
        message += f"; its 90 % interval, {span}, holds the bound, so it may be {'within' if is_over else 'above'} it"
    basis = _basis_of(view, budget, group)
    if is_over:
        return Check("budget", by, "failed", message, subject, found, bound, basis, _parts(view, group, currency))
    return Check("budget", by, "ok", message, subject, found, bound, basis, warning=straddles)


def _uncounted(budget: Budget, group: Mapping[str, Any], cost: Mapping[str, Any]) -> str:
    """Why there is money and no cost per million."""
    counts = [group["tokens"][name] for name in _COUNTED_IN[budget.tokens]]
    words = _WORDS[budget.tokens]
    if None not in counts and not sum(counts):
        return f"no {words} in the window, so nothing that a cost per million could be of"
    why = said(cost["findings"], _UNDIVIDED, group["by"])
    what = f"how many {words} there were is not told" if None in counts else f"what {words} cost is not told apart"
    return f"{what}: {why}" if why else what


def _basis_of(view: str, budget: Budget, group: Mapping[str, Any]) -> str | None:
    """The weakest of what the figure stands on: its price, its tokens, and what was divided to get it."""
    basis = group["basis"]
    parts = [basis["cost"], basis["tokens"]]
    parts += [basis["active"]] if view == "active" else []
    parts += [] if budget.tokens == "total" else [basis["split"]]
    return worst(parts)


def _parts(view: str, group: Mapping[str, Any], currency: str) -> str:
    """Where to look when a budget is exceeded."""
    hint = "`kvtally cost` tells its parts"
    nobody = sum(Decimal(amount) for amount in group["cost"]["of_which"].values())
    if view == "active" or not nobody:
        return hint
    total = money_text(group["cost"]["total"])
    return f"{hint}; of {total} {currency}, {money_text(nobody)} served nobody (idle, asleep, warm-up, unallocated)"


def hourly(asked: Asked, cost: Mapping[str, Any]) -> Iterator[Check]:
    """What an hour of covered time costs, all groups together, against its bound."""
    limit = asked.budget_hour
    if limit is None:
        return
    bound, currency = Bound("at_most", amount_text(limit)), cost["currency"]
    seconds = Decimal(str(cost["window"]["covered_seconds"]))
    priced = [group for group in cost["groups"] if group["cost"] is not None]
    if not seconds or not priced:
        message = _unpriced(cost, {}) if seconds else "no time is covered"
        yield Check("hourly", {}, "unknown", message, "", None, bound)
        return
    total = sum(Decimal(group["cost"]["total"]) for group in priced)
    point = (total * 3600 / seconds).quantize(_NINE_PLACES)
    found = Found(amount_text(point), f"{currency} per hour")
    basis = worst(group["basis"]["cost"] for group in priced)
    # charges are whole nano-units, and those of a short window may be a few of them off what an hour is paid
    near = point.quantize(_SIX_PLACES)
    message = f"{money_text(near)} {found.unit} is {'above' if near > limit else 'within'} {money_text(limit)}"
    lacks = len(priced) < len(cost["groups"])
    if near > limit:
        message += ", even without what has no price" if lacks else ""
        yield Check("hourly", {}, "failed", message, "", found, bound, basis, "`kvtally cost` tells its parts")
    elif lacks:
        message += f", but not all of it is known: {_unpriced(cost, {})}"
        yield Check("hourly", {}, "unknown", message, "", found, bound, basis)
    else:
        yield Check("hourly", {}, "ok", message, "", found, bound, basis)


def savings(answer: Mapping[str, Any]) -> Iterator[Check]:
    """What each tier's reuse is worth, net: a loss fails where the whole interval is one."""
    for group in answer["groups"]:
        if group["status"] in REFUSED or not group["tiers"]:
            reasons: Sequence[str] = group["reasons"] or ["what was seen cannot carry one"]
            more = f"`kvtally savings` tells all {len(reasons)} reasons" if len(reasons) > 1 else ""
            yield Check("savings", group["by"], "unknown", f"no figure: {reasons[0]}", "", hint=more)
            continue
        for name, tier in group["tiers"].items():
            yield _tier(group, name, tier, answer["currency"])


def _tier(group: Mapping[str, Any], name: str, tier: Mapping[str, Any], currency: str) -> Check:
    net, unit, basis = tier["net"], currency, group["basis"]["money"]
    if net is None:  # seconds alone, where a price is missing
        net, unit, basis = tier["net_engine_seconds"], "engine-seconds", group["basis"]["engine_seconds"]
    if net is None:  # nothing tells what loading and storing took
        return Check("savings", group["by"], "unknown", f"no figure: {tier['reasons'][0]}", name)
    low, point, high = (Decimal(str(net[end])) for end in ("low", "point", "high"))
    found, bound = Found(net["point"], unit, net["low"], net["high"]), Bound("at_least", 0)
    told = f"net {money_text(point)} {unit}"
    if low != high:
        told += f" ({money_text(low)} to {money_text(high)})"
    if high < 0:
        message = f"{told}: reuse by {name} costs more than it saves"
        if tier["holding"] is not None and Decimal(tier["holding"]):
            message += f"; holding it takes {money_text(tier['holding'])} {currency}"
        if tier["status"] == "lower_bound":
            message += "; requests were preempted, and what they computed again is in no counter"
        hint = "`kvtally savings --explain` follows it down to the counters"
        return Check("savings", group["by"], "failed", message, name, found, bound, basis, hint)
    if low < 0 or low == 0 < high:
        message = f"{told}: not proven, its interval holds zero{' and a loss is likelier' if point < 0 else ''}"
        return Check("savings", group["by"], "ok", message, name, found, bound, basis, warning=True)
    return Check("savings", group["by"], "ok", told, name, found, bound, basis)
