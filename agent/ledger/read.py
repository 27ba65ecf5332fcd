"""Reading the ledger: what the reports, the settlement and the audit ask, in SQLAlchemy Core."""

from __future__ import annotations

import json
import os
from contextlib import contextmanager
from decimal import Decimal
from fractions import Fraction
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from sqlalchemy import URL, Connection, ExceptionContext, create_engine, event, func, insert, select
from sqlalchemy.pool import NullPool

from kvtally.agent.facts import VLLM, EngineRow, Evidence, Replica
from kvtally.agent.finding import Finding
from kvtally.agent.ledger import calibrations, schema, settled
from kvtally.agent.ledger.columns import HEAD_REVISION, HOUR_NS, KINDS, quantity_columns
from kvtally.agent.ledger.errors import LedgerRevision, LedgerUnreachable, explained
from kvtally.agent.ledger.evidence import MARGIN_NS, evidence
from kvtally.agent.ledger.place import file_of
from kvtally.agent.ledger.reach import reach
from kvtally.agent.price import Rate

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
    from types import TracebackType
    from typing import Self

    from sqlalchemy import Engine

    from kvtally.agent.calibration import Calibration
    from kvtally.agent.ledger.calibrations import StoredCalibration, StoredSaving
    from kvtally.agent.price import Term
    from kvtally.collectors.base import Kind


# intervals that began last: the newest end is one of theirs, unless an older one lasted until after they all began
_LAST_BEGUN = 1000


class Target(NamedTuple):
    """One row of `target`."""

    id: int
    kind: str
    name: str
    attributes: Mapping[str, str]
    detail_names: tuple[str, ...]


class LedgerReader:
    """A ledger opened for questions (and for what is written rarely: rates, settlements); LedgerError if it cannot be.

    Any question raises LedgerError where the file does not answer it.
    """

    def __init__(self, url: str) -> None:
        self.path = file_of(url)
        if not os.path.exists(self.path):  # noqa: PTH110  # one call
            raise LedgerUnreachable(f"{self.path}: no ledger there", "`kvtally run` or `kvtally replay` makes one")
        self._engine: Engine = create_engine(URL.create("sqlite", database=self.path), poolclass=NullPool)
        event.listen(self._engine, "connect", _prepare)
        event.listen(self._engine, "handle_error", self._explain)
        self.connection: Connection = self._engine.connect()
        try:
            self._check_revision()
        except BaseException:
            self.close()
            raise

    def _explain(self, about: ExceptionContext) -> None:
        raise explained(self.path, Exception(str(about.original_exception))) from about.original_exception

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self.connection.close()
        self._engine.dispose()

    def _check_revision(self) -> None:
        tables = self.connection.exec_driver_sql("SELECT name FROM sqlite_master WHERE type = 'table'").scalars().all()
        if "alembic_version" not in tables:
            raise LedgerUnreachable(f"{self.path}: not a ledger of kvtally", "give another with --ledger")
        revision = self.connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar()
        if revision != HEAD_REVISION:
            older = (revision or "") < HEAD_REVISION
            raise LedgerRevision(
                f"{self.path}: the ledger has revision {revision}, this kvtally knows {HEAD_REVISION}",
                "run `kvtally ledger upgrade`" if older else "it was written by a newer kvtally: upgrade this one",
            )

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """Everything that is asked inside sees the ledger of one instant, whatever a writer does meanwhile."""
        self.connection.rollback()
        self.connection.exec_driver_sql("BEGIN")
        try:
            yield
        finally:
            self.connection.rollback()

    def targets(self) -> dict[int, Target]:
        """Every target that the ledger knows, by id."""
        table = schema.target
        rows = self.connection.execute(select(table).order_by(table.c.id))
        return {
            row.id: Target(row.id, row.kind, row.name, json.loads(row.attributes), tuple(json.loads(row.detail_names)))
            for row in rows
        }

    def extent(self) -> tuple[int, int] | None:
        """Start of the oldest engine interval and end of the newest, raw or summed by hour; None if there is none."""
        raw, hour = schema.intervals["engine"].c, schema.hours["engine"].c
        # asked for one at a time, each is the end of an index
        oldest = self.connection.execute(select(func.min(hour.hour_ns))).scalar()
        newest = self.connection.execute(select(func.max(hour.hour_ns))).scalar()
        if oldest is None or newest is None:
            return None
        first = self.connection.execute(select(func.min(raw.start_ns))).scalar()
        ends = select(raw.start_ns + raw.length_ns).order_by(raw.start_ns.desc()).limit(_LAST_BEGUN)
        last = max(self.connection.execute(ends).scalars(), default=newest + HOUR_NS)
        # where intervals have aged out, only the hours tell that they were
        return (oldest if first is None or self.pruned_before() is not None else first), last

    def pruned_before(self) -> int | None:
        """The instant up to which raw intervals have left; None if none has."""
        return self.connection.execute(select(func.max(schema.prune_log.c.before_ns))).scalar()

    def raw_from(self) -> int | None:
        """The instant from which on every raw engine interval is there; None if none is."""
        oldest = self.connection.execute(select(func.min(schema.intervals["engine"].c.start_ns))).scalar()
        return None if oldest is None else max(oldest, self.pruned_before() or oldest)

    def whole_hours_from(self) -> int | None:
        """The first hour of which every raw engine interval is there; None if none is there at all."""
        raw_from_ns, pruned_ns = self.raw_from(), self.pruned_before()
        if raw_from_ns is None or pruned_ns is None:
            return None if raw_from_ns is None else raw_from_ns // HOUR_NS * HOUR_NS
        return -(-raw_from_ns // HOUR_NS) * HOUR_NS

    def engine_rows(self, start_ns: int, end_ns: int) -> Iterator[EngineRow]:
        """Engine intervals that overlap [start_ns, end_ns), in time order."""
        c = schema.intervals["engine"].c
        columns = [c.target_id, c.start_ns, c.length_ns, c.missed, c.flags, c.began_ns]
        columns += [c[name] for name in quantity_columns("engine")]
        query = select(*columns).where(
            c.start_ns >= reach(self.connection, "engine", start_ns),
            c.start_ns < end_ns,
            c.start_ns + c.length_ns > start_ns,
        )
        for row in self.connection.execute(query.order_by(c.start_ns, c.target_id)):
            yield EngineRow(row[0], row[1], row[1] + row[2], row[3], row[4], row[5], tuple(row[6:]))

    def evidence(self, start_ns: int, end_ns: int, targets: Mapping[int, Target]) -> Evidence:
        """What GPUs and processes say about [start_ns, end_ns)."""
        return evidence(self.connection, start_ns, end_ns, targets)

    def rates(self) -> list[tuple[int, Rate]]:
        """Every rate with its id, in the order in which they were added."""
        rows = self.connection.execute(select(schema.rate).order_by(schema.rate.c.id)).mappings()
        return [(row["id"], _rate(dict(row))) for row in rows]

    def findings(self, start_ns: int, end_ns: int, limit: int = 1000) -> list[Finding]:
        """Findings whose span touches [start_ns, end_ns), oldest first."""
        c = schema.finding.c
        query = select(c.kind, c.severity, c.target, c.start_ns, c.end_ns, c.message).where(
            c.start_ns < end_ns, c.end_ns >= start_ns
        )
        rows = self.connection.execute(query.order_by(c.start_ns, c.id).limit(limit))
        return [Finding(*row) for row in rows]

    def counts(self) -> dict[str, int]:
        """Rows by table."""
        return {
            name: self.connection.execute(select(func.count()).select_from(table)).scalar_one()
            for name, table in schema.metadata.tables.items()
        }

    def settled_hours(self) -> dict[int, int]:
        """Every settled hour, and how many engine intervals had begun in it when it was settled last."""
        c = schema.settlement.c
        query = select(c.period_start_ns, c.intervals).order_by(c.period_start_ns, c.revision)
        return {row.period_start_ns: row.intervals for row in self.connection.execute(query)}

    def begun(self, start_ns: int, end_ns: int) -> dict[int, int]:
        """How many engine intervals begin in each hour of [start_ns, end_ns)."""
        c = schema.hours["engine"].c
        query = select(c.hour_ns, func.sum(c.intervals).label("begun")).where(c.hour_ns >= start_ns, c.hour_ns < end_ns)
        return {row.hour_ns: row.begun for row in self.connection.execute(query.group_by(c.hour_ns))}

    def has_charges_at(self, rate_ids: Collection[int]) -> bool:
        """Whether there is a charge, in any revision, at one of these rates."""
        c = schema.charge.c
        return self.connection.execute(select(c.id).where(c.rate_id.in_(rate_ids)).limit(1)).first() is not None

    def hour_sums(self, kind: Kind, start_ns: int, end_ns: int) -> Iterator[Mapping[str, Any]]:
        """Hourly sums of a kind for the hours in [start_ns, end_ns)."""
        table = schema.hours[kind]
        query = select(table).where(table.c.hour_ns >= start_ns, table.c.hour_ns < end_ns)
        names = table.columns.keys()
        for row in self.connection.execute(query.order_by(table.c.hour_ns, table.c.target_id)):
            yield dict(zip(names, row, strict=True))

    def state_ends(self) -> dict[tuple[str, str], int]:
        """When each target was last scraped."""
        c = schema.counter_state.c
        rows = self.connection.execute(select(c.kind, c.name, c.taken_at_ns))
        return {(kind, name): taken_at_ns for kind, name, taken_at_ns in rows}

    def add_rates(self, rates: Sequence[Rate]) -> None:
        """Append rates, all or none."""
        rows = [{**rate._asdict(), "pue": None if rate.pue is None else str(rate.pue)} for rate in rates]
        with self._writing():
            if rows:
                self.connection.execute(insert(schema.rate), rows)

    def write_settlement(
        self,
        hour_ns: int,
        revision: int,
        *,
        reason: str,
        intervals: int,
        facts: object,
        charges: Iterable[Mapping[str, Any]],
        savings: Iterable[Mapping[str, Any]] = (),
    ) -> None:
        """Write one hour's settlement with its charges and savings, whole or not at all.

        `intervals` are those that had begun in the hour when the facts were worked out. A saving has a target_id, a
        body of plain values and, where a law was used, its calibration_id.
        """
        values = {
            "period_start_ns": hour_ns,
            "revision": revision,
            "period_end_ns": hour_ns + HOUR_NS,
            "reason": reason,
            "intervals": intervals,
            "facts": json.dumps(facts, sort_keys=True),
        }
        rows = [dict(charge) for charge in charges]
        with self._writing():
            self.connection.execute(insert(schema.settlement).values(**values))
            if rows:
                self.connection.execute(insert(schema.charge), rows)
            calibrations.add_savings(self.connection, hour_ns, revision, savings)

    def prune(self, before_ns: int) -> dict[str, int]:
        """Remove intervals that ended by an instant, and write down how many.

        What crosses it stays whole, and so does what GPUs and processes say about the time of an engine's that does.
        """
        crossing = [row.start_ns for row in self.engine_rows(before_ns, before_ns + 1)]
        before_ns = min([before_ns, *crossing]) - MARGIN_NS
        removed: dict[str, int] = {}
        with self._writing():
            for kind in KINDS:
                table = schema.intervals[kind]
                old = table.delete().where(
                    table.c.start_ns < before_ns, table.c.start_ns + table.c.length_ns <= before_ns
                )
                gone = self.connection.execute(old).rowcount
                if gone:
                    removed[table.name] = gone
            if removed:
                values = {"before_ns": before_ns, "removed": json.dumps(removed, sort_keys=True)}
                self.connection.execute(insert(schema.prune_log).values(**values))
        return removed

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """One transaction: what is written inside is there whole, or not at all."""
        self.connection.rollback()
        try:
            yield
            self.connection.commit()
        except BaseException:
            self.connection.rollback()
            raise

    def add_calibration(self, calibration: Calibration, made_at_ns: int, reason: str) -> int:
        """Write a calibration and give its number; one that says the same is not written again.

        ValueError for one that holds a number which is none (NaN or an infinity).
        """
        with self._writing():
            return calibrations.add(self.connection, calibration, made_at_ns, reason)

    def calibrations(self, fingerprint: str | None = None) -> list[StoredCalibration]:
        """Calibrations, oldest first, of one fingerprint (`Fingerprint.text()`) or of all."""
        return calibrations.stored(self.connection, fingerprint).readable

    def unreadable_calibrations(self) -> list[int]:
        """Numbers of the calibrations that this kvtally cannot read, and so leaves out: a newer one wrote them."""
        return calibrations.stored(self.connection).unreadable

    def savings(self, start_ns: int, end_ns: int) -> dict[tuple[int, int], StoredSaving]:
        """Savings of the hours in [start_ns, end_ns): (hour, target) -> what its newest settlement found."""
        return calibrations.savings(self.connection, settled.revisions(self, start_ns, end_ns))


def _prepare(connection: Any, _: object) -> None:
    connection.execute("PRAGMA busy_timeout=5000")
    connection.execute("PRAGMA foreign_keys=ON")


def _rate(row: Mapping[str, Any]) -> Rate:
    values = {name: row[name] for name in Rate._fields}
    values["pue"] = None if row["pue"] is None else Decimal(row["pue"])
    return Rate(**values)


LABELS = ("cluster", "namespace", "tenant")
ROLES = ("prefill", "decode", "both")
_COUNT_DIGITS = 9


def replica_of(target: Target) -> Replica:
    """The replica that an engine target describes."""
    about = target.attributes
    gpus = about.get("gpus")
    return Replica(
        target.id,
        target.name,
        about.get("model", ""),
        about.get("version"),
        None if gpus is None else tuple(uuid for uuid in gpus.split(",") if uuid),
        about.get("sku") or None,
        cast("Term", about.get("term", "on-demand")),
        about.get("site", ""),
        {label: about[label] for label in LABELS if about.get(label)},
        about.get("mapping", ""),
        Fraction(about.get("dram_gib", "0")),
        Fraction(about.get("storage_tib", "0")),
        _table(about.get("shape")),
        _count(about.get("token_budget")),
        _count(about.get("tensor_parallel")) or 1,
        _count(about.get("pipeline_parallel")) or 1,
        about.get("eager") == "1",
        str(about.get("connector", "")),
        role if (role := about.get("role")) in ROLES else "",
        str(about.get("group", "")),
        Fraction(about["slices"]) if about.get("slices") else None,
        str(about.get("engine") or VLLM),
    )


def _table(text: object) -> str:
    """A text that is a JSON table; "" for anything else."""
    try:
        return text if isinstance(text, str) and isinstance(json.loads(text), dict) else ""
    except (ValueError, RecursionError):
        return ""


def _count(text: object) -> int | None:
    """A number above 0; None for anything else."""
    if isinstance(text, str) and text.isascii() and text.isdecimal() and len(text) <= _COUNT_DIGITS:
        return int(text) or None
    return None
