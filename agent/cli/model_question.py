"""From the options of `kvtally model` to its question: every input with where it comes from."""

from __future__ import annotations

import re
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click
import msgspec

from kvtally.agent.cli.quantity import bytes_of, counts_of, numbers_of, positive, shares_of, store_of
from kvtally.agent.forward import PRIOR, PRIOR_FAST, PRIOR_SLOW, Efficiency, LawRange, roofline
from kvtally.agent.forward_cost.cost import Owned, Scenario
from kvtally.agent.hardware import SHORT_NAMES, gpu_of
from kvtally.agent.model_report import Input, Question
from kvtally.agent.model_shape import UnknownArchitecture, shape_of
from kvtally.agent.price import NANO, parse_decimal

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from kvtally.agent.forward import Parameters
    from kvtally.agent.forward_cost.cost import Store
    from kvtally.agent.hardware import Gpu
    from kvtally.agent.model_shape import ModelShape

PRESETS = "model_presets.toml"
PROMPT_LIMIT_TOKENS = 2**24
CONFIG_LIMIT_BYTES = 1 << 20
_METHOD = "packaged prior, anchored on public measurements"
_COUNTED = {
    "active": ("SOURCE", "config.json, with embedding and output matrix"),
    "linear": ("SOURCE", "config.json, without embedding and output matrix"),
}
_DEFAULT_STORAGE = ("average storage=8GB/s,$300/TB", "fast storage=100GB/s,$300/TB")
_DEFAULT_DRAM = ("DRAM=200GB/s,$1000/128GB",)


class Options(NamedTuple):
    """The options by name, and whether one was given."""

    values: Mapping[str, Any]
    is_given: Callable[[str], bool]

    def basis(self, name: str) -> str:
        """GIVEN or ASSUMED."""
        return "GIVEN" if self.is_given(name) else "ASSUMED"

    def decimal(self, name: str) -> Decimal:
        """A number from 0 up, exactly as written; RateError names the option."""
        return parse_decimal(f"--{name.replace('_', '-')}", self.values[name])

    def positive(self, name: str) -> Decimal:
        """A number above 0."""
        value = self.decimal(name)
        positive(f"--{name.replace('_', '-')}", float(value))
        return value


def question_of(options: Options) -> Question:
    """The question that the options ask; click.UsageError or RateError where they ask none."""
    values = options.values
    if not re.fullmatch("[A-Z]{3}", values["currency"]):
        raise click.UsageError(f"--currency {values['currency']!r} is no ISO 4217 code such as USD")
    shape, model, model_input = _shape(options)
    gpu = gpu_of(values["gpu"])
    if gpu is None:
        raise click.UsageError(f"--gpu {values['gpu']!r} is not in the table: {', '.join(SHORT_NAMES)}")
    laws, law_inputs = _laws(options, shape, gpu)
    stores, store_inputs = _stores(options)
    hourly, price_input = _gpu_price(options, gpu)
    scenario = Scenario(
        laws,
        shape.kv_bytes_per_token,
        values["gpus"],
        stores,
        hourly,
        options.decimal("host_price"),
        values["replicas"],
        values["output_tokens"],
        values["token_seconds"],
        values["overlap"],
    )
    inputs = [
        model_input,
        Input("GPU", f"{values['gpus']} x {gpu.name}", options.basis("gpus")),
        *law_inputs,
        *store_inputs,
        price_input,
        Input("host of a replica", f"{values['host_price']} an hour", options.basis("host_price"), _host(options)),
        Input("replicas that share each store", str(values["replicas"]), options.basis("replicas")),
        Input(
            "output tokens of a request",
            f"{values['output_tokens']}, {values['token_seconds']:g} s each",
            "GIVEN" if options.is_given("output_tokens") and options.is_given("token_seconds") else "ASSUMED",
        ),
        Input("traffic", "one request after the other, without a pause", "ASSUMED", "batches cost less a token"),
    ]
    return Question(
        model,
        shape,
        gpu,
        scenario,
        counts_of("--prompt", values["prompt"], PROMPT_LIMIT_TOKENS),
        shares_of("--reuse", values["reuse"]),
        tuple(inputs),
        values["currency"],
        prices_basis=_prices_basis(options),
    )


def _host(options: Options) -> str:
    return "" if options.is_given("host_price") else "inside the GPU price"


def _prices_basis(options: Options) -> str:
    """MODELLED where every price is the caller's own."""
    is_own = (options.is_given("gpu_price") or options.is_given("owned")) and (
        options.is_given("storage") and options.is_given("dram")
    )
    return "MODELLED" if is_own else "ASSUMED"


def _shape(options: Options) -> tuple[ModelShape, str, Input]:
    """The shape of a packaged name or of a config.json."""
    name = options.values["model"]
    presets = _presets()
    if name in presets:
        config, told = presets[name], Input("model", presets[name]["name"], "SOURCE", "its published config.json")
    else:
        config = _config(name, presets)
        told = Input("model", name, "GIVEN", "config.json")
    chosen = {key: options.values[key] for key in ("weight_dtype", "kv_dtype", "quantization")}
    try:
        shape = shape_of(config, **chosen)
    except UnknownArchitecture as unknown:
        raise click.UsageError(f"--model {name}: {unknown} ({unknown.hint})") from unknown
    return shape, name, told


def _presets() -> dict[str, dict[str, Any]]:
    from importlib.resources import files  # noqa: PLC0415  # --help needs no file
    from tomllib import loads  # noqa: PLC0415  # as above

    return loads((files("kvtally.agent") / PRESETS).read_text(encoding="utf-8"))


def _config(name: str, presets: Mapping[str, Any]) -> dict[str, Any]:
    path = Path(name)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise click.UsageError(f"--model {name!r} is neither a config.json nor one of {', '.join(presets)}")
    with path.open("rb") as file:
        content = file.read(CONFIG_LIMIT_BYTES + 1)
    try:
        config = msgspec.json.decode(content)
    except (ValueError, RecursionError) as error:
        raise click.UsageError(f"--model {name}: no JSON ({error})") from error
    if len(content) > CONFIG_LIMIT_BYTES or not isinstance(config, dict):
        raise click.UsageError(f"--model {name}: not the config.json of a model")
    return config


def _efficiencies(options: Options, name: str, prior: tuple[float, float, float]) -> tuple[float, float, float]:
    """Point, slow and fast: one number that is sure, or low, point and high."""
    text = options.values[name]
    if text is None:
        return prior
    option = f"--{name.replace('_', '-')}"
    given = [positive(option, each, 1.0) for each in numbers_of(option, text)]
    if len(given) == 1:
        return given[0], given[0], given[0]
    if len(given) != len(prior) or given != sorted(given):
        raise click.UsageError(f"{option} {text!r}: write one share of the peak, or LOW,POINT,HIGH")
    return given[1], given[0], given[2]


def _laws(options: Options, shape: ModelShape, gpu: Gpu) -> tuple[LawRange, list[Input]]:
    """The rooflines at the efficiencies' medians and ends."""
    values = options.values
    compute = _efficiencies(options, "efficiency", (PRIOR.compute, PRIOR_SLOW.compute, PRIOR_FAST.compute))
    attention = _efficiencies(
        options, "attention_efficiency", (PRIOR.attention, PRIOR_SLOW.attention, PRIOR_FAST.attention)
    )
    parameters = _parameters(values["parameters"])
    laws = LawRange(
        *(
            roofline(
                shape,
                gpu,
                values["gpus"],
                Efficiency(*pair),
                first_token_seconds=values["first_token_seconds"],
                parameters=parameters,
                has_all_reduce=values["all_reduce"],
            )
            for pair in zip(compute, attention, strict=True)
        )
    )
    named = {"active": shape.active_parameters, "linear": float(shape.linear_parameters)}
    counted = named[parameters] if isinstance(parameters, str) else parameters
    peak = gpu.dense_bf16_flops * (gpu.fp8_factor if shape.is_fp8 else 1)
    told = [
        Input("parameters of a token", f"{counted / 1e9:.4g}e9", *_COUNTED.get(values["parameters"], ("GIVEN",))),
        Input("KV of a token", f"{shape.kv_bytes_per_token:,.0f} B", "SOURCE", "config.json"),
        Input(
            "peak of a GPU", f"{peak / 1e12:,.4g} TFLOP/s, {'fp8' if shape.is_fp8 else 'bf16'}", "SOURCE", gpu.source
        ),
        _share_input("compute efficiency", compute, options.basis("efficiency")),
        _share_input("attention efficiency", attention, options.basis("attention_efficiency")),
        Input(
            "t0, beside prefill and load", f"{values['first_token_seconds']:g} s", options.basis("first_token_seconds")
        ),
        Input("all-reduces", "counted" if values["all_reduce"] else "not counted", options.basis("all_reduce")),
        Input("loading", "overlaps" if values["overlap"] else "stalls the prefill", options.basis("overlap")),
    ]
    return laws, told


def _share_input(name: str, shares: tuple[float, float, float], basis: str) -> Input:
    point, low, high = shares
    interval = "" if low == high else f" ({low:.2f} to {high:.2f})"
    return Input(name, f"{point:.2f}{interval} of the peak", basis, _METHOD if basis == "ASSUMED" else "")


def _parameters(text: str) -> Parameters:
    if text == "active":
        return "active"
    if text == "linear":
        return "linear"
    try:
        return positive("--parameters", float(text))
    except ValueError:
        raise click.UsageError(f"--parameters {text!r}: write active, linear or a number such as 70.6e9") from None


def _stores(options: Options) -> tuple[tuple[Store, ...], list[Input]]:
    values = options.values
    capacity = bytes_of("--capacity", values["capacity"])
    life = options.positive("life_years")
    told = [
        Input("capacity of each store", values["capacity"], options.basis("capacity")),
        Input("life of what is bought", f"{life:g} years, written off evenly", options.basis("life_years")),
    ]
    stores = []
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


def _gpu_price(options: Options, gpu: Gpu) -> tuple[Decimal | None, Input]:
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
    return _packaged_price(gpu, values["currency"])


def _packaged_price(gpu: Gpu, currency: str) -> tuple[Decimal | None, Input]:
    from kvtally.agent.rate_file import packaged_rates  # noqa: PLC0415  # only where no price was given

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
