from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from itertools import pairwise, permutations
from typing import TYPE_CHECKING, Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtally.agent.costing import CPU_HOST, GPU_HOST, apportioned, law_of, replica_facts, time_of, working_ns
from kvtally.agent.facts import WORK, EngineRow, Evidence, Facts, Replica
from kvtally.agent.interval import ASLEEP_AT_END, ASLEEP_AT_START, BORN, BUSY_AT_END, BUSY_AT_START, RESET
from kvtally.agent.price import HOUR_NS, NANO, Rate
from kvtally.agent.rates import RateBook, charge_nano
from kvtally.agent.states import STATES, EngineTime
from kvtally.agent.timeline import Span, Timeline
from kvtally.collectors.quantities import ENGINE

if TYPE_CHECKING:
    from kvtally.agent.price import Resource
    from kvtally.agent.states import State

SECOND = NANO
H100 = "NVIDIA H100 80GB HBM3"
NOON = 500_000 * HOUR_NS  # a whole hour: 2027-01-15T08:00Z
BUSY = BUSY_AT_START | BUSY_AT_END
ASLEEP = ASLEEP_AT_START | ASLEEP_AT_END

GPU = Rate("gpu", H100, "", "on-demand", "gpu-hour", 2 * NANO, "USD", 0)
SERVER = Rate("server", GPU_HOST, "", "on-demand", "server-hour", 8 * NANO, "USD", 0)
ENERGY = Rate("energy", "", "", "owned", "kwh", NANO // 10, "USD", 0, pue=Decimal("1.5"))
REPLICA = Replica(1, "127.0.0.1:8000/0", "llama-8b", "0.25.1", ("GPU-a",), H100, "on-demand", "", {})
OWNED = REPLICA._replace(term="owned", gpus=("GPU-a", "GPU-b"))
NOTHING = Evidence({}, {}, {}, ())


def row(start_ns: int, end_ns: int, flags: int = BUSY, missed: int = 0, **values: int | None) -> EngineRow:
    began_ns = values.pop("began_ns", None)
    shown = tuple(values.get(quantity.name) for quantity in ENGINE)
    return EngineRow(1, start_ns, end_ns, missed, flags, began_ns, shown)


def hour(*minutes: int, start_ns: int = NOON) -> list[EngineRow]:
    """Rows of an hour, busy and idle in turn, that end at these minutes."""
    edges = [start_ns + minute * 60 * SECOND for minute in (0, *minutes)]
    return [
        row(start, end, BUSY if number % 2 == 0 else 0, steps=0) for number, (start, end) in enumerate(pairwise(edges))
    ]


def priced(rate: Rate, price: float, **changes: Any) -> Rate:
    return rate._replace(price_nano=round(price * NANO), **changes)


def facts(
    rows: list[EngineRow],
    rates: list[Rate],
    replica: Replica = REPLICA,
    period_ns: tuple[int, int] = (NOON, NOON + HOUR_NS),
    evidence: Evidence = NOTHING,
    **options: Any,
) -> Facts:
    own = [one for one in rows if one.start_ns < period_ns[1] and one.end_ns > period_ns[0]]
    return replica_facts(
        replica,
        own,
        evidence,
        RateBook(rates),
        period_ns=period_ns,
        tokens_from_ns=options.pop("tokens_from_ns", 0),
        **options,
    )


def amounts(found: Facts, resource: str = "gpu") -> dict[str, int]:
    assert found.lines is not None
    spent: dict[str, int] = {}
    for line in found.lines:
        if line.resource == resource:
            spent[line.state] = spent.get(line.state, 0) + line.amount_nano
    return spent


def spent(found: Facts, resource: str | None = None) -> int:
    assert found.lines is not None
    return sum(line.amount_nano for line in found.lines if resource in {None, line.resource})


@given(
    st.integers(0, 10**18),
    st.dictionaries(st.sampled_from("abcdefg"), st.integers(0, 10**15), min_size=1).filter(lambda w: any(w.values())),
)
def test_what_is_apportioned_adds_up_and_no_part_is_off_by_one(total: int, weights: dict[str, int]) -> None:
    parts = apportioned(total, weights)
    assert list(parts) == list(weights)
    assert sum(parts.values()) == total
    whole = sum(weights.values())
    assert all(abs(Fraction(total * weight, whole) - parts[key]) < 1 for key, weight in weights.items())
    assert all(parts[key] == 0 for key, weight in weights.items() if not weight)


def test_the_largest_remainders_get_the_rest_and_ties_go_in_order() -> None:
    assert apportioned(10, {"a": 1, "b": 1, "c": 1}) == {"a": 4, "b": 3, "c": 3}
    assert apportioned(5, {"a": 30, "b": 69, "c": 1}) == {"a": 2, "b": 3, "c": 0}  # 1.5, 3.45, 0.05
    assert apportioned(1, {"a": 1, "b": 2}) == {"a": 0, "b": 1}


def test_what_has_no_weight_gets_nothing_and_something_without_weights_is_an_error() -> None:
    assert apportioned(0, {"a": 0, "b": 0}) == {"a": 0, "b": 0}
    with pytest.raises(ValueError, match="7 to split, and no weight"):
        apportioned(7, {"a": 0})


def test_an_hour_of_one_gpu_costs_its_price_and_every_state_its_share() -> None:
    found = facts(hour(15, 60), [GPU])
    assert found.state_ns == {
        "occupied": HOUR_NS // 4,
        "idle": 3 * HOUR_NS // 4,
        "asleep": 0,
        "warm_up": 0,
        "unallocated": 0,
    }
    assert amounts(found) == {"occupied": NANO // 2, "idle": 3 * NANO // 2}
    assert found.lines is not None
    assert [(line.quantity, line.unit, line.sku, line.rate) for line in found.lines] == [
        (HOUR_NS // 4, "gpu-ns", H100, GPU),
        (3 * HOUR_NS // 4, "gpu-ns", H100, GPU),
    ]
    assert (found.start_ns, found.end_ns, found.period_ns) == (NOON, NOON + HOUR_NS, NOON)
    assert (found.covered_ns, found.modelled, found.findings) == (HOUR_NS, False, ())


def test_every_state_is_paid_alike_and_only_the_time_that_is_covered() -> None:
    minute = 60 * SECOND
    rows = [
        row(NOON, NOON + minute),
        row(NOON + minute, NOON + 2 * minute, 0, steps=0),
        row(NOON + 2 * minute, NOON + 3 * minute, ASLEEP),
        row(NOON + 10 * minute, NOON + 12 * minute, RESET, began_ns=NOON + 11 * minute, steps=0),
    ]
    found = facts(rows, [priced(GPU, 3.6)])
    price = 60_000_000  # of a minute
    assert amounts(found) == dict.fromkeys(("occupied", "idle", "asleep", "warm_up", "unallocated"), price)
    assert (found.covered_ns, found.modelled) == (5 * minute, True)
    assert (found.start_ns, found.end_ns) == (NOON, NOON + 12 * minute)


def test_gpus_multiply_the_price_and_not_the_engines_time() -> None:
    found = facts(hour(60), [GPU], REPLICA._replace(gpus=("GPU-a", "GPU-b", "GPU-c")))
    assert found.state_ns["occupied"] == HOUR_NS
    assert found.lines is not None
    assert [(line.quantity, line.amount_nano) for line in found.lines] == [(3 * HOUR_NS, 6 * NANO)]


def test_a_price_that_changes_within_the_hour_splits_it_exactly() -> None:
    dearer = priced(GPU, 3, valid_from_ns=NOON + HOUR_NS // 2)
    found = facts(hour(15, 60), [GPU, dearer])
    assert found.lines is not None
    assert [(line.state, line.rate.price_nano // NANO, line.amount_nano) for line in found.lines] == [
        ("occupied", 2, NANO // 2),
        ("idle", 2, NANO // 2),
        ("idle", 3, 3 * NANO // 2),
    ]


def test_time_without_a_price_makes_the_money_unknown_and_says_what_to_type() -> None:
    gap = GPU._replace(valid_until_ns=NOON + HOUR_NS // 2)
    found = facts(hour(15, 60), [gap])
    assert found.lines is None
    assert found.state_ns["idle"] == 3 * HOUR_NS // 4  # time and tokens are known all the same
    (finding,) = found.findings
    assert (finding.kind, finding.target) == ("no_rate", "engine/127.0.0.1:8000/0")
    assert (finding.start_ns, finding.end_ns) == (NOON, NOON + HOUR_NS)
    assert f'kvtally rates add gpu PRICE --unit gpu-hour --sku "{H100}" --from 2027-01-15' in finding.message


def test_one_resource_without_a_price_makes_all_the_money_unknown() -> None:
    found = facts(hour(60), [GPU], REPLICA._replace(dram_gib=Fraction(3)))
    assert found.lines is None
    assert "kvtally rates add dram PRICE --unit gib-hour" in found.findings[0].message


@pytest.mark.parametrize(
    ("replica", "message"),
    [
        (
            REPLICA._replace(gpus=None, sku=None, mapping="two engines and two GPUs"),
            (
                "replica mapping unknown (two engines and two GPUs): tokens and seconds are shown, money is not. Name "
                'them in kvtally.toml, in the [[engine]] with url = "http://127.0.0.1:8000/metrics": gpus = ["GPU-…"]'
            ),
        ),
        (
            REPLICA._replace(name="127.0.0.1:8000/0/llama-8b", gpus=None),
            (
                "replica mapping unknown (nothing says which GPUs this engine holds): tokens and seconds are shown, "
                "money is not. Name them in kvtally.toml, in the [[engine]] with "
                'url = "http://127.0.0.1:8000/metrics": gpus = ["GPU-…"]'
            ),
        ),
        (
            REPLICA._replace(sku=None, mapping="config"),
            (
                "replica mapping unknown (no driver here shows GPU-a, so its product is unknown): tokens and seconds "
                "are shown, money is not. Compare `gpus` in kvtally.toml with `nvidia-smi -L`"
            ),
        ),
    ],
)
def test_an_engine_whose_gpus_are_unknown_has_no_money_and_a_finding_that_says_what_to_write(
    replica: Replica, message: str
) -> None:
    found = facts(hour(60), [GPU], replica)
    assert found.lines is None
    assert found.state_ns["occupied"] == HOUR_NS
    assert [(one.kind, one.message) for one in found.findings] == [("replica_mapping_unknown", message)]


def test_a_gpu_of_a_product_without_a_name_in_the_book_takes_the_price_of_any() -> None:
    assert spent(facts(hour(60), [priced(GPU, 5, sku="")], REPLICA._replace(sku="NVIDIA B300"))) == 5 * NANO


def test_an_engine_without_a_gpu_takes_a_server() -> None:
    replica = REPLICA._replace(gpus=(), sku=None)
    server = Rate("server", CPU_HOST, "", "on-demand", "server-hour", NANO, "USD", 0)
    found = facts(hour(15, 60), [server], replica)
    assert amounts(found, "server") == {"occupied": NANO // 4, "idle": 3 * NANO // 4}
    assert found.lines is not None
    assert found.lines[0].unit == "server-ns"


def test_an_engine_without_a_gpu_and_without_a_server_price_has_no_money() -> None:
    found = facts(hour(60), [GPU, SERVER], REPLICA._replace(gpus=(), sku=None))
    assert found.lines is None
    assert 'kvtally rates add server PRICE --unit server-hour --sku "cpu-host"' in found.findings[0].message


def test_a_host_of_gpus_with_a_price_is_split_by_the_gpus_it_has() -> None:
    two = REPLICA._replace(gpus=("GPU-a", "GPU-b"))
    assert spent(facts(hour(60), [GPU, SERVER], two, host_gpus=8), "server") == 2 * NANO
    assert spent(facts(hour(60), [GPU, SERVER], two), "server") == 8 * NANO
    # a host that shows fewer GPUs than the engine holds is not the whole of it
    assert spent(facts(hour(60), [GPU, SERVER], two, host_gpus=1), "server") == 8 * NANO


def test_a_host_that_gets_a_price_within_the_hour_is_paid_from_then_on() -> None:
    later = SERVER._replace(valid_from_ns=NOON + HOUR_NS // 2, valid_until_ns=NOON + 3 * HOUR_NS // 4)
    found = facts(hour(60), [GPU, later])
    assert found.findings == ()
    assert spent(found, "server") == 2 * NANO
    assert spent(found, "gpu") == 2 * NANO


def test_memory_and_storage_of_the_cache_are_paid_as_they_are_reserved() -> None:
    dram = Rate("dram", "", "", "on-demand", "gib-hour", NANO // 100, "USD", 0)
    storage = Rate("storage", "", "", "on-demand", "tib-hour", NANO, "USD", 0)
    replica = REPLICA._replace(dram_gib=Fraction(64), storage_tib=Fraction(1, 4))
    found = facts(hour(60), [GPU, dram, storage], replica)
    assert (spent(found, "dram"), spent(found, "storage")) == (64 * NANO // 100, NANO // 4)
    assert found.lines is not None
    assert {line.resource: (line.quantity, line.unit) for line in found.lines} == {
        "gpu": (HOUR_NS, "gpu-ns"),
        "dram": (64 * HOUR_NS, "gib-ns"),
        "storage": (HOUR_NS // 4, "tib-ns"),
    }


def metered(millijoules: int = 2_520_000_000, **timelines: list[Span]) -> Evidence:
    """Two GPUs that draw 700 W each over the hour."""
    whole = [Span(NOON, NOON + HOUR_NS, millijoules)]
    energy = {"GPU-a": Timeline(timelines.get("a", whole)), "GPU-b": Timeline(timelines.get("b", whole))}
    return Evidence({}, {}, energy, ())


def test_owned_gpus_are_paid_with_the_energy_that_was_metered() -> None:
    # 2 x 0.7 kWh x PUE 1.5 x 0.10 = 0.21, on top of 2 x 2.00
    found = facts(hour(15, 60), [GPU._replace(term="owned"), ENERGY], OWNED, evidence=metered())
    assert spent(found, "gpu") == 4 * NANO
    assert amounts(found, "energy") == {"occupied": 52_500_000, "idle": 157_500_000}
    assert found.lines is not None
    drawn = [(line.quantity, line.unit) for line in found.lines if line.resource == "energy"]
    assert drawn == [(1_260_000_000, "mj"), (3_780_000_000, "mj")]
    assert found.findings == ()
    dear = facts(hour(60), [GPU._replace(term="owned"), priced(ENERGY, 1000)], OWNED, evidence=metered())
    assert spent(dear, "energy") == 2100 * NANO


def test_an_energy_price_that_changes_splits_energy_and_money_exactly() -> None:
    dearer = priced(ENERGY, 0.3, valid_from_ns=NOON + HOUR_NS // 3)
    found = facts(hour(60), [GPU._replace(term="owned"), ENERGY, dearer], OWNED, evidence=metered(1_000_000_001))
    assert found.lines is not None
    lines = [line for line in found.lines if line.resource == "energy"]
    assert [line.quantity for line in lines] == [666_666_667, 1_333_333_335]
    assert sum(line.quantity for line in lines) == 2_000_000_002
    # 2000000002 mJ / 3.6e9 x 1.5 x (0.1 / 3 + 0.3 x 2 / 3)
    assert [line.amount_nano for line in lines] == [27_777_778, 166_666_667]


@pytest.mark.parametrize("b", [[], [Span(NOON, NOON + HOUR_NS // 3, 5.0)]])
def test_owned_gpus_whose_energy_nobody_metered_have_a_finding_and_no_energy_line_of_zero(b: list[Span]) -> None:
    found = facts(hour(60), [GPU._replace(term="owned"), ENERGY], OWNED, evidence=metered(b=b))
    assert amounts(found, "energy") == {}
    assert spent(found) == 4 * NANO
    (finding,) = found.findings
    assert (finding.kind, finding.start_ns, finding.end_ns) == ("energy_unknown", NOON, NOON + HOUR_NS)
    assert "for 3600 s" in finding.message


def test_rented_gpus_have_their_energy_in_their_price() -> None:
    found = facts(hour(60), [GPU], evidence=metered())
    assert (amounts(found, "energy"), found.findings) == ({}, ())


def test_energy_without_a_price_makes_the_money_unknown() -> None:
    found = facts(hour(60), [GPU._replace(term="owned")], OWNED, evidence=metered())
    assert found.lines is None
    assert "kvtally rates add energy PRICE --unit kwh" in found.findings[0].message


def test_tokens_belong_to_the_period_in_which_their_interval_starts() -> None:
    rows = [
        row(NOON - SECOND, NOON + SECOND, prompt_tokens=1),
        row(NOON + SECOND, NOON + HOUR_NS + SECOND, prompt_tokens=10, computed_tokens=4),
        row(NOON + HOUR_NS + SECOND, NOON + 2 * HOUR_NS, prompt_tokens=100),
    ]
    periods = [(NOON - HOUR_NS, NOON), (NOON, NOON + HOUR_NS), (NOON + HOUR_NS, NOON + 2 * HOUR_NS)]
    found = [facts(rows, [GPU], period_ns=period).work for period in periods]
    assert [work["prompt_tokens"] for work in found] == [1, 10, 100]
    assert [work["computed_tokens"] for work in found] == [None, 4, None]
    assert list(found[0]) == list(WORK)


def test_an_interval_that_starts_before_the_window_brings_its_time_and_not_its_tokens() -> None:
    rows = [row(NOON, NOON + HOUR_NS, prompt_tokens=5, steps=3)]
    half = NOON + HOUR_NS // 2
    found = facts(rows, [GPU], period_ns=(NOON, NOON + HOUR_NS), tokens_from_ns=half)
    assert found.work["prompt_tokens"] is None
    assert found.state_ns["occupied"] == HOUR_NS


def test_a_quantity_that_no_interval_tells_is_unknown_and_what_some_tell_is_their_sum() -> None:
    half = NOON + HOUR_NS // 2
    rows = [row(NOON, half, prompt_tokens=5), row(half, NOON + HOUR_NS, prompt_tokens=None, generated_tokens=0)]
    work = facts(rows, [GPU]).work
    assert (work["prompt_tokens"], work["generated_tokens"], work["steps"]) == (5, 0, None)


def test_scrapes_that_were_missed_lower_the_coverage() -> None:
    rows = [row(NOON, NOON + HOUR_NS // 2), row(NOON + HOUR_NS // 2, NOON + HOUR_NS, missed=3)]
    assert facts(rows, [GPU]).covered_ns == HOUR_NS // 2 + HOUR_NS // 8


def test_a_replica_without_intervals_costs_nothing() -> None:
    found = facts([], [])
    assert (found.lines, found.findings, found.covered_ns) == ((), (), 0)
    assert found.work["prompt_tokens"] is None


# Rows of one replica: lengths and gaps in whole microseconds, any flags, any working time.
flags_drawn = st.sampled_from([0, BUSY, BUSY_AT_START, BUSY_AT_END, ASLEEP, RESET, BORN])
rows_drawn = st.lists(
    st.tuples(
        st.integers(0, 3) | st.integers(0, 10**9),
        st.integers(1, 4 * 10**9),
        flags_drawn,
        st.none() | st.integers(0, 9),
        st.none() | st.integers(0, 10**13),
        st.integers(0, 10**12),
    ),
    min_size=1,
    max_size=6,
)
WINDOW = 8 * HOUR_NS
cuts_drawn = st.sets(st.integers(1, WINDOW - 1) | st.integers(1, 7).map(lambda hours: hours * HOUR_NS), max_size=5)


def built(drawn: list[tuple[int, int, int, int | None, int | None, int]]) -> list[EngineRow]:
    rows, at = [], NOON
    for gap, length, flags, steps, working, tokens in drawn:
        start = at + gap * 1000
        at = start + length * 1000
        rows.append(
            row(
                start,
                at,
                flags,
                steps=steps,
                prefill_ns=working,
                decode_ns=0,
                prompt_tokens=tokens,
                began_ns=start + length * 300 if flags & RESET else None,
            )
        )
    return rows


RATES = [
    priced(GPU, 2.69),
    priced(GPU, 1.234567891, valid_from_ns=NOON + 5_000_000_000_007),
    priced(GPU, 3.3, valid_from_ns=NOON + 3 * HOUR_NS),
    priced(SERVER, 7.77, valid_from_ns=NOON + HOUR_NS + 12345),
    Rate("dram", "", "", "on-demand", "gib-month", 3 * NANO + 1, "USD", 0),
    Rate("storage", "", "", "on-demand", "tib-month", 33 * NANO + 7, "USD", 0),
]
HELD = REPLICA._replace(gpus=("GPU-a", "GPU-b", "GPU-c"), dram_gib=Fraction(7, 3), storage_tib=Fraction(1, 7))
RESOURCES = ("gpu", "server", "dram", "storage")
HOLDINGS: tuple[tuple[Resource, str, Fraction | int], ...] = (
    ("gpu", H100, 3),
    ("dram", "", Fraction(7, 3)),
    ("storage", "", Fraction(1, 7)),
)


@given(rows_drawn, cuts_drawn)
def test_time_tokens_and_money_of_any_partition_add_up_to_those_of_the_whole(
    drawn: list[tuple[int, int, int, int | None, int | None, int]], cuts: set[int]
) -> None:
    rows = built(drawn)
    edges = [NOON, *(NOON + cut for cut in sorted(cuts)), NOON + WINDOW]
    whole = facts(rows, RATES, HELD, (NOON, NOON + WINDOW), host_gpus=8)
    parts = [facts(rows, RATES, HELD, period, host_gpus=8) for period in pairwise(edges)]
    for resource in RESOURCES:
        assert sum(spent(part, resource) for part in parts) == spent(whole, resource)
    assert sum(sum(part.state_ns.values()) for part in parts) == sum(whole.state_ns.values())
    for state in STATES:  # a state that is cut in proportion is rounded at every cut of every interval
        split = sum(part.state_ns[state] for part in parts)
        assert abs(split - whole.state_ns[state]) <= len(rows) * len(parts)
    assert sum(part.work["prompt_tokens"] or 0 for part in parts) == whole.work["prompt_tokens"]


@given(rows_drawn)
def test_states_partition_the_covered_time_and_lines_are_the_charge_of_the_covered_spans(
    drawn: list[tuple[int, int, int, int | None, int | None, int]],
) -> None:
    rows = [one for one in built(drawn) if one.start_ns < NOON + WINDOW]
    found = facts(rows, RATES, HELD, (NOON, NOON + WINDOW), host_gpus=8)
    book = RateBook(RATES)
    # touching spans are one; charges add up over any partition, so each row may be charged by itself
    spans = [(one.start_ns, min(one.end_ns, NOON + WINDOW)) for one in rows]
    assert sum(found.state_ns.values()) == sum(end - start for start, end in spans)
    assert min(found.state_ns.values()) >= 0
    assert found.lines is not None
    assert min(line.amount_nano for line in found.lines) >= 0
    for resource, sku, quantity in HOLDINGS:
        charges = [
            charge_nano(book, resource, sku, "on-demand", "", quantity=quantity, start_ns=start, end_ns=end)
            for start, end in spans
        ]
        assert spent(found, resource) == sum(charges)
    gpu_ns = dict.fromkeys(STATES, 0)
    for line in found.lines:
        if line.resource == "gpu":
            gpu_ns[cast("State", line.state)] += line.quantity
    assert gpu_ns == {state: 3 * length for state, length in found.state_ns.items()}


@given(rows_drawn, st.integers(2, 1000))
def test_prices_times_k_make_every_amount_times_k_and_change_no_second_and_no_token(
    drawn: list[tuple[int, int, int, int | None, int | None, int]], factor: int
) -> None:
    rows = built(drawn)
    dearer = [rate._replace(price_nano=rate.price_nano * factor) for rate in RATES]
    period = (NOON, NOON + WINDOW)
    one, other = (facts(rows, rates, HELD, period, host_gpus=8) for rates in (RATES, dearer))
    assert (one.state_ns, one.work, one.covered_ns) == (other.state_ns, other.work, other.covered_ns)
    assert one.lines is not None
    assert other.lines is not None
    before = {(line.resource, line.state, line.rate.valid_from_ns): line for line in one.lines}
    for line in other.lines:
        same = before.pop((line.resource, line.state, line.rate.valid_from_ns))
        assert line.quantity == same.quantity
        # a nano-unit of rounding for every span before, factor times that after
        assert abs(line.amount_nano - factor * same.amount_nano) <= (factor + 1) * len(rows) * 2
    assert not before


@given(rows_drawn, cuts_drawn)
def test_energy_of_any_partition_adds_up_but_for_a_millijoule_and_a_nano_unit_a_cut(
    drawn: list[tuple[int, int, int, int | None, int | None, int]], cuts: set[int]
) -> None:
    rows = built(drawn)
    spans = [Span(NOON + at * HOUR_NS // 4, NOON + (at + 1) * HOUR_NS // 4, 1e8 + at * 7919) for at in range(400)]
    evidence = Evidence({}, {}, {uuid: Timeline(spans) for uuid in OWNED.gpus or ()}, ())
    rates = [GPU._replace(term="owned"), ENERGY]
    edges = [NOON, *(NOON + cut for cut in sorted(cuts)), NOON + WINDOW]
    whole = facts(rows, rates, OWNED, (NOON, NOON + WINDOW), evidence)
    parts = [facts(rows, rates, OWNED, period, evidence) for period in pairwise(edges)]
    slack = len(rows) * 2 + len(parts)
    assert abs(sum(spent(part, "energy") for part in parts) - spent(whole, "energy")) <= slack
    for part in (whole, *parts):
        assert part.lines is not None
    drawn_mj = [sum(one.quantity for one in part.lines or () if one.unit == "mj") for part in (whole, *parts)]
    assert abs(sum(drawn_mj[1:]) - drawn_mj[0]) <= slack


def test_the_order_of_gpus_and_of_their_evidence_changes_nothing() -> None:
    spans = [Span(NOON, NOON + HOUR_NS, 3e9), Span(NOON, NOON + HOUR_NS, 2e9), Span(NOON, NOON + HOUR_NS, 1e9)]
    uuids = ("GPU-a", "GPU-b", "GPU-c")
    timelines = {uuid: Timeline([span]) for uuid, span in zip(uuids, spans, strict=True)}
    rows = [row(NOON, NOON + HOUR_NS, BUSY_AT_END, steps=5)]
    found = set()
    for order in permutations(uuids):
        evidence = Evidence({uuid: timelines[uuid] for uuid in order}, {}, timelines, ())
        one = facts(rows, [GPU._replace(term="owned"), ENERGY], OWNED._replace(gpus=order), evidence=evidence)
        found.add((tuple(one.state_ns.items()), one.lines))
    assert len(found) == 1


def graphics(**seconds: float) -> Evidence:
    """GPU -> seconds of graphics utilisation from NOON to ten seconds later."""
    lines = {f"GPU-{key}": Timeline([Span(NOON, NOON + 10 * SECOND, busy * SECOND)]) for key, busy in seconds.items()}
    return Evidence(lines, {}, {}, ())


TEN = row(NOON, NOON + 10 * SECOND, BUSY_AT_END, steps=4, prefill_ns=2 * SECOND, decode_ns=4 * SECOND)


def test_an_engine_worked_as_long_as_the_busiest_of_its_gpus() -> None:
    two = REPLICA._replace(gpus=("GPU-a", "GPU-b"))
    assert working_ns(TEN, two, graphics(a=3, b=7, c=9)) == 7 * SECOND
    assert working_ns(TEN, two, graphics(a=3)) == 3 * SECOND
    assert working_ns(TEN, two, graphics(c=9)) is None
    assert working_ns(row(NOON + 60 * SECOND, NOON + 70 * SECOND), two, graphics(a=3)) is None


def test_an_engine_without_a_gpu_worked_as_long_as_its_processes() -> None:
    cpu = {"127.0.0.1:8000": Timeline([Span(NOON, NOON + 10 * SECOND, 80.0 * SECOND)])}
    evidence = Evidence({}, cpu, {}, ())
    assert working_ns(TEN, REPLICA._replace(gpus=()), evidence) == 80 * SECOND
    assert working_ns(TEN, REPLICA._replace(gpus=(), name="127.0.0.1:8001/0"), evidence) is None
    # processes of several ranks are not told apart, and of a GPU's engine they are not the work
    assert working_ns(TEN, REPLICA._replace(gpus=(), name="127.0.0.1:8000/1"), evidence) is None
    assert working_ns(TEN, REPLICA._replace(gpus=None), evidence) is None
    assert working_ns(TEN, REPLICA, evidence) is None


def test_graphics_utilisation_tells_the_time_by_state_and_without_it_the_requests_do() -> None:
    assert time_of(TEN, REPLICA, graphics(a=3)) == EngineTime(occupied=3 * SECOND, idle=7 * SECOND, modelled=True)
    assert time_of(TEN, REPLICA, NOTHING) == EngineTime(occupied=6 * SECOND, idle=4 * SECOND, modelled=True)
    unknown = row(NOON, NOON + 10 * SECOND, BUSY_AT_END, steps=4, prefill_ns=SECOND)
    assert time_of(unknown, REPLICA, NOTHING) == EngineTime(occupied=10 * SECOND, modelled=True)


def test_cpu_seconds_of_many_threads_are_no_wall_time() -> None:
    cpu = {"127.0.0.1:8000": Timeline([Span(NOON, NOON + 10 * SECOND, 80.0 * SECOND)])}
    time = time_of(TEN, REPLICA._replace(gpus=()), Evidence({}, cpu, {}, ()))
    assert time == EngineTime(occupied=6 * SECOND, idle=4 * SECOND, modelled=True)


def test_the_time_before_a_restart_is_counted_from_the_start_of_the_interval() -> None:
    restarted = row(NOON, NOON + 10 * SECOND, RESET, began_ns=NOON + 4 * SECOND, steps=0)
    assert time_of(restarted, REPLICA, NOTHING) == EngineTime(warm_up=6 * SECOND, unallocated=4 * SECOND, modelled=True)


def test_the_law_is_fitted_to_the_rows_that_tell_work_steps_and_tokens() -> None:
    # 2 s slices of 10 ms a step and 20 us a token
    rows, spans = [], []
    for number in range(40):
        start = NOON + number * 2 * SECOND
        steps, computed = 30 + 13 * (number % 7), 1000 * (number % 5)
        told = None if number == 20 else computed
        rows.append(row(start, start + 2 * SECOND, steps=steps, computed_tokens=told))
        spans.append(Span(start, start + 2 * SECOND, steps * 10e6 + computed * 20e3))
    evidence = Evidence({"GPU-a": Timeline(spans)}, {}, {}, ())
    law = law_of(REPLICA, rows, evidence)
    assert law is not None
    assert law.step_ns == pytest.approx(10e6)
    assert law.token_ns == pytest.approx(20e3)
    assert law.slices == 13  # 78 s are known, in slices of 6 s
    assert law_of(REPLICA, rows, NOTHING) is None
    assert facts(rows, [GPU], split=law).split is law
