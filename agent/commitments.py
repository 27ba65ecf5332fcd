"""Reserved units that are paid for and that nobody used: a cost of their own beside what was used. Pure."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING

from kvtally.agent.facts import Facts, Line
from kvtally.agent.rates import RateBook, Stretch, Used, unused_commitment_nano

if TYPE_CHECKING:
    from collections.abc import Sequence

UNUSED = "unused"


def with_unused(facts: Sequence[Facts], book: RateBook) -> list[Facts]:
    """The facts with a line for every commitment that a period did not use up.

    What was used is the mean over the period's covered time: a commitment is paid for by the month, and moments of
    more and of less within one period make up for each other. The line stands with the GPUs of that product that no
    replica held.
    """
    commitments = book.commitments()
    if not commitments:
        return list(facts)
    done: list[Facts] = []
    for period_ns in sorted({one.period_ns for one in facts}):
        group = [one for one in facts if one.period_ns == period_ns]
        for commitment in commitments:
            line, span = _line(commitment, group)
            if line is not None:
                group = _joined(group, line, period_ns, span)
        done += group
    return done


def _line(commitment: Stretch, group: Sequence[Facts]) -> tuple[Line | None, tuple[int, int]]:
    rate = commitment.rate
    start_ns = max(min(one.start_ns for one in group), commitment.start_ns)
    end_ns = min(max(one.end_ns for one in group), commitment.end_ns)
    if end_ns <= start_ns or rate.committed is None or any(one.lines is None for one in group):
        return None, (start_ns, end_ns)  # with a cost that is unknown it is unknown what was used
    used_ns = sum(line.quantity for one in group for line in one.lines or () if line.rate == rate)
    used = Used(Fraction(used_ns, end_ns - start_ns), start_ns, end_ns)
    amount_nano = unused_commitment_nano(commitment, [used], start_ns, end_ns)
    unused_ns = max(rate.committed * (end_ns - start_ns) - used_ns, 0)
    if not unused_ns:
        return None, (start_ns, end_ns)
    unit = f"{rate.unit.split('-')[0]}-ns"
    return Line(rate.resource, rate.sku, UNUSED, unused_ns, unit, rate, amount_nano), (start_ns, end_ns)


def _joined(group: list[Facts], line: Line, period_ns: int, span: tuple[int, int]) -> list[Facts]:
    """Put the line where the product's unheld GPUs are, or by itself where there are none."""
    for position, one in enumerate(group):
        if one.replica is None and one.lines and one.lines[0].sku == line.sku:
            return [*group[:position], one._replace(lines=(*one.lines, line)), *group[position + 1 :]]
    alone = Facts(None, period_ns, {}, {}, (line,), None, *span, 0.0, modelled=False)
    return [*group, alone]
