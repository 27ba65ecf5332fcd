"""`kvtally model` on a ledger: the deployment's own law, what it measured, and a store that it does not have."""

from __future__ import annotations

from contextlib import contextmanager
from decimal import Decimal
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from kvtally.agent.accounts import Payment
from kvtally.agent.book import book_of
from kvtally.agent.calibration import PARAMETERS
from kvtally.agent.cli.model_measured import measured_beside
from kvtally.agent.cli.model_prices import gpu_price
from kvtally.agent.cli.model_question import (
    Subject,
    gpu_asked,
    loading_input,
    packaged_laws,
    prompts_asked,
    shape_asked,
)
from kvtally.agent.cli.named import fits_nothing, laws_by, replicas_in
from kvtally.agent.cli.options import settings, window_of
from kvtally.agent.cli.quantity import shares_of, supposed_store_of
from kvtally.agent.finding import utc_text
from kvtally.agent.forward_cost.cost import MONTH_HOURS
from kvtally.agent.hardware import gpu_of
from kvtally.agent.kin import kin_of
from kvtally.agent.ledger.read import LedgerReader
from kvtally.agent.model_report.deployment import (
    WEEK_NS,
    NotCarried,
    deployments,
    is_elsewhere,
    law_json,
    laws_for,
    priced,
)
from kvtally.agent.model_report.measured import lengths_of
from kvtally.agent.model_report.report import Input, Told
from kvtally.agent.model_report.what_if import Idea, what_if
from kvtally.agent.savings import Reason
from kvtally.agent.steplaw.forwards import ELSEWHERE_SD
from kvtally.agent.valuing import MARGIN_NS, valued

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kvtally.agent.calibration import Calibration
    from kvtally.agent.cli.model_question import Options
    from kvtally.agent.config import Config
    from kvtally.agent.forward import LawRange
    from kvtally.agent.forward_cost.cost import Store
    from kvtally.agent.hardware import Gpu
    from kvtally.agent.model_report.deployment import Deployment
    from kvtally.agent.model_shape import ModelShape
    from kvtally.agent.valuing import Laws

_OF_THE_LAW = ("efficiency", "attention_efficiency", "parameters", "all_reduce")
_OF_THE_MODEL = ("weight_dtype", "kv_dtype", "quantization")


class _Opened(NamedTuple):
    """A ledger with the one deployment in it that is asked about, and its law where one is needed."""

    reader: LedgerReader
    config: Config
    deployment: Deployment
    laws: Laws
    law: Calibration | None


class _Target(NamedTuple):
    """The GPUs that are asked about, which may be others than the deployment's."""

    gpu: Gpu | None
    gpus: int
    is_elsewhere: bool


def ledger_subject(options: Options) -> Subject:
    """What a ledger tells of its deployment; click.UsageError for a wrong call, NotCarried where it says too little."""
    stores = tuple(
        supposed_store_of("--what-if", text, options.positive("life_years")) for text in options.values["what_if"]
    )
    with _opened(options) as opened:
        return _subject(options, opened, stores)


@contextmanager
def _opened(options: Options) -> Iterator[_Opened]:
    values = options.values
    config, url = settings(values["config_path"], values["ledger"])
    with LedgerReader(url) as reader, reader.snapshot():
        extent = reader.extent()
        if extent is None:
            raise NotCarried(
                [Reason("the ledger holds no engine interval", "`kvtally run` or `kvtally replay` write some")]
            )
        targets = reader.targets()
        start_ns, end_ns = window_of(extent, values["since"], values["until"]) or (extent[1] - WEEK_NS, extent[1])
        window_ns = max(start_ns, reader.raw_from() or extent[0]), min(end_ns, extent[1])
        laws = laws_by(reader, targets, values["calibration"])
        kinds = kin_of(reader, (window_ns[0] - MARGIN_NS, window_ns[1] + MARGIN_NS), targets)
        replicas_in(kinds, values["replica"])
        deployment = _one_of(deployments(kinds, window_ns, values["replica"]), laws, values["calibration"])
        law = _law(deployment, laws) if values["calibrated"] or values["what_if"] else None
        yield _Opened(reader, config, deployment, laws, law)


def _one_of(found: Sequence[Deployment], laws: Laws, calibration: int | None) -> Deployment:
    """The deployment that is meant: the newest, as long as no other replica stands beside it."""
    if calibration is not None:
        wanted = {one.calibration.fingerprint for one in laws.stored}
        found = [one for one in found if one.kin.fingerprint in wanted]
        if not found:
            raise fits_nothing(calibration)
    names = sorted({name for one in found for name in one.names})
    if names != sorted(found[-1].names):
        raise click.UsageError(f"the window holds several kinds of replica, {', '.join(names)}: add --replica NAME")
    return found[-1]


def _law(deployment: Deployment, laws: Laws) -> Calibration:
    law, reasons = laws.of(deployment.kin, deployment.window_ns)
    if law is None:
        raise NotCarried(reasons)
    return law


def _subject(options: Options, opened: _Opened, stores: tuple[Store, ...]) -> Subject:
    values, deployment = options.values, opened.deployment
    replica = deployment.subjects[-1].replica
    shape = _agreed_shape(options, deployment.machine.shape, replica.model)
    target = _target(options, opened)
    where = Input(
        "GPU" if target.gpus else "host", _hardware(target.gpu, target.gpus), *_whence(options, opened, target)
    )
    model = Input("model", replica.model, "SOURCE", f"the ledger, of {', '.join(deployment.names)}")
    laws, law_inputs = _laws(options, opened, target, shape)
    prices = _prices(options, opened, target)
    rows: list[dict[str, Any]] | None = None
    findings: list[str] = []
    if values["measured"]:
        law = opened.law if values["calibrated"] else None
        rows, findings = measured_beside(deployment, laws, values["log_path"], law)
    prompts = lengths_of(rows) if rows and not options.is_given("prompt") else ()
    if target.is_elsewhere:
        findings.append(_scaled(opened))
    told = Told(_deployment_json(opened), rows, _what_ifs(options, opened, stores, prices), tuple(findings))
    return Subject(
        replica.model,
        shape,
        target.gpu,
        target.gpus,
        laws,
        prices.hourly,
        prices.host,
        prices.told,
        prompts or prompts_asked(options),
        prices.currency,
        (model, where, *law_inputs),
        stores,
        told,
    )


def _agreed_shape(options: Options, own: ModelShape, served: str) -> ModelShape:
    """The deployment's; click.UsageError where another is asked for."""
    given = [f"--{name.replace('_', '-')}" for name in _OF_THE_MODEL if options.is_given(name)]
    if given:
        raise click.UsageError(f"{given[0]}: the ledger knows the deployment's own types")
    if options.values["model"] not in {None, served}:
        asked, _ = shape_asked(options)
        if _formulas(asked) != _formulas(own):
            raise click.UsageError(f"--model {options.values['model']} is not what the replica serves: {served}")
    return own


def _formulas(shape: ModelShape) -> tuple[Any, ...]:
    """What the law reads of a shape."""
    return shape.layers, shape.hidden, shape.linear_parameters, shape.attention_flop, shape.kv_bytes_per_token


def _target(options: Options, opened: _Opened) -> _Target:
    """The GPUs asked about; click.UsageError where points or a store of other ones would be meant."""
    values, deployment = options.values, opened.deployment
    count = deployment.machine.gpus
    replica = deployment.subjects[-1].replica
    own = gpu_of(replica.sku or "") if count else None
    gpu = gpu_asked(options) if options.is_given("gpu") else own
    gpus = values["gpus"] if options.is_given("gpus") else count or int(gpu is not None)
    if gpu is None and (gpus or not values["calibrated"]):
        hint = "--gpu says of which" if gpus else "no datasheet tells how fast it is: add --calibrated"
        raise click.UsageError(f"{deployment.names[0]} runs on a CPU: {hint}")
    moved = (gpu, gpus) != (own, count)
    if moved and (values["measured"] or values["what_if"] or not values["calibrated"]):
        raise click.UsageError(
            f"{deployment.names[0]} has {_hardware(own, count)}: what it would be elsewhere, --calibrated tells alone"
        )
    return _Target(gpu, gpus, moved and opened.law is not None and is_elsewhere(opened.law, gpu, gpus))


def _hardware(gpu: Gpu | None, gpus: int) -> str:
    return "a CPU" if gpu is None else f"{gpus} x {gpu.name}"


def _whence(options: Options, opened: _Opened, target: _Target) -> tuple[str, str]:
    if target.is_elsewhere:
        return "GIVEN", ""
    return "GIVEN" if options.is_given("gpus") else "SOURCE", f"the ledger, of {', '.join(opened.deployment.names)}"


def _laws(options: Options, opened: _Opened, target: _Target, shape: ModelShape) -> tuple[LawRange, Sequence[Input]]:
    """The deployment's own law where it is asked for, else the packaged one."""
    values = options.values
    if not values["calibrated"]:
        assert target.gpu is not None  # noqa: S101  # a CPU was refused
        return packaged_laws(options, shape, target.gpu, target.gpus)
    assert opened.law is not None  # noqa: S101  # it was learned where the ledger was opened
    given = [f"--{name.replace('_', '-')}" for name in _OF_THE_LAW if options.is_given(name)]
    if given:
        raise click.UsageError(f"{given[0]} is of the packaged law: --calibrated brings the deployment's own")
    first = values["first_token_seconds"] if options.is_given("first_token_seconds") else None
    laws = laws_for(opened.deployment, opened.law, target.gpu, target.gpus, first)
    return laws, _law_inputs(options, opened.law, laws, target)


def _law_inputs(options: Options, law: Calibration, laws: LawRange, target: _Target) -> list[Input]:
    """What the law is, and where it comes from."""
    evidence = law.evidence
    number = "not stored" if law.id is None else f"calibration {law.id}"
    value = f"{number}, rung {law.rung}: {evidence.windows} windows, {evidence.singles} of them of requests alone"
    learned = f"learned from {utc_text(evidence.start_ns)} to {utc_text(evidence.end_ns)} on {law.fingerprint.text()}"
    medians = dict(zip(PARAMETERS, law.medians, strict=True))
    told = [
        Input("step law", value, "MODELLED", learned),
        Input("compute efficiency", f"{medians['compute_efficiency']:.2f} of the peak", "MODELLED", learned),
        Input("attention efficiency", f"{medians['attention_efficiency']:.2f} of the peak", "MODELLED", learned),
        Input(
            "t0, beside prefill and load",
            f"{laws.point.first_token_seconds:.3g} s",
            "GIVEN" if options.is_given("first_token_seconds") else "MODELLED",
            "" if options.is_given("first_token_seconds") else learned,
        ),
        loading_input(options),
    ]
    if target.is_elsewhere:
        told.insert(
            1, Input("efficiencies there", f"as where they were learned, within {ELSEWHERE_SD:.0%} (sd)", "ASSUMED")
        )
    return told


def _scaled(opened: _Opened) -> str:
    deployment = opened.deployment
    own = _hardware(gpu_of(deployment.subjects[-1].replica.sku or ""), deployment.machine.gpus)
    return f"scaled, MODELLED: the law was learned on {own}, and its efficiencies are ASSUMED to hold elsewhere"


class _Prices(NamedTuple):
    """Of an hour: one GPU, and what a replica takes beside its GPUs; with where they come from."""

    hourly: Decimal | None
    host: Decimal
    told: Input
    currency: str

    def of_a_replica(self, gpus: int) -> Decimal | None:
        """All of it."""
        return None if self.hourly is None else gpus * self.hourly + self.host


def _prices(options: Options, opened: _Opened, target: _Target) -> _Prices:
    """Those given, else the ledger's own; for other GPUs than the deployment's, the packaged ones."""
    values = options.values
    book = book_of(opened.reader, opened.config)
    host = options.decimal("host_price")
    is_own = values["gpu_price"] is not None or values["owned"] is not None
    currency = values["currency"] if options.is_given("currency") else book.currency
    if currency != book.currency and not is_own:
        raise click.UsageError(f"--currency {currency}: the ledger's prices are in {book.currency}: add --gpu-price")
    own = gpu_of(opened.deployment.subjects[-1].replica.sku or "")
    if target.gpu is not None and (is_own or target.gpu != own):
        hourly, told = gpu_price(options, target.gpu, currency)
        return _Prices(hourly, host, told, currency)
    if target.gpu is None and options.is_given("host_price"):
        return _Prices(Decimal(0), host, Input("price of the host", f"{host} an hour", "GIVEN"), currency)
    rates = opened.config.rates
    found = priced(opened.reader, opened.deployment, book, Payment(rates.term, rates.site))
    told = found.told(opened.deployment.machine.gpus)
    if target.gpu is None:
        return _Prices(None if found.hourly is None else Decimal(0), found.hourly or host, told, currency)
    return _Prices(
        None if found.hourly is None else found.hourly / opened.deployment.machine.gpus, host, told, currency
    )


def _deployment_json(opened: _Opened) -> dict[str, Any]:
    deployment = opened.deployment
    start_ns, end_ns = deployment.seen_ns
    return {
        "replicas": list(deployment.names),
        "window": {"start": utc_text(start_ns), "end": utc_text(end_ns)},
        "calibration": None if opened.law is None else law_json(opened.law),
    }


def _what_ifs(options: Options, opened: _Opened, stores: Sequence[Store], prices: _Prices) -> list[dict[str, Any]]:
    if not stores:
        return []
    values, deployment = options.values, opened.deployment
    extra, *more = shares_of("--extra-reuse", values["extra_reuse"])
    if more:
        raise click.UsageError(f"--extra-reuse {values['extra_reuse']}: one share of what was computed")
    loading = deployment.loading()
    if values["overlap"]:
        loading = "asynchronous"
    elif loading == "unknown":
        loading = "synchronous"
    hourly = prices.of_a_replica(deployment.machine.gpus)
    replicas = values["replicas"] if options.is_given("replicas") else None
    present = valued(opened.reader, deployment.window_ns, opened.laws, opened.reader.targets())
    found = []
    for store in stores:
        is_bought = store.holding is not None and store.holding.hours != MONTH_HOURS
        is_assumed = prices.told.basis == "ASSUMED" or (is_bought and not options.is_given("life_years"))
        idea = Idea(store, extra, loading, replicas, hourly, "ASSUMED" if is_assumed else "MODELLED")
        found.append(what_if(idea, deployment, present))
    return found
