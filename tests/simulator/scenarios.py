"""Named loads on named engines: a scenario is a load, a seed, and a law in the family or outside it.

scenario = build("rag70", seed=3, law="stress")
run = scenario.run()
recorded = scenario.recorded(run)      # a recording in memory; .write(folder), .open()
truth = truth_of(scenario, run)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from tests.simulator import traces
from tests.simulator.engine import Engine
from tests.simulator.laws import CPU, H100, H100_X4, LLAMA_8B, LLAMA_70B, OUTSIDE, TINY, Law, Parameters, draw
from tests.simulator.pages import Recorded, View, record
from tests.simulator.story import Config
from tests.simulator.truth import probes

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.simulator.laws import Device, Shape
    from tests.simulator.story import Run
    from tests.simulator.traces import Trace

    Loads = Callable[[np.random.Generator, float], Trace]

LAWS = ("family", *OUTSIDE)
SECONDS = 600.0
PROBED = (512, 1024, 2048, 4096, 8192, 16_384, 32_768)
_GB = 1e9
_LMCACHE = Config(
    connector="LMCacheConnectorV1",
    kv_tokens=250_000,
    dram_tokens=800_000,
    disk_tokens=50_000_000,
    disk_bytes_per_second=8 * _GB,
)
_FAST = _LMCACHE._replace(disk_bytes_per_second=40 * _GB)
_OFFLOADING = _FAST._replace(connector="OffloadingConnector", sync_loads=False, store_share=0.1)
_INNER = Config(kv_tokens=400_000)


class Scenario(NamedTuple):
    """One load on one engine; a `backlog` has a makespan that means something."""

    name: str
    seed: int
    law: Law
    config: Config
    trace: Trace
    view: View
    backlog: bool = False

    def run(self) -> Run:
        """Serve it."""
        return Engine(self.config, self.law, self.trace, self.seed).run()

    def recorded(self, run: Run | None = None, *, probed: bool = False) -> Recorded:
        """The recording of a run, its own unless one is given; with probes.jsonl beside it where `probed`."""
        name = f"simulated-{self.name}-{self.seed}"
        recorded = record(name, run or self.run(), self.config, self.law, self.view)
        if not probed:
            return recorded
        lines = (f'{{"prompt_tokens": {tokens}, "seconds": {seconds}}}\n' for tokens, seconds in self.probes())
        return recorded._replace(files={**recorded.files, "probes.jsonl": "".join(lines).encode()})

    def probes(self) -> list[tuple[int, float]]:
        """Tokens and seconds to the first token of cold prompts on an idle engine."""
        lengths = (tokens for tokens in PROBED if tokens < self.config.kv_tokens / 2)
        return probes(self.config, self.law, traces.singles(lengths, 60.0), self.seed)


class _Plan(NamedTuple):
    shape: Shape
    device: Device
    config: Config
    load: Loads
    backlog: bool = False
    view: View = View(scrape_seconds=2.0, sample_seconds=1.0)


def _rag70(chance: np.random.Generator, seconds: float) -> Trace:
    return traces.documents(chance, seconds, 0.7, 300, 8000)


def _mixed8(chance: np.random.Generator, seconds: float) -> Trace:
    return traces.mixed(
        traces.documents(chance, seconds, 0.5, 100, 5000),
        traces.chats(chance, seconds / 2, 0.2, 6, think_seconds=20),
        traces.documents(chance, seconds, 0.02, 10, 40_000),
        traces.documents(chance, seconds, 1.0, 50, 300, question=100, output=60, system=256),
    )


def _backlog8(chance: np.random.Generator, seconds: float) -> Trace:
    return traces.closed(traces.documents(chance, seconds / 3, 6, 60, 6000, output=60), 24)


def _impatient8(chance: np.random.Generator, seconds: float) -> Trace:
    return traces.impatient(chance, traces.documents(chance, seconds, 1.5, 200, 5000, output=300), 0.2, 2.0)


_PLANS: dict[str, _Plan] = {
    "rag70": _Plan(LLAMA_70B, H100_X4, _LMCACHE, _rag70),
    "rag70_fast": _Plan(LLAMA_70B, H100_X4, _FAST, _rag70),
    "rag70_async": _Plan(LLAMA_70B, H100_X4, _OFFLOADING, _rag70),
    "chat8": _Plan(
        LLAMA_8B, H100, _FAST._replace(kv_tokens=120_000), lambda chance, t: traces.chats(chance, t / 2, 0.5, 6)
    ),
    "agent70": _Plan(
        LLAMA_70B,
        H100_X4,
        _FAST,
        lambda chance, t: traces.chats(
            chance, t / 2, 0.06, 12, turn_tokens=600, output=150, think_seconds=20, first=20_000
        ),
    ),
    "documents70": _Plan(
        LLAMA_70B,
        H100_X4,
        _FAST._replace(kv_tokens=400_000, dram_tokens=2_000_000),
        lambda chance, t: traces.documents(chance, t, 0.10, 40, 40_000, question=300, output=200),
    ),
    "thrash8": _Plan(
        LLAMA_8B,
        H100,
        _FAST._replace(kv_tokens=120_000, dram_tokens=150_000, disk_tokens=150_000),
        lambda chance, t: traces.documents(chance, t, 1.2, 2000, 6000, zipf=0.2, output=120),
    ),
    "short8": _Plan(
        LLAMA_8B,
        H100,
        _FAST,
        lambda chance, t: traces.documents(chance, t, 6, 50, 300, zipf=0.8, question=120, output=100, system=256),
    ),
    "decode8": _Plan(
        LLAMA_8B,
        H100,
        _FAST,
        lambda chance, t: traces.documents(chance, t, 2.5, 500, 800, zipf=0.5, question=100, output=900),
    ),
    "idle70": _Plan(
        LLAMA_70B, H100_X4, _FAST, lambda chance, t: traces.documents(chance, t, 0.04, 10, 6000, zipf=0.8, output=100)
    ),
    "backlog8": _Plan(LLAMA_8B, H100, _FAST._replace(kv_tokens=150_000), _backlog8, backlog=True, view=View(1.0, 0.5)),
    "backlog8_hbm": _Plan(LLAMA_8B, H100, _INNER, _backlog8, backlog=True, view=View(1.0, 0.5)),
    "burst8": _Plan(
        LLAMA_8B,
        H100,
        _FAST._replace(kv_tokens=120_000),
        lambda chance, t: traces.chats(chance, 0.8 * t, 0.35, 6, turn_tokens=250, burst=3),
    ),
    "preempt8": _Plan(
        LLAMA_8B,
        H100,
        _FAST._replace(kv_tokens=24_000),
        lambda chance, t: traces.documents(chance, t, 1.0, 200, 1500, output=700),
    ),
    "hbm_only8": _Plan(LLAMA_8B, H100, _INNER, lambda chance, t: traces.documents(chance, t, 1.2, 60, 5000, zipf=0.8)),
    "slow8": _Plan(
        LLAMA_8B,
        H100,
        _LMCACHE._replace(kv_tokens=100_000, dram_tokens=80_000, disk_bytes_per_second=1 * _GB),
        lambda chance, t: traces.documents(chance, t, 0.6, 300, 5000, zipf=0.4),
    ),
    "mixed8": _Plan(LLAMA_8B, H100, _FAST, _mixed8),
    "impatient8": _Plan(LLAMA_8B, H100, _FAST, _impatient8),
    "misses8": _Plan(
        LLAMA_8B, H100, _INNER, lambda chance, t: traces.documents(chance, t, 1.0, 100_000, 5000, zipf=0.0, system=0)
    ),
    "cpu": _Plan(
        TINY,
        CPU,
        Config(kv_tokens=170_000, token_budget=2048),
        lambda chance, t: traces.documents(chance, t, 0.5, 30, 1500, question=100, output=40, system=256),
    ),
}
NAMES = tuple(_PLANS)


def build(name: str, seed: int, law: str = "family", *, seconds: float = SECONDS, mfu: bool = False) -> Scenario:
    """The scenario of this name: the seed decides the trace and the law's parameters; `law` is one of LAWS."""
    plan = _PLANS[name]
    trace = plan.load(np.random.default_rng([seed, *name.encode()]), seconds)
    chance = np.random.default_rng([seed, 1, *name.encode()])
    parameters = draw(chance, plan.shape)
    if not plan.device.sku:
        parameters = _on_cpu(parameters)
    departures = None if law == "family" else OUTSIDE[law]
    view = plan.view._replace(mfu=mfu)
    made = Law(plan.shape, plan.device, parameters, departures)
    return Scenario(name, seed, made, plan.config, trace, view, plan.backlog)


def _on_cpu(parameters: Parameters) -> Parameters:
    """A CPU has neither launches to wait for nor a clock that prefill slows."""
    return parameters._replace(step_seconds=1e-3, launch_seconds=1e-3, clock=1.0)
