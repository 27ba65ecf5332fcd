"""What the answers of the ledger share: windows, groups, and findings as they print."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from kvtally.agent.accounts import Window
from kvtally.agent.finding import Finding, utc_text
from kvtally.agent.price import DAY_NS, HOUR_NS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from kvtally.agent.facts import Facts

DIMENSIONS = ("model", "replica", "cluster", "namespace", "tenant", "hour", "day")

Key = tuple[tuple[str, str | None], ...]
_T = TypeVar("_T")


def window_json(window: Window | None, covered_ns: int) -> dict[str, Any]:
    """A window as it prints; None is a ledger without any interval."""
    return {
        "start": None if window is None else utc_text(window.start_ns),
        "end": None if window is None else utc_text(window.end_ns),
        "covered_seconds": covered_ns / 1e9,
    }


def in_order(groups: Mapping[Key, _T]) -> list[tuple[Key, _T]]:
    """Groups by their names, what has none last."""
    return sorted(groups.items(), key=lambda item: [value or "\uffff" for _, value in item[0]])


def finding_json(finding: Finding) -> dict[str, str]:
    """One finding as it prints."""
    return {
        "kind": finding.kind,
        "severity": finding.severity,
        "target": finding.target,
        "start": utc_text(finding.start_ns),
        "end": utc_text(finding.end_ns),
        "message": finding.message,
    }


def default_window(extent: tuple[int, int]) -> Window:
    """The whole ledger if it spans less than 24 h, else the last 24 h before its newest interval."""
    start, end = extent
    return Window(start, end) if end - start < DAY_NS else Window(end - DAY_NS, end)


def key_of(facts: Facts, by: Sequence[str]) -> Key:
    """The group of a replica's hour by the dimensions of `by`."""
    replica = facts.replica
    values: list[tuple[str, str | None]] = []
    for name in by:
        if name == "hour":
            values.append((name, utc_text(facts.period_ns - facts.period_ns % HOUR_NS)))
        elif name == "day":
            values.append((name, utc_text(facts.period_ns - facts.period_ns % DAY_NS)))
        elif replica is None:
            values.append((name, None))
        elif name == "model":
            values.append((name, replica.model))
        elif name == "replica":
            values.append((name, replica.group or replica.name))
        else:
            values.append((name, replica.labels.get(name)))
    return tuple(values)


def union(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans joined where they touch or overlap."""
    joined: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        elif end > start:
            joined.append((start, end))
    return joined


def unique(findings: Iterable[Finding]) -> list[Finding]:
    """Findings told once each, over the time of all that say the same."""
    merged: dict[tuple[str, str, str], Finding] = {}
    for finding in findings:
        # what holds for a whole target reads once, however many hours it was found in
        told = "" if finding.kind in {"no_rate", "replica_mapping_unknown"} else finding.message
        key = (finding.kind, finding.target, told)
        before = merged.get(key, finding)
        # the earliest has the message to keep: a price from then on closes the later gaps as well
        first = min(before, finding, key=lambda one: one.start_ns)
        merged[key] = first._replace(end_ns=max(before.end_ns, finding.end_ns))
    return sorted(merged.values(), key=lambda one: (one.start_ns, one.kind, one.target))
