"""A finding: one thing that is not as it should be, as data with its span of time."""

from __future__ import annotations

from typing import Literal, NamedTuple

Severity = Literal["info", "warning", "error"]


class Finding(NamedTuple):
    """What was found, where and when; written to the ledger once and never changed.

    kind       a short fixed word ("engine_restarted", "identity_broken")
    target     kind/name of the target, or "" where it concerns the whole ledger
    start_ns   the span that it concerns, half-open, unix nanoseconds
    message    one sentence that a stranger understands, with what to do where something can be done
    """

    kind: str
    severity: Severity
    target: str
    start_ns: int
    end_ns: int
    message: str


def plural(count: int, word: str) -> str:
    """A count with its noun: 1 hour, 2 processes."""
    ending = "" if count == 1 else "es" if word.endswith("s") else "s"
    return f"{count:,} {word}{ending}"


def utc_text(at_ns: int) -> str:
    """An instant as ISO 8601 in UTC with milliseconds."""
    from datetime import UTC, datetime  # noqa: PLC0415  # the daemon's tick has no need of datetime

    return datetime.fromtimestamp(at_ns // 10**6 / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
