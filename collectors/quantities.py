"""Every quantity that a reading carries: its name, unit, type and meaning, in the order of a reading's values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvtally.collectors.base import Kind

# counter   cumulative in the source; survives a restart of kvtally
# integral  cumulative in the collector (a gauge times the time it held); begins at 0 with every collector session
# gauge     the value at the end of an interval
Type = Literal["counter", "integral", "gauge"]


class Quantity(NamedTuple):
    """One column: `scale` turns the source's unit into the integer unit that ends the name.

    A difference is round(current * scale) - round(previous * scale), so intervals add up exactly.
    """

    name: str
    type: Type
    scale: float
    meaning: str


def _tokens(name: str, meaning: str) -> Quantity:
    return Quantity(name, "counter", 1, meaning)


def _seconds(name: str, meaning: str) -> Quantity:
    return Quantity(name, "counter", 1e9, meaning)


ENGINE = (
    _tokens("prompt_tokens", "prompt length of requests that gave their first token, cached part included"),
    _tokens("computed_tokens", "prompt tokens computed here (vLLM >= 0.16)"),
    _tokens("hbm_tokens", "prompt tokens reused from the engine's own prefix cache (vLLM >= 0.16)"),
    _tokens("external_tokens", "prompt tokens loaded through a KV connector (vLLM >= 0.16)"),
    _tokens("generated_tokens", "output tokens, those of aborted requests included"),
    _tokens("prefix_query_tokens", "tokens looked up in the prefix cache; before 0.27 once per scheduling attempt"),
    _tokens("prefix_hit_tokens", "tokens found there"),
    _tokens("external_query_tokens", "tokens looked up through a KV connector; whole prompts until vLLM 0.14"),
    _tokens("external_hit_tokens", "tokens found there"),
    _tokens("first_tokens", "requests that gave their first token"),
    _tokens("finished_requests", "requests that finished; client aborts are not among them"),
    _tokens("preemptions", "requests thrown out of the batch; their second prefill is in no prompt counter"),
    _tokens("steps", "engine steps with output"),
    _tokens("step_tokens", "tokens of those steps; before 0.23 cached prompt tokens are among them"),
    _seconds("first_token_ns", "sum of time to first token"),
    _seconds("queue_ns", "sum of queue time, counted at finish"),
    _seconds("prefill_ns", "sum of prefill time (wall, per request, overlapping), counted at finish"),
    _seconds("decode_ns", "sum of decode time, counted at finish"),
    _seconds("inter_token_ns", "sum of inter-token latency, counted at each token"),
    _seconds("request_ns", "sum of end-to-end latency, counted at finish"),
    Quantity("running_requests", "gauge", 1, "requests in the batch"),
    Quantity("waiting_requests", "gauge", 1, "requests in the queue"),
    Quantity("waiting_for_capacity", "gauge", 1, "those of them that wait for KV blocks (vLLM >= 0.20)"),
    Quantity("kv_usage_ppm", "gauge", 1e6, "share of the KV blocks in use"),
    Quantity("awake", "gauge", 1, "0: the engine sleeps and still holds its GPUs"),
)

CACHE = (
    _tokens("lookup_tokens", "tokens asked for, from token 0"),
    _tokens("lookup_hit_tokens", "tokens found, those that HBM holds too included"),
    _tokens("requested_tokens", "tokens asked for beyond HBM"),
    _tokens("loaded_tokens", "tokens loaded"),
    _tokens("stored_tokens", "tokens stored"),
    _tokens("loads", "load operations"),
    _tokens("stores", "store operations"),
    _seconds("load_ns", "seconds of loading"),
    _seconds("store_ns", "seconds of storing"),
    _tokens("load_bytes", "bytes brought to the engine"),
    _tokens("store_bytes", "bytes taken from the engine"),
    Quantity("used_bytes", "gauge", 1, "bytes held"),
    _tokens("dram_hit_tokens", "of the tokens found, those in this host's DRAM"),
    _tokens(
        "disk_hit_tokens", "of the tokens found, those on storage: a disk, a filesystem, an object or key-value store"
    ),
    _tokens("storage_read_bytes", "KV bytes that this cache read from storage: what its programs asked for"),
    _seconds("storage_read_ns", "seconds of reading them, summed over what ran side by side"),
    _tokens("storage_write_bytes", "KV bytes that this cache wrote to storage"),
    _seconds("storage_write_ns", "seconds of writing them, summed"),
)

GPU = (
    Quantity("energy_mj", "counter", 1, "energy since the driver was loaded, millijoules"),
    Quantity("observed_ns", "integral", 1e9, "seconds for which utilisation, power and memory were sampled"),
    Quantity("busy_ns", "integral", 1e9, "utilization.gpu x time; copies count as busy, so never price compute by it"),
    Quantity("memory_busy_ns", "integral", 1e9, "utilization.memory x time"),
    Quantity("power_sampled_mj", "integral", 1, "power draw x time, where no energy counter is"),
    Quantity("gpm_ns", "integral", 1e9, "seconds over which the GPM means below were taken"),
    Quantity("graphics_ns", "integral", 1e9, "GPM graphics utilisation x time"),
    Quantity("sm_ns", "integral", 1e9, "GPM SM utilisation x time"),
    Quantity("tensor_ns", "integral", 1e9, "GPM tensor pipe utilisation x time"),
    Quantity("dram_ns", "integral", 1e9, "GPM DRAM bandwidth utilisation x time"),
    Quantity("pcie_received_bytes", "integral", 1, "PCIe bytes to the GPU (GPM)"),
    Quantity("pcie_sent_bytes", "integral", 1, "PCIe bytes from the GPU (GPM)"),
    Quantity("memory_used_bytes", "gauge", 1, "device memory in use"),
    Quantity("power_mw", "gauge", 1, "power draw"),
    Quantity("sm_clock_mhz", "gauge", 1, "SM clock"),
    Quantity("clock_reasons", "gauge", 1, "bit mask of NVML clock event reasons"),
    Quantity("busy_cycles", "integral", 1e6, "SM clock x utilization.gpu x time: over busy_ns, the clock under load"),
)

FILESYSTEM = (
    _tokens("read_bytes", "bytes read from the device or the server: page-cache hits are not among them"),
    _tokens("reads", "read operations"),
    _seconds("read_ns", "time of read operations, summed"),
    _tokens("write_bytes", "bytes written to the device or the server"),
    _tokens("writes", "write operations"),
    _seconds("write_ns", "time of write operations, summed"),
    _tokens("app_read_bytes", "bytes that programs read through the filesystem, those that a cache served included"),
    _tokens("app_write_bytes", "bytes that programs wrote through the filesystem"),
)

PROCESS = (
    _seconds("cpu_ns", "user and system CPU seconds of the process tree"),
    _tokens("read_call_bytes", "rchar: bytes of read calls, page-cache hits included, mmap not"),
    _tokens("write_call_bytes", "wchar"),
    _tokens("read_bytes", "bytes fetched from storage"),
    _tokens("write_bytes", "bytes sent to storage"),
    _seconds("worker_cpu_ns", "CPU seconds of the processes that compute, where titles tell them from the rest"),
    Quantity("processes", "gauge", 1, "processes in the tree"),
    Quantity("resident_bytes", "gauge", 1, "resident memory of the tree"),
)

GATEWAY = (
    _tokens("requests", "requests that came in"),
    _tokens("failed_requests", "requests that ended in an error"),
    _tokens("input_tokens", "prompt tokens as the responses tell them, each request once"),
    _tokens("cached_tokens", "of these, the tokens that the engines tell as cached"),
    _tokens("output_tokens", "output tokens as the responses tell them"),
    _tokens("disaggregated_requests", "requests whose prefill ran on another engine than their decode"),
    _seconds("first_token_ns", "sum of time to first token, seen from the gateway"),
    _seconds("request_ns", "sum of end-to-end latency, seen from the gateway"),
)

QUANTITIES: Mapping[Kind, tuple[Quantity, ...]] = {
    "engine": ENGINE,
    "cache": CACHE,
    "gpu": GPU,
    "filesystem": FILESYSTEM,
    "process": PROCESS,
    "gateway": GATEWAY,
}


def index(kind: Kind, name: str) -> int:
    """Position of a quantity in the values of its kind; KeyError for an unknown name."""
    for position, quantity in enumerate(QUANTITIES[kind]):
        if quantity.name == name:
            return position
    raise KeyError(name)
