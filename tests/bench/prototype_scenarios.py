"""The prototype's simulator and estimator beside ours: its scenarios as recordings, its truth, its figures.

    python -m tests.bench.prototype_scenarios FOLDER [--seeds 1-3] [--scenarios chat8,rag70_async] [--rungs M1,M2]
        [--stress] [--estimator tests.bench.savings_bench:estimate] [--json FILE]

FOLDER holds sim.py and est.py (which needs scipy); nothing here imports them by itself. An estimator is called as
estimate(recording folder, rung) and gives {"all": (low, point, high), "outer": (low, point, high)} in engine seconds.

The truth is sim.py's own: marginal prefill seconds (its G['pf']) of the run with every cache off, or with the outer
tiers off, less those of the run.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tests.bench.prototype_rows import recorded_rows
from tests.bench.scores import Result, scores, table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from tests.simulator.pages import Recorded

    Array = np.ndarray
    Range = tuple[float, float, float]
    Estimate = Callable[[Path, str], Mapping[str, Range]]

SCENARIOS = (
    *("rag70_avg8", "rag70_fast40", "rag70_async", "chat8", "agent70_long", "doc70_64k", "thrash8", "short8"),
    *("decode8", "idle70", "satur8", "slow8_1g", "burst8", "preempt8", "hbm_only8"),
)
PROBED = (512, 1024, 2048, 4096, 8192, 16384, 32768)
_DEVIATES = 1.645  # half a 90 % interval


class Rung(NamedTuple):
    """What an estimator may look at beside counters."""

    log: bool = False
    mfu: bool = False
    probe: bool = False


RUNGS = {
    "M1": Rung(),
    "M2": Rung(log=True),
    "M3": Rung(mfu=True),
    "M4": Rung(probe=True),
    "M2+M3": Rung(log=True, mfu=True),
    "M2+M4": Rung(log=True, probe=True),
}


class Prototype:
    """The two modules in a folder."""

    def __init__(self, folder: Path) -> None:
        sys.path.insert(0, str(folder))
        self.sim: Any = importlib.import_module("sim")
        self.est: Any = importlib.import_module("est")


class Case:
    """One of the prototype's scenarios, run once with its caches and twice without."""

    def __init__(self, prototype: Prototype, name: str, seed: int, *, stress: bool = False) -> None:
        self._prototype = prototype
        self.name, self.seed, self.stress = name, seed, stress
        sim = prototype.sim
        self.model, self._law, self.engine, trace = sim.scenario(name, seed, stress=int(stress))
        self.rows, on, self.log = sim.run(trace, self.model, self._law, seed, **self.engine)
        _, inner, _ = sim.run(trace, self.model, self._law, seed, ext_on=False, **self.engine)
        _, bare, _ = sim.run(trace, self.model, self._law, seed, ext_on=False, hbm_on=False, **self.engine)
        self.truth = {"all": bare["pf"] - on["pf"], "outer": inner["pf"] - on["pf"]}
        self.full_seconds = float(bare["pf"])

    @cached_property
    def probes(self) -> tuple[Array, Array]:
        """Prompt tokens and seconds of cold prompts on an idle engine."""
        chance = np.random.default_rng(self.seed)
        lengths = np.array(PROBED, dtype=float)
        return lengths, self._prototype.sim.probe_times(self.model, self._law, lengths, chance)

    def theirs(self, rung: str) -> dict[str, Range]:
        """What est.py's structural() says at a rung."""
        given = RUNGS[rung]
        found = self._prototype.est.structural(
            self.model,
            self.rows,
            8192,
            self.engine["kv_cap"],
            log=self.log if given.log else None,
            ci=True,
            mfu=given.mfu,
            probe=self.probes if given.probe else None,
        )
        points = (found["gross_all"], found["gross_ext"])
        halves = _DEVIATES * np.asarray(found["sd"])
        return {
            name: (float(point - half), float(point), float(point + half))
            for name, point, half in zip(("all", "outer"), points, halves, strict=True)
        }

    def recorded(self, rung: str) -> Recorded:
        """The recording that an estimator sees at a rung."""
        given = RUNGS[rung]
        name = f"prototype-{self.name}-{self.seed}"
        shown = self.log if given.log else None
        return recorded_rows(
            name, self.rows, self.log, self.model, self.engine, sync=self._law.sync, mfu=given.mfu, shown=shown,
            probes=self.probes if given.probe else None,
        )  # fmt: skip


def results(case: Case, rungs: Iterable[str], estimate: Estimate | None) -> Iterator[Result]:
    """The prototype's estimates and ours of one case."""
    for rung in rungs:
        found = {"prototype": case.theirs(rung)}
        if estimate is not None:
            with tempfile.TemporaryDirectory() as folder:
                found["kvtally"] = dict(estimate(case.recorded(rung).write(Path(folder) / "recording"), rung))
        for who, ranges in found.items():
            for quantity, (low, point, high) in ranges.items():
                truth = case.truth[quantity]
                yield Result(who, case.name, case.seed, rung, quantity, truth, case.full_seconds, low, point, high)


def _options(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="holds sim.py and est.py")
    parser.add_argument("--seeds", default="1-3")
    parser.add_argument("--scenarios", default=",".join(SCENARIOS))
    parser.add_argument("--rungs", default="M1,M2,M3,M4")
    parser.add_argument("--stress", action="store_true", help="the prototype's law outside its family")
    parser.add_argument("--estimator", metavar="MODULE:NAME")
    parser.add_argument("--json", type=Path, help="write every single result here")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    """Compare, and print the table."""
    options = _options(words)
    first, _, last = options.seeds.partition("-")
    seeds = range(int(first), int(last or first) + 1)
    estimate: Estimate | None = None
    if options.estimator:
        module, _, name = options.estimator.partition(":")
        estimate = getattr(importlib.import_module(module), name)
    prototype = Prototype(options.folder)
    found: list[Result] = []
    for name, seed in product(options.scenarios.split(","), seeds):
        case = Case(prototype, name, seed, stress=options.stress)
        found += results(case, options.rungs.split(","), estimate)
        print(name, seed, file=sys.stderr)  # noqa: T201  # progress of a script
    if options.json:
        options.json.write_text(json.dumps([one._asdict() for one in found], indent=1), encoding="utf-8")
    print(table(scores(found)))  # noqa: T201  # what the script is for


if __name__ == "__main__":
    main()
