"""Measures NvmlCollector on a real GPU: what it reads under known loads, and what every call costs.

Needs a GPU, nvidia-ml-py, msgspec and PyTorch:  PYTHONPATH=src python3 tests/bench/nvml_load.py OUTPUT_FOLDER
Writes nvml_load.json and gpu.jsonl there; docs/gpu.md holds the figures of one run. Takes about three minutes.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvtally.collectors import quantities
from kvtally.collectors.base import CollectError, NoData
from kvtally.collectors.gpu import GpuIntegrator, format_line, parse_line
from kvtally.collectors.nvml import NvmlCollector
from kvtally.collectors.nvml_device import GPM_METRICS, gpm_request

if TYPE_CHECKING:
    from collections.abc import Callable

LOADS = ("gemm", "device_copy", "host_to_device", "spin")
SECONDS = 10
NOBODY = 65534
NAMES = tuple(quantity.name for quantity in quantities.GPU)
ALL_33 = [*range(1, 14), 20, 21, *range(60, 70), *range(100, 104), *range(30, 34)]


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def memory_kib() -> dict[str, int]:
    """Resident memory of this process, private and mapped from files, and its threads."""
    wanted = ("VmRSS", "RssAnon", "RssFile", "Threads")
    fields = (line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(value.split()[0]) for name, value in fields if name in wanted}


def child(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, __file__, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def line_from(process: subprocess.Popen[str]) -> Any:
    assert process.stdout is not None
    return json.loads(process.stdout.readline())


def load(kind: str) -> None:
    """Runs one load until stdin closes; says when it begins, and at the end what it did: FLOP or bytes."""
    torch: Any = importlib.import_module("torch")
    work: Callable[[], Any]
    size = 2 * 2**30
    repeat, amount = 10, size
    if kind == "gemm":
        a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        work, repeat, amount = (lambda: torch.mm(a, b)), 100, 2 * 8192**3
    elif kind == "device_copy":
        source = torch.ones(size, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        work = lambda: target.copy_(source)  # noqa: E731  # one of four works, chosen here
    elif kind == "host_to_device":
        source = torch.ones(size, dtype=torch.uint8).pin_memory()
        target = torch.empty(size, dtype=torch.uint8, device="cuda")
        work = lambda: target.copy_(source, non_blocking=True)  # noqa: E731  # as above
    else:
        work, amount = (lambda: torch.cuda._sleep(10_000_000)), 0  # one thread that spins
    work()
    torch.cuda.synchronize()
    say(json.dumps({"started": True}))
    began, count = time.perf_counter(), 0
    while not select.select([sys.stdin], [], [], 0)[0]:
        for _ in range(repeat):
            work()
        torch.cuda.synchronize()
        count += repeat
    took = time.perf_counter() - began
    say(json.dumps({"done": count * amount, "seconds": took, "done_per_second": count * amount / took}))


def observe(name: str, lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Samples a load once a second for SECONDS, dear calls every 2 s; sums up through the project's integrator."""
    collector = NvmlCollector(energy_every_seconds=2, gpm_every_seconds=2)
    integrator, own = GpuIntegrator(0.0), []
    began = time.monotonic()
    for tick in range(SECONDS + 1):
        time.sleep(max(0.0, began + tick - time.monotonic()))
        samples = collector.sample()
        line = format_line(samples)
        line["gpus"][0]["load"] = name
        own.append(line)
        for sample in parse_line(line):
            integrator.add(sample)
    limits = dict(collector.limits)
    collector.close()
    lines.extend(own)
    (reading,) = integrator.readings()
    value = dict(zip(NAMES, reading.values, strict=True))
    observed, gpm = value["observed_ns"] or 0, value["gpm_ns"] or 0
    powered = [(line["t"], line["gpus"][0]) for line in own]
    with_energy = [(t, gpu["energy_millijoules"]) for t, gpu in powered if gpu["energy_millijoules"] is not None]
    (first_t, first_mj), (last_t, last_mj) = with_energy[0], with_energy[-1]
    sampled = [gpu["power_milliwatts"] for t, gpu in powered if first_t < t <= last_t]

    def rate(key: str, seconds: float, unit: float) -> float | None:
        total = value[key]
        return None if total is None or not seconds else round(total / seconds / unit, 2)

    return {
        "observed_seconds": observed,
        "gpm_seconds": gpm,
        "utilization_percent": rate("busy_ns", observed, 0.01),
        "memory_utilization_percent": rate("memory_busy_ns", observed, 0.01),
        "graphics_percent": rate("graphics_ns", gpm, 0.01),
        "sm_percent": rate("sm_ns", gpm, 0.01),
        "tensor_percent": rate("tensor_ns", gpm, 0.01),
        "dram_percent": rate("dram_ns", gpm, 0.01),
        "pcie_received_mib_per_s": rate("pcie_received_bytes", gpm, 2**20),
        "pcie_sent_mib_per_s": rate("pcie_sent_bytes", gpm, 2**20),
        "watts_sampled": round(statistics.fmean(sampled) / 1000, 1),
        "watts_energy_counter": round((last_mj - first_mj) / (last_t - first_t) / 1000, 1),
        "sm_clock_mhz": value["sm_clock_mhz"],
        "clock_reasons": value["clock_reasons"],
        "limits": limits,
    }


def cost(call: Callable[[], Any], repeat: int = 200) -> dict[str, float]:
    """Wall and CPU microseconds of one call, medians and means."""
    walls, began_cpu = [], time.thread_time()
    for _ in range(repeat):
        began = time.perf_counter()
        call()
        walls.append(time.perf_counter() - began)
    cpu = (time.thread_time() - began_cpu) / repeat
    return {
        "wall_median_us": round(1e6 * statistics.median(walls), 1),
        "wall_mean_us": round(1e6 * statistics.fmean(walls), 1),
        "wall_max_us": round(1e6 * max(walls), 1),
        "cpu_mean_us": round(1e6 * cpu, 1),
    }


def costs(nvml: Any) -> dict[str, Any]:
    nvml.nvmlInit()
    handle = nvml.nvmlDeviceGetHandleByIndex(0)
    first, second = nvml.nvmlGpmSampleAlloc(), nvml.nvmlGpmSampleAlloc()
    nvml.nvmlGpmSampleGet(handle, first)
    time.sleep(1)
    nvml.nvmlGpmSampleGet(handle, second)

    def request(ids: list[int]) -> Any:
        wanted = nvml.c_nvmlGpmMetricsGet_t()
        wanted.version, wanted.numMetrics = 1, len(ids)
        wanted.sample1, wanted.sample2 = first, second
        for place, metric in enumerate(ids):
            wanted.metrics[place].metricId = metric
        return wanted

    ours, single, every = request([1, 2, 5, 10, 20, 21]), request([1]), request(ALL_33)
    table = {
        "utilization": cost(lambda: nvml.nvmlDeviceGetUtilizationRates(handle)),
        "memory": cost(lambda: nvml.nvmlDeviceGetMemoryInfo(handle, nvml.nvmlMemory_v2)),
        "power": cost(lambda: nvml.nvmlDeviceGetPowerUsage(handle)),
        "sm clock": cost(lambda: nvml.nvmlDeviceGetClockInfo(handle, 1)),
        "clock reasons": cost(lambda: nvml.nvmlDeviceGetCurrentClocksEventReasons(handle)),
        "energy": cost(lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle)),
        "energy as field 83": cost(lambda: nvml.nvmlDeviceGetFieldValues(handle, [83])),
        "gpm metrics, 1 id": cost(lambda: nvml.nvmlGpmMetricsGet(single)),
        "gpm metrics, 6 ids": cost(lambda: nvml.nvmlGpmMetricsGet(ours)),
        "gpm metrics, 33 ids": cost(lambda: nvml.nvmlGpmMetricsGet(every)),
        "gpm sample": cost(lambda: nvml.nvmlGpmSampleGet(handle, second)),
        "compute processes": cost(lambda: nvml.nvmlDeviceGetComputeRunningProcesses_v3(handle)),
    }
    nvml.nvmlGpmSampleFree(first)
    nvml.nvmlGpmSampleFree(second)
    nvml.nvmlShutdown()
    return table


class EightFold:
    """The real NVML, showing its first GPU eight times: the cost of a tick on a host of eight."""

    def __init__(self, nvml: Any) -> None:
        self._nvml = nvml
        self._handles: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._nvml, name)

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802  # NVML's name
        return 8

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Any:  # noqa: ARG002, N802  # NVML's name and argument
        self._handles.append(self._nvml.nvmlDeviceGetHandleByIndex(0))
        return self._handles[-1]

    def nvmlDeviceGetUUID(self, handle: Any) -> str:  # noqa: N802  # NVML's name
        return f"GPU-{[one is handle for one in self._handles].index(True)}"


def ticks(nvml: Any, every_seconds: float, count: int = 60, tick_seconds: float = 0.25) -> dict[str, float]:
    """Wall and CPU milliseconds of collect(), the first one apart."""
    collector = NvmlCollector(nvml, energy_every_seconds=every_seconds, gpm_every_seconds=every_seconds)
    began = time.perf_counter()
    collector.collect()
    first = time.perf_counter() - began
    walls, cpus = [], []
    for _ in range(count):
        time.sleep(tick_seconds)
        began, began_cpu = time.perf_counter(), time.thread_time()
        collector.collect()
        cpus.append(time.thread_time() - began_cpu)
        walls.append(time.perf_counter() - began)
    collector.close()
    return {
        "first_wall_ms": round(1e3 * first, 3),
        "wall_mean_ms": round(1e3 * statistics.fmean(walls), 3),
        "wall_max_ms": round(1e3 * max(walls), 3),
        "cpu_mean_ms": round(1e3 * statistics.fmean(cpus), 3),
        "cpu_max_ms": round(1e3 * max(cpus), 3),
        "cpu_ms_per_second": round(1e3 * sum(cpus) / (count * tick_seconds), 3),
    }


def as_nobody() -> None:
    """What a user without rights reads: run as a child, since there is no way back to root."""
    importlib.import_module("pynvml")
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    collector = NvmlCollector(energy_every_seconds=0, gpm_every_seconds=0)
    said: dict[str, Any] = {"uid": os.getuid()}
    try:
        collector.collect()
        time.sleep(2)
        (reading,) = collector.collect()
        said["reading"] = dict(zip(NAMES, reading.values, strict=True))
        said["compute_pids"] = collector.compute_pids()
    except (NoData, CollectError) as error:
        said["error"] = f"{error} ({error.hint})"
    say(json.dumps({**said, "limits": collector.limits}))


def memory_steps() -> None:
    """What the collector adds to a process that has nothing else."""
    steps = {"before": memory_kib()}
    nvml = importlib.import_module("pynvml")
    steps["pynvml imported"] = memory_kib()
    nvml.nvmlInit()
    steps["nvmlInit"] = memory_kib()
    collector = NvmlCollector(energy_every_seconds=0, gpm_every_seconds=0)
    collector.collect()
    steps["first collection"] = memory_kib()
    for _ in range(50):
        time.sleep(0.11)
        collector.collect()
    steps["51 collections"] = memory_kib()
    collector.close()
    nvml.nvmlShutdown()
    steps["shut down"] = memory_kib()
    say(json.dumps(steps))


class LongMean:
    """GPM over a long time in one mean: a counter of the GPU that wraps would show here."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle
        self._first, self._began = nvml.nvmlGpmSampleAlloc(), time.time()
        nvml.nvmlGpmSampleGet(handle, self._first)

    def end(self) -> dict[str, float]:
        nvml = self._nvml
        second = nvml.nvmlGpmSampleAlloc()
        nvml.nvmlGpmSampleGet(self._handle, second)
        request = gpm_request(nvml)
        request.sample1, request.sample2 = self._first, second
        nvml.nvmlGpmMetricsGet(request)
        means = {name: round(request.metrics[place].value, 3) for place, name in enumerate(GPM_METRICS)}
        return {"seconds": time.time() - self._began, **means}


def run_loads(nvml: Any, handle: Any, result: dict[str, Any], lines: list[dict[str, Any]]) -> None:
    for kind in LOADS:
        process = child("--load", kind)
        line_from(process)
        time.sleep(2)
        mean = LongMean(nvml, handle)
        result["loads"][kind] = observe(kind, lines)
        if kind == "gemm":
            result["costs_gemm"] = costs(nvml)
            collector = NvmlCollector()
            result["compute_pids_of_gemm"] = {"pids": collector.compute_pids(), "child": process.pid}
            collector.close()
            nobody = child("--as-nobody")
            result["nobody"] = line_from(nobody)
            nobody.communicate()
        if kind == "host_to_device":
            time.sleep(20)
            result["host_to_device_long_mean"] = mean.end()
        said, _ = process.communicate()
        result["loads"][kind].update(json.loads(said))
        say(f"{kind}: {json.dumps(result['loads'][kind])}")


def identity(nvml: Any, handle: Any) -> dict[str, Any]:
    parameters = Path("/proc/driver/nvidia/params")
    known = parameters.read_text().splitlines() if parameters.exists() else []
    return {
        "taken_at": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "gpu": str(nvml.nvmlDeviceGetName(handle)),
        "driver": str(nvml.nvmlSystemGetDriverVersion()),
        "kernel": os.uname().release,
        "python": sys.version.split()[0],
        "persistence": nvml.nvmlDeviceGetPersistenceMode(handle),
        "profiling_admin_only": [line for line in known if "Admin" in line],
        "device_files": sorted(f"{path} {oct(path.stat().st_mode)}" for path in Path("/dev").glob("nvidia*")),
    }


def measure(result: dict[str, Any], lines: list[dict[str, Any]]) -> None:
    nvml = importlib.import_module("pynvml")
    nvml.nvmlInit()
    handle = nvml.nvmlDeviceGetHandleByIndex(0)
    result.update(identity(nvml, handle))
    result["costs_idle"] = costs(nvml)
    result["loads"] = {"idle": observe("idle", lines)}
    whole = LongMean(nvml, handle)
    run_loads(nvml, handle, result, lines)
    result["whole_run_mean"] = whole.end()
    result["ticks"] = {}
    for label, module in (("1 GPU", nvml), ("8 GPUs", EightFold(nvml))):
        for way, every in (("staggered 10 s", 10.0), ("every tick", 0.0)):
            result["ticks"][f"{label}, {way}"] = ticks(module, every)
    memory = child("--memory")
    result["memory_kib"] = line_from(memory)
    memory.communicate()


def main(output: Path) -> None:
    result: dict[str, Any] = {}
    lines: list[dict[str, Any]] = []
    try:
        measure(result, lines)
    finally:  # what was measured before a failure is worth keeping
        output.mkdir(parents=True, exist_ok=True)
        (output / "nvml_load.json").write_text(json.dumps(result, indent=1))
        (output / "gpu.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        say(json.dumps(result, indent=1))


if __name__ == "__main__":
    if sys.argv[1] == "--load":
        load(sys.argv[2])
    elif sys.argv[1] == "--as-nobody":
        as_nobody()
    elif sys.argv[1] == "--memory":
        memory_steps()
    else:
        main(Path(sys.argv[1]))
