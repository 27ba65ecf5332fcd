"""What FOCUS 1.2 asks of a cost and usage dataset in CSV, written off its text and not off what we write."""

from __future__ import annotations

import csv
import io
import json
import re
from datetime import UTC, datetime
from decimal import Decimal
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

Row = dict[str, str]  # an empty field is null

MANDATORY, CONDITIONAL, RECOMMENDED = "Mandatory", "Conditional", "Recommended"
# a product of a unit price and a quantity may differ from its cost by what the rounding of a charge to 1e-9 makes
ROUNDING = Decimal("0.000001")
NUMBER = re.compile(r"-?\d+(\.\d+)?(E-?\d+)?")
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")
CURRENCY = re.compile(r"[A-Z]{3}")
CUSTOM = re.compile(r"x_[A-Z][A-Za-z0-9]*")
_SIZE = r"(b|B|[KMGTPE]i?[bB])"
_COUNT = rf"({_SIZE}|[A-Z][A-Za-z]*)"
_TIMES = r"(Year|Month|Day|Hour|Minute|Second)"
UNIT = re.compile(rf"(\d+ )?{_COUNT}(-{_TIMES}s|/{_TIMES}|/\d+ {_TIMES}s)?")
DETAILS = {
    *("CoreCount", "DiskMaxIops", "DiskSpace", "DiskType", "GpuCount", "InstanceSeries", "InstanceType"),
    *("MemorySize", "NetworkMaxIops", "NetworkMaxThroughput", "OperatingSystem", "Redundancy", "StorageClass"),
}


class Rule(NamedTuple):
    """One column of the specification: whether it must be there, may be null, and what may stand in it."""

    level: str
    nullable: bool
    type: str = "String"
    allowed: tuple[str, ...] = ()


_CATEGORIES = (
    *("AI and Machine Learning", "Analytics", "Business Applications", "Compute", "Databases", "Developer Tools"),
    *("Multicloud", "Identity", "Integration", "Internet of Things", "Management and Governance", "Media", "Migration"),
    *("Mobile", "Networking", "Security", "Storage", "Web", "Other"),
)
_OF_AI = (
    *("AI Platforms", "Bots", "Generative AI", "Machine Learning", "Natural Language Processing"),
    "Other (AI and Machine Learning)",
)
RULES: Mapping[str, Rule] = {
    "AvailabilityZone": Rule(RECOMMENDED, True),
    "BilledCost": Rule(MANDATORY, False, "Decimal"),
    "BillingAccountId": Rule(MANDATORY, False),
    "BillingAccountName": Rule(MANDATORY, True),
    "BillingAccountType": Rule(CONDITIONAL, False),
    "BillingCurrency": Rule(MANDATORY, False, "Currency"),
    "BillingPeriodEnd": Rule(MANDATORY, False, "Date/Time"),
    "BillingPeriodStart": Rule(MANDATORY, False, "Date/Time"),
    "CapacityReservationId": Rule(CONDITIONAL, True),
    "CapacityReservationStatus": Rule(CONDITIONAL, True, "String", ("Used", "Unused")),
    "ChargeCategory": Rule(MANDATORY, False, "String", ("Usage", "Purchase", "Tax", "Credit", "Adjustment")),
    "ChargeClass": Rule(MANDATORY, True, "String", ("Correction",)),
    "ChargeDescription": Rule(MANDATORY, True),
    "ChargeFrequency": Rule(RECOMMENDED, False, "String", ("One-Time", "Recurring", "Usage-Based")),
    "ChargePeriodEnd": Rule(MANDATORY, False, "Date/Time"),
    "ChargePeriodStart": Rule(MANDATORY, False, "Date/Time"),
    "CommitmentDiscountCategory": Rule(CONDITIONAL, True, "String", ("Spend", "Usage")),
    "CommitmentDiscountId": Rule(CONDITIONAL, True),
    "CommitmentDiscountName": Rule(CONDITIONAL, True),
    "CommitmentDiscountQuantity": Rule(CONDITIONAL, True, "Decimal"),
    "CommitmentDiscountStatus": Rule(CONDITIONAL, True, "String", ("Used", "Unused")),
    "CommitmentDiscountType": Rule(CONDITIONAL, True),
    "CommitmentDiscountUnit": Rule(CONDITIONAL, True, "Unit"),
    "ConsumedQuantity": Rule(CONDITIONAL, True, "Decimal"),
    "ConsumedUnit": Rule(CONDITIONAL, True, "Unit"),
    "ContractedCost": Rule(MANDATORY, False, "Decimal"),
    "ContractedUnitPrice": Rule(CONDITIONAL, True, "Decimal"),
    "EffectiveCost": Rule(MANDATORY, False, "Decimal"),
    "InvoiceId": Rule(RECOMMENDED, True),
    "InvoiceIssuerName": Rule(MANDATORY, False),
    "ListCost": Rule(MANDATORY, False, "Decimal"),
    "ListUnitPrice": Rule(CONDITIONAL, True, "Decimal"),
    "PricingCategory": Rule(CONDITIONAL, True, "String", ("Standard", "Dynamic", "Committed", "Other")),
    "PricingCurrency": Rule(CONDITIONAL, True, "Currency"),
    "PricingCurrencyContractedUnitPrice": Rule(CONDITIONAL, True, "Decimal"),
    "PricingCurrencyEffectiveCost": Rule(CONDITIONAL, True, "Decimal"),
    "PricingCurrencyListUnitPrice": Rule(CONDITIONAL, True, "Decimal"),
    "PricingQuantity": Rule(MANDATORY, True, "Decimal"),
    "PricingUnit": Rule(MANDATORY, True, "Unit"),
    "ProviderName": Rule(MANDATORY, False),
    "PublisherName": Rule(MANDATORY, False),
    "RegionId": Rule(CONDITIONAL, True),
    "RegionName": Rule(CONDITIONAL, True),
    "ResourceId": Rule(CONDITIONAL, True),
    "ResourceName": Rule(CONDITIONAL, True),
    "ResourceType": Rule(CONDITIONAL, True),
    "ServiceCategory": Rule(MANDATORY, False, "String", _CATEGORIES),
    "ServiceName": Rule(MANDATORY, False),
    "ServiceSubcategory": Rule(RECOMMENDED, False),
    "SkuId": Rule(CONDITIONAL, True),
    "SkuMeter": Rule(CONDITIONAL, True),
    "SkuPriceDetails": Rule(CONDITIONAL, True, "JSON"),
    "SkuPriceId": Rule(CONDITIONAL, True),
    "SubAccountId": Rule(CONDITIONAL, True),
    "SubAccountName": Rule(CONDITIONAL, True),
    "SubAccountType": Rule(CONDITIONAL, True),
    "Tags": Rule(CONDITIONAL, True, "JSON"),
}
# (the one, the other): both are null or neither is
TOGETHER = (
    ("ConsumedQuantity", "ConsumedUnit"),
    ("PricingQuantity", "PricingUnit"),
    ("RegionId", "RegionName"),
    ("ResourceId", "ResourceType"),
    ("SubAccountId", "SubAccountName"),
    ("CommitmentDiscountQuantity", "CommitmentDiscountUnit"),
    ("CommitmentDiscountId", "CommitmentDiscountCategory"),
    ("CommitmentDiscountId", "CommitmentDiscountType"),
)
# null where the other is
ONLY_WITH = (
    ("ResourceName", "ResourceId"),
    ("SkuMeter", "SkuId"),
    ("SkuPriceDetails", "SkuPriceId"),
    ("CommitmentDiscountStatus", "CommitmentDiscountId"),
)
# of usage and purchases that are no corrections: never null, where the column is there
OF_USAGE = ("PricingQuantity", "PricingCategory", "ListUnitPrice", "ContractedUnitPrice", "SkuId", "SkuPriceId")


def rows_of(text: str) -> list[Row]:
    """The rows of a CSV; ValueError where one has more or fewer fields than the head."""
    head, *lines = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    return [dict(zip(head, line, strict=True)) for line in lines]


def faults(text: str) -> list[str]:
    """Everything in which a CSV breaks FOCUS 1.2, by line; nothing for one that does not."""
    rows = rows_of(text)
    found = list(_head_faults(next(csv.reader(io.StringIO(text, newline="")))))
    for line, row in enumerate(rows, 2):
        wrong = list(_value_faults(row))
        # what is no value of its type breaks every rule that reads it
        found += [f"line {line}: {fault}" for fault in wrong or [*_null_faults(row), *_rule_faults(row)]]
    return found + list(_across(rows))


def billed(rows: list[Row]) -> Decimal:
    """The sum of BilledCost, exact."""
    return sum((Decimal(row["BilledCost"]) for row in rows), Decimal(0))


def _head_faults(head: list[str]) -> Iterator[str]:
    if len(set(head)) < len(head):
        yield "a column is there twice"
    yield from (f"{name} is mandatory" for name, rule in RULES.items() if rule.level == MANDATORY and name not in head)
    own = [name for name in head if name not in RULES]
    yield from (f"{name} is no column of FOCUS 1.2 and no custom one" for name in own if not CUSTOM.fullmatch(name))
    if head[len(head) - len(own) :] != own:
        yield "custom columns come last"
    of_focus = [name for name in head if name in RULES]
    if of_focus != sorted(of_focus):
        yield "the columns of FOCUS are not in its order"


def _value_faults(row: Row) -> Iterator[str]:
    for name, value in row.items():
        rule = RULES.get(name)
        if rule is None:
            continue
        if not value:
            if not rule.nullable:
                yield f"{name} is null"
        elif not value.strip():
            yield f"{name} is blank"
        elif not _fits(rule, value):
            yield f"{name}: {value!r} is no {rule.type}"
        elif rule.allowed and value not in rule.allowed:
            yield f"{name}: {value!r} is none of {', '.join(rule.allowed)}"


def _fits(rule: Rule, value: str) -> bool:
    patterns = {"Decimal": NUMBER, "Currency": CURRENCY, "Unit": UNIT, "Date/Time": TIME}
    if rule.type in patterns and not patterns[rule.type].fullmatch(value):
        return False
    try:
        if rule.type == "Date/Time":
            _instant(value)
        return rule.type != "JSON" or _is_flat(value)
    except ValueError:
        return False


def _is_flat(text: str) -> bool:
    """Whether a text is a JSON object of plain values with every key once; ValueError for no JSON."""
    body = json.loads(text, object_pairs_hook=tuple)  # an object is a tuple of its pairs, whatever its keys
    if not isinstance(body, tuple) or len({key for key, _ in body}) < len(body):
        return False
    return all(value is None or isinstance(value, (str, int, float)) for _, value in body)


def _null_faults(row: Row) -> Iterator[str]:
    known = {name for name, value in row.items() if value}
    for one, other in TOGETHER:
        if {one, other} <= row.keys() and (one in known) != (other in known):
            yield f"of {one} and {other} only one is null"
    for one, other in ONLY_WITH:
        if one in known and other not in known:
            yield f"{one} stands without {other}"
    category, is_correction = row["ChargeCategory"], row["ChargeClass"] == "Correction"
    if category in {"Usage", "Purchase"} and not is_correction:
        yield from (f"{name} is null for {category}" for name in OF_USAGE if name in row and name not in known)
    is_consumed = category == "Usage" and row.get("CommitmentDiscountStatus") != "Unused"
    if not is_consumed and "ConsumedQuantity" in known:
        yield "ConsumedQuantity stands where nothing was consumed"
    if is_consumed and not is_correction and "ConsumedQuantity" in row and "ConsumedQuantity" not in known:
        yield "ConsumedQuantity is null for Usage"


def _rule_faults(row: Row) -> Iterator[str]:
    edges = [_instant(row[f"{name}Period{edge}"]) for name in ("Billing", "Charge") for edge in ("Start", "End")]
    billing_start, billing_end, charge_start, charge_end = edges
    if not billing_start < billing_end:
        yield "the billing period is empty"
    if not charge_start < charge_end:
        yield "the charge period is empty"
    if not billing_start <= charge_start < charge_end <= billing_end:
        yield "the charge period is not inside the billing period"
    if row.get("ChargeFrequency") == "Usage-Based" and row["ChargeCategory"] == "Purchase":
        yield "a purchase is not usage-based"
    for kind in ("List", "Contracted"):
        yield from _price_faults(row, kind)
    if row.get("ResourceName") and row["ResourceName"] == row["ResourceId"]:
        yield "ResourceName repeats ResourceId"
    if row["ServiceCategory"] == "AI and Machine Learning" and row.get("ServiceSubcategory", _OF_AI[0]) not in _OF_AI:
        yield "ServiceSubcategory is none of its category"
    details = json.loads(row.get("SkuPriceDetails") or "{}")
    yield from (f"SkuPriceDetails: {key}" for key in details if not key.startswith("x_") and key not in DETAILS)
    if row.get("CommitmentDiscountId") and row["ChargeCategory"] == "Usage" and Decimal(row["BilledCost"]):
        yield "what a commitment covers was billed with its purchase"


def _price_faults(row: Row, kind: str) -> Iterator[str]:
    price, cost = row.get(f"{kind}UnitPrice"), Decimal(row[f"{kind}Cost"])
    if row["ChargeClass"] == "Correction":
        return
    if price:
        if Decimal(price) < 0:
            yield f"{kind}UnitPrice is negative"
        if row["PricingQuantity"] and abs(Decimal(price) * Decimal(row["PricingQuantity"]) - cost) > ROUNDING:
            yield f"{kind}UnitPrice x PricingQuantity is not {kind}Cost"
    elif cost != Decimal(row["BilledCost"]):
        yield f"{kind}Cost is not BilledCost, and there is no {kind}UnitPrice"


def _across(rows: list[Row]) -> Iterator[str]:
    """What holds of several rows: a price has one SKU, a service one category."""
    for child, parent in (("SkuPriceId", "SkuId"), ("ServiceName", "ServiceCategory"), ("RegionId", "RegionName")):
        seen: dict[str, str] = {}
        for row in rows:
            one = row.get(child)
            if one and seen.setdefault(one, row.get(parent, "")) != row.get(parent, ""):
                yield f"{child} {one!r} has two of {parent}"


def _instant(text: str) -> datetime:
    return datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
