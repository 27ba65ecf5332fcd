"""What a simulated engine is given and what it tells afterwards, as values."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Config(NamedTuple):
    """The engine and its tiers; a tier of 0 tokens is not there.

    connector              "" for none, "LMCacheConnectorV1" (looks up from token 0) or "OffloadingConnector"
    sync_loads             the whole batch waits for a load; else only the request, and loads come one after the other
    dram_bytes_per_second  of one GPU's link
    store_share            of a store's seconds, for which the engine waits
    """

    token_budget: int = 8192
    most_running: int = 256
    kv_tokens: int = 400_000
    block_tokens: int = 32
    chunk_tokens: int = 256
    hbm_cache: bool = True
    connector: str = ""
    sync_loads: bool = True
    dram_tokens: int = 0
    disk_tokens: int = 0
    dram_bytes_per_second: float = 25e9
    disk_bytes_per_second: float = 8e9
    load_latency_seconds: float = 3e-3
    store_bytes_per_second: float = 40e9
    store_share: float = 1.0


class Step(NamedTuple):
    """One engine step. `output_tokens` is what vLLM observes of it, 0 where the step has no output.

    marginal   engine seconds that its prefill adds to the decode step that would have run, all where none would have
    stall      engine seconds waited for loads before it; stored the same for stores after it
    """

    start: float
    busy: float
    gpu: float
    end: float
    decodes: int
    generated: int
    prefill: int
    output_tokens: int
    running: int
    waiting: int
    deferred: int
    kv_used: int
    marginal: float
    stall: float
    stored: float
    tensor: float
    clock: float
    flop: float
    read_bytes: float
    retried_tokens: int


class Served(NamedTuple):
    """What became of a request: seconds of the run, NaN for what did not happen; tokens by tier, first admission."""

    number: int
    arrival: float
    scheduled: float
    first: float
    end: float
    prompt: int
    generated: int
    hbm: int
    dram: int
    disk: int
    preemptions: int
    aborted: bool

    @property
    def cached(self) -> int:
        """Prompt tokens that were not computed."""
        return self.hbm + self.dram + self.disk


class Load(NamedTuple):
    """Tokens brought in from outer tiers, at the end of the transfer; `first` unless after a preemption."""

    at: float
    tokens: int
    dram_tokens: int
    disk_tokens: int
    seconds: float
    first: bool


class Store(NamedTuple):
    """Tokens written through."""

    at: float
    tokens: int
    seconds: float


class Lookup(NamedTuple):
    """One admission: tokens looked up and found in HBM; tokens of whole chunks looked up and found outside."""

    at: float
    tokens: int
    hbm_tokens: int
    chunk_tokens: int
    chunk_hit_tokens: int
    external_tokens: int
    first: bool


class Run(NamedTuple):
    """All that happened, in its order; `late` are gaps between tokens across a preemption (time, seconds)."""

    steps: tuple[Step, ...]
    served: tuple[Served, ...]
    loads: tuple[Load, ...]
    stores: tuple[Store, ...]
    lookups: tuple[Lookup, ...]
    late: tuple[tuple[float, float], ...]
    preempted: tuple[float, ...]
    dram_chunks: tuple[tuple[float, int], ...]
    end: float

    def column(self, name: str) -> np.ndarray:
        """One quantity of all steps."""
        at = Step._fields.index(name)
        return np.array([step[at] for step in self.steps], dtype=float)
