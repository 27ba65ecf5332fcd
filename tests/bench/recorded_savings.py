"""Savings from real recordings beside the truth, the baseline and the naive formulas.

    python -m tests.bench.recorded_savings FOLDER

FOLDER holds recordings of one trace under several arms (h100-llama8b-{off,on,small-nolmc,lmc-cpu}, packed or not).
Under a backlog (phase `closed`) the wall time of the arms is the truth: what `off` took longer. The estimator sees one
arm alone.

The baseline is what a recording rule could do: least squares of GPU seconds on (steps, computed tokens) over slices
of the window itself.
"""

from __future__ import annotations

import json
import sys
import tempfile
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tests.present import present

from kvtally.agent.calibrating import learned
from kvtally.agent.kin import kin_of
from kvtally.agent.ledger.append import LedgerWriter
from kvtally.agent.ledger.place import connect
from kvtally.agent.ledger.read import LedgerReader
from kvtally.agent.ledger.upgrade import upgrade
from kvtally.agent.recording import open_recording
from kvtally.agent.replay import Replay
from kvtally.agent.savings import Part, loading_of, seconds_of
from kvtally.agent.steplaw.fit import alone_seconds
from kvtally.agent.steplaw.worth import worth

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from kvtally.agent.calibration import Calibration
    from kvtally.agent.kin import Kin
    from kvtally.agent.savings import Seconds
    from kvtally.agent.steplaw.series import Series

ARMS = ("on", "small-nolmc", "lmc-cpu")
PREFIX = "h100-llama8b"
FOREVER_NS = 2**62
THINNED_SECONDS = (1, 5, 15)


class Arm(NamedTuple):
    """One recording in the ledger: its replica and the phases of its load (unix seconds)."""

    name: str
    kin: Kin
    phases: Mapping[str, tuple[float, float]]

    @property
    def series(self) -> Series:
        """The counters of its only replica."""
        return self.kin.subjects[0].series

    def within(self, phase: str, margin_seconds: float) -> tuple[int, int]:
        """First and last scrape of the intervals that a phase touches."""
        start, end = self.phases[phase]
        begins = self.series.at[:-1] + self.series.epoch_ns / 1e9
        inside = np.flatnonzero((begins > start - margin_seconds) & (begins < end))
        return int(inside[0]), int(inside[-1]) + 1


def arm_of(path: Path, interval_seconds: int = 0) -> Arm:
    """Replay a recording, one interval per page or per `interval_seconds`."""
    recording = open_recording(path)
    with tempfile.TemporaryDirectory() as place:
        ledger = f"{place}/ledger.db"
        upgrade(f"sqlite:///{ledger}")
        with closing(LedgerWriter(connect(ledger), ledger)) as writer:
            Replay(recording, writer, interval_ns=interval_seconds * 10**9).run()
        with LedgerReader(f"sqlite:///{ledger}") as reader, reader.snapshot():
            (kin,) = kin_of(reader, (0, FOREVER_NS), reader.targets())
    phases = {name: (one["start"], one["end"]) for name, one in recording.meta["phases"].items()}
    return Arm(path.name.partition(".")[0], kin, phases)


def law_of(arm: Arm, span: tuple[int, int] | None = None) -> Calibration | None:
    """The law from a whole arm, or from a part of it."""
    kin = arm.kin
    if span is not None:
        subject = kin.subjects[0]
        part = _part(subject.series, *span)
        rows = subject.observed.rows[span[0] : span[1]]
        kin = kin._replace(subjects=(subject._replace(series=part, observed=subject.observed._replace(rows=rows)),))
    return learned(kin, (), {}, (0, FOREVER_NS)).calibration


def _part(series: Series, start: int, end: int) -> Series:
    """The scrapes from start to end, counts and all."""
    cut = slice(start, end + 1)
    arrays: dict[str, Any] = {
        name: value[cut] for name, value in series._asdict().items() if isinstance(value, np.ndarray)
    }
    totals = {name: total[cut] - total[start] for name, total in series.totals.items()}
    histograms = {
        name: one._replace(counts=one.counts[cut] - one.counts[start]) for name, one in series.histograms.items()
    }
    return series._replace(**arrays, totals=totals, histograms=histograms)


def figure(arm: Arm, law: Calibration, span: tuple[int, int]) -> Seconds:
    """The figures of a part of an arm by a law."""
    subject = arm.kin.subjects[0]
    assert arm.kin.machine is not None
    value = worth(arm.kin.machine, arm.series, *span, law)
    loading = loading_of(subject.replica.connector, tuple(subject.observed.caches))
    return seconds_of([Part(law, value, loading)], value.seconds)


def baseline(series: Series, span: tuple[int, int]) -> list[float]:
    """Seconds by least squares on (steps, computed tokens): slices of 1-3 s, every offset, edges in and out."""
    found = []
    for slices in (1, 2, 3):
        for offset in range(slices):
            for inset in (0, 1):
                places = np.arange(span[0] + inset + offset, span[1] - inset + 1, slices)
                if len(places) < 4:
                    continue
                begin, end = places[:-1], places[1:]
                steps, tokens = (series.over(name, begin, end) for name in ("steps", "computed_tokens"))
                worked = series.worked[end] - series.worked[begin]
                (_, per_token), *_ = np.linalg.lstsq(np.stack([steps, tokens], axis=1), worked, rcond=None)
                reused = _moved(series, span, "hbm_tokens") + _moved(series, span, "external_tokens")
                found.append(float(per_token) * reused)
    return found


def naive(series: Series, span: tuple[int, int]) -> dict[str, float]:
    """What ratios of counters say."""
    reused = _moved(series, span, "hbm_tokens") + _moved(series, span, "external_tokens")
    computed = _moved(series, span, "computed_tokens")
    return {
        "reused x prefill time / computed": reused * _moved(series, span, "prefill") / computed,
        "reused x busy seconds / computed": reused * float(series.worked[span[1]] - series.worked[span[0]]) / computed,
    }


def _moved(series: Series, span: tuple[int, int], name: str) -> float:
    return float(series.totals[name][span[1]] - series.totals[name][span[0]])


def sweep(
    arm: Arm, law: Calibration, requests: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[int, float, float, float]]:
    """Single queries: prompt tokens, share reused, measured and predicted seconds to the first token."""
    assert arm.kin.machine is not None
    theta = np.array(law.medians)
    start, end = arm.phases["sweep"]
    for one in requests:
        if not start <= one["t_start"] <= end or one.get("tag", "").startswith(("sweep_warm", "sweep_evict")):
            continue
        prompt = one["usage"]["prompt_tokens"]
        cached = (one["usage"].get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        predicted = alone_seconds(
            arm.kin.machine, theta, np.array([float(prompt)]), np.array([float(min(cached, prompt - 1))]), law.clock
        )
        yield prompt, cached / prompt, one["t_first"] - one["t_start"], float(predicted[0])


def phases_of(arm: Arm, law: Calibration, truth: float) -> None:
    """The closed phase of one arm by laws from each of its phases, by the baseline and by ratios."""
    span = arm.within("closed", 1.0)
    for phase in ("sweep", "open", "closed"):
        other = law_of(arm, arm.within(phase, 1.0))
        if other is not None:
            _line(f"{arm.name}, law from {phase}", figure(arm, other, span), truth)
    loads = float(arm.series.loads[span[1]] - arm.series.loads[span[0]])
    found = np.array(baseline(arm.series, span)) - loads
    worst = float(found[np.argmax(np.abs(found - truth))])
    middle = float(np.median(found))
    _say(f"    baseline: median {middle:.2f} ({middle / truth - 1:+.1%}), worst {worst:.2f} ({worst / truth - 1:+.1%})")
    for words, value in naive(arm.series, span).items():
        _say(f"    {words}: {value:.1f} ({value / truth - 1:+.0%})")
    outer = figure(arm, law, span).tiers.get("external")
    if outer is not None:
        low, point, high = present(outer.net)
        _say(f"    external tier: avoided {outer.avoided.point:.2f}, net {point:.2f} [{low:.2f}, {high:.2f}]")


def queries(folder: Path, arm: Arm, law: Calibration) -> None:
    """Seconds to the first token that reuse saved single queries, by prompt length and share."""
    path = folder / arm.name / "requests.jsonl"
    if not path.exists():
        return
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    groups: dict[tuple[int, float], list[tuple[float, float]]] = {}
    for prompt, share, measured, predicted in sweep(arm, law, lines):
        groups.setdefault((round(prompt, -3), round(4 * share) / 4), []).append((measured, predicted))
    medians = {key: np.median(np.array(pairs), axis=0) for key, pairs in groups.items()}
    for (prompt, share), pair in sorted(medians.items()):
        if share and (prompt, 0.0) in medians:
            saved, told = medians[prompt, 0.0] - pair
            words = f"{prompt:6} tokens, {share:4.0%} reused"
            _say(
                f"    {words}: measured {saved * 1e3:6.0f} ms, predicted {told * 1e3:6.0f} ms ({told / saved - 1:+.0%})"
            )


def main(folder: Path) -> None:
    """Print the tables."""
    walls = {}
    for name in ("off", *ARMS):
        start, end = (open_recording(_found(folder, name)).meta["phases"]["closed"][edge] for edge in ("start", "end"))
        walls[name] = end - start
    _say("net engine-seconds of the closed phase; truth: wall of `off` less wall of the arm")
    for name in ARMS:
        truth = walls["off"] - walls[name]
        arms = {seconds: arm_of(_found(folder, name), seconds if seconds > 1 else 0) for seconds in THINNED_SECONDS}
        law = law_of(arms[1])
        assert law is not None
        for seconds, arm in arms.items():
            span = arm.within("closed", 1.0 if seconds == 1 else 0.9 * seconds)
            reused = sum(_moved(arm.series, span, one) for one in ("hbm_tokens", "external_tokens"))
            _line(f"{name}, scraped every {seconds} s", figure(arm, law, span), truth, reused)
        phases_of(arms[1], law, truth)
    _say(f"external tier, truth: {walls['small-nolmc'] - walls['lmc-cpu']:.2f} +- 1 engine-seconds net")
    _say(
        "single queries (sweep): seconds to the first token that reuse saved, measured and by the whole recording's law"
    )
    arm = arm_of(_found(folder, ARMS[0]))
    law = law_of(arm)
    assert law is not None
    queries(folder, arm, law)


def _line(words: str, told: Seconds, truth: float, reused: float | None = None) -> None:
    low, point, high = present(told.net)
    inside = "inside" if present(told.net).holds(truth) else "OUTSIDE"
    tokens = "" if reused is None else f", {reused:,.0f} reused tokens"
    figures = f"{point:6.2f} [{low:.2f}, {high:.2f}] of {truth:.2f}: {point / truth - 1:+.1%}"
    _say(f"  {words:34} {figures}, truth {inside}, {told.status}{tokens}")


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201  # what the script is for


def _found(folder: Path, arm: str) -> Path:
    plain = folder / f"{PREFIX}-{arm}"
    return plain if plain.exists() else folder / f"{PREFIX}-{arm}.tar.xz"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
