from __future__ import annotations

from pathlib import Path

from kvtally.collectors import juicefs
from kvtally.collectors.page import PageMapper
from kvtally.collectors.quantities import index
from kvtally.collectors.registry import reader_class, sources_on

# Of a page of JuiceFS 1.0: 2,173,698,048 bytes were written and read back, 26 MB of them from its disk cache
LABELS = 'mp="/kv",vol_name="myjuicefs"'
PAGE = f"""\
juicefs_fuse_read_size_bytes_sum{{{LABELS}}} 2.173698048e+09
juicefs_fuse_written_size_bytes_sum{{{LABELS}}} 2.173698048e+09
juicefs_object_request_data_bytes{{method="GET",{LABELS}}} 2.147483648e+09
juicefs_object_request_data_bytes{{method="PUT",{LABELS}}} 2.205155328e+09
juicefs_process_start_time_seconds{{{LABELS}}} 1.65354147984e+09
""".encode()


def test_what_programs_read_and_what_the_objects_gave_are_told_apart() -> None:
    assert sources_on(PAGE) == ("juicefs",)
    (reading,) = PageMapper("node:9567", (reader_class("juicefs")(),)).read(PAGE)
    names = ("read_bytes", "write_bytes", "app_read_bytes", "app_write_bytes")
    assert [reading.values[index("filesystem", name)] for name in names] == [2**31, 2205155328, *[2173698048] * 2]
    assert (reading.epoch, reading.attributes["mounts"]) == (1653541479.84, "/kv")


def test_a_source_takes_no_more_lines_than_contributing_says() -> None:
    assert Path(str(juicefs.__file__)).read_text() in (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
    assert sum(len(Path(file).read_text().splitlines()) for file in (str(juicefs.__file__), __file__)) < 60
