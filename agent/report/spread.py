"""Occupied time, or what it cost, by what it was spent on, added up over hours, with 90 % intervals. Pure.

Points are whole nanoseconds or nano-units, and sum exactly. The interval of prefill joins, as errors that do not
depend on each other,

- what is a matter of view: half of the gain of a step that prefill and decode share may be charged to either (the
  marginal views of METHOD 2.4; METHOD 4.4 takes such a range for an error of its half). All hours lean the same way.
- the calibration's error: sqrt(g' C g), where C is the covariance of the logs of the law's parameters and g sums the
  derivatives of prefill by them over all hours under that calibration. Calibrations are independent of each other.
- the error of the law's form: the ratio of prefill to decode may be wrong by savings.DISCREPANCY.
- what the law of two costs says of its own error, for hours that it divides.
- what the engine really stood still for loading and storing: savings.LOAD_RANGE and STORE_RANGE of what the connector's
  own timers say; prefill and decode share what that leaves.

Decode has the same errors mirrored.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import hypot, sqrt
from typing import TYPE_CHECKING

from kvtally.agent.costing import apportioned
from kvtally.agent.report.division import NO_COPIES
from kvtally.agent.savings import DISCREPANCY, LOAD_RANGE, STORE_RANGE, Z90
from kvtally.agent.unit_cost import Bounds, Shares
from kvtally.agent.words import PARTS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvtally.agent.report.division import Division

Covariance = tuple[tuple[float, ...], ...]
Covariances = Mapping[int | str, Covariance]  # of the logs of the parameters, by law

TWO_COSTS = 0  # stands for a calibration where the law of two costs divides, or where nothing needs to be divided
_PLACES = 11  # of a price in nano-units per nanosecond: hours at the same price differ in its rounding alone
LESS_LOADING, MORE_LOADING = 1 - LOAD_RANGE[0], LOAD_RANGE[1] - 1
LESS_STORING, MORE_STORING = 1 - STORE_RANGE[0], STORE_RANGE[1] - 1


class Spread:
    """Adds up hours: `time` in nanoseconds and `money` in nano-units, each by what it went into.

    What is uncertain of an hour's division is as long a vector of nanoseconds for all hours that share a calibration
    and a price; it adds up over them, and turned into money it is multiplied by the price.
    """

    __slots__ = ("_gaps", "money", "time")

    def __init__(self) -> None:
        self.time = dict.fromkeys(PARTS, 0)
        self.money = dict.fromkeys(PARTS, 0)
        self._gaps: dict[tuple[int | str, float], list[float]] = {}

    def add(self, division: Division, calibration: int | str, worked_nano: int) -> None:
        """Add an hour's time and what that cost, divided under a calibration."""
        time, money = self.time, self.money
        stall_ns, store_ns = division.copies or NO_COPIES
        prefill_ns, left_ns = division.prefill_ns, division.prefill_ns + division.decode_ns
        time["prefill"] += prefill_ns
        time["decode"] += division.decode_ns
        time["stall"] += stall_ns
        time["store"] += store_ns
        price = 0.0
        if worked_nano:
            price = round(worked_nano / (left_ns + stall_ns + store_ns), _PLACES)
            parts = {name: part for name, part in division.parts.items() if part}
            for name, amount in apportioned(worked_nano, parts).items():
                money[name] += amount
        share = prefill_ns / left_ns if left_ns else 0.0
        gaps = [max(prefill_ns - division.low_ns, 0.0), max(division.high_ns - prefill_ns, 0.0)]
        gaps += [share * stall_ns, share * store_ns]
        if division.law == "step law":
            gaps += [share * division.decode_ns, *division.by]
        known = self._gaps.get((calibration, price))
        self._gaps[calibration, price] = gaps if known is None else [a + b for a, b in zip(known, gaps, strict=True)]

    def shares_of_time(self, covariances: Covariances, *, parted: bool) -> Shares:
        """Time with its intervals; `parted`: stall and store are known of every hour."""
        return _shares(self.time, [(law, gaps) for (law, _), gaps in self._gaps.items()], covariances, parted=parted)

    def shares_of_money(self, covariances: Covariances, *, parted: bool) -> Shares:
        """Money with its intervals."""
        priced = [(law, [price * gap for gap in gaps]) for (law, price), gaps in self._gaps.items()]
        return _shares(self.money, priced, covariances, parted=parted)


def _shares(
    sums: Mapping[str, int],
    uncertain: Sequence[tuple[int | str, list[float]]],
    covariances: Covariances,
    *,
    parted: bool,
) -> Shares:
    laws: dict[int | str, list[float]] = {}
    for law, gaps in uncertain:
        known = laws.get(law)
        laws[law] = gaps if known is None else [a + b for a, b in zip(known, gaps, strict=True)]
    lent = laws.pop(TWO_COSTS, [0.0] * 4)
    views = [sum(gaps[place] for gaps in laws.values()) for place in range(5)]
    variance = sum(_quadratic(gaps[5:], covariances[law]) for law, gaps in laws.items())
    law_error = Z90 * hypot(sqrt(variance), DISCREPANCY * views[4])
    down, up = (hypot(lent[place], views[place], law_error) for place in (0, 1))
    stall, store = lent[2] + views[2], lent[3] + views[3]  # what of them prefill would have, if they were less
    whole = sum(sums.values())
    prefill = _around(sums["prefill"], _joined(down, up, stall, store), whole)
    decode = _around(sums["decode"], _joined(up, down, sums["stall"] - stall, sums["store"] - store), whole)
    if not parted:
        return Shares(prefill, decode, None, None)
    copies = ((sums["stall"], LOAD_RANGE), (sums["store"], STORE_RANGE))
    return Shares(prefill, decode, *(Bounds(low * point, point, high * point) for point, (low, high) in copies))


def _joined(down: float, up: float, stall: float, store: float) -> tuple[float, float]:
    """Errors down and up, with those of what loading and storing took away from this part."""
    return (
        hypot(down, MORE_LOADING * stall, MORE_STORING * store),
        hypot(up, LESS_LOADING * stall, LESS_STORING * store),
    )


def _around(point: int, gaps: tuple[float, float], most: int) -> Bounds:
    return Bounds(max(point - gaps[0], 0.0), point, min(point + gaps[1], float(most)))


def _quadratic(by: Sequence[float], covariance: Covariance) -> float:
    total = sum(
        one * sum(other * value for other, value in zip(by, row, strict=True))
        for one, row in zip(by, covariance, strict=True)
    )
    return max(total, 0.0)
