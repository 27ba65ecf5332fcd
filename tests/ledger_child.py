"""A writer that appends as fast as it can until somebody kills it; its engine counts time, so any process knows it.

Run as `python ledger_child.py LEDGER BASE_NS`; it prints a line once its first tick is written.
"""

from __future__ import annotations

import sys
import time
from contextlib import closing

from kvtally.agent.ledger.append import LedgerWriter
from kvtally.agent.ledger.place import WriterLock, connect
from kvtally.agent.pipeline import Pipeline
from kvtally.collectors.base import Reading, Scrape
from kvtally.collectors.quantities import QUANTITIES

CADENCE_NS = 1_000_000
BEGAN_NS = 1_795_409_900_000_000_000  # 100 s before an hour is full
ATTRIBUTES = {"model": "llama-8b", "version": "0.25.1"}


def scrapes_at(passed_ns: int) -> list[Scrape]:
    """What an engine and a GPU show so long after the beginning: every microsecond computes 1 token and reuses 2."""
    count = float(passed_ns // 1000)
    tokens = {"prompt_tokens": 3 * count, "computed_tokens": count, "hbm_tokens": 2 * count, "external_tokens": 0.0}
    tokens |= {"generated_tokens": count, "steps": count, "running_requests": 1.0, "awake": 1.0}
    engine = tuple(tokens.get(quantity.name) for quantity in QUANTITIES["engine"])
    gpu = tuple(count if quantity.name == "energy_mj" else None for quantity in QUANTITIES["gpu"])
    names = ("cached_tokens", "step_tokens_le_1")
    return [
        Scrape("nvml", BEGAN_NS + passed_ns, 0.0, (Reading("gpu", "GPU-a", {"sku": "H100"}, gpu, None, 1.0),)),
        Scrape(
            "vllm",
            BEGAN_NS + passed_ns,
            0.0,
            (Reading("engine", "127.0.0.1:8000/0", ATTRIBUTES, engine, 1.0, None, names, (2 * count, count)),),
        ),
    ]


def pipeline_over(writer: LedgerWriter) -> Pipeline:
    """A pipeline that goes on where the ledger stands."""
    return Pipeline(writer, writer.states(), list, interval_ns=CADENCE_NS, started_ns=BEGAN_NS)


def main(path: str, base_ns: int) -> None:
    """Append until killed."""
    with WriterLock(path), closing(LedgerWriter(connect(path), path)) as writer:
        pipeline = pipeline_over(writer)
        told = False
        while True:
            tick = pipeline.tick(scrapes_at(time.monotonic_ns() - base_ns))
            if tick.error is not None:
                raise tick.error
            if not told:
                print(len(tick.closed), flush=True)  # noqa: T201  # the parent waits for it
                told = True


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
