"""Which GPUs, labels and prices belong to an engine: joined to its readings before the ledger sees them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvtally.collectors.base import Reading


class About(NamedTuple):
    """What is known of an engine from outside its page.

    gpus           UUIDs of all its ranks; () without a GPU, None where the mapping is unknown
    per_replica    GPUs of one rank (TP x PP); None: all of them
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


class Describer:
    """Adds to every engine reading the attributes that its target row carries."""

    def __init__(self, engines: Mapping[str, About], default: About) -> None:
        """`engines` by target name ("127.0.0.1:8000")."""
        self._engines = dict(engines)
        self._default = default
        self._skus: dict[str, str] = {}
        self._made: dict[str, tuple[Mapping[str, str], dict[str, str]]] = {}

    def learn(self, engines: Mapping[str, About]) -> None:
        """Take in what a later discovery found."""
        for name, about in engines.items():
            if self._engines.get(name) != about:
                self._engines[name] = about
                self._made.clear()

    def __call__(self, reading: Reading) -> Reading:
        """The reading with its engine's attributes; other kinds as they are."""
        if reading.kind == "gpu":
            sku = reading.attributes.get("sku", "")
            if self._skus.get(reading.name) != sku:
                self._skus[reading.name] = sku
                self._made.clear()
            return reading
        if reading.kind != "engine":
            return reading
        made = self._made.get(reading.name)
        if made is None or made[0] is not reading.attributes:
            made = (reading.attributes, {**reading.attributes, **self._attributes(reading.name)})
            self._made[reading.name] = made
        return reading._replace(attributes=made[1])

    def _attributes(self, name: str) -> dict[str, str]:
        target, _, rank = name.partition("/")
        about = self._engines.get(target, self._default)
        found = {"term": about.term, "site": about.site, **about.labels}
        found |= {"dram_gib": about.dram_gib, "storage_tib": about.storage_tib, "mapping": about.mapping}
        gpus = about.gpus
        if gpus and about.per_replica and rank.split("/")[0].isdigit():
            first = int(rank.split("/")[0]) * about.per_replica
            gpus = gpus[first : first + about.per_replica] or None
        if gpus is not None:
            found["gpus"] = ",".join(gpus)
            found["sku"] = about.sku or next((self._skus[uuid] for uuid in gpus if uuid in self._skus), "")
        return {key: value for key, value in found.items() if value or key == "gpus"}
