"""What reuse was worth in a span of time by a step law: values that add up over spans, with what their error needs.

Spans that share a calibration add their worths; the error of the law is common to them all, so derivatives add too
(METHOD 4.5), and only then become an interval.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from kvtally.agent.calibration import PARAMETERS

Three = tuple[float, float, float]
ZEROS: Three = (0.0, 0.0, 0.0)

A_TOKEN = 0.5  # what is less of one is rounding


class Worth(NamedTuple):
    """Engine-seconds and counts of one replica in a span.

    avoided, outer, full    engine-seconds that all reuse avoided; that the outer tiers avoided beyond HBM; and that the
                            prompts would take with no reuse: each under the three couplings of prompt and computed
                            tokens (together, mixed, apart)
    avoided_by, outer_by, full_by   their derivatives by the logs of the law's parameters
    clock_by                derivatives of the three by the log of the clock under load
    dram, disk, p2p         of `outer`, the parts of tiers that the engine tells apart
    bound, bound_loads, bound_stores   of avoided (mixed), loads and stores, what fell into time of waiting for capacity
    bound_variance, bound_missed   of `bound`: its variance, since scrapes only sample who waits; and how much more of
                            `avoided` may have fallen there, by the engine's queue seconds
    prefill, decode         engine-seconds of the steps by the law; low and high are the two marginal views (METHOD 2.4)
    share_by                derivatives of prefill and decode by the logs of the parameters
    loads, stores           seconds that the outer tiers report of loading and storing; None where one is at work that
                            does not tell
    starved, seconds        of these seconds, those in which requests waited for capacity, as scrapes sample them
    attention_seconds       of `full`, those of attention, about: where its share is large, so is the error
    estimated_tokens        of the external tokens, those whose tier is estimated from a cache's lookups
    """

    avoided: Three
    outer: Three
    full: Three
    avoided_by: tuple[float, ...]
    outer_by: tuple[float, ...]
    full_by: tuple[float, ...]
    clock_by: Three
    dram: float
    disk: float
    p2p: float
    bound: float
    bound_loads: float
    bound_stores: float
    prefill: Three
    decode: float
    prefill_by: tuple[float, ...]
    decode_by: tuple[float, ...]
    loads: float | None
    stores: float | None
    requests: float
    steps: float
    preemptions: float
    hbm_tokens: float
    external_tokens: float
    dram_tokens: float
    disk_tokens: float
    p2p_tokens: float
    computed_tokens: float
    worked_seconds: float | None
    law_seconds: float
    seconds: float
    starved_seconds: float | None
    attention_seconds: float
    estimated_tokens: float = 0.0
    bound_variance: float = 0.0
    bound_missed: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """Plain values, rounded to what their error leaves."""
        return {name: _rounded(value) for name, value in self._asdict().items()}


_NONE = (0.0,) * len(PARAMETERS)
NOTHING = Worth(ZEROS, ZEROS, ZEROS, _NONE, _NONE, _NONE, ZEROS, *(0.0,) * 6, ZEROS, 0.0, _NONE, _NONE, *(0.0,) * 16)


def worth_of(body: dict[str, Any]) -> Worth:
    """Invert `as_json`, of an older kvtally too; KeyError if it is not one."""
    told = {**Worth._field_defaults, **body}
    return Worth(**{name: _tupled(told[name]) for name in Worth._fields})


def added(one: Worth, other: Worth) -> Worth:
    """The worth of both spans; what one of them does not know, the sum does not."""
    return Worth(*(_sum(left, right) for left, right in zip(one, other, strict=True)))


def hbm_alone(worth: Worth) -> Worth:
    """The worth of what HBM served, without outer tiers: where what came from outside was nobody's reuse."""
    together, mixed, apart = (a - o for a, o in zip(worth.avoided, worth.outer, strict=True))
    share = mixed / worth.avoided[1] if worth.avoided[1] else 0.0
    return worth._replace(
        avoided=(together, mixed, apart),
        avoided_by=tuple(a - o for a, o in zip(worth.avoided_by, worth.outer_by, strict=True)),
        clock_by=(worth.clock_by[0] - worth.clock_by[1], 0.0, worth.clock_by[2]),
        outer=ZEROS,
        outer_by=(0.0,) * len(worth.outer_by),
        bound=worth.bound * share,
        bound_variance=worth.bound_variance * share**2,
        bound_missed=worth.bound_missed * share,
        dram=0.0,
        disk=0.0,
        p2p=0.0,
        external_tokens=0.0,
        dram_tokens=0.0,
        disk_tokens=0.0,
        p2p_tokens=0.0,
        estimated_tokens=0.0,
        loads=0.0,
        stores=0.0,
        bound_loads=0.0,
        bound_stores=0.0,
    )


def _sum(left: Any, right: Any) -> Any:
    if left is None or right is None:
        return None
    if isinstance(left, tuple):
        return tuple(a + b for a, b in zip(left, right, strict=True))
    return left + right


def _rounded(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_rounded(part) for part in value]
    return value if value is None else float(f"{value:.9g}")


def _tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
