"""The sources of one host: built from config and discovery, rebuilt when an engine comes or goes."""

from __future__ import annotations

import os
import socket
from contextlib import closing
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

from kvtally.agent.config import Config, Engine, Labels, complete
from kvtally.agent.config_file import ConfigError
from kvtally.agent.engine_process import facts_of_process
from kvtally.agent.replica import About
from kvtally.collectors.base import CollectError, Collector, NoData
from kvtally.collectors.engine_page import EnginePage
from kvtally.collectors.filesystem import BlockDevices, CgroupIo
from kvtally.collectors.host import ProcessTree
from kvtally.collectors.http import Endpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from kvtally.agent.discovery import FoundEngine
    from kvtally.collectors.nvml import NvmlCollector

GONE_LOOKS = 10  # a discovered engine that so many looks in a row do not find is gone
PROBE_SECONDS = 1.0
PAGE_BYTES = 8 * 2**20  # of one engine: 64 ranks on a page take 6 MiB, and many bad pages may come at once


class Found(NamedTuple):
    """What a look around this host found.

    gpu_indices  UUIDs of its GPUs in the order of their indices; None where they could not be read
    listed       ports of this host that config lists, under whatever address -> the name of the engine there
    facts        what their processes and their models' files tell of engines, by the engine's name
    """

    engines: tuple[FoundEngine, ...]
    gpu_indices: tuple[str, ...] | None
    listed: Mapping[int, str] = {}
    facts: Mapping[str, Mapping[str, str]] = {}


def probe(url: str) -> bytes | None:
    """The body of a page, or None: whatever else answers on a port is no engine."""
    try:
        with closing(Endpoint(url, timeout_seconds=PROBE_SECONDS, max_bytes=PAGE_BYTES)) as endpoint:
            return endpoint.get().body
    except (CollectError, ValueError):
        return None


def look_around(config: Config, nvml: NvmlCollector | None) -> Found:
    """Find engines on this host and the GPUs that they hold; bounded by a second per listening port."""
    from kvtally.agent.discovery import find_engines  # noqa: PLC0415  # not loaded where discovery is off

    indices: tuple[str, ...] | None = None
    pids: Mapping[str, Sequence[int]] | None = None
    if nvml is not None:
        try:
            readings = nvml.collect()
            by_index = sorted((int(reading.attributes["index"]), reading.name) for reading in readings)
            indices = tuple(name for _, name in by_index)
            pids = nvml.compute_pids()
        except (NoData, CollectError):
            indices = None
    listed = {port: engine.name for engine in config.engines if (port := _local_port(engine.url)) is not None}
    ports = {*listed, *(config.scrape.ports if config.scrape.discover else ())}
    found = find_engines(sorted(ports), probe, gpu_uuids_by_index=indices, compute_pids=pids)
    return Found(tuple(found), indices, listed, _told(config, found, listed))


def _told(config: Config, found: Sequence[FoundEngine], listed: Mapping[int, str]) -> dict[str, dict[str, str]]:
    """How engines are run: those that were found, and those whose process config names."""
    pids = {listed.get(urlsplit(one.url).port or 0, one.name): one.command_pid for one in found}
    pids |= {engine.name: engine.pid for engine in config.engines if engine.pid is not None}
    places = {engine.name: engine.model_config for engine in config.engines}
    return {name: facts_of_process(pid, model_config=places.get(name, "")) for name, pid in pids.items()}


def _local_port(url: str) -> int | None:
    """The port of a page that this host serves, under any of its names and addresses; None for another host's."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        family, kind, _, _, address = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as datagrams:
            datagrams.connect(address)  # sends nothing: it only chooses the address to send from
            from_here = datagrams.getsockname()[0]
    except (OSError, UnicodeError):
        return None
    return port if from_here == address[0] or str(address[0]).startswith("127.") else None


class Sources:
    """Every collector of a run, kept from one look around to the next."""

    def __init__(self, config: Config, nvml: NvmlCollector | None) -> None:
        self._config = config
        self._nvml = nvml
        self._pages: dict[str, EnginePage] = {}
        self._processes: dict[str, list[Collector]] = {}
        self._pids: dict[str, int | None] = {}
        self._disks: list[Collector] = [BlockDevices()] if config.host.disks else []
        self.abouts: dict[str, About] = {}
        self._given = {engine.name: _given_facts(engine) for engine in config.engines}
        self._absent: dict[str, int] = {}
        for engine in config.engines:
            self._add(engine, None)

    @property
    def engines(self) -> Sequence[EnginePage]:
        """The engines' pages."""
        return tuple(self._pages.values())

    @property
    def may_hang(self) -> list[Collector]:
        """Sources behind a network or a driver."""
        return [*self._pages.values(), *([self._nvml] if self._nvml is not None else [])]

    @property
    def prompt(self) -> list[Collector]:
        """Sources that the kernel answers at once."""
        return [*self._disks, *(one for own in self._processes.values() for one in own)]

    def take(self, found: Found) -> bool:
        """Take in what a look around found; True if the set of sources changed."""
        before = (set(self._pages), dict(self._pids))
        listed = {engine.name: engine for engine in self._config.engines}
        seen: set[str] = set()
        for one in found.engines:
            # an engine that config lists under another address of this host is not a second one
            name = found.listed.get(urlsplit(one.url).port or 0, "")
            engine = listed.get(name) or complete(Engine(url=one.url), self._config)
            seen.add(engine.name)
            self._add(engine, one, found.facts.get(engine.name, {}))
        for name in (found.facts.keys() & listed.keys()) - seen:  # config names its process
            facts = self._facts(listed[name], found.facts[name])
            self.abouts[name] = self.abouts[name]._replace(facts=facts)
        for name in [name for name in self._pages if name not in seen and name not in listed]:
            self._absent[name] = self._absent.get(name, 0) + 1
            # one that is merely too busy to answer a look has a process still
            if self._absent[name] >= GONE_LOOKS and _is_gone(self._pids.get(name)):
                self._drop(name)
        for name in seen:
            self._absent.pop(name, None)
        return before != (set(self._pages), dict(self._pids))

    def _add(self, engine: Engine, found: FoundEngine | None, told: Mapping[str, str] = {}) -> None:
        name = engine.name
        if name not in self._pages:
            try:
                endpoint = Endpoint(
                    engine.url, timeout_seconds=self._config.scrape.timeout_seconds, max_bytes=PAGE_BYTES
                )
            except ValueError as error:
                raise ConfigError(f"engine {name}", str(error), "see docs/configuration.md, [[engine]]") from error
            self._pages[name] = EnginePage(name, endpoint, restrict=self._config.scrape.restrict == "always")
        if self._config.scrape.restrict == "auto" and found is not None and found.logs_scrapes is not None:
            self._pages[name].allow_restricting(allowed=not found.logs_scrapes)
        self.abouts[name] = about_of(engine, found, self._facts(engine, told))
        pid = engine.pid or (found.pid if found else None)
        if pid is not None:
            self._pids[name] = pid
        if name not in self._processes and pid is not None:
            own: list[Collector] = []
            if self._config.host.processes:
                own.append(ProcessTree(name, self._pid_of(name)))
            if self._config.host.cgroup:
                cgroup = CgroupIo(self._pid_of(name))
                cgroup.source = f"cgroup:{name}"
                own.append(cgroup)
            self._processes[name] = own

    def _facts(self, engine: Engine, told: Mapping[str, str]) -> dict[str, str]:
        """How an engine is run by what its process tells; what config gives goes before that."""
        facts = {**self._given.get(engine.name, {}), **told}
        by_hand = {"connector": engine.connector} if engine.connector else {}
        if engine.token_budget is not None:
            by_hand["token_budget"] = str(engine.token_budget)
        return facts | by_hand

    def _drop(self, name: str) -> None:
        """Forget an engine that discovery found and finds no more; its counters stay in the ledger for its return."""
        self._pages.pop(name).close()
        for kept in (self._processes, self._pids, self._absent):
            kept.pop(name, None)

    def _pid_of(self, name: str) -> Callable[[], int | None]:
        return lambda: self._pids.get(name)

    def close(self) -> None:
        """Close every connection."""
        for page in self._pages.values():
            page.close()


def _is_gone(pid: int | None) -> bool:
    return pid is not None and not os.path.exists(f"/proc/{pid}")  # noqa: PTH110  # one call


def _given_facts(engine: Engine) -> dict[str, str]:
    """What the file tells that config names; ConfigError where there is no model's config."""
    facts = facts_of_process(None, model_config=engine.model_config) if engine.model_config else {}
    if engine.model_config and not facts:
        reason = f"model_config: {engine.model_config} is no config.json of a model, and no folder that holds one"
        raise ConfigError(f"engine {engine.name}", reason, "name the file that lies beside the model's weights")
    return facts


def about_of(engine: Engine, found: FoundEngine | None, facts: Mapping[str, str] = {}) -> About:
    """What config says of an engine, and where it is silent what discovery found; `facts` of how it is run."""
    labels = {name: value for name in Labels.__struct_fields__ if (value := getattr(engine.labels, name))}
    gpus, mapping, per_replica = engine.gpus, "config", engine.gpus_per_replica
    if gpus is None and found is not None:
        gpus, mapping = found.gpus, found.gpu_evidence
        ranks = found.data_parallel or 1
        per_replica = per_replica or (len(gpus) // ranks if gpus and ranks > 1 else None)
    elif gpus is None:
        mapping = "the engine was not found on this host, and the config does not name its GPUs"
    return About(
        None if gpus is None else tuple(gpus),
        per_replica,
        mapping,
        "",
        engine.term,
        engine.site,
        labels,
        "" if engine.kv_dram_gib is None else f"{engine.kv_dram_gib:.9f}",
        "" if engine.kv_storage_tib is None else f"{engine.kv_storage_tib:.9f}",
        facts,
    )


def open_nvml(config: Config) -> NvmlCollector | None:
    """The GPUs of this host; None without a driver, or where config switches them off."""
    if not config.gpu.enabled:
        return None
    from kvtally.collectors.nvml import NvmlCollector  # noqa: PLC0415  # pynvml is loaded where there is a driver

    nvml = NvmlCollector(
        energy_every_seconds=config.gpu.energy_every_seconds, gpm_every_seconds=config.gpu.gpm_every_seconds
    )
    try:
        nvml.compute_pids()
    except NoData:
        return None
    except CollectError:
        pass  # a driver that does not answer now may do so later; every tick says what is wrong
    return nvml
