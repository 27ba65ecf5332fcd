"""`kvtally model`."""

from __future__ import annotations

from typing import Any

import click

from kvtally.agent.cli.options import Seconds, chosen_format, format_option

_SMOOTH = (
    *(step / 50 for step in range(45)),
    *(0.9 + step / 200 for step in range(21)),
)  # of a chart: steep at its end


@click.command(
    epilog="\b\nExample: a 70B model on 4 H100, with a file system of 40 GB/s at 145 USD a TB and month\n"
    "  kvtally model --model llama-70b --gpu H100 --gpus 4 --storage 'scale=40GB/s,$145/TB-month' --svg 70b.svg"
)
@click.option("--model", required=True, metavar="NAME|FILE", help="A packaged name (llama-70b), or a config.json.")
@click.option("--gpu", default="H100", show_default=True, metavar="NAME", help="H100, H200, A100, … or NVML's name.")
@click.option("--gpus", type=click.IntRange(1, 10_000), default=1, show_default=True, help="GPUs of a replica.")
@click.option("--weight-dtype", metavar="TYPE", help="In place of the config's, such as bfloat16.")
@click.option("--kv-dtype", metavar="TYPE", help="Of the KV cache, such as fp8. [default: as the weights']")
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
    "--t0",
    type=Seconds(0, 3600),
    default=0.05,
    show_default=True,
    help="Of every request, beside prefill and load.",
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
@click.option("--years", default="5", show_default=True, help="That it is kept.")
@click.option("--residual-share", default="0.10", show_default=True, help="Of its price, what it is worth then.")
@click.option("--interest", default="0.08", show_default=True, help="A year.")
@click.option("--opex-share", default="0.10", show_default=True, help="Of its price: upkeep of a year, without power.")
@click.option("--watts", default="0", show_default=True, help="That it draws, with its share of the host.")
@click.option("--pue", default="1.54", show_default=True, help="What the building draws for each of them.")
@click.option("--kwh-price", default="0.0929", show_default=True, help="Of a kWh.")
@click.option("--host-price", default="0", show_default=True, help="Of what a replica takes beside its GPUs, an hour.")
@click.option("--currency", default="USD", show_default=True, metavar="CODE", help="That prices are in.")
@click.option("--svg", type=click.Path(dir_okay=False, writable=True), metavar="FILE", help="Write a chart, too.")
@format_option("table", "json", "csv")
def model(svg: str | None, form: str | None, **values: Any) -> None:
    """Predict time to first token and cost with a KV cache, and say when one pays.

    By datasheet and assumed efficiencies; each figure has the range that these leave. Every input is shown with where
    it comes from: GIVEN, a SOURCE, or ASSUMED.
    """
    from click.core import ParameterSource  # noqa: PLC0415  # --help needs none of it

    from kvtally.agent.cli.model_question import Options, question_of  # noqa: PLC0415  # as above
    from kvtally.agent.model_report import model_report  # noqa: PLC0415  # as above

    context = click.get_current_context()

    def is_given(name: str) -> bool:
        return context.get_parameter_source(name) is not ParameterSource.DEFAULT

    question = question_of(Options(values, is_given))
    report = model_report(question)
    if svg is not None:
        from kvtally.agent.render.chart import chart  # noqa: PLC0415  # only here

        smooth = model_report(question._replace(reuses=_SMOOTH))
        with open(svg, "w", encoding="utf-8") as file:  # noqa: PTH123  # one write
            file.write(chart(smooth))
    show(report, chosen_format(form))


def show(report: dict[str, Any], form: str) -> None:
    """Print the answer."""
    if form == "json":
        from json import dumps  # noqa: PLC0415  # only here

        click.echo(dumps(report, indent=2))
    elif form == "csv":
        from kvtally.agent.model_report import points  # noqa: PLC0415  # only here
        from kvtally.agent.render.comma_separated import lines_of  # noqa: PLC0415  # as above

        click.echo(lines_of(points(report)), nl=False)
    else:
        from kvtally.agent.render.model import model_table  # noqa: PLC0415  # rich is loaded for a table only

        model_table(report)
