from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from tests.ledgers import (
    HOUR,
    SECOND,
    SKU,
    START,
    STORY_END,
    Deployment,
    FakeEngine,
    FakeGpu,
    new_ledger,
    reader_of,
    tell_story,
)

from kvtally.agent.accounts import Payment, Window
from kvtally.agent.book import book_of
from kvtally.agent.config import Config
from kvtally.agent.export import openmetrics
from kvtally.agent.export.figures import snapshot
from kvtally.agent.export.metrics import METRICS
from kvtally.agent.export.openmetrics import backfill
from kvtally.agent.ledger.read import LedgerReader
from kvtally.agent.replica import About
from kvtally.agent.settlement import due_hours, settle

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from kvtally.collectors.base import Reading

FIRST = "10.0.0.1:8000"
Series = dict[tuple[str, frozenset[tuple[str, str]]], list[tuple[int, float]]]


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LedgerReader]:
    path = new_ledger(tmp_path_factory.mktemp("openmetrics"))
    tell_story(path)
    with reader_of(path) as reader:
        yield reader


def text_of(reader: LedgerReader, window: Window | None = None, step: int = 60, **more: str) -> str:
    return "".join(backfill(reader, window, step, more))


def series_of(text: str) -> Series:
    """Samples by series, as the client library of Prometheus reads them: it refuses a wrong page."""
    found: Series = {}
    for family in text_string_to_metric_families(text):  # type: ignore[no-untyped-call]  # the library
        assert family.type == "counter"
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert sample.timestamp is not None
            found.setdefault(key, []).append((int(float(sample.timestamp)), sample.value))
    return found


def counters_of(reader: LedgerReader) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """The counters that /metrics shows of the ledger as it is."""
    taken = snapshot(reader, book_of(reader, Config()), Payment(), {})
    assert taken is not None
    return {
        (METRICS[one.metric].prometheus, frozenset(one.labels.items())): one.value
        for one in taken.figures
        if METRICS[one.metric].type == "counter"
    }


def tokens(reader: LedgerReader, window: Window | None = None, step: int = 60) -> list[tuple[int, float]]:
    """The generated tokens of the one engine, seconds since START."""
    found = [samples for (name, _), samples in series_of(text_of(reader, window, step)).items() if "generated" in name]
    assert len(found) == 1
    return [(at - START // SECOND, value) for at, value in found[0]]


def one_engine(path: str, ends: list[int], version: str = "0.25.1") -> None:
    """An engine that generates a token a second, scraped at these seconds after START."""
    engine = FakeEngine(f"{FIRST}/0", version)
    deployment = Deployment(path, {FIRST: About(gpus=(), mapping="a test")}, interval_seconds=10)
    for before, second in zip([ends[0], *ends], ends, strict=False):
        engine.serve(generated=second - before)
        deployment.scrape(START + second * SECOND, [engine])
    deployment.close()


def test_the_last_sample_of_every_series_is_what_metrics_show(story: LedgerReader) -> None:
    last = {key: samples[-1][1] for key, samples in series_of(text_of(story, Window(0, STORY_END))).items()}
    assert len(last) == 38  # 7 of each of two engines, 8 of each of three GPUs
    assert last == counters_of(story)


def test_the_demo_is_told_as_metrics_show_it(demo_ledger: str) -> None:
    with LedgerReader(demo_ledger) as reader:
        last = {key: samples[-1][1] for key, samples in series_of(text_of(reader, step=1)).items()}
        assert last == counters_of(reader)


def test_series_only_grow_stand_on_steps_and_come_family_by_family(story: LedgerReader) -> None:
    text = text_of(story)
    assert text.endswith("\n# EOF\n")
    for samples in series_of(text).values():
        instants = [at for at, _ in samples]
        assert instants == sorted(set(instants))
        assert {at % 60 for at in instants} == {0}
        values = [value for _, value in samples]
        assert values == sorted(values)
        assert values[0] == 0
    names = re.findall(r"^# TYPE (\S+) counter$", text, re.MULTILINE)
    assert len(names) == len(set(names)) == 8


def test_samples_are_what_was_counted_by_then(tmp_path: Path) -> None:
    path = new_ledger(tmp_path)
    one_engine(path, [5, 15, 25, 60, 61, 130])
    with reader_of(path) as reader:
        # intervals end after 15, 25, 60, 61 and 130 s; a token a second since 5
        assert tokens(reader) == [(0, 0.0), (60, 55.0), (120, 56.0), (180, 125.0)]
        assert tokens(reader, step=10) == [(0, 0.0), (20, 10.0), (30, 20.0), (60, 55.0), (70, 56.0), (130, 125.0)]


def test_a_counter_has_counted_since_the_ledger_began(tmp_path: Path) -> None:
    path = new_ledger(tmp_path)
    one_engine(path, list(range(0, 7201, 10)))
    with reader_of(path) as reader:
        late = Window(START + 5400 * SECOND, START + 5520 * SECOND)
        assert tokens(reader, late) == [(5400, 5400.0), (5460, 5460.0), (5520, 5520.0)]
        unaligned = Window(START + 5405 * SECOND, START + 5430 * SECOND)
        # intervals that start in it: from 5410 and from 5420 on
        assert tokens(reader, unaligned, 10) == [(5410, 5410.0), (5420, 5420.0), (5430, 5430.0)]


def test_where_intervals_have_aged_out_their_hours_tell(tmp_path: Path) -> None:
    path = new_ledger(tmp_path)
    one_engine(path, list(range(0, 3 * 3600 + 601, 10)))
    with reader_of(path) as reader:
        before = tokens(reader, Window(0, START + 4 * HOUR))
        for hour in due_hours(reader, START + 4 * HOUR):
            settle(reader, hour, book_of(reader, Config()), Payment())
        assert reader.prune(START + 2 * HOUR + 1000 * SECOND)
        after = tokens(reader, Window(0, START + 4 * HOUR))
        assert after[:3] == [(0, 0.0), (3600, 3600.0), (7200, 7200.0)]
        assert after[-1] == before[-1] == (11400, 11400.0)
        assert set(after) <= set(before)
        assert len(after) == 14  # three hours, their beginning, and ten minutes by the minute


def test_a_time_that_nobody_watched_has_no_sample(tmp_path: Path) -> None:
    path = new_ledger(tmp_path)
    one_engine(path, [0, 10, 20, 1000, 1010])
    with reader_of(path) as reader:
        assert tokens(reader) == [(0, 0.0), (60, 20.0), (1020, 1010.0)]


def test_a_new_version_of_an_engine_is_no_new_series(tmp_path: Path) -> None:
    path = new_ledger(tmp_path)
    engine = FakeEngine(f"{FIRST}/0")
    deployment = Deployment(path, {FIRST: About(gpus=(), mapping="a test")}, interval_seconds=10)
    for second in range(0, 61, 10):
        if second == 30:
            engine.attributes = engine.attributes | {"version": "0.26.0"}
        engine.serve(generated=10)
        deployment.scrape(START + second * SECOND, [engine])
    deployment.close()
    with reader_of(path) as reader:
        assert len([one for one in reader.targets().values() if one.kind == "engine"]) == 2
        assert tokens(reader, step=30) == [(0, 0.0), (30, 30.0), (60, 60.0)]


class OldEngine(FakeEngine):
    """An engine that does not tell where its prompt tokens come from."""

    def reading(self) -> Reading:
        untold = ("computed_tokens", "hbm_tokens", "external_tokens")
        values = tuple(None if name in untold else value for name, value in self.counts.items())
        return super().reading()._replace(values=values)


def test_prompts_whose_source_is_not_told_are_shown_whole_beside_those_of_a_later_version(tmp_path: Path) -> None:
    path = new_ledger(tmp_path)
    old, new = OldEngine(f"{FIRST}/0", "0.12.0"), FakeEngine(f"{FIRST}/0")
    deployment = Deployment(path, {FIRST: About(gpus=(), mapping="a test")}, interval_seconds=10)
    for second in (0, 10, 20, 30):
        engine = old if second < 20 else new
        engine.serve(computed=70, hbm=30)
        engine.epoch = START / 1e9 - 600 if engine is old else START / 1e9 + 15
        deployment.scrape(START + second * SECOND, [engine])
    deployment.close()
    with reader_of(path) as reader:
        told = series_of(text_of(reader, step=10))
        prompts = {dict(labels)["source"]: samples for (name, labels), samples in told.items() if "prompt" in name}
        since = START // SECOND
        # the new engine's first interval begins with the last scrape of the old one, and counts all that it counted
        assert prompts == {
            "untold": [(since, 0.0), (since + 10, 100.0)],
            "computed": [(since + 10, 0.0), (since + 20, 70.0), (since + 30, 140.0)],
            "hbm": [(since + 10, 0.0), (since + 20, 30.0), (since + 30, 60.0)],
            "external": [(since + 10, 0.0), (since + 20, 0.0), (since + 30, 0.0)],
        }
        assert {key: samples[-1][1] for key, samples in told.items()} == counters_of(reader)


@pytest.mark.parametrize("values", [1, 5_000, 20_000])
def test_small_blocks_give_the_same_text(story: LedgerReader, monkeypatch: pytest.MonkeyPatch, values: int) -> None:
    whole = text_of(story, step=2)
    monkeypatch.setattr(openmetrics, "_BLOCK_VALUES", values)
    assert text_of(story, step=2) == whole


def test_an_interval_longer_than_a_block_is_counted_where_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openmetrics, "_BLOCK_VALUES", 1)  # blocks of 64 steps
    path = new_ledger(tmp_path)
    engine, gpu = FakeEngine(f"{FIRST}/0"), FakeGpu("GPU-a")
    about = About(gpus=("GPU-a",), sku=SKU, mapping="a test")
    deployment = Deployment(path, {FIRST: about}, interval_seconds=10)
    for second in (*range(0, 40, 10), 1000, 1010):
        engine.serve(generated=1)
        gpu.run(10, 5)
        deployment.scrape(START + second * SECOND, [engine], [gpu])
    deployment.close()
    with reader_of(path) as reader:
        assert tokens(reader, step=1) == [(0, 0.0), (10, 1.0), (20, 2.0), (30, 3.0), (1000, 4.0), (1010, 5.0)]


def test_further_labels_stand_on_every_series_and_all_are_escaped(tmp_path: Path) -> None:
    path = new_ledger(tmp_path)
    engine = FakeEngine(f"{FIRST}/0")
    engine.attributes = engine.attributes | {"model": 'a "b"\\c\nd'}
    deployment = Deployment(path, {FIRST: About(gpus=(), mapping="a test")}, interval_seconds=10)
    for second in (0, 10):
        engine.serve(generated=1)
        deployment.scrape(START + second * SECOND, [engine])
    deployment.close()
    with reader_of(path) as reader:
        keys = list(series_of(text_of(reader, job="kvtally", instance='x"')))
        assert keys
        for _, labels in keys:
            told = dict(labels)
            assert (told["job"], told["instance"], told["model"]) == ("kvtally", 'x"', 'a "b"\\c\nd')


@pytest.mark.parametrize("window", [None, Window(0, 10), Window(START, START + HOUR)])
def test_nothing_is_a_page_that_ends(tmp_path: Path, window: Window | None) -> None:
    with reader_of(new_ledger(tmp_path)) as reader:
        assert text_of(reader, window) == "# EOF\n"


def test_a_window_beside_the_ledger_is_empty(story: LedgerReader) -> None:
    assert text_of(story, Window(START + 100 * HOUR, START + 101 * HOUR)) == "# EOF\n"
    assert text_of(story, Window(0, START)) == "# EOF\n"
