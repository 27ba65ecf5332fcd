from __future__ import annotations

from pathlib import Path

import pytest
from tests.rights import without_rights

from kvtally.agent.interval import close, opened
from kvtally.collectors.base import CollectError, scrape
from kvtally.collectors.lustre import Lustre, parse_stats

STORAGE = Path(__file__).parent / "fixtures" / "storage"
LLITE = (STORAGE / "lustre_llite_stats.txt").read_text()
OSC = (STORAGE / "lustre_osc_stats.txt").read_text()
NOTHING_YET = "snapshot_time             1510950459.772792457 secs.nsecs\n"
MOUNT = "work-ffff81032792f800"


def target(number: int, end: str = "ffff81032792f800") -> str:
    return f"work-OST{number:04x}-osc-{end}"


class Host:
    """A /proc and a /sys of our own making, with Lustre in the place of an old or of a new version."""

    def __init__(self, root: Path, place: str) -> None:
        self.proc, self.sys = root / "proc", root / "sys"
        self.lustre = root / place
        self.lustre.mkdir(parents=True)

    def stats(self, kind: str, name: str, text: str) -> None:
        folder = self.lustre / kind / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "stats").write_text(text)

    def reader(self) -> Lustre:
        return Lustre("work", str(self.proc), str(self.sys))


@pytest.fixture(params=["proc/fs/lustre", "sys/kernel/debug/lustre"])
def host(tmp_path: Path, request: pytest.FixtureRequest) -> Host:
    return Host(tmp_path, request.param)


def test_counts_and_sums_are_read_and_lines_without_a_sum_are_left_out() -> None:
    assert parse_stats(LLITE) == {"read_bytes": (1, 4194304), "write_bytes": (89467810, 93813797294080)}
    osc = parse_stats(OSC)
    assert osc["read_bytes"] == (591036, 452705124352)
    assert osc["ost_read"] == (591567, 10257217364)


def test_programs_bytes_and_servers_bytes_are_parts_of_one_reading(host: Host) -> None:
    host.stats("llite", MOUNT, LLITE)
    host.stats("osc", target(0), OSC)
    host.stats("osc", target(1), NOTHING_YET)
    collector = host.reader()
    (reading,) = collector.collect()
    assert collector.source == "lustre:work"
    assert (reading.kind, reading.name) == ("filesystem", "lustre:work")
    assert reading.attributes == {"source": "lustre llite and osc", "fs": "work"}
    assert reading.values == (None,) * 8
    # ost_read took 10257217364 us in 591567 calls, ost_write 6699685897 us in 298332
    osc = (452705124352, 591567, 10257.217364, 249338619646, 298332, 6699.685897)
    assert reading.parts == {
        f"llite {MOUNT}": (0, 0, 0, 0, 0, 0, 4194304, 93813797294080),
        f"osc {target(0)}": (*osc, 0, 0),
        f"osc {target(1)}": (0, 0, 0, 0, 0, 0, 0, 0),
    }


def test_targets_are_summed_over_an_interval(host: Host) -> None:
    for kind, name in (("llite", MOUNT), ("osc", target(0)), ("osc", target(1))):
        host.stats(kind, name, NOTHING_YET)
    state = opened(host.reader().collect()[0], 10)
    read = NOTHING_YET + "read_bytes 3 samples [bytes] 1 2 {} 9\nost_read 3 samples [usec] 1 2 {} 9\n"
    host.stats("osc", target(0), read.format(1000, 7))
    host.stats("osc", target(1), read.format(500, 3))
    host.stats("llite", MOUNT, NOTHING_YET + "read_bytes 9 samples [bytes] 1 2 4000\n")
    interval, _, _ = close(state, host.reader().collect()[0], 20)
    assert interval.values == (1500, 6, 10_000, 0, 0, 0, 4000, 0)


def test_another_mount_of_it_counts_whole_and_one_that_goes_takes_nothing_away(host: Host) -> None:
    host.stats("llite", MOUNT, NOTHING_YET + "read_bytes 9 samples [bytes] 1 2 4000\n")
    host.stats("osc", target(0), OSC)
    state = opened(host.reader().collect()[0], 10)
    (host.lustre / "llite" / MOUNT / "stats").unlink()
    (host.lustre / "llite" / MOUNT).rmdir()
    host.stats("llite", "work-ffff88105db50000", NOTHING_YET + "read_bytes 1 samples [bytes] 70 70 70\n")
    assert close(state, host.reader().collect()[0], 20)[0].values == (0, 0, 0, 0, 0, 0, 70, 0)


def test_a_mount_that_goes_while_it_is_read_hides_no_other(host: Host) -> None:
    host.stats("llite", MOUNT, LLITE)
    host.stats("osc", target(0), OSC)
    state = opened(host.reader().collect()[0], 10)
    going = host.lustre / "llite" / "work-ffff88105db50000"
    going.mkdir()  # listed, and its stats are there no more
    _, state, _ = close(state, host.reader().collect()[0], 20)
    going.rmdir()
    # what the other has read since it was mounted is not counted again
    assert close(state, host.reader().collect()[0], 30)[0].values == (0,) * 8


def test_a_mount_whose_only_count_is_cleared_counts_from_nothing(host: Host) -> None:
    line = NOTHING_YET + "read_bytes 9 samples [bytes] 1 2 {}\n"
    host.stats("llite", MOUNT, line.format(4000))
    state = opened(host.reader().collect()[0], 10)
    host.stats("llite", MOUNT, line.format(70))  # lctl set_param llite.*.stats=clear
    interval, _, findings = close(state, host.reader().collect()[0], 20)
    assert interval.values[6:] == (70, 0)
    assert findings == []


def test_where_one_side_is_not_shown_its_quantities_are_unknown(host: Host) -> None:
    host.stats("llite", MOUNT, LLITE)
    state = opened(host.reader().collect()[0], 10)
    assert close(state, host.reader().collect()[0], 20)[0].values == (*(None,) * 6, 0, 0)


def test_other_filesystems_and_a_metadata_servers_own_clients_are_left_out(host: Host) -> None:
    host.stats("llite", MOUNT, LLITE)
    host.stats("llite", "work2-ffff81032792f800", LLITE)
    host.stats("osc", target(0, "MDT0000"), OSC)
    host.stats("osc", "home-OST0000-osc-ffff81032792f800", OSC)
    assert list(host.reader().collect()[0].parts or {}) == [f"llite {MOUNT}"]


def test_a_filesystem_that_is_not_mounted_is_no_data(host: Host) -> None:
    host.stats("llite", "home-ffff81032792f800", LLITE)
    outcome = scrape(host.reader(), lambda: 0)
    assert (outcome.outcome, outcome.reason) == ("no_data", "Lustre tells nothing of a filesystem work on this host")


def test_counts_that_may_not_be_read_are_no_data_with_a_hint(host: Host) -> None:
    host.stats("llite", MOUNT, LLITE)
    with without_rights(host.lustre):
        outcome = scrape(host.reader(), lambda: 0)
    assert outcome.outcome == "no_data"
    assert outcome.reason.endswith("/lustre/llite may not be read")
    assert "root" in outcome.hint


@pytest.mark.parametrize(
    "text", ["", "read_bytes 1 samples [bytes] 1 1 1\n", NOTHING_YET + "a x samples [bytes] 1 1 1"]
)
def test_what_is_no_stats_file_is_an_error(text: str) -> None:
    with pytest.raises(CollectError, match="stats file of Lustre"):
        parse_stats(text)
