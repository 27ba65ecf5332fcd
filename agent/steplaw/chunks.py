"""The steps that prefills take: each prompt in chunks of what the step's budget leaves (METHOD section 3)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvtally.agent.steplaw.machine import Machine

    Array = NDArray[np.float64]
    Index = NDArray[np.intp]

LEAST_BUDGET = 256.0  # tokens that a step leaves to prefill, however many decodes run


class Chunks(NamedTuple):
    """Rows: a chunk of a request's prefill.

    request     its place in the population
    tokens      of the chunk
    products    causal query x context products: chunk x (start + chunk / 2)
    sharing     prefills that share its step
    """

    request: Index
    tokens: Array
    products: Array
    sharing: Array


def chunked(prompt: Array, begin: Array, budget: Array, packing: Array) -> Chunks:
    """The chunks of prefills from `begin` to `prompt`, in steps that leave `budget` tokens each.

    Small chunks share their step with others, as far as the budget allows and as observed (`packing`).
    """
    requests, tokens, products = [], [], []
    done = begin.astype(float).copy()
    left = np.flatnonzero(prompt - done > 0.5)  # noqa: PLR2004  # a token
    while len(left):
        chunk = np.minimum(prompt[left] - done[left], budget[left])
        requests.append(left)
        tokens.append(chunk)
        products.append(chunk * (done[left] + chunk / 2))
        done[left] += chunk
        left = left[prompt[left] - done[left] > 0.5]  # noqa: PLR2004  # as above
    if not requests:
        nothing = np.zeros(0)
        return Chunks(np.zeros(0, dtype=np.intp), nothing, nothing, nothing)
    request, length = np.concatenate(requests), np.concatenate(tokens)
    sharing = np.clip(budget[request] / np.maximum(length, 1.0), 1.0, packing[request])
    return Chunks(request, length, np.concatenate(products), sharing)


def budget_of(machine: Machine, occupancy: Array, decodes: Array) -> Array:
    """Tokens that the decodes leave of a step's budget."""
    result: Array = np.maximum(machine.token_budget - occupancy * decodes, LEAST_BUDGET)
    return result


def clock_of(machine: Machine, tokens: Array, window_clock: Array, loaded_clock: float) -> Array:
    """Large chunks run at the clock under load, small ones at their window's."""
    result: Array = np.where(tokens < 0.5 * machine.token_budget, window_clock, loaded_clock)
    return result
