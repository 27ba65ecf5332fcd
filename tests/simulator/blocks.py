"""Where KV lies: the engine's blocks with their prefix cache, and the outer tiers; what was used last stays longest."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


class BlockPool:
    """The engine's HBM: blocks that requests hold, shared ones counted once, and cached ones that nobody holds.

    A block is named by a key that stands for all content up to its end. What a request holds without a key (a block
    that is not full, output being made) is counted in tokens.
    """

    def __init__(self, capacity_tokens: int, block_tokens: int, *, caches: bool) -> None:
        self.capacity_tokens = capacity_tokens
        self.block_tokens = block_tokens
        self.private_tokens = 0
        self._caches = caches
        self._held: dict[int, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def used_tokens(self) -> int:
        """Tokens of blocks that requests hold."""
        return len(self._held) * self.block_tokens + self.private_tokens

    def found(self, keys: Sequence[int], limit: int) -> int:
        """How many of the first `limit` blocks are here, without a gap."""
        held, idle = self._held, self._idle
        for number in range(limit):
            key = keys[number]
            if key not in held and key not in idle:
                return number
        return limit

    def room_for(self, keys: Sequence[int], found: int, tokens: int) -> int:
        """Tokens left free if a request of `tokens` came that finds its first `found` blocks; negative: none."""
        shared = sum(key in self._held for key in keys[:found])
        return self.capacity_tokens - self.used_tokens - (tokens - shared * self.block_tokens)

    def admit(self, keys: Sequence[int], found: int, tokens: int) -> None:
        """Hold the first `found` blocks and room for the rest of `tokens`."""
        self._hold(keys[:found])
        self.private_tokens += tokens - found * self.block_tokens
        self._evict()

    def grow(self, tokens: int) -> None:
        """Make room for output."""
        self.private_tokens += tokens
        self._evict()

    def publish(self, keys: Sequence[int], first: int, last: int) -> int:
        """Give the blocks first..last of a request, now full, their keys; how many blocks it holds by key now."""
        if not self._caches or last <= first:
            return first
        self._hold(keys[first:last])
        self.private_tokens -= (last - first) * self.block_tokens
        return last

    def release(self, keys: Sequence[int], held: int, full: int, tokens: int) -> None:
        """Let go of a request's `tokens`: `held` blocks by key, and output that fills blocks up to `full`."""
        self.private_tokens -= tokens - held * self.block_tokens
        for key in reversed(keys[:held]):
            count = self._held[key] - 1
            if count:
                self._held[key] = count
            else:
                del self._held[key]
                self._idle[key] = None
        if self._caches:
            for key in reversed(keys[held:full]):
                if key not in self._held:
                    self._idle[key] = None
        self._evict()

    def _hold(self, keys: Sequence[int]) -> None:
        for key in keys:
            self._held[key] = self._held.get(key, 0) + 1
            self._idle.pop(key, None)

    def _evict(self) -> None:
        room = (self.capacity_tokens - self.used_tokens) // self.block_tokens
        while len(self._idle) > max(room, 0):
            self._idle.popitem(last=False)


class Tier:
    """An outer tier of chunks."""

    def __init__(self, capacity_chunks: int) -> None:
        self._capacity = capacity_chunks
        self._chunks: OrderedDict[int, None] = OrderedDict()

    def __contains__(self, key: int) -> bool:
        return key in self._chunks

    def __len__(self) -> int:
        return len(self._chunks)

    def touch(self, key: int) -> bool:
        """Put a chunk in, or to the front where it is in already; whether it is new."""
        if self._capacity <= 0:
            return False
        if key in self._chunks:
            self._chunks.move_to_end(key)
            return False
        self._chunks[key] = None
        if len(self._chunks) > self._capacity:
            self._chunks.popitem(last=False)
        return True
