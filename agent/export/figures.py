"""The figures that exporters carry, out of a ledger at one instant, by the functions that answer the CLI."""

from __future__ import annotations

from decimal import Decimal
from typing import TYPE_CHECKING, Any, NamedTuple

from kvtally.agent.accounts import Window
from kvtally.agent.export.counters import COUNTED, EVER_NS, LABELS, LENGTH, counters_of, labels_of
from kvtally.agent.export.opencost import opencost_figures
from kvtally.agent.ledger.columns import HOUR_NS
from kvtally.agent.ledger.totals import totals
from kvtally.agent.report import cost_report
from kvtally.agent.savings_report import savings_report

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from kvtally.agent.accounts import Payment
    from kvtally.agent.export.counters import Counter
    from kvtally.agent.ledger.read import LedgerReader, Target
    from kvtally.agent.rates import RateBook
    from kvtally.collectors.base import Kind

_VIEWS = ("fully_loaded", "active")
_PRICED = ("total", "input", "input_computed", "output")
_BOUNDS = ("low", "point", "high")
_NOBODY = "unallocated"  # the model of GPUs that no engine holds


class Figure(NamedTuple):
    """One value of a metric (kvtally.agent.export.metrics) with its labels."""

    metric: str
    labels: Mapping[str, str]
    value: float


class Snapshot(NamedTuple):
    """All figures of a ledger at one instant.

    start_ns, end_ns   what the ledger spans, from the hour in which it begins, which no pruning moves; counters begin
                       with the first
    """

    start_ns: int
    end_ns: int
    figures: tuple[Figure, ...]


def snapshot(
    reader: LedgerReader, book: RateBook, payment: Payment, windows: Mapping[str, int], *, opencost: bool = False
) -> Snapshot | None:
    """Work out every figure; None for a ledger without intervals. What is unknown is left out.

    windows    lengths in nanoseconds by name ("1h")
    opencost   OpenCost's gauges too, of the first window
    """
    extent = reader.extent()
    if extent is None:
        return None
    start_ns = extent[0] // HOUR_NS * HOUR_NS
    figures: list[Figure] = []
    targets = reader.targets()
    for kind in COUNTED:
        figures += _counted(reader, kind, start_ns, targets)
    figures += _since_ever(reader, extent, book, payment)
    for name, length_ns in windows.items():
        window = Window(max(extent[0], extent[1] - length_ns), extent[1])
        figures += _windowed(reader, name, window, book, payment)
    if opencost and windows:
        # its labels tell no window: the first one
        window = Window(max(extent[0], extent[1] - next(iter(windows.values()))), extent[1])
        answer = cost_report(reader, window, ("model", "namespace"), book, payment).as_json()
        figures += [Figure(*one) for one in opencost_figures(answer)]
    return Snapshot(start_ns, extent[1], tuple(figures))


def _counted(reader: LedgerReader, kind: Kind, start_ns: int, targets: Mapping[int, Target]) -> Iterator[Figure]:
    """The counters of a kind, those of targets of one name and labels together: a new version is no new series."""
    sums: dict[tuple[Counter, tuple[tuple[str, str], ...]], int] = {}
    for target_id, total in totals(reader, kind, start_ns, EVER_NS).items():
        own = tuple(labels_of(targets[target_id]).items())
        # target by target: a version that does not tell where prompts come from keeps its tokens beside one that does
        for counter in counters_of(kind, total.counted):
            value = total.length_ns if counter.quantity == LENGTH else total.counted[counter.quantity]
            key = (counter, (*own, *counter.labels))
            sums[key] = sums.get(key, 0) + (value or 0)
    for (counter, labels), value in sorted(sums.items(), key=lambda item: item[0][1]):
        yield Figure(counter.metric, dict(labels), value / counter.divisor if counter.divisor != 1 else value)


def _since_ever(reader: LedgerReader, extent: tuple[int, int], book: RateBook, payment: Payment) -> Iterator[Figure]:
    """Cost, engine-seconds by state and cached tokens of the whole ledger, by replica."""
    # from the beginning of time: GPUs may have been paid for before the first engine interval
    answer = cost_report(reader, Window(0, extent[1]), ("replica", *LABELS), book, payment).as_json()
    currency = answer["currency"]
    for group in answer["groups"]:
        labels = _group_labels(group["by"])
        yield from _cost(group["cost"], labels, currency)
        yield from _states(group["engine_seconds"], labels)
        for tier, tokens in group["tokens"]["cached"].items():
            if tokens is not None:
                yield Figure("cached_tokens", {**labels, "tier": tier}, tokens)


def _states(seconds: Mapping[str, float | None], labels: Mapping[str, str]) -> Iterator[Figure]:
    """Engine-seconds by state; what no law divides is undivided, so that the states are all of the time."""
    divided = {name: value for name, value in seconds.items() if name != "occupied"}
    if divided["prefill"] is None:
        divided = {**divided, "stall": None, "store": None, "undivided": seconds["occupied"]}
    for state, value in divided.items():
        if value is not None:
            yield Figure("ledger_seconds", {**labels, "state": state}, value)


def _cost(cost: Mapping[str, Any] | None, labels: Mapping[str, str], currency: str) -> Iterator[Figure]:
    if cost is None:  # no rate
        return
    for resource, amount in cost.items():
        if isinstance(amount, str) and resource != "total":
            yield Figure("ledger_cost", {**labels, "resource": resource, "currency": currency}, float(amount))
    left = Decimal(cost["total"])
    for state, amount in cost["of_which"].items():
        left -= Decimal(amount)
        yield Figure("ledger_state_cost", {**labels, "state": state, "currency": currency}, float(amount))
    yield Figure("ledger_state_cost", {**labels, "state": "occupied", "currency": currency}, float(left))


def _windowed(reader: LedgerReader, name: str, window: Window, book: RateBook, payment: Payment) -> Iterator[Figure]:
    """Figures of one window by model and labels."""
    cost = cost_report(reader, window, LABELS, book, payment).as_json()
    for group in cost["groups"]:
        labels = {**_group_labels(group["by"]), "window": name}
        yield from _unit_costs(group, labels, cost["currency"])
        hours = cost["window"]["covered_seconds"] / 3600
        if group["cost"] is not None and hours:
            total = float(group["cost"]["total"])
            yield Figure("cost_per_hour", {**labels, "currency": cost["currency"]}, total / hours)
        tokens = group["tokens"]
        if tokens["prompt"] and tokens["computed"] is not None:
            yield Figure("reuse_ratio", labels, 1 - tokens["computed"] / tokens["prompt"])
        if group["coverage"] is not None:
            yield Figure("coverage", labels, group["coverage"])
    yield from _findings(cost["findings"], name)
    savings = savings_report(reader, window, LABELS, book, payment).as_json()
    for group in savings["groups"]:
        yield from _savings(group, {**_group_labels(group["by"]), "window": name}, savings["currency"])


def _unit_costs(group: Mapping[str, Any], labels: Mapping[str, str], currency: str) -> Iterator[Figure]:
    for view in _VIEWS if group["cost_per_million"] is not None else ():
        prices = group["cost_per_million"][view]
        about = {**labels, "view": view, "currency": currency, "basis": group["basis"]["cost"] or ""}
        for tokens in _PRICED:
            if prices[tokens] is not None:
                yield Figure("cost_per_million", {**about, "tokens": tokens}, float(prices[tokens]))
        for tier, price in (prices["input_cached"] or {}).items():
            if price is not None:
                yield Figure("cost_per_million", {**about, "tokens": f"input_cached_{tier}"}, float(price))


def _savings(group: Mapping[str, Any], labels: Mapping[str, str], currency: str) -> Iterator[Figure]:
    yield Figure("savings_status", {**labels, "status": group["status"]}, 1)
    seconds = {"gross": group["avoided_engine_seconds"], "net": group["net_engine_seconds"]}
    for measure, estimate in seconds.items():
        for bound in _BOUNDS if estimate is not None else ():
            yield Figure("savings_seconds", {**labels, "measure": measure, "bound": bound}, estimate[bound])
    for measure in ("gross", "net", "realised"):
        amount = group[measure]
        for bound in _BOUNDS if amount is not None else ():
            about = {**labels, "measure": measure, "bound": bound, "currency": currency}
            yield Figure("savings_amount", about, float(amount[bound]))
    for tier, told in group["tiers"].items():
        net = told["net_engine_seconds"]
        for bound in _BOUNDS if net is not None else ():
            yield Figure("tier_savings_seconds", {**labels, "tier": tier, "bound": bound}, net[bound])


def _findings(findings: Sequence[Mapping[str, str]], window: str) -> Iterator[Figure]:
    counts: dict[tuple[str, str], int] = {}
    for one in findings:
        counts[one["kind"], one["severity"]] = counts.get((one["kind"], one["severity"]), 0) + 1
    for (kind, severity), count in sorted(counts.items()):
        yield Figure("findings", {"kind": kind, "severity": severity, "window": window}, count)


def _group_labels(by: Mapping[str, str | None]) -> dict[str, str]:
    labels = {name: value or "" for name, value in by.items()}
    return labels if any(value is not None for value in by.values()) else {**labels, "model": _NOBODY}
