"""The part of the audit that looks at settled hours: their time, their charges and the prices of these."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Any, NamedTuple

from kvtally.agent.commitments import UNUSED
from kvtally.agent.finding import Finding, utc_text
from kvtally.agent.ledger import audit_queries as ask
from kvtally.agent.ledger.columns import HOUR_NS
from kvtally.agent.ledger.read import replica_of
from kvtally.agent.price import FOREVER_NS, UNITS
from kvtally.agent.rates import PriceGap, energy_cost_nano
from kvtally.agent.sharing import GPU_SHARED
from kvtally.agent.states import STATES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from kvtally.agent.facts import Replica
    from kvtally.agent.ledger.audit_queries import SettledHour
    from kvtally.agent.ledger.read import LedgerReader, Target
    from kvtally.agent.price import Rate
    from kvtally.agent.rates import RateBook


_SHARED = ("gpu", "server")


class Ledger(NamedTuple):
    """What every check is given."""

    reader: LedgerReader
    book: RateBook
    targets: Mapping[int, Target]
    rates: Mapping[int, Rate]
    clock_steps: Sequence[tuple[int, int]]
    whole_from_ns: int | None  # the first hour of which every raw engine interval is there; None: none is there at all

    def can_settle_again(self, hour: SettledHour) -> bool:
        """Whether this is the newest revision of its hour, and all raw intervals of the hour are there."""
        return hour.newest and self.whole_from_ns is not None and hour.start_ns >= self.whole_from_ns

    def name(self, target_id: int) -> str:
        """A target as findings name it."""
        target = self.targets.get(target_id)
        return f"{target.kind}/{target.name}" if target else f"target {target_id}"


class Settled(NamedTuple):
    """One replica of one settlement (or, with replica None, GPUs that none holds), and what it was charged."""

    hour: SettledHour
    replica: Replica | None
    entry: Mapping[str, Any]
    charges: Sequence[Mapping[str, Any]]
    runs: int  # stretches of time without a gap, at most

    @property
    def state_ns(self) -> Mapping[str, int]:
        """Nanoseconds by state."""
        return dict(self.entry["state_ns"])

    def finding(self, kind: str, message: str) -> Finding:
        """An error of this entry."""
        start_ns, end_ns, revision = self.hour.start_ns, self.hour.end_ns, self.hour.revision
        where = f"engine/{self.replica.name}" if self.replica else "gpu"
        text = f"hour {utc_text(start_ns)}, revision {revision}: {message}"
        return Finding(kind, "error", where, start_ns, end_ns, text)


def settlements(about: Ledger) -> Iterator[Finding]:
    """Every replica of every settlement passes the checks of SETTLED_CHECKS."""
    for hour in ask.settled(about.reader):
        charges: dict[tuple[int | None, str], list[Mapping[str, Any]]] = {}
        for charge in ask.charges_of(about.reader, hour):
            key = (charge["target_id"], charge["sku"] if charge["target_id"] is None else "")
            charges.setdefault(key, []).append(charge)
        for entry in hour.entries:
            target = about.targets.get(entry["target_id"])
            own = charges.pop((entry["target_id"], entry["sku"]), [])
            replica = replica_of(target) if target else None
            settled = Settled(hour, replica, entry, own, _runs(about, hour, entry))
            for one in SETTLED_CHECKS:
                yield from one(about, settled)
        for (target_id, sku), rest in charges.items():
            name = sku if target_id is None else about.name(target_id)
            message = f"{len(rest)} charges of {name} have no time that they are for"
            yield Finding("charge_unfounded", "error", name, hour.start_ns, hour.end_ns, message)
        yield from _overtaken(about, hour)


def _runs(about: Ledger, hour: SettledHour, entry: Mapping[str, Any]) -> int:
    """In how many stretches without a gap the entry's time lies, at most: each is rounded by itself."""
    target_id = entry["target_id"]
    if _is_shared(entry):  # whoever comes or goes cuts the time of all
        engines = sum(target.kind == "engine" for target in about.targets.values())
        return sum(ask.begun(about.reader, "engine", hour.start_ns).values()) + engines
    if target_id is not None and sum(entry["state_ns"].values()) == entry["end_ns"] - entry["start_ns"]:
        return 1
    begun = ask.begun(about.reader, "engine" if target_id is not None else "gpu", hour.start_ns)
    if target_id is not None:
        return begun.get(target_id, 0) + 1
    return sum(begun.values()) + sum(target.kind == "gpu" for target in about.targets.values())


def _overtaken(about: Ledger, hour: SettledHour) -> Iterator[Finding]:
    """The newest revision of an hour has all the time of its raw intervals, as long as these are there."""
    if not about.can_settle_again(hour):
        return
    settled = {entry["target_id"]: sum(entry["state_ns"].values()) for entry in hour.entries}
    for target_id, covered_ns in sorted(ask.covered(about.reader, hour.start_ns).items()):
        if covered_ns != settled.get(target_id, 0):
            message = (
                f"hour {utc_text(hour.start_ns)}: {settled.get(target_id, 0)} ns are settled, its intervals have "
                f"{covered_ns} ns; if they came later, `kvtally ledger settle` writes a revision"
            )
            yield Finding("hour_overtaken", "warning", about.name(target_id), hour.start_ns, hour.end_ns, message)


def states_partition_time(_: Ledger, one: Settled) -> Iterator[Finding]:
    """A state has no time below 0, and all states together have none beyond the replica's in the hour."""
    start_ns, end_ns = one.entry["start_ns"], one.entry["end_ns"]
    if not one.hour.start_ns <= start_ns <= end_ns <= one.hour.end_ns:
        yield one.finding("states_wrong", "it reaches beyond its hour")
    if min(one.state_ns.values(), default=0) < 0 or one.state_ns.keys() - set(STATES):
        yield one.finding("states_wrong", "a state's time cannot be")
    if one.replica and sum(one.state_ns.values()) > end_ns - start_ns:
        yield one.finding("states_wrong", "its states have more time than it has")


def split_sound(_: Ledger, one: Settled) -> Iterator[Finding]:
    """Where an hour keeps how its time divides, prefill has a share between none and all of it, and an interval."""
    split = one.entry["split"]
    if split is not None and not 0 <= split[0] <= split[1] <= split[2] <= 1:
        yield one.finding("split_wrong", f"prefill has {split[1]} of its time, from {split[0]} to {split[2]}")


def charges_present(_: Ledger, one: Settled) -> Iterator[Finding]:
    """A priced replica is charged for what it holds over all its time; one that has no price for nothing.

    Σ over the states of a resource's quantity is time x units, to the nanosecond for whole units. A price that
    changes cuts one interval by state anew, which may move a nanosecond per unit from state to state.
    """
    if not one.entry["priced"]:
        if one.charges:
            yield one.finding("charge_unfounded", "it has charges although its price was unknown")
        return
    total_ns = sum(one.state_ns.values())
    for resource, units in _held(one.replica).items():
        # a commitment that was not used up is paid for beside what was held
        own = [charge for charge in one.charges if charge["resource"] == resource and charge["state"] != UNUSED]
        pieces = one.runs * (2 * len({charge["rate_id"] for charge in own}) - 1) if own else 1
        charged = sum(charge["quantity"] for charge in own)
        lost = 0 if units.denominator == 1 else len(STATES) * pieces
        if resource in _SHARED and _is_shared(one.entry):
            if sum(charge["quantity"] for charge in own) > total_ns * units:
                yield one.finding("charge_quantity_wrong", f"{resource}: more is charged than it holds")
            continue
        if not total_ns * units - lost <= charged <= total_ns * units:
            message = f"{resource}: {charged} ns are charged, its time times what it holds is {float(total_ns * units)}"
            yield one.finding("charge_quantity_wrong", message)
        for state, state_ns in one.state_ns.items():
            quantity = sum(charge["quantity"] for charge in own if charge["state"] == state)
            if abs(quantity - state_ns * units) > lost + (pieces - 1) * units:
                message = f"{resource}, {state}: {quantity} ns are charged for {state_ns} ns of {units}"
                yield one.finding("charge_quantity_wrong", message)


def _is_shared(entry: Mapping[str, Any]) -> bool:
    """Whether another engine held the same GPUs for a part of the hour: each is then charged a part of them."""
    return any(kind == GPU_SHARED for kind, *_ in entry["findings"])


def _held(replica: Replica | None) -> dict[str, Fraction]:
    """Resources whose units the replica's own row tells."""
    if replica is None:
        return {"gpu": Fraction(1)}
    held = {"dram": replica.dram_gib, "storage": replica.storage_tib}
    held["gpu" if replica.gpu_units else "server"] = replica.gpu_units or Fraction(1)
    return {resource: units for resource, units in held.items() if units}


def amounts(about: Ledger, one: Settled) -> Iterator[Finding]:
    """Every amount is quantity x price.

    Under one price, a stretch of time without a gap costs quantity x price to the nano-unit (it is the difference of
    two rounded running totals). Sharing that out among the states moves less than one more from line to line. So a
    line may be off by 2 nano-units for each such stretch, and the states together by 1; a quantity that was cut to
    whole nanoseconds adds the price of one for each state.
    """
    groups: dict[tuple[str, int, bool], list[Mapping[str, Any]]] = {}
    for charge in one.charges:
        key = (charge["resource"], charge["rate_id"], charge["state"] == UNUSED)
        groups.setdefault(key, []).append(charge)
    for (resource, rate_id, unused), own in groups.items():
        rate = about.rates.get(rate_id)
        if rate is None or rate.resource != resource:
            continue  # `prices` tells
        stretches = 1 if unused else one.runs * len({key for key in groups if key[0] == resource and not key[2]})
        unit = _cost_nano(rate, 1)
        for charge in own:
            if charge["quantity"] < 0 or charge["amount_nano"] < 0:
                yield one.finding("charge_wrong", f"{resource}, {charge['state']}: below 0")
            apart = abs(charge["amount_nano"] - _cost_nano(rate, charge["quantity"]))
            if apart > stretches * (2 + unit):
                message = f"{resource}, {charge['state']}: the amount is {float(apart):.1f} nano-units off its price"
                yield one.finding("charge_wrong", message)
        total = sum(charge["amount_nano"] for charge in own)
        apart = abs(total - _cost_nano(rate, sum(charge["quantity"] for charge in own)))
        if apart > stretches * (1 + len(STATES) * unit):
            message = f"{resource}: the states together are {float(apart):.1f} nano-units off their price"
            yield one.finding("charge_wrong", message)


def _cost_nano(rate: Rate, quantity: int) -> Fraction:
    """What a quantity of nanoseconds times units, or of millijoules, costs; exact."""
    hours = UNITS[rate.resource][rate.unit]
    if hours is None:
        return energy_cost_nano(rate, quantity)
    return Fraction(rate.price_nano * quantity) / (hours * HOUR_NS)


def prices(about: Ledger, one: Settled) -> Iterator[Finding]:
    """Every charge names a price of its resource that held in its period, and that still does if it can be changed."""
    start_ns, end_ns = one.entry["start_ns"], one.entry["end_ns"]
    for charge in one.charges:
        what = f"{charge['resource']} {charge['sku']}".strip()
        rate = about.rates.get(charge["rate_id"])
        if rate is None or rate.resource != charge["resource"] or rate.sku not in {"", charge["sku"]}:
            yield one.finding(
                "rate_wrong", f"its charge of {what} names rate {charge['rate_id']}, which is not its price"
            )
        elif not rate.valid_from_ns < end_ns or (rate.valid_until_ns or FOREVER_NS) <= start_ns:
            yield one.finding("rate_wrong", f"its charge of {what} has a price that does not hold in this hour")
        elif one.replica and _superseded(about, one, charge, rate):
            message = f"the price of {what} has changed since; `kvtally ledger settle --again {utc_text(start_ns)}`"
            yield one.finding("rate_superseded", message)._replace(severity="info")


def _superseded(about: Ledger, one: Settled, charge: Mapping[str, Any], rate: Rate) -> bool:
    """Whether the newest revision of an hour, which could be settled again, has a price that the book has no more."""
    if one.replica is None or not about.can_settle_again(one.hour):
        return False
    asked = (rate.resource, charge["sku"], one.replica.term, one.replica.site)
    try:
        now = about.book.stretches(*asked, start_ns=one.entry["start_ns"], end_ns=one.entry["end_ns"])
    except PriceGap:
        return True
    return rate._replace(currency="") not in {stretch.rate._replace(currency="") for stretch in now}


SETTLED_CHECKS: tuple[Callable[[Ledger, Settled], Iterable[Finding]], ...] = (
    states_partition_time,
    split_sound,
    charges_present,
    amounts,
    prices,
)
