"""From the worth of reuse to figures: intervals, statuses and refusals (METHOD sections 3, 4.5 and 4.9). Pure."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, NamedTuple

from kvtally.agent.calibration import PARAMETERS
from kvtally.agent.facts import CONNECTOR
from kvtally.agent.words import REFUSED, TIERS
from kvtally.agent.worth import A_TOKEN, Worth, added

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from kvtally.agent.calibration import Calibration

Status = Literal["ok", "lower_bound", "not_proven", "insufficient_data", "unreconciled"]
Loading = Literal["synchronous", "asynchronous", "unknown"]

Z90 = 1.645
# what the law's form gets wrong beyond its parameters. ASSUMED: 7 of 8 intervals hold with it on real H100 runs
DISCREPANCY = 0.06
# of attention's share, where nothing was learned of attention (METHOD 4.5); it falls with what is left of the prior's
# doubt, here its standard deviation of the log
ATTENTION_ERROR, ATTENTION_DOUBT = 0.8, 0.35
PREFILL_FLOOR = 0.02  # of what the prompts would take with no reuse: METHOD 4.5
CLOCK_ERROR, CLOCK_WEIGHT_SECONDS = 0.06, 3.0
# work that preempted requests do again is in no prompt counter: it makes the law look slower than it is
PREEMPTION_ERROR = 0.2
MANY_PREEMPTIONS = 0.05
LEAST_REQUESTS = 20
WIDEST_SHARE = 0.35  # half-width of the interval, of the estimate
WIDEST_OF_TIME = 0.02  # and of the window's time: METHOD 0.7
UNKNOWN_LOADING = 0.05  # of the occupied time, from which on it must be known whether loads stall the engine
# the connector's own timers cover its copies; low and high of what they cost the engine (METHOD section 6)
LOAD_RANGE = (0.7, 1.3)
STORE_RANGE = (0.5, 1.2)
SAMPLED_SHARE = 0.02  # of the net, from which on what scrapes leave open of the realised part is told

_SYNCHRONOUS = ("LMCacheConnectorV1", "LMCacheConnector", "SharedStorageConnector", "ExampleConnector")
_ASYNCHRONOUS = (
    "LMCacheMPConnector",
    "OffloadingConnector",
    "SimpleCPUOffloadConnector",
    "NixlConnector",
    "P2pNcclConnector",
    "MooncakeConnector",
    "MooncakeStoreConnector",
    "MoRIIOConnector",
)
# a connector's timers, by the beginning of its class, and what lifts it where they are not seen
_TIMERS = (
    (
        "LMCacheMP",
        "of LMCache's server",
        'list its page in kvtally.toml: [[page]] url = "http://127.0.0.1:8080/metrics"',
    ),
    (
        "LMCache",
        "lmcache:time_to_retrieve, lmcache:time_to_store",
        "export PROMETHEUS_MULTIPROC_DIR before `vllm serve`, or list LMCache's own page under [[page]]",
    ),
    (
        "OffloadingConnector",
        "vllm:kv_offload_load_time, vllm:kv_offload_store_time",
        "vLLM 0.24 and later have them (0.16 and later: vllm:kv_offload_total_time)",
    ),
    ("Mooncake", "of Mooncake", "list the page of Mooncake's client under [[page]]"),
    ("", "of the outer tier", "`kvtally doctor` says what would tell them"),
)
_NAMING = f"name the connector: {CONNECTOR}"
# caches, by the ends of their names, that serve such connectors alone
_NEVER_STOPPING = ("/kv_offload", "/lmcache_mp")


class Estimate(NamedTuple):
    """A figure with its 90 % interval."""

    low: float
    point: float
    high: float

    def holds(self, value: float) -> bool:
        """Whether the interval contains a value."""
        return self.low <= value <= self.high


EXACTLY_NOTHING = Estimate(0.0, 0.0, 0.0)


class Reason(NamedTuple):
    """Why a figure is not plain, in words, and what would change that."""

    text: str
    hint: str = ""
    refuses: bool = False

    def __str__(self) -> str:
        return f"{self.text}: {self.hint}" if self.hint else self.text


class Part(NamedTuple):
    """Worth under one calibration, added up over the hours and replicas that share it."""

    calibration: Calibration
    worth: Worth
    loading: Loading


class TierSeconds(NamedTuple):
    """One tier's engine-seconds and tokens; net None where what loading and storing took is not known."""

    tokens: float
    avoided: Estimate
    net: Estimate | None
    status: Status
    reasons: tuple[Reason, ...] = ()


class Seconds(NamedTuple):
    """Engine-seconds of a group.

    stall, store    None where an outer tier is at work that does not tell; so is net then
    parts_sd    standard deviation of `avoided` by cause
    bound       net seconds in the time in which requests waited for capacity; None where that is not told
    latency     seconds of loading that hold up requests but not the engine (asynchronous connectors)
    """

    status: Status
    reasons: tuple[Reason, ...]
    avoided: Estimate
    stall: Estimate | None
    store: Estimate | None
    net: Estimate | None
    tiers: dict[str, TierSeconds]
    parts_sd: dict[str, float]
    bound: Estimate | None
    capacity_bound_share: float | None
    latency: float | None


def loading_of(connector: str, caches: Sequence[str] = ()) -> Loading:
    """Whether a connector's loads stop the engine; vLLM's own offloading and LMCache's own server never do."""
    if connector in _SYNCHRONOUS:
        return "synchronous"
    if connector in _ASYNCHRONOUS or (
        not connector and caches and all(one.endswith(_NEVER_STOPPING) for one in caches)
    ):
        return "asynchronous"
    return "unknown"


def untimed(worth: Worth, connector: str) -> Reason | None:
    """Why the net is not known, where the outer tier does not tell what it took; None where it does."""
    untold = [what for what, seconds in (("loading", worth.loads), ("storing", worth.stores)) if seconds is None]
    if not untold:
        return None
    timers, hint = next((timers, hint) for start, timers, hint in _TIMERS if connector.startswith(start))
    text = f"nothing tells how long {' and '.join(untold)} KV took, so the net is not known: no timers ({timers})"
    return Reason(text, hint)


def parts_of(worths: Iterable[tuple[Calibration, Loading, Worth]]) -> list[Part]:
    """Worths added up by calibration and way of loading, in the order in which these first come."""
    found: dict[tuple[int | None, str, Loading], Part] = {}
    for calibration, loading, worth in worths:
        key = (calibration.id, calibration.fingerprint.text(), loading)
        before = found.get(key)
        total = worth if before is None else added(before.worth, worth)
        found[key] = Part(calibration, total, loading)
    return list(found.values())


def nothing_reused() -> Seconds:
    """The figures where no token was reused and no tier was at work: exactly nothing, by any law or none."""
    hbm = TierSeconds(0.0, EXACTLY_NOTHING, EXACTLY_NOTHING, "ok")
    nothing = EXACTLY_NOTHING
    return Seconds("ok", (), nothing, nothing, nothing, nothing, {"hbm": hbm}, {}, nothing, None, 0.0)


def with_held(seconds: Seconds, held: Iterable[str]) -> Seconds:
    """The same with a row for every tier that something is held for, whether it served anything or not.

    Where the outer tiers are not told apart, what is held for any of them stands with them.
    """
    if "external" in seconds.tiers:
        return seconds
    idle = TierSeconds(0.0, EXACTLY_NOTHING, EXACTLY_NOTHING, "ok")
    missing = {tier: idle for tier in TIERS if tier in set(held) and tier not in seconds.tiers}
    return seconds._replace(tiers=seconds.tiers | missing)


def seconds_of(
    parts: Sequence[Part], occupied_seconds: float, reasons: Sequence[Reason] = (), *, naming: str = _NAMING
) -> Seconds:
    """The figures of a group; `reasons` are those that are known beforehand, and any that refuses decides.

    naming      how to name the connector of its engines; "" for engines that have none
    """
    total = parts[0].worth
    for part in parts[1:]:
        total = added(total, part.worth)
    reused = total.hbm_tokens + total.external_tokens
    avoided, parts_sd = _estimate(parts, _all)
    outer, _ = _estimate(parts, _outer)
    hbm, _ = _estimate(parts, _hbm)
    if not reused:
        avoided = outer = hbm = EXACTLY_NOTHING
    stall, store, latency = _costs(parts)
    net = None if stall is None or store is None else _less(avoided, stall, store)
    found = [*reasons, *_window_reasons(total, parts, occupied_seconds, naming)]
    status = _status(net, avoided, total, occupied_seconds, found)
    tiers = _tiers(total, hbm, outer, stall, store, status=status, occupied_seconds=occupied_seconds)
    starved = total.starved_seconds
    bound = None
    if starved is not None and net is not None and stall is not None and store is not None:
        bound = _bound(total, avoided, stall, store, net)
        found += [] if status in REFUSED else _sampled(total, bound, net)
    return Seconds(
        status,
        tuple(found),
        avoided,
        stall,
        store,
        net,
        tiers,
        parts_sd,
        bound,
        None if starved is None or not total.seconds else starved / total.seconds,
        latency,
    )


def _bound(total: Worth, avoided: Estimate, stall: Estimate, store: Estimate, net: Estimate) -> Estimate:
    """Of the net seconds, those that fell into time in which capacity was short (METHOD section 3, kappa).

    Scrapes only sample who waits: that error comes on top of the law's, and never makes more than all of it cash.
    """
    shares = bound_shares(total)
    by_law = _less(*(_scaled(one, share) for one, share in zip((avoided, stall, store), shares, strict=True)))
    less, more = by_law.point - by_law.low, by_law.high - by_law.point
    down, up = sampling(total, net)
    # what was loaded and stored at other times makes no more of it cash than there is
    point = min(by_law.point, net.point) if net.point >= 0 else by_law.point
    low, high = point - math.hypot(less, down), point + math.hypot(more, up)
    if net.point >= 0:
        low = max(low, min(point - less, 0.0))  # that fewer waited makes no gain a loss
        return Estimate(low, point, max(point, min(high, net.high)))
    return Estimate(min(point, max(low, net.low)), point, high)


def bound_shares(total: Worth) -> list[float]:
    """Of what was avoided, loaded and stored, the shares in the time in which capacity was short."""
    return [
        min(1.0, max(0.0, part / whole)) if whole > 0 else 0.0
        for part, whole in (
            (total.bound, total.avoided[1]),
            (total.bound_loads, total.loads or 0.0),
            (total.bound_stores, total.stores or 0.0),
        )
    ]


def sampling(total: Worth, net: Estimate) -> tuple[float, float]:
    """How much less, and how much more, of the net may have fallen into that time than the scrapes saw."""
    if total.avoided[1] <= 0:
        return 0.0, 0.0
    half = Z90 * math.sqrt(total.bound_variance)
    shares = (min(1.0, min(half, most) / total.avoided[1]) for most in (max(total.bound, 0.0), total.bound_missed))
    less, more = (abs(net.point) * share for share in shares)  # loading and storing go with what they serve
    return (less, more) if net.point >= 0 else (more, less)


def _sampled(total: Worth, bound: Estimate, net: Estimate) -> list[Reason]:
    """A word where scrapes are too few to say how much of the net was cash."""
    down, up = sampling(total, net)
    half = (down + up) / 2
    if half <= WIDEST_SHARE * abs(bound.point) or half <= SAMPLED_SHARE * abs(net.point):
        return []
    low, high = (round(end, 1) + 0.0 for end in (bound.low, bound.high))  # no -0.0
    text = (
        f"few scrapes saw requests wait for capacity: what is realised lies between {low:.1f} and {high:.1f} "
        "engine-seconds"
    )
    return [Reason(text, "scrape more often (interval_seconds), or ask for a longer window (--since)")]


def _scaled(estimate: Estimate, factor: float) -> Estimate:
    return Estimate(*sorted(factor * bound for bound in estimate))


class _View(NamedTuple):
    """What is estimated of a worth: its couplings, its derivatives, its derivative by the clock."""

    couplings: tuple[float, ...]
    by: tuple[float, ...]
    clock_by: float


def _all(worth: Worth) -> _View:
    return _View(worth.avoided, worth.avoided_by, worth.clock_by[0])


def _outer(worth: Worth) -> _View:
    return _View(worth.outer, worth.outer_by, worth.clock_by[1])


def _hbm(worth: Worth) -> _View:
    couplings = tuple(a - o for a, o in zip(worth.avoided, worth.outer, strict=True))
    by = tuple(a - o for a, o in zip(worth.avoided_by, worth.outer_by, strict=True))
    return _View(couplings, by, worth.clock_by[0] - worth.clock_by[1])


def tier_deviations(parts: Sequence[Part]) -> dict[str, dict[str, float]]:
    """Standard deviations by cause of what HBM's hits avoided and of what the outer tiers' did."""
    return {name: _estimate(parts, view)[1] for name, view in (("hbm", _hbm), ("out", _outer))}


def _estimate(parts: Sequence[Part], view: Callable[[Worth], _View]) -> tuple[Estimate, dict[str, float]]:
    """Point and interval: errors of different laws are independent, the error of the law's form is common to all."""
    point = 0.0
    squares = {"calibration": 0.0, "coupling": 0.0, "clock": 0.0}
    common = {"form": 0.0, "attention": 0.0, "preemptions": 0.0, "floor": 0.0}
    for part in parts:
        worth, calibration = part.worth, part.calibration
        seen = view(worth)
        mean = sum(seen.couplings) / len(seen.couplings)
        full = sum(worth.full) / len(worth.full)
        point += mean
        squares["calibration"] += _quadratic(seen.by, calibration.covariance)
        squares["coupling"] += ((max(seen.couplings) - min(seen.couplings)) / 2) ** 2
        known = CLOCK_WEIGHT_SECONDS / (CLOCK_WEIGHT_SECONDS + calibration.clock_weight_seconds)
        squares["clock"] += (seen.clock_by * CLOCK_ERROR * known) ** 2
        common["form"] += DISCREPANCY * abs(mean)
        share = worth.attention_seconds / full if full else 0.0
        common["attention"] += _attention_factor(calibration) * share * abs(mean)
        often = min(1.0, worth.preemptions / worth.requests) if worth.requests else 0.0
        common["preemptions"] += PREEMPTION_ERROR * often * abs(mean)
        common["floor"] += PREFILL_FLOOR * abs(full) if mean else 0.0
    sds = {name: math.sqrt(square) for name, square in squares.items()} | common
    half = Z90 * math.hypot(*sds.values())
    # reuse cannot take longer than no reuse: what is below nothing is error
    return Estimate(max(point - half, min(point, 0.0)), point, point + half), sds


def _quadratic(by: Sequence[float], covariance: Sequence[Sequence[float]]) -> float:
    return max(
        0.0,
        math.fsum(
            a * b * value for a, row in zip(by, covariance, strict=True) for b, value in zip(by, row, strict=True)
        ),
    )


def _attention_factor(calibration: Calibration) -> float:
    if calibration.rung == "M3":
        return 0.0
    place = PARAMETERS.index("attention_efficiency")
    left = math.sqrt(max(calibration.covariance[place][place], 0.0)) / ATTENTION_DOUBT
    return ATTENTION_ERROR * min(1.0, left)


def _costs(parts: Sequence[Part]) -> tuple[Estimate | None, Estimate | None, float | None]:
    """Engine-seconds of loading and of storing, and loading seconds that only requests waited for."""
    stall = _cost((part.worth.loads, part.loading, LOAD_RANGE) for part in parts)
    store = _cost((part.worth.stores, part.loading, STORE_RANGE) for part in parts)
    waited = [part.worth.loads for part in parts if part.loading == "asynchronous"]
    known = [loads for loads in waited if loads is not None]
    return stall, store, math.fsum(known) if len(known) == len(waited) else None


def _cost(clocks: Iterable[tuple[float | None, Loading, tuple[float, float]]]) -> Estimate | None:
    """Of seconds by connectors' clocks, what they cost the engines; None where one of them is not known."""
    low, point, high = 0.0, 0.0, 0.0
    for seconds, loading, (least, most) in clocks:
        if seconds is None:
            return None
        if loading == "asynchronous":
            high += seconds  # the engine goes on; no more than all of it can have been in its way
        else:
            low += least * seconds if loading == "synchronous" else 0.0
            point += seconds
            high += most * seconds
    return Estimate(low, point, high)


def _less(gain: Estimate, *costs: Estimate) -> Estimate:
    """A gain less its costs; the errors of the three are independent."""
    point = gain.point - sum(cost.point for cost in costs)
    down = math.hypot(gain.point - gain.low, *(cost.high - cost.point for cost in costs))
    up = math.hypot(gain.high - gain.point, *(cost.point - cost.low for cost in costs))
    return Estimate(point - down, point, point + up)


def _window_reasons(total: Worth, parts: Sequence[Part], occupied_seconds: float, naming: str) -> list[Reason]:
    found: list[Reason] = []
    reused = total.hbm_tokens + total.external_tokens
    if reused and total.requests < LEAST_REQUESTS:
        text = f"the window holds {total.requests:.0f} requests, a figure takes {LEAST_REQUESTS}"
        found.append(Reason(text, "ask for a longer window (--since)", refuses=True))
    unknown = sum(part.worth.loads or 0.0 for part in parts if part.loading == "unknown")
    if unknown > UNKNOWN_LOADING * occupied_seconds:
        text = f"{unknown:.1f} s went into loading KV, and nothing tells whether the engine waited for it"
        found.append(Reason(text, naming, refuses=True))
    preempted = _preempted(total)
    return found if preempted is None else [*found, preempted]


def _preempted(total: Worth) -> Reason | None:
    """Why a figure is a lower bound; None where few requests were preempted."""
    if not total.requests or total.preemptions <= MANY_PREEMPTIONS * total.requests:
        return None
    text = (
        f"{total.preemptions:.0f} preemptions in {total.requests:.0f} requests: what they computed again is in no "
        "prompt counter"
    )
    return Reason(text, "give the engine more KV blocks, or fewer sequences (--max-num-seqs)")


def _status(
    net: Estimate | None, avoided: Estimate, total: Worth, occupied_seconds: float, reasons: list[Reason]
) -> Status:
    if any(reason.refuses for reason in reasons):
        return "insufficient_data"
    half = (avoided.high - avoided.low) / 2
    if avoided.point > 0 and half > WIDEST_SHARE * avoided.point and half > WIDEST_OF_TIME * occupied_seconds:
        text = f"the interval is {half / avoided.point:.0%} of the estimate to either side"
        reasons.append(Reason(text, "`kvtally calibrate --probe`, or a longer calibration, narrows it"))
        return "not_proven"
    if net is None:
        return "not_proven"
    touched = total.hbm_tokens or total.external_tokens or total.loads or total.stores
    if touched and net.holds(0.0):
        reasons.append(Reason("the interval of net engine-seconds contains zero"))
        return "not_proven"
    return "ok" if _preempted(total) is None else "lower_bound"


def _tiers(
    total: Worth,
    hbm: Estimate,
    outer: Estimate,
    stall: Estimate | None,
    store: Estimate | None,
    *,
    status: Status,
    occupied_seconds: float,
) -> dict[str, TierSeconds]:
    """Serving-tier attribution: each tier gets what it served, the outer ones net of what loading and storing cost."""
    preempted = _preempted(total)
    tiers = {"hbm": _tier(total.hbm_tokens, hbm, hbm, status, occupied_seconds, preempted=preempted)}
    tokens = {name: getattr(total, f"{name}_tokens") for name in ("dram", "disk", "p2p")}
    rest = total.external_tokens - sum(tokens.values())
    tokens["external"] = rest if rest >= A_TOKEN else 0.0
    named = {"dram": total.dram, "disk": total.disk, "p2p": total.p2p}
    works = total.external_tokens or total.loads != 0 or total.stores != 0
    served = sum(tokens.values())
    # the parts are of the coupling in the middle: they keep their proportions, and what is left is never less than none
    apart = sum(named.values())
    whole = max(apart, total.outer[1]) if tokens["external"] else apart
    points = {name: value * outer.point / whole if whole > 0 else 0.0 for name, value in named.items()}
    points["external"] = outer.point - sum(points.values())
    for name in ("dram", "disk", "p2p", "external"):
        share = tokens[name] / served if served else float(name == "external")
        if not works or not share:
            continue
        ratio = points[name] / outer.point if outer.point else 0.0
        gain = _scaled(outer, ratio) if total.external_tokens else EXACTLY_NOTHING
        net = None if stall is None or store is None else _less(gain, _scaled(stall, share), _scaled(store, share))
        tiers[name] = _tier(tokens[name], gain, net, status, occupied_seconds, preempted=preempted)
    return tiers


def _tier(
    tokens: float,
    avoided: Estimate,
    net: Estimate | None,
    status: Status,
    occupied_seconds: float,
    *,
    preempted: Reason | None,
) -> TierSeconds:
    """A tier's figures with its own status; what refuses the group refuses its tiers."""
    if status in REFUSED:
        return TierSeconds(tokens, avoided, net, status)
    if net is None:
        reason = Reason("its net is not known: nothing tells how long loading and storing took")
        return TierSeconds(tokens, avoided, None, "insufficient_data", (reason,))
    half = (avoided.high - avoided.low) / 2
    if avoided.point > 0 and half > WIDEST_SHARE * avoided.point and half > WIDEST_OF_TIME * occupied_seconds:
        text = f"the interval is {half / avoided.point:.0%} of the estimate to either side"
        return TierSeconds(tokens, avoided, net, "not_proven", (Reason(text),))
    if net != EXACTLY_NOTHING and net.holds(0.0):
        return TierSeconds(tokens, avoided, net, "not_proven", (Reason("its net interval contains zero"),))
    if preempted is not None and tokens:
        return TierSeconds(tokens, avoided, net, "lower_bound", (preempted,))
    return TierSeconds(tokens, avoided, net, "ok")
