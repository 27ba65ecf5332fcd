"""True step times: the law of METHOD 4.2 with parameters drawn by chance, and departures that no fit can follow.

    gpu  = norm_p(2P T / (peak eta clock), W / (bandwidth e)) + A X / (peak eta_a clock) + kv K / (bandwidth e_kv)
           + step + all-reduce
    wall = max(gpu, launch if the step holds prefill) + gap

T tokens of the step, X query x context products of its prefill chunks, K context tokens of its decodes.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np

_REDUCE_SECONDS = 10e-6  # one all-reduce of nothing, and its bandwidth over NVLink
_REDUCE_BYTES_PER_SECOND = 350e9
_HOT = 0.6  # share of prefill steps from which a throttled GPU is at its slowest
_LONG_TOKENS = 40_000


class Shape(NamedTuple):
    """A dense decoder, as its config.json tells it; two bytes a weight and a KV element."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    @property
    def linear_parameters(self) -> int:
        """Weights that every token is multiplied with: embeddings and the head are not among them."""
        projections = self.hidden * (2 * self.heads + 2 * self.kv_heads) * self.head_dim
        return self.layers * (projections + 3 * self.hidden * self.intermediate)

    @property
    def parameters(self) -> int:
        """All weights, as a model card counts them."""
        return self.linear_parameters + 2 * self.vocabulary * self.hidden

    @property
    def step_bytes(self) -> int:
        """Weights that each step reads: the embedding table is not."""
        return 2 * (self.linear_parameters + self.vocabulary * self.hidden)

    @property
    def kv_bytes(self) -> int:
        """KV bytes of a token."""
        return 2 * self.layers * self.kv_heads * self.head_dim * 2

    @property
    def attention_flop(self) -> int:
        """FLOP of a query token x context token."""
        return 4 * self.layers * self.heads * self.head_dim


class Device(NamedTuple):
    """GPUs of one kind, `ranks` of them in tensor parallel; a CPU has no sku. The peak holds at the reference clock."""

    sku: str
    flop_per_second: float
    bytes_per_second: float
    ranks: int = 1
    reference_mhz: float = 1830
    boost_mhz: float = 1980


LLAMA_8B = Shape("llama-8b", 32, 4096, 14336, 32, 8, 128, 128_256)
LLAMA_70B = Shape("llama-70b", 80, 8192, 28672, 64, 8, 128, 128_256)
TINY = Shape("tiny", 6, 512, 1408, 8, 4, 64, 4096)
H100 = Device("NVIDIA H100 80GB HBM3", 989.4e12, 3.35e12)
H100_X4 = H100._replace(ranks=4)
CPU = Device("", 120e9, 18e9)


class Batch(NamedTuple):
    """One step: all its tokens, those of prefill chunks, their products, context of decodes; recent prefill load."""

    tokens: int
    prefill_tokens: int
    products: float
    context: int
    requests: int
    heat: float = 0.0


class StepTime(NamedTuple):
    """Seconds on the GPU, seconds of the engine, seconds of the tensor pipe, SM clock over the reference clock."""

    gpu: float
    wall: float
    tensor: float
    clock: float


class Parameters(NamedTuple):
    """The family's parameters; efficiencies are shares of the datasheet's peaks, the rest is seconds."""

    compute_efficiency: float = 0.6
    attention_efficiency: float = 0.45
    weight_bandwidth_efficiency: float = 0.8
    kv_bandwidth_efficiency: float = 0.6
    step_seconds: float = 0.5e-3
    gap_seconds: float = 1e-3
    launch_seconds: float = 5e-3
    sharpness: float = 4.0
    request_seconds: float = 3e-3
    clock: float = 0.85


class Departures(NamedTuple):
    """What is not in the family; all zero: nothing.

    additive      share of compute and memory time that does not overlap
    ripple        amplitude of the linear layers' efficiency over log2(tokens)
    long_context  how much slower attention is from 40,000 tokens of context on
    per_request   seconds of a step for each of its requests
    throttle      how much slower a GPU is under steady prefill; its clock tells
    jitter        sd of the log of each step
    drift         sd of the log of a slow random walk
    joint         attention and KV reads inside the norm, as METHOD 4.2 writes it, and tokens in tiles of 64
    """

    additive: float = 0.0
    ripple: float = 0.0
    long_context: float = 0.0
    per_request: float = 0.0
    throttle: float = 0.0
    jitter: float = 0.0
    drift: float = 0.0
    joint: bool = False


OUTSIDE = {
    "additive": Departures(additive=0.6),
    "ripple": Departures(ripple=0.10),
    "long_context": Departures(long_context=0.4),
    "per_request": Departures(per_request=15e-6),
    "throttle": Departures(throttle=0.15),
    "drift": Departures(jitter=0.03, drift=0.04),
    "joint": Departures(joint=True),
    "stress": Departures(0.6, 0.10, 0.4, 15e-6, 0.15, 0.03, 0.04),
}


def draw(chance: np.random.Generator, shape: Shape) -> Parameters:
    """Parameters of one seed, as wide as engines differ; launches and kernels cost a part for each layer."""
    return Parameters(
        compute_efficiency=chance.uniform(0.50, 0.80),
        attention_efficiency=chance.uniform(0.30, 0.65),
        weight_bandwidth_efficiency=chance.uniform(0.65, 0.90),
        kv_bandwidth_efficiency=chance.uniform(0.45, 0.80),
        step_seconds=shape.layers * chance.uniform(8e-6, 25e-6),
        gap_seconds=math.exp(chance.uniform(math.log(0.2e-3), math.log(3e-3))),
        launch_seconds=shape.layers * chance.uniform(0.08e-3, 0.40e-3),
        sharpness=chance.uniform(2.0, 6.0),
        request_seconds=chance.uniform(1e-3, 6e-3),
        clock=chance.uniform(0.75, 0.98),
    )


class Law:
    """Gives the seconds of a step; it remembers nothing."""

    def __init__(
        self, shape: Shape, device: Device, parameters: Parameters, departures: Departures | None = None
    ) -> None:
        self.shape = shape
        self.device = device
        self.parameters = parameters
        self.departures = departures or Departures()
        given, peak, bandwidth = parameters, device.flop_per_second, device.bytes_per_second
        count = device.ranks
        self._per_token = 2 * shape.linear_parameters / (peak * count * given.compute_efficiency)
        self._per_product = shape.attention_flop / (peak * count * given.attention_efficiency)
        self._weights = shape.step_bytes / (bandwidth * count * given.weight_bandwidth_efficiency)
        self._per_context = shape.kv_bytes / (bandwidth * count * given.kv_bandwidth_efficiency)
        reduces = 2 * shape.layers if count > 1 else 0
        self._reduce = reduces * _REDUCE_SECONDS
        self._reduce_per_token = reduces * 4 * shape.hidden * (count - 1) / count / _REDUCE_BYTES_PER_SECOND

    def step(self, batch: Batch) -> StepTime:
        """Seconds of one step, chance left out."""
        given, apart = self.parameters, self.departures
        tokens = batch.tokens
        clock = given.clock
        if apart.throttle:
            clock /= 1 + apart.throttle * min(1.0, batch.heat / _HOT)
        tiled = -(-tokens // 64) * 64 if apart.joint and tokens > 64 else tokens
        compute = self._per_token * tiled / clock
        if apart.ripple:
            compute *= 1 + apart.ripple * math.sin(2.1 * math.log2(tokens + 1))
        attention = self._per_product * batch.products / clock
        if apart.long_context and batch.prefill_tokens:
            attention *= 1 + apart.long_context * min(1.0, batch.products / batch.prefill_tokens / _LONG_TOKENS)
        memory, reads = self._weights, self._per_context * batch.context
        tensor = 0.85 * (compute + attention)
        if apart.joint:
            compute, memory, attention, reads = compute + attention, memory + reads, 0.0, 0.0
        high, low = (compute, memory) if compute > memory else (memory, compute)
        if apart.additive:
            both = high + apart.additive * low
        else:
            both = high * (1 + (low / high) ** given.sharpness) ** (1 / given.sharpness)
        gpu = both + attention + reads + given.step_seconds + self._reduce + self._reduce_per_token * tokens
        gpu += apart.per_request * batch.requests
        wall = max(gpu, given.launch_seconds) if batch.prefill_tokens else gpu
        return StepTime(gpu, wall + given.gap_seconds, min(tensor, gpu), clock)
