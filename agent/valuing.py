"""What reuse was worth to every replica, hour by hour: as it was settled, or worked out from raw intervals."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from kvtally.agent.calibrating import Extra, Learned, flags_of, learn
from kvtally.agent.disaggregation import DECODE, ROLE
from kvtally.agent.interval import IDENTITY_BROKEN, RESET
from kvtally.agent.kin import kin_of, known_laws, shown_as
from kvtally.agent.ledger.columns import HOUR_NS
from kvtally.agent.ledger.totals import handed
from kvtally.agent.price import DAY_NS
from kvtally.agent.savings import Loading, Reason, loading_of, untimed
from kvtally.agent.steplaw.series import NEEDED
from kvtally.agent.steplaw.worth import worth
from kvtally.agent.worth import Worth, hbm_alone, worth_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from kvtally.agent.calibration import Calibration, Fingerprint
    from kvtally.agent.facts import EngineRow
    from kvtally.agent.kin import Kin, Subject
    from kvtally.agent.ledger.calibrations import StoredCalibration
    from kvtally.agent.ledger.read import LedgerReader, Target
    from kvtally.agent.steplaw.machine import Machine
    from kvtally.agent.steplaw.series import Series

# on either side of a span: histograms tick when a request finishes, long after its first token
MARGIN_NS = 600_000_000_000
UNREAD_SHARE = 0.05  # of the time, for which a counter may be unknown before there is no figure
TRANSFERRED = Reason("engines that decode what others prefilled are left out: what they load was handed to them")
HANDED = Reason(
    "what other engines handed to an engine is left out, since its role is not known and it has no outer tier",
    f"say in its [[engine]] {ROLE}",
)
_UNREADABLE = "look for what is missing from the engine's page, is no number there, or falls without a restart"
NOT_CALIBRATED = Reason("no calibration was there when the hour was settled", "`kvtally calibrate` makes one", True)


class Valued(NamedTuple):
    """One replica in one hour, or in the part of it that was asked for.

    worth, calibration   None where there is no figure; `reasons` say why
    is_broken            an identity of the engine's own counters failed
    has_outer            a tier beyond HBM may have been at work
    """

    hour_ns: int
    target_id: int
    worth: Worth | None
    calibration: Calibration | None
    loading: Loading
    reasons: tuple[Reason, ...] = ()
    is_broken: bool = False
    has_outer: bool = False

    def as_json(self) -> dict[str, Any]:
        """What a settlement keeps of it; the calibration by its number."""
        return {
            "worth": None if self.worth is None else self.worth.as_json(),
            "loading": self.loading,
            "reasons": [list(reason) for reason in self.reasons],
            "is_broken": self.is_broken,
            "has_outer": self.has_outer,
        }


class Laws:
    """The laws that hold in a ledger: those that are stored, and those learned for one answer."""

    def __init__(
        self,
        reader: LedgerReader,
        targets: Mapping[int, Target],
        *,
        only: int | None = None,
        extra: Mapping[str, Extra] | None = None,
        learns: bool = True,
    ) -> None:
        """`only`: the number of the calibration to use wherever its fingerprint fits.

        Without `learns` a fingerprint that has no stored law has none.
        """
        self._reader = reader
        self._targets = targets
        stored = known_laws(reader.calibrations(), targets)
        self.stored: list[StoredCalibration] = [one for one in stored if only is None or one.id == only]
        self.extra = extra or {}
        self._learns = learns
        self._learned: dict[Fingerprint, Learned | None] = {}

    def frozen(self, numbers: Iterable[int | None]) -> Laws:
        """The same, but with the laws of these numbers for their fingerprints: those that a period was settled with."""
        kept = Laws.__new__(Laws)
        kept.__dict__.update(self.__dict__)
        wanted = set(numbers)
        own = {one.calibration.fingerprint: one for one in self.stored if one.id in wanted}
        kept.stored = [one for one in self.stored if own.get(one.calibration.fingerprint, one) is one]
        return kept

    def numbered(self, number: int | None) -> Calibration | None:
        """A stored calibration by its number."""
        return next((one.calibration for one in self.stored if one.id == number), None)

    def of(self, kin: Kin, span_ns: tuple[int, int]) -> tuple[Calibration | None, tuple[Reason, ...]]:
        """The newest stored law of a fingerprint, else one learned from the day around its part of the span."""
        newest = [one for one in self.stored if one.calibration.fingerprint == kin.fingerprint]
        if kin.machine is None or kin.fingerprint is None:
            return None, kin.reasons
        if newest:
            law = max(newest, key=lambda one: one.id).calibration
            return law, flags_of(law)
        if not self._learns:
            return None, (NOT_CALIBRATED,)
        if kin.fingerprint not in self._learned:
            self._learned[kin.fingerprint] = self._learn(kin.fingerprint, kin, span_ns)
        best = self._learned[kin.fingerprint]
        return (None, (NOT_CALIBRATED,)) if best is None else (best.calibration, best.reasons)

    def _learn(self, fingerprint: Fingerprint, kin: Kin, span_ns: tuple[int, int]) -> Learned | None:
        rows = [one.row for subject in kin.subjects for one in subject.observed.rows]
        first_ns, last_ns = min(row.start_ns for row in rows), max(row.end_ns for row in rows)
        span = self._evidence_span((max(span_ns[0], first_ns), min(span_ns[1], last_ns)))
        found = learn(self._reader, span, self._targets, (), self.extra, only=fingerprint)
        # a replica of the same kind that lacks something has no law, and comes before those that share one
        return found[-1] if found else None

    def _evidence_span(self, span_ns: tuple[int, int]) -> tuple[int, int]:
        """A day at most, the span in its middle as far as the ledger reaches."""
        oldest, newest = self._reader.extent() or span_ns
        until = min(newest, max(span_ns[1], span_ns[0] + DAY_NS // 2))
        return max(oldest, min(span_ns[0], until - DAY_NS), until - DAY_NS), until + 1


def valued(reader: LedgerReader, window_ns: tuple[int, int], laws: Laws, targets: Mapping[int, Target]) -> list[Valued]:
    """The worth of every replica in the window from raw intervals: those that start in it, by the hour."""
    start_ns, end_ns = window_ns
    found: list[Valued] = []
    handed_to = {one.replica.target_id for one in handed(reader, start_ns, end_ns, targets) if not one.has_outer}
    for kin in kin_of(reader, (start_ns - MARGIN_NS, end_ns + MARGIN_NS), targets):
        law: Calibration | None = None
        reasons: tuple[Reason, ...] = ()
        is_asked = False
        for subject in kin.subjects:
            spans = _hours(subject.series, start_ns, end_ns)
            if subject.replica.role == DECODE:
                found += [_left_out(subject, hour_ns) for hour_ns, _, _ in spans]
                continue
            if spans and not is_asked:
                law, reasons = laws.of(kin, window_ns)
                is_asked = True
            extra = laws.extra.get(subject.name)
            series = subject.series if extra is None else subject.series._replace(logged=extra.logged)
            is_handed = subject.replica.target_id in handed_to
            for span in spans:
                found.append(_valued(kin.machine, subject, series, (law, reasons), span, is_handed=is_handed))
    return found


def _left_out(subject: Subject, hour_ns: int) -> Valued:
    """A decode engine's hour: transfers are no savings."""
    loading = loading_of(subject.replica.connector, tuple(subject.observed.caches))
    return Valued(hour_ns, subject.observed.rows[0].row.target_id, None, None, loading, (TRANSFERRED,))


def _valued(
    machine: Machine | None,
    subject: Subject,
    series: Series,
    answer: tuple[Calibration | None, tuple[Reason, ...]],
    span: tuple[int, int, int],
    *,
    is_handed: bool,
) -> Valued:
    law, reasons = answer
    hour_ns, first, last = span
    rows = [one.row for one in subject.observed.rows]
    start_ns = round(series.at[first] * 1e9) + series.epoch_ns
    end_ns = round(series.at[last] * 1e9) + series.epoch_ns
    is_broken = any(row.flags & IDENTITY_BROKEN for row in rows if start_ns <= row.start_ns < end_ns)
    loading = loading_of(subject.replica.connector, tuple(subject.observed.caches))
    in_process = any(name.endswith("/lmcache") for name in subject.observed.caches)
    unread = _unread([row for row in rows if start_ns <= row.start_ns < end_ns])
    if unread and law is not None:
        named = ", ".join(shown_as(unread, subject.replica))
        text = f"{named} could not be read in a part of this time, so what was counted there is not known"
        law, reasons = None, (Reason(text, _UNREADABLE, refuses=True),)
    known = worth(machine, series, first, last, law) if machine is not None and law is not None else None
    has_outer = bool(subject.replica.connector or subject.observed.caches) and not is_handed
    if is_handed:
        known, reasons = None if known is None else hbm_alone(known), (*reasons, HANDED)
    why = None if known is None else untimed(known, subject.replica.connector or ("LMCache" if in_process else ""))
    reasons = reasons if why is None else (*reasons, why)
    return Valued(hour_ns, rows[0].target_id, known, law, loading, reasons, is_broken, has_outer)


def _unread(rows: Sequence[EngineRow]) -> list[str]:
    """Counters of which too much is missing to tell what happened when.

    The interval after one that is unknown has the counts of both, unless the engine began anew; but requests and their
    tokens are then apart.
    """
    ends = [row for row, following in pairwise(rows) if following.flags & RESET] + list(rows[-1:])
    whole_ns = sum(row.end_ns - row.start_ns for row in rows)
    unread: list[str] = []
    for name in NEEDED:
        unknown_ns = sum(row.end_ns - row.start_ns for row in rows if row.value(name) is None)
        if unknown_ns > UNREAD_SHARE * whole_ns or any(row.value(name) is None for row in ends):
            unread.append(name)
    return unread


def _hours(series: Series, start_ns: int, end_ns: int) -> list[tuple[int, int, int]]:
    """(hour, first scrape, last scrape) of the intervals that start in the window."""
    starts = series.instants_ns
    spans: list[tuple[int, int, int]] = []
    # a window may reach from 1970 on
    start_ns, end_ns = max(start_ns, int(starts[0])), min(end_ns, int(starts[-1]) + 1)
    for hour_ns in range(start_ns - start_ns % HOUR_NS, end_ns, HOUR_NS):
        low, high = max(hour_ns, start_ns), min(hour_ns + HOUR_NS, end_ns)
        first = int(np.searchsorted(starts, low, "left"))
        last = min(int(np.searchsorted(starts, high, "left")), len(starts) - 1)
        if first < last:
            spans.append((hour_ns, first, last))
    return spans


def settled_value(hour_ns: int, target_id: int, body: Mapping[str, Any], calibration: Calibration | None) -> Valued:
    """What a settlement kept of an hour; KeyError if it is not one of ours."""
    told = body["worth"]
    return Valued(
        hour_ns,
        target_id,
        None if told is None or calibration is None else worth_of(told),
        calibration,
        body["loading"],
        tuple(Reason(*reason) for reason in body["reasons"]),
        body["is_broken"],
        body["has_outer"],
    )


def values_of(
    reader: LedgerReader,
    window_ns: tuple[int, int],
    targets: Mapping[int, Target],
    laws: Laws,
    settled_hours: Sequence[int] = (),
) -> list[Valued]:
    """The worth of every replica over the window: `settled_hours` as they were settled, the rest worked out."""
    found = {(one.hour_ns, one.target_id): one for one in _settled(reader, laws, settled_hours)}
    # what was settled without a law is worked out, as long as its raw intervals are there
    known = {hour_ns for (hour_ns, _), one in found.items() if one.worth is not None}
    late = {hour_ns for (hour_ns, _), one in found.items() if NOT_CALIBRATED in one.reasons}
    whole_from = reader.whole_hours_from()
    hours = sorted(hour for hour in settled_hours if hour in known or whole_from is None or hour < whole_from)
    spans = [(hour, hour + HOUR_NS) for hour in hours if hour in late and whole_from is not None and hour >= whole_from]
    at = window_ns[0]
    for hour_ns in [*hours, window_ns[1]]:
        if at < hour_ns:
            spans.append((at, hour_ns))
        at = hour_ns + HOUR_NS
    for span in spans:
        for one in valued(reader, span, laws, targets):
            before = found.get((one.hour_ns, one.target_id))
            if before is None or before.worth is None:
                found[one.hour_ns, one.target_id] = one
    return list(found.values())


def _settled(reader: LedgerReader, laws: Laws, hours: Sequence[int]) -> list[Valued]:
    """What the settlements of these hours kept."""
    if not hours:
        return []
    wanted = set(hours)
    return [
        settled_value(hour_ns, target_id, saving.body, laws.numbered(saving.calibration_id))
        for (hour_ns, target_id), saving in reader.savings(min(hours), max(hours) + HOUR_NS).items()
        if hour_ns in wanted
    ]
