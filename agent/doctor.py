"""Every target: found or not, which version, what is missing, what that costs, and what to do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from kvtally.agent.disaggregation import ROLE
from kvtally.agent.facts import among, in_config
from kvtally.agent.finding import plural
from kvtally.agent.joins import is_transfer, named_engines
from kvtally.agent.readiness import (
    Around,
    Lacking,
    Readiness,
    missing_of,
    readiness,
    shared_gpus,
    unknown,
    value,
)
from kvtally.collectors.base import CollectError, Collector, Reading, Scrape, scrape
from kvtally.collectors.lmcache import is_unhealthy
from kvtally.collectors.quantities import QUANTITIES
from kvtally.collectors.registry import title_of, titles

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from kvtally.agent.config import Config
    from kvtally.agent.look import Found
    from kvtally.agent.replica import About
    from kvtally.agent.sources import Sources
    from kvtally.collectors.engine_page import EnginePage
    from kvtally.collectors.side_page import SidePage


class Checked(NamedTuple):
    """One target's state: ok, partial, no_data or failed.

    counted, not_counted   quantities that its readings tell, and those that they do not
    readiness              of an engine, for savings; None for anything else, and for one that cannot be read
    warnings               what is unsafe in how it is reached
    """

    target: str
    state: str
    summary: str
    missing: tuple[Lacking, ...] = ()
    hint: str = ""
    version: str = ""
    counted: tuple[str, ...] = ()
    not_counted: tuple[str, ...] = ()
    readiness: Readiness | None = None
    warnings: tuple[str, ...] = ()


class Kept(NamedTuple):
    """What the ledger holds.

    writer      the number of the process that writes it now; "" for none
    newest_ns   the end of its newest engine interval, unix nanoseconds; None where it has none
    """

    writer: str
    newest_ns: int | None


# connector, by the beginning of its class -> how its own families are had
_OUTER: Mapping[str, str] = {
    "LMCacheMP": "list the page of LMCache's server (--http-port), in kvtally.toml, in a [[page]] of its own: "
    'url = "http://127.0.0.1:8080/metrics"',
    "LMCache": "export PROMETHEUS_MULTIPROC_DIR before `vllm serve`, the same for all its processes; or set "
    "internal_api_server_enabled: true in LMCache's config and list its port (6999 and on) under [[page]]",
    "Mooncake": "list the page of Mooncake's client under [[page]]",
    "Dynamo": "set DYN_KVBM_METRICS=true; KVBM's page is on port 6880",
    "": "export PROMETHEUS_MULTIPROC_DIR before `vllm serve`, the same for all its processes; an LMCache server, "
    "Mooncake or KVBM has a page of its own: list it under [[page]]",
}


class Taken(NamedTuple):
    """Every source, read once."""

    engines: Mapping[str, Scrape]
    others: Mapping[str, Scrape]

    def readings(self, kind: str) -> list[Reading]:
        """All readings of a kind."""
        every = (*self.engines.values(), *self.others.values())
        return [reading for taken in every for reading in taken.readings if reading.kind == kind]


def examine(
    config: Config, sources: Sources, found: Found, clock_ns: Callable[[], int], others: Sequence[Collector]
) -> list[Checked]:
    """Read every source once and judge it; `others` are the sources beside the engines."""
    taken = Taken(
        {page.name: scrape(page, clock_ns) for page in sources.engines},
        {collector.source: scrape(collector, clock_ns) for collector in others},
    )
    config = found.config or config
    unsafe = _unsafe(config)
    checked = [
        _with_health(_engine(page.name, page.url, sources.abouts, taken, restricted=page.restricted), page)
        for page in sources.engines
    ]
    if not checked:
        checked.append(_no_engine(config))
    if "nvml" not in taken.others and not taken.readings("gpu"):
        checked.append(_no_gpu(config))
    pages = {page.source: page for page in sources.pages}
    names = {page.name for page in sources.engines}
    for collector in others:
        page = pages.get(collector.source)
        own = _with_health(_other(taken.others[collector.source], page, names), page)
        limits = [Lacking(what, why) for what, why in getattr(collector, "limits", {}).items()]
        checked.append(own._replace(missing=(*own.missing, *limits)))
    checked += [Checked("scrape.file_sd", "partial", complaint) for complaint in found.complaints]
    return [one._replace(warnings=unsafe.get(one.target, ())) for one in checked]


_UNHEALTHY = Lacking(
    "a working LMCache",
    "lmcache_is_healthy is 0: its lookups find nothing, and its hits are silently 0",
    "LMCache's log says why; a restart of the engine brings it back",
)


def _with_health(checked: Checked, page: EnginePage | SidePage | None) -> Checked:
    """What was found of a page, and whether its LMCache says that it is out of order: on the whole page alone."""
    if page is None or checked.state not in {"ok", "partial"} or "lmcache" not in page.sources:
        return checked
    try:
        body = page.page()
    except CollectError:
        return checked
    if not is_unhealthy(body):
        return checked
    return checked._replace(state="partial", missing=(_UNHEALTHY, *checked.missing))


def _unsafe(config: Config) -> dict[str, tuple[str, ...]]:
    """What is unsafe in how engines and pages are reached, by target."""
    listed = (
        [(f"engine {one.name}", one) for one in config.engines],
        [(f"page:{one.name}", one) for one in config.pages],
    )
    told = {target: one.access.for_endpoint().warning(one.url) for each in listed for target, one in each}
    return {target: (warning,) for target, warning in told.items() if warning}


def _no_engine(config: Config) -> Checked:
    hint = 'start one, or name it in kvtally.toml, in an [[engine]] of its own: url = "http://HOST:PORT/metrics"'
    if not config.scrape.discover:
        return Checked("engine", "failed", "the config names none, and looking for them is switched off", (), hint)
    ports = _runs(config.scrape.ports)
    return Checked("engine", "failed", f"no engine answers on this host's ports {ports}", (), hint)


def _runs(numbers: Sequence[int]) -> str:
    """Numbers in order, those that follow on each other as a span: "8000 to 8010, 8200"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number <= runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]} to {run[-1]}" if run[-1] > run[0] else str(run[0]) for run in runs)


def _engine(name: str, url: str, abouts: Mapping[str, About], taken: Taken, *, restricted: bool) -> Checked:
    target, scraped, about = f"engine {name}", taken.engines[name], abouts[name]
    if scraped.outcome != "ok":
        return Checked(target, "failed", scraped.reason, (), scraped.hint)
    engines = [reading for reading in scraped.readings if reading.kind == "engine"]
    caches = [reading for reading in scraped.readings if reading.kind == "cache"]
    caches += [one for one in taken.readings("cache") if name in named_engines(one.attributes)]
    if not engines:
        return Checked(target, "failed", "the page names no engine", (), "is this the engine's own /metrics?")
    first = engines[0]
    missing = missing_of(first, about, url)
    if value(first, "external_tokens") and not caches:
        connector = about.facts.get("connector", "")
        hint = next(hint for start, hint in _OUTER.items() if connector.startswith(start))
        lost = "tokens come from an outer tier, and which tier and how long loading took is unknown"
        missing.append(Lacking("the outer tier's families", lost, hint))
    if not (about.role or about.facts.get("role")) and (ways := _handed_by(engines, caches)):
        lost = f"KV comes to it from other engines ({ways}): prompts count where they were prefilled and here again"
        missing.append(Lacking("its role", f"{lost}, and transfers as reuse", f"say it {in_config('url', url, ROLE)}"))
    counted, not_counted = _counted(engines)
    around = Around(
        {reading.name: reading for reading in taken.readings("gpu")},
        next((one for one in taken.readings("process") if one.name == name), None),
        shared_gpus(abouts, name),
        url,
    )
    state = "partial" if missing else "ok"
    if value(first, "prompt_tokens") is None and value(first, "generated_tokens") is None:
        state = "failed"  # there is nothing to meter
    return Checked(
        target,
        state,
        _summary(engines, caches, restricted=restricted),
        tuple(missing),
        version=first.attributes.get("version", ""),
        counted=counted,
        not_counted=not_counted,
        readiness=readiness(first, about, around),
    )


def _handed_by(engines: Sequence[Reading], caches: Sequence[Reading]) -> str:
    """What the transfers are called by which an engine has got KV from others; "" where it has got none so."""
    if not any(value(one, "external_tokens") for one in engines):
        return ""
    moving = [
        one for one in caches if is_transfer(one.attributes) and (value(one, "load_bytes") or value(one, "loads"))
    ]
    return ", ".join(sorted({one.attributes.get("cache", one.name) for one in moving}))


def _summary(engines: Sequence[Reading], caches: Sequence[Reading], *, restricted: bool) -> str:
    first = engines[0].attributes
    parts = [f"{title_of(first.get('engine', ''))} {first.get('version', 'version unknown')}", first.get("model", "")]
    parts.append(f"{len(engines)} ranks" if len(engines) > 1 else "")
    parts += [f"cache: {cache.attributes.get('cache') or cache.attributes.get('source')}" for cache in caches]
    parts.append("asked for the wanted families alone" if restricted else "whole page read")
    return ", ".join(part for part in parts if part)


def _counted(readings: Sequence[Reading]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Quantities that readings of one kind tell, and those that none of them does."""
    names = [quantity.name for quantity in QUANTITIES[readings[0].kind]]
    parts = [reading._replace(values=part) for reading in readings for part in (reading.parts or {}).values()]
    lacking = unknown([*readings, *parts], names)
    return tuple(name for name in names if name not in lacking), tuple(lacking)


def _no_gpu(config: Config) -> Checked:
    reason, hint = "no NVIDIA driver on this host", "in a container, NVIDIA_VISIBLE_DEVICES must let it in"
    if not config.gpu.enabled:
        reason, hint = "switched off in the config", "gpu.enabled = true reads this host's GPUs"
    lost = "no GPU seconds, power or energy; an engine without a GPU is split by its CPU seconds"
    return Checked("gpu", "no_data", f"{reason}: {lost}", (), hint)


def _other(taken: Scrape, page: SidePage | None, engines: Collection[str]) -> Checked:
    source, title = taken.source, "" if page is None else titles(page.sources)
    if taken.outcome != "ok":
        return Checked(source, taken.outcome, taken.reason, (), taken.hint)
    if not taken.readings:
        return Checked(source, "no_data", f"{title}: nothing of it is read here", (), _UNREAD_HINT)
    kinds: dict[str, list[Reading]] = {}
    for reading in taken.readings:
        kinds.setdefault(reading.kind, []).append(reading)
    told = [_counted(readings) for readings in kinds.values()]
    names = ", ".join(_shown(reading) for reading in taken.readings)
    is_fresh = page is not None and not _NAMED_WHEN_USED.isdisjoint(page.sources) and _is_unused(taken.readings)
    names += ", nothing counted yet" if is_fresh else ""
    return Checked(
        source,
        "ok",
        f"{title}: {names}" if title else names,
        tuple(lacking for reading in taken.readings for lacking in _of_page(reading, page, engines)),
        version=taken.readings[0].attributes.get("version", ""),
        counted=tuple(name for counted, _ in told for name in counted),
        not_counted=() if is_fresh else tuple(name for _, not_counted in told for name in not_counted),
    )


def _is_unused(readings: Sequence[Reading]) -> bool:
    """Whether none of them has counted anything."""
    return not any(
        value(reading, quantity.name)
        for reading in readings
        for quantity in QUANTITIES[reading.kind]
        if quantity.type != "gauge"
    )


def _of_page(reading: Reading, page: SidePage | None, engines: Collection[str]) -> list[Lacking]:
    """What a page lacks that is no engine's: a cache's or a gateway's."""
    lacking: list[Lacking] = []
    if reading.kind == "cache" and page is not None:
        unknown_names = [name for name in page.engines if name not in engines]
        if not page.engines:
            text = "nothing tells which engine it serves, so its seconds and tiers are in no engine's figures"
            lacking.append(Lacking("the engines behind it", text, "name them: engines = […] of its [[page]]"))
        elif unknown_names:
            text = f"it is said to serve {', '.join(unknown_names)}, and no such engine is read here"
            lacking.append(Lacking("some of its engines", text, "`engines` of a [[page]] are names of engines"))
    dropped = dict(zip(reading.detail_names, reading.details, strict=False)).get("event_bus_dropped_events", 0.0)
    if dropped:
        text = f"LMCache has dropped {dropped:,.0f} events since its start, so its counts are lower bounds"
        lacking.append(Lacking("some of what it counts", text, "it is short of CPU: give it more"))
    if reading.kind == "gateway" and value(reading, "input_tokens") and not value(reading, "cached_tokens"):
        text = "reuse as the responses tell it cannot be set beside the engines' own counts"
        lacking.append(Lacking("cached tokens", text, "start vLLM with --enable-prompt-tokens-details"))
    return lacking


# their pages show a family from its first count on: before it nobody knows what they will tell
_NAMED_WHEN_USED = {"lmcache_mp", "llm_d", "dynamo"}
_UNREAD_HINT = "NVML counts this host's GPUs: gpu.enabled = false takes them from dcgm-exporter's page instead"


def _shown(reading: Reading) -> str:
    if reading.kind == "gpu":
        gpm = value(reading, "gpm_ns") is not None
        return f"{reading.name} {reading.attributes.get('sku', '')} ({'with' if gpm else 'without'} GPM)"
    if reading.kind == "process":
        return plural(int(value(reading, "processes") or 0), "process")
    if paths := reading.attributes.get("paths"):
        return f"{reading.name}, {reading.attributes.get('fstype', '')}, holds {paths}"
    mounts = reading.attributes.get("mounts")
    return f"{reading.name} ({mounts})" if mounts else reading.name


def answer_of(checked: Sequence[Checked], kept: Kept | None = None) -> dict[str, Any]:
    """The answer as it prints in JSON; `kept` is what the ledger holds."""
    metered = [one for one in checked if one.target.startswith("engine ") and one.state in {"ok", "partial"}]
    ready = [one.readiness for one in metered if one.readiness is not None and one.readiness.is_due]
    failed = [one.target.removeprefix("engine ") for one in checked if _is_lost(one)]
    good, due, able = len(metered), len(ready), sum(one.rung is not None for one in ready)
    return {
        "targets": [_as_json(one) for one in checked],
        "metered_engines": good,
        "engines_failed": len(failed),
        "engines_with_savings": able,
        "engines_without_savings": due - able,
        "verdict": _verdict(good, failed, due, able, kept or Kept("", None)),
    }


def _is_lost(one: Checked) -> bool:
    return one.state == "failed" and one.target.startswith("engine ")


def _verdict(good: int, failed: Sequence[str], due: int, able: int, kept: Kept) -> str:
    """What it comes to: engines that can be metered or not, those with savings due, and those whose can be told."""
    if not good:
        return "Nothing can be metered here yet."
    does = f"process {kept.writer} writes the ledger" if kept.writer else "`kvtally run` does it"
    verdict = f"{plural(good, 'engine')} can be metered: {does}."
    if failed:
        verdict += f" {len(failed)} cannot be: {among(failed)}; see above."
    if not due:
        return verdict
    if not able:
        return f"{verdict} No savings can be told yet: see above."
    when = "once there is evidence" if kept.newest_ns is None else "as far as there is evidence: `kvtally savings`"
    if able < due:
        return f"{verdict} Savings of {able} of them can be told {when}; of {due - able} not: see above."
    return f"{verdict} Savings can be told {when}."


def _as_json(one: Checked) -> dict[str, Any]:
    ready = one.readiness
    return {
        "target": one.target,
        "state": one.state,
        "summary": one.summary,
        "version": one.version or None,
        "counted": list(one.counted),
        "not_counted": list(one.not_counted),
        "missing": [each._asdict() for each in one.missing],
        "savings": None
        if ready is None
        else {
            "due": ready.is_due,
            "rung": ready.rung,
            "refused": [each._asdict() for each in ready.refused],
            "above": [each._asdict() for each in ready.above],
        },
        "warnings": list(one.warnings),
        "hint": one.hint,
    }
