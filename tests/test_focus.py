from __future__ import annotations

import io
import json
import shutil
from datetime import UTC, datetime
from decimal import Decimal
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import pytest
from tests.focus_validator import MANDATORY, RULES, billed, faults, rows_of
from tests.ledgers import HOUR, RATES, SKU, START, STORY_END, charges_of, new_ledger, rate, reader_of, tell_story

from kvtally.agent.accounts import Payment, Window
from kvtally.agent.book import book_of
from kvtally.agent.config import Config
from kvtally.agent.export import focus
from kvtally.agent.export.focus import FocusCharges, Issuer, Told
from kvtally.agent.export.focus_columns import COLUMNS, FOCUS_VERSION
from kvtally.agent.export.rows import CsvWriter
from kvtally.agent.facts import Facts, Line, Replica
from kvtally.agent.grouping import key_of
from kvtally.agent.ledger.read import LedgerReader
from kvtally.agent.price import nano_to_text
from kvtally.agent.rates import RateBook
from kvtally.agent.report import cost_report
from kvtally.agent.savings_report import savings_report
from kvtally.agent.settlement import due_hours, settle, settle_hours

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from tests.focus_validator import Row

    from kvtally.agent.price import Rate

PAYMENT = Payment()
TOKENS = ("Prompt", "Computed", "Generated")
CACHED = ("HBM", "DRAM", "Disk", "P2P", "External")


def of_story(folder: Path, settled_until_ns: int) -> LedgerReader:
    path = new_ledger(folder)
    tell_story(path)
    reader = reader_of(path)
    for hour in due_hours(reader, settled_until_ns):
        settle(reader, hour, RateBook(RATES), PAYMENT)
    return reader


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LedgerReader]:
    """Three hours settled, the last open."""
    with of_story(tmp_path_factory.mktemp("focus"), STORY_END) as reader:
        yield reader


@pytest.fixture(scope="module")
def demo(demo_ledger: str) -> Iterator[LedgerReader]:
    with LedgerReader(demo_ledger) as reader:
        yield reader


def exported(
    reader: LedgerReader, window: Window | None = None, book: RateBook | None = None, issuer: Issuer | None = None
) -> tuple[str, int]:
    """The CSV, and how many hours have no price."""
    charges = FocusCharges(reader, book or book_of(reader, Config()), PAYMENT, issuer or Issuer())
    out = io.BytesIO()
    writer = CsvWriter(out, COLUMNS)
    for row in charges.rows(window):
        writer.write(row)
    return out.getvalue().decode(), charges.unpriced


def total(reader: LedgerReader, window: Window | None) -> str:
    (group,) = cost_report(reader, window, (), book_of(reader, Config()), PAYMENT).groups
    text = group["cost"]["total"]
    assert isinstance(text, str)
    return text


def added(rows: list[Row], name: str) -> int:
    return sum(int(row[name]) for row in rows if row[name])


def test_the_version_is_named_and_its_mandatory_columns_are_all_there() -> None:
    names = [column.name for column in COLUMNS]
    assert FOCUS_VERSION == "1.2"
    assert [name for name, rule in RULES.items() if rule.level == MANDATORY and name not in names] == []


@pytest.mark.parametrize(
    "window",
    [
        None,
        Window(0, STORY_END),
        Window(START + HOUR, START + 3 * HOUR),
        Window(START + HOUR + 1_234_567_891_011, START + 3 * HOUR + 987_654_321),
        Window(START + 3 * HOUR + 1, STORY_END),
        Window(START + 1900 * 10**9, START + 2000 * 10**9),
    ],
    ids=["default", "since ever", "settled hours", "parts of hours", "open hour", "a moment"],
)
def test_what_is_billed_is_what_the_cost_report_says_to_the_nano(story: LedgerReader, window: Window | None) -> None:
    text, unpriced = exported(story, window)
    assert faults(text) == []
    rows = rows_of(text)
    assert f"{billed(rows):.9f}" == total(story, window)
    assert all(row["BilledCost"] == row["EffectiveCost"] == row["ListCost"] == row["ContractedCost"] for row in rows)
    assert unpriced == 0


def test_the_story_has_what_makes_the_sum_hard(story: LedgerReader) -> None:
    rows = rows_of(exported(story)[0])
    assert {row["x_IsSettled"] for row in rows} == {"true", "false"}
    assert {row["x_State"] for row in rows} >= {"occupied", "idle", "asleep", "unallocated"}
    assert {row["ContractedUnitPrice"] for row in rows} == {"2.690000001", "3.333333333", "0.700000000"}


def test_every_settled_charge_is_one_row(story: LedgerReader) -> None:
    rows = [row for row in rows_of(exported(story, Window(0, STORY_END))[0]) if row["x_IsSettled"] == "true"]
    charges = [
        (one["period_start_ns"] // 10**9, one["resource"], one["state"], nano_to_text(one["amount_nano"]))
        for one in charges_of(story)
    ]
    told = [
        (
            int(datetime.fromisoformat(row["ChargePeriodStart"]).timestamp()),
            row["x_Resource"],
            row["x_State"],
            row["BilledCost"],
        )
        for row in rows
    ]
    assert len(told) > 30
    assert sorted(told) == sorted(charges)


def test_namespaces_are_sub_accounts_and_what_nobody_holds_has_none(story: LedgerReader) -> None:
    rows = rows_of(exported(story)[0])
    accounts = {(row["ResourceType"], row["ResourceId"], row["SubAccountId"]) for row in rows}
    assert accounts == {
        ("Inference Engine", "10.0.0.1:8000/0", "one"),
        ("Inference Engine", "10.0.0.2:8000/0", "two"),
        ("Unheld GPU", SKU, ""),
    }
    by_namespace = cost_report(story, None, ("namespace",), book_of(story, Config()), PAYMENT).groups
    for group in by_namespace:
        own = [row for row in rows if row["SubAccountId"] == (group["by"]["namespace"] or "")]
        assert f"{billed(own):.9f}" == group["cost"]["total"]


def test_tokens_stand_once_an_hour_and_replica_so_that_their_sums_are_right(story: LedgerReader) -> None:
    rows = rows_of(exported(story)[0])
    (group,) = cost_report(story, None, (), book_of(story, Config()), PAYMENT).groups
    tokens = group["tokens"]
    assert {name: added(rows, f"x_{name}Tokens") for name in TOKENS} == {name: tokens[name.lower()] for name in TOKENS}
    assert {name: added(rows, f"x_CachedTokens{name}") for name in CACHED} == {
        name: tokens["cached"][name.lower()] for name in CACHED
    }
    bearing = [(row["ResourceId"], row["ChargePeriodStart"]) for row in rows if row["x_PromptTokens"]]
    assert len(bearing) == len(set(bearing)) == 10  # two engines in five hours
    assert {row["x_State"] for row in rows if row["x_PromptTokens"]} == {"occupied"}


def test_savings_are_those_of_the_report_and_no_row_is_a_credit(demo: LedgerReader) -> None:
    text, _ = exported(demo)
    rows = rows_of(text)
    (group,) = savings_report(demo, None, (), book_of(demo, Config()), PAYMENT).groups
    (bearer,) = [row for row in rows if row["x_SavingsStatus"]]
    money = group.money
    assert money is not None
    assert money.net is not None
    assert money.realised is not None
    for name, amount in (("AvoidedCost", money.gross), ("NetSavings", money.net), ("RealisedSavings", money.realised)):
        told = [bearer[f"x_{name}{bound}"] for bound in ("Low", "", "High")]
        assert told == [nano_to_text(value) for value in amount]
    assert bearer["x_SavingsStatus"] == "ok"
    assert {row["ChargeCategory"] for row in rows} == {"Usage"}
    assert f"{billed(rows):.9f}" == total(demo, None)


def test_savings_that_are_refused_are_null_beside_their_status(story: LedgerReader) -> None:
    rows = [row for row in rows_of(exported(story)[0]) if row["x_SavingsStatus"]]
    assert {row["x_SavingsStatus"] for row in rows} == {"insufficient_data"}
    assert {row[name] for row in rows for name in row if "Savings" in name and not name.endswith("Status")} == {""}
    assert {row["x_AvoidedCost"] for row in rows} == {""}


def test_an_hour_that_was_settled_again_is_told_as_it_was_last(tmp_path: Path) -> None:
    with of_story(tmp_path, START + 3 * HOUR) as reader:
        before = rows_of(exported(reader, Window(START + HOUR, START + 2 * HOUR))[0])
        dearer = rate("gpu", "5.380000002", "gpu-hour", START, sku=SKU)
        reader.add_rates([dearer])
        book = book_of(reader, Config())
        settle_hours(reader, [START + HOUR], STORY_END, book, PAYMENT, reason="dearer", restates=True)
        text, _ = exported(reader, Window(START + HOUR, START + 2 * HOUR))
        after = rows_of(text)
        assert faults(text) == []
        assert ({row["x_Revision"] for row in before}, {row["x_Revision"] for row in after}) == ({"1"}, {"2"})
        assert billed(after) > billed(before)
        assert f"{billed(after):.9f}" == total(reader, Window(START + HOUR, START + 2 * HOUR))


def test_time_without_a_price_has_no_row_and_is_counted(tmp_path: Path) -> None:
    path = new_ledger(tmp_path)
    tell_story(path)
    with reader_of(path) as reader:
        text, unpriced = exported(reader, Window(0, START + HOUR), RateBook(RATES[:1]))
        assert (faults(text), unpriced) == ([], 0)
        text, unpriced = exported(reader, Window(0, START + HOUR), RateBook(RATES[2:]))
        assert rows_of(text) == []
        assert unpriced == 3  # two engines and the GPU beside them


def test_an_empty_ledger_gives_the_names_of_the_columns(tmp_path: Path) -> None:
    with reader_of(new_ledger(tmp_path)) as reader:
        text, unpriced = exported(reader)
    assert text == ",".join(column.name for column in COLUMNS) + "\r\n"
    assert unpriced == 0


def test_the_ledger_may_be_a_copy_that_nobody_may_write(tmp_path: Path, demo_ledger: str) -> None:
    copy = tmp_path / "read-only.db"
    shutil.copyfile(demo_ledger.removeprefix("sqlite:///"), copy)
    copy.chmod(0o444)
    with LedgerReader(f"sqlite:///{copy}") as reader:
        assert len(rows_of(exported(reader)[0])) == 4


# single rows, by hand


def replica(**more: Any) -> Replica:
    values: dict[str, Any] = {
        "target_id": 1,
        "name": "engine:8000/0",
        "model": "llama-8b",
        "version": "0.25.1",
        "gpus": ("GPU-a",),
        "sku": SKU,
        "term": "on-demand",
        "site": "",
        "labels": {},
    }
    return Replica(**values | more)


def facts(*lines: Line, holder: Replica | None, at_ns: int = START) -> Facts:
    work = dict.fromkeys(("prompt_tokens", "computed_tokens"), 0)
    return Facts(holder, at_ns, work, {"occupied": HOUR}, lines, None, at_ns, at_ns + HOUR, HOUR, modelled=False)


def line(price: Rate, quantity: int, amount_nano: int, *, state: str = "occupied", unit: str = "") -> Line:
    unit = unit or f"{price.unit.split('-')[0]}-ns"
    return Line(price.resource, price.sku, state, quantity, unit, price, amount_nano)


def row_of(
    one: Line, holder: Replica | None = None, *, at_ns: int = START, revisions: Mapping[int, int] | None = None
) -> Row:
    """The one row of a line, as CSV."""
    out = io.BytesIO()
    writer = CsvWriter(out, COLUMNS)
    told = facts(one, holder=holder, at_ns=at_ns)
    for row in focus.rows_of([told], revisions or {}, Told({}, {}), Issuer("Platform team", "acme"), "EUR"):
        writer.write(row)
    text = out.getvalue().decode()
    assert faults(text) == []
    (single,) = rows_of(text)
    return single


GPU = rate("gpu", "2.69", "gpu-hour", START - HOUR, sku=SKU)


def test_half_an_hour_of_two_gpus_is_a_gpu_hour_and_its_price() -> None:
    row = row_of(line(GPU, HOUR, 2_690_000_000), replica(labels={"namespace": "chat", "tenant": "a"}, group="pair"))
    told = {name: value for name, value in row.items() if value and not name.startswith("x_")}
    assert told == {
        **dict.fromkeys(("BilledCost", "ContractedCost", "EffectiveCost", "ListCost"), "2.690000000"),
        **dict.fromkeys(("ContractedUnitPrice", "ListUnitPrice"), "2.690000000"),
        "BillingAccountId": "acme",
        "BillingCurrency": "EUR",
        "BillingPeriodStart": "2026-11-01T00:00:00Z",
        "BillingPeriodEnd": "2026-12-01T00:00:00Z",
        "ChargeCategory": "Usage",
        "ChargeDescription": "engine at work: gpu NVIDIA H100 80GB HBM3 on-demand 2.69 USD/gpu-hour "
        "from 2026-11-23T03:00:00Z (MEASURED)",
        "ChargeFrequency": "Usage-Based",
        "ChargePeriodStart": "2026-11-23T04:00:00Z",
        "ChargePeriodEnd": "2026-11-23T05:00:00Z",
        "ConsumedQuantity": "3600",
        "ConsumedUnit": "GPU-Seconds",
        "PricingCategory": "Standard",
        "PricingQuantity": "1",
        "PricingUnit": "GPU-Hours",
        **dict.fromkeys(("InvoiceIssuerName", "ProviderName", "PublisherName"), "Platform team"),
        "ResourceId": "engine:8000/0",
        "ResourceName": "pair",
        "ResourceType": "Inference Engine",
        "ServiceCategory": "AI and Machine Learning",
        "ServiceName": "LLM Inference",
        "ServiceSubcategory": "Generative AI",
        "SkuId": f"gpu/{SKU}",
        "SkuMeter": "GPU Time",
        "SkuPriceDetails": '{"x_Basis": "MEASURED", "x_Term": "on-demand"}',
        "SkuPriceId": f"gpu/{SKU}/on-demand//gpu-hour/2026-11-23T03:00:00Z",
        **dict.fromkeys(("SubAccountId", "SubAccountName"), "chat"),
        "Tags": '{"kvtally/model": "llama-8b", "namespace": "chat", "tenant": "a"}',
    }


def test_energy_is_consumed_in_joules_and_priced_with_what_the_building_takes() -> None:
    # 7.2 MJ are 2 kWh at the meter, 3 kWh with PUE 1.5, 0.60 at 0.20
    price = rate("energy", "0.2", "kwh", START, pue=Decimal("1.5"), term="owned")
    row = row_of(line(price, 7_200_000_000, 600_000_000, unit="mj"), replica())
    assert (row["ConsumedQuantity"], row["ConsumedUnit"]) == ("7200000", "Joules")
    assert (row["PricingQuantity"], row["PricingUnit"]) == ("3", "Kilowatt-Hours")
    assert json.loads(row["SkuPriceDetails"])["x_PowerUsageEffectiveness"] == 1.5


@pytest.mark.parametrize(
    ("price", "quantity", "amount_nano", "told"),
    [
        # a month is 8766 / 12 hours
        (rate("gpu", "730.5", "gpu-month", START), HOUR, 10**9, ("3600", "GPU-Seconds", "GPU-Months")),
        (rate("server", "4", "server-hour", START), HOUR // 2, 2 * 10**9, ("1800", "Server-Seconds", "Server-Hours")),
        (rate("dram", "0.005", "gib-hour", START), 200 * HOUR, 10**9, ("720000", "GiB-Seconds", "GiB-Hours")),
        (rate("storage", "73.05", "tib-month", START), 10 * HOUR, 10**9, ("36000", "TiB-Seconds", "TiB-Months")),
        (rate("network", "0.5", "gib", START), 2**31, 10**9, (str(2**31), "B", "GiB")),
        (rate("platform", "1", "service-hour", START), HOUR, 10**9, ("3600", "Service-Seconds", "Service-Hours")),
    ],
    ids=lambda value: value.unit if hasattr(value, "unit") else "",
)
def test_every_unit_of_a_price_is_a_unit_of_focus(
    price: Rate, quantity: int, amount_nano: int, told: tuple[str, str, str]
) -> None:
    row = row_of(line(price, quantity, amount_nano), replica())
    assert (row["ConsumedQuantity"], row["ConsumedUnit"], row["PricingUnit"]) == told
    hours = Fraction(quantity, HOUR) / {"Months": Fraction(1461, 2)}.get(told[2].partition("-")[2], 1)
    if price.resource != "network":
        assert abs(Fraction(row["PricingQuantity"]) - hours) <= Fraction(1, 2 * 10**18)


def test_a_quantity_that_no_decimal_holds_is_rounded_far_below_the_nano() -> None:
    row = row_of(line(GPU, 1_000_000_000, 747_222), replica())  # a second: 2.69 / 3600 = 0.00074722…
    assert row["ConsumedQuantity"] == "1"
    assert row["PricingQuantity"] == "0.000277777777777778"


def test_spot_prices_are_dynamic() -> None:
    row = row_of(line(GPU._replace(term="spot"), HOUR, 2_690_000_000), replica(term="spot"))
    assert (row["PricingCategory"], row["x_Term"]) == ("Dynamic", "spot")


def test_a_commitment_that_nobody_used_is_a_recurring_charge_of_its_own() -> None:
    price = GPU._replace(term="reserved", committed=8)
    row = row_of(line(price, HOUR, 2_690_000_000, state="unused"))
    told = [row[name] for name in ("ChargeCategory", "ChargeClass", "ChargeFrequency", "ResourceType", "x_State")]
    assert told == ["Usage", "", "Recurring", "Reserved Capacity", "unused"]
    assert (row["SubAccountId"], row["Tags"], row["ResourceId"]) == ("", "", SKU)
    assert json.loads(row["SkuPriceDetails"])["x_CommittedUnits"] == 8
    assert row["ChargeDescription"].startswith("reserved and not used: ")


@pytest.mark.parametrize(
    ("holder", "priced_at", "region"),
    [("frankfurt", "", "frankfurt"), ("", "paris", "paris"), ("frankfurt", "paris", "frankfurt"), ("", "", "")],
)
def test_the_site_is_the_region(holder: str, priced_at: str, region: str) -> None:
    row = row_of(line(GPU._replace(site=priced_at), HOUR, 2_690_000_000), replica(site=holder))
    assert (row["RegionId"], row["RegionName"]) == (region, region)


def test_a_packaged_price_is_another_than_an_operators_of_the_same_day() -> None:
    packaged = GPU._replace(source="packaged: a card", basis="ASSUMED")
    row = row_of(line(packaged, HOUR, 2_690_000_000), replica())
    assert row["SkuPriceId"] == f"gpu/{SKU}/on-demand//gpu-hour/2026-11-23T03:00:00Z/packaged"
    assert (row["x_PriceBasis"], json.loads(row["SkuPriceDetails"])["x_Source"]) == ("ASSUMED", "packaged: a card")


@pytest.mark.parametrize(
    ("month", "start", "end"),
    [
        ("2026-12-31T23", "2026-12-01T00:00:00Z", "2027-01-01T00:00:00Z"),
        ("2027-01-01T00", "2027-01-01T00:00:00Z", "2027-02-01T00:00:00Z"),
        ("2028-02-29T12", "2028-02-01T00:00:00Z", "2028-03-01T00:00:00Z"),
    ],
)
def test_the_billing_period_is_the_calendar_month(month: str, start: str, end: str) -> None:
    at = datetime.fromisoformat(f"{month}:00:00").replace(tzinfo=UTC)
    row = row_of(line(GPU, HOUR, 2_690_000_000), replica(), at_ns=int(at.timestamp()) * 10**9)
    assert (row["BillingPeriodStart"], row["BillingPeriodEnd"]) == (start, end)


def test_a_part_of_an_hour_carries_the_hours_period() -> None:
    row = row_of(line(GPU, HOUR, 2_690_000_000), replica(), at_ns=START + 1_234_567_891_011, revisions={START: 3})
    assert (row["ChargePeriodStart"], row["ChargePeriodEnd"]) == ("2026-11-23T04:00:00Z", "2026-11-23T05:00:00Z")
    assert (row["x_IsSettled"], row["x_Revision"]) == ("true", "3")


def test_tokens_stand_on_the_gpus_work_or_else_on_the_first_line() -> None:
    server = rate("server", "1", "server-hour", START)
    lines = [line(server, HOUR, 10**9), line(GPU, HOUR, 0, state="idle"), line(GPU, HOUR, 0)]
    one = facts(*lines, holder=replica())
    key = key_of(one, focus.BY)
    tokens = {"prompt": 7, "computed": None, "generated": 1, "cached": dict.fromkeys(map(str.lower, CACHED), 0)}
    at = [column.name for column in COLUMNS].index("x_PromptTokens")
    told = Told({key: tokens}, {})
    assert [row[at] for row in focus.rows_of([one], {}, told, Issuer(), "USD")] == [None, None, 7]
    asleep = one._replace(lines=tuple(each._replace(state="asleep") for each in lines))
    # the second facts of the same replica and hour carry none
    assert [row[at] for row in focus.rows_of([asleep, one], {}, told, Issuer(), "USD")] == [7, *[None] * 5]
