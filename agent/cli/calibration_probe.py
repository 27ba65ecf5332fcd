"""`kvtally calibrate --probe`: a few cold prompts to one idle engine, after it was asked (METHOD 4.1, M4)."""

from __future__ import annotations

import json
import os
import sys
from contextlib import closing
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

import click

from kvtally.agent.finding import plural

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvtally.agent.config import Config
    from kvtally.agent.facts import Replica
    from kvtally.agent.kin import Kin
    from kvtally.agent.probe.engine import Engine
    from kvtally.agent.probe.measure import Probe as Measured
    from kvtally.agent.steplaw.evidence import Probe

RELATIVE_ERROR = 0.05  # METHOD 4.3, M4


class Where(NamedTuple):
    """How the engine is reached: its metrics page, and its API where that lies elsewhere; the key's place."""

    url: str | None
    api_url: str | None
    key_file: str | None
    key_variable: str | None


def page_of(name: str, config: Config) -> str:
    """The metrics page of a replica: as the config lists its engine, else where its name says."""
    target = name.rpartition("/")[0]
    return next((engine.url for engine in config.engines if engine.name == target), f"http://{target}/metrics")


def named_by(url: str, kinds: Iterable[Kin], config: Config) -> str | None:
    """The replica whose page this is; None where none or several are."""
    own = urlsplit(url).netloc
    names = {subject.name for kin in kinds for subject in kin.subjects}
    found = [name for name in names if urlsplit(page_of(name, config)).netloc == own]
    return found[0] if len(found) == 1 else None


def probed(kin: Kin, name: str, where: Where, config: Config, *, is_agreed: bool) -> tuple[Probe, ...]:
    """Ask, send the prompts, and give what they tell. CollectError as the engine raises; a no ends with status 1."""
    from kvtally.agent.probe.engine import Engine
    from kvtally.agent.probe.key import read_key
    from kvtally.agent.steplaw.evidence import Probe

    if not is_agreed and not sys.stdin.isatty():
        raise click.UsageError("--probe asks before it sends anything: without a terminal, agree with --yes")
    key = read_key(where.key_file, where.key_variable, os.environ)
    url = where.url or page_of(name, config)
    if not urlsplit(url).path.strip("/"):
        url = f"{url.rstrip('/')}/metrics"  # a server's address alone: vLLM serves its page there
    try:
        engine = Engine(url, api_url=where.api_url, key=key)
    except ValueError as error:
        raise click.UsageError(f"{url}: {error}") from None
    replica = next(subject.replica for subject in kin.subjects if subject.name == name)
    with closing(engine):
        measured = _measured(engine, kin, replica, is_agreed=is_agreed)
    return tuple(Probe(one.prompt_tokens, 0.0, one.seconds, RELATIVE_ERROR) for one in measured)


def _measured(engine: Engine, kin: Kin, replica: Replica, *, is_agreed: bool) -> tuple[Measured, ...]:
    from kvtally.agent.probe.measure import measure
    from kvtally.agent.probe.plan import announce, plan

    assert kin.machine is not None  # noqa: S101  # asked only where a law is possible
    served = engine.served(replica.model or None)
    lengths = plan(served.max_model_len, kin.machine.token_budget)
    speed = None if kin.machine.is_cpu else 1 / kin.machine.token_seconds
    click.echo(announce(lengths, served.model, engine.api_url, tokens_per_second=speed), err=True)
    if not is_agreed and not click.confirm("Send them?", err=True):
        click.echo("nothing was sent", err=True)
        raise click.exceptions.Exit(1)
    vocabulary = json.loads(replica.shape).get("vocab_size") if replica.shape else None
    done = measure(engine, served, lengths, vocabulary=vocabulary, told=_tell)
    if done.discarded:
        click.echo(f"{plural(done.discarded, 'prompt')} disturbed, and sent again", err=True)
    if done.stopped:
        click.echo(f"it ended early: {done.stopped}", err=True)
    return done.probes


def _tell(one: Measured) -> None:
    by = "by the engine's own clock" if one.source == "engine" else "to the first token"
    click.echo(f"  {one.prompt_tokens:>7,} tokens  {one.seconds * 1000:>10,.1f} ms {by}", err=True)
