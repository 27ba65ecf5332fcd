from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
BOARD: dict[str, Any] = json.loads((ROOT / "deploy/grafana/kvtally.json").read_text(encoding="utf-8"))
ASKED = {
    f"{panel['title']}: {target['refId']}": target["expr"]
    for panel in BOARD["panels"]
    if panel["type"] != "row"
    for target in panel["targets"]
}
IN_THE_DOCUMENTS = re.findall(
    r"```\n(sum by \(model, currency\).*?)```", (ROOT / "docs/grafana.md").read_text(encoding="utf-8"), re.DOTALL
)
CHOSEN = {"window": "1h", "__range": "1h", "__rate_interval": "1h", "currency": "USD"}
WHO = {
    "@a": 'job="k", instance="10.0.0.1:9478", node="n"',
    "@b": 'job="k", instance="10.0.0.2:9478", node="n"',
    "@c": 'job="k", instance="host:9478"',
    "@usd": 'window="1h", currency="USD"',
    "@eur": 'window="1h", currency="EUR"',
}
# An hour of two kvtallys on one node that meter the model m, 1000 and 500 tokens a minute; of a third elsewhere, whose
# replica of m nobody asks; and of a model that is paid in another currency. The node's GPU and disk are seen by both.
FLEET = """
kvtally_cost_per_million_tokens{@a, @usd, model="m", view="fully_loaded", tokens="total", basis="ASSUMED"} 2x60
kvtally_cost_per_million_tokens{@a, @usd, model="m", view="fully_loaded", tokens="input", basis="ASSUMED"} 1x60
kvtally_cost_per_million_tokens{@a, @usd, model="m", view="fully_loaded", tokens="output", basis="ASSUMED"} 8x60
kvtally_cost_per_million_tokens{@a, @usd, model="m", view="fully_loaded", tokens="input_cached_hbm"} 3x60
kvtally_cost_per_million_tokens{@a, @usd, model="m", view="active", tokens="total", basis="ASSUMED"} 1x60
kvtally_cost_per_hour{@a, @usd, model="m"} 0.25x60
kvtally_reuse_ratio{@a, model="m", window="1h"} 0.75x60
kvtally_prompt_tokens_total{@a, model="m", replica="a", source="computed"} 7+200x60
kvtally_prompt_tokens_total{@a, model="m", replica="a", source="hbm"} 7+600x60
kvtally_generated_tokens_total{@a, model="m", replica="a"} 7+200x60
kvtally_ledger_cached_tokens{@a, model="m", replica="a", tier="hbm"} 7+600x60
kvtally_watched_seconds_total{@a, model="m", replica="a"} 7+60x60

kvtally_cost_per_million_tokens{@b, @usd, model="m", view="fully_loaded", tokens="total", basis="MEASURED"} 5x60
kvtally_cost_per_million_tokens{@b, @usd, model="m", view="fully_loaded", tokens="input", basis="ASSUMED"} 6x60
kvtally_cost_per_million_tokens{@b, @usd, model="m", view="active", tokens="total", basis="MEASURED"} 4x60
kvtally_cost_per_hour{@b, @usd, model="m"} 0.5x60
kvtally_reuse_ratio{@b, model="m", window="1h"} 0x60
kvtally_prompt_tokens_total{@b, model="m", replica="b", source="computed"} 9+200x60
kvtally_generated_tokens_total{@b, model="m", replica="b"} 9+300x60
kvtally_watched_seconds_total{@b, model="m", replica="b"} 9+60x60

kvtally_cost_per_hour{@c, @usd, model="m"} 0.09x60
kvtally_generated_tokens_total{@c, model="m", replica="c"} 50x60
kvtally_watched_seconds_total{@c, model="m", replica="c"} 9+60x60

kvtally_cost_per_million_tokens{@a, @eur, model="other", view="fully_loaded", tokens="total", basis="MEASURED"} 3x60
kvtally_generated_tokens_total{@a, model="other", replica="d"} 0+10x60

kvtally_savings_amount{@a, @usd, model="m", measure="net", bound="low"} 2x60
kvtally_savings_amount{@b, @usd, model="m", measure="net", bound="low"} 1x60
kvtally_savings_amount{@a, @eur, model="other", measure="net", bound="low"} 8x60

kvtally_gpu_energy_joules_total{@a, gpu="GPU-1", sku="H"} 5+600x60
kvtally_gpu_energy_joules_total{@b, gpu="GPU-1", sku="H"} 1+600x60
kvtally_gpu_energy_joules_total{@c, gpu="GPU-2", sku="H"} 5+60x60
kvtally_filesystem_read_bytes_total{@a, filesystem="vda", source="diskstats", side="device"} 3+120x60
kvtally_filesystem_read_bytes_total{@b, filesystem="vda", source="diskstats", side="device"} 1+120x60
kvtally_filesystem_read_bytes_total{@c, filesystem="vda", source="diskstats", side="device"} 3+240x60
"""
TOLD: dict[str, dict[str, float]] = {
    # (2 x 60,000 + 5 x 30,000 + 90,000 for the idle hour) / 90,000; 3 of one alone
    "Cost of a million tokens: A": {
        '{model="m", currency="USD", basis="ASSUMED"}': 4,
        '{model="other", currency="EUR", basis="MEASURED"}': 3,
    },
    "Cost of an hour: A": {'{model="m", currency="USD"}': 0.84},
    # three quarters of 800 prompt tokens a minute, and none of 200
    "Reused prompt tokens: A": {'{model="m"}': 0.6},
    # (1 x 800 + 6 x 200) / 1000
    "Cost of a million tokens: total, input, output: B": {
        '{model="m", tokens="input", view="fully_loaded", basis="ASSUMED", currency="USD"}': 2
    },
    "Cost of a million tokens: total, input, output: C": {
        '{model="m", tokens="output", view="fully_loaded", basis="ASSUMED", currency="USD"}': 8
    },
    "Cost of a million prompt tokens: computed, or cached by tier: B": {
        '{model="m", tokens="input_cached_hbm", view="fully_loaded", currency="USD"}': 3
    },
    "Fully loaded, and active time alone: B": {
        '{model="m", tokens="total", view="active", basis="ASSUMED", currency="USD"}': 1,
        '{model="m", tokens="total", view="active", basis="MEASURED", currency="USD"}': 4,
    },
    "Net saving in the window ($currency): A": {'{bound="low"}': 3},
    "GPU energy, in the time range shown: A": {"{}": 39600},
    "Storage read bandwidth: A": {
        '{host="n", filesystem="vda", side="device"}': 2,
        '{host="host", filesystem="vda", side="device"}': 4,
    },
}


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not here (apt install prometheus)")
def test_several_kvtallys_are_one_fleet_and_one_is_what_it_says(tmp_path: Path) -> None:
    (in_the_documents,) = IN_THE_DOCUMENTS
    asked = [(ASKED[name], told) for name, told in TOLD.items()]
    # without the idle hour: (2 x 60,000 + 5 x 30,000) / 90,000
    asked.append((in_the_documents, {'{model="m", currency="USD"}': 3, '{model="other", currency="EUR"}': 3}))
    cases = [
        {
            "expr": re.sub(r"\$([a-z_]\w*)", lambda found: CHOSEN.get(found[1], ".*"), expr),
            "eval_time": "1h",
            "exp_samples": [{"labels": labels, "value": value} for labels, value in told.items()],
        }
        for expr, told in asked
    ]
    series = [dict(zip(("series", "values"), line.rsplit(" ", 1), strict=True)) for line in _lines()]
    test = {"interval": "1m", "input_series": series, "promql_expr_test": cases}
    (tmp_path / "test.yml").write_text(json.dumps({"rule_files": [], "tests": [test]}), encoding="utf-8")
    command = ["promtool", "test", "rules", "test.yml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def _lines() -> list[str]:
    return [re.sub(r"@[a-z]+", lambda found: WHO[found[0]], line) for line in FLEET.splitlines() if line]
