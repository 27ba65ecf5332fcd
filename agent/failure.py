"""Errors as a person sees them: one line, what to do about it, and the exit status."""

from __future__ import annotations

from typing import NamedTuple

WRONG_CALL = 2
UNREACHABLE = 3


class Told(NamedTuple):
    """What goes to stderr, and the exit status."""

    text: str
    status: int


def explain(error: Exception) -> Told | None:
    """The words for an error of ours; None for a defect, which may show its traceback."""
    from kvtally.agent.config_file import ConfigError  # noqa: PLC0415  # the failing command has loaded it already
    from kvtally.agent.ledger.errors import LedgerError  # noqa: PLC0415  # as above
    from kvtally.agent.price import RateError  # noqa: PLC0415  # as above
    from kvtally.agent.recording_members import RecordingError  # noqa: PLC0415  # as above
    from kvtally.collectors.base import CollectError, NoData  # noqa: PLC0415  # as above

    hint = getattr(error, "hint", "")
    status = None
    if isinstance(error, (ConfigError, RateError)):
        status = WRONG_CALL
    elif isinstance(error, (LedgerError, RecordingError, CollectError, NoData, OSError)):
        status = UNREACHABLE
    if status is None:
        return None
    text = str(error) if not isinstance(error, OSError) else f"{error.filename or ''}: {error.strerror or error}"
    line = f"kvtally: {text.lstrip(': ')}" + (f" ({hint})" if hint else "")
    return Told(line.replace("\n", " "), status)
