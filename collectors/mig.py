"""What part of a GPU a MIG instance is: by its profile, among all the instances of that GPU."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

SLICES = 7  # of compute; such a GPU has eight of memory

# "1g.10gb", "1g.10gb+me", "NVIDIA H100 80GB HBM3 MIG 3g.40gb"; "1c.3g.40gb": one of the three slices of an instance
_PROFILE = re.compile(r"(?:.* MIG |)(?:([1-7])c\.)?([1-7])g\.([1-9][0-9]{0,3})gb(?:[+-][a-z.+-]*)?")
_USUAL_MEMORY = {3: 4, 7: 8}  # slices of memory by slices of compute, where they are not as many
_FOUR_SLICES = re.compile(r"\b(?:A30|RTX PRO)\b")
_NAMED_MEMORY = re.compile(r"\b([0-9]+) ?GB\b")
# gigabytes of products whose name does not tell them; "GH200 480GB" tells those of its CPU
_MEMORY = (
    (re.compile(r"\bGH200 480GB\b"), 96),
    (re.compile(r"\bGH200 144G\b"), 144),
    (re.compile(r"\bH100 NVL\b"), 94),
    (re.compile(r"\bH100 PCIe\b"), 80),
    (re.compile(r"\bH200\b"), 141),
    (re.compile(r"\bG?B200\b"), 180),
    (re.compile(r"\bG?B300\b"), 270),
    (re.compile(r"\bH20\b"), 96),
)


def slices_of(product: str) -> int:
    """How many compute slices a GPU of this product has."""
    return 4 if _FOUR_SLICES.search(product) else SLICES


def gigabytes_of(product: str) -> float | None:
    """Memory of a GPU by its product's name; None where that does not tell."""
    for pattern, gigabytes in _MEMORY:
        if pattern.search(product):
            return gigabytes
    named = _NAMED_MEMORY.search(product)
    return float(named[1]) if named else None


def part_of(profile: str, gigabytes: float | None, slices: int = SLICES) -> Fraction | None:
    """The greater of an instance's parts of compute and of memory; None for a profile that cannot be read.

    `gigabytes` and `slices` are the whole GPU's. Where its memory is unknown, an instance has as much as is usual for
    its compute. Compute instances of one GPU instance have equal parts of it for each slice.
    """
    match = _PROFILE.fullmatch(profile)
    if match is None:
        return None
    compute, own = int(match[2]), int(match[1] or match[2])
    if max(compute, own) > slices or own > compute:
        return None
    whole = 8 if slices == SLICES else slices
    if gigabytes is None:
        memory = _USUAL_MEMORY.get(compute, compute) if slices == SLICES else compute
    else:
        memory = min(whole, max(1, round(int(match[3]) / gigabytes * whole)))
    return max(Fraction(compute, slices), Fraction(memory, whole)) * Fraction(own, compute)


def shares(parts: Sequence[Fraction | None]) -> tuple[list[Fraction | None], Fraction]:
    """Shares of one GPU by the parts of all its instances, and the rest that is in none: together exactly 1.

    Parts may come to more than the whole (3g.40gb and 4g.40gb: 1/2 and 4/7): each then has its proportion.
    """
    total = sum((part for part in parts if part is not None), Fraction(0))
    scale = max(total, Fraction(1))
    return [None if part is None else part / scale for part in parts], 1 - total / scale
