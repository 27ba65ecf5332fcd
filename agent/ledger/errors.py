"""What can be wrong with a ledger, each with what to do about it.

LedgerError
├── LedgerUnreachable   no such place, no right, read-only, not a database, corrupt
│   └── LedgerLost      it is not this run's any more: only another run can go on
├── LedgerBusy          another process holds it
└── LedgerRevision      made by a newer kvtally, or not brought up to date
"""

from __future__ import annotations


class LedgerError(Exception):
    """The ledger cannot be used as asked; `hint` says what to do."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class LedgerUnreachable(LedgerError):  # noqa: N818  # reads as a sentence where it is raised
    """There is no usable ledger at this place."""


class LedgerLost(LedgerUnreachable):
    """Somebody moved the ledger away, or wrote to it: what is kept in memory does not fit it any more."""


class LedgerBusy(LedgerError):  # noqa: N818  # as above
    """Another process writes this ledger."""


class LedgerRevision(LedgerError):  # noqa: N818  # as above
    """The ledger's schema is not the one that this kvtally knows."""


# what SQLite says, and what it means: (words of its message), class, what, what to do
_SAID: tuple[tuple[tuple[str, ...], type[LedgerError], str, str], ...] = (
    (
        ("is locked", "is busy"),
        LedgerBusy,
        "locked by another process",
        "close the program that holds it; nothing is lost",
    ),
    (("is full",), LedgerUnreachable, "the disk is full", "free space; the next interval then covers the gap"),
    (
        ("readonly", "read-only"),
        LedgerUnreachable,
        "read-only",
        "give kvtally's user the right to write the file and its folder",
    ),
    (
        ("malformed", "not a database", "corrupt"),
        LedgerUnreachable,
        "damaged or not a SQLite database ({error})",
        "move the file away and start anew, or restore a copy; `sqlite3 FILE .recover` saves what is readable",
    ),
    (
        ("unable to open",),
        LedgerUnreachable,
        "cannot be opened",
        "it must be a file in a folder that exists, both of them readable and writable",
    ),
    (("disk i/o",), LedgerUnreachable, "the disk does not answer ({error})", "look at the kernel's log"),
    (
        ("no such column", "no such table"),
        LedgerUnreachable,
        "its tables are not those of its revision ({error})",
        "restore a copy, or begin another ledger with --ledger: this one was changed by another program",
    ),
)
_UNKNOWN = (
    "`sqlite3 FILE 'PRAGMA integrity_check'` tells whether the file is whole: if not, restore a copy; if it is, this "
    "is a fault of kvtally: report these words"
)


def explained(path: str, error: Exception) -> LedgerError:
    """One clear error for what SQLite says: what, where, what to do."""
    text = str(error).lower()
    for words, kind, what, hint in _SAID:
        if any(word in text for word in words):
            return kind(f"{path}: {what.format(error=error)}", hint)
    return LedgerUnreachable(f"{path}: {error}", _UNKNOWN)
