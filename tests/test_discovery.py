from __future__ import annotations

import http.client
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from os import getpid
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

from kvtally.agent.config_tables import DEFAULT_PORTS
from kvtally.agent.discovery import Discovered, FoundPage, Listener, find, listeners

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from kvtally.agent.discovery import FoundEngine

A, B, C, D = (f"GPU-{letter * 8}-0000-0000-0000-000000000000" for letter in "abcd")
HEADER = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
ANY, LOOPBACK, LOOPBACK_2, OUTSIDE = "00000000", "0100007F", "0200007F", "0501A8C0"
ANY_6, LOOPBACK_6 = "0" * 32, "0" * 24 + "01000000"
MAPPED_6 = "0000000000000000FFFF0000" + LOOPBACK
PAGE = (
    b"# TYPE vllm:prompt_tokens counter\nvllm:prompt_tokens_total 5.0\nvllm:prompt_tokens_created 1.79540843369%de+09\n"
)


class Machine:
    """A /proc of our own making, and what its ports answer."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.pages: dict[str, bytes] = {}
        self.asked: list[str] = []
        (root / "net").mkdir()
        (root / "devices").write_text("Character devices:\n195 nvidia\n")
        self.sockets(tcp=[], tcp6=[])

    def sockets(self, **tables: list[tuple[str, int, int]]) -> None:
        for table, rows in tables.items():
            lines = (
                f"   {row}: {address}:{port:04X} 00000000:0000 0A 00000000:00000000 00:00000000 00000000"
                f"  1000        0 {inode} 1 ...\n"
                for row, (address, port, inode) in enumerate(rows)
            )
            (self.root / "net" / table).write_text(HEADER + "".join(lines))

    def process(
        self,
        pid: int,
        parent: int,
        command: str,
        environment: Mapping[str, str] = {},
        inodes: tuple[int, ...] = (),
        *,
        opened: tuple[str, ...] = (),
    ) -> None:
        folder = self.root / str(pid)
        (folder / "fd").mkdir(parents=True)
        (folder / "net").mkdir()
        numbers = f"S {parent} 1 1 0 -1 4194304 9 0 0 0 1 1 0 0 20 0 1 0 500 1000000 25 0"
        (folder / "stat").write_text(f"{pid} (x) {numbers}\n")
        (folder / "cmdline").write_bytes(b"".join(word.encode() + b"\0" for word in command.split(" ")))
        (folder / "environ").write_bytes(b"".join(f"{name}={value}\0".encode() for name, value in environment.items()))
        (folder / "fd" / "0").symlink_to("/dev/null")
        for descriptor, inode in enumerate(inodes, 3):
            (folder / "fd" / str(descriptor)).symlink_to(f"socket:[{inode}]")
        for descriptor, node in enumerate(opened, 50):
            (folder / "fd" / str(descriptor)).symlink_to(node)

    def engine(self, host_and_port: str, birth: int = 0, version: bytes = b'{"version":"0.25.1"}') -> None:
        self.pages[f"http://{host_and_port}/metrics"] = PAGE % birth
        self.pages[f"http://{host_and_port}/version"] = version

    def probe(self, url: str) -> bytes | None:
        self.asked.append(url)
        return self.pages.get(url)

    def find(
        self, gpus: tuple[str, ...] | None = (A, B), compute: Mapping[str, list[int]] | None = None
    ) -> list[FoundEngine]:
        return list(self.look(gpus, compute).engines)

    def look(self, gpus: tuple[str, ...] | None = (A, B), compute: Mapping[str, list[int]] | None = None) -> Discovered:
        return find(DEFAULT_PORTS, self.probe, str(self.root), gpu_uuids_by_index=gpus, compute_pids=compute)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    made = Machine(tmp_path)
    made.process(1, 0, "/sbin/init")
    return made


def test_only_ports_that_listen_here_are_tried(machine: Machine) -> None:
    machine.sockets(tcp=[(LOOPBACK, 8000, 11), (OUTSIDE, 8001, 12), (ANY, 9999, 13), (LOOPBACK_2, 8002, 14)])
    table = machine.root / "net" / "tcp"
    established = table.read_text().splitlines()[1].replace(" 0A ", " 01 ").replace(":1F40", ":1F43")
    table.write_text(f"{table.read_text()}{established}\n")
    assert listeners(DEFAULT_PORTS, str(machine.root)) == [
        Listener(8000, ("127.0.0.1",), frozenset({"11"})),
        Listener(8002, ("127.0.0.2",), frozenset({"14"})),
    ]


@pytest.mark.parametrize(
    ("tcp", "tcp6", "hosts"),
    [
        ([], [(LOOPBACK_6, 8000, 1)], ("[::1]",)),
        ([], [(ANY_6, 8000, 1)], ("127.0.0.1", "[::1]")),
        ([], [(MAPPED_6, 8000, 1)], ("127.0.0.1",)),
        ([(ANY, 8000, 2)], [(LOOPBACK_6, 8000, 1)], ("127.0.0.1", "[::1]")),
        ([(ANY, 8000, 2), (ANY, 8000, 3)], [], ("127.0.0.1",)),
    ],
)
def test_a_port_is_tried_once_where_it_is_bound(
    machine: Machine, tcp: list[tuple[str, int, int]], tcp6: list[tuple[str, int, int]], hosts: tuple[str, ...]
) -> None:
    machine.sockets(tcp=tcp, tcp6=tcp6)
    (listener,) = listeners(DEFAULT_PORTS, str(machine.root))
    assert listener.hosts == hosts
    assert listener.inodes == {str(inode) for _, _, inode in tcp + tcp6}


def test_without_ipv6_the_other_table_serves(machine: Machine) -> None:
    machine.sockets(tcp=[(ANY, 8200, 1)])
    (machine.root / "net" / "tcp6").unlink()
    assert [listener.port for listener in listeners(DEFAULT_PORTS, str(machine.root))] == [8200]


def test_where_the_kernel_does_not_tell_all_ports_are_tried(machine: Machine) -> None:
    (machine.root / "net" / "tcp").unlink()
    machine.engine("[::1]:8003")
    assert [found.url for found in machine.find()] == ["http://[::1]:8003/metrics"]
    assert "http://127.0.0.1:8200/metrics" in machine.asked


def test_a_server_that_is_no_engine_is_passed_over(machine: Machine) -> None:
    machine.sockets(tcp=[(ANY, 8000, 1), (ANY, 8001, 2)])
    machine.pages["http://127.0.0.1:8000/metrics"] = b"# HELP vllm:x\nprocess_cpu_seconds_total 1\n"
    assert machine.look() == ((), ())
    # what answers with another page may be TensorRT-LLM, which has its own elsewhere
    tried = ["http://127.0.0.1:8000/metrics", "http://127.0.0.1:8000/prometheus/metrics"]
    assert machine.asked == [*tried, "http://127.0.0.1:8001/metrics"]


@pytest.mark.parametrize(("answer", "names"), [(b"", ["127.0.0.1:8000"]), (None, [])])
def test_tensorrt_llm_is_found_where_its_metrics_stand_elsewhere_alone(
    machine: Machine, answer: bytes | None, names: list[str]
) -> None:
    """Another status than 200 is an answer; a port that gives none, and may hang, is asked once."""
    machine.sockets(tcp=[(ANY, 8000, 1)])
    if answer is not None:
        machine.pages["http://127.0.0.1:8000/metrics"] = answer
    machine.pages["http://127.0.0.1:8000/prometheus/metrics"] = b"trtllm_request_success_total 5.0\n"
    assert [found.name for found in machine.find()] == names


def test_what_config_lists_is_found_by_its_process_where_its_page_is_not_shown(machine: Machine) -> None:
    """It may want TLS, credentials or another path."""
    machine.sockets(tcp=[(ANY, 8443, 77), (LOOPBACK, 8080, 78), (ANY, 9443, 79)])
    told = {"LMCACHE_LOCAL_DISK": "file:///mnt/kv", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}
    machine.process(100, 1, "vllm serve m -tp 2 -dp 2 --ssl-keyfile k", told, (77,))
    machine.process(200, 1, 'python3 /bin/lmcache server --l2-adapter {"base_path":"/mnt/shared"}', {}, (78,))
    machine.process(300, 1, "vllm serve other", {}, (79,))

    def look(engines: tuple[int, ...] = (), pages: tuple[int, ...] = ()) -> Discovered:
        asked, proc, gpus = (8443, 8080, 9443), str(machine.root), (A, B, C, D)
        return find(asked, machine.probe, proc, listed_engines=engines, listed_pages=pages, gpu_uuids_by_index=gpus)

    assert look() == ((), ())
    (engine,), (page,) = look((8443,), (8080,))
    assert (engine.pid, engine.command_pid, engine.engine_kind, engine.version) == (100, 100, "vllm", None)
    assert (engine.url, engine.kv_paths) == ("http://127.0.0.1:8443/metrics", ("/mnt/kv",))
    assert (engine.tensor_parallel, engine.data_parallel, engine.logs_scrapes) == (2, 2, True)
    assert engine.gpus == (A, B, C, D)
    assert page == FoundPage("http://127.0.0.1:8080/metrics", "127.0.0.1:8080", (), 200, ("/mnt/shared",))


def test_what_config_lists_is_found_at_any_address_of_this_host(machine: Machine) -> None:
    machine.sockets(tcp=[(OUTSIDE, 8000, 77), (OUTSIDE, 8001, 78)])
    machine.process(100, 1, "vllm serve m", {"CUDA_VISIBLE_DEVICES": "1"}, (77,))
    (found,) = find((8000, 8001), machine.probe, str(machine.root), gpu_uuids_by_index=(A, B), listed_engines=[8000])[0]
    assert (found.pid, found.gpus) == (100, (B,))
    assert machine.asked == []
    # of two addresses with one port nobody knows which is meant: the other engine's GPUs would be sure and wrong
    machine.sockets(tcp=[(OUTSIDE, 8000, 77), (OUTSIDE[:-1] + "6", 8000, 80)])
    assert listeners((8000,), str(machine.root), (8000,)) == []
    # where a port is bound here as well, it is the one here that is meant
    machine.sockets(tcp=[(OUTSIDE, 8000, 77), (LOOPBACK, 8000, 79)])
    assert listeners((8000,), str(machine.root), (8000,)) == [Listener(8000, ("127.0.0.1",), frozenset({"79"}))]


def test_a_program_before_a_listed_engine_is_named_and_is_none(machine: Machine) -> None:
    machine.sockets(tcp=[(ANY, 8443, 77)])
    machine.process(100, 1, "/usr/sbin/nginx -g", {}, (77,))
    (found,) = find((8443,), machine.probe, str(machine.root), gpu_uuids_by_index=(A,), listed_engines=(8443,)).engines
    assert (found.pid, found.gpu_evidence) == (None, "mapping unknown: nginx holds the port, no engine of this host")
    (machine.root / "net" / "tcp").unlink()  # nothing tells that anything listens there
    assert find((8443,), machine.probe, str(machine.root), listed_engines=(8443,)).engines == ()


def test_a_page_of_a_cache_is_found_beside_the_engines(machine: Machine) -> None:
    machine.sockets(tcp=[(LOOPBACK, 8000, 1), (LOOPBACK, 8080, 2)])
    machine.engine("127.0.0.1:8000")
    machine.pages["http://127.0.0.1:8080/metrics"] = b'lmcache:num_lookup_tokens_total{worker_id="0"} 5.0\n'
    found = machine.look()
    assert [one.name for one in found.engines] == ["127.0.0.1:8000"]
    assert found.pages == (FoundPage("http://127.0.0.1:8080/metrics", "127.0.0.1:8080", ("lmcache",)),)


def test_an_engine_is_described_by_its_topmost_process(machine: Machine) -> None:
    machine.sockets(tcp=[(ANY, 8000, 77)])
    machine.engine("127.0.0.1:8000")
    machine.process(50, 1, "bash -c vllm")
    machine.process(
        100,
        50,
        "/usr/bin/python3 /usr/local/bin/vllm serve m -tp 2 --api-key SECRET",
        {"CUDA_VISIBLE_DEVICES": "0,1", "HF_TOKEN": "SECRET", "LMCACHE_LOCAL_DISK": "file:///mnt/kv"},
        (77,),
    )
    machine.process(101, 100, "python -c spawn_main", {}, (77,))
    machine.process(102, 101, "VLLM::Worker_TP0", {}, (77,))
    (found,) = machine.find()
    assert found._asdict() == {
        "url": "http://127.0.0.1:8000/metrics",
        "name": "127.0.0.1:8000",
        "pid": 100,
        "version": "0.25.1",
        "engine_kind": "vllm",
        "gpus": (A, B),
        "gpu_evidence": "CUDA_VISIBLE_DEVICES=0,1; TP 2 x PP 1",
        "tensor_parallel": 2,
        "pipeline_parallel": 1,
        "kv_paths": ("/mnt/kv",),
        "data_parallel": 1,
        "logs_scrapes": True,
        "command_pid": 100,
    }
    assert "SECRET" not in repr(found)


@pytest.mark.parametrize(
    ("named", "place"), [("/etc/lmcache.yaml", "root/etc/lmcache.yaml"), ("own/lmcache.yaml", "cwd/own/lmcache.yaml")]
)
def test_folders_are_read_off_the_file_of_lmcaches_settings_as_the_engine_sees_it(
    machine: Machine, named: str, place: str
) -> None:
    machine.sockets(tcp=[(ANY, 8000, 77)])
    machine.engine("127.0.0.1:8000")
    machine.process(100, 1, "vllm serve m", {"LMCACHE_CONFIG_FILE": named}, (77,))
    assert machine.find()[0].kv_paths == ()
    file = machine.root / "100" / place
    file.parent.mkdir(parents=True)
    file.write_text("local_disk: file:///mnt/nvme0/\n")
    assert machine.find()[0].kv_paths == ("/mnt/nvme0",)
    file.write_text("local_disk: file:///mnt/nvme0/\n" + "#" * 65536)  # whatever that is, it is no such file
    assert machine.find()[0].kv_paths == ()


def test_a_listener_below_the_engine_leads_up_to_it(machine: Machine) -> None:
    machine.sockets(tcp=[(ANY, 8000, 77)])
    machine.engine("127.0.0.1:8000")
    machine.process(100, 1, "vllm serve m --api-server-count 2")
    machine.process(101, 100, "VLLM::APIServer_0", {}, (77,))
    machine.process(102, 100, "VLLM::APIServer_1", {}, (77,))
    machine.process(103, 100, "VLLM::EngineCore")
    (found,) = machine.find(compute={B: [103]})
    assert (found.pid, found.gpus) == (100, (B,))
    assert found.gpu_evidence == "NVML sees its processes compute there; TP 1 x PP 1"


def test_a_process_that_is_not_to_be_seen_leaves_the_engine_found(machine: Machine) -> None:
    machine.sockets(tcp=[(ANY, 8000, 77)])
    machine.engine("127.0.0.1:8000", version=b"not found")
    (found,) = machine.find()
    assert (found.pid, found.version, found.gpus, found.tensor_parallel) == (None, None, None, None)
    assert found.command_pid is None
    assert found.gpu_evidence.startswith("mapping unknown: ")
    assert "same PID namespace" in found.gpu_evidence
    (alone,) = machine.find(gpus=(A,))
    assert (alone.gpus, alone.gpu_evidence) == ((A,), "one engine and one GPU on this host")


def test_two_engines_are_mapped_each_by_its_own_environment(machine: Machine) -> None:
    machine.sockets(tcp=[(ANY, 8000, 77), (ANY, 8001, 78)])
    for place in range(2):
        machine.engine(f"127.0.0.1:800{place}", birth=place)
        machine.process(100 + place, 1, "vllm serve m", {"CUDA_VISIBLE_DEVICES": str(1 - place)}, (77 + place,))
    assert [(found.pid, found.gpus) for found in machine.find()] == [(100, (B,)), (101, (A,))]
    assert [found.command_pid for found in machine.find()] == [100, 101]


@pytest.mark.parametrize(
    ("namespace", "gpus"),
    [(None, (B,)), ("pid:[4026531836]", (B,)), ("pid:[4026532461]", None)],
)
def test_nvmls_processes_are_those_of_proc_only_where_both_number_them_alike(
    machine: Machine, namespace: str | None, gpus: tuple[str, ...] | None
) -> None:
    machine.sockets(tcp=[(ANY, 8000, 77)])
    machine.engine("127.0.0.1:8000")
    machine.process(100, 1, "vllm serve m", {}, (77,))
    if namespace is not None:
        (machine.root / "self" / "ns").mkdir(parents=True)
        (machine.root / "self" / "ns" / "pid").symlink_to(namespace)
    # in a container the host's process 100 may be anybody's
    (found,) = machine.find(compute={A: [7], B: [100]})
    assert found.gpus == gpus
    if gpus is None:
        assert "NVML numbers processes as the host does, and this container numbers its own" in found.gpu_evidence


def test_an_engine_whose_environment_says_nothing_holds_the_gpus_whose_nodes_its_processes_have_open(
    machine: Machine,
) -> None:
    # nodes that are everywhere stand in for GPUs': 1 is their driver's number, and 3, 7 and 9 are their own
    (machine.root / "devices").write_text("Character devices:\n  1 nvidia\n")
    nodes = {3: B, 7: C, 9: A}
    machine.sockets(tcp=[(ANY, 8000, 77), (ANY, 8001, 78)])
    void = {"NVIDIA_VISIBLE_DEVICES": "void"}  # CDI's
    machine.engine("127.0.0.1:8000", birth=1)
    machine.process(100, 1, "vllm serve m -tp 2", void, (77,))
    machine.process(101, 100, "VLLM::Worker_TP0", void, opened=("/dev/null",))
    machine.process(102, 100, "VLLM::Worker_TP1", void, opened=("/dev/urandom", "/dev/urandom"))
    machine.engine("127.0.0.1:8001", birth=2)
    machine.process(200, 1, "vllm serve m", void | {"CUDA_VISIBLE_DEVICES": "0"}, (78,))
    (machine.root / "200" / "root" / "dev").mkdir(parents=True)
    (machine.root / "200" / "root" / "dev" / "nvidia7").symlink_to("/dev/full")

    def found(minors: Mapping[int, str] | None) -> list[tuple[tuple[str, ...] | None, str]]:
        probe, proc = machine.probe, str(machine.root)
        look = find(DEFAULT_PORTS, probe, proc, gpu_uuids_by_index=(A, B, C), gpu_uuids_by_minor=minors)
        return [(one.gpus, one.gpu_evidence) for one in look.engines]

    assert found(nodes) == [
        ((A, B), "its processes have /dev/nvidia3, /dev/nvidia9 open; TP 2 x PP 1"),
        ((C,), "CUDA_VISIBLE_DEVICES=0 of /dev/nvidia7; TP 1 x PP 1"),
    ]
    # in WSL no GPU has a node of its own
    assert [gpus for gpus, _ in found(None)] == [None, (A,)]


def test_servers_below_one_supervisor_have_trees_of_their_own(machine: Machine) -> None:
    machine.sockets(tcp=[(ANY, 8000, 77), (ANY, 8001, 78)])
    machine.process(100, 1, "vllm serve m -dp 2 -dpm", {"NVIDIA_VISIBLE_DEVICES": "all"})
    for rank in range(2):
        machine.engine(f"127.0.0.1:800{rank}", birth=rank)
        machine.process(110 + rank, 100, f"VLLM::APIServer_DP{rank}", {}, (77 + rank,))
        machine.process(120 + rank, 110 + rank, f"VLLM::EngineCore_DP{rank}")
    first, second = machine.find(compute={A: [121], B: [120]})
    assert (first.pid, first.gpus, first.tensor_parallel, first.data_parallel) == (110, (B,), 1, 1)
    assert (second.pid, second.gpus) == (111, (A,))
    assert (first.command_pid, second.command_pid) == (100, 100)  # their own command lines are titles


def test_a_program_with_vllm_inside_is_its_own_root(machine: Machine) -> None:
    machine.sockets(tcp=[(ANY, 8000, 77), (ANY, 8001, 78)])
    machine.engine("127.0.0.1:8000", birth=1)
    machine.engine("127.0.0.1:8001", birth=2)
    machine.process(100, 1, "python3 my_server.py", {"CUDA_VISIBLE_DEVICES": "0,1"}, (77,))
    machine.process(200, 1, "/opt/launcher", {"CUDA_VISIBLE_DEVICES": "1"}, (78,))
    machine.process(201, 200, "VLLM::EngineCore")
    first, second = machine.find()
    assert (first.pid, first.gpus, first.tensor_parallel) == (100, None, None)
    assert "does not tell how many" in first.gpu_evidence
    assert (second.pid, second.gpus) == (200, (B,))


def test_an_engine_of_another_make_is_described_by_its_own_command_line(machine: Machine) -> None:
    machine.sockets(tcp=[(ANY, 30000, 77), (ANY, 8000, 78)])
    machine.pages["http://127.0.0.1:30000/metrics"] = b'sglang:prompt_tokens_total{model_name="m"} 5.0\n'
    machine.pages["http://127.0.0.1:8000/metrics"] = b"[]"
    machine.pages["http://127.0.0.1:8000/prometheus/metrics"] = b"trtllm_request_success_total 5.0\n"
    folder = {"SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR": "/mnt/kv", "CUDA_VISIBLE_DEVICES": "0,1"}
    machine.process(100, 1, "python3 -m sglang.launch_server --model-path m --tp 1 --dp-size 2", folder, (77,))
    machine.process(101, 100, "sglang::scheduler_DP0", {}, (77,))
    machine.process(200, 1, "/usr/bin/python3 /usr/local/bin/trtllm-serve m --tp_size 2", {}, (78,))
    machine.process(201, 200, "python3 -m mpi4py.futures.server")
    found = {one.engine_kind: one for one in machine.find(gpus=(A, B, C, D), compute={C: [201], D: [200]})}
    sglang, trtllm = found["sglang"], found["tensorrt_llm"]
    assert (sglang.pid, sglang.gpus, sglang.kv_paths) == (100, (A, B), ("/mnt/kv",))
    assert sglang.gpu_evidence == "CUDA_VISIBLE_DEVICES=0,1; TP 1 x PP 1 x DP 2"
    assert sglang.data_parallel == 1  # its page adds up the ranks: both GPUs are this one target's
    assert (trtllm.pid, trtllm.gpus) == (200, (C, D))
    assert (trtllm.tensor_parallel, trtllm.data_parallel, trtllm.logs_scrapes) == (2, 1, None)


def test_a_scheduler_that_holds_the_port_leads_up_to_its_server(machine: Machine) -> None:
    machine.sockets(tcp=[(ANY, 30000, 77)])
    machine.pages["http://127.0.0.1:30000/metrics"] = b'sglang:prompt_tokens_total{model_name="m"} 5.0\n'
    machine.process(90, 1, "bash run.sh")
    machine.process(100, 90, "python3 -m sglang.launch_server --model-path m")
    machine.process(101, 100, "sglang::tokenizer_worker:101", {}, (77,))
    machine.process(102, 100, "sglang::scheduler")
    (found,) = machine.find(compute={B: [102]})
    assert (found.pid, found.command_pid, found.gpus) == (100, 100, (B,))


def test_a_tunnel_to_another_host_holds_no_gpu_of_this_one(machine: Machine) -> None:
    machine.sockets(tcp=[(LOOPBACK, 8000, 77)])
    machine.engine("127.0.0.1:8000")
    machine.process(100, 1, "/usr/bin/ssh -L 8000:far:8000", {}, (77,))
    (found,) = machine.find(gpus=(A,))
    assert (found.pid, found.gpus) == (None, None)
    assert found.gpu_evidence == "mapping unknown: ssh holds the port, no engine of this host"


PROXY = (
    "/usr/bin/docker-proxy -proto tcp -host-ip 0.0.0.0 -host-port 8000 -container-ip 172.17.0.2 -container-port 8000"
)
ROUTES = "Local:\n  +-- 0.0.0.0/0 3 0 5\n     |-- 172.17.0.{}\n        /32 host LOCAL\n"


def test_an_engine_in_a_container_is_found_behind_its_published_port(machine: Machine) -> None:
    machine.sockets(tcp=[(ANY, 8000, 77)], tcp6=[(ANY_6, 8000, 78)])
    machine.engine("127.0.0.1:8000")
    machine.process(90, 1, PROXY, {}, (77,))
    machine.process(91, 1, PROXY, {}, (78,))
    for pid, address in ((100, 2), (200, 22)):
        machine.process(pid, 1, "python3 -m vllm.entrypoints.openai.api_server", {"NVIDIA_VISIBLE_DEVICES": A})
        (machine.root / str(pid) / "net" / "fib_trie").write_text(ROUTES.format(address))
    (found,) = machine.find()
    assert (found.pid, found.gpus) == (100, (A,))
    (machine.root / "100" / "net" / "fib_trie").unlink()
    (lost,) = machine.find()
    assert (lost.pid, lost.gpu_evidence) == (
        None,
        "mapping unknown: docker-proxy holds the port, no engine of this host",
    )


def test_a_proxys_copy_of_a_page_is_no_second_engine(machine: Machine) -> None:
    """llm-d's routing sidecar serves 8000 and hands /metrics on to vLLM at 8200."""
    machine.sockets(tcp=[(ANY, 8000, 77), (ANY, 8200, 78)])
    machine.engine("127.0.0.1:8000", birth=4)
    machine.engine("127.0.0.1:8200", birth=4)
    assert [found.name for found in machine.find()] == ["127.0.0.1:8200"]
    machine.process(100, 1, "vllm serve m", {}, (77,))
    machine.process(101, 1, "python toy_proxy.py", {}, (78,))
    assert [found.name for found in machine.find()] == ["127.0.0.1:8000"]


def test_a_cpu_build_holds_no_gpu(machine: Machine) -> None:
    machine.sockets(tcp=[(ANY, 8000, 77)])
    machine.engine("127.0.0.1:8000", version=b'{"version":"0.17.0+cpu"}')
    (found,) = machine.find()
    assert (found.gpus, found.gpu_evidence) == ((), "a CPU build of vLLM, 0.17.0+cpu")
    machine.engine("127.0.0.1:8000", version=b'{"version":"0.32.0"}')
    (machine.root / "devices").write_text("Character devices:\n  1 mem\n")
    (found,) = machine.find(gpus=None)
    assert (found.gpus, found.gpu_evidence) == ((), "no GPU on this host")


@pytest.mark.parametrize("version", [b"", b"[1]", b"{", b'{"version": 5}', b"\xff"])
def test_a_version_in_another_form_is_unknown(machine: Machine, version: bytes) -> None:
    machine.sockets(tcp=[(ANY, 8000, 77)])
    machine.engine("127.0.0.1:8000", version=version)
    assert machine.find()[0].version is None


class Engine(BaseHTTPRequestHandler):
    """A server that answers as an engine does."""

    def do_GET(self) -> None:
        body = {"/metrics": PAGE % 9, "/version": b'{"version":"0.25.1"}'}.get(self.path)
        self.send_response(200 if body else 404)
        self.end_headers()
        self.wfile.write(body or b"")

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # http.server's own word
        """Say nothing."""


@pytest.fixture
def port() -> Iterator[int]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Engine) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


def get(url: str) -> bytes | None:
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=5)
    try:
        connection.request("GET", parts.path)
        answer = connection.getresponse()
        return answer.read() if answer.status == 200 else None
    finally:
        connection.close()


def test_our_own_process_is_found_by_the_port_it_listens_on(port: int) -> None:
    (found,) = find([port, port], get).engines
    assert (found.url, found.version, found.pid) == (f"http://127.0.0.1:{port}/metrics", "0.25.1", getpid())


def test_a_real_port_that_is_closed_is_not_tried(port: int) -> None:
    tried = []

    def probe(url: str) -> None:
        tried.append(url)

    with ThreadingHTTPServer(("127.0.0.1", 0), Engine) as other:
        closed = other.server_address[1]
    assert find([closed, port], probe) == ((), ())
    assert tried == [f"http://127.0.0.1:{port}/metrics"]
