"""What a million tokens cost: tokens of a group, and the group's money over them (METHOD 2.5). Pure."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Any, NamedTuple

from kvtally.agent.costing import apportioned
from kvtally.agent.identity import BY_SOURCE_SINCE, version_of
from kvtally.agent.price import nano_to_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvtally.agent.facts import Facts


class Tokens(NamedTuple):
    """Tokens of a group; None where no counter tells."""

    prompt: int | None
    computed: int | None
    hbm: int | None
    external: int | None
    generated: int | None
    derived: bool  # the engine does not count computed tokens: prompt less what its lookups found


def tokens_of(facts: Sequence[Facts]) -> Tokens:
    """Tokens of a group; one part that is unknown makes its sum unknown."""
    sums: dict[str, int | None] = dict.fromkeys(("prompt", "computed", "hbm", "external", "generated"), 0)
    derived = False
    for one in facts:
        if one.replica is None:
            continue
        work = dict(one.work)
        release = version_of(one.replica.version)
        prompt = work.get("prompt_tokens")
        if (
            work.get("computed_tokens") is None
            and prompt is not None
            and (release or BY_SOURCE_SINCE) < BY_SOURCE_SINCE
        ):
            hits, outer = work.get("prefix_hit_tokens"), work.get("external_hit_tokens") or 0
            if hits is not None and hits + outer <= prompt:
                work |= {"computed_tokens": prompt - hits - outer, "hbm_tokens": hits, "external_tokens": outer}
                derived = True
        for short, total in sums.items():
            value = work.get(f"{short}_tokens")
            sums[short] = None if value is None or total is None else total + value
    return Tokens(sums["prompt"], sums["computed"], sums["hbm"], sums["external"], sums["generated"], derived)


def unit_costs(
    facts: Sequence[Facts], tokens: Tokens, shares: tuple[int, int, int] | None, occupied: int, *, outer: bool
) -> dict[str, Any]:
    """Unit costs of a group, fully loaded and active, with the intervals of what the split estimates.

    `shares` are prefill nanoseconds of the occupied time as (low, point, high); None: no split. `outer`: an outer
    cache tier is at work, whose price is unknown here.
    """
    total = sum(line.amount_nano for one in facts for line in one.lines or ())
    active = sum(line.amount_nano for one in facts for line in one.lines or () if line.state == "occupied")
    if shares is None or not occupied:
        none = (None, None, None)
        return {
            "fully_loaded": _per_million(tokens, total, none, outer=outer),
            "active": _per_million(tokens, active, none, outer=outer),
        }
    # each replica's own price times its own share, so that a group of unlike replicas adds up
    prefill = tuple(round(_worked_nano(facts, slot)) for slot in (0, 1, 2))
    loaded = tuple(
        amount + apportioned(total - active, {"prefill": share, "decode": occupied - share})["prefill"]
        # overhead goes pro rata to occupied engine-seconds, never per token (METHOD 2.2)
        for amount, share in zip(prefill, shares, strict=True)
    )
    return {
        "fully_loaded": _per_million(tokens, total, loaded, outer=outer),
        "active": _per_million(tokens, active, prefill, outer=outer),
    }


def _worked_nano(facts: Sequence[Facts], slot: int) -> Fraction:
    """What prefill cost at the low, the point or the high share."""
    total = Fraction(0)
    for one in facts:
        if one.split is not None:
            worked = sum(line.amount_nano for line in one.lines or () if line.state == "occupied")
            total += worked * Fraction((one.split.low, one.split.point, one.split.high)[slot])
    return total


def _per_million(tokens: Tokens, total: int, prefill: tuple[int | None, ...], *, outer: bool) -> dict[str, Any]:
    """Unit costs; `prefill` as low, point and high nano-units, the rest of the total being decode."""
    both = None if tokens.prompt is None or tokens.generated is None else tokens.prompt + tokens.generated
    cached: dict[str, str | None] = {}
    if tokens.hbm:
        cached["hbm"] = nano_to_text(0)  # no stall, no holding: its price is KV room, which is in the batch size
    if outer:
        cached["external"] = None
    low, point, high = prefill
    decode = [None if amount is None else total - amount for amount in (high, point, low)]
    estimates = {
        "input_computed": (tokens.computed, (low, point, high)),
        "input": (tokens.prompt, (low, point, high)),
        "output": (tokens.generated, tuple(decode)),
    }
    units = {name: [_unit(amount, count) for amount in amounts] for name, (count, amounts) in estimates.items()}
    return {
        "total": _unit(total, both),
        "input_computed": units["input_computed"][1],
        "input_cached": cached,
        "input": units["input"][1],
        "output": units["output"][1],
        "intervals": {
            name: None if three[1] is None else {"low": three[0], "high": three[2]} for name, three in units.items()
        },
    }


def _unit(amount_nano: int | None, tokens: int | None) -> str | None:
    if amount_nano is None or not tokens:
        return None
    return nano_to_text(round(Fraction(amount_nano * 10**6, tokens)))
