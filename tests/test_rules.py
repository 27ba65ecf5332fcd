from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from tests.promql import known_metrics, labels_named, matchers, metrics_of

from kvtally.agent import interval
from kvtally.agent.cli import group
from kvtally.agent.config import Config

FOLDER = Path(__file__).parents[1] / "deploy/prometheus"
RULES = (FOLDER / "rules.yml").read_text(encoding="utf-8")
TESTS = (FOLDER / "rules_test.yml").read_text(encoding="utf-8")


ALERTS: list[dict[str, Any]] = [rule for group in yaml.safe_load(RULES)["groups"] for rule in group["rules"]]
each_alert = pytest.mark.parametrize("alert", ALERTS, ids=[alert["alert"] for alert in ALERTS])


def test_there_are_alerts_and_no_other_rules() -> None:
    assert len(ALERTS) == len({alert["alert"] for alert in ALERTS}) == 11


@each_alert
def test_an_alert_asks_for_what_metrics_shows(alert: dict[str, Any], demo_ledger: str) -> None:
    known = known_metrics(demo_ledger)
    asked = metrics_of(alert["expr"])
    assert asked
    assert asked <= set(known)
    for metric, label, is_literal, value in matchers(alert["expr"]):
        assert label in known[metric]
        assert not is_literal or value in known[metric][label]
    labels = {label for metric in asked for label in known[metric]} | {"job", "instance"}
    assert labels_named(alert["expr"]) <= labels
    told = {name for text in alert["annotations"].values() for name in re.findall(r"\$labels\.(\w+)", text)}
    assert told <= labels


def test_counters_that_contradict_each_other_are_the_findings_of_an_interval() -> None:
    pattern = re.search(r'kind=~"([^"]*)"', RULES)
    assert pattern
    for kind in ("identity_broken", interval.BACKWARDS, interval.IMPOSSIBLE):
        assert re.fullmatch(pattern[1], kind)
    for kind in ("no_rate", "engine_restarted", "tokens_lost"):
        assert not re.fullmatch(pattern[1], kind)


@each_alert
def test_an_alert_says_what_it_means_and_what_to_type(alert: dict[str, Any]) -> None:
    assert set(alert["annotations"]) == {"summary", "description", "command"}
    assert alert["labels"]["severity"] in {"warning", "critical"}
    assert alert["annotations"]["description"].endswith(".")


def test_windows_of_alerts_are_exported_without_a_config() -> None:
    windows = set(re.findall(r'window="(\w+)"', RULES))
    assert windows == {"1h", "24h"}
    assert windows <= set(Config().export.windows)


@each_alert
def test_what_to_type_is_a_call_that_is_understood(alert: dict[str, Any]) -> None:
    for part in re.split(r"&&|\|\||>", alert["annotations"]["command"]):
        words = shlex.split(part)
        if words[:1] != ["kvtally"]:
            continue
        command: click.Command = group
        context = click.Context(group, info_name="kvtally")
        words = words[1:]
        while isinstance(command, click.Group):
            inner = command.get_command(context, words[0])
            assert inner is not None, part
            command, words = inner, words[1:]
        command.make_context(command.name, words, parent=context)


@each_alert
def test_an_alert_is_tested_where_it_fires(alert: dict[str, Any]) -> None:
    cases = [case for test in yaml.safe_load(TESTS)["tests"] for case in test["alert_rule_test"]]
    assert any(case.get("exp_alerts") for case in cases if case["alertname"] == alert["alert"])


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not here (apt install prometheus)")
@pytest.mark.parametrize("words", [("check", "rules", "rules.yml"), ("test", "rules", "rules_test.yml")])
def test_promtool_agrees(words: tuple[str, ...]) -> None:
    done = subprocess.run(["promtool", *words], cwd=FOLDER, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
