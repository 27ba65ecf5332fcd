"""What the tables of the ledger's answers share: names of groups, findings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from kvtally.agent.render.screen import Screen

_SEVERITY = {"info": "dim", "warning": "yellow", "error": "bold red"}
_TIMES = {"hour": 16, "day": 10}  # how much of 2026-11-23T04:00:00.000Z names one


def label(dimension: str, value: str | None) -> str:
    """A group's name in one dimension."""
    if value is None:
        return f"(no {dimension})"
    return value[: _TIMES[dimension]].replace("T", " ") if dimension in _TIMES else value


def name_of(by: Mapping[str, str | None]) -> str:
    """A group's whole name."""
    return " ".join(label(dimension, value) for dimension, value in by.items()) or "all"


def tiers_line(basis: str) -> str:
    """How the outer tiers were told apart."""
    if basis == "MODELLED":
        return "dram, disk: MODELLED, by where lookups found the tokens, less what HBM held of them"
    return "dram, disk, p2p: MEASURED, the engine tells them apart"


def say_findings(screen: Screen, found: Iterable[Mapping[str, str]]) -> None:
    """What is not as it should be, a paragraph each."""
    for one in found:
        where = f" [{one['target']}]" if one["target"] else ""
        screen.say(Text(f"{one['severity']}{where}: ", style=_SEVERITY[one["severity"]]), one["message"], indent=2)
