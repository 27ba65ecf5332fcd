"""Replicas of a ledger by what their law depends on, each with its counters; or why one cannot have a law."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from kvtally.agent.ledger.observed import observed, replica_names
from kvtally.agent.observed import fingerprint_of
from kvtally.agent.savings import Reason
from kvtally.agent.steplaw.machine import CannotCalibrate, Machine, machine_of
from kvtally.agent.steplaw.series import series_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from kvtally.agent.calibration import Fingerprint
    from kvtally.agent.facts import Replica
    from kvtally.agent.ledger.read import LedgerReader, Target
    from kvtally.agent.observed import CacheSpan, Observed
    from kvtally.agent.steplaw.series import Series

_NO_SECONDS = Reason(
    "nothing tells how long the engine worked: neither GPM nor utilization.gpu of its GPUs, nor CPU seconds of its "
    "processes",
    "run kvtally where it sees the engine's GPUs or processes (`kvtally doctor`)",
    refuses=True,
)


class Subject(NamedTuple):
    """One replica while it had one fingerprint."""

    name: str
    replica: Replica
    observed: Observed
    series: Series


class Kin(NamedTuple):
    """Replicas that share a law, or the reason why they cannot have one."""

    fingerprint: Fingerprint | None
    machine: Machine | None
    subjects: tuple[Subject, ...]
    reasons: tuple[Reason, ...] = ()


def kin_of(reader: LedgerReader, span_ns: tuple[int, int], targets: Mapping[int, Target]) -> list[Kin]:
    """Replicas of a span by fingerprint; those that cannot have a law each on their own."""
    start_ns, end_ns = span_ns
    alike: dict[Fingerprint, list[Subject]] = {}
    found: list[Kin] = []
    seen: list[tuple[str, Replica, Observed]] = []
    for name in replica_names(reader, start_ns, end_ns, targets):
        seen += [(name, *part) for part in _by_target(observed(reader, start_ns, end_ns, targets, name))]
    seen = _with_own_share(seen)
    crowded = _sharing(seen)
    for name, replica, part in seen:
        fingerprint = fingerprint_of(replica)
        subject = Subject(name, replica, part, series_of(part))
        problem = _unusable(subject, fingerprint, crowded)
        if fingerprint is None or problem is not None:
            found.append(Kin(fingerprint, None, (subject,), () if problem is None else (problem,)))
        else:
            alike.setdefault(fingerprint, []).append(subject)
    for fingerprint, members in alike.items():
        subjects = tuple(members)
        try:
            found.append(Kin(fingerprint, machine_of(subjects[0].replica, fingerprint), subjects))
        except CannotCalibrate as cannot:
            found.append(Kin(fingerprint, None, subjects, (Reason(str(cannot), cannot.hint, refuses=True),)))
    return found


def _by_target(whole: Observed) -> list[tuple[Replica, Observed]]:
    """An observed replica by what its targets agree in; a change of version or GPUs parts it."""
    parts: dict[int, list[int]] = {}
    for number, one in enumerate(whole.rows):
        parts.setdefault(one.row.target_id, []).append(number)
    return [
        (whole.replicas[target_id], whole._replace(rows=tuple(whole.rows[number] for number in numbers)))
        for target_id, numbers in parts.items()
    ]


def _with_own_share(seen: Sequence[tuple[str, Replica, Observed]]) -> list[tuple[str, Replica, Observed]]:
    """Ranks of one server see the same cache: each is charged the loads of its own tokens, and the stores likewise."""
    totals: dict[str, list[int]] = {}
    for _, _, part in seen:
        for cache in part.caches:
            sums = totals.setdefault(cache, [0, 0, 0])
            for place, count in enumerate((1, *_moved(part))):
                sums[place] += count
    shared: list[tuple[str, Replica, Observed]] = []
    for name, replica, part in seen:
        caches = dict(part.caches)
        for cache, (sharers, *whole) in totals.items():
            if cache in caches and sharers > 1:
                pairs = zip(_moved(part), whole, strict=True)
                shares = [mine / total if total else 1 / sharers for mine, total in pairs]
                caches[cache] = tuple(_shared(span, *shares) for span in caches[cache])
        shared.append((name, replica, part._replace(caches=caches)))
    return shared


def _moved(part: Observed) -> tuple[int, int]:
    """External and computed tokens of a replica: what it loaded, and what it had to store."""
    loaded, computed = (
        sum(one.row.value(name) or 0 for one in part.rows) for name in ("external_tokens", "computed_tokens")
    )
    return loaded, computed


def _shared(span: CacheSpan, loads: float, stores: float) -> CacheSpan:
    """A share of what a cache did."""

    def part(value: int | None, share: float) -> int | None:
        return None if value is None else round(value * share)

    return span._replace(
        load_ns=part(span.load_ns, loads),
        store_ns=part(span.store_ns, stores),
        loaded_tokens=part(span.loaded_tokens, loads),
        stored_tokens=part(span.stored_tokens, stores),
        load_bytes=part(span.load_bytes, loads),
        store_bytes=part(span.store_bytes, stores),
    )


def _sharing(seen: Iterable[tuple[str, Replica, Observed]]) -> frozenset[str]:
    """Names of engines that hold a GPU while another one does; one that comes when the other is gone does not."""
    holders: dict[str, list[tuple[int, int, str]]] = {}
    for name, replica, part in seen:
        for uuid in replica.gpus or ():
            holders.setdefault(uuid, []).append((part.rows[0].row.start_ns, part.rows[-1].row.end_ns, name))
    sharing: set[str] = set()
    for spans in holders.values():
        for start_ns, end_ns, name in spans:
            if any(other != name and start < end_ns and start_ns < end for start, end, other in spans):
                sharing.add(name)
    return frozenset(sharing)


def _unusable(subject: Subject, fingerprint: Fingerprint | None, crowded: frozenset[str]) -> Reason | None:
    replica, part = subject.replica, subject.observed
    if replica.gpus is None:
        why = replica.mapping or "nothing says which GPUs this engine holds"
        url = f"http://{replica.name.partition('/')[0]}/metrics"
        hint = f'write in kvtally.toml: engine = [{{ url = "{url}", gpus = ["GPU-…"] }}]'
        return Reason(f"replica mapping unknown ({why})", hint, refuses=True)
    if replica.name in crowded:
        return Reason(
            "two engines share a GPU: its seconds cannot be told apart",
            "give each engine GPUs of its own",
            refuses=True,
        )
    if not part.source or part.worked is None:
        return _NO_SECONDS
    if replica.gpus and not replica.sku:
        return Reason(
            f"the product of GPU {replica.gpus[0]} is not known",
            "compare `gpus` in kvtally.toml with `nvidia-smi -L`",
            refuses=True,
        )
    if fingerprint is None:
        return Reason(
            f"the shape of model {replica.model or '?'} is not known",
            'say where its config.json lies: engine = [{ url = "…", model_config = "/models/x/config.json" }]',
            refuses=True,
        )
    return _missing(subject.series.missing, replica.version or "") if subject.series.missing else None


def _missing(names: Sequence[str], version: str) -> Reason:
    text = f"vLLM {version or '?'} does not tell {', '.join(names)}"
    return Reason(text, "vLLM 0.16 and later count what the savings need", refuses=True)
