"""The identity that every interval must satisfy: prompt tokens by source add up to prompt tokens."""

from __future__ import annotations

import re
from enum import Enum
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from kvtally.collectors.quantities import index

if TYPE_CHECKING:
    from collections.abc import Sequence

_PROMPT, _COMPUTED, _HBM, _EXTERNAL = (
    index("engine", name) for name in ("prompt_tokens", "computed_tokens", "hbm_tokens", "external_tokens")
)
FAMILIES = frozenset(("prompt_tokens", "computed_tokens", "hbm_tokens", "external_tokens", "details"))
CLEAN_SINCE = (0, 20)  # before, a fully cached prompt puts a fictitious recomputed token into local_cache_hit
BY_SOURCE_SINCE = (0, 16)


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
    found = re.match(r"v?(\d+)\.(\d+)", text or "")
    return (int(found[1]), int(found[2])) if found else None


def check(
    version: str | None,
    values: Sequence[int | None],
    detail_names: Sequence[str],
    details: Sequence[int] | None,
) -> Check:
    """Check one interval's differences in the form of the engine's version (TELEMETRY section 0).

    >= 0.20: computed + hbm + external = prompt, and hbm + external = cached.
    0.16 to 0.19: the sum exceeds prompt (and cached) by the recomputed tokens.
    Older engines do not tell tokens by source: unchecked. Where nobody tells the version, the families do: only
    0.16 to 0.19 have prompt_tokens_recomputed.
    """
    prompt, parts = values[_PROMPT], (values[_COMPUTED], values[_HBM], values[_EXTERNAL])
    known = [part for part in parts if part is not None]
    if prompt is None or len(known) < len(parts):
        return Check(Identity.UNCHECKED)
    extra = dict(zip(detail_names, details, strict=True)) if details is not None else {}
    release = version_of(version)
    recomputed = extra.get("recomputed_tokens")
    if recomputed is None:
        if "recomputed_tokens" in detail_names or (release is not None and release < CLEAN_SINCE):
            return Check(Identity.UNCHECKED)
        recomputed = 0
    total = sum(known)
    if total != prompt + recomputed:
        sources = " + ".join(str(part) for part in known)
        and_recomputed = f" + {recomputed} recomputed" if recomputed else ""
        return Check(
            Identity.BROKEN,
            f"prompt tokens by source do not add up: {sources} = {total}, not {prompt}{and_recomputed}; "
            "figures of this interval cannot be trusted",
        )
    cached = extra.get("cached_tokens")
    reused = total - known[0]
    if cached is not None and reused != cached + recomputed:
        return Check(
            Identity.BROKEN, f"reused tokens by source are {reused}, the engine's own total says {cached + recomputed}"
        )
    return Check(Identity.OK)
