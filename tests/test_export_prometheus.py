from __future__ import annotations

import re
import shutil
import subprocess
from typing import TYPE_CHECKING, Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families as text_families
from tests.ledgers import HOUR

from kvtally.agent.accounts import Payment
from kvtally.agent.book import book_of
from kvtally.agent.config import Config
from kvtally.agent.export.figures import Figure, Snapshot, snapshot
from kvtally.agent.export.metrics import METRICS, OPENCOST
from kvtally.agent.export.prometheus import openmetrics_page, text_page
from kvtally.agent.health import OWN, Health, rendered
from kvtally.agent.ledger.read import LedgerReader
from kvtally.agent.metrics_server import unpacked

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tests.command_line import Call

PROMTOOL = shutil.which("promtool")
START_NS = 1_795_406_400_000_000_000
HOSTILE = 'a "quoted" \\back\\slash\nand a line, {x="y"} # EOF'
Key = tuple[str, frozenset[tuple[str, str]]]


def page_of(*figures: Figure) -> Snapshot:
    return Snapshot(START_NS, START_NS + 60_000_000_000, figures)


EVERY = page_of(
    *(Figure(name, {"model": "m", "n": str(at)}, at + 0.5) for name in (*METRICS, *OPENCOST) for at in (1, 2))
)


@pytest.fixture(scope="module")
def demo_figures(demo_ledger: str) -> Snapshot:
    """Those of the packaged recording."""
    windows = {"1h": HOUR, "24h": 24 * HOUR}
    with LedgerReader(demo_ledger) as reader:
        taken = snapshot(reader, book_of(reader, Config()), Payment(), windows)
    assert taken is not None
    return taken


def samples(families: Iterable[Any]) -> dict[Key, float]:
    """Every sample by its name and labels that are not empty."""
    found: dict[Key, float] = {}
    for family in families:
        for one in family.samples:
            key = (one.name, frozenset((name, value) for name, value in one.labels.items() if value))
            assert key not in found
            found[key] = one.value
    return found


def expected(taken: Snapshot) -> dict[Key, float]:
    names = {**METRICS, **OPENCOST}
    return {
        (
            names[one.metric].prometheus,
            frozenset((label, text) for label, text in one.labels.items() if text),
        ): one.value
        for one in taken.figures
    }


def text(taken: Snapshot | None) -> dict[Key, float]:
    return samples(text_families(text_page(taken).decode()))


def openmetrics(taken: Snapshot | None) -> dict[Key, float]:
    """Without _created, which says of each counter when it began."""
    told = samples(openmetrics_families(openmetrics_page(taken).decode()))  # type: ignore[no-untyped-call]  # as above
    created = {key: told.pop(key) for key in list(told) if key[0].endswith("_created")}
    assert set(created.values()) <= {START_NS / 1e9}
    counters = {(name.removesuffix("_total"), labels) for name, labels in told if name.endswith("_total")}
    assert {(name.removesuffix("_created"), labels) for name, labels in created} == counters
    return told


def test_both_pages_say_every_figure() -> None:
    assert text(EVERY) == openmetrics(EVERY) == expected(EVERY)
    assert len(expected(EVERY)) == 2 * len({**METRICS, **OPENCOST})


def test_the_demos_figures_come_through_to_the_last_digit(demo_figures: Snapshot) -> None:
    assert text(demo_figures) == openmetrics(demo_figures) == expected(demo_figures)


def test_a_ledger_without_intervals_gives_pages_without_samples() -> None:
    assert text_page(None) == b""
    assert openmetrics_page(None) == b"# EOF\n"


def test_whatever_stands_in_a_label_comes_through() -> None:
    taken = page_of(Figure("generated_tokens", {"replica": HOSTILE, "model": "ümläut \u2028"}, 3))
    assert text(taken) == openmetrics(taken) == expected(taken)


def test_help_and_type_stand_once_and_before_the_samples_of_their_family() -> None:
    for page in (text_page(EVERY).decode(), openmetrics_page(EVERY).decode()):
        heads = re.findall(r"^# (HELP|TYPE) (\S+)", page, re.MULTILINE)
        assert len(heads) == len(set(heads)) == 2 * len({**METRICS, **OPENCOST})
        family = ""
        for line in page.splitlines():
            if line.startswith("# TYPE"):
                family = line.split()[2]
            elif not line.startswith("#"):
                assert line.startswith(family.removesuffix("_total"))


def test_the_text_page_has_no_created_and_openmetrics_ends_with_eof() -> None:
    assert b"_created" not in text_page(EVERY)
    assert b"_created" in openmetrics_page(EVERY)
    assert openmetrics_page(EVERY).endswith(b"\n# EOF\n")


@pytest.mark.parametrize("metric", [*METRICS.values(), *OPENCOST.values()], ids=lambda one: one.prometheus)
def test_names_fit_their_type(metric: Any) -> None:
    assert metric.prometheus.endswith("_total") == (metric.type == "counter")
    assert re.fullmatch(r"(kvtally|llm)_[a-z_]+", metric.prometheus)
    assert re.fullmatch(r"(kvtally|hw)\.[a-z_.]+|llm_[a-z_]+", metric.otel)
    assert metric.unit in {"s", "J", "By", "1"} or re.fullmatch(r"\{[a-z]+\}(/h)?", metric.unit)
    assert metric.meaning[0].isupper() or metric.meaning[0].isdigit()
    assert not metric.meaning.endswith(".")


def test_names_are_told_apart_from_each_other_and_from_those_of_health() -> None:
    own = OWN.keys()
    families = [one.prometheus.removesuffix("_total") for one in (*METRICS.values(), *OPENCOST.values())]
    assert len(families) == len(set(families))
    assert not own & set(families)
    otel = [one.otel for one in METRICS.values()]
    assert len(otel) == len(set(otel))


def test_export_page_prints_the_text_page_or_what_the_daemon_serves(
    kvtally: Call, demo_ledger: str, demo_figures: Snapshot
) -> None:
    shown = kvtally("export", "page", "--ledger", demo_ledger)
    assert (shown.status, shown.err) == (0, "")
    assert shown.out == text_page(demo_figures).decode()
    served = unpacked(kvtally("export", "page", "--packed", "--ledger", demo_ledger).out.encode())
    assert (served.text, served.openmetrics) == (text_page(demo_figures), openmetrics_page(demo_figures))


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not on PATH (apt install prometheus)")
@pytest.mark.parametrize("page", ["figures", "health"])
def test_promtool_has_nothing_to_say(page: str, demo_figures: Snapshot) -> None:
    assert PROMTOOL is not None
    own = rendered(Health("ledger.db").families(0, 1.0), openmetrics=False).encode()
    content = text_page(demo_figures) if page == "figures" else own
    done = subprocess.run([PROMTOOL, "check", "metrics"], input=content, capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_the_price_of_tokens_says_whose_basis_its_label_is() -> None:
    """`kvtally cost` says MODELLED of a split that this page shows as MEASURED: that is said of the money."""
    assert "its label basis is the basis of the price" in METRICS["cost_per_million"].meaning
