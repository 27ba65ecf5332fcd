from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtally.agent.engine_process import arguments_of, model_shape, without_secrets

if TYPE_CHECKING:
    from pathlib import Path

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


def process(proc: Path, command: list[str], files: dict[str, Any] | None = None) -> str:
    """A process 7 below a /proc of our own; the files lie below its root and its working folder."""
    (proc / "7").mkdir(parents=True)
    (proc / "7/cmdline").write_bytes(b"".join(word.encode() + b"\0" for word in command))
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
    }


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
