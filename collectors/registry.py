"""Every source that is read from a page: how it is recognised, and which module reads it; loaded when it is there."""

from __future__ import annotations

import re
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


class Source(NamedTuple):
    """One source.

    prefixes    patterns with which its samples' names begin
    reader      "module:Class": a mapping (kvtally.collectors.page.SourceMapping); where the page shows gauges that are
                integrated over time, a class whose objects have `read(body) -> readings` and are made with a clock
                (seconds that only go forward)
    title       for people
    is_engine   what it shows serves requests: its page belongs under [[engine]]
    integrates  which of the two `reader` is
    """

    prefixes: tuple[str, ...]
    reader: str
    title: str
    is_engine: bool = False
    integrates: bool = False


# A new source is one row here and one module beside this one: see CONTRIBUTING.md, "A source".
SOURCES: Mapping[str, Source] = {
    "vllm": Source(("vllm[:_]", "ray_vllm[:_]"), "kvtally.collectors.vllm:VllmMapping", "vLLM", is_engine=True),
    "lmcache": Source(
        ("lmcache:", "lmcache_(?!mp[_:])"),
        "kvtally.collectors.lmcache:LmcacheMapping",
        "LMCache in-process",
    ),
    "lmcache_mp": Source(
        ("lmcache_mp[_:]",),
        "kvtally.collectors.lmcache_mp:LmcacheMpMapping",
        "LMCache multiprocess server",
    ),
    "llm_d": Source(
        (
            "llm_d_epp_",
            "llm_d_router_epp_",
            "llm_d_inference_scheduler_",
            "inference_(?:objective|model|pool|extension)_",
        ),
        "kvtally.collectors.llm_d:LlmDMapping",
        "llm-d router",
    ),
    "dynamo": Source(("dynamo_frontend_",), "kvtally.collectors.dynamo:DynamoMapping", "NVIDIA Dynamo frontend"),
    "sglang": Source(("sglang[:_]",), "kvtally.collectors.sglang:SglangMapping", "SGLang", is_engine=True),
    "tensorrt_llm": Source(
        ("trtllm_",), "kvtally.collectors.tensorrt_llm:TensorRtLlmMapping", "TensorRT-LLM", is_engine=True
    ),
    "kvbm": Source(("kvbm_",), "kvtally.collectors.kvbm:KvbmMapping", "Dynamo KVBM"),
    "mooncake": Source(
        ("mooncake_(?:transfer|ssd)_", "master_allocated_bytes", "(?:mem|file)_cache_hit_"),
        "kvtally.collectors.mooncake:MooncakeMapping",
        "Mooncake store",
    ),
    "gpfs_exporter": Source(("gpfs_perf_",), "kvtally.collectors.gpfs_exporter:GpfsExporterMapping", "gpfs_exporter"),
    "gpfs_cluster": Source(
        ("gpfs_bytes_(?:read|write)",), "kvtally.collectors.gpfs_cluster:GpfsClusterMapping", "gpfs-exporter (plazonic)"
    ),
    "gpfs_bridge": Source(
        ("gpfs_(?:fs|fis|ds)_(?:bytes|read|write)_",),
        "kvtally.collectors.gpfs_bridge:StorageScaleBridge",
        "Storage Scale bridge",
        integrates=True,
    ),
    "dcgm": Source(("DCGM_FI_",), "kvtally.collectors.dcgm:DcgmReader", "dcgm-exporter", integrates=True),
    "weka": Source(("weka_(?:fs_)?stats",), "kvtally.collectors.weka:WekaReader", "WEKA exporter", integrates=True),
    "juicefs": Source(("juicefs_",), "kvtally.collectors.juicefs:JuicefsMapping", "JuiceFS"),
}
_NAME_BYTES = 256
# led by a literal, which is looked for ten times faster than the beginning of a line is
_BY_NAME = {name: re.compile(rb"\n(?:%b)" % "|".join(one.prefixes).encode()) for name, one in SOURCES.items()}


def sources_on(body: bytes) -> tuple[str, ...]:
    """Names of the sources whose samples a page shows, in the order of the table."""
    first = b"\n" + body[:_NAME_BYTES]  # not a copy of all: a page may have megabytes
    return tuple(name for name, pattern in _BY_NAME.items() if pattern.match(first) or pattern.search(body))


def reader_class(name: str) -> Any:
    """The class that reads a source; KeyError for an unknown name."""
    module, _, attribute = SOURCES[name].reader.partition(":")
    return getattr(import_module(module), attribute)


def title_of(engine: str) -> str:
    """What an engine is called that says `engine` of itself: "tensorrt-llm"; that itself where it is no source's."""
    source = SOURCES.get(engine.replace("-", "_"))
    return engine if source is None else source.title


def titles(names: Iterable[str]) -> str:
    """What sources are called, for a message."""
    return ", ".join(SOURCES[name].title for name in names)
