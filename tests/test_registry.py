from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvtally.collectors.page import PageMapper
from kvtally.collectors.registry import SOURCES, reader_class, sources_on, titles

if TYPE_CHECKING:
    from kvtally.collectors.page import SourceMapping

PAGES = Path(__file__).parent / "fixtures" / "pages"
OF_PAGES = [name for name, source in SOURCES.items() if not source.integrates]
# every process may show them
ANYBODYS = {"process_start_time_seconds"}


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_can_be_loaded_and_is_what_its_row_says(name: str) -> None:
    made = reader_class(name)
    assert SOURCES[name].reader.startswith("kvtally.collectors.")
    if SOURCES[name].integrates:
        assert callable(made(lambda: 0.0).read)
    else:
        mapping: SourceMapping = made()
        assert mapping.names()
        assert callable(mapping.compile)


@pytest.mark.parametrize("name", OF_PAGES)
def test_all_that_a_source_reads_is_wanted_and_no_other_source_is_taken_for_it(name: str) -> None:
    mapping: SourceMapping = reader_class(name)()
    for sample in mapping.names():
        assert mapping.wants(sample), sample
        # a family that two sources share would make each of them see the other on every page of its own
        shown = sources_on(f"{sample} 1\n".encode())
        assert shown in {(name,), ()}, sample
        assert sources_on(f"{sample.replace(':', '_')} 1\n".encode()) == shown, sample


@pytest.mark.parametrize("name", OF_PAGES)
def test_a_source_is_recognised_by_something_that_it_reads(name: str) -> None:
    names = set(reader_class(name)().names()) - ANYBODYS
    known = {sample for sample in names if sources_on(f'{sample}{{a="b"}} 1\n'.encode())}
    assert known
    if len(SOURCES[name].prefixes) == 1 and SOURCES[name].is_engine:
        assert known == names


@pytest.mark.parametrize(
    ("folder", "sources"),
    [
        ("cpu-v012", ("vllm",)),
        ("cpu-v016", ("vllm",)),
        ("cpu-v032", ("vllm",)),
        ("h100-lmcache-in-process", ("vllm", "lmcache")),
        ("h100-v025-lmcache", ("vllm", "lmcache")),
        ("lmcache-mp-056", ("lmcache_mp",)),
    ],
)
def test_recorded_pages_show_the_sources_that_were_recorded(folder: str, sources: tuple[str, ...]) -> None:
    pages = sorted((PAGES / folder).glob("*.prom"))
    assert pages
    for page in pages:
        assert sources_on(page.read_bytes()) == sources


@pytest.mark.parametrize("path", sorted(PAGES.glob("*/*.prom")), ids=lambda path: path.parent.name)
def test_each_source_that_a_recorded_page_shows_is_read_of_it(path: Path) -> None:
    body = path.read_bytes()
    shown = sources_on(body)
    assert shown
    for name in shown:
        readings = PageMapper("host:9", (reader_class(name)(),)).read(body)
        assert any(number is not None for reading in readings for number in reading.values), name


@pytest.mark.parametrize(
    ("sample", "sources"),
    [
        ("vllm:prompt_tokens_total", ("vllm",)),
        ("vllm_prompt_tokens_total", ("vllm",)),
        ("ray_vllm_prompt_tokens_total", ("vllm",)),
        ("lmcache:num_hit_tokens_total", ("lmcache",)),
        ("lmcache_num_hit_tokens_total", ("lmcache",)),
        ("lmcache_mp_lookup_hit_tokens_total", ("lmcache_mp",)),
        ("lmcache_mp:l1_read_keys", ("lmcache_mp",)),
        ("lmcache_mpx", ("lmcache",)),
        ("xvllm:prompt_tokens_total", ()),
        ("http_requests_total", ()),
        ("process_start_time_seconds", ()),
    ],
)
def test_a_sample_tells_its_source_in_either_spelling(sample: str, sources: tuple[str, ...]) -> None:
    for before in ("", "# a comment\n", "up 1\n\n"):
        for after in (" 1\n", " 1", '{a="b"} 1\nup 1\n'):
            assert sources_on(f"{before}{sample}{after}".encode()) == sources


def test_comments_and_labels_make_no_source() -> None:
    page = (
        b"# HELP vllm:prompt_tokens_total Prompt tokens.\n# TYPE vllm:prompt_tokens_total counter\n"
        b'up{job="vllm:a",help="\\nvllm:b"} 1\n'
    )
    assert sources_on(page) == ()
    assert sources_on(b"") == ()


def test_sources_come_in_the_order_of_the_table_whatever_order_the_page_has() -> None:
    lines = [b"lmcache_mp_a 1\n", b"lmcache:a 1\n", b"vllm:a 1\n"]
    assert sources_on(b"".join(lines)) == sources_on(b"".join(reversed(lines))) == ("vllm", "lmcache", "lmcache_mp")


def test_no_reader_is_loaded_before_its_page_is_seen() -> None:
    script = (
        "import sys, kvtally.collectors.registry as registry\n"
        "readers = {source.reader.partition(':')[0] for source in registry.SOURCES.values()}\n"
        "registry.sources_on(b'lmcache:a 1\\n')\n"
        "assert not readers & set(sys.modules), readers & set(sys.modules)\n"
        "registry.reader_class('lmcache')\n"
        "assert readers & set(sys.modules) == {'kvtally.collectors.lmcache'}\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_every_source_has_a_title_of_its_own() -> None:
    found = [source.title for source in SOURCES.values()]
    assert len(set(found)) == len(found)
    assert titles(("lmcache", "vllm")) == "LMCache in-process, vLLM"
    assert titles(()) == ""


def test_an_unknown_source_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        reader_class("nothing")
