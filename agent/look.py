"""A look around this host: the engines that serve here, what runs beside them, and what files say of others."""

from __future__ import annotations

import os
import socket
from contextlib import closing
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

import msgspec

from kvtally.agent.engine_process import facts_of_process
from kvtally.agent.kubernetes import in_pod_of_its_own, pod_of
from kvtally.agent.target_files import TargetFiles
from kvtally.collectors.base import CollectError, Collector, NoData
from kvtally.collectors.http import Endpoint, OtherStatus

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from kvtally.agent.config import Config
    from kvtally.agent.discovery import FoundEngine, FoundPage
    from kvtally.collectors.base import Reading
    from kvtally.collectors.kv_mount import KvMount
    from kvtally.collectors.nvml import NvmlCollector

    MountKey = tuple[int | None, tuple[str, ...]]

PROBE_SECONDS = 1.0
PAGE_BYTES = 8 * 2**20  # of one engine: 64 ranks on a page take 6 MiB, and many bad pages may come at once


class Found(NamedTuple):
    """What a look around this host found.

    gpu_indices  UUIDs of its GPUs in the order of their indices; None where they could not be read
    listed       ports of this host that config lists, under whatever address -> the name of the engine there
    facts        what their processes and their models' files tell of engines, by the engine's name
    pages        pages of this host that are no engine's and that config does not list
    listed_pages  names that these would have which config lists
    mounts       collectors of the mounts that hold KV cache, by the process that sees them (None: we) and its folders
    config       the config with what files of targets name; None where no files are to be read
    complaints   about these files, those that the look before did not have
    """

    engines: tuple[FoundEngine, ...]
    gpu_indices: tuple[str, ...] | None
    listed: Mapping[int, str] = {}
    facts: Mapping[str, Mapping[str, str]] = {}
    pages: tuple[FoundPage, ...] = ()
    listed_pages: frozenset[str] = frozenset()
    mounts: Mapping[MountKey, Collector] = {}
    config: Config | None = None
    complaints: tuple[str, ...] = ()


def probe(url: str) -> bytes | None:
    """The body of a page, b"" where a server answers with another status than 200, or None."""
    try:
        with closing(Endpoint(url, timeout_seconds=PROBE_SECONDS, max_bytes=PAGE_BYTES)) as endpoint:
            return endpoint.get().body
    except OtherStatus:
        return b""
    except (CollectError, ValueError):
        return None


def look_around(config: Config, nvml: NvmlCollector | None, files: TargetFiles | None = None) -> Found:
    """Find engines on this host and the GPUs that they hold; bounded by a second per page of a listening port.

    `files` are those of `scrape.file_sd`, kept from one look to the next.
    """
    from kvtally.agent.discovery import find  # noqa: PLC0415  # `probe` and `open_nvml` need none of it

    complaints: tuple[str, ...] = ()
    if config.scrape.file_sd:
        named = (files or TargetFiles(config)).look()
        complaints = named.complaints
        config = msgspec.structs.replace(
            config, engines=(*config.engines, *named.engines), pages=(*config.pages, *named.pages)
        )
    gpus = _gpus(nvml)
    listed = {port: engine.name for engine in config.engines if (port := _local_port(engine.url)) is not None}
    own = {port for page in config.pages if (port := _local_port(page.url)) is not None}
    wanted = {*listed, *(config.scrape.ports if config.scrape.discover else ())}
    engines, pages = find(
        sorted(wanted | own),
        probe,
        listed_engines=listed,
        listed_pages=own,
        gpu_uuids_by_index=gpus.by_index,
        compute_pids=gpus.compute_pids,
        mig_instances=gpus.instances,
        gpu_uuids_by_minor=gpus.by_minor,
    )
    # a port that config lists for a page is asked for the folders of its server alone
    engines = tuple(one for one in engines if _port(one) in wanted)
    return Found(
        engines,
        gpus.by_index,
        listed,
        _told(config, engines, listed),
        tuple(page for page in pages if _port(page) not in own),
        frozenset(page.name for page in pages if _port(page) in own),
        mounts_of(_folders(config, engines, pages, listed), config.storage.mmpmon) if config.storage.enabled else {},
        config if config.scrape.file_sd else None,
        complaints,
    )


class _Gpus(NamedTuple):
    """What NVML tells of the GPUs of this host; None for what it does not."""

    by_index: tuple[str, ...] | None = None
    compute_pids: Mapping[str, Sequence[int]] | None = None
    instances: Mapping[str, Sequence[str]] = {}
    by_minor: Mapping[int, str] = {}


def _gpus(nvml: NvmlCollector | None) -> _Gpus:
    if nvml is None:
        return _Gpus()
    try:
        readings = nvml.collect()
        pids = nvml.compute_pids()
        minors = nvml.minor_numbers()
    except (NoData, CollectError):
        return _Gpus()
    whole = [reading for reading in readings if "parent" not in reading.attributes]
    instances: dict[str, list[str]] = {one.name: [] for one in whole if one.attributes.get("mig") == "1"}
    for reading in readings:
        if (parent := reading.attributes.get("parent")) in instances:
            instances[parent].append(reading.name)
    by_index = sorted((int(reading.attributes["index"]), reading.name) for reading in whole)
    by_minor = {minor: uuid for uuid, minor in minors.items()}
    return _Gpus(tuple(name for _, name in by_index), pids, instances, by_minor)


def _folders(
    config: Config, found: Sequence[FoundEngine], pages: Sequence[FoundPage], listed: Mapping[int, str]
) -> list[tuple[int | None, Sequence[str]]]:
    """Folders of KV with the process that names them, an engine's or a cache server's; None where it is not seen."""
    servers: tuple[FoundEngine | FoundPage, ...] = (*found, *pages)
    pids = {listed.get(_port(one), one.name): one.pid for one in found}
    named = [(engine.pid or pids.get(engine.name), engine.kv_paths) for engine in config.engines]
    return [*((one.pid, one.kv_paths) for one in servers), *named]


def mounts_of(
    folders: Iterable[tuple[int | None, Sequence[str]]], mmpmon: str, proc: str = "/proc", sys: str = "/sys"
) -> dict[MountKey, Collector]:
    """Collectors of the filesystems under folders as processes see them, None for ours; each filesystem once.

    Looked up beside the ticks, since a path on a server that is gone may hang.
    """
    own = _namespace(None, proc)
    seen: dict[str, tuple[int | None, list[str]]] = {}
    for pid, paths in folders:
        if paths:
            space = _namespace(pid, proc)
            seen.setdefault(space, (None if space == own else pid, []))[1].extend(paths)
    if not seen:
        return {}
    from kvtally.collectors.kv_mount import collectors_for  # noqa: PLC0415  # not loaded where no KV lies on storage

    mounts: dict[MountKey, Collector] = {}
    counted: set[str] = set()
    # our own view first, and the same order at every look: a name stays with its filesystem
    for pid, paths in sorted(seen.values(), key=lambda one: one[0] or 0):
        for mount in collectors_for(paths, pid, proc, sys, mmpmon):
            if mount.filesystem not in counted:
                mounts[pid, mount.paths] = SeenMount(mount, pid)
            counted |= {mount.filesystem} - {""}
    return mounts


class SeenMount:
    """A mount under a source's name that stays, and that no other mount namespace has: there, too, may be a /kv.

    pid   a process of another mount namespace, in which the mount is seen; None for ours
    """

    def __init__(self, mount: KvMount, pid: int | None) -> None:
        place = "" if pid is None else f" ({mount.filesystem or f'of process {pid}'})"
        self.source = f"{mount.source}{place}"
        self._mount = mount
        self._is_ours = pid is None

    def collect(self) -> tuple[Reading, ...]:
        """Read now; what KvMount raises."""
        readings = self._mount.collect()
        return readings if self._is_ours else tuple(_with_device(reading) for reading in readings)


def _with_device(reading: Reading) -> Reading:
    """A reading that is named by its mount point, named by what is mounted there too: no process' name would stay."""
    device = reading.attributes.get("device") or reading.attributes.get("devices")
    return reading._replace(name=f"{reading.name} ({device})") if device and reading.name.startswith("/") else reading


def _namespace(pid: int | None, proc: str) -> str:
    """What processes that see the same mounts have in common; of one that is hidden, its own number."""
    who = "self" if pid is None else str(pid)
    try:
        return os.readlink(f"{proc}/{who}/ns/mnt")  # noqa: PTH115  # a link to no path
    except OSError:
        return f"process {who}"


def _port(one: FoundEngine | FoundPage) -> int:
    return urlsplit(one.url).port or 0


def _told(config: Config, found: Sequence[FoundEngine], listed: Mapping[int, str]) -> dict[str, dict[str, str]]:
    """How engines are run: those that were found, and those whose process config names."""
    pids = {listed.get(_port(one), one.name): one.command_pid for one in found}
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


def _are_others(unheld: str) -> bool:
    """Whether GPUs that no engine here holds are somebody else's: NVML shows a pod those of its whole node."""
    return unheld == "others" or (unheld == "auto" and in_pod_of_its_own(pod_of(os.environ)))


def open_nvml(config: Config) -> NvmlCollector | None:
    """The GPUs of this host; None without a driver, or where config switches them off."""
    if not config.gpu.enabled:
        return None
    from kvtally.collectors.nvml import NvmlCollector  # noqa: PLC0415  # pynvml is loaded where there is a driver

    nvml = NvmlCollector(
        energy_every_seconds=config.gpu.energy_every_seconds,
        gpm_every_seconds=config.gpu.gpm_every_seconds,
        shown="node" if _are_others(config.gpu.unheld) else "",
    )
    try:
        nvml.compute_pids()
    except NoData:
        return None
    except CollectError:
        pass  # a driver that does not answer now may do so later; every tick says what is wrong
    return nvml
