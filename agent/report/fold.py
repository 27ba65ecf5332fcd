"""Adds the facts of a window up to groups, and finds for each replica-hour what divides its occupied time."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from kvtally.agent.disaggregation import DECODE, PREFILL
from kvtally.agent.facts import CONNECTOR, VLLM
from kvtally.agent.grouping import key_of
from kvtally.agent.report.division import NO_COPIES, alike, by_pool, by_step_law, by_two_costs, copies_of
from kvtally.agent.report.spread import TWO_COSTS
from kvtally.agent.report.sums import Sums
from kvtally.agent.report.told import place_of
from kvtally.agent.savings import Reason
from kvtally.agent.savings_money import HOLDING
from kvtally.agent.split import lent
from kvtally.agent.words import TOLD_APART
from kvtally.collectors.registry import title_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kvtally.agent.facts import Facts, Line, Replica
    from kvtally.agent.finding import Finding
    from kvtally.agent.grouping import Key
    from kvtally.agent.price import Rate
    from kvtally.agent.report.division import Copies, Division
    from kvtally.agent.report.told import Told
    from kvtally.agent.split import Split

_POOLS = (PREFILL, DECODE)
_UNKNOWN_CONNECTOR = "nothing tells whether the engine waits for its KV connector"
_UNKNOWN_LOADING = "nothing tells whether {title} waits for what it loads"
_NO_STEP_LAW = Reason("they are parted by the step law, and there is none here")
_NO_SECONDS = Reason("no page of the tier tells how long it loads and stores (`kvtally doctor`)")


class Scale(NamedTuple):
    """Time that the step law divided, and what it had said of that time, of one replica; nanoseconds."""

    divided_ns: int = 0
    law_ns: float = 0.0
    start_ns: int = 2**63
    end_ns: int = 0


class SummedMoney(NamedTuple):
    """What settled hours cost, where no group parts them: summed in the ledger, which is fast.

    amounts     (target, resource, state, rate, nano-units) of all of them together
    worked      nano-units of occupied time, without what holding KV costs, by hour and target
    """

    amounts: Sequence[tuple[int | None, str, str, Rate, int]]
    worked: Mapping[tuple[int, int], int]


class _Hour(NamedTuple):
    """What of a replica-hour without a law the law of another needs."""

    sums: Sums
    replica: str
    occupied_ns: int
    worked_nano: int
    steps: int | None
    computed: int | None
    copies: Copies | None


class Fold:
    """Groups of facts by the dimensions of `by`.

    scales      of every replica that the step law served
    """

    def __init__(self, by: Sequence[str]) -> None:
        self._by = by
        self.groups: dict[Key, Sums] = {}
        self.spans: set[tuple[int, int]] = set()
        self.findings: list[Finding] = []
        self.scales: dict[str, Scale] = {}
        self._best: dict[str, Split] = {}
        self._latest: dict[str, tuple[Division, int | str]] = {}
        self._waiting: list[_Hour] = []

    def add(
        self, facts: Sequence[Facts], told: Mapping[tuple[int, int], Told], summed: SummedMoney | None = None
    ) -> None:
        """Add facts, in order of time, with what is told of each replica in them; `summed`: their lines are there."""
        holders: dict[int | None, Sums] = {}
        for one in facts:
            key = key_of(one, self._by)
            sums = self.groups.get(key)
            if sums is None:
                sums = self.groups[key] = Sums()
            sums.add(one)
            self.findings += one.findings
            replica = one.replica
            holders[None if replica is None else replica.target_id] = sums
            worked = _charged(sums, one.lines or ())
            if replica is not None:
                self.spans.add((one.start_ns, one.end_ns))
                place = place_of(one, replica)
                self._divide(sums, one, replica, worked + (summed.worked.get(place, 0) if summed else 0), told[place])
        for target_id, resource, state, rate, amount_nano in summed.amounts if summed else ():
            if target_id in holders:
                holders[target_id].charge(resource, state, rate, amount_nano)

    def finish(self) -> None:
        """Divide the hours that carry no law by that of their replica which was fitted to the most slices."""
        for hour in self._waiting:
            law = self._best.get(hour.replica)
            if law is not None:
                law = None if hour.steps is None or hour.computed is None else lent(law, hour.steps, hour.computed)
            if law is None:
                hour.sums.laws.add(None)
            else:
                hour.sums.divide(by_two_costs(hour.occupied_ns, law, hour.copies), TWO_COSTS, hour.worked_nano)
        self._waiting.clear()

    def _divide(self, sums: Sums, one: Facts, replica: Replica, worked_nano: int, told: Told) -> None:
        """Divide one replica's hour, as far as there is something to divide."""
        name, occupied = replica.name, one.state_ns.get("occupied", 0)
        if one.split is not None and (name not in self._best or one.split.slices > self._best[name].slices):
            self._best[name] = one.split
        copies = _copies(sums, one, replica, told)
        if not occupied:
            return
        if copies is None:
            sums.is_parted = False
        if replica.role in _POOLS:
            sums.divide(by_pool(occupied, replica.role, copies), TWO_COSTS, worked_nano)
            return
        steps, computed = one.work.get("steps"), one.work.get("computed_tokens")
        if name in self._latest and steps == computed == 0:
            before, law = self._latest[name]
            division: Division | None = alike(occupied, before)
        else:
            division, law = _division(occupied, one, told, copies)
        if division is None or division.law != "step law":
            for reason in told.reasons:
                sums.lack("step law", reason, one)
        if division is None:
            self._waiting.append(_Hour(sums, name, occupied, worked_nano, steps, computed, copies))
            return
        self._latest[name] = division, law
        sums.divide(division, law, worked_nano)
        if division.law == "step law":
            self._scale(name, division, one)

    def _scale(self, name: str, division: Division, one: Facts) -> None:
        scale = self.scales.get(name, Scale())
        self.scales[name] = Scale(
            scale.divided_ns + division.prefill_ns + division.decode_ns,
            scale.law_ns + division.law_ns,
            min(scale.start_ns, one.start_ns),
            max(scale.end_ns, one.end_ns),
        )


def _division(occupied_ns: int, one: Facts, told: Told, copies: Copies | None) -> tuple[Division | None, int | str]:
    """By the step law, else by the hour's own law of two costs; and the calibration behind it."""
    if told.parted is not None:
        division = by_step_law(occupied_ns, told.parted, copies)
        if division is not None:
            return division, told.calibration
    if one.split is not None:
        return by_two_costs(occupied_ns, one.split, copies), TWO_COSTS
    return None, TWO_COSTS


def _charged(sums: Sums, lines: Sequence[Line]) -> int:
    """Add lines to a group: nano-units of occupied time in them, without what holding KV costs."""
    worked = 0
    for line in lines:
        sums.charge(line.resource, line.state, line.rate, line.amount_nano)
        if line.state == "occupied" and line.resource not in HOLDING:
            worked += line.amount_nano
    return worked


def _copies(sums: Sums, one: Facts, replica: Replica, told: Told) -> Copies | None:
    """What the outer tiers took of the engine's time; nothing where there are none, None where nothing tells."""
    external = one.work.get("external_tokens")
    if external is None:
        external = one.work.get("external_hit_tokens") or 0
    hands_on = replica.role in _POOLS  # then the connector alone tells of no tier
    if replica.role == DECODE or not (external or told.has_cache or (replica.connector and not hands_on)):
        return NO_COPIES
    sums.is_outer = True
    _tell_apart(sums, told)
    copies = copies_of(told.parted, told.loading, external_tokens=external, is_told=told.has_cache)
    if copies is None and one.state_ns.get("occupied"):
        if told.loading == "unknown":
            reason = _unknown_loading(replica)
        else:
            reason = _NO_STEP_LAW if told.parted is None else _NO_SECONDS
        sums.lack("stall", reason, one)
    return copies


def _unknown_loading(replica: Replica) -> Reason:
    """Only vLLM has connectors, so that naming one may help."""
    if replica.engine == VLLM:
        return Reason(_UNKNOWN_CONNECTOR, f"name it {replica.in_config(CONNECTOR)}")
    return Reason(_UNKNOWN_LOADING.format(title=title_of(replica.engine)))


def _tell_apart(sums: Sums, told: Told) -> None:
    """Add external tokens by tier: as a law's hour has them, else as the engine or a cache's lookups tell."""
    parted = told.parted
    tokens = {} if parted is None else {tier: getattr(parted, f"{tier}_tokens") for tier in TOLD_APART}
    estimated = 0.0 if parted is None else parted.estimated_tokens
    if not any(tokens.values()) and told.tiers is not None:
        tokens, estimated = told.tiers.named(), told.tiers.estimated
    for tier, amount in tokens.items():
        sums.tiers[tier] += round(amount)
    sums.estimated_tokens += round(estimated)
