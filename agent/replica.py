"""Which GPUs, labels and prices belong to an engine: joined to its readings before the ledger sees them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kvtally.collectors.base import Reading


# what SGLang's page calls an engine -> what it does of a request; "unified" does both, as one without such a label
_ROLES = {"prefill": "prefill", "decode": "decode"}


_ENGINES_MAX = 4096
_NAMES_MAX = 8192


class About(NamedTuple):
    """What is known of an engine from outside its page.

    gpus           UUIDs of all its ranks; () without a GPU, None where the mapping is unknown
    per_replica    GPUs of one rank (TP x PP); None: all of them
    facts          attributes that tell the model and how it is run (kvtally.agent.engine_process)
    role           what it does of a request: "prefill", "decode" or "both"; "" for what its facts say, or its page
    group          name of the replica group that it costs together with
    """

    gpus: tuple[str, ...] | None = None
    per_replica: int | None = None
    mapping: str = ""
    sku: str = ""
    term: str = "on-demand"
    site: str = ""
    labels: Mapping[str, str] = {}
    dram_gib: str = ""
    storage_tib: str = ""
    facts: Mapping[str, str] = {}
    role: str = ""
    group: str = ""


class Describer:
    """Adds to every engine reading the attributes that its target row carries."""

    def __init__(self, engines: Mapping[str, About], default: About) -> None:
        """`engines` by target name ("127.0.0.1:8000")."""
        self._engines = dict(engines)
        self._default = default
        self._skus: dict[str, str] = {}
        self._slices: dict[str, str] = {}  # MIG instance -> its share of a GPU
        self._cut: set[str] = set()  # GPUs that are cut into MIG instances
        self._made: dict[str, tuple[Mapping[str, str], tuple[int, int], dict[str, str]]] = {}

    def learn(self, engines: Mapping[str, About]) -> None:
        """Take in what a later discovery found; engines that are gone are known for as long as there is room."""
        if len(self._engines) >= _ENGINES_MAX:
            self._engines = {}
        for name, about in engines.items():
            if self._engines.get(name) != about:
                self._engines[name] = about
                self._made.clear()

    def __call__(self, readings: Sequence[Reading]) -> list[Reading]:
        """The readings of one scrape, those of engines with their attributes; other kinds as they are."""
        engines = [_place(reading) for reading in readings if reading.kind == "engine"]
        targets = [target for target, _ in engines]
        described: list[Reading] = []
        for reading in readings:
            if reading.kind == "gpu":
                self._learn_sku(reading)
            one = reading
            if reading.kind == "engine":
                place = _place(reading)
                counts = targets.count(place[0]), engines.count(place)
                one = reading._replace(attributes=self._attributes(reading, counts))
            described.append(one)
        return described

    def _learn_sku(self, reading: Reading) -> None:
        about, name = reading.attributes, reading.name
        sku, is_instance = about.get("sku", ""), "parent" in about
        share, is_cut = about.get("share", "") if is_instance else "", about.get("mig") == "1" and not is_instance
        if len(self._skus) >= _NAMES_MAX:
            for kept in (self._skus, self._slices, self._cut):
                kept.clear()
        if (self._skus.get(name), self._slices.get(name, ""), name in self._cut) != (sku, share, is_cut):
            self._skus[name] = sku
            self._slices[name] = share
            (self._cut.add if is_cut else self._cut.discard)(name)
            self._made.clear()

    def _attributes(self, reading: Reading, counts: tuple[int, int]) -> Mapping[str, str]:
        """Attributes of an engine; the same object while nothing changes, which spares the ledger a comparison.

        `counts`: how many engines the page shows, and how many of this one's rank.
        """
        made = self._made.get(reading.name)
        if made is None or made[0] is not reading.attributes or made[1] != counts:
            target, rank = _place(reading)
            about = self._engines.get(target, self._default)
            told = reading.attributes
            gpus = _share(about, rank, *counts)
            made = (told, counts, {**told, **self._added(about, *gpus, told.get("engine_type", ""))})
            if len(self._made) >= _NAMES_MAX:  # a page with ever new models
                self._made.clear()
            self._made[reading.name] = made
        return made[2]

    def _added(self, about: About, gpus: tuple[str, ...] | None, mapping: str, engine_type: str) -> dict[str, str]:
        cut = next((uuid for uuid in gpus or () if uuid in self._cut), "")
        if cut:
            gpus, mapping = None, f"{cut} is cut into MIG instances: name the one that it holds, MIG-…"
        found = {**about.facts, "term": about.term, "site": about.site, **about.labels}
        found |= {"dram_gib": about.dram_gib, "storage_tib": about.storage_tib, "mapping": mapping}
        role = about.role or about.facts.get("role", "") or _ROLES.get(engine_type, "")
        found |= {"role": role, "group": about.group}
        if gpus is not None:
            found["gpus"] = ",".join(gpus)
            found["sku"] = about.sku or next((sku for uuid in gpus if (sku := self._skus.get(uuid))), "")
            found["slices"] = _sum([self._slices.get(uuid, "") for uuid in gpus])
        return {key: value for key, value in found.items() if value or key == "gpus"}


def _sum(shares: Sequence[str]) -> str:
    """Shares of MIG instances added up; "" where one of them is unknown, as that of a whole GPU is."""
    if not shares or not all(shares):
        return ""
    from fractions import Fraction  # noqa: PLC0415  # only where a GPU is cut

    return str(sum(map(Fraction, shares)))


def _place(reading: Reading) -> tuple[str, str]:
    """The target of an engine and its rank: "node:8080/0/x2kq8" is rank 0 of one of Ray's replicas."""
    target, _, rest = reading.name.partition("/")
    return target, rest.partition("/")[0]


def _share(about: About, rank: str, engines: int, alike: int) -> tuple[tuple[str, ...] | None, str]:
    """GPUs of one rank, None where that cannot be told, and how that is known or why it is not.

    `engines` answer on the page, `alike` of them as this rank.
    """
    gpus, count = about.gpus, about.per_replica
    if not gpus or (engines == 1 and count in {None, len(gpus)}):
        return gpus, about.mapping
    if alike > 1:
        # each of them by its rank would be charged for the same GPUs
        return None, f"{alike} engines of one page answer as rank {rank}: nothing tells which of its GPUs each has"
    if count is None:
        # each of them holding all would be paid for several times
        return None, f"{engines} ranks answer for {len(gpus)} GPUs: say gpus_per_replica"
    first = int(rank) * count if rank.isdecimal() else len(gpus)
    own = gpus[first : first + count]
    if len(own) < count:
        return None, f"rank {rank} with {count} GPUs is beyond the {len(gpus)} that are named"
    return own, about.mapping
