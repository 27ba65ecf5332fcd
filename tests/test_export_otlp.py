from __future__ import annotations

import json
import os
import ssl
import sys
import time
from typing import TYPE_CHECKING

import pytest
import trustme
from opentelemetry.proto.metrics.v1.metrics_pb2 import AggregationTemporality
from tests.command_line import copied
from tests.ledgers import HOUR, SECOND, START, Deployment, FakeEngine, new_ledger, url_of
from tests.otlp_grpc_receiver import OtlpGrpcReceiver
from tests.otlp_receiver import OtlpReceiver, free_port

from kvtally import __version__
from kvtally.agent.export.figures import Figure, Snapshot
from kvtally.agent.export.last_sent import Kept, LastSent
from kvtally.agent.export.metrics import DISK_READ, METRICS
from kvtally.agent.export.otlp import key_of, metrics_data, push_snapshot, resource_of
from kvtally.agent.export.otlp_exporter import ExporterMissing, exporter_of
from kvtally.agent.replica import About

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from tests.command_line import Call
    from tests.otlp_receiver import Push

CUMULATIVE = AggregationTemporality.AGGREGATION_TEMPORALITY_CUMULATIVE
DELTA = AggregationTemporality.AGGREGATION_TEMPORALITY_DELTA
PREFERENCE = "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE"
DELTAS = {PREFERENCE: "delta"}
NAME = "10.0.0.1:8000"
POD = {"POD_NAME": "vllm-7d9", "POD_NAMESPACE": "serving", "NODE_NAME": "gpu-1", "POD_IP": "10.1.0.5"}


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither OpenTelemetry's nor a pod's."""
    for name in list(os.environ):
        if name.startswith("OTEL_") or name in POD:
            monkeypatch.delenv(name)


@pytest.fixture
def receiver() -> Iterator[OtlpReceiver]:
    with OtlpReceiver() as one:
        yield one


@pytest.fixture
def endpoint(receiver: OtlpReceiver, monkeypatch: pytest.MonkeyPatch) -> OtlpReceiver:
    """The receiver, which the environment names."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.endpoint)
    return receiver


class Growing:
    """A ledger that goes on growing: a scrape every ten seconds in which an engine generates seven tokens."""

    def __init__(self, folder: Path) -> None:
        self.path = new_ledger(folder)
        self.url = url_of(self.path)
        self._engine = FakeEngine(f"{NAME}/0")
        self._at_ns = START + 600 * SECOND
        self._deployment = Deployment(self.path, {NAME: About(gpus=(), mapping="a test")}, interval_seconds=10)
        self._deployment.scrape(self._at_ns, [self._engine])

    def grow(self, scrapes: int = 1) -> None:
        for _ in range(scrapes):
            self._at_ns += 10 * SECOND
            self._engine.serve(computed=60, hbm=40, generated=7)
            self._deployment.scrape(self._at_ns, [self._engine])

    def close(self) -> None:
        self._deployment.close()


@pytest.fixture
def growing(tmp_path: Path) -> Iterator[Growing]:
    one = Growing(tmp_path)
    one.grow(2)
    yield one
    one.close()


def snapshot_of(*figures: Figure, start_ns: int = START) -> Snapshot:
    return Snapshot(start_ns, start_ns + HOUR, figures)


def generated(value: float, replica: str = "a") -> Figure:
    return Figure("generated_tokens", {"replica": replica, "model": "m"}, value)


def sent(snapshot: Snapshot, url: str, environ: Mapping[str, str], at_ns: int = START + 2 * HOUR) -> bool:
    """Push by this environment, to the receiver that the process's names."""
    return push_snapshot(exporter_of(environ), snapshot, url, environ, lambda: at_ns).ok


# what is sent


def test_the_receiver_holds_what_the_command_line_says(kvtally: Call, demo_ledger: str, endpoint: OtlpReceiver) -> None:
    ran = kvtally("export", "otlp", "--ledger", demo_ledger)
    assert (ran.status, ran.out) == (0, "")
    (push,) = endpoint.pushes
    points = sum(len(push.points(name)) for name in push.metrics)
    assert ran.err == f"{points} points sent\n"
    (cost,) = json.loads(kvtally("cost", "--ledger", demo_ledger, "--format", "json").out)["groups"]
    (saved,) = json.loads(kvtally("savings", "--ledger", demo_ledger, "--format", "json").out)["groups"]
    prompts = {point.attributes["kvtally.source"]: point.value for point in push.points("kvtally.prompt.tokens")}
    assert prompts["computed"] == cost["tokens"]["computed"]
    assert sum(prompts.values()) == cost["tokens"]["prompt"]
    assert sum(endpoint.values("kvtally.ledger.cost")) == pytest.approx(float(cost["cost"]["total"]), abs=1e-9)
    amounts = {
        (point.attributes["kvtally.measure"], point.attributes["kvtally.bound"]): point.value
        for point in push.points("kvtally.savings.amount")
        if point.attributes["kvtally.window"] == "1h"
    }
    assert amounts == {
        (measure, bound): float(saved[measure][bound])
        for measure in ("gross", "net", "realised")
        for bound in ("low", "point", "high")
    }


def test_counters_are_cumulative_monotone_sums_since_the_ledger_began_and_the_rest_are_gauges(
    kvtally: Call, demo_ledger: str, endpoint: OtlpReceiver
) -> None:
    before_ns = time.time_ns()
    kvtally("export", "otlp", "--ledger", demo_ledger)
    (push,) = endpoint.pushes
    by_name = {metric.otel: metric for metric in (*METRICS.values(), DISK_READ)}
    assert {"kvtally.generated.tokens", "kvtally.savings.amount", "hw.energy"} <= push.metrics.keys() <= by_name.keys()
    for name, shown in push.metrics.items():
        about = by_name[name]
        assert (shown.unit, shown.description) == (about.unit, about.meaning)
        starts = {point.start_ns for point in push.points(name)}
        if about.type == "counter":
            assert (shown.sum.aggregation_temporality, shown.sum.is_monotonic) == (CUMULATIVE, True)
            assert starts == {START}
        else:
            assert shown.HasField("gauge")
            assert starts == {0}
        assert all(before_ns <= point.at_ns <= time.time_ns() for point in push.points(name))


def test_attributes_have_the_names_of_the_semantic_conventions_where_there_are_any(
    kvtally: Call, demo_ledger: str, endpoint: OtlpReceiver
) -> None:
    kvtally("export", "otlp", "--ledger", demo_ledger)
    (push,) = endpoint.pushes
    (energy,) = push.points("hw.energy")
    assert energy.attributes.keys() == {"hw.id", "hw.model", "hw.type"}
    assert energy.attributes["hw.type"] == "gpu"
    (tokens,) = push.points("kvtally.generated.tokens")
    assert tokens.attributes == {
        "kvtally.replica": tokens.attributes["kvtally.replica"],
        "gen_ai.request.model": "llama-8b",
    }
    costs = push.points("kvtally.ledger.cost")
    assert {point.attributes["kvtally.currency"] for point in costs} == {"USD"}


def test_the_bytes_of_a_disk_are_told_as_the_conventions_have_them_and_those_of_a_mount_on_it_are_not_added(
    tmp_path: Path, endpoint: OtlpReceiver
) -> None:
    def read(name: str, source: str, side: str, value: int) -> Figure:
        return Figure("filesystem_bytes", {"filesystem": name, "source": source, "side": side}, value)

    figures = (
        read("nvme0n1", "diskstats", "device", 4096),
        read("/kv (nvme0n1)", "diskstats", "device", 1024),
        read("cgroup:/engine", "cgroup", "device", 512),
        read("/kv", "nfs mountstats", "app", 256),
    )
    assert sent(snapshot_of(*figures), f"sqlite:///{tmp_path / 'ledger.db'}", {})
    (push,) = endpoint.pushes
    (disk,) = push.points("system.disk.io")
    assert (disk.value, disk.attributes) == (4096, {"system.device": "nvme0n1", "disk.io.direction": "read"})
    assert (push.metrics["system.disk.io"].unit, push.metrics["system.disk.io"].sum.is_monotonic) == ("By", True)
    assert [point.value for point in push.points("kvtally.filesystem.read")] == [1024, 512, 256]


def test_no_metric_has_the_name_of_anothers_namespace() -> None:
    names = {metric.otel for metric in (*METRICS.values(), DISK_READ)}
    assert [name for name in names if any(other.startswith(f"{name}.") for other in names)] == []


def test_a_ledger_without_intervals_sends_nothing(kvtally: Call, tmp_path: Path, endpoint: OtlpReceiver) -> None:
    ran = kvtally("export", "otlp", "--ledger", url_of(new_ledger(tmp_path)))
    assert (ran.status, ran.err) == (0, "the ledger holds no interval yet\n")
    assert endpoint.pushes == []


# over restarts and outages


def test_pushes_of_two_processes_have_one_start_and_growing_sums(
    kvtally: Call, growing: Growing, endpoint: OtlpReceiver
) -> None:
    for _ in range(2):
        kvtally("export", "otlp", "--ledger", growing.url)  # everything is read anew: as a process of its own
        growing.grow(3)
    told = [push.points("kvtally.generated.tokens")[0] for push in endpoint.pushes]
    assert [point.value for point in told] == [14, 35]
    assert {point.start_ns for point in told} == {START}
    assert told[0].at_ns < told[1].at_ns


def test_a_push_that_fails_is_in_the_next_cumulative(growing: Growing, kvtally: Call, endpoint: OtlpReceiver) -> None:
    endpoint.status = 400
    ran = kvtally("export", "otlp", "--ledger", growing.url)
    assert ran.status == 3
    assert ran.err.startswith("the backend did not take them: ")
    assert "400" in ran.err
    endpoint.status = 200
    growing.grow()
    assert kvtally("export", "otlp", "--ledger", growing.url).status == 0
    assert endpoint.values("kvtally.generated.tokens") == [21]


def test_a_backend_that_is_not_there_is_told_within_the_timeout(
    kvtally: Call, demo_ledger: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with free_port() as port:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
        monkeypatch.setenv(
            "OTEL_EXPORTER_OTLP_TIMEOUT", "2000"
        )  # a second attempt fits in: the first one's fault is told
        ran = kvtally("export", "otlp", "--ledger", demo_ledger)
    assert ran.status == 3
    assert "refused" in ran.err
    assert ran.err.count("\n") == 1
    assert caplog.records == []


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_no_push_and_says_where_it_leads(
    status: int, kvtally: Call, growing: Growing, endpoint: OtlpReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PREFERENCE, "delta")
    endpoint.status, endpoint.location = status, f"{endpoint.endpoint}/elsewhere"
    ran = kvtally("export", "otlp", "--ledger", growing.url)
    assert ran.status == 3
    assert str(status) in ran.err
    assert f", Location: {endpoint.endpoint}/elsewhere (no redirect is followed)" in ran.err
    endpoint.status, endpoint.location = 200, ""
    growing.grow()
    assert kvtally("export", "otlp", "--ledger", growing.url).status == 0
    assert endpoint.values("kvtally.generated.tokens") == [21]


@pytest.mark.parametrize("protocol", ["http/protobuf", "grpc"])
def test_points_that_the_backend_rejects_are_told_and_not_sent_again(
    protocol: str, kvtally: Call, growing: Growing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PREFERENCE, "delta")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", protocol)
    with OtlpReceiver() if protocol == "http/protobuf" else OtlpGrpcReceiver() as other:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", other.endpoint)
        other.rejected = (7, "seven are\n\x1b[31mbad")
        ran = kvtally("export", "otlp", "--ledger", growing.url)
        (push,) = other.pushes
        points = sum(len(push.points(name)) for name in push.metrics)
        assert (ran.status, ran.err) == (3, f"the backend rejected 7 of {points} points: seven are [31mbad\n")
        other.rejected = (0, "deltas are out of fashion")
        growing.grow()
        ran = kvtally("export", "otlp", "--ledger", growing.url)
        assert (ran.status, ran.err) == (0, f"{points} points sent; the backend says: deltas are out of fashion\n")
        assert [one.points("kvtally.generated.tokens")[0].value for one in other.pushes] == [14, 7]


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"", "application/x-protobuf"),
        (b"", "text/html"),
        (b"{}", "application/json"),
        (b'{"partialSuccess":{}}', "text/plain"),
    ],
)
def test_a_backend_that_answers_with_nothing_or_in_json_has_taken_them(
    body: bytes, kind: str, kvtally: Call, demo_ledger: str, endpoint: OtlpReceiver
) -> None:
    endpoint.body, endpoint.kind = body, kind
    ran = kvtally("export", "otlp", "--ledger", demo_ledger)
    assert (ran.status, ran.err.split(" ", 1)[1]) == (0, "points sent\n")


def test_a_login_page_is_no_push_and_is_shown(kvtally: Call, demo_ledger: str, endpoint: OtlpReceiver) -> None:
    endpoint.body, endpoint.kind = b"<html>\nLog in</html>", "text/html"
    ran = kvtally("export", "otlp", "--ledger", demo_ledger)
    told = "200 text/html, which is no answer of OTLP's: <html> Log in</html>"
    assert (ran.status, ran.err) == (3, f"the backend did not take them: {told}\n")


def test_points_that_are_rejected_in_json_are_told_too(kvtally: Call, demo_ledger: str, endpoint: OtlpReceiver) -> None:
    endpoint.kind = "application/json"
    endpoint.body = b'{"partialSuccess":{"rejectedDataPoints":"7","errorMessage":"too old"}}'
    ran = kvtally("export", "otlp", "--ledger", demo_ledger)
    assert ran.status == 3
    assert ran.err.startswith("the backend rejected 7 of ")
    assert ran.err.endswith("points: too old\n")


@pytest.mark.parametrize(
    ("body", "kind", "shown"),
    [
        (b"<html>\nLog in</html>", "text/html; charset=utf-8", "<html> Log in</html>"),
        (b"<html>", "application/x-protobuf", "<html>"),
        (b"{}", "Text/HTML", "{}"),  # whatever it looks like, a page for people
        (b"ok", "text/plain", "ok"),
        (b'{"status":"success"}', "application/json", '{"status":"success"}'),
        (b"\xff" * 9, "application/x-protobuf", "\ufffd" * 9),
        (b"<br>" * 3000, "text/plain", "<br>" * 20),
    ],
)
def test_an_answer_that_is_none_of_otlp_is_no_push(
    body: bytes, kind: str, shown: str, tmp_path: Path, endpoint: OtlpReceiver
) -> None:
    endpoint.body, endpoint.kind = body, kind
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    told = push_snapshot(exporter_of({}), snapshot_of(generated(1)), url, {})
    assert (told.ok, told.reason) == (False, f"200 {kind}, which is no answer of OTLP's: {shown}")


@pytest.mark.parametrize(
    "variables",
    [
        {"OTEL_EXPORTER_OTLP_TIMEOUT": "200"},
        {"OTEL_EXPORTER_OTLP_TIMEOUT": "60000", "OTEL_EXPORTER_OTLP_METRICS_TIMEOUT": "200"},
        {"OTEL_METRIC_EXPORT_TIMEOUT": "200"},
    ],
)
def test_a_backend_that_hangs_is_given_up_after_so_many_milliseconds(
    variables: dict[str, str],
    kvtally: Call,
    demo_ledger: str,
    endpoint: OtlpReceiver,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    endpoint.trickles = 600
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    ran = kvtally("export", "otlp", "--ledger", demo_ledger)
    assert (ran.status, ran.err.count("\n")) == (3, 1)
    assert "timeout" in ran.err
    assert endpoint.pushes == []


def test_an_answer_that_comes_byte_by_byte_ends_with_the_time_of_a_push(
    kvtally: Call, demo_ledger: str, endpoint: OtlpReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvtally.agent.export.otlp._GRACE_SECONDS", 0.0)
    monkeypatch.setenv("OTEL_METRIC_EXPORT_TIMEOUT", "500")
    endpoint.trickles = 0.05
    ran = kvtally("export", "otlp", "--ledger", demo_ledger)
    assert (ran.status, ran.err) == (3, "the backend did not take them: it was not done within 0.5 s\n")


def test_a_timeout_that_is_no_number_stops_no_exporter_and_is_told(
    kvtally: Call, demo_ledger: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_METRICS_TIMEOUT", "10s")
    for protocol, kind in (("http/protobuf", OtlpReceiver), ("grpc", OtlpGrpcReceiver)):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", protocol)
        with kind() as other:
            monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", other.endpoint)
            ran = kvtally("export", "otlp", "--ledger", demo_ledger)
            assert (ran.status, len(other.pushes)) == (0, 1)
        fault, told = ran.err.splitlines()
        assert fault.startswith("OTEL_EXPORTER_OTLP_METRICS_TIMEOUT=10s is no whole number of milliseconds")
        assert told.endswith("points sent")
    assert os.environ["OTEL_EXPORTER_OTLP_METRICS_TIMEOUT"] == "10s"


def test_the_certificate_that_is_named_for_otlp_goes_before_those_for_all_hosts(
    kvtally: Call, demo_ledger: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    named, other = trustme.CA(), trustme.CA()
    for authority, name in ((named, "named.pem"), (other, "other.pem")):
        authority.cert_pem.write_to_path(str(tmp_path / name))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    named.issue_cert("127.0.0.1").configure_cert(context)
    for variable in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.setenv(variable, str(tmp_path / "other.pem"))
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1500")
    with OtlpReceiver(context=context) as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.endpoint)
        assert kvtally("export", "otlp", "--ledger", demo_ledger).status == 3
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_CERTIFICATE", str(tmp_path / "named.pem"))
        assert kvtally("export", "otlp", "--ledger", demo_ledger).status == 0
        assert len(receiver.pushes) == 1
        # where none is named, those of all hosts hold
        monkeypatch.delenv("OTEL_EXPORTER_OTLP_CERTIFICATE")
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "named.pem"))
        assert kvtally("export", "otlp", "--ledger", demo_ledger).status == 0


def test_what_counts_things_is_a_whole_number_in_every_push(tmp_path: Path, endpoint: OtlpReceiver) -> None:
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    for tokens, seconds in ((100, 2.5), (130, 4.0)):
        watched = Figure("watched_seconds", {"replica": "a"}, seconds)
        assert sent(snapshot_of(generated(tokens), watched), url, DELTAS)
    for push, numbers in zip(endpoint.pushes, ((100, 2.5), (30, 1.5)), strict=True):
        (count,) = push.metrics["kvtally.generated.tokens"].sum.data_points
        (time_taken,) = push.metrics["kvtally.watched.time"].sum.data_points
        assert (count.WhichOneof("value"), time_taken.WhichOneof("value")) == ("as_int", "as_double")
        assert (count.as_int, time_taken.as_double) == numbers


def test_deltas_are_what_was_counted_since_the_last_push_that_was_taken(
    kvtally: Call, growing: Growing, endpoint: OtlpReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PREFERENCE, "Delta")
    for scrapes, status in ((0, 200), (3, 200), (2, 400), (1, 400), (1, 200), (0, 200)):
        growing.grow(scrapes)
        endpoint.status = status
        kvtally("export", "otlp", "--ledger", growing.url)
    told = [push.points("kvtally.generated.tokens")[0] for push in endpoint.pushes]
    assert [point.value for point in told] == [14, 21, 28, 0]
    assert told[0].start_ns == START
    assert [point.start_ns for point in told[1:]] == [point.at_ns for point in told[:-1]]
    for push in endpoint.pushes:
        assert push.metrics["kvtally.generated.tokens"].sum.aggregation_temporality == DELTA
        assert push.metrics["kvtally.coverage"].HasField("gauge")


@pytest.mark.parametrize("preference", ["", "cumulative", "lowmemory", "LowMemory", "another"])
def test_all_but_deltas_is_cumulative(
    preference: str, kvtally: Call, growing: Growing, endpoint: OtlpReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PREFERENCE, preference)
    for _ in range(2):
        kvtally("export", "otlp", "--ledger", growing.url)
    assert endpoint.values("kvtally.generated.tokens") == [14]
    assert endpoint.pushes[0].metrics["kvtally.generated.tokens"].sum.aggregation_temporality == CUMULATIVE


def test_deltas_of_another_ledger_in_the_same_place_begin_anew(tmp_path: Path, endpoint: OtlpReceiver) -> None:
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    for snapshot in (snapshot_of(generated(100)), snapshot_of(generated(30), start_ns=START + HOUR)):
        assert sent(snapshot, url, DELTAS, START + 3 * HOUR)
    assert [push.points("kvtally.generated.tokens")[0].value for push in endpoint.pushes] == [100, 30]
    assert endpoint.pushes[1].points("kvtally.generated.tokens")[0].start_ns == START + HOUR


def test_a_counter_that_is_new_or_has_begun_anew_is_sent_whole(tmp_path: Path, endpoint: OtlpReceiver) -> None:
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    for figures in ((generated(100),), (generated(40), generated(7, "b")), (generated(41), generated(9, "b"))):
        assert sent(snapshot_of(*figures), url, DELTAS)
    assert [[point.value for point in push.points("kvtally.generated.tokens")] for push in endpoint.pushes] == [
        [100],
        [40, 7],
        [1, 2],
    ]


def test_no_point_ends_before_it_begins_when_the_clock_is_set_back(tmp_path: Path, endpoint: OtlpReceiver) -> None:
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    for at_ns in (START + 3 * HOUR, START + 2 * HOUR):
        assert sent(snapshot_of(generated(5)), url, DELTAS, at_ns)
    for push in endpoint.pushes:
        (point,) = push.points("kvtally.generated.tokens")
        assert point.start_ns <= point.at_ns


def test_deltas_that_cannot_be_kept_account_of_are_not_sent(
    kvtally: Call, demo_ledger: str, tmp_path: Path, endpoint: OtlpReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = copied(demo_ledger, tmp_path)
    (tmp_path / "copy.db.otlp-new").mkdir()
    monkeypatch.setenv(PREFERENCE, "delta")
    ran = kvtally("export", "otlp", "--ledger", url)
    assert ran.status == 3
    assert "copy.db.otlp-new" in ran.err
    assert endpoint.pushes == []


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", '{"ledger_ns": 1}', '{"ledger_ns": 1, "at_ns": "x", "counters": {}}', '{"counters": []}'],
)
def test_an_account_that_is_not_whole_counts_as_none(content: str, tmp_path: Path) -> None:
    kept = Kept(str(tmp_path / "ledger.db.otlp"))
    assert kept.read(START) == LastSent(START, START, {})
    (tmp_path / "ledger.db.otlp").write_text(content)
    assert kept.read(START) == LastSent(START, START, {})


def test_an_account_is_renewed_whole_or_not_at_all(tmp_path: Path) -> None:
    kept = Kept(str(tmp_path / "ledger.db.otlp"))
    first, second = (LastSent(START, START + at, {"a": float(at)}) for at in (1, 2))
    with kept.renewed(first) as keep:
        assert kept.read(START) == LastSent(START, START, {})
        keep()
    with kept.renewed(second):
        assert kept.read(START) == first
    assert kept.read(START) == first
    assert [path.name for path in tmp_path.iterdir()] == ["ledger.db.otlp"]


def test_counters_are_told_apart_by_their_labels_in_any_order() -> None:
    one = Figure("generated_tokens", {"replica": "a", "model": "m"}, 1)
    assert key_of(one) == key_of(one._replace(labels={"model": "m", "replica": "a"}))
    assert key_of(one) != key_of(generated(1, "b"))


# the environment


def resource(push: Push) -> dict[str, str]:
    return {name: value for name, value in push.resource.items() if not name.startswith("telemetry.")}


def test_the_resource_is_this_host_unless_the_environment_says_more(
    monkeypatch: pytest.MonkeyPatch, endpoint: OtlpReceiver, tmp_path: Path
) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "gpu-host")
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    own = {
        "service.name": "kvtally",
        "service.version": __version__,
        "host.name": "gpu-host",
        "service.instance.id": "gpu-host",
    }
    assert sent(snapshot_of(generated(1)), url, {})
    assert resource(endpoint.pushes[-1]) == own
    given = {"OTEL_RESOURCE_ATTRIBUTES": "deployment.environment.name=prod,host.name=other,service.name=by-attribute"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert sent(snapshot_of(generated(1)), url, given)
    more = {"deployment.environment.name": "prod", "host.name": "other"}
    assert resource(endpoint.pushes[-1]) == own | more | {"service.name": "by-attribute"}
    monkeypatch.setenv("OTEL_SERVICE_NAME", "by-name")
    assert sent(snapshot_of(generated(1)), url, given | {"OTEL_SERVICE_NAME": "by-name"})
    assert resource(endpoint.pushes[-1]) == own | more | {"service.name": "by-name"}


def test_the_pod_is_told_by_the_names_of_kubernetes(monkeypatch: pytest.MonkeyPatch) -> None:
    told = dict(resource_of(POD).attributes)
    assert told["k8s.namespace.name"] == "serving"
    assert told["k8s.pod.name"] == "vllm-7d9"
    assert told["k8s.node.name"] == "gpu-1"
    assert told["service.instance.id"] == "serving/vllm-7d9"
    given = "service.instance.id=mine,k8s.node.name=theirs"
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", given)
    named = dict(resource_of(POD | {"OTEL_RESOURCE_ATTRIBUTES": given}).attributes)
    assert (named["service.instance.id"], named["k8s.node.name"]) == ("mine", "theirs")
    assert named["k8s.pod.name"] == "vllm-7d9"


def test_headers_compression_and_a_path_of_metrics_alone_are_honoured(
    kvtally: Call, demo_ledger: str, receiver: OtlpReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", f"{receiver.endpoint}/tenants/7/metrics")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer%20secret,x-scope=team-a")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip")
    assert kvtally("export", "otlp", "--ledger", demo_ledger).status == 0
    (push,) = receiver.pushes
    assert push.path == "/tenants/7/metrics"
    assert (push.headers["authorization"], push.headers["x-scope"]) == ("Bearer secret", "team-a")
    assert push.headers["content-encoding"] == "gzip"


def test_config_names_the_endpoint_where_the_environment_does_not(
    kvtally: Call, demo_ledger: str, receiver: OtlpReceiver, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = tmp_path / "kvtally.toml"
    config.write_text(f'[export.otlp]\nendpoint = "{receiver.endpoint}"\n')
    for given in (None, ""):
        if given is not None:
            monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", given)
        assert kvtally("export", "otlp", "--ledger", demo_ledger, "--config", str(config)).status == 0
        assert os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT") == given
    assert [push.path for push in receiver.pushes] == ["/v1/metrics"] * 2
    with OtlpReceiver() as other:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", other.endpoint)
        assert kvtally("export", "otlp", "--ledger", demo_ledger, "--config", str(config)).status == 0
        assert len(other.pushes) == 1


def test_grpc_carries_the_same_points_and_headers(
    kvtally: Call, demo_ledger: str, endpoint: OtlpReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_http = kvtally("export", "otlp", "--ledger", demo_ledger)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer%20secret")
    with OtlpGrpcReceiver() as other:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", other.endpoint)
        assert kvtally("export", "otlp", "--ledger", demo_ledger) == by_http
    (push,), (same,) = other.pushes, endpoint.pushes
    assert push.headers["authorization"] == "Bearer secret"
    assert push.resource == same.resource
    assert {name: untimed(push, name) for name in push.metrics} == {name: untimed(same, name) for name in same.metrics}


def untimed(push: Push, metric: str) -> list[tuple[Mapping[str, str], float]]:
    return [(point.attributes, point.value) for point in push.points(metric)]


def test_a_backend_of_grpc_that_is_not_there_is_told_within_the_timeout(
    kvtally: Call, demo_ledger: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1000")
    with free_port() as port:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
        ran = kvtally("export", "otlp", "--ledger", demo_ledger)
    assert ran.status == 3
    assert "UNAVAILABLE" in ran.err
    assert "scheme" not in ran.err
    assert ran.err.count("\n") == 1


def test_an_endpoint_without_a_scheme_is_refused_with_what_to_write(
    kvtally: Call, demo_ledger: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = tmp_path / "kvtally.toml"
    config.write_text('[export.otlp]\nendpoint = "127.0.0.1:4318"\n')
    told = "begins with neither http:// nor https://: write http://127.0.0.1:4318"
    ran = kvtally("export", "otlp", "--ledger", demo_ledger, "--config", str(config))
    assert (ran.status, ran.out) == (2, "")
    assert f"export.otlp.endpoint {told}" in ran.err
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "127.0.0.1:4318")
    ran = kvtally("export", "otlp", "--ledger", demo_ledger)
    assert (ran.status, ran.out) == (2, "")
    assert f"OTEL_EXPORTER_OTLP_ENDPOINT {told}" in ran.err


def test_grpc_to_a_bare_host_is_tls_which_a_failure_says(
    kvtally: Call, demo_ledger: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1000")
    with OtlpGrpcReceiver() as other:
        bare = other.endpoint.removeprefix("http://")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", bare)
        ran = kvtally("export", "otlp", "--ledger", demo_ledger)
        assert (ran.status, ran.err.count("\n"), len(other.pushes)) == (3, 1, 0)
        hint = f"for none, write {other.endpoint} or set OTEL_EXPORTER_OTLP_INSECURE=true"
        assert ran.err.endswith(f" (without a scheme it is TLS: {hint})\n")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_INSECURE", "true")
        assert kvtally("export", "otlp", "--ledger", demo_ledger).status == 0
        assert len(other.pushes) == 1


def test_a_protocol_that_is_not_installed_says_what_to_install(
    kvtally: Call, demo_ledger: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.delitem(sys.modules, "kvtally.agent.export.otlp_grpc", raising=False)  # an earlier test loaded it
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.grpc.metric_exporter", None)
    ran = kvtally("export", "otlp", "--ledger", demo_ledger)
    assert ran.status == 2
    assert "pip install 'kvtally[grpc]'" in ran.err


@pytest.mark.parametrize("off", [{}, {"OTEL_SDK_DISABLED": "true"}, {"OTEL_METRICS_EXPORTER": "none"}])
def test_what_is_switched_off_or_has_no_endpoint_is_not_pushed_by_hand_either(
    kvtally: Call, demo_ledger: str, monkeypatch: pytest.MonkeyPatch, off: dict[str, str]
) -> None:
    for name, value in ({**off, "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"} if off else {}).items():
        monkeypatch.setenv(name, value)
    ran = kvtally("export", "otlp", "--ledger", demo_ledger)
    assert (ran.status, ran.out) == (2, "")
    assert "nothing is pushed: set OTEL_EXPORTER_OTLP_ENDPOINT" in ran.err


def test_metrics_have_a_protocol_of_their_own_and_one_that_is_not_known_is_refused() -> None:
    general = {"OTEL_EXPORTER_OTLP_PROTOCOL": "http/json"}
    with pytest.raises(ExporterMissing, match="http/json"):
        exporter_of(general)
    for environ in (
        {},
        general | {"OTEL_EXPORTER_OTLP_METRICS_PROTOCOL": "http/protobuf"},
        {"OTEL_EXPORTER_OTLP_PROTOCOL": ""},
    ):
        exporter = exporter_of(environ).sends
        assert type(exporter).__module__.startswith("opentelemetry.exporter.otlp.proto.http")
        exporter.shutdown()


def test_figures_of_opencost_are_not_sent() -> None:
    data = metrics_data(snapshot_of(Figure("llm_total_hourly_cost", {}, 1), generated(1)), resource_of({}), START)
    (scope,) = data.resource_metrics[0].scope_metrics
    assert [metric.name for metric in scope.metrics] == ["kvtally.generated.tokens"]
