"""How estimates compare with the truth: bias, error, coverage, and the table that shows them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_SMALL = 0.02  # of the seconds without caches: below that a relative error says nothing


class Result(NamedTuple):
    """One estimate with its truth."""

    who: str
    scenario: str
    seed: int
    rung: str
    quantity: str
    truth: float
    full: float
    low: float
    point: float
    high: float


class Score(NamedTuple):
    """How one estimator did at one rung on one scenario; errors in percent of the truth.

    Where the truth is below 2 % of the seconds without caches, in percent of those instead: `small` says so.
    """

    who: str
    scenario: str
    rung: str
    quantity: str
    cases: int
    bias: float
    rmse: float
    coverage: float
    half_width: float
    small: bool


def scores(found: Iterable[Result]) -> list[Score]:
    """Bias, root mean square error and 90 % coverage by estimator, scenario, rung and quantity."""
    groups: dict[tuple[str, str, str, str], list[Result]] = {}
    for one in found:
        groups.setdefault((one.quantity, one.rung, one.scenario, one.who), []).append(one)
    return [_score(group) for _, group in sorted(groups.items())]


def _score(group: Sequence[Result]) -> Score:
    truth, full = (np.array([getattr(one, name) for one in group]) for name in ("truth", "full"))
    low, point, high = (np.array([getattr(one, name) for one in group]) for name in ("low", "point", "high"))
    small = bool(np.mean(np.abs(truth)) < _SMALL * np.mean(full))
    errors = 100 * (point - truth) / (full if small else truth)
    widths = 50 * (high - low) / (full if small else truth)
    first = group[0]
    return Score(
        who=first.who,
        scenario=first.scenario,
        rung=first.rung,
        quantity=first.quantity,
        cases=len(group),
        bias=float(errors.mean()),
        rmse=float(np.sqrt((errors**2).mean())),
        coverage=float(100 * np.mean((low <= truth) & (truth <= high))),
        half_width=float(widths.mean()),
        small=small,
    )


def table(found: Iterable[Score]) -> str:
    """The scores as text, a line each, and the median of each estimator at each rung."""
    rows = [
        f"{'quantity':9}{'rung':7}{'scenario':14}{'who':10}{'n':>3}{'bias %':>9}{'rmse %':>9}{'cover %':>9}{'+-%':>7}"
    ]
    ordered = list(found)
    for one in ordered:
        mark = " of the seconds without caches" if one.small else ""
        rows.append(
            f"{one.quantity:9}{one.rung:7}{one.scenario:14}{one.who:10}{one.cases:3}{one.bias:9.1f}{one.rmse:9.1f}"
            f"{one.coverage:9.0f}{one.half_width:7.0f}{mark}"
        )
    for quantity, rung, who in sorted({(one.quantity, one.rung, one.who) for one in ordered}):
        same = [one for one in ordered if (one.quantity, one.rung, one.who, one.small) == (quantity, rung, who, False)]
        if same:
            errors, covered = [one.rmse for one in same], float(np.mean([one.coverage for one in same]))
            rows.append(
                f"{quantity:9}{rung:7}{'median, worst':14}{who:10}{len(same):3}{'':9}{np.median(errors):9.1f}"
                f"{covered:9.0f}  worst {max(errors):.0f} %"
            )
    return "\n".join(rows)
