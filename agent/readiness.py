"""What an engine does not tell, which rung of METHOD 4.1 its data reach, and what would lift either.

What only time can tell (too few requests, a calibration that is too wide) is the savings report's to say.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Literal, NamedTuple

from kvtally.agent.facts import GPUS, MODEL_CONFIG, in_config
from kvtally.agent.hardware import gpu_of
from kvtally.agent.identity import BY_SOURCE_SINCE, CLEAN_SINCE, version_of
from kvtally.agent.model_shape import UnknownArchitecture, shape_of
from kvtally.collectors.quantities import index

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kvtally.agent.replica import About
    from kvtally.collectors.base import Reading

Rung = Literal["M1", "M3"]
# the population of prompts comes from these histograms (METHOD 4.4)
_POPULATION = ("request_prompt_tokens_le_", "request_computed_tokens_le_")
_NEEDED = {
    "prompt_tokens": "prompts are not counted",
    "computed_tokens": "which prompt tokens were computed is not counted",
    "hbm_tokens": "which tokens came from HBM is not counted",
    "steps": "steps are not counted, and the law is one of steps",
    "first_tokens": "requests that gave their first token are not counted",
    "generated_tokens": "generated tokens are not counted",
}
_BY_SOURCE = {"computed_tokens", "hbm_tokens"}
_UPGRADE = "vLLM counts prompt tokens by source since 0.16: upgrade"
GPUS_UNKNOWN = "which GPUs it holds"
_LOG = "`kvtally calibrate --requests FILE`, with prompt, cached and TTFT of each request"

# quantity of an engine -> what is lost without it, what to do
_STATS = "start vLLM without --disable-log-stats"
_WANTED: Mapping[str, tuple[str, str]] = {
    "prompt_tokens": ("no cost per token at all", _STATS),
    "generated_tokens": ("no cost per output token", _STATS),
    "steps": ("prefill and decode cannot be told apart; idle time is guessed from the gauges", ""),
    "first_tokens": ("time to first token is unknown", ""),
    "running_requests": ("idle and occupied time are guessed from finished requests", ""),
    "prefill_ns": ("occupied time at the edges of work is guessed", ""),
    "prefix_hit_tokens": ("reuse is not counted", "prefix caching may be off: --enable-prefix-caching"),
    "awake": ("a sleeping engine counts as idle", "vLLM tells since 0.11.1"),
    "kv_usage_ppm": ("nobody knows how full the KV cache is", ""),
}


class Lacking(NamedTuple):
    """Something that is not told, what is lost by it, and how to get it."""

    what: str
    costs: str
    hint: str = ""


class NextRung(NamedTuple):
    """A rung above, what it adds, and what leads there."""

    rung: str
    adds: str
    hint: str


class Readiness(NamedTuple):
    """rung None: no figure of savings can be given, and `refused` says why.

    is_due   False of an engine whose savings are another's, so that none of its own is no fault
    """

    rung: Rung | None
    refused: tuple[Lacking, ...]
    above: tuple[NextRung, ...]
    is_due: bool = True


class Around(NamedTuple):
    """What the sources beside an engine tell.

    gpus        readings by UUID
    processes   the reading of its process tree, None where there is none
    shared      UUIDs of GPUs that another engine holds too -> that engine's name
    url         of its page
    """

    gpus: Mapping[str, Reading]
    processes: Reading | None
    shared: Mapping[str, str]
    url: str


def readiness(engine: Reading, about: About, around: Around) -> Readiness:
    """What the savings of one engine could stand on, by one scrape of it and of what is beside it."""
    if (about.role or about.facts.get("role")) == "decode":
        text = "it decodes what another engine prefilled, so what it loads is a transfer"
        told = Lacking("savings of its own", text, "they are told of the prefill engine of its group")
        return Readiness(None, (told,), (), is_due=False)
    refused = [*_counters(engine), *_shape(about, around), *_datasheet(about, around), *_seconds(about, around)]
    has_mfu = _detail(engine, "estimated_gflop") > 0
    above = [_mfu(engine)] if is_vllm(engine) and not has_mfu else []
    above.append(NextRung("M4", "how fast large prefills are", "`kvtally calibrate --probe` while it idles"))
    above.append(NextRung("M2/M5", "which prompts were reused, each by itself", _LOG))
    if refused:
        return Readiness(None, tuple(refused), tuple(above))
    return Readiness("M3" if has_mfu else "M1", (), tuple(above))


def missing_of(engine: Reading, about: About, url: str) -> list[Lacking]:
    """What an engine's page or its surroundings do not tell, that costs or audits want; savings or not."""
    return [*_families(engine), *_version(engine), *_mapping(url, about)]


def value(reading: Reading, quantity: str) -> float | None:
    """What a reading tells of a quantity."""
    return reading.values[index(reading.kind, quantity)]


def is_vllm(engine: Reading) -> bool:
    """Whether what lifts something on vLLM lifts it here."""
    return engine.attributes.get("engine", "vllm") == "vllm"


def _families(reading: Reading) -> list[Lacking]:
    return [
        Lacking(quantity, costs, hint if is_vllm(reading) else "")
        for quantity, (costs, hint) in _WANTED.items()
        if value(reading, quantity) is None and not _is_told_otherwise(reading, quantity)
    ]


def _is_told_otherwise(reading: Reading, quantity: str) -> bool:
    """Whether another count serves as well: lookups tell of reuse only where tokens by tier do not."""
    return quantity == "prefix_hit_tokens" and value(reading, "hbm_tokens") is not None


def _version(reading: Reading) -> list[Lacking]:
    if not is_vllm(reading):
        return []
    release = version_of(reading.attributes.get("version"))
    by_source = value(reading, "computed_tokens") is not None
    if release is None:
        return [
            Lacking(
                "the engine's version",
                "the identity of its token counters is checked in the form that its families suggest",
                "/version does not answer; a proxy in front of the engine may hide it",
            )
        ]
    if not by_source:
        older = release < BY_SOURCE_SINCE
        return [
            Lacking(
                "prompt tokens by source",
                "computed tokens are derived from lookups, which are counted on every scheduling attempt",
                "vLLM counts them since 0.16: upgrade" if older else "",
            )
        ]
    if release < CLEAN_SINCE:
        return [
            Lacking("clean counts of recomputed tokens", "checked in the form of vLLM 0.16 to 0.19", "clean since 0.20")
        ]
    return []


def _mapping(url: str, about: About) -> list[Lacking]:
    if about.gpus is None:
        hint = f"{about.mapping}. Name them {in_config('url', url, GPUS)}"
        return [Lacking(GPUS_UNKNOWN, "no money: tokens and seconds only", hint)]
    return []


def _counters(engine: Reading) -> list[Lacking]:
    lacking = [
        Lacking(quantity, costs, _UPGRADE if is_vllm(engine) and quantity in _BY_SOURCE else "")
        for quantity, costs in _NEEDED.items()
        if value(engine, quantity) is None
    ]
    if not all(any(name.startswith(prefix) for name in engine.detail_names) for prefix in _POPULATION):
        text = "nothing tells how long prompts are and how much of them is computed"
        hint = "vLLM tells since 0.13 (request_prefill_kv_computed_tokens): upgrade" if is_vllm(engine) else ""
        lacking.append(Lacking("lengths of prompts", text, hint))
    return lacking


def _shape(about: About, around: Around) -> list[Lacking]:
    text = about.facts.get("shape")
    if not text:
        hint = f"say where its config.json lies, {in_config('url', around.url, MODEL_CONFIG)}"
        return [Lacking("the shape of its model", "no step law can be set up", hint)]
    try:
        shape_of(json.loads(text))
    except UnknownArchitecture as unknown:
        return [Lacking("a law for its model", str(unknown), unknown.hint)]
    return []


def _datasheet(about: About, around: Around) -> list[Lacking]:
    """Whether a law can be set up for its GPUs: a part of one has no datasheet."""
    skus = {around.gpus[uuid].attributes.get("sku", "") for uuid in about.gpus or () if uuid in around.gpus}
    lacking = sorted(sku for sku in skus if gpu_of(sku) is None)
    if not lacking:
        return []
    text = f"there is no datasheet row for {lacking[0] or 'a GPU that does not tell its product'}"
    return [Lacking("a law for its GPUs", text, "whole GPUs of NVIDIA's and AMD's data-centre lines have one")]


def _seconds(about: About, around: Around) -> list[Lacking]:
    """What keeps the seconds that the engine worked from being known."""
    if about.gpus is None:
        return [Lacking(GPUS_UNKNOWN, "no seconds in which it worked", about.mapping)]
    if about.gpus:
        text, hint = _unreadable(about.gpus, around)
    elif around.processes is None or not around.processes.parts:
        text = "an engine without a GPU is timed by the CPU seconds of its processes, and these are not seen"
        hint = "run kvtally as the same user and in the same PID namespace (Kubernetes: shareProcessNamespace: true)"
    else:
        text = hint = ""
    return [Lacking("seconds in which it worked", text, hint)] if text else []


def _unreadable(gpus: Sequence[str], around: Around) -> tuple[str, str]:
    """Why its GPUs do not tell how long an engine worked, and what would lift that; empty where they do."""
    others = sorted({around.shared[uuid] for uuid in gpus if uuid in around.shared})
    if others:
        text = f"its GPUs serve {', '.join(others)} too, and utilisation does not tell whose work it was"
        return text, "give each engine GPUs of its own"
    known = [around.gpus[uuid] for uuid in gpus if uuid in around.gpus]
    if len(known) < len(gpus):
        unseen = "its GPU is" if len(gpus) == 1 else f"{len(gpus) - len(known)} of its {len(gpus)} GPUs are"
        hint = "let NVIDIA_VISIBLE_DEVICES show it to kvtally, or list the page of dcgm-exporter under [[page]]"
        return f"{unseen} not read here", hint
    if any(value(gpu, "gpm_ns") is None and value(gpu, "observed_ns") is None for gpu in known):
        return "neither GPM nor utilization.gpu of its GPUs can be read", "`nvml` below says why"
    return "", ""


def _mfu(engine: Reading) -> NextRung:
    adds = "how much attention there was"
    if "estimated_gflop" not in engine.detail_names:
        return NextRung("M3", adds, "vLLM >= 0.17 with --enable-mfu-metrics")
    worked = value(engine, "prompt_tokens")
    return NextRung("M3", adds, "--enable-mfu-metrics" if worked else "--enable-mfu-metrics, if it is not set already")


def _detail(reading: Reading, name: str) -> float:
    return dict(zip(reading.detail_names, reading.details, strict=False)).get(name, 0.0)


def shared_gpus(abouts: Mapping[str, About], name: str) -> dict[str, str]:
    """GPUs of an engine that another engine holds too, and which does."""
    own = set(abouts[name].gpus or ())
    return {uuid: other for other, about in abouts.items() if other != name for uuid in about.gpus or () if uuid in own}


def unknown(readings: Sequence[Reading], names: Sequence[str]) -> list[str]:
    """Quantities that none of these readings tells."""
    return [name for name in names if all(value(reading, name) is None for reading in readings)]
