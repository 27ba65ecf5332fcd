from __future__ import annotations

import os
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pytest
from msgspec.structs import replace
from tests.loopback import FakeEngine, Server, answer

from kvtally.agent.config import Config, Engine, Gpu, Host, Page, Scrape, Storage, complete, complete_page
from kvtally.agent.look import PAGE_BYTES, _gpus, _local_port, look_around, mounts_of, open_nvml, probe
from kvtally.agent.target_files import TargetFiles
from kvtally.collectors.base import CollectError, NoData, Reading

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from kvtally.collectors.nvml import NvmlCollector

LMCACHE_MP = next((Path(__file__).parent / "fixtures" / "pages" / "lmcache-mp-056").glob("*.prom")).read_bytes()
NOTHING = Host(processes=False, disks=False, cgroup=False)
OWN, ENGINES, OTHERS = "mnt:[4026531841]", "mnt:[4026532700]", "mnt:[4026532701]"
ROOT = "27 1 254:1 / / rw - ext4 /dev/vda1 rw\n"
DISKSTATS = """\
 254       1 vda1 10 0 100 1000 20 0 200 2000 0 0 0
 259       0 nvme0n1 5 0 50 500 6 0 60 600 0 0 0
 259       1 nvme1n1 7 0 70 700 8 0 80 800 0 0 0
"""


def config_of(*engines: Engine, pages: tuple[Page, ...] = (), **tables: object) -> Config:
    config = replace(Config(gpu=Gpu(enabled=False), host=NOTHING), **tables)
    engines = tuple(complete(engine, config) for engine in engines)
    return replace(config, engines=engines, pages=tuple(complete_page(page) for page in pages))


class FakeNvml:
    """Two GPUs, listed against their order, one of them cut; or a driver that does not answer."""

    def __init__(self, fault: Exception | None = None) -> None:
        self._fault = fault

    def collect(self) -> tuple[Reading, ...]:
        if self._fault is not None:
            raise self._fault
        whole = [Reading("gpu", f"GPU-{index}", {"index": str(index)}, ()) for index in (10, 2)]
        return (*whole, Reading("gpu", "MIG-a", {"index": "0", "parent": "GPU-2"}, ()))

    def compute_pids(self) -> Mapping[str, Sequence[int]]:
        return {"GPU-2": [os.getpid()]}

    def minor_numbers(self) -> Mapping[str, int]:
        return {"GPU-2": 4, "GPU-10": 0}


def nvml(fault: Exception | None = None) -> NvmlCollector:
    return FakeNvml(fault)  # type: ignore[return-value]  # the part of it that is asked


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    with FakeEngine() as one:
        yield one


@pytest.fixture
def cache() -> Iterator[Server]:
    """The metrics page of an LMCache server, in this process."""

    def talk(connection: socket.socket, target: str) -> bool:
        connection.sendall(answer(LMCACHE_MP) if target == "/metrics" else answer(b"", "404 Not Found"))
        return True

    with Server(talk) as one:
        yield one


def port_of(engine: FakeEngine) -> int:
    return int(engine.name.rpartition(":")[2])


@contextmanager
def serving(page: Path, *words: str) -> Iterator[int]:
    """A process with these words behind its program that serves a page; its port."""
    program = (
        "import http.server, pathlib, sys\n"
        "page = pathlib.Path(sys.argv[1]).read_bytes()\n"
        "class One(http.server.BaseHTTPRequestHandler):\n"
        "    def do_GET(self):\n"
        "        self.send_response(200)\n"
        "        self.end_headers()\n"
        "        self.wfile.write(page)\n"
        "    def log_message(self, *_):\n"
        "        pass\n"
        "server = http.server.HTTPServer(('127.0.0.1', 0), One)\n"
        "print(server.server_port, flush=True)\n"
        "server.serve_forever()\n"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(page), *words], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        yield int(process.stdout.readline())
        process.kill()


@pytest.mark.parametrize(
    ("url", "port"),
    [
        ("http://127.0.0.1:8000/metrics", 8000),
        ("http://localhost:8000/metrics", 8000),
        ("http://127.1.2.3/metrics", 80),
        ("https://127.0.0.1/metrics", 443),
        ("http://192.0.2.1:8000/metrics", None),  # of nobody: kept for documentation
        ("http://256.0.0.1:8000/metrics", None),
    ],
)
def test_a_port_is_of_this_host_or_of_another(url: str, port: int | None) -> None:
    assert _local_port(url) == port


def test_the_own_address_of_this_host_is_this_host() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams:
        try:
            datagrams.connect(("192.0.2.1", 9))
        except OSError:
            own = "127.0.0.1"  # a machine without a network has no other
        else:
            own = datagrams.getsockname()[0]
    assert _local_port(f"http://{own}:8000/metrics") == 8000


def test_a_look_tells_which_process_serves_and_which_ports_config_lists(engine: FakeEngine) -> None:
    config = config_of(Engine(url=f"http://{engine.name}", name="mine"), scrape=Scrape(discover=False))
    look = look_around(config, None)
    (one,) = look.engines
    assert (one.name, one.pid, one.version) == (engine.name, os.getpid(), "0.32.0")
    assert look.gpu_indices is None
    assert look.listed == {port_of(engine): "mine"}


def test_nothing_is_looked_for_where_discovery_is_off(engine: FakeEngine) -> None:
    ports = (port_of(engine),)
    assert look_around(config_of(scrape=Scrape(discover=False, ports=ports)), None).engines == ()
    assert len(look_around(config_of(scrape=Scrape(discover=True, ports=ports)), None).engines) == 1


def test_a_look_lists_gpus_in_the_order_of_their_indices() -> None:
    assert look_around(config_of(scrape=Scrape(discover=False)), nvml()).gpu_indices == ("GPU-2", "GPU-10")


def test_a_look_joins_device_nodes_to_gpus_by_their_minor_numbers() -> None:
    assert _gpus(nvml()).by_minor == {4: "GPU-2", 0: "GPU-10"}
    assert _gpus(nvml(NoData("no driver"))).by_minor == {}


@pytest.mark.parametrize("fault", [NoData("no driver"), CollectError("the driver does not answer")])
def test_a_look_without_gpus_finds_engines_all_the_same(engine: FakeEngine, fault: Exception) -> None:
    look = look_around(config_of(scrape=Scrape(discover=True, ports=(port_of(engine),))), nvml(fault))
    assert look.gpu_indices is None
    assert [one.name for one in look.engines] == [engine.name]


def test_a_probe_gives_the_body_of_any_page_and_nothing_where_there_is_none(engine: FakeEngine) -> None:
    assert (probe(f"http://{engine.name}/metrics") or b"").startswith(b"python_gc")
    engine.stop()
    assert probe(f"http://{engine.name}/metrics") is None
    assert probe("gopher://127.0.0.1") is None


def test_a_probe_tells_an_answer_with_another_status_from_none() -> None:
    def talk(connection: socket.socket, target: str) -> bool:
        connection.sendall(answer(b"", "404 Not Found" if target == "/metrics" else "401 Unauthorized"))
        return True

    with Server(talk) as server:
        assert [probe(f"http://{server.origin}{path}") for path in ("/metrics", "/secret")] == [b"", b""]


def test_what_config_lists_and_nobody_is_shown_is_found_by_the_process_that_serves_it() -> None:
    """Credentials, or a path of its own."""

    def talk(connection: socket.socket, _target: str) -> bool:
        connection.sendall(answer(b"", "401 Unauthorized"))
        return True

    with Server(talk) as engine, Server(talk) as cache:
        listed = Engine(url=f"http://{engine.origin}/custom/metrics", name="mine")
        page = Page(url=f"http://{cache.origin}/metrics")
        look = look_around(config_of(listed, pages=(page,), scrape=Scrape(discover=False)), None)
        assert [(one.pid, look.listed[engine.port]) for one in look.engines] == [(os.getpid(), "mine")]
        assert look.pages == ()
        assert look.facts.keys() == {"mine"}


def test_a_probe_takes_no_page_that_is_too_large() -> None:
    def talk(connection: socket.socket, _target: str) -> bool:
        connection.sendall(answer(b"x" * (PAGE_BYTES + 1)))
        return True

    with Server(talk) as large:
        assert probe(f"http://{large.origin}/metrics") is None


def test_gpus_that_config_switches_off_are_not_read() -> None:
    assert open_nvml(Config(gpu=Gpu(enabled=False))) is None


@pytest.mark.parametrize(
    ("unheld", "environ", "others"),
    [
        ("auto", {}, False),
        ("auto", {"POD_NAME": "vllm-0", "POD_NAMESPACE": "chat", "POD_IP": "10.0.0.5", "HOST_IP": "192.168.0.1"}, True),
        ("auto", {"NODE_NAME": "n1", "POD_NAME": "d", "POD_IP": "192.168.0.1", "HOST_IP": "192.168.0.1"}, False),
        ("paid", {"POD_NAME": "vllm-0", "POD_NAMESPACE": "chat"}, False),
        ("others", {}, True),
    ],
)
def test_a_pod_is_shown_the_gpus_of_others_and_a_daemonset_its_own(
    unheld: Literal["auto", "paid", "others"],
    environ: dict[str, str],
    others: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("POD_NAME", "POD_NAMESPACE", "NODE_NAME", "POD_IP", "HOST_IP"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    made: list[str] = []

    class Collector:
        def __init__(self, *, shown: str, **_: float) -> None:
            made.append(shown)

        def compute_pids(self) -> Mapping[str, Sequence[int]]:
            return {}

    monkeypatch.setattr("kvtally.collectors.nvml.NvmlCollector", Collector)
    assert open_nvml(Config(gpu=Gpu(unheld=unheld))) is not None
    assert made == ["node" if others else ""]


def test_a_look_without_files_leaves_the_config_as_it_was(engine: FakeEngine) -> None:
    config = config_of(Engine(f"http://{engine.name}"), scrape=Scrape(discover=False))
    assert look_around(config, None).config is None


def test_what_files_name_is_looked_for_as_what_config_lists(engine: FakeEngine, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(f'[{{"targets": ["{engine.name}"], "labels": {{"instance": "mine"}}}}]')
    scrape = Scrape(discover=False, file_sd=(f"{tmp_path}/*.json", f"{tmp_path}/b.json"))
    config = config_of(scrape=scrape)
    files = TargetFiles(config)
    look = look_around(config, None, files)
    assert look.config is not None
    assert [one.name for one in look.config.engines] == ["mine"]
    assert look.listed == {port_of(engine): "mine"}
    assert [one.pid for one in look.engines] == [os.getpid()]
    assert look.complaints == (f"{tmp_path}/b.json: there is no such file",)
    assert look_around(config, None, files).complaints == ()  # once is enough


def test_pages_beside_engines_are_found_and_those_that_config_lists_are_not_found_again(cache: Server) -> None:
    scrape = Scrape(ports=(cache.port,))
    (page,) = look_around(config_of(scrape=scrape), None).pages
    assert (page.name, page.sources, page.pid) == (cache.origin, ("lmcache_mp",), os.getpid())
    listed = config_of(scrape=scrape, pages=(Page(f"http://localhost:{cache.port}"),))
    look = look_around(listed, None)
    assert (look.pages, look.listed_pages) == ((), frozenset({cache.origin}))


def test_an_engine_that_is_listed_as_a_page_is_not_read_as_an_engine_behind_ones_back(engine: FakeEngine) -> None:
    config = config_of(pages=(Page(f"http://{engine.name}"),), scrape=Scrape(discover=False))
    assert look_around(config, None).engines == ()


@pytest.mark.parametrize("listed", [True, False])
def test_the_folder_that_the_server_of_a_cache_is_given_leads_to_its_mount(tmp_path: Path, *, listed: bool) -> None:
    page = tmp_path / "page"
    page.write_bytes(LMCACHE_MP)
    with serving(page, "--l2-adapter", f'{{"type": "fs", "base_path": "{tmp_path}"}}') as port:
        pages = (Page(f"http://127.0.0.1:{port}"),) if listed else ()
        config = config_of(scrape=Scrape(discover=not listed, ports=(port,)), pages=pages)
        look = look_around(config, None)
        without = look_around(replace(config, storage=Storage(enabled=False)), None)
    assert list(look.mounts) == [(None, (str(tmp_path),))]  # it has the same mounts as this process
    assert without.mounts == {}


def test_folders_that_config_names_of_an_engine_are_seen_by_its_process(engine: FakeEngine, tmp_path: Path) -> None:
    folders = (str(tmp_path), str(tmp_path / "other"))
    config = config_of(Engine(f"http://{engine.name}", kv_paths=folders), scrape=Scrape(discover=False))
    assert list(look_around(config, None).mounts) == [(None, folders)]
    assert look_around(config_of(scrape=Scrape(discover=False)), None).mounts == {}


class Namespaces:
    """A /proc and a /sys where processes see mounts of their own: three disks, and what is mounted at /kv of each."""

    def __init__(self, root: Path) -> None:
        self.proc, self.sys = root / "proc", root / "sys"
        for folder in ("dev/block", "class/block", "block"):
            (self.sys / folder).mkdir(parents=True)
        for name, number in (("vda1", "254:1"), ("nvme0n1", "259:0"), ("nvme1n1", "259:1")):
            disk = self.sys / "devices" / name
            disk.mkdir(parents=True)
            (self.sys / "dev" / "block" / number).symlink_to(disk)
            (self.sys / "class" / "block" / name).symlink_to(disk)
            (self.sys / "block" / name).symlink_to(disk)
        self.process("self", OWN, ROOT)
        (self.proc / "diskstats").write_text(DISKSTATS)

    def process(self, who: str, namespace: str, mountinfo: str) -> None:
        (self.proc / who / "ns").mkdir(parents=True)
        (self.proc / who / "mountinfo").write_text(mountinfo)
        if namespace:
            (self.proc / who / "ns" / "mnt").symlink_to(namespace)

    def names(self, *folders: tuple[int | None, Sequence[str]]) -> list[tuple[str, str, float | None]]:
        """Source, reading's name and bytes read of every mount under these folders."""
        mounts = mounts_of(folders, "", str(self.proc), str(self.sys)).values()
        return [(one.source, reading.name, reading.values[0]) for one in mounts for reading in one.collect()]


def at_kv(disk: str, number: str) -> str:
    return f"{ROOT}30 27 {number} / /kv rw - xfs /dev/{disk} rw\n"


@pytest.fixture
def host(tmp_path: Path) -> Namespaces:
    return Namespaces(tmp_path)


def test_a_mount_that_two_engines_share_is_counted_once(host: Namespaces) -> None:
    for who in ("101", "102"):
        host.process(who, OWN, ROOT)
    mounts = mounts_of([(101, ["/kv/a"]), (102, ["/kv/b", "/kv/a"])], "", str(host.proc), str(host.sys))
    # both see what we see: so no engine's process need live on for it
    assert list(mounts) == [(None, ("/kv/a", "/kv/b"))]
    (one,) = mounts.values()
    (reading,) = one.collect()
    assert (one.source, reading.name, reading.attributes["paths"]) == ("mount:/", "/", "/kv/a,/kv/b")


def test_the_same_mount_point_of_two_namespaces_is_two_mounts_with_two_names(host: Namespaces) -> None:
    host.process("101", ENGINES, at_kv("nvme0n1", "259:0"))
    host.process("102", OTHERS, at_kv("nvme1n1", "259:1"))
    told = host.names((102, ["/kv"]), (101, ["/kv"]), (None, ["/kv"]))
    assert told == [
        ("mount:/", "/", 100 * 512),
        ("mount:/kv (devices nvme0n1)", "/kv (nvme0n1)", 50 * 512),
        ("mount:/kv (devices nvme1n1)", "/kv (nvme1n1)", 70 * 512),
    ]


def test_one_filesystem_that_two_namespaces_show_is_counted_once(host: Namespaces) -> None:
    host.process("101", ENGINES, at_kv("nvme0n1", "259:0"))
    host.process("102", OTHERS, at_kv("nvme0n1", "259:0").replace("/kv", "/cache"))
    told = host.names((102, ["/cache"]), (101, ["/kv"]))
    assert told == [("mount:/kv (devices nvme0n1)", "/kv (nvme0n1)", 50 * 512)]
    # processes of one container are asked for together
    host.process("103", ENGINES, at_kv("nvme0n1", "259:0"))
    mounts = mounts_of([(101, ["/kv/a"]), (103, ["/kv/b"])], "", str(host.proc), str(host.sys))
    assert list(mounts) == [(101, ("/kv/a", "/kv/b"))]


def test_mounts_of_hidden_processes_say_why_they_are_not_read_each_under_its_own_name(host: Namespaces) -> None:
    for who in ("101", "102"):
        host.process(who, "", "")
        (host.proc / who / "mountinfo").unlink()
    mounts = mounts_of([(101, ["/kv"]), (102, ["/kv"])], "", str(host.proc), str(host.sys))
    assert [one.source for one in mounts.values()] == ["mount:/kv (of process 101)", "mount:/kv (of process 102)"]
    for one in mounts.values():
        with pytest.raises(NoData, match=r"process 10[12] is gone"):
            one.collect()


def test_a_source_keeps_its_name_when_another_filesystem_is_mounted_there(host: Namespaces) -> None:
    """The ticks know a source by its name from one look to the next."""
    (mount,) = mounts_of([(None, ["/kv"])], "", str(host.proc), str(host.sys)).values()
    assert [reading.name for reading in mount.collect()] == ["/"]
    (host.proc / "self" / "mountinfo").write_text(at_kv("nvme0n1", "259:0"))
    assert [reading.name for reading in mount.collect()] == ["/kv"]
    assert mount.source == "mount:/"
