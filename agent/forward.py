"""The step law run forwards: time to first token with a KV cache, and the bandwidth that it needs (METHOD 8).

A request of n prompt tokens reuses its first r; a literal reuse of 100 % does not exist, since an engine computes at
least one token: r = reuse x (n - 1). One request at a time, nothing else on the engine.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvtally.agent.hardware import Gpu
    from kvtally.agent.model_shape import ModelShape

ALL_REDUCE_SECONDS = 10e-6  # METHOD 4.2: one all-reduce, of two in each layer
LINK_BYTES_PER_SECOND = 350e9
_ACTIVATION_BYTES = 2
TOKEN_BUDGET = 8192
ORDER_OF_MAGNITUDE = 10.0

Parameters = Literal["active", "linear"] | float


class Law(Protocol):
    """Seconds of a replica's prefill: a roofline with assumed efficiencies, or what a calibration has learned."""

    @property
    def first_token_seconds(self) -> float:
        """Of every request beside its prefill and its load: t0 of METHOD 8."""

    def prefill_seconds(self, prompt: float, reused: float) -> float:
        """To compute the tokens from `reused` to `prompt`."""


class Estimate(NamedTuple):
    """A figure with the ends of its range."""

    low: float
    point: float
    high: float


class LawRange(NamedTuple):
    """The law that is believed, and the slowest and the fastest that one would not be surprised at."""

    point: Law
    slow: Law
    fast: Law

    def estimate(self, figure: Callable[[Law], float]) -> Estimate:
        """A figure by all three."""
        point, *ends = figure(self.point), figure(self.slow), figure(self.fast)
        return Estimate(min(point, *ends), point, max(point, *ends))


class Efficiency(NamedTuple):
    """Shares of the datasheet's peak that prefill reaches, in the layers' matrices and in attention."""

    compute: float
    attention: float


# METHOD 4.2 and 8: before any evidence
PRIOR = Efficiency(0.55, 0.40)
PRIOR_SLOW = Efficiency(0.40, 0.30)
PRIOR_FAST = Efficiency(0.70, 0.55)


class Roofline(NamedTuple):
    """2P(n-r)/(Pi g eta) + A(n^2-r^2)/(2 Pi g eta_a), and all-reduces where they are counted.

    token_seconds           of the matrices, for one token
    product_seconds         of attention, for one query token and one context token
    reduce_token_seconds    moved in all-reduces, for one token
    reduce_step_seconds     latency of all-reduces, for one step
    """

    token_seconds: float
    product_seconds: float
    first_token_seconds: float
    reduce_token_seconds: float = 0.0
    reduce_step_seconds: float = 0.0

    def prefill_seconds(self, prompt: float, reused: float) -> float:
        """To compute the tokens from `reused` to `prompt`; each attends to all before it."""
        computed = prompt - reused
        steps = math.ceil(computed / TOKEN_BUDGET)
        products = (prompt + reused) * computed / 2
        reduces = self.reduce_token_seconds * computed + self.reduce_step_seconds * steps
        return self.token_seconds * computed + self.product_seconds * products + reduces


def roofline(
    shape: ModelShape,
    gpu: Gpu,
    gpus: int,
    efficiency: Efficiency = PRIOR,
    *,
    first_token_seconds: float,
    parameters: Parameters = "active",
    has_all_reduce: bool = False,
) -> Roofline:
    """The law of a model on so many GPUs of a kind, by their datasheet.

    `parameters` says what P is: "active" ones, with embedding and output matrix, as METHOD 8 has it and as the packaged
    efficiencies were anchored; or "linear", without them, as the step law of a calibration has it (METHOD 4.2); or a
    number.
    """
    if isinstance(parameters, str):
        parameters = float(shape.active_parameters if parameters == "active" else shape.linear_parameters)
    peak = gpu.dense_bf16_flops * gpus
    reduced = has_all_reduce and gpus > 1
    moved = 2 * _ACTIVATION_BYTES * shape.hidden * (gpus - 1) / gpus / LINK_BYTES_PER_SECOND
    return Roofline(
        token_seconds=2 * parameters / (peak * (gpu.fp8_factor if shape.is_fp8 else 1) * efficiency.compute),
        product_seconds=shape.attention_flop / (peak * efficiency.attention),
        first_token_seconds=first_token_seconds,
        reduce_token_seconds=2 * shape.layers * moved if reduced else 0.0,
        reduce_step_seconds=2 * shape.layers * ALL_REDUCE_SECONDS if reduced else 0.0,
    )


Kind = Literal["none", "storage", "dram", "bound"]


class Backend(NamedTuple):
    """Where reused KV comes from.

    bandwidth_bytes_per_second  into the replica, all its GPUs together; infinite for the bound
    latency_seconds             of a request that loads anything: look-up, CPU, the first byte
    """

    name: str
    kind: Kind
    bandwidth_bytes_per_second: float
    latency_seconds: float = 0.0


NO_CACHE = Backend("no cache", "none", math.inf)
LOWER_BOUND = Backend("lower bound", "bound", math.inf)  # infinitely fast CPU and storage


def load_seconds(backend: Backend, kv_bytes_per_token: float, reused: float) -> float:
    """To load the KV of so many tokens."""
    if reused <= 0:
        return 0.0
    return backend.latency_seconds + kv_bytes_per_token * reused / backend.bandwidth_bytes_per_second


def ttft_seconds(
    law: Law, backend: Backend, kv_bytes_per_token: float, prompt: float, reuse: float, *, overlaps: bool = False
) -> float:
    """Time to first token; a load that does not overlap stalls the prefill, one that does hides behind it."""
    reused = 0.0 if backend.kind == "none" else reuse * (prompt - 1)
    computing = law.prefill_seconds(prompt, reused)
    loading = load_seconds(backend, kv_bytes_per_token, reused)
    return law.first_token_seconds + (max(computing, loading) if overlaps else computing + loading)


def saved_seconds(law: Law, prefix: float, until: float) -> float:
    """That a request computes less by reusing its first `until` tokens and not `prefix`.

    By a roofline it does not matter what follows them; where steps have a fixed cost, half a step's budget does.
    """
    prompt = until + TOKEN_BUDGET / 2
    return law.prefill_seconds(prompt, prefix) - law.prefill_seconds(prompt, until)


def break_even_bandwidth(law: Law, kv_bytes_per_token: float, prefix: float) -> float:
    """B*: bytes/s at which loading a prefix takes as long as computing it; of 1 token: the limit of short ones.

    Infinite where computing it takes no time, since a step has to be waited for anyway.
    """
    saved = saved_seconds(law, 0, prefix)
    return kv_bytes_per_token * prefix / saved if saved > 0 else math.inf


def marginal_break_even_bandwidth(law: Law, kv_bytes_per_token: float, prefix: float) -> float:
    """The same for the last token of a prefix alone."""
    saved = saved_seconds(law, prefix - 0.5, prefix + 0.5)
    return kv_bytes_per_token / saved if saved > 0 else math.inf


def bandwidth_for(
    law: Law,
    kv_bytes_per_token: float,
    prompt: float,
    *,
    factor: float = ORDER_OF_MAGNITUDE,
    more_seconds: float = 0.0,
    latency_seconds: float = 0.0,
    overlaps: bool = False,
) -> float | None:
    """The least bytes/s at which full reuse makes a request `factor` times faster; None: no bandwidth does.

    `more_seconds` are those of a request after its first token, where these count.
    """
    fixed = law.first_token_seconds + more_seconds
    goal = (fixed + law.prefill_seconds(prompt, 0)) / factor
    left = law.prefill_seconds(prompt, prompt - 1)
    loading = goal - fixed - latency_seconds - (0.0 if overlaps else left)
    if loading <= 0 or fixed + left > goal:
        return None
    return kv_bytes_per_token * (prompt - 1) / loading


def first_token_seconds_for(law: Law, prompt: float, *, factor: float = ORDER_OF_MAGNITUDE) -> float:
    """The t0 from which on no bandwidth makes a request `factor` times faster."""
    return (law.prefill_seconds(prompt, 0) / factor - law.prefill_seconds(prompt, prompt - 1)) / (1 - 1 / factor)


def gpus_for(
    law: Law,
    backend: Backend,
    kv_bytes_per_token: float,
    prompt: float,
    gpus: int,
    *,
    factor: float = ORDER_OF_MAGNITUDE,
    more_seconds: float = 0.0,
) -> float:
    """With how many GPUs at most full reuse is `factor` times faster, a prefill's time taken as going with 1/GPUs."""
    fixed = law.first_token_seconds + more_seconds
    loading = load_seconds(backend, kv_bytes_per_token, prompt - 1)
    saved = law.prefill_seconds(prompt, 0) - factor * law.prefill_seconds(prompt, prompt - 1)
    return gpus * saved / (factor * (fixed + loading) - fixed)
