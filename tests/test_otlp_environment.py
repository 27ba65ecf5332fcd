from __future__ import annotations

import pytest

from kvtally.agent.config import Config
from kvtally.agent.config_tables import Export, Otlp
from kvtally.agent.export.otlp_environment import (
    TEMPORALITY,
    answer_seconds,
    endpoint_fault,
    grpc_hint,
    otlp_faults,
    otlp_interval,
    push_seconds,
)

NAMED = "OTEL_EXPORTER_OTLP_ENDPOINT"
METRICS_ENDPOINT = "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT"
ENDPOINT = {NAMED: "http://127.0.0.1:4318"}
GRPC = {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}
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
    assert otlp_faults(Config(), environ) == ([] if seconds else [told])


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
    assert otlp_faults(Config(), environ) == []


def test_a_timeout_that_means_seconds_is_told_and_the_next_one_holds() -> None:
    span = "is no whole number of milliseconds from 100 to 300000"
    assert answer_seconds({TIMEOUT: "10"}) == 10
    assert otlp_faults(Config(), {TIMEOUT: "10"}) == [f"{TIMEOUT}=10 {span}: 10 s hold"]
    both = {METRICS_TIMEOUT: "2.5", TIMEOUT: "4000"}
    assert answer_seconds(both) == 4
    assert otlp_faults(Config(), both) == [f"{METRICS_TIMEOUT}=2.5 {span}: 4 s hold"]
    assert otlp_faults(Config(), {PUSH: "-1"}) == [f"{PUSH}=-1 {span}: 30 s hold"]


def test_a_protocol_and_a_temporality_that_are_not_there_are_told() -> None:
    assert otlp_faults(Config(), {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc", TEMPORALITY: "DELTA"}) == []
    (protocol,) = otlp_faults(Config(), {"OTEL_EXPORTER_OTLP_PROTOCOL": "http/json"})
    assert protocol.startswith("OTLP by http/json is not there")
    (temporality,) = otlp_faults(Config(), {TEMPORALITY: "Deltas"})
    assert temporality.endswith("cumulative holds")


@pytest.mark.parametrize(
    ("endpoint", "environ", "told"),
    [
        ("", {}, ""),
        ("http://127.0.0.1:4318", {}, ""),
        ("", {METRICS_ENDPOINT: "HTTPS://otlp.example/v1/metrics"}, ""),
        ("127.0.0.1:4318", {}, "export.otlp.endpoint … write http://127.0.0.1:4318"),
        ("", {NAMED: "collector:4318"}, f"{NAMED} … write http://collector:4318"),
        ("", {NAMED: "grpc://collector:4317"}, f"{NAMED} … write http://collector:4317"),
        ("", {NAMED: "me:secret@collector:4318"}, f"{NAMED} … write http://collector:4318"),
        ("127.0.0.1:4318", ENDPOINT, ""),  # the environment goes before
        ("", ENDPOINT | {METRICS_ENDPOINT: "a:1/v1/metrics"}, f"{METRICS_ENDPOINT} … write http://a:1/v1/metrics"),
        ("", {NAMED: "a:1", METRICS_ENDPOINT: "http://a:1/v1/metrics"}, ""),
        ("127.0.0.1:4317", GRPC, ""),
    ],
)
def test_an_endpoint_to_which_http_cannot_go_is_told_with_what_to_write(
    endpoint: str, environ: dict[str, str], told: str
) -> None:
    fault = told.replace("…", "begins with neither http:// nor https://:")
    assert endpoint_fault(config_with(endpoint), environ) == fault
    assert otlp_faults(config_with(endpoint), environ) == ([fault] if fault else [])


@pytest.mark.parametrize(
    ("environ", "is_told"),
    [
        ({NAMED: "collector:4317"}, False),  # by http it was refused before
        (GRPC | {NAMED: "collector:4317"}, True),
        (GRPC | {NAMED: "http://collector:4317"}, False),
        (GRPC | {NAMED: "collector:4317", "OTEL_EXPORTER_OTLP_INSECURE": "true"}, False),
        (GRPC | {NAMED: "collector:4317", "OTEL_EXPORTER_OTLP_METRICS_INSECURE": "false"}, False),
    ],
)
def test_a_bare_host_by_grpc_is_explained(environ: dict[str, str], is_told: bool) -> None:
    hint = grpc_hint(Config(), environ)
    told = "without a scheme it is TLS: for none, write http://collector:4317 or set OTEL_EXPORTER_OTLP_INSECURE=true"
    assert hint == (told if is_told else "")
