"""How occupied time divides between prefill and decode: a law of two costs, fitted to this engine's own counters.

METHOD 2.4 splits by a step law. Until there is one that is calibrated over time, the law is the plainest that the
counters can carry: working seconds = a x steps + b x computed prompt tokens, least squares over slices of the
window. A step costs `a` whatever it holds, which is decode; every prompt token computed in it adds `b`, which is
prefill. A ratio of summed request times cannot do this: those seconds overlap (METHOD section 6).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

# A prefill's tokens count at its first token, so a slice shorter than a prefill parts work from tokens: long slices
# are better, as long as enough of them are left to fit
SLICES_NS = (15_000_000_000, 10_000_000_000, 8_000_000_000, 6_000_000_000, 4_000_000_000, 2_000_000_000)
ENOUGH_SLICES = 12
LEAST_SLICES = 8
# R² about zero, not about the mean: a saturated engine works all of every slice, and there is no spread to explain
LEAST_EXPLAINED = 0.8
WIDEST = 0.25  # half-width of the share's interval beyond which there is no figure
# what a law of two costs gets wrong beyond the scatter of its slices: it has no attention term and no batching.
# ASSUMED; the baseline of METHOD section 6 is within 15 % of the truth on three real arms
DISCREPANCY = 0.15
Z90 = 1.645


class Slice(NamedTuple):
    """What the engine did in a stretch of time; `working_ns` of it were spent working."""

    length_ns: int
    working_ns: float
    steps: int
    computed_tokens: int


class Split(NamedTuple):
    """Share of working time that is prefill, with its 90 % interval, and the law behind it."""

    low: float
    point: float
    high: float
    step_ns: float
    token_ns: float
    slices: int


def merged(pieces: Sequence[Slice], slice_ns: int) -> list[Slice]:
    """Join consecutive pieces until each lasts at least `slice_ns`; a short rest joins the last."""
    slices: list[Slice] = []
    current = Slice(0, 0.0, 0, 0)
    for piece in pieces:
        current = _joined(current, piece)
        if current.length_ns >= slice_ns:
            slices.append(current)
            current = Slice(0, 0.0, 0, 0)
    if current.length_ns and slices:
        slices[-1] = _joined(slices[-1], current)
    return slices


def _joined(one: Slice, other: Slice) -> Slice:
    return Slice(
        one.length_ns + other.length_ns,
        one.working_ns + other.working_ns,
        one.steps + other.steps,
        one.computed_tokens + other.computed_tokens,
    )


def fit(pieces: Sequence[Slice]) -> Split | None:
    """Fit the law; None where the slices cannot carry it (too few, one kind of load only, or a bad fit)."""
    slices: list[Slice] = []
    for slice_ns in SLICES_NS:
        slices = [one for one in merged(pieces, slice_ns) if one.steps or one.computed_tokens]
        if len(slices) >= ENOUGH_SLICES:
            break
    if len(slices) < LEAST_SLICES:
        return None
    steps = [float(one.steps) for one in slices]
    tokens = [float(one.computed_tokens) for one in slices]
    worked = [one.working_ns for one in slices]
    ss, tt, st = _dot(steps, steps), _dot(tokens, tokens), _dot(steps, tokens)
    sw, tw = _dot(steps, worked), _dot(tokens, worked)
    determinant = ss * tt - st * st
    if not tt or not ss or determinant <= 1e-3 * ss * tt:
        return None  # steps and tokens move together: nothing tells one's cost from the other's
    step_ns, token_ns = (sw * tt - tw * st) / determinant, (tw * ss - sw * st) / determinant
    if step_ns <= 0 or token_ns <= 0:
        return None
    errors = [w - step_ns * s - token_ns * t for w, s, t in zip(worked, steps, tokens, strict=True)]
    scatter = _dot(errors, errors)
    if scatter > (1 - LEAST_EXPLAINED) * _dot(worked, worked):
        return None
    variance = scatter / (len(slices) - 2)
    prefill, decode = token_ns * sum(tokens), step_ns * sum(steps)
    point = prefill / (prefill + decode)
    # delta method on point = p / (p + d) with the covariance of (step_ns, token_ns)
    by_token, by_step = decode * sum(tokens), -prefill * sum(steps)
    noise = variance / determinant * (by_token**2 * ss + by_step**2 * tt - 2 * by_token * by_step * st)
    sd = math.hypot(math.sqrt(max(noise, 0.0)) / (prefill + decode) ** 2, DISCREPANCY * point * (1 - point))
    if Z90 * sd > WIDEST:
        return None
    low, high = max(0.0, point - Z90 * sd), min(1.0, point + Z90 * sd)
    return Split(low, point, high, step_ns, token_ns, len(slices))


def lent(law: Split, steps: int, computed_tokens: int) -> Split | None:
    """The law of another time applied to this one's work; None where there was no work.

    The interval keeps its width in log odds: the costs are as uncertain as they were, the mix is another.
    """
    prefill, decode = law.token_ns * computed_tokens, law.step_ns * steps
    if not prefill + decode:
        return None
    point = prefill / (prefill + decode)
    if not prefill or not decode:
        return Split(point, point, point, law.step_ns, law.token_ns, law.slices)
    factors = [_odds(bound) / _odds(law.point) if 0 < law.point < 1 else 1.0 for bound in (law.low, law.high)]
    low, high = (_share(_odds(point) * factor) for factor in factors)
    return Split(low, point, high, law.step_ns, law.token_ns, law.slices)


def _odds(share: float) -> float:
    return share / (1 - share) if share < 1 else math.inf


def _share(odds: float) -> float:
    return 1.0 if math.isinf(odds) or math.isnan(odds) else odds / (1 + odds)


def _dot(left: Sequence[float], right: Sequence[float]) -> float:
    return math.fsum(a * b for a, b in zip(left, right, strict=True))
