"""The prices that hold for a ledger: its own rates, the operator's card, and the packaged card behind both."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvtally.agent.rate_file import packaged_rates, read_rates
from kvtally.agent.rates import RateBook

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvtally.agent.config import Config
    from kvtally.agent.ledger.read import LedgerReader
    from kvtally.agent.price import Rate


def book_of(reader: LedgerReader, config: Config) -> RateBook:
    """All prices for this ledger; OSError or RateError if the operator's card cannot be read."""
    rates = [rate for _, rate in reader.rates()]
    known = set(rates)
    rates += [rate for rate in cards_of(config) if rate not in known]
    if not config.rates.default_card:
        rates = [rate for rate in rates if not rate.packaged]
    return RateBook(rates)


def keep_rates(reader: LedgerReader, config: Config) -> int:
    """Write into the ledger what the cards hold and it does not yet: charges name rates by their id there."""
    known = {rate for _, rate in reader.rates()}
    new = [rate for rate in cards_of(config) if rate not in known]
    if new:
        reader.add_rates(new)
    return len(new)


def cards_of(config: Config) -> Sequence[Rate]:
    """The packaged card, unless it is switched off, and the operator's; OSError or RateError if it cannot be read."""
    cards: list[Rate] = list(packaged_rates()) if config.rates.default_card else []
    if config.rates.card:
        with open(config.rates.card, "rb") as file:  # noqa: PTH123  # one read
            cards += read_rates(file.read())
    return cards
