"""How much attention there was, from the engine's own FLOP counter (`--enable-mfu-metrics`, rung M3).

vLLM counts every chunk's attention as a rectangle, tokens times the context at the chunk's end; decode as one token
times its context. What the counter shows beyond the linear layers therefore tells which prompts computed how much:
the joint distribution that histograms leave open.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvtally.agent.steplaw.chunks import budget_of, chunked
from kvtally.agent.steplaw.population import COUPLINGS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvtally.agent.steplaw.machine import Machine
    from kvtally.agent.steplaw.population import Population
    from kvtally.agent.steplaw.series import Series
    from kvtally.agent.steplaw.windows import Described, Windows

    Array = NDArray[np.float64]
    Index = NDArray[np.intp]

LINEAR_ERROR = 0.02  # of the linear layers' FLOP: what the engine's formula may count differently from ours


def coupling_share(
    machine: Machine,
    series: Series,
    windows: Windows,
    *,
    told: Described,
    window: Index,
    populations: tuple[Population, ...],
) -> float | None:
    """Where between `apart` (0) and `together` (1) the attention that was counted lies; None where it does not tell."""
    if "estimated_gflop" not in series.totals:
        return None
    counted = float(series.over("estimated_gflop", windows.start, windows.end).sum()) * 1e9 * max(machine.gpus, 1)
    if not counted:
        return None
    start, end = windows.start, windows.end
    tokens = series.over("computed_tokens", start, end) + told.decodes * told.steps
    head = 2.0 * machine.shape.vocab * machine.shape.hidden
    linear = machine.linear_flop * float(tokens.sum()) + head * float(series.over("generated_tokens", start, end).sum())
    decode = float((told.context * told.steps).sum())
    squares = (counted - linear) / machine.attention_flop - decode
    low, high = (
        _rectangles(machine, told, window, populations[COUPLINGS.index(name)]) for name in ("apart", "together")
    )
    if high - low < LINEAR_ERROR * linear / machine.attention_flop:
        return None  # the counter's own error is as large as what it would have to tell apart
    return float(np.clip((squares - low) / (high - low), 0.0, 1.0))


def _rectangles(machine: Machine, told: Described, window: Index, people: Population) -> float:
    """Tokens times context at the chunk's end, over all chunks."""
    of = window[people.piece]
    budget = budget_of(machine, told.occupancy, told.decodes)[of]
    parts = chunked(people.prompt, people.reused, budget, np.ones(len(of)))
    area = parts.products + parts.tokens**2 / 2
    return float((area * people.weight[parts.request]).sum())
