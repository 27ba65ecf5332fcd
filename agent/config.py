"""What an operator may set, with defaults that need no config at all, and where the ledger lies."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta, Struct

from kvtally.agent import config_faults, config_file

if TYPE_CHECKING:
    from collections.abc import Mapping

SEARCHED = ("kvtally.toml", "/etc/kvtally/kvtally.toml")

_TIMEOUT_SECONDS = 2.0
_DISCOVERED_PORTS = (*range(8000, 8011), 8200)

Term = Literal["on-demand", "spot", "reserved", "owned"]
Port = Annotated[int, Meta(ge=1, le=65535)]


class Scrape(Struct, frozen=True, forbid_unknown_fields=True):
    """How often engines are read, and which."""

    interval_seconds: Annotated[float, Meta(ge=1, le=300, description="Seconds from one scrape to the next.")] = 5.0
    timeout_seconds: Annotated[
        float,
        Meta(
            ge=0,
            le=60,
            description="Seconds that one page may take; below the interval. 0: 2 seconds, or half the interval where"
            " that is less.",
        ),
    ] = 0.0
    discover: Annotated[
        bool, Meta(description="Look for engines on this host; those listed under [[engine]] are read in any case.")
    ] = True
    discover_every_seconds: Annotated[
        float, Meta(ge=5, le=3600, description="Seconds from one look for engines to the next.")
    ] = 60.0
    ports: Annotated[
        tuple[Port, ...],
        Meta(max_length=256, description="Ports that are looked at; a listening one whose page speaks vllm: is read."),
    ] = _DISCOVERED_PORTS
    restrict: Annotated[
        Literal["auto", "always", "never"],
        Meta(
            description="Ask engines for the wanted families alone (/metrics/?name[]=…), which costs them less than"
            " half of a whole page. auto: where the engine is seen not to log requests, since the address is 2.4 kB"
            " long; where an engine does not understand, the whole page is read."
        ),
    ] = "auto"

    def __post_init__(self) -> None:
        """Put the seconds in the place of a 0."""
        if not self.timeout_seconds:
            msgspec.structs.force_setattr(self, "timeout_seconds", min(_TIMEOUT_SECONDS, self.interval_seconds / 2))


class Labels(Struct, frozen=True, forbid_unknown_fields=True):
    """Whose tokens these are; reports group by them."""

    cluster: Annotated[str, Meta(max_length=200, description="Cluster.")] = ""
    namespace: Annotated[str, Meta(max_length=200, description="Kubernetes namespace.")] = ""
    tenant: Annotated[str, Meta(max_length=200, description="Team or customer who pays.")] = ""


class Engine(Struct, frozen=True, forbid_unknown_fields=True):
    """One engine by its metrics page; what is not given is found out or taken from the other tables."""

    url: Annotated[
        str, Meta(max_length=2000, description="Its metrics page, http or https; /metrics where no path is given.")
    ]
    name: Annotated[str, Meta(max_length=200, description='Its name in every report. "": host:port.')] = ""
    gpus: Annotated[
        Annotated[tuple[str, ...], Meta(max_length=1024)] | None,
        Meta(
            description="UUIDs of the GPUs that it holds, all replicas together, as nvidia-smi -L prints them;"
            " [] for an engine without a GPU."
        ),
    ] = None
    gpus_per_replica: Annotated[
        Annotated[int, Meta(ge=1, le=1024)] | None,
        Meta(description="GPUs of one replica: tensor-parallel times pipeline-parallel size."),
    ] = None
    pid: Annotated[
        Annotated[int, Meta(ge=1, le=1 << 22)] | None,
        Meta(description="Process id of the engine's front end; else the owner of its port."),
    ] = None
    kv_paths: Annotated[
        tuple[str, ...],
        Meta(max_length=64, description="Folders that hold KV cache; their mounts' reads and writes are counted."),
    ] = ()
    kv_dram_gib: Annotated[
        Annotated[float, Meta(ge=0, le=1 << 20)] | None,
        Meta(description="GiB of DRAM reserved for KV cache, all workers together."),
    ] = None
    kv_storage_tib: Annotated[
        Annotated[float, Meta(ge=0, le=1 << 20)] | None, Meta(description="TiB of storage provisioned for KV cache.")
    ] = None
    model_config: Annotated[
        str,
        Meta(
            max_length=4096,
            description="Its model's config.json or the folder that holds it, where the engine reads another or none"
            " can be found; a relative path counts from the config file.",
        ),
    ] = ""
    token_budget: Annotated[
        Annotated[int, Meta(ge=1, le=1 << 24)] | None,
        Meta(
            description="Most tokens of one step (--max-num-batched-tokens); goes before what its command line tells."
        ),
    ] = None
    connector: Annotated[
        str,
        Meta(
            max_length=200,
            pattern="^[A-Za-z0-9_.]*$",
            description="Class of its KV connector (kv_connector of --kv-transfer-config): it says whether the engine"
            " waits for loads. Goes before what its command line tells.",
        ),
    ] = ""
    term: Annotated[
        Literal["", "on-demand", "spot", "reserved", "owned"],
        Meta(description='How its GPUs are paid for. "": rates.term.'),
    ] = ""
    site: Annotated[str, Meta(max_length=200, description='Site whose prices hold. "": rates.site.')] = ""
    labels: Labels = Labels()


class Gpu(Struct, frozen=True, forbid_unknown_fields=True):
    """What is read from NVIDIA GPUs."""

    enabled: Annotated[bool, Meta(description="Read GPUs through NVML.")] = True
    energy_every_seconds: Annotated[
        float,
        Meta(ge=1, le=3600, description="Seconds from one reading of the energy counter (3 ms a GPU) to the next."),
    ] = 10.0
    gpm_every_seconds: Annotated[
        float,
        Meta(ge=1, le=3600, description="Seconds from one GPM sample (5 ms a GPU, Hopper and later) to the next."),
    ] = 10.0


class Host(Struct, frozen=True, forbid_unknown_fields=True):
    """What is read from the host."""

    processes: Annotated[bool, Meta(description="Count CPU seconds and bytes of the engines' processes.")] = True
    disks: Annotated[bool, Meta(description="Count reads and writes of the disks in use.")] = True
    cgroup: Annotated[bool, Meta(description="Count reads and writes of the engines' cgroups (version 2).")] = True


class Rates(Struct, frozen=True, forbid_unknown_fields=True):
    """Which prices hold."""

    card: Annotated[
        str,
        Meta(
            max_length=4096,
            description="A TOML rate card used beside the ledger's own rates; a relative path counts from the config"
            " file.",
        ),
    ] = ""
    default_card: Annotated[
        bool, Meta(description="Fall back on the packaged list prices, each marked ASSUMED; false: no price, no money.")
    ] = True
    term: Annotated[Term, Meta(description="How GPUs are paid for where an engine does not say.")] = "on-demand"
    site: Annotated[str, Meta(max_length=200, description="Site whose prices hold where an engine does not say.")] = ""


class Ledger(Struct, frozen=True, forbid_unknown_fields=True):
    """Where the books are, and for how long raw intervals stay in them."""

    url: Annotated[
        str,
        Meta(
            max_length=2000,
            description='SQLite URL; a relative path counts from the config file. "":'
            " ledger.db in $STATE_DIRECTORY, else in $XDG_STATE_HOME/kvtally. $KVTALLY_LEDGER comes first.",
        ),
    ] = ""
    retention_days: Annotated[
        int,
        Meta(ge=1, le=36500, description="Days that raw intervals are kept; hourly sums and charges stay for ever."),
    ] = 90


class Log(Struct, frozen=True, forbid_unknown_fields=True):
    """What the daemon writes to its standard error."""

    format: Annotated[Literal["text", "json"], Meta(description="key=value lines, or one JSON object a line.")] = "text"
    level: Annotated[Literal["debug", "info", "warning", "error"], Meta(description="The least that is written.")] = (
        "info"
    )


class Config(Struct, frozen=True, forbid_unknown_fields=True):
    """Everything that can be set; `Config()` is what holds without a file."""

    scrape: Scrape = Scrape()
    labels: Labels = Labels()
    engines: Annotated[tuple[Engine, ...], Meta(max_length=4096)] = msgspec.field(default=(), name="engine")
    gpu: Gpu = Gpu()
    host: Host = Host()
    rates: Rates = Rates()
    ledger: Ledger = Ledger()
    log: Log = Log()


def load(path: str | None, environ: Mapping[str, str], searched: tuple[str, ...] = SEARCHED) -> Config:
    """The config of `path`, else of $KVTALLY_CONFIG, else of the first file searched that exists, else the defaults.

    The environment is laid over it, and every listed engine is completed. Raises ConfigError.
    """
    file = path or environ.get("KVTALLY_CONFIG") or next((each for each in searched if os.path.lexists(each)), "")
    tables = config_file.overlay(file, config_file.read(file) if file else {}, environ, Config)
    config = config_file.decode(tables, Config)
    for fault in config_faults.of_each(config):
        raise tables.error(*fault)
    config = msgspec.structs.replace(config, engines=tuple(complete(engine, config) for engine in config.engines))
    for fault in config_faults.between(config.engines):
        raise tables.error(*fault)
    folder = Path(file).absolute().parent if file else Path.cwd()
    card = config.rates.card
    if card and "rates.card" not in tables.variables:
        card = str(folder / card)
    url = config.ledger.url if "ledger.url" in tables.variables else _absolute(config.ledger.url, folder)
    engines = tuple(
        engine
        if not engine.model_config or f"engine[{place}].model_config" in tables.variables
        else msgspec.structs.replace(engine, model_config=str(folder / engine.model_config))
        for place, engine in enumerate(config.engines)
    )
    return msgspec.structs.replace(
        config,
        engines=engines,
        rates=msgspec.structs.replace(config.rates, card=card),
        ledger=msgspec.structs.replace(config.ledger, url=url),
    )


def complete(engine: Engine, config: Config) -> Engine:
    """An engine, listed or discovered, with its page, name, term, site and labels filled from the other tables."""
    parts = urlsplit(engine.url)
    page = parts if parts.path.strip("/") else parts._replace(path="/metrics")
    labels = {name: getattr(engine.labels, name) or getattr(config.labels, name) for name in Labels.__struct_fields__}
    return msgspec.structs.replace(
        engine,
        url=page.geturl(),
        name=engine.name or _address(engine.url),
        term=engine.term or config.rates.term,
        site=engine.site or config.rates.site,
        labels=Labels(**labels),
    )


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


def _address(url: str) -> str:
    parts = urlsplit(url)
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    return f"{host}:{parts.port or (443 if parts.scheme == 'https' else 80)}"
