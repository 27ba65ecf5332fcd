"""What is true of a simulated run: the same trace served again with tiers off, by the same engine and law.

gross_all        W of METHOD section 3 over all tiers: prefill's marginal engine seconds with every cache off, less
                 those of the run. Marginal seconds of a step: its own less those of the decode step that would have
                 run in its place, all of them (the gap too) where none would. Loads and stores are in neither.
gross_outer      W_ext: the same with the connector off and HBM's cache on, less those of the run.
makespan_all     the seconds that the whole trace took longer with every cache off: W net of stalls and stores, free of
                 any model, and meaningful for a backlog only
makespan_outer   the same against HBM's cache alone
stall_seconds    that the engine waited for synchronous loads; store_seconds that it waited for stores
load_seconds     of all loads by the connector's clock, asynchronous ones too; save_seconds the same of stores

Prefill computed anew after a preemption is in the marginal seconds of every arm, and in no token count.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from tests.simulator.engine import Engine

if TYPE_CHECKING:
    from tests.simulator.laws import Law
    from tests.simulator.scenarios import Scenario
    from tests.simulator.story import Config, Run, Served
    from tests.simulator.traces import Trace


class Truth(NamedTuple):
    """Engine seconds as the module says, tokens of the run, and each request's own story."""

    gross_all: float
    gross_outer: float
    makespan_all: float
    makespan_outer: float
    prefill_seconds: float
    stall_seconds: float
    store_seconds: float
    load_seconds: float
    save_seconds: float
    occupied_seconds: float
    worked_seconds: float
    prompt_tokens: int
    computed_tokens: int
    hbm_tokens: int
    dram_tokens: int
    disk_tokens: int
    generated_tokens: int
    preemptions: int
    served: tuple[Served, ...]

    @property
    def net_all(self) -> float:
        """Gross of all tiers less what the engine waited for loads and stores."""
        return self.gross_all - self.stall_seconds - self.store_seconds

    @property
    def net_outer(self) -> float:
        """Gross of the outer tiers less what the engine waited for loads and stores."""
        return self.gross_outer - self.stall_seconds - self.store_seconds


def without_outer(config: Config) -> Config:
    """The same engine with its own prefix cache alone."""
    return config._replace(connector="", dram_tokens=0, disk_tokens=0)


def without_caches(config: Config) -> Config:
    """The same engine computing every prompt in full."""
    return without_outer(config)._replace(hbm_cache=False)


def truth_of(scenario: Scenario, run: Run | None = None) -> Truth:
    """Serve the trace with all tiers (unless `run` did), with HBM alone and with none, and compare."""
    config, law, trace, seed = scenario.config, scenario.law, scenario.trace, scenario.seed
    run = run or Engine(config, law, trace, seed).run()
    inner = Engine(without_outer(config), law, trace, seed).run() if config.connector else run
    bare = Engine(without_caches(config), law, trace, seed).run()
    own = prefill_seconds(run)
    first = [one for one in run.served if not math.isnan(one.first)]
    hbm, dram, disk = (sum(getattr(one, name) for one in first) for name in ("hbm", "dram", "disk"))
    prompt = sum(one.prompt for one in first)
    return Truth(
        gross_all=prefill_seconds(bare) - own,
        gross_outer=prefill_seconds(inner) - own,
        makespan_all=bare.end - run.end,
        makespan_outer=inner.end - run.end,
        prefill_seconds=own,
        stall_seconds=_sum(run, "stall"),
        store_seconds=_sum(run, "stored"),
        load_seconds=sum(load.seconds for load in run.loads),
        save_seconds=sum(store.seconds for store in run.stores),
        occupied_seconds=_sum(run, "end") - _sum(run, "start"),
        worked_seconds=_sum(run, "gpu"),
        prompt_tokens=prompt,
        computed_tokens=prompt - hbm - dram - disk,
        hbm_tokens=hbm,
        dram_tokens=dram,
        disk_tokens=disk,
        generated_tokens=sum(one.generated for one in run.served),
        preemptions=len(run.preempted),
        served=run.served,
    )


def prefill_seconds(run: Run) -> float:
    """Marginal engine seconds of prefill."""
    return _sum(run, "marginal")


def probes(config: Config, law: Law, trace: Trace, seed: int) -> list[tuple[int, float]]:
    """What a probe reads: prompt tokens and seconds to the first token of prompts that find an idle engine."""
    run = Engine(without_caches(config), law, trace, seed).run()
    late = law.parameters.request_seconds
    return [(one.prompt, one.first - one.arrival + late) for one in run.served]


def _sum(run: Run, column: str) -> float:
    return float(run.column(column).sum())
