from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtally.agent.engine_process import (
    SHAPE_LIMIT_BYTES,
    arguments_of,
    facts_of,
    facts_of_process,
    model_shape,
    without_secrets,
)
from kvtally.agent.model_shape import UnknownArchitecture, shape_of

if TYPE_CHECKING:
    from collections.abc import Mapping

CONFIGS = Path(__file__).parent / "fixtures" / "model_configs"
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
    "rope_theta": 500000.0,
}


def process(
    proc: Path, command: list[str], files: dict[str, Any] | None = None, environment: Mapping[str, str] = {}
) -> str:
    """A process 7 below a /proc of our own; the files lie below its root and its working folder."""
    (proc / "7").mkdir(parents=True)
    (proc / "7/cmdline").write_bytes(b"".join(word.encode() + b"\0" for word in command))
    (proc / "7/environ").write_bytes(b"".join(f"{name}={value}\0".encode() for name, value in environment.items()))
    for name, content in (files or {}).items():
        place = proc / "7" / name
        place.parent.mkdir(parents=True)
        place.write_text(json.dumps(content), encoding="utf-8")
    return str(proc)


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("--api-key sk-1 --port 8000", "--api-key <removed> --port 8000"),
        ("--api-key one two three --port 8000", "--api-key <removed> <removed> <removed> --port 8000"),
        ("--api_key=one --port=8000", "--api_key=<removed> --port=8000"),
        ("--hf-token abc", "--hf-token <removed>"),
        ("--api-k abc --hf-tok abc", "--api-k <removed> --hf-tok <removed>"),
        ("--ssl-keyfile-password abc", "--ssl-keyfile-password <removed>"),
        (
            "--kv-transfer-config.kv_extra.secret_access_key abc",
            "--kv-transfer-config.kv_extra.secret_access_key <removed>",
        ),
        ('--kv-transfer-config {"s3":{"SecretKey":"abc"}}', "--kv-transfer-config <removed>"),
        ("--otlp-traces-endpoint http://me:abc@host:4317", "--otlp-traces-endpoint <removed>"),
        ("--download-dir=http://me:abc@host/", "--download-dir=<removed>"),
        ("AWS_SECRET_ACCESS_KEY=abc --port 1", "<removed> --port 1"),
        ("--load-format hf_AbCdEfGhIjKlMnOpQr", "--load-format <removed>"),
        # what only sounds like one stays: a recording is of no use without its batch size
        (
            "--max-num-batched-tokens 8192 --enable-prompt-tokens-details --tokenizer-mode slow --num-gpu-blocks 4600",
            "--max-num-batched-tokens 8192 --enable-prompt-tokens-details --tokenizer-mode slow --num-gpu-blocks 4600",
        ),
    ],
)
def test_secrets_are_removed_and_the_rest_stays(given: str, shown: str) -> None:
    assert without_secrets(given.split()) == shown.split()


@given(
    st.sampled_from(["--api-key", "--api_key", "--hf-token", "--hf_token", "--some.password", "--x-secret-y", "--key"]),
    st.text(alphabet=st.characters(min_codepoint=33, max_codepoint=126), min_size=12),
    st.booleans(),
    st.lists(st.sampled_from(["--port", "8000", "--model", "llama", "-O3"]), max_size=4),
)
def test_no_form_of_a_secret_stays(option: str, secret: str, joined: bool, others: list[str]) -> None:
    value = "s3cr3t" + secret
    words = [*others, *([f"{option}={value}"] if joined else [option, value]), *others]
    assert value not in " ".join(without_secrets(words))


@pytest.mark.parametrize(
    "program",
    [
        ["python3", "-m", "vllm.entrypoints.openai.api_server"],
        ["/usr/bin/python3", "/usr/local/bin/vllm", "serve"],
        ["vllm", "serve"],
        ["python3", "/opt/vllm/entrypoints/openai/api_server.py"],
        ["python3", "-m", "sglang.launch_server"],
        ["/usr/bin/python3", "/usr/local/bin/trtllm-serve"],
        ["python3", "-m", "dynamo.vllm"],
    ],
)
def test_the_engines_arguments_begin_behind_its_program(tmp_path: Path, program: list[str]) -> None:
    proc = process(tmp_path, [*program, "--port", "8000", "--api-key", "one"])
    assert arguments_of(7, proc) == ["--port", "8000", "--api-key", "<removed>"]


def test_a_process_that_is_gone_or_shows_a_title_tells_no_arguments(tmp_path: Path) -> None:
    proc = process(tmp_path, ["VLLM::APIServer_0"])
    assert arguments_of(7, proc) is None
    assert arguments_of(8, proc) is None


def test_the_arguments_of_a_real_process_are_read() -> None:
    program = [sys.executable, "-c", "print(flush=True); input()"]
    child = subprocess.Popen(
        [*program, "--api-key", "one", "--port", "1"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with child:
        assert child.stdout is not None
        child.stdout.readline()  # it runs, so its command line is there
        shown = arguments_of(child.pid)
        child.communicate(b"\n")
    assert shown == [*program, "--api-key", "<removed>", "--port", "1"]


def test_the_shape_of_a_model_comes_from_its_folder_as_the_engine_sees_it(tmp_path: Path) -> None:
    command = ["vllm", "serve", "/models/llama", "--kv-cache-dtype", "fp8"]
    proc = process(tmp_path, command, {"root/models/llama/config.json": LLAMA})
    assert model_shape(7, proc) == {
        "architecture": "LlamaForCausalLM",
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,  # 4096 / 32
        "vocab_size": 128256,
        "weight_dtype": "bfloat16",
        "kv_dtype": "fp8",
    }


def test_a_relative_model_lies_in_the_working_folder_and_options_choose_its_types(tmp_path: Path) -> None:
    command = ["python3", "-m", "vllm.entrypoints.openai.api_server", "--model=models/small", "--dtype", "float16"]
    config = {"text_config": {"num_hidden_layers": 6, "head_dim": 64}, "quantization_config": {"quant_method": "awq"}}
    proc = process(tmp_path, command, {"cwd/models/small/config.json": config})
    assert model_shape(7, proc) == {
        "num_hidden_layers": 6,
        "head_dim": 64,
        "weight_dtype": "float16",
        "kv_dtype": "float16",
        "quantization": "awq",
        "quantization_fp8": False,
    }


@pytest.mark.parametrize(
    "command",
    [
        ["python3", "-m", "sglang.launch_server", "--model-path", "/models/llama", "--kv-cache-dtype", "bf16"],
        ["trtllm-serve", "/models/llama", "--kv_cache_dtype", "bfloat16"],
        ["python3", "-m", "dynamo.trtllm", "--model-path=/models/llama"],
    ],
)
def test_other_engines_name_their_model_and_its_types_in_their_own_way(tmp_path: Path, command: list[str]) -> None:
    found = model_shape(7, process(tmp_path, command, {"root/models/llama/config.json": LLAMA}))
    assert found is not None
    assert (found["architecture"], found["kv_dtype"]) == ("LlamaForCausalLM", "bfloat16")


@pytest.mark.parametrize("command", [["vllm", "serve", "meta-llama/Llama-3.1-8B"], ["vllm", "serve"], []])
def test_a_model_that_lies_in_no_folder_has_no_shape(tmp_path: Path, command: list[str]) -> None:
    assert model_shape(7, process(tmp_path, command)) is None


def test_a_pipe_or_nonsense_in_the_place_of_a_config_is_no_shape(tmp_path: Path) -> None:
    proc = process(tmp_path, ["vllm", "serve", "/m"], {"root/m/config.json": [1]})
    assert model_shape(7, proc) is None
    place = tmp_path / "7/root/m/config.json"
    place.write_bytes(b"{")
    assert model_shape(7, proc) is None
    place.unlink()
    os.mkfifo(place)
    assert model_shape(7, proc) is None


def shape(config: dict[str, Any] | None, words: str = "") -> dict[str, Any] | None:
    """The attribute `shape` of an engine with that model and those arguments."""
    text = facts_of(words.split(), config).get("shape")
    return None if text is None else json.loads(text)


@pytest.mark.parametrize(
    ("words", "facts"),
    [
        ("", {}),
        ("--max-num-batched-tokens 4096", {"token_budget": "4096"}),
        ("--max_num_batched_tokens=8K -tp 1", {"token_budget": "8192"}),
        ("--max-num-batched-tokens 2.5k", {"token_budget": "2500"}),
        ("--max-num-batched-tokens 1m", {"token_budget": "1000000"}),
        ("--max-num-batched-tokens lots", {}),
        ("--max-num-batched-tokens 0", {}),
        ("--max-num-batched-tokens 999999999M", {}),
        ("--max-num-batched-tokens " + "9" * 5000, {}),
        ("--max-num-batched-tokens", {}),
        ("-tp 4 -pp=2", {"tensor_parallel": "4", "pipeline_parallel": "2"}),
        ("--tensor-parallel-size=8 --pipeline_parallel_size 1", {"tensor_parallel": "8"}),
        ("-tp auto", {}),
        # SGLang and TensorRT-LLM
        ("--chunked-prefill-size 8192 --tp 2", {"token_budget": "8192", "tensor_parallel": "2"}),
        ("--chunked-prefill-size=-1 --pp-size 2", {"pipeline_parallel": "2"}),
        ("--chunked-prefill-size -1 --max-prefill-tokens 16384", {}),
        ("m --max_num_tokens 4096 --tp_size 4", {"token_budget": "4096", "tensor_parallel": "4"}),
    ],
)
def test_sizes_are_read_off_the_options_that_tell_them(words: str, facts: dict[str, str]) -> None:
    assert facts_of(words.split(), None) == facts


@pytest.mark.parametrize(
    ("words", "is_eager"),
    [
        ("--enforce-eager --port 1", True),
        ("--enforce_eager", True),
        ("--no-enforce-eager", False),
        ('--compilation-config {"mode":0}', True),
        ('--compilation-config {"level":0}', True),
        ('--compilation-config={"mode":"NONE"}', True),
        ('--compilation_config {"mode":3,"cudagraph_mode":"FULL_DECODE_ONLY"}', True),
        ('-cc {"cudagraph_mode":"none"}', True),
        ("-cc.mode none", True),
        ("-cc.cudagraph_mode=FULL_DECODE_ONLY", True),
        ("--compilation-config.level 0", True),
        ("-O 0", True),
        ("-O0", True),
        ("-O=0", True),
        ("-O.mode=0", True),
        ("--optimization-level 0", True),
        ("", False),
        ("-O3", False),
        ("-O 2", False),
        ("--compilation-config 3", False),
        ('--compilation-config {"mode":null,"cudagraph_mode":null}', False),
        ('--compilation-config {"mode":3,"cudagraph_mode":"FULL_AND_PIECEWISE"}', False),
        ('--compilation-config {"cudagraph_capture_sizes":[0,1]}', False),
        ("--compilation-config {", False),
        ("--optimization-level 2", False),
    ],
)
def test_prefill_without_compiled_graphs_is_told_by_several_options(words: str, is_eager: bool) -> None:
    assert facts_of(words.split(), None) == ({"eager": "1"} if is_eager else {})


@pytest.mark.parametrize(
    ("words", "connector"),
    [
        (
            ["--kv-transfer-config", '{"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both"}'],
            "LMCacheConnectorV1",
        ),
        # a recording may hold the quotes of the shell that started the engine
        (["--kv-transfer-config", '\'{"kv_connector":"LMCacheMPConnector"}\''], "LMCacheMPConnector"),
        (['--kv_transfer_config={"kv_connector":"MultiConnector"}'], "MultiConnector"),
        (["--kv-transfer-config.kv_connector", "OffloadingConnector"], "OffloadingConnector"),
        (["--kv-transfer-config.kv_connector=NixlConnector", "--kv-transfer-config.kv_role=kv_both"], "NixlConnector"),
        (["--kv-offloading-size", "64"], "OffloadingConnector"),
        (["--kv-offloading-size", "64", "--kv-offloading-backend", "native"], "OffloadingConnector"),
        # the in-process connector or the other one, as the version has it
        (["--kv-offloading-size", "64", "--kv-offloading-backend", "lmcache"], None),
        (["--enable-lmcache"], "LMCacheConnector"),  # SGLang's
        (["--kv-transfer-config", '{"kv_role":"kv_both"}'], None),
        (["--kv-transfer-config", '{"kv_connector":7}'], None),
        (["--kv-transfer-config", '["kv_connector"]'], None),
        (["--kv-transfer-config", "["], None),
        (["--kv-transfer-config", '{"kv_connector":"http://me:word@host"}'], None),
        (["--kv-transfer-config", json.dumps({"kv_connector": "A" * 65})], None),
        ([], None),
    ],
)
def test_the_connector_is_the_one_that_the_transfer_config_names(words: list[str], connector: str | None) -> None:
    assert facts_of(words, None) == ({} if connector is None else {"connector": connector})


NIXL = '{"kv_connector":"NixlConnector","kv_role":"%s"}'
SEVERAL = '{"kv_connector":"MultiConnector","kv_role":"kv_both","kv_connector_extra_config":{"connectors":[%s]}}'


@pytest.mark.parametrize(
    ("words", "role"),
    [
        (["--kv-transfer-config", NIXL % "kv_producer"], "prefill"),
        (["--kv-transfer-config", NIXL % "kv_consumer"], "decode"),
        (["--kv-transfer-config", NIXL % "kv_both"], None),
        (["--kv-transfer-config", NIXL % "neither"], None),
        (["--kv-transfer-config", '{"kv_connector":"NixlConnector"}'], None),
        (["--kv-transfer-config", '{"kv_connector":"NixlConnector","kv_role":["kv_producer"]}'], None),
        (["--kv-transfer-config.kv_connector=P2pNcclConnector", "--kv-transfer-config.kv_role=kv_consumer"], "decode"),
        (["--kv-transfer-config", NIXL % "kv_both", "--kv-transfer-config.kv_role", "kv_producer"], "prefill"),
        (["--kv-transfer-config", (NIXL % "kv_producer").replace("NixlConnector", "LMCacheConnectorV1")], "prefill"),
        # it writes to or reads from a store, which anybody may share
        (["--kv-transfer-config", (NIXL % "kv_producer").replace("Nixl", "MooncakeStore")], None),
        (["--kv-transfer-config", SEVERAL % (NIXL % "kv_consumer")], "decode"),
        (["--kv-transfer-config", SEVERAL % f'7,{{"kv_connector":"OffloadingConnector"}},{NIXL % "kv_both"}'], None),
        (["--kv-transfer-config", SEVERAL.replace("[%s]", "7")], None),
        # SGLang, TensorRT-LLM, workers of NVIDIA Dynamo
        (["--disaggregation-mode", "prefill"], "prefill"),
        (["--disaggregation-mode=decode"], "decode"),
        (["--disaggregation-mode", "null"], None),
        (["--disaggregation-mode", "prefill_and_decode"], None),
        (["--server_role", "CONTEXT"], "prefill"),
        (["--server_role", "generation"], "decode"),
        (["--server_role", "MM_ENCODER"], None),
        (["--is-prefill-worker", "--kv-transfer-config", NIXL % "kv_both"], "prefill"),
        (["--is-decode-worker"], "decode"),
        (["--is-prefill-worker", "--is-decode-worker"], None),
        ([], None),
    ],
)
def test_the_role_is_what_an_option_or_a_connector_between_engines_says(words: list[str], role: str | None) -> None:
    assert facts_of(words, None).get("role") == role


def test_the_shape_is_one_line_of_sorted_json_and_says_what_the_config_and_the_options_choose() -> None:
    text = facts_of(["--kv-cache-dtype", "fp8", "--quantization=fp8"], LLAMA)["shape"]
    assert text == (
        '{"architecture":"LlamaForCausalLM","head_dim":128,"hidden_size":4096,"intermediate_size":14336,'
        '"kv_dtype":"fp8","num_attention_heads":32,"num_hidden_layers":32,"num_key_value_heads":8,'
        '"quantization":"fp8","quantization_fp8":true,"vocab_size":128256,"weight_dtype":"bfloat16"}'
    )


def config_of(name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8"))
    return config


@pytest.mark.parametrize("name", ["llama-3.1-8b", "mistral-small-3.1-24b", "mixtral-8x7b", "deepseek-v3", "qwen2.5-7b"])
def test_the_attribute_gives_the_formulas_what_the_whole_config_would(name: str) -> None:
    told = shape(config_of(name))
    assert told is not None
    assert shape_of(told) == shape_of(config_of(name))
    assert shape(told) == told  # as it comes back from a recording


@pytest.mark.parametrize("name", ["gpt-oss-20b", "bamba-9b", "mistral-7b-v0.1"])
def test_the_attribute_of_a_model_without_formulas_says_what_it_is(name: str) -> None:
    told = shape(config_of(name))
    assert told is not None
    said = []
    for config in (told, config_of(name)):
        with pytest.raises(UnknownArchitecture) as refused:
            shape_of(config)
        said.append(str(refused.value))
    assert said[0] == said[1]


@pytest.mark.parametrize(
    ("stored", "words", "weight", "kv"),
    [
        ("bfloat16", "", "bfloat16", "bfloat16"),
        ("bfloat16", "--dtype auto --kv-cache-dtype auto", "bfloat16", "bfloat16"),
        ("bfloat16", "--dtype half", "half", "half"),
        ("bfloat16", "--dtype=float16 --kv-cache-dtype fp8_e5m2", "float16", "fp8_e5m2"),
        # vLLM serves these in 16 bits where nobody asks for more
        ("float32", "", "bfloat16", "bfloat16"),
        ("float32", "--dtype float32", "float32", "float32"),
    ],
)
def test_types_are_those_that_the_engine_serves_in(stored: str, words: str, weight: str, kv: str) -> None:
    told = shape({**LLAMA, "torch_dtype": stored}, words)
    assert told is not None
    assert (told["weight_dtype"], told["kv_dtype"]) == (weight, kv)


@pytest.mark.parametrize(
    ("quantization", "words", "kv"),
    [
        ({"quant_method": "compressed-tensors", "kv_cache_scheme": {"num_bits": 8, "type": "float"}}, "", "fp8"),
        ({"quant_method": "modelopt", "kv_cache_quant_algo": "FP8"}, "", "fp8"),
        ({"quant_method": "modelopt", "kv_cache_quant_algo": "FP8"}, "--kv-cache-dtype bfloat16", "bfloat16"),
        ({"quant_method": "modelopt", "kv_cache_quant_algo": None}, "", "bfloat16"),
        ({"quant_method": "compressed-tensors", "kv_cache_scheme": {"num_bits": 8, "type": "int"}}, "", "bfloat16"),
        (["fp8"], "", "bfloat16"),
    ],
)
def test_a_checkpoint_may_ask_for_a_narrow_kv_cache(quantization: object, words: str, kv: str) -> None:
    told = shape({**LLAMA, "quantization_config": quantization}, words)
    assert told is not None
    assert told["kv_dtype"] == kv


@pytest.mark.parametrize(
    "config",
    [
        None,
        {},
        {"secret": "abc"},
        {"torch_dtype": "bfloat16"},
        {**LLAMA, "num_hidden_layers": "hf_AbCdEfGhIjKlMnOpQr"},
        {**LLAMA, "vocab_size": -1},
        {**LLAMA, "vocab_size": 1 << 53},
        {**LLAMA, "hidden_size": 4096.5},
        {**LLAMA, "head_dim": {"a": 1}},
        {**LLAMA, "architectures": ["a word of somebody's"]},
        {**LLAMA, "torch_dtype": "b" * 65},
        {**LLAMA, "layer_types": ["https://me:word@host"]},
        {**LLAMA, "mamba_x y": 1},
        {**LLAMA, "mlp_only_layers": list(range(2000))},  # 8,890 characters
    ],
)
def test_what_is_no_shape_of_numbers_and_short_words_is_none(config: dict[str, Any] | None) -> None:
    assert facts_of([], config) == {}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
KEYS = [*LLAMA, "dtype", "text_config", "quantization_config", "layer_types", "sliding_window", "mamba_d", "parameters"]


@given(st.dictionaries(st.sampled_from(KEYS), JSON), st.lists(st.text(max_size=12), max_size=4))
def test_nonsense_gives_small_attributes_or_none(config: dict[str, Any], words: list[str]) -> None:
    for name, value in facts_of(words, config).items():
        assert name in {"shape", "token_budget", "tensor_parallel", "pipeline_parallel", "eager", "connector", "role"}
        assert value
        assert len(value) <= SHAPE_LIMIT_BYTES


COMMIT = "0123456789abcdef0123456789abcdef01234567"
FOLDER = "models--meta-llama--Llama-3.1-8B"


def in_hub(hub: str, *, ref: str | None = "main", commits: tuple[str, ...] = (COMMIT,)) -> dict[str, Any]:
    """A cache of Hugging Face as files of a process; the ref names the first of the commits."""
    return {f"{hub}/{FOLDER}/snapshots/{commit}/config.json": LLAMA for commit in commits} | (
        {} if ref is None else {f"{hub}/{FOLDER}/refs/{ref}": commits[0]}
    )


def shape_by_name(
    tmp_path: Path, files: dict[str, Any], environment: Mapping[str, str], *words: str
) -> dict[str, Any] | None:
    proc = process(tmp_path, ["vllm", "serve", "meta-llama/Llama-3.1-8B", *words], files, environment)
    for ref in tmp_path.glob(f"7/**/{FOLDER}/refs/*"):
        ref.write_text(json.loads(ref.read_text()))  # as Hugging Face writes it, without quotes
    return model_shape(7, proc)


@pytest.mark.parametrize(
    ("hub", "environment"),
    [
        ("root/home/me/.cache/huggingface/hub", {"HOME": "/home/me"}),
        ("root/cache/huggingface/hub", {"HOME": "/home/me", "XDG_CACHE_HOME": "/cache"}),
        ("root/models/hub", {"HOME": "/home/me", "HF_HOME": "/models", "XDG_CACHE_HOME": "/cache"}),
        ("root/old", {"HF_HOME": "/models", "HUGGINGFACE_HUB_CACHE": "/old"}),
        ("root/new", {"HF_HOME": "/models", "HUGGINGFACE_HUB_CACHE": "/old", "HF_HUB_CACHE": "/new"}),
        ("root/home/me/models/hub", {"HOME": "/home/me", "HF_HOME": "~/models"}),
        ("cwd/models/hub", {"HF_HOME": "models"}),
    ],
)
def test_a_model_by_its_name_is_looked_up_in_the_cache_of_the_process(
    tmp_path: Path, hub: str, environment: dict[str, str]
) -> None:
    found = shape_by_name(tmp_path, in_hub(hub), environment)
    assert found is not None
    assert found["num_hidden_layers"] == 32


@pytest.mark.parametrize(
    ("ref", "commits", "words", "is_found"),
    [
        ("main", (COMMIT, "other"), [], True),
        (None, (COMMIT,), [], True),  # the only one
        (None, (COMMIT, "other"), [], False),
        ("main", (COMMIT, "other"), ["--revision", "v2"], False),
        ("v2", (COMMIT, "other"), ["--revision", "v2"], True),
        ("v2", (COMMIT, "other"), [], False),
        (None, (COMMIT, "other"), ["--revision", COMMIT], True),
        (None, (COMMIT,), ["--revision", "../../.."], False),
    ],
)
def test_of_several_snapshots_the_one_that_is_asked_for_counts(
    tmp_path: Path, ref: str | None, commits: tuple[str, ...], words: list[str], is_found: bool
) -> None:
    files = in_hub("root/models/hub", ref=ref, commits=commits)
    assert (shape_by_name(tmp_path, files, {"HF_HOME": "/models"}, *words) is not None) == is_found


def test_a_ref_that_points_out_of_the_cache_is_not_followed(tmp_path: Path) -> None:
    files = {"root/models/hub/config.json": LLAMA, f"root/models/hub/{FOLDER}/refs/main": "../.."}
    assert shape_by_name(tmp_path, files, {"HF_HOME": "/models"}) is None


@pytest.mark.parametrize("model", ["s3://bucket/model", "../../models", "a/b/c", "x" * 300])
def test_a_model_of_another_kind_is_not_looked_for(tmp_path: Path, model: str) -> None:
    assert model_shape(7, process(tmp_path, ["vllm", "serve", model], environment={"HOME": "/"})) is None


def test_the_facts_of_a_process_are_those_of_its_arguments_and_its_model(tmp_path: Path) -> None:
    command = ["vllm", "serve", "/models/llama", "--api-key", "abc", "--enforce-eager", "-tp", "2"]
    proc = process(tmp_path, command, {"root/models/llama/config.json": LLAMA})
    facts = facts_of_process(7, proc)
    assert facts == facts_of(command[3:], LLAMA)
    assert sorted(facts) == ["eager", "shape", "tensor_parallel"]
    assert facts_of_process(8, proc) == {}
    assert facts_of_process(None, proc) == {}


def test_a_config_by_hand_stands_in_for_the_one_that_the_process_reads(tmp_path: Path) -> None:
    proc = process(tmp_path, ["vllm", "serve", "/m", "-tp", "2"], {"root/m/config.json": LLAMA})
    place = tmp_path / "model/config.json"
    place.parent.mkdir()
    place.write_text(json.dumps({**LLAMA, "num_hidden_layers": 80}), encoding="utf-8")
    for name in (place, place.parent):
        facts = facts_of_process(7, proc, model_config=str(name))
        assert facts == facts_of(["-tp", "2"], {**LLAMA, "num_hidden_layers": 80})
    place.unlink()
    assert facts_of_process(7, proc, model_config=str(place)) == facts_of(["-tp", "2"], LLAMA)


def test_a_title_in_the_place_of_a_command_line_tells_nothing(tmp_path: Path) -> None:
    assert facts_of_process(7, process(tmp_path, ["VLLM::APIServer_0"])) == {}
