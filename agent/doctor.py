"""Every target: found or not, which version, what is missing, what that costs, and what to do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from kvtally.agent.identity import BY_SOURCE_SINCE, CLEAN_SINCE, version_of
from kvtally.collectors.base import Collector, Reading, Scrape, scrape
from kvtally.collectors.quantities import QUANTITIES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from kvtally.agent.config import Config
    from kvtally.agent.replica import About
    from kvtally.agent.sources import Found, Sources


class Missing(NamedTuple):
    """Something that is not told, what is lost by it, and how to get it."""

    what: str
    costs: str
    hint: str = ""


class Checked(NamedTuple):
    """One target's state: ok, partial, no_data or failed."""

    target: str
    state: str
    summary: str
    missing: tuple[Missing, ...] = ()
    hint: str = ""


# quantity of an engine -> what is lost without it, what to do
_WANTED: Mapping[str, tuple[str, str]] = {
    "prompt_tokens": ("no cost per token at all", "is this vLLM with log stats? --disable-log-stats must not be set"),
    "generated_tokens": ("no cost per output token", "as above"),
    "steps": ("prefill and decode cannot be told apart; idle time is guessed from the gauges", ""),
    "first_tokens": ("time to first token is unknown", ""),
    "running_requests": ("idle and occupied time are guessed from finished requests", ""),
    "prefill_ns": ("occupied time at the edges of work is guessed", ""),
    "prefix_hit_tokens": ("reuse is not counted", "prefix caching may be off: --enable-prefix-caching"),
    "awake": ("a sleeping engine counts as idle", "vLLM tells since 0.11.1"),
    "kv_usage_ppm": ("nobody knows how full the KV cache is", ""),
}


def examine(
    config: Config, sources: Sources, found: Found, clock_ns: Callable[[], int], others: Sequence[Collector]
) -> list[Checked]:
    """Read every source once and judge it; `others` are the sources beside the engines."""
    readings: dict[str, Scrape] = {}
    for collector in others:
        readings[collector.source] = scrape(collector, clock_ns)
    checked = [
        _engine(page.name, scrape(page, clock_ns), sources.abouts[page.name], restricted=page.restricted)
        for page in sources.engines
    ]
    if not checked:
        checked.append(_no_engine(config))
    if found.gpu_indices is None and not any(source == "nvml" for source in readings):
        checked.append(_no_gpu(config))
    checked += [_other(source, taken) for source, taken in readings.items()]
    return checked


def _no_engine(config: Config) -> Checked:
    hint = 'start one, or name it in kvtally.toml: engine = [{ url = "http://HOST:PORT/metrics" }]'
    if not config.scrape.discover:
        return Checked("engine", "failed", "the config names none, and looking for them is switched off", (), hint)
    ports = _runs(config.scrape.ports)
    return Checked("engine", "failed", f"no vLLM engine answers on this host's ports {ports}", (), hint)


def _runs(numbers: Sequence[int]) -> str:
    """Numbers in order, those that follow on each other as a span: "8000 to 8010, 8200"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number <= runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]} to {run[-1]}" if run[-1] > run[0] else str(run[0]) for run in runs)


def _engine(name: str, taken: Scrape, about: About, *, restricted: bool) -> Checked:
    target = f"engine {name}"
    if taken.outcome != "ok":
        return Checked(target, "failed", taken.reason, (), taken.hint)
    engines = [reading for reading in taken.readings if reading.kind == "engine"]
    caches = [reading for reading in taken.readings if reading.kind == "cache"]
    if not engines:
        return Checked(target, "failed", "the page names no engine", (), "is this vLLM's own /metrics?")
    first = engines[0]
    missing = [*_families(first), *_version(first), *_mapping(name, about)]
    external = _value(first, "external_tokens")
    if external and not caches:
        missing.append(
            Missing(
                "LMCache's families",
                "tokens come from an outer tier, and which tier and how long loading took is unknown",
                "export PROMETHEUS_MULTIPROC_DIR before `vllm serve`, the same for all its processes",
            )
        )
    version = first.attributes.get("version", "version unknown")
    parts = [f"vLLM {version}", first.attributes.get("model", "")]
    parts.append(f"{len(engines)} ranks" if len(engines) > 1 else "")
    parts += [f"cache: {cache.attributes.get('cache')}" for cache in caches]
    parts.append("asked for the wanted families alone" if restricted else "whole page read")
    state = "partial" if missing else "ok"
    if _value(first, "prompt_tokens") is None and _value(first, "generated_tokens") is None:
        state = "failed"  # there is nothing to meter
    return Checked(target, state, ", ".join(part for part in parts if part), tuple(missing))


def _value(reading: Reading, quantity: str) -> float | None:
    names = [one.name for one in QUANTITIES[reading.kind]]
    return reading.values[names.index(quantity)]


def _families(reading: Reading) -> list[Missing]:
    return [
        Missing(quantity, costs, hint)
        for quantity, (costs, hint) in _WANTED.items()
        if _value(reading, quantity) is None
    ]


def _version(reading: Reading) -> list[Missing]:
    release = version_of(reading.attributes.get("version"))
    by_source = _value(reading, "computed_tokens") is not None
    if release is None:
        return [
            Missing(
                "the engine's version",
                "the identity of its token counters is checked in the form that its families suggest",
                "/version does not answer; a proxy in front of the engine may hide it",
            )
        ]
    if not by_source:
        older = release < BY_SOURCE_SINCE
        return [
            Missing(
                "prompt tokens by source",
                "computed tokens are derived from lookups, which are counted on every scheduling attempt",
                "vLLM counts them since 0.16: upgrade" if older else "",
            )
        ]
    if release < CLEAN_SINCE:
        return [
            Missing("clean counts of recomputed tokens", "checked in the form of vLLM 0.16 to 0.19", "clean since 0.20")
        ]
    return []


def _mapping(target: str, about: About) -> list[Missing]:
    if about.gpus is None:
        return [
            Missing(
                "which GPUs it holds",
                "no money: tokens and seconds only",
                f'{about.mapping}. In kvtally.toml: engine = [{{ url = "http://{target}/metrics", gpus = ["GPU-…"] }}]',
            )
        ]
    return []


def _no_gpu(config: Config) -> Checked:
    reason = "no NVIDIA driver on this host" if config.gpu.enabled else "switched off in the config"
    lost = "no GPU seconds, power or energy; an engine without a GPU is split by its CPU seconds"
    return Checked("gpu", "no_data", f"{reason}: {lost}", (), "in a container, NVIDIA_VISIBLE_DEVICES must let it in")


def _other(source: str, taken: Scrape) -> Checked:
    if taken.outcome != "ok":
        return Checked(source, taken.outcome, taken.reason, (), taken.hint)
    names = ", ".join(_shown(reading) for reading in taken.readings)
    return Checked(source, "ok", names)


def _shown(reading: Reading) -> str:
    if reading.kind == "gpu":
        gpm = _value(reading, "gpm_ns") is not None
        return f"{reading.name} {reading.attributes.get('sku', '')} ({'with' if gpm else 'without'} GPM)"
    if reading.kind == "process":
        return f"{int(_value(reading, 'processes') or 0)} processes"
    mounts = reading.attributes.get("mounts")
    return f"{reading.name} ({mounts})" if mounts else reading.name


def answer_of(checked: Sequence[Checked]) -> dict[str, Any]:
    """The answer as it prints in JSON."""
    good = sum(one.target.startswith("engine ") and one.state in {"ok", "partial"} for one in checked)
    verdict = (
        f"{good} engine{'s' if good != 1 else ''} can be metered: `kvtally run` does it"
        if good
        else "Nothing can be metered here yet."
    )
    return {
        "targets": [{**one._asdict(), "missing": [each._asdict() for each in one.missing]} for one in checked],
        "metered_engines": good,
        "verdict": verdict,
    }
