"""Means over spans as a function of time: joins sources that are sampled at different moments."""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable


class Span(NamedTuple):
    """`amount` accrued evenly over [start_ns, end_ns)."""

    start_ns: int
    end_ns: int
    amount: float


class Timeline:
    """Spans that do not overlap; what lies between them is unknown."""

    def __init__(self, spans: Iterable[Span]) -> None:
        kept: list[Span] = []
        for span in sorted(spans):
            start = max(span.start_ns, kept[-1].end_ns) if kept else span.start_ns
            if span.end_ns > start:
                share = (span.end_ns - start) / (span.end_ns - span.start_ns)
                kept.append(Span(start, span.end_ns, span.amount * share))
        self._spans = kept
        self._ends = [span.end_ns for span in kept]

    def over(self, start_ns: int, end_ns: int, least_known: float = 0.5) -> float | None:
        """The amount over a span, scaled up from the part that is known.

        None where less than `least_known` of it is known.
        """
        total, known = 0.0, 0
        position = bisect_right(self._ends, start_ns)
        while position < len(self._spans) and self._spans[position].start_ns < end_ns:
            span = self._spans[position]
            overlap = min(span.end_ns, end_ns) - max(span.start_ns, start_ns)
            total += span.amount * overlap / (span.end_ns - span.start_ns)
            known += overlap
            position += 1
        length = end_ns - start_ns
        return total * length / known if known and known >= least_known * length else None
