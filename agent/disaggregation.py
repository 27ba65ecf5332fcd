"""Prefill/decode disaggregation: a request that two engines serve counts once, and both of them cost together. Pure.

The prefill engine computes the prompt and generates one token that nobody sees; the decode engine is handed the KV of
the prompt and generates every token of the answer. Each counts the whole prompt.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from kvtally.agent.facts import Replica

PREFILL, DECODE, BOTH = "prefill", "decode", "both"
ROLE = 'role = "decode" (or "prefill", or "both")'  # as settings of an [[engine]]
LOCAL, ASKED = "computed_at_decode_tokens", "prompt_at_decode_tokens"
# of a decode engine's prompt tokens, those that it may compute itself as the rest of what it was handed: a block or a
# token of each. Above that it serves whole requests
LOCAL_SHARE = 0.1

_ELSEWHERE = {
    DECODE: (
        "prompt_tokens",
        "computed_tokens",
        "hbm_tokens",
        "external_tokens",
        "prefix_hit_tokens",
        "external_hit_tokens",
    ),
    PREFILL: ("generated_tokens",),
}


def counted_work(replica: Replica, work: Mapping[str, int | None]) -> Mapping[str, int | None]:
    """What a replica counted, less what is another's: prompts of a decode engine, the tokens of a prefill engine.

    Of a decode engine, what it computed of how many prompt tokens is kept under LOCAL and ASKED.
    """
    dropped = _ELSEWHERE.get(replica.role)
    if dropped is None:
        return work
    own = {**work, **dict.fromkeys(dropped, 0)}
    if replica.role == DECODE:
        own |= {LOCAL: work.get("computed_tokens"), ASKED: work.get("prompt_tokens")}
    return own


def pool_of(replica: Replica) -> str:
    """What serves the same requests: the group that is named, else one model in one place."""
    place = [replica.labels[label] for label in ("cluster", "namespace") if replica.labels.get(label)]
    return replica.group or "/".join([*place, replica.model])


def grouped(replicas: Mapping[int, Replica]) -> dict[int, Replica]:
    """The same replicas; prefill and decode engines of one pool without a group's name get one of their own."""
    roles: dict[str, set[str]] = {}
    for one in replicas.values():
        roles.setdefault(pool_of(one), set()).add(one.role)
    return {
        number: one._replace(group=f"{pool_of(one)} prefill+decode")
        if not one.group and one.role in _ELSEWHERE and {PREFILL, DECODE} <= roles[pool_of(one)]
        else one
        for number, one in replicas.items()
    }


def without_other_half(roles: Mapping[str, Iterable[str]], role: str) -> list[str]:
    """Pools, of those whose roles are given, with engines of this role and none that does the other half."""
    other = {DECODE: PREFILL, PREFILL: DECODE}[role]
    return [pool for pool, own in roles.items() if role in own and not {other, BOTH} & {*own}]
