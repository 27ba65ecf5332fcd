from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
import tomllib
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

import pytest

from kvtally.agent.cli.model_question import PRESETS
from kvtally.agent.cli.quantity import bytes_of, counts_of, shares_of
from kvtally.agent.hardware import SHORT_NAMES
from kvtally.agent.model_shape import shape_of
from kvtally.agent.render.chart import _Axis
from kvtally.agent.render.comma_separated import POINT_COLUMNS
from kvtally.agent.render.model import significant

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.command_line import Call

CONFIGS = Path(__file__).parent / "fixtures" / "model_configs"
SVG = "{http://www.w3.org/2000/svg}"
# the published number of parameters behind each name
PARAMETERS = {
    "llama-8b": 8.030e9,
    "llama-70b": 70.55e9,
    "llama-405b": 405.9e9,
    "mistral-7b": 7.248e9,
    "mixtral-8x7b": 46.70e9,
    "qwen2-5-7b": 7.616e9,
    "qwen2-5-72b": 72.71e9,
    "qwen3-8b": 8.191e9,
    "qwen3-32b": 32.76e9,
    "qwen3-30b-a3b": 30.53e9,
    "deepseek-v3": 671.0e9,
}
SEVENTY = ("model", "--model", "llama-70b", "--gpus", "4", "--parameters", "70.6e9")


def asked(call: Call, *arguments: str) -> dict[str, Any]:
    ran = call(*arguments, "--format", "json")
    assert (ran.status, ran.err) == (0, "")
    found = json.loads(ran.out)
    assert isinstance(found, dict)
    return found


def curves(report: dict[str, Any], key: str) -> dict[str, list[str]]:
    """The points of the last prompt length, with two places."""
    return {
        curve["backend"]: [f"{float(point[key]['point']):.2f}" for point in curve["points"]]
        for curve in report["prompts"][-1]["curves"]
    }


def test_every_name_is_the_model_that_it_says() -> None:
    presets = tomllib.loads((files("kvtally.agent") / PRESETS).read_text(encoding="utf-8"))
    counted = {name: shape_of(preset).total_parameters for name, preset in presets.items()}
    assert counted == pytest.approx(PARAMETERS, rel=0.001)


def test_the_methods_case_is_one_call(kvtally: Call) -> None:
    report = asked(kvtally, *SEVENTY, "--prompt", "128k", "--first-token-seconds", "0.15", "--gpu-price", "2.70")
    assert curves(report, "ttft_seconds") == {
        "no cache": ["22.02", "22.02", "22.02", "22.02"],
        "average storage": ["22.02", "17.10", "8.28", "5.39"],
        "fast storage": ["22.02", "14.69", "3.94", "0.57"],
        "DRAM": ["22.02", "14.58", "3.75", "0.36"],
        "lower bound": ["22.02", "14.48", "3.56", "0.15"],
    }
    assert report["model"]["kv_bytes_per_token"] == 327_680
    dram = next(store for store in report["stores"] if store["kind"] == "dram")
    assert (dram["price"], dram["price_hours"], dram["tokens_held"]) == ("781250.000000000", 26_298.0, 305_175_781)
    assert {row["prefix_tokens"]: f"{row['bytes_per_second']['point'] / 1e9:.2f}" for row in report["break_even"]} == {
        1: "5.05",
        1000: "4.99",
        128_000: "1.92",
    }


def test_the_methods_cost_is_one_call(kvtally: Call) -> None:
    report = asked(kvtally, *SEVENTY, "--prompt", "128k", "--gpu-price", "2.70")
    assert curves(report, "cost_per_100m_tokens") == {
        "no cache": ["51.37", "51.37", "51.37", "51.37"],
        "average storage": ["51.46", "39.90", "19.20", "12.43"],
        "fast storage": ["51.46", "34.24", "9.00", "1.10"],
        "DRAM": ["53.58", "35.40", "8.91", "0.64"],
        "lower bound": ["51.37", "33.69", "8.10", "0.12"],
    }
    dear = asked(kvtally, *SEVENTY, "--prompt", "128k", "--gpu-price", "5.40", "--replicas", "1000000")
    twice = dear["prompts"][0]["curves"][0]["points"][0]["cost_per_100m_tokens"]
    once = report["prompts"][0]["curves"][0]["points"][0]["cost_per_100m_tokens"]
    assert float(twice["point"]) == pytest.approx(2 * float(once["point"]), rel=1e-9)


def test_every_estimate_lies_in_its_range(kvtally: Call) -> None:
    report = asked(kvtally, "model", "--model", "llama-8b", "--reuse", "0,25,50,75,100")
    spans = [
        point[key]
        for prompt in report["prompts"]
        for curve in prompt["curves"]
        for point in curve["points"]
        for key in ("ttft_seconds", "cost_per_100m_tokens")
    ]
    spans += [row["bytes_per_second"] for row in report["break_even"]]
    assert len(spans) == 3 * 5 * 5 * 2 + 5
    assert all(float(span["low"]) <= float(span["point"]) <= float(span["high"]) for span in spans)


def test_a_model_is_read_from_its_config_or_its_folder(kvtally: Call, tmp_path: Path) -> None:
    config = CONFIGS / "deepseek-v3.json"
    (tmp_path / "config.json").write_bytes(config.read_bytes())
    by_file, by_folder, by_name = (
        asked(kvtally, "model", "--model", name, "--gpu", "H200", "--gpus", "8")
        for name in (str(config), str(tmp_path), "deepseek-v3")
    )
    assert by_file["prompts"] == by_folder["prompts"] == by_name["prompts"]
    assert by_file["model"]["active_parameters"] == pytest.approx(37.55e9, rel=0.001)
    assert any("latent attention" in finding for finding in by_file["findings"])


def test_types_that_the_engine_is_told_go_before_the_config(kvtally: Call) -> None:
    report = asked(kvtally, "model", "--model", "llama-8b", "--kv-dtype", "fp8", "--quantization", "fp8")
    assert report["model"]["kv_bytes_per_token"] == 65_536
    assert report["model"]["weight_bytes"] == 8_030_261_248


def test_every_input_says_where_it_comes_from(kvtally: Call) -> None:
    report = asked(kvtally, *SEVENTY, "--storage", "mine=40GB/s,$145/TB-month", "--first-token-seconds", "0.2")
    basis = {each["name"]: each["basis"] for each in report["inputs"]}
    assert {basis[name] for name in ("GPU", "parameters of a token", "mine", "t0, beside prefill and load")} == {
        "GIVEN"
    }
    assert {basis[name] for name in ("model", "KV of a token", "peak of a GPU")} == {"SOURCE"}
    assert {basis[name] for name in ("compute efficiency", "DRAM", "price of a GPU", "all-reduces")} == {"ASSUMED"}
    assert set(basis.values()) == {"GIVEN", "SOURCE", "ASSUMED"}
    assert report["basis"] == {
        "ttft": "MODELLED",
        "break_even": "MODELLED",
        "cost": "ASSUMED",
        "claims": "MODELLED",
    }


def test_a_datasheet_that_was_not_read_is_an_assumption(kvtally: Call) -> None:
    def basis(gpu: str) -> list[str]:
        inputs = asked(kvtally, "model", "--model", "llama-8b", "--gpu", gpu)["inputs"]
        return [each["basis"] for each in inputs if each["name"] == "peak of a GPU"]

    assert (basis("A100"), basis("GH200")) == (["SOURCE"], ["ASSUMED"])


def test_prices_and_lives_of_ones_own_are_no_assumption(kvtally: Call) -> None:
    own = ("--storage", "s=8GB/s,300/TB", "--dram", "d=200GB/s,1000/128GB", "--gpu-price", "2")
    assert asked(kvtally, *SEVENTY, *own)["basis"]["cost"] == "ASSUMED"
    assert asked(kvtally, *SEVENTY, *own, "--life-years", "4")["basis"]["cost"] == "MODELLED"


def test_an_owned_gpu_has_the_price_of_its_capital(kvtally: Call) -> None:
    report = asked(kvtally, *SEVENTY, "--owned", "38750", "--watts", "700")
    (price,) = (each for each in report["inputs"] if each["name"] == "price of a GPU")
    assert (price["value"], price["basis"]) == ("1.5740 an hour", "ASSUMED")
    assert "bought for 38750, 5 years at 8%" in price["source"]


def test_a_gpu_without_a_price_has_times_and_no_money(kvtally: Call) -> None:
    report = asked(kvtally, "model", "--model", "llama-8b", "--gpu", "MI300X")
    assert report["basis"]["cost"] is None
    assert report["prompts"][0]["curves"][0]["points"][0]["cost_per_100m_tokens"] is None
    assert all(row["reuses"] is None for row in report["reuses_per_month"])
    assert any("give --gpu-price or --owned" in finding for finding in report["findings"])
    table = kvtally("model", "--model", "llama-8b", "--gpu", "MI300X", "--format", "table").out
    assert "per 100M tokens by reuse" not in table
    assert "unknown" in table


def test_a_model_that_does_not_fit_is_said_to_be_scaled(kvtally: Call) -> None:
    report = asked(kvtally, "model", "--model", "llama-70b")
    assert any("do not fit into 1 x NVIDIA H100" in each and "--gpus 2" in each for each in report["findings"])
    slow = asked(kvtally, "model", "--model", "llama-70b", "--gpus", "8")
    assert any(each == "slower than computing at some prompt length: average storage" for each in slow["findings"])


def test_range_all_reduce_and_overlap_change_what_they_should(kvtally: Call) -> None:
    def none_and_full(*more: str) -> tuple[float, float]:
        report = asked(kvtally, *SEVENTY, "--prompt", "32k", "--reuse", "0,100", *more)
        return tuple(point["ttft_seconds"]["point"] for point in report["prompts"][0]["curves"][1]["points"])

    plain = none_and_full()
    assert none_and_full("--all-reduce")[0] > plain[0]
    assert none_and_full("--efficiency", "0.8")[0] < plain[0]
    assert none_and_full("--attention-efficiency", "0.2,0.3,0.4")[0] > plain[0]
    assert none_and_full("--parameters", "linear")[0] < plain[0]
    assert none_and_full("--overlap")[1] < plain[1]
    report = asked(kvtally, *SEVENTY, "--efficiency", "0.5", "--attention-efficiency", "0.5", "--prompt", "128k")
    span = report["prompts"][0]["curves"][0]["points"][0]["ttft_seconds"]
    assert span["low"] == span["point"] == span["high"] == pytest.approx(20.04, abs=0.01)


@pytest.mark.parametrize("columns", [80, 110])
def test_the_answer_is_shown_as_a_table(
    columns: int, kvtally: Call, monkeypatch: pytest.MonkeyPatch, golden: Callable[[str, str], None]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    ran = kvtally(*SEVENTY, "--gpu-price", "2.70", "--prompt", "8k,128k", "--format", "table")
    assert (ran.status, ran.err) == (0, "")
    golden(f"model-{columns}.txt", ran.out)
    assert max(len(line) for line in ran.out.splitlines()) <= columns


def test_the_curves_are_rows_of_figures(kvtally: Call) -> None:
    ran = kvtally(*SEVENTY, "--prompt", "8k", "--reuse", "0,100", "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(ran.out)))
    assert [*rows[0]] == [*POINT_COLUMNS]
    assert len(rows) == 5 * 2
    assert rows[3]["backend"] == "average storage"
    assert rows[3]["reuse"] == "1.0"
    assert float(rows[3]["ttft_seconds.point"]) == pytest.approx(0.05 + 7999 * 327_680 / 8e9, abs=2e-4)
    assert (rows[3]["ttft_basis"], rows[3]["cost_basis"], rows[3]["currency"]) == ("MODELLED", "ASSUMED", "USD")


def drawn(call: Call, folder: Path, *arguments: str) -> ET.Element:
    path = folder / "chart.svg"
    assert call("model", "--model", "llama-70b", *arguments, "--svg", str(path), "--format", "csv").status == 0
    return ET.fromstring(path.read_text(encoding="utf-8"))


def texts(root: ET.Element) -> list[str]:
    return ["".join(each.itertext()) for each in root.iter(f"{SVG}text")]


def test_the_chart_has_axes_units_legend_inputs_and_sources(kvtally: Call, tmp_path: Path) -> None:
    root = drawn(kvtally, tmp_path, "--gpus", "4", "--prompt", "8k,128k")
    shown = texts(root)
    assert shown.count("time to first token (s), MODELLED") == 2
    assert shown.count("USD per 100M tokens, prices ASSUMED") == 2
    assert shown.count("reused share of the prompt (%)") == 4
    assert shown.count("128,000 prompt tokens") == 2
    assert {"no cache", "average storage", "fast storage", "DRAM", "lower bound"} <= set(shown)
    caption = " ".join(shown)
    for words in ("compute efficiency: 0.55 (0.40 to 0.70) of the peak (ASSUMED)", "Sources:", "RunPod"):
        assert words in caption
    assert len([each for each in root.iter(f"{SVG}path") if each.get("class") == "curve"]) == 5 + 4 * 5


def test_every_curve_stays_inside_its_frame(kvtally: Call, tmp_path: Path) -> None:
    root = drawn(kvtally, tmp_path, "--gpus", "4", "--prompt", "8k")
    for panel in root.iter(f"{SVG}g"):
        (frame,) = panel.iter(f"{SVG}rect")
        width, height = float(frame.get("width", "")), float(frame.get("height", ""))
        paths = [each.get("d", "") for each in panel.iter(f"{SVG}path") if "," in each.get("d", "")]
        assert len(paths) == 10
        for path in paths:
            points = [pair.split(",") for pair in path.strip("Mz").split()]
            assert all(0 <= float(x) <= width and 0 <= float(y) <= height for x, y in points)


# 21.92 s without a cache, at 230 x log(ceiling/value) / log(ceiling/floor) pixels
def test_a_value_lies_where_its_logarithm_puts_it() -> None:
    axis = _Axis(0.01, 100.0)
    assert [axis.place(each) for each in (100.0, 1.0, 0.01)] == pytest.approx([0, 115, 230])
    assert axis.ticks() == pytest.approx([0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100])
    assert _Axis(1, 10).ticks() == [1, 2, 5, 10]


def test_names_cannot_break_out_of_the_chart(kvtally: Call, tmp_path: Path) -> None:
    root = drawn(kvtally, tmp_path, "--storage", "</text><b>&\x1b[2J=8GB/s,$300/TB")
    assert "</text><b>&?[2J" in texts(root)
    assert [each.tag for each in root.iter() if each.tag.endswith("b")] == []


def test_without_a_price_the_chart_shows_times_alone(kvtally: Call, tmp_path: Path) -> None:
    for more in (("--gpu", "MI300X"), ("--gpu-price", "0")):
        shown = texts(drawn(kvtally, tmp_path, *more))
        assert "time to first token (s), MODELLED" in shown
        assert not any("100M tokens" in each for each in shown)


def test_many_stores_keep_their_colours_apart(kvtally: Call, tmp_path: Path) -> None:
    stores = [f"s{number}={number + 1}GB/s,$300/TB" for number in range(12)]
    root = drawn(kvtally, tmp_path, *(word for store in stores for word in ("--storage", store)), "--prompt", "8k")
    (first, *_) = root.iter(f"{SVG}g")
    curves = [each for each in first.iter(f"{SVG}path") if each.get("class") == "curve"]
    looks = {(each.get("stroke"), each.get("stroke-dasharray")) for each in curves}
    assert len(looks) == len(curves) == 15


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--model", "gpt-9"), "'gpt-9' is neither a config.json nor one of llama-8b, "),
        (
            ("--model", str(CONFIGS / "gpt-oss-20b.json")),
            "the formulas of GptOssForCausalLM are unknown (only decoders",
        ),
        (("--model", str(CONFIGS / "bamba-9b.json")), "the formulas of BambaForCausalLM are unknown"),
        (("--model", str(CONFIGS / "mistral-7b-v0.1.json")), "with a sliding window of 4096 tokens"),
        (("--model", str(CONFIGS / "README.md")), "no JSON"),
        (("--model", "llama-8b", "--kv-dtype", "fp3"), "KV cache of type 'fp3'"),
        (("--model", "llama-8b", "--gpu", "H1000"), "--gpu 'H1000' is not in the table: H100, "),
        (("--model", "llama-8b", "--gpus", "0"), "--gpus"),
        (("--model", "llama-8b", "--prompt", "1"), "--prompt '1' is no number of tokens from 2"),
        (("--model", "llama-8b", "--prompt", "8k,"), "--prompt ''"),
        (("--model", "llama-8b", "--prompt", "99999999999999999999"), "is no number of tokens"),
        (("--model", "llama-8b", "--reuse", "0,101"), "reuse lies between 0 and 100"),
        (("--model", "llama-8b", "--reuse", "nan"), "not finite"),
        (("--model", "llama-8b", "--reuse", "a"), "write numbers with commas"),
        (("--model", "llama-8b", "--storage", "x"), "write NAME=8GB/s,$300/TB"),
        (("--model", "llama-8b", "--storage", "=8GB/s,$300/TB"), "write NAME=8GB/s,$300/TB"),
        (("--model", "llama-8b", "--storage", "x=8Gb/s,$300/TB"), "'8Gb' is no number of bytes"),
        (("--model", "llama-8b", "--storage", "x=8GB,$300/TB"), "'8GB' is no bandwidth"),
        (("--model", "llama-8b", "--storage", "x=0GB/s,$300/TB"), "no size that can be had"),
        (("--model", "llama-8b", "--storage", "x=8GB/s,$300"), "is no price of a size"),
        (("--model", "llama-8b", "--storage", "x=8GB/s,$-300/TB"), "-300"),
        (("--model", "llama-8b", "--storage", "x=8GB/s,$3/TB,5"), "'5' is no latency"),
        (("--model", "llama-8b", "--storage", "DRAM=8GB/s,$3/TB"), "two stores have the same name"),
        (("--model", "llama-8b", "--capacity", "lots"), "--capacity 'lots' is no number of bytes"),
        (("--model", "llama-8b", "--life-years", "0"), "--life-years 0 must be more than 0"),
        (("--model", "llama-8b", "--gpu-price", "two"), "--gpu-price: 'two' is not a number"),
        (("--model", "llama-8b", "--gpu-price", "2", "--owned", "30000"), "give one of them"),
        (("--model", "llama-8b", "--owned", "30000", "--years", "0"), "years"),
        (("--model", "llama-8b", "--efficiency", "1.5"), "--efficiency 1.5 must be more than 0 and at most 1"),
        (("--model", "llama-8b", "--efficiency", "0.7,0.5,0.4"), "LOW,POINT,HIGH"),
        (("--model", "llama-8b", "--parameters", "all"), "write active, linear or a number"),
        (("--model", "llama-8b", "--parameters", "-1"), "must be more than 0"),
        (("--model", "llama-8b", "--first-token-seconds", "nan"), "nan"),
        (("--model", "llama-8b", "--currency", "dollars"), "no ISO 4217 code"),
    ],
)
def test_a_wrong_call_is_told_in_one_line(kvtally: Call, arguments: tuple[str, ...], said: str) -> None:
    ran = kvtally("model", *arguments)
    assert (ran.status, ran.out) == (2, "")
    assert said in ran.err
    assert ran.err.count("\n") == 1


def test_a_chart_that_cannot_be_written_is_no_traceback(kvtally: Call, tmp_path: Path) -> None:
    ran = kvtally("model", "--model", "llama-8b", "--svg", str(tmp_path / "none" / "chart.svg"))
    assert (ran.status, ran.out) == (3, "")
    assert ran.err.count("\n") == 1


def test_a_config_of_another_size_or_kind_is_refused(kvtally: Call, tmp_path: Path) -> None:
    for content, said in (
        (b"[]", "not the config.json of a model"),
        (b" " * (1 << 20) + b"{}", "no JSON"),
        (b"{}", "unknown"),
    ):
        (tmp_path / "config.json").write_bytes(content)
        ran = kvtally("model", "--model", str(tmp_path))
        assert (ran.status, ran.err.count("\n")) == (2, 1)
        assert said in ran.err


@pytest.mark.parametrize(
    ("text", "expected"),
    [("100TB", 10**14), ("128GB", 128 * 10**9), ("64GiB", 64 * 2**30), ("TB", 10**12), ("1.5 kB", 1500), ("7B", 7)],
)
def test_sizes_are_read_as_they_are_written(text: str, expected: int) -> None:
    assert bytes_of("--capacity", text) == expected


def test_lists_are_put_in_order_and_without_doubles() -> None:
    assert counts_of("--prompt", "8k,128000,8000", 10**6) == (8000, 128_000)
    assert shares_of("--reuse", "100%,0,50,50") == (0.0, 0.5, 1.0)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.0, "0"),
        (22.015, "22.0"),
        (0.05, "0.0500"),
        (1234.5, "1,234"),
        (-0.4654, "-0.465"),
        (None, "-"),
        (1e-15, "0.000000000"),
    ],
)
def test_figures_have_three_digits(value: float | None, expected: str) -> None:
    assert significant(value) == expected


def test_help_loads_neither_tables_nor_arithmetic() -> None:
    program = (
        "import sys\n"
        "from kvtally.agent.cli import main\n"
        "try:\n    main(['model', '--help'])\n"
        "except SystemExit:\n    print('LOADED', *sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.rpartition("LOADED ")[2].split())
    assert loaded & {"numpy", "rich", "sqlalchemy", "msgspec", "kvtally.agent.hardware"} == set()
    assert "kvtally.agent.cli.model" in loaded


def test_every_gpu_of_the_table_can_be_asked_for(kvtally: Call) -> None:
    for name in SHORT_NAMES:
        assert asked(kvtally, "model", "--model", "llama-8b", "--gpu", name, "--prompt", "1k")["model"]["gpus"] == 1
