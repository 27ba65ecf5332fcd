"""One request worked out by hand: its chunks, and what each step took by the law, term by term (METHOD 3 and 4.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvtally.agent.calibration import PARAMETERS
from kvtally.agent.explain.arithmetic import Worked
from kvtally.agent.finding import utc_text
from kvtally.agent.hardware import gpu_of
from kvtally.agent.steplaw.chunks import LEAST_BUDGET
from kvtally.agent.steplaw.law import tile_tokens
from kvtally.agent.steplaw.machine import ALL_REDUCE_SECONDS, LINK_BYTES_PER_SECOND

if TYPE_CHECKING:
    from kvtally.agent.calibration import Calibration
    from kvtally.agent.steplaw.explained import Example
    from kvtally.agent.steplaw.machine import Machine

SYMBOLS = {
    "compute_efficiency": "eta",
    "attention_efficiency": "eta_a",
    "weight_bandwidth_efficiency": "e_w",
    "kv_bandwidth_efficiency": "e_kv",
    "step_seconds": "t_step",
    "gap_seconds": "t_gap",
    "launch_seconds": "t_launch",
    "sharpness": "p",
    "request_seconds": "t_request",
}
MEANINGS = {
    "compute_efficiency": "share of peak FLOP/s, linear layers",
    "attention_efficiency": "share of peak FLOP/s, attention",
    "weight_bandwidth_efficiency": "share of peak bytes/s, reading weights",
    "kv_bandwidth_efficiency": "share of peak bytes/s, reading KV; above 1 where decodes share a prefix's reading",
    "step_seconds": "of every step, on the GPU",
    "gap_seconds": "between two steps",
    "launch_seconds": "the least that a step with prefill takes",
    "sharpness": "how sharply compute hands over to bandwidth",
    "request_seconds": "of every request, before its prefill",
}
_STEP = 7  # decimal places of a step's seconds
_CONFIG = "the model's config.json"


def worked_request(example: Example, *, is_logged: bool) -> dict[str, Any]:
    """The request as JSON: its inputs, the step that decode would have taken, and its prefill with and without reuse.

    `is_logged`: its tokens stand in a log of requests, rather than being read off histograms.
    """
    prompt, reused = round(example.prompt_tokens), round(example.reused_tokens)
    inputs = Worked()
    how = {"basis": "MEASURED", "source": "the log of requests"}
    if not is_logged:
        how = {"basis": "MODELLED", "source": "a point of the histograms, coupling mixed"}
    inputs.given("n", "prompt tokens", prompt, 0, unit="tokens", **how)
    inputs.given("r", "of these, reused", min(reused, prompt - 1), 0, unit="tokens", **how)
    _model(inputs, example.machine)
    _hardware(inputs, example.machine, example.calibration)
    _law(inputs, example.calibration)
    _surroundings(inputs, example)
    decode = _decode(inputs)
    known = decode.printed()
    sides = [_prefill(known, example.machine, begin) for begin in (0.0, inputs["r"])]
    total = Worked()
    for name, words, (steps, seconds) in zip(("PF_0", "PF_r"), ("PF(n, 0)", "PF(n, r)"), sides, strict=True):
        summed = f"what its {len(steps)} steps add" if len(steps) > 1 else "what its step adds"
        total.given(name, f"{words}: {summed}", float(seconds), _STEP, unit="s", basis="MODELLED")
    total.result("avoided", "what its reuse avoided", "PF_0 - PF_r", _STEP, unit="s", basis="MODELLED")
    return {
        "window": {"start": utc_text(example.start_ns), "end": utc_text(example.end_ns)},
        "prompt_tokens": prompt,
        "reused_tokens": reused,
        "calibration": example.calibration.id,
        "inputs": inputs.as_json(),
        "decode": decode.as_json(),
        "without_reuse": {"steps": sides[0][0], "seconds": sides[0][1]},
        "as_it_was": {"steps": sides[1][0], "seconds": sides[1][1]},
        "total": total.as_json(),
        "unrounded_seconds": example.avoided,
    }


def _model(inputs: Worked, machine: Machine) -> None:
    shape = machine.shape
    about = {"basis": "MEASURED", "source": _CONFIG}
    inputs.given("P", "parameters that a token multiplies with", shape.linear_parameters, 0, **about)
    inputs.given("A", "attention: query token x context token", shape.attention_flop, 0, unit="FLOP", **about)
    inputs.given("kappa", "KV of a token", shape.kv_bytes_per_token, 0, unit="B", **about)
    words = "tokens that a step computes for nothing, half a tile"
    inputs.given("tile", words, tile_tokens(machine), 0, basis="ASSUMED")
    if shape.experts:
        inputs.given("V_d", "weights read by every step", shape.dense_weight_bytes, unit="B", **about)
        inputs.given("V_x", "weights of all routed experts", shape.expert_weight_bytes, unit="B", **about)
        inputs.given("E", "routed experts", shape.experts, 0, **about)
        inputs.given("k", "of them, a token is sent to", shape.experts_per_token, 0, **about)
    else:
        inputs.given("V", "weights read by every step", shape.dense_weight_bytes, unit="B", **about)
    if machine.gpus > 1:
        inputs.given("g", "GPUs", machine.gpus, 0, basis="MEASURED")
        inputs.given("L", "layers", shape.layers, 0, **about)
        inputs.given("H", "hidden size", shape.hidden, 0, **about)


def _hardware(inputs: Worked, machine: Machine, calibration: Calibration) -> None:
    gpu = gpu_of(calibration.fingerprint.sku)
    source = "order of magnitude of a small server" if gpu is None else gpu.source
    about = {"basis": "ASSUMED", "source": source}
    many = f", {machine.gpus} GPUs" if machine.gpus > 1 else ""
    inputs.given("Pi", f"peak, linear layers{many}", machine.flops, unit="FLOP/s", **about)
    inputs.given("Pi_a", f"peak, attention{many}", machine.attention_flops, unit="FLOP/s", **about)
    inputs.given("beta", f"peak of device memory{many}", machine.bandwidth, unit="B/s", **about)


def _law(inputs: Worked, calibration: Calibration) -> None:
    number = "not stored" if calibration.id is None else str(calibration.id)
    for name, median in zip(PARAMETERS, calibration.medians, strict=True):
        if name == "request_seconds":
            continue  # it comes once a request, reuse or not
        unit = "s" if name.endswith("_seconds") else ""
        source = f"calibration {number}"
        inputs.given(SYMBOLS[name], MEANINGS[name], median, unit=unit, basis="MODELLED", source=source)


def _surroundings(inputs: Worked, example: Example) -> None:
    """What the request met in its window."""
    counted = {"basis": "MODELLED", "source": "counters of the request's window"}
    clock = {"basis": "MEASURED" if example.machine.clock_mhz else "ASSUMED"}
    inputs.given("B", "most tokens of a step", example.machine.token_budget, 0, unit="tokens", basis="MEASURED")
    inputs.given("N", "decodes in a step", example.decodes, **counted)
    inputs.given("K", "context tokens that they read", example.context, unit="tokens", **counted)
    inputs.given("rho", "how likely decodes run at all", example.occupancy, **counted)
    inputs.given("m", "prefills that share a step, at most", example.packing, **counted)
    inputs.given("c_w", "SM clock in the window, of the peaks' own", example.window_clock, **clock)
    inputs.given("c_l", "SM clock under large chunks, the same", example.loaded_clock, basis="MODELLED")
    words = "tokens that a step leaves to prefill"
    inputs.result("room", words, f"max(B - rho * N, {LEAST_BUDGET:.0f})", 1, unit="tokens", basis="MODELLED")


def _bytes(tokens: str, known: Worked) -> str:
    """The weights that a step of so many tokens reads."""
    return "V" if "V" in known.printed() else f"(V_d + min(1, {tokens} * k / E) * V_x)"


def _dense(lines: Worked, tokens: str, clock: str) -> None:
    """The linear layers: FLOP, of half a tile more, and reading of weights overlap, all but where they are alike."""
    padded = f"({tokens} + tile)"
    lines.result("compute", "linear layers", f"2 * P * {padded} / (Pi * eta * {clock})", _STEP, unit="s")
    lines.result("reading", "weights' reading", f"{_bytes(tokens, lines)} / (beta * e_w)", _STEP, unit="s")
    lines.result("u", "the lesser over the greater", "min(compute, reading) / max(compute, reading)", _STEP)
    lines.result("dense", "the two together", "max(compute, reading) * (1 + u ^ p) ^ (1 / p)", _STEP, unit="s")


def _link(lines: Worked, tokens: str) -> str:
    """The all-reduces of several GPUs; what to add to a step's work for them."""
    if "g" not in lines.printed():
        return ""
    moved = f"{tokens} * 4 * H * (g - 1) / g / {LINK_BYTES_PER_SECOND / 1e9:.0f}e9"
    words = "all-reduces between GPUs"
    lines.result("link", words, f"2 * L * ({ALL_REDUCE_SECONDS * 1e6:.0f}e-6 + {moved})", _STEP, unit="s")
    return " + link"


def _decode(inputs: Worked) -> Worked:
    """The step that the decodes would have taken without the prefill."""
    lines = Worked(inputs.printed())
    _dense(lines, "N", "c_w")
    lines.result("kv", "KV's reading", "kappa * K / (beta * e_kv)", _STEP, unit="s")
    link = _link(lines, "N")
    lines.result("decode", "a step without prefill", f"dense + kv + t_step{link} + t_gap", _STEP, unit="s")
    lines.result("anyway", "of it, what would have run anyway", "rho * decode", _STEP, unit="s")
    return lines


def _prefill(known: dict[str, str], machine: Machine, begin: float) -> tuple[list[dict[str, Any]], str]:
    """The steps of a prefill from `begin` on, and the seconds that they add in all."""
    steps: list[dict[str, Any]] = []
    added = Worked()
    place = begin
    prompt = float(known["n"])
    while prompt - place > 0.5:  # noqa: PLR2004  # a token
        lines = Worked(known)
        lines.given("s", "tokens before the chunk", place, 1, unit="tokens")
        lines.result("q", "tokens of the chunk", "min(n - s, room)", 1, unit="tokens")
        lines.result("h", "prefills in its step", "max(1, min(room / max(q, 1), m))", 4)
        lines.result("T", "tokens of the step", "q * h + rho * N", 1, unit="tokens")
        lines.result("X", "query x context tokens", "q * (s + q / 2) * h", 0)
        is_small = lines["q"] < 0.5 * machine.token_budget
        lines.result("c", "clock: c_l from half of B on, else c_w", "c_w" if is_small else "c_l")
        _dense(lines, "T", "c")
        lines.result("attention", "attention", "A * X / (Pi_a * eta_a * c)", _STEP, unit="s")
        lines.result("kv", "decodes' reading of KV", "kappa * rho * K / (beta * e_kv)", _STEP, unit="s")
        link = _link(lines, "T")
        lines.result("works", "the GPUs work for", f"dense + attention + kv + t_step{link}", _STEP, unit="s")
        lines.result("takes", "the step takes", "max(works, t_launch) + t_gap", _STEP, unit="s")
        lines.result("adds", "the chunk adds", "(takes - anyway) / h", _STEP, unit="s")
        steps.append({"rows": lines.as_json()})
        added.given(f"adds_{len(steps)}", "", lines["adds"], _STEP)
        place += lines["q"]
    added.result("PF", "", " + ".join(added.printed()), _STEP)
    return steps, added.rows[-1].value
