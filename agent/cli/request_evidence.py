"""A log of requests (`--requests FILE`) as evidence beside the ledger's counters."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import click

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

    from kvtally.agent.calibrating import Extra
    from kvtally.agent.kin import Kin
    from kvtally.agent.ledger.read import LedgerReader, Target
    from kvtally.agent.request_log import Request

BEFORE_SECONDS = 3600  # a request may be sent so long before its first token
LEAST_SHARE, MOST_SHARE = 0.9, 1.1  # of the requests that the engine counted


class Log(NamedTuple):
    """What a log tells of one replica.

    requests    of the log in the span that was asked for
    counted     that the engine counted there
    """

    file: str
    replica: str
    requests: int
    counted: int
    extra: Extra

    @property
    def is_whole(self) -> bool:
        """Whether the log can stand for all the requests that the engine counted."""
        return self.extra.logged is not None

    def __str__(self) -> str:
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
    names = sorted({subject.name for kin in kinds for subject in kin.subjects})
    if asked is not None and asked not in names:
        raise click.UsageError(f"--replica {asked}: the window holds {', '.join(names) or 'none'}")
    if asked is None and len(names) > 1:
        raise click.UsageError(
            f"{option} is about one replica, the window holds {', '.join(names)}: add --replica NAME"
        )
    return asked or next(iter(names), None)


def log_of(
    path: str, reader: LedgerReader, span_ns: tuple[int, int], targets: Mapping[int, Target], replica: str | None
) -> Log | None:
    """Read a log beside the counters of a span; None where the span holds no replica. click.UsageError names faults."""
    from kvtally.agent.calibrating import Extra  # noqa: PLC0415  # numpy is loaded only where it is needed
    from kvtally.agent.kin import kin_of  # noqa: PLC0415  # numpy is loaded only where it is needed
    from kvtally.agent.steplaw.logged import counted, logged_of, probes_of  # noqa: PLC0415  # as above

    kinds = kin_of(reader, span_ns, targets)
    name = replica_named(kinds, replica, "--requests")
    if name is None:
        return None
    requests = _requests(path, span_ns)
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
    paired = [one for one in inside if one.cached_tokens is not None]
    logged = logged_of(requests) if len(paired) >= LEAST_SHARE * total else None
    probes = tuple(probe for one in series for probe in probes_of(one, requests))
    rung = "M5" if probes and logged else "M4" if probes else "M2" if logged else ""
    return Log(path, name, len(paired), total, Extra(probes, logged, rung))


def _requests(path: str, span_ns: tuple[int, int]) -> Sequence[Request]:
    from kvtally.agent.request_log import RequestLogError, bounded_lines, read_requests  # noqa: PLC0415  # as above

    since_seconds, until_seconds = span_ns[0] / 1e9 - BEFORE_SECONDS, span_ns[1] / 1e9
    try:
        with open(path, "rb") as file:  # noqa: PTH123  # one read
            lines = bounded_lines(file)
            return read_requests(lines, since_seconds=since_seconds, until_seconds=until_seconds).requests
    except RequestLogError as error:
        raise click.UsageError(f"--requests {path}: {error}{f': {error.hint}' if error.hint else ''}") from None
