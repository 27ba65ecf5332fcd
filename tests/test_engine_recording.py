from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from kvtally.agent.discovery import FoundEngine
from kvtally.agent.engine_recording import EngineRecording, meta_of
from kvtally.agent.recording import Page, open_recording
from kvtally.agent.replica import About

if TYPE_CHECKING:
    from pathlib import Path

T_NS = 1_795_411_552_665_000_000


def meta_in(folder: Path) -> dict[str, Any]:
    meta: dict[str, Any] = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    return meta


def test_a_page_of_the_cache_that_serves_an_engine_lies_beside_the_engines(tmp_path: Path) -> None:
    folder = tmp_path / "recording"
    engine = EngineRecording(folder, meta_of("name", "10.0.0.1:8000", About(), {}, T_NS))
    engine.page(T_NS, 0.01, b"vllm:prompt_tokens_total 7\n")
    engine.page(T_NS + 60_000_000, 0.02, b"lmcache_mp_l1_read_chunks_total 40.0\n", "lmcache")
    engine.failure(T_NS + 10**9, "lmcache", 0.03, "no answer")
    engine.close(T_NS + 2 * 10**9)
    recording = open_recording(folder)
    pages = [event for event in recording.events() if isinstance(event, Page)]
    assert [(page.source, page.t_ns - T_NS) for page in pages] == [("vllm", 0), ("lmcache", 60_000_000)]
    assert pages[1].body == b"lmcache_mp_l1_read_chunks_total 40.0\n"
    assert (folder / "lmcache" / "1795411552725.prom").is_file()
    # an engine's recording is as long as it has pages of the engine
    assert (engine.pages, engine.failed_scrapes) == (1, 1)


def test_the_engine_is_the_one_that_discovery_found_or_that_its_first_page_shows(tmp_path: Path) -> None:
    found = FoundEngine(
        "http://a:1/metrics", "a:1", None, None, "sglang", None, "unknown", None, None, (), None, None, None
    )
    told = EngineRecording(tmp_path / "told", meta_of("name", "a:1", About(), {}, T_NS))
    told.learn_process(found, None)
    told.page(T_NS, 0.01, b"trtllm_request_success_total 7\n")
    seen = EngineRecording(tmp_path / "seen", meta_of("name", "a:1", About(), {}, T_NS))
    seen.page(T_NS, 0.01, b"lmcache_mp_l1_read_chunks_total 40.0\n", "lmcache")
    seen.page(T_NS + 1, 0.01, b"some_other_server 7\n")
    assert meta_in(tmp_path / "seen")["engine"] is None
    seen.page(T_NS + 2, 0.01, b"trtllm_request_success_total 7\n")
    for recording in (told, seen):
        recording.close(T_NS + 3)
    assert meta_in(tmp_path / "told")["engine"] == "sglang"
    assert meta_in(tmp_path / "seen")["engine"] == "tensorrt_llm"
