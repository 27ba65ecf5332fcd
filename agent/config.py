"""What an operator may set, with defaults that need no config at all, and where the ledger lies."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import msgspec

from kvtally.agent import config_faults, config_file
from kvtally.agent.config_tables import (
    Access,
    Config,
    Engine,
    Gpu,
    Host,
    Labels,
    Ledger,
    Log,
    Page,
    Rates,
    Role,
    Scrape,
    Storage,
    Term,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvtally.agent.config_file import Tables

__all__ = [
    "SEARCHED",
    "Access",
    "Config",
    "Engine",
    "Gpu",
    "Host",
    "Labels",
    "Ledger",
    "Log",
    "Page",
    "Rates",
    "Role",
    "Scrape",
    "Storage",
    "Term",
    "complete",
    "complete_page",
    "ledger_url",
    "load",
    "masked",
]

SEARCHED = ("kvtally.toml", "/etc/kvtally/kvtally.toml")
ACCESS_FILES = ("bearer_token_file", "password_file", "ca_file", "cert_file", "key_file")


def load(path: str | None, environ: Mapping[str, str], searched: tuple[str, ...] = SEARCHED) -> Config:
    """The config of `path`, else of $KVTALLY_CONFIG, else of the first file searched that exists, else the defaults.

    The environment is laid over it, and every listed engine and page is completed. Raises ConfigError.
    """
    file = path or environ.get("KVTALLY_CONFIG") or next((each for each in searched if os.path.lexists(each)), "")
    tables = config_file.overlay(file, config_file.read(file) if file else {}, environ, Config)
    config = config_file.decode(tables, Config)
    for fault in config_faults.of_each(config):
        raise tables.error(*fault)
    engines = tuple(complete(engine, config) for engine in config.engines)
    pages = tuple(complete_page(page) for page in config.pages)
    for fault in config_faults.between(engines, pages):
        raise tables.error(*fault)
    return _placed(msgspec.structs.replace(config, engines=engines, pages=pages), tables)


def complete(engine: Engine, config: Config) -> Engine:
    """An engine, listed or discovered, with its page, name, term, site and labels filled from the other tables."""
    labels = {name: getattr(engine.labels, name) or getattr(config.labels, name) for name in Labels.__struct_fields__}
    return msgspec.structs.replace(
        engine,
        url=_page(engine.url),
        name=engine.name or _address(engine.url),
        term=engine.term or config.rates.term,
        site=engine.site or config.rates.site,
        labels=Labels(**labels),
    )


def complete_page(page: Page) -> Page:
    """A page with its path and its name filled in."""
    return msgspec.structs.replace(page, url=_page(page.url), name=page.name or _address(page.url))


def ledger_url(option: str | None, config: Config, environ: Mapping[str, str]) -> str:
    """The ledger's URL: the option, $KVTALLY_LEDGER, ledger.url, or a file in the state folder; ConfigError if none is.

    A relative SQLite path of the option or the environment counts from the working folder. systemd sets
    $STATE_DIRECTORY for units with StateDirectory=.
    """
    for where, given in (
        ("--ledger", option),
        ("$KVTALLY_LEDGER", environ.get("KVTALLY_LEDGER")),
        ("ledger.url", config.ledger.url),
    ):
        if given:
            if fault := config_faults.of_ledger(given):
                raise config_file.ConfigError(where, *fault)
            return _absolute(given, Path.cwd())
    return f"sqlite:///{_state_folder(environ) / 'ledger.db'}"


def masked(url: str) -> str:
    """A URL fit for logs: its password, before the last @ or in the query, replaced by ***."""
    url = re.sub(r"^([\w.+-]+://[^/:@]*):.*@", r"\1:***@", url, flags=re.DOTALL)
    return re.sub(r"(?i)([?&][^=&]*password=)[^&]*", r"\1***", url)


def _placed(config: Config, tables: Tables) -> Config:
    """The config with the relative paths of its file put under that file's folder."""
    folder = Path(tables.file).absolute().parent if tables.file else Path.cwd()

    def beside(key: str, path: str) -> str:
        return path if not path or key in tables.variables else str(folder / path)

    def reached(key: str, access: Access) -> Access:
        paths = {name: beside(f"{key}.{name}", getattr(access, name)) for name in ACCESS_FILES}
        return msgspec.structs.replace(access, **paths)

    replace = msgspec.structs.replace
    scrape, url = config.scrape, config.ledger.url
    return replace(
        config,
        scrape=replace(
            scrape,
            file_sd=tuple(beside("scrape.file_sd", each) for each in scrape.file_sd),
            file_sd_access=reached("scrape.file_sd_access", scrape.file_sd_access),
        ),
        engines=tuple(
            replace(
                engine,
                model_config=beside(f"engine[{place}].model_config", engine.model_config),
                access=reached(f"engine[{place}].access", engine.access),
            )
            for place, engine in enumerate(config.engines)
        ),
        pages=tuple(
            replace(page, access=reached(f"page[{place}].access", page.access))
            for place, page in enumerate(config.pages)
        ),
        rates=replace(config.rates, card=beside("rates.card", config.rates.card)),
        ledger=replace(config.ledger, url=url if "ledger.url" in tables.variables else _absolute(url, folder)),
    )


def _state_folder(environ: Mapping[str, str]) -> Path:
    """The folder of systemd, else that of the user; a relative XDG_STATE_HOME does not count, as XDG says."""
    if given := environ.get("STATE_DIRECTORY", "").split(":")[0]:
        return Path(given)
    shared = Path(environ.get("XDG_STATE_HOME", ""))
    if not shared.is_absolute():
        try:
            shared = Path(environ.get("HOME") or Path.home()) / ".local" / "state"
        except RuntimeError:
            shared = Path()
    if not shared.is_absolute():
        raise config_file.ConfigError("ledger", "no home directory to keep it in", "set KVTALLY_LEDGER")
    return shared / "kvtally"


def _absolute(url: str, folder: Path) -> str:
    """A SQLite URL with its relative path put under a folder; any other URL as it is."""
    match = re.fullmatch(r"(sqlite(?:\+\w+)?:///)((?!file:)[^/:?][^?]*)(\?.*)?", url, re.DOTALL)
    return f"{match[1]}{folder / match[2]}{match[3] or ''}" if match else url


def _page(url: str) -> str:
    parts = urlsplit(url)
    return (parts if parts.path.strip("/") else parts._replace(path="/metrics")).geturl()


def _address(url: str) -> str:
    parts = urlsplit(url)
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    return f"{host}:{parts.port or (443 if parts.scheme == 'https' else 80)}"
