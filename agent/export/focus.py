"""Charges as rows of a FOCUS cost and usage dataset: one row a charge, its cost as the ledger has it, to the nano."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from fractions import Fraction
from typing import TYPE_CHECKING, Any, NamedTuple

from kvtally.agent.accounts import Payment, Window, facts_in, hour_of, parts_of, widened
from kvtally.agent.commitments import UNUSED
from kvtally.agent.export.focus_columns import COLUMNS
from kvtally.agent.export.rows import number
from kvtally.agent.grouping import default_window, key_of
from kvtally.agent.ledger.columns import HOUR_NS
from kvtally.agent.price import MILLIJOULES_PER_KWH, NANO, UNITS, instant_text, is_used_up, rate_text
from kvtally.agent.report import cost_report
from kvtally.agent.savings_report import savings_report

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from kvtally.agent.accounts import Part
    from kvtally.agent.export.rows import Row, Value
    from kvtally.agent.facts import Facts, Line
    from kvtally.agent.grouping import Key
    from kvtally.agent.ledger.read import LedgerReader
    from kvtally.agent.price import Rate
    from kvtally.agent.rates import RateBook
    from kvtally.agent.savings_report import Group

# what tokens and savings are told of: a replica as it was in one hour
BY = ("replica", "model", "cluster", "namespace", "tenant", "hour")

_WORDS = {"gpu": "GPU", "server": "Server", "gib": "GiB", "tib": "TiB", "service": "Service"}
_METERS = {
    "gpu": "GPU Time",
    "server": "Server Time",
    "energy": "Energy",
    "dram": "Memory Held",
    "storage": "Storage Held",
    "network": "Data Transfer",
    "platform": "Platform Time",
}
_STATES = {
    "occupied": "engine at work",
    "idle": "engine idle",
    "asleep": "engine asleep",
    "warm_up": "engine starting",
    "unallocated": "held by no engine",
    UNUSED: "reserved and not used",
}
_CACHED = {"hbm": "HBM", "dram": "DRAM", "disk": "Disk", "p2p": "P2P", "external": "External"}
_BYTES_PER_GIB = 2**30


class Issuer(NamedTuple):
    """Who charges whom: the name of what makes the GPUs available here, and the account that is charged."""

    provider: str = "kvtally"
    account: str = "kvtally"


class Told(NamedTuple):
    """What the reports say of a replica's hours: their tokens as they print in JSON, and their savings."""

    tokens: Mapping[Key, Mapping[str, Any]]
    savings: Mapping[Key, Group]


class FocusCharges:
    """The charges of a ledger, part by part of a window.

    unpriced    hours of engines and GPUs without a price, which have no row: `kvtally cost` says why
    """

    def __init__(self, reader: LedgerReader, book: RateBook, payment: Payment, issuer: Issuer) -> None:
        self._reader, self._book, self._payment, self._issuer = reader, book, payment, issuer
        self.unpriced = 0

    def rows(self, window: Window | None) -> Iterator[Row]:
        """A row for every charge in the window, in order of time; with no window, the default one of CLI.md."""
        extent = self._reader.extent()
        if extent is None:
            return
        targets = self._reader.targets()
        asked = widened(window or default_window(extent), self._reader.raw_from(), extent[1])
        for part in parts_of(self._reader, asked):
            facts = facts_in(self._reader, part, self._book, self._payment, targets)
            self.unpriced += sum(one.lines is None for one in facts)
            if any(one.lines for one in facts):
                yield from rows_of(facts, part.hours, self._told(part), self._issuer, self._book.currency)

    def _told(self, part: Part) -> Told:
        asked = (self._reader, part.window, BY, self._book, self._payment)
        tokens = {tuple(group["by"].items()): group["tokens"] for group in cost_report(*asked).groups}
        savings = {tuple(group.by.items()): group for group in savings_report(*asked).groups}
        return Told(tokens, savings)


def rows_of(
    facts: Sequence[Facts], revisions: Mapping[int, int], told: Told, issuer: Issuer, currency: str
) -> Iterator[Row]:
    """A row for every line of the facts; `revisions` of the hours that are settled."""
    done: set[Key] = set()
    for one in facts:
        lines = one.lines or ()
        bearer: Line | None = None
        key = key_of(one, BY)
        if one.replica is not None and lines and key not in done:
            done.add(key)
            bearer = next((line for line in lines if line.resource == "gpu" and line.state == "occupied"), lines[0])
        for line in lines:
            values = _charge(one, line, revisions, currency) | _who(one, line, issuer) | _sku(line)
            if line is bearer:
                values |= _tokens(told.tokens.get(key)) | _savings(told.savings.get(key))
            yield tuple(values.get(column.name) for column in COLUMNS)


def _charge(one: Facts, line: Line, revisions: Mapping[int, int], currency: str) -> dict[str, Value]:
    """What is charged, for when and how much."""
    hour_ns = hour_of(one.period_ns)
    month_ns, following_ns = _month(hour_ns)
    price = line.rate.price_nano
    return {
        **dict.fromkeys(("BilledCost", "ContractedCost", "EffectiveCost", "ListCost"), line.amount_nano),
        "ContractedUnitPrice": price,
        "ListUnitPrice": price,
        "BillingCurrency": currency or line.rate.currency,
        "BillingPeriodStart": month_ns,
        "BillingPeriodEnd": following_ns,
        "ChargeCategory": "Usage",
        "ChargeDescription": f"{_STATES.get(line.state, line.state)}: {rate_text(line.rate)}",
        "ChargeFrequency": "Recurring" if line.state == UNUSED else "Usage-Based",
        "ChargePeriodStart": hour_ns,
        "ChargePeriodEnd": hour_ns + HOUR_NS,
        **_quantities(line),
        "x_Resource": line.resource,
        "x_State": line.state,
        "x_Term": line.rate.term,
        "x_PriceBasis": line.rate.basis,
        "x_IsSettled": hour_ns in revisions,
        "x_Revision": revisions.get(hour_ns),
    }


def _quantities(line: Line) -> dict[str, Value]:
    """What was consumed, in a unit that is exact, and the same in the unit that has the price."""
    rate = line.rate
    if is_used_up(rate.resource):
        priced = Fraction(line.quantity, MILLIJOULES_PER_KWH if rate.resource == "energy" else _BYTES_PER_GIB)
        energy = rate.resource == "energy"
        return {
            "ConsumedQuantity": number(Fraction(line.quantity, 1000 if energy else 1)),
            "ConsumedUnit": "Joules" if energy else "B",
            "PricingQuantity": number(priced * Fraction(rate.pue or 1)),
            "PricingUnit": "Kilowatt-Hours" if energy else "GiB",
        }
    held, _, length = rate.unit.partition("-")
    hours = UNITS[rate.resource][rate.unit]
    assert hours is not None  # noqa: S101  # what is held is priced by a length of time
    return {
        "ConsumedQuantity": number(Fraction(line.quantity, NANO)),
        "ConsumedUnit": f"{_WORDS[held]}-Seconds",
        "PricingQuantity": number(line.quantity / (hours * HOUR_NS)),
        "PricingUnit": f"{_WORDS[held]}-{length.title()}s",
    }


def _who(one: Facts, line: Line, issuer: Issuer) -> dict[str, Value]:
    """Who is charged by whom, and for what of theirs."""
    replica = one.replica
    site = (replica.site if replica is not None else "") or line.rate.site or None
    own: dict[str, Value]
    if replica is not None:
        own = {"ResourceId": replica.name, "ResourceName": replica.group or None, "ResourceType": "Inference Engine"}
    else:
        kind = "Reserved Capacity" if line.state == UNUSED else "Unheld GPU"
        own = {"ResourceId": line.sku or line.resource, "ResourceType": kind}
    labels = {} if replica is None else dict(replica.labels)
    tags = labels | ({"kvtally/model": replica.model} if replica is not None and replica.model else {})
    return {
        **dict.fromkeys(("InvoiceIssuerName", "ProviderName", "PublisherName"), issuer.provider),
        "BillingAccountId": issuer.account,
        "RegionId": site,
        "RegionName": site,
        **own,
        "ServiceCategory": "AI and Machine Learning",
        "ServiceName": "LLM Inference",
        "ServiceSubcategory": "Generative AI",
        "SubAccountId": labels.get("namespace"),
        "SubAccountName": labels.get("namespace"),
        "Tags": json.dumps(tags, sort_keys=True) if tags else None,
        "x_Model": tags.get("kvtally/model"),
    }


def _sku(line: Line) -> dict[str, Value]:
    """What is priced, and which price it is."""
    rate = line.rate
    product = f"{line.resource}/{line.sku}" if line.sku else line.resource
    price = "/".join([product, rate.term, rate.site, rate.unit, instant_text(rate.valid_from_ns)])
    return {
        "SkuId": product,
        "SkuMeter": _METERS[line.resource],
        "SkuPriceId": f"{price}/packaged" if rate.packaged else price,
        "SkuPriceDetails": _details(rate),
        "PricingCategory": "Dynamic" if rate.term == "spot" else "Standard",
    }


def _details(rate: Rate) -> str:
    details: dict[str, str | int | float] = {"x_Basis": rate.basis, "x_Source": rate.source, "x_Term": rate.term}
    if rate.pue is not None:
        details["x_PowerUsageEffectiveness"] = float(rate.pue)
    if rate.committed is not None:
        details["x_CommittedUnits"] = rate.committed
    return json.dumps({key: value for key, value in details.items() if value != ""}, sort_keys=True)


def _month(at_ns: int) -> tuple[int, int]:
    """The calendar month of an instant in UTC: its start and its end, unix nanoseconds."""
    at = datetime.fromtimestamp(at_ns // NANO, UTC)
    first = datetime(at.year, at.month, 1, tzinfo=UTC)
    following = datetime(at.year + at.month // 12, at.month % 12 + 1, 1, tzinfo=UTC)
    return int(first.timestamp()) * NANO, int(following.timestamp()) * NANO


def _tokens(told: Mapping[str, Any] | None) -> dict[str, Value]:
    if told is None:
        return {}
    return {
        "x_PromptTokens": told["prompt"],
        "x_ComputedTokens": told["computed"],
        "x_GeneratedTokens": told["generated"],
        **{f"x_CachedTokens{name}": told["cached"][tier] for tier, name in _CACHED.items()},
    }


def _savings(group: Group | None) -> dict[str, Value]:
    """What reuse saved in the hour: never a charge, and nothing where the report refuses a figure."""
    if group is None:
        return {}
    values: dict[str, Value] = {"x_SavingsStatus": group.status}
    money = group.money
    for name, amount in (
        ("AvoidedCost", money and money.gross),
        ("NetSavings", money and money.net),
        ("RealisedSavings", money and money.realised),
    ):
        if amount is not None:
            values |= {f"x_{name}": amount.point, f"x_{name}Low": amount.low, f"x_{name}High": amount.high}
    return values
