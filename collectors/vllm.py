"""vLLM's own families (0.8 to 0.33) as readings: one per engine core (data-parallel rank), and its connectors' own."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from kvtally.collectors.family import chosen, release, unit_told
from kvtally.collectors.page import Detail, Pick, Plan, bucket_details, positions
from kvtally.collectors.quantities import QUANTITIES
from kvtally.collectors.vllm_families import (
    BLOCKS,
    CONNECTORS,
    FAMILIES,
    HISTOGRAMS,
    INFORMATION,
    INFORMATION_LABELS,
)
from kvtally.collectors.vllm_series import CREATED, NAMES, START, by_engine, is_read

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from kvtally.collectors.base import Kind
    from kvtally.collectors.exposition import Series
    from kvtally.collectors.family import Family
    from kvtally.collectors.page import Helps, Samples
    from kvtally.collectors.vllm_families import Connector
    from kvtally.collectors.vllm_series import Engine

    Rows = Mapping[str, Sequence[Family]]

# what storage tiers moved, and how long it took: not every tier tells the second
_TIMED = {"storage_read_ns": "storage_read_bytes", "storage_write_ns": "storage_write_bytes"}
_COUNTED = {kind: frozenset(quantity.name for quantity in QUANTITIES[kind]) for kind in ("engine", "cache")}


class _Shown(NamedTuple):
    """What a page shows of one engine: its name, its series by the samples of the table, where its start stands."""

    name: str
    engine: Engine
    samples: Samples
    epoch: int | None


class VllmMapping:
    """Reads the pages of vLLM's API server and of Ray's node agent.

    Engines are named `<target>/<rank>`, with `/<model>` behind it where a rank serves several. Ray's agent shows the
    engines of all replicas on its node, which come and go: where it tells the ReplicaId (else the WorkerId), that ends
    their names also while there is one alone, so that no name ever means two of them.
    """

    def __init__(self) -> None:
        self._rows = _by_quantity(FAMILIES)
        self._connectors = [(connector, _by_quantity(connector.families)) for connector in CONNECTORS]

    def wants(self, sample_name: str) -> bool:
        """Whether a sample of this name is read, in any spelling."""
        return is_read(sample_name)

    def names(self) -> tuple[str, ...]:
        """Every sample name that is read, in vLLM's own spelling."""
        return tuple(sorted(NAMES))

    def compile(self, target: str, series: Sequence[Series], version: str | None, helps: Helps) -> list[Plan]:
        """One engine plan for each engine, and a cache plan for each of its connectors that counts by itself."""
        owned = by_engine(series)
        names = _names(target, owned)
        start = next((at for at, one in enumerate(series) if one.name == START), None)
        plans: list[Plan] = []
        for engine, own in sorted(owned.items()):
            epoch = start if start is not None else next(iter(positions(own.samples, CREATED)), None)
            # the start on a page of Ray's is its agent's
            shown = _Shown(names[engine], engine, own.samples, None if engine.replica else epoch)
            rows = {quantity: _settled(found, shown, series, version, helps) for quantity, found in self._rows.items()}
            plans.append(_engine_plan(shown, rows, version))
            for spec, samples in (("", own.samples), *sorted(own.specs.items())):
                part = shown._replace(name=f"{shown.name}/{spec}" if spec else shown.name, samples=samples)
                plans += [plan for one in self._connectors if (plan := _connector_plan(part, *one))]
        return plans


def _names(target: str, engines: Collection[Engine]) -> dict[Engine, str]:
    processes = [(engine.rank, engine.replica) for engine in engines]
    names: dict[Engine, str] = {}
    for engine, process in zip(engines, processes, strict=True):
        ends = (engine.model if processes.count(process) > 1 else "", engine.told_replica)
        names[engine] = "/".join((target, engine.rank, *filter(None, ends)))
    return names


def _by_quantity(families: Iterable[Family]) -> dict[str, list[Family]]:
    rows: dict[str, list[Family]] = {}
    for family in families:
        rows.setdefault(family.quantity, []).append(family)
    return rows


def _settled(
    rows: Sequence[Family], shown: _Shown, series: Sequence[Series], version: str | None, helps: Helps
) -> list[Family]:
    """The rows that can serve on this page: of a sample that has had several units, the one whose unit holds here.

    The version decides, else what the page says of the sample. Blocks count as the tokens that they hold.
    """
    settled: list[Family] = []
    for row in rows:
        rivals = [other for other in rows if (other.sample, other.labels) == (row.sample, row.labels)]
        places = shown.samples.get(row.sample, ())
        if places and len({rival.unit for rival in rivals}) > 1:
            text = _told_of(row.sample, series[places[0][0]].name, helps)
            if unit_told(rivals, release(version), text) != row.unit:
                continue
        scale = _block_tokens(shown.samples) if row.unit == BLOCKS else 1.0
        if scale is not None:
            one = row._replace(scale=row.scale * scale)
            settled.append(_late(one) if shown.engine.replica else one)
    return settled


# # HELP vllm:gpu_prefix_cache_hits_total GPU prefix cache hits, in terms of number of cached blocks.
def _told_of(sample: str, shown: str, helps: Helps) -> str:
    """What the page says of a sample; its comment may spell it otherwise than its series."""
    names = (shown, shown.removesuffix("_total"), sample, sample.removesuffix("_total"))
    return next((text for name in names if (text := helps(name))), "")


def _late(row: Family) -> Family:
    """The row for Ray, which shows a counter once it has counted: until then it is 0 where its like has."""
    if row.less or row.greatest:
        return row
    return row._replace(zero_beside=row.sample.replace("_hits_", "_queries_"))


def _block_tokens(samples: Samples) -> float | None:
    sizes = {labels.get("block_size", "") for _, labels in samples.get(INFORMATION, ())}
    size = sizes.pop() if len(sizes) == 1 else ""
    return float(size) if size.isascii() and size.isdecimal() else None


def _engine_plan(shown: _Shown, rows: Rows, version: str | None) -> Plan:
    attributes = {"engine": "vllm", "model": shown.engine.model}
    attributes |= {"version": version} if version else {}
    attributes |= {"replica": shown.engine.told_replica} if shown.engine.told_replica else {}
    for _, labels in shown.samples.get(INFORMATION, ()):
        attributes |= {key: labels[key] for key in INFORMATION_LABELS if key in labels}
    details = _details("engine", rows, shown.samples)
    for histogram in HISTOGRAMS:
        details += bucket_details(shown.samples, histogram.sample, histogram.quantity)
    picks = [chosen(rows.get(quantity.name, ()), shown.samples) for quantity in QUANTITIES["engine"]]
    return Plan("engine", shown.name, attributes, picks, details=details, epoch=shown.epoch)


def _connector_plan(shown: _Shown, connector: Connector, rows: Rows) -> Plan | None:
    """What a connector counts; None where the page shows none of it."""
    samples = shown.samples
    picks = {quantity.name: chosen(rows.get(quantity.name, ()), samples) for quantity in QUANTITIES["cache"]}
    for seconds, moved in _TIMED.items():
        if picks[seconds] and _tiers(picks[seconds], samples) != _tiers(picks[moved], samples):
            picks[seconds] = None
    details = _details("cache", rows, samples)
    if not details and not any(picks.values()):
        return None
    about = {"cache": connector.title, "model": shown.engine.model}
    about |= {"transfer": "1"} if connector.is_transfer else {}
    for family, told in connector.information.items():
        for _, labels in samples.get(family, ()):
            about |= {label: labels[label] for label in told if label in labels}
    name = f"{shown.name}/{connector.name}"
    return Plan("cache", name, about, list(picks.values()), details=details, epoch=shown.epoch)


def _tiers(pick: Pick | None, samples: Samples) -> set[str]:
    places = () if pick is None else pick.positions
    return {labels.get("tier", "") for found in samples.values() for at, labels in found if at in places}


def _details(kind: Kind, rows: Rows, samples: Samples) -> list[Detail]:
    """Counters beside the quantities; one that several series would have to make up is left out."""
    return [
        Detail(name, pick.positions[0], None, pick.scale)
        for name, found in rows.items()
        if name not in _COUNTED[kind] and (pick := chosen(found, samples)) and len(pick.positions) == 1
    ]
