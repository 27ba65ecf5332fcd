"""Engine-seconds that reuse avoided, and what prefill and decode took, by the law (METHOD sections 2.4 and 3)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kvtally.agent.calibration import PARAMETERS
from kvtally.agent.lookup_tiers import LEAST_SECONDS, TierTokens, estimated
from kvtally.agent.steplaw.capacity import bound_of, short_of_capacity, spread
from kvtally.agent.steplaw.chunks import budget_of, chunked, clock_of
from kvtally.agent.steplaw.law import GAP, Steps, prefill_seconds, working_seconds
from kvtally.agent.steplaw.mfu import coupling_share
from kvtally.agent.steplaw.population import COUPLINGS, agreement, pieces_of, populations
from kvtally.agent.steplaw.windows import cut, describe, least_seconds
from kvtally.agent.words import TOLD_APART
from kvtally.agent.worth import A_TOKEN, NOTHING, Three, Worth

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

    from kvtally.agent.calibration import Calibration
    from kvtally.agent.steplaw.chunks import Chunks
    from kvtally.agent.steplaw.machine import Machine
    from kvtally.agent.steplaw.population import Population
    from kvtally.agent.steplaw.series import Series
    from kvtally.agent.steplaw.windows import Described, Windows

    Array = NDArray[np.float64]
    Flags = NDArray[np.bool_]
    Index = NDArray[np.intp]

DERIVATIVE_STEP = 0.03  # of a logarithm
CLOCK_STEP = 0.05
MIXED = COUPLINGS.index("mixed")
KNOWN_COUPLING = 0.25  # of the couplings' range that stays open where MFU counters tell the attention work
UNTOLD_SHARE = 0.05  # of the tokens, whose loading or storing no clock may have timed
_ADMITTED = {"dram": "admitted_host_tokens", "disk": "admitted_disk_tokens", "p2p": "admitted_p2p_tokens"}


class Law(NamedTuple):
    """Parameters, the clock under load as a share of the reference, and a factor on the windows' own clocks."""

    theta: Array
    clock: float
    faster: float = 1.0


class Load(NamedTuple):
    """What a span's windows did and the requests in them; `window` of each piece of the populations."""

    machine: Machine
    told: Described
    window: Index
    populations: tuple[Population, ...]

    def of(self, people: Population) -> Index:
        """The window of each point."""
        result: Index = self.window[people.piece]
        return result

    def chunks(self, people: Population, begin: Array) -> tuple[Chunks, Index]:
        """The chunks of prefills from `begin` on, and the window of each."""
        window = self.of(people)
        budget = budget_of(self.machine, self.told.occupancy, self.told.decodes)[window]
        parts = chunked(people.prompt, begin, budget, self.told.packing[window])
        return parts, window[parts.request]

    def step(self, law: Law, parts: Chunks, of: Index, *, beside: bool) -> Array:
        """Wall seconds of the steps that hold the chunks, with the decodes that run beside them or without."""
        told = self.told
        share = told.occupancy if beside else np.zeros(len(told.first))
        steps = Steps(
            parts.tokens * parts.sharing + (share * told.decodes)[of],
            parts.products * parts.sharing,
            (share * told.context)[of],
            clock_of(self.machine, parts.tokens, told.clock[of] * law.faster, law.clock),
        )
        working = working_seconds(self.machine, law.theta, steps)
        return prefill_seconds(working, law.theta)

    def decode_step(self, law: Law) -> Array:
        """Wall seconds of each window's steps without prefill."""
        told = self.told
        clock = told.clock * law.faster
        working = working_seconds(self.machine, law.theta, Steps(told.decodes, 0.0, told.context, clock))
        result: Array = working + law.theta[GAP]
        return result


class _Parts(NamedTuple):
    """Engine-seconds: avoided by all reuse, by outer tiers, of full prefills; prefill in three views; decode."""

    avoided: float
    outer: float
    full: float
    prefill: Three
    decode: float


def load_of(machine: Machine, series: Series, windows: Windows, clock: float) -> Load:
    """The windows' requests under every coupling."""
    told = describe(machine, series, windows, clock)
    first, last, window = pieces_of(windows.start, windows.end, agreement(series))
    return Load(machine, told, window, tuple(populations(series, first, last, COUPLINGS)))


def worth(machine: Machine, series: Series, start: int, end: int, calibration: Calibration) -> Worth:
    """The worth of reuse between the scrapes `start` and `end`; of a span without work, its counts alone."""
    counted = _counted(series, start, end)
    windows = cut(series, start, end, least_seconds(machine, series))
    if not len(windows.start):
        return counted
    load = load_of(machine, series, windows, calibration.clock)
    law = Law(np.array(calibration.medians), calibration.clock)
    told_apart = [_parts(load, one, law) for one in load.populations]
    couplings = _narrowed(machine, series, windows, load, told_apart)
    people, middle = load.populations[MIXED], couplings[MIXED]
    by = [_derivative(load, people, law, place) for place in range(len(PARAMETERS))]
    faster = _parts(load, people, law._replace(clock=law.clock * (1 + CLOCK_STEP), faster=1 + CLOCK_STEP))
    tiers = _tiers(load, people, law, counted)
    short = short_of_capacity(series, start, end)
    bound = bound_of(short, spread(series, windows.start, windows.end, _by_window(load, people, law), (start, end)))
    return counted._replace(
        avoided=_three(one.avoided for one in couplings),
        outer=_three(one.outer for one in couplings),
        full=_three(one.full for one in couplings),
        avoided_by=tuple(one.avoided for one in by),
        outer_by=tuple(one.outer for one in by),
        full_by=tuple(one.full for one in by),
        clock_by=_three(
            (getattr(faster, name) - getattr(told_apart[MIXED], name)) / CLOCK_STEP
            for name in ("avoided", "outer", "full")
        ),
        **tiers,
        bound=bound.point,
        bound_loads=bound_of(short, np.diff(series.loads[start : end + 1])).point,
        bound_stores=bound_of(short, np.diff(series.stores[start : end + 1])).point,
        bound_variance=bound.variance,
        bound_missed=bound.missed,
        prefill=middle.prefill,
        decode=middle.decode,
        prefill_by=tuple(one.prefill[1] for one in by),
        decode_by=tuple(one.decode for one in by),
        law_seconds=middle.prefill[1] + middle.decode,
        attention_seconds=_attention_share(load) * middle.full,
    )


def _three(values: Iterable[float]) -> Three:
    first, second, third = values
    return first, second, third


def _counted(series: Series, start: int, end: int) -> Worth:
    """The counts of a span, with no seconds by the law."""
    a, b = np.array([start]), np.array([end])

    def over(name: str) -> float:
        return float(series.over(name, a, b)[0]) if name in series.totals else 0.0

    lengths = np.diff(series.at[start : end + 1])
    starved = bound_of(short_of_capacity(series, start, end), lengths).point if series.is_starving_told else None
    known = bool(series.worked_known[start + 1 : end + 1].all())
    outer = over("external_tokens")
    admitted = {tier: over(name) for tier, name in _ADMITTED.items()}
    total = sum(admitted.values()) + over("admitted_unspecified_tokens")
    # admission and first token differ by the requests in flight: the shares are what counts
    shares = {tier: outer * tokens / total if total else 0.0 for tier, tokens in admitted.items()}
    found = _looked_up(series, start, end, outer - sum(shares.values()))
    return NOTHING._replace(
        loads=_timed(series.loads, series.loads_told, series.totals["external_tokens"], start, end),
        stores=_timed(series.stores, series.stores_told, _stored(series), start, end),
        requests=over("first_tokens"),
        steps=over("steps"),
        preemptions=over("preemptions"),
        hbm_tokens=over("hbm_tokens"),
        external_tokens=outer,
        dram_tokens=shares["dram"] + found.dram,
        disk_tokens=shares["disk"] + found.disk,
        p2p_tokens=shares["p2p"],
        computed_tokens=over("computed_tokens"),
        worked_seconds=float(series.worked[end] - series.worked[start]) if known else None,
        seconds=float(lengths.sum()),
        starved_seconds=starved,
        estimated_tokens=found.dram + found.disk,
    )


def _stored(series: Series) -> Array:
    """Tokens that a connector may store, up to each scrape: the computed ones, none where there is no connector."""
    computed = series.totals["computed_tokens"]
    return computed if series.is_storing else np.zeros(len(computed))


def _timed(seconds: Array, told: Flags, tokens: Array, start: int, end: int) -> float | None:
    """Seconds of moving tokens between two scrapes; None where no clock tells of some of the tokens."""
    moved = np.diff(tokens[start : end + 1])
    if float(moved[~told[start + 1 : end + 1]].sum()) > UNTOLD_SHARE * float(moved.sum()):
        return None
    return float(seconds[end] - seconds[start])


def _looked_up(series: Series, start: int, end: int, unnamed: float) -> TierTokens:
    """Tiers of the external tokens that the engine does not name, as far as a cache tells of their time."""
    hits = series.hits
    if hits is None or unnamed < A_TOKEN or series.at[end] - series.at[start] < LEAST_SECONDS:
        return TierTokens(0.0, 0.0)
    loaded = np.diff(series.totals["external_tokens"][start : end + 1])
    seen = float(loaded[hits.told[start + 1 : end + 1]].sum() / loaded.sum())
    return estimated(unnamed * seen, *(float(found[end] - found[start]) for found in (hits.dram, hits.disk)))


def around(law: Law, place: int) -> Iterator[Law]:
    """The law with one parameter a little larger, and a little smaller: DERIVATIVE_STEP of its log each way."""
    for sign in (1.0, -1.0):
        theta = law.theta.copy()
        theta[place] *= np.exp(sign * DERIVATIVE_STEP)
        yield law._replace(theta=theta)


def _derivative(load: Load, people: Population, law: Law, place: int) -> _Parts:
    """Derivatives by the log of one parameter, from both sides."""
    up, down = (_parts(load, people, one) for one in around(law, place))
    width = 2 * DERIVATIVE_STEP
    least, middle, most = ((a - b) / width for a, b in zip(up.prefill, down.prefill, strict=True))
    return _Parts(
        (up.avoided - down.avoided) / width,
        (up.outer - down.outer) / width,
        (up.full - down.full) / width,
        (least, middle, most),
        (up.decode - down.decode) / width,
    )


def _parts(load: Load, people: Population, law: Law) -> _Parts:
    nothing = float(marginal(load, people, law, np.zeros(len(people.prompt))).sum())
    without_outer = float(marginal(load, people, law, people.reused_hbm).sum())
    actual = float(marginal(load, people, law, people.reused).sum())
    prefill, decode = _parted(load, people, law)
    return _Parts(nothing - actual, without_outer - actual, nothing, prefill, decode)


def marginal(load: Load, people: Population, law: Law, begin: Array) -> Array:
    """Wall seconds that each point's prefills from `begin` add: their steps, less decode steps that ran anyway.

    PF(n, r) of METHOD section 3.
    """
    parts, of = load.chunks(people, begin)
    anyway = (load.told.occupancy * load.decode_step(law))[of]
    added = (load.step(law, parts, of, beside=True) - anyway) / parts.sharing
    result: Array = np.bincount(parts.request, added, len(people.prompt)) * people.weight
    return result


def _by_window(load: Load, people: Population, law: Law) -> Array:
    """Seconds avoided in each window."""
    saved = marginal(load, people, law, np.zeros(len(people.prompt))) - marginal(load, people, law, people.reused)
    avoided: Array = np.bincount(load.of(people), saved, len(load.told.first)).astype(np.float64)
    return avoided


def _tiers(load: Load, people: Population, law: Law, counted: Worth) -> dict[str, float]:
    """What each outer tier that the engine tells apart avoided, behind those that are looked up before it."""
    outer = counted.external_tokens
    if not outer:
        return {}
    shares = {tier: getattr(counted, f"{tier}_tokens") / outer for tier in TOLD_APART}
    seconds: dict[str, float] = {}
    loaded = people.reused - people.reused_hbm
    behind = 0.0  # share of what is loaded that the tiers before have served
    for tier in TOLD_APART:
        if not shares[tier]:
            continue
        before = marginal(load, people, law, people.reused_hbm + loaded * behind)
        behind += shares[tier]
        after = marginal(load, people, law, people.reused_hbm + loaded * behind)
        seconds[tier] = float((before - after).sum())
    return seconds


def _parted(load: Load, people: Population, law: Law) -> tuple[Three, float]:
    """Prefill seconds (least, Shapley, most) and decode seconds of the steps that ran (METHOD 2.4).

    A step with both takes less than the two would take alone: Shapley shares that gain. The least that prefill can be
    charged is what it adds to decode, the most what it takes alone.
    """
    told = load.told
    parts, of = load.chunks(people, people.reused)
    both, alone = (load.step(law, parts, of, beside=beside) for beside in (True, False))
    decode = load.decode_step(law)
    base = (told.occupancy * decode)[of]
    steps = people.weight[parts.request] / parts.sharing
    views = (np.minimum(both - base, alone), (alone + both - base) / 2, np.maximum(both - base, alone))
    least, middle, most = (float((view * steps).sum()) for view in views)
    count = len(told.first)
    chunks = np.bincount(of, people.weight[parts.request], count)
    nonfinal = np.maximum(chunks - np.bincount(load.of(people), people.weight, count), 0.0)
    plain = np.maximum(told.steps - told.finals - told.occupancy * nonfinal, 0.0)
    total = float((both * steps).sum() + (plain * decode).sum())
    return (least, middle, most), total - middle


def _narrowed(machine: Machine, series: Series, windows: Windows, load: Load, couplings: list[_Parts]) -> list[_Parts]:
    """The couplings' results, drawn together where MFU counters tell how much attention there was (rung M3)."""
    share = coupling_share(machine, series, windows, told=load.told, window=load.window, populations=load.populations)
    if share is None:
        return couplings
    apart, together = couplings[COUPLINGS.index("apart")], couplings[COUPLINGS.index("together")]

    def between(position: float) -> _Parts:
        mixed = couplings[MIXED]
        avoided, outer, full = (
            getattr(apart, name) + position * (getattr(together, name) - getattr(apart, name))
            for name in ("avoided", "outer", "full")
        )
        return mixed._replace(avoided=avoided, outer=outer, full=full)

    half = KNOWN_COUPLING / 2
    return [between(share + half), between(share), between(share - half)]


def _attention_share(load: Load) -> float:
    """Attention's share of a full prefill's work, prompts weighted by their length (METHOD 4.5)."""
    people = load.populations[MIXED]
    tokens = float((people.prompt * people.weight).sum())
    if not tokens:
        return 0.0
    mean = float((people.prompt**2 * people.weight).sum()) / tokens
    ratio = load.machine.attention_flop * mean / 2 / load.machine.linear_flop
    return ratio / (1 + ratio)
