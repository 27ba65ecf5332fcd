"""What vLLM (0.25.1 with LMCache in multiprocess mode, else 0.32.0) shows of a simulated run on its metrics page."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from tests.simulator.families import Events, Family, Sample, counter, histogram, one_two_five

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from tests.simulator.families import Array
    from tests.simulator.laws import Law
    from tests.simulator.story import Config, Run, Served

ITERATION_EDGES = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
FIRST_TOKEN_EDGES = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560),
)
GAP_EDGES = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
REQUEST_EDGES = (
    *(0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60),
    *(120, 240, 480, 960, 1920, 7680),
)
PREEMPTION_EDGES = (1, 2, 3, 4, 5, 10, 20)
_REASONS = ("stop", "length", "abort", "error", "repetition")
_SOURCES = ("device", "host", "p2p", "disk", "external_unspecified")


class Shown(NamedTuple):
    """How a run is shown: when (seconds of the run), under which labels, by which version."""

    instants: Array
    labels: dict[str, str]
    version: str
    mfu: bool
    longest_context: int
    started: float  # unix seconds

    @property
    def is_multiprocess(self) -> bool:
        """Whether it runs with PROMETHEUS_MULTIPROC_DIR, as in-process LMCache needs it."""
        return self.version < "0.3"

    def has(self, version: str) -> bool:
        """Whether the version is at least this one (of the same number of digits)."""
        return self.version >= version


def vllm_families(run: Run, config: Config, law: Law, shown: Shown) -> list[Family]:
    """All of vLLM's own families, and those of its offloading connector."""
    request_seconds = law.parameters.request_seconds
    families = [
        *_request_histograms(run, shown, request_seconds),
        *_iterations(run, shown),
        *_counters(run, config, shown),
        *_gauges(run, config, shown),
    ]
    if config.connector == "OffloadingConnector":
        families += _offloading(run, config, law.shape.kv_bytes, shown)
    if not shown.is_multiprocess:
        started = np.full(len(shown.instants), shown.started)
        families.append(
            Family("process_start_time_seconds", "gauge", (Sample("process_start_time_seconds", {}, started),))
        )
    return families


def _request_histograms(run: Run, shown: Shown, request_seconds: float) -> Iterable[Family]:
    ended = [one for one in run.served if not one.aborted]
    first = [one for one in run.served if not math.isnan(one.first)]

    def of(name: str, edges: Iterable[float], value: Callable[[Served], float], *, at_first: bool = False) -> Family:
        population = first if at_first else ended
        events = Events((one.first if at_first else one.end for one in population), map(value, population))
        return histogram(f"vllm:{name}", shown.labels, events, tuple(edges), shown.instants)

    tokens = one_two_five(shown.longest_context)
    yield of("request_prompt_tokens", tokens, lambda one: one.prompt)
    yield of("request_generation_tokens", tokens, lambda one: one.generated)
    yield of("request_max_num_generation_tokens", tokens, lambda one: one.generated)
    yield of("request_params_n", (1, 2, 5, 10, 20), lambda _: 1)
    yield of("request_params_max_tokens", tokens, lambda one: one.generated)
    yield of(
        "time_to_first_token_seconds",
        FIRST_TOKEN_EDGES,
        lambda one: one.first - one.arrival + request_seconds,
        at_first=True,
    )
    yield of("request_time_per_output_token_seconds", GAP_EDGES, _mean_gap)
    yield of("e2e_request_latency_seconds", REQUEST_EDGES, lambda one: one.end - one.arrival + request_seconds)
    yield of("request_queue_time_seconds", REQUEST_EDGES, lambda one: one.scheduled - one.arrival)
    yield of("request_inference_time_seconds", REQUEST_EDGES, lambda one: one.end - one.scheduled + request_seconds)
    yield of("request_prefill_time_seconds", REQUEST_EDGES, lambda one: one.first - one.scheduled + request_seconds)
    yield of("request_decode_time_seconds", REQUEST_EDGES, lambda one: one.end - one.first)
    yield of("request_prefill_kv_computed_tokens", tokens, lambda one: one.prompt - one.cached)
    if shown.has("0.30"):
        yield of("request_num_preemptions", PREEMPTION_EDGES, lambda one: one.preemptions)


def _mean_gap(one: Served) -> float:
    return (one.end - one.first) / (one.generated - 1) if one.generated > 1 else 0.0


def _iterations(run: Run, shown: Shown) -> Iterable[Family]:
    """Families that tick at each step: iteration tokens where the step has output, gaps between tokens."""
    end, tokens, decodes = run.column("end"), run.column("output_tokens"), run.column("decodes")
    with_output = tokens > 0
    events = Events(end[with_output], tokens[with_output])
    yield histogram("vllm:iteration_tokens_total", shown.labels, events, ITERATION_EDGES, shown.instants)
    gaps = np.diff(end, prepend=0.0)
    many = decodes > 0
    times = np.concatenate((end[many], [at for at, _ in run.late]))
    values = np.concatenate((gaps[many], [seconds for _, seconds in run.late]))
    weights = np.concatenate((decodes[many], np.ones(len(run.late))))
    name = "vllm:inter_token_latency_seconds"
    yield histogram(name, shown.labels, Events(times, values), GAP_EDGES, shown.instants, weights=weights)


def _counters(run: Run, config: Config, shown: Shown) -> Iterable[Family]:
    first = [one for one in run.served if not math.isnan(one.first)]
    at_first = [one.first for one in first]
    end = run.column("end")

    def of(name: str, events: Events, **labels: str) -> Sample:
        return counter(f"vllm:{name}_total", {**shown.labels, **labels}, events, shown.instants)

    def family(name: str, *samples: Sample) -> Family:
        return Family(f"vllm:{name}_total", "counter", samples)

    for name, column in (("flops", "flop"), ("read_bytes", "read_bytes"), ("write_bytes", "")):
        events = Events(end, run.column(column)) if shown.mfu and column else Events(())
        yield family(f"estimated_{name}_per_gpu", of(f"estimated_{name}_per_gpu", events))
    for name, events in _lookups(run, config, shown).items():
        yield family(name, of(name, events))
    yield family("num_preemptions", of("num_preemptions", Events(run.preempted)))
    yield family("prompt_tokens", of("prompt_tokens", Events(at_first, (one.prompt for one in first))))
    by_source: tuple[tuple[str, Callable[[Served], float]], ...] = (
        ("local_compute", lambda one: one.prompt - one.cached),
        ("local_cache_hit", lambda one: one.hbm),
        ("external_kv_transfer", lambda one: one.dram + one.disk),
    )
    samples = [
        of("prompt_tokens_by_source", Events(at_first, map(value, first)), source=name) for name, value in by_source
    ]
    yield family("prompt_tokens_by_source", *samples)
    yield family("prompt_tokens_cached", of("prompt_tokens_cached", Events(at_first, (one.cached for one in first))))
    if shown.has("0.32"):
        yield family("prompt_tokens_cached_by_source", *_admitted(run, config, of))
    yield family("generation_tokens", of("generation_tokens", Events(end, run.column("generated"))))
    ended = [one.end for one in run.served if not one.aborted]
    reasons = (of("request_success", Events(ended if why == "length" else ()), finished_reason=why) for why in _REASONS)
    yield family("request_success", *reasons)


def _lookups(run: Run, config: Config, shown: Shown) -> dict[str, Events]:
    """Tokens looked up; before 0.27 once for each attempt to admit a request."""
    admitted = [one for one in run.lookups if one.first]
    at = [one.at for one in admitted]
    queries = Events(at, (one.tokens for one in admitted))
    if not shown.has("0.27"):
        times = np.concatenate((queries.times, run.column("start")))
        queries = Events(times, np.concatenate((queries.amounts, run.column("retried_tokens"))))
    outside = admitted if config.connector else []
    return {
        "prefix_cache_queries": queries,
        "prefix_cache_hits": Events(at, (one.hbm_tokens for one in admitted)),
        "external_prefix_cache_queries": Events(
            (one.at for one in outside), (one.tokens - one.hbm_tokens for one in outside)
        ),
        "external_prefix_cache_hits": Events((one.at for one in outside), (one.external_tokens for one in outside)),
    }


def _admitted(run: Run, config: Config, of: Callable[..., Sample]) -> Iterable[Sample]:
    """Cached tokens by tier, counted at admission; LMCache does not tell its tiers."""
    served = [one for one in run.served if not math.isnan(one.scheduled)]
    tells = not config.connector.startswith("LMCache")
    value: dict[str, Callable[[Served], float]] = {
        "device": lambda one: one.hbm,
        "host": lambda one: one.dram if tells else 0,
        "p2p": lambda _: 0,
        "disk": lambda one: one.disk if tells else 0,
        "external_unspecified": lambda one: 0 if tells else one.dram + one.disk,
    }
    for name in _SOURCES:
        yield of(
            "prompt_tokens_cached_by_source",
            Events((one.scheduled for one in served), map(value[name], served)),
            source=name,
        )


def _gauges(run: Run, config: Config, shown: Shown) -> Iterable[Family]:
    """Gauges as the last step with output left them: a chunk without output updates none."""
    with_output = run.column("output_tokens") > 0
    ends = run.column("end")[with_output]
    last = np.searchsorted(ends, shown.instants, side="right")

    def held(column: str) -> Array:
        return np.concatenate(([0.0], run.column(column)[with_output]))[last]

    def of(name: str, *columns: tuple[Array, dict[str, str]]) -> Family:
        samples = (Sample(f"vllm:{name}", {**shown.labels, **labels}, values) for values, labels in columns)
        return Family(f"vllm:{name}", "gauge", tuple(samples))

    capacity, deferred = held("waiting"), held("deferred")
    still = np.ones(len(shown.instants))
    yield of("num_requests_running", (held("running"), {}))
    yield of("num_requests_waiting", (capacity + deferred, {}))
    reasons = (capacity, {"reason": "capacity"}), (deferred, {"reason": "deferred"})
    yield of("num_requests_waiting_by_reason", *reasons)
    states = (("awake", still), ("weights_offloaded", 0 * still), ("discard_all", 0 * still))
    yield of("engine_sleep_state", *((values, {"sleep_state": state}) for state, values in states))
    yield of("kv_cache_usage_perc", (held("kv_used") / config.kv_tokens, {}))
    info = {
        "block_size": str(config.block_tokens),
        "cache_dtype": "auto",
        "enable_prefix_caching": str(config.hbm_cache),
        "kv_cache_size_tokens": str(config.kv_tokens),
        "num_gpu_blocks": str(config.kv_tokens // config.block_tokens),
    }
    labels = {"engine": shown.labels["engine"], **info}
    yield Family("vllm:cache_config_info", "gauge", (Sample("vllm:cache_config_info", labels, still),))


def _offloading(run: Run, config: Config, kv_bytes: int, shown: Shown) -> Iterable[Family]:
    loads, stores = run.loads, run.stores
    loaded, stored = [load.at for load in loads], [store.at for store in stores]
    families = {
        "kv_offload_load_bytes": Events(loaded, (load.tokens * kv_bytes for load in loads)),
        "kv_offload_load_time": Events(loaded, (load.seconds for load in loads)),
        "kv_offload_store_bytes": Events(stored, (store.tokens * kv_bytes for store in stores)),
        "kv_offload_store_time": Events(stored, (store.seconds for store in stores)),
    }
    for name, events in families.items():
        sample = counter(f"vllm:{name}_total", shown.labels, events, shown.instants)
        yield Family(f"vllm:{name}_total", "counter", (sample,))
    if config.disk_tokens:
        name = "vllm:kv_offload_tiering_read_bytes_total"
        events = Events(loaded, (load.disk_tokens * kv_bytes for load in loads))
        labels = {**shown.labels, "tier": "1:fs"}
        yield Family(name, "counter", (counter(name, labels, events, shown.instants),))
