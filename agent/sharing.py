"""GPUs that several engines hold at the same time: who, when, and what part of the price each has. Pure.

A GPU that is time-sliced, or served by MPS, or that two small engines fit on, tells one utilisation for all of them
(METHOD 2.3): its price is parted evenly between those that hold it, and nobody's law is learned from its seconds.
"""

from __future__ import annotations

from bisect import bisect_right
from fractions import Fraction
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from kvtally.agent.interval import RESET

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from kvtally.agent.facts import EngineRow, Replica

GPU_SHARED = "gpu_shared"
REMEDY = "give each engine GPUs of its own"


class Part(NamedTuple):
    """What of its GPUs a replica is charged in [start_ns, end_ns)."""

    start_ns: int
    end_ns: int
    units: Fraction


class Sharing:
    """Who holds which GPU when, of the GPUs that more than one replica ever holds."""

    def __init__(self, rows: Iterable[tuple[Replica, EngineRow]] = ()) -> None:
        """`rows` of all replicas, in any order; those of one replica follow on each other."""
        held: dict[str, dict[str, list[tuple[int, int, int]]]] = {}
        for replica, row in rows:
            span = (row.start_ns, _held_from(row), row.end_ns)
            for uuid in replica.gpus or ():
                held.setdefault(uuid, {}).setdefault(replica.name, []).append(span)
        self._holders = {uuid: _timeline(spans) for uuid, spans in held.items() if len(spans) > 1}

    def __bool__(self) -> bool:
        return bool(self._holders)

    def others(self, replica: Replica, start_ns: int, end_ns: int) -> dict[str, tuple[str, ...]]:
        """GPUs of a replica -> who else holds them in a part of [start_ns, end_ns) in which it does, by name."""
        found: dict[str, tuple[str, ...]] = {}
        for uuid in replica.gpus or ():
            names: set[str] = set()
            for _, _, holders in self._within(uuid, start_ns, end_ns):
                names |= holders - {replica.name} if replica.name in holders else set()
            if names:
                found[uuid] = tuple(sorted(names))
        return found

    def parts(self, replica: Replica, start_ns: int, end_ns: int) -> list[Part]:
        """What the replica is charged for over the span: of each GPU an equal part with all that hold it just then.

        An engine between two of its processes holds its GPU unless another one does; where several are, with those.
        """
        whole = replica.gpu_units or Fraction(0)
        own = [uuid for uuid in replica.gpus or () if uuid in self._holders]
        if not own:
            return [Part(start_ns, end_ns, whole)]
        each = whole / len(replica.gpus or ())
        pieces = {uuid: self._within(uuid, start_ns, end_ns) for uuid in own}
        inside = (edge for spans in pieces.values() for low, high, _ in spans for edge in (low, high))
        edges = sorted({start_ns, end_ns, *inside})
        found: list[Part] = []
        for low, high in pairwise(edges):
            units = whole - each * len(own)
            for uuid in own:
                holders = next((names for a, b, names in pieces[uuid] if a <= low < b), frozenset())
                if replica.name in holders:
                    units += each / len(holders)
                elif not holders:
                    units += each
            if found and found[-1].units == units:
                found[-1] = found[-1]._replace(end_ns=high)
            else:
                found.append(Part(low, high, units))
        return found

    def _within(self, uuid: str, start_ns: int, end_ns: int) -> list[tuple[int, int, frozenset[str]]]:
        """The stretches of [start_ns, end_ns) with who holds the GPU in each."""
        edges, holders = self._holders.get(uuid, ((), ()))
        found: list[tuple[int, int, frozenset[str]]] = []
        at = max(0, bisect_right(edges, start_ns) - 1)
        while at < len(edges) and edges[at] < end_ns:
            until = edges[at + 1] if at + 1 < len(edges) else end_ns
            low, high = max(edges[at], start_ns), min(until, end_ns)
            if low < high:
                found.append((low, high, holders[at]))
            at += 1
        return found


NOBODY = Sharing()


def told(others: Mapping[str, Sequence[str]]) -> str:
    """Which GPUs are shared with whom, in words."""
    return "; ".join(f"{uuid} is held by {', '.join(names)} too" for uuid, names in others.items())


def _held_from(row: EngineRow) -> int:
    """From when on the engine of an interval holds its GPUs: after a restart, from the new process's start."""
    began_ns = row.began_ns if row.flags & RESET and row.began_ns is not None else row.start_ns
    return max(row.start_ns, min(began_ns, row.end_ns))


def _timeline(
    held: Mapping[str, Sequence[tuple[int, int, int]]],
) -> tuple[tuple[int, ...], tuple[frozenset[str], ...]]:
    """Instants at which the holders of a GPU change, and who holds it from each on.

    `held` by name: when an interval starts, when its process does, and when it ends. Who is between two of its
    processes holds a GPU that no process of another has.
    """
    changes: dict[int, list[tuple[str, int, int]]] = {}
    for name, spans in held.items():
        for start_ns, began_ns, end_ns in spans:
            for at, running, waiting in ((start_ns, 0, 1), (began_ns, 1, -1), (end_ns, -1, 0)):
                changes.setdefault(at, []).append((name, running, waiting))
    edges: list[int] = []
    holders: list[frozenset[str]] = []
    run: dict[str, int] = {}
    wait: dict[str, int] = {}
    for at in sorted(changes):
        for name, running, waiting in changes[at]:
            run[name] = run.get(name, 0) + running
            wait[name] = wait.get(name, 0) + waiting
        now = frozenset(name for name, count in run.items() if count) or frozenset(
            name for name, count in wait.items() if count
        )
        if not holders or holders[-1] != now:
            edges.append(at)
            holders.append(now)
    return tuple(edges), tuple(holders)
