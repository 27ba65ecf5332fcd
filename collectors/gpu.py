"""GPU samples, live or recorded, summed over time into cumulative readings: one pipeline for both."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from kvtally.collectors.base import Reading

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_INFINITY = float("inf")
_BYTES_PER_MIB = 2**20

# What one step of each group sums, and what one unit of it times one second is worth in the quantity's source unit.
# utilization.gpu %, utilization.memory %, power mW, SM clock MHz while busy % -> s, s, mJ, million cycles
_GAUGES = (0.01, 0.01, 1.0, 0.01)
_GPM = {
    "graphics_util": 0.01,
    "sm_util": 0.01,
    "any_tensor_util": 0.01,
    "dram_bw_util": 0.01,
    "pcie_rx_mib_per_s": _BYTES_PER_MIB,
    "pcie_tx_mib_per_s": _BYTES_PER_MIB,
}


class GpuSample(msgspec.Struct, frozen=True):
    """One GPU at one instant, in NVML's units; None where NVML does not tell.

    t            unix seconds
    mig          the GPU is cut into MIG instances; utilisation and GPM are then unknown
    parent       UUID of the GPU that this MIG instance is of
    share        of a MIG instance: its part of the GPU ("1/7"); of a GPU that is cut: the part that is in no instance
    gpm          means over the last `gpm_seconds`, percent or MiB/s; a metric that could not be read is left out;
                 empty: GPM is readable and its first means come later
    gpm_seconds  None: the means are over the time since the previous sample of this GPU
    """

    t: float
    uuid: str
    index: int
    name: str | None = None
    mig: bool | None = None
    utilization_percent: float | None = None
    memory_utilization_percent: float | None = None
    memory_used_bytes: int | None = None
    power_milliwatts: float | None = None
    energy_millijoules: int | None = None
    sm_clock_mhz: int | None = None
    clock_reasons: int | None = None
    gpm: dict[str, float | None] | None = None
    gpm_seconds: float | None = None
    parent: str | None = None
    share: str | None = None


class _Line(msgspec.Struct):
    t: float
    gpus: list[dict[str, Any]]


# {"t": 1795409207.2, "gpus": [{"index": 0, "uuid": "GPU-…", "utilization_percent": 31, "power_milliwatts": 184514,
#   "energy_millijoules": 119372437, …, "gpm": {"graphics_util": 37.95, "pcie_rx_mib_per_s": 14.517, …}}]}
def parse_line(line: dict[str, Any]) -> list[GpuSample]:
    """Read one line of a recording's gpu.jsonl; ValueError where a value has the wrong type."""
    checked = msgspec.convert(line, _Line)
    return [msgspec.convert({**gpu, "t": checked.t}, GpuSample) for gpu in checked.gpus]


def format_line(samples: Sequence[GpuSample]) -> dict[str, Any]:
    """Shape one line of gpu.jsonl from samples of one instant (at least one); `parse_line` reads it back unchanged."""
    gpus = []
    for sample in samples:
        gpu = msgspec.structs.asdict(sample)
        del gpu["t"]
        gpus.append(gpu)
    return {"t": samples[0].t, "gpus": gpus}


class _Sums:
    """Gauges that are read together, times the time they held.

    A step that lacks one of the gauges is left out whole: with the seconds counted and the gauge not,
    the missing value would read as zero.
    """

    __slots__ = ("_announced", "_factors", "_seconds", "_totals")

    def __init__(self, factors: tuple[float, ...]) -> None:
        self._factors = factors
        self._seconds = 0.0
        self._totals: tuple[float | None, ...] = (None,) * len(factors)
        self._announced = False

    def announce(self) -> None:
        """Set all sums to zero, over zero seconds: the gauges can be read and were not yet."""
        if all(total is None for total in self._totals):
            self._totals = (0.0,) * len(self._factors)
            self._announced = True

    def add(self, values: tuple[float | None, ...], seconds: float) -> None:
        if not 0 <= seconds < _INFINITY:
            return
        given = tuple(value if value is not None and 0 <= value < _INFINITY else None for value in values)
        if all(value is None for value in given):
            return
        totals = self._totals
        if self._announced:  # which of them there are, the first values tell
            totals = tuple(None if value is None else 0.0 for value in given)
            self._announced = False
        if any(total is not None and value is None for total, value in zip(totals, given, strict=True)):
            return
        self._seconds += seconds
        self._totals = tuple(
            None if value is None else (total or 0.0) + value * factor * seconds
            for total, value, factor in zip(totals, given, self._factors, strict=True)
        )

    def values(self) -> tuple[float | None, ...]:
        """Give the seconds, then the sums; None for all if nothing was ever read."""
        if all(total is None for total in self._totals):
            return (None, *self._totals)
        return (self._seconds, *self._totals)


class _Identity(NamedTuple):
    """What of a sample becomes attributes."""

    number: int
    name: str | None
    mig: bool | None
    parent: str | None
    share: str | None


class _Gpu:
    """What is summed for one GPU, and its newest sample."""

    __slots__ = ("energy_millijoules", "gauges", "gpm", "identity", "newest")

    def __init__(self, sample: GpuSample, identity: _Identity) -> None:
        self.newest = sample
        self.identity = identity
        self.energy_millijoules: int | None = None
        self.gauges = _Sums(_GAUGES)
        self.gpm = _Sums(tuple(_GPM.values()))

    def add(self, sample: GpuSample, seconds: float) -> None:
        self.newest = sample
        if sample.energy_millijoules is not None:
            self.energy_millijoules = sample.energy_millijoules
        busy, clock = sample.utilization_percent, sample.sm_clock_mhz
        at_work = None if busy is None or clock is None else busy * clock
        self.gauges.add((busy, sample.memory_utilization_percent, sample.power_milliwatts, at_work), seconds)
        if sample.gpm is None:
            return
        if sample.gpm:
            stated = sample.gpm_seconds
            means = tuple(sample.gpm.get(name) for name in _GPM)
            self.gpm.add(means, seconds if stated is None else stated)
        else:
            self.gpm.announce()

    def reading(self, session: float, shown: Mapping[str, str]) -> Reading:
        of = self.identity
        attributes = {"index": str(of.number), **shown}
        if of.name is not None:
            attributes["sku"] = of.name
        if of.mig is not None:
            attributes["mig"] = str(int(of.mig))
        if of.parent is not None:
            attributes["parent"] = of.parent
        if of.share is not None:
            attributes["share"] = of.share
        newest = self.newest
        *gauges, busy_cycles = self.gauges.values()
        values = (
            self.energy_millijoules,
            *gauges,
            *self.gpm.values(),
            newest.memory_used_bytes,
            newest.power_milliwatts,
            newest.sm_clock_mhz,
            newest.clock_reasons,
            busy_cycles,
        )
        return Reading("gpu", newest.uuid, attributes, values, session=session)


class GpuIntegrator:
    """Turns samples into readings: a gauge counts for the time since the previous sample of its GPU.

    A gap longer than `max_gap_seconds` is unknown and not counted; means over a stated time (GPM) cover any gap.
    `session` marks the start of the sums (unix seconds); the caller chooses it once for each integrator.
    `shown` becomes an attribute: "node" where the GPUs of others are shown as well.
    """

    def __init__(self, session: float, max_gap_seconds: float = 30.0, shown: str = "") -> None:
        self._session = session
        self._shown = {"shown": shown} if shown else {}
        self._max_gap_seconds = max_gap_seconds
        self._gpus: dict[str, _Gpu] = {}

    def add(self, sample: GpuSample) -> None:
        """Count one sample; samples of a GPU come in time order, one that comes late is left out."""
        gpu = self._gpus.get(sample.uuid)
        identity = _Identity(sample.index, sample.name, sample.mig, sample.parent, sample.share)
        seconds = 0.0
        if gpu is not None:
            elapsed = sample.t - gpu.newest.t
            if -self._max_gap_seconds <= elapsed <= 0:
                return
            # Further back than that, the clock itself was set back: time starts anew at this sample.
            seconds = elapsed if 0 < elapsed <= self._max_gap_seconds else 0.0
            known = gpu.identity
            identity = identity._replace(
                name=known.name if sample.name is None else sample.name,
                mig=known.mig if sample.mig is None else sample.mig,
            )
        if gpu is None or gpu.identity != identity:  # other attributes are another target: its sums begin at zero
            gpu = self._gpus[sample.uuid] = _Gpu(sample, identity)
            seconds = 0.0
        gpu.add(sample, seconds)

    def readings(self) -> tuple[Reading, ...]:
        """One reading per GPU that was sampled lately, by index; its name is the UUID."""
        if not self._gpus:
            return ()
        newest = max(gpu.newest.t for gpu in self._gpus.values())
        current = [gpu for gpu in self._gpus.values() if newest - gpu.newest.t <= self._max_gap_seconds]
        current.sort(key=lambda gpu: (gpu.newest.index, gpu.newest.uuid))
        return tuple(gpu.reading(self._session, self._shown) for gpu in current)
