from __future__ import annotations

from pathlib import Path

import pytest
from tests.rights import without_rights

from kvtally.agent.interval import close, opened
from kvtally.collectors.base import CollectError, scrape
from kvtally.collectors.ceph import Ceph, parse_size

SIZE = (Path(__file__).parent / "fixtures" / "storage" / "ceph_metrics_size.txt").read_text()
ONE, OTHER = "0f1e2d3c-0001-4b0e-9c57-0b0a2f1d7a11", "0f1e2d3c-0002-4b0e-9c57-0b0a2f1d7a11"
FOLDER = "kernel/debug/ceph"


def client(sys: Path, name: str, size: str | None = SIZE) -> None:
    folder = sys / FOLDER / name / "metrics"
    folder.mkdir(parents=True)
    if size is not None:
        (folder / "size").write_text(size)


def test_sums_and_counts_of_reads_and_writes_are_read() -> None:
    assert parse_size(SIZE) == (10240, 1, 20971520, 5)


@pytest.mark.parametrize(
    "text",
    [
        "",
        SIZE.replace("total_sz(bytes)", "total_sz(KiB)"),
        SIZE.replace("read ", "reads"),
        SIZE.replace("20971520", "20 MiB"),
        SIZE.replace("20971520", "many"),
    ],
)
def test_a_table_of_another_form_is_an_error(text: str) -> None:
    with pytest.raises(CollectError, match="CephFS tells sizes"):
        parse_size(text)


def test_a_cluster_is_a_reading_and_its_clients_are_parts(tmp_path: Path) -> None:
    client(tmp_path, f"{ONE}.client4115")
    client(tmp_path, f"{ONE}.client4116")
    client(tmp_path, f"{OTHER}.client9")
    (tmp_path / FOLDER / "meta").mkdir()
    one, other = Ceph(sys=str(tmp_path)).collect()
    assert (one.name, other.name) == (f"ceph:{ONE}", f"ceph:{OTHER}")
    assert one.attributes == {"source": "ceph metrics", "fsid": ONE}
    counts = (10240, 1, None, 20971520, 5, None, None, None)
    assert one.parts == {f"{ONE}.client4115": counts, f"{ONE}.client4116": counts}


def test_clients_are_summed_over_an_interval(tmp_path: Path) -> None:
    client(tmp_path, f"{ONE}.client4115")
    collector = Ceph(ONE, str(tmp_path))
    state = opened(collector.collect()[0], 10)
    client(tmp_path, f"{ONE}.client4116")  # another mount, which has read once and written five times
    assert collector.source == f"ceph:{ONE}"
    assert close(state, collector.collect()[0], 20)[0].values == (10240, 1, None, 20971520, 5, None, None, None)


def test_one_cluster_is_read_where_one_is_asked_for(tmp_path: Path) -> None:
    client(tmp_path, f"{ONE}.client4115")
    assert len(Ceph(ONE, str(tmp_path)).collect()) == 1
    outcome = scrape(Ceph(OTHER, str(tmp_path)), lambda: 0)
    assert (outcome.outcome, outcome.reason) == ("no_data", f"the kernel has no CephFS client of {OTHER}")


def test_a_host_without_cephfs_is_no_data(tmp_path: Path) -> None:
    outcome = scrape(Ceph(sys=str(tmp_path)), lambda: 0)
    assert (outcome.outcome, outcome.reason) == ("no_data", "the kernel has no CephFS client")


def test_a_kernel_that_does_not_tell_sizes_is_no_data(tmp_path: Path) -> None:
    client(tmp_path, f"{ONE}.client4115", None)
    old = tmp_path / FOLDER / f"{ONE}.client4115" / "metrics"
    assert scrape(Ceph(sys=str(tmp_path)), lambda: 0).reason == "this kernel's CephFS does not tell sizes"
    old.rmdir()
    old.write_text("one file until Linux 5.13\n")
    outcome = scrape(Ceph(sys=str(tmp_path)), lambda: 0)
    assert (outcome.outcome, outcome.hint) == ("no_data", "it does from Linux 5.14 on")


def test_debugfs_that_may_not_be_read_is_no_data_with_a_hint(tmp_path: Path) -> None:
    client(tmp_path, f"{ONE}.client4115")
    with without_rights(tmp_path / FOLDER):
        outcome = scrape(Ceph(sys=str(tmp_path)), lambda: 0)
    assert (outcome.outcome, outcome.reason) == ("no_data", f"{tmp_path}/{FOLDER} may not be read")
    assert "root" in outcome.hint
