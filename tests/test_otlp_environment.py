from __future__ import annotations

import pytest

from kvtally.agent.config import Config
from kvtally.agent.config_tables import Export, Otlp
from kvtally.agent.export.otlp_environment import (
    TEMPORALITY,
    answer_seconds,
    otlp_faults,
    otlp_interval,
    push_seconds,
)

ENDPOINT = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"}
TIMEOUT = "OTEL_EXPORTER_OTLP_TIMEOUT"
METRICS_TIMEOUT = "OTEL_EXPORTER_OTLP_METRICS_TIMEOUT"
PUSH = "OTEL_METRIC_EXPORT_TIMEOUT"
INTERVAL = "OTEL_METRIC_EXPORT_INTERVAL"


def config_with(endpoint: str) -> Config:
    return Config(export=Export(otlp=Otlp(endpoint)))


@pytest.mark.parametrize(
    ("endpoint", "environ", "seconds"),
    [
        ("", {}, None),
        ("http://127.0.0.1:4318", {}, 60),
        ("", ENDPOINT, 60),
        ("", {"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "http://127.0.0.1:4318/v1/metrics"}, 60),
        ("", {"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, None),
        ("", {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:4318"}, None),
        ("", ENDPOINT | {"OTEL_METRIC_EXPORT_INTERVAL": "15000"}, 15),
        ("", ENDPOINT | {"OTEL_METRIC_EXPORT_INTERVAL": "1000"}, 1),
        ("", ENDPOINT | {"OTEL_METRIC_EXPORT_INTERVAL": "999"}, 60),
        ("", ENDPOINT | {"OTEL_METRIC_EXPORT_INTERVAL": "0"}, 60),
        ("", ENDPOINT | {"OTEL_METRIC_EXPORT_INTERVAL": "-5"}, 60),
        ("", ENDPOINT | {"OTEL_METRIC_EXPORT_INTERVAL": "nan"}, 60),
        ("", ENDPOINT | {"OTEL_METRIC_EXPORT_INTERVAL": "inf"}, 60),
        ("", ENDPOINT | {"OTEL_METRIC_EXPORT_INTERVAL": "often"}, 60),
        ("", ENDPOINT | {"OTEL_METRIC_EXPORT_INTERVAL": ""}, 60),
        ("", ENDPOINT | {"OTEL_SDK_DISABLED": "true"}, None),
        ("", ENDPOINT | {"OTEL_SDK_DISABLED": " TRUE "}, None),
        ("", ENDPOINT | {"OTEL_SDK_DISABLED": "1"}, 60),  # the specification: true alone is true
        ("", ENDPOINT | {"OTEL_SDK_DISABLED": "false"}, 60),
        ("", ENDPOINT | {"OTEL_METRICS_EXPORTER": "none"}, None),
        ("", ENDPOINT | {"OTEL_METRICS_EXPORTER": "prometheus"}, None),
        ("", ENDPOINT | {"OTEL_METRICS_EXPORTER": "console, otlp"}, 60),
        ("", ENDPOINT | {"OTEL_METRICS_EXPORTER": ""}, 60),
        ("http://127.0.0.1:4318", {"OTEL_METRICS_EXPORTER": "none"}, None),
    ],
)
def test_the_environment_says_whether_and_how_often_is_pushed(
    endpoint: str, environ: dict[str, str], seconds: float | None
) -> None:
    assert otlp_interval(config_with(endpoint), environ) == seconds


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("1000", 1), (" 1000 ", 1), ("86400000", 86400)]
    + [(text, None) for text in ("500", "0", "-5", "100000000", "1e4", "10000.0", "60 s", "nan", "9" * 5000)],
)
def test_an_interval_that_is_not_kept_is_told_and_no_other(text: str, seconds: float | None) -> None:
    environ = {INTERVAL: text}
    assert otlp_interval(config_with("http://127.0.0.1:4318"), environ) == (seconds or 60)
    told = f"{INTERVAL}={text} is no whole number of milliseconds from 1000 to 86400000: 60 s hold"
    assert otlp_faults(environ) == ([] if seconds else [told])


@pytest.mark.parametrize(
    ("environ", "answer", "push"),
    [
        ({}, 10, 30),
        ({TIMEOUT: "5000"}, 5, 30),
        ({TIMEOUT: "5000", METRICS_TIMEOUT: "1500"}, 1.5, 30),
        ({TIMEOUT: "5000", METRICS_TIMEOUT: ""}, 5, 30),
        ({TIMEOUT: "60000"}, 30, 30),
        ({TIMEOUT: "60000", PUSH: "120000"}, 60, 120),
        ({PUSH: "2000"}, 2, 2),
        ({TIMEOUT: "0"}, 30, 30),
        ({TIMEOUT: "0", PUSH: "0"}, 300, 300),  # for ever, which is as long as a child may take
    ],
)
def test_timeouts_are_milliseconds_and_the_one_of_the_whole_push_bounds_the_other(
    environ: dict[str, str], answer: float, push: float
) -> None:
    assert (answer_seconds(environ), push_seconds(environ)) == (answer, push)
    assert otlp_faults(environ) == []


def test_a_timeout_that_means_seconds_is_told_and_the_next_one_holds() -> None:
    span = "is no whole number of milliseconds from 100 to 300000"
    assert answer_seconds({TIMEOUT: "10"}) == 10
    assert otlp_faults({TIMEOUT: "10"}) == [f"{TIMEOUT}=10 {span}: 10 s hold"]
    both = {METRICS_TIMEOUT: "2.5", TIMEOUT: "4000"}
    assert answer_seconds(both) == 4
    assert otlp_faults(both) == [f"{METRICS_TIMEOUT}=2.5 {span}: 4 s hold"]
    assert otlp_faults({PUSH: "-1"}) == [f"{PUSH}=-1 {span}: 30 s hold"]


def test_a_protocol_and_a_temporality_that_are_not_there_are_told() -> None:
    assert otlp_faults({"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc", TEMPORALITY: "DELTA"}) == []
    (protocol,) = otlp_faults({"OTEL_EXPORTER_OTLP_PROTOCOL": "http/json"})
    assert protocol.startswith("OTLP by http/json is not there")
    (temporality,) = otlp_faults({TEMPORALITY: "Deltas"})
    assert temporality.endswith("cumulative holds")
