"""The step law: seconds of one engine step, and what is believed of its parameters before any evidence (METHOD 4.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kvtally.agent.calibration import PARAMETERS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvtally.agent.steplaw.machine import Machine

    Array = NDArray[np.float64]

(
    COMPUTE,
    ATTENTION,
    WEIGHT_BANDWIDTH,
    KV_BANDWIDTH,
    STEP,
    GAP,
    LAUNCH,
    SHARPNESS,
    REQUEST,
) = range(len(PARAMETERS))


# matrix units work on tiles of 128 tokens: half of one runs empty on average (METHOD 4.2, T½)
TILE_TOKENS = 64.0


def tile_tokens(machine: Machine) -> float:
    """Tokens that a step computes for nothing: half a tile of a GPU, none of a CPU."""
    return 0.0 if machine.is_cpu else TILE_TOKENS


class Prior(NamedTuple):
    """Log-normal beliefs: medians, one per PARAMETERS, and the covariance of the logs."""

    medians: Array
    covariance: Array


def packaged_prior(machine: Machine) -> Prior:
    """What holds before any evidence: ASSUMED, from METHOD 4.2 and public measurements, never from a fit of ours."""
    layers = machine.shape.layers
    narrow_weights = machine.shape.weight_bytes_per_parameter < 2  # noqa: PLR2004  # bytes of 16 bits
    narrow_kv = machine.shape.kv_bytes_per_value < 2  # noqa: PLR2004  # as above
    launch = 0.4e-3 if machine.is_eager else 0.15e-3
    medians = [0.62, 0.70 if narrow_kv else 0.50, 0.75, 0.60, layers * 15e-6, 0.5e-3, layers * launch, 4.0, 4e-3]
    sd = [0.35 if narrow_weights else 0.25, 0.50 if narrow_kv else 0.35, 0.15, 0.35, 0.7, 0.8, 0.7, 0.4, 0.7]
    if machine.is_cpu:
        # efficiencies of a machine that nobody has measured
        sd[COMPUTE] = sd[ATTENTION] = sd[WEIGHT_BANDWIDTH] = sd[KV_BANDWIDTH] = 1.5
        medians[STEP], medians[GAP], medians[LAUNCH] = 2e-3, 1e-3, 2e-3
        sd[STEP] = sd[GAP] = sd[LAUNCH] = 1.5
    return Prior(np.array(medians), np.diag(np.square(sd)))


class Steps(NamedTuple):
    """Steps of the engine.

    tokens      in the step, prefill and decode
    products    causal (query token x context token) products of the prefill in it
    context     context tokens that its decodes read
    clock       SM clock as a share of the one at which the peaks hold
    """

    tokens: Array
    products: Array | float
    context: Array | float
    clock: Array | float


def working_seconds(machine: Machine, theta: Array, steps: Steps) -> Array:
    """Seconds for which the GPUs work in each step."""
    tokens = np.maximum(steps.tokens, 1e-9)
    compute = machine.linear_flop * (tokens + tile_tokens(machine)) / (machine.flops * theta[COMPUTE] * steps.clock)
    weights = machine.shape.weight_bytes(tokens)
    reading = weights / (machine.bandwidth * theta[WEIGHT_BANDWIDTH])
    more, less = np.maximum(compute, reading), np.minimum(compute, reading)
    power = theta[SHARPNESS]
    dense: Array = more * (1 + (less / more) ** power) ** (1 / power)
    attention = machine.attention_flop * steps.products / (machine.attention_flops * theta[ATTENTION] * steps.clock)
    kv = machine.kv_bytes * steps.context / (machine.bandwidth * theta[KV_BANDWIDTH])
    result: Array = dense + attention + kv + theta[STEP] + machine.all_reduce_seconds(tokens)  # type: ignore[arg-type]
    return result


def prefill_seconds(working: Array, theta: Array) -> Array:
    """Wall seconds of steps with prefill that work for so long: launches may take longer than the work."""
    result: Array = np.maximum(working, theta[LAUNCH]) + theta[GAP]
    return result
