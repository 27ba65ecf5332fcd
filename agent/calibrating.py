"""Learn the step law of every kind of replica in a ledger, from what it holds of a span of time."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kvtally.agent.calibration import Calibration, CalibrationEvidence, Fingerprint
from kvtally.agent.kin import kin_of, known_laws
from kvtally.agent.ledger.columns import HOUR_NS
from kvtally.agent.ledger.observed import replica_names
from kvtally.agent.ledger.read import replica_of
from kvtally.agent.observed import fingerprint_of
from kvtally.agent.price import DAY_NS
from kvtally.agent.savings import Reason
from kvtally.agent.steplaw.evidence import evidence_of
from kvtally.agent.steplaw.fit import fit
from kvtally.agent.steplaw.law import Prior, packaged_prior
from kvtally.agent.steplaw.windows import overall_clock

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kvtally.agent.kin import Kin, Subject
    from kvtally.agent.ledger.calibrations import StoredCalibration
    from kvtally.agent.ledger.read import LedgerReader, Target
    from kvtally.agent.steplaw.evidence import Evidence, Probe
    from kvtally.agent.steplaw.fit import Fit
    from kvtally.agent.steplaw.machine import Machine
    from kvtally.agent.steplaw.series import Logged

WEEK_NS = 7 * DAY_NS
LEAST_STEPS = 200
LEAST_REQUESTS = 20
LEAST_ALONE = 5
LEAST_PROBES = 7  # that stand for all other evidence: METHOD 4.1, M4
LEAST_OCCUPIED_SECONDS = 15.0
# a law that was learned is the prior of the next: its variance grows with time (METHOD 4.3), and by what engines drift
# from day to day, so that a long chain of calibrations never pretends to know more than one of them could
GROWTH_PER_WEEK = 1.5
# of measured work (METHOD 4.8 has 0.9). Recordings and simulated engines of every law come to 0.945-1.083, an H100 with
# another tenant for 30 % of its time to 0.906
MISFIT = (0.92, 1.1)
# root mean square of requests that ran alone, from which on the law is not theirs: simulated ones come to 0.18
SINGLE_MISFIT = 0.25
# a GPU that takes less for a step, kernels and all, is not the one that the steps ran on
LEAST_STEP_SECONDS = 1e-4
DRIFT = 0.03

# a CPU has no clock that gives way under load: it is known, and JSON has no infinity
KNOWN_CLOCK_SECONDS = 1e9

# how long a law is used before what came since is learned from as well: often at first, then four times a day
YOUNG_NS, YOUNG_EVERY_NS, EVERY_NS = 6 * HOUR_NS, HOUR_NS, 6 * HOUR_NS


class Learned(NamedTuple):
    """A law, or why there is none; `target_ids` are the targets that it holds for."""

    fingerprint: Fingerprint | None
    target_ids: frozenset[int]
    replicas: tuple[str, ...]
    calibration: Calibration | None
    reasons: tuple[Reason, ...] = ()


class Extra(NamedTuple):
    """Evidence beyond the counters: requests that ran alone, and a log of requests with its rung."""

    probes: tuple[Probe, ...] = ()
    logged: Logged | None = None
    rung: str = ""


NOTHING_EXTRA = Extra()


def learn(
    reader: LedgerReader,
    span_ns: tuple[int, int],
    targets: Mapping[int, Target],
    stored: Sequence[StoredCalibration] = (),
    extra: Mapping[str, Extra] | None = None,
    *,
    only: Fingerprint | None = None,
) -> list[Learned]:
    """The law of every kind of replica with intervals that start in the span; `extra` by replica name.

    `only`: of the kinds with this fingerprint.
    """
    found = kin_of(reader, span_ns, targets)
    return [learned(kin, stored, extra or {}, span_ns) for kin in found if only is None or kin.fingerprint == only]


def keep(reader: LedgerReader, now_ns: int, targets: Mapping[int, Target]) -> list[int]:
    """Learn and store the laws that are due, from the last day at most: the numbers of those that were written."""
    extent = reader.extent()
    if extent is None:
        return []
    end_ns = min(now_ns, extent[1])
    oldest_ns = max(extent[0], end_ns - DAY_NS)
    stored = known_laws(reader.calibrations(), targets)
    written: list[int] = []
    for fingerprint in _fingerprints(reader, (oldest_ns, end_ns), targets):
        own = [one.calibration.evidence for one in stored if one.calibration.fingerprint == fingerprint]
        since_ns = max((one.end_ns for one in own), default=oldest_ns)
        known_ns = sum(one.end_ns - one.start_ns for one in own)
        if own and end_ns - since_ns < (YOUNG_EVERY_NS if known_ns < YOUNG_NS else EVERY_NS):
            continue
        for one in learn(reader, (max(since_ns, oldest_ns), end_ns), targets, stored, only=fingerprint):
            if one.calibration is not None:
                reason = "new evidence" if own else "first evidence"
                written.append(reader.add_calibration(one.calibration, end_ns, reason))
    return written


def _fingerprints(reader: LedgerReader, span_ns: tuple[int, int], targets: Mapping[int, Target]) -> list[Fingerprint]:
    names = set(replica_names(reader, *span_ns, targets))
    found: dict[Fingerprint, None] = {}
    for target in targets.values():
        if target.kind == "engine" and target.name in names:
            fingerprint = fingerprint_of(replica_of(target))
            if fingerprint is not None:
                found.setdefault(fingerprint)
    return list(found)


def learned(
    kin: Kin, stored: Sequence[StoredCalibration], extra: Mapping[str, Extra], span_ns: tuple[int, int]
) -> Learned:
    """The law of one kind of replica, or the reasons why its evidence cannot carry one."""
    targets = frozenset(one.row.target_id for subject in kin.subjects for one in subject.observed.rows)
    names = tuple(sorted({subject.name for subject in kin.subjects}))
    nothing = Learned(kin.fingerprint, targets, names, None)
    if kin.machine is None or kin.fingerprint is None:
        return nothing._replace(reasons=kin.reasons)
    own = [extra.get(subject.name, NOTHING_EXTRA) for subject in kin.subjects]
    subjects = [
        subject._replace(series=subject.series._replace(logged=one.logged))
        for subject, one in zip(kin.subjects, own, strict=True)
    ]
    probes = [probe for one in own for probe in one.probes]
    clock, weight = _clock(kin.machine, subjects)
    parts = [_evidence(kin.machine, subject, clock) for subject in subjects]
    told = [part for part in parts if part is not None]
    prior, prior_name = prior_of(kin.machine, kin.fingerprint, stored, span_ns[0])
    best = fit(kin.machine, told, prior, probes, clock)
    rung = max(_rung(subjects), "M4" if probes else "", *(one.rung for one in own))
    evidence = _told(subjects, best, len(probes))
    gpus = kin.fingerprint.gpus
    flags = _misfit(evidence, gpus) + _unworked(subjects)
    evidence = evidence._replace(notes=tuple(str(flag) for flag in flags))
    calibration = Calibration(
        kin.fingerprint,
        rung,
        tuple(float(f"{value:.9g}") for value in np.exp(best.logs)),
        tuple(tuple(float(f"{value:.9g}") for value in row) for row in best.covariance),
        float(f"{clock:.9g}"),
        float(f"{min(weight, KNOWN_CLOCK_SECONDS):.9g}"),
        evidence,
        prior_name,
    )
    reasons = _too_little(evidence, has_prior=prior_name != "packaged") + _at_bound(best, gpus) + flags
    if any(reason.refuses for reason in reasons):
        return nothing._replace(reasons=reasons)
    return nothing._replace(calibration=calibration, reasons=reasons)


def _clock(machine: Machine, subjects: Sequence[Subject]) -> tuple[float, float]:
    """Clock under load of all the replicas, weighted by the evidence for each, and that evidence in seconds."""
    clocks = [overall_clock(machine, subject.series) for subject in subjects]
    total = sum(weight for _, weight in clocks)
    if not total or not np.isfinite(total):
        return clocks[0]
    return sum(clock * weight for clock, weight in clocks) / total, total


def _evidence(machine: Machine, subject: Subject, clock: float) -> Evidence | None:
    return evidence_of(machine, subject.series, 0, len(subject.series.at) - 1, clock)


def _rung(subjects: Sequence[Subject]) -> str:
    mfu = all(subject.series.totals.get("estimated_gflop", np.zeros(1))[-1] > 0 for subject in subjects)
    return "M3" if mfu else "M1"


def prior_of(
    machine: Machine, fingerprint: Fingerprint, stored: Sequence[StoredCalibration], start_ns: int
) -> tuple[Prior, str]:
    """What is believed beforehand: the newest law whose evidence ends before this one's begins, else the packaged one.

    Evidence that overlaps would be counted twice.
    """
    before = [
        one
        for one in stored
        if one.calibration.fingerprint == fingerprint and one.calibration.evidence.end_ns <= start_ns
    ]
    if not before:
        return packaged_prior(machine), "packaged"
    newest = max(before, key=lambda one: (one.calibration.evidence.end_ns, one.id))
    weeks = (start_ns - newest.calibration.evidence.end_ns) / WEEK_NS
    covariance = np.array(newest.calibration.covariance) * GROWTH_PER_WEEK**weeks
    widest = np.diag(packaged_prior(machine).covariance)
    drifted = covariance + np.diag(np.minimum(DRIFT**2, widest))
    return Prior(np.array(newest.calibration.medians), drifted), str(newest.id)


def _told(subjects: Sequence[Subject], best: Fit, probes: int) -> CalibrationEvidence:
    requests = steps = 0
    occupied = 0.0
    for subject in subjects:
        series = subject.series
        requests += round(float(series.totals["first_tokens"][-1]))
        steps += round(float(series.totals["steps"][-1]))
        occupied += float(np.diff(series.at)[np.diff(series.totals["steps"]) > 0].sum())
    rows = [one.row for subject in subjects for one in subject.observed.rows]
    return CalibrationEvidence(
        min(row.start_ns for row in rows),
        max(row.end_ns for row in rows),
        subjects[0].observed.source,
        best.windows,
        best.singles,
        best.saturated,
        probes,
        requests,
        steps,
        float(f"{occupied:.9g}"),
        None if best.worked_ratio is None else float(f"{best.worked_ratio:.6g}"),
        None if best.single_error is None else float(f"{best.single_error:.6g}"),
    )


def _too_little(evidence: CalibrationEvidence, *, has_prior: bool) -> tuple[Reason, ...]:
    if (has_prior and evidence.windows) or evidence.probes >= LEAST_PROBES:
        return ()
    enough = (
        evidence.requests >= LEAST_REQUESTS
        # requests that ran alone tell the law without many steps
        and (evidence.steps >= LEAST_STEPS or evidence.singles + evidence.probes >= LEAST_ALONE)
        and evidence.occupied_seconds >= LEAST_OCCUPIED_SECONDS
        and evidence.windows
    )
    if enough:
        return ()
    text = (
        f"too little was seen to learn the step law: {evidence.requests} requests, {evidence.steps} steps and "
        f"{evidence.occupied_seconds:.0f} s in which it worked, in {evidence.windows} windows, where {LEAST_REQUESTS}, "
        f"{LEAST_STEPS} and {LEAST_OCCUPIED_SECONDS:.0f} s are the least"
    )
    return (Reason(text, "let kvtally watch for longer, or run `kvtally calibrate --probe`", refuses=True),)


def flags_of(calibration: Calibration) -> tuple[Reason, ...]:
    """What is to be said of a stored law wherever it is used."""
    return tuple(Reason(note) for note in calibration.evidence.notes)


def _where(gpus: int) -> str:
    """Where to look for what else fills the seconds that were measured."""
    return "for another process on its GPUs" if gpus else "whether all its processes are seen, and no others"


def _misfit(evidence: CalibrationEvidence, gpus: int) -> tuple[Reason, ...]:
    """Flags where the law does not meet what was measured (METHOD 4.8)."""
    found = []
    hint = f"look at the model's shape and {_where(gpus)} (`kvtally doctor`)"
    ratio, error = evidence.worked_ratio, evidence.single_error
    if ratio is not None and not MISFIT[0] <= ratio <= MISFIT[1]:
        text = f"by the law the engine would have worked {ratio:.0%} of what was measured"
        found.append(Reason(text, hint))
    if error is not None and error > SINGLE_MISFIT:
        text = f"requests that ran alone took {error:.0%} more or less than by the law"
        found.append(Reason(text, hint))
    return tuple(found)


def _unworked(subjects: Sequence[Subject]) -> tuple[Reason, ...]:
    """A flag where steps were counted in which the GPUs are measured to have done next to nothing."""
    steps = worked = 0.0
    for subject in subjects:
        series = subject.series
        known = series.worked_known[1:] & series.sound[1:]
        steps += float(np.diff(series.totals["steps"])[known].sum())
        worked += float(np.diff(series.worked)[known].sum())
    if steps < LEAST_STEPS or worked >= LEAST_STEP_SECONDS * steps:
        return ()
    text = f"{steps:.0f} steps were counted in which {worked:.1f} s of work were measured"
    what = "these GPUs are the engine's, and tell their work" if subjects[0].replica.gpus else "its processes are seen"
    return (Reason(text, f"look whether {what} (`kvtally doctor`)"),)


def _at_bound(best: Fit, gpus: int) -> tuple[Reason, ...]:
    if not best.at_bound:
        return ()
    text = f"the fitted {', '.join(best.at_bound)} cannot be: something else than this engine fills its seconds"
    return (Reason(text, f"look {_where(gpus)}, and at the model's shape (`kvtally doctor`)", refuses=True),)
