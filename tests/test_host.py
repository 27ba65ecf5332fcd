from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtally.agent.interval import close, opened
from kvtally.collectors.base import NoData, scrape
from kvtally.collectors.host import ProcessTree, descendants, parents, parse_io, parse_stat, process_reading
from kvtally.collectors.quantities import QUANTITIES, index

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kvtally.collectors.base import Reading

CPU, WORKER, RCHAR, WCHAR = (
    index("process", name) for name in ("cpu_ns", "worker_cpu_ns", "read_call_bytes", "write_call_bytes")
)
# Two lines of recordings/h100-llama8b-lmc-cpu: what an early recording tells of a process
RECORDED = [
    {"pid": 1856, "comm": "python3", "rchar": 1987720, "wchar": 0, "read_bytes": 0, "write_bytes": 0},
    {
        "pid": 1857,
        "comm": "VLLM::EngineCor",
        "rchar": 697973263,
        "wchar": 97506,
        "read_bytes": 479232,
        "write_bytes": 352256,
    },
]


class Proc:
    """A /proc of our own making."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def add(
        self, pid: int, parent: int, *, ticks: int = 0, start: int = 500, rchar: int = 0, comm: str = "vllm"
    ) -> None:
        folder = self.root / str(pid)
        folder.mkdir(exist_ok=True)
        after = f"S {parent} 1 1 0 -1 4194304 9 0 0 0 {ticks} 7 0 0 20 0 1 0 {start} 1000000 25 18446744073709551615"
        (folder / "stat").write_text(f"{pid} ({comm}) {after}\n")
        (folder / "io").write_text(
            f"rchar: {rchar}\nwchar: 20\nsyscr: 5\nsyscw: 6\n"
            "read_bytes: 30\nwrite_bytes: 40\ncancelled_write_bytes: 0\n"
        )

    def remove(self, pid: int) -> None:
        for file in (self.root / str(pid)).iterdir():
            file.unlink()
        (self.root / str(pid)).rmdir()


@pytest.fixture
def proc(tmp_path: Path) -> Proc:
    """Init, an engine of three generations, and a stranger."""
    made = Proc(tmp_path)
    (tmp_path / "sys").mkdir()
    made.add(1, 0, comm="systemd")
    made.add(100, 1, ticks=93, rchar=1000)
    made.add(101, 100, ticks=193, rchar=2000)
    made.add(102, 101, ticks=293, rchar=4000)
    made.add(200, 1, comm="sshd")
    return made


def tree(proc: Proc, root: int | None = 100, scans_every: int = 10) -> ProcessTree:
    return ProcessTree(
        "127.0.0.1:8000",
        lambda: root,
        str(proc.root),
        clock_ticks=100,
        page_bytes=4096,
        scans_every=scans_every,
    )


def test_a_command_name_may_hold_blanks_and_brackets() -> None:
    line = b"7 (a) b (c)) S 3 1 1 0 -1 4194304 9 0 0 0 11 22 0 0 20 0 1 0 88123 1000000 25 18446744073709551615\n"
    stat = parse_stat(line)
    assert (stat.comm, stat.parent, stat.cpu_ticks, stat.start_ticks, stat.resident_pages) == (
        "a) b (c)",
        3,
        33,
        88123,
        25,
    )


@pytest.mark.parametrize("text", [b"", b"7 (a) S 3", b"nonsense"])
def test_a_stat_line_cut_short_is_refused(text: bytes) -> None:
    with pytest.raises(ValueError, match="not a stat line"):
        parse_stat(text)


def test_io_is_read_by_the_kernels_names() -> None:
    assert parse_io(b"rchar: 10\nwchar: 20\nsyscr: 1\n") == {"rchar": 10, "wchar": 20, "syscr": 1}


def test_a_tree_is_one_reading_with_a_part_for_every_process(proc: Proc) -> None:
    (reading,) = tree(proc).collect()
    assert (reading.kind, reading.name, reading.epoch) == ("process", "127.0.0.1:8000", None)
    assert reading.values == (None, None, None, None, None, None, 3, 3 * 25 * 4096)
    assert reading.parts == {
        "100:5.0": (1.0, 1000, 20, 30, 40, None, None, None),
        "101:5.0": (2.0, 2000, 20, 30, 40, None, None, None),
        "102:5.0": (3.0, 4000, 20, 30, 40, None, None, None),
    }


def test_values_and_parts_are_as_many_as_the_quantities(proc: Proc) -> None:
    (reading,) = tree(proc).collect()
    assert len(reading.values) == len(QUANTITIES["process"])
    assert {len(part) for part in (reading.parts or {}).values()} == {len(QUANTITIES["process"])}


def test_live_and_recorded_forms_give_the_same_reading(proc: Proc) -> None:
    collector = tree(proc)
    assert (process_reading("127.0.0.1:8000", collector.sample()),) == collector.collect()


def test_an_early_recording_knows_neither_cpu_nor_start_nor_memory() -> None:
    reading = process_reading("e", RECORDED)
    assert reading.values == (None, None, None, None, None, None, 2, None)
    assert reading.parts == {
        "1856:": (None, 1987720, 0, 0, 0, None, None, None),
        "1857:": (None, 697973263, 97506, 479232, 352256, None, None, None),
    }


# The tree of `ps` beside vLLM 0.32 on a CPU, and those of the sources of vLLM and SGLang; ten CPU seconds each
VLLM = ("python", "python", "VLLM::EngineCor", "VLLM::Worker")


def tree_of(*comms: str, cpu_seconds: Sequence[float | None] = (10.0,) * 9) -> Reading:
    """A process tree, its processes by their comms."""
    named = zip(comms, cpu_seconds, strict=False)
    processes = [{"pid": pid, "comm": comm, "cpu_seconds": seconds} for pid, (comm, seconds) in enumerate(named)]
    return process_reading("e", processes)


@pytest.mark.parametrize(
    ("comms", "worked"),
    [
        (VLLM, (0, 0, 0, 10)),
        # two API servers, two replicas of two ranks
        (
            ("vllm", "VLLM::APIServer", "VLLM::DPCoordin", "VLLM::EngineCor", "VLLM::Worker_DP", "VLLM::Worker_DP"),
            (0, 0, 0, 0, 10, 10),
        ),
        # one rank: on a GPU, and on every TPU, the core computes in its own process
        (("vllm", "VLLM::EngineCor"), (0, 10)),
        (("vllm", "VLLM::EngineCor", "VLLM::EngineCor"), (0, 10, 10)),
        (("python", "mine::EngineCor", "mine::Worker_TP"), (0, 0, 10)),  # VLLM_PROCESS_NAME_PREFIX
        (("vllm", "VLLM::EngineCor", "ray::RayWorkerW"), (0, 0, 10)),
        (("python3", "sglang::schedul", "sglang::schedul", "sglang::detoken"), (0, 10, 10, 0)),
        (("python3", "sglang::tokeniz", "sglang::schedul", "sglang::data_pa"), (0, 0, 10, 0)),
        # no titles: without setproctitle, before vLLM 0.10.1, in TensorRT-LLM
        (("vllm", "python", "python"), (None, None, None)),
        (("trtllm-serve", "Worker"), (None, None)),
        (("vllm", "VLLM::APIServer"), (None, None)),
    ],
)
def test_the_processes_that_compute_are_told_from_the_rest_by_their_titles(
    comms: tuple[str, ...], worked: tuple[float | None, ...]
) -> None:
    parts = tree_of(*comms).parts or {}
    assert tuple(part[WORKER] for part in parts.values()) == worked
    assert {part[CPU] for part in parts.values()} == {10}


@given(st.lists(st.tuples(st.sampled_from((*VLLM, "VLLM::APIServer")), st.floats(0, 1e6)), max_size=6))
def test_workers_take_no_more_than_the_whole_tree(processes: list[tuple[str, float]]) -> None:
    reading = tree_of(*(comm for comm, _ in processes), cpu_seconds=[seconds for _, seconds in processes])
    parts = list((reading.parts or {}).values())
    worked = [part[WORKER] for part in parts]
    assert all(seconds in {0, part[CPU]} for seconds, part in zip(worked, parts, strict=True) if seconds is not None)
    # all or none
    is_titled = any("Engine" in comm or "Worker" in comm for comm, _ in processes)
    assert [seconds is not None for seconds in worked] == [is_titled] * len(processes)


@pytest.mark.parametrize("told", [{}, {"comm": None}, {"comm": 7}, {"comm": "::"}])
def test_a_recorded_process_without_a_usable_title_is_no_worker(told: dict[str, object]) -> None:
    processes = [{"pid": 1, "cpu_seconds": 3.0, **told}]
    for beside, worked in ((), [None]), (({"pid": 2, "cpu_seconds": 4.0, "comm": "VLLM::EngineCor"},), [0, 4]):
        parts = process_reading("e", [*processes, *beside]).parts or {}
        assert [part[WORKER] for part in parts.values()] == worked


def test_an_interval_of_an_engine_tells_its_workers_from_its_server(proc: Proc) -> None:
    def measured(server: int, core: int, worker: int) -> Reading:
        proc.add(100, 1, ticks=server, comm="vllm")
        proc.add(101, 100, ticks=core, comm="VLLM::EngineCor")
        proc.add(102, 101, ticks=worker, comm="VLLM::Worker_TP")
        return tree(proc).collect()[0]

    state = opened(measured(1000, 500, 2000), 10)
    interval, state, findings = close(state, measured(3000, 510, 2090), 20)
    # a server that is busy with log-probabilities for 20 s, a worker with 0.9 s of steps
    assert (interval.values[CPU], interval.values[WORKER]) == (21_000_000_000, 900_000_000)
    # the worker is killed and another takes its place: 7 ticks in the kernel, as ever
    proc.remove(102)
    proc.add(103, 101, ticks=93, comm="VLLM::Worker_TP", start=900)
    (reading,) = tree(proc).collect()
    interval, state, more = close(state, reading, 30)
    assert (interval.values[CPU], interval.values[WORKER]) == (1_000_000_000, 1_000_000_000)
    # its engine goes with it
    proc.remove(103)
    proc.remove(101)
    for at in (40, 50):
        (reading,) = tree(proc).collect()
        interval, state, less = close(state, reading, at)
        assert (interval.values[CPU], interval.values[WORKER]) == (0, None)
        more += less
    assert findings + more == []


def test_workers_whose_titles_come_late_are_told_from_the_next_interval_on(proc: Proc) -> None:
    collector = tree(proc)
    state = opened(collector.collect()[0], 10)
    worked = []
    for at in (20, 30, 40):
        proc.add(101, 100, ticks=193 + 10 * at, rchar=2000, comm="vllm" if at == 20 else "VLLM::EngineCor")
        interval, state, findings = close(state, collector.collect()[0], at)
        assert findings == []
        worked.append(interval.values[WORKER])
    assert worked == [None, None, 1_000_000_000]


def test_memory_known_of_some_processes_only_is_unknown() -> None:
    processes = [{"pid": 1, "resident_bytes": 10}, {"pid": 2}]
    assert process_reading("e", processes).values[-1] is None


def test_an_interval_counts_a_process_that_came_and_not_one_that_went(proc: Proc) -> None:
    collector = tree(proc, scans_every=1)
    before = opened(collector.collect()[0], 10)
    proc.remove(102)
    proc.add(100, 1, ticks=143, rchar=1500)
    proc.add(103, 100, ticks=13, rchar=70)
    interval, _, _ = close(before, collector.collect()[0], 20)
    assert interval.values[CPU] == 700_000_000  # 50 ticks of 100, and 20 (13 + 7 in the kernel) of 103
    assert interval.values[RCHAR] == 570


def test_a_pid_that_was_reused_is_another_part(proc: Proc) -> None:
    collector = tree(proc)
    collector.collect()
    proc.add(102, 101, ticks=3, start=900)
    parts = collector.collect()[0].parts or {}
    assert set(parts) == {"100:5.0", "101:5.0", "102:9.0"}


def test_children_are_searched_every_tenth_time_or_when_one_vanishes(proc: Proc) -> None:
    collector = tree(proc, scans_every=3)
    counts = [len(collector.sample())]
    proc.add(103, 100)
    counts += [len(collector.sample()) for _ in range(3)]
    assert counts == [3, 3, 3, 4]
    proc.add(104, 100)
    proc.remove(102)
    assert [process["pid"] for process in collector.sample()] == [100, 101, 103, 104]


def test_a_new_root_is_followed_at_once(proc: Proc) -> None:
    roots = iter([100, 200])
    collector = ProcessTree("e", lambda: next(roots), str(proc.root), clock_ticks=100)
    assert [len(collector.sample()), len(collector.sample())] == [3, 1]


def test_a_ring_of_reused_pids_ends() -> None:
    assert descendants(1, {1: 2, 2: 1, 3: 2}) == [1, 2, 3]


def test_byte_counters_that_may_not_be_read_are_unknown_and_the_limit_is_told(
    proc: Proc, monkeypatch: pytest.MonkeyPatch
) -> None:
    opening = os.open

    def denying(path: str, flags: int) -> int:  # a test that runs as root is denied nothing by file modes
        if path.endswith("102/io"):
            raise PermissionError(13, "Permission denied", path)
        return opening(path, flags)

    collector = tree(proc)
    monkeypatch.setattr(os, "open", denying)
    parts = collector.collect()[0].parts or {}
    assert parts["102:5.0"] == (3.0, None, None, None, None, None, None, None)
    assert parts["101:5.0"][RCHAR] == 2000
    assert collector.limits["io"].startswith("bytes of 1 of 3 processes may not be read: ")
    assert "shareProcessNamespace" in collector.limits["io"]
    monkeypatch.undo()
    collector.collect()
    assert collector.limits == {}


def test_a_process_that_ends_between_two_reads_is_no_missing_right(proc: Proc) -> None:
    collector = tree(proc)
    (proc.root / "102" / "io").unlink()
    assert (collector.collect()[0].parts or {})["102:5.0"] == (3.0, None, None, None, None, None, None, None)
    assert collector.limits == {}


def test_a_root_that_is_hidden_is_no_data(proc: Proc, monkeypatch: pytest.MonkeyPatch) -> None:
    def denying(path: str, flags: int) -> int:
        raise PermissionError(13, "Permission denied", path, flags)

    monkeypatch.setattr(os, "open", denying)
    with pytest.raises(NoData, match="process 100 may not be read") as caught:
        tree(proc).collect()
    assert "CAP_SYS_PTRACE" in caught.value.hint


def test_an_unknown_root_is_no_data(proc: Proc) -> None:
    outcome = scrape(tree(proc, None), lambda: 0)
    assert (outcome.outcome, outcome.reason) == ("no_data", "the engine's process is not known")
    assert outcome.source == "process:127.0.0.1:8000"


def test_a_root_that_has_gone_is_no_data(proc: Proc) -> None:
    collector = tree(proc)
    collector.collect()
    proc.remove(100)
    with pytest.raises(NoData, match="process 100 is gone"):
        collector.collect()


WORK = """
import os, sys
data = os.urandom(1 << 20)
with open(sys.argv[1], "wb") as file:
    for _ in range(8):
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
with open(sys.argv[1], "rb") as file:
    while file.read(1 << 20):
        pass
total = 0
import resource
while sum(resource.getrusage(resource.RUSAGE_SELF)[:2]) < 0.3:
    total += sum(range(1000))
used = resource.getrusage(resource.RUSAGE_SELF)
print(used.ru_utime + used.ru_stime, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], float]]:
    """A grandchild that has read, written and computed, and its own account of CPU seconds; it then waits."""
    shell = ["/bin/sh", "-c", '"$0" -c "$1" "$2"; exit $?', sys.executable, WORK, str(tmp_path / "kv")]
    with subprocess.Popen(shell, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        used = float(process.stdout.readline())
        yield process, used
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGCONT)
        process.communicate("")


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="needs Linux with task accounting")
def test_a_real_child_is_measured_as_it_measures_itself(worker: tuple[subprocess.Popen[str], float]) -> None:
    process, used_seconds = worker
    collector = ProcessTree("e", process.pid)
    (reading,) = collector.collect()
    parts = list((reading.parts or {}).values())
    assert reading.values[-2] == 2  # the shell and its child
    cpu_seconds = sum(part[CPU] or 0 for part in parts)
    assert cpu_seconds == pytest.approx(used_seconds, abs=0.06)  # ticks of 10 ms, user and system, two processes
    assert collector.limits == {}
    assert sum(part[WCHAR] or 0 for part in parts) == pytest.approx(8 << 20, rel=0.01)
    assert 8 << 20 <= sum(part[RCHAR] or 0 for part in parts) < 24 << 20  # the interpreter reads its modules too
    assert (reading.values[-1] or 0) > 1 << 20


def test_our_own_cpu_seconds_agree_with_getrusage() -> None:
    before = ProcessTree("e", os.getpid()).sample()[0]["cpu_seconds"]
    used = resource.getrusage(resource.RUSAGE_SELF)
    after = ProcessTree("e", os.getpid()).sample()[0]["cpu_seconds"]
    assert before - 0.03 <= used.ru_utime + used.ru_stime <= after + 0.03


def test_parents_of_this_machine_hold_our_own() -> None:
    assert parents("/proc")[os.getpid()] == os.getppid()
