"""What makes a config wrong although each of its keys has the right type and range."""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

from kvtally.agent import yaml_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from msgspec import Struct

    from kvtally.agent.config_tables import Access, Config, Engine, Page


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
    yield from _of_files(scrape.file_sd)
    yield from _of_access("scrape.file_sd_access", scrape.file_sd_access)
    if config.storage.mmpmon and not PurePath(config.storage.mmpmon).is_absolute():
        yield Fault("storage.mmpmon", f'"{config.storage.mmpmon}" is relative', "give the path from /")
    for place, engine in enumerate(config.engines):
        key = f"engine[{place}]"
        yield from _of_page(key, engine)
        yield from _of_texts(f"{key}.labels", engine.labels)
        yield from _of_gpus(key, engine)
        for path in engine.kv_paths:
            if not PurePath(path).is_absolute():
                yield Fault(f"{key}.kv_paths", f'"{path}" is relative', "give the path from /")
    for place, page in enumerate(config.pages):
        yield from _of_page(f"page[{place}]", page)


def between(engines: tuple[Engine, ...], pages: tuple[Page, ...] = ()) -> Iterator[Fault]:
    """The faults of completed engines and pages against each other: what has one address would be counted twice.

    A GPU may be several engines': its cost is split between them.
    """
    owners: dict[tuple[str, str], str] = {}
    listed: list[tuple[str, Engine | Page]] = [
        *((f"engine[{place}]", engine) for place, engine in enumerate(engines)),
        *((f"page[{place}]", page) for place, page in enumerate(pages)),
    ]
    for here, entry in listed:
        for name, value in (("url", entry.url), ("name", entry.name)):
            owner = owners.setdefault((name, value), here)
            if owner != here:
                what = "" if name == "url" else f'"{value}" '  # the query of a URL may hold a secret
                hint = "give one of them another name" if name == "name" else "it would be counted twice"
                yield Fault(f"{here}.{name}", f"{what}belongs to {owner} too", hint)


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


def _of_page(key: str, entry: Engine | Page) -> Iterator[Fault]:
    if _has_credentials(entry.url):
        hint = f"set {key}.access.username and {key}.access.password_file"
        yield Fault(f"{key}.url", "holds a user name or a password, which would end up in logs", hint)
    elif not _is_page(entry.url):
        yield Fault(f"{key}.url", "no http or https URL", "http://127.0.0.1:8000/metrics is the form")
    yield from _of_texts(key, entry)
    yield from _of_access(f"{key}.access", entry.access)


def _of_files(patterns: Iterable[str]) -> Iterator[Fault]:
    for pattern in patterns:
        if not pattern.endswith((".json", *yaml_text.SUFFIXES)):
            hint = "its end tells the format: rename the file, or spell out the end of the pattern"
            yield Fault("scrape.file_sd", f'"{pattern}" does not end in .json, .yml or .yaml', hint)
        elif pattern.endswith(yaml_text.SUFFIXES) and not yaml_text.is_installed():
            yield Fault("scrape.file_sd", f'"{pattern}" is YAML, and PyYAML is not installed', yaml_text.REMEDY)


def _of_access(key: str, access: Access) -> Iterator[Fault]:
    if access.password_file and not access.username:
        yield Fault(f"{key}.password_file", "a password without a user name", "set username beside it")
    if access.username and access.bearer_token_file:
        hint = "a request carries one of them: leave out username or bearer_token_file"
        yield Fault(f"{key}.bearer_token_file", "a token beside a user name", hint)
    if access.key_file and not access.cert_file:
        yield Fault(f"{key}.key_file", "a key without its certificate", "set cert_file beside it")
    if access.insecure_skip_verify and access.ca_file:
        hint = "leave out insecure_skip_verify, and the certificate is checked against ca_file"
        yield Fault(f"{key}.insecure_skip_verify", "nothing is checked against ca_file", hint)
    yield from _of_texts(key, access)


def _has_credentials(url: str) -> bool:
    return "@" in re.split(r"[/?#]", url.partition("://")[2] or url)[0]


def _is_page(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and " " not in url
    except ValueError:
        return False
