"""GPUs by dcgm-exporter's page, where NVML is out of reach: its gauges held over the time until the next page."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, NamedTuple

from kvtally.collectors.base import CollectError
from kvtally.collectors.exposition import PageReader
from kvtally.collectors.gpu import GpuIntegrator, GpuSample

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from kvtally.collectors.base import Reading
    from kvtally.collectors.exposition import Layout

MAX_GPUS = 1024  # MIG instances counted: a node has at most 16 x 7
_PERCENT = 100.0
_PER_MIB = 1 / 2**20
# what DCGM holds where it has no value, and some exporters show: of 32 bits, of a float, of 64 bits (as a float)
_BLANKS = frozenset((*(2.0**31 - 16 + more for more in range(4)), *(2.0**47 + more for more in range(4)), 2.0**63))


class Field(NamedTuple):
    """One sample of the page.

    field     of a GpuSample, or of its means (`is_mean`); the first row of a field that the page shows serves it
    sample    name on the wire
    unit      of the wire
    scale     from there to the field's own unit
    is_mean   DCGM's mean over its own interval (30 s unless set otherwise)
    of_whole  tells of the whole GPU also where it carries the labels of a MIG instance
    trap      what the number is not
    """

    field: str
    sample: str
    unit: str
    scale: float = 1.0
    is_mean: bool = False
    of_whole: bool = False
    trap: str = ""


_DEVICE, _MEAN = "DCGM_FI_DEV_", "DCGM_FI_PROF_"
_OFF = "not in the exporter's default list of fields"
_RATE = "a rate, although older exporters type it as a counter; protocol headers are counted too"

# DCGM_FI_DEV_GPU_UTIL{gpu="0",UUID="GPU-604ac76c-…",device="nvidia0",modelName="NVIDIA H100 80GB HBM3"} 93
# DCGM_FI_PROF_GR_ENGINE_ACTIVE{gpu="1",UUID="GPU-34319582-…",GPU_I_PROFILE="1g.5gb",GPU_I_ID="13",pod="x"} 0.995687
DCGM_FIELDS = (
    Field(
        "utilization_percent",
        f"{_DEVICE}GPU_UTIL",
        "percent",
        of_whole=True,
        trap="copies count as busy; not told of a GPU that is cut by MIG",
    ),
    Field(
        "memory_utilization_percent",
        f"{_DEVICE}MEM_COPY_UTIL",
        "percent",
        of_whole=True,
        trap="time in which memory was read or written, not bandwidth",
    ),
    Field("memory_used_bytes", f"{_DEVICE}FB_USED", "MiB", 2**20),
    Field("power_milliwatts", f"{_DEVICE}POWER_USAGE", "W", 1000, of_whole=True),
    Field(
        "energy_millijoules",
        f"{_DEVICE}TOTAL_ENERGY_CONSUMPTION",
        "mJ",
        of_whole=True,
        trap="since the driver was loaded, whatever its help text says of boot",
    ),
    Field("sm_clock_mhz", f"{_DEVICE}SM_CLOCK", "MHz", of_whole=True),
    Field("clock_reasons", f"{_DEVICE}CLOCKS_EVENT_REASONS", "bit mask", of_whole=True, trap=_OFF),
    Field("clock_reasons", f"{_DEVICE}CLOCK_THROTTLE_REASONS", "bit mask", of_whole=True, trap=f"older name; {_OFF}"),
    Field("graphics_util", f"{_MEAN}GR_ENGINE_ACTIVE", "ratio", _PERCENT, is_mean=True),
    Field("sm_util", f"{_MEAN}SM_ACTIVE", "ratio", _PERCENT, is_mean=True, trap=_OFF),
    Field("any_tensor_util", f"{_MEAN}PIPE_TENSOR_ACTIVE", "ratio", _PERCENT, is_mean=True),
    Field("dram_bw_util", f"{_MEAN}DRAM_ACTIVE", "ratio", _PERCENT, is_mean=True),
    Field("pcie_rx_mib_per_s", f"{_MEAN}PCIE_RX_BYTES", "bytes/s", _PER_MIB, is_mean=True, trap=_RATE),
    Field("pcie_tx_mib_per_s", f"{_MEAN}PCIE_TX_BYTES", "bytes/s", _PER_MIB, is_mean=True, trap=_RATE),
)
_NAMES = frozenset(row.sample for row in DCGM_FIELDS)
_WHOLE_NUMBERS = frozenset(("memory_used_bytes", "energy_millijoules", "sm_clock_mhz", "clock_reasons"))


class _Target(NamedTuple):
    """A GPU, or a MIG instance of one, the host that it is in, and where on the page its fields are."""

    uuid: str
    number: int
    name: str | None
    mig: bool | None
    parent: str | None
    share: str | None
    host: str
    places: tuple[tuple[Field, tuple[int, ...]], ...]


class DcgmReader:
    """Reads the pages of one dcgm-exporter.

    A value holds until the next page: DCGM's means are over its own interval, which ends up to that long ago, so an
    hour's sum is right and a scrape's may be the one before. Its counters need no such care.

    A MIG instance is named "MIG-<UUID of its GPU>/<GPU_I_ID>/0", as drivers before 470 name it: the page does not tell
    the instance's own UUID. A GPU that several pods share is there once for each pod and counts once.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        """`clock` gives seconds; where it begins does not matter."""
        self._clock = clock
        self._reader = PageReader(_NAMES.__contains__)
        self._integrator = GpuIntegrator(clock())
        self._layout: Layout | None = None
        self._targets: tuple[_Target, ...] = ()

    def read(self, body: bytes) -> tuple[Reading, ...]:
        """Give what has been summed up so far, one reading per GPU and MIG instance; CollectError if there is none."""
        layout, values = self._reader.read(body)
        if layout is not self._layout:
            self._targets = _targets(layout)
            self._layout = layout
        if not self._targets:
            raise CollectError(
                "the page shows no GPU",
                "dcgm-exporter serves DCGM_FI_DEV_… at :9400/metrics; its log says what it lacks",
            )
        now = self._clock()
        for target in self._targets:
            self._integrator.add(_sample(target, values, now))
        hosts = {target.uuid: {"host": target.host} for target in self._targets if target.host}
        return tuple(
            reading._replace(attributes={**reading.attributes, "source": "dcgm", **hosts.get(reading.name, {})})
            for reading in self._integrator.readings()
        )


def _sample(target: _Target, values: Sequence[float], now: float) -> GpuSample:
    plain: dict[str, float] = {}
    means: dict[str, float | None] = {}
    for row, places in target.places:
        known = [value for at in places if math.isfinite(value := values[at]) and value >= 0 and value not in _BLANKS]
        if not known:
            continue
        value = max(known) * row.scale
        if row.is_mean:
            means.setdefault(row.field, value)
        else:
            plain.setdefault(row.field, int(value) if row.field in _WHOLE_NUMBERS else value)
    about = {name: getattr(target, name) for name in ("name", "mig", "parent", "share")}
    return GpuSample(now, target.uuid, target.number, gpm=means or None, **about, **plain)  # type: ignore[arg-type]  # the table names its fields


def _targets(layout: Layout) -> tuple[_Target, ...]:
    """Every GPU of the page with its instances. With MIG on, the exporter shows the instances in place of the GPU."""
    places: dict[tuple[str, str], dict[str, list[int]]] = {}
    labels: dict[tuple[str, str], Mapping[str, str]] = {}
    for at, one in enumerate(layout.series):
        uuid, instance = one.labels.get("UUID", ""), one.labels.get("GPU_I_ID", "")
        if not uuid:
            continue
        for key in dict.fromkeys(((uuid, ""), (uuid, instance))):
            places.setdefault(key, {}).setdefault(one.name, []).append(at)
            labels.setdefault(key, one.labels)
    if len(places) > MAX_GPUS:
        raise CollectError(f"the page shows more than {MAX_GPUS} GPUs and MIG instances")
    found: list[_Target] = []
    for uuid in dict.fromkeys(uuid for uuid, _ in places):
        own = {instance: labels[uuid, instance] for of, instance in places if of == uuid}
        whole = own.pop("")
        parts, rest = _shares(own.values()) if own else ([], None)
        number, name, host = _number(whole), whole.get("modelName") or None, _host(whole)
        found.append(_Target(uuid, number, name, bool(own), None, rest, host, _rows(places[uuid, ""], layout, own)))
        for (instance, about), share in zip(own.items(), parts, strict=True):
            # without a share nobody knows what it costs: a product without a name has no price
            named = None if share is None or name is None else f"{name} MIG {about['GPU_I_PROFILE']}"
            rows = tuple((row, at) for row, at in _rows(places[uuid, instance], layout, ()) if not row.of_whole)
            found.append(_Target(f"MIG-{uuid}/{instance}/0", number, named, True, uuid, share, host, rows))
    return tuple(found)


def _rows(
    places: Mapping[str, Sequence[int]], layout: Layout, instances: Iterable[str]
) -> tuple[tuple[Field, tuple[int, ...]], ...]:
    """The rows that serve a target. Of a GPU that is cut, only what tells of the whole whichever instance shows it."""
    is_cut = bool(tuple(instances))
    found: list[tuple[Field, tuple[int, ...]]] = []
    for row in DCGM_FIELDS:
        at = tuple(places.get(row.sample, ()))
        if is_cut:
            if row.field in ("utilization_percent", "memory_utilization_percent") or row.is_mean:
                continue
            at = at if row.of_whole else tuple(one for one in at if not layout.series[one].labels.get("GPU_I_ID"))
        if at:
            found.append((row, at))
    return tuple(found)


def _shares(instances: Iterable[Mapping[str, str]]) -> tuple[list[str | None], str]:
    """Shares of a GPU's instances, and the rest."""
    from kvtally.collectors import mig  # noqa: PLC0415  # fractions are loaded where a GPU is cut

    parts = []
    for labels in instances:
        product = labels.get("modelName", "")
        of_whole = mig.gigabytes_of(product), mig.slices_of(product)
        parts.append(mig.part_of(labels.get("GPU_I_PROFILE", ""), *of_whole))
    each, rest = mig.shares(parts)
    return [None if share is None else str(share) for share in each], str(rest)


def _host(labels: Mapping[str, str]) -> str:
    """The label's name is written small since dcgm-exporter's d5e5f51."""
    return labels.get("hostname") or labels.get("Hostname", "")


def _number(labels: Mapping[str, str]) -> int:
    text = labels.get("gpu", "")
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= 4 else 0  # noqa: PLR2004  # 1024 GPUs
