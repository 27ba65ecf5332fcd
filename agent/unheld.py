"""GPUs that no replica holds: paid for, and a cost of their own (METHOD 2.2). Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvtally.agent.costing import joined_lines
from kvtally.agent.facts import Facts, GpuPresence, Line
from kvtally.agent.finding import Finding
from kvtally.agent.rates import PriceGap, RateBook, charge_nano

if TYPE_CHECKING:
    from collections.abc import Sequence
    from fractions import Fraction

    from kvtally.agent.price import Term


def unheld_facts(
    gpu: GpuPresence,
    held: Sequence[tuple[int, int]],
    book: RateBook,
    period_ns: tuple[int, int],
    *,
    term: Term,
    site: str,
) -> Facts | None:
    """A GPU in the time in which no replica held it; None where there is no such time.

    A MIG instance counts by its share, and a GPU that is cut by what is in no instance.

    `held` are the spans of all replicas that hold it. A GPU interval counts as held if one of them lies within its
    own length of it: engines and GPUs are not read at the same moment.
    """
    free: list[tuple[int, int]] = []
    for start_ns, end_ns in gpu.spans:
        slack = end_ns - start_ns
        low, high = max(start_ns, period_ns[0]), min(end_ns, period_ns[1])
        if low < high and not any(a - slack < end_ns and start_ns < b + slack for a, b in held):
            free.append((low, high))
    if not free or not gpu.share or not gpu.is_paid:
        return None
    where = f"gpu/{gpu.uuid}"
    total_ns = sum(_gpu_ns(gpu.share, *span) for span in free)
    lines: list[Line] = []
    findings: tuple[Finding, ...] = ()
    try:
        for start_ns, end_ns in free:
            for part in book.stretches("gpu", gpu.sku, term, site, start_ns=start_ns, end_ns=end_ns):
                amount = charge_nano(
                    book, "gpu", gpu.sku, term, site, quantity=gpu.share, start_ns=part.start_ns, end_ns=part.end_ns
                )
                quantity = _gpu_ns(gpu.share, part.start_ns, part.end_ns)
                lines.append(Line("gpu", gpu.sku, "unallocated", quantity, "gpu-ns", part.rate, amount))
    except PriceGap as gap:
        findings = (Finding("no_rate", "warning", where, free[0][0], free[-1][1], str(gap)),)
    return Facts(
        None,
        period_ns[0],
        {},
        {"unallocated": total_ns},
        None if findings else joined_lines(lines),
        None,
        free[0][0],
        free[-1][1],
        float(total_ns),
        False,
        findings,
    )


def _gpu_ns(share: Fraction, start_ns: int, end_ns: int) -> int:
    """GPU-nanoseconds of a share in a span, whole ones; parts of a span have together what it has."""
    return int(end_ns * share) - int(start_ns * share)


def joined(group: Sequence[Facts]) -> Facts:
    """Facts of several GPUs of one product that nobody held in the same period, as one."""
    lines = [line for one in group for line in one.lines or ()]
    return group[0]._replace(
        state_ns={"unallocated": sum(one.state_ns["unallocated"] for one in group)},
        lines=None if any(one.lines is None for one in group) else joined_lines(lines),
        start_ns=min(one.start_ns for one in group),
        end_ns=max(one.end_ns for one in group),
        covered_ns=sum(one.covered_ns for one in group),
        findings=tuple(finding for one in group for finding in one.findings),
    )
