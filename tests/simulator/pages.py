"""A simulated run as a recording: metrics pages, GPU or host samples, meta.json and the request log, as files."""

from __future__ import annotations

import json
import math
from io import BytesIO
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tests.simulator.families import Events, render
from tests.simulator.lmcache_page import FLUSH_SECONDS, lmcache_families
from tests.simulator.vllm_page import Shown, vllm_families

from kvtally.agent.recording import Recording
from kvtally.agent.recording_members import Member, PageName

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Mapping
    from pathlib import Path

    from tests.simulator.families import Array
    from tests.simulator.laws import Law
    from tests.simulator.story import Config, Run

START = 1_795_406_400.0  # 2026-11-23T04:00:00Z: second 0 of every run
_IDLE_WATTS, _BUSY_WATTS, _TENSOR_WATTS = 80.0, 220.0, 400.0
_OUTPUT_CPU_SECONDS = 0.4e-3  # of the API server, for each token


class View(NamedTuple):
    """How a run is recorded: seconds between pages and between samples, --enable-mfu-metrics, the longest context."""

    scrape_seconds: float = 1.0
    sample_seconds: float = 0.5
    mfu: bool = False
    longest_context: int = 131_072
    before_seconds: float = 2.0
    after_seconds: float = 2.0


class Recorded(NamedTuple):
    """A recording in memory: what lies in each file of its folder."""

    name: str
    files: Mapping[str, bytes]

    def open(self) -> Recording:
        """As what `kvtally replay` reads, without a folder."""
        return Recording(self._members, self.name)

    def write(self, folder: Path) -> Path:
        """Write the folder; its path."""
        for name, body in self.files.items():
            place = folder / name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(body)
        return folder

    def _members(self) -> Generator[Member]:
        for name, body in self.files.items():
            kind: str | PageName = name
            if name.endswith(".prom"):
                source, _, file = name.partition("/")
                kind = PageName(int(file.removesuffix(".prom")) * 1_000_000, source, source)
            elif name not in {"meta.json", "gpu.jsonl", "host.jsonl"}:
                continue
            yield Member(name, None, kind, len(body), lambda body=body: BytesIO(body))  # type: ignore[misc]  # its default


def record(name: str, run: Run, config: Config, law: Law, view: View | None = None) -> Recorded:
    """Record a run from before its first request until after its last one; LMCache gets time for its last flush."""
    view = view or View()
    flush = FLUSH_SECONDS if config.connector.startswith("LMCache") else 0.0
    until = run.end + view.after_seconds + flush
    pages = np.arange(-view.before_seconds, until + view.scrape_seconds, view.scrape_seconds)
    files = {"meta.json": _json(_meta(name, run, config, law, view))}
    samples = np.arange(-view.before_seconds - view.sample_seconds, until + view.sample_seconds, view.sample_seconds)
    if law.device.sku:
        files["gpu.jsonl"] = b"".join(_gpu_lines(run, law, samples))
    else:
        files["host.jsonl"] = b"".join(_host_lines(run, pages - 0.001))
    files["requests.jsonl"] = b"".join(_request_lines(run, law))
    bodies = page_bodies(run, config, law, view, pages)
    files |= {f"vllm/{round((START + t) * 1e3)}.prom": body for t, body in zip(pages, bodies, strict=True)}
    return Recorded(name, files)


def page_bodies(run: Run, config: Config, law: Law, view: View, instants: Array) -> list[bytes]:
    """The pages at these instants (seconds of the run)."""
    model = law.shape.name
    labels = {"engine": "0", "model_name": model}
    shown = Shown(instants, labels, _version(config), view.mfu, view.longest_context, START - 300)
    families = vllm_families(run, config, law, shown)
    if config.connector.startswith("LMCache"):
        families += lmcache_families(run, config, law, model, instants)
    return render(families, len(instants))


def worked_seconds(run: Run, instants: Array, *, tensor: bool = False) -> Array:
    """Seconds that the GPU (or its tensor pipes) has worked up to each instant."""
    busy, gpu = run.column("busy"), run.column("gpu")
    share = np.divide(run.column("tensor"), gpu, out=np.zeros_like(gpu), where=gpu > 0) if tensor else np.ones(len(gpu))
    done = np.concatenate(([0.0], np.cumsum(gpu * share)))
    edges = np.stack((busy, busy + gpu), axis=1).ravel()
    sums = np.stack((done[:-1], done[1:]), axis=1).ravel()
    return np.interp(instants, edges, sums) if len(edges) else np.zeros(len(instants))


def _version(config: Config) -> str:
    return "0.25.1" if config.connector.startswith("LMCache") else "0.32.0"


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1).encode() + b"\n"


def _meta(name: str, run: Run, config: Config, law: Law, view: View) -> dict[str, Any]:
    shape, device = law.shape, law.device
    count = device.ranks if device.sku else 0
    arguments = ["--model", f"models/{shape.name}", "--served-model-name", shape.name, "--dtype", "bfloat16"]
    arguments += ["--max-model-len", str(view.longest_context), "--max-num-seqs", str(config.most_running)]
    arguments += ["--max-num-batched-tokens", str(config.token_budget), "--tensor-parallel-size", str(device.ranks)]
    arguments += ["--enable-prefix-caching" if config.hbm_cache else "--no-enable-prefix-caching"]
    arguments += ["--enable-mfu-metrics"] if view.mfu else []
    if config.connector:
        transfer = {"kv_connector": config.connector, "kv_role": "kv_both"}
        arguments += ["--kv-transfer-config", json.dumps(transfer)]
    uuids = [f"GPU-simulated-{number}" for number in range(count)]
    return {
        "name": name,
        "engine": "vllm",
        "engine_version": _version(config),
        "lmcache_version": "0.5.1" if config.connector.startswith("LMCache") else None,
        "engine_args": arguments,
        "gpus": [{"index": number, "uuid": uuid, "name": device.sku} for number, uuid in enumerate(uuids)],
        "gpus_per_replica": count,
        "model": {
            "architecture": "LlamaForCausalLM",
            "num_hidden_layers": shape.layers,
            "hidden_size": shape.hidden,
            "intermediate_size": shape.intermediate,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "head_dim": shape.head_dim,
            "vocab_size": shape.vocabulary,
            "weight_dtype": "bfloat16",
            "kv_dtype": "bfloat16",
            "parameters": shape.parameters,
        },
        "phases": {"load": {"start": START, "end": START + run.end, "requests": len(run.served)}},
    }


def _gpu_lines(run: Run, law: Law, instants: Array) -> Iterator[bytes]:
    """Lines of gpu.jsonl: GPM means since the sample before; all GPUs of a replica work alike."""
    device = law.device
    span = np.diff(instants)
    work, tensor = np.diff(worked_seconds(run, instants)), np.diff(worked_seconds(run, instants, tensor=True))
    end, copies = run.column("end"), run.column("stall") + run.column("stored")
    copied = np.diff(Events(end, copies).total(instants))
    kv_bytes = law.shape.kv_bytes / device.ranks / 2**20
    received = np.diff(
        Events((one.at for one in run.loads), (one.tokens * kv_bytes for one in run.loads)).total(instants)
    )
    sent = np.diff(
        Events((one.at for one in run.stores), (one.tokens * kv_bytes for one in run.stores)).total(instants)
    )
    joules = np.cumsum(_IDLE_WATTS * span + _BUSY_WATTS * work + _TENSOR_WATTS * tensor)
    watts = np.diff(joules, prepend=0.0) / span
    memory = round(0.9 * 80e9)
    at_work = np.concatenate(([device.boost_mhz], run.column("clock") * device.reference_mhz))
    slow = at_work[np.searchsorted(end, instants[1:], side="right")]
    prefills = np.minimum(1.0, tensor / span / 0.5)  # the boost clock gives way to the power limit under prefill
    clocks = device.boost_mhz + (slow - device.boost_mhz) * prefills
    for at, t in enumerate(instants[1:].tolist()):
        share = 100 * work[at] / span[at]
        means = {
            "graphics_util": round(share, 3),
            "sm_util": round(0.8 * share, 3),
            "any_tensor_util": round(100 * tensor[at] / span[at], 3),
            "dram_bw_util": round(0.4 * share, 3),
            "pcie_rx_mib_per_s": round(received[at] / span[at], 3),
            "pcie_tx_mib_per_s": round(sent[at] / span[at], 3),
        }
        one = {
            "utilization_percent": min(100, round(share + 100 * copied[at] / span[at])),
            "memory_utilization_percent": round(0.4 * share),
            "memory_used_bytes": memory,
            "power_milliwatts": round(1000 * watts[at]),
            "energy_millijoules": 10**9 + round(1000 * joules[at]),
            "sm_clock_mhz": round(clocks[at]),
            "gpm": means,
        }
        gpus = [{"index": number, "uuid": f"GPU-simulated-{number}", **one} for number in range(device.ranks)]
        yield json.dumps({"t": round(START + t, 6), "gpus": gpus}).encode() + b"\n"


def _host_lines(run: Run, instants: Array) -> Iterator[bytes]:
    """Lines of host.jsonl: CPU seconds of the engine core, which computes, and of the API server."""
    core = worked_seconds(run, instants)
    server = _OUTPUT_CPU_SECONDS * Events(run.column("end"), run.column("generated")).total(instants)
    for at, t in enumerate(instants.tolist()):
        processes = [
            {"pid": pid, "comm": name, "start_time": START - 300, "cpu_seconds": round(base + seconds[at], 2)}
            for pid, name, base, seconds in ((1788, "python3", 31.0, server), (1857, "VLLM::EngineCor", 12.0, core))
        ]
        yield json.dumps({"t": round(START + t, 6), "processes": processes, "disks": []}).encode() + b"\n"


def _request_lines(run: Run, law: Law) -> Iterator[bytes]:
    """Lines of requests.jsonl, by arrival: what a client saw, and under "truth" what it could not see."""
    late = law.parameters.request_seconds
    for one in sorted(run.served, key=lambda one: (one.arrival, one.number)):
        line = {
            "tag": "load",
            "t_start": START + one.arrival,
            "t_first": None if math.isnan(one.first) else START + one.first + late,
            "t_end": START + one.end + late,
            "prompt_tokens_sent": one.prompt,
            "usage": None
            if one.aborted
            else {
                "prompt_tokens": one.prompt,
                "completion_tokens": one.generated,
                "prompt_tokens_details": {"cached_tokens": one.cached},
            },
            "error": "aborted" if one.aborted else None,
            "truth": {"hbm": one.hbm, "dram": one.dram, "disk": one.disk, "preemptions": one.preemptions},
        }
        yield json.dumps(line).encode() + b"\n"
