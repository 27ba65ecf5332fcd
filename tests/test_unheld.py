from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import pytest

from kvtally.agent.facts import Facts, GpuPresence
from kvtally.agent.price import HOUR_NS, NANO, Rate
from kvtally.agent.rates import RateBook
from kvtally.agent.unheld import joined, unheld_facts

H100 = "NVIDIA H100 80GB HBM3"
NOON = 500_000 * HOUR_NS
MINUTE = 60 * NANO
HOUR = (NOON, NOON + HOUR_NS)
GPU = Rate("gpu", H100, "", "on-demand", "gpu-hour", 6 * NANO, "USD", 0)
PRICE = NANO // 10  # of a minute


def presence(*minutes: int, uuid: str = "GPU-a", sku: str = H100) -> GpuPresence:
    """A GPU that was read every minute between pairs of minutes."""
    spans = [
        (NOON + minute * MINUTE, NOON + (minute + 1) * MINUTE)
        for first, last in zip(minutes[::2], minutes[1::2], strict=True)
        for minute in range(first, last)
    ]
    return GpuPresence(uuid, sku, tuple(spans))


def held(*minutes: float) -> list[tuple[int, int]]:
    return [
        (NOON + round(first * MINUTE), NOON + round(last * MINUTE))
        for first, last in zip(minutes[::2], minutes[1::2], strict=True)
    ]


def free(gpu: GpuPresence, spans: list[tuple[int, int]], *rates: Rate, period: tuple[int, int] = HOUR) -> Facts | None:
    return unheld_facts(gpu, spans, RateBook(rates or (GPU,)), period, term="on-demand", site="")


def test_a_gpu_that_no_replica_holds_is_paid_for_while_it_is_seen() -> None:
    found = free(presence(0, 10, 20, 25), [])
    assert found is not None
    assert (found.replica, found.state_ns, found.work) == (None, {"unallocated": 15 * MINUTE}, {})
    assert found.lines is not None
    (line,) = found.lines
    assert (line.resource, line.sku, line.state, line.unit) == ("gpu", H100, "unallocated", "gpu-ns")
    assert (line.quantity, line.amount_nano) == (15 * MINUTE, 15 * PRICE)
    assert (found.start_ns, found.end_ns, found.covered_ns) == (NOON, NOON + 25 * MINUTE, 15 * MINUTE)
    assert (found.period_ns, found.modelled, found.findings) == (NOON, False, ())


def test_a_gpu_that_a_replica_holds_all_the_time_has_no_line() -> None:
    assert free(presence(0, 10), held(0, 10)) is None
    assert free(presence(), []) is None
    # it was seen until the period began
    assert free(presence(0, 10), [], period=(NOON + 10 * MINUTE, NOON + HOUR_NS)) is None


def test_an_interval_of_a_gpu_counts_as_held_if_a_replica_is_seen_within_its_own_length() -> None:
    # the replica is seen from 3 1/2 on: the minute that ends at 3 is near enough, the one before is not
    found = free(presence(0, 10), held(3.5, 10))
    assert found is not None
    assert found.state_ns["unallocated"] == 2 * MINUTE
    # a minute that ends a minute before the replica is seen is not near
    found = free(presence(0, 10), held(4, 10))
    assert found is not None
    assert found.state_ns["unallocated"] == 3 * MINUTE
    # it was last seen at 5: the minutes from 5 on are near, those from 6 on are not
    found = free(presence(0, 10), held(0, 5))
    assert found is not None
    assert found.state_ns["unallocated"] == 4 * MINUTE
    assert (found.start_ns, found.end_ns) == (NOON + 6 * MINUTE, NOON + 10 * MINUTE)


def test_time_is_cut_at_the_edges_of_the_period_and_adds_up_over_them() -> None:
    gpu = GpuPresence("GPU-a", H100, ((NOON - MINUTE, NOON + 7 * MINUTE + 1),))
    edges = (NOON - HOUR_NS, NOON, NOON + MINUTE + 3, NOON + HOUR_NS)
    parts = [free(gpu, [], period=(edges[at], edges[at + 1])) for at in range(3)]
    whole = free(gpu, [], period=(edges[0], edges[-1]))
    assert whole is not None
    assert whole.lines is not None
    assert sum(part.state_ns["unallocated"] for part in parts if part) == whole.state_ns["unallocated"]
    assert [sum(line.amount_nano for part in parts if part for line in part.lines or ())] == [
        line.amount_nano for line in whole.lines
    ]


def test_a_price_that_changes_while_it_is_free_makes_two_lines() -> None:
    dearer = GPU._replace(price_nano=12 * NANO, valid_from_ns=NOON + 4 * MINUTE)
    found = free(presence(0, 10), [], GPU, dearer)
    assert found is not None
    assert found.lines is not None
    assert [(line.rate.price_nano // NANO, line.amount_nano) for line in found.lines] == [
        (6, 4 * PRICE),
        (12, 12 * PRICE),
    ]


@pytest.mark.parametrize("sku", ["NVIDIA B300", ""])
def test_a_free_gpu_without_a_price_has_unknown_money_and_says_what_to_type(sku: str) -> None:
    found = free(presence(0, 10, 20, 25, sku=sku), [])
    assert found is not None
    assert found.lines is None
    assert found.state_ns == {"unallocated": 15 * MINUTE}
    (finding,) = found.findings
    assert (finding.kind, finding.target) == ("no_rate", "gpu/GPU-a")
    assert (finding.start_ns, finding.end_ns) == (NOON, NOON + 25 * MINUTE)
    assert "kvtally rates add gpu PRICE" in finding.message


def test_a_mig_instance_counts_by_its_share_and_parts_of_its_time_add_up() -> None:
    seventh = presence(0, 60)._replace(share=Fraction(1, 7))
    edges = [NOON, NOON + 7 * MINUTE + 1, NOON + HOUR_NS]
    whole = free(seventh, [])
    parts = [free(seventh, [], period=(low, high)) for low, high in pairwise(edges)]
    assert whole is not None
    assert whole.lines is not None
    # 6 an hour, a seventh of it; of 3.6e12 ns a seventh is 514285714285.7
    assert [line.amount_nano for line in whole.lines] == [857_142_857]
    assert whole.state_ns["unallocated"] == whole.lines[0].quantity
    assert abs(whole.state_ns["unallocated"] - HOUR_NS // 7) <= 1
    assert sum(one.state_ns["unallocated"] for one in parts if one is not None) == whole.state_ns["unallocated"]


def test_a_gpu_that_is_wholly_in_instances_or_is_shown_by_a_page_of_others_is_not_paid_for() -> None:
    assert free(presence(0, 10)._replace(share=Fraction(0)), []) is None
    assert free(presence(0, 10)._replace(is_paid=False), []) is None


def test_free_gpus_of_one_product_are_one_entry() -> None:
    one, other = free(presence(0, 10), []), free(presence(20, 40, uuid="GPU-b"), [])
    assert one is not None
    assert other is not None
    both = joined([one, other])
    assert both.state_ns == {"unallocated": 30 * MINUTE}
    assert both.lines is not None
    assert [(line.quantity, line.amount_nano) for line in both.lines] == [(30 * MINUTE, 30 * PRICE)]
    assert (both.start_ns, both.end_ns, both.covered_ns) == (NOON, NOON + 40 * MINUTE, 30 * MINUTE)
    assert joined([one, other]).lines == joined([other, one]).lines


def test_one_of_them_without_a_price_makes_the_money_of_all_unknown() -> None:
    one, other = free(presence(0, 10), []), free(presence(0, 10, sku="NVIDIA B300", uuid="GPU-b"), [])
    assert one is not None
    assert other is not None
    both = joined([one, other])
    assert both.lines is None
    assert [finding.target for finding in both.findings] == ["gpu/GPU-b"]
