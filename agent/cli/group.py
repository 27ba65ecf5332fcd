"""A command that only holds others: called alone, it shows its page."""

from __future__ import annotations

import click


class Group(click.Group):
    """A group whose help is the answer to a call without a command, on stdout and with status 0."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Ask for help where nothing is asked for."""
        return super().parse_args(ctx, args or ["--help"])
