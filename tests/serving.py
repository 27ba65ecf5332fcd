"""Engines that serve a load by a known law, with a GPU each: real ledgers for what learns laws and values reuse."""

from __future__ import annotations

import json
import random
from bisect import bisect_left
from math import inf
from typing import TYPE_CHECKING, NamedTuple

from tests.ledgers import SECOND, SKU, START, Deployment, FakeEngine, FakeGpu
from tests.simulator.laws import H100, LLAMA_8B, Batch, Law, Parameters

from kvtally.agent.replica import About
from kvtally.collectors.base import Reading, Scrape
from kvtally.collectors.quantities import QUANTITIES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from tests.simulator.laws import StepTime

LAW = Law(LLAMA_8B, H100, Parameters(clock=0.88))
SHAPE = {
    "architecture": "LlamaForCausalLM",
    "head_dim": 128,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "kv_dtype": "bfloat16",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128_256,
    "weight_dtype": "bfloat16",
}
FACTS = {"shape": json.dumps(SHAPE, sort_keys=True), "token_budget": "8192"}
NAME = "10.0.0.1:8000/0"
_EDGES = (1, 8, 64, 512, 1024, 2048, 4096, 8192, 16384, inf)
_HISTOGRAMS = ("step_tokens", "request_prompt_tokens", "request_computed_tokens")


class Load(NamedTuple):
    """What comes between two scrapes: requests one at a time, shares of their prompts that are reused, output tokens.

    load_seconds, store_seconds   of an outer tier, by its own clock; prefills wait for both
    """

    requests: int = 4
    prompt: tuple[int, int] = (1000, 8000)
    hbm: float = 0.7
    external: float = 0.0
    output: int = 40
    preempted: int = 0
    starved: bool = False
    load_seconds: float = 0.0
    store_seconds: float = 0.0


PLAIN = Load()
IDLE = Load(requests=0)


class ServingEngine(FakeEngine):
    """An engine that tells everything a vLLM does; `avoided` are the engine seconds that its reuse spared, by LAW."""

    def __init__(self, name: str = NAME, version: str = "0.25.1") -> None:
        super().__init__(name, version)
        self.finished_prompt_tokens = 0.0
        self.histograms = {kind: [0.0] * len(_EDGES) for kind in _HISTOGRAMS}
        self.avoided = 0.0

    def restart(self, epoch: float) -> None:
        super().restart(epoch)
        self.finished_prompt_tokens = 0.0
        self.histograms = {kind: [0.0] * len(_EDGES) for kind in _HISTOGRAMS}

    def take(self, load: Load, chance: random.Random) -> float:
        """Serve a load; the seconds for which the GPU worked."""
        worked = sum(self._request(load, chance) for _ in range(load.requests))
        self.counts["preemptions"] += load.preempted
        self.counts["waiting_for_capacity"] = float(load.starved)
        return worked

    def _request(self, load: Load, chance: random.Random) -> float:
        prompt = chance.randint(*load.prompt)
        hbm, external = int(prompt * load.hbm), int(prompt * load.external)
        computed = prompt - hbm - external
        own, cold = (_prefill(prompt, begin) for begin in (hbm + external, 0))
        decode = LAW.step(Batch(1, 0, 0, prompt + load.output // 2, 1))
        decodes = load.output - 1
        stall = (load.load_seconds + load.store_seconds) / load.requests
        self.avoided += cold.wall - own.wall
        counts = self.counts
        for name, more in (
            ("prompt_tokens", prompt),
            ("computed_tokens", computed),
            ("hbm_tokens", hbm),
            ("external_tokens", external),
            ("generated_tokens", load.output),
            ("first_tokens", 1),
            ("finished_requests", 1),
            ("steps", load.output),
            ("step_tokens", computed + decodes),
            ("prefill_ns", own.wall + stall),
            ("decode_ns", decodes * decode.wall),
            ("inter_token_ns", decodes * decode.wall),
        ):
            counts[name] += more
        self.finished_prompt_tokens += prompt
        for kind, amount, many in (
            ("step_tokens", computed, 1),
            ("step_tokens", 1, decodes),
            ("request_prompt_tokens", prompt, 1),
            ("request_computed_tokens", computed, 1),
        ):
            self.histograms[kind][bisect_left(_EDGES, amount)] += many
        return own.gpu + decodes * decode.gpu

    def reading(self) -> Reading:
        reused = self.counts["hbm_tokens"] + self.counts["external_tokens"]
        named = {"cached_tokens": reused, "finished_prompt_tokens": self.finished_prompt_tokens}
        for kind, counts in self.histograms.items():
            named |= {f"{kind}_le_{edge:.15g}": count for edge, count in zip(_EDGES, counts, strict=True)}
        return super().reading()._replace(detail_names=tuple(named), details=tuple(named.values()))


def _prefill(prompt: int, begin: int) -> StepTime:
    size = prompt - begin
    return LAW.step(Batch(size, size, size * (begin + size / 2), 0, 1))


class Site:
    """Engines under load on GPUs of their own, scraped through the real pipeline into a ledger."""

    def __init__(
        self,
        path: str,
        engines: Sequence[ServingEngine] = (),
        *,
        about: Mapping[str, About] | None = None,
        sku: str = SKU,
        every: int = 30,
        caches: bool = False,
    ) -> None:
        """`about`: what is known of an engine by its address, where that is not all; `caches`: their pages tell."""
        self.engines = list(engines) or [ServingEngine()]
        self.gpus = {engine.name: FakeGpu(f"GPU-{number}", sku) for number, engine in enumerate(self.engines)}
        known = {
            name.partition("/")[0]: About(gpus=(gpu.name,), mapping="a test", facts=FACTS)
            for name, gpu in self.gpus.items()
        }
        self.at_ns = START
        self.every = every
        self.chance = random.Random(20261123)
        self._deployment = Deployment(path, known | dict(about or {}), interval_seconds=every)
        self._caches = caches
        self._cached = {name: dict.fromkeys((one.name for one in QUANTITIES["cache"]), 0.0) for name in self.gpus}

    def serve(
        self,
        seconds: int,
        load: Load = PLAIN,
        *,
        only: Sequence[ServingEngine] | None = None,
        seen: Sequence[str] = ("gpu",),
        shown: Callable[[Reading], Reading] = lambda reading: reading,
    ) -> Site:
        """Serve for so long and scrape.

        only    engines that serve and answer; the others' GPUs rest
        seen    whether "gpu" samples are there
        shown   what becomes of an engine's reading on its way
        """
        serving = self.engines if only is None else only
        for _ in range(seconds // self.every):
            self.at_ns += self.every * SECOND
            worked = dict.fromkeys((gpu.name for gpu in self.gpus.values()), 0.0)
            for engine in serving:
                worked[self.gpus[engine.name].name] += engine.take(load, self.chance)
                self._cached[engine.name]["load_ns"] += load.load_seconds
                self._cached[engine.name]["store_ns"] += load.store_seconds
            assert max(worked.values()) < self.every
            for gpu in {gpu.name: gpu for gpu in self.gpus.values()}.values():
                gpu.run(self.every, worked[gpu.name])
            self.scrape(serving, seen=seen, shown=shown)
        return self

    def scrape(
        self,
        engines: Sequence[ServingEngine],
        *,
        seen: Sequence[str] = ("gpu",),
        shown: Callable[[Reading], Reading] = lambda reading: reading,
    ) -> None:
        """One tick."""
        scrapes = []
        if "gpu" in seen:
            gpus = tuple({gpu.name: gpu.reading() for gpu in self.gpus.values()}.values())
            scrapes.append(Scrape("nvml", self.at_ns - 2_000_000, 0.0, gpus))
        for engine in engines:
            readings = [shown(engine.reading())]
            if self._caches:
                name = f"{engine.name.partition('/')[0]}/lmcache"
                counts = tuple(self._cached[engine.name].values())
                readings.append(Reading("cache", name, {"cache": "lmcache in-process"}, counts, None))
            scrapes.append(Scrape(f"vllm:{engine.name}", self.at_ns, 0.0, tuple(readings)))
        tick = self._deployment.pipeline.tick(scrapes)
        assert tick.error is None

    def close(self) -> None:
        self._deployment.close()
