"""The command line: each command in its own module, loaded when it is called."""

from __future__ import annotations

import io
import os
import sys
from importlib import import_module
from typing import Any

import click

from kvtally import __version__
from kvtally.agent.cli.group import Group

# command -> where it lives and what its line in --help says (known here so that --help loads none of them)
COMMANDS = {
    "demo": ("kvtally.agent.cli.demo:demo", "A first look: a real recording, with no engine and no GPU."),
    "run": ("kvtally.agent.cli.run:run", "The sidecar: find engines, scrape them, keep the ledger."),
    "cost": ("kvtally.agent.cli.cost:cost", "Cost per million tokens, and its parts."),
    "savings": ("kvtally.agent.cli.savings:savings", "What KV reuse saved: gross, net and realised, per tier."),
    "storage": ("kvtally.agent.cli.storage:storage", "What loading KV took: bytes, bandwidth, page cache."),
    "calibrate": ("kvtally.agent.cli.calibrate:calibrate", "Learn how fast these engines are, for the savings."),
    "model": ("kvtally.agent.cli.model:model", "Predict what a KV cache would gain and cost."),
    "check": ("kvtally.agent.cli.check:check", "Is it within budget? For cron and CI, by exit status."),
    "doctor": ("kvtally.agent.cli.doctor:doctor", "What is found here, what is missing, and what to do."),
    "rates": ("kvtally.agent.cli.rates:rates", "List, add and import prices."),
    "ledger": ("kvtally.agent.cli.ledger:ledger", "Look after the ledger: info, upgrade, audit, settle, prune."),
    "export": ("kvtally.agent.cli.export:export", "Write FOCUS, Parquet or OpenMetrics; push to OpenTelemetry."),
    "record": ("kvtally.agent.cli.record:record", "Write a recording of a live deployment."),
    "replay": ("kvtally.agent.cli.replay:replay", "Feed a recording into a ledger."),
}


class _Commands(Group):
    """Loads a command when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  # click's signature
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002  # as above
        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name][0].partition(":")
        command = getattr(import_module(module), name)
        assert isinstance(command, click.Command)  # noqa: S101  # a wrong table is our own defect
        return command

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; where its reader (head, less) has gone, there is nobody to complain to."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            # Python writes into the pipe once more at its exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(0)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002  # as above
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="kvtally")
def group() -> None:
    """What a million tokens really cost, and what KV reuse really saved.

    Begin with `kvtally demo`; beside an engine, with `kvtally run`.
    """


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; every error is one line on stderr with a hint, and an exit status of CLI.md."""
    from kvtally.agent.failure import WRONG_CALL, explain

    _let_pass_what_cannot_be_encoded()
    try:
        status = group.main(args=arguments, prog_name="kvtally", standalone_mode=False)
    except click.exceptions.Abort:
        sys.exit(130)
    except click.ClickException as error:
        sys.stderr.write(_wrong_call(error))
        sys.exit(WRONG_CALL)
    except Exception as error:
        told = explain(error)
        if told is None:
            raise
        sys.stderr.write(told.text + "\n")
        sys.exit(told.status)
    sys.exit(status if isinstance(status, int) else 0)


def _wrong_call(error: click.ClickException) -> str:
    """What is wrong with the call, in one line that names the page to read."""
    context = getattr(error, "ctx", None)
    command = "kvtally" if context is None else context.command_path
    return f"{command}: {' '.join(error.format_message().split())} (see `{command} --help`)\n"


def _let_pass_what_cannot_be_encoded() -> None:
    """A name that the terminal's encoding lacks is shown escaped: it is no reason to fail."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
