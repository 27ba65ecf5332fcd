"""Rate cards: what a file says becomes rates, and what is wrong in it is named by entry and key."""

from __future__ import annotations

import re
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from pathlib import Path

import pytest

from kvtally.agent.price import NANO, Rate, RateError
from kvtally.agent.rate_file import instant_ns, owned_example, packaged_rates, read_rates
from kvtally.agent.rates import RateBook, charge_nano

NEW_YEAR_NS = 1_767_225_600 * NANO  # 2026-01-01T00:00:00Z
RECORDED_NS = 1_795_409_235 * NANO  # 2026-11-23, when the shipped recordings were made
DOCS = Path(__file__).parents[1] / "docs" / "rates.md"

ENTRY = """
[[rate]]
resource = "gpu"
sku = "NVIDIA H100 80GB HBM3"
term = "on-demand"
unit = "gpu-hour"
price = "2.69"
currency = "USD"
from = 2026-01-01
"""
OWNED = """
[[rate]]
resource = "gpu"
term = "owned"
unit = "gpu-hour"
currency = "USD"
from = 2026-01-01
note = "rack 7"
[rate.owned]
capex = 38750
residual_share = 0.10
years = 5
interest = 0.08
opex_share = 0.10
"""


def read(text: str) -> tuple[Rate, ...]:
    return read_rates(text.encode())


def refusal(text: str) -> str:
    with pytest.raises(RateError) as caught:
        read(text)
    return str(caught.value)


def test_an_entry_becomes_a_rate_that_the_operator_stated() -> None:
    assert read(ENTRY) == (
        Rate("gpu", "NVIDIA H100 80GB HBM3", "", "on-demand", "gpu-hour", 2_690_000_000, "USD", NEW_YEAR_NS),
    )


def test_every_key_arrives_where_it_belongs() -> None:
    text = ENTRY.replace("on-demand", "reserved") + (
        'site = "berlin"\nuntil = 2026-01-02T00:00:00+01:00\nbasis = "ASSUMED"\nsource = "contract"\n'
        'note = "renewed"\ncommitted = 16\n'
    )
    (rate,) = read(text)
    assert rate.valid_until_ns == NEW_YEAR_NS + 23 * 3600 * NANO
    assert (rate.site, rate.term, rate.basis, rate.source) == ("berlin", "reserved", "ASSUMED", "contract")
    assert (rate.note, rate.committed, rate.packaged) == ("renewed", 16, False)


def test_a_list_of_products_or_terms_gives_a_rate_for_each() -> None:
    text = ENTRY.replace('"NVIDIA H100 80GB HBM3"', '["A", "*"]').replace('"on-demand"', '["spot", "owned"]')
    assert [(rate.sku, rate.term) for rate in read(text)] == [
        ("A", "spot"),
        ("A", "owned"),
        ("", "spot"),
        ("", "owned"),
    ]


@pytest.mark.parametrize(("written", "price_nano"), [("2", 2 * NANO), ("0.1", NANO // 10), ('"1e-9"', 1)])
def test_a_price_may_stand_without_quotes_and_is_still_exact(written: str, price_nano: int) -> None:
    assert read(ENTRY.replace('"2.69"', written))[0].price_nano == price_nano


def test_hardware_that_was_bought_gets_the_price_that_recovers_it() -> None:
    (rate,) = read(OWNED)
    assert rate.price_nano == 1_473_838_564
    assert rate.note == (
        "rack 7; 1.473838564 an hour of capex 38750, residual_share 0.10, years 5, interest 0.08, opex_share 0.10"
    )


def test_energy_without_a_pue_is_an_assumption() -> None:
    text = ENTRY.replace('"gpu"', '"energy"').replace("gpu-hour", "kWh").replace("on-demand", "owned")
    (assumed,) = read(text)
    assert (assumed.unit, assumed.pue, assumed.basis) == ("kwh", Decimal("1.54"), "ASSUMED")
    (stated,) = read(text + "pue = 1.3\n")
    assert (stated.pue, stated.basis) == (Decimal("1.3"), "MEASURED")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('price = "2.69"', 'prcie = "2.69"', "rate[1].prcie: unknown key; known here: resource, term, unit, currency,"),
        ('price = "2.69"', "", "rate[1].price: give a price, or a [rate.owned] table in its place: one of the two"),
        ('price = "2.69"', 'price = "2,69"', "rate[1].price: '2,69' is not a number: write it like 2.69"),
        ('price = "2.69"', "price = nan", "rate[1].price: nan is not a number from 0 up"),
        ('price = "2.69"', "price = true", "rate[1].price: expected an integer or a string"),
        ('currency = "USD"', "", "rate[1].currency: is missing"),
        ('currency = "USD"', 'currency = "dollar"', "rate[1].currency: 'dollar' is not an ISO 4217 code such as USD"),
        ('"gpu"', '"tpu"', "rate[1].resource: 'tpu' is none of gpu, server, energy, dram, storage, network, platform"),
        ('"on-demand"', '"rent"', "rate[1].term: 'rent' is none of on-demand, spot, reserved, owned"),
        ('"on-demand"', '["spot", "x"]', "rate[1].term[1]: 'x' is none of on-demand, spot, reserved, owned"),
        ('"on-demand"', "[]", "rate[1].term: is an empty list"),
        ('"on-demand"', "7", "rate[1].term: expected a string or a list"),
        ('"gpu-hour"', '"hour"', "rate[1].unit: 'hour' is no unit of gpu: write gpu-hour or gpu-month"),
        ("2026-01-01", '"soon"', 'rate[1].from: "soon" is no date: write 2026-01-01 or 2026-01-01T12:00:00Z'),
        ("2026-01-01", "12:00:00", "rate[1].from: is no date: write 2026-01-01 or 2026-01-01T12:00:00Z"),
        ("2026-01-01", "1", "rate[1].from: is no date: write 2026-01-01 or 2026-01-01T12:00:00Z"),
        ("2026-01-01", "0001-01-01", "rate[1].from: must lie between 1970 and 2262"),
        ("2026-01-01", "2026-01-01\nuntil = 2025-01-01", "rate[1].until: must be later than `from`"),
        ("2026-01-01", "2026-01-01\ncommitted = 8", "rate[1].committed: belongs to a reserved resource"),
        ("2026-01-01", "2026-01-01\ncommitted = 1.5", "rate[1].committed: expected an integer"),
        ("2026-01-01", "2026-01-01\npue = 1.5", "rate[1].pue: belongs to energy, not to gpu"),
        ("2026-01-01", '2026-01-01\nsource = "packaged: me"', 'rate[1].source: "packaged: " marks what comes with'),
        ("2026-01-01", '2026-01-01\n"a\\nb" = 1', "rate[1].a?b: unknown key"),
    ],
)
def test_a_wrong_entry_is_named_with_its_key(old: str, new: str, message: str) -> None:
    assert refusal(ENTRY + ENTRY.replace(old, new)).startswith(message)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("years = 5", "", "rate[0].owned.years: is missing"),
        ("years = 5", "year = 5", "rate[0].owned.year: unknown key; known here: capex, residual_share, years,"),
        ("years = 5", "years = 0", "rate[0].owned.years: must be more than 0"),
        ("0.08", "8", "rate[0].owned.interest: 8 is not between 0 and 1"),
        ("38750", '"a lot"', "rate[0].owned.capex: 'a lot' is not a number"),
        ('term = "owned"', 'term = "spot"', 'rate[0].owned: goes with term = "owned"'),
        ('"gpu-hour"', '"gpu-month"', "rate[0].unit: a [rate.owned] table gives a price per hour"),
        ('unit = "gpu-hour"', 'unit = "gpu-hour"\nprice = "1"', "rate[0].price: give a price, or a [rate.owned] table"),
    ],
)
def test_a_wrong_purchase_is_named_with_its_key(old: str, new: str, message: str) -> None:
    assert refusal(OWNED.replace(old, new)).startswith(message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "rate: is missing: begin every entry with [[rate]]"),
        (b"rate = []", "rate: is missing"),
        (b'rate = "2.69"', "rate: is missing"),
        (b"[rate]\nprice = 1", "rate: is missing"),
        (b"rate = [1]", "rate[0]: expected a table"),
        (b"[[rates]]", "rates: unknown key: a rate card has [[rate]] tables only"),
        (b"[[rate]", "file: is not TOML: "),
        (b"x = 1\xff", "file: is not UTF-8 at byte 5"),
        (b"x = " + b"9" * 5000, "file: is not TOML: "),
        (b"x = " + b"[" * 100_000, "file: is nested too deeply"),
        (b"#" * (16 << 20) + b"#", "file: is larger than 16 MiB: this is no rate card"),
    ],
)
def test_a_file_that_is_no_rate_card_is_refused_in_one_line(content: bytes, message: str) -> None:
    with pytest.raises(RateError) as caught:
        read_rates(content)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "value",
    [
        date(2026, 1, 1),
        datetime(2026, 1, 1),  # noqa: DTZ001  # TOML's local time, which a card means as UTC
        datetime(2026, 1, 1, tzinfo=UTC),
        datetime(2026, 1, 1, 1, tzinfo=timezone(timedelta(hours=1))),
        "2026-01-01",
        "2026-01-01T00:00:00Z",
    ],
)
def test_a_date_is_midnight_utc(value: object) -> None:
    assert instant_ns("from", value) == NEW_YEAR_NS


def test_an_instant_is_exact_to_the_microsecond() -> None:
    assert instant_ns("from", "2026-01-01T00:00:00.000001Z") == NEW_YEAR_NS + 1000
    with pytest.raises(RateError, match="until: is no date"):
        instant_ns("until", time(12))


def test_the_packaged_card_prices_the_recorded_h100_at_2_69_and_says_that_it_assumes() -> None:
    book = RateBook(packaged_rates())
    rate = book.select("gpu", "NVIDIA H100 80GB HBM3", "on-demand", "", RECORDED_NS)
    assert rate is not None
    assert (rate.price_nano, rate.currency, rate.basis, rate.packaged) == (2_690_000_000, "USD", "ASSUMED", True)


@pytest.mark.parametrize("rate", [rate for rate in packaged_rates() if rate.price_nano], ids=lambda rate: rate.sku)
def test_a_packaged_price_names_a_dated_source_and_begins_with_that_month(rate: Rate) -> None:
    assert rate.basis == "ASSUMED"
    assert rate.resource == "gpu"
    read_on = re.search(r"read (\d{4})-(\d{2})-\d{2}", rate.source)
    assert read_on is not None
    assert rate.valid_from_ns == instant_ns("from", date(int(read_on[1]), int(read_on[2]), 1))
    assert "first day of the month" in rate.note


def test_what_comes_with_a_gpu_is_free_and_a_cpu_host_is_not() -> None:
    book = RateBook(packaged_rates())
    for term in ("on-demand", "spot", "reserved", "owned"):
        for resource, sku in (("server", "gpu-host"), ("dram", ""), ("storage", "nvme"), ("network", "")):
            rate = book.select(resource, sku, term, "berlin", RECORDED_NS)  # type: ignore[arg-type]  # words of the loops
            assert rate is not None
            assert (rate.price_nano, rate.basis, rate.note) == (0, "ASSUMED", "inside the GPU price")
    assert book.select("server", "cpu-host", "on-demand", "", RECORDED_NS) is None
    assert book.select("energy", "", "owned", "", RECORDED_NS) is None


def test_the_example_of_owned_hardware_costs_what_its_comments_say() -> None:
    rates = read(owned_example())
    assert {rate.basis for rate in rates} == {"ASSUMED"}
    book = RateBook([*packaged_rates(), *rates])
    start_ns, end_ns = RECORDED_NS, RECORDED_NS + 3600 * NANO
    gpu = charge_nano(book, "gpu", "NVIDIA H100 80GB HBM3", "owned", "", quantity=1, start_ns=start_ns, end_ns=end_ns)
    assert abs(gpu - 1_473_838_564) <= 1
    assert "1.473839" in owned_example()
    power = charge_nano(book, "energy", "", "owned", "", quantity=7, start_ns=start_ns, end_ns=end_ns)
    assert power == 1_001_462_000  # ten times 0.7 kWh x 1.54 x 0.0929


def test_the_host_in_the_examples_comments_is_a_rate_once_the_marks_are_gone() -> None:
    before, mark, after = owned_example().partition("# [[rate]]")
    assert mark
    host = read(before + ("# [[rate]]" + after).replace("\n# ", "\n").removeprefix("# "))[-1]
    assert (host.resource, host.sku, host.price_nano) == ("server", "gpu-host", 343_000_000)


def test_the_rate_files_in_the_documentation_are_rate_files() -> None:
    text = DOCS.read_text("utf-8")
    (block,) = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    assert [rate.price_nano for rate in read(block)] == [2_100_000_000, 92_900_000]
    assert "1.473838564" in text


def test_the_documentation_shows_the_message_that_a_gap_gives() -> None:
    book = RateBook(packaged_rates())
    start_ns = instant_ns("from", "2026-11-23T10:00:00Z")
    with pytest.raises(Exception, match="no rate for NVIDIA L4") as caught:
        book.stretches("gpu", "NVIDIA L4", "on-demand", "", start_ns=start_ns, end_ns=start_ns + 1)
    assert str(caught.value) in DOCS.read_text("utf-8")
