"""Pages of vLLM 0.8 to 0.33 for one workload, made by hand for the versions of which there is no recording."""

from __future__ import annotations

import re
from typing import NamedTuple

# Two requests were served in blocks of 16 tokens. One of 1000 prompt tokens: 320 were in HBM, 160 came through a
# connector. One of 49, of which 48, all that can be, were in HBM. In all 1049 prompt tokens, 368 hits, 160 loaded,
# 521 computed; 50 tokens were generated. A third request runs.
# 0.8 counts whole blocks: 62 + 3 looked up, 20 + 3 found. 0.16 to 0.19 show the second prompt's last token twice.
#
# since  until   type  family{labels}  value, of a histogram count and sum; | what its HELP says, where that matters
_TABLE = """
0.8      -       counter   prompt_tokens 1049 | Number of prefill tokens processed.
0.16     -       counter   prompt_tokens_by_source{source="local_compute"} 521 | Number of prompt tokens by source.
0.16     0.19    counter   prompt_tokens_by_source{source="local_cache_hit"} 369 | Number of prompt tokens by source.
0.20     -       counter   prompt_tokens_by_source{source="local_cache_hit"} 368 | Number of prompt tokens by source.
0.16     -       counter   prompt_tokens_by_source{source="external_kv_transfer"} 160
0.16     -       counter   prompt_tokens_cached 528 | Number of cached prompt tokens (local + external).
0.16     0.19    counter   prompt_tokens_recomputed 1 | Number of cached tokens recomputed for forward pass.
0.32     -       counter   prompt_tokens_cached_by_source{source="device"} 368
0.32     -       counter   prompt_tokens_cached_by_source{source="host"} 96
0.32     -       counter   prompt_tokens_cached_by_source{source="disk"} 64
0.32     -       counter   prompt_tokens_cached_by_source{source="p2p"} 0
0.32     -       counter   prompt_tokens_cached_by_source{source="external_unspecified"} 0
0.8      -       counter   generation_tokens 50 | Number of generation tokens processed.
0.8      0.8     counter   gpu_prefix_cache_queries 65 | GPU prefix cache queries, in terms of number of queried blocks.
0.8      0.8     counter   gpu_prefix_cache_hits 23 | GPU prefix cache hits, in terms of number of cached blocks.
0.9      0.10    counter   gpu_prefix_cache_queries 1049 | GPU prefix cache queries, in terms of number of queriedtokens
0.9      0.10    counter   gpu_prefix_cache_hits 368 | GPU prefix cache hits, in terms of number of cached tokens.
0.9.2    -       counter   prefix_cache_queries 1049 | Prefix cache queries, in terms of number of queried tokens.
0.9.2    -       counter   prefix_cache_hits 368 | Prefix cache hits, in terms of number of cached tokens.
0.11.1   0.14    counter   external_prefix_cache_queries 1049
0.16     -       counter   external_prefix_cache_queries 681
0.11.1   -       counter   external_prefix_cache_hits 160
0.11.1   -       counter   mm_cache_queries 4
0.8      -       counter   request_success{finished_reason="stop"} 1 | Count of successfully processed requests.
0.8      -       counter   request_success{finished_reason="length"} 1 | Count of successfully processed requests.
0.8      -       counter   request_success{finished_reason="abort"} 0 | Count of successfully processed requests.
0.16     -       counter   request_success{finished_reason="error"} 0 | Count of successfully processed requests.
0.8      -       counter   num_preemptions 0 | Cumulative number of preemption from the engine.
0.8      -       gauge     num_requests_running 1 | Number of requests in model execution batches.
0.8      -       gauge     num_requests_waiting 2 | Number of requests waiting to be processed.
0.20     -       gauge     num_requests_waiting_by_reason{reason="capacity"} 2
0.20     -       gauge     num_requests_waiting_by_reason{reason="deferred"} 0
0.8      0.10    gauge     gpu_cache_usage_perc 0.25
0.9.2    -       gauge     kv_cache_usage_perc 0.25 | KV-cache usage. 1 means 100 percent usage.
0.11.1   -       gauge     engine_sleep_state{sleep_state="awake"} 1
0.11.1   -       gauge     engine_sleep_state{sleep_state="discard_all"} 0
0.8      -       gauge     cache_config_info{block_size="16",num_gpu_blocks="100"} 1
0.8      -       histogram time_to_first_token_seconds 2 0.5 | Histogram of time to first token in seconds.
0.8      -       histogram request_queue_time_seconds 2 0.125
0.8      -       histogram request_prefill_time_seconds 2 0.25
0.8      -       histogram request_decode_time_seconds 2 1.5
0.8      -       histogram request_inference_time_seconds 2 1.75
0.8      -       histogram e2e_request_latency_seconds 2 2.0 | Histogram of e2e request latency in seconds.
0.8      0.11    histogram time_per_output_token_seconds 48 1.5
0.10.2   -       histogram inter_token_latency_seconds 48 1.5 | Histogram of inter-token latency in seconds.
0.8      -       histogram request_prompt_tokens 2 1049 | Number of prefill tokens processed.
0.8      -       histogram request_generation_tokens 2 50 | Number of generation tokens processed.
0.13     -       histogram request_prefill_kv_computed_tokens 2 521
0.8      0.22    histogram iteration_tokens_total 49 1099 | Histogram of number of tokens per engine_step.
0.23     -       histogram iteration_tokens_total 49 571 | Histogram of number of tokens per engine_step.
0.17     -       counter   estimated_flops_per_gpu_total 7000000000
0.16     -       counter   kv_offload_total_bytes{transfer_type="CPU_to_GPU"} 20480
0.16     -       counter   kv_offload_total_bytes{transfer_type="GPU_to_CPU"} 66688
0.16     -       counter   kv_offload_total_time{transfer_type="CPU_to_GPU"} 0.25
0.16     -       counter   kv_offload_total_time{transfer_type="GPU_to_CPU"} 0.5
0.16     -       histogram kv_offload_size{transfer_type="CPU_to_GPU"} 1 20480
0.16     -       histogram kv_offload_size{transfer_type="GPU_to_CPU"} 2 66688
0.24     -       counter   kv_offload_load_bytes 20480
0.24     -       counter   kv_offload_store_bytes 66688
0.24     -       counter   kv_offload_load_time 0.25
0.24     -       counter   kv_offload_store_time 0.5
0.24     -       histogram kv_offload_load_size 1 20480
0.24     -       histogram kv_offload_store_size 2 66688
0.28     -       counter   kv_offload_tiering_read_bytes{tier="1:fs"} 8192
0.28     -       counter   kv_offload_tiering_read_time{tier="1:fs"} 0.125
0.28     -       counter   kv_offload_tiering_write_bytes{tier="1:fs"} 66688
0.28     -       counter   kv_offload_tiering_write_time{tier="1:fs"} 1.0
0.33     -       gauge     kv_offload_config_info{cpu_kv_cache_size_bytes="1048576",cpu_kv_cache_size_tokens="8192"} 1
"""
_REGISTERED_TOTAL = ("estimated_flops_per_gpu",)  # with "_total" in its own name, which Ray leaves alone
_ROW = re.compile(
    r"(?P<since>\S+) +(?P<until>\S+) +(?P<type>\w+) +(?P<family>\w+)(?:\{(?P<labels>[^}]*)\})? "
    r"(?P<values>[\d. ]+?)(?: \| (?P<about>.*))?"
)


class Sample(NamedTuple):
    """One line of a page: its family as vLLM registers it, the ending of its name, labels and value."""

    family: str
    type: str
    about: str
    ending: str
    labels: str
    value: str


def number(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def samples(version: str) -> list[Sample]:
    """What an engine of this version shows of the workload, but for the labels that all series have."""
    found: list[Sample] = []
    here = number(version)
    for line in _TABLE.strip().splitlines():
        row = _ROW.fullmatch(line)
        assert row is not None, line
        until = here if row["until"] == "-" else number(row["until"])
        if not number(row["since"]) <= here or here[: len(until)] > until:
            continue
        about = row["about"] or f"About {row['family']}."
        labels = row["labels"] or ""
        values = row["values"].split()
        endings = {"counter": ("_total",), "gauge": ("",), "histogram": ("_count", "_sum")}[row["type"]]
        name = row["family"].removesuffix("_total") if row["type"] == "counter" else row["family"]
        if row["type"] == "histogram":
            bucket = ",".join(filter(None, (labels, 'le="+Inf"')))
            found.append(Sample(name, row["type"], about, "_bucket", bucket, values[0]))
        for ending, value in zip(endings, values, strict=True):
            found.append(Sample(name, row["type"], about, ending, labels, value))
    return found


def _braced(sample: Sample, rest: str) -> str:
    # the configuration names no model
    own = rest.replace(',model_name="m"', "") if sample.family == "cache_config_info" else rest
    return "{" + ",".join(filter(None, (sample.labels, own))) + "}"


ENGINE = 'engine="0",model_name="m"'


def page(version: str, labels: str = ENGINE) -> str:
    """As prometheus_client writes it: a birth for each counter and histogram, and the start of the process."""
    lines = ["process_start_time_seconds 1.7e+09"]
    for one in samples(version):
        name = f"vllm:{one.family}"
        family = f"{name}_total" if one.type == "counter" else name
        lines += [f"# HELP {family} {one.about}", f"# TYPE {family} {one.type}"]
        lines.append(f"{name}{one.ending}{_braced(one, labels)} {one.value}")
        if one.ending in {"_total", "_sum"}:
            lines.append(f"{name}_created{_braced(one, labels)} 1.7e+09")
    return "\n".join(lines) + "\n"


def multiprocess(version: str) -> str:
    """As several front-ends write it: no birth, no start, no help, and before 0.11 one gauge of KV usage for each."""
    lines: list[str] = []
    for one in samples(version):
        name = f"vllm:{one.family}"
        lines += [f"# HELP {name} Multiprocess metric", f"# TYPE {name} {one.type}"]
        if one.family.endswith("cache_usage_perc") and number(version) < (0, 11):
            lines += [f'{name}{_braced(one, ENGINE)[:-1]},pid="{pid}"}} {one.value}' for pid in (71, 72)]
        else:
            lines.append(f"{name}{one.ending}{_braced(one, ENGINE)} {one.value}")
    return "\n".join(lines) + "\n"


def openmetrics(version: str) -> str:
    """As prometheus_client 0.23 and later writes OpenMetrics: the colon stays in comments alone."""
    lines: list[str] = []
    for one in samples(version):
        lines += [f"# HELP vllm:{one.family} {one.about}", f"# TYPE vllm:{one.family} {one.type}"]
        lines.append(f"vllm_{one.family}{one.ending}{_braced(one, ENGINE)} {one.value}")
    return "\n".join(lines) + "\n# EOF\n"


def ray(version: str, *, suffixed: bool, plain: bool, labels: str, prefix: str = "ray_vllm_") -> str:
    """As Ray's node agent writes it: what never counted is missing, a counter is there suffixed, plain, or twice."""
    lines = ["process_start_time_seconds 1.6e+09"]  # the agent's
    for one in samples(version):
        if one.type == "counter" and float(one.value) == 0:
            continue
        is_twofold = one.type == "counter" and one.family not in _REGISTERED_TOTAL
        names = [f"{prefix}{one.family}{one.ending}"] if suffixed or not is_twofold else []
        names += [f"{prefix}{one.family}"] if plain and is_twofold else []
        for name in names:
            lines += [f"# HELP {name} {one.about}", f"# TYPE {name} {one.type}"]
            lines.append(f"{name}{_braced(one, f'{ENGINE},{labels}')} {one.value}")
    return "\n".join(lines) + "\n"
