from __future__ import annotations

from pathlib import Path

import pytest

from kvtally.collectors.base import CollectError, scrape
from kvtally.collectors.gds import GpuDirectStorage, parse_stats

STORAGE = Path(__file__).parent / "fixtures" / "storage"
ENABLED = (STORAGE / "nvidia_fs_stats_enabled.txt").read_text()
DISABLED = (STORAGE / "nvidia_fs_stats_disabled.txt").read_text()


def reader(root: Path, text: str | None) -> GpuDirectStorage:
    folder = root / "driver" / "nvidia-fs"
    folder.mkdir(parents=True)
    if text is not None:
        (folder / "stats").write_text(text)
    return GpuDirectStorage(str(root))


def test_bytes_are_whole_mebibytes_and_operations_are_all_that_were_asked_for(tmp_path: Path) -> None:
    collector = reader(tmp_path, ENABLED)
    (reading,) = collector.collect()
    assert collector.source == "gds"
    assert (reading.kind, reading.name, reading.attributes) == ("filesystem", "gds", {"source": "nvidia-fs"})
    # 1048575 and 2048 MiB
    assert reading.values == (1099510579200, 1048576, None, 2147483648, 500, None, None, None)


def test_sparse_reads_and_speeds_are_not_taken_for_reads() -> None:
    assert parse_stats(ENABLED)[1] == 1048576


def test_a_driver_that_does_not_count_is_no_data_with_what_makes_it_count(tmp_path: Path) -> None:
    outcome = scrape(reader(tmp_path, DISABLED), lambda: 0)
    assert (outcome.outcome, outcome.reason) == ("no_data", "nvidia-fs does not count bytes: IO stats are disabled")
    assert outcome.hint == "echo 1 > /sys/module/nvidia_fs/parameters/rw_stats_enabled"


def test_a_host_without_the_driver_is_no_data(tmp_path: Path) -> None:
    outcome = scrape(reader(tmp_path, None), lambda: 0)
    assert (outcome.outcome, outcome.reason) == ("no_data", "the nvidia-fs driver is not loaded")


@pytest.mark.parametrize(
    "text", ["", ENABLED.replace("readMiB", "readGiB"), DISABLED.replace("IO stats: Disabled", "IO stats: Enabled")]
)
def test_counts_of_another_form_are_an_error(text: str) -> None:
    with pytest.raises(CollectError, match="nvidia-fs tells its counts in a form that is not known"):
        parse_stats(text)
