"""Prints docs/observability.md: how kvtally's figures reach other systems, its names off the tables it works by."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvtally.agent.export.metrics import DISK_READ, METRICS, OPENCOST
from kvtally.agent.health import OWN

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from kvtally.agent.export.metrics import Metric

INTRODUCTION = """\
# Prometheus and OpenTelemetry

<!-- printed by docs/observability.py; `just docs` writes it anew -->

`kvtally run` serves `/metrics` and pushes OTLP. The figures of both are worked out of the ledger by the functions \
that answer `kvtally cost` and `kvtally savings`, so they agree with the command line to the digit, and what they \
are worked out with (SQLAlchemy, OpenTelemetry's SDK) runs in a child that ends after a second: see \
[0008](adr/0008-figures-for-exporters-come-from-a-child.md). The dashboard and the alerts are in \
[grafana.md](grafana.md), manifests in [deploy.md](deploy.md), every key in \
[configuration.md](configuration.md#export).

## Prometheus

```toml
[export.prometheus]
listen = "127.0.0.1:9478" # the default; "0.0.0.0:9478" or "[::]:9478" for a Prometheus elsewhere, "" for none
```

```yaml
scrape_configs:
  - job_name: kvtally
    honor_labels: true # kvtally's namespace is the engine's; without it yours takes its place
    scrape_interval: 30s
    static_configs:
      - targets: ["127.0.0.1:9478"]
```

`/metrics` speaks the text format and OpenMetrics, whichever the scraper asks for first, and adds kvtally's own \
health of that moment. The ledger's figures on it are up to `refresh_seconds` (60) old, and are worked out only \
while somebody asks: the first scrape after five minutes of silence shows those of then, or none where they are \
older than 15 minutes, and the first after a start shows kvtally's own health alone. \
`kvtally_snapshot_age_seconds` says how old they are, and for how long kvtally runs where there are none yet. \
Figures for `/metrics` and for a push are worked out one after the other. A ledger so large that it takes more \
than 2 s of CPU is worked out so rarely that it takes a tenth of one core. `/-/healthy` answers 503 once nothing has \
been read for 15 minutes; `/-/ready` answers 200 from the first tick that the ledger took, and stays so: a full disk \
of the sidecar must not take its engine out of service. Whoever reaches the address reads what these engines cost; \
there is no access control. A port that is taken is a warning, and the run goes on without.

An OTLP push is made once more when `run` ends, for at most eight seconds.

`kvtally export page` prints the same page, as for node_exporter's textfile collector; `kvtally export \
openmetrics` writes the counters of the past for `promtool tsdb create-blocks-from openmetrics`.

## OpenTelemetry

```sh
OTEL_EXPORTER_OTLP_ENDPOINT=http://127.0.0.1:4318 kvtally run # or [export.otlp] endpoint
```

```yaml
receivers: {otlp: {protocols: {http: {endpoint: "127.0.0.1:4318"}}}}
exporters: {debug: {verbosity: detailed}}
service: {pipelines: {metrics: {receivers: [otlp], exporters: [debug]}}}
```

Nothing is pushed, and nothing of OpenTelemetry is loaded, where no endpoint is named. A push that fails is told in \
the log and costs nothing else: there is no queue, since the next push carries the ledger's sums. A redirect is not \
followed: the log says where it leads. An answer that is none of OTLP's, such as a login page, is a failure, whatever \
its status; an empty one is not. Points that a backend rejects of a push that it takes are told with what it says, \
and not sent again, as OTLP wants it.

Lengths of time are whole milliseconds, as OpenTelemetry's specification has them. Its own exporters for Python take \
`OTEL_EXPORTER_OTLP_TIMEOUT` for seconds; kvtally does not, so one environment says the same to every program that \
keeps to the specification. A value that is out of its bounds is told at the start, and the default holds.

"""
VARIABLES: tuple[tuple[str, str], ...] = (
    (
        "OTEL_EXPORTER_OTLP_ENDPOINT, …_METRICS_ENDPOINT",
        "Where to: the base URL, or the whole one of metrics, with http:// or https:// (by gRPC, a bare host is TLS)",
    ),
    ("OTEL_EXPORTER_OTLP_PROTOCOL, …_METRICS_PROTOCOL", "http/protobuf (default); grpc with `kvtally[grpc]`"),
    ("OTEL_EXPORTER_OTLP_HEADERS, …_METRICS_HEADERS", "Such as authorization=Bearer%20…"),
    (
        "OTEL_EXPORTER_OTLP_TIMEOUT, …_METRICS_TIMEOUT",
        "Milliseconds to wait for the backend, repetitions included, 100 to 300000 (0: as long as there is); 10000",
    ),
    ("OTEL_METRIC_EXPORT_TIMEOUT", "Milliseconds that a push may take in all, 100 to 300000 (0: the longest); 30000"),
    ("OTEL_EXPORTER_OTLP_CERTIFICATE, …_METRICS_CERTIFICATE", "Goes before REQUESTS_CA_BUNDLE and CURL_CA_BUNDLE"),
    ("OTEL_EXPORTER_OTLP_COMPRESSION, …_CLIENT_KEY, …", "As OpenTelemetry's exporter has them"),
    ("OTEL_METRIC_EXPORT_INTERVAL", "Milliseconds from one push to the next, a second to a day; 60000"),
    (
        "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE",
        "cumulative (default); delta; lowmemory, which for sums that are read off is cumulative",
    ),
    ("OTEL_RESOURCE_ATTRIBUTES, OTEL_SERVICE_NAME", "Go before what kvtally says of itself"),
    ("OTEL_METRICS_EXPORTER", "Without otlp in it (none), nothing is pushed"),
    ("OTEL_SDK_DISABLED", "true: nothing is pushed"),
)
RESOURCE = """\

The resource is `service.name` kvtally, `service.version`, `host.name`, `service.instance.id` (the pod, else the \
host: a restart begins no new series), and in a pod `k8s.namespace.name`, `k8s.pod.name` and `k8s.node.name`. Two \
kvtallys on one host need a `service.instance.id` each, in OTEL_RESOURCE_ATTRIBUTES. Attributes of points: \
`gen_ai.request.model`, `k8s.cluster.name`, `k8s.namespace.name`, `hw.id`, `hw.model` and `hw.type` where a label \
below is one of those, else the label's name behind `kvtally.`. Bytes read from a whole disk are `system.disk.io` with \
`system.device` and `disk.io.direction`, as in the semantic conventions; those of a mount or a cgroup, which have no \
name there, are `kvtally.filesystem.read`.

Sums are cumulative from the hour in which the ledger begins, whichever process pushes them: a restart of kvtally is \
no reset. For deltas, what was sent last is kept beside the ledger (`ledger.db.otlp`), and renewed by a push that \
was taken: what a failed one held is in the next. Where that file cannot be written, nothing is sent.

## What is a counter, and what a gauge

What only grows is a counter: tokens, measured seconds, bytes, joules. Cost, the states that a step law parts, and \
savings may be restated by a price or a calibration that comes later, also downwards. A counter that falls reads as \
a reset, and `rate` would count it twice; so they are gauges over the ledger's life (`kvtally_ledger_*`): take their \
difference (`delta`, or two instants) for a span of your own. Figures of a window are gauges too, by the lengths of \
`export.windows`, and end with the ledger's newest interval.

What is unknown has no sample: no price, no `kvtally_ledger_cost`. `model="unallocated"` is GPUs that no engine \
holds. Costs of prefill and decode pods that serve together stand under the name of their group, as in `kvtally \
cost`; their counters stand under their own. Amounts are in the currency that their label names.

## Names

"""
OPENCOST_TEXT = """\

## Beside OpenCost

`export.opencost = true` adds OpenCost's three gauges (its inference cost, 1.121) to `/metrics`, of the first of \
`export.windows`, with its names and labels. Allocation has the idle time in it, as `fully_loaded` has; usage has \
not, as `active`. `phase` is empty for all tokens, `prompt` or `generation`. `model_version` is always `unknown`, \
which is what OpenCost says. The prices differ where its split of input and output does: it takes the mean time per \
output token of a request for the whole of its decode.

"""
OWN_TEXT = """\

## Its own health

On `/metrics` alone. `promtool check metrics` has nothing to say about the page.

"""


def page() -> str:
    """The page, as `just docs` writes it."""
    variables = [(", ".join(f"`{one}`" for one in names.split(", ")), meaning) for names, meaning in VARIABLES]
    own = [
        (
            f"`{name}_total`" if about.kind == "counter" else f"`{name}`",
            about.kind,
            _listed(about.labels),
            about.meaning,
        )
        for name, about in OWN.items()
    ]
    opencost = [(f"`{one.prometheus}`", _listed(one.labels), one.meaning) for one in OPENCOST.values()]
    names = [
        (f"`{one.prometheus}`", _otel(one), f"`{one.unit}`", one.type, _listed(one.labels), one.meaning)
        for one in METRICS.values()
    ]
    return "".join(
        (
            INTRODUCTION,
            _table(("variable", "what it does"), variables),
            RESOURCE,
            _table(("Prometheus", "OpenTelemetry", "unit", "type", "labels", "meaning"), names),
            OPENCOST_TEXT,
            _table(("Prometheus", "labels", "meaning"), opencost),
            OWN_TEXT,
            _table(("Prometheus", "type", "labels", "meaning"), own),
        )
    )


def _otel(one: Metric) -> str:
    is_read = one.prometheus == DISK_READ.prometheus
    return f"`{one.otel}`, of a disk `{DISK_READ.otel}`" if is_read else f"`{one.otel}`"


def _listed(labels: Sequence[str]) -> str:
    return ", ".join(f"`{label}`" for label in labels)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *map(_escaped, rows))]
    return "\n".join(lines) + "\n"


def _escaped(cells: Sequence[str]) -> list[str]:
    return [cell.replace("|", "\\|") for cell in cells]


if __name__ == "__main__":
    print(page(), end="")
