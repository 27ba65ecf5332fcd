"""The requests of a group by how much they reused: rows that sum to what reuse avoided."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvtally.agent.explain.arithmetic import rounded
from kvtally.agent.explain.figure import places_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvtally.agent.steplaw.explained import RequestClass

COUPLINGS = (
    "The counters tell how long prompts were and how much was computed, not which prompt computed how much. Three "
    "couplings bound that: together (long prompts compute much, so reuse saved early, cheap tokens), mixed (neither: "
    "the rows above), apart (long prompts compute little)."
)
LOGGED = "A log of the requests told prompt and reused tokens of each: the three couplings are one."


def classes_json(
    found: Sequence[RequestClass], mixed: float, elsewhere: float, gone: str, *, is_logged: bool
) -> dict[str, Any]:
    """Classes as JSON; `mixed` is W under that coupling, `elsewhere` the part in hours that `gone` speaks of."""
    places = places_of(mixed)
    rows = [_row(one, places) for one in found]
    if gone:
        rows.append(_only(gone, elsewhere, places))
    # each figure is rounded first and then computed with: what is left over has a row of its own
    left = mixed - sum(float(row["avoided"]) for row in rows)
    if abs(left) >= 10.0**-places * (len(rows) + 1):
        rows.append(_only("what has come to the ledger since the hours were settled", left, places))
    total = {
        name: rounded(sum(float(row[name]) for row in rows if row[name] is not None), digits)
        for name, digits in (("requests", 1), ("nothing", places), ("actual", places), ("avoided", places))
    }
    avoided = float(total["avoided"])
    for row in rows:
        row["share"] = rounded(float(row["avoided"]) / avoided, 3) if avoided else None
    return {"rows": rows, "total": total, "couplings": LOGGED if is_logged else COUPLINGS}


def _row(one: RequestClass, places: int) -> dict[str, Any]:
    nothing, actual = rounded(one.nothing, places), rounded(one.actual, places)
    return {
        "name": None,
        "reused_from": None if one.high < 1 else max(1, round(one.low)),
        "reused_below": None if one.high < 1 else round(one.high),
        "requests": rounded(one.requests, 1),
        "mean_prompt_tokens": rounded(one.prompt_tokens, 0),
        "mean_reused_tokens": rounded(one.reused_tokens, 0),
        "nothing": nothing,
        "actual": actual,
        "avoided": rounded(float(nothing) - float(actual), places),
    }


def _only(name: str, avoided: float, places: int) -> dict[str, Any]:
    """A row of which only the avoided seconds are known."""
    unknown = ("reused_from", "reused_below", "requests", "mean_prompt_tokens", "mean_reused_tokens")
    return {
        "name": name,
        **dict.fromkeys(unknown),
        "nothing": None,
        "actual": None,
        "avoided": rounded(avoided, places),
    }
