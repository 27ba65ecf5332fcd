"""Calibrations as tables: what was learned, from what, and what would tell more."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.text import Text

from kvtally.agent.render.numbers import count
from kvtally.agent.render.savings import evidence_text, rung_text
from kvtally.agent.render.screen import Screen, Sheet, printable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_WORDS = {
    "compute_efficiency": "matrices, of peak FLOP/s",
    "attention_efficiency": "attention, of peak FLOP/s",
    "weight_bandwidth_efficiency": "reading weights, of peak B/s",
    "kv_bandwidth_efficiency": "reading KV cache, of peak B/s",
    "step_seconds": "every step, on the GPU, ms",
    "gap_seconds": "between two steps, ms",
    "launch_seconds": "least of a step with prefill, ms",
    "sharpness": "sharpness of the roofline's bend",
    "request_seconds": "a request before its prefill, ms",
}


def calibration_table(answer: Mapping[str, Any]) -> None:
    """Print what was learned of each kind of replica, and of which nothing could be learned."""
    answer = printable(answer)
    screen = Screen()
    for law in answer["calibrations"]:
        _law(screen, law)
        if law["is_new"]:
            screen.say(f"Kept in {answer['ledger']} as calibration {law['id']}: it values what is settled next.")
            again = "What is settled stays as it is: `kvtally calibrate --restate TIME` settles it again."
            screen.say(again, style="dim")
        else:
            screen.say(f"{answer['ledger']} held it already, as calibration {law['id']}.")
        screen.print()
    for one in answer["refused"]:
        name = one["fingerprint"] or ", ".join(one["replicas"])
        screen.say(Text("NO CALIBRATION", style="bold red"), f" of {name}", indent=2)
        for reason in one["reasons"]:
            screen.say(Text("why: ", style="yellow"), reason, indent=2)
    if not answer["calibrations"] and not answer["refused"]:
        screen.say("The ledger holds no interval of an engine in this window, so there is nothing to learn from.")


def _law(screen: Screen, law: Mapping[str, Any]) -> None:
    screen.say(Text(law["text"], style="bold"), indent=2)
    screen.say(f"{rung_text(law['rung'])}. Replicas: {', '.join(law['replicas'])}", indent=2)
    screen.print()
    prior = "packaged prior" if law["prior"] == "packaged" else f"calibration {law['prior']}"
    sheet = Sheet("step law", "median", "90 % interval", prior)
    for name, one in law["parameters"].items():
        unit, before = one["unit"], one["prior"]
        sheet.add(
            _WORDS[name],
            _figure(one["median"], unit),
            f"{_figure(one['low'], unit)} to {_figure(one['high'], unit)}",
            f"{_figure(before['low'], unit)} to {_figure(before['high'], unit)}",
        )
    screen.sheet(sheet)
    evidence = law["evidence"]
    about = {**evidence, "alone": evidence["singles"], **law["window"]}
    screen.say(f"Learned from {evidence_text(about)}.", indent=2)
    for text in _fitness(evidence):
        screen.say(text, indent=2)
    for note in evidence["notes"]:
        screen.say(Text("look at this: ", style="yellow"), note, indent=2)
    for one in law["further"]:
        screen.say(f"Rung {one['rung']} tells more: {one['how']}", style="dim", indent=2)


def _fitness(evidence: Mapping[str, Any]) -> list[str]:
    """How well the law describes what it was learned from."""
    found = []
    if evidence["worked_ratio"] is not None:
        found.append(f"By the law the windows held {evidence['worked_ratio']:.3f} times the work that was measured.")
    if evidence["single_error"] is not None:
        found.append(f"Single requests are {evidence['single_error']:.1%} off it (root mean square).")
    return found


def _figure(value: float, unit: str) -> str:
    """A parameter with three significant digits; times in milliseconds."""
    scaled = value * 1000 if unit == "s" else value
    return f"{scaled:#.3g}".rstrip(".")


def calibrations_table(answer: Mapping[str, Any]) -> None:
    """Print all calibrations of a ledger, by what they hold for."""
    answer = printable(answer)
    screen = Screen()
    if not answer["calibrations"]:
        screen.say("The ledger holds no calibration. `kvtally calibrate` makes one, `kvtally run` does it by itself.")
    by_text: dict[str, list[Mapping[str, Any]]] = {}
    for one in answer["calibrations"]:
        by_text.setdefault(one["text"], []).append(one)
    for text, laws in by_text.items():
        screen.say(Text(text, style="bold"), indent=2)
        sheet = Sheet("number", "made", "rung", "evidence from", "until", "requests", "steps", "prior", "why")
        for one in laws:
            evidence = one["evidence"]
            sheet.add(
                str(one["id"]),
                _minute(one["made_at"]),
                one["rung"],
                _minute(one["window"]["start"]),
                _minute(one["window"]["end"]),
                count(evidence["requests"]),
                count(evidence["steps"]),
                one["prior"],
                one["reason"],
            )
        screen.sheet(sheet, ("steps", "until", "why", "prior"))
    if answer["unreadable"]:
        numbers = ", ".join(str(number) for number in answer["unreadable"])
        screen.say(f"A newer kvtally wrote {numbers}: this one cannot read them.", style="yellow")


def _minute(time: str) -> str:
    return time[:16].replace("T", " ")


def imported_lines(imported: Sequence[Mapping[str, Any]]) -> None:
    """Say of each calibration whether it is new here, and whether it is of use."""
    screen = Screen()
    for one in printable(list(imported)):
        what = "imported, and used from now on" if one["is_new"] else "was there already"
        if not one["fits"]:
            what += "; no engine of this ledger has this fingerprint"
        screen.say(f"calibration {one['id']} ({one['rung']}) of {one['text']}: {what}", indent=2)
