"""What KV loads took, as tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvtally.agent.render.answer import say_findings
from kvtally.agent.render.numbers import UNKNOWN, count
from kvtally.agent.render.screen import Screen, Sheet, printable

if TYPE_CHECKING:
    from collections.abc import Mapping

_STEPS = ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB"))
_TOKENS = {
    "looked_up": "looked up",
    "found": "found",
    "found_in_dram": "in DRAM",
    "found_on_storage": "on storage",
    "loaded": "loaded",
    "stored": "stored",
}
_WAYS = (
    ("load", "to the engine"),
    ("store", "from the engine"),
    ("storage_read", "from storage"),
    ("storage_write", "to storage"),
)


def storage_table(answer: Mapping[str, Any]) -> None:
    """Print what was moved by every cache, then what the mounts and disks say of it."""
    answer = printable(dict(answer))
    screen = Screen()
    window = answer["window"]
    if window["start"] is None:
        screen.say("The ledger holds no interval yet.")
        return
    screen.say(f"{window['start']} to {window['end']}; MEASURED, where nothing else is said")
    screen.print()
    _caches(screen, answer["caches"])
    _mounts(screen, answer["mounts"])
    say_findings(screen, answer["findings"])


def _caches(screen: Screen, caches: list[dict[str, Any]]) -> None:
    if not caches:
        screen.say("No page of a cache is in this window: `kvtally doctor` says how to get one.")
        screen.print()
        return
    heads = [head for head in _TOKENS if any(one["tokens"][head] is not None for one in caches)]
    tokens = Sheet("cache", "of engines", *(_TOKENS[head] for head in heads), texts=2)
    moved = Sheet("cache", "KV moved", "bytes", "seconds", "GB/s", "operations", "ms each", texts=2)
    is_modelled = is_moved = False
    for one in caches:
        tokens.add(one["name"], ", ".join(one["engines"]), *(count(one["tokens"][head]) for head in heads))
        for key, way in _WAYS:
            each = one[key]
            if not (each["bytes"] or each["seconds"] or each["operations"]):
                continue
            is_moved = True
            mark = "*" if each["basis"] == "MODELLED" else ""
            is_modelled |= bool(mark)
            moved.add(
                one["name"],
                way,
                size(each["bytes"]) + mark,
                _number(each["seconds"]),
                _number(each["gigabytes_per_second"]),
                count(each["operations"]),
                _number(each["mean_milliseconds"]),
            )
    screen.say("Tokens, as the caches count them: those that HBM holds too are among what is found.", style="dim")
    screen.sheet(tokens, ("of engines",))
    if not is_moved:
        screen.say("None of them tells of KV that it moved.")
        screen.print()
        return
    screen.sheet(moved, ("operations", "ms each"))
    if is_modelled:
        screen.say("* MODELLED: tokens x bytes of KV a token, since this cache counts no bytes there", style="dim")
    screen.say("Seconds are summed over what ran side by side; GB/s are bytes over these.", style="dim")
    screen.print()


def _mounts(screen: Screen, mounts: list[dict[str, Any]]) -> None:
    if not mounts:
        return
    sheet = Sheet(
        "mount or disk", "type", "holds KV in", "by programs", "from device", "page cache", "ms a read", texts=3
    )
    screen.say(
        "Read: what programs asked for, what came from the device or server, and the rest, which a page cache gave."
    )
    for one in mounts:
        share = one["page_cache_share"]
        sheet.add(
            one["name"],
            one["fstype"] or "",
            ", ".join(one["kv_paths"]),
            size(one["app_bytes"]),
            size(one["device_bytes"]),
            UNKNOWN if share is None else f"{share:.1%}",
            _number(one["read"]["mean_milliseconds"]),
        )
    screen.sheet(sheet, ("type",))


def size(value: int | None) -> str:
    """Bytes with three significant digits, in decimal steps as disks and networks have them."""
    if value is None:
        return UNKNOWN
    for step, name in _STEPS:
        if value >= step:
            return f"{value / step:.3g} {name}" if value < 1000 * step else f"{value / step:,.0f} {name}"
    return f"{value} B"


def _number(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"  # noqa: PLR2004  # beyond three digits
