"""`kvtally model`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from kvtally.agent.cli.options import Seconds, chosen_format, echo_json, format_option, ledger_options, window_options
from kvtally.agent.cli.request_evidence import requests_option

if TYPE_CHECKING:
    from kvtally.agent.model_report import Question

_SMOOTH = (
    *(step / 50 for step in range(45)),
    *(0.9 + step / 200 for step in range(21)),
)  # of a chart: steep at its end


_OF_THE_LEDGER = ("calibrated", "measured", "what_if")
# options that say more about one that asks a ledger: without it they would do nothing
_GO_WITH = {
    "calibration": ("calibrated", "what_if"),
    "log_path": ("measured",),
    "extra_reuse": ("what_if",),
    **dict.fromkeys(("replica", "since", "until", "ledger", "config_path"), _OF_THE_LEDGER),
}


@click.command(
    epilog="\b\nExample: a 70B model on 4 H100, with a file system of 40 GB/s at 145 USD a TB and month\n"
    "  kvtally model --model llama-70b --gpu H100 --gpus 4 --storage 'scale=40GB/s,$145/TB-month' --svg 70b.svg\n\n\b\n"
    "And from a ledger: 10 TB of storage for its deployment, if it turned a fifth of its computed tokens into hits\n"
    "  kvtally model --calibrated --measured --what-if 'disk=10TB@20GB/s,$300/TB' --extra-reuse 20%"
)
@click.option("--model", metavar="NAME|FILE", help="A packaged name (llama-70b), or a config.json.")
@click.option("--gpu", default="H100", show_default=True, metavar="NAME", help="H100, H200, A100, … or NVML's name.")
@click.option("--gpus", type=click.IntRange(1, 10_000), default=1, show_default=True, help="GPUs of a replica.")
@click.option("--calibrated", is_flag=True, help="By the ledger's own law, of its own model and GPUs.")
@click.option("--measured", is_flag=True, help="Lay the ledger's own points beside the curves, with the error.")
@click.option(
    "--what-if",
    multiple=True,
    metavar="SPEC",
    help="A store, under the reuse seen: NAME=10TB@20GB/s,$300/TB; repeatable.",
)
@click.option(
    "--extra-reuse",
    default="0%",
    show_default=True,
    metavar="%",
    help="Of the computed tokens: what that store turns into hits.",
)
@click.option("--replica", metavar="NAME", help="Of the ledger, where it holds several kinds.")
@click.option(
    "--calibration", type=click.IntRange(min=1), metavar="N", help="Its law. [default: the newest, or learned]"
)
@requests_option
@window_options
@click.option("--weight-dtype", metavar="TYPE", help="In place of the config's, such as bfloat16.")
@click.option("--kv-dtype", metavar="TYPE", help="Of the KV cache, such as fp8. [default: as config.json asks]")
@click.option("--quantization", metavar="METHOD", help="In place of the config's, such as fp8.")
@click.option("--prompt", default="8k,32k,128k", show_default=True, metavar="N,N", help="Tokens of a prompt.")
@click.option("--reuse", default="0,50,90,100", show_default=True, metavar="%,%", help="Shares of it that are reused.")
@click.option(
    "--storage", multiple=True, metavar="SPEC", help="NAME=8GB/s,$300/TB[,5ms] or …,$145/TB-month; repeatable."
)
@click.option("--dram", multiple=True, metavar="SPEC", help="NAME=200GB/s,$1000/128GB: price of a module; repeatable.")
@click.option("--capacity", default="100TB", show_default=True, metavar="SIZE", help="Of each of them.")
@click.option("--life-years", default="3", show_default=True, metavar="YEARS", help="Over which they are written off.")
@click.option(
    "--replicas", type=click.IntRange(1, 10**6), default=64, show_default=True, help="That share each of them."
)
@click.option("--overlap", is_flag=True, help="Loading hides behind the prefill, instead of stalling it.")
@click.option("--output-tokens", type=click.IntRange(0, 10**7), default=0, show_default=True, help="Of a request.")
@click.option(
    "--token-seconds",
    type=Seconds(0, 3600),
    default=0.025,
    show_default=True,
    help="Between two output tokens.",
)
@click.option(
    "--first-token-seconds",
    type=Seconds(0, 3600),
    default=0.05,
    show_default=True,
    help="Of every request, beside prefill and load: t0.",
)
@click.option("--efficiency", metavar="LOW,POINT,HIGH", help="Of the peak, in matrices. [default: 0.40,0.55,0.70]")
@click.option("--attention-efficiency", metavar="LOW,POINT,HIGH", help="In attention. [default: 0.30,0.40,0.55]")
@click.option(
    "--parameters",
    default="active",
    show_default=True,
    metavar="active|linear|N",
    help="That a token multiplies with: active are all but idle experts; linear, without embedding and output.",
)
@click.option("--all-reduce", is_flag=True, help="Count what tensor parallelism sends between GPUs.")
@click.option("--gpu-price", metavar="PRICE", help="Of a rented GPU, an hour. [default: the packaged one]")
@click.option("--owned", metavar="PRICE", help="Of a GPU that is bought, with its share of the node.")
@click.option("--years", default="5", show_default=True, metavar="YEARS", help="That it is kept.")
@click.option(
    "--residual-share", default="0.10", show_default=True, metavar="SHARE", help="Of its price, what it is worth then."
)
@click.option("--interest", default="0.08", show_default=True, metavar="SHARE", help="A year.")
@click.option(
    "--opex-share",
    default="0.10",
    show_default=True,
    metavar="SHARE",
    help="Of its price: upkeep of a year, without power.",
)
@click.option("--watts", default="0", show_default=True, metavar="W", help="That it draws, with its share of the host.")
@click.option(
    "--pue", default="1.54", show_default=True, metavar="FACTOR", help="What the building draws for each of them."
)
@click.option("--kwh-price", default="0.0929", show_default=True, metavar="PRICE", help="Of a kWh.")
@click.option(
    "--host-price",
    default="0",
    show_default=True,
    metavar="PRICE",
    help="Of what a replica takes beside its GPUs, an hour.",
)
@click.option("--currency", default="USD", show_default=True, metavar="CODE", help="That prices are in.")
@click.option("--svg", type=click.Path(dir_okay=False, writable=True), metavar="FILE", help="Write a chart, too.")
@format_option("table", "json", "csv")
@ledger_options
def model(svg: str | None, form: str | None, **values: Any) -> None:
    """Predict time to first token and cost with a KV cache, and say when one pays.

    By datasheet and assumed efficiencies, or by the law that a ledger's deployment has taught; each figure has the
    range that these leave. Every input is shown with where it comes from: GIVEN, a SOURCE, MODELLED or ASSUMED.

    A ledger is asked about its last seven days, or those of --since and --until. Exit status 1 where it cannot carry
    the answer.
    """
    from kvtally.agent.model_report import model_report

    question = _question(values)
    report = model_report(question)
    if svg is not None:
        from kvtally.agent.render.chart import chart

        smooth = model_report(question._replace(reuses=_SMOOTH))
        with open(svg, "w", encoding="utf-8") as file:  # noqa: PTH123  # one write
            file.write(chart(smooth))
    show(report, chosen_format(form))


def _question(values: dict[str, Any]) -> Question:
    """What is asked; where a ledger cannot carry it, the process ends with status 1 and the reasons."""
    from click.core import ParameterSource

    from kvtally.agent.cli.model_question import Options, check_currency, question_of, subject_of

    context = click.get_current_context()

    def is_given(name: str) -> bool:
        return context.get_parameter_source(name) is not ParameterSource.DEFAULT

    options = Options(values, is_given)
    for option in context.command.params:
        needed = _GO_WITH.get(option.name or "", ())
        if needed and is_given(option.name or "") and not any(values[name] for name in needed):
            names = " or ".join(f"--{name.replace('_', '-')}" for name in needed)
            raise click.UsageError(f"{option.opts[-1]} goes with {names}")
    check_currency(options)
    if not any(values[name] for name in _OF_THE_LEDGER):
        return question_of(options, subject_of(options))

    from kvtally.agent.cli.model_ledger import ledger_subject
    from kvtally.agent.model_report.deployment import NotCarried

    try:
        return question_of(options, ledger_subject(options))
    except NotCarried as reasons:
        click.echo(f"kvtally model: {reasons}", err=True)
        context.exit(1)


def show(report: dict[str, Any], form: str) -> None:
    """Print the answer."""
    if form == "json":
        echo_json(report)
    elif form == "csv":
        from kvtally.agent.model_report import points
        from kvtally.agent.render.comma_separated import POINT_COLUMNS, lines_of

        click.echo(lines_of(points(report), POINT_COLUMNS), nl=False)
    else:
        from kvtally.agent.render.model import model_table

        model_table(report)
