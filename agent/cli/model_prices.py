"""What `kvtally model` is told of prices: of GPUs, rented or bought, and of what holds the KV."""

from __future__ import annotations

from decimal import Decimal
from typing import TYPE_CHECKING

import click

from kvtally.agent.cli.quantity import bytes_of, store_of
from kvtally.agent.forward_cost.cost import Owned
from kvtally.agent.model_report.report import Input
from kvtally.agent.price import NANO

if TYPE_CHECKING:
    from kvtally.agent.cli.model_question import Options
    from kvtally.agent.forward_cost.cost import Store
    from kvtally.agent.hardware import Gpu

_DEFAULT_STORAGE = ("average storage=8GB/s,$300/TB", "fast storage=100GB/s,$300/TB")
_DEFAULT_DRAM = ("DRAM=200GB/s,$1000/128GB",)


def stores_asked(options: Options, supposed: tuple[Store, ...]) -> tuple[tuple[Store, ...], list[Input]]:
    """The stores of the curves; `supposed` ones among them."""
    values = options.values
    capacity = bytes_of("--capacity", values["capacity"])
    life = options.positive("life_years")
    told = [
        Input("capacity of each store", values["capacity"], options.basis("capacity")),
        Input("life of what is bought", f"{life:g} years, written off evenly", options.basis("life_years")),
    ]
    stores = list(supposed)
    told += [
        Input(store.backend.name, text.partition("=")[2], "GIVEN")
        for store, text in zip(supposed, values["what_if"], strict=True)
    ]
    for name, kind, default in (("storage", "storage", _DEFAULT_STORAGE), ("dram", "dram", _DEFAULT_DRAM)):
        for text in values[name] or default:
            store = store_of(f"--{name}", text, "dram" if kind == "dram" else "storage", capacity, life)
            stores.append(store)
            source = "" if options.is_given(name) else "a list price: state your own"
            told.append(Input(store.backend.name, text.partition("=")[2], options.basis(name), source))
    names = [store.backend.name for store in stores]
    if len(set(names)) < len(names):
        raise click.UsageError("two stores have the same name")
    return tuple(stores), told


def gpu_price(options: Options, gpu: Gpu, currency: str) -> tuple[Decimal | None, Input]:
    """Of an hour of one GPU: given, owned, or from the packaged card; None where that has none."""
    values = options.values
    if values["gpu_price"] is not None and values["owned"] is not None:
        raise click.UsageError("--gpu-price is for a rented GPU, --owned for a bought one: give one of them")
    if values["gpu_price"] is not None:
        return options.decimal("gpu_price"), Input(
            "price of a GPU", f"{values['gpu_price']} an hour", "GIVEN", "rented"
        )
    if values["owned"] is not None:
        names = ("owned", "years", "residual_share", "interest", "opex_share", "watts", "pue", "kwh_price")
        owned = Owned(*(options.decimal(name) for name in names))
        hourly = owned.hourly()
        power = f"{owned.watts} W at {owned.kwh_price} a kWh, PUE {owned.pue}" if owned.watts else "no power counted"
        source = (
            f"bought for {owned.capex}, {owned.years} years at {owned.interest:.0%}, worth {owned.residual_share:.0%} "
            f"then, upkeep {owned.opex_share:.0%} a year, {power}"
        )
        basis = "GIVEN" if all(options.is_given(name) for name in names) else "ASSUMED"
        return hourly, Input("price of a GPU", f"{hourly:.4f} an hour", basis, source)
    return _packaged_price(gpu, currency)


def _packaged_price(gpu: Gpu, currency: str) -> tuple[Decimal | None, Input]:
    from kvtally.agent.rate_file import packaged_rates

    rows = [
        rate
        for rate in packaged_rates()
        if (rate.resource, rate.sku, rate.term, rate.currency) == ("gpu", gpu.name, "on-demand", currency)
        and rate.unit == "gpu-hour"
    ]
    if not rows:
        return None, Input("price of a GPU", "unknown", "ASSUMED", f"none is packaged for {gpu.name} in {currency}")
    rate = max(rows, key=lambda row: row.valid_from_ns)
    price = Decimal(rate.price_nano) / NANO
    return price, Input("price of a GPU", f"{price:g} an hour", "ASSUMED", rate.source)
