"""The identity that every interval must satisfy: prompt tokens by source add up to prompt tokens."""

from __future__ import annotations

from enum import Enum
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from kvtally.collectors.family import release
from kvtally.collectors.quantities import index

if TYPE_CHECKING:
    from collections.abc import Sequence

_PROMPT, _COMPUTED, _HBM, _EXTERNAL = (
    index("engine", name) for name in ("prompt_tokens", "computed_tokens", "hbm_tokens", "external_tokens")
)
FAMILIES = frozenset(("prompt_tokens", "computed_tokens", "hbm_tokens", "external_tokens", "details"))
CLEAN_SINCE = (0, 20)  # before, a fully cached prompt's recomputed token is under two sources: told apart by its family
BY_SOURCE_SINCE = (0, 16)
_FIRST = (0, 8)  # a build from a checkout without tags calls itself 0.1.dev: that tells nothing


class Identity(Enum):
    """What the check says."""

    OK = "ok"
    BROKEN = "broken"
    UNCHECKED = "unchecked"


class Check(NamedTuple):
    """The answer, and what is wrong in words where it is."""

    state: Identity
    message: str = ""


@lru_cache(maxsize=64)
def version_of(text: str | None) -> tuple[int, int] | None:
    """Major and minor of "0.25.1" or "v0.17.0+cpu"; None where it is not told."""
    known = release(text)
    return None if known is None or known < _FIRST else known


def check(
    version: str | None,
    values: Sequence[int | None],
    detail_names: Sequence[str],
    details: Sequence[int] | None,
) -> Check:
    """Check one interval's differences: computed + hbm + external = prompt, and hbm + external = cached.

    The collector takes the tokens off that 0.16 to 0.19 count twice; where such an engine does not show them the sums
    are unchecked. Older engines do not tell tokens by source: unchecked. Where nobody tells the version the families
    do: those that are there must add up.
    """
    prompt, parts = values[_PROMPT], (values[_COMPUTED], values[_HBM], values[_EXTERNAL])
    known = [part for part in parts if part is not None]
    if prompt is None or len(known) < len(parts):
        return Check(Identity.UNCHECKED)
    engine = version_of(version)
    if engine is not None and engine < CLEAN_SINCE and "recomputed_tokens" not in detail_names:
        return Check(Identity.UNCHECKED)
    total = sum(known)
    if total != prompt:
        sources = " + ".join(str(part) for part in known)
        return Check(
            Identity.BROKEN,
            f"prompt tokens by source do not add up: {sources} = {total}, not {prompt}; "
            "figures of this interval cannot be trusted",
        )
    extra = dict(zip(detail_names, details, strict=True)) if details is not None else {}
    cached = extra.get("cached_tokens")
    reused = total - known[0]
    if cached is not None and reused != cached:
        return Check(Identity.BROKEN, f"reused tokens by source are {reused}, the engine's own total says {cached}")
    return Check(Identity.OK)
