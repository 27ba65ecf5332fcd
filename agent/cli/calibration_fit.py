"""What `kvtally calibrate` learns: the evidence that it takes, and the laws as it tells of them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from kvtally.agent.calibrating import Learned, learned, prior_of
from kvtally.agent.calibration import PARAMETERS
from kvtally.agent.finding import utc_text
from kvtally.agent.kin import kin_of
from kvtally.agent.price import DAY_NS
from kvtally.agent.savings import Z90, Reason

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

    from kvtally.agent.accounts import Window
    from kvtally.agent.calibrating import Extra
    from kvtally.agent.calibration import Calibration, Fingerprint
    from kvtally.agent.kin import Kin
    from kvtally.agent.ledger.calibrations import StoredCalibration
    from kvtally.agent.ledger.read import LedgerReader, Target
    from kvtally.agent.steplaw.law import Prior

UNITS = dict.fromkeys(PARAMETERS, "s") | {
    "compute_efficiency": "of peak FLOP/s",
    "attention_efficiency": "of peak FLOP/s",
    "weight_bandwidth_efficiency": "of peak bytes/s",
    "kv_bandwidth_efficiency": "of peak bytes/s",
    "sharpness": "",
}
# rung -> what it takes
FURTHER = {
    "M3": "start vLLM with --enable-mfu-metrics: attention work is then counted",
    "M4": "kvtally calibrate --probe: a few cold prompts while the engine idles tell how fast large ones are",
    "M5": "kvtally calibrate --requests FILE: a log with times to first token",
}


class Kindred(NamedTuple):
    """Replicas that share a law, the span whose intervals are its evidence, and why there is none to look at."""

    kin: Kin
    span_ns: tuple[int, int]
    reason: Reason | None = None


def evidence_for(
    reader: LedgerReader, targets: Mapping[int, Target], stored: Sequence[StoredCalibration], window: Window | None
) -> list[Kindred]:
    """Every kind of replica with its evidence: the window's, else what came since its newest law, a day at most."""
    extent = reader.extent()
    if extent is None:
        return []
    oldest_ns, newest_ns = extent
    if window is not None:
        span_ns = (max(window.start_ns, oldest_ns), min(window.end_ns, newest_ns))
        return [Kindred(kin, span_ns) for kin in kin_of(reader, span_ns, targets)] if span_ns[0] < span_ns[1] else []
    span_ns = (max(oldest_ns, newest_ns - DAY_NS), newest_ns)
    kinds = kin_of(reader, span_ns, targets)
    learned_until = _learned_until({kin.fingerprint for kin in kinds}, stored)
    seen_until = {one: end_ns for one, (end_ns, _) in learned_until.items() if end_ns > span_ns[0]}
    found = [Kindred(kin, span_ns) for kin in kinds if kin.fingerprint not in seen_until]
    for since_ns in sorted(set(seen_until.values())):
        later = kin_of(reader, (since_ns, newest_ns), targets) if since_ns < newest_ns else []
        for fingerprint in (one for one, end_ns in seen_until.items() if end_ns == since_ns):
            own = [Kindred(kin, (since_ns, newest_ns)) for kin in later if kin.fingerprint == fingerprint]
            reason = _nothing_since(*learned_until[fingerprint])
            before = (Kindred(kin, span_ns, reason) for kin in kinds if kin.fingerprint == fingerprint)
            found += own or [next(before)]
    return found


def _learned_until(
    fingerprints: Collection[Fingerprint | None], stored: Iterable[StoredCalibration]
) -> dict[Fingerprint, tuple[int, int]]:
    """Where the evidence of each fingerprint's newest law ends, and the law's number: it would count twice."""
    found: dict[Fingerprint, tuple[int, int]] = {}
    for one in stored:
        fingerprint = one.calibration.fingerprint
        if fingerprint in fingerprints:
            found[fingerprint] = max(found.get(fingerprint, (0, 0)), (one.calibration.evidence.end_ns, one.id))
    return found


def _nothing_since(end_ns: int, number: int) -> Reason:
    text = f"nothing came since the evidence of calibration {number}, which ends {utc_text(end_ns)}"
    return Reason(text, "--since TIME --fresh learns from that time again", refuses=True)


def learned_from(one: Kindred, stored: Sequence[StoredCalibration], extra: Mapping[str, Extra]) -> Learned:
    """The law of one kind of replica, or why there is none."""
    if one.reason is not None:
        names = tuple(sorted({subject.name for subject in one.kin.subjects}))
        return Learned(one.kin.fingerprint, frozenset(), names, None, (one.reason,))
    return learned(one.kin, stored, extra, one.span_ns)


def told(one: Kindred, law: Calibration, stored: Sequence[StoredCalibration]) -> dict[str, Any]:
    """A law as it prints, beside its prior."""
    assert one.kin.machine is not None  # noqa: S101  # it has a law
    prior, _ = prior_of(one.kin.machine, law.fingerprint, stored, one.span_ns[0])
    return {
        **law.as_json(),
        "text": law.fingerprint.text(),
        "window": {"start": utc_text(law.evidence.start_ns), "end": utc_text(law.evidence.end_ns)},
        "parameters": dict(_parameters(law, prior)),
        "further": [{"rung": rung, "how": how} for rung, how in FURTHER.items() if rung > law.rung],
    }


def _parameters(law: Calibration, prior: Prior) -> Iterator[tuple[str, dict[str, Any]]]:
    for place, name in enumerate(PARAMETERS):
        own = _interval(law.medians[place], law.covariance[place][place])
        before = _interval(float(prior.medians[place]), float(prior.covariance[place][place]))
        yield name, {"unit": UNITS[name], **own, "prior": before}


def _interval(median: float, variance: float) -> dict[str, float]:
    """The 90 % interval of a log-normal parameter."""
    factor = math.exp(Z90 * math.sqrt(variance))
    return {
        name: float(f"{value:.6g}")
        for name, value in (("low", median / factor), ("median", median), ("high", median * factor))
    }
