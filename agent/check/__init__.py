"""Is it within budget, does reuse pay, and can the counters be trusted: judged from the reports, by exit status.

verdict     what a check says, and what is asked
seen        what is judged: reports of a window, an audit, when engines were last heard of
money       budgets, and tiers that lose money
counters    hit rate, counters that reconcile, coverage, sources
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvtally.agent.check.counters import coverage, fresh, hit_rates, reconciled, sources
from kvtally.agent.check.money import budgets, hourly, savings
from kvtally.agent.check.verdict import Check

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvtally.agent.check.seen import Seen
    from kvtally.agent.check.verdict import Asked

SKIPPABLE = ("savings", "reconcile", "coverage", "sources")
_EMPTY = "the ledger holds no interval in the window: nothing could be checked"


def judged(asked: Asked, seen: Seen) -> list[Check]:
    """Every check that was asked for, in a fixed order."""
    found: list[Check] = []
    if not seen.cost["groups"]:
        found.append(Check("window", {}, "unknown", _EMPTY, hint="`kvtally ledger info` says how far it reaches"))
    else:
        found += budgets(asked, seen.cost)
        found += hourly(asked, seen.cost)
        found += savings(seen.savings) if seen.savings is not None else ()
        found += hit_rates(asked, seen)
        found += reconciled(seen) if "reconcile" not in asked.skipped else ()
        found += coverage(asked, seen.cost) if "coverage" not in asked.skipped else ()
    found += sources(seen) if "sources" not in asked.skipped else ()
    found += fresh(asked, seen)
    return found


def answer_of(checks: Sequence[Check], seen: Seen) -> dict[str, Any]:
    """The answer as it prints in JSON; its state is failed if any check is, else unknown if any is."""
    states = [check.state for check in checks]
    return {
        "window": seen.cost["window"],
        "currency": seen.cost["currency"],
        "state": "failed" if "failed" in states else "unknown" if "unknown" in states else "ok",
        "failed": states.count("failed"),
        "unknown": states.count("unknown"),
        "warnings": sum(check.warning for check in checks),
        "checks": [check.as_json() for check in checks],
    }
