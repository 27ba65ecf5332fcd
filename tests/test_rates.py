"""Prices: which holds when, what a span costs to the nano-unit, and money as text."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtally.agent.price import (
    FOREVER_NS,
    HOUR_NS,
    NANO,
    UNITS,
    Rate,
    RateError,
    Resource,
    checked,
    instant_text,
    nano_to_text,
    owned_hourly_nano,
    parse_price,
    parse_unit,
    rate_text,
)
from kvtally.agent.rates import (
    ChargePart,
    PriceGap,
    RateBook,
    Stretch,
    Used,
    charge_nano,
    energy_cost_nano,
    unused_commitment_nano,
)

H100 = "NVIDIA H100 80GB HBM3"
DAY_NS = 24 * HOUR_NS
NEW_YEAR_NS = 1_767_225_600 * NANO  # 2026-01-01T00:00:00Z
GPU = Rate("gpu", H100, "", "on-demand", "gpu-hour", 2 * NANO, "USD", NEW_YEAR_NS)
ENERGY = Rate("energy", "", "", "owned", "kwh", NANO // 10, "USD", NEW_YEAR_NS, pue=Decimal("1.5"))
RESERVED = GPU._replace(term="reserved", committed=4)


def priced(rate: Rate, price: str) -> Rate:
    return rate._replace(price_nano=parse_price(price))


def selected(book: RateBook, at_ns: int, sku: str = H100, site: str = "") -> int | None:
    rate = book.select("gpu", sku, "on-demand", site, at_ns)
    return None if rate is None else rate.price_nano


def gpu_charge(book: RateBook, start_ns: int, end_ns: int, quantity: Fraction | int = 1) -> int:
    return charge_nano(book, "gpu", H100, "on-demand", "", quantity=quantity, start_ns=start_ns, end_ns=end_ns)


def test_a_later_row_supersedes_an_earlier_one_from_its_first_instant_on() -> None:
    book = RateBook([GPU, priced(GPU, "3")._replace(valid_from_ns=NEW_YEAR_NS + DAY_NS)])
    assert selected(book, NEW_YEAR_NS - 1) is None
    assert selected(book, NEW_YEAR_NS) == 2 * NANO
    assert selected(book, NEW_YEAR_NS + DAY_NS - 1) == 2 * NANO
    assert selected(book, NEW_YEAR_NS + DAY_NS) == 3 * NANO
    assert selected(book, FOREVER_NS - 1) == 3 * NANO


def test_rows_may_be_added_in_any_order_of_their_dates() -> None:
    later = priced(GPU, "3")._replace(valid_from_ns=NEW_YEAR_NS + DAY_NS)
    book = RateBook([later, GPU])
    assert selected(book, NEW_YEAR_NS) == 2 * NANO
    assert selected(book, NEW_YEAR_NS + DAY_NS) == 3 * NANO


def test_of_two_rows_with_one_date_the_one_added_last_holds() -> None:
    assert selected(RateBook([GPU, priced(GPU, "1.5")]), NEW_YEAR_NS) == 1_500_000_000
    assert selected(RateBook([priced(GPU, "1.5"), GPU]), NEW_YEAR_NS) == 2 * NANO


def test_a_row_ends_at_its_until_and_what_it_superseded_does_not_come_back() -> None:
    book = RateBook(
        [GPU, GPU._replace(valid_from_ns=NEW_YEAR_NS + DAY_NS, valid_until_ns=NEW_YEAR_NS + 2 * DAY_NS, price_nano=7)]
    )
    assert selected(book, NEW_YEAR_NS + DAY_NS - 1) == 2 * NANO
    assert selected(book, NEW_YEAR_NS + 2 * DAY_NS - 1) == 7
    assert selected(book, NEW_YEAR_NS + 2 * DAY_NS) is None


def test_a_row_that_is_superseded_before_its_until_is_charged_only_so_far() -> None:
    changed = NEW_YEAR_NS + HOUR_NS
    book = RateBook([GPU._replace(valid_until_ns=FOREVER_NS), priced(GPU, "3")._replace(valid_from_ns=changed)])
    assert gpu_charge(book, NEW_YEAR_NS, changed + HOUR_NS) == 5 * NANO


def test_the_exact_product_comes_before_any_and_then_the_exact_site() -> None:
    book = RateBook(
        [
            GPU._replace(price_nano=1, sku="", site=""),
            GPU._replace(price_nano=2, sku="", site="berlin"),
            GPU._replace(price_nano=3, site=""),
            GPU._replace(price_nano=4, site="berlin"),
        ]
    )
    assert selected(book, NEW_YEAR_NS, H100, "berlin") == 4
    assert selected(book, NEW_YEAR_NS, H100, "paris") == 3
    assert selected(book, NEW_YEAR_NS, "NVIDIA L4", "berlin") == 2
    assert selected(book, NEW_YEAR_NS, "NVIDIA L4", "") == 1


def test_a_star_means_any_product() -> None:
    book = RateBook([GPU._replace(sku="*", site="*")])
    assert selected(book, NEW_YEAR_NS, "NVIDIA L4", "berlin") == 2 * NANO


def test_what_the_operator_says_of_any_gpu_comes_before_a_packaged_price_of_this_one() -> None:
    packaged = GPU._replace(basis="ASSUMED", source="packaged: a price list", price_nano=5)
    book = RateBook([packaged, GPU._replace(sku="", valid_from_ns=NEW_YEAR_NS + DAY_NS)])
    assert selected(book, NEW_YEAR_NS) == 5
    assert selected(book, NEW_YEAR_NS + DAY_NS) == 2 * NANO


def test_an_assumption_of_the_operator_comes_before_a_packaged_price() -> None:
    packaged = GPU._replace(basis="ASSUMED", source="packaged: a price list", price_nano=5)
    assert selected(RateBook([GPU._replace(basis="ASSUMED", source="a guess"), packaged]), NEW_YEAR_NS) == 2 * NANO


def test_a_rate_for_another_term_or_resource_is_no_rate() -> None:
    book = RateBook([GPU])
    assert book.select("gpu", H100, "reserved", "", NEW_YEAR_NS) is None
    assert book.select("server", H100, "on-demand", "", NEW_YEAR_NS) is None


def test_a_span_is_cut_exactly_where_the_price_changes() -> None:
    changed = NEW_YEAR_NS + HOUR_NS
    book = RateBook([GPU, priced(GPU, "3")._replace(valid_from_ns=changed)])
    parts = book.amount_nano(
        "gpu", H100, "on-demand", "", quantity=8, start_ns=NEW_YEAR_NS, end_ns=changed + HOUR_NS // 2
    )
    assert parts == (
        ChargePart(book.rates[0], NEW_YEAR_NS, changed, Fraction(16 * NANO)),
        ChargePart(book.rates[1], changed, changed + HOUR_NS // 2, Fraction(12 * NANO)),
    )
    assert gpu_charge(book, NEW_YEAR_NS, changed + HOUR_NS // 2, 8) == 28 * NANO


def test_a_price_that_another_rate_hides_for_a_while_is_charged_on_both_sides_of_it() -> None:
    start, end = NEW_YEAR_NS + HOUR_NS, NEW_YEAR_NS + 2 * HOUR_NS
    book = RateBook([GPU._replace(sku=""), GPU._replace(price_nano=NANO, valid_from_ns=start, valid_until_ns=end)])
    assert gpu_charge(book, NEW_YEAR_NS, end + HOUR_NS) == (2 + 1 + 2) * NANO


def test_the_cost_of_a_recording_of_94_seconds_at_the_default_price_is_seven_cents() -> None:
    assert nano_to_text(gpu_charge(RateBook([priced(GPU, "2.69")]), NEW_YEAR_NS, NEW_YEAR_NS + 94 * NANO)) == (
        "0.070238889"  # 2.69 / 3600 x 94 = 0.07023888...
    )


def test_a_month_of_storage_is_730_and_a_half_hours() -> None:
    book = RateBook([Rate("storage", "", "", "on-demand", "tib-month", 10 * NANO, "USD", NEW_YEAR_NS)])
    end = NEW_YEAR_NS + 1461 * HOUR_NS // 2
    assert charge_nano(book, "storage", "", "on-demand", "", quantity=2, start_ns=NEW_YEAR_NS, end_ns=end) == 20 * NANO


def test_a_gap_is_refused_and_the_message_holds_the_line_to_type() -> None:
    with pytest.raises(PriceGap) as caught:
        charge_nano(
            RateBook([GPU]),
            "gpu",
            "NVIDIA L4",
            "on-demand",
            "",
            quantity=1,
            start_ns=NEW_YEAR_NS + HOUR_NS,
            end_ns=NEW_YEAR_NS + 2 * HOUR_NS,
        )
    line = 'kvtally rates add gpu PRICE --unit gpu-hour --sku "NVIDIA L4" --from 2026-01-01 --term on-demand'
    assert caught.value.command == line
    assert str(caught.value) == f"no rate for NVIDIA L4 (gpu, on-demand) on 2026-01-01T01:00:00Z: {line}"
    assert (caught.value.resource, caught.value.sku) == ("gpu", "NVIDIA L4")
    assert caught.value.start_ns == NEW_YEAR_NS + HOUR_NS


@pytest.mark.parametrize(
    ("start_ns", "end_ns", "gap_ns"),
    [
        (NEW_YEAR_NS - 5, NEW_YEAR_NS + 5, NEW_YEAR_NS - 5),
        (NEW_YEAR_NS - 5, NEW_YEAR_NS, NEW_YEAR_NS - 5),
        (NEW_YEAR_NS + DAY_NS - 1, NEW_YEAR_NS + DAY_NS + 1, NEW_YEAR_NS + DAY_NS),
        (NEW_YEAR_NS, NEW_YEAR_NS + 3 * DAY_NS, NEW_YEAR_NS + DAY_NS),
        (NEW_YEAR_NS + DAY_NS, NEW_YEAR_NS + 2 * DAY_NS + 1, NEW_YEAR_NS + DAY_NS),
    ],
)
def test_a_nanosecond_without_a_price_is_a_gap(start_ns: int, end_ns: int, gap_ns: int) -> None:
    book = RateBook(
        [GPU._replace(valid_until_ns=NEW_YEAR_NS + DAY_NS), GPU._replace(valid_from_ns=NEW_YEAR_NS + 2 * DAY_NS)]
    )
    with pytest.raises(PriceGap) as caught:
        gpu_charge(book, start_ns, end_ns)
    assert caught.value.start_ns == gap_ns


def test_the_line_to_type_does_not_replace_a_price_of_earlier_that_day() -> None:
    noon = NEW_YEAR_NS + 12 * HOUR_NS
    book = RateBook([GPU._replace(valid_until_ns=noon, currency="EUR", site="lab 1")])
    with pytest.raises(PriceGap) as caught:
        book.stretches("gpu", H100, "on-demand", "lab 1", start_ns=NEW_YEAR_NS, end_ns=noon + 1)
    assert caught.value.command == (
        f'kvtally rates add gpu PRICE --unit gpu-hour --sku "{H100}" --site "lab 1"'
        " --from 2026-01-01T12:00:00Z --term on-demand --currency EUR"
    )


def test_a_product_name_that_a_shell_would_read_is_quoted() -> None:
    with pytest.raises(PriceGap) as caught:
        RateBook([]).stretches("platform", "$(reboot)", "owned", "", start_ns=0, end_ns=1)
    assert caught.value.command == (
        "kvtally rates add platform PRICE --unit service-hour --sku '$(reboot)' --from 1970-01-01 --term owned"
    )


def test_an_empty_span_costs_nothing_even_where_no_price_is() -> None:
    assert gpu_charge(RateBook([]), 5, 5) == 0
    with pytest.raises(ValueError, match="cannot charge"):
        gpu_charge(RateBook([GPU]), NEW_YEAR_NS + 1, NEW_YEAR_NS)
    with pytest.raises(ValueError, match="cannot charge"):
        gpu_charge(RateBook([GPU]), NEW_YEAR_NS, NEW_YEAR_NS + 1, -1)


def test_half_a_unit_goes_to_the_even_side_and_two_halves_make_one() -> None:
    book = RateBook([GPU._replace(price_nano=1)])  # one nano-unit an hour; the epoch is a whole number of hours away
    half = HOUR_NS // 2
    hours = NEW_YEAR_NS // HOUR_NS  # 490896, even: A goes 490896, 490896.5, 490897, 490897.5, 490898
    assert hours % 2 == 0
    spans = [gpu_charge(book, NEW_YEAR_NS + n * half, NEW_YEAR_NS + (n + 1) * half) for n in range(4)]
    assert spans == [0, 1, 1, 0]
    assert gpu_charge(book, NEW_YEAR_NS, NEW_YEAR_NS + 2 * HOUR_NS) == 2


def test_a_rate_added_for_another_time_leaves_every_other_charge_as_it_was() -> None:
    odd = priced(GPU, "2.690000001")
    earlier = priced(GPU, "1.23456789")._replace(valid_from_ns=NEW_YEAR_NS - 777)
    later = priced(GPU, "9.87654321")._replace(valid_from_ns=NEW_YEAR_NS + DAY_NS)
    spans = [(NEW_YEAR_NS + n * 5_000_000_007, NEW_YEAR_NS + (n + 1) * 5_000_000_007) for n in range(100)]
    before = [gpu_charge(RateBook([odd]), *span) for span in spans]
    assert before == [gpu_charge(RateBook([earlier, odd, later]), *span) for span in spans]


OFFSETS = st.integers(1, 400 * DAY_NS)
PRICES = st.integers(0, 20 * NANO)


@given(
    changes=st.dictionaries(OFFSETS, PRICES, max_size=8),
    cuts=st.sets(OFFSETS, max_size=30),
    quantity=st.fractions(0, 64, max_denominator=1000),
)
def test_any_partition_of_time_adds_up_to_the_whole_within_a_unit_a_price(
    changes: dict[int, int], cuts: set[int], quantity: Fraction
) -> None:
    book = RateBook([GPU, *(GPU._replace(valid_from_ns=NEW_YEAR_NS + at, price_nano=p) for at, p in changes.items())])
    instants = sorted({NEW_YEAR_NS, NEW_YEAR_NS + 400 * DAY_NS, *(NEW_YEAR_NS + cut for cut in cuts)})
    whole = gpu_charge(book, instants[0], instants[-1], quantity)
    pieces = [gpu_charge(book, start, end, quantity) for start, end in pairwise(instants)]
    assert sum(pieces) == whole
    assert min(pieces) >= 0
    parts = book.amount_nano("gpu", H100, "on-demand", "", quantity=quantity, start_ns=instants[0], end_ns=instants[-1])
    exact = sum((part.amount_nano for part in parts), Fraction(0))
    assert abs(whole - exact) <= len(parts)
    assert [part.start_ns for part in parts[1:]] == [part.end_ns for part in parts[:-1]]


@given(changes=st.dictionaries(OFFSETS, PRICES, max_size=8), span=st.tuples(OFFSETS, OFFSETS))
def test_an_exact_amount_is_the_sum_over_the_prices_worked_out_one_by_one(
    changes: dict[int, int], span: tuple[int, int]
) -> None:
    book = RateBook([GPU, *(GPU._replace(valid_from_ns=NEW_YEAR_NS + at, price_nano=p) for at, p in changes.items())])
    start, end = NEW_YEAR_NS + min(span), NEW_YEAR_NS + max(span)
    edges = sorted({start, end, *(NEW_YEAR_NS + at for at in changes if start < NEW_YEAR_NS + at < end)})
    expected = sum(
        Fraction(
            max([(0, 2 * NANO), *((at, p) for at, p in changes.items() if NEW_YEAR_NS + at <= low)])[1] * (high - low),
            HOUR_NS,
        )
        for low, high in pairwise(edges)
    )
    parts = book.amount_nano("gpu", H100, "on-demand", "", quantity=1, start_ns=start, end_ns=end)
    assert sum(part.amount_nano for part in parts) == expected


@given(
    rows=st.lists(
        st.tuples(
            st.sampled_from(["", H100]),
            st.sampled_from(["", "berlin"]),
            st.booleans(),
            st.integers(0, 20),
            st.one_of(st.none(), st.integers(1, 20)),
        ),
        max_size=12,
    ),
    at=st.integers(0, 25),
)
def test_the_rate_selected_is_the_one_that_the_rules_name(
    rows: list[tuple[str, str, bool, int, int | None]], at: int
) -> None:
    rates = [
        GPU._replace(
            sku=sku,
            site=site,
            source="packaged: list" if packaged else "",
            valid_from_ns=begin,
            valid_until_ns=None if length is None else begin + length,
            price_nano=index,
        )
        for index, (sku, site, packaged, begin, length) in enumerate(rows)
    ]
    expected = None
    for packaged in (False, True):
        for sku in (H100, ""):
            for site in ("berlin", ""):
                same = [r for r in rates if (r.packaged, r.sku, r.site) == (packaged, sku, site)]
                begun = [(r.valid_from_ns, r.price_nano, r) for r in same if r.valid_from_ns <= at]
                last = max(begun)[2] if begun else None
                if expected is None and last and (last.valid_until_ns is None or at < last.valid_until_ns):
                    expected = last.price_nano
    assert selected(RateBook(rates), at, H100, "berlin") == expected


def test_more_products_than_are_remembered_are_still_priced() -> None:
    book = RateBook([GPU._replace(sku="")])
    assert {selected(book, NEW_YEAR_NS, f"product {number}") for number in range(5000)} == {2 * NANO}
    assert len(book._timelines) < 5000


def test_energy_is_kilowatt_hours_times_pue_times_price() -> None:
    assert energy_cost_nano(ENERGY, 7_200_000_000) == 300_000_000  # 2 kWh x 1.5 x 0.10
    book = RateBook([ENERGY])
    parts = book.amount_nano("energy", "", "owned", "", quantity=2, start_ns=NEW_YEAR_NS, end_ns=NEW_YEAR_NS + 5 * NANO)
    assert [part.amount_nano for part in parts] == [300_000_000]


def test_700_watts_for_an_hour_cost_ten_cents_at_the_methods_prices() -> None:
    rate = ENERGY._replace(price_nano=parse_price("0.0929"), pue=Decimal("1.54"))
    assert energy_cost_nano(rate, 700 * 3600 * 1000) == Fraction(100_146_200)  # 0.7 x 1.54 x 0.0929 = 0.1001462


@given(cuts=st.sets(st.integers(1, 999), max_size=20), energy_mj=st.integers(0, 10**10))
def test_the_parts_of_an_intervals_energy_add_up_across_a_price_change(cuts: set[int], energy_mj: int) -> None:
    book = RateBook([ENERGY, ENERGY._replace(price_nano=77_777_777, valid_from_ns=NEW_YEAR_NS + 400)])
    interval = (NEW_YEAR_NS, NEW_YEAR_NS + 1000)
    quantity = Fraction(energy_mj, 3_600_000_000)

    def charge(start_ns: int, end_ns: int) -> int:
        return charge_nano(
            book,
            "energy",
            "",
            "owned",
            "",
            quantity=quantity,
            start_ns=start_ns,
            end_ns=end_ns,
            used_over_ns=interval,
        )

    instants = sorted({*interval, *(NEW_YEAR_NS + cut for cut in cuts)})
    whole = charge(*interval)
    assert sum(charge(start, end) for start, end in pairwise(instants)) == whole
    exact = quantity * Fraction(3, 2) * (Fraction(4, 10) * 100_000_000 + Fraction(6, 10) * 77_777_777)
    assert abs(whole - exact) <= 2
    assert whole == charge_nano(
        book, "energy", "", "owned", "", quantity=quantity, start_ns=interval[0], end_ns=interval[1]
    )


def test_energy_used_in_no_time_or_outside_its_interval_is_refused_rather_than_lost() -> None:
    book = RateBook([ENERGY])
    with pytest.raises(ValueError, match="in no time"):
        charge_nano(book, "energy", "", "owned", "", quantity=1, start_ns=NEW_YEAR_NS, end_ns=NEW_YEAR_NS)
    with pytest.raises(ValueError, match="is no part of"):
        charge_nano(
            book,
            "energy",
            "",
            "owned",
            "",
            quantity=1,
            start_ns=NEW_YEAR_NS,
            end_ns=NEW_YEAR_NS + 2,
            used_over_ns=(NEW_YEAR_NS, NEW_YEAR_NS + 1),
        )


def test_an_unstated_pue_is_assumed_and_makes_the_rate_an_assumption() -> None:
    rate = checked(ENERGY._replace(pue=None, note="grid"))
    assert (rate.pue, rate.basis, rate.note) == (Decimal("1.54"), "ASSUMED", "grid; PUE 1.54 assumed")
    assert checked(rate) == rate


def test_what_is_committed_and_not_used_is_charged_at_the_reserved_price() -> None:
    (commitment,) = RateBook([RESERVED, GPU]).commitments()
    end = NEW_YEAR_NS + 3 * HOUR_NS
    used = [
        Used(1, NEW_YEAR_NS, NEW_YEAR_NS + HOUR_NS),  # 3 of 4 idle for an hour
        Used(3, NEW_YEAR_NS + HOUR_NS, end),  # then 5 GPUs in use for an hour: nothing idle, and no credit
        Used(2, NEW_YEAR_NS + HOUR_NS, NEW_YEAR_NS + 2 * HOUR_NS),  # then 1 idle for an hour
    ]
    assert unused_commitment_nano(commitment, used, NEW_YEAR_NS, end) == (3 + 0 + 1) * 2 * NANO
    assert unused_commitment_nano(commitment, [], NEW_YEAR_NS, end) == 4 * 3 * 2 * NANO
    assert unused_commitment_nano(commitment, [], NEW_YEAR_NS - DAY_NS, NEW_YEAR_NS) == 0
    assert unused_commitment_nano(commitment, [Used(9, 0, FOREVER_NS)], NEW_YEAR_NS, end) == 0


def test_a_commitment_ends_with_its_contract() -> None:
    book = RateBook([RESERVED._replace(valid_until_ns=NEW_YEAR_NS + HOUR_NS)])
    (commitment,) = book.commitments()
    assert commitment == Stretch(book.rates[0], NEW_YEAR_NS, NEW_YEAR_NS + HOUR_NS)
    assert unused_commitment_nano(commitment, [], NEW_YEAR_NS, NEW_YEAR_NS + DAY_NS) == 8 * NANO


@given(
    spans=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 10**13), st.integers(0, 10**13)), max_size=8),
    cuts=st.sets(st.integers(1, 10**13 - 1), max_size=10),
)
def test_the_unused_part_of_a_commitment_adds_up_and_is_never_negative(
    spans: list[tuple[int, int, int]], cuts: set[int]
) -> None:
    (commitment,) = RateBook([RESERVED]).commitments()
    used = [Used(count, NEW_YEAR_NS + min(a, b), NEW_YEAR_NS + max(a, b)) for count, a, b in spans]
    instants = sorted({NEW_YEAR_NS, NEW_YEAR_NS + 10**13, *(NEW_YEAR_NS + cut for cut in cuts)})
    pieces = [unused_commitment_nano(commitment, used, start, end) for start, end in pairwise(instants)]
    assert min(pieces) >= 0
    assert sum(pieces) == unused_commitment_nano(commitment, used, instants[0], instants[-1])


def test_a_ledger_has_one_currency() -> None:
    with pytest.raises(RateError, match="currency: EUR beside USD: a ledger has one currency"):
        RateBook([GPU, GPU._replace(currency="EUR")])


def test_packaged_prices_of_another_currency_are_left_out_but_nothing_is_nothing_in_any() -> None:
    packaged = GPU._replace(source="packaged: list", basis="ASSUMED")
    free = packaged._replace(resource="server", unit="server-hour", price_nano=0, sku="")
    book = RateBook([packaged, free, GPU._replace(sku="NVIDIA L4", currency="EUR")])
    assert book.currency == "EUR"
    assert selected(book, NEW_YEAR_NS) is None
    server = book.select("server", "gpu-host", "on-demand", "", NEW_YEAR_NS)
    assert server is not None
    assert (server.price_nano, server.currency) == (0, "EUR")
    assert RateBook([packaged]).currency == "USD"
    assert RateBook([]).currency == ""


def test_owned_hardware_of_the_methods_example_costs_1_47_an_hour() -> None:
    # 1.08^5 = 1.4693280768; 38750 - 3875 / 1.4693280768 = 36112.740107; CRF = 0.2504564545; recovery 9044.668841
    # plus upkeep 3875 makes 12919.668841 a year
    hourly = owned_hourly_nano(Decimal(38750), Decimal("0.1"), Decimal(5), Decimal("0.08"), Decimal("0.1"))
    assert hourly == 1_473_838_564
    straight_line = owned_hourly_nano(Decimal(38750), Decimal(0), Decimal(3), Decimal(0), Decimal(0))
    assert straight_line == 1_473_496_083  # 38750 / 3 / 8766


def test_without_interest_the_loss_is_spread_evenly() -> None:
    assert owned_hourly_nano(Decimal(17532), Decimal("0.5"), Decimal(1), Decimal(0), Decimal(0)) == NANO


@pytest.mark.parametrize(
    ("numbers", "field"),
    [
        (("NaN", "0", "1", "0", "0"), "capex"),
        (("-1", "0", "1", "0", "0"), "capex"),
        (("1", "10", "1", "0", "0"), "residual_share"),
        (("1", "0", "0", "0", "0"), "years"),
        (("1", "0", "1", "8", "0"), "interest"),
        (("1", "0", "1", "0", "1.1"), "opex_share"),
        (("1e13", "0", "1e-9", "0", "0"), "capex"),
    ],
)
def test_numbers_of_a_purchase_that_cannot_be_right_are_refused_by_name(
    numbers: tuple[str, str, str, str, str], field: str
) -> None:
    with pytest.raises(RateError) as caught:
        owned_hourly_nano(*map(Decimal, numbers))
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("amount_nano", "text"),
    [
        (70_200_000, "0.070200000"),
        (0, "0.000000000"),
        (-1, "-0.000000001"),
        (-1_500_000_000, "-1.500000000"),
        (12_345_678_901_234_567_890, "12345678901.234567890"),
    ],
)
def test_nano_units_are_written_with_nine_places(amount_nano: int, text: str) -> None:
    assert nano_to_text(amount_nano) == text


@pytest.mark.parametrize(
    ("text", "price_nano"),
    [
        ("2.69", 2_690_000_000),
        ("0", 0),
        ("0.000000001", 1),
        ("1e-9", 1),
        ("2.6900000000000", 2_690_000_000),
        ("1.5E3", 1500 * NANO),
        ("1000000000", 10**18),
        ("0e-999999", 0),
        ("-0", 0),
    ],
)
def test_a_price_is_read_exactly(text: str, price_nano: int) -> None:
    assert parse_price(text) == price_nano


@given(st.integers(0, 10**18))
def test_a_price_written_is_read_back(price_nano: int) -> None:
    assert parse_price(nano_to_text(price_nano)) == price_nano


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("2,69", "is not a number: write it like 2.69"),
        ("", "is not a number"),
        ("$2", "is not a number"),
        ("-1", "is not a number from 0 up"),
        ("NaN", "is not a number from 0 up"),
        ("sNaN", "is not a number from 0 up"),
        ("Infinity", "is not a number from 0 up"),
        ("0.0000000001", "has more than nine decimal places"),
        ("1.2345678901", "has more than nine decimal places"),
        ("1e-999999", "has more than nine decimal places"),
        ("1e10", "is more than 1000000000"),
        ("1e999999", "is more than 1000000000"),
        ("1" * 65, "at most 64 characters"),
    ],
)
def test_what_is_no_price_is_refused(text: str, reason: str) -> None:
    with pytest.raises(RateError) as caught:
        parse_price(text)
    assert caught.value.field == "price"
    assert reason in caught.value.reason


def test_a_unit_belongs_to_its_resource() -> None:
    assert parse_unit("gpu", " GPU-Hour ") == "gpu-hour"
    assert parse_unit("energy", "kWh") == "kwh"
    with pytest.raises(RateError, match="unit: 'kwh' is no unit of gpu: write gpu-hour or gpu-month"):
        parse_unit("gpu", "kwh")


def test_every_resource_has_units_of_one_kind() -> None:
    for units in UNITS.values():
        assert len({hours is None for hours in units.values()}) == 1


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        (GPU._replace(unit="kwh"), "unit"),
        (GPU._replace(unit="GPU-hour"), "unit"),
        (GPU._replace(currency="usd"), "currency"),
        (GPU._replace(currency="U1D"), "currency"),
        (GPU._replace(currency="EURO"), "currency"),
        (GPU._replace(price_nano=-1), "price"),
        (GPU._replace(price_nano=10**18 + 1), "price"),
        (GPU._replace(valid_from_ns=-1), "from"),
        (GPU._replace(valid_until_ns=NEW_YEAR_NS), "until"),
        (GPU._replace(sku="a\nb"), "sku"),
        (GPU._replace(site="x" * 201), "site"),
        (GPU._replace(note="\x1b[31m"), "note"),
        (GPU._replace(committed=4), "committed"),
        (RESERVED._replace(committed=0), "committed"),
        (RESERVED._replace(committed=10**9 + 1), "committed"),
        (ENERGY._replace(term="reserved", committed=4), "committed"),
        (GPU._replace(pue=Decimal("1.5")), "pue"),
        (ENERGY._replace(pue=Decimal("0.9")), "pue"),
        (ENERGY._replace(pue=Decimal("NaN")), "pue"),
    ],
)
def test_a_row_that_cannot_be_right_is_refused_by_its_key(wrong: Rate, field: str) -> None:
    with pytest.raises(RateError) as caught:
        RateBook([wrong])
    assert caught.value.field == field


def test_words_that_are_no_resource_term_or_basis_are_refused() -> None:
    row = GPU._asdict()
    for field, known in (("resource", "gpu, server"), ("term", "on-demand, spot"), ("basis", "MEASURED, ASSUMED")):
        with pytest.raises(RateError, match=f"^{field}: 'tpu' is none of {known}"):
            checked(Rate(**{**row, field: "tpu"}))


def test_a_rate_is_named_with_its_price_date_basis_and_source() -> None:
    assert rate_text(priced(GPU, "2.69")._replace(source="contract 4711")) == (
        f"gpu {H100} on-demand 2.69 USD/gpu-hour from 2026-01-01 (MEASURED: contract 4711)"
    )
    assert rate_text(ENERGY._replace(valid_from_ns=NEW_YEAR_NS + 1_500_000_000)) == (
        "energy owned 0.10 USD/kwh x PUE 1.5 from 2026-01-01T00:00:01.500000Z (MEASURED)"
    )


def test_an_instant_is_a_date_only_at_midnight() -> None:
    assert instant_text(NEW_YEAR_NS) == "2026-01-01"
    assert instant_text(NEW_YEAR_NS + HOUR_NS) == "2026-01-01T01:00:00Z"


@pytest.mark.parametrize("resource", list(UNITS))
def test_every_resource_can_be_charged_and_the_line_for_its_gap_names_its_usual_unit(resource: Resource) -> None:
    unit = next(iter(UNITS[resource]))
    rate = GPU._replace(resource=resource, unit=unit, pue=Decimal(1) if resource == "energy" else None)
    hours = UNITS[resource][unit]
    end_ns = NEW_YEAR_NS + int((hours or 1) * HOUR_NS)
    book = RateBook([rate])
    charged = charge_nano(book, resource, H100, "on-demand", "", quantity=3, start_ns=NEW_YEAR_NS, end_ns=end_ns)
    assert charged == 6 * NANO  # three units at 2, whatever the unit
    with pytest.raises(PriceGap, match=f"add {resource} PRICE --unit {unit} "):
        book.stretches(resource, "else", "on-demand", "", start_ns=NEW_YEAR_NS, end_ns=end_ns)
