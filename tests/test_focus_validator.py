from __future__ import annotations

import csv
import io
from decimal import Decimal

import pytest
from tests.focus_validator import MANDATORY, RULES, billed, faults, rows_of

GOOD = {
    "BilledCost": "1.345",
    "BillingAccountId": "platform",
    "BillingAccountName": "",
    "BillingCurrency": "USD",
    "BillingPeriodEnd": "2026-12-01T00:00:00Z",
    "BillingPeriodStart": "2026-11-01T00:00:00Z",
    "ChargeCategory": "Usage",
    "ChargeClass": "",
    "ChargeDescription": "half an hour",
    "ChargeFrequency": "Usage-Based",
    "ChargePeriodEnd": "2026-11-23T05:00:00Z",
    "ChargePeriodStart": "2026-11-23T04:00:00Z",
    "ConsumedQuantity": "1800",
    "ConsumedUnit": "GPU-Seconds",
    "ContractedCost": "1.345",
    "ContractedUnitPrice": "2.69",
    "EffectiveCost": "1.345",
    "InvoiceIssuerName": "platform",
    "ListCost": "1.345",
    "ListUnitPrice": "2.69",
    "PricingCategory": "Standard",
    "PricingQuantity": "0.5",
    "PricingUnit": "GPU-Hours",
    "ProviderName": "platform",
    "PublisherName": "platform",
    "RegionId": "eu",
    "RegionName": "eu",
    "ResourceId": "engine",
    "ResourceName": "",
    "ResourceType": "Engine",
    "ServiceCategory": "AI and Machine Learning",
    "ServiceName": "Inference",
    "ServiceSubcategory": "Generative AI",
    "SkuId": "gpu",
    "SkuMeter": "GPU Time",
    "SkuPriceDetails": '{"x_Basis": "MEASURED", "GpuCount": 1}',
    "SkuPriceId": "gpu/2026",
    "SubAccountId": "",
    "SubAccountName": "",
    "Tags": '{"team": "a"}',
    "x_State": "idle",
}


def text_of(*rows: dict[str, str]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def test_a_row_that_is_right_has_no_fault() -> None:
    assert faults(text_of(GOOD, GOOD)) == []


def test_what_was_billed_is_summed_exactly() -> None:
    assert billed(rows_of(text_of(GOOD, {**GOOD, "BilledCost": "0.000000001"}))) == Decimal("1.345000001")


def test_a_field_too_few_is_an_error() -> None:
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        rows_of("a,b\r\n1\r\n")


def test_there_are_21_mandatory_columns_and_57_in_all() -> None:
    assert (sum(rule.level == MANDATORY for rule in RULES.values()), len(RULES)) == (21, 57)


@pytest.mark.parametrize("name", [name for name, rule in RULES.items() if rule.level == MANDATORY])
def test_a_mandatory_column_that_is_missing_is_a_fault(name: str) -> None:
    head = ",".join(column for column in GOOD if column != name)
    assert faults(f"{head}\r\n") == [f"{name} is mandatory"]


@pytest.mark.parametrize("name", [name for name in GOOD if name in RULES and not RULES[name].nullable])
def test_a_null_where_none_may_be_is_a_fault(name: str) -> None:
    assert f"line 2: {name} is null" in faults(text_of({**GOOD, name: ""}))


@pytest.mark.parametrize(
    ("head", "fault"),
    [
        ([*GOOD, "x_State"], "a column is there twice"),
        ([*GOOD, "State"], "State is no column of FOCUS 1.2 and no custom one"),
        ([*GOOD, "x_state"], "x_state is no column of FOCUS 1.2 and no custom one"),
        (["x_State", *list(GOOD)[:-1]], "custom columns come last"),
        (["BillingAccountId", "BilledCost", *list(GOOD)[2:]], "the columns of FOCUS are not in its order"),
    ],
)
def test_a_head_that_is_wrong_is_a_fault(head: list[str], fault: str) -> None:
    assert fault in faults(",".join(head) + "\r\n")


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"BilledCost": "1,345"}, "BilledCost: '1,345' is no Decimal"),
        ({"BilledCost": "+1.345"}, "BilledCost: '+1.345' is no Decimal"),
        ({"BilledCost": "1.345E+1"}, "BilledCost: '1.345E+1' is no Decimal"),
        ({"BilledCost": "NaN"}, "BilledCost: 'NaN' is no Decimal"),
        ({"BillingCurrency": "usd"}, "BillingCurrency: 'usd' is no Currency"),
        ({"ChargePeriodEnd": "2026-11-23T05:00:00.000Z"}, "is no Date/Time"),
        ({"ChargePeriodEnd": "2026-11-23T05:00:00+01:00"}, "is no Date/Time"),
        ({"ChargePeriodEnd": "2026-11-31T05:00:00Z"}, "is no Date/Time"),
        ({"ConsumedUnit": "gpu-seconds"}, "is no Unit"),
        ({"PricingUnit": "GPU-Fortnights"}, "is no Unit"),
        ({"Tags": "team=a"}, "is no JSON"),
        ({"Tags": '{"team": ["a"]}'}, "is no JSON"),
        ({"Tags": '{"team": "a", "team": "b"}'}, "is no JSON"),
        ({"Tags": '["team"]'}, "is no JSON"),
        ({"ChargeDescription": " "}, "ChargeDescription is blank"),
        ({"ChargeCategory": "Saving"}, "'Saving' is none of Usage"),
        ({"ChargeClass": "Usage"}, "'Usage' is none of Correction"),
        ({"ChargeFrequency": "Hourly"}, "'Hourly' is none of One-Time"),
        ({"PricingCategory": "Spot"}, "'Spot' is none of Standard"),
        ({"ServiceCategory": "AI"}, "'AI' is none of AI and"),
        ({"ServiceSubcategory": "Containers"}, "ServiceSubcategory is none of its category"),
        ({"ConsumedUnit": ""}, "of ConsumedQuantity and ConsumedUnit only one is null"),
        ({"ConsumedQuantity": "", "ConsumedUnit": ""}, "ConsumedQuantity is null for Usage"),
        ({"ChargeCategory": "Credit"}, "ConsumedQuantity stands where nothing was consumed"),
        ({"PricingQuantity": "", "PricingUnit": ""}, "PricingQuantity is null for Usage"),
        ({"PricingUnit": ""}, "of PricingQuantity and PricingUnit only one is null"),
        ({"SkuId": ""}, "SkuMeter stands without SkuId"),
        ({"SkuPriceId": ""}, "SkuPriceDetails stands without SkuPriceId"),
        ({"SkuPriceId": ""}, "SkuPriceId is null for Usage"),
        ({"ListUnitPrice": ""}, "ListUnitPrice is null for Usage"),
        ({"RegionName": ""}, "of RegionId and RegionName only one is null"),
        ({"ResourceType": ""}, "of ResourceId and ResourceType only one is null"),
        ({"SubAccountId": "a"}, "of SubAccountId and SubAccountName only one is null"),
        ({"ResourceName": "engine"}, "ResourceName repeats ResourceId"),
        ({"ResourceId": "", "ResourceType": "", "ResourceName": "b"}, "ResourceName stands without ResourceId"),
        ({"ChargePeriodEnd": "2026-11-23T04:00:00Z"}, "the charge period is empty"),
        ({"BillingPeriodEnd": "2026-11-01T00:00:00Z"}, "the billing period is empty"),
        ({"BillingPeriodStart": "2026-11-23T04:30:00Z"}, "the charge period is not inside the billing period"),
        ({"BillingPeriodEnd": "2026-11-23T04:30:00Z"}, "the charge period is not inside the billing period"),
        ({"ListCost": "1.35"}, "ListUnitPrice x PricingQuantity is not ListCost"),
        ({"ContractedCost": "1.346"}, "ContractedUnitPrice x PricingQuantity is not ContractedCost"),
        ({"ListUnitPrice": "-2.69", "ListCost": "-1.345"}, "ListUnitPrice is negative"),
        ({"ListUnitPrice": "", "ListCost": "2"}, "ListCost is not BilledCost, and there is no ListUnitPrice"),
        ({"SkuPriceDetails": '{"Basis": "MEASURED"}'}, "SkuPriceDetails: Basis"),
        ({"ChargeCategory": "Purchase", "ConsumedQuantity": "", "ConsumedUnit": ""}, "a purchase is not usage-based"),
    ],
)
def test_a_value_that_breaks_a_rule_is_a_fault(change: dict[str, str], fault: str) -> None:
    assert [one for one in faults(text_of({**GOOD, **change})) if fault in one]


def test_a_commitment_is_billed_with_its_purchase() -> None:
    row = {**GOOD, "CommitmentDiscountId": "c", "CommitmentDiscountStatus": "Used"}
    assert "line 2: what a commitment covers was billed with its purchase" in faults(text_of(row))


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"SkuId": "other"}, "SkuPriceId 'gpu/2026' has two of SkuId"),
        ({"ServiceCategory": "Compute"}, "ServiceName 'Inference' has two of ServiceCategory"),
        ({"RegionName": "us"}, "RegionId 'eu' has two of RegionName"),
    ],
)
def test_an_identifier_with_two_parents_is_a_fault(change: dict[str, str], fault: str) -> None:
    assert faults(text_of(GOOD, {**GOOD, **change})) == [fault]


def test_a_correction_may_lack_what_usage_may_not() -> None:
    lacking = dict.fromkeys(("ConsumedQuantity", "ConsumedUnit", "PricingQuantity", "PricingUnit", "SkuPriceId"), "")
    row = {**GOOD, **lacking, "SkuPriceDetails": "", "ChargeClass": "Correction", "ListCost": "7"}
    assert faults(text_of(row)) == []
