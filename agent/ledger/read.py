"""Reading the ledger: what the reports, the settlement and the audit ask, in SQLAlchemy Core."""

from __future__ import annotations

import json
import os
from decimal import Decimal
from fractions import Fraction
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from sqlalchemy import Connection, create_engine, event, func, insert, select
from sqlalchemy.exc import DatabaseError
from sqlalchemy.pool import NullPool

from kvtally.agent.facts import EngineRow, Evidence, GpuPresence, Replica
from kvtally.agent.finding import Finding
from kvtally.agent.ledger import schema
from kvtally.agent.ledger.columns import HEAD_REVISION, KINDS, quantity_columns
from kvtally.agent.ledger.errors import LedgerRevision, LedgerUnreachable, explained
from kvtally.agent.ledger.place import file_of
from kvtally.agent.price import Rate
from kvtally.agent.timeline import Span, Timeline

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from sqlalchemy import Engine

    from kvtally.agent.price import Term
    from kvtally.collectors.base import Kind


class Target(NamedTuple):
    """One row of `target`."""

    id: int
    kind: str
    name: str
    attributes: Mapping[str, str]
    detail_names: tuple[str, ...]


class LedgerReader:
    """A ledger opened for questions (and for what is written rarely: rates, settlements)."""

    def __init__(self, url: str) -> None:
        self.path = file_of(url)
        if not os.path.exists(self.path):  # noqa: PTH110  # one call
            raise LedgerUnreachable(f"{self.path}: no ledger there", "`kvtally run` or `kvtally replay` makes one")
        self._engine: Engine = create_engine(f"sqlite:///{self.path}", poolclass=NullPool)
        event.listen(self._engine, "connect", _prepare)
        try:
            self.connection: Connection = self._engine.connect()
        except DatabaseError as error:
            raise explained(self.path, Exception(str(error.orig))) from error
        try:
            self._check_revision()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> LedgerReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self.connection.close()
        self._engine.dispose()

    def _check_revision(self) -> None:
        try:
            tables = self.connection.exec_driver_sql("SELECT name FROM sqlite_master WHERE type = 'table'").scalars().all()
            if "alembic_version" not in tables:
                raise LedgerUnreachable(f"{self.path}: not a ledger of kvtally", "give another with --ledger")
            revision = self.connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar()
        except DatabaseError as error:
            raise explained(self.path, Exception(str(error.orig))) from error
        if revision != HEAD_REVISION:
            older = (revision or "") < HEAD_REVISION
            raise LedgerRevision(
                f"{self.path}: the ledger has revision {revision}, this kvtally knows {HEAD_REVISION}",
                "run `kvtally ledger upgrade`" if older else "it was written by a newer kvtally: upgrade this one",
            )

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
        first = self.connection.execute(select(func.min(raw.start_ns))).scalar()
        oldest_hour = self.connection.execute(select(func.min(hour.hour_ns))).scalar()
        last = self.connection.execute(
            select(raw.start_ns + raw.length_ns).order_by((raw.start_ns).desc()).limit(1000)
        ).scalars()
        ends = list(last)
        if first is None or not ends:
            return None
        # where the first hour's intervals have aged out, only its sums tell that it was
        aged = oldest_hour is not None and oldest_hour + 3_600_000_000_000 <= first
        return (oldest_hour if aged else first), max(ends)

    def raw_from(self) -> int | None:
        """Start of the oldest raw engine interval."""
        return self.connection.execute(select(func.min(schema.intervals["engine"].c.start_ns))).scalar()

    def engine_rows(self, start_ns: int, end_ns: int) -> Iterator[EngineRow]:
        """Engine intervals that overlap [start_ns, end_ns), in time order."""
        table = schema.intervals["engine"]
        c = table.c
        columns = [c.target_id, c.start_ns, c.length_ns, c.missed, c.flags, c.began_ns]
        columns += [c[name] for name in quantity_columns("engine")]
        query = select(*columns).where(c.start_ns < end_ns, c.start_ns >= self._reach(table, start_ns))
        for row in self.connection.execute(query.order_by(c.start_ns, c.target_id)):
            begin, length = row[1], row[2]
            if begin + length > start_ns:
                yield EngineRow(row[0], begin, begin + length, row[3], row[4], row[5], tuple(row[6:]))

    def _reach(self, table: Any, start_ns: int) -> int:
        """Where to begin so that an interval which crosses `start_ns` is found: the longest lasts that long."""
        longest = self.connection.execute(
            select(func.max(table.c.length_ns)).where(table.c.start_ns < start_ns, table.c.start_ns + table.c.length_ns > start_ns)
        ).scalar()
        return start_ns - (longest or 0)

    def evidence(self, start_ns: int, end_ns: int, targets: Mapping[int, Target]) -> Evidence:
        """What GPUs and processes say about [start_ns, end_ns)."""
        margin = 60_000_000_000  # GPM means are kept for up to half a minute before they are written
        graphics: dict[str, list[Span]] = {}
        energy: dict[str, list[Span]] = {}
        present: dict[str, list[tuple[int, int]]] = {}
        skus: dict[str, str] = {}
        gpu = schema.intervals["gpu"].c
        query = select(
            gpu.target_id, gpu.start_ns, gpu.length_ns, gpu.gpm_ns, gpu.graphics_ns, gpu.energy_mj, gpu.power_sampled_mj
        ).where(gpu.start_ns >= start_ns - margin, gpu.start_ns < end_ns + margin)
        for row in self.connection.execute(query.order_by(gpu.start_ns)):
            target = targets[row.target_id]
            uuid, until = target.name, row.start_ns + row.length_ns
            skus[uuid] = target.attributes.get("sku", "")
            present.setdefault(uuid, []).append((row.start_ns, until))
            if row.gpm_ns and row.graphics_ns is not None:
                # the mean covers the time up to the sample, however long before the interval that began
                graphics.setdefault(uuid, []).append(Span(until - row.gpm_ns, until, row.graphics_ns))
            drawn = row.energy_mj if row.energy_mj is not None else row.power_sampled_mj
            if drawn is not None:
                energy.setdefault(uuid, []).append(Span(row.start_ns, until, drawn))
        process = schema.intervals["process"].c
        cpu: dict[str, list[Span]] = {}
        query = select(process.target_id, process.start_ns, process.length_ns, process.cpu_ns).where(
            process.start_ns >= start_ns - margin, process.start_ns < end_ns + margin, process.cpu_ns.is_not(None)
        )
        for row in self.connection.execute(query.order_by(process.start_ns)):
            name = targets[row.target_id].name
            cpu.setdefault(name, []).append(Span(row.start_ns, row.start_ns + row.length_ns, row.cpu_ns))
        return Evidence(
            {uuid: Timeline(spans) for uuid, spans in graphics.items()},
            {name: Timeline(spans) for name, spans in cpu.items()},
            {uuid: Timeline(spans) for uuid, spans in energy.items()},
            tuple(GpuPresence(uuid, skus[uuid], tuple(spans)) for uuid, spans in sorted(present.items())),
        )

    def rates(self) -> list[tuple[int, Rate]]:
        """Every rate with its id, in the order in which they were added."""
        rows = self.connection.execute(select(schema.rate).order_by(schema.rate.c.id)).mappings()
        return [(row["id"], _rate(row)) for row in rows]

    def currency(self) -> str | None:
        """The ledger's currency; None until a rate fixes it."""
        return self.connection.execute(select(schema.ledger.c.currency)).scalar()

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

    def settlements(self, start_ns: int, end_ns: int) -> dict[int, tuple[int, dict[str, Any]]]:
        """Hours settled in [start_ns, end_ns): hour -> (newest revision, its facts)."""
        c = schema.settlement.c
        query = select(c.period_start_ns, c.revision, c.facts).where(c.period_start_ns >= start_ns, c.period_start_ns < end_ns)
        return {
            hour: (revision, json.loads(facts))
            for hour, revision, facts in self.connection.execute(query.order_by(c.period_start_ns, c.revision))
        }

    def charges(self, start_ns: int, end_ns: int) -> Iterator[Mapping[str, Any]]:
        """Charges of the hours in [start_ns, end_ns), every revision."""
        c = schema.charge.c
        query = select(schema.charge).where(c.period_start_ns >= start_ns, c.period_start_ns < end_ns)
        for row in self.connection.execute(query.order_by(c.period_start_ns, c.id)).mappings():
            yield dict(row)

    def hour_sums(self, kind: Kind, start_ns: int, end_ns: int) -> Iterator[Mapping[str, Any]]:
        """Hourly sums of a kind for the hours in [start_ns, end_ns)."""
        table = schema.hours[kind]
        query = select(table).where(table.c.hour_ns >= start_ns, table.c.hour_ns < end_ns)
        for row in self.connection.execute(query.order_by(table.c.hour_ns, table.c.target_id)).mappings():
            yield dict(row)

    def state_ends(self) -> dict[tuple[str, str], int]:
        """When each target was last scraped."""
        c = schema.counter_state.c
        return {(row.kind, row.name): row.taken_at_ns for row in self.connection.execute(select(c.kind, c.name, c.taken_at_ns))}

    def add_rates(self, rates: Sequence[Rate]) -> None:
        """Append rates in one transaction."""
        with self.connection.begin_nested() if self.connection.in_transaction() else self.connection.begin():
            for rate in rates:
                row = rate._asdict()
                row["pue"] = None if rate.pue is None else str(rate.pue)
                self.connection.execute(insert(schema.rate).values(**row))
        self.connection.commit()

    def write_settlement(
        self, hour_ns: int, end_ns: int, revision: int, reason: str, facts: object, charges: Iterable[Mapping[str, Any]]
    ) -> None:
        """Write one hour's settlement with its charges, whole or not at all."""
        values = {
            "period_start_ns": hour_ns,
            "revision": revision,
            "period_end_ns": end_ns,
            "reason": reason,
            "facts": json.dumps(facts, sort_keys=True),
        }
        self.connection.execute(insert(schema.settlement).values(**values))
        rows = [dict(charge) for charge in charges]
        if rows:
            self.connection.execute(insert(schema.charge), rows)
        self.connection.commit()

    def prune(self, before_ns: int) -> dict[str, int]:
        """Remove intervals that started before an instant, and write down how many."""
        removed: dict[str, int] = {}
        for kind in KINDS:
            table = schema.intervals[kind]
            gone = self.connection.execute(table.delete().where(table.c.start_ns < before_ns)).rowcount
            if gone:
                removed[table.name] = gone
        if removed:
            values = {"before_ns": before_ns, "removed": json.dumps(removed, sort_keys=True)}
            self.connection.execute(insert(schema.prune_log).values(**values))
        self.connection.commit()
        return removed


def _prepare(connection: Any, _: object) -> None:
    connection.execute("PRAGMA busy_timeout=5000")
    connection.execute("PRAGMA foreign_keys=ON")


def _rate(row: Mapping[str, Any]) -> Rate:
    values = {name: row[name] for name in Rate._fields}
    values["pue"] = None if row["pue"] is None else Decimal(row["pue"])
    return Rate(**values)


LABELS = ("cluster", "namespace", "tenant")


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
    )
