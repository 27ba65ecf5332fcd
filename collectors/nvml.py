"""The NVIDIA GPUs of this host through NVML: cheap calls at every collection, dear ones one GPU at a time."""

from __future__ import annotations

import math
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from kvtally.collectors.base import CollectError, NoData
from kvtally.collectors.gpu import GpuIntegrator, GpuSample
from kvtally.collectors.nvml_device import Device, cut, gpm_means, gpm_request, text_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvtally.collectors.base import Reading

LIBRARY = "libnvidia-ml.so.1"

_UNINITIALIZED = 1
_NOT_SUPPORTED = 3
_NO_PERMISSION = 4
_DRIVER_NOT_LOADED = 9
_LIBRARY_NOT_FOUND = 12
_FUNCTION_NOT_FOUND = 13
_GPU_IS_LOST = 15
_RESET_REQUIRED = 16
_VERSION_MISMATCH = 18
_ARGUMENT_VERSION_MISMATCH = 25
_GPU_NOT_FOUND = 28
_DRIVER_GONE = frozenset({_UNINITIALIZED, _DRIVER_NOT_LOADED, _VERSION_MISMATCH})
_LOST = frozenset({_GPU_IS_LOST, _RESET_REQUIRED, _GPU_NOT_FOUND})
_FINAL = frozenset({_NOT_SUPPORTED, _NO_PERMISSION, _FUNCTION_NOT_FOUND, _ARGUMENT_VERSION_MISMATCH})

_CLOCK_SM = 1
_EARLY = 0.05  # of the time between turns: a tick that comes a moment early does not put a turn off to the next tick
_GPM_SHORTEST_SECONDS = 0.1  # NVML asks for as much between two samples


class _GpuLostError(Exception):
    """One GPU answers nothing more; the others do."""


class _Turns:
    """Who is due: every GPU at the start, then each every `every_seconds`, spread evenly over that time."""

    __slots__ = ("_due", "_every_seconds")

    def __init__(self, every_seconds: float, count: int, now: float) -> None:
        self._every_seconds = every_seconds
        self._due = [now - every_seconds * (count - 1 - place) / count for place in range(count)]

    def take(self, place: int, now: float) -> bool:
        """Whether it is this one's turn; if so, its next turn is set."""
        every, due = self._every_seconds, self._due[place]
        now += every * _EARLY
        if now < due <= now + every:
            return False
        if due > now or every <= 0:  # the clock was set back, or every time is asked for
            self._due[place] = now + every
        else:
            self._due[place] = due + every * (math.floor((now - due) / every) + 1)
        return True


class NvmlCollector:
    """Samples every GPU that NVML shows and sums the samples up.

    Raises NoData where there is no driver or no GPU, CollectError where the driver went away or all GPUs are lost;
    the next call then starts afresh. `limits` tells what cannot be read and why ("GPU-… gpm" -> reason).
    """

    source = "nvml"

    def __init__(
        self,
        nvml: Any = None,
        clock: Callable[[], float] = time.time,
        session: float | None = None,
        energy_every_seconds: float = 10.0,
        gpm_every_seconds: float = 10.0,
        *,
        shown: str = "",
    ) -> None:
        """`shown` is "node" where NVML shows others' GPUs too, as in a pod."""
        self.limits: dict[str, str] = {}
        self._nvml = nvml
        self._clock = clock
        self._energy_every_seconds = energy_every_seconds
        self._gpm_every_seconds = gpm_every_seconds
        self._integrator = GpuIntegrator(clock() if session is None else session, shown=shown)
        self._devices: list[Device] = []
        self._energy_turns = self._gpm_turns = _Turns(0, 0, 0)
        self._gpm_request: Any = None

    def collect(self) -> tuple[Reading, ...]:
        """Sample and give what has been summed up so far: one reading per GPU."""
        for sample in self.sample():
            self._integrator.add(sample)
        return self._integrator.readings()

    def sample(self) -> list[GpuSample]:
        """One sample per GPU, each followed by those of its MIG instances; one without values for a GPU that is lost.

        A GPM mean goes to one caller only: who calls both `sample` and `collect` splits the means between them.
        """
        self._open()
        now = self._clock()
        samples, lost = [], 0
        for place, device in enumerate(self._devices):
            energy_due = self._energy_turns.take(place, now)
            gpm_due = self._gpm_turns.take(place, now)
            try:
                if energy_due:
                    self._look(device)
                samples.append(self._sample(device, now, energy_due, gpm_due))
                for one in device.instances:
                    with suppress(_GpuLostError):  # it was just taken away
                        samples.append(self._sample_instance(one, now, gpm_due))
            except _GpuLostError:
                lost += 1
                samples.append(GpuSample(now, **device.about()))
        if lost == len(self._devices):
            self.close()
            raise CollectError("every GPU is lost", "look for Xid in the kernel log; a GPU reset or a reboot helps")
        return samples

    def compute_pids(self) -> dict[str, list[int]]:
        """Host process ids with a compute context on each GPU, by UUID; a GPU that does not tell is left out.

        A GPU that is cut has none of its own: its MIG instances have them.
        """
        self._open()
        call = self._nvml.nvmlDeviceGetComputeRunningProcesses_v3
        pids = {}
        for device in self._devices:
            with suppress(_GpuLostError):
                for one in device.instances if device.mig else (device,):
                    found = self._read(one, "processes", call, one.handle)
                    if found is not None:
                        pids[one.uuid] = sorted({process.pid for process in found})
        return pids

    def minor_numbers(self) -> dict[str, int]:
        """Minor number of each GPU's device node, by UUID: 6 is /dev/nvidia6, whatever the GPU's index is.

        A GPU that does not tell is left out; in WSL none has a node of its own.
        """
        self._open()
        numbers = {}
        for device in self._devices:
            with suppress(_GpuLostError):
                number = self._read(device, "minor number", self._nvml.nvmlDeviceGetMinorNumber, device.handle)
                if number is not None:
                    numbers[device.uuid] = number
                elif "minor number" in device.refused:
                    self.limits.pop(f"{device.uuid} minor number", None)  # where there is no node, nothing is missing
        return numbers

    def close(self) -> None:
        """Free what NVML holds; the next call opens it again."""
        if not self._devices:
            return
        for device in self._devices:
            for one in (device, *device.instances):
                self._free(one)
        self._devices = []
        with suppress(self._nvml.NVMLError):
            self._nvml.nvmlShutdown()

    def _free(self, device: Device) -> None:
        for gpm_sample in (device.last, device.fresh):
            if gpm_sample is not None:
                with suppress(self._nvml.NVMLError):
                    self._nvml.nvmlGpmSampleFree(gpm_sample)
        device.last = device.fresh = None

    def _open(self) -> None:
        if self._devices:
            return
        if self._nvml is None:
            self._nvml = _load()
        nvml = self._nvml
        self.limits.clear()
        try:
            nvml.nvmlInit()
            try:
                self._devices = self._find()
            finally:
                if not self._devices:
                    nvml.nvmlShutdown()
        except nvml.NVMLError as error:
            raise _unavailable(error) from error
        now = self._clock()
        self._energy_turns = _Turns(self._energy_every_seconds, len(self._devices), now)
        self._gpm_turns = _Turns(self._gpm_every_seconds, len(self._devices), now)
        self._gpm_request = gpm_request(nvml)

    def _find(self) -> list[Device]:
        nvml = self._nvml
        count = nvml.nvmlDeviceGetCount()
        devices = []
        for index in range(count):
            try:
                handle = nvml.nvmlDeviceGetHandleByIndex(index)
                device = Device(handle, index, text_of(nvml.nvmlDeviceGetUUID(handle)))
                name = self._read(device, "name", nvml.nvmlDeviceGetName, handle)
                device.name = None if name is None else text_of(name)
                self._look(device)
            except (nvml.NVMLError, _GpuLostError) as error:
                self.limits[f"gpu {index}"] = str(error)
            else:
                devices.append(device)
        if count == 0:
            raise NoData("the NVIDIA driver shows no GPU", "in a container, see NVIDIA_VISIBLE_DEVICES")
        if not devices:
            raise CollectError(f"no GPU answers: {'; '.join(self.limits.values())}", "look for Xid in the kernel log")
        return devices

    def _look(self, device: Device) -> None:
        """Whether a GPU is cut and into which instances: both may change while it is there."""
        mig = self._mig(device)
        if device.mig is None or (mig is not None and mig != device.mig):
            device.mig = mig
            device.refused -= {"gpm", "utilization"}
            self._refuse_gpm(device)
        before = device.instances
        device.instances = cut(self._nvml, device, self._read, self.limits) if device.mig else ()
        if not device.mig:
            device.share = None
        for gone in before:
            if gone not in device.instances:
                self._free(gone)
                for key in [key for key in self.limits if key.startswith(f"{gone.uuid} ")]:
                    del self.limits[key]

    def _mig(self, device: Device) -> bool | None:
        mode = self._read(device, "mig", self._nvml.nvmlDeviceGetMigMode, device.handle)
        if mode is not None:
            return bool(mode[0])
        if "mig" not in device.refused:
            return None
        self.limits.pop(f"{device.uuid} mig", None)  # a GPU that cannot be cut is whole, and nothing is missing
        return False

    def _refuse_gpm(self, device: Device) -> None:
        support = self._read(device, "gpm", self._nvml.nvmlGpmQueryDeviceSupport, device.handle)
        why = "this GPU has no GPM: Hopper or newer has"
        if device.mig:
            why = "MIG is on: its instances have their own"
        elif support is None or support.isSupportedDevice:
            return
        device.refused.add("gpm")
        self.limits[f"{device.uuid} gpm"] = why

    def _sample(self, device: Device, now: float, energy_due: bool, gpm_due: bool) -> GpuSample:
        nvml, handle = self._nvml, device.handle
        rates = self._read(device, "utilization", nvml.nvmlDeviceGetUtilizationRates, handle)
        memory = self._read(device, "memory", nvml.nvmlDeviceGetMemoryInfo, handle, nvml.nvmlMemory_v2)
        power = self._read(device, "power", nvml.nvmlDeviceGetPowerUsage, handle)
        clock = self._read(device, "clock", nvml.nvmlDeviceGetClockInfo, handle, _CLOCK_SM)
        reasons = self._read(device, "clock reasons", nvml.nvmlDeviceGetCurrentClocksEventReasons, handle)
        energy = None
        if energy_due:
            energy = self._read(device, "energy", nvml.nvmlDeviceGetTotalEnergyConsumption, handle)
        gpm, gpm_seconds = self._gpm(device) if gpm_due else (None, None)
        return GpuSample(
            t=now,
            **device.about(),
            utilization_percent=None if rates is None else rates.gpu,
            memory_utilization_percent=None if rates is None else rates.memory,
            memory_used_bytes=None if memory is None else memory.used,
            power_milliwatts=power,
            energy_millijoules=energy,
            sm_clock_mhz=clock,
            clock_reasons=reasons,
            gpm=gpm,
            gpm_seconds=gpm_seconds,
        )

    def _sample_instance(self, device: Device, now: float, gpm_due: bool) -> GpuSample:
        """What NVML tells of a MIG instance: power, energy and clocks are the whole GPU's, and of that alone."""
        memory = self._read(
            device, "memory", self._nvml.nvmlDeviceGetMemoryInfo, device.handle, self._nvml.nvmlMemory_v2
        )
        gpm, gpm_seconds = self._gpm(device) if gpm_due else (None, None)
        used = None if memory is None else memory.used
        return GpuSample(now, **device.about(), memory_used_bytes=used, gpm=gpm, gpm_seconds=gpm_seconds)

    def _gpm(self, device: Device) -> tuple[dict[str, float | None] | None, float | None]:
        """Give the means since this GPU's GPM sample before, and over how many seconds they are."""
        nvml = self._nvml
        if device.last is not None and 0 <= self._clock() - device.last_at < _GPM_SHORTEST_SECONDS:
            return None, None
        if device.fresh is None:
            device.fresh = self._read(device, "gpm", nvml.nvmlGpmSampleAlloc)
        fresh = device.fresh
        if device.parent is None or device.gpu_instance is None:
            call, *of = nvml.nvmlGpmSampleGet, device.handle
        else:
            call, *of = nvml.nvmlGpmMigSampleGet, device.parent.handle, device.gpu_instance
        if fresh is None or self._read(device, "gpm", call, *of, fresh) is None:
            return None, None
        taken_at = self._clock()
        before, seconds = device.last, taken_at - device.last_at
        device.last, device.fresh, device.last_at = fresh, before, taken_at
        if before is None:
            return {}, 0.0
        request = self._gpm_request
        request.sample1, request.sample2 = before, fresh
        if seconds <= 0 or self._read(device, "gpm", nvml.nvmlGpmMetricsGet, request) is None:
            return None, None
        return gpm_means(nvml, request, device, self.limits) or None, seconds

    def _read(self, device: Device, what: str, call: Callable[..., Any], *arguments: Any) -> Any:
        """Give the call's answer, or None with the reason in `limits`; what can never succeed is not called again."""
        if what in device.refused:
            return None
        key = f"{device.uuid} {what}"
        try:
            value = call(*arguments)
        except self._nvml.NVMLError as error:
            if error.value in _DRIVER_GONE:
                self.close()
                raise CollectError(
                    f"the NVIDIA driver went away: {error}",
                    "it is read again once it is back; after an upgrade of the driver restart kvtally",
                ) from error
            self.limits[key] = str(error)
            if error.value in _LOST:
                raise _GpuLostError(str(error)) from error
            if error.value in _FINAL:
                device.refused.add(what)
            return None
        self.limits.pop(key, None)
        return value


def _load() -> Any:
    """Import pynvml if there is a driver: without one its 4 MiB are not paid for."""
    import ctypes  # noqa: PLC0415  # a host without GPUs never gets here

    try:
        ctypes.CDLL(LIBRARY)
    except OSError as error:
        raise NoData(
            f"no NVIDIA driver: {LIBRARY} is not there",
            "in a container, run with the NVIDIA runtime and NVIDIA_DRIVER_CAPABILITIES=utility",
        ) from error
    import pynvml  # noqa: PLC0415  # as above

    return pynvml


def _unavailable(error: Any) -> NoData | CollectError:
    if error.value in (_DRIVER_NOT_LOADED, _LIBRARY_NOT_FOUND):
        return NoData(f"no NVIDIA driver: {error}", "nvidia-smi tells whether the driver is loaded")
    if error.value == _NO_PERMISSION:
        return NoData(f"no right to read the GPUs: {error}", "kvtally needs to open /dev/nvidiactl and /dev/nvidia*")
    if error.value == _VERSION_MISMATCH:
        return CollectError(f"the NVIDIA driver was upgraded: {error}", "restart kvtally; if nvidia-smi fails, reboot")
    return CollectError(f"NVML does not start: {error}", "nvidia-smi tells more")
