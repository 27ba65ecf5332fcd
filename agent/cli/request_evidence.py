"""A log of requests (`--requests FILE`) as evidence beside the ledger's counters."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import click

from kvtally.agent.cli.named import replicas_in

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

    from kvtally.agent.calibrating import Extra
    from kvtally.agent.kin import Kin
    from kvtally.agent.ledger.read import LedgerReader, Target
    from kvtally.agent.request_log import Request
    from kvtally.agent.steplaw.laying import Laid

BEFORE_SECONDS = 3600  # a request may be sent so long before its first token
CLOCK_NS = 5_000_000_000  # that a log's clock may be ahead
LEAST_SHARE, MOST_SHARE = 0.9, 1.1  # of the requests that the engine counted
# of the prompts' tokens that may lie in other intervals than the engine counted them in. Measured on recordings: 0.8 %
# where a tenth of the requests lacks, 1.1-2.6 % in the order of ends (figures within 2 %), 7 % where laws go wrong
MISPLACED_MOST = 0.03
REUSE_APART_MOST = 0.05  # by which the reused share of the prompts may differ from the engine's


class Log(NamedTuple):
    """What a log tells of one replica.

    requests    of the log in the span that was asked for
    counted     that the engine counted there
    misfit      why it is no log of these requests, "" where it is one: nothing of it is evidence then
    """

    file: str
    replica: str
    requests: int
    counted: int
    extra: Extra
    misfit: str = ""

    @property
    def is_whole(self) -> bool:
        """Whether the log can stand for all the requests that the engine counted."""
        return self.extra.logged is not None

    def __str__(self) -> str:
        if self.misfit:
            return f"{self.file} {self.misfit}"
        text = f"{self.file} holds {self.requests:,} requests of the window with cached tokens"
        return f"{text}, {self.replica} counted {self.counted:,}"

    def as_json(self) -> dict[str, Any]:
        """What an answer names of it."""
        return {"file": self.file, "replica": self.replica, "requests": self.requests, "counted": self.counted}


def requests_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """--requests."""
    return click.option(
        "--requests",
        "log_path",
        type=click.Path(exists=True, dir_okay=False),
        metavar="FILE",
        help="Log of the replica's requests, JSON lines or CSV: time, prompt_tokens, cached_tokens, ttft_ms.",
    )(command)


def replica_named(kinds: Sequence[Kin], asked: str | None, option: str) -> str | None:
    """The one replica of a span, or the one that is named; None where there is none at all."""
    names = replicas_in(kinds, asked)
    if asked is None and len(names) > 1:
        raise click.UsageError(
            f"{option} is about one replica, the window holds {', '.join(names)}: add --replica NAME"
        )
    return asked or next(iter(names), None)


def log_of(
    path: str, reader: LedgerReader, span_ns: tuple[int, int], targets: Mapping[int, Target], replica: str | None
) -> Log | None:
    """Read a log beside the counters of a span; None where the span holds no replica. click.UsageError names faults."""
    from kvtally.agent.calibrating import Extra
    from kvtally.agent.kin import kin_of
    from kvtally.agent.steplaw.laying import laid
    from kvtally.agent.steplaw.logged import counted, logged_of, probes_of

    kinds = kin_of(reader, span_ns, targets)
    name = replica_named(kinds, replica, "--requests")
    if name is None:
        return None
    requests = requests_of(path, (span_ns[0], span_ns[1] + CLOCK_NS))
    series = [subject.series for kin in kinds for subject in kin.subjects if subject.name == name]
    start_ns, end_ns = span_ns
    inside = [one for one in requests if start_ns <= (one.at_seconds + (one.ttft_seconds or 0)) * 1e9 < end_ns]
    total = round(sum(counted(one, start_ns, end_ns) for one in series))
    where = f"--requests {path}"
    if not inside:
        raise click.UsageError(f"{where}: no request of the log is of the window: is its time UTC or has a zone?")
    if len(inside) > MOST_SHARE * total:
        text = f"{len(inside):,} requests of the log are of the window, {name} counted {total:,}: give its own alone"
        raise click.UsageError(f"{where}: {text}")
    found = laid(logged_of(requests), series)
    # a clock that is off takes requests out of the window that are of it
    paired = max(len(found.log.prompt), sum(one.cached_tokens is not None for one in inside))
    is_whole = paired >= LEAST_SHARE * total
    misfit = _misfit(found, name, total) if is_whole else ""
    if misfit:
        return Log(path, name, paired, total, Extra(), misfit)
    if is_whole:  # by the engine's clock
        requests = [one._replace(at_seconds=one.at_seconds + found.late) for one in requests]
    probes = tuple(probe for one in series for probe in probes_of(one, requests))
    rung = "M5" if probes and is_whole else "M4" if probes else "M2" if is_whole else ""
    return Log(path, name, paired, total, Extra(probes, found.log if is_whole else None, rung))


def _misfit(found: Laid, replica: str, counted: int) -> str:
    """Why a log is not one of the requests that a replica counted, "" where it is."""
    if abs(found.reuse) > REUSE_APART_MOST:
        more = "more" if found.reuse > 0 else "fewer"
        return (
            f"says that {more} of the prompts' tokens were reused than {replica} counted ({abs(found.reuse):.0%} of "
            "all): cached_tokens are those of the engine's usage.prompt_tokens_details"
        )
    if found.misplaced > MISPLACED_MOST:
        return (
            f"has {found.misplaced:.0%} of its tokens in other intervals than {replica} counted them in, even if its "
            "clock is some seconds off: time is when a request was sent or gave its first token, to the second; add "
            "ttft_ms to it"
        )
    if len(found.log.prompt) < LEAST_SHARE * counted:
        return (
            f"has only {len(found.log.prompt):,} requests that can be laid between the scrapes, of {counted:,} that "
            f"{replica} counted: there are gaps in its counters, or they do not add up"
        )
    return ""


def requests_of(path: str, span_ns: tuple[int, int]) -> Sequence[Request]:
    """The requests of a log that a span may have served; click.UsageError names the faults."""
    from kvtally.agent.request_log import RequestLogError, bounded_lines, read_requests

    since_seconds, until_seconds = span_ns[0] / 1e9 - BEFORE_SECONDS, span_ns[1] / 1e9
    try:
        with open(path, "rb") as file:  # noqa: PTH123  # one read
            lines = bounded_lines(file)
            return read_requests(lines, since_seconds=since_seconds, until_seconds=until_seconds).requests
    except RequestLogError as error:
        raise click.UsageError(f"--requests {path}: {error}{f': {error.hint}' if error.hint else ''}") from None
