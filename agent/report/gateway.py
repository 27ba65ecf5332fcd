"""What a gateway counted against what its engines did: tokens that one of them has and the other has not."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from kvtally.agent.accounts import replicas_of
from kvtally.agent.disaggregation import DECODE, PREFILL, pool_of, without_other_half
from kvtally.agent.finding import Finding
from kvtally.agent.ledger.gateways import running, watched
from kvtally.agent.ledger.totals import totals

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from kvtally.agent.accounts import Window
    from kvtally.agent.facts import Replica
    from kvtally.agent.ledger.read import LedgerReader, Target

TOLERANCE = 0.02  # of the larger of the two
# quantity of a gateway, the same of an engine, the role of engines whose count of it is another's
_COMPARED = (("input_tokens", "prompt_tokens", DECODE), ("output_tokens", "generated_tokens", PREFILL))


class _Side(NamedTuple):
    """One model at one kind of gateway, and at the engines.

    is_part     its page has models that no engine in the ledger has: adapters of this one, or other engines
    """

    model: str
    gateways: tuple[Target, ...]
    engines: tuple[Replica, ...]
    is_part: bool


def gateway_findings(reader: LedgerReader, window: Window, targets: Mapping[int, Target]) -> Iterator[Finding]:
    """Where a gateway and all engines of a model that are in the ledger tell different tokens for the same time."""
    for side in _sides(targets):
        span = watched(reader, [gateway.id for gateway in side.gateways], window.start_ns, window.end_ns)
        if span is not None:
            yield from _disagreements(reader, side, span)


def _sides(targets: Mapping[int, Target]) -> list[_Side]:
    engines: dict[str, list[Replica]] = {}
    for replica in replicas_of(targets).values():
        # a frontend may write the name in lower case
        engines.setdefault(replica.model.casefold(), []).append(replica)
    found: dict[tuple[str, str], list[Target]] = {}
    strange: set[str] = set()
    for target in targets.values():
        model = target.attributes.get("model", "").casefold()
        if target.kind == "gateway" and model in engines:
            found.setdefault((target.attributes.get("source", ""), model), []).append(target)
        elif target.kind == "gateway":
            strange.add(_page(target))
    return [
        _Side(
            engines[model][0].model,
            tuple(gateways),
            tuple(engines[model]),
            any(_page(one) in strange for one in gateways),
        )
        for (_, model), gateways in sorted(found.items())
    ]


def _page(target: Target) -> str:
    return target.name.partition("/")[0]


def _disagreements(reader: LedgerReader, side: _Side, span: tuple[int, int]) -> Iterator[Finding]:
    gateway, engine = totals(reader, "gateway", *span), totals(reader, "engine", *span)
    present = [one for one in side.engines if one.target_id in engine]
    roles: dict[str, set[str]] = {}
    for one in present:
        roles.setdefault(pool_of(one), set()).add(one.role)
    asked = _sum(gateway[one.id].counted["requests"] for one in side.gateways if one.id in gateway)
    in_hand = running(reader, [one.target_id for one in present], *span)
    for own, other, role in _COMPARED:
        counting = [one for one in present if one.role != role]
        told = _sum(gateway[one.id].counted[own] for one in side.gateways if one.id in gateway)
        counted = _sum(engine[one.target_id].counted[other] for one in counting)
        if not asked or told is None or counted is None or not counting or without_other_half(roles, role):
            continue
        allowed = TOLERANCE * max(told, counted) + in_hand * told / asked
        if abs(told - counted) <= allowed or (side.is_part and told < counted):
            continue
        names = ", ".join(sorted({one.name for one in side.gateways}))
        message = (
            f"the gateway tells {told} {own.replace('_', ' ')} of {side.model}, its engines {counted}, where up to "
            f"{allowed:.0f} between them are its other instants: it counts a request from its response, the engines at "
            "the first token. Usual reasons: requests that were aborted or had no usage in their response, engines "
            "that are asked past the gateway, and engines that are not in this ledger"
        )
        yield Finding("gateway_disagrees", "warning", f"gateway/{names}", *span, message)


def _sum(values: Iterator[int | None] | Sequence[int | None]) -> int | None:
    """The sum; None where a part is unknown, or there is none."""
    known = list(values)
    return None if not known or None in known else sum(value or 0 for value in known)
