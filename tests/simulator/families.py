"""Families of a metrics page over time: what was counted up to each scrape, as counters and histograms."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from prometheus_client.utils import floatToGoString

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    Array = np.ndarray

_TEXT: Callable[[float], str] = floatToGoString  # it has no types of its own


class Sample(NamedTuple):
    """One series: its value on each page."""

    name: str
    labels: Mapping[str, str]
    values: Array


class Family(NamedTuple):
    """A family as a page shows it; `type` is counter, gauge or histogram."""

    name: str
    type: str
    samples: tuple[Sample, ...]


class Events:
    """Amounts at instants, in any order."""

    def __init__(self, times: Iterable[float], amounts: Iterable[float] | None = None) -> None:
        self.times = np.asarray(list(times), dtype=float)
        self.amounts = np.ones(len(self.times)) if amounts is None else np.asarray(list(amounts), dtype=float)

    def flushed(self, every: float, phase: float) -> Events:
        """The same, told only at multiples of `every` seconds."""
        return Events(np.ceil((self.times - phase) / every) * every + phase, self.amounts)

    def total(self, instants: Array) -> Array:
        """The sum of what came up to each instant."""
        order = np.argsort(self.times, kind="stable")
        sums = np.concatenate(([0.0], np.cumsum(self.amounts[order])))
        return sums[np.searchsorted(self.times[order], instants, side="right")]


def counter(name: str, labels: Mapping[str, str], events: Events, instants: Array) -> Sample:
    """A counter's samples."""
    return Sample(name, labels, events.total(instants))


def histogram(
    name: str,
    labels: Mapping[str, str],
    events: Events,
    edges: Sequence[float],
    instants: Array,
    *,
    weights: Array | None = None,
) -> Family:
    """A histogram of amounts, each of them `weights` times there."""
    times, values = events.times, events.amounts
    many = np.ones(len(times)) if weights is None else weights
    samples = [Sample(f"{name}_sum", labels, Events(times, values * many).total(instants))]
    for edge in (*edges, np.inf):
        within = values <= edge
        bound = {"le": _TEXT(edge), **labels}
        samples.append(Sample(f"{name}_bucket", bound, Events(times[within], many[within]).total(instants)))
    samples.append(Sample(f"{name}_count", labels, samples[-1].values))
    return Family(name, "histogram", tuple(samples))


def one_two_five(most: int) -> list[float]:
    """The bucket edges that vLLM makes of the longest context: 1, 2, 5, 10, … up to it."""
    edges: list[float] = []
    unit = 1
    while True:
        for digit in (1, 2, 5):
            if digit * unit > most:
                return edges
            edges.append(float(digit * unit))
        unit *= 10


def render(families: Sequence[Family], count: int) -> list[bytes]:
    """The text of `count` pages."""
    columns: list[list[str]] = []
    for family in families:
        columns.append([f"# TYPE {family.name} {family.type}"] * count)
        columns += [_lines(sample) for sample in family.samples]
    return [("\n".join(lines) + "\n").encode() for lines in zip(*columns, strict=True)]


def _lines(sample: Sample) -> list[str]:
    labels = ",".join(f'{key}="{value}"' for key, value in sorted(sample.labels.items()))
    head = f"{sample.name}{{{labels}}} " if labels else f"{sample.name} "
    lines: list[str] = []
    previous: float | None = None
    for value in sample.values.tolist():
        if value != previous:
            line, previous = head + _TEXT(value), value
        lines.append(line)
    return lines
