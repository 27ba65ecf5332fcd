"""Cost of tokens by the forward model: what a replica and its share of the KV storage cost while it answers."""

from __future__ import annotations

from decimal import Decimal
from typing import TYPE_CHECKING, NamedTuple

from kvtally.agent.forward import LOWER_BOUND, NO_CACHE, saved_seconds, ttft_seconds
from kvtally.agent.price import HOURS_PER_YEAR, NANO, owned_hourly_nano

if TYPE_CHECKING:
    from kvtally.agent.forward import Backend, Law, LawRange

TOKENS_PRICED = 10**8  # the article's unit: cost of 100 M tokens
MONTH_HOURS = Decimal(HOURS_PER_YEAR) / 12
_SECONDS_PER_HOUR = 3600
_WATT_HOURS_PER_KWH = 1000


class Holding(NamedTuple):
    """What it costs to hold KV: `price` holds `per_bytes` for `hours`: a module's life, or the month of a rent."""

    price: Decimal
    per_bytes: int
    hours: Decimal

    def price_of(self, capacity_bytes: int) -> Decimal:
        """What so much capacity costs, for `hours`."""
        return self.price * capacity_bytes / self.per_bytes

    def hourly(self, capacity_bytes: float | Decimal) -> Decimal:
        """The same in an hour, written off evenly."""
        return self.price * Decimal(capacity_bytes) / self.per_bytes / self.hours


class Store(NamedTuple):
    """A backend with its price; `holding` None is one that costs nothing (no cache, the bound)."""

    backend: Backend
    holding: Holding | None = None
    capacity_bytes: int = 0

    def hourly(self) -> Decimal:
        """What all of it costs in an hour, however many replicas share it."""
        return Decimal(0) if self.holding is None else self.holding.hourly(self.capacity_bytes)


class Scenario(NamedTuple):
    """What the forward model is asked about.

    gpu_hourly      of one GPU; None where no price is known: then there is no money
    host_hourly     of what a replica takes beside its GPUs
    replicas        how many share each store
    output_tokens   of each request, and
    token_seconds   between two of them
    """

    laws: LawRange
    kv_bytes_per_token: float
    gpus: int
    stores: tuple[Store, ...]
    gpu_hourly: Decimal | None
    host_hourly: Decimal = Decimal(0)
    replicas: int = 1
    output_tokens: int = 0
    token_seconds: float = 0.0
    overlaps: bool = False

    def all_stores(self) -> tuple[Store, ...]:
        """The stores between the two ends of the scale."""
        return (Store(NO_CACHE), *self.stores, Store(LOWER_BOUND))

    def ttft(self, law: Law, store: Store, prompt: float, reuse: float) -> float:
        """Seconds to the first token."""
        return ttft_seconds(law, store.backend, self.kv_bytes_per_token, prompt, reuse, overlaps=self.overlaps)

    def request_seconds(self, law: Law, store: Store, prompt: float, reuse: float) -> float:
        """Seconds of a whole request."""
        return self.ttft(law, store, prompt, reuse) + self.output_seconds

    @property
    def output_seconds(self) -> float:
        """Of a request, after its first token."""
        return self.output_tokens * self.token_seconds

    @property
    def replica_hourly(self) -> Decimal | None:
        """What a replica costs without any store."""
        return None if self.gpu_hourly is None else self.gpus * self.gpu_hourly + self.host_hourly

    def cost(self, law: Law, store: Store, prompt: float, reuse: float, replicas: int | None = None) -> Decimal | None:
        """Of 100 M tokens, prompt and output, one request after the other without a pause; None without a price."""
        if self.replica_hourly is None:
            return None
        hourly = self.replica_hourly + store.hourly() / (replicas or self.replicas)
        seconds = Decimal(self.request_seconds(law, store, prompt, reuse))
        return hourly * seconds / _SECONDS_PER_HOUR * TOKENS_PRICED / Decimal(prompt + self.output_tokens)

    def reuses_that_pay(self, law: Law, store: Store, prefix: float) -> float | None:
        """How often a month a stored prefix must be reused to pay for its holding.

        None: without a price of either, or never, since loading takes as long as computing.
        """
        if self.replica_hourly is None or store.holding is None:
            return None
        loading = store.backend.latency_seconds + (
            self.kv_bytes_per_token * prefix / store.backend.bandwidth_bytes_per_second
        )
        saved = saved_seconds(law, 0, prefix) - (0.0 if self.overlaps else loading)
        if saved <= 0 or not self.replica_hourly:
            return None
        worth = self.replica_hourly * Decimal(saved) / _SECONDS_PER_HOUR
        held = store.holding.hourly(Decimal(self.kv_bytes_per_token * prefix)) * MONTH_HOURS
        return float(held / worth)


class Owned(NamedTuple):
    """A GPU that is bought, with its share of the node (METHOD 2.1); shares are of `capex`, rates of a year."""

    capex: Decimal
    years: Decimal = Decimal(5)
    residual_share: Decimal = Decimal("0.10")
    interest: Decimal = Decimal("0.08")
    opex_share: Decimal = Decimal("0.10")
    watts: Decimal = Decimal(0)
    pue: Decimal = Decimal("1.54")
    kwh_price: Decimal = Decimal("0.0929")

    def hourly(self) -> Decimal:
        """What an hour of it costs, power included; RateError if a figure cannot be right."""
        nano = owned_hourly_nano(self.capex, self.residual_share, self.years, self.interest, self.opex_share)
        return Decimal(nano) / NANO + self.watts / _WATT_HOURS_PER_KWH * self.pue * self.kwh_price
