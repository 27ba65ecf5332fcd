"""Finds the engines that serve on this host, and the pages of their caches: listening ports, processes, GPUs."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from kvtally.agent import engine_command, placement
from kvtally.agent.device_nodes import Nodes, nodes_of
from kvtally.collectors.bounded_file import read_bounded
from kvtally.collectors.host import descendants, parents
from kvtally.collectors.registry import SOURCES, sources_on

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

    from kvtally.agent.placement import Host

LISTENING = "0A"
PATH = "/metrics"
PATH_OF_TENSORRT_LLM = "/prometheus/metrics"  # its /metrics is JSON of another kind
BIRTH = re.compile(rb"^vllm[:_]prompt_tokens_created.*", re.MULTILINE)  # the same on every port that shows an engine
CONFIG_BYTES = 64 << 10  # of LMCache's file
UNSEEN = "its process is not to be seen here: it needs the same user or root, and the same PID namespace"


class FoundEngine(NamedTuple):
    """One engine that answers here.

    url                its page, "http://127.0.0.1:8000/metrics"; of one that config lists and that wants TLS,
                       credentials or another path, the port alone is sure
    name               "127.0.0.1:8000"
    pid                root of its process tree, None where it is not to be seen
    gpus               UUIDs in the order of its ranks; () for none, None for unknown
    gpu_evidence       what decided, or why nothing did
    data_parallel      ranks that this server runs here and shows apart; they split `gpus` in order
    logs_scrapes       whether it writes a line for every scrape; None where its command line is not to be seen
    kv_paths           directories of its KV cache tiers, as the engine's own mount namespace names them
    command_pid        the process whose command line tells how it is run: `pid`, or the supervisor above it where
                       that shows a title; None where neither is to be seen
    """

    url: str
    name: str
    pid: int | None
    version: str | None
    engine_kind: str
    gpus: tuple[str, ...] | None
    gpu_evidence: str
    tensor_parallel: int | None
    pipeline_parallel: int | None
    kv_paths: tuple[str, ...]
    data_parallel: int | None = None
    logs_scrapes: bool | None = None
    command_pid: int | None = None


class FoundPage(NamedTuple):
    """A page of this host that is no engine's.

    sources     that it shows (kvtally.collectors.registry); none of one that config lists and that is not shown to us
    pid         of its server, None where that is not to be seen
    kv_paths    directories of KV that the server's command line names, in its own mount namespace
    """

    url: str
    name: str
    sources: tuple[str, ...]
    pid: int | None = None
    kv_paths: tuple[str, ...] = ()


class Discovered(NamedTuple):
    """What answers on the ports that were asked, in their order."""

    engines: tuple[FoundEngine, ...]
    pages: tuple[FoundPage, ...]


class Listener(NamedTuple):
    """A listening port: the hosts to try it by, and the inodes of its sockets."""

    port: int
    hosts: tuple[str, ...]
    inodes: frozenset[str]


class _Server(NamedTuple):
    """Who is behind a port."""

    holder: int | None = None  # the process that serves it
    root: int | None = None  # the topmost process of the engine
    is_engine: bool = False  # by its command line
    stranger: str = ""  # the program that holds the port, where it is no engine


class _Answer(NamedTuple):
    """An engine's page was served here; `birth` is the same on every port that shows the same engine."""

    port: int
    host: str
    path: str
    kind: str
    version: str | None
    birth: bytes
    server: _Server


def find(
    ports: Iterable[int],
    probe: Callable[[str], bytes | None],
    proc: str = "/proc",
    *,
    listed_engines: Collection[int] = (),
    listed_pages: Collection[int] = (),
    gpu_uuids_by_index: Sequence[str] | None = None,
    compute_pids: Mapping[str, Sequence[int]] | None = None,
    mig_instances: Mapping[str, Sequence[str]] | None = None,
    gpu_uuids_by_minor: Mapping[int, str] | None = None,
) -> Discovered:
    """Find the engines on these ports and map each to its GPUs, and the other pages that kvtally reads.

    `probe` gives the body of a URL, b"" where another status than 200 is the answer, or None, within its own time-out.
    What serves a port that config lists is described by its process where the probe has no page of it. What is known
    of GPUs is NVML's; None where there is no NVML, which is not the same as no GPU.
    """
    processes = _Processes(proc)
    listed = {*listed_engines, *listed_pages}
    asked = [
        _ask(listener, probe, processes) or _listed(listener, listed_engines, listed_pages, processes)
        for listener in listeners(ports, proc, listed)
    ]
    answers = _each_engine_once([answer for answer in asked if isinstance(answer, _Answer)])
    has_own_pids = bool(compute_pids) and not placement.numbers_as_host(proc)
    host = placement.Host(
        gpu_uuids_by_index,
        {} if has_own_pids else compute_pids or {},
        placement.accelerator_driver(proc),
        mig_instances or {},
        has_own_pids,
        gpu_uuids_by_minor or {},
    )
    roots = [answer.server.root for answer in answers]
    engines = tuple(
        _engine(
            answer, processes, host, shares_root=roots.count(answer.server.root) > 1, is_only_engine=len(answers) == 1
        )
        for answer in answers
    )
    return Discovered(engines, tuple(page for page in asked if isinstance(page, FoundPage)))


#   sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
#    0: 0100007F:1F40 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 48213 1 ...
def listeners(ports: Iterable[int], proc: str = "/proc", listed: Collection[int] = ()) -> list[Listener]:
    """Which of the ports listen on loopback or on every address; all of them where the kernel does not tell.

    Those that config lists are found at another address of this host, too, and have no hosts to try there.
    """
    wanted = dict.fromkeys(ports)
    try:
        sockets = list(_listening(Path(proc, "net", "tcp")))
    except OSError:
        return [Listener(port, ("127.0.0.1", "[::1]"), frozenset()) for port in wanted]
    with contextlib.suppress(OSError):  # IPv6 may be off
        sockets += _listening(Path(proc, "net", "tcp6"))
    found = []
    for port in wanted:
        everywhere = [(hosts, inode) for hosts, bound, inode in sockets if bound == port]
        # of several addresses with one port nobody knows which one config means
        is_listed = port in listed and len(everywhere) == 1
        here = [one for one in everywhere if one[0]] or (everywhere if is_listed else [])
        # an IPv4 socket answers first; one bound to [::] may take IPv4 as well
        hosts = dict.fromkeys(host for hosts, _ in sorted(here) for host in hosts)
        if here:
            found.append(Listener(port, tuple(hosts), frozenset(inode for _, inode in here)))
    return found


def _listening(table: Path) -> Iterator[tuple[tuple[str, ...], int, str]]:
    """Hosts to try, port and inode of every socket of one table that listens; no hosts where that is not locally."""
    with table.open(encoding="ascii") as lines:
        next(lines, None)
        for line in lines:
            fields = line.split()
            if fields[3] != LISTENING:
                continue
            address, _, port = fields[1].partition(":")
            yield _hosts(address), int(port, 16), fields[9]


def _hosts(address: str) -> tuple[str, ...]:
    """Where to reach a socket bound to this address: words of 32 bits in the machine's byte order."""
    words = [int(address[start : start + 8], 16).to_bytes(4, sys.byteorder) for start in range(0, len(address), 8)]
    packed = b"".join(words)
    if packed == bytes(16):
        return ("127.0.0.1", "[::1]")
    if packed == bytes(15) + b"\x01":
        return ("[::1]",)
    if packed[:12] == bytes(10) + b"\xff\xff":
        packed = packed[12:]
    if packed == bytes(4):
        return ("127.0.0.1",)
    return (".".join(map(str, packed)),) if len(packed) == 4 and packed[0] == 127 else ()  # noqa: PLR2004  # 127.0.0.0/8


def _ask(listener: Listener, probe: Callable[[str], bytes | None], processes: _Processes) -> _Answer | FoundPage | None:
    """Ask a port for a page that is read, and where it is an engine's the kernel for the process behind it."""
    for host in listener.hosts:
        path, page = PATH, probe(f"http://{host}:{listener.port}{PATH}")
        shown: tuple[str, ...] = ()
        if page is not None and not (shown := sources_on(page)):
            path, page = PATH_OF_TENSORRT_LLM, probe(f"http://{host}:{listener.port}{PATH_OF_TENSORRT_LLM}")
            shown = () if page is None else sources_on(page)
        if page is None or not shown:
            continue
        kind = next((name for name in shown if SOURCES[name].is_engine), None)
        if kind is None:
            return _page(f"{host}:{listener.port}", path, shown, processes.behind(listener.inodes), processes)
        version = version_told(probe(f"http://{host}:{listener.port}/version"))
        birth = b"\n".join(BIRTH.findall(page))
        return _Answer(listener.port, host, path, kind, version, birth, processes.behind(listener.inodes))
    return None


def _listed(
    listener: Listener, engines: Collection[int], pages: Collection[int], processes: _Processes
) -> _Answer | FoundPage | None:
    """Who serves what config lists at this port, whose page wants TLS, credentials, a path of its own or more time."""
    if not listener.inodes:
        return None
    host = next(iter(listener.hosts), "127.0.0.1")
    server = processes.behind(listener.inodes)
    if listener.port in engines:
        kind = engine_command.engine_of(processes.told(server.root)[0])
        return _Answer(listener.port, host, PATH, kind, None, b"", server)
    if listener.port in pages:
        return _page(f"{host}:{listener.port}", PATH, (), server, processes)
    return None


def _page(name: str, path: str, shown: tuple[str, ...], server: _Server, processes: _Processes) -> FoundPage:
    """Describe a page that is no engine's by the process that serves it."""
    return FoundPage(f"http://{name}{path}", name, shown, server.holder, processes.kv_paths(server.holder))


# GET /version -> {"version":"0.25.1"}
def version_told(body: bytes | None) -> str | None:
    """Which version an engine's answer names; None for no answer, and for one that names none."""
    try:
        answer = msgspec.json.decode(body or b"")
    except msgspec.DecodeError:
        return None
    version = answer.get("version") if isinstance(answer, dict) else None
    return version if isinstance(version, str) else None


def _each_engine_once(answers: list[_Answer]) -> list[_Answer]:
    """Drop a proxy's copy of an engine's page: keep the port whose process is an engine, else the highest.

    A proxy takes the well-known port and moves the engine to another.
    """

    def rank(answer: _Answer) -> tuple[bool, bool, int]:
        return answer.server.is_engine, answer.server.root is not None, answer.port

    kept: dict[object, _Answer] = {}
    for answer in sorted(answers, key=rank):
        kept[answer.birth or answer.port] = answer
    return [answer for answer in answers if kept[answer.birth or answer.port] is answer]


def _engine(
    answer: _Answer, processes: _Processes, host: Host, *, shares_root: bool, is_only_engine: bool
) -> FoundEngine:
    """Describe one engine. Servers below one root (a data-parallel supervisor) are each their own process tree."""
    server = answer.server
    root = server.holder if shares_root else server.root
    arguments, environment = processes.told(root)
    needed = engine_command.sizes(arguments)
    command_pid = root
    if shares_root and server.root is not None and engine_command.is_title(arguments):
        command_pid = server.root
        needed = engine_command.sizes(processes.arguments(command_pid))._replace(data=1)
    if answer.version is not None and answer.version.endswith("+cpu"):
        where = placement.Placement((), f"a CPU build of vLLM, {answer.version}")
    elif server.stranger:
        where = placement.Placement(None, f"mapping unknown: {server.stranger} holds the port, no engine of this host")
    else:
        tree = processes.tree(root)
        nodes = processes.nodes(tree) if host.minors else Nodes()
        where = placement.place(needed, environment, tree, host, nodes, is_only_engine=is_only_engine)
        if where.gpus is None and root is None:
            where = where._replace(evidence=f"{where.evidence}; {UNSEEN}")
    # the pages of other engines add up what their ranks count
    ranks = needed.data if answer.kind == "vllm" else 1
    return FoundEngine(
        url=f"http://{answer.host}:{answer.port}{answer.path}",
        name=f"{answer.host}:{answer.port}",
        pid=root,
        version=answer.version,
        engine_kind=answer.kind,
        gpus=where.gpus,
        gpu_evidence=where.evidence,
        tensor_parallel=needed.tensor,
        pipeline_parallel=needed.pipeline,
        kv_paths=processes.kv_paths(root),
        data_parallel=None if needed.gpus is None else ranks,
        logs_scrapes=engine_command.logs_scrapes(arguments),
        command_pid=command_pid,
    )


class _Processes:
    """The processes of this host, as they were when first asked for."""

    def __init__(self, proc: str) -> None:
        self._proc = proc
        self._parents = parents(proc)

    def behind(self, inodes: frozenset[str]) -> _Server:
        """Who holds these sockets. Children inherit a server's socket: its holder is the topmost of them."""
        holders = self._holders(inodes)
        holder = min((pid for pid in holders if self._parents.get(pid) not in holders), default=None)
        if holder is None:
            return _Server()
        root = self._root(holder)
        if root is not None:
            return _Server(holder, root, is_engine=True)
        arguments = self.arguments(holder)
        program = PurePosixPath(arguments[0]).name if arguments else "a process without a command line"
        if program == "docker-proxy":
            contained = self._in_container(arguments)
            return _Server(stranger=program) if contained is None else _Server(contained, contained, is_engine=True)
        below = (pid for pid in self.tree(holder) if engine_command.engine_of(self.arguments(pid)))
        if program.startswith("python") or next(below, None) is not None:
            return _Server(holder, holder)  # an engine inside a program of somebody's own
        return _Server(stranger=program)

    def arguments(self, pid: int) -> tuple[str, ...]:
        """Command line of a process; empty where it may not be read."""
        return tuple(self._strings(pid, "cmdline"))

    def environment(self, pid: int) -> dict[str, str]:
        """The few variables that place an engine; nothing else leaves here."""
        pairs = (text.partition("=") for text in self._strings(pid, "environ"))
        return {name: value for name, _, value in pairs if name in engine_command.VARIABLES}

    def told(self, pid: int | None) -> tuple[tuple[str, ...], dict[str, str]]:
        """Both of a process that may be unknown."""
        return ((), {}) if pid is None else (self.arguments(pid), self.environment(pid))

    def kv_paths(self, pid: int | None) -> tuple[str, ...]:
        """Directories of KV that a process' command line, environment or file of LMCache's settings names."""
        arguments, environment = self.told(pid)
        config = environment.get(engine_command.LMCACHE_FILE, "")
        content = b""
        if config:
            place = f"{self._proc}/{pid}/{'root' if config.startswith('/') else 'cwd/'}{config}"
            with contextlib.suppress(OSError):
                content = read_bounded(place, CONFIG_BYTES)[1]
        return engine_command.kv_paths(arguments, environment, content.decode("utf-8", "replace"))

    def tree(self, root: int | None) -> list[int]:
        """A process and all below it."""
        return [] if root is None else descendants(root, self._parents)

    def nodes(self, tree: Sequence[int]) -> Nodes:
        """Device nodes of GPUs that a process tree has open and sees."""
        return nodes_of(tree, self._proc)

    def _content(self, pid: int, file: str) -> bytes:
        try:
            return Path(self._proc, str(pid), file).read_bytes()
        except OSError:
            return b""

    def _strings(self, pid: int, file: str) -> list[str]:
        content = self._content(pid, file).removesuffix(b"\0")
        return [word.decode("utf-8", "replace") for word in content.split(b"\0")] if content else []

    def _root(self, pid: int) -> int | None:
        """The topmost of a process and its ancestors whose command line is an engine's."""
        root, seen = None, set[int]()
        while pid in self._parents and pid not in seen:
            seen.add(pid)
            if engine_command.engine_of(self.arguments(pid)):
                root = pid
            pid = self._parents[pid]
        return root

    def _holders(self, inodes: frozenset[str]) -> set[int]:
        names = {f"socket:[{inode}]" for inode in inodes}
        return {pid for pid in self._parents if names and not names.isdisjoint(self._descriptors(pid))}

    def _descriptors(self, pid: int) -> Iterator[str]:
        folder = f"{self._proc}/{pid}/fd"
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    yield os.readlink(entry.path)  # noqa: PTH115  # thousands of them: no Path objects
        except OSError:
            return

    # docker-proxy -proto tcp -host-ip 0.0.0.0 -host-port 8000 -container-ip 172.17.0.2 -container-port 8000
    def _in_container(self, proxy: Sequence[str]) -> int | None:
        """The engine behind a published port: the one root in the network namespace of the container's address."""
        address = engine_command.options(proxy).get("-container-ip", "none")
        pattern = re.compile(rb"-- %b\s" % re.escape(address.encode()))
        engines = (pid for pid in self._parents if engine_command.engine_of(self.arguments(pid)))
        roots = {self._root(pid) for pid in engines if pattern.search(self._content(pid, "net/fib_trie"))}
        return roots.pop() if len(roots) == 1 else None
