"""How a replica's occupied time in an hour divides into prefill, decode, stall and store (METHOD 2.4). Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

from kvtally.agent.costing import apportioned
from kvtally.agent.disaggregation import PREFILL

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvtally.agent.ledger.settled import Parted
    from kvtally.agent.savings import Loading
    from kvtally.agent.split import Split

SplitLaw = Literal["step law", "two costs", "pool"]


class Copies(NamedTuple):
    """Nanoseconds in which the engine stood still for loading KV, and in which it stored KV."""

    stall_ns: int
    store_ns: int


class Division(NamedTuple):
    """Whole nanoseconds that sum to the occupied time.

    copies          None where stall and store are still inside prefill and decode
    low_ns, high_ns of prefill: the two marginal views of the step law, or the 90 % interval of the law of two costs
    by              derivatives of prefill by the logs of the step law's parameters; () for two costs
    law_ns          what the step law says that the steps took, before prefill and decode are scaled to what there was
    """

    law: SplitLaw
    prefill_ns: int
    decode_ns: int
    copies: Copies | None
    low_ns: float
    high_ns: float
    by: Sequence[float] = ()
    law_ns: float = 0.0

    @property
    def parts(self) -> dict[str, int]:
        """What sums to the occupied time."""
        stall_ns, store_ns = self.copies or NO_COPIES
        return {"prefill": self.prefill_ns, "decode": self.decode_ns, "stall": stall_ns, "store": store_ns}


NO_COPIES = Copies(0, 0)


def copies_of(parted: Parted | None, loading: Loading, *, external_tokens: int, is_told: bool) -> Copies | None:
    """What an outer tier that is at work took of the engine's time; None where nothing tells.

    Loads of an asynchronous connector are latency: the engine goes on. `is_told`: a cache's page is in the ledger.
    """
    if loading == "asynchronous":
        return NO_COPIES
    if parted is None or loading == "unknown" or not is_told or (external_tokens and not parted.loads):
        return None
    if parted.loads is None or parted.stores is None:
        return None
    return Copies(round(parted.loads * 1e9), round(parted.stores * 1e9))


def by_step_law(occupied_ns: int, parted: Parted, copies: Copies | None) -> Division | None:
    """Prefill (Shapley) and decode by the step law, scaled to what loading and storing leave; None for no step.

    Only the ratio of the two counts, and what is uncertain of it: a law that is wrong by a factor divides as well.
    """
    prefill, total = parted.prefill[1], parted.prefill[1] + parted.decode
    if total <= 0:
        return None
    copies = _within(occupied_ns, copies)
    left_ns = occupied_ns - sum(copies or NO_COPIES)
    least, point, most = [left_ns * min(max(each / total, 0.0), 1.0) for each in parted.prefill]
    prefill_ns = round(point)
    share = prefill / total
    per_prefill, per_decode = left_ns * (1 - share) / total, left_ns * share / total
    by = [
        per_prefill * one - per_decode * other for one, other in zip(parted.prefill_by, parted.decode_by, strict=True)
    ]
    return Division("step law", prefill_ns, left_ns - prefill_ns, copies, least, most, by, total * 1e9)


def by_two_costs(occupied_ns: int, split: Split, copies: Copies | None) -> Division:
    """Prefill and decode by the law of two costs."""
    copies = _within(occupied_ns, copies)
    left_ns = occupied_ns - sum(copies or NO_COPIES)
    prefill_ns = round(left_ns * split.point)
    return Division("two costs", prefill_ns, left_ns - prefill_ns, copies, left_ns * split.low, left_ns * split.high)


def by_pool(occupied_ns: int, role: str, copies: Copies | None) -> Division:
    """All of it prefill, or all of it decode, of an engine that does nothing else: no law is needed."""
    copies = _within(occupied_ns, copies)
    left_ns = occupied_ns - sum(copies or NO_COPIES)
    prefill_ns = left_ns if role == PREFILL else 0
    return Division("pool", prefill_ns, left_ns - prefill_ns, copies, prefill_ns, prefill_ns)


def alike(occupied_ns: int, other: Division) -> Division:
    """Time in which nothing was counted, because its interval began earlier, divided as that one's was."""
    whole = sum(other.parts.values())
    parts = apportioned(occupied_ns, other.parts)
    scale = occupied_ns / whole
    return other._replace(
        prefill_ns=parts["prefill"],
        decode_ns=parts["decode"],
        copies=None if other.copies is None else Copies(parts["stall"], parts["store"]),
        low_ns=scale * other.low_ns,
        high_ns=scale * other.high_ns,
        by=[scale * each for each in other.by],
        law_ns=scale * other.law_ns,
    )


def _within(occupied_ns: int, copies: Copies | None) -> Copies | None:
    """Seconds of copying come in bursts, those of one hour may exceed its time: then they fill it."""
    if copies is None or sum(copies) <= occupied_ns:
        return copies
    parts = apportioned(occupied_ns, {"stall": copies.stall_ns, "store": copies.store_ns})
    return Copies(parts["stall"], parts["store"])
