from __future__ import annotations

import gzip
import io
import json
import lzma
import random
import resource
import signal
import subprocess
import sys
import tarfile
import tracemalloc
from decimal import Decimal
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtally.agent import recording as recording_module
from kvtally.agent.recording import Failure, GpuLine, HostLine, Page, RecordingError, open_recording
from kvtally.agent.recording_writer import RecordingWriter, pack

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from kvtally.agent.recording import Recording

Files = dict[str, bytes]

META = b'{"name": "small", "engine": "vllm"}'
SMALL: Files = {
    "meta.json": META,
    "vllm/1000.prom": b"vllm:a 1\n",
    "vllm/2000.prom": b"vllm:a 2\n",
}


def tar_of(members: Iterable[tuple[str, bytes]], top: str = "any-name/") -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name, body in members:
            header = tarfile.TarInfo(top + name)
            header.size = len(body)
            archive.addfile(header, io.BytesIO(body))
    return packed.getvalue()


def opened(members: Files, **changed: bytes) -> Recording:
    return open_recording(io.BytesIO(tar_of({**members, **changed}.items())))


def folder_of(place: Path, members: Files) -> Path:
    for name, body in members.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(body)
    return place


def refusal(act: Callable[[], object]) -> str:
    with pytest.raises(RecordingError) as caught:
        act()
    assert caught.value.hint
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_events_of_one_instant_come_as_gpu_host_failure_cache_page_engine_page() -> None:
    recording = opened(
        {
            "vllm/1000.prom": b"engine",
            "lmcache/1000.prom": b"cache",
            "scrapes.jsonl": b'{"t": 1.0, "source": "vllm", "took_seconds": 2.5, "error": "timed out"}\n',
            "host.jsonl": b'{"t": 1, "processes": []}\n',
            "gpu.jsonl": b'{"t": 1.000000001, "gpus": []}\n{"t": 1.0, "gpus": [{"index": 0}]}\n',
            "meta.json": META,
        }
    )
    assert list(recording.events()) == [
        GpuLine(1_000_000_000, {"t": 1.0, "gpus": [{"index": 0}]}),
        HostLine(1_000_000_000, {"t": 1, "processes": []}),
        Failure(1_000_000_000, "vllm", 2.5, "timed out"),
        Page(1_000_000_000, "lmcache", b"cache"),
        Page(1_000_000_000, "vllm", b"engine"),
        GpuLine(1_000_000_001, {"t": 1.000000001, "gpus": []}),
    ]
    assert recording.missing == ()
    assert recording.notes == ()


def test_a_recording_says_what_it_is_and_what_it_lacks() -> None:
    recording = opened(SMALL)
    assert recording.name == "small"
    assert recording.meta == {"name": "small", "engine": "vllm"}
    assert recording.missing == ("gpu.jsonl", "host.jsonl", "scrapes.jsonl", "lmcache")
    assert (recording.page_count, recording.first_ns, recording.last_ns) == (2, 1_000_000_000, 2_000_000_000)


def test_events_can_be_read_again() -> None:
    recording = opened(SMALL)
    assert list(recording.events()) == list(recording.events())


def test_an_unnamed_recording_is_named_after_its_file(tmp_path: Path) -> None:
    packed = tmp_path / "monday.tar.xz"
    packed.write_bytes(lzma.compress(tar_of({**SMALL, "meta.json": b"{}"}.items())))
    assert open_recording(packed).name == "monday"


def test_folders_may_carry_a_number_and_other_members_are_never_read() -> None:
    recording = opened(
        {
            "requests.jsonl": b"not json",
            "busy.jsonl": b"not json",
            "vllm-1/1000.prom": b"second",
            "vllm-0/1000.prom": b"first",
            "vllm-0/.1001.prom.part": b"half a page",
            "vllm-0/notes.prom": b"no page",
            "other/1000.prom": b"no page",
            "meta.json": META,
        }
    )
    assert [page.body for page in recording.events() if isinstance(page, Page)] == [b"first", b"second"]


@pytest.mark.parametrize("top", ["", "./", "./some-name/", "vllm/"])
def test_the_top_folder_may_have_any_name_or_none(top: str) -> None:
    recording = open_recording(io.BytesIO(tar_of(SMALL.items(), top)))
    assert [event.t_ns for event in recording.events()] == [1_000_000_000, 2_000_000_000]


def test_the_time_of_a_line_is_taken_from_its_text_to_the_nanosecond() -> None:
    line = b'{"t": 1795409206.964902611, "gpus": []}\n'
    (first, *_) = opened({"meta.json": META, "gpu.jsonl": line, "vllm/1795409207000.prom": b""}).events()
    assert first.t_ns == 1_795_409_206_964_902_611
    # as a float the same text is the nearest multiple of 2**-22 s
    assert round(1795409206.964902611 * 1e9) != first.t_ns


def test_lines_that_a_clock_set_back_left_out_of_order_come_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording_module, "BLOCK_BYTES", 64)  # about four lines a block
    seconds = [5, 6, 7, 8, 9, 1, 2, 3, 4, 5, 6, 20, 0, 21]
    lines = b"".join(b'{"t": %d, "n": %d}\n' % (second, number) for number, second in enumerate(seconds))
    events = opened({"meta.json": META, "host.jsonl": lines, "vllm/30000.prom": b""}).events()
    found = [(event.line["t"], event.line["n"]) for event in events if isinstance(event, HostLine)]
    assert found == sorted(zip(seconds, range(14), strict=True))


times_ms = st.lists(st.integers(0, 40), max_size=12, unique=True)


@st.composite
def recordings(draw: st.DrawFn) -> tuple[Files, list[Any]]:
    """A recording's files, and its events worked out from what was drawn."""
    members = {"meta.json": META}
    ranked: list[tuple[int, int, int, Any]] = []
    for rank, kind, name in ((0, GpuLine, "gpu.jsonl"), (1, HostLine, "host.jsonl")):
        stamps = draw(st.lists(st.integers(0, 40), max_size=12))
        for number, t in enumerate(stamps):
            ranked.append((t, rank, number, kind(t * 1_000_000, {"t": t / 1000, "n": number})))
        if stamps:
            members[name] = b"".join(b'{"t": %.3f, "n": %d}\n' % (t / 1000, n) for n, t in enumerate(stamps))
    for rank, source in ((3, "lmcache"), (4, "vllm")):
        for t in draw(times_ms):
            body = draw(st.binary(max_size=40))
            members[f"{source}/{t}.prom"] = body
            ranked.append((t, rank, 0, Page(t * 1_000_000, source, body)))
    members["vllm/41.prom"] = b"last"
    ranked.append((41, 4, 0, Page(41_000_000, "vllm", b"last")))
    return members, [event for *_, event in sorted(ranked, key=lambda item: item[:3])]


@given(drawn=recordings(), compress=st.sampled_from([bytes, gzip.compress, lzma.compress]), seed=st.integers())
@settings(max_examples=60, deadline=None)
def test_events_are_complete_and_in_order_whatever_the_order_of_members(
    tmp_path_factory: pytest.TempPathFactory,
    drawn: tuple[Files, list[Any]],
    compress: Callable[[bytes], bytes],
    seed: int,
) -> None:
    members, expected = drawn
    shuffled = list(members.items())
    random.Random(seed).shuffle(shuffled)
    assert list(open_recording(io.BytesIO(compress(tar_of(shuffled)))).events()) == expected
    folder = folder_of(tmp_path_factory.mktemp("drawn"), members)
    assert list(open_recording(folder).events()) == expected
    pack(folder, folder / "again.tar.xz")
    assert list(open_recording(folder / "again.tar.xz").events()) == expected


def test_reading_out_of_order_holds_a_fraction_of_the_pages_and_in_order_none() -> None:
    page = b"".join(b'vllm:bucket{le="%d"} %d\n' % (number, number * 7) for number in range(4000))
    pages = [(f"vllm/{number}.prom", page) for number in range(1, 101)]
    raw_bytes = 100 * len(page)
    for members, share in (
        ([("meta.json", META), *pages], 0.08),
        ([*reversed(pages), ("meta.json", META)], 0.35),
    ):
        recording = open_recording(io.BytesIO(tar_of(members)))
        tracemalloc.start()
        assert sum(len(event.body) for event in recording.events() if isinstance(event, Page)) == raw_bytes
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak_bytes < share * raw_bytes


def test_more_than_may_be_held_is_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    members = {f"vllm/{number}.prom": random.Random(number).randbytes(1000) for number in range(9, 0, -1)}
    members["meta.json"] = META
    monkeypatch.setattr(recording_module, "HELD_LIMIT_BYTES", 4000)
    assert "too large to put in order" in refusal(lambda: list(opened(members).events()))
    assert len(list(open_recording(folder_of(tmp_path, members)).events())) == 9


def test_a_torn_last_line_is_left_out_and_reported() -> None:
    recording = opened(SMALL, **{"gpu.jsonl": b'{"t": 1.5, "gpus": []}\n{"t": 1.75, "gp'})
    assert [event.t_ns for event in recording.events()] == [1_000_000_000, 1_500_000_000, 2_000_000_000]
    assert recording.notes == ("gpu.jsonl line 2 is torn and was left out",)


def test_a_whole_last_line_without_its_end_counts() -> None:
    recording = opened(SMALL, **{"gpu.jsonl": b'{"t": 1.5, "gpus": []}\n\n{"t": 1.75}'})
    assert sum(isinstance(event, GpuLine) for event in recording.events()) == 2
    assert recording.notes == ()


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"[1]",
        b'{"gpus": []}',
        b'{"t": "soon"}',
        b'{"t": "NaN"}',
        b'{"t": NaN}',
        b'{"t": -1}',
        b'{"t": 1e30}',
        b'{"t": 1e999999999999999999999}',
        b'{"t": null}',
        b'{"t": 1, "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b"\xff\xfe",
    ],
    ids=lambda line: line[:20].decode("latin-1"),
)
def test_a_bad_line_is_named_with_its_file_and_number(line: bytes) -> None:
    lines = b'{"t": 1.5}\n' + line + b'\n{"t": 1.6}\n'
    assert refusal(lambda: opened(SMALL, **{"host.jsonl": lines})).startswith("host.jsonl line 2: ")


def test_a_scrape_line_must_tell_source_and_time() -> None:
    lines = b'{"t": 1.5, "source": "vllm", "took_seconds": 0.01, "error": null}\n{"t": 1.6, "error": "no"}\n'
    assert refusal(lambda: opened(SMALL, **{"scrapes.jsonl": lines})).startswith("scrapes.jsonl line 2: ")


def test_a_line_or_page_of_impossible_length_is_refused() -> None:
    long_line = b'{"t": 1.5}\n{"t": 1.6, "x": "' + b"x" * (1 << 20) + b'"}\n'
    assert refusal(lambda: opened(SMALL, **{"gpu.jsonl": long_line})) == "gpu.jsonl line 2 is longer than 1 MiB"
    giant = {**SMALL, "vllm/1500.prom": bytes((16 << 20) + 1)}
    assert "1500.prom is larger than 16 MiB" in refusal(lambda: opened(giant))


def test_a_giant_page_in_a_folder_is_refused_without_being_read(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, SMALL)
    with (folder / "vllm/1500.prom").open("wb") as page:
        page.truncate(1 << 40)
    assert "1500.prom is larger than 16 MiB" in refusal(lambda: open_recording(folder))


@pytest.mark.parametrize("compress", [lzma.compress, gzip.compress, bytes])
def test_a_truncated_archive_is_refused_before_its_first_event(compress: Callable[[bytes], bytes]) -> None:
    body = random.Random(1).randbytes(20_000)
    archive = tar_of({**SMALL, "vllm/3000.prom": body}.items())
    packed = compress(archive[: archive.rindex(body[-100:]) + 1000])
    for cut in (len(packed) // 2, len(packed) - 600):
        assert "damaged" in refusal(lambda cut=cut: open_recording(io.BytesIO(packed[:cut])))  # type: ignore[misc]


def test_an_archive_cut_between_two_members_is_refused() -> None:
    whole = tar_of(SMALL.items())
    last = whole.index(b"any-name/vllm/2000.prom")
    assert "damaged" in refusal(lambda: open_recording(io.BytesIO(whole[:last])))


@pytest.mark.parametrize("compress", [lzma.compress, gzip.compress])
def test_one_wrong_byte_in_a_compressed_archive_is_refused(compress: Callable[[bytes], bytes]) -> None:
    packed = bytearray(compress(tar_of({**SMALL, "vllm/3000.prom": random.Random(1).randbytes(20_000)}.items())))
    packed[len(packed) // 2] ^= 1
    assert "damaged" in refusal(lambda: open_recording(io.BytesIO(packed)))


def test_a_damaged_header_is_refused_rather_than_taken_for_the_end() -> None:
    archive = bytearray(tar_of(SMALL.items()))
    archive[archive.index(b"any-name/vllm/2000.prom")] ^= 1
    assert "damaged" in refusal(lambda: open_recording(io.BytesIO(archive)))


def test_a_header_that_claims_gigabytes_of_names_is_refused() -> None:
    header = tarfile.TarInfo("././@LongLink")
    header.type = tarfile.GNUTYPE_LONGNAME
    header.size = 5 << 30
    archive = header.tobuf() + tar_of(SMALL.items())
    assert "impossible size" in refusal(lambda: open_recording(io.BytesIO(archive)))


def test_members_that_climb_out_of_the_folder_are_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    climbing = [
        ("../meta.json", b"{}"),
        ("../vllm/1500.prom", b"evil"),
        ("/vllm/1501.prom", b"evil"),
        ("small/../../vllm/1502.prom", b"evil"),
        *((f"small/{name}", body) for name, body in SMALL.items()),
    ]
    recording = open_recording(io.BytesIO(tar_of(climbing, top="")))
    assert [event.t_ns for event in recording.events()] == [1_000_000_000, 2_000_000_000]
    assert list(tmp_path.iterdir()) == []


def test_a_page_that_is_a_link_is_refused() -> None:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        header = tarfile.TarInfo("small/vllm/1500.prom")
        header.type = tarfile.LNKTYPE
        header.linkname = "small/vllm/1000.prom"
        archive.addfile(header)
    assert "no plain file" in refusal(lambda: open_recording(packed))


def test_two_recordings_in_one_archive_or_a_member_twice_are_refused() -> None:
    both = [(f"{top}/{name}", body) for top in ("one", "two") for name, body in SMALL.items()]
    assert "more than one recording" in refusal(lambda: open_recording(io.BytesIO(tar_of(both, top=""))))
    twice = [*SMALL.items(), ("vllm/2000.prom", b"other")]
    assert "vllm/2000.prom twice" in refusal(lambda: open_recording(io.BytesIO(tar_of(twice))))


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"<html>" * 200, lzma.compress(b"no tar"), gzip.compress(b""), bytes(10240), b"\xfd7zXZ\x00"],
)
def test_what_is_no_recording_is_refused(tmp_path: Path, content: bytes) -> None:
    place = tmp_path / "x.tar.xz"
    place.write_bytes(content)
    assert refusal(lambda: open_recording(place)).startswith("x.tar.xz is no recording")


def test_a_missing_path_an_empty_folder_and_missing_parts_are_told_apart(tmp_path: Path) -> None:
    assert "does not exist" in refusal(lambda: open_recording(tmp_path / "nowhere"))
    assert "holds no meta.json" in refusal(lambda: open_recording(tmp_path))
    assert "holds no pages" in refusal(lambda: open_recording(folder_of(tmp_path, {"meta.json": META})))
    assert "meta.json: " in refusal(lambda: open_recording(folder_of(tmp_path, {"meta.json": b"{"})))
    no_instant = {**SMALL, "vllm/9999999999999.prom": b""}
    assert "named for no instant" in refusal(lambda: opened(no_instant))


def test_a_page_that_vanishes_during_the_replay_is_an_error(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, SMALL)
    recording = open_recording(folder)
    (folder / "vllm/2000.prom").unlink()
    assert "lost pages" in refusal(lambda: list(recording.events()))


def test_pages_that_a_running_recorder_adds_after_opening_stay_out(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, SMALL)
    recording = open_recording(folder)
    folder_of(tmp_path, {"vllm/1500.prom": b"new"})
    assert [event.t_ns for event in recording.events()] == [1_000_000_000, 2_000_000_000]


def test_what_was_written_is_read_back_from_the_folder_and_from_the_package(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with RecordingWriter(folder, {"name": "live"}) as writer:
        assert json.loads((folder / "meta.json").read_bytes()) == {"name": "live"}
        writer.gpu({"t": Decimal("1795409206.964902611"), "gpus": [{"index": 0, "energy_millijoules": None}]})
        writer.host({"t": 1795409206.5, "processes": []})
        writer.page("vllm", 1_795_409_206_962_999_999, b"vllm:a 1\n")
        writer.page("lmcache", 1_795_409_206_962_000_000, b"lmcache:a 1\n")
        writer.scrape_ok(1_795_409_206_962_999_999, "vllm", 0.004)
        writer.failure(1_795_409_207_000_000_001, "vllm", 10.0, "timed out")
        writer.update_meta(engine_version="0.25.1")
    expected = [
        HostLine(1_795_409_206_500_000_000, {"t": 1795409206.5, "processes": []}),
        Page(1_795_409_206_962_000_000, "lmcache", b"lmcache:a 1\n"),
        Page(1_795_409_206_962_000_000, "vllm", b"vllm:a 1\n"),
        GpuLine(
            1_795_409_206_964_902_611,
            {"t": 1795409206.964902611, "gpus": [{"index": 0, "energy_millijoules": None}]},
        ),
        Failure(1_795_409_207_000_000_001, "vllm", 10.0, "timed out"),
    ]
    pack(folder, tmp_path / "live.tar.xz")
    for path in (folder, tmp_path / "live.tar.xz"):
        recording = open_recording(path)
        assert list(recording.events()) == expected
        assert recording.meta == {"name": "live", "engine_version": "0.25.1"}
        assert recording.missing == ()
    assert (folder / "scrapes.jsonl").read_text().splitlines() == [
        '{"t":1795409206.962999999,"source":"vllm","took_seconds":0.004,"error":null}',
        '{"t":1795409207.000000001,"source":"vllm","took_seconds":10.0,"error":"timed out"}',
    ]


def test_a_package_lists_lines_then_pages_by_time_and_names_nobody(tmp_path: Path) -> None:
    folder = folder_of(
        tmp_path / "run",
        {
            "vllm/20000.prom": b"2",
            "vllm/3000.prom": b"1",
            "lmcache/20000.prom": b"3",
            "requests.jsonl": b"{}",
            "scrapes.jsonl": b"",
            "host.jsonl": b'{"t": 4}\n',
            "gpu.jsonl": b'{"t": 4}\n',
            "meta.json": META,
        },
    )
    first, second = tmp_path / "a" / "night.tar.xz", tmp_path / "b" / "night.tar.xz"
    for destination in (first, second):
        destination.parent.mkdir()
        pack(folder, destination)
        for place in folder.rglob("*"):
            place.touch()
    assert first.read_bytes() == second.read_bytes()
    assert [place.name for place in first.parent.iterdir()] == ["night.tar.xz"]
    with tarfile.open(first) as archive:
        members = archive.getmembers()
    assert [(member.name, member.mtime) for member in members] == [
        ("night/meta.json", 3),
        ("night/gpu.jsonl", 3),
        ("night/host.jsonl", 3),
        ("night/scrapes.jsonl", 3),
        ("night/vllm/3000.prom", 3),
        ("night/lmcache/20000.prom", 20),
        ("night/vllm/20000.prom", 20),
    ]
    assert {(member.uid, member.gid, member.uname, member.gname) for member in members} == {(0, 0, "", "")}


def test_packing_something_else_or_under_another_name_is_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "run", SMALL)
    assert "no .tar.xz" in refusal(lambda: pack(folder, tmp_path / "x.zip"))
    assert "no folder" in refusal(lambda: pack(tmp_path / "nowhere", tmp_path / "x.tar.xz"))
    assert "cannot be written" in refusal(lambda: pack(folder, tmp_path / "nowhere" / "x.tar.xz"))


def test_a_folder_that_holds_something_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    assert "is not empty" in refusal(lambda: RecordingWriter(tmp_path, {}))
    assert [place.name for place in tmp_path.iterdir()] == ["thesis.txt"]
    assert "cannot be written" in refusal(lambda: RecordingWriter(tmp_path / "thesis.txt", {}))


def test_a_millisecond_that_is_taken_loses_no_page(tmp_path: Path) -> None:
    with RecordingWriter(tmp_path, {}) as writer:
        writer.page("vllm", 5_000_000, b"before the clock went back")
        writer.page("vllm", 5_000_000, b"after")
    assert [(page.t_ns, page.body) for page in open_recording(tmp_path).events() if isinstance(page, Page)] == [
        (5_000_000, b"before the clock went back"),
        (6_000_000, b"after"),
    ]


def test_the_writer_refuses_what_no_reader_would_take(tmp_path: Path) -> None:
    with RecordingWriter(tmp_path, {}) as writer:
        with pytest.raises(ValueError, match="no source"):
            writer.page("../vllm", 0, b"")
        with pytest.raises(TypeError, match="needs t"):
            writer.gpu({"gpus": []})
        assert "larger than 16 MiB" in refusal(lambda: writer.page("vllm", 0, bytes((16 << 20) + 1)))
        assert "longer than 1 MiB" in refusal(lambda: writer.host({"t": 1, "x": "x" * (1 << 20)}))
    assert [place.name for place in tmp_path.iterdir()] == ["meta.json"]


def test_a_full_disk_is_named_and_leaves_whole_lines_and_pages(tmp_path: Path) -> None:
    with RecordingWriter(tmp_path, {"name": "full"}) as writer:
        writer.host({"t": 1, "n": 1})
        whole_bytes = (tmp_path / "host.jsonl").stat().st_size
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (whole_bytes + 4, hard))  # room for four bytes of the next line
        try:
            for _ in range(2):
                assert "host.jsonl cannot be written" in refusal(lambda: writer.host({"t": 2, "n": 2}))
            assert "5.prom cannot be written" in refusal(lambda: writer.page("vllm", 5_000_000, bytes(1000)))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
            signal.signal(signal.SIGXFSZ, handler)
        writer.host({"t": 3, "n": 3})
        writer.page("vllm", 6_000_000, b"page")
    assert (tmp_path / "host.jsonl").read_bytes() == b'{"t":1,"n":1}\n{"t":3,"n":3}\n'
    assert [place.name for place in (tmp_path / "vllm").iterdir()] == ["6.prom"]


def test_a_device_without_room_is_called_full(tmp_path: Path) -> None:
    with RecordingWriter(tmp_path, {}) as writer:
        (tmp_path / "gpu.jsonl").symlink_to("/dev/full")
        with pytest.raises(RecordingError, match="No space left") as caught:
            writer.gpu({"t": 1})
    assert caught.value.hint == "make room; what was written before is whole"


def test_a_recorder_killed_at_any_moment_leaves_a_readable_recording(tmp_path: Path) -> None:
    program = """
import sys
from pathlib import Path
from kvtally.agent.recording_writer import RecordingWriter

writer = RecordingWriter(Path(sys.argv[1]), {"name": "killed"})
for number in range(10_000_000):
    writer.gpu({"t": number, "gpus": []})
    writer.page("vllm", number * 10**9, b"x" * 1000)
    print(number, flush=True)
"""
    child = subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "run")], stdout=subprocess.PIPE)
    assert child.stdout is not None
    with child, child.stdout:
        while int(child.stdout.readline()) < 50:
            pass
        child.kill()
        told = max((int(line) for line in child.stdout if line.endswith(b"\n")), default=50)
    recording = open_recording(tmp_path / "run")
    pages = [event for event in recording.events() if isinstance(event, Page)]
    assert {len(page.body) for page in pages} == {1000}
    assert [page.t_ns for page in pages][: told + 1] == [number * 10**9 for number in range(told + 1)]
    assert sum(isinstance(event, GpuLine) for event in recording.events()) >= told + 1


def test_the_demo_is_a_whole_recording_of_an_h100() -> None:
    demo = files("kvtally.agent").joinpath("demo", "h100-llama8b.tar.xz")
    recording = open_recording(demo)
    assert recording.meta["provenance"] == (
        "one NVIDIA H100 80GB HBM3, vLLM 0.25.1, Llama-8B shape with dummy weights, 2026-11-23, "
        "recorded by the kvtally project"
    )
    assert recording.missing == ("scrapes.jsonl", "lmcache")
    assert recording.notes == ()
    events = list(recording.events())
    assert [sum(isinstance(event, kind) for event in events) for kind in (Page, GpuLine, HostLine)] == [95, 365, 94]
    last = [event for event in events if isinstance(event, Page)][-1].body.decode()
    assert 'vllm:prompt_tokens_total{engine="0",model_name="llama-8b"} 2.828558e+06\n' in last
    assert 'vllm:generation_tokens_total{engine="0",model_name="llama-8b"} 33380.0\n' in last
    with demo.open("rb") as file:
        assert len(file.read()) <= 120_000
        file.seek(0)
        with tarfile.open(fileobj=file) as archive:
            assert not any("requests" in name or "busy" in name for name in archive.getnames())


class ZipLike:
    """A package resource that is no path, as an importer other than the file system's gives it."""

    name = "small.tar"

    def open(self, mode: str) -> io.BytesIO:
        assert mode == "rb"
        return io.BytesIO(tar_of(SMALL.items()))


def test_a_resource_that_is_no_path_is_read_too() -> None:
    recording = open_recording(ZipLike())  # type: ignore[arg-type]
    assert [event.t_ns for event in recording.events()] == [1_000_000_000, 2_000_000_000]


def test_a_stream_that_cannot_be_read_twice_is_refused() -> None:
    class Pipe(io.BytesIO):
        def seekable(self) -> bool:
            return False

    assert "cannot be read twice" in refusal(lambda: open_recording(Pipe()))
