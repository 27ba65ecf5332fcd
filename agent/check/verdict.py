"""What a check says: its state, what was found and on what basis, the bound, and what to do."""

from __future__ import annotations

from datetime import datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

State = Literal["ok", "failed", "unknown"]
Tokens = Literal["total", "input", "input_computed", "output"]
# an amount as the reports write it, or a plain number
Value = str | float

_WORST_FIRST = ("ASSUMED", "MODELLED", "MEASURED")


class Found(NamedTuple):
    """What a report says, with its 90 % interval where it has one; money as its decimal string."""

    point: Value
    unit: str
    low: Value | None = None
    high: Value | None = None


class Bound(NamedTuple):
    """Where a figure fails: beyond it, never at it."""

    side: Literal["at_most", "at_least"]
    value: Value


class Check(NamedTuple):
    """One thing that was checked.

    name      budget, hourly, savings, hit-rate, reconcile, coverage, sources, fresh; window: there was nothing to check
    by        the group, as the reports name it; empty: all together
    subject   what of the group: a tier, a target, a kind of tokens
    message   what was found, as one sentence without a full stop
    hint      what to do; "" where nothing is
    warning   it did not fail, and a person should know
    """

    name: str
    by: Mapping[str, str | None]
    state: State
    message: str
    subject: str = ""
    found: Found | None = None
    bound: Bound | None = None
    basis: str | None = None
    hint: str = ""
    warning: bool = False

    def as_json(self) -> dict[str, Any]:
        """The check as it prints."""
        found, bound = self.found, self.bound
        return {
            "name": self.name,
            "by": dict(self.by),
            "subject": self.subject,
            "state": self.state,
            "warning": self.warning,
            "found": None if found is None else found._asdict(),
            "bound": None if bound is None else {bound.side: bound.value},
            "basis": self.basis,
            "message": self.message,
            "hint": self.hint,
        }


class Budget(NamedTuple):
    """The most that a million tokens may cost; currency "" is the ledger's own."""

    amount: Decimal
    tokens: Tokens = "total"
    currency: str = ""


class Asked(NamedTuple):
    """What is to be checked; None: not at all.

    by            the dimensions of the groups
    view          of the cost per million: fully_loaded or active
    budget_hour   the most that an hour may cost, all groups together
    hit_rate_min  share of prompt tokens; hit_rate_drop: share of the hit rate before that may be lost
    fresh_ns      the greatest age of the ledger's newest scrape
    skipped       names of checks to leave out
    """

    by: tuple[str, ...] = ("model",)
    budgets: tuple[Budget, ...] = ()
    view: str = "fully_loaded"
    budget_hour: Decimal | None = None
    hit_rate_min: float | None = None
    hit_rate_drop: float | None = None
    coverage_min: float = 0.9
    fresh_ns: int | None = None
    skipped: frozenset[str] = frozenset()


def amount_text(amount: Decimal) -> str:
    """An amount as the reports write it: nine places."""
    return f"{amount:.9f}"


def money_text(amount: Decimal | str) -> str:
    """An amount with all of its digits and no idle zeros: 2.500000000 is 2.50."""
    whole, _, places = f"{Decimal(amount):.9f}".partition(".")
    return f"{whole}.{places.rstrip('0').ljust(2, '0')}"


def worst(bases: Iterable[str | None]) -> str | None:
    """The weakest of several bases; None where there is none."""
    known = set(bases)
    return next((basis for basis in _WORST_FIRST if basis in known), None)


def is_unheld(group: Mapping[str, Any]) -> bool:
    """Whether a group of the cost report is GPUs alone, which no engine held: it has money and can have no token."""
    return group["coverage"] is None and not group["engine_seconds"]["occupied"]


def said(findings: Iterable[Mapping[str, str]], kinds: Iterable[str], by: Mapping[str, str | None]) -> str:
    """The message of the longest finding of these kinds that may be the group's; "" if there is none."""
    found = of_group(findings, kinds, by)
    return max(found, key=span_seconds)["message"] if found else ""


def of_group(
    findings: Iterable[Mapping[str, str]], kinds: Iterable[str], by: Mapping[str, str | None]
) -> list[Mapping[str, str]]:
    """Findings of these kinds that may be the group's: of any engine, unless it is one replica's."""
    wanted, replica = set(kinds), by.get("replica")
    return [one for one in findings if one["kind"] in wanted and (replica is None or _is_of(one["target"], replica))]


def _is_of(target: str, replica: str) -> bool:
    """Whether a target is a replica (engine/HOST:PORT/RANK), its page (engine:HOST:PORT) or the whole ledger."""
    page = target.removeprefix("engine:")
    return target in {"", f"engine/{replica}"} or (page != target and f"{replica}/".startswith(f"{page}/"))


def span_seconds(finding: Mapping[str, str]) -> float:
    """How long what was found lasted."""
    return (datetime.fromisoformat(finding["end"]) - datetime.fromisoformat(finding["start"])).total_seconds()
