"""The savings report: what reuse was worth, grouped as asked, as the JSON of CLI.md."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from kvtally.agent import accounts
from kvtally.agent.accounts import Payment, Window, facts_in, settled_hours_of, widened
from kvtally.agent.disaggregation import DECODE
from kvtally.agent.facts import CONNECTOR, VLLM, among
from kvtally.agent.finding import Finding, utc_text
from kvtally.agent.grouping import default_window, finding_json, in_order, key_of, union, unique, window_json
from kvtally.agent.ledger.columns import HOUR_NS
from kvtally.agent.lookup_tiers import BY_LOOKUPS
from kvtally.agent.outer_tiers import Behind, is_apart, outer_tiers
from kvtally.agent.price import nano_to_text, rate_text
from kvtally.agent.savings import Reason, Seconds, loading_of, nothing_reused, parts_of, seconds_of, with_held
from kvtally.agent.savings_money import (
    HOLDING,
    TIME_RESOURCES,
    Money,
    holding_of,
    mean_rate,
    money_of,
    rate_of,
    weighed,
    weight_of,
)
from kvtally.agent.valuing import HANDED, TRANSFERRED, Laws, Valued, values_of
from kvtally.agent.words import REFUSED, RUNGS
from kvtally.agent.worth import A_TOKEN

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kvtally.agent.calibration import Calibration
    from kvtally.agent.facts import Facts
    from kvtally.agent.grouping import Key
    from kvtally.agent.ledger.read import LedgerReader
    from kvtally.agent.outer_tiers import OuterTiers
    from kvtally.agent.rates import RateBook
    from kvtally.agent.savings import Estimate
    from kvtally.agent.savings_money import NanoEstimate

VERSION = "1"
# of the reused tokens: what may lie in hours without a figure before the group has none
UNKNOWN_SHARE = 0.05


class Group(NamedTuple):
    """One group: its facts, what they were worth, and the figures.

    apart   external tokens by tier of hours that no law parts, as their engine or a cache's lookups tell
    """

    by: dict[str, str | None]
    facts: tuple[Facts, ...]
    values: tuple[Valued, ...]
    seconds: Seconds | None
    money: Money | None
    reasons: tuple[Reason, ...]
    apart: tuple[OuterTiers, ...] = ()

    @property
    def status(self) -> str:
        """The status as it prints; counters that contradict each other carry no figure, with a law or without."""
        if any(value.is_broken for value in self.values):
            return "unreconciled"
        return "insufficient_data" if self.seconds is None else self.seconds.status


class SavingsReport(NamedTuple):
    """The answer as values."""

    window: Window | None
    covered_ns: int
    currency: str
    groups: tuple[Group, ...]
    findings: tuple[Finding, ...]

    def as_json(self) -> dict[str, Any]:
        """The JSON of CLI.md."""
        laws = {
            _identity(value.calibration): value.calibration
            for group in self.groups
            for value in group.values
            if value.calibration is not None
        }
        rungs = [law.rung for law in laws.values()]
        return {
            "window": window_json(self.window, self.covered_ns),
            "currency": self.currency,
            "method": {
                "version": VERSION,
                "rung": min(rungs, key=lambda rung: (rung not in RUNGS, rung), default=None),
                "calibrations": [calibration_json(law) for law in laws.values()],
            },
            "groups": [group_json(group) for group in self.groups],
            "findings": [finding_json(finding) for finding in self.findings],
        }


def savings_report(
    reader: LedgerReader,
    window: Window | None,
    by: Sequence[str],
    book: RateBook,
    payment: Payment,
    *,
    laws: Laws | None = None,
) -> SavingsReport:
    """Savings of a window by the dimensions of `by`; with no window, the default one of CLI.md.

    `laws`: calibrations to use in place of those that the ledger's settled hours name.
    """
    extent = reader.extent()
    if extent is None:
        return SavingsReport(None, 0, book.currency, (), ())
    targets = reader.targets()
    asked = widened(window or default_window(extent), reader.raw_from(), extent[1])
    parts = accounts.parts_of(reader, asked)
    by_part = [
        [one for one in facts_in(reader, part, book, payment, targets) if one.replica is not None] for part in parts
    ]
    settled = settled_hours_of(reader, asked) if laws is None else []
    values = values_of(reader, (asked.start_ns, asked.end_ns), targets, laws or Laws(reader, targets), settled)
    worths = {(value.hour_ns, value.target_id): value for value in values}
    by_part = [[_own_reuse(one, worths.get(_place(one))) for one in members] for members in by_part]
    facts = [one for members in by_part for one in members]
    parted = {place for place, value in worths.items() if value.worth is not None and is_apart(value.worth)}
    behind = Behind(targets)
    apart: dict[tuple[int, int], OuterTiers] = {}
    for part, members in zip(parts, by_part, strict=True):
        apart |= outer_tiers(reader, part, members, behind, targets, parted=parted)
    groups: dict[Key, list[Facts]] = {}
    for one in facts:
        groups.setdefault(key_of(one, by), []).append(one)
    done = tuple(
        _group(dict(key), members, worths)._replace(apart=_of(members, apart)) for key, members in in_order(groups)
    )
    spans = union([(one.start_ns, one.end_ns) for one in facts])
    real = Window(spans[0][0], spans[-1][1]) if spans else asked
    found = [finding for one in facts for finding in one.findings]
    found += reader.findings(real.start_ns, real.end_ns)
    return SavingsReport(real, sum(b - a for a, b in spans), book.currency, done, tuple(unique(found)))


def _own_reuse(one: Facts, value: Valued | None) -> Facts:
    """A replica-hour without the tokens that were handed to it, where these are no reuse of its own."""
    if value is None or HANDED not in value.reasons:
        return one
    return one._replace(work={**one.work, "external_tokens": 0, "external_hit_tokens": 0})


def _of(facts: Sequence[Facts], apart: Mapping[tuple[int, int], OuterTiers]) -> tuple[OuterTiers, ...]:
    """The tiers of these replica-hours."""
    return tuple(apart[place] for place in dict.fromkeys(_place(one) for one in facts) if place in apart)


def _group(by: dict[str, str | None], members: list[Facts], worths: dict[tuple[int, int], Valued]) -> Group:
    facts = [one for one in members if one.replica is None or one.replica.role != DECODE]
    pairs = [(one, worths.get(_place(one))) for one in facts]
    values = tuple(value for _, value in pairs if value is not None)
    known = [value for value in values if value.worth is not None and value.calibration is not None]
    reasons = [*_told_once(pairs), *_lacking(pairs)]
    reasons += [TRANSFERRED] if len(facts) < len(members) else []
    occupied = sum(one.state_ns.get("occupied", 0) for one in facts) / 1e9
    broken = any(value.is_broken for value in values)
    if broken:
        text = "the engine's own counters do not add up: computed and reused tokens are not its prompt tokens"
        reasons = [Reason(text, "`kvtally ledger audit` names the intervals", refuses=True), *reasons]
    if not known and not broken and _is_without_reuse(facts, values):
        held = [tier for tier, amount in holding_of(facts).items() if amount]
        seconds = with_held(nothing_reused(), held)
        money, unpriced = _money(pairs, seconds)
        seconds = weighed(seconds, money)
        return Group(by, tuple(facts), values, seconds, money, (*seconds.reasons, *unpriced))
    if not known:
        if not reasons:
            reasons = [Reason("no engine interval in the window", "ask for a longer one (--since)", refuses=True)]
        return Group(by, tuple(facts), values, None, None, tuple(reasons))
    parts = parts_of(
        (value.calibration, value.loading, value.worth)
        for value in known
        if value.calibration is not None and value.worth is not None
    )
    held = [tier for tier, amount in holding_of(facts).items() if amount]
    seconds = with_held(seconds_of(parts, occupied, reasons, naming=_naming(facts)), held)
    if broken:
        seconds = seconds._replace(status="unreconciled")
    money, unpriced = _money(pairs, seconds)
    seconds = weighed(seconds, money)
    return Group(by, tuple(facts), values, seconds, money, (*seconds.reasons, *unpriced))


def _naming(facts: Sequence[Facts]) -> str:
    """How to name a connector whose way of loading is known; only vLLM has one."""
    found = {one.replica.name: one.replica for one in facts if one.replica is not None}
    own = [one for _, one in sorted(found.items()) if one.engine == VLLM and loading_of(one.connector) == "unknown"]
    if not own:
        return ""
    more = f", and so for {len(own) - 1} more" if len(own) > 1 else ""
    return f"name the connector {own[0].in_config(CONNECTOR)}{more}"


def _is_without_reuse(facts: Sequence[Facts], values: Sequence[Valued]) -> bool:
    """Whether it is known that no token was reused and that no outer tier could have been at work."""
    reused = [one.work.get(name) for one in facts for name in ("hbm_tokens", "external_tokens")]
    return bool(values) and all(count == 0 for count in reused) and not any(value.has_outer for value in values)


def _place(facts: Facts) -> tuple[int, int]:
    assert facts.replica is not None  # noqa: S101  # GPUs that nobody holds were left out
    return facts.period_ns - facts.period_ns % HOUR_NS, facts.replica.target_id


def _lacking(pairs: Sequence[tuple[Facts, Valued | None]]) -> list[Reason]:
    """Whether too much of the reuse lies where there is no figure."""
    reused = lacking = 0
    for one, value in pairs:
        counts = [one.work.get(name) for name in ("hbm_tokens", "external_tokens")]
        # where it is not known how many there are, there may be as many as the prompts have
        tokens = sum(count or 0 for count in counts) if None not in counts else one.work.get("prompt_tokens") or 0
        reused += tokens
        lacking += tokens if value is None or value.worth is None else 0
    if not lacking:
        return []
    text = f"{lacking / reused:.0%} of the reused tokens lie in hours without a figure"
    return [Reason(text, "", refuses=lacking > UNKNOWN_SHARE * reused)]


def _told_once(pairs: Sequence[tuple[Facts, Valued | None]]) -> list[Reason]:
    """What the values of a group give as reasons; in a group of several replicas each names those that it is of."""
    found: dict[str, tuple[Reason, set[str]]] = {}
    every: set[str] = set()
    for one, value in pairs:
        name = "" if one.replica is None else one.replica.name
        every.add(name)
        for reason in () if value is None else value.reasons:
            # a replica that has no law refuses the group only by the tokens that it leaves out
            found.setdefault(reason.text, (reason._replace(refuses=False), set()))[1].add(name)
    return [
        reason._replace(text=f"{among(names)}: {reason.text}") if len(every) > 1 else reason
        for reason, names in found.values()
    ]


def _money(pairs: Sequence[tuple[Facts, Valued | None]], seconds: Seconds) -> tuple[Money | None, tuple[Reason, ...]]:
    """The group's money; None, and why, where a price is missing."""
    if seconds.status in REFUSED:
        return None, ()
    rates = []
    for one, value in pairs:
        rate = rate_of(one)
        if rate is None:
            why = next((finding.message for finding in one.findings), "a price is missing")
            return None, (Reason(f"seconds are shown, money is not: {why}"),)
        rates.append((rate, 0.0 if value is None else weight_of(value.worth)))
    return money_of(seconds, mean_rate(rates), holding_of(one for one, _ in pairs)), ()


def group_json(group: Group) -> dict[str, Any]:
    """One group as it prints."""
    seconds, money = group.seconds, group.money
    refused = seconds is None or seconds.status in REFUSED
    shown = None if refused else seconds
    return {
        "by": group.by,
        "status": group.status,
        "reasons": [str(reason) for reason in group.reasons],
        "reused_tokens": _tokens(group),
        "avoided_engine_seconds": None if shown is None else estimate_json(shown.avoided),
        "reuse_engine_seconds": {
            "stall": None if shown is None else _estimate_json(shown.stall),
            "store": None if shown is None else _estimate_json(shown.store),
        },
        "net_engine_seconds": None if shown is None else _estimate_json(shown.net),
        "tiers": {} if seconds is None else {name: _tier_json(group, name) for name in seconds.tiers},
        "gross": _nano_json(money.gross if money else None),
        "reuse_cost": {
            "stall": None if money is None or money.stall is None else nano_to_text(money.stall),
            "store": None if money is None or money.store is None else nano_to_text(money.store),
        },
        "holding": None if money is None else nano_to_text(money.holding),
        "net": _nano_json(money.net if money else None),
        "realised": _nano_json(money.realised if money else None),
        "capacity_bound_share": None if seconds is None else _share(seconds.capacity_bound_share),
        "latency_seconds": None if shown is None or shown.latency is None else round(shown.latency, 3),
        "engine_second": None if money is None else nano_to_text(round(money.rate_nano)),
        "rates": [] if money is None else _rates(group),
        "calibrations": sorted({_number(value.calibration) for value in group.values if value.calibration is not None}),
        "basis": {
            "tokens": "MODELLED" if any(one.work.get(BY_LOOKUPS) for one in group.facts) else "MEASURED",
            "tiers": _tiers_basis(group),
            "engine_seconds": None if shown is None else "MODELLED",
            "money": None if money is None else _money_basis(group),
        },
        "tiers_untold": _why_untold(group),
    }


def _tokens(group: Group) -> dict[str, int | None]:
    """Reused tokens by tier, as counted; None where the engine does not tell."""
    counted = {name: [one.work.get(f"{name}_tokens") for one in group.facts] for name in ("hbm", "external")}
    totals = {
        name: None if any(value is None for value in values) else sum(value or 0 for value in values)
        for name, values in counted.items()
    }
    apart = {
        name: sum(round(getattr(value.worth, f"{name}_tokens")) for value in group.values if value.worth is not None)
        + sum(round(one.named()[name]) for one in group.apart)
        for name in ("dram", "disk", "p2p")
    }
    outer = totals["external"]
    split: dict[str, int | None] = dict(apart) if any(apart.values()) or outer == 0 else dict.fromkeys(apart)
    rest = None if outer is None else max(0, outer - sum(apart.values()))
    return {"hbm": totals["hbm"], **split, "external": rest}


def _why_untold(group: Group) -> str | None:
    """Why nothing tells the outer tiers apart, where a longer window would."""
    return next((one.why for one in group.apart if one.why), None) if _tiers_basis(group) is None else None


def _tiers_basis(group: Group) -> str | None:
    """Who tells the outer tiers apart: the engine's counters, or an estimate by the cache's lookups; None: nobody."""
    worths = [value.worth for value in group.values if value.worth is not None]
    if any(one.estimated_tokens >= A_TOKEN for one in worths) or any(one.estimated >= A_TOKEN for one in group.apart):
        return "MODELLED"
    told = any(is_apart(worth) for worth in worths) or any(sum(one.named().values()) for one in group.apart)
    return "MEASURED" if told else None


def _tier_json(group: Group, name: str) -> dict[str, Any]:
    assert group.seconds is not None  # noqa: S101  # asked only for groups that have tiers
    tier = group.seconds.tiers[name]
    refused = group.seconds.status in REFUSED
    money = None if group.money is None else group.money.tiers[name]
    return {
        "status": group.seconds.status if refused else tier.status,
        "reasons": [str(reason) for reason in tier.reasons],
        "tokens": round(tier.tokens),
        "avoided_engine_seconds": None if refused else estimate_json(tier.avoided),
        "net_engine_seconds": None if refused else _estimate_json(tier.net),
        "gross": _nano_json(money.gross if money else None),
        "holding": None if money is None else nano_to_text(money.holding),
        "net": _nano_json(money.net if money else None),
    }


def estimate_json(estimate: Estimate) -> dict[str, float]:
    """Seconds with their interval as they print."""
    return {name: round(bound, 6) for name, bound in estimate._asdict().items()}


def _estimate_json(estimate: Estimate | None) -> dict[str, float] | None:
    return None if estimate is None else estimate_json(estimate)


def _nano_json(amount: NanoEstimate | None) -> dict[str, str] | None:
    return None if amount is None else {name: nano_to_text(value) for name, value in amount._asdict().items()}


def _share(share: float | None) -> float | None:
    return None if share is None else round(share, 6)


def _money_basis(group: Group) -> str:
    """ASSUMED if any price behind it is, else MODELLED: savings are never measured."""
    lines = [line for one in group.facts for line in one.lines or () if line.rate.price_nano]
    return "ASSUMED" if not lines or any(line.rate.basis == "ASSUMED" for line in lines) else "MODELLED"


def _rates(group: Group) -> list[str]:
    """The prices behind the money: of engine time, and of what is held where that has one."""
    lines = [line for one in group.facts for line in one.lines or ()]
    return sorted(
        {
            rate_text(line.rate)
            for line in lines
            if line.resource in TIME_RESOURCES or (line.resource in HOLDING and line.rate.price_nano)
        }
    )


def _identity(law: Calibration) -> tuple[int | None, str]:
    return law.id, law.fingerprint.text()


def _number(law: Calibration) -> str:
    return "not stored" if law.id is None else str(law.id)


def calibration_json(law: Calibration) -> dict[str, Any]:
    """What a figure names of the law behind it."""
    evidence = law.evidence
    return {
        "id": law.id,
        "fingerprint": law.fingerprint.text(),
        "rung": law.rung,
        "prior": law.prior,
        "evidence": {
            "start": utc_text(evidence.start_ns),
            "end": utc_text(evidence.end_ns),
            "source": evidence.source,
            "windows": evidence.windows,
            "alone": evidence.singles,
            "probes": evidence.probes,
            "requests": evidence.requests,
            "steps": evidence.steps,
            "occupied_seconds": evidence.occupied_seconds,
        },
    }
