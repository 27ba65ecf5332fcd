"""What a replica's hardware and model could do at best: the constants of the step law (METHOD 4.2)."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, NamedTuple

from kvtally.agent.facts import MODEL_CONFIG
from kvtally.agent.hardware import gpu_of
from kvtally.agent.model_shape import UnknownArchitecture, shape_of

if TYPE_CHECKING:
    from kvtally.agent.calibration import Fingerprint
    from kvtally.agent.facts import Replica
    from kvtally.agent.hardware import Gpu
    from kvtally.agent.model_shape import ModelShape

# a CPU has no datasheet row: the order of magnitude of a small server, with priors so wide that the data decide
CPU_FLOPS = 0.5e12
CPU_BANDWIDTH = 40e9
ALL_REDUCE_SECONDS = 10e-6  # METHOD 4.2: latency of one all-reduce, two in each layer
LINK_BYTES_PER_SECOND = 350e9


class CannotCalibrate(ValueError):  # noqa: N818  # it is an answer, as NoData is
    """The law has no form for this replica; `hint` says what would lift that."""

    def __init__(self, reason: str, hint: str = "") -> None:
        super().__init__(reason)
        self.hint = hint


class Machine(NamedTuple):
    """Constants of one replica, all its GPUs together.

    flops               dense FLOP/s at the weights' type
    attention_flops     dense FLOP/s at 16 bits
    bandwidth           bytes/s of device memory
    linear_flop         FLOP of a token in the linear layers
    attention_flop      FLOP per query token and context token
    kv_bytes            bytes of KV per token
    clock_mhz           SM clock at which the peaks hold; None where there is no GPU
    token_budget        most tokens of a step
    is_eager            no compiled graph for steps with prefill: each launch is paid for
    """

    shape: ModelShape
    gpus: int
    flops: float
    attention_flops: float
    bandwidth: float
    linear_flop: float
    attention_flop: float
    kv_bytes: float
    clock_mhz: float | None
    token_budget: int
    is_eager: bool

    @property
    def is_cpu(self) -> bool:
        """Whether the replica has no GPU: seconds are then CPU seconds, and no datasheet helps."""
        return not self.gpus

    @property
    def token_seconds(self) -> float:
        """About what a prompt token takes: the linear layers at 60 % of the peak."""
        return self.linear_flop / (0.6 * self.flops)

    def all_reduce_seconds(self, tokens: float) -> float:
        """Latency and transfer of the all-reduces of a step; `tokens` may be an array."""
        if self.gpus <= 1:
            return 0.0
        share = (self.gpus - 1) / self.gpus
        moved = 4 * self.shape.hidden * share / LINK_BYTES_PER_SECOND
        return 2 * self.shape.layers * (ALL_REDUCE_SECONDS + tokens * moved)


def machine_of(replica: Replica, fingerprint: Fingerprint) -> Machine:
    """The constants of a replica; CannotCalibrate if its model or its GPUs are not known."""
    if not replica.shape:
        raise CannotCalibrate(
            f"the shape of model {replica.model or '?'} is not known",
            f"say where its config.json lies, {replica.in_config(MODEL_CONFIG)}",
        )
    try:
        shape = shape_of(json.loads(replica.shape))
    except UnknownArchitecture as unknown:
        raise CannotCalibrate(str(unknown), unknown.hint) from unknown
    count = fingerprint.gpus
    if not count:
        gpu = None
    else:
        gpu = gpu_of(fingerprint.sku)
        if gpu is None:
            raise CannotCalibrate(
                f"no datasheet row for GPU {fingerprint.sku or '?'}",
                "give its figures in an issue, or calibrate with --probe once there is a row",
            )
    return machine(shape, gpu, count, token_budget=fingerprint.token_budget, is_eager=replica.eager)


def machine(shape: ModelShape, gpu: Gpu | None, gpus: int, *, token_budget: int, is_eager: bool = False) -> Machine:
    """The constants of a model on so many GPUs of a kind; `gpu` None is a CPU."""
    flops = CPU_FLOPS if gpu is None else gpu.dense_bf16_flops * gpus
    is_8_bit = gpu is not None and shape.is_fp8
    return Machine(
        shape,
        gpus,
        flops * (gpu.fp8_factor if gpu is not None and is_8_bit else 1),
        flops,
        CPU_BANDWIDTH if gpu is None else gpu.bandwidth_bytes_per_second * gpus,
        2.0 * shape.linear_parameters,
        float(shape.attention_flop),
        float(shape.kv_bytes_per_token),
        None if gpu is None else gpu.clock_mhz,
        token_budget,
        is_eager,
    )
