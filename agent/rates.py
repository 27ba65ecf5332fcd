"""What a resource costs at any instant: dated prices, integrated exactly and rounded so that spans add up."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from fractions import Fraction
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from kvtally.agent.price import (
    DAY_NS,
    FOREVER_NS,
    HOUR_NS,
    MILLIJOULES_PER_KWH,
    UNITS,
    Rate,
    RateError,
    Resource,
    Term,
    checked,
    instant_text,
    is_used_up,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

_TIMELINES_KEPT = 4096

_Key = tuple[bool, Resource, str, Term, str]
_Query = tuple[Resource, str, Term, str]


class PriceGap(Exception):  # noqa: N818  # it names the condition, as METHOD does; a report makes it a finding
    """No price is in force at `start_ns`; `command` is the line to type, with PRICE to fill in."""

    def __init__(
        self, resource: Resource, sku: str, start_ns: int, *, term: Term, site: str, currency: str, from_ns: int
    ) -> None:
        self.resource, self.sku, self.start_ns, self.term, self.site = resource, sku, start_ns, term, site
        options = [
            f"--unit {next(iter(UNITS[resource]))}",
            f"--sku {_quoted(sku)}" if sku else "",
            f"--site {_quoted(site)}" if site else "",
            f"--from {instant_text(from_ns)}",
            f"--term {term}",
            f"--currency {currency}" if currency not in {"", "USD"} else "",
        ]
        self.command = " ".join(["kvtally rates add", resource, "PRICE", *filter(None, options)])
        where = f" at site {site}" if site else ""
        name = f"{sku or resource} ({resource}, {term}{where})"
        super().__init__(f"no rate for {name} on {instant_text(start_ns)}: {self.command}")


class Stretch(NamedTuple):
    """A rate and the half-open time in which it is in force; `end_ns` is FOREVER_NS where nothing ends it."""

    rate: Rate
    start_ns: int
    end_ns: int


class ChargePart(NamedTuple):
    """The part of a charge that fell under one rate: `amount_nano` is exact, not rounded."""

    rate: Rate
    start_ns: int
    end_ns: int
    amount_nano: Fraction


class Used(NamedTuple):
    """Units held over a half-open time."""

    quantity: Fraction | int
    start_ns: int
    end_ns: int


class RateBook:
    """All prices of a ledger, in the order in which they were added; never changes.

    Raises RateError for a row that cannot be right and for operator rows of two currencies. Operator rows fix the
    currency: packaged prices of another are left out, except 0, which is 0 in any.
    """

    __slots__ = ("_rows", "_timelines", "currency", "rates")

    def __init__(self, rates: Iterable[Rate]) -> None:
        self.currency, self.rates = _one_currency([checked(rate) for rate in rates])
        self._rows = _superseded(self.rates)
        self._timelines: dict[_Query, tuple[Stretch, ...]] = {}

    def select(self, resource: Resource, sku: str, term: Term, site: str, at_ns: int) -> Rate | None:
        """Return the rate in force at an instant, or None.

        Operator rows come before packaged ones; then the exact sku before any, the exact site before any.
        """
        return _in_force(self._timeline((resource, sku, term, site)), at_ns)

    def stretches(
        self, resource: Resource, sku: str, term: Term, site: str, *, start_ns: int, end_ns: int
    ) -> list[Stretch]:
        """Return the rates in force, cut to [start, end); PriceGap if any part of it has none."""
        timeline = self._timeline((resource, sku, term, site))
        cut: list[Stretch] = []
        reached, last_end = start_ns, 0
        for index in range(max(bisect_right(timeline, start_ns, key=_start) - 1, 0), len(timeline)):
            stretch = timeline[index]
            if reached >= end_ns or stretch.start_ns > reached:
                break
            last_end = stretch.end_ns
            if stretch.end_ns > reached:
                upto = min(stretch.end_ns, end_ns)
                cut.append(Stretch(stretch.rate, reached, upto))
                reached = upto
        if reached < end_ns:
            midnight = reached - reached % DAY_NS
            from_ns = max(midnight, last_end)  # a row from midnight would replace one in force earlier that day
            raise PriceGap(resource, sku, reached, term=term, site=site, currency=self.currency, from_ns=from_ns)
        return cut

    def amount_nano(
        self,
        resource: Resource,
        sku: str,
        term: Term,
        site: str,
        *,
        quantity: Fraction | int,
        start_ns: int,
        end_ns: int,
    ) -> tuple[ChargePart, ...]:
        """Return what `quantity` costs over [start, end), cut at price changes; PriceGap if any part has no price.

        The quantity is what was held all the time (GPUs, GiB, TiB), or for kWh (as metered: the rate's PUE is
        applied here) and GiB of network what was used in all, spread evenly.
        """
        _refuse_impossible(resource, quantity, start_ns, end_ns)
        cut = self.stretches(resource, sku, term, site, start_ns=start_ns, end_ns=end_ns)
        spread_ns = end_ns - start_ns
        return tuple(ChargePart(*s, _slope(s.rate, quantity, spread_ns) * (s.end_ns - s.start_ns)) for s in cut)

    def commitments(self) -> tuple[Stretch, ...]:
        """Return every row that is paid for whether used or not, and when it is in force."""
        return tuple(s for row in self._rows.values() for s in row if s.rate.committed is not None)

    def _timeline(self, query: _Query) -> tuple[Stretch, ...]:
        found = self._timelines.get(query)
        if found is None:
            if len(self._timelines) >= _TIMELINES_KEPT:  # names come from telemetry: do not grow without bound
                self._timelines.clear()
            rows = [self._rows[key] for key in _preference(*query) if key in self._rows]
            found = self._timelines[query] = _overlaid(rows)
        return found


def charge_nano(
    book: RateBook,
    resource: Resource,
    sku: str,
    term: Term,
    site: str,
    *,
    quantity: Fraction | int,
    start_ns: int,
    end_ns: int,
    used_over_ns: tuple[int, int] | None = None,
) -> int:
    """Return what `quantity` costs over [start, end) in whole nano-units; any partition of time adds up exactly.

    Under each rate the charge is round_half_even(A(end)) - round_half_even(A(start)), A(t) being what the quantity
    would have cost from the unix epoch to t at that rate: so A depends neither on the window asked for nor on rates
    for other times. Of a quantity that was used up (kWh, GiB of network), [start, end) may be a part of the span
    `used_over_ns` in which all of it was used. Raises PriceGap if any part has no price.
    """
    _refuse_impossible(resource, quantity, start_ns, end_ns)
    first_ns, last_ns = used_over_ns or (start_ns, end_ns)
    if not first_ns <= start_ns <= end_ns <= last_ns:
        raise ValueError(f"[{start_ns}, {end_ns}) is no part of [{first_ns}, {last_ns})")
    cut = book.stretches(resource, sku, term, site, start_ns=start_ns, end_ns=end_ns)
    return sum(_accrued(_slope(s.rate, quantity, last_ns - first_ns), s.start_ns, s.end_ns) for s in cut)


def unused_commitment_nano(commitment: Stretch, used: Iterable[Used], start_ns: int, end_ns: int) -> int:
    """Return what the committed units cost over [start, end) while unused; any partition of time adds up exactly.

    `used` are the units that this rate priced; their spans may overlap. More use than committed at one moment does
    not make up for less at another.
    """
    rate = commitment.rate
    low, high = max(start_ns, commitment.start_ns), min(end_ns, commitment.end_ns)
    if rate.committed is None or high <= low:
        return 0
    changes: defaultdict[int, Fraction | int] = defaultdict(int, {low: 0, high: 0})
    for quantity, begin_ns, finish_ns in used:
        if max(begin_ns, low) < min(finish_ns, high):
            changes[max(begin_ns, low)] += quantity
            changes[min(finish_ns, high)] -= quantity
    held: Fraction | int = 0
    total_nano = 0
    for at_ns, until_ns in pairwise(sorted(changes)):
        held += changes[at_ns]
        total_nano += _accrued(_slope(rate, max(rate.committed - held, 0), 0), at_ns, until_ns)
    return total_nano


def energy_cost_nano(rate: Rate, energy_mj: int) -> Fraction:
    """Return what metered millijoules cost at an energy rate, PUE included; exact."""
    return Fraction(energy_mj, MILLIJOULES_PER_KWH) * _unit_price(rate)


def _refuse_impossible(resource: Resource, quantity: Fraction | int, start_ns: int, end_ns: int) -> None:
    if end_ns < start_ns or quantity < 0:
        raise ValueError(f"cannot charge {quantity} of {resource} from {start_ns} to {end_ns}")
    if end_ns == start_ns and quantity and is_used_up(resource):
        raise ValueError(f"{quantity} of {resource} used in no time at {start_ns}: it would be lost")


def _one_currency(rates: Sequence[Rate]) -> tuple[str, tuple[Rate, ...]]:
    stated = [rate for rate in rates if not rate.packaged] or rates
    currency = stated[0].currency if stated else ""
    for rate in stated:
        if rate.currency != currency:
            raise RateError("currency", f"{rate.currency} beside {currency}: a ledger has one currency")
    kept = (rate for rate in rates if rate.currency == currency or not rate.price_nano)
    return currency, tuple(rate._replace(currency=currency) for rate in kept)


def _superseded(rates: Iterable[Rate]) -> dict[_Key, tuple[Stretch, ...]]:
    """Per key, when each row is in force: a later one ends an earlier one for good, even if it ends itself."""
    by_key: defaultdict[_Key, dict[int, Rate]] = defaultdict(dict)
    for rate in rates:
        by_key[rate.packaged, rate.resource, rate.sku, rate.term, rate.site][rate.valid_from_ns] = rate
    return {
        key: tuple(
            Stretch(dated[start_ns], start_ns, min(dated[start_ns].valid_until_ns or FOREVER_NS, following_ns))
            for start_ns, following_ns in pairwise([*sorted(dated), FOREVER_NS])
        )
        for key, dated in by_key.items()
    }


def _preference(resource: Resource, sku: str, term: Term, site: str) -> Iterator[_Key]:
    for packaged in (False, True):
        for named in dict.fromkeys((sku, "")):
            for placed in dict.fromkeys((site, "")):
                yield packaged, resource, named, term, placed


def _overlaid(rows: Sequence[tuple[Stretch, ...]]) -> tuple[Stretch, ...]:
    """One timeline of several, the first that has a price winning at every instant."""
    if len(rows) == 1:
        return rows[0]
    edges = sorted({edge for row in rows for s in row for edge in (s.start_ns, s.end_ns)})
    shown: list[Stretch] = []
    for start_ns, end_ns in pairwise(edges):
        rate = next((found for row in rows if (found := _in_force(row, start_ns)) is not None), None)
        if rate is None:
            continue
        if shown and shown[-1].rate is rate:
            shown[-1] = shown[-1]._replace(end_ns=end_ns)
        else:
            shown.append(Stretch(rate, start_ns, end_ns))
    return tuple(shown)


def _in_force(timeline: tuple[Stretch, ...], at_ns: int) -> Rate | None:
    index = bisect_right(timeline, at_ns, key=_start) - 1
    return timeline[index].rate if index >= 0 and at_ns < timeline[index].end_ns else None


def _start(stretch: Stretch) -> int:
    return stretch.start_ns


def _unit_price(rate: Rate) -> Fraction:
    """Nano-units per unit as metered: with the PUE, where there is one."""
    return Fraction(rate.price_nano) if rate.pue is None else rate.price_nano * Fraction(rate.pue)


def _slope(rate: Rate, quantity: Fraction | int, used_over_ns: int) -> Fraction:
    """Nano-units per nanosecond: of a quantity held, or of one used up evenly over `used_over_ns`."""
    hours = UNITS[rate.resource][rate.unit]
    return _unit_price(rate) * quantity / (used_over_ns if hours is None else hours * HOUR_NS)


def _accrued(slope: Fraction, start_ns: int, end_ns: int) -> int:
    return round(slope * end_ns) - round(slope * start_ns)  # round() of a Fraction goes half to even


def _quoted(name: str) -> str:
    if not set(name) & set('"$`\\!'):
        return f'"{name}"'
    import shlex  # noqa: PLC0415  # hardly any product is named so

    return shlex.quote(name)
