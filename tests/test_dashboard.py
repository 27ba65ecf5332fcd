from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.promql import known_metrics, labels_named, matchers, metrics_of

from kvtally.agent.export.metrics import METRICS

ROOT = Path(__file__).parents[1]
BOARD: dict[str, Any] = json.loads((ROOT / "deploy/grafana/kvtally.json").read_text(encoding="utf-8"))
ROWS = [panel for panel in BOARD["panels"] if panel["type"] == "row"]
PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
TARGETS = [(f"{panel['title']} {target['refId']}", target) for panel in PANELS for target in panel["targets"]]
VARIABLES = {variable["name"]: variable for variable in BOARD["templating"]["list"]}
# what no panel shows: tokens of a gateway stand beside the engines' in `kvtally cost`, as a finding where they disagree
NOT_SHOWN = {"kvtally_gateway_tokens_total", "kvtally_savings_engine_seconds"}
UNITS = {"none", "short", "percentunit", "s", "Bps", "bytes", "watt", "joule"}

each_target = pytest.mark.parametrize("target", [one for _, one in TARGETS], ids=[name for name, _ in TARGETS])
each_panel = pytest.mark.parametrize("panel", PANELS, ids=[panel["title"] for panel in PANELS])


def test_the_dashboard_is_what_its_code_prints() -> None:
    words = [sys.executable, "-m", "deploy.grafana.dashboard"]
    printed = subprocess.run(words, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    assert json.loads(printed) == BOARD, "run `just docs`"
    assert printed == (ROOT / "deploy/grafana/kvtally.json").read_text(encoding="utf-8")


@each_target
def test_a_query_asks_for_metrics_and_labels_that_are_shown(target: dict[str, Any], demo_ledger: str) -> None:
    known = known_metrics(demo_ledger)
    asked = metrics_of(target["expr"])
    assert asked, target["expr"]
    assert asked <= set(known)
    for metric, label, is_literal, value in matchers(target["expr"]):
        assert label in known[metric] or label == "instance", f"{metric} has no label {label}"
        if is_literal and known[metric][label]:
            assert value in known[metric][label], f"{metric}: no {label} is {value}"
    labels = {label for metric in asked for label in known[metric]} | {"job", "instance", "host"}
    assert labels_named(target["expr"]) <= labels


@each_target
def test_a_legend_names_labels_that_the_query_leaves(target: dict[str, Any], demo_ledger: str) -> None:
    grouped = re.findall(r"\bsum(?: by \(([^)]*)\))?|\bmax by \(([^)]*)\)", target["expr"])
    wanted = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
    if grouped:
        assert wanted <= {label.strip() for pair in grouped for part in pair for label in part.split(",")}
    else:
        known = known_metrics(demo_ledger)
        assert wanted <= {label for metric in metrics_of(target["expr"]) for label in known[metric]} | {"instance"}


@each_target
def test_a_query_knows_no_data_source_of_its_own(target: dict[str, Any]) -> None:
    assert target["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    assert target["instant"] is not target["range"]


def test_every_metric_of_ours_is_on_the_dashboard() -> None:
    shown = {metric for _, target in TARGETS for metric in metrics_of(target["expr"])}
    assert {metric.prometheus for metric in METRICS.values()} - shown == NOT_SHOWN


def test_variables_are_all_that_queries_use() -> None:
    texts = [text for _, target in TARGETS for text in (target["expr"], target["legendFormat"])]
    texts += [panel["title"] for panel in PANELS]
    used = {name for text in texts for name in re.findall(r"\$([a-z_]\w*)", text)} - {"__rate_interval", "__range"}
    assert used | {"datasource"} == set(VARIABLES)
    assert VARIABLES["datasource"] | {"type": "datasource", "query": "prometheus"} == VARIABLES["datasource"]


@pytest.mark.parametrize("name", sorted(set(VARIABLES) - {"datasource"}))
def test_a_variable_is_found_among_the_values_of_a_label(name: str, demo_ledger: str) -> None:
    variable = VARIABLES[name]
    found = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["definition"])
    assert found
    assert variable["query"]["query"] == variable["definition"]
    assert (found[2], found[2] in known_metrics(demo_ledger)[found[1]] or found[2] == "instance") == (name, True)
    # every engine or one that is chosen, and always one window and one currency, since money of two does not add up;
    # ".*" matches engines without the label too
    is_one = name in {"window", "currency"}
    assert variable["multi"] == variable["includeAll"] == (not is_one)
    assert variable.get("allValue") == (None if is_one else ".*")


@each_panel
def test_a_panel_says_what_its_figure_is(panel: dict[str, Any]) -> None:
    description = panel["description"]
    assert description.endswith(".")
    assert len(description) > 20
    assert panel["fieldConfig"]["defaults"]["unit"] in UNITS
    assert panel["targets"]


@each_panel
def test_a_band_lies_between_two_series_of_its_query(panel: dict[str, Any]) -> None:
    legends = [target["legendFormat"] for target in panel["targets"]]
    overrides = panel["fieldConfig"]["overrides"]
    names = [one["matcher"]["options"] for one in overrides]
    lower = [p["value"] for one in overrides for p in one["properties"] if p["id"] == "custom.fillBelowTo"]
    assert len(names) == 2 * len(lower)
    assert set(lower) <= set(names)
    for name in names:
        assert any(re.fullmatch(re.sub(r"\{\{\w+\}\}", r"\\w+", legend), name) for legend in legends)


def test_panels_neither_overlap_nor_leave_the_grid() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in BOARD["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
    heights = {y for _, y in taken}
    assert heights == set(range(len(heights)))  # nor leave a line empty


def test_ids_and_titles_are_one_panels_own() -> None:
    ids = [panel["id"] for panel in BOARD["panels"]]
    assert (len(set(ids)), min(ids)) == (len(ids), 1)
    titles = [panel["title"] for panel in BOARD["panels"]]
    assert len(set(titles)) == len(titles)


def test_the_dashboard_is_of_grafana_10_and_no_installation() -> None:
    assert BOARD["schemaVersion"] == 38
    assert "id" not in BOARD  # a number of the Grafana that it was saved in
    assert (BOARD["uid"], len(ROWS)) == ("kvtally", 8)


@each_target
def test_money_is_never_without_its_currency(target: dict[str, Any], demo_ledger: str) -> None:
    known = known_metrics(demo_ledger)
    if any("currency" in known[metric] for metric in metrics_of(target["expr"])):
        assert "{{currency}}" in target["legendFormat"] or 'currency="$currency"' in target["expr"]


@each_target
def test_a_kvtallys_own_figure_says_whose_it_is(target: dict[str, Any]) -> None:
    """What is not summed up is drawn once for each kvtally, model, cluster, namespace and tenant."""
    if "window=" in target["expr"] and not re.search(r"\b(?:sum|max)\b", target["expr"]):
        assert target["legendFormat"].startswith("{{model}} {{cluster}} {{namespace}} {{tenant}} {{instance}}")
