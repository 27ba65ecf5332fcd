"""A store that is not there, under the reuse that a ledger saw: what it would save, cost, and hold."""

from __future__ import annotations

from decimal import Decimal
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from kvtally.agent.finding import utc_text
from kvtally.agent.forward_cost.cost import MONTH_HOURS
from kvtally.agent.ledger.columns import HOUR_NS
from kvtally.agent.savings import Estimate, Reason, parts_of, seconds_of
from kvtally.agent.steplaw.supposed import SHARES, supposed
from kvtally.agent.words import REFUSED

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from kvtally.agent.calibration import Calibration
    from kvtally.agent.forward_cost.cost import Store
    from kvtally.agent.model_report.deployment import Deployment
    from kvtally.agent.savings import Loading, Seconds
    from kvtally.agent.steplaw.supposed import Supposed
    from kvtally.agent.valuing import Valued
    from kvtally.agent.worth import Worth

# writing shares the GPU's time with computing: METHOD section 6 saw between none and all of it. ASSUMED
STORE_SHARE = 0.5
UNKNOWN_SHARE = 0.05  # of the hours: those without a figure
_SECONDS_PER_HOUR = 3600


class Idea(NamedTuple):
    """What is supposed.

    extra_share     of the tokens that each request computed: what the store would turn into hits
    loading         whether its loads stop the engine
    replicas        that share it; None: those of the ledger alone
    hourly          what an hour of a replica costs; None where no price is known
    """

    store: Store
    extra_share: float
    loading: Loading
    replicas: int | None
    hourly: Decimal | None
    prices_basis: str


class _Sums(NamedTuple):
    """Of the whole window: tokens, requests and seconds."""

    requests: float
    computed: float
    hbm: float
    external: float
    stores: float
    occupied: float


class _Case(NamedTuple):
    """An idea on a deployment, with what the window counted and what storing a token takes there."""

    idea: Idea
    deployment: Deployment
    sums: _Sums
    per_token: float

    @property
    def hours(self) -> Decimal:
        """From the first interval to the last."""
        start_ns, end_ns = self.deployment.seen_ns
        return Decimal(end_ns - start_ns) / HOUR_NS

    @property
    def capacity(self) -> float:
        """Tokens that the store holds."""
        return self.idea.store.capacity_bytes / self.deployment.machine.kv_bytes

    def computed(self, loaded: float) -> float:
        """Tokens that are computed where so many are loaded."""
        return self.sums.computed + self.sums.external - loaded

    def load_seconds(self, tokens: float, requests: float) -> float:
        """To load so many tokens for so many requests."""
        backend = self.idea.store.backend
        moved = tokens * self.deployment.machine.kv_bytes / backend.bandwidth_bytes_per_second
        return moved + requests * backend.latency_seconds

    def holding(self) -> Decimal:
        """Of the window, whether anything is reused or not; the ledger's replicas bear their part."""
        seen = len(self.deployment.names)
        share = Decimal(seen) / max(self.idea.replicas or seen, seen)
        return self.idea.store.hourly() * self.hours * share


class _Curve(NamedTuple):
    """At each of SHARES: engine-seconds avoided, tokens loaded, requests that load."""

    rows: tuple[tuple[float, float, float], ...]

    def more(self, other: Iterable[tuple[float, float, float]]) -> _Curve:
        added = (tuple(a + b for a, b in zip(*pair, strict=True)) for pair in zip(self.rows, other, strict=True))
        return _Curve(tuple((a, b, c) for a, b, c in added))


def what_if(idea: Idea, deployment: Deployment, values: Sequence[Valued]) -> dict[str, Any]:
    """One idea, worked out; with reasons and without figures where the ledger cannot carry it."""
    own = [one for one in values if one.target_id in deployment.target_ids]
    reasons = _reasons(own)
    answer = _asked(idea, deployment)
    known = [one for one in own if one.worth is not None]
    if not known or any(reason.refuses for reason in reasons) or any(one.is_broken for one in own):
        broken = any(one.is_broken for one in own)
        return answer | _refused("unreconciled" if broken else "insufficient_data", reasons)
    sums = _sums(known)
    case = _Case(idea, deployment, sums, _store_seconds(idea, deployment, sums))
    found: list[tuple[Calibration, Loading, Worth]] = []
    curve = _Curve(((0.0, 0.0, 0.0),) * len(SHARES))
    for law, one in _supposed(idea, deployment, known):
        loads = case.load_seconds(one.worth.external_tokens, one.loading)
        stores = case.per_token * one.worth.computed_tokens
        found.append((law, idea.loading, one.worth._replace(loads=loads, stores=stores)))
        curve = curve.more(one.by_share)
    if not found:
        return answer | _refused("insufficient_data", [Reason("the engine did no work in the window")])
    seconds = seconds_of(parts_of(found), sums.occupied, reasons)
    if seconds.status in REFUSED:
        return answer | _refused(seconds.status, seconds.reasons)
    return answer | _told(case, seconds, curve)


def _reasons(values: Sequence[Valued]) -> list[Reason]:
    """Why there may be no figure, as the savings say it."""
    found: dict[Reason, None] = {}
    for one in values:
        for reason in one.reasons:
            found.setdefault(reason._replace(refuses=False))
    lacking = sum(one.worth is None for one in values)
    if lacking > UNKNOWN_SHARE * len(values):
        found = {reason._replace(refuses=True): None for reason in found}
    if not values:
        return [Reason("no engine interval in the window", "ask for a longer one (--since)", refuses=True)]
    if any(one.is_broken for one in values):
        text = "the engine's own counters do not add up: computed and reused tokens are not its prompt tokens"
        found[Reason(text, "`kvtally ledger audit` names the intervals", refuses=True)] = None
    return list(found)


def _asked(idea: Idea, deployment: Deployment) -> dict[str, Any]:
    store, kv_bytes = idea.store, deployment.machine.kv_bytes
    start_ns, end_ns = deployment.seen_ns
    return {
        "name": store.backend.name,
        "capacity_bytes": store.capacity_bytes,
        "capacity_tokens": int(store.capacity_bytes / kv_bytes),
        "bandwidth_bytes_per_second": store.backend.bandwidth_bytes_per_second,
        "latency_seconds": store.backend.latency_seconds,
        "loading": idea.loading,
        "extra_reuse": idea.extra_share,
        "window": {
            "start": utc_text(start_ns),
            "end": utc_text(end_ns),
            "hours": round((end_ns - start_ns) / HOUR_NS, 6),
        },
        "replicas": list(deployment.names),
    }


_FIGURES = (
    *("tokens", "working_set", "gross_engine_seconds", "stall_engine_seconds", "store_engine_seconds"),
    *("net_engine_seconds", "gross", "reuse_cost", "holding", "net", "net_per_month", "verdict", "pays_from"),
)


def _refused(status: str, reasons: Sequence[Reason]) -> dict[str, Any]:
    told = {"status": status, "reasons": [str(reason) for reason in reasons]}
    return told | dict.fromkeys(_FIGURES) | {"basis": None, "assumptions": []}


def _sums(values: Iterable[Valued]) -> _Sums:
    worths = [one.worth for one in values if one.worth is not None]
    return _Sums(
        sum(one.requests for one in worths),
        sum(one.computed_tokens for one in worths),
        sum(one.hbm_tokens for one in worths),
        sum(one.external_tokens for one in worths),
        sum(one.stores or 0.0 for one in worths),
        sum(one.law_seconds for one in worths),
    )


def _supposed(idea: Idea, deployment: Deployment, values: Sequence[Valued]) -> Iterable[tuple[Calibration, Supposed]]:
    """Each hour of each replica that did something, with the law that values it."""
    start_ns, end_ns = deployment.window_ns
    for subject in deployment.subjects:
        own = {one.row.target_id for one in subject.observed.rows}
        for one in values:
            if one.target_id not in own or one.worth is None or one.calibration is None:
                continue
            hour_ns = one.hour_ns - one.hour_ns % HOUR_NS
            span = (max(hour_ns, start_ns), min(hour_ns + HOUR_NS, end_ns))
            law = one.calibration
            found = supposed(
                deployment.machine, subject.series, span, law, before=one.worth, extra_share=idea.extra_share
            )
            if found is not None:
                yield law, found


def _store_seconds(idea: Idea, deployment: Deployment, sums: _Sums) -> float:
    """Engine-seconds that storing a token takes: what the present tier's takes, else a half of writing it."""
    if sums.stores and sums.computed:
        return sums.stores / sums.computed
    return STORE_SHARE * deployment.machine.kv_bytes / idea.store.backend.bandwidth_bytes_per_second


def _told(case: _Case, seconds: Seconds, curve: _Curve) -> dict[str, Any]:
    stall, store, net = _known(seconds)
    idea, sums = case.idea, case.sums
    loaded = _at(curve, idea.extra_share)[1]
    computed = case.computed(loaded)
    return {
        "status": seconds.status,
        "reasons": [str(reason) for reason in seconds.reasons],
        "tokens": {
            "computed": round(sums.computed),
            "hbm": round(sums.hbm),
            "external": round(sums.external),
            "extra": round(loaded - sums.external),
        },
        "working_set": {
            "computed_tokens": round(computed),
            "fits": computed <= case.capacity,
            "kept_hours": case.capacity / computed * float(case.hours) if computed else None,
        },
        "gross_engine_seconds": seconds.avoided._asdict(),
        "stall_engine_seconds": stall._asdict(),
        "store_engine_seconds": store._asdict(),
        "net_engine_seconds": net._asdict(),
        **_money(case, seconds),
        "pays_from": _pays_from(case, curve),
        "basis": {
            "tokens": "MEASURED",
            "extra_reuse": "ASSUMED" if idea.extra_share else None,
            "engine_seconds": "MODELLED",
            "money": None if idea.hourly is None else idea.prices_basis,
        },
        "assumptions": _assumptions(idea, sums),
    }


def _known(seconds: Seconds) -> tuple[Estimate, Estimate, Estimate]:
    """Stall, store and net of a store whose loading and storing are worked out, not timed."""
    assert seconds.stall is not None  # noqa: S101
    assert seconds.store is not None  # noqa: S101
    assert seconds.net is not None  # noqa: S101
    return seconds.stall, seconds.store, seconds.net


def _money(case: _Case, seconds: Seconds) -> dict[str, Any]:
    holding, hourly = case.holding(), case.idea.hourly
    stall, store, within = _known(seconds)
    if hourly is None:
        nothing = dict.fromkeys(("gross", "reuse_cost", "net", "net_per_month", "verdict"))
        return nothing | {"holding": f"{holding:.9f}"}
    rate = hourly / _SECONDS_PER_HOUR
    net = [Decimal(bound) * rate - holding for bound in within]
    months = MONTH_HOURS / case.hours
    return {
        "gross": _amounts(Decimal(bound) * rate for bound in seconds.avoided),
        "reuse_cost": {
            "stall": f"{Decimal(stall.point) * rate:.9f}",
            "store": f"{Decimal(store.point) * rate:.9f}",
        },
        "holding": f"{holding:.9f}",
        "net": _amounts(net),
        "net_per_month": _amounts(bound * months for bound in net),
        "verdict": "pays" if net[0] > 0 else "does not pay" if net[2] < 0 else "not sure",
    }


def _amounts(bounds: Iterable[Decimal]) -> dict[str, str]:
    return dict(zip(Estimate._fields, (f"{bound:.9f}" for bound in bounds), strict=True))


def _pays_from(case: _Case, curve: _Curve) -> dict[str, float | None] | None:
    """The least extra reuse at which the store pays, and what that is a month; None without a price.

    None in it where no share of what was computed is enough.
    """
    idea = case.idea
    if not idea.hourly:
        return None
    held = float(case.holding() / idea.hourly * _SECONDS_PER_HOUR)
    nets = []
    for avoided, tokens, requests in curve.rows:
        copies = case.load_seconds(tokens, requests) + case.per_token * case.computed(tokens)
        nets.append(avoided - held - (0.0 if idea.loading == "asynchronous" else copies))
    share = _crossing(nets)
    if share is None:
        return dict.fromkeys(("extra_reuse", "tokens_per_month", "reuses_per_month_of_a_held_token"))
    tokens = _at(curve, share)[1] * float(MONTH_HOURS / case.hours)
    return {
        "extra_reuse": share,
        "tokens_per_month": tokens,
        "reuses_per_month_of_a_held_token": tokens / case.capacity,
    }


def _crossing(nets: Sequence[float]) -> float | None:
    """Where the net passes zero first, straight between two shares."""
    if nets[0] >= 0:
        return 0.0
    for (low, before), (high, behind) in pairwise(zip(SHARES, nets, strict=True)):
        if behind >= 0:
            return low + (high - low) * -before / (behind - before)
    return None


def _at(curve: _Curve, share: float) -> tuple[float, float, float]:
    """The curve at a share, straight between two of SHARES."""
    place = min(int(share * (len(SHARES) - 1)), len(SHARES) - 2)
    within = share * (len(SHARES) - 1) - place
    first, second, third = (a + (b - a) * within for a, b in zip(curve.rows[place], curve.rows[place + 1], strict=True))
    return first, second, third


def _assumptions(idea: Idea, sums: _Sums) -> list[str]:
    """What the figures take for granted, in words."""
    found = []
    if sums.external:
        found.append("the tokens that came from outside HBM come from this store instead, at its bandwidth")
    if idea.extra_share:
        found.append(
            f"{idea.extra_share:.0%} of the tokens that each request computed are there and lengthen its reused "
            "prefix: no counter tells which of them were seen before"
        )
    else:
        found.append("no more is reused than was: --extra-reuse 20% supposes that a part of what was computed is")
    if idea.loading == "asynchronous":
        found.append("loading and storing hide behind other work: up to all of them is in the interval")
    elif sums.stores:
        found.append("storing takes as long a token as the present tier's does")
    else:
        found.append(f"half of the time that writing takes is lost to the engine ({STORE_SHARE:.0%})")
    found.append("the traffic goes on as in the window")
    return found
