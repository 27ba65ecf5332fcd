from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

import pytest
from tests.ledgers import HOUR, SECOND, SKU, START, Deployment, FakeEngine, FakeGpu, new_ledger, rate, reader_of

from kvtally.agent.accounts import Payment, Window, facts_of
from kvtally.agent.audit import audit
from kvtally.agent.commitments import UNUSED
from kvtally.agent.rates import RateBook
from kvtally.agent.replica import About
from kvtally.agent.report import cost_report
from kvtally.agent.settlement import settle

if TYPE_CHECKING:
    from pathlib import Path

PAYMENT = Payment("reserved")
# 3.60 an hour is 1_000_000 nano-units a second
RESERVED = rate("gpu", "3.6", "gpu-hour", START - HOUR, sku=SKU, term="reserved", committed=3)


@pytest.fixture
def path(tmp_path: Path) -> str:
    """Two hours and ten seconds of one replica on one of two GPUs that are seen; three are committed."""
    path = new_ledger(tmp_path)
    about = About(gpus=("GPU-a",), sku=SKU, term="reserved", mapping="config")
    deployment = Deployment(path, {"e": about}, interval_seconds=10)
    engine, gpus = FakeEngine("e/0"), [FakeGpu("GPU-a"), FakeGpu("GPU-b")]
    for at_ns in range(START, START + 2 * HOUR + 11 * SECOND, 10 * SECOND):
        for gpu in gpus:
            gpu.run(10, 0)
        deployment.scrape(at_ns, (engine,), gpus)
    deployment.close()
    with closing(reader_of(path)) as reader:
        reader.add_rates([RESERVED])
    return path


def test_units_that_are_committed_and_not_used_are_a_cost_of_their_own(path: str) -> None:
    window = Window(START, START + HOUR)
    with closing(reader_of(path)) as reader:
        facts = facts_of(reader, window, RateBook([RESERVED]), PAYMENT)
    lines = {(one.replica is not None, line.state): line for one in facts for line in one.lines or ()}
    assert lines[True, "idle"].amount_nano == 3_600_000_000
    # the GPU that nobody holds is seen 2 ms before the pages, so it has that much of the hour not yet
    free = lines[False, "unallocated"]
    assert free.quantity in {HOUR - 2_000_000, HOUR}
    assert lines[False, UNUSED].quantity == 3 * HOUR - HOUR - free.quantity
    total = sum(line.amount_nano for line in lines.values())
    assert total == pytest.approx(3 * 3_600_000_000, abs=2)


def test_a_settled_hour_with_an_unused_commitment_is_sound_and_reads_the_same(path: str) -> None:
    book, window = RateBook([RESERVED]), Window(START, START + 2 * HOUR)
    with closing(reader_of(path)) as reader:
        raw = cost_report(reader, window, ["model"], book, PAYMENT)
        for hour in (START, START + HOUR):
            settle(reader, hour, book, PAYMENT)
        assert cost_report(reader, window, ["model"], book, PAYMENT).groups == raw.groups
        assert audit(reader, book) == []
    unheld = next(group for group in raw.groups if group["by"]["model"] is None)
    assert float(unheld["cost"]["unused_commitment"]) == pytest.approx(7.2, rel=1e-6)
    assert float(unheld["cost"]["gpu"]) == pytest.approx(7.2, rel=1e-6)


def test_with_a_cost_that_is_unknown_it_is_unknown_what_of_a_commitment_was_used(path: str) -> None:
    other = rate("gpu", "3.6", "gpu-hour", START - HOUR, sku="NVIDIA L4", term="reserved", committed=3)
    with closing(reader_of(path)) as reader:
        facts = facts_of(reader, Window(START, START + HOUR), RateBook([other]), PAYMENT)
    assert all(one.lines is None for one in facts)
