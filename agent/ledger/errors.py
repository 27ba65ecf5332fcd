"""What can be wrong with a ledger, each with what to do about it.

LedgerError
├── LedgerUnreachable   no such place, no right, read-only, not a database, corrupt
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


class LedgerBusy(LedgerError):  # noqa: N818  # as above
    """Another process writes this ledger."""


class LedgerRevision(LedgerError):  # noqa: N818  # as above
    """The ledger's schema is not the one that this kvtally knows."""


def explained(path: str, error: Exception) -> LedgerError:
    """One clear error for what SQLite says: what, where, what to do."""
    text = str(error).lower()
    if "locked" in text or "busy" in text:
        return LedgerBusy(f"{path}: locked by another process", "close the program that holds it; nothing is lost")
    if "full" in text:
        return LedgerUnreachable(f"{path}: the disk is full", "free space; the next interval then covers the gap")
    if "readonly" in text or "read-only" in text:
        return LedgerUnreachable(f"{path}: read-only", "give kvtally's user the right to write the file and its folder")
    if "malformed" in text or "not a database" in text or "corrupt" in text:
        return LedgerUnreachable(
            f"{path}: damaged or not a SQLite database ({error})",
            "move the file away and start anew, or restore a copy; `sqlite3 FILE .recover` saves what is readable",
        )
    if "unable to open" in text:
        return LedgerUnreachable(
            f"{path}: cannot be opened", "it must be a file in a folder that exists and is writable"
        )
    if "disk i/o" in text:
        return LedgerUnreachable(f"{path}: the disk does not answer ({error})", "look at the kernel's log")
    return LedgerUnreachable(f"{path}: {error}", "`kvtally ledger audit` tells whether the ledger is whole")
