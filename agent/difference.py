"""Counters seen twice: what they counted in between, or why nobody can tell."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvtally.collectors.quantities import QUANTITIES

if TYPE_CHECKING:
    from collections.abc import Container

    from kvtally.collectors.base import Kind

Values = tuple[float | None, ...]

# in a state: a quantity whose count so far nobody knows, since the page showed no number for it, or since this kvtally
# reads what the one before did not. The next value is a baseline
UNASKED = float("nan")

MISSING = "counter_missing"
BACKWARDS = "counter_backwards"
IMPOSSIBLE = "counter_impossible"

# A sum of floats that is taken in another order differs in its last bits: in multiprocess mode vLLM adds up the files
# of its processes as the folder lists them. A token less in ten thousand billion is no restart either way.
NOISE = 1 - 1e-13
INTEGER_MAX = 2**63  # what the ledger's integers hold; a page may show anything
COUNT_MAX = 2**63  # nothing has counted so far in its own unit; sums of seconds may pass it in nanoseconds

# of each quantity: whether it counts (a gauge does not), whether the collector itself counts it, its scale
RULES = {
    kind: tuple((q.type != "gauge", q.type == "integral", q.scale) for q in quantities)
    for kind, quantities in QUANTITIES.items()
}
# LMCache by POST /metrics/reset, Storage Scale by `mmpmon reset`, Lustre by `lctl set_param … clear`
TOLD_TO_RESET = frozenset({"cache", "filesystem", "gateway"})


def difference(
    base: float | None, current: float | None, *, integral: bool, scale: float
) -> tuple[int | None, float | None, str]:
    """A counter's difference, the raw value to keep, and why the value cannot be used; "" if it can."""
    was_told = base is not None and abs(base) < COUNT_MAX
    if current is None or current != current:  # noqa: PLR0124  # NaN: shown, and not to be read
        # on the first page the second is no count of nothing: what it shows later is a baseline
        return None, current if base is None else base, MISSING if was_told else ""
    if base is not None and not was_told:
        return (None, current, "") if abs(current) < COUNT_MAX else (None, base, IMPOSSIBLE)
    if base is None or (integral and current < base):
        base = 0.0  # a collector's own sums fall only where they begin anew
    if base * NOISE <= current < base:
        current = base  # the same sum in another order
    if current < base:
        return None, base, BACKWARDS
    if current < COUNT_MAX and current * scale - base * scale < INTEGER_MAX:
        return round(current * scale) - round(base * scale), current, ""
    return None, base, IMPOSSIBLE


def gauge(value: float | None, scale: float) -> int | None:
    """A gauge in its integer unit; None where it is unknown or beyond what can be."""
    return round(value * scale) if value is not None and abs(value * scale) < INTEGER_MAX else None


def differences(
    kind: Kind, before: Values, values: Values, behind: dict[str, str], *, reset: bool, is_new_session: bool
) -> tuple[list[int | None], Values]:
    """Differences (gauges as they are) and the raw values to keep; `behind` takes those that stay as they were."""
    steady = not reset and not is_new_session
    found: list[int | None] = []
    kept: list[float | None] = []
    for position, (current, base, (counts, integral, scale)) in enumerate(
        zip(values, before, RULES[kind], strict=True)
    ):
        counted: int | None
        keep, why = current, ""
        if not counts:
            counted = gauge(current, scale)
        elif (
            steady
            and current is not None
            and base is not None
            and base <= current
            and base >= 0
            and (now := current * scale) < INTEGER_MAX
        ):
            # nearly all of them, nearly always: as `difference` has it; an UNASKED one compares false
            counted = round(now) - round(base * scale)
        else:
            # where counting began anew the old value means nothing; a family that was not there had counted nothing
            is_anew = is_new_session if integral else reset
            counted, keep, why = difference(None if is_anew else base, current, integral=integral, scale=scale)
        if why:
            behind[QUANTITIES[kind][position].name] = why
        found.append(counted)
        kept.append(keep)
    return found, tuple(kept)


def fell_to_begin_anew(
    kind: Kind, before: Values, values: Values, backwards: Container[str] = (), *, is_new_session: bool = False
) -> bool:
    """Whether counters moved as those do that began anew, where no start marker tells.

    Two that fall together did; one alone is a counter that lies, unless its collector began anew as well (a GPU's
    energy counts from the loading of the driver, which no open handle survives). Of a source that can be told to
    begin anew, one that falls while none rises is enough; what is kept of one that is known to have gone `backwards`
    is its highest value, and tells nothing there.
    """
    is_told = kind in TOLD_TO_RESET
    fallen = risen = 0
    for quantity, (counts, integral, _), current, was in zip(
        QUANTITIES[kind], RULES[kind], values, before, strict=True
    ):
        if not counts or integral or current is None or was is None or (is_told and quantity.name in backwards):
            continue
        if not abs(was) < COUNT_MAX:  # NaN, or what nothing can have counted: it says nothing
            continue
        fallen += current < was * NOISE
        risen += current > was
    return fallen > 1 or (fallen == 1 and (is_new_session or (is_told and not risen)))
