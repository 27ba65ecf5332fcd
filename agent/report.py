"""The cost report: facts grouped as asked, as the JSON of CLI.md."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Any, NamedTuple

from kvtally.agent.accounts import Payment, Window, facts_of, widened
from kvtally.agent.finding import Finding
from kvtally.agent.grouping import default_window, finding_json, in_order, key_of, union, unique, window_json
from kvtally.agent.price import nano_to_text, rate_text
from kvtally.agent.split import Split, lent
from kvtally.agent.unit_cost import Tokens, tokens_of, unit_costs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvtally.agent.facts import Facts
    from kvtally.agent.ledger.read import LedgerReader
    from kvtally.agent.price import Rate
    from kvtally.agent.rates import RateBook

RESOURCES = ("gpu", "server", "energy", "dram", "storage", "network", "platform", "unused_commitment")
OVERHEADS = ("idle", "asleep", "warm_up", "unallocated")


class Report(NamedTuple):
    """The answer as values: `groups` and `findings` as they print in JSON."""

    window: Window | None  # None: the ledger holds no interval at all
    covered_ns: int
    currency: str
    groups: list[dict[str, Any]]
    findings: list[Finding]

    def as_json(self) -> dict[str, Any]:
        """The JSON of CLI.md."""
        return {
            "window": window_json(self.window, self.covered_ns),
            "currency": self.currency,
            "groups": self.groups,
            "findings": [finding_json(finding) for finding in self.findings],
        }


def cost_report(
    reader: LedgerReader, window: Window | None, by: Sequence[str], book: RateBook, payment: Payment
) -> Report:
    """Cost of a window by the dimensions of `by`; with no window, the default one of CLI.md."""
    extent = reader.extent()
    if extent is None:
        return Report(None, 0, book.currency, [], [])
    asked = window or default_window(extent)
    asked = widened(asked, reader.raw_from(), extent[1])
    facts = facts_of(reader, asked, book, payment)
    caches = {target.name.split("/")[0] for target in reader.targets().values() if target.kind == "cache"}
    facts = _with_laws(facts)
    groups: dict[tuple[tuple[str, str | None], ...], list[Facts]] = {}
    for one in facts:
        groups.setdefault(key_of(one, by), []).append(one)
    found = [finding for one in facts for finding in one.findings]
    rendered = []
    for key, members in in_order(groups):
        group, findings = _group(dict(key), members, caches)
        rendered.append(group)
        found += findings
    spans = union([(one.start_ns, one.end_ns) for one in facts if one.replica is not None])
    real = Window(spans[0][0], spans[-1][1]) if spans else asked
    found += reader.findings(real.start_ns, real.end_ns)
    return Report(real, sum(b - a for a, b in spans), book.currency, rendered, unique(found))


def _with_laws(facts: Sequence[Facts]) -> list[Facts]:
    """Hours that could not carry a law of their own borrow their replica's best: the one from the most slices."""
    best: dict[str, Split] = {}
    for one in facts:
        if one.replica is not None and one.split is not None:
            known = best.get(one.replica.name)
            if known is None or one.split.slices > known.slices:
                best[one.replica.name] = one.split
    filled: list[Facts] = []
    for one in facts:
        law = best.get(one.replica.name) if one.replica is not None and one.split is None else None
        steps, computed = one.work.get("steps"), one.work.get("computed_tokens")
        if law is not None and steps is not None and computed is not None:
            filled.append(one._replace(split=lent(law, steps, computed)))
        else:
            filled.append(one)
    return filled


def _group(by: dict[str, str | None], facts: list[Facts], caches: set[str]) -> tuple[dict[str, Any], list[Finding]]:
    tokens = tokens_of(facts)
    state_ns = {state: sum(one.state_ns.get(state, 0) for one in facts) for state in ("occupied", *OVERHEADS)}
    shares = _prefill_ns(facts)
    outer = bool(tokens.external) or any(one.replica and one.replica.name.split("/")[0] in caches for one in facts)
    none_loaded = None if outer else 0.0
    priced = all(one.lines is not None for one in facts)
    lines = [line for one in facts for line in one.lines or ()]
    cost = _cost(lines) if priced else None
    held = [one for one in facts if one.replica is not None]
    expected = _expected_ns(held)
    rates = sorted({line.rate for line in lines}, key=rate_text)
    findings = [*_token_findings(facts, tokens), *_split_findings(facts, shares, state_ns["occupied"])]
    if outer:
        findings.append(_not_parted(facts))
    group = {
        "by": by,
        "tokens": {
            "prompt": tokens.prompt,
            "computed": tokens.computed,
            "cached": _cached(tokens),
            "generated": tokens.generated,
        },
        "engine_seconds": {
            "prefill": None if shares is None else shares[1] / 1e9,
            "decode": None if shares is None else (state_ns["occupied"] - shares[1]) / 1e9,
            "stall": none_loaded,
            "store": none_loaded,
            **{state: state_ns[state] / 1e9 for state in ("idle", "asleep", "warm_up", "unallocated")},
            "occupied": state_ns["occupied"] / 1e9,
        },
        "prefill_share": _share_json(shares, state_ns["occupied"]),
        "cost": cost,
        "cost_per_million": unit_costs(facts, tokens, shares, state_ns["occupied"], outer=outer) if priced else None,
        "basis": {
            "tokens": "MODELLED" if tokens.derived else "MEASURED",
            "states": "MODELLED" if any(one.modelled for one in facts) else "MEASURED",
            "cost": None if not priced else _basis(rates),
            "active": None if not priced else "MODELLED" if any(one.modelled for one in facts) else _basis(rates),
            "split": None if shares is None else "MODELLED",
        },
        "rates": [rate_text(rate) for rate in rates],
        "coverage": round(min(1.0, sum(one.covered_ns for one in held) / expected), 6) if expected else None,
    }
    return group, findings


def _cached(tokens: Tokens) -> dict[str, int | None]:
    split = 0 if tokens.external == 0 else None  # dram, disk and p2p of tokens that nobody splits are unknown
    return {"hbm": tokens.hbm, "dram": split, "disk": split, "p2p": split, "external": tokens.external}


def _basis(rates: Sequence[Rate]) -> str:
    """ASSUMED if any of the money is; what is charged as 0, inside another price, decides only where it is alone."""
    deciding = [rate for rate in rates if rate.price_nano] or rates
    return "ASSUMED" if any(rate.basis == "ASSUMED" for rate in deciding) or not deciding else "MEASURED"


def _expected_ns(facts: Sequence[Facts]) -> int:
    """Time that full coverage would have: each replica from its first to its last interval in the window."""
    spans: dict[str, tuple[int, int]] = {}
    for one in facts:
        name = one.replica.name if one.replica else ""
        low, high = spans.get(name, (one.start_ns, one.end_ns))
        spans[name] = (min(low, one.start_ns), max(high, one.end_ns))
    return sum(high - low for low, high in spans.values())


def _prefill_ns(facts: Sequence[Facts]) -> tuple[int, int, int] | None:
    """Prefill nanoseconds (low, point, high) of the occupied time; None where some of it has no law."""
    total = [Fraction(0)] * 3
    for one in facts:
        occupied = one.state_ns.get("occupied", 0)
        if not occupied:
            continue
        if one.split is None:
            return None
        for slot, share in enumerate((one.split.low, one.split.point, one.split.high)):
            total[slot] += Fraction(share) * occupied
    low, point, high = (round(part) for part in total)
    return low, point, high


def _share_json(shares: tuple[int, int, int] | None, occupied: int) -> dict[str, float] | None:
    if shares is None or not occupied:
        return None
    return {name: round(part / occupied, 4) for name, part in zip(("low", "point", "high"), shares, strict=True)}


def _cost(lines: Sequence[Any]) -> dict[str, Any]:
    by_resource = dict.fromkeys(RESOURCES, 0)
    overhead = dict.fromkeys(OVERHEADS, 0)
    for line in lines:
        by_resource[line.resource if line.state != "unused" else "unused_commitment"] += line.amount_nano
        if line.state in overhead:
            overhead[line.state] += line.amount_nano
    texts: dict[str, Any] = {"total": nano_to_text(sum(by_resource.values()))}
    texts |= {resource: nano_to_text(amount) for resource, amount in by_resource.items()}
    texts["of_which"] = {state: nano_to_text(amount) for state, amount in overhead.items()}
    return texts


def _span(facts: Sequence[Facts]) -> tuple[int, int]:
    return min(one.start_ns for one in facts), max(one.end_ns for one in facts)


def _token_findings(facts: Sequence[Facts], tokens: Tokens) -> list[Finding]:
    start, end = _span(facts)
    if tokens.derived:
        message = (
            "vLLM before 0.16 does not count computed tokens: they are prompt tokens less prefix-cache hits, which "
            "it counts on every scheduling attempt, so reuse may be overstated under back-pressure"
        )
        return [Finding("tokens_derived", "info", "", start, end, message)]
    if tokens.prompt and tokens.computed is None:
        message = "the engine does not tell which prompt tokens it computed, and its lookups do not add up to them"
        return [Finding("tokens_unknown", "warning", "", start, end, message)]
    return []


def _split_findings(facts: Sequence[Facts], shares: tuple[int, int, int] | None, occupied: int) -> list[Finding]:
    if shares is not None or not occupied:
        return []
    start, end = _span(facts)
    message = (
        "prefill and decode cannot be told apart here, so input and output have no price of their own: it takes "
        "seconds in which the engine worked (GPM graphics utilisation, or CPU seconds of an engine without a GPU), "
        "at least 8 slices of 2 s, and a load that varies"
    )
    return [Finding("split_unknown", "info", "", start, end, message)]


def _not_parted(facts: Sequence[Facts]) -> Finding:
    start, end = _span(facts)
    message = (
        "loading from and storing to the outer cache tier takes engine time that is still inside prefill and decode: "
        "stall and store are unknown, and so is the price of a token from that tier"
    )
    return Finding("stall_not_parted", "info", "", start, end, message)
