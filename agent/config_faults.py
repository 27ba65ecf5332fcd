"""What makes a config wrong although each of its keys has the right type and range."""

from __future__ import annotations

from pathlib import PurePath
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from collections.abc import Iterator

    from msgspec import Struct

    from kvtally.agent.config import Config, Engine


class Fault(NamedTuple):
    """A key by its path, what is wrong with it, and what to do."""

    key: str
    reason: str
    hint: str


def of_each(config: Config) -> Iterator[Fault]:
    """The faults of every table by itself."""
    scrape = config.scrape
    if scrape.timeout_seconds >= scrape.interval_seconds:
        reason = f"{scrape.timeout_seconds:g} is not below interval_seconds, {scrape.interval_seconds:g}"
        yield Fault("scrape.timeout_seconds", reason, "leave it out for half the interval, at most 2 seconds")
    yield from _of_texts("labels", config.labels)
    yield from _of_texts("rates", config.rates)
    if config.ledger.url and (fault := of_ledger(config.ledger.url)):
        yield Fault("ledger.url", *fault)
    for place, engine in enumerate(config.engines):
        key = f"engine[{place}]"
        if not _is_page(engine.url):
            yield Fault(f"{key}.url", "no http or https URL", "http://127.0.0.1:8000/metrics is the form")
        yield from _of_texts(key, engine)
        yield from _of_texts(f"{key}.labels", engine.labels)
        yield from _of_gpus(key, engine)
        for path in engine.kv_paths:
            if not PurePath(path).is_absolute():
                yield Fault(f"{key}.kv_paths", f'"{path}" is relative', "give the path from /")


def between(engines: tuple[Engine, ...]) -> Iterator[Fault]:
    """The faults of completed engines against each other: what two of them have would be counted twice."""
    owners: dict[tuple[str, str], str] = {}
    for place, engine in enumerate(engines):
        here = f"engine[{place}]"
        for name, values in (("url", (engine.url,)), ("name", (engine.name,)), ("gpus", engine.gpus or ())):
            for value in values:
                owner = owners.setdefault((name, value), here)
                if owner != here:
                    what = "" if name == "url" else f'"{value}" '  # a URL may hold a password
                    yield Fault(f"{here}.{name}", f"{what}belongs to {owner} too", "it would be counted twice")


def of_ledger(url: str) -> tuple[str, str] | None:
    """The reason and the hint where a ledger's URL is of no known kind."""
    scheme, separator, _ = url.partition("://")
    if separator and scheme.partition("+")[0] in ("sqlite", "postgresql"):
        return None  # PostgreSQL, which is still to come, is refused where the ledger is opened
    return "no SQLite URL", "sqlite:///ledger.db is the form"


def _of_texts(key: str, table: Struct) -> Iterator[Fault]:
    for name in table.__struct_fields__:
        value = getattr(table, name)
        if isinstance(value, str) and not value.isprintable():
            yield Fault(f"{key}.{name}", "holds a control character", "write it on one line")


def _of_gpus(key: str, engine: Engine) -> Iterator[Fault]:
    gpus = engine.gpus or ()
    for gpu in gpus:
        if not gpu.startswith(("GPU-", "MIG-")):
            yield Fault(f"{key}.gpus", f'"{gpu}" is no UUID', "nvidia-smi -L prints them: GPU-... or MIG-...")
    if len(set(gpus)) != len(gpus):
        yield Fault(f"{key}.gpus", "names a GPU twice", "list each once")
    if engine.gpus_per_replica and len(gpus) % engine.gpus_per_replica:
        reason = f"{len(gpus)} GPUs do not divide into replicas of {engine.gpus_per_replica}"
        hint = "a replica holds tensor-parallel times pipeline-parallel size GPUs"
        yield Fault(f"{key}.gpus_per_replica", reason, hint)


def _is_page(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and " " not in url
    except ValueError:
        return False
