"""Replicas of a ledger by what their law depends on, each with its counters; or why one cannot have a law."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from kvtally.agent.disaggregation import DECODE
from kvtally.agent.facts import GPUS, MODEL_CONFIG, VLLM
from kvtally.agent.finding import utc_text
from kvtally.agent.identity import BY_SOURCE_SINCE, version_of
from kvtally.agent.ledger.columns import HOUR_NS
from kvtally.agent.ledger.observed import observed, replica_names
from kvtally.agent.ledger.read import replica_of
from kvtally.agent.observed import fingerprint_of
from kvtally.agent.savings import Reason
from kvtally.agent.sharing import REMEDY, Sharing, told
from kvtally.agent.steplaw.machine import CannotCalibrate, Machine, machine_of
from kvtally.agent.steplaw.series import series_of
from kvtally.collectors.registry import title_of
from kvtally.collectors.vllm_families import counters_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from kvtally.agent.calibration import Fingerprint
    from kvtally.agent.facts import Replica
    from kvtally.agent.ledger.calibrations import StoredCalibration
    from kvtally.agent.ledger.read import LedgerReader, Target
    from kvtally.agent.observed import CacheSpan, Observed, ObservedRow
    from kvtally.agent.steplaw.series import Series

    # external and computed tokens by hour (unix nanoseconds), None for all of them
    Moved = Mapping[int | None, tuple[int, int]]

_NO_SECONDS = Reason(
    "nothing tells how long the engine worked: neither GPM nor utilization.gpu of its GPUs, nor CPU seconds of its "
    "processes",
    "run kvtally where it sees the engine's GPUs or processes (`kvtally doctor`)",
    refuses=True,
)
_FILTERED = "this version shows it: look for what filters the page on its way here, or for values that are no numbers"


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
    sharing = Sharing((replica, one.row) for _, replica, part in seen for one in part.rows)
    usable_ns: dict[str, int] = {}  # since when a replica is usable that was not before
    refused: list[tuple[Fingerprint | None, Subject, Reason]] = []
    for name, replica, part in seen:
        fingerprint = fingerprint_of(replica)
        subject = Subject(name, replica, part, series_of(part))
        problem = _unusable(subject, fingerprint, sharing)
        if problem is not None:
            refused.append((fingerprint, subject, problem))
        elif fingerprint is None:
            found.append(Kin(None, None, (subject,)))
        else:
            alike.setdefault(fingerprint, []).append(subject)
            usable_ns[name] = max(usable_ns.get(name, 0), part.rows[0].row.start_ns)
    for fingerprint, subject, problem in refused:
        since_ns = usable_ns.get(subject.name, 0)
        is_over = since_ns >= subject.observed.rows[-1].row.end_ns
        found.append(Kin(fingerprint, None, (subject,), (_over(problem, since_ns) if is_over else problem,)))
    for fingerprint, members in alike.items():
        subjects = tuple(members)
        try:
            found.append(Kin(fingerprint, machine_of(subjects[0].replica, fingerprint), subjects))
        except CannotCalibrate as cannot:
            found.append(Kin(fingerprint, None, subjects, (Reason(str(cannot), cannot.hint, refuses=True),)))
    return found


def known_laws(stored: Iterable[StoredCalibration], targets: Mapping[int, Target]) -> list[StoredCalibration]:
    """Stored laws as they fit the ledger's engines: one of before sizes were told belongs to the only kind it fits.

    Where several models went by its name it was learned from all of them, and fits none.
    """
    kinds = {fingerprint_of(replica_of(target)) for target in targets.values() if target.kind == "engine"}
    found = []
    for one in stored:
        law = one.calibration
        found.append(one._replace(calibration=law._replace(fingerprint=law.fingerprint.completed(kinds))))
    return found


def _by_target(whole: Observed) -> list[tuple[Replica, Observed]]:
    """An observed replica by what its targets agree in; a change of version or GPUs parts it."""
    parts: dict[int, list[int]] = {}
    for number, one in enumerate(whole.rows):
        parts.setdefault(one.row.target_id, []).append(number)
    return [
        (whole.replicas[target_id], _part(whole, target_id, tuple(whole.rows[number] for number in numbers)))
        for target_id, numbers in parts.items()
    ]


def _part(whole: Observed, target_id: int, rows: tuple[ObservedRow, ...]) -> Observed:
    """What is of one target: its rows, and the caches that told of their time."""
    start_ns, end_ns = rows[0].row.start_ns, rows[-1].row.end_ns
    caches = {
        name: spans
        for name, spans in whole.caches.items()
        if any(one.start_ns < end_ns and one.end_ns > start_ns for one in spans)
    }
    return whole._replace(replicas={target_id: whole.replicas[target_id]}, rows=rows, caches=caches)


def _with_own_share(seen: Sequence[tuple[str, Replica, Observed]]) -> list[tuple[str, Replica, Observed]]:
    """Engines that share a cache are each charged the loads of their own tokens, and the stores likewise.

    Ranks of one server see the same cache, and one LMCache server serves several engines. Hour by hour: one engine may
    have worked when the other did not.
    """
    moved = [_moved(replica, part) for _, replica, part in seen]
    sums: dict[str, dict[int | None, tuple[int, int]]] = {}
    sharers: dict[str, int] = {}
    for (_, _, part), own in zip(seen, moved, strict=True):
        for cache in part.caches:
            sharers[cache] = sharers.get(cache, 0) + 1
            total = sums.setdefault(cache, {})
            for hour_ns, counts in own.items():
                before = total.get(hour_ns, (0, 0))
                total[hour_ns] = (before[0] + counts[0], before[1] + counts[1])
    shared: list[tuple[str, Replica, Observed]] = []
    for (name, replica, part), own in zip(seen, moved, strict=True):
        caches = dict(part.caches)
        for cache, spans in part.caches.items():
            if sharers[cache] > 1:
                shares = {hour_ns: _shares(own, sums[cache], hour_ns, sharers[cache]) for hour_ns in sums[cache]}
                caches[cache] = tuple(_shared(one, *shares.get(_hour(one.start_ns), shares[None])) for one in spans)
        shared.append((name, replica, part._replace(caches=caches)))
    return shared


def _moved(replica: Replica, part: Observed) -> Moved:
    """External and computed tokens of a replica, what it loaded and what it had to store: by hour, None for all.

    What a decode engine has from outside was handed to it, by no cache.
    """
    found: dict[int | None, tuple[int, int]] = {None: (0, 0)}
    for one in part.rows:
        loaded, computed = (one.row.value(name) or 0 for name in ("external_tokens", "computed_tokens"))
        loaded = 0 if replica.role == DECODE else loaded
        for hour_ns in (None, _hour(one.row.start_ns)):
            before = found.get(hour_ns, (0, 0))
            found[hour_ns] = (before[0] + loaded, before[1] + computed)
    return found


def _shares(own: Moved, sums: Moved, hour_ns: int | None, sharers: int) -> tuple[float, float]:
    """What part of a cache's loads and stores in an hour are a replica's."""

    def share(place: int) -> float:
        for when in (hour_ns, None):  # a cache may tell late of what it did in the hour before
            if total := sums.get(when, (0, 0))[place]:
                return own.get(when, (0, 0))[place] / total
        return 1 / sharers

    return share(0), share(1)


def _hour(at_ns: int) -> int:
    return at_ns - at_ns % HOUR_NS


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
        dram_hit_tokens=part(span.dram_hit_tokens, loads),
        disk_hit_tokens=part(span.disk_hit_tokens, loads),
    )


def _over(problem: Reason, since_ns: int) -> Reason:
    """A problem that a replica had before: what would lift it was done."""
    since = utc_text(since_ns)
    return problem._replace(text=f"before {since}, {problem.text}", hint=f"ask from then on: --since {since}")


def _unusable(subject: Subject, fingerprint: Fingerprint | None, sharing: Sharing) -> Reason | None:
    replica, part = subject.replica, subject.observed
    if replica.gpus is None:
        why = replica.mapping or "nothing says which GPUs this engine holds"
        hint = replica.in_config(GPUS)
        return Reason(f"replica mapping unknown ({why})", hint, refuses=True)
    others = sharing.others(replica, part.rows[0].row.start_ns, part.rows[-1].row.end_ns)
    if others:
        return Reason(f"{told(others)}: the seconds of these engines cannot be told apart", REMEDY, refuses=True)
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
            f"say where its config.json lies, {replica.in_config(MODEL_CONFIG)}",
            refuses=True,
        )
    return _missing(subject.series.missing, replica) if subject.series.missing else None


def _missing(names: Sequence[str], replica: Replica) -> Reason:
    version = replica.version or ("?" if replica.engine == VLLM else "")
    title, lacking = " ".join((title_of(replica.engine), version)).rstrip(), ", ".join(shown_as(names, replica))
    if replica.engine != VLLM:
        text = f"{title} does not tell {lacking}: this engine does not count what the savings need"
        return Reason(text, "", refuses=True)
    release = version_of(replica.version)
    if release is None or release < BY_SOURCE_SINCE:
        return Reason(
            f"{title} does not tell {lacking}", "vLLM 0.16 and later count what the savings need", refuses=True
        )
    return Reason(f"the page of {title} lacks {lacking}", _FILTERED, refuses=True)


def shown_as(names: Sequence[str], replica: Replica) -> Sequence[str]:
    """Quantities as the counters of vLLM's page; of an engine that lacks them by their own names."""
    return counters_of(names) if replica.engine == VLLM else names
