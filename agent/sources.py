"""The sources of one host: built from config and discovery, rebuilt when an engine comes or goes."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from kvtally.agent.config import Access, Config, Engine, Labels, Page, complete, complete_page
from kvtally.agent.config_file import ConfigError
from kvtally.agent.engine_process import facts_of_process
from kvtally.agent.kubernetes import in_pod, pod_of
from kvtally.agent.look import PAGE_BYTES
from kvtally.agent.replica import About
from kvtally.collectors.engine_page import EnginePage
from kvtally.collectors.filesystem import BlockDevices, CgroupIo
from kvtally.collectors.host import ProcessTree
from kvtally.collectors.http import Endpoint
from kvtally.collectors.side_page import SidePage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from kvtally.agent.discovery import FoundEngine
    from kvtally.agent.look import Found, MountKey
    from kvtally.collectors.base import Collector, Kind
    from kvtally.collectors.nvml import NvmlCollector

GONE_LOOKS = 10  # a discovered engine that so many looks in a row do not find is gone


class Sources:
    """Every collector of a run, kept from one look around to the next."""

    def __init__(self, config: Config, nvml: NvmlCollector | None) -> None:
        self._config = config
        self._nvml = nvml
        self._pod = pod_of(os.environ)
        self._pages: dict[str, EnginePage] = {}
        self._side: dict[str, SidePage] = {}
        self._mounts: dict[MountKey, Collector] = {}
        self._processes: dict[str, list[Collector]] = {}
        self._pids: dict[str, int | None] = {}
        self._disks: list[Collector] = [BlockDevices()] if config.host.disks else []
        self.abouts: dict[str, About] = {}
        self._given = {engine.name: given_facts(engine) for engine in config.engines}
        self._absent: dict[str, int] = {}
        self._told: set[str] = set()  # engines whose command line says how they are run
        for engine in config.engines:
            self._add(engine, None)
        for page in config.pages:
            self._add_page(page)

    @property
    def pages(self) -> Sequence[SidePage]:
        """The pages that are no engine's."""
        return tuple(self._side.values())

    @property
    def engines(self) -> Sequence[EnginePage]:
        """The engines' pages."""
        return tuple(self._pages.values())

    @property
    def may_hang(self) -> list[Collector]:
        """Sources behind a network or a driver."""
        drivers = [self._nvml] if self._nvml is not None else []
        return [*self._pages.values(), *self._side.values(), *self._mounts.values(), *drivers]

    @property
    def prompt(self) -> list[Collector]:
        """Sources that the kernel answers at once."""
        return [*self._disks, *(one for own in self._processes.values() for one in own)]

    def take(self, found: Found) -> bool:
        """Take in what a look around found; True if the set of sources changed."""
        before = self._set()
        self._take_config(found.config or self._config)
        listed = {engine.name: engine for engine in self._config.engines}
        seen: set[str] = set()
        for one in found.engines:
            # an engine that config lists under another address of this host is not a second one
            name = found.listed.get(urlsplit(one.url).port or 0, "")
            engine = listed.get(name) or in_pod(complete(Engine(url=one.url), self._config), self._pod)
            seen.add(engine.name)
            if one.tensor_parallel is not None:  # its whole command line is to be seen
                self._told.add(engine.name)
            self._add(engine, one, found.facts.get(engine.name, {}))
        for name in (found.facts.keys() & listed.keys()) - seen:  # config names its process
            facts = self._facts(listed[name], found.facts[name])
            self.abouts[name] = self.abouts[name]._replace(facts=facts)
        for name in [name for name in self._pages if name not in seen and name not in listed]:
            self._absent[name] = self._absent.get(name, 0) + 1
            # one that is merely too busy to answer a look has a process still
            is_gone = self._absent[name] >= GONE_LOOKS and _is_gone(self._pids.get(name))
            if is_gone or urlsplit(self._pages[name].url).port in found.listed:  # config has named it since
                self._drop(name)
        for name in seen:
            self._absent.pop(name, None)
        self._take_pages(found)
        self._take_mounts(found.mounts)
        return before != self._set()

    def _take_config(self, config: Config) -> None:
        """Read what files of targets name now, and no more what they name no more."""
        before, self._config = self._config, config
        if before == config:
            return
        was, now = _by_name(before), _by_name(config)
        for name in [name for name in {**was, **now} if was.get(name) != now.get(name)]:
            if name in self._pages:
                self._drop(name)
            if name in self._side:
                self._drop_page(name)
        for engine in config.engines:
            if was.get(engine.name) != engine:
                self._given[engine.name] = given_facts(engine)
                self._add(engine, None)
        for page in config.pages:
            self._add_page(page)

    def _set(self) -> tuple[object, ...]:
        return self.may_hang, self.prompt, dict(self._pids)

    def _take_pages(self, found: Found) -> None:
        """Read what discovery found beside the engines, and forget what it finds no more."""
        seen = {page.name for page in self._config.pages}
        for one in found.pages:
            seen.add(one.name)
            self._add_page(Page(url=one.url))
        for name in [name for name in self._side if name not in seen]:
            self._absent[name] = self._absent.get(name, 0) + 1
            if self._absent[name] >= GONE_LOOKS or name in found.listed_pages:
                self._drop_page(name)
        for name in seen:
            self._absent.pop(name, None)

    def _take_mounts(self, mounts: Mapping[MountKey, Collector]) -> None:
        """Count at the mounts of this look; one that is seen as before goes on with its own collector."""
        self._mounts = {key: self._mounts.get(key, collector) for key, collector in mounts.items()}

    def _add_page(self, page: Page) -> None:
        page = complete_page(page)
        if page.name not in self._side:
            endpoint = self._endpoint(f"page {page.name}", page.url, page.access)
            # a GPU that NVML counts is not counted from an exporter's page as well
            counted: tuple[Kind, ...] = ("gpu",) if self._nvml is not None else ()
            # those that config names, else by the connectors of the engines that are known by then
            given = page.engines
            serves = (lambda _: given) if given else (lambda sources: served_by(sources, self._connectors()))
            self._side[page.name] = SidePage(page.name, endpoint, serves, leave_out=counted)

    def _endpoint(self, who: str, url: str, access: Access) -> Endpoint:
        try:
            return Endpoint(
                url,
                timeout_seconds=self._config.scrape.timeout_seconds,
                max_bytes=PAGE_BYTES,
                access=access.for_endpoint(),
            )
        except ValueError as error:
            raise ConfigError(who, str(error), "see docs/configuration.md, [[engine]] and [[page]]") from error

    def _add(self, engine: Engine, found: FoundEngine | None, told: Mapping[str, str] = {}) -> None:
        name = engine.name
        if name not in self._pages:
            endpoint = self._endpoint(f"engine {name}", engine.url, engine.access)
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
        return {**self._given.get(engine.name, {}), **told, **by_hand(engine)}

    def _drop(self, name: str) -> None:
        """Forget an engine that nobody names or finds any more; its counters stay in the ledger for its return.

        Its page may be read at this moment, by a thread that closes it.
        """
        del self._pages[name]
        self._told.discard(name)
        for kept in (self._processes, self._pids, self._absent, self._given, self.abouts):
            kept.pop(name, None)

    def _drop_page(self, name: str) -> None:
        del self._side[name]
        self._absent.pop(name, None)

    def _connectors(self) -> dict[str, str | None]:
        """The KV connector of every engine: "" for one that has none, None where that is not to be seen."""
        found: dict[str, str | None] = {}
        for name, page in self._pages.items():
            told = self.abouts[name].facts.get("connector", "")
            is_told = told not in {"", "MultiConnector"} or (not told and name in self._told)
            found[name] = told if is_told or "vllm" not in page.sources else None
        return found

    def _pid_of(self, name: str) -> Callable[[], int | None]:
        return lambda: self._pids.get(name)

    def close(self) -> None:
        """Close every connection and NVML, where no Gatherer reads them: it closes what it has read itself."""
        pages: tuple[EnginePage | SidePage, ...] = (*self._pages.values(), *self._side.values())
        for page in pages:
            page.close()
        if self._nvml is not None:
            self._nvml.close()


# connectors that keep their KV in a source, by the beginning of the class name
_CONNECTORS = {"lmcache": "LMCacheConnector", "lmcache_mp": "LMCacheMP", "mooncake": "Mooncake", "kvbm": "Dynamo"}


def served_by(sources: Iterable[str], connectors: Mapping[str, str | None]) -> tuple[str, ...]:
    """Names of the engines that the caches of a page serve, by the connectors of all engines; None: not known.

    Those whose connector is one of the caches'. Where there is none, the only engine whose connector nobody knows: of
    two, a guess would split the tokens of one by the lookups of the other.
    """
    wanted = tuple(_CONNECTORS[source] for source in sources if source in _CONNECTORS)
    if not wanted:
        return ()
    sure = sorted(name for name, connector in connectors.items() if connector and connector.startswith(wanted))
    unknown = [name for name, connector in connectors.items() if connector is None]
    return tuple(sure) if sure or len(unknown) > 1 else tuple(unknown)


def keeps_kv(sources: Iterable[str]) -> bool:
    """Whether a page with these sources is a cache's that engines reach by a connector."""
    return any(source in _CONNECTORS for source in sources)


def _by_name(config: Config) -> dict[str, Engine | Page]:
    listed: tuple[Engine | Page, ...] = (*config.engines, *config.pages)
    return {one.name: one for one in listed}


def _is_gone(pid: int | None) -> bool:
    return pid is not None and not os.path.exists(f"/proc/{pid}")  # noqa: PTH110  # one call


def given_facts(engine: Engine) -> dict[str, str]:
    """What the file tells that config names; ConfigError where there is no model's config."""
    facts = facts_of_process(None, model_config=engine.model_config) if engine.model_config else {}
    if engine.model_config and not facts:
        reason = f"model_config: {engine.model_config} is no config.json of a model, and no folder that holds one"
        raise ConfigError(f"engine {engine.name}", reason, "name the file that lies beside the model's weights")
    return facts


def by_hand(engine: Engine) -> dict[str, str]:
    """What config itself says of how an engine is run."""
    told = {"connector": engine.connector} if engine.connector else {}
    return told if engine.token_budget is None else {**told, "token_budget": str(engine.token_budget)}


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
        engine.role,
        engine.group,
    )
