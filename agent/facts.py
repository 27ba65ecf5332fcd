"""What the accounting reads and what it gives: rows in, facts out, all of them values."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import TYPE_CHECKING, Literal, NamedTuple

from kvtally.collectors.quantities import index

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from kvtally.agent.finding import Finding
    from kvtally.agent.price import Rate, Resource, Term
    from kvtally.agent.split import Split
    from kvtally.agent.states import State
    from kvtally.agent.timeline import Timeline

TOKENS = ("prompt_tokens", "computed_tokens", "hbm_tokens", "external_tokens", "generated_tokens")
LOOKUPS = ("prefix_hit_tokens", "external_hit_tokens")
WORK = (*TOKENS, *LOOKUPS, "steps")
VLLM = "vllm"  # what an engine is that does not say
# examples of settings of an [[engine]]
MODEL_CONFIG = 'model_config = "/models/x/config.json"'
CONNECTOR = 'connector = "LMCacheConnectorV1"'
GPUS = 'gpus = ["GPU-…"]'
# where the mapping of a replayed engine comes from, and why there is none
RECORDED = "recorded"
UNRECORDED = "the recording does not say which GPUs it had"
_ADDRESS = re.compile(r".+:\d+")  # host:port, the name of an engine that nobody named
_NAMES = 3  # of several, told in a message
_WORK_AT = tuple(index("engine", name) for name in WORK)


def product_of(sku: str) -> str:
    """The product that is paid for: "NVIDIA H100 80GB HBM3" of its instance "NVIDIA H100 80GB HBM3 MIG 1g.10gb"."""
    return sku.partition(" MIG ")[0]


def in_config(key: Literal["url", "name"], value: str, setting: str) -> str:
    """Where a setting of one engine goes: words, for an engine may have a table already and TOML takes no second."""
    return f'in kvtally.toml, in the [[engine]] with {key} = "{value}": {setting}'


def among(names: Iterable[str]) -> str:
    """Names in a message: "10.0.0.1:8000/0, 10.0.0.2:8000/0, 10.0.0.3:8000/0 and 5 more"."""
    every = sorted(set(names))
    return ", ".join(every[:_NAMES]) + (f" and {len(every) - _NAMES} more" if len(every) > _NAMES else "")


class Replica(NamedTuple):
    """One engine core and what it holds, as its target row says.

    gpus        UUIDs; () is an engine without a GPU, None where the mapping is unknown
    sku         the GPUs' product name; None where nothing tells
    slices      parts of a GPU that its MIG instances are, together; None where it holds whole GPUs
    labels      cluster, namespace, tenant
    shape       of the model: a JSON table of its config's keys, which kvtally.agent.model_shape reads; "" for unknown
    token_budget  most tokens of a step; None where nobody told
    eager       steps with prefill run without compiled graphs
    connector   class of the KV connector; "" for none, or none that is known
    role        "prefill" or "decode" where another engine does the other half of its requests; "both", or "" for the
                same where nobody says
    group       name of the replica group that it costs together with; "" for none
    engine      what it is, as its target row says: "vllm", "sglang", "tensorrt-llm"
    """

    target_id: int
    name: str
    model: str
    version: str | None
    gpus: tuple[str, ...] | None
    sku: str | None
    term: Term
    site: str
    labels: Mapping[str, str]
    mapping: str = ""
    dram_gib: Fraction = Fraction(0)
    storage_tib: Fraction = Fraction(0)
    shape: str = ""
    token_budget: int | None = None
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    eager: bool = False
    connector: str = ""
    role: str = ""
    group: str = ""
    slices: Fraction | None = None
    engine: str = VLLM

    def in_config(self, setting: str) -> str:
        """Where a setting of this replica's engine goes; the url is where its kind of engine has its page."""
        name = self.name.partition("/")[0]
        if self.mapping in {RECORDED, UNRECORDED}:
            return f"{in_config('name', name, setting)}, and replay it into a new ledger"
        if not _ADDRESS.fullmatch(name):  # config has named it
            return in_config("name", name, setting)
        path = "/prometheus/metrics" if self.engine == "tensorrt-llm" else "/metrics"
        return in_config("url", f"http://{name}{path}", setting)

    @property
    def gpu_units(self) -> Fraction | None:
        """How many GPUs it holds, a MIG instance by its share of one; None where unknown."""
        if self.slices is not None:
            return self.slices
        is_cut = any(uuid.startswith("MIG-") for uuid in self.gpus or ())
        return None if self.gpus is None or is_cut else Fraction(len(self.gpus))


class EngineRow(NamedTuple):
    """One engine interval as the ledger holds it; `values` in the order of quantities.ENGINE."""

    target_id: int
    start_ns: int
    end_ns: int
    missed: int
    flags: int
    began_ns: int | None
    values: tuple[int | None, ...]

    def value(self, name: str) -> int | None:
        """One quantity of the row."""
        return self.values[index("engine", name)]

    def work(self) -> tuple[int | None, ...]:
        """The quantities of WORK."""
        return tuple(self.values[at] for at in _WORK_AT)


class GpuPresence(NamedTuple):
    """A GPU or a MIG instance that was seen, and when.

    sku         the whole GPU's product
    share       of a MIG instance: its part of the GPU; of a GPU that is cut: what is in no instance
    is_paid     it is paid for here if no replica holds it: a page of GPUs may show those of others
    host        that it is in, as its page names it; "" for where kvtally runs
    """

    uuid: str
    sku: str
    spans: tuple[tuple[int, int], ...]
    share: Fraction = Fraction(1)
    is_paid: bool = True
    host: str = ""


class Evidence(NamedTuple):
    """What other targets say about the engines' time.

    graphics    GPU UUID -> nanoseconds of graphics utilisation over time
    cpu         engine target name -> CPU nanoseconds of its workers, else of its whole process tree, over time
    energy      GPU UUID -> millijoules over time
    present     GPUs that were seen
    """

    graphics: Mapping[str, Timeline]
    cpu: Mapping[str, Timeline]
    energy: Mapping[str, Timeline]
    present: tuple[GpuPresence, ...]


class Line(NamedTuple):
    """A part of a period's cost: one resource in one state at one rate. `quantity` in nanoseconds x units held."""

    resource: Resource
    sku: str
    state: State | str
    quantity: int
    unit: str
    rate: Rate
    amount_nano: int


class Facts(NamedTuple):
    """One replica (or, with replica None, GPUs that no replica holds) in one period.

    state_ns    nanoseconds of engine time by state; for GPUs that nobody holds, GPU-nanoseconds
    lines       None where the money is unknown
    split       the law for occupied time, None where the data cannot carry one
    """

    replica: Replica | None
    period_ns: int
    work: Mapping[str, int | None]
    state_ns: Mapping[str, int]
    lines: tuple[Line, ...] | None
    split: Split | None
    start_ns: int
    end_ns: int
    covered_ns: float
    modelled: bool
    findings: tuple[Finding, ...] = ()
