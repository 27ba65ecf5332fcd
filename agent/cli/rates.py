"""`kvtally rates …`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast, get_args

import click

from kvtally.agent.cli.group import Group
from kvtally.agent.cli.options import chosen_format, echo_json, format_option, ledger_options, settings
from kvtally.agent.finding import plural
from kvtally.agent.price import Basis, Resource, Term

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from kvtally.agent.ledger.read import LedgerReader
    from kvtally.agent.price import Rate


@click.group(cls=Group, epilog="\b\nExample:\n  kvtally rates list")
def rates() -> None:
    """List, add and import prices. A price is never edited: a later one supersedes it."""


@rates.command(name="list", epilog="\b\nExample:\n  kvtally rates list")
@format_option("table", "json", "csv")
@ledger_options
def list_(form: str | None, ledger: str | None, config_path: str | None) -> None:
    """Show every price that the ledger knows, the packaged ones included."""
    from kvtally.agent.book import book_of, cards_of
    from kvtally.agent.ledger.place import file_of
    from kvtally.agent.ledger.read import LedgerReader

    config, url = settings(config_path, ledger)
    if Path(file_of(url)).exists():
        with LedgerReader(url) as reader:
            known: Sequence[Rate] = book_of(reader, config).rates
    else:
        known = cards_of(config)
    rows = [_row(rate) for rate in known]
    form = chosen_format(form)
    if form == "json":
        echo_json({"rates": rows})
    elif form == "csv":
        from kvtally.agent.render.comma_separated import RATE_COLUMNS, lines_of

        click.echo(lines_of(rows, RATE_COLUMNS), nl=False)
    else:
        from kvtally.agent.render.listing import rates_table

        rates_table(rows)


def _row(rate: Rate) -> dict[str, object]:
    """A rate as it prints: amounts as decimal strings, instants as text."""
    from kvtally.agent.price import instant_text, nano_to_text

    row = rate._asdict()
    del row["price_nano"]
    row["price"] = nano_to_text(rate.price_nano)
    row["valid_from"] = instant_text(row.pop("valid_from_ns"))
    until_ns = row.pop("valid_until_ns")
    row["valid_until"] = None if until_ns is None else instant_text(until_ns)
    row["pue"] = None if rate.pue is None else str(rate.pue)
    return row


@rates.command(
    epilog="\b\nExample:\n"
    '  kvtally rates add gpu 2.69 --unit gpu-hour --sku "NVIDIA H100 80GB HBM3" --from 2026-01-01 --term on-demand'
)
@click.argument("resource", type=click.Choice(get_args(Resource)))
@click.argument("price")
@click.option("--unit", help="What the price is for, such as gpu-hour. [default: the resource's own]")
@click.option("--sku", default="", help="Exact product name (nvidia-smi -L tells a GPU's). [default: any]")
@click.option("--site", default="", help="Where. [default: anywhere]")
@click.option("--term", type=click.Choice(get_args(Term)), default="on-demand", show_default=True)
@click.option("--from", "valid_from", required=True, metavar="DATE", help="First day or instant with this price.")
@click.option("--until", "valid_until", metavar="DATE", help="First instant without it. [default: until superseded]")
@click.option("--currency", default="USD", show_default=True, help="ISO 4217; a ledger has one.")
@click.option("--committed", type=click.IntRange(min=1), help="Reserved units that are paid for even when unused.")
@click.option("--pue", help="Energy: factor on metered kWh.")
@click.option(
    "--basis",
    type=click.Choice(["measured", "assumed"]),
    default="measured",
    show_default=True,
    help="measured: an invoice or a contract says so; a guess is assumed.",
)
@click.option("--source", default="operator", show_default=True, help="Where the price is written.")
@click.option("--note", default="", help="Free text, kept with the price.")
@ledger_options
def add(  # one option for each field of a rate
    resource: Resource,
    price: str,
    unit: str | None,
    sku: str,
    site: str,
    term: Term,
    valid_from: str,
    valid_until: str | None,
    currency: str,
    committed: int | None,
    pue: str | None,
    basis: str,
    source: str,
    note: str,
    ledger: str | None,
    config_path: str | None,
) -> None:
    """Add a price of your own; hours that it concerns are settled again."""
    from kvtally.agent.price import UNITS, Rate, checked, parse_decimal, parse_price, parse_unit
    from kvtally.agent.rate_file import instant_ns

    rate = checked(
        Rate(
            resource,
            sku,
            site,
            term,
            parse_unit(resource, unit or next(iter(UNITS[resource]))),
            parse_price(price),
            currency,
            instant_ns("from", valid_from),
            None if valid_until is None else instant_ns("until", valid_until),
            cast("Basis", basis.upper()),
            source,
            note,
            committed,
            None if pue is None else parse_decimal("pue", pue),
        )
    )
    _keep([rate], ledger, config_path)


@rates.command(name="import", epilog="\b\nExample:\n  kvtally rates import contract.toml")
@click.argument("file", type=click.Path(exists=True, dir_okay=False))
@ledger_options
def import_(file: str, ledger: str | None, config_path: str | None) -> None:
    """Add every price of a TOML card (docs/rates.md shows the form; `rates example` prints one)."""
    from kvtally.agent.rate_file import read_rates

    _keep(read_rates(Path(file).read_bytes()), ledger, config_path)


@rates.command(epilog="\b\nExample:\n  kvtally rates example > owned.toml")
def example() -> None:
    """Print a card for GPUs of your own: capital recovery, energy and PUE, to be filled in."""
    from kvtally.agent.rate_file import owned_example

    click.echo(owned_example(), nl=False)


def _refuse_another_currency(reader: LedgerReader, known: Mapping[int, Rate], currency: str) -> None:
    """Charges at a packaged price stay in its currency: rates in another would be added to them."""
    from kvtally.agent.price import RateError

    foreign = {rate_id for rate_id, rate in known.items() if rate.price_nano and rate.currency != currency}
    if foreign and reader.has_charges_at(foreign):
        raise RateError("currency", f"this ledger holds charges in another: begin a new ledger for {currency}")


def _unused(reader: LedgerReader, new: Sequence[Rate]) -> Iterator[str]:
    """What to say of products that no GPU of the ledger is: a name that is a letter off would be no price at all."""
    from kvtally.agent.facts import product_of

    targets = [one.attributes.get("sku", "") for one in reader.targets().values() if one.kind == "gpu"]
    products = sorted({product_of(sku) for sku in targets if sku})
    if products:
        for sku in dict.fromkeys(rate.sku for rate in new if rate.resource == "gpu" and rate.sku):
            if sku not in products:
                yield f'no GPU of this ledger is a "{sku}": it has {", ".join(f"{one!r}" for one in products)}'


def _keep(new: Sequence[Rate], ledger: str | None, config_path: str | None) -> None:
    from kvtally.agent.accounts import Payment
    from kvtally.agent.book import book_of, keep_rates
    from kvtally.agent.ledger.read import LedgerReader
    from kvtally.agent.ledger.upgrade import upgrade
    from kvtally.agent.price import rate_text
    from kvtally.agent.rates import RateBook
    from kvtally.agent.settlement import settle_again

    config, url = settings(config_path, ledger)
    upgrade(url)
    with LedgerReader(url) as reader:
        keep_rates(reader, config)
        known = dict(reader.rates())
        # a second currency is refused before it is written
        _refuse_another_currency(reader, known, RateBook([*known.values(), *new]).currency)
        fresh = [rate for rate in dict.fromkeys(new) if rate not in known.values()]
        reader.add_rates(fresh)
        for rate in new:
            click.echo(f"{'added' if rate in fresh else 'was there'}: {rate_text(rate)}", err=True)
        for line in _unused(reader, new):
            click.echo(f"note: {line}", err=True)
        if fresh:
            payment = Payment(config.rates.term, config.rates.site)
            done, aged = settle_again(
                reader, min(rate.valid_from_ns for rate in fresh), book_of(reader, config), payment
            )
            if done:
                click.echo(f"{plural(done, 'hour')} settled again at the new price", err=True)
            if aged:
                click.echo(f"{plural(aged, 'hour')} left at the old price: the raw intervals have aged out", err=True)
