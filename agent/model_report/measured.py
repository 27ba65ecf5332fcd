"""Times to first token that were measured, by prompt length and reuse, each beside what the law says of it."""

from __future__ import annotations

import math
from statistics import median
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from kvtally.agent.forward import Law, LawRange
    from kvtally.agent.steplaw.alone import Alone

Seen = Literal["engine", "client"]
MOST_ROWS = 48
MOST_LENGTHS = 4
# of the longest prompt in a class over the shortest, and of reuse; the first that leaves few enough rows
_WIDTHS = ((1.1, 0.05), (1.25, 0.1), (1.6, 0.1), (2.5, 0.25), (6, 0.25), (math.inf, 0.25))
NEAR = 1.1  # of a panel's prompt, for a point to be drawn there
_NO_REUSE = 0.025


class Point(NamedTuple):
    """One request that ran alone, who saw it, and what each law says of it."""

    seen_by: Seen
    request: Alone
    predicted: tuple[float, float, float]

    @property
    def reuse(self) -> float:
        """As the curves have it: one token is always computed."""
        return min(1.0, self.request.reused_tokens / max(self.request.prompt_tokens - 1, 1))

    @property
    def tier(self) -> str:
        """Where the reused tokens came from."""
        one = self.request
        if one.reused_tokens < 1:
            return "none"
        if one.outer_tokens is None:
            return "unknown"
        if one.outer_tokens < 1:
            return "hbm"
        return "outer" if one.outer_tokens > one.reused_tokens - 1 else "both"


def points_of(seen_by: Seen, requests: Iterable[Alone], laws: LawRange, *, stalls: bool) -> list[Point]:
    """Every request with its prediction, to which the copies of the outer tiers are added where they stall it."""

    def by(law: Law, one: Alone) -> float:
        copies = one.copies_seconds if stalls else 0.0
        return law.first_token_seconds + law.prefill_seconds(one.prompt_tokens, one.reused_tokens) + copies

    return [
        Point(seen_by, one, (by(laws.fast, one), by(laws.point, one), by(laws.slow, one)))
        for one in requests
        if one.prompt_tokens - one.reused_tokens >= 1
    ]


def measured_rows(points: Sequence[Point]) -> list[dict[str, Any]]:
    """Rows by prompt length, reuse, and who saw them: medians, since a first request may wait for a compiler."""
    groups: dict[tuple[int, int, str, str], list[Point]] = {}
    for width, step in _WIDTHS:
        groups = _grouped(points, width, step)
        if len(groups) <= MOST_ROWS:
            break
    cold = {(key[0], key[3]): group for key, group in groups.items() if all(one.reuse < _NO_REUSE for one in group)}
    return [_row(group, cold.get((key[0], key[3]))) for key, group in sorted(groups.items())]


def _grouped(points: Sequence[Point], width: float, step: float) -> dict[tuple[int, int, str, str], list[Point]]:
    groups: dict[tuple[int, int, str, str], list[Point]] = {}
    length, shortest = -1, 0.0
    for one in sorted(points, key=lambda point: point.request.prompt_tokens):
        if length < 0 or one.request.prompt_tokens > width * shortest:
            length, shortest = length + 1, one.request.prompt_tokens
        groups.setdefault((length, round(one.reuse / step), one.tier, one.seen_by), []).append(one)
    return groups


def _row(group: Sequence[Point], cold: Sequence[Point] | None) -> dict[str, Any]:
    seconds = [one.request.seconds for one in group]
    low, point, high = (median(one.predicted[end] for one in group) for end in range(3))
    measured = median(seconds)
    return {
        "prompt_tokens": round(median(one.request.prompt_tokens for one in group)),
        "reuse": median(one.reuse for one in group),
        "tier": group[0].tier,
        "seen_by": group[0].seen_by,
        "requests": len(group),
        "seconds": {"low": min(seconds), "point": measured, "high": max(seconds)},
        "basis": "MEASURED",
        "predicted_seconds": {"low": low, "point": point, "high": high},
        "predicted_basis": "MODELLED",
        "copies_seconds": median(one.request.copies_seconds for one in group),
        "error": point / measured - 1,
        "saved": None if cold is None or cold is group else _saved(group, cold),
    }


def _saved(group: Sequence[Point], cold: Sequence[Point]) -> dict[str, float | None]:
    """What reuse took off, against requests of that length without any: what a client adds to both is not in it."""
    measured = median(one.request.seconds for one in cold) - median(one.request.seconds for one in group)
    predicted = median(one.predicted[1] for one in cold) - median(one.predicted[1] for one in group)
    return {
        "seconds": measured,
        "predicted_seconds": predicted,
        "error": predicted / measured - 1 if measured > 0 else None,
    }


def near(rows: Iterable[Mapping[str, Any]], prompt: int) -> list[Mapping[str, Any]]:
    """Rows of about this prompt length."""
    return [row for row in rows if prompt / NEAR <= row["prompt_tokens"] <= prompt * NEAR]


def lengths_of(rows: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
    """The prompt lengths with most levels of reuse, shortest first: those with more than one, else the longest."""
    left = list(rows)
    found: list[int] = []
    while left and len(found) < MOST_LENGTHS:
        best = max({row["prompt_tokens"] for row in left}, key=lambda length: (_levels(left, length), length))
        if found and _levels(left, best) == 1:
            break
        found.append(max(best, 2))
        taken = near(left, best)
        left = [row for row in left if row not in taken]
    return tuple(sorted(found))


def _levels(rows: Iterable[Mapping[str, Any]], length: int) -> int:
    return len({round(row["reuse"], 1) for row in near(rows, length)})


def client_seconds(points: Iterable[Point]) -> float | None:
    """What a client's time has beyond the law's, at the median: tokenising, and the way there and back."""
    beyond = [one.request.seconds - one.predicted[1] for one in points if one.seen_by == "client"]
    return median(beyond) if beyond else None
