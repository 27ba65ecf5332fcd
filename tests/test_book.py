from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest
from tests.ledgers import HOUR, SKU, START, new_ledger, rate, reader_of

from kvtally.agent.book import book_of, cards_of, keep_rates
from kvtally.agent.config import Config, load
from kvtally.agent.price import RateError
from kvtally.agent.rate_file import packaged_rates

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from kvtally.agent.ledger.read import LedgerReader

CARD = """
[[rate]]
resource = "gpu"
term = "on-demand"
unit = "gpu-hour"
price = "2.10"
currency = "USD"
from = 2026-11-01
"""
ASKED: tuple[Any, ...] = ("gpu", SKU, "on-demand", "", START)


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[LedgerReader]:
    with closing(reader_of(new_ledger(tmp_path))) as opened:
        yield opened


def config_of(folder: Path, card: str | None = None, *, default_card: bool = True) -> Config:
    environment = {"KVTALLY_RATES__DEFAULT_CARD": str(default_card).lower()}
    if card is not None:
        (folder / "card.toml").write_text(card, encoding="utf-8")
        environment["KVTALLY_RATES__CARD"] = str(folder / "card.toml")
    return load(None, environment, ())


def price(reader: LedgerReader, config: Config) -> int | None:
    found = book_of(reader, config).select(*ASKED)
    return None if found is None else found.price_nano


def test_the_packaged_card_is_behind_everything(reader: LedgerReader, tmp_path: Path) -> None:
    assert price(reader, config_of(tmp_path)) == 2_690_000_000


def test_the_operators_card_comes_before_it(reader: LedgerReader, tmp_path: Path) -> None:
    assert price(reader, config_of(tmp_path, CARD)) == 2_100_000_000


def test_a_rate_in_the_ledger_comes_before_the_packaged_card_too(reader: LedgerReader, tmp_path: Path) -> None:
    reader.add_rates([rate("gpu", "1.5", "gpu-hour", START - HOUR, sku=SKU)])
    assert price(reader, config_of(tmp_path)) == 1_500_000_000
    assert price(reader, config_of(tmp_path, CARD)) == 1_500_000_000  # by name, before the card's "any"


def test_without_the_packaged_card_there_is_no_price_even_where_the_ledger_holds_it(
    reader: LedgerReader, tmp_path: Path
) -> None:
    keep_rates(reader, config_of(tmp_path))
    assert price(reader, config_of(tmp_path)) == 2_690_000_000
    assert price(reader, config_of(tmp_path, default_card=False)) is None


def test_a_price_that_left_the_card_stays_in_the_ledger_that_kept_it(reader: LedgerReader, tmp_path: Path) -> None:
    assert keep_rates(reader, config_of(tmp_path, CARD)) == len(packaged_rates()) + 1
    assert price(reader, config_of(tmp_path)) == 2_100_000_000


def test_what_is_kept_already_is_not_kept_again(reader: LedgerReader, tmp_path: Path) -> None:
    config = config_of(tmp_path, CARD)
    keep_rates(reader, config)
    assert keep_rates(reader, config) == 0
    assert len(reader.rates()) == len(packaged_rates()) + 1


def test_a_card_is_not_doubled_by_the_ledger_that_holds_it(reader: LedgerReader, tmp_path: Path) -> None:
    config = config_of(tmp_path, CARD)
    before = book_of(reader, config).rates
    keep_rates(reader, config)
    assert book_of(reader, config).rates == before


def test_the_cards_alone(tmp_path: Path) -> None:
    assert cards_of(config_of(tmp_path)) == list(packaged_rates())
    (own,) = cards_of(config_of(tmp_path, CARD, default_card=False))
    assert (own.price_nano, own.packaged, own.basis) == (2_100_000_000, False, "MEASURED")
    assert list(cards_of(config_of(tmp_path, default_card=False))) == []


def test_a_card_that_is_not_there_or_wrong_says_so(reader: LedgerReader, tmp_path: Path) -> None:
    config = config_of(tmp_path, "[[rate]]\nprice = 1\n")
    with pytest.raises(RateError, match=r"rate\[0\]"):
        book_of(reader, config)
    (tmp_path / "card.toml").unlink()
    with pytest.raises(FileNotFoundError):
        book_of(reader, config)
