"""The replicas of a ledger that the forward model is asked about: one kind of them, their law, what they cost."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from typing import TYPE_CHECKING, NamedTuple

from kvtally.agent.accounts import Window, facts_of
from kvtally.agent.finding import utc_text
from kvtally.agent.model_report.report import Input
from kvtally.agent.price import NANO, rate_text
from kvtally.agent.savings import CLOCK_ERROR, CLOCK_WEIGHT_SECONDS, DISCREPANCY, Reason, loading_of
from kvtally.agent.savings_money import TIME_RESOURCES, rate_of
from kvtally.agent.steplaw.forwards import ELSEWHERE_SD, Doubt, calibrated_laws
from kvtally.agent.steplaw.machine import machine

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvtally.agent.accounts import Payment
    from kvtally.agent.calibration import Calibration
    from kvtally.agent.forward import LawRange
    from kvtally.agent.hardware import Gpu
    from kvtally.agent.kin import Kin, Subject
    from kvtally.agent.ledger.read import LedgerReader
    from kvtally.agent.rates import RateBook
    from kvtally.agent.savings import Loading
    from kvtally.agent.steplaw.machine import Machine

WEEK_NS = 7 * 86_400_000_000_000
_SECONDS_PER_HOUR = 3600


class NotCarried(Exception):  # noqa: N818  # it is an answer: the ledger says too little for the figure
    """Why there is no figure, and what would lift it."""

    def __init__(self, reasons: Sequence[Reason]) -> None:
        super().__init__("; ".join(str(reason) for reason in reasons))


class Deployment(NamedTuple):
    """Replicas of one kind over a window; `kin` reaches beyond it, as far as counters need to be read together."""

    kin: Kin
    machine: Machine
    window_ns: tuple[int, int]

    @property
    def subjects(self) -> tuple[Subject, ...]:
        """The replicas, each as long as it had this fingerprint."""
        return self.kin.subjects

    @property
    def names(self) -> tuple[str, ...]:
        """Of the replicas."""
        return tuple(sorted({subject.name for subject in self.subjects}))

    @property
    def target_ids(self) -> frozenset[int]:
        """Rows of the ledger that are about them."""
        return frozenset(one.row.target_id for subject in self.subjects for one in subject.observed.rows)

    @property
    def seen_ns(self) -> tuple[int, int]:
        """Start of the first interval in the window, and end of the last."""
        rows = [one.row for subject in self.subjects for one in subject.observed.rows]
        start_ns, end_ns = self.window_ns
        inside = [row for row in rows if start_ns <= row.start_ns < end_ns]
        if not inside:
            return start_ns, start_ns
        return min(row.start_ns for row in inside), max(row.end_ns for row in inside)

    def loading(self) -> Loading:
        """Whether loads from the outer tiers stop the engine."""
        ways = {loading_of(one.replica.connector, tuple(one.observed.caches)) for one in self.subjects}
        return ways.pop() if len(ways) == 1 else "unknown"


def deployments(kinds: Sequence[Kin], window_ns: tuple[int, int], replica: str | None) -> list[Deployment]:
    """What can be asked about, newest last; NotCarried where every candidate lacks something.

    `replica`: only the one of this name.
    """
    found: list[Deployment] = []
    reasons: list[Reason] = []
    for kin in kinds:
        own = tuple(one for one in kin.subjects if replica in {None, one.name} and _is_in(one, window_ns))
        if own and kin.machine is not None:
            found.append(Deployment(kin._replace(subjects=own), kin.machine, window_ns))
        elif own:
            reasons += kin.reasons
    if not found:
        raise NotCarried(reasons or [Reason("no engine interval in the window", "ask for a longer one (--since)")])
    return sorted(found, key=lambda one: one.seen_ns[1])


def _is_in(subject: Subject, window_ns: tuple[int, int]) -> bool:
    return any(window_ns[0] <= one.row.start_ns < window_ns[1] for one in subject.observed.rows)


def laws_for(
    deployment: Deployment, law: Calibration, gpu: Gpu | None, gpus: int, first_token_seconds: float | None
) -> LawRange:
    """The deployment's own law; on another kind or number of GPUs, the same efficiencies there, less surely."""
    own = deployment.machine
    elsewhere = is_elsewhere(law, gpu, gpus)
    subject = deployment.subjects[0]
    asked = own
    if elsewhere:
        eager = subject.replica.eager
        asked = machine(own.shape, gpu, gpus, token_budget=law.fingerprint.token_budget, is_eager=eager)
    known = CLOCK_WEIGHT_SECONDS / (CLOCK_WEIGHT_SECONDS + law.clock_weight_seconds)
    clock = 0.0 if own.is_cpu else CLOCK_ERROR * known
    doubt = Doubt(DISCREPANCY, clock, ELSEWHERE_SD if elsewhere else 0.0)
    return calibrated_laws(asked, law, doubt, first_token_seconds)


def is_elsewhere(law: Calibration, gpu: Gpu | None, gpus: int) -> bool:
    """Whether these are not the GPUs that the law was learned on."""
    from kvtally.agent.hardware import gpu_of  # noqa: PLC0415  # read where two names may mean the same

    return gpus != law.fingerprint.gpus or gpu != gpu_of(law.fingerprint.sku)


def law_json(law: Calibration) -> dict[str, object]:
    """What the answer names of a law."""
    evidence = law.evidence
    return {
        "id": law.id,
        "fingerprint": law.fingerprint.text(),
        "rung": law.rung,
        "start": utc_text(evidence.start_ns),
        "end": utc_text(evidence.end_ns),
        "windows": evidence.windows,
        "alone": evidence.singles,
        "probes": evidence.probes,
    }


class Priced(NamedTuple):
    """What an hour of a replica cost, as the ledger's rates say; `hourly` None where they do not, and `why`."""

    hourly: Decimal | None
    rates: tuple[str, ...] = ()
    is_assumed: bool = True
    why: str = ""

    def told(self, gpus: int) -> Input:
        """As an input."""
        name = "price of a GPU" if gpus else "price of the host"
        if self.hourly is None:
            return Input(name, "unknown", "ASSUMED", self.why)
        value = f"{self.hourly / max(gpus, 1):.4g} an hour"
        return Input(name, value, "ASSUMED" if self.is_assumed else "SOURCE", "; ".join(self.rates))


def priced(reader: LedgerReader, deployment: Deployment, book: RateBook, payment: Payment) -> Priced:
    """The mean over the deployment's time; gap or no price at all: None."""
    facts = [
        one
        for one in facts_of(reader, Window(*deployment.window_ns), book, payment)
        if one.replica is not None and one.replica.target_id in deployment.target_ids
    ]
    spent = length = Fraction(0)
    for one in facts:
        rate, seconds = rate_of(one), Fraction(sum(one.state_ns.values()), NANO)
        if rate is None:
            return Priced(None, why=next((finding.message for finding in one.findings), "a price is missing"))
        spent, length = spent + rate * seconds, length + seconds
    if not length:
        return Priced(None, why="no engine interval is priced")
    lines = [line for one in facts for line in one.lines or () if line.resource in TIME_RESOURCES]
    charged = [line.rate for line in lines if line.rate.price_nano]
    hourly = spent / length * _SECONDS_PER_HOUR / NANO
    return Priced(
        Decimal(hourly.numerator) / hourly.denominator,
        tuple(sorted({rate_text(rate) for rate in charged})),
        not charged or any(rate.basis == "ASSUMED" for rate in charged),
    )
