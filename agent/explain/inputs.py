"""The counters behind a figure: where each is read, what it showed at both ends, and how much it grew."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

from kvtally.agent.facts import VLLM
from kvtally.agent.finding import utc_text
from kvtally.agent.ledger.raw_counters import raw_counters
from kvtally.collectors.quantities import QUANTITIES
from kvtally.collectors.registry import SOURCES

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from kvtally.agent.explain.pieces import Piece
    from kvtally.agent.ledger.read import LedgerReader
    from kvtally.collectors.family import Family

    Named = Callable[[str, str], str]  # a quantity and vLLM's counter of it -> the counter of the engine at hand

_BY_SOURCE = "vllm:prompt_tokens_by_source_total"
# quantity -> what it is to the figure, and the family that vLLM shows it in, as kvtally.collectors.vllm reads it
ENGINE: Mapping[str, tuple[str, str]] = {
    "prompt_tokens": ("prompt tokens", "vllm:prompt_tokens_total"),
    "computed_tokens": ("computed", f'{_BY_SOURCE}{{source="local_compute"}}'),
    "hbm_tokens": ("reused from HBM", f'{_BY_SOURCE}{{source="local_cache_hit"}}'),
    "external_tokens": ("reused from outer tiers", f'{_BY_SOURCE}{{source="external_kv_transfer"}}'),
    "generated_tokens": ("generated tokens", "vllm:generation_tokens_total"),
    "first_tokens": ("requests that gave a first token", "vllm:time_to_first_token_seconds_count"),
    "finished_requests": ("requests that finished", "vllm:request_success_total"),
    "preemptions": ("preemptions", "vllm:num_preemptions_total"),
    "steps": ("steps with output", "vllm:iteration_tokens_total_count"),
    "prefill_ns": ("prefill time, summed", "vllm:request_prefill_time_seconds_sum"),
    "decode_ns": ("decode time, summed", "vllm:request_decode_time_seconds_sum"),
    "queue_ns": ("queue time, summed", "vllm:request_queue_time_seconds_sum"),
}
DETAILS: Mapping[str, tuple[str, str]] = {
    "finished_prompt_tokens": ("prompt tokens of finished requests", "vllm:request_prompt_tokens_sum"),
    "admitted_host_tokens": ("admitted from DRAM", 'vllm:prompt_tokens_cached_by_source_total{source="host"}'),
    "admitted_disk_tokens": ("admitted from disk", 'vllm:prompt_tokens_cached_by_source_total{source="disk"}'),
    "admitted_p2p_tokens": ("admitted from peers", 'vllm:prompt_tokens_cached_by_source_total{source="p2p"}'),
}
HISTOGRAMS: Mapping[str, tuple[str, str]] = {
    "request_prompt_tokens": ("prompt lengths, requests", "vllm:request_prompt_tokens_bucket"),
    "request_computed_tokens": ("computed lengths, requests", "vllm:request_prefill_kv_computed_tokens_bucket"),
    "step_tokens": ("tokens of steps, steps", "vllm:iteration_tokens_total_bucket"),
}
_LMCACHE = {"load_ns": "lmcache:time_to_retrieve_sum", "store_ns": "lmcache:time_to_store_sum"}
_OFFLOAD = {"load_ns": "vllm:kv_offload_load_time_total", "store_ns": "vllm:kv_offload_store_time_total"}
_STAGING = "lmcache_mp_transfer_phase_elapsed_seconds_total"
_LMCACHE_MP = {
    "load_ns": f'{_STAGING}{{direction="h2d",phase="staging"}}',
    "store_ns": f'{_STAGING}{{direction="d2h",phase="staging"}}',
}
# by what the names of an engine's caches end with; else LMCache runs inside of it, if it is vLLM
_CLOCKS = {"/lmcache": _LMCACHE, "/kv_offload": _OFFLOAD, "/lmcache_mp": _LMCACHE_MP}
_WORK = {
    "graphics": ("the GPUs worked", "NVML_GPM_METRIC_GRAPHICS_UTIL over time, the busiest GPU"),
    "utilization": ("the GPUs worked", "NVML utilization.gpu over time, the busiest GPU"),
    "cpu": ("the engine's processes worked", "/proc/PID/stat: user and system CPU time"),
}


class Counted(NamedTuple):
    """One input: first and last are None where the ledger tells only the difference."""

    name: str
    counter: str
    first: float | None
    last: float | None
    difference: float | None
    unit: str
    basis: str = "MEASURED"

    def as_json(self) -> dict[str, Any]:
        """As plain values."""
        return self._asdict()


def inputs_json(
    reader: LedgerReader, pieces: Sequence[Piece], sums: Mapping[str, int | None], engines: Collection[str] = (VLLM,)
) -> dict[str, Any]:
    """The inputs of a group: `sums` are what its settled hours without raw intervals counted; of what `engines` are."""
    replicas = _replicas(pieces)
    named, named_cache = _named(engines, "FAMILIES"), _named(engines, "CACHE_FAMILIES")
    found = _engine(reader, pieces, replicas, sums, named)
    found += _details(pieces, named)
    found += _caches(pieces, named_cache)
    found += _worked(pieces)
    return {"replicas": replicas, "counters": [one.as_json() for one in found]}


def _named(engines: Collection[str], table: str) -> Named:
    """What a quantity is counted by: as the engine's own table has it, else (or of unlike engines) its own name."""
    if set(engines) == {VLLM}:
        return lambda _, counter: counter
    source = SOURCES.get(next(iter(engines)).replace("-", "_")) if len(set(engines)) == 1 else None
    rows: Sequence[Family] = ()
    if source is not None:
        rows = getattr(import_module(source.reader.partition(":")[0]), table, ())
    samples: dict[str, str] = {}
    for row in rows:
        samples.setdefault(row.quantity, _sample(row))
    return lambda quantity, _: samples.get(quantity, quantity)


def _sample(row: Family) -> str:
    """A family as people write it: "trtllm_prompt_tokens_total less trtllm_cached_prompt_tokens_total"."""
    labels = ",".join(
        f'{name}="{value}"' if isinstance(value, str) else f'{name}=~"{value.pattern}"'
        for name, value in row.labels.items()
    )
    parts = "".join(f" plus {sample}" for sample, _ in row.plus) + "".join(f" less {sample}" for sample, _ in row.less)
    return f"{row.sample}{{{labels}}}{parts}" if labels else f"{row.sample}{parts}"


def _replicas(pieces: Sequence[Piece]) -> list[dict[str, Any]]:
    """First and last scrape of each replica."""
    spans: dict[str, tuple[int, int]] = {}
    for piece in pieces:
        start, end = spans.get(piece.name, (piece.start_ns, piece.end_ns))
        spans[piece.name] = (min(start, piece.start_ns), max(end, piece.end_ns))
    return [
        {"name": name, "first_scrape": utc_text(start), "last_scrape": utc_text(end)}
        for name, (start, end) in sorted(spans.items())
    ]


def _engine(
    reader: LedgerReader,
    pieces: Sequence[Piece],
    replicas: Sequence[Mapping[str, Any]],
    sums: Mapping[str, int | None],
    named: Named,
) -> list[Counted]:
    ends: Mapping[str, tuple[int, int]] = {}
    if len(replicas) == 1 and not sums:
        start_ns, end_ns = min(one.start_ns for one in pieces), max(one.end_ns for one in pieces)
        ends = raw_counters(reader, "engine", pieces[0].name, start_ns, end_ns)
    scales = {one.name: 1e9 if one.name.endswith("_ns") else 1.0 for one in QUANTITIES["engine"]}
    found = []
    for quantity, (name, counter) in ENGINE.items():
        scale = scales[quantity]
        parts = [piece.totals[quantity] for piece in pieces]
        if sums:
            parts.append(sums.get(quantity))
        difference = None if None in parts or not parts else sum(part or 0 for part in parts)
        first, last = ends.get(quantity, (None, None))
        if first is not None and last is not None and difference is not None and last - first != difference:
            first = last = None  # an hour between the pieces is not of this group
        unit = "s" if scale > 1 else "tokens" if quantity.endswith("_tokens") and quantity != "first_tokens" else ""
        shown = (None if value is None else value / scale for value in (first, last, difference))
        if difference or quantity != "external_tokens":
            found.append(Counted(name, named(quantity, counter), next(shown), next(shown), next(shown), unit))
    return found


def _details(pieces: Sequence[Piece], named: Named) -> list[Counted]:
    found = []
    for quantity, (name, counter) in DETAILS.items():
        told = [piece.details[quantity] for piece in pieces if quantity in piece.details]
        if any(told):
            found.append(Counted(name, named(quantity, counter), None, None, float(sum(told)), "tokens"))
    for prefix, (name, counter) in HISTOGRAMS.items():
        told = [value for piece in pieces for key, value in piece.details.items() if key.startswith(f"{prefix}_le_")]
        if told:
            found.append(Counted(name, named(prefix, counter), None, None, float(sum(told)), ""))
    return found


def _caches(pieces: Sequence[Piece], named: Named) -> list[Counted]:
    """What the outer tiers' own clocks say."""
    found = []
    own = {name for piece in pieces for name in piece.caches}
    alike = (families for end, families in _CLOCKS.items() if own and all(name.endswith(end) for name in own))
    families = next(alike, None)
    pages = {piece.name.partition("/")[0] for piece in pieces}
    # a cache on a page of its own is not in the engine's table
    own_name = named if all(name.partition("/")[0] in pages for name in own) else lambda quantity, _: quantity
    for quantity, words in (("load_ns", "loading, by the cache's clock"), ("store_ns", "storing, the same")):
        told = [piece.cache_totals[quantity] for piece in pieces if quantity in piece.cache_totals]
        if told:
            counter = own_name(quantity, _LMCACHE[quantity]) if families is None else families[quantity]
            found.append(Counted(words, counter, None, None, sum(told) / 1e9, "s"))
    return found


def _worked(pieces: Sequence[Piece]) -> list[Counted]:
    """How long the engine worked; a span's first and last samples may lie beyond it."""
    found = []
    for source in sorted({piece.source for piece in pieces if piece.source}):
        own = [piece for piece in pieces if piece.source == source]
        seconds, over = sum(piece.worked_seconds for piece in own), sum(piece.worked_over for piece in own)
        words, counter = _WORK[source]
        whole = sum(piece.end_ns - piece.start_ns for piece in own) / 1e9
        known = "" if whole - over < 0.001 else f", known over {over:.1f} s"  # noqa: PLR2004  # a millisecond
        found.append(Counted(f"{words}{known}", counter, None, None, seconds, "s"))
    return found
