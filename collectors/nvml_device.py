"""What is kept of one GPU or one MIG instance of NVML, how a GPU's instances are found, and GPM's means read."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

_NOT_FOUND = 6
_ONE_SLICE = 0  # NVML_GPU_INSTANCE_PROFILE_1_SLICE: every GPU that can be cut has it
_GIB = 2**30
_GPM_VERSION = 1
GPM_METRICS = {
    "graphics_util": 1,
    "sm_util": 2,
    "any_tensor_util": 5,
    "dram_bw_util": 10,
    "pcie_tx_mib_per_s": 20,
    "pcie_rx_mib_per_s": 21,
}


class Device:
    """One GPU or MIG instance: its handle, what it is, the calls it refused, and two GPM buffers that change places.

    share         as a GpuSample has it
    gpu_instance  number of a MIG instance's GPU instance, where GPM tells of it alone
    instances     of a GPU that is cut
    """

    __slots__ = (
        "fresh",
        "gpu_instance",
        "handle",
        "index",
        "instances",
        "last",
        "last_at",
        "mig",
        "name",
        "parent",
        "refused",
        "share",
        "uuid",
    )

    def __init__(self, handle: Any, index: int, uuid: str, parent: Device | None = None) -> None:
        self.handle = handle
        self.index = index
        self.uuid = uuid
        self.parent = parent
        self.name: str | None = None
        self.mig: bool | None = None
        self.share: str | None = None
        self.gpu_instance: int | None = None
        self.instances: tuple[Device, ...] = ()
        self.refused: set[str] = set()
        self.last: Any = None
        self.last_at = 0.0
        self.fresh: Any = None

    def about(self) -> dict[str, Any]:
        """What every sample of it says of it."""
        return {
            "uuid": self.uuid,
            "index": self.index,
            "name": self.name,
            "mig": self.mig,
            "parent": None if self.parent is None else self.parent.uuid,
            "share": self.share,
        }


def cut(nvml: Any, whole: Device, read: Callable[..., Any], limits: dict[str, str]) -> tuple[Device, ...]:
    """The MIG instances of a GPU as they are now, with their shares of it, and its own share: what is in none.

    `read` is NvmlCollector's: it gives None and keeps the reason where a call fails.
    """
    from kvtally.collectors import mig  # noqa: PLC0415  # fractions are loaded where a GPU is cut

    count = read(whole, "mig instances", nvml.nvmlDeviceGetMaxMigDeviceCount, whole.handle)
    memory = read(whole, "memory", nvml.nvmlDeviceGetMemoryInfo, whole.handle, nvml.nvmlMemory_v2)
    known = {instance.uuid: instance for instance in whole.instances}
    found: dict[str, Device] = {}
    parts = []
    for place in range(count or 0):
        what = f"mig instance {place}"
        handle = read(whole, what, _handle, nvml, whole.handle, place)
        uuid = None if handle is None else read(whole, what, nvml.nvmlDeviceGetUUID, handle)
        if uuid is None:
            continue
        uuid = text_of(uuid)
        instance = known.get(uuid) or Device(handle, whole.index, uuid, whole)
        instance.handle, instance.mig = handle, True
        instance.name = text_of(read(instance, "name", nvml.nvmlDeviceGetName, handle) or "") or None
        instance.gpu_instance = read(instance, "gpu instance", nvml.nvmlDeviceGetGpuInstanceId, handle)
        gigabytes = None if memory is None else memory.total / _GIB
        parts.append(mig.part_of(instance.name or "", gigabytes, count))
        found[uuid] = instance
    each, rest = mig.shares(parts)
    for instance, share in zip(found.values(), each, strict=True):
        instance.share = None if share is None else str(share)
        if share is None:
            limits[f"{instance.uuid} share"] = f"{instance.name or 'its name'} does not tell its part of the GPU"
            instance.name = None  # what has no product has no price, rather than the price of a whole GPU
    whole.share = str(rest)
    if rest and not _sees_all(nvml, whole, read):
        whole.share = "0"
        limits[f"{whole.uuid} mig room"] = "instances of others may be out of sight: what is in none is not counted"
    _refuse_shared_gpm(tuple(found.values()), limits)
    return tuple(found.values())


def _handle(nvml: Any, whole: Any, place: int) -> Any:
    """Handle of one MIG instance; None where no instance has this number."""
    try:
        return nvml.nvmlDeviceGetMigDeviceHandleByIndex(whole, place)
    except nvml.NVMLError as error:
        if error.value == _NOT_FOUND:
            return None
        raise


def _sees_all(nvml: Any, whole: Device, read: Callable[..., Any]) -> bool:
    """Whether NVML shows every instance: a container is shown its own alone, and may not ask what room is left."""
    profile = read(whole, "mig room", nvml.nvmlDeviceGetGpuInstanceProfileInfo, whole.handle, _ONE_SLICE)
    if profile is None:
        return False
    room = read(whole, "mig room", nvml.nvmlDeviceGetGpuInstanceRemainingCapacity, whole.handle, profile.id)
    return room is not None


def _refuse_shared_gpm(instances: tuple[Device, ...], limits: dict[str, str]) -> None:
    """GPM tells of a GPU instance: where several compute instances share one, of none of them."""
    numbers = [instance.gpu_instance for instance in instances]
    for instance in instances:
        if instance.gpu_instance is None or numbers.count(instance.gpu_instance) > 1:
            instance.gpu_instance = None
            instance.refused.add("gpm")
            limits[f"{instance.uuid} gpm"] = "several compute instances share its GPU instance"


def text_of(value: bytes | str) -> str:
    """Text that NVML gives as either."""
    return value.decode() if isinstance(value, bytes) else value


def gpm_request(nvml: Any) -> Any:
    """The request for the metrics of GPM that are read, to be used again and again."""
    request = nvml.c_nvmlGpmMetricsGet_t()
    request.version = _GPM_VERSION
    request.numMetrics = len(GPM_METRICS)
    for place, metric in enumerate(GPM_METRICS.values()):
        request.metrics[place].metricId = metric
    return request


def gpm_means(nvml: Any, request: Any, device: Device, limits: dict[str, str]) -> dict[str, float | None]:
    """The means in an answered request; `limits` says of a metric that is not among them why."""
    means: dict[str, float | None] = {}
    for place, name in enumerate(GPM_METRICS):
        metric, key = request.metrics[place], f"{device.uuid} gpm {name}"
        if metric.nvmlReturn == 0 and math.isfinite(metric.value):
            means[name] = metric.value
            limits.pop(key, None)
        else:
            limits[key] = str(nvml.NVMLError(metric.nvmlReturn)) if metric.nvmlReturn else "not a number"
    return means
