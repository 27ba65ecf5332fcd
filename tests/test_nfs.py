from __future__ import annotations

from pathlib import Path

import pytest

from kvtally.agent.interval import close, opened
from kvtally.collectors.base import CollectError, scrape
from kvtally.collectors.nfs import NfsMount, parse_mountstats
from kvtally.collectors.quantities import QUANTITIES

STORAGE = Path(__file__).parent / "fixtures" / "storage"
OURS = (STORAGE / "mountstats_linux_6.1.txt").read_text()
EXPORTED = (STORAGE / "mountstats_node_exporter.txt").read_text()


def proc_of(root: Path, who: str, mountstats: str, mountinfo: str = "") -> str:
    (root / who).mkdir()
    (root / who / "mountstats").write_text(mountstats)
    (root / who / "mountinfo").write_text(mountinfo)
    return str(root)


def test_bytes_of_programs_and_bytes_of_the_server_are_two_counts() -> None:
    ours, again = parse_mountstats(OURS)
    assert (ours.mount_point, ours.device, ours.fstype) == ("/mnt/kv", "127.0.0.1:/", "nfs4")
    assert again == ours._replace(mount_point="/mnt/kv2")  # a second mount of one export shows the same counts
    mib = 2**20
    # A file of 64 MiB. From the server: 3 cold reads, O_DIRECT, mmap(). By programs: 5 read() of the whole file, and
    # 65 MiB with O_DIRECT, whose last read asked for 1 MiB at the end of the file and got nothing
    read, written = 5 * 64 * mib, 2 * 64 * mib
    assert ours.values == (read, 1540, 0.255, written, 512, 15.122, 5 * 64 * mib + 65 * mib, written)
    assert len(ours.values) == len(QUANTITIES["filesystem"])


def test_a_mount_is_read_by_its_mount_point(tmp_path: Path) -> None:
    collector = NfsMount("/mnt/nfs/test", proc_of(tmp_path, "self", EXPORTED))
    (reading,) = collector.collect()
    assert collector.source == "nfs:/mnt/nfs/test"
    assert (reading.kind, reading.name, reading.epoch) == ("filesystem", "/mnt/nfs/test", None)
    assert reading.attributes == {
        "source": "nfs mountstats",
        "device": "192.168.1.1:/srv/test",
        "mounts": "/mnt/nfs/test",
        "fstype": "nfs4",
    }
    # READ: 1298 operations, 79407 ms in all, of which 79386 from the sending to the answer
    assert reading.values == (1210214218, 1298, 79.407, 0, 0, 0.0, 1207640230, 0)


def test_the_mounts_of_another_process_are_read_in_its_namespace(tmp_path: Path) -> None:
    proc = proc_of(tmp_path, "self", "device proc mounted on /proc with fstype proc\n")
    proc_of(tmp_path, "77", OURS)
    pids = iter([77, None])
    collector = NfsMount("/mnt/kv", proc, lambda: next(pids))
    assert collector.collect()[0].values[1] == 1540
    assert scrape(collector, lambda: 0).reason == "the engine's process is not known"
    outcome = scrape(NfsMount("/mnt/kv", proc), lambda: 0)
    assert (outcome.outcome, outcome.reason) == ("no_data", "no NFS is mounted at /mnt/kv")
    assert "as the engine names it" in outcome.hint
    assert scrape(NfsMount("/mnt/kv", proc, 78), lambda: 0).reason == "process 78 is gone"


MOUNT = """\
device {device} mounted on {point} with fstype nfs statvers=1.1
\tage:\t5
\tbytes:\t{read} 2 3 4 5 6 7 8
\tper-op statistics
\t        READ: 10 10 0 0 0 {queued} 20 {took}
\t       WRITE: 30 30 0 0 0 0 40 50 0
"""


def mount(device: str = "server:/kv", point: str = "/kv", *, read: int = 1, queued: int = 0, took: int = 25) -> str:
    return MOUNT.format(device=device, point=point, read=read, queued=queued, took=took)


def test_a_time_below_zero_is_unknown_and_takes_no_other_with_it() -> None:
    # as node_exporter's fixture shows one: 2**64 - 1 - 54 ms
    (queued,) = parse_mountstats(mount(queued=18446744073709551561))
    assert queued.values == (5, 10, 0.025, 6, 30, 0.05, 1 + 3, 2 + 4)
    (whole,) = parse_mountstats(mount(took=18446744073709551561))
    assert whole.values == (5, 10, None, 6, 30, 0.05, 4, 6)


def test_reads_by_read_plus_are_reads() -> None:
    (counts,) = parse_mountstats(mount() + "\t   READ_PLUS: 90 90 0 0 0 0 0 75 0\n")
    assert counts.values[1:3] == (100, 0.1)


def test_blanks_in_names_and_mounts_without_a_device_are_read() -> None:
    text = mount(r"nas:/my\040kv", r"/mnt/my\040kv") + "no device mounted on /x with fstype bpf\n\tbytes:\t9\n"
    (counts,) = parse_mountstats(text)
    assert (counts.device, counts.mount_point) == ("nas:/my kv", "/mnt/my kv")


def test_of_two_mounts_at_one_point_the_later_is_read(tmp_path: Path) -> None:
    proc = proc_of(tmp_path, "self", mount(read=100) + mount(read=200))
    assert NfsMount("/kv", proc).collect()[0].values[6] == 203


@pytest.mark.parametrize(
    "text",
    [
        "device server:/kv mounted on /kv with fstype nfs4\n",
        mount().replace("bytes:\t1 2", "bytes:\tone 2"),
        mount().replace(" 0 0 0 0 20 25", ""),
    ],
)
def test_counts_of_another_form_are_an_error_that_names_the_mount(text: str) -> None:
    with pytest.raises(CollectError, match="mountstats tells of /kv in a form that is not known"):
        parse_mountstats(text)


def test_what_is_no_nfs_is_left_out() -> None:
    assert parse_mountstats("") == []
    assert parse_mountstats("device x mounted on /kv with fstype nfsd\n\tbytes:\t1 2 3\n") == []


def test_a_mount_made_anew_counts_from_nothing(tmp_path: Path) -> None:
    proc = proc_of(tmp_path, "self", OURS)
    collector = NfsMount("/mnt/kv", proc)
    state = opened(collector.collect()[0], 10)
    (tmp_path / "self" / "mountstats").write_text(mount(point="/mnt/kv"))
    interval, _, _ = close(state, collector.collect()[0], 20)
    assert interval.values == (5, 10, 25_000_000, 6, 30, 50_000_000, 4, 6)
