"""The tiers outside the engine: what a connector finds in DRAM and on disk, and how long it takes to move it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from tests.simulator.blocks import Tier

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from tests.simulator.story import Config

_SPREAD = 0.08  # sd of the log of a load's seconds


class OuterTiers:
    """DRAM in front of a disk that holds the same and more; without a connector there is neither."""

    def __init__(self, config: Config, kv_bytes: int, ranks: int) -> None:
        self._config = config
        self._kv_bytes = kv_bytes
        self._ranks = ranks
        self._ratio = config.chunk_tokens // config.block_tokens
        self._dram = Tier(config.dram_tokens // config.chunk_tokens)
        self._disk = Tier(config.disk_tokens // config.chunk_tokens)

    @property
    def dram_chunks(self) -> int:
        """Chunks in DRAM."""
        return len(self._dram)

    def found(self, keys: Sequence[int], tokens: int, hbm: int) -> tuple[int, int, int, int]:
        """Tokens that DRAM and disk add to the `hbm` ones of a prompt; tokens of chunks looked up and found.

        LMCache looks up from token 0, an offloading connector from where HBM ends.
        """
        config = self._config
        if not config.connector:
            return 0, 0, 0, 0
        size = config.chunk_tokens
        most = tokens - 1  # at least one token is computed
        chunks = min(tokens // size, len(keys) // self._ratio)
        begun = 0 if config.connector.startswith("LMCache") else hbm // size
        dram = disk = 0
        number = begun
        used: list[int] = []
        while number < chunks:
            key = self._key(keys, number)
            in_dram = key in self._dram
            if not in_dram and key not in self._disk:
                break
            more = max(0, min((number + 1) * size, most) - max(number * size, hbm))
            dram, disk = dram + more * in_dram, disk + more * (not in_dram)
            if more or in_dram:
                used.append(key)
            number += 1
        for key in used:  # all have been found before the first of them pushes another one out
            self._dram.touch(key)
            self._disk.touch(key)
        return dram, disk, (chunks - begun) * size, (number - begun) * size

    def keep(self, keys: Sequence[int], first: int, last: int) -> int:
        """Write whole chunks between two tokens of a prompt through to both; tokens that were new to DRAM."""
        if not self._config.connector:
            return 0
        new = 0
        for number in range(first // self._config.chunk_tokens, last // self._config.chunk_tokens):
            key = self._key(keys, number)
            new += self._dram.touch(key)
            self._disk.touch(key)
        return new * self._config.chunk_tokens

    def load_seconds(self, dram: int, disk: int, chance: np.random.Generator) -> float:
        """Seconds to bring tokens of each tier in."""
        if not dram + disk:
            return 0.0
        config = self._config
        seconds = config.load_latency_seconds + disk * self._kv_bytes / config.disk_bytes_per_second
        seconds += dram * self._kv_bytes / (config.dram_bytes_per_second * self._ranks)
        return seconds * math.exp(chance.normal(0, _SPREAD))

    def store_seconds(self, tokens: int) -> float:
        """Seconds to bring tokens out."""
        return tokens * self._kv_bytes / (self._config.store_bytes_per_second * self._ranks)

    def _key(self, keys: Sequence[int], number: int) -> int:
        """A chunk is named by its last block."""
        return keys[(number + 1) * self._ratio - 1]
