from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from shutil import copytree
from typing import TYPE_CHECKING, Any

import pytest
from tests.ledgers import new_ledger, reader_of

from kvtally.agent.config import Engine, Labels
from kvtally.agent.config_file import ConfigError
from kvtally.agent.engine_recording import EngineRecording, meta_of
from kvtally.agent.ledger.append import LedgerWriter
from kvtally.agent.ledger.observed import observed
from kvtally.agent.ledger.place import connect
from kvtally.agent.recording import open_recording
from kvtally.agent.replay import Replay, about_of
from kvtally.agent.replica import About

if TYPE_CHECKING:
    from kvtally.agent.observed import Observed
    from kvtally.agent.replay import Replayed

MODEL = {"architecture": "LlamaForCausalLM", "num_hidden_layers": 32, "weight_dtype": "bfloat16"}
SHAPE = '{"architecture":"LlamaForCausalLM","kv_dtype":"bfloat16","num_hidden_layers":32,"weight_dtype":"bfloat16"}'


def facts(**meta: Any) -> dict[str, str]:
    return dict(about_of(meta).facts)


def test_a_recording_tells_how_its_engine_was_run() -> None:
    told = '{"kv_connector":"LMCacheConnectorV1"}'
    arguments = ["--max-num-batched-tokens", "2048", "--enforce-eager", "-tp", "2", "--kv-transfer-config", told]
    about = about_of({"model": MODEL, "engine_args": arguments, "gpus": [], "gpus_per_replica": 0})
    assert about.facts == {
        "shape": SHAPE,
        "token_budget": "2048",
        "tensor_parallel": "2",
        "eager": "1",
        "connector": "LMCacheConnectorV1",
    }
    assert (about.gpus, about.per_replica, about.mapping) == ((), None, "recorded")


def test_a_recording_that_does_not_know_its_gpus_tells_how_its_engine_was_run_all_the_same() -> None:
    about = about_of({"model": MODEL, "gpus": None})
    assert (about.gpus, about.facts) == (None, {"shape": SHAPE})


def test_options_choose_other_types_than_the_model_has() -> None:
    told = json.loads(facts(model=MODEL, engine_args=["--kv-cache-dtype=fp8"])["shape"])
    assert (told["weight_dtype"], told["kv_dtype"]) == ("bfloat16", "fp8")


@pytest.mark.parametrize("model", [None, 7, "llama", [MODEL], {}, {"num_hidden_layers": "many"}, {"name": "llama"}])
def test_a_model_that_is_nonsense_is_no_shape(model: object) -> None:
    assert facts(model=model, engine_args=None) == {}


@pytest.mark.parametrize("arguments", [None, "--enforce-eager", {"--enforce-eager": 1}, [7, None, ["-tp", "2"]]])
def test_arguments_that_are_nonsense_tell_nothing(arguments: object) -> None:
    assert facts(model=MODEL, engine_args=arguments) == {"shape": SHAPE}


@pytest.mark.parametrize(
    ("connector", "told"),
    [("MultiConnector", "MultiConnector"), (None, "A"), ("", "A"), ("x y", "A"), (7, "A"), ("B" * 201, "A")],
)
def test_a_connector_that_the_recorders_config_gave_goes_before_the_arguments(connector: object, told: str) -> None:
    arguments = ["--kv-transfer-config", '{"kv_connector":"A"}']
    assert facts(connector=connector, engine_args=arguments) == {"connector": told}


@pytest.mark.parametrize(
    ("budget", "told"),
    [(4096, "4096"), (None, "2048"), (True, "2048"), (0, "2048"), ("4096", "2048"), (10**30, "2048")],
)
def test_a_budget_that_the_recorders_config_gave_goes_before_the_arguments(budget: object, told: str) -> None:
    assert facts(token_budget=budget, engine_args=["--max-num-batched-tokens", "2048"]) == {"token_budget": told}


# -- what the config says of it


def test_what_config_says_of_the_recorded_engine_goes_before_the_recording(tmp_path: Path) -> None:
    config = {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 80, "torch_dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    meta = {
        "model": MODEL,
        "engine_args": ["--kv-cache-dtype=fp8", "--max-num-batched-tokens", "2048"],
        "gpus": [{"uuid": "GPU-1", "name": "NVIDIA H100"}],
        "labels": {"tenant": "a", "cluster": "b"},
    }
    given = Engine(
        url="http://on",
        name="on",
        model_config=str(tmp_path),
        token_budget=4096,
        kv_dram_gib=64,
        labels=Labels("", "", "c"),
    )
    about = about_of(meta, given)
    told = json.loads(about.facts["shape"])
    assert (told["num_hidden_layers"], told["kv_dtype"], about.facts["token_budget"]) == (80, "fp8", "4096")
    assert (about.gpus, about.mapping, about.sku) == (("GPU-1",), "recorded", "NVIDIA H100")
    assert (about.dram_gib, about.labels) == ("64.000000000", {"tenant": "c", "cluster": "b"})
    named = about_of(meta, Engine(url="http://on", name="on", gpus=("GPU-2",)))
    assert (named.gpus, named.mapping, json.loads(named.facts["shape"])["num_hidden_layers"]) == (
        ("GPU-2",),
        "config",
        32,
    )


def test_a_model_config_that_is_none_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model_config: .* is no config\.json of a model"):
        about_of({"model": MODEL}, Engine(url="http://on", name="on", model_config=str(tmp_path)))


# -- pages beside the engine's

RECORDING = Path(__file__).parent / "fixtures" / "recordings" / "lmcache-mp-dram-disk"
SECOND = 1_000_000_000


def replayed(folder: Path, ledger: str, interval_ns: int = 0) -> Replayed:
    with closing(LedgerWriter(connect(ledger), ledger)) as writer:
        return Replay(open_recording(folder), writer, interval_ns=interval_ns).run()


def looked_at(ledger: str) -> Observed:
    with closing(reader_of(ledger)) as reader:
        return observed(reader, 0, 2**62, reader.targets(), "lmcache-mp-dram-disk/0")


def total(found: Observed, name: str) -> int:
    return sum(one.row.value(name) or 0 for one in found.rows)


@pytest.mark.parametrize("interval_ns", [0, 10 * SECOND])
def test_an_lmcache_server_that_was_recorded_beside_its_engine_is_a_cache_behind_it(
    tmp_path: Path, interval_ns: int
) -> None:
    ledger = new_ledger(tmp_path)
    done = replayed(RECORDING, ledger, interval_ns)
    assert (done.unread, done.findings) == (0, ())
    found = looked_at(ledger)
    # what the driver sent and was told, of all 104 requests: 92,109 prompt tokens, 44,544 of them cached
    assert total(found, "prompt_tokens") == 92_109
    assert (total(found, "hbm_tokens"), total(found, "external_tokens")) == (39_168, 5_376)
    ((name, spans),) = found.caches.items()
    assert name == "lmcache-mp-dram-disk/lmcache_mp"
    assert sum(one.dram_hit_tokens or 0 for one in spans) == 33_792
    assert sum(one.disk_hit_tokens or 0 for one in spans) == 9_984
    assert len(spans) == 3


def test_a_page_beside_the_engines_that_nobody_reads_is_counted_and_stops_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "lmcache-mp-dram-disk"
    copytree(RECORDING, folder)
    for page in (folder / "lmcache").iterdir():
        page.write_text("some_other_server_total 7\n")
    ledger = new_ledger(tmp_path)
    done = replayed(folder, ledger)
    assert (done.pages, done.unread) == (4, 4)
    assert total(looked_at(ledger), "prompt_tokens") == 92_109


def test_a_cache_that_the_engines_own_page_tells_is_not_told_twice(tmp_path: Path) -> None:
    folder = tmp_path / "lmcache-mp-dram-disk"
    copytree(RECORDING, folder)
    # as where PROMETHEUS_MULTIPROC_DIR is set and LMCache's internal API is asked too: the port is one worker's
    for number, page in enumerate(sorted((folder / "vllm").iterdir())):
        page.write_text(f'{page.read_text()}lmcache:num_hit_tokens_total{{model_name="m"}} {100 * number}\n')
    for number, page in enumerate(sorted((folder / "lmcache").iterdir())):
        page.write_text(f'lmcache:num_hit_tokens_total{{model_name="m"}} {90 * number}\n')
    ledger = new_ledger(tmp_path)
    assert replayed(folder, ledger).unread == 0
    ((name, spans),) = looked_at(ledger).caches.items()
    assert (name, sum(one.loaded_tokens or 0 for one in spans)) == ("lmcache-mp-dram-disk/lmcache", 300)


def test_a_cache_that_had_counted_nothing_yet_is_read_from_where_it_begins(tmp_path: Path) -> None:
    folder = tmp_path / "lmcache-mp-dram-disk"
    copytree(RECORDING, folder)
    first, *_ = sorted((folder / "lmcache").iterdir())
    first.write_text('python_info{version="3.11.7"} 1.0\n')
    ledger = new_ledger(tmp_path)
    done = replayed(folder, ledger)
    assert (done.unread, [one for one in done.findings if one.kind == "scrapes_failed"]) == (0, [])
    assert list(looked_at(ledger).caches) == ["lmcache-mp-dram-disk/lmcache_mp"]
    with closing(connect(ledger)) as connection:
        looked_up = connection.execute("SELECT lookup_tokens FROM cache_interval ORDER BY start_ns").fetchall()
    assert looked_up[0] == (4096,)  # its second page: all of it came since the first


def test_an_hour_in_which_a_cache_drops_events_is_told_of_once(tmp_path: Path) -> None:
    folder = tmp_path / "lmcache-mp-dram-disk"
    copytree(RECORDING, folder)
    for number, page in enumerate(sorted((folder / "lmcache").iterdir())):
        lines = (one for one in page.read_text().splitlines() if "lmcache_mp_event_bus_dropped" not in one)
        page.write_text("\n".join([*lines, f"lmcache_mp_event_bus_dropped_events_total {number * 5}.0", ""]))
    ledger = new_ledger(tmp_path)
    done = replayed(folder, ledger)
    assert [(one.kind, one.target) for one in done.findings] == [
        ("cache_events_dropped", "cache/lmcache-mp-dram-disk/lmcache_mp")
    ]
    with closing(connect(ledger)) as connection:
        assert connection.execute("SELECT kind FROM finding").fetchall() == [("cache_events_dropped",)]


def test_counts_of_a_cache_begin_at_its_first_page_however_pages_fall(tmp_path: Path) -> None:
    recording = EngineRecording(tmp_path / "m", meta_of("m", "10.0.0.1:8000", About(), {}, 10**18))
    # the cache's 2nd and 3rd page lie between two of the engine's
    for number, (at_seconds, source) in enumerate([(0, "vllm"), (1, "lmcache"), (4, "lmcache"), (5, "vllm")]):
        line = "vllm:prompt_tokens_total" if source == "vllm" else "lmcache_mp_lookup_hit_l1_tokens_total"
        body = f'{line}{{model_name="m"}} {100 * number}.0\n'.encode()
        recording.page(10**18 + at_seconds * SECOND, 0.01, body, "vllm" if source == "vllm" else "lmcache")
    recording.close(10**18 + 5 * SECOND)
    ledger = new_ledger(tmp_path)
    replayed(tmp_path / "m", ledger)
    with closing(reader_of(ledger)) as reader:
        found = observed(reader, 0, 2**62, reader.targets(), "m/0")
    ((_, spans),) = found.caches.items()
    assert [(one.end_ns - one.start_ns, one.dram_hit_tokens) for one in spans] == [(3 * SECOND, 100)]


# -- other engines

# 30 prompt tokens a page and more, of which 10 are from the GPU and 5 from the host; 3 of output
SGLANG = """sglang:prompt_tokens_total{{engine_type="decode",model_name="qwen"}} {prompt}.0
sglang:cached_tokens_total{{cache_source="device",model_name="qwen"}} {device}.0
sglang:cached_tokens_total{{cache_source="host",model_name="qwen"}} {host}.0
sglang:generation_tokens_total{{model_name="qwen"}} {output}.0
sglang:num_running_reqs{{model_name="qwen",tp_rank="0"}} 1.0
"""


def test_a_recording_of_another_engine_is_read_by_what_its_pages_show(tmp_path: Path) -> None:
    recording = EngineRecording(tmp_path / "qwen", meta_of("qwen", "10.0.0.1:30000", About(), {}, 10**18))
    for number in range(1, 5):
        page = SGLANG.format(prompt=30 * number, device=10 * number, host=5 * number, output=3 * number)
        recording.page(10**18 + number * 5 * SECOND, 0.01, page.encode())
    recording.learn(engine_version="0.5.23", engine_args=["--model-path", "qwen", "--tp", "2"])
    recording.close(10**18 + 20 * SECOND)
    ledger = new_ledger(tmp_path)
    done = replayed(tmp_path / "qwen", ledger)
    assert (done.pages, done.intervals, done.findings) == (4, 3, ())
    with closing(reader_of(ledger)) as reader:
        targets = reader.targets()
        found = observed(reader, 0, 2**62, targets, "qwen/0")
    names = ("prompt_tokens", "computed_tokens", "hbm_tokens", "external_tokens", "generated_tokens")
    assert [total(found, name) for name in names] == [90, 45, 30, 15, 9]
    (about,) = (one.attributes for one in targets.values() if one.kind == "engine")
    assert (about["engine"], about["model"]) == ("sglang", "qwen")
    assert (about["tensor_parallel"], about["role"]) == ("2", "decode")
