"""The tables of a config as structs: every key with its type, its range, its default and its meaning."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from kvtally.collectors.access import Access as Files

_TIMEOUT_SECONDS = 2.0
# 8200: vLLM behind llm-d's routing sidecar, which takes 8000; 30000 SGLang, 8081 workers of Dynamo; then LMCache's
# server, 9090 that of its older releases and llm-d's router, 6880 KVBM, 9003 Mooncake, 9400 dcgm-exporter
DEFAULT_PORTS = (*range(8000, 8011), 8200, 30000, 8081, 8080, 9090, 6880, 9003, 9400)

Term = Literal["on-demand", "spot", "reserved", "owned"]
Role = Literal["", "prefill", "decode", "both"]
Port = Annotated[int, Meta(ge=1, le=65535)]


class Access(Struct, frozen=True, forbid_unknown_fields=True):
    """How a page that is not open to all is reached. Secrets stand in files, relative ones beside the config file."""

    bearer_token_file: Annotated[
        str,
        Meta(
            max_length=4096,
            description="File that holds the bearer token; read again when it changes, or when the token is refused.",
        ),
    ] = ""
    username: Annotated[str, Meta(max_length=200, pattern="^[^:]*$", description="User name of basic auth.")] = ""
    password_file: Annotated[
        str, Meta(max_length=4096, description="File that holds the password of basic auth; read again as above.")
    ] = ""
    ca_file: Annotated[
        str,
        Meta(max_length=4096, description="Certificate authorities (PEM) to trust for https instead of the system's."),
    ] = ""
    cert_file: Annotated[
        str, Meta(max_length=4096, description="Client certificate (PEM) with the chain up to its authority.")
    ] = ""
    key_file: Annotated[
        str,
        Meta(max_length=4096, description="Key (PEM, not encrypted) of cert_file, where that file does not hold it."),
    ] = ""
    server_name: Annotated[
        str,
        Meta(
            max_length=253,
            pattern="^[A-Za-z0-9._:-]*$",
            description="Name that the server's certificate must bear, where it is not the host of the URL.",
        ),
    ] = ""
    insecure_skip_verify: Annotated[
        bool, Meta(description="Take any certificate of the server: whoever sits between can read what is sent.")
    ] = False

    def for_endpoint(self) -> Files:
        """The same as collectors take it."""
        return Files(*(getattr(self, name) for name in self.__struct_fields__))


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
        Meta(
            max_length=256,
            description="Ports that are looked at; a listening one is read where its page shows families that kvtally"
            " knows.",
        ),
    ] = DEFAULT_PORTS
    restrict: Annotated[
        Literal["auto", "always", "never"],
        Meta(
            description="Ask engines for the wanted families alone (/metrics/?name[]=…), which costs them less than"
            " half of a whole page. auto: where the engine is seen not to log requests, since the address is 2.4 kB"
            " long; where an engine does not understand, the whole page is read."
        ),
    ] = "auto"
    file_sd: Annotated[
        tuple[str, ...],
        Meta(
            max_length=64,
            description="Files of engines and pages in the format of Prometheus' file_sd_configs, JSON or, with the"
            " extra kvtally[yaml], YAML; looked at with every look for engines and read again when they change; *"
            " stands for any part of a name; a relative path counts from the config file.",
        ),
    ] = ()
    file_sd_access: Access = Access()

    @property
    def answer_seconds(self) -> float:
        """How long a tick waits for its sources: as long as a page may take, and a little to take it in."""
        return min(self.timeout_seconds, self.interval_seconds) + 0.5

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
            " [] for an engine without a GPU. Engines that name the same GPU share its cost, and their savings are not"
            " told."
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
    role: Annotated[
        Role,
        Meta(
            description="Its part where prefill and decode run in engines of their own; both: it does both. "
            '"": as its pod is labelled, else both.'
        ),
    ] = ""
    group: Annotated[
        str,
        Meta(
            max_length=200,
            description="Name of the replica group whose prefill and decode engines cost together. "
            '"": it stands alone.',
        ),
    ] = ""
    labels: Labels = Labels()
    access: Access = Access()


class Page(Struct, frozen=True, forbid_unknown_fields=True):
    """One metrics page that is not an engine's: an LMCache server, a router, dcgm-exporter, a storage exporter."""

    url: Annotated[str, Meta(max_length=2000, description="The page, http or https; /metrics where no path is given.")]
    name: Annotated[str, Meta(max_length=200, description='Its name in every report. "": host:port.')] = ""
    engines: Annotated[
        tuple[str, ...],
        Meta(
            max_length=4096,
            description="Names of the engines that its caches serve. []: those whose KV connector is its own, or the"
            " only one whose connector is not known.",
        ),
    ] = ()
    access: Access = Access()


class Gpu(Struct, frozen=True, forbid_unknown_fields=True):
    """What is read from NVIDIA GPUs."""

    enabled: Annotated[bool, Meta(description="Read GPUs through NVML.")] = True
    unheld: Annotated[
        Literal["auto", "paid", "others"],
        Meta(
            description="GPUs that no engine here has ever held: paid for and unallocated, or others'. auto: others' in"
            " a pod with a network of its own, which may be shown the GPUs of its whole node; else paid for."
        ),
    ] = "auto"
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


class Storage(Struct, frozen=True, forbid_unknown_fields=True):
    """What is read from the filesystems that hold KV cache."""

    enabled: Annotated[bool, Meta(description="Count reads and writes of the mounts that hold KV cache.")] = True
    mmpmon: Annotated[
        str,
        Meta(
            max_length=4096,
            description="IBM Storage Scale's mmpmon, run with a time-out and without a shell where such a mount holds"
            ' KV cache; a path from /. "": not run.',
        ),
    ] = "/usr/lpp/mmfs/bin/mmpmon"


Listen = Annotated[str, Meta(max_length=255, pattern=r"^(|[A-Za-z0-9._-]+:[0-9]{1,5}|\[[0-9A-Fa-f:.]+\]:[0-9]{1,5})$")]
Window = Annotated[str, Meta(pattern="^[1-9][0-9]{0,3}[mhd]$")]


class Prometheus(Struct, frozen=True, forbid_unknown_fields=True):
    """What /metrics serves, and where."""

    listen: Annotated[
        Listen,
        Meta(
            description="Address of /metrics, /-/healthy and /-/ready. Anybody who reaches it reads what these engines"
            ' cost: beyond loopback put access control before it. "": not served.'
        ),
    ] = "127.0.0.1:9478"
    refresh_seconds: Annotated[
        float,
        Meta(
            ge=5,
            le=3600,
            description="Seconds from one working out of the ledger's figures to the next (0.6 s of CPU in a child),"
            " while somebody reads /metrics; kvtally's own health is always of the moment.",
        ),
    ] = 60.0


class Otlp(Struct, frozen=True, forbid_unknown_fields=True):
    """Where metrics are pushed to. The OTEL_* environment variables hold too, and go before it."""

    endpoint: Annotated[
        str,
        Meta(
            max_length=2000,
            description='Base URL of an OTLP backend, "http://127.0.0.1:4318". "": what OTEL_EXPORTER_OTLP_ENDPOINT'
            " says, else nothing is pushed.",
        ),
    ] = ""


class Export(Struct, frozen=True, forbid_unknown_fields=True):
    """What leaves for Prometheus and OpenTelemetry while `kvtally run` runs."""

    windows: Annotated[
        tuple[Window, ...],
        Meta(max_length=8, description='Lengths of time over which costs and savings are told: "90m", "24h", "30d".'),
    ] = ("1h", "24h")
    opencost: Annotated[
        bool,
        Meta(description="Show the same figures under OpenCost's names and labels too, to set the two side by side."),
    ] = False
    prometheus: Prometheus = Prometheus()
    otlp: Otlp = Otlp()


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
    pages: Annotated[tuple[Page, ...], Meta(max_length=4096)] = msgspec.field(default=(), name="page")
    gpu: Gpu = Gpu()
    host: Host = Host()
    storage: Storage = Storage()
    export: Export = Export()
    rates: Rates = Rates()
    ledger: Ledger = Ledger()
    log: Log = Log()
