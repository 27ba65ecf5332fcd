"""From the options of `kvtally model` to its question: every input with where it comes from."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click
import msgspec

from kvtally.agent.cli.model_prices import gpu_price, stores_asked
from kvtally.agent.cli.quantity import counts_of, numbers_of, positive, shares_of
from kvtally.agent.forward import PRIOR, PRIOR_FAST, PRIOR_SLOW, Efficiency, LawRange, roofline
from kvtally.agent.forward_cost.cost import Scenario
from kvtally.agent.hardware import SHORT_NAMES, gpu_of
from kvtally.agent.model_report.report import Input, Question
from kvtally.agent.model_shape import UnknownArchitecture, shape_of
from kvtally.agent.price import parse_decimal

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from decimal import Decimal

    from kvtally.agent.forward import Parameters
    from kvtally.agent.forward_cost.cost import Store
    from kvtally.agent.hardware import Gpu
    from kvtally.agent.model_report.report import Told
    from kvtally.agent.model_shape import ModelShape

PRESETS = "model_presets.toml"
PROMPT_LIMIT_TOKENS = 2**24
CONFIG_LIMIT_BYTES = 1 << 20
_METHOD = "packaged prior, anchored on public measurements"
_COUNTED = {
    "active": ("SOURCE", "config.json, with embedding and output matrix"),
    "linear": ("SOURCE", "config.json, without embedding and output matrix"),
}


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


class Subject(NamedTuple):
    """What is asked about: from options alone, or from a ledger.

    hourly  of one GPU, and
    host    of what a replica takes beside them
    told    what a ledger says beside the curves
    """

    model: str
    shape: ModelShape
    gpu: Gpu | None
    gpus: int
    laws: LawRange
    hourly: Decimal | None
    host: Decimal
    price: Input
    prompts: tuple[int, ...]
    currency: str
    inputs: tuple[Input, ...]
    supposed: tuple[Store, ...] = ()
    told: Told | None = None


def subject_of(options: Options) -> Subject:
    """What the options ask about; click.UsageError or RateError where that is nothing."""
    values = options.values
    if values["model"] is None:
        raise click.UsageError("--model NAME, or a ledger's own: --calibrated, --measured")
    shape, model_input = shape_asked(options)
    gpu = gpu_asked(options)
    laws, law_inputs = packaged_laws(options, shape, gpu, values["gpus"])
    hourly, price = gpu_price(options, gpu, values["currency"])
    gpu_input = Input("GPU", f"{values['gpus']} x {gpu.name}", options.basis("gpus"))
    return Subject(
        values["model"],
        shape,
        gpu,
        values["gpus"],
        laws,
        hourly,
        options.decimal("host_price"),
        price,
        prompts_asked(options),
        values["currency"],
        (model_input, gpu_input, *law_inputs),
    )


def gpu_asked(options: Options) -> Gpu:
    """The GPU that is named."""
    gpu = gpu_of(options.values["gpu"])
    if gpu is None:
        raise click.UsageError(f"--gpu {options.values['gpu']!r} is not in the table: {', '.join(SHORT_NAMES)}")
    return gpu


def prompts_asked(options: Options) -> tuple[int, ...]:
    """The prompt lengths that are named."""
    return counts_of("--prompt", options.values["prompt"], PROMPT_LIMIT_TOKENS)


def check_currency(options: Options) -> None:
    """click.UsageError where it is none."""
    if not re.fullmatch("[A-Z]{3}", options.values["currency"]):
        raise click.UsageError(f"--currency {options.values['currency']!r} is no ISO 4217 code such as USD")


def question_of(options: Options, subject: Subject) -> Question:
    """The question that the options ask about a subject; click.UsageError or RateError where they ask none."""
    values = options.values
    stores, store_inputs = stores_asked(options, subject.supposed)
    scenario = Scenario(
        subject.laws,
        subject.shape.kv_bytes_per_token,
        subject.gpus,
        stores,
        subject.hourly,
        subject.host,
        values["replicas"],
        values["output_tokens"],
        values["token_seconds"],
        values["overlap"],
    )
    inputs = [
        *subject.inputs,
        *store_inputs,
        subject.price,
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
        subject.model,
        subject.shape,
        subject.gpu,
        scenario,
        subject.prompts,
        shares_of("--reuse", values["reuse"]),
        tuple(inputs),
        subject.currency,
        prices_basis=_prices_basis(options, subject.price),
        ledger=subject.told,
    )


def _host(options: Options) -> str:
    return "" if options.is_given("host_price") else "inside the GPU price"


def _prices_basis(options: Options, gpu_price: Input) -> str:
    """MODELLED where every price is the caller's own."""
    is_own = gpu_price.basis != "ASSUMED" and all(options.is_given(name) for name in ("storage", "dram", "life_years"))
    return "MODELLED" if is_own else "ASSUMED"


def shape_asked(options: Options) -> tuple[ModelShape, Input]:
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
    return shape, told


def _presets() -> dict[str, dict[str, Any]]:
    from importlib.resources import files
    from tomllib import loads

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


def packaged_laws(options: Options, shape: ModelShape, gpu: Gpu, gpus: int) -> tuple[LawRange, list[Input]]:
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
                gpus,
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
            "peak of a GPU",
            f"{peak / 1e12:,.4g} TFLOP/s, {'fp8' if shape.is_fp8 else 'bf16'}",
            _peak_basis(gpu),
            gpu.source,
        ),
        _share_input("compute efficiency", compute, options.basis("efficiency")),
        _share_input("attention efficiency", attention, options.basis("attention_efficiency")),
        Input(
            "t0, beside prefill and load", f"{values['first_token_seconds']:g} s", options.basis("first_token_seconds")
        ),
        Input("all-reduces", "counted" if values["all_reduce"] else "not counted", options.basis("all_reduce")),
        loading_input(options),
    ]
    return laws, told


def loading_input(options: Options) -> Input:
    """Whether loads hide behind the prefill."""
    return Input("loading", "overlaps" if options.values["overlap"] else "stalls the prefill", options.basis("overlap"))


def _peak_basis(gpu: Gpu) -> str:
    """A row of the table that nobody could look up says so in its source."""
    return "ASSUMED" if "ASSUMED" in gpu.source else "SOURCE"


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
