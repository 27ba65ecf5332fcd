"""The cost report: the facts of a window grouped as asked, as the JSON of CLI.md (METHOD section 2).

told        what the step law says of a replica-hour
division    how a replica's occupied time divides
fold        facts added up to groups
sums        what is added up of a group
spread      time or money by what it went into, with intervals
group       a group as it prints
gateway     what a gateway tells of the same tokens
cache       what a cache tells of them
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from kvtally.agent.accounts import Payment, Window, facts_in, parts_of, widened
from kvtally.agent.disaggregation import DECODE, LOCAL_SHARE, PREFILL, without_other_half
from kvtally.agent.facts import among
from kvtally.agent.finding import Finding
from kvtally.agent.grouping import default_window, finding_json, in_order, union, unique, window_json
from kvtally.agent.ledger.settled import charged, charged_for
from kvtally.agent.report.cache import cache_findings, role_findings
from kvtally.agent.report.fold import Fold, SummedMoney
from kvtally.agent.report.gateway import gateway_findings
from kvtally.agent.report.group import group_json
from kvtally.agent.report.told import StepLaws
from kvtally.agent.savings_money import HOLDING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from kvtally.agent.ledger.read import LedgerReader
    from kvtally.agent.rates import RateBook
    from kvtally.agent.report.fold import Scale
    from kvtally.agent.report.sums import Lack, Sums
    from kvtally.agent.unit_cost import Tokens

FITTING = (0.8, 1.25)  # what prefill and decode by the step law may be multiplied by before it is a misfit (METHOD 2.4)


class Report(NamedTuple):
    """The answer as values: `groups` and `findings` as they print in JSON."""

    window: Window | None  # None: the ledger holds no interval at all
    covered_ns: int
    currency: str
    groups: list[dict[str, Any]]
    findings: list[Finding]

    def as_json(self) -> dict[str, Any]:
        """The JSON of CLI.md."""
        return {
            "window": window_json(self.window, self.covered_ns),
            "currency": self.currency,
            "groups": self.groups,
            "findings": [finding_json(finding) for finding in self.findings],
        }


def cost_report(
    reader: LedgerReader, window: Window | None, by: Sequence[str], book: RateBook, payment: Payment
) -> Report:
    """Cost of a window by the dimensions of `by`; with no window, the default one of CLI.md."""
    extent = reader.extent()
    if extent is None:
        return Report(None, 0, book.currency, [], [])
    asked = widened(window or default_window(extent), reader.raw_from(), extent[1])
    targets = reader.targets()
    laws, fold = StepLaws(reader, targets), Fold(by)
    for part in parts_of(reader, asked):
        # a part has the hours of one day: only a group by hour needs the lines of each
        is_summed = bool(part.hours) and "hour" not in by
        facts = facts_in(reader, part, book, payment, targets, with_lines=not is_summed)
        fold.add(facts, laws.of(part, facts), _summed(reader, part.hours) if is_summed else None)
    fold.finish()
    groups = in_order(fold.groups)
    found = [*fold.findings, *_misfits(fold.scales)]
    for _, sums in groups:
        found += _findings(sums)
    found += _lacking(sums for _, sums in groups)
    spans = union(fold.spans)
    real = Window(spans[0][0], spans[-1][1]) if spans else asked
    found += gateway_findings(reader, real, targets)
    found += cache_findings(reader, real, targets)
    found += role_findings(reader, real, targets)
    found += reader.findings(real.start_ns, real.end_ns)
    rendered = [group_json(dict(key), sums, laws.covariances) for key, sums in groups]
    return Report(real, sum(b - a for a, b in spans), book.currency, rendered, unique(found))


def _summed(reader: LedgerReader, hours: dict[int, int]) -> SummedMoney:
    """What settled hours cost."""
    rates = dict(reader.rates())
    amounts = [
        (target, resource, state, rates[rate], nano) for target, resource, state, rate, nano in charged(reader, hours)
    ]
    return SummedMoney(amounts, charged_for(reader, hours, "occupied", without=HOLDING))


def _misfits(scales: Mapping[str, Scale]) -> Iterator[Finding]:
    """Replicas whose steps take much longer or shorter than their law says."""
    for name, scale in scales.items():
        factor = scale.divided_ns / scale.law_ns
        if not FITTING[0] <= factor <= FITTING[1]:
            message = (
                f"prefill and decode took {factor:.2f} times what the step law says: their shares may be off; "
                "`kvtally calibrate` learns it anew"
            )
            yield Finding("step_law_misfit", "warning", f"engine/{name}", scale.start_ns, scale.end_ns, message)


def _findings(sums: Sums) -> Iterator[Finding]:
    """What a group's figures lack, and what would mend it."""
    yield from _token_findings(sums, sums.counted())
    yield from _half_findings(sums)
    if None in sums.laws:
        message = (
            "prefill and decode cannot be told apart here, so input and output have no price of their own: without "
            "the step law it takes seconds in which the engine worked (GPM graphics utilisation, or CPU seconds of an "
            "engine without a GPU), at least 8 slices of 2 s, and a load that varies"
        )
        yield Finding("split_unknown", "info", "", sums.start_ns, sums.end_ns, message)


def _lacking(groups: Iterable[Sums]) -> Iterator[Finding]:
    """Why replicas have no step law, and no stall; told alike however they are grouped."""
    found: dict[tuple[str, str], Lack] = {}
    for sums in groups:
        for key, lack in sums.lacking.items():
            found[key] = lack.together(found.get(key, lack))
    for (missing, _), lack in sorted(found.items(), key=lambda one: one[0]):
        where, span_ns = f"engine/{among(lack.names)}", (lack.start_ns, lack.end_ns)
        if missing == "stall":
            message = (
                "loading from and storing to the outer cache tier takes engine time that is still inside prefill and "
                f"decode, and so a token from that tier has no price: {lack.reason}"
            )
            yield Finding("stall_not_parted", "info", where, *span_ns, message)
        else:
            message = f"no step law divides the time of prefill and decode: {lack.reason}"
            yield Finding("step_law_lacking", "info", where, *span_ns, message)


def _token_findings(sums: Sums, tokens: Tokens) -> Iterator[Finding]:
    span = (sums.start_ns, sums.end_ns)
    if tokens.derived:
        message = (
            "vLLM before 0.16 does not count computed tokens: they are prompt tokens less prefix-cache hits, which "
            "it counts on every scheduling attempt, so reuse may be overstated under back-pressure"
        )
        yield Finding("tokens_derived", "info", "", *span, message)
    elif tokens.prompt and tokens.computed is None:
        message = "the engine does not tell which prompt tokens it computed, and its lookups do not add up to them"
        yield Finding("tokens_unknown", "warning", "", *span, message)
    if tokens.by_lookups:
        message = (
            "TensorRT-LLM counts cached tokens as one, when a request finishes: which of them HBM, host and disk had "
            "is by the shares of what each had when requests were scheduled"
        )
        yield Finding("tiers_by_lookups", "info", "", *span, message)


def _half_findings(sums: Sums) -> Iterator[Finding]:
    """What is not known of requests whose prefill and decode run on different engines."""
    span = (sums.start_ns, sums.end_ns)
    for pool in without_other_half(sums.roles, DECODE):
        message = (
            f"the engines of {pool} decode what others prefilled, and those are not here: their prompts are not "
            "counted, so input has no price; scrape the prefill engines into the same ledger, or name their role"
        )
        yield Finding("prefill_elsewhere", "warning", "", *span, message)
    for pool in without_other_half(sums.roles, PREFILL):
        message = (
            f"the engines of {pool} prefill what others decode, and those are not here: their answers are not "
            "counted, so output has no price; scrape the decode engines into the same ledger, or name their role"
        )
        yield Finding("decode_elsewhere", "warning", "", *span, message)
    computed, asked = sums.at_decode
    if computed > LOCAL_SHARE * asked:
        message = (
            f"decode engines computed {computed} of their {asked} prompt tokens themselves: prompts that never went "
            "through a prefill engine are in no count of input, and their time is in that of decode"
        )
        yield Finding("prefill_at_decode", "warning", "", *span, message)
