"""Ledgers for tests: an empty one at once, engines and GPUs whose counters a test moves, and one with a whole story."""

from __future__ import annotations

import os
import random
import signal
import tempfile
from contextlib import closing
from functools import cache
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import Engine, event

from kvtally.agent.ledger.append import LedgerWriter
from kvtally.agent.ledger.place import connect
from kvtally.agent.ledger.read import LedgerReader
from kvtally.agent.ledger.upgrade import upgrade
from kvtally.agent.pipeline import Pipeline
from kvtally.agent.price import NANO, Rate
from kvtally.agent.replica import About, Describer
from kvtally.collectors.base import Reading, Scrape
from kvtally.collectors.quantities import QUANTITIES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from sqlalchemy import RowMapping

SECOND = 1_000_000_000
HOUR = 3600 * SECOND
START = 1_795_406_400 * SECOND  # 2026-11-23T04:00:00Z: on the hour
SKU = "NVIDIA H100 80GB HBM3"
LOADED_MHZ, RESTING_MHZ = 1650, 1965
DETAIL_NAMES = ("cached_tokens", "step_tokens_le_1", "step_tokens_le_8")


@cache
def _empty() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.db"
        upgrade(f"sqlite:///{path}")
        return path.read_bytes()


def new_ledger(folder: Path, name: str = "ledger.db") -> str:
    """An empty ledger; its path."""
    path = folder / name
    path.write_bytes(_empty())
    return str(path)


def url_of(path: str) -> str:
    return f"sqlite:///{path}"


def reader_of(path: str) -> LedgerReader:
    return LedgerReader(url_of(path))


def charges_of(reader: LedgerReader, start_ns: int = 0, end_ns: int = 2**62) -> list[RowMapping]:
    """Charges of the hours in [start_ns, end_ns), every revision, by the hour and as they were written."""
    query = "SELECT * FROM charge WHERE period_start_ns >= ? AND period_start_ns < ? ORDER BY period_start_ns, id"
    return list(reader.connection.exec_driver_sql(query, (start_ns, end_ns)).mappings())


def steps_of(reader: LedgerReader, ask: Callable[[], object]) -> int:
    """How many steps SQLite's machine takes for a question: what it costs, on any computer."""
    taken = count()
    connection = reader.connection.connection.driver_connection
    assert connection is not None
    connection.set_progress_handler(lambda: next(taken) < 0, 1)
    ask()
    connection.set_progress_handler(None, 0)
    return next(taken)


class FakeEngine:
    """An engine whose counters only grow, until it restarts."""

    def __init__(
        self, name: str = "127.0.0.1:8000/0", version: str = "0.25.1", epoch: float = START / 1e9 - 600
    ) -> None:
        self.name = name
        self.attributes: dict[str, str] = {"model": "llama-8b", "version": version}
        self.epoch = epoch
        self.counts = dict.fromkeys((quantity.name for quantity in QUANTITIES["engine"]), 0.0) | {"awake": 1.0}
        self.buckets = [0.0, 0.0]

    def serve(
        self, *, computed: int = 0, hbm: int = 0, generated: int = 0, steps: int = 1, seconds: float = 0.0
    ) -> None:
        """Serve prompts of computed + hbm tokens."""
        counts = self.counts
        for name, more in (
            ("prompt_tokens", computed + hbm),
            ("computed_tokens", computed),
            ("hbm_tokens", hbm),
            ("generated_tokens", generated),
            ("steps", steps),
            ("prefill_ns", seconds / 4),
            ("decode_ns", seconds * 3 / 4),
        ):
            counts[name] += more
        self.buckets[steps > 1] += steps

    def restart(self, epoch: float) -> None:
        self.epoch = epoch
        self.counts = dict.fromkeys(self.counts, 0.0) | {"awake": 1.0}
        self.buckets = [0.0, 0.0]

    def reading(self) -> Reading:
        details = (self.counts["hbm_tokens"], *self.buckets)
        values = tuple(self.counts.values())
        return Reading("engine", self.name, self.attributes, values, self.epoch, None, DETAIL_NAMES, details)


class FakeGpu:
    """A GPU that is sampled, and whose GPM means come every other scrape; at work its clock is lower than at rest."""

    def __init__(self, uuid: str, sku: str = SKU) -> None:
        self.name = uuid
        self.attributes = {"sku": sku}
        self.counts = dict.fromkeys((quantity.name for quantity in QUANTITIES["gpu"]), 0.0)
        self._session = 1.0
        self._mean_of = [0.0, 0.0]  # seconds and seconds at work since the last mean

    def restart(self) -> None:
        """Another collector samples it, whose sums begin at zero; the driver's energy counter goes on."""
        self.counts |= dict.fromkeys((one.name for one in QUANTITIES["gpu"] if one.type == "integral"), 0.0)
        self._session += 1
        self._mean_of = [0.0, 0.0]

    def run(self, seconds: float, busy: float, *, mean: bool = True) -> None:
        """Pass `seconds`, `busy` of them at work; `mean`: the GPM mean of the time since the last is there now."""
        self.counts["observed_ns"] += seconds
        self.counts["busy_ns"] += busy
        self.counts["busy_cycles"] += busy * LOADED_MHZ
        self.counts["sm_clock_mhz"] = LOADED_MHZ if busy else RESTING_MHZ
        self.counts["energy_mj"] += round(seconds * 80_000 + busy * 500_000)
        self._mean_of = [self._mean_of[0] + seconds, self._mean_of[1] + busy]
        if mean:
            self.counts["gpm_ns"] += self._mean_of[0]
            self.counts["graphics_ns"] += self._mean_of[1]
            self._mean_of = [0.0, 0.0]

    def reading(self) -> Reading:
        return Reading("gpu", self.name, self.attributes, tuple(self.counts.values()), None, self._session)


def rate(resource: str, price: str, unit: str, from_ns: int, **more: object) -> Rate:
    """A price of the operator."""
    nano = round(float(price) * NANO)
    values: dict[str, object] = {"sku": "", "site": "", "term": "on-demand", "currency": "USD"} | more
    return Rate(resource=resource, unit=unit, price_nano=nano, valid_from_ns=from_ns, **values)  # type: ignore[arg-type]


class Deployment:
    """Engines and GPUs of one host, scraped through the real pipeline into a ledger."""

    def __init__(self, path: str, abouts: Mapping[str, About], *, interval_seconds: int = 20) -> None:
        self._writer = LedgerWriter(connect(path), path)
        self._abouts = abouts
        self._interval_ns = interval_seconds * SECOND
        self.pipeline = self._started(START)

    def _started(self, at_ns: int) -> Pipeline:
        describer = Describer(dict(self._abouts), About())
        return Pipeline(self._writer, self._writer.states(), describer, interval_ns=self._interval_ns, started_ns=at_ns)

    def restart(self, at_ns: int) -> None:
        """Another kvtally goes on with this ledger."""
        self.pipeline = self._started(at_ns)

    def scrape(
        self, at_ns: int, engines: Sequence[FakeEngine | None], gpus: Sequence[FakeGpu] = (), *, apart_ns: int = 0
    ) -> None:
        """One tick; None is an engine that does not answer; each engine is read `apart_ns` after the one before."""
        scrapes = [Scrape("nvml", at_ns - 2_000_000, 0.0, tuple(gpu.reading() for gpu in gpus))] if gpus else []
        for number, engine in enumerate(engines):
            source = f"vllm:{number}"
            scrapes.append(
                Scrape(source, at_ns, 0.0, (), "failed", "no answer")
                if engine is None
                else Scrape(source, at_ns + number * apart_ns, 0.0, (engine.reading(),))
            )
        tick = self.pipeline.tick(scrapes)
        assert tick.error is None

    def close(self) -> None:
        self._writer.close()


RATES = (
    rate("gpu", "2.690000001", "gpu-hour", START - 1000 * HOUR, sku=SKU),
    rate("gpu", "3.333333333", "gpu-hour", START + HOUR + 1_800_000_000_007, sku=SKU),
    rate("server", "0.7", "server-hour", START - 1000 * HOUR, sku="gpu-host"),
)
_FIRST, _SECOND = "10.0.0.1:8000", "10.0.0.2:8000"
STORY_ABOUTS = {
    _FIRST: About(gpus=("GPU-a",), sku=SKU, labels={"namespace": "one"}, mapping="config"),
    _SECOND: About(gpus=("GPU-b",), sku=SKU, labels={"namespace": "two"}, mapping="config"),
}
STORY_END = START + 4 * HOUR + 900 * SECOND


def tell_story(path: str, seconds: int = 20) -> None:
    """Fill a ledger with four hours of two engines and three GPUs, one of them free, scraped from 04:10:07 on.

    04:30 the second engine sleeps for 6 minutes. 05:17 the first restarts at work. 05:30:00.000000007 the GPUs'
    price changes. 05:50-06:25 the second engine's page does not answer. 06:50-07:10:30 no kvtally runs. 07:40 the
    third GPU is gone for 5 minutes.
    """
    chance = random.Random(20261123)
    deployment = Deployment(path, STORY_ABOUTS, interval_seconds=seconds)
    first, second = FakeEngine(f"{_FIRST}/0"), FakeEngine(f"{_SECOND}/0")
    gpus = [FakeGpu("GPU-a"), FakeGpu("GPU-b"), FakeGpu("GPU-c")]
    try:
        for number, at_ns in enumerate(_moments(seconds)):
            into = (at_ns - START) // SECOND
            for engine, gpu in ((first, gpus[0]), (second, gpus[1])):
                asleep = engine is second and 1800 <= into < 2160
                _work(chance, engine, gpu, seconds, busy=not asleep and chance.random() < 0.7, mean=number % 2 == 1)
                engine.counts["awake"] = 0.0 if asleep else 1.0
            gpus[2].run(seconds, 0, mean=number % 2 == 1)
            if 4620 <= into < 4620 + seconds:
                first.restart(at_ns / 1e9 - 9)
            if 10230 <= into < 11430:
                continue
            if 11430 <= into < 11430 + seconds:
                deployment.restart(at_ns)
            answering = None if 6600 <= into < 8700 else second
            seen = gpus[:2] if 13200 <= into < 13500 else gpus
            deployment.scrape(at_ns, (first, answering), seen, apart_ns=1_000_003)
    finally:
        deployment.close()
    with closing(reader_of(path)) as reader:
        reader.add_rates(RATES)


def _moments(seconds: int) -> Iterator[int]:
    jitter = random.Random(7)
    for at_ns in range(START + 607 * SECOND, STORY_END, seconds * SECOND):
        yield at_ns + jitter.randrange(3_000_000)


def _work(chance: random.Random, engine: FakeEngine, gpu: FakeGpu, seconds: int, *, busy: bool, mean: bool) -> None:
    engine.counts["running_requests"] = 0.0
    worked = 0.0
    if busy:
        steps, computed = chance.randrange(50, 400), chance.randrange(0, 60_000)
        worked = min(19.9, steps * 0.02 + computed * 0.00012)
        generated = steps * 7
        engine.serve(
            computed=computed, hbm=chance.randrange(0, 90_000), generated=generated, steps=steps, seconds=worked
        )
        engine.counts["running_requests"] = float(chance.choice((0, 0, 3)))
    gpu.run(seconds, worked, mean=mean)


def killed_at(statement: int, act: Callable[[], object]) -> bool:
    """Do something in a child that dies before its n-th SQL statement, as by the kernel; whether it did."""
    child = os.fork()
    if child == 0:
        left = iter(range(statement))

        def count(*_: object) -> None:
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)

        event.listen(Engine, "before_cursor_execute", count)
        try:
            act()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])
