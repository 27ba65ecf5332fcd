"""The daemon's hot path: closed intervals and the raw counters behind them, in one transaction."""

from __future__ import annotations

import json
import sqlite3
from math import isfinite
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from kvtally.agent.interval import UNASKED, Interval, State
from kvtally.agent.ledger.columns import (
    HOUR_HEAD,
    HOUR_NS,
    INTERVAL_HEAD,
    KINDS,
    hour_table,
    interval_table,
    quantity_columns,
    sum_columns,
)
from kvtally.agent.ledger.errors import LedgerLost, explained
from kvtally.agent.ledger.packing import packed
from kvtally.agent.ledger.place import place_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from kvtally.agent.finding import Finding
    from kvtally.collectors.base import Kind, Reading


class Closed(NamedTuple):
    """One target's share of a tick: what is written, and the state that is kept once it is."""

    reading: Reading
    interval: Interval | None  # None: a first scrape, which only opens one
    state: State
    findings: Sequence[Finding] = ()


def insert_sql(kind: Kind) -> str:
    """The statement that appends one interval."""
    columns = (*INTERVAL_HEAD, *quantity_columns(kind), "details")
    return f"INSERT INTO {interval_table(kind)} ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})"  # noqa: S608  # names are our own constants


def hour_sql(kind: Kind) -> str:
    """The statement that adds one interval to the hour in which it starts; an unknown difference adds nothing."""
    columns = (*HOUR_HEAD, *sum_columns(kind))
    table = hour_table(kind)
    adds = ["intervals = intervals + 1", "length_ns = length_ns + excluded.length_ns"]
    adds += ["missed = missed + excluded.missed", "flags = flags | excluded.flags"]
    adds += [f"{name} = coalesce({name} + excluded.{name}, {name}, excluded.{name})" for name in sum_columns(kind)]
    marks = ", ".join("?" * len(columns))
    return (
        f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({marks}) "  # noqa: S608  # names are our own constants
        f"ON CONFLICT (hour_ns, target_id) DO UPDATE SET {', '.join(adds)}"
    )


_NAMES = {kind: quantity_columns(kind) for kind in KINDS}
_INSERT = {kind: insert_sql(kind) for kind in KINDS}
_HOUR = {kind: hour_sql(kind) for kind in KINDS}
_SUMMED = {
    kind: tuple(at for at, name in enumerate(quantity_columns(kind)) if name in sum_columns(kind)) for kind in KINDS
}
# a first state where there is one already, or another taken_at_ns than ours, is a second writer's: it would count
# the same difference twice, or leave one out
_FIRST_STATE = (
    "INSERT INTO counter_state (taken_at_ns, target_id, state, kind, name) VALUES (?, ?, ?, ?, ?) "
    "ON CONFLICT (kind, name) DO NOTHING"
)
_NEXT_STATE = (
    "UPDATE counter_state SET taken_at_ns = ?, target_id = ?, state = ? WHERE kind = ? AND name = ? AND taken_at_ns = ?"
)
_LARGEST = 2**63 - 1
_UNTOLD = "nan"  # of a part, whose numbers stand in a list: JSON has no word for it
_STATES_MAX = 4096  # held in memory from the start; a fleet's ledger may know many more that are gone
_IDS_MAX = 8192
_FINDING = "INSERT OR IGNORE INTO finding (kind, severity, target, start_ns, end_ns, message) VALUES (?, ?, ?, ?, ?, ?)"


def encoded(kind: Kind, state: State) -> str:
    """A state as JSON: counters by name, so that a later kvtally with other quantities reads it."""
    # UNASKED (NaN) is left out, and an infinity, which tells no more: absent means "nobody knows the count so far"
    given = zip(_NAMES[kind], state.values, strict=True)
    values = {name: value for name, value in given if value is None or isfinite(value)}
    body: dict[str, Any] = {"epoch": state.epoch, "session": state.session, "values": values, "moved": state.moved}
    body["details"] = state.details
    if state.parts is not None:
        body["parts"] = {
            key: [number if number is None or isfinite(number) else _UNTOLD for number in numbers]
            for key, numbers in state.parts.items()
        }
    if state.behind:
        body["behind"] = state.behind
    return msgspec.json.encode(body).decode()


def decoded(kind: Kind, taken_at_ns: int, text: str, detail_names: Sequence[str]) -> State:
    """Invert `encoded`."""
    body = json.loads(text)
    values = tuple(body["values"].get(name, UNASKED) for name in quantity_columns(kind))
    parts = body.get("parts")
    if parts is not None:
        parts = {
            key: tuple(UNASKED if number == _UNTOLD else number for number in numbers) for key, numbers in parts.items()
        }
    return State(
        taken_at_ns,
        values,
        body["epoch"],
        body["session"],
        tuple(detail_names),
        tuple(body["details"]),
        parts,
        body["moved"],
        body.get("behind", {}),
    )


def _storable(closed: Closed) -> Closed:
    """The same with what SQLite's integers cannot hold as unknown."""
    interval = closed.interval
    if interval is None:
        return closed
    values = tuple(None if value is None or abs(value) > _LARGEST else value for value in interval.values)
    return closed._replace(interval=interval._replace(values=values))


class LedgerWriter:
    """Appends to one SQLite ledger over one connection."""

    def __init__(self, connection: sqlite3.Connection, path: str, ticks_together: int = 1) -> None:
        """`ticks_together` ticks are written in one transaction, which costs as much as one tick's.

        A crash of kvtally loses none of their counts: the last state in the ledger is older then, and the next run's
        first interval covers their time too. An engine that dies with it takes the held ticks along.
        """
        self._connection = connection
        self._path = path
        self._place = place_of(path)
        self._ticks_together = ticks_together
        self._held: list[tuple[tuple[Closed, ...], tuple[Finding, ...]]] = []
        self._ids: dict[tuple[str, str], tuple[Mapping[str, str], tuple[str, ...], int]] = {}

    def states(self) -> dict[tuple[str, str], State]:
        """The last raw counters by (kind, name), of those targets that were read last; `recall` knows the others'."""
        return self._states("ORDER BY s.taken_at_ns DESC LIMIT ?", _STATES_MAX)

    def recall(self, kind: str, name: str) -> State | None:
        """The last raw counters of one target; None if there are none."""
        return self._states("WHERE s.kind = ? AND s.name = ?", kind, name).get((kind, name))

    def _states(self, which: str, *about: object) -> dict[tuple[str, str], State]:
        query = (
            "SELECT s.kind, s.name, s.taken_at_ns, s.state, t.detail_names "  # noqa: S608  # our own words
            f"FROM counter_state s JOIN target t ON t.id = s.target_id {which}"
        )
        try:
            rows = self._connection.execute(query, about).fetchall()
        except sqlite3.Error as error:
            raise explained(self._path, error) from error
        return {
            (kind, name): decoded(kind, taken_at_ns, state, json.loads(detail_names))
            for kind, name, taken_at_ns, state, detail_names in rows
        }

    def append(self, batch: Iterable[Closed], findings: Iterable[Finding] = ()) -> None:
        """Write a tick whole or not at all; one without anything remarkable may be held for its successors.

        LedgerError if it could not be written: the caller keeps the states that it had, and its next interval
        covers this one too; the ticks held before stay held. A difference beyond 64 bits, which only a page that
        lies can tell, is unknown.
        """
        tick = tuple(batch), tuple(findings)
        self._held.append(tick)
        remarkable = tick[1] or any(closed.interval is None or closed.findings for closed in tick[0])
        if remarkable or len(self._held) >= self._ticks_together:
            try:
                self.flush()
            except BaseException:
                self._held.pop()
                raise

    def flush(self) -> None:
        """Write what is held; LedgerError if it could not be written, and it stays held."""
        batch = [closed for tick, _ in self._held for closed in tick]
        findings = [finding for _, found in self._held for finding in found]
        try:
            self._write(batch, findings)
        except OverflowError:
            self._write([_storable(closed) for closed in batch], findings)
        self._held.clear()

    def _write(self, batch: Sequence[Closed], findings: Iterable[Finding]) -> None:
        execute = self._connection.execute
        spans: dict[tuple[str, str], tuple[Closed, Closed]] = {}  # the first and the last of each target
        for closed in batch:
            key = (closed.reading.kind, closed.reading.name)
            spans[key] = (spans[key][0] if key in spans else closed, closed)
        if place_of(self._path) != self._place:
            raise LedgerLost(
                f"{self._path}: the ledger was moved or removed while it was written",
                "restart this `kvtally run`: what was counted since is in the engines' counters still",
            )
        try:
            execute("BEGIN IMMEDIATE")
            for first, last in spans.values():
                self._keep_state(first.interval, last)
            for closed in batch:
                self._one(closed)
            for finding in findings:
                execute(_FINDING, finding)
            execute("COMMIT")
        except sqlite3.Error as error:
            self._undo()
            raise explained(self._path, error) from error
        except BaseException:
            self._undo()
            raise

    def skip(self, by_ns: int, finding: Finding) -> None:
        """Move every target's last scrape forward by a step of the clock: the next interval starts after it."""
        if self._held:
            self.flush()
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            self._connection.execute("UPDATE counter_state SET taken_at_ns = taken_at_ns + ?", (by_ns,))
            self._connection.execute(_FINDING, finding)
            self._connection.execute("COMMIT")
        except sqlite3.Error as error:
            self._undo()
            raise explained(self._path, error) from error

    def _undo(self) -> None:
        self._ids.clear()  # rows of `target` may have gone with the transaction
        if self._connection.in_transaction:
            self._connection.execute("ROLLBACK")

    def _one(self, closed: Closed) -> None:
        reading, interval = closed.reading, closed.interval
        execute = self._connection.execute
        if interval is not None:
            target_id = self._target_id(reading, closed.state.detail_names)
            head = (interval.end_ns - interval.start_ns, interval.missed, interval.flags)
            values = interval.values
            execute(
                _INSERT[reading.kind],
                (interval.start_ns, target_id, *head, interval.began_ns, *values, packed(interval.details)),
            )
            hour_ns = interval.start_ns // HOUR_NS * HOUR_NS
            sums = [values[at] for at in _SUMMED[reading.kind]]
            execute(_HOUR[reading.kind], (hour_ns, target_id, 1, *head, *sums))
        for finding in closed.findings:
            execute(_FINDING, finding)

    def _keep_state(self, first: Interval | None, last: Closed) -> None:
        """Store a target's last raw counters; `first` is its first interval since the state that is stored."""
        kind, name = last.reading.kind, last.reading.name
        target_id = self._target_id(last.reading, last.state.detail_names)
        about = (last.state.taken_at_ns, target_id, encoded(kind, last.state), kind, name)
        if first is None or first.start_ns == first.began_ns:
            moved = self._connection.execute(_FIRST_STATE, about)
        else:
            moved = self._connection.execute(_NEXT_STATE, (*about, first.start_ns))
        if moved.rowcount != 1:
            raise LedgerLost(
                f"{self._path}: somebody else wrote counters of {kind}/{name}",
                "only one `kvtally run` may write a ledger; restart this one",
            )

    def _target_id(self, reading: Reading, detail_names: tuple[str, ...]) -> int:
        key = (reading.kind, reading.name)
        cached = self._ids.get(key)
        if cached is not None and cached[0] == reading.attributes and cached[1] == detail_names:
            return cached[2]
        attributes = json.dumps(dict(reading.attributes), sort_keys=True)
        about = (*key, attributes, json.dumps(detail_names))
        execute = self._connection.execute
        execute("INSERT OR IGNORE INTO target (kind, name, attributes, detail_names) VALUES (?, ?, ?, ?)", about)
        query = "SELECT id FROM target WHERE kind = ? AND name = ? AND attributes = ? AND detail_names = ?"
        target_id = int(execute(query, about).fetchone()[0])
        if len(self._ids) >= _IDS_MAX:
            self._ids.clear()
        self._ids[key] = (reading.attributes, detail_names, target_id)
        return target_id

    def close(self) -> None:
        """Write what is held and close the connection; SQLite then folds the write-ahead log into the file."""
        try:
            if self._held:
                self.flush()
        finally:
            self._connection.close()
