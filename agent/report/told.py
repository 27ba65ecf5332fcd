"""What the step law says of every replica-hour of a part of the window: as it was settled, or worked out now."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, cast

from kvtally.agent.facts import MODEL_CONFIG
from kvtally.agent.ledger import settled
from kvtally.agent.ledger.columns import HOUR_NS
from kvtally.agent.ledger.settled import Parted
from kvtally.agent.outer_tiers import Behind, is_apart, outer_tiers
from kvtally.agent.savings import Reason, loading_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kvtally.agent.accounts import Part
    from kvtally.agent.facts import Facts, Replica
    from kvtally.agent.ledger.read import LedgerReader, Target
    from kvtally.agent.outer_tiers import OuterTiers
    from kvtally.agent.report.spread import Covariance
    from kvtally.agent.savings import Loading
    from kvtally.agent.valuing import Laws
    from kvtally.agent.worth import Worth

_SETTLED_WITHOUT = Reason("the hour was settled without it", "`kvtally ledger settle --again TIME` settles it anew")
_NOTHING_BEGAN = Reason("no interval began in this time")


class Told(NamedTuple):
    """One replica in one hour; parted None where there is no step law, and `reasons` say why.

    calibration     number of the law, or the fingerprint of one that is not stored
    has_cache       a page of an outer cache tier of this engine is in the ledger
    tiers           external tokens by tier for where no law parts them; None where neither engine nor cache tells
    """

    parted: Parted | None
    loading: Loading
    calibration: int | str
    has_cache: bool
    reasons: tuple[Reason, ...] = ()
    tiers: OuterTiers | None = None


class StepLaws:
    """The step laws of a ledger, and what they say; numpy is loaded only where one has to be applied now.

    covariances     of the logs of the parameters, by the laws that were of use
    """

    def __init__(self, reader: LedgerReader, targets: Mapping[int, Target]) -> None:
        self._reader = reader
        self._targets = targets
        self._behind = Behind(targets)
        self._stored: dict[int, Covariance] | None = None
        self._laws: Laws | None = None
        self.covariances: dict[int | str, Covariance] = {}

    def of(self, part: Part, facts: Sequence[Facts]) -> dict[tuple[int, int], Told]:
        """What is told of the replicas in a part's facts, by hour and target."""
        found: dict[tuple[int, int], Told] = {}
        if part.hours:
            found = self._settled(part.hours)
        elif any(one.replica is not None and one.replica.shape for one in facts):
            found = self._valued(part.window)
        untold: dict[int, Told] = {}
        for one in facts:
            if one.replica is None or (place := place_of(one, one.replica)) in found:
                continue
            if one.replica.target_id not in untold:
                untold[one.replica.target_id] = self._untold(one.replica, is_settled=bool(part.hours))
            found[place] = untold[one.replica.target_id]
        parted = {place for place, told in found.items() if told.parted is not None and is_apart(told.parted)}
        tiers_of = outer_tiers(self._reader, part, facts, self._behind, self._targets, parted=parted)
        for place, tiers in tiers_of.items():
            found[place] = found[place]._replace(tiers=tiers)
        return found

    def _untold(self, replica: Replica, *, is_settled: bool) -> Told:
        caches = [cache.name for cache in self._behind.of(replica.name)]
        if not replica.shape:
            hint = f"say where its config.json lies, {replica.in_config(MODEL_CONFIG)}"
            reason = Reason(f"the shape of model {replica.model or '?'} is not known", hint)
        else:
            reason = _SETTLED_WITHOUT if is_settled else _NOTHING_BEGAN
        return Told(None, loading_of(replica.connector, caches), 0, bool(caches), (reason,))

    def _settled(self, hours: dict[int, int]) -> dict[tuple[int, int], Told]:
        found: dict[tuple[int, int], Told] = {}
        for hour_ns, target_id, number, saving in settled.savings(self._reader, hours):
            is_stored = number is not None and self._is_stored(number)
            found[hour_ns, target_id] = Told(
                saving.worth if is_stored else None,
                cast("Loading", saving.loading),
                number or 0,
                self._has_cache(target_id),
                tuple(Reason(*reason) for reason in saving.reasons) or (_SETTLED_WITHOUT,),
            )
        return found

    def _is_stored(self, number: int) -> bool:
        if self._stored is None:
            self._stored = {one.id: one.calibration.covariance for one in self._reader.calibrations()}
        if number in self._stored:
            self.covariances[number] = self._stored[number]
        return number in self._stored

    def _has_cache(self, target_id: int) -> bool:
        return bool(self._behind.of(self._targets[target_id].name))

    def _valued(self, window_ns: tuple[int, int]) -> dict[tuple[int, int], Told]:
        from kvtally.agent.valuing import Laws, valued  # noqa: PLC0415  # numpy is loaded only where there is a law

        if self._laws is None:
            self._laws = Laws(self._reader, self._targets)
        found: dict[tuple[int, int], Told] = {}
        for value in valued(self._reader, window_ns, self._laws, self._targets):
            law = value.calibration
            number: int | str = 0
            if law is not None:
                number = law.fingerprint.text() if law.id is None else law.id
                self.covariances[number] = law.covariance
            found[value.hour_ns, value.target_id] = Told(
                None if value.worth is None else parted_of(value.worth),
                value.loading,
                number,
                self._has_cache(value.target_id),
                value.reasons,
            )
        return found


def parted_of(worth: Worth) -> Parted:
    """What of a worth parts occupied time."""
    return Parted(*(getattr(worth, name) for name in Parted.__struct_fields__))


def place_of(facts: Facts, replica: Replica) -> tuple[int, int]:
    """The hour and the target of a replica's facts."""
    return facts.period_ns - facts.period_ns % HOUR_NS, replica.target_id
