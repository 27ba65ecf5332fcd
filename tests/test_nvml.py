# ruff: noqa: N802, N815  # the fake carries NVML's own names
from __future__ import annotations

import ctypes
import importlib
import sys
from collections import Counter
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from kvtally.collectors import quantities
from kvtally.collectors.base import CollectError, NoData
from kvtally.collectors.nvml import LIBRARY, NvmlCollector
from kvtally.collectors.nvml_device import gpm_request

if TYPE_CHECKING:
    from kvtally.collectors.base import Reading

UNINITIALIZED = 1
NOT_FOUND = 6
UNKNOWN_ERROR = 999
NOT_SUPPORTED = 3
NO_PERMISSION = 4
DRIVER_NOT_LOADED = 9
GPU_IS_LOST = 15
VERSION_MISMATCH = 18


class NvmlError(Exception):
    """As in pynvml: the number is in `value`, and str() gives words."""

    def __init__(self, value: int) -> None:
        super().__init__(value)
        self.value = value

    def __str__(self) -> str:
        return {NOT_SUPPORTED: "Not Supported", NO_PERMISSION: "Insufficient Permissions"}.get(
            self.value, f"NVML Error with code {self.value}"
        )


class GpmSample:
    """A buffer: who was sampled, when, and how often it was handed out."""

    def __init__(self) -> None:
        self.taken_at: float | None = None
        self.freed = False


class GpmRequest:
    def __init__(self) -> None:
        self.version = 0
        self.numMetrics = 0
        self.sample1: Any = None
        self.sample2: Any = None
        self.metrics = [SimpleNamespace(metricId=0, nvmlReturn=0, value=0.0) for _ in range(477)]


class FakeNvml:
    """A host of GPUs with pynvml's names; `failures[(function, index)]` is the error that a call gives.

    GPM means are those of `graphics`, the share of the time before the clock's instant; every call is counted.
    """

    NVMLError = NvmlError
    nvmlMemory_v2 = 0x02000028
    NVML_GPU_INSTANCE_PROFILE_1_SLICE = 0
    c_nvmlGpmMetricsGet_t = GpmRequest

    def __init__(self, count: int = 1) -> None:
        self.now = 1000.0
        self.count = count
        self.calls: Counter[str] = Counter()
        self.failures: dict[tuple[str, int | None], int] = {}
        self.metric_failures: dict[int, int] = {}
        self.metric_values = {1: 50.0, 2: 40.0, 5: 30.0, 10: 20.0, 20: 1.0, 21: 2.0}
        self.mig = [0, 0]
        self.gpm_supported = 1
        self.names_are_bytes = False
        self.gpm_buffers: list[GpmSample] = []
        self.windows: list[float] = []
        self.pids = [41, 40, 40]
        self.instances: dict[int, tuple[str, str, int]] = {}  # place on GPU 0 -> UUID, profile, GPU instance
        self.sees_all = True
        self.utilization = 70
        self.millijoules = 5_000
        self.initialised = 0

    def clock(self) -> float:
        return self.now

    def called(self, function: str, handle: int | None = None) -> None:
        self.calls[function] += 1
        if handle is not None:
            self.calls[f"{function} {handle}"] += 1
        if not self.initialised and function != "nvmlInit":
            raise NvmlError(UNINITIALIZED)
        for key in ((function, handle), (function, None)):
            if key in self.failures:
                raise NvmlError(self.failures[key])

    def nvmlInit(self) -> None:
        self.called("nvmlInit")
        self.initialised += 1

    def nvmlShutdown(self) -> None:
        self.called("nvmlShutdown")
        self.initialised -= 1

    def nvmlDeviceGetCount(self) -> int:
        self.called("nvmlDeviceGetCount")
        return self.count

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        self.called("nvmlDeviceGetHandleByIndex", index)
        return index

    def text(self, value: str) -> bytes | str:
        return value.encode() if self.names_are_bytes else value

    def nvmlDeviceGetUUID(self, handle: int) -> bytes | str:
        self.called("nvmlDeviceGetUUID", handle)
        return self.text(self.instances[handle - 100][0] if handle >= 100 else f"GPU-{handle}")

    def nvmlDeviceGetName(self, handle: int) -> bytes | str:
        self.called("nvmlDeviceGetName", handle)
        profile = f" MIG {self.instances[handle - 100][1]}" if handle >= 100 else ""
        return self.text(f"NVIDIA H100 80GB HBM3{profile}")

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: int) -> int:
        self.called("nvmlDeviceGetMaxMigDeviceCount", handle)
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: int, index: int) -> int:
        self.called("nvmlDeviceGetMigDeviceHandleByIndex", handle)
        if index not in self.instances:
            raise NvmlError(NOT_FOUND)
        return 100 + index

    def nvmlDeviceGetGpuInstanceId(self, handle: int) -> int:
        self.called("nvmlDeviceGetGpuInstanceId", handle)
        return self.instances[handle - 100][2]

    def nvmlDeviceGetGpuInstanceProfileInfo(self, handle: int, profile: int) -> Any:
        self.called("nvmlDeviceGetGpuInstanceProfileInfo", handle)
        assert profile == self.NVML_GPU_INSTANCE_PROFILE_1_SLICE
        return SimpleNamespace(id=19)

    def nvmlDeviceGetGpuInstanceRemainingCapacity(self, handle: int, profile_id: int) -> int:
        self.called("nvmlDeviceGetGpuInstanceRemainingCapacity", handle)
        assert profile_id == 19
        if not self.sees_all:
            raise NvmlError(NO_PERMISSION)
        return 7 - len(self.instances)

    def nvmlGpmMigSampleGet(self, handle: int, gpu_instance: int, sample: GpmSample) -> GpmSample:
        self.called("nvmlGpmMigSampleGet", handle)
        self.calls[f"nvmlGpmMigSampleGet of {gpu_instance}"] += 1
        sample.taken_at = self.now
        return sample

    def nvmlDeviceGetMigMode(self, handle: int) -> list[int]:
        self.called("nvmlDeviceGetMigMode", handle)
        return self.mig

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> Any:
        self.called("nvmlDeviceGetUtilizationRates", handle)
        return SimpleNamespace(gpu=self.utilization, memory=25)

    def nvmlDeviceGetMemoryInfo(self, handle: int, version: int) -> Any:
        self.called("nvmlDeviceGetMemoryInfo", handle)
        assert version == self.nvmlMemory_v2
        return SimpleNamespace(used=2**28 if handle >= 100 else 2**30, total=80 * 2**30)

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:
        self.called("nvmlDeviceGetPowerUsage", handle)
        return 300_000

    def nvmlDeviceGetClockInfo(self, handle: int, clock: int) -> int:
        self.called("nvmlDeviceGetClockInfo", handle)
        assert clock == 1
        return 1980

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: int) -> int:
        self.called("nvmlDeviceGetCurrentClocksEventReasons", handle)
        return 4

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:
        self.called("nvmlDeviceGetTotalEnergyConsumption", handle)
        return self.millijoules

    def nvmlDeviceGetComputeRunningProcesses_v3(self, handle: int) -> list[Any]:
        self.called("nvmlDeviceGetComputeRunningProcesses_v3", handle)
        return [SimpleNamespace(pid=pid + (handle if handle >= 100 else 0)) for pid in self.pids]

    def nvmlDeviceGetMinorNumber(self, handle: int) -> int:
        self.called("nvmlDeviceGetMinorNumber", handle)
        return 5 - handle  # no index

    def nvmlDeviceGetPcieThroughput(self, handle: int, counter: int) -> int:
        self.called("nvmlDeviceGetPcieThroughput", handle)
        return counter

    def nvmlGpmQueryDeviceSupport(self, handle: int) -> Any:
        self.called("nvmlGpmQueryDeviceSupport", handle)
        return SimpleNamespace(isSupportedDevice=self.gpm_supported)

    def nvmlGpmSampleAlloc(self) -> GpmSample:
        self.called("nvmlGpmSampleAlloc")
        self.gpm_buffers.append(GpmSample())
        return self.gpm_buffers[-1]

    def nvmlGpmSampleFree(self, sample: GpmSample) -> None:
        assert not sample.freed
        sample.freed = True

    def nvmlGpmSampleGet(self, handle: int, sample: GpmSample) -> GpmSample:
        self.called("nvmlGpmSampleGet", handle)
        assert not sample.freed
        sample.taken_at = self.now
        return sample

    def nvmlGpmMetricsGet(self, request: GpmRequest) -> GpmRequest:
        self.called("nvmlGpmMetricsGet")
        assert request.version == 1
        assert request.sample1.taken_at < request.sample2.taken_at
        self.windows.append(request.sample2.taken_at - request.sample1.taken_at)
        for metric in request.metrics[: request.numMetrics]:
            metric.nvmlReturn = self.metric_failures.get(metric.metricId, 0)
            metric.value = self.metric_values[metric.metricId]
        return request


def collector_of(nvml: FakeNvml, energy: float = 10.0, gpm: float = 10.0) -> NvmlCollector:
    return NvmlCollector(nvml, nvml.clock, 1.0, energy, gpm)


def value(reading: Reading, name: str) -> float | None:
    return reading.values[quantities.index("gpu", name)]


def tick(nvml: FakeNvml, seconds: float) -> None:
    nvml.now += seconds


def test_a_sample_holds_what_nvml_says() -> None:
    nvml = FakeNvml()
    collector = collector_of(nvml)
    (first,) = collector.sample()
    assert (first.uuid, first.index, first.name, first.mig) == ("GPU-0", 0, "NVIDIA H100 80GB HBM3", False)
    assert (first.utilization_percent, first.memory_utilization_percent) == (70, 25)
    assert (first.memory_used_bytes, first.power_milliwatts) == (2**30, 300_000)
    assert (first.energy_millijoules, first.sm_clock_mhz, first.clock_reasons) == (5_000, 1980, 4)
    assert (first.gpm, first.gpm_seconds) == ({}, 0.0)
    tick(nvml, 10)
    (second,) = collector.sample()
    assert second.gpm == {
        "graphics_util": 50.0,
        "sm_util": 40.0,
        "any_tensor_util": 30.0,
        "dram_bw_util": 20.0,
        "pcie_tx_mib_per_s": 1.0,
        "pcie_rx_mib_per_s": 2.0,
    }
    assert second.gpm_seconds == 10.0
    assert collector.limits == {}


def test_a_reading_is_summed_up_over_collections() -> None:
    nvml = FakeNvml()
    collector = collector_of(nvml)
    collector.collect()
    tick(nvml, 10)
    nvml.millijoules = 9_000
    (reading,) = collector.collect()
    assert (reading.kind, reading.name, reading.session) == ("gpu", "GPU-0", 1.0)
    assert reading.attributes == {"index": "0", "sku": "NVIDIA H100 80GB HBM3", "mig": "0"}
    assert value(reading, "energy_mj") == 9_000
    assert value(reading, "observed_ns") == 10
    assert value(reading, "busy_ns") == pytest.approx(7)
    assert value(reading, "busy_cycles") == pytest.approx(7 * 1980)
    assert value(reading, "graphics_ns") == pytest.approx(5)
    assert value(reading, "pcie_received_bytes") == 2 * 10 * 2**20
    assert value(reading, "pcie_sent_bytes") == 10 * 2**20


def test_gpus_that_are_shown_with_others_say_so() -> None:
    nvml = FakeNvml(2)
    readings = NvmlCollector(nvml, nvml.clock, 1.0, shown="node").collect()
    assert [reading.attributes["shown"] for reading in readings] == ["node", "node"]


def test_names_may_be_bytes() -> None:
    nvml = FakeNvml()
    nvml.names_are_bytes = True
    (sample,) = collector_of(nvml).sample()
    assert (sample.uuid, sample.name) == ("GPU-0", "NVIDIA H100 80GB HBM3")


def test_after_the_start_a_frequent_tick_pays_for_one_gpu() -> None:
    nvml = FakeNvml(8)
    collector = collector_of(nvml)
    collector.sample()
    assert nvml.calls["nvmlDeviceGetTotalEnergyConsumption"] == 8
    assert nvml.calls["nvmlGpmSampleGet"] == 8
    for _ in range(40):
        before = nvml.calls.copy()
        tick(nvml, 1)
        collector.sample()
        paid = nvml.calls - before
        assert paid["nvmlDeviceGetUtilizationRates"] == 8
        assert paid["nvmlDeviceGetTotalEnergyConsumption"] <= 1
        assert paid["nvmlGpmSampleGet"] <= 1
        assert paid["nvmlGpmMetricsGet"] == paid["nvmlGpmSampleGet"]
    for gpu in range(8):  # 40 s at one reading every 10 s, and the one at the start
        assert nvml.calls[f"nvmlDeviceGetTotalEnergyConsumption {gpu}"] == 5
        assert nvml.calls[f"nvmlGpmSampleGet {gpu}"] == 5


@pytest.mark.parametrize(("tick_seconds", "dear_calls"), [(5.0, 4), (10.0, 8), (60.0, 8)])
def test_a_slow_tick_pays_for_as_many_gpus_as_are_due(tick_seconds: float, dear_calls: int) -> None:
    nvml = FakeNvml(8)
    collector = collector_of(nvml)
    collector.sample()
    for _ in range(4):
        before = nvml.calls.copy()
        tick(nvml, tick_seconds)
        collector.sample()
        paid = nvml.calls - before
        assert paid["nvmlDeviceGetTotalEnergyConsumption"] == dear_calls
        assert paid["nvmlGpmSampleGet"] == dear_calls


def test_a_tick_a_moment_early_does_not_miss_its_turn() -> None:
    nvml = FakeNvml()
    collector = collector_of(nvml)
    collector.sample()
    for seconds in (9.99, 10.02, 9.98, 10.01, 9.97, 10.03):
        tick(nvml, seconds)
        (sample,) = collector.sample()
        assert sample.energy_millijoules == 5_000
        assert sample.gpm_seconds == pytest.approx(seconds)


def test_gpm_means_of_a_gpu_cover_all_the_time_between_its_turns() -> None:
    nvml = FakeNvml(3)
    collector = collector_of(nvml)
    for _ in range(61):
        collector.collect()
        tick(nvml, 1)
    for reading in collector.collect():
        covered = value(reading, "gpm_ns")
        assert covered is not None
        assert 51 <= covered <= 61
        assert value(reading, "graphics_ns") == pytest.approx(covered * 0.5)


def test_every_0_seconds_means_every_time() -> None:
    nvml = FakeNvml(2)
    collector = collector_of(nvml, energy=0, gpm=0)
    for _ in range(5):
        collector.sample()
        tick(nvml, 1)
    assert nvml.calls["nvmlDeviceGetTotalEnergyConsumption"] == 10
    assert nvml.windows == [1.0] * 8


def test_two_gpm_samples_are_never_closer_than_nvml_allows() -> None:
    nvml = FakeNvml()
    collector = collector_of(nvml, gpm=0)
    collector.sample()
    tick(nvml, 0.0625)
    (near,) = collector.sample()
    assert near.gpm is None
    tick(nvml, 0.0625)
    (far,) = collector.sample()
    assert far.gpm_seconds == 0.125


def test_gpm_uses_two_buffers_per_gpu_however_long_it_runs() -> None:
    nvml = FakeNvml(2)
    collector = collector_of(nvml, gpm=0)
    for _ in range(20):
        collector.sample()
        tick(nvml, 1)
    assert len(nvml.gpm_buffers) == 4
    collector.close()
    assert all(buffer.freed for buffer in nvml.gpm_buffers)
    assert nvml.initialised == 0


def test_a_clock_set_back_does_not_blind_the_dear_calls() -> None:
    nvml = FakeNvml()
    collector = collector_of(nvml)
    collector.sample()
    tick(nvml, -3600)
    (sample,) = collector.sample()
    assert sample.energy_millijoules == 5_000
    assert sample.gpm is None  # over how long is not known
    tick(nvml, 10)
    (sample,) = collector.sample()
    assert sample.gpm_seconds == 10


def test_the_blocking_pcie_call_is_never_made() -> None:
    nvml = FakeNvml(8)
    collector = collector_of(nvml, energy=0, gpm=0)
    for _ in range(3):
        collector.collect()
        tick(nvml, 1)
    collector.compute_pids()
    collector.close()
    assert nvml.calls["nvmlDeviceGetPcieThroughput"] == 0


def test_a_gpu_without_gpm_has_none_and_says_so() -> None:
    nvml = FakeNvml()
    nvml.gpm_supported = 0
    collector = collector_of(nvml, gpm=0)
    for _ in range(3):
        (reading,) = collector.collect()
        tick(nvml, 1)
    for name in ("gpm_ns", "graphics_ns", "sm_ns", "tensor_ns", "dram_ns", "pcie_received_bytes", "pcie_sent_bytes"):
        assert value(reading, name) is None
    assert value(reading, "busy_ns") == pytest.approx(1.4)
    assert collector.limits == {"GPU-0 gpm": "this GPU has no GPM: Hopper or newer has"}
    assert nvml.calls["nvmlGpmSampleGet"] == 0


def test_without_permission_gpm_is_none_and_is_not_asked_for_again() -> None:
    nvml = FakeNvml()
    nvml.failures["nvmlGpmSampleGet", None] = NO_PERMISSION
    collector = collector_of(nvml, gpm=0)
    for _ in range(3):
        (sample,) = collector.sample()
        tick(nvml, 1)
    assert (sample.gpm, sample.gpm_seconds) == (None, None)
    assert sample.utilization_percent == 70
    assert collector.limits == {"GPU-0 gpm": "Insufficient Permissions"}
    assert nvml.calls["nvmlGpmSampleGet"] == 1


def test_a_metric_that_fails_is_left_out_and_the_others_stay() -> None:
    nvml = FakeNvml()
    nvml.metric_failures[5] = NOT_SUPPORTED
    nvml.metric_values[10] = float("nan")
    collector = collector_of(nvml, gpm=0)
    collector.sample()
    tick(nvml, 1)
    (sample,) = collector.sample()
    assert sample.gpm is not None
    assert sorted(sample.gpm) == ["graphics_util", "pcie_rx_mib_per_s", "pcie_tx_mib_per_s", "sm_util"]
    assert collector.limits == {
        "GPU-0 gpm any_tensor_util": "Not Supported",
        "GPU-0 gpm dram_bw_util": "not a number",
    }
    nvml.metric_failures.clear()
    nvml.metric_values[10] = 20.0
    tick(nvml, 1)
    collector.sample()
    assert collector.limits == {}


def test_with_mig_on_utilisation_and_gpm_are_unknown_and_the_rest_is_read() -> None:
    nvml = FakeNvml()
    nvml.mig = [1, 1]
    nvml.failures["nvmlDeviceGetUtilizationRates", None] = NOT_SUPPORTED
    collector = collector_of(nvml, gpm=0)
    collector.collect()
    tick(nvml, 10)
    (reading,) = collector.collect()
    assert reading.attributes["mig"] == "1"
    assert value(reading, "busy_ns") is None
    assert value(reading, "busy_cycles") is None
    assert value(reading, "gpm_ns") is None
    assert value(reading, "power_sampled_mj") == 3_000_000
    assert value(reading, "memory_used_bytes") == 2**30
    assert collector.limits == {
        "GPU-0 utilization": "Not Supported",
        "GPU-0 gpm": "MIG is on: its instances have their own",
    }
    assert nvml.calls["nvmlDeviceGetUtilizationRates"] == 1


def cut_in_two() -> FakeNvml:
    """GPU 0 with a seventh and a half in instances, and 5/14 in none."""
    nvml = FakeNvml()
    nvml.mig = [1, 1]
    nvml.failures["nvmlDeviceGetUtilizationRates", 0] = NOT_SUPPORTED
    nvml.instances = {0: ("MIG-one", "1g.10gb", 9), 3: ("MIG-two", "3g.40gb", 2)}
    return nvml


def test_mig_instances_are_read_each_with_its_share_of_the_gpu() -> None:
    nvml = cut_in_two()
    collector = collector_of(nvml, gpm=0)
    collector.collect()
    tick(nvml, 10)
    whole, one, two = collector.collect()
    assert [reading.name for reading in (whole, one, two)] == ["GPU-0", "MIG-one", "MIG-two"]
    assert whole.attributes == {"index": "0", "sku": "NVIDIA H100 80GB HBM3", "mig": "1", "share": "5/14"}
    assert one.attributes == {
        "index": "0",
        "sku": "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "mig": "1",
        "parent": "GPU-0",
        "share": "1/7",
    }
    assert two.attributes["share"] == "1/2"
    assert [value(reading, "graphics_ns") for reading in (whole, one, two)] == [None, 5, 5]
    assert [value(reading, "memory_used_bytes") for reading in (whole, one, two)] == [2**30, 2**28, 2**28]
    assert [value(reading, "energy_mj") for reading in (whole, one, two)] == [5_000, None, None]
    assert [value(reading, "observed_ns") for reading in (whole, one, two)] == [10, None, None]
    assert (nvml.calls["nvmlGpmMigSampleGet of 9"], nvml.calls["nvmlGpmMigSampleGet of 2"]) == (2, 2)
    assert collector.limits == {
        "GPU-0 utilization": "Not Supported",
        "GPU-0 gpm": "MIG is on: its instances have their own",
    }


def test_instances_that_nobody_may_count_leave_no_rest_to_pay_for() -> None:
    nvml = cut_in_two()
    nvml.sees_all = False
    whole, *_ = (collector := collector_of(nvml)).collect()
    assert whole.attributes["share"] == "0"
    assert "out of sight" in collector.limits["GPU-0 mig room"]


def test_instances_come_and_go_while_they_are_watched() -> None:
    nvml = cut_in_two()
    collector = collector_of(nvml, gpm=0)
    collector.collect()
    tick(nvml, 10)
    collector.collect()
    nvml.instances = {3: nvml.instances[3], 4: ("MIG-three", "4g.40gb", 1)}
    tick(nvml, 10)
    found = {reading.name: reading.attributes.get("share") for reading in collector.collect()}
    # 1/2 and 4/7 come to 15/14 of the GPU; the one that went is still told of for the time that a gap may last
    assert found == {"GPU-0": "0", "MIG-one": "1/7", "MIG-two": "7/15", "MIG-three": "8/15"}
    assert sum(buffer.freed for buffer in nvml.gpm_buffers) == 2
    nvml.mig = [0, 0]
    del nvml.failures["nvmlDeviceGetUtilizationRates", 0]
    for _ in range(4):
        tick(nvml, 10)
        readings = collector.collect()
    assert [(reading.name, reading.attributes["mig"]) for reading in readings] == [("GPU-0", "0")]
    assert "share" not in readings[0].attributes
    assert value(readings[0], "graphics_ns") == 15
    assert value(readings[0], "busy_ns") == pytest.approx(21)
    assert all(buffer.freed for buffer in nvml.gpm_buffers[:-2])


def test_compute_instances_of_one_gpu_instance_have_no_gpm_of_their_own() -> None:
    nvml = cut_in_two()
    nvml.instances = {0: ("MIG-one", "1c.3g.40gb", 2), 1: ("MIG-two", "2c.3g.40gb", 2)}
    collector = collector_of(nvml, gpm=0)
    whole, one, two = collector.collect()
    # a third and two thirds of a half
    assert [reading.attributes["share"] for reading in (whole, one, two)] == ["1/2", "1/6", "1/3"]
    assert [value(reading, "gpm_ns") for reading in (one, two)] == [None, None]
    assert collector.limits["MIG-one gpm"] == "several compute instances share its GPU instance"


def test_an_instance_whose_name_tells_no_profile_has_no_product_and_so_no_price() -> None:
    nvml = cut_in_two()
    nvml.instances = {0: ("MIG-one", "half", 2)}
    _, one = collector_of(nvml).collect()
    assert "sku" not in one.attributes


def test_an_instance_that_is_lost_leaves_its_gpu_and_the_others() -> None:
    nvml = cut_in_two()
    collector = collector_of(nvml, gpm=0)
    collector.collect()
    tick(nvml, 1)
    nvml.failures["nvmlDeviceGetMemoryInfo", 100] = GPU_IS_LOST
    assert [sample.uuid for sample in collector.sample()] == ["GPU-0", "MIG-two"]


def test_processes_are_those_of_the_instances_and_not_of_the_gpu_that_is_cut() -> None:
    nvml = cut_in_two()
    assert collector_of(nvml).compute_pids() == {"MIG-one": [140, 141], "MIG-two": [143, 144]}


def test_a_gpu_that_cannot_be_cut_is_not_cut() -> None:
    nvml = FakeNvml()
    nvml.failures["nvmlDeviceGetMigMode", None] = NOT_SUPPORTED
    collector = collector_of(nvml)
    (sample,) = collector.sample()
    assert sample.mig is False
    assert collector.limits == {}


@pytest.mark.parametrize(
    ("function", "field"),
    [
        ("nvmlDeviceGetUtilizationRates", "utilization_percent"),
        ("nvmlDeviceGetMemoryInfo", "memory_used_bytes"),
        ("nvmlDeviceGetPowerUsage", "power_milliwatts"),
        ("nvmlDeviceGetClockInfo", "sm_clock_mhz"),
        ("nvmlDeviceGetCurrentClocksEventReasons", "clock_reasons"),
        ("nvmlDeviceGetTotalEnergyConsumption", "energy_millijoules"),
        ("nvmlGpmSampleGet", "gpm"),
    ],
)
def test_a_call_that_fails_once_costs_its_value_once(function: str, field: str) -> None:
    nvml = FakeNvml()
    collector = collector_of(nvml, energy=0, gpm=0)
    collector.sample()
    tick(nvml, 1)
    nvml.failures[function, None] = UNKNOWN_ERROR
    (failed,) = collector.sample()
    missing = {name for name in failed.__struct_fields__ if getattr(failed, name) is None}
    assert field in missing
    assert missing <= {field, "memory_utilization_percent", "gpm_seconds", "parent", "share"}
    assert list(collector.limits.values()) == ["NVML Error with code 999"]
    nvml.failures.clear()
    tick(nvml, 1)
    (sample,) = collector.sample()
    assert getattr(sample, field) is not None
    assert collector.limits == {}


def test_a_clock_that_fails_once_leaves_its_step_out_so_that_the_clock_under_load_stays_true() -> None:
    nvml = FakeNvml()
    collector = collector_of(nvml)
    collector.collect()
    for fails in (False, True, False):
        tick(nvml, 10)
        nvml.failures.clear()
        if fails:
            nvml.failures["nvmlDeviceGetClockInfo", None] = UNKNOWN_ERROR
        (reading,) = collector.collect()
    assert value(reading, "observed_ns") == 20
    assert value(reading, "busy_ns") == pytest.approx(14)
    assert value(reading, "busy_cycles") == pytest.approx(14 * 1980)


def test_a_gpu_that_never_tells_its_clock_has_no_cycles_and_the_rest_is_summed() -> None:
    nvml = FakeNvml()
    nvml.failures["nvmlDeviceGetClockInfo", None] = NOT_SUPPORTED
    collector = collector_of(nvml)
    collector.collect()
    tick(nvml, 10)
    (reading,) = collector.collect()
    assert value(reading, "busy_ns") == pytest.approx(7)
    assert value(reading, "busy_cycles") is None


def test_a_gpm_sample_that_fails_loses_no_time() -> None:
    nvml = FakeNvml()
    collector = collector_of(nvml, gpm=0)
    collector.sample()
    tick(nvml, 1)
    nvml.failures["nvmlGpmSampleGet", None] = UNKNOWN_ERROR
    collector.sample()
    nvml.failures.clear()
    tick(nvml, 1)
    (sample,) = collector.sample()
    assert sample.gpm_seconds == 2


def test_a_lost_gpu_has_no_values_and_the_others_are_read() -> None:
    nvml = FakeNvml(2)
    collector = collector_of(nvml)
    collector.collect()
    tick(nvml, 1)
    nvml.failures["nvmlDeviceGetUtilizationRates", 0] = GPU_IS_LOST
    before = nvml.calls.copy()
    lost, whole = collector.collect()
    assert (lost.name, value(lost, "observed_ns"), value(lost, "power_mw")) == ("GPU-0", 0, None)
    assert (whole.name, value(whole, "observed_ns"), value(whole, "power_mw")) == ("GPU-1", 1, 300_000)
    assert (nvml.calls - before)["nvmlDeviceGetPowerUsage"] == 1
    assert collector.limits == {"GPU-0 utilization": "NVML Error with code 15"}


def test_a_gpu_lost_before_the_start_leaves_the_others() -> None:
    nvml = FakeNvml(2)
    nvml.failures["nvmlDeviceGetHandleByIndex", 0] = GPU_IS_LOST
    collector = collector_of(nvml)
    assert [sample.uuid for sample in collector.sample()] == ["GPU-1"]
    assert collector.limits == {"gpu 0": "NVML Error with code 15"}


def test_when_all_gpus_are_lost_collecting_fails_and_begins_afresh() -> None:
    nvml = FakeNvml(2)
    collector = collector_of(nvml)
    collector.collect()
    nvml.failures["nvmlDeviceGetUtilizationRates", None] = GPU_IS_LOST
    with pytest.raises(CollectError, match="every GPU is lost"):
        collector.collect()
    assert nvml.initialised == 0
    nvml.failures.clear()
    tick(nvml, 1)
    assert len(collector.collect()) == 2
    assert nvml.calls["nvmlInit"] == 2


@pytest.mark.parametrize("error", [UNINITIALIZED, DRIVER_NOT_LOADED, VERSION_MISMATCH])
def test_a_driver_that_went_away_fails_once_and_is_opened_again(error: int) -> None:
    nvml = FakeNvml()
    collector = collector_of(nvml)
    collector.collect()
    tick(nvml, 5)
    nvml.failures["nvmlDeviceGetPowerUsage", None] = error
    with pytest.raises(CollectError, match="driver went away"):
        collector.collect()
    nvml.failures.clear()
    tick(nvml, 5)
    (reading,) = collector.collect()
    assert value(reading, "observed_ns") == 10
    assert value(reading, "energy_mj") == 5_000
    assert nvml.calls["nvmlInit"] == 2


@pytest.mark.parametrize(
    ("error", "outcome", "reason"),
    [
        (DRIVER_NOT_LOADED, NoData, "no NVIDIA driver"),
        (NO_PERMISSION, NoData, "no right"),
        (VERSION_MISMATCH, CollectError, "upgraded"),
        (UNKNOWN_ERROR, CollectError, "does not start"),
    ],
)
def test_a_start_that_fails_says_why(error: int, outcome: type[Exception], reason: str) -> None:
    nvml = FakeNvml()
    nvml.failures["nvmlInit", None] = error
    with pytest.raises(outcome, match=reason) as raised:
        collector_of(nvml).collect()
    assert getattr(raised.value, "hint", "")


def test_a_driver_without_gpus_gives_no_data_and_is_shut_down() -> None:
    nvml = FakeNvml(0)
    with pytest.raises(NoData, match="shows no GPU"):
        collector_of(nvml).collect()
    assert nvml.initialised == 0


def test_when_no_gpu_answers_at_the_start_collecting_fails() -> None:
    nvml = FakeNvml(2)
    nvml.failures["nvmlDeviceGetHandleByIndex", None] = UNKNOWN_ERROR
    with pytest.raises(CollectError, match="no GPU answers"):
        collector_of(nvml).collect()
    assert nvml.initialised == 0


def test_compute_pids_are_given_by_uuid_without_the_gpus_that_do_not_tell() -> None:
    nvml = FakeNvml(2)
    nvml.failures["nvmlDeviceGetComputeRunningProcesses_v3", 1] = NO_PERMISSION
    assert collector_of(nvml).compute_pids() == {"GPU-0": [40, 41]}


def test_minor_numbers_are_given_by_uuid_without_the_gpus_that_do_not_tell() -> None:
    nvml = FakeNvml(3)
    nvml.failures["nvmlDeviceGetMinorNumber", 1] = UNKNOWN_ERROR
    collector = collector_of(nvml)
    assert collector.minor_numbers() == {"GPU-0": 5, "GPU-2": 3}
    assert collector.limits == {"GPU-1 minor number": "NVML Error with code 999"}
    nvml.failures["nvmlDeviceGetMinorNumber", 1] = GPU_IS_LOST
    assert collector.minor_numbers() == {"GPU-0": 5, "GPU-2": 3}


def test_minor_numbers_are_those_of_whole_gpus() -> None:
    assert collector_of(cut_in_two()).minor_numbers() == {"GPU-0": 5}


def test_gpus_without_nodes_of_their_own_lack_nothing_and_are_asked_once() -> None:
    nvml = FakeNvml(2)
    nvml.failures["nvmlDeviceGetMinorNumber", None] = NOT_SUPPORTED  # WSL
    collector = collector_of(nvml)
    assert (collector.minor_numbers(), collector.minor_numbers()) == ({}, {})
    assert collector.limits == {}
    assert nvml.calls["nvmlDeviceGetMinorNumber"] == 2


def test_without_the_library_there_is_no_data_and_pynvml_is_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        assert name == LIBRARY
        raise OSError("cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)
    with pytest.raises(NoData, match=r"libnvidia-ml.so.1 is not there") as raised:
        NvmlCollector().collect()
    assert raised.value.hint
    assert "pynvml" not in sys.modules


def test_the_real_pynvml_has_every_name_that_the_fake_has() -> None:
    pynvml = importlib.import_module("pynvml")
    names = {name for name in dir(FakeNvml) if name.startswith(("nvml", "NVML", "c_nvml"))}
    assert len(names) > 20
    assert names - set(dir(pynvml)) == set()
    assert FakeNvml.nvmlMemory_v2 == pynvml.nvmlMemory_v2
    assert pynvml.NVMLError(NO_PERMISSION).value == NO_PERMISSION
    assert str(pynvml.NVMLError(NO_PERMISSION)) == "Insufficient Permissions"


def test_the_real_request_asks_for_the_six_metrics_by_their_real_ids() -> None:
    pynvml = importlib.import_module("pynvml")
    request = gpm_request(pynvml)
    assert (request.version, request.numMetrics) == (pynvml.NVML_GPM_METRICS_GET_VERSION, 6)
    assert {metric.metricId for metric in request.metrics[:6]} == {
        pynvml.NVML_GPM_METRIC_GRAPHICS_UTIL,
        pynvml.NVML_GPM_METRIC_SM_UTIL,
        pynvml.NVML_GPM_METRIC_ANY_TENSOR_UTIL,
        pynvml.NVML_GPM_METRIC_DRAM_BW_UTIL,
        pynvml.NVML_GPM_METRIC_PCIE_TX_PER_SEC,
        pynvml.NVML_GPM_METRIC_PCIE_RX_PER_SEC,
    }
