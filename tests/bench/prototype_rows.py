"""Rows of the prototype's simulator as a recording that shows what they hold and no more.

Pages and GPU samples come with its rows, every 5 s; chunk steps are counted among the iterations; utilisation has
parts of stalls, gaps and stores in it. Prompt tokens by source come from its request log, since its rows count them at
admission. `time_to_store` is stored bytes over the link's speed, of which its engine waits for a tenth. The SM clock
stands at the datasheet's.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
from tests.simulator.families import Family, Sample, render
from tests.simulator.pages import START, Recorded
from tests.simulator.vllm_page import FIRST_TOKEN_EDGES, ITERATION_EDGES

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    Array = np.ndarray

_LINK_BYTES_PER_SECOND = 25e9
_SKU, _CLOCK_MHZ, _PEAK = "NVIDIA H100 80GB HBM3", 1830, 989.4e12
_LONGEST = 262_144
_TOKEN_EDGES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000, 200_000)


def recorded_rows(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    log: Array,
    model: Any,
    engine: Mapping[str, Any],
    *,
    sync: bool,
    mfu: bool = False,
    shown: Array | None = None,
    probes: tuple[Array, Array] | None = None,
) -> Recorded:
    """The prototype's rows as a recording; `shown` is the part of its request log that goes into requests.jsonl."""
    kept = [row for before, row in zip([None, *rows], rows, strict=False) if before is None or row["t"] > before["t"]]
    times = np.array([row["t"] for row in kept], dtype=float)
    table = {key: np.array([row[key] for row in kept], dtype=float) for key in kept[0]}
    bodies = render([*_families(table, log, sync=sync, mfu=mfu), *_connector(table, model, sync=sync)], len(kept))
    files = {"meta.json": json.dumps(_meta(name, model, engine, sync=sync), indent=1).encode()}
    files["gpu.jsonl"] = b"".join(_gpu_lines(times, table, model))
    files |= {f"vllm/{round((START + t) * 1e3)}.prom": body for t, body in zip(times, bodies, strict=True)}
    if shown is not None:
        files["requests.jsonl"] = b"".join(map(_request_line, sorted(shown.tolist())))
    if probes is not None:
        lines = ({"prompt_tokens": int(n), "seconds": float(s)} for n, s in zip(*probes, strict=True))
        files["probes.jsonl"] = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    return Recorded(name, files)


_LABELS = {"engine": "0", "model_name": "prototype"}


def _families(table: Mapping[str, Array], log: Array, *, sync: bool, mfu: bool) -> Iterator[Family]:
    """vLLM's families."""
    simple = {
        "prompt_tokens": table["prompt"],
        "generation_tokens": table["gen"],
        "num_preemptions": table["pre"],
        "estimated_flops_per_gpu": table["flops"] * mfu,
        "estimated_read_bytes_per_gpu": table["rbytes"] * mfu,
    }
    for name, values in simple.items():
        yield _counters(f"vllm:{name}_total", ({}, values))
    computed, inner, outer = _by_source(table, log)
    yield _counters(
        "vllm:prompt_tokens_by_source_total",
        ({"source": "local_compute"}, computed),
        ({"source": "local_cache_hit"}, inner),
        ({"source": "external_kv_transfer"}, outer),
    )
    yield _counters("vllm:prompt_tokens_cached_by_source_total", *_admitted(table, sync=sync))
    yield _counters("vllm:request_success_total", ({"finished_reason": "length"}, table["fin_n"]))
    gauges = {"num_requests_running": "g_run", "num_requests_waiting": "g_wait", "kv_cache_usage_perc": "g_kv"}
    for name, key in gauges.items():
        yield Family(f"vllm:{name}", "gauge", (Sample(f"vllm:{name}", _LABELS, table[key]),))
    yield from _histograms(table, log)


def _admitted(table: Mapping[str, Array], *, sync: bool) -> list[tuple[dict[str, str], Array]]:
    """Cached tokens by tier, at admission; LMCache, which loads synchronously, does not tell its tiers."""
    host, disk = table["host"], table["disk"]
    told = {"external_unspecified": host + disk} if sync else {"host": host, "disk": disk}
    return [({"source": source}, values) for source, values in {"device": table["dev"], **told}.items()]


def _histograms(table: Mapping[str, Array], log: Array) -> Iterator[Family]:
    yield _histogram("iteration_tokens_total", ITERATION_EDGES, table["it_h"], table["it_sum"])
    finished = table["fin_n"]
    yield _histogram("request_prompt_tokens", _TOKEN_EDGES, table["n_h"], _sums(log[:, 1], finished))
    yield _histogram(
        "request_prefill_kv_computed_tokens", _TOKEN_EDGES, table["c_h"], _sums(log[:, 1] - log[:, 2], finished)
    )
    clocks = {"prefill": "pf_t", "decode": "dec_t", "queue": "q_t"}
    for name, key in clocks.items():
        yield _histogram(f"request_{name}_time_seconds", (), finished[:, None], table[key])
    yield _histogram("inter_token_latency_seconds", (), table["itl_n"][:, None], table["itl_s"])
    waits = _by_first(log)[:, 5]
    within = [_sums((waits <= edge).astype(float), table["ttft_n"]) for edge in FIRST_TOKEN_EDGES]
    counts = np.diff(np.stack((*within, table["ttft_n"]), axis=1), prepend=0.0)
    yield _histogram("time_to_first_token_seconds", FIRST_TOKEN_EDGES, counts, table["ttft_s"])


def _by_first(log: Array) -> Array:
    """The request log in the order of first tokens; it is kept in that of finishes."""
    return log[np.argsort(log[:, 0] + log[:, 5], kind="stable")]


def _by_source(table: Mapping[str, Array], log: Array) -> tuple[Array, Array, Array]:
    """Prompt tokens computed, found in HBM and outside, at first tokens.

    The log does not know what a preempted request found in HBM: what is missing to the rows' total is spread over
    them by their cached tokens.
    """
    ordered = _by_first(log)
    cached, hbm, again = ordered[:, 2], ordered[:, 6].copy(), ordered[:, 4] > 0
    if again.any() and cached[again].sum():
        missing = table["dev"][-1] - hbm[~again].sum()
        hbm[again] = np.floor(cached[again] * np.clip(missing / cached[again].sum(), 0, 1))
    inner = _sums(hbm, table["ttft_n"])
    return table["c"], inner, table["prompt"] - table["c"] - inner


def _sums(values: Array, counts: Array) -> Array:
    """The sum of the first so many values, for each count."""
    summed: Array = np.concatenate(([0.0], np.cumsum(values)))[counts.astype(int)]
    return summed


def _connector(table: Mapping[str, Array], model: Any, *, sync: bool) -> Iterator[Family]:
    """LMCache's families where loads are synchronous, vLLM's own offloading where they are not."""
    loaded, stored = table["load_b_dram"] + table["load_b_disk"], table["store_b"]
    saving = stored / (_LINK_BYTES_PER_SECOND * model.tp)
    if not sync:
        counters = {"load_bytes": loaded, "load_time": table["load_s"], "store_bytes": stored, "store_time": saving}
        for name, values in counters.items():
            yield _counters(f"vllm:kv_offload_{name}_total", ({}, values))
        return
    labels = {"model_name": "prototype", "role": "worker", "served_model_name": "prototype", "worker_id": "0"}
    for name, seconds in {"time_to_retrieve": table["load_s"], "time_to_store": saving}.items():
        samples = (Sample(f"lmcache:{name}_sum", labels, seconds),)
        yield Family(f"lmcache:{name}", "histogram", samples)
    found = {
        "num_hit_tokens": loaded / model.kvb,
        "num_stored_tokens": stored / model.kvb,
        "num_retrieve_requests": table["n_ret"],
        "num_remote_read_bytes": table["load_b_disk"],
    }
    for name, values in found.items():
        full = f"lmcache:{name}_total"
        yield Family(full, "counter", (Sample(full, labels, np.round(values)),))


def _counters(name: str, *series: tuple[Mapping[str, str], Array]) -> Family:
    return Family(name, "counter", tuple(Sample(name, {**_LABELS, **labels}, values) for labels, values in series))


def _histogram(name: str, edges: Sequence[float], counts: Array, sums: Array) -> Family:
    """A histogram from counts in each bucket, the one beyond the last edge too."""
    full = f"vllm:{name}"
    cumulative = np.cumsum(counts, axis=1)
    bounds = [*(str(float(edge)) for edge in edges), "+Inf"]
    buckets = (Sample(f"{full}_bucket", {"le": bound, **_LABELS}, cumulative[:, at]) for at, bound in enumerate(bounds))
    ends = Sample(f"{full}_sum", _LABELS, sums), Sample(f"{full}_count", _LABELS, cumulative[:, -1])
    return Family(full, "histogram", (*buckets, *ends))


def _gpu_lines(times: Array, table: Mapping[str, Array], model: Any) -> Iterator[bytes]:
    """One sample with each row: its utilisation, and the tensor pipes' share by its FLOP count."""
    span = np.diff(times, prepend=times[0] - 1.0)
    share = 100 * np.diff(table["util"], prepend=0.0) / span
    tensor = 100 * np.diff(table["flops"], prepend=0.0) / _PEAK / span
    for at, t in enumerate(times.tolist()):
        means = {"graphics_util": share[at], "sm_util": share[at], "any_tensor_util": tensor[at], "dram_bw_util": 0.0}
        one = {"gpm": means | {"pcie_rx_mib_per_s": 0.0, "pcie_tx_mib_per_s": 0.0}}
        gpus = [{"index": number, "uuid": f"GPU-prototype-{number}", **one} for number in range(model.tp)]
        yield json.dumps({"t": START + t, "gpus": gpus}).encode() + b"\n"


def _meta(name: str, model: Any, engine: Mapping[str, Any], *, sync: bool) -> dict[str, Any]:
    connector = "LMCacheConnectorV1" if sync else "OffloadingConnector"
    arguments = ["--max-num-batched-tokens", "8192", "--tensor-parallel-size", str(model.tp), "--max-model-len"]
    arguments += [str(_LONGEST), "--kv-transfer-config", json.dumps({"kv_connector": connector, "kv_role": "kv_both"})]
    return {
        "name": name,
        "engine": "vllm",
        "engine_version": "0.32.0",
        "engine_args": arguments,
        "gpus": [{"index": at, "uuid": f"GPU-prototype-{at}", "name": _SKU} for at in range(model.tp)],
        "gpus_per_replica": model.tp,
        "kv_cache_tokens": engine["kv_cap"],
        "model": {
            "architecture": "LlamaForCausalLM",
            "num_hidden_layers": model.L,
            "hidden_size": model.hid,
            "intermediate_size": _intermediate(model),
            "num_attention_heads": model.q,
            "num_key_value_heads": model.kv,
            "head_dim": model.d,
            "vocab_size": 1,
            "weight_dtype": "bfloat16",
            "kv_dtype": "bfloat16",
            "parameters": round(model.P),
        },
    }


def _request_line(row: Sequence[float]) -> bytes:
    """One request as recordings tell it; the prototype does not know when it ended."""
    arrival, prompt, cached, output, _, wait, _ = row
    usage = {
        "prompt_tokens": round(prompt),
        "completion_tokens": round(output),
        "prompt_tokens_details": {"cached_tokens": round(cached)},
    }
    line = {"tag": "load", "t_start": START + arrival, "t_first": START + arrival + wait, "t_end": None, "usage": usage}
    return json.dumps(line | {"error": None}).encode() + b"\n"


def _intermediate(model: Any) -> int:
    """Width of the MLP with which every parameter is one that every token multiplies with, as sim.py has it."""
    attention = model.hid * (model.q + 2 * model.kv) * model.d + model.q * model.d * model.hid
    width: float = (model.P / model.L - attention) / (3 * model.hid)
    return round(width)
