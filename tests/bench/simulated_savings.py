"""Our estimator on our own simulator: bias, error and coverage by scenario, in the law's family and outside it.

python -m tests.bench.simulated_savings [--seeds 1-3] [--scenarios chat8,…] [--laws family,stress] [--rungs M1]
    [--seconds 600] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from tests.bench.savings_bench import estimate
from tests.bench.scores import Result, scores, table
from tests.simulator.scenarios import LAWS, NAMES, build
from tests.simulator.truth import truth_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

RUNGS = ("M1", "M2", "M3", "M4")


def results(name: str, seed: int, law: str, rungs: Sequence[str], seconds: float) -> Iterator[Result]:
    """Our figures of one simulated deployment, rung by rung; a refusal gives none."""
    for rung in rungs:
        scenario = build(name, seed=seed, law=law, seconds=seconds, mfu="M3" in rung)
        run = scenario.run()
        truth = truth_of(scenario, run)
        with tempfile.TemporaryDirectory() as folder:
            recorded = scenario.recorded(run, probed="M4" in rung)
            found = estimate(recorded.write(Path(folder) / "recording"), rung)
        real = {"all": truth.gross_all, "outer": truth.gross_outer}
        full = truth.gross_all + truth.prefill_seconds
        for quantity, (low, point, high) in found.items():
            yield Result("kvtally", f"{name} {law}", seed, rung, quantity, real[quantity], full, low, point, high)
        if not found:
            print(f"{name} {law} {seed} {rung}: refused", file=sys.stderr)  # noqa: T201  # progress of a script


def main(words: Sequence[str] | None = None) -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", default="1-3")
    parser.add_argument("--scenarios", default=",".join(NAMES))
    parser.add_argument("--laws", default=",".join(LAWS))
    parser.add_argument("--rungs", default="M1")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--json", type=Path, help="write every single result here")
    options = parser.parse_args(words)
    first, _, last = options.seeds.partition("-")
    seeds = range(int(first), int(last or first) + 1)
    found: list[Result] = []
    for name, law, seed in product(options.scenarios.split(","), options.laws.split(","), seeds):
        found += results(name, seed, law, options.rungs.split(","), options.seconds)
        print(name, law, seed, file=sys.stderr)  # noqa: T201  # progress of a script
    if options.json:
        options.json.write_text(json.dumps([one._asdict() for one in found], indent=1), encoding="utf-8")
    print(table(scores(found)))  # noqa: T201  # what the script is for


if __name__ == "__main__":
    main()
