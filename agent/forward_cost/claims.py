"""The claims of the article that this project began with: whether they hold for the inputs, and when they turn."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from kvtally.agent.forward import (
    NO_CACHE,
    ORDER_OF_MAGNITUDE,
    Estimate,
    bandwidth_for,
    break_even_bandwidth,
    first_token_seconds_for,
    gpus_for,
)
from kvtally.agent.forward_cost.cost import Store

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvtally.agent.forward import Law
    from kvtally.agent.forward_cost.cost import Scenario

CLAIMS = {
    "ttft_tenfold": "time to first token falls tenfold from no reuse to full reuse",
    "cost_tenfold": "full reuse costs a tenth of no cache at all",
    "work_proportional": "GPU work falls in proportion to reuse",
    "average_storage_modest": "the slowest storage gains, but less than tenfold",
    "dram_dearer": "DRAM is dearer than storage at every level of reuse",
}
HALF = 0.5
PROPORTIONAL_WITHIN = 0.05
LEVELS = tuple(step / 20 for step in range(21))
_GIGA = 1e9
_SHORTEST = 2.0  # tokens: one of them is always computed


class Claim(NamedTuple):
    """One claim, for one prompt length and, where it is about one, a backend.

    holds       by the point of the estimate; None where a price is missing
    is_sure     whether both ends of the range say the same
    figure      what it is judged by, in `unit`; a unit that begins with "/" is of the currency
    condition   when it holds, or turns, in words
    """

    claim: str
    prompt_tokens: int
    backend: str
    holds: bool | None
    is_sure: bool
    figure: Estimate | None
    unit: str
    condition: str


def claims(scenario: Scenario, prompt: int) -> list[Claim]:
    """All of them for one prompt length."""
    found = [_ttft_tenfold(scenario, store, prompt) for store in scenario.stores]
    found += [_cost_tenfold(scenario, store, prompt) for store in scenario.stores]
    found.append(_proportional(scenario, prompt))
    storage = sorted(
        (store for store in scenario.stores if store.backend.kind == "storage"),
        key=lambda store: store.backend.bandwidth_bytes_per_second,
    )
    if storage:
        found.append(_modest(scenario, storage[0], prompt))
        drams = [store for store in scenario.stores if store.backend.kind == "dram"]
        found += [_dram_dearer(scenario, dram, storage[-1], prompt) for dram in drams]
    return found


def _judged(figure: Estimate, holds: Callable[[float], bool]) -> tuple[bool, bool]:
    """Whether the point holds, and whether the ends agree."""
    verdict = holds(figure.point)
    return verdict, holds(figure.low) == holds(figure.high) == verdict


def _takes(scenario: Scenario, store: Store, prompt: int, factor: float, more_seconds: float = 0.0) -> str:
    """What it takes to be so many times faster at full reuse, in words."""
    law, backend = scenario.laws.point, store.backend
    needed = bandwidth_for(
        law,
        scenario.kv_bytes_per_token,
        prompt,
        factor=factor,
        more_seconds=more_seconds,
        latency_seconds=backend.latency_seconds,
        overlaps=scenario.overlaps,
    )
    if needed is not None:
        return f"from {needed / _GIGA:.3g} GB/s into the replica on"
    fixed = law.first_token_seconds + more_seconds + backend.latency_seconds
    limit = first_token_seconds_for(law, prompt, factor=factor)
    if limit <= 0:
        left, whole = (law.prefill_seconds(prompt, reused) for reused in (prompt - 1, 0))
        return f"at no bandwidth: the last token's step alone takes {left:.3g} s, the whole prefill {whole:.3g} s"
    return f"at no bandwidth: beside prefill and transfer a request takes {fixed:.3g} s, and may take {limit:.2g} s"


def _ttft_tenfold(scenario: Scenario, store: Store, prompt: int) -> Claim:
    """From no reuse to all of it."""
    figure = scenario.laws.estimate(
        lambda law: scenario.ttft(law, store, prompt, 0.0) / scenario.ttft(law, store, prompt, 1.0)
    )
    holds, is_sure = _judged(figure, lambda ratio: ratio >= ORDER_OF_MAGNITUDE)
    condition = _takes(scenario, store, prompt, ORDER_OF_MAGNITUDE)
    if not holds and not scenario.overlaps and scenario.gpus:
        most = gpus_for(scenario.laws.point, store.backend, scenario.kv_bytes_per_token, prompt, scenario.gpus)
        condition += f"; at its own with {most:.2f} GPUs at most" if most > 0 else ""
    return Claim("ttft_tenfold", prompt, store.backend.name, holds, is_sure, figure, "x", condition)


def _cost_tenfold(scenario: Scenario, store: Store, prompt: int) -> Claim:
    """Full reuse against no cache at all, whose price has no share of a store in it."""
    name, replica = store.backend.name, scenario.replica_hourly
    if not replica:
        return Claim("cost_tenfold", prompt, name, None, False, None, "x", "no price of the GPU is known")
    dearer = float(1 + store.hourly() / scenario.replicas / replica)

    def ratio(law: Law) -> float:
        without = scenario.request_seconds(law, Store(NO_CACHE), prompt, 0.0)
        return without / scenario.request_seconds(law, store, prompt, 1.0) / dearer

    figure = scenario.laws.estimate(ratio)
    holds, is_sure = _judged(figure, lambda ratio: ratio >= ORDER_OF_MAGNITUDE)
    condition = _takes(scenario, store, prompt, ORDER_OF_MAGNITUDE * dearer, scenario.output_seconds)
    if scenario.output_tokens:
        condition += f", with {scenario.output_tokens} output tokens a request"
    return Claim("cost_tenfold", prompt, name, holds, is_sure, figure, "x", condition)


def _modest(scenario: Scenario, store: Store, prompt: int) -> Claim:
    """Slow storage: some gain, but no order of magnitude."""
    figure = scenario.laws.estimate(
        lambda law: scenario.ttft(law, store, prompt, 0.0) / scenario.ttft(law, store, prompt, 1.0)
    )
    holds, is_sure = _judged(figure, lambda ratio: 1 < ratio < ORDER_OF_MAGNITUDE)
    least = break_even_bandwidth(scenario.laws.point, scenario.kv_bytes_per_token, prompt - 1)
    slower = f"under {least / _GIGA:.3g} GB/s into the replica" if math.isfinite(least) else "at any bandwidth"
    condition = f"{slower}, loading is slower than computing"
    return Claim("average_storage_modest", prompt, store.backend.name, holds, is_sure, figure, "x", condition)


def _proportional(scenario: Scenario, prompt: int) -> Claim:
    """At half reuse half of the prefill would be left, were it not for attention: late tokens are the dear ones."""

    def left(law: Law, tokens: float = prompt) -> float:
        return law.prefill_seconds(tokens, HALF * tokens) / law.prefill_seconds(tokens, 0)

    figure = scenario.laws.estimate(left)
    holds, is_sure = _judged(figure, lambda share: abs(share - HALF) <= PROPORTIONAL_WITHIN)
    longest = _turns_at(lambda tokens: left(scenario.laws.point, tokens) - HALF - PROPORTIONAL_WITHIN)
    condition = f"half reuse leaves half, within {PROPORTIONAL_WITHIN:.0%} of the prefill"
    if longest is not None:
        condition += f", up to {longest:,.0f} prompt tokens"
    return Claim("work_proportional", prompt, "", holds, is_sure, figure, "share left at half", condition)


def _turns_at(excess: Callable[[float], float], longest: float = 2.0**21) -> float | None:
    """The prompt's length from which on a figure is above zero; None if it is not, or always, up to 2 M tokens."""
    if excess(longest) <= 0:
        return None
    high = longest
    while (low := high / 2) >= _SHORTEST:
        if excess(low) <= 0:
            break
        high = low
    else:
        return None
    for _ in range(26):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if excess(middle) > 0 else (middle, high)
    return high


def _dram_dearer(scenario: Scenario, dram: Store, storage: Store, prompt: int) -> Claim:
    """Cost with DRAM less cost with the fastest storage, at the reuse at which it is least."""
    name = f"{dram.backend.name} against {storage.backend.name}"
    unit = "/100M tokens, least"
    if scenario.replica_hourly is None:
        return Claim("dram_dearer", prompt, name, None, False, None, unit, "no price of the GPU is known")

    def dearer(law: Law, reuse: float, than: Store, replicas: int | None = None) -> float:
        costs = [scenario.cost(law, store, prompt, reuse, replicas) for store in (dram, than)]
        return float((costs[0] or 0) - (costs[1] or 0))

    law = scenario.laws.point
    figure = scenario.laws.estimate(lambda law: min(dearer(law, reuse, storage) for reuse in LEVELS))
    holds, is_sure = _judged(figure, lambda least: least > 0)
    turns = next((reuse for reuse in LEVELS if dearer(law, reuse, storage) <= 0), None)
    condition = f"shared by {scenario.replicas}: " if scenario.replicas > 1 else "not shared: "
    condition += "at every reuse" if turns is None else f"below {turns:.0%} reuse"
    condition += f", {dearer(law, 0.0, storage):+.2f} without any ({dearer(law, 0.0, storage, 1):+.2f} if not shared)"
    pays = next((reuse for reuse in LEVELS if dearer(law, reuse, Store(NO_CACHE)) <= 0), None)
    condition += (
        "; dearer than no cache at every reuse" if pays is None else f"; pays against no cache from {pays:.0%} on"
    )
    return Claim("dram_dearer", prompt, name, holds, is_sure, figure, unit, condition)
