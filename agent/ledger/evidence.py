"""What other targets than engines say about the engines' time, read from their intervals."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING

from sqlalchemy import select

from kvtally.agent.facts import Evidence, GpuPresence, product_of
from kvtally.agent.ledger import schema
from kvtally.agent.ledger.reach import reach
from kvtally.agent.timeline import Span, Timeline

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from sqlalchemy import ColumnElement, Connection

    from kvtally.agent.ledger.read import Target
    from kvtally.collectors.base import Kind

MARGIN_NS = 60_000_000_000  # GPM means are kept for up to half a minute before they are written


def evidence(connection: Connection, start_ns: int, end_ns: int, targets: Mapping[int, Target]) -> Evidence:
    """What GPUs and processes say about [start_ns, end_ns)."""
    graphics: dict[str, list[Span]] = {}
    energy: dict[str, list[Span]] = {}
    present: dict[int, list[tuple[int, int]]] = {}
    gpu = schema.intervals["gpu"].c
    counted = (gpu.gpm_ns, gpu.graphics_ns, gpu.energy_mj, gpu.power_sampled_mj)
    query = select(gpu.target_id, gpu.start_ns, gpu.length_ns, *counted)
    overlapping = near(connection, "gpu", start_ns, end_ns)
    for target_id, begin_ns, length_ns, gpm_ns, graphics_ns, energy_mj, sampled_mj in connection.execute(
        query.where(*overlapping).order_by(gpu.start_ns)
    ):
        target = targets[target_id]
        uuid, until = target.name, begin_ns + length_ns
        present.setdefault(target_id, []).append((begin_ns, until))
        mean = mean_until(until, gpm_ns, graphics_ns)
        if mean is not None:
            graphics.setdefault(uuid, []).append(mean)
        drawn = energy_mj if energy_mj is not None else sampled_mj
        if drawn is not None:
            energy.setdefault(uuid, []).append(Span(begin_ns, until, drawn))
    return Evidence(
        {uuid: Timeline(spans) for uuid, spans in graphics.items()},
        cpu(connection, start_ns, end_ns, targets),
        {uuid: Timeline(spans) for uuid, spans in energy.items()},
        tuple(_present(present, targets)),
    )


def _present(spans: Mapping[int, list[tuple[int, int]]], targets: Mapping[int, Target]) -> Iterator[GpuPresence]:
    """The GPUs that were seen, by UUID; one whose product or share changed comes once for each."""
    alike: dict[tuple[str, str, str, bool, str], list[tuple[int, int]]] = {}
    for target_id, own in spans.items():
        about = targets[target_id].attributes
        key = (
            targets[target_id].name,
            product_of(about.get("sku", "")),
            about.get("share", "1"),
            about.get("source") == "dcgm" or about.get("shown") == "node",
            about.get("host", ""),
        )
        alike.setdefault(key, []).extend(own)
    named = _named(targets) if any(are_all for _, _, _, are_all, _ in alike) else frozenset()
    for (uuid, sku, share, are_all, host), own in sorted(alike.items()):
        # a page of GPUs, and NVML in a pod, show those of the whole node, whoever uses them
        yield GpuPresence(uuid, sku, tuple(sorted(own)), Fraction(share), not are_all or uuid in named, host)


def _named(targets: Mapping[int, Target]) -> frozenset[str]:
    """GPUs that an engine ever held."""
    gpus = (target.attributes.get("gpus", "") for target in targets.values() if target.kind == "engine")
    return frozenset(uuid for each in gpus for uuid in each.split(","))


def mean_until(until_ns: int, over_ns: int | None, amount: int | None) -> Span | None:
    """A mean over the time up to its sample, however long before the interval that began; None where unknown."""
    return Span(until_ns - over_ns, until_ns, amount) if over_ns and amount is not None else None


def cpu(connection: Connection, start_ns: int, end_ns: int, targets: Mapping[int, Target]) -> dict[str, Timeline]:
    """CPU time of the processes that compute, else of the whole tree, by the name of their engine's target."""
    process = schema.intervals["process"].c
    query = select(process.target_id, process.start_ns, process.length_ns, process.cpu_ns, process.worker_cpu_ns).where(
        *near(connection, "process", start_ns, end_ns), process.cpu_ns.is_not(None)
    )
    spans: dict[str, list[Span]] = {}
    for target_id, begin_ns, length_ns, cpu_ns, worker_ns in connection.execute(query.order_by(process.start_ns)):
        # a process that becomes a worker, as a core does whose workers have died, brings all that it took before
        worked_ns = cpu_ns if worker_ns is None else min(worker_ns, cpu_ns)
        spans.setdefault(targets[target_id].name, []).append(Span(begin_ns, begin_ns + length_ns, worked_ns))
    return {name: Timeline(own) for name, own in spans.items()}


def near(connection: Connection, kind: Kind, start_ns: int, end_ns: int) -> tuple[ColumnElement[bool], ...]:
    """Intervals that overlap the span, or the margin on either side of it."""
    c = schema.intervals[kind].c
    from_ns = start_ns - MARGIN_NS
    return (
        c.start_ns >= reach(connection, kind, from_ns),
        c.start_ns < end_ns + MARGIN_NS,
        c.start_ns + c.length_ns > from_ns,
    )
