"""Rows about the work behind the money: tokens, GPUs, storage, and kvtally itself."""

from __future__ import annotations

from deploy.grafana.panels import Panel, Query, Row
from deploy.grafana.selectors import ENGINES, HERE, OF_KVTALLY, RATE, once_a_host, per_covered_second

STEADY = "2m"
MINUTES = "5m"  # for what moves once a minute, over the scraper's clock
GPU_ACTIVE = "kvtally_gpu_active_seconds_total"
GPU_OBSERVED = "kvtally_gpu_observed_seconds_total"
READ = "kvtally_filesystem_read_bytes_total"
FINDINGS = f'kvtally_findings{{{HERE},window="$window"}}'
# where nothing is found there is no series: a 0 says so, unless there is no kvtally that could have looked
NONE = f'label_replace(0 * scalar(sum(kvtally_build_info{{{HERE}}})) * absent({FINDINGS}), "kind", "none", "", "")'


def _active(measures: str, observed: str) -> str:
    """Mean utilisation by measure, over the seconds for which it is known; a GPU counts once, whoever sees it."""
    rates = f'rate({GPU_ACTIVE}{{{HERE},measure{measures}"utilization"}}{RATE})'
    active = f"sum by (measure) (max by (gpu, measure) ({rates}))"
    seconds = f'sum(max by (gpu) (rate({GPU_OBSERVED}{{{HERE},measure="{observed}"}}{RATE})))'
    return f"{active} / ignoring (measure) group_left () ({seconds} > 0)"


def _read(side: str) -> str:
    return once_a_host("filesystem", f'increase({READ}{{{HERE},side="{side}"}}{RATE})')


REUSE = Row(
    "Tokens and reuse",
    (
        Panel(
            "Tokens per second by source",
            "Prompt tokens by where their KV came from (untold: the engine does not say), and output tokens, per "
            "second that intervals cover. MEASURED by the engine's counters.",
            (
                Query(
                    f"sum by (source) ({per_covered_second('kvtally_prompt_tokens_total', 'source')})",
                    "prompt: {{source}}",
                ),
                Query(f"sum({per_covered_second('kvtally_generated_tokens_total', '')})", "output"),
            ),
            "short",
            "stack",
            interval=STEADY,
        ),
        Panel(
            "Reused prompt tokens by tier",
            "Shares of all prompt tokens. hbm is MEASURED; dram and disk may be estimated from what the cache found "
            "where; what nobody tells apart is external.",
            (
                Query(
                    f"sum by (tier) (delta(kvtally_ledger_cached_tokens{{{ENGINES}}}{RATE})) / ignoring (tier) "
                    f"group_left () (sum(delta(kvtally_prompt_tokens_total{{{ENGINES}}}{RATE})) > 0)",
                    "{{tier}}",
                ),
            ),
            "percentunit",
            "stack",
            interval=STEADY,
            most=1,
        ),
        Panel(
            "Time to first token, mean",
            "Seconds from a request's arrival to its first token, by the engine's own histogram: sum over count.",
            (
                Query(
                    f"sum by (model) (rate(kvtally_first_token_seconds_total{{{ENGINES}}}{RATE})) / "
                    f"(sum by (model) (rate(kvtally_first_tokens_total{{{ENGINES}}}{RATE})) > 0)",
                    "{{model}}",
                ),
            ),
            "s",
            interval=STEADY,
        ),
    ),
)
GPUS = Row(
    "What the GPUs really did (all GPUs that the chosen kvtally sees, whoever holds them)",
    (
        Panel(
            "GPU activity beside utilization.gpu",
            "Means over time and GPUs. sm, tensor, dram and graphics are GPM's counters (Hopper and later): how much "
            "of the chip worked. utilization is utilization.gpu, which is 100 % as soon as any kernel or copy runs: it "
            "says nothing of how full the GPU is.",
            (Query(_active("!=", "gpm"), "{{measure}}"), Query(_active("=", "utilization"), "{{measure}}.gpu")),
            "percentunit",
            width=12,
            interval=STEADY,
            most=1,
        ),
        Panel(
            "GPU power",
            "Mean power by the GPU's energy counter over the seconds in which it was observed.",
            (
                Query(
                    f"sum by (gpu) (rate(kvtally_gpu_energy_joules_total{{{HERE}}}{RATE})) / "
                    f'(sum by (gpu) (rate({GPU_OBSERVED}{{{HERE},measure="utilization"}}{RATE})) > 0)',
                    "{{gpu}}",
                ),
            ),
            "watt",
            interval=STEADY,
        ),
        Panel(
            "GPU energy, in the time range shown",
            "By the GPU's energy counter, a GPU once, however many kvtallys see it. Its money is a line of its own "
            "where the GPUs are owned (resource energy).",
            (
                Query(
                    f"sum(max by (gpu) (increase(kvtally_gpu_energy_joules_total{{{HERE}}}[$__range])))",
                    "all GPUs",
                ),
            ),
            "joule",
            "stat",
            width=4,
        ),
    ),
)
STORAGE = Row(
    "Storage and KV loads",
    (
        Panel(
            "Storage read bandwidth",
            "device: bytes that came from the device or the server. app: bytes that programs read, a page cache's "
            "included, where the filesystem counts them. Kvtallys of one host see the same disks, which count once; "
            "the host is the label node, or else the kvtally's address.",
            (
                Query(
                    once_a_host("filesystem, side", f"rate({READ}{{{HERE}}}{RATE})"),
                    "{{host}} {{filesystem}} {{side}}",
                ),
            ),
            "Bps",
            width=6,
            interval=MINUTES,
        ),
        Panel(
            "Share read from the page cache",
            "What programs read and no device delivered: DRAM, not storage. No line where the device delivered more "
            "than was asked for. `kvtally storage`: page_cache_share.",
            (
                Query(
                    f"1 - ({_read('device')} / ({_read('app')} > 0)) >= 0",
                    "{{host}} {{filesystem}}",
                ),
            ),
            "percentunit",
            width=6,
            interval=MINUTES,
            most=1,
        ),
        Panel(
            "KV bandwidth while it moves",
            "Bytes over the seconds that moving them took: load brings KV to the engine, storage_read brings it to the "
            "cache. MEASURED, so no line for a cache that counts no bytes; `kvtally storage` then works them out from "
            "tokens.",
            (
                Query(
                    f"sum by (cache, way) (rate(kvtally_cache_moved_bytes_total{{{HERE}}}{RATE})) / "
                    f"(sum by (cache, way) (rate(kvtally_cache_moved_seconds_total{{{HERE}}}{RATE})) > 0)",
                    "{{cache}} {{way}}",
                ),
            ),
            "Bps",
            width=6,
            interval=STEADY,
        ),
        Panel(
            "KV moves under way, mean",
            "Seconds of moving KV per second: above 1 where several moves run side by side.",
            (
                Query(
                    f"sum by (cache, way) (rate(kvtally_cache_moved_seconds_total{{{HERE}}}{RATE}))",
                    "{{cache}} {{way}}",
                ),
            ),
            "none",
            width=6,
            interval=MINUTES,
        ),
    ),
)
HEALTH = Row(
    "Findings, and kvtally itself",
    (
        Panel(
            "Findings in the window",
            "What is not as it should be, by kind. `kvtally cost --since 1h --format json` has each with its span, its "
            "target and what to do.",
            (Query(f"sum by (kind, severity) ({FINDINGS}) or {NONE}", "{{severity}} {{kind}}"),),
            "short",
            "bars",
        ),
        Panel(
            "Scrapes per second by outcome",
            "Of all sources. no_data: the source is there and has nothing to tell; failed: `kvtally doctor` says why.",
            (Query(f"sum by (outcome) (rate(kvtally_scrapes_total{{{HERE}}}{RATE}))", "{{outcome}}"),),
            "short",
        ),
        Panel(
            "How old the figures are",
            "Age of the ledger's newest interval (one scrape interval, or two), and of the figures on /metrics that "
            "come from the ledger (a minute, while somebody scrapes).",
            (
                Query(f"kvtally_ledger_lag_seconds{{{HERE}}}", "{{instance}} newest interval"),
                Query(f"kvtally_snapshot_age_seconds{{{HERE}}}", "{{instance}} figures"),
            ),
            "s",
        ),
        Panel(
            "What a scrape takes",
            "The last scrape of each source.",
            (Query(f"max by (source) (kvtally_scrape_duration_seconds{{{HERE}}})", "{{source}}"),),
            "s",
        ),
        Panel(
            "Intervals written per second",
            "By kind of target. An engine writes one a scrape; a cache only when it moved something.",
            (Query(f"sum by (kind) (rate(kvtally_intervals_total{{{HERE}}}{RATE}))", "{{kind}}"),),
            "short",
        ),
        Panel(
            "CPU of kvtally",
            "Of the daemon; its children, once a minute and once an hour, are not in it.",
            (Query(f"rate(process_cpu_seconds_total{{{HERE}}}{RATE}) {OF_KVTALLY}", "{{instance}}"),),
            "percentunit",
        ),
        Panel(
            "Memory of kvtally",
            "Resident memory of the daemon.",
            (Query(f"process_resident_memory_bytes{{{HERE}}} {OF_KVTALLY}", "{{instance}}"),),
            "bytes",
        ),
        Panel(
            "Size of the ledger",
            "The ledger's file. Raw intervals leave after ledger.retention_days; charges and hourly sums stay.",
            (Query(f"kvtally_ledger_bytes{{{HERE}}}", "{{instance}}"),),
            "bytes",
        ),
    ),
)
