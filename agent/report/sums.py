"""A group of the cost report: its replica-hours, added up one by one."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from kvtally.agent.disaggregation import ASKED, DECODE, LOCAL, PREFILL, pool_of, without_other_half
from kvtally.agent.report.spread import Spread
from kvtally.agent.sharing import GPU_SHARED
from kvtally.agent.states import STATES
from kvtally.agent.unit_cost import TokenSums
from kvtally.agent.words import TOLD_APART

if TYPE_CHECKING:
    from kvtally.agent.facts import Facts
    from kvtally.agent.price import Rate
    from kvtally.agent.report.division import Division
    from kvtally.agent.savings import Reason
    from kvtally.agent.unit_cost import Tokens


class Lack(NamedTuple):
    """Why something is not known, when, and of which replicas: the first of them is in the reason's hint."""

    reason: Reason
    start_ns: int
    end_ns: int
    names: frozenset[str]

    def together(self, other: Lack) -> Lack:
        """Both, with the reason of the first replica by name."""
        first = min(self, other, key=lambda one: sorted(one.names))
        return Lack(
            first.reason,
            min(self.start_ns, other.start_ns),
            max(self.end_ns, other.end_ns),
            self.names | other.names,
        )


class Sums:
    """What the facts of a group come to.

    amounts     nano-units by (resource, state, id of the rate); `rates` has the rates by that id
    tiers       tokens of the outer tiers, where they are told apart: by the engine, or, so many of them as
                `estimated_tokens` says, by its lookups or those of the cache behind it
    laws        what divided occupied time: "step law", "two costs", "pool" where an engine only does one of the two,
                None for time that nothing divides
    is_shared   some of its GPUs are other engines' too: what each is charged of them is worked out
    is_outer    an outer tier is at work, and `is_parted` tells whether what it takes of the engine's time is known
    step_law_ns scaled time, and what the step law had said of it
    roles       of the engines, by the pool that serves the same requests
    at_decode   of the prompt tokens of decode engines: those that they computed themselves, and all
    lacking     why there is no step law, and no stall: by kind of finding and reason, what it concerns
    """

    def __init__(self) -> None:
        self.start_ns, self.end_ns = 2**63, 0
        self.tokens = TokenSums()
        self.tiers = dict.fromkeys(TOLD_APART, 0)
        self.estimated_tokens = 0
        self.state_ns: dict[str, int] = dict.fromkeys(STATES, 0)
        self.is_priced = self.is_parted = True
        self.is_modelled = self.is_outer = self.is_shared = False
        self.amounts: dict[tuple[str, str, int], int] = {}
        self.rates: dict[int, Rate] = {}
        self.covered_ns = 0.0
        self.spans: dict[str, tuple[int, int]] = {}
        self.laws: set[str | None] = set()
        self.calibrations: set[int | str] = set()
        self.occupied = Spread()
        self.step_law_ns = [0, 0.0]
        self.roles: dict[str, set[str]] = {}
        self.at_decode = [0, 0]
        self.lacking: dict[tuple[str, str], Lack] = {}

    def add(self, one: Facts) -> None:
        """Add everything but money and the division of occupied time."""
        self.start_ns = min(self.start_ns, one.start_ns)
        self.end_ns = max(self.end_ns, one.end_ns)
        for state, amount in one.state_ns.items():
            self.state_ns[state] += amount
        self.is_modelled |= one.modelled
        self.is_shared |= any(finding.kind == GPU_SHARED for finding in one.findings)
        self.is_priced &= one.lines is not None
        if one.replica is not None:
            self.tokens.add(one.work, one.replica.version)
            self.roles.setdefault(pool_of(one.replica), set()).add(one.replica.role)
            for place, name in enumerate((LOCAL, ASKED)):
                self.at_decode[place] += one.work.get(name) or 0
            self.covered_ns += one.covered_ns
            low, high = self.spans.get(one.replica.name, (one.start_ns, one.end_ns))
            self.spans[one.replica.name] = min(low, one.start_ns), max(high, one.end_ns)

    def counted(self) -> Tokens:
        """Its tokens; prompts are unknown where engines only decode and their prefill is not here, and the reverse."""
        tokens = self.tokens.tokens()
        if without_other_half(self.roles, DECODE):
            tokens = tokens._replace(prompt=None, computed=None, hbm=None, external=None)
        return tokens._replace(generated=None) if without_other_half(self.roles, PREFILL) else tokens

    def charge(self, resource: str, state: str, rate: Rate, amount_nano: int) -> None:
        """Add an amount of money."""
        key = (resource, state, id(rate))  # a rate has many fields: its hash costs more than all the rest
        self.amounts[key] = self.amounts.get(key, 0) + amount_nano
        self.rates[id(rate)] = rate

    def divide(self, division: Division, calibration: int | str, worked_nano: int) -> None:
        """Add the division of an hour's occupied time, and so of what that time cost."""
        self.laws.add(division.law)
        self.occupied.add(division, calibration, worked_nano)
        if division.law == "step law":
            self.calibrations.add(calibration)
            self.step_law_ns[0] += division.prefill_ns + division.decode_ns
            self.step_law_ns[1] += division.law_ns

    def lack(self, kind: str, reason: Reason, one: Facts) -> None:
        """Note why something is not known of a replica in a span of time."""
        names = frozenset(() if one.replica is None else (one.replica.name,))
        lack = Lack(reason, one.start_ns, one.end_ns, names)
        self.lacking[kind, reason.text] = lack.together(self.lacking.get((kind, reason.text), lack))
