"""The figure itself: engine-seconds avoided, what they cost, and what the error of them is made of."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from kvtally.agent import savings
from kvtally.agent.calibration import PARAMETERS
from kvtally.agent.explain.arithmetic import Worked, evaluated, rounded

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kvtally.agent.savings import Part, Seconds
    from kvtally.agent.worth import Three, Worth

COUPLINGS = {
    "W_t": "where long prompts compute much (together)",
    "W_m": "where neither goes with the other (mixed)",
    "W_a": "where long prompts compute little (apart)",
}
AVOIDED = {"hbm": "avoided by HBM's hits, behind nothing", "out": "avoided by those of the outer tiers, behind HBM"}
# what each part of the error is, and what would make it less
CAUSES = {
    "calibration": (
        "the law's parameters: sqrt(g' S g), both in --format json",
        "`kvtally calibrate --probe`: a few cold prompts on an idle engine; or a longer span with requests alone",
    ),
    "coupling": (
        "which prompts computed how much: half the couplings' range",
        "a log of the requests (--requests FILE, rung M2), or vLLM's --enable-mfu-metrics (rung M3)",
    ),
    "clock": (
        "the SM clock under load",
        "GPM metrics of the GPU over some seconds of heavy prefill: `kvtally doctor` says whether they are read",
    ),
    "form": (
        "what the law's form gets wrong (ASSUMED)",
        "nothing that counters tell: an A/B of your own, caching on and off on one trace",
    ),
    "attention": (
        "attention, where little of it was seen",
        "`kvtally calibrate --probe` with long prompts, or vLLM's --enable-mfu-metrics (rung M3)",
    ),
    "preemptions": (
        "what preempted requests computed again",
        "more KV blocks, or fewer sequences (--max-num-seqs), so that none is preempted",
    ),
    "floor": (
        "2 % of the prefills without reuse (ASSUMED)",
        "nothing that counters tell: an A/B of your own, caching on and off on one trace",
    ),
}


class Couplings(NamedTuple):
    """Engine-seconds avoided under the three couplings, and where MFU counters place the truth; None: they do not."""

    avoided: Three
    position: float | None

    def summed(self, mixed: float) -> Couplings:
        """With W under `mixed` as the rows of the classes sum to it, rounded as they are."""
        return self._replace(avoided=(self.avoided[0], mixed, self.avoided[2]))


def places_of(value: float) -> int:
    """Decimal places with which seconds of this size print: six digits, four places at most."""
    return max(1, min(4, 5 - math.floor(math.log10(abs(value))))) if value else 4


def seconds_lines(seconds: Seconds, couplings: Couplings, parts: Sequence[Part]) -> Worked:
    """W, its costs and the net, with their intervals."""
    lines = Worked()
    places = places_of(seconds.avoided.point)
    about = {"unit": "s", "basis": "MODELLED"}
    words = "engine-seconds that reuse avoided"
    if seconds.avoided == savings.EXACTLY_NOTHING:
        lines.given("W", f"{words}: no token was reused", 0.0, places, **about)
    else:
        _coupled(lines, couplings, places)
    _costs(lines, seconds, parts, places)
    if seconds.net is not None:
        lines.result("net", "engine-seconds that reuse was worth", "W - stall - store", places, **about)
    return lines


def _coupled(lines: Worked, couplings: Couplings, places: int) -> None:
    """W from what it is under each coupling; a log of the requests leaves only one."""
    about = {"unit": "s", "basis": "MODELLED"}
    together, mixed, apart = couplings.avoided
    if math.isclose(together, apart, rel_tol=1e-9):
        lines.given("W_m", "avoided: what the classes of requests sum to", mixed, places, **about)
        lines.result("W", "engine-seconds that reuse avoided", "W_m", places, **about)
        return
    for (symbol, meaning), value in zip(COUPLINGS.items(), couplings.avoided, strict=True):
        lines.given(symbol, f"avoided {meaning}", value, places, **about)
    if couplings.position is None:
        lines.result("W", "that reuse avoided: the mean of the three", "(W_t + W_m + W_a) / 3", places, **about)
    else:
        source = "vllm:estimated_flops_per_gpu_total"
        lines.given("z", "from apart (0) to together (1), by MFU counters", couplings.position, source=source)
        lines.result("W", "that reuse avoided", "W_a + z * (W_t - W_a)", places, **about)


def _costs(lines: Worked, seconds: Seconds, parts: Sequence[Part], places: int) -> None:
    """What loading and storing took of the engine, from what the outer tiers' clocks say."""
    about = {"unit": "s", "basis": "MODELLED"}
    words = {"stall": "of the engine, held up by loading", "store": "of the engine, taken by storing"}
    if seconds.stall is None or seconds.store is None:
        return  # the reasons say which clock is missing
    if not any(part.worth.loads or part.worth.stores for part in parts):
        for name, meaning in words.items():
            lines.given(name, f"{meaning}: none", 0.0, places, **about)
        return
    clocks = {"unit": "s", "basis": "MEASURED", "source": "the outer tiers' own clocks"}
    loads, stores = (sum(getattr(part.worth, name) or 0.0 for part in parts) for name in ("loads", "stores"))
    lines.given("loads", "of loading, spread over the work between two reports", loads, places, **clocks)
    lines.given("stores", "of storing, the same", stores, places, **clocks)
    loading = " and ".join(dict.fromkeys(part.loading for part in parts))
    for name, own, estimate in (("stall", "loads", seconds.stall), ("store", "stores", seconds.store)):
        _share(lines, name, own, estimate.point, words=f"{words[name]}: {loading}", places=places)


def _share(lines: Worked, name: str, clock: str, value: float, *, words: str, places: int) -> None:
    """A cost as a multiple of what a clock says; just as it is, where several connectors make it no plain multiple."""
    about = {"unit": "s", "basis": "MODELLED"}
    factor = rounded(value / lines[clock], 2) if lines[clock] else "0"
    if abs(float(factor) * lines[clock] - value) <= 10.0**-places:
        lines.result(name, words, f"{factor.rstrip('0').rstrip('.') or '0'} * {clock}", places, **about)
    else:
        lines.given(name, words, value, places, **about)


def interval_lines(seconds: Seconds, sd: str | None, known: Worked) -> Worked:
    """The 90 % intervals of W and of the net; `sd` as printed in the error budget, None where nothing was reused."""
    lines = Worked(known.printed())
    places = places_of(seconds.avoided.point)
    if sd is not None:
        reach_lines(lines, "", sd, places)
    if seconds.stall is None or seconds.store is None:
        return lines
    if "loads" in known.printed():
        for name, clock, cost in (("stall", "loads", seconds.stall), ("store", "stores", seconds.store)):
            _share(lines, f"{name}_low", clock, cost.low, words=f"{name}, from", places=places)
            _share(lines, f"{name}_high", clock, cost.high, words=f"{name}, to", places=places)
    elif sd is None:
        return lines
    down, up = spans(lines, "" if sd is None else "W")
    lines.result("net_low", "net, from", f"net - {down}", places, unit="s")
    lines.result("net_high", "net, to", f"net + {up}", places, unit="s")
    return lines


def reach_lines(lines: Worked, suffix: str, sd: str, places: int) -> None:
    """The 90 % interval of W, or of W_hbm or W_out, from its printed standard deviation."""
    name, half = f"W{suffix}", f"half{suffix}"
    words = f"of {name}, from the section on how sure it is"
    lines.given(f"sd{suffix}", words, float(sd), len(sd.partition(".")[2]), unit="s")
    lines.result(half, f"half of {name}'s 90 % interval", f"{savings.Z90} * sd{suffix}", places, unit="s")
    lines.result(f"{name}_low", f"{name}, from", f"max({name} - {half}, min({name}, 0))", places, unit="s")
    lines.result(f"{name}_high", f"{name}, to", f"{name} + {half}", places, unit="s")


def spans(lines: Worked, gain: str, *, gain_share: str = "", cost_share: str = "") -> tuple[str, str]:
    """How far a net reaches down and up, as formulas: of the interval of `gain` ("" for none) and of what costs told.

    The shares are factors ("R_dram / R_out * "), where it is the net of one tier among several.
    """
    down, up = [], []
    if gain:
        down.append(f"{gain_share}({gain} - {gain}_low)")
        up.append(f"{gain_share}({gain}_high - {gain})")
    if "stall_low" in lines.printed():
        down += [f"{cost_share}({cost}_high - {cost})" for cost in ("stall", "store")]
        up += [f"{cost_share}({cost} - {cost}_low)" for cost in ("stall", "store")]
    return _together(down), _together(up)


def _together(parts: Sequence[str]) -> str:
    """Independent gaps, as one."""
    if len(parts) == 1:
        return parts[0]
    return f"sqrt({' + '.join(f'{part}^2' if part.startswith('(') else f'({part})^2' for part in parts)})"


def error_budget(seconds: Seconds, parts: Sequence[Part], known: Worked, gained: Mapping[str, float]) -> dict[str, Any]:
    """The standard deviation of W by cause, how each was worked out, and the largest with what would make it less.

    gained    what HBM's hits ("hbm") and those of the outer tiers ("out") avoided; their errors are told too
    """
    lines = Worked(known.printed())
    places = places_of(seconds.avoided.point)
    if len(parts) == 1:
        _inputs(lines, parts[0])
    _caused(lines, seconds.parts_sd, _formulas(parts, has_couplings="W_t" in lines.printed()), places)
    largest = max(seconds.parts_sd, key=lambda cause: seconds.parts_sd[cause])
    variance = sum(sd**2 for sd in seconds.parts_sd.values())
    return {
        "rows": lines.as_json(),
        "tiers": _tier_errors(gained, parts, lines, places).as_json(),
        "shares": {cause: rounded(sd**2 / variance if variance else 0.0, 3) for cause, sd in seconds.parts_sd.items()},
        "largest": {
            "cause": largest,
            "words": CAUSES.get(largest, (largest, ""))[0],
            "less_by": CAUSES.get(largest, ("", ""))[1],
        },
        "gradients": [_gradient(part) for part in parts],
    }


def _tier_errors(gained: Mapping[str, float], parts: Sequence[Part], known: Worked, places: int) -> Worked:
    """The standard deviations of what the tiers avoided, with W_hbm or W_out in place of W."""
    lines = Worked(known.printed())
    deviations = savings.tier_deviations(parts)
    for side, seconds in gained.items():
        lines.given(f"W_{side}", AVOIDED[side], seconds, places, unit="s", basis="MODELLED")
        formulas = _formulas(parts, f"W_{side}", has_couplings=False)
        _caused(lines, deviations[side], {**formulas, "clock": ""}, places, f"_{side}")
    return lines


def _caused(
    lines: Worked, deviations: Mapping[str, float], formulas: Mapping[str, str], places: int, suffix: str = ""
) -> None:
    """A line for each cause, and what they make together."""
    for cause, sd in deviations.items():
        words = CAUSES.get(cause, (cause, ""))[0]
        symbol, formula = f"sd_{cause}{suffix}", formulas.get(cause)
        # what was settled, or what several laws share, is told as it is
        if formula and abs(evaluated(formula, _numbers(lines)) - sd) <= 0.001 * sd + 10.0**-places:
            lines.result(symbol, words, formula, places, unit="s")
        else:
            lines.given(symbol, words, sd, places, unit="s")
    squares = " + ".join(f"sd_{cause}{suffix}^2" for cause in deviations)
    words = f"of W{suffix}: the causes are independent"
    lines.result(f"sd{suffix}", words, f"sqrt({squares})", places, unit="s", basis="MODELLED")


def _numbers(lines: Worked) -> dict[str, float]:
    return {name: float(text) for name, text in lines.printed().items()}


def _inputs(lines: Worked, part: Part) -> None:
    """What the causes' formulas are made of, for one law."""
    worth, law = part.worth, part.calibration
    full = sum(worth.full) / len(worth.full)
    lines.given("F", "the prefills with no reuse at all", full, places_of(full), unit="s", basis="MODELLED")
    lines.given("g_c", "by how much W moves with the log of the clock", abs(worth.clock_by[0]), unit="s")
    lines.given("w_c", "tensor seconds that the clock was seen over", law.clock_weight_seconds, unit="s")
    lines.given("a", "attention's share of F", worth.attention_seconds / full if full else 0.0)
    place = PARAMETERS.index("attention_efficiency")
    lines.given("sd_eta", "sd of the log of eta_a", math.sqrt(max(law.covariance[place][place], 0.0)))
    lines.given("U", "preemptions a request", _often(worth))


def _often(worth: Worth) -> float:
    return min(1.0, worth.preemptions / worth.requests) if worth.requests else 0.0


def _formulas(parts: Sequence[Part], of: str = "W", *, has_couplings: bool) -> dict[str, str]:
    """Of the causes that a calculator reaches (METHOD 4.5); several laws' errors add up in other ways."""
    if len(parts) != 1:
        return {}
    weight = savings.CLOCK_WEIGHT_SECONDS
    attention = f"{savings.ATTENTION_ERROR} * min(1, sd_eta / {savings.ATTENTION_DOUBT}) * a * {of}"
    half_range = "(max(W_t, W_m, W_a) - min(W_t, W_m, W_a)) / 2"
    return {
        **({"coupling": half_range} if has_couplings else {}),
        "clock": f"g_c * {savings.CLOCK_ERROR} * {weight:.0f} / ({weight:.0f} + w_c)",
        "form": f"{savings.DISCREPANCY} * {of}",
        "attention": f"0 * {of}" if parts[0].calibration.rung == "M3" else attention,
        "preemptions": f"{savings.PREEMPTION_ERROR} * U * {of}",
        "floor": f"{savings.PREFILL_FLOOR} * F",
    }


def _gradient(part: Part) -> dict[str, Any]:
    """Of the calibration's part of the error, the g and the S under its root."""
    return {
        "calibration": part.calibration.id,
        "by_log_of": dict(zip(PARAMETERS, part.worth.avoided_by, strict=True)),
        "covariance_of_logs": [list(row) for row in part.calibration.covariance],
    }
