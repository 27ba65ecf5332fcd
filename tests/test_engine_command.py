from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kvtally.agent.engine_command import (
    ENGINES,
    Sizes,
    behind_program,
    engine_of,
    is_title,
    kv_paths,
    logs_scrapes,
    options,
    sizes,
)
from kvtally.collectors.registry import SOURCES

if TYPE_CHECKING:
    from collections.abc import Mapping

ONE = Sizes(1, 1, 1, 1)
TWO = Sizes(2, 1, 1, 1)
UNTOLD = Sizes(None, None, 1, 1)


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("/opt/venv/bin/vllm serve m", "vllm"),
        ("/usr/bin/python3 /usr/local/bin/vllm serve m", "vllm"),
        ("python3.12 -u -W ignore -m vllm.entrypoints.openai.api_server --model m", "vllm"),
        ("python -m dynamo.vllm --model m", "vllm"),
        ("python /src/vllm/entrypoints/openai/api_server.py", "vllm"),
        ("VLLM::EngineCore_DP0", "vllm"),
        ("python3 -m sglang.launch_server --model-path m", "sglang"),
        ("python3 /sgl/python/sglang/launch_server.py --model-path m", "sglang"),
        ("/usr/local/bin/sglang serve --model-path m", "sglang"),
        ("python -m dynamo.sglang --model-path m", "sglang"),
        ("sglang::scheduler_DP0_TP1", "sglang"),
        ("sglang::detokenizer", "sglang"),
        ("/usr/bin/python3 /usr/local/bin/trtllm-serve m --tp_size 4", "tensorrt_llm"),
        ("trtllm-serve serve m", "tensorrt_llm"),
        ("python3 -m tensorrt_llm.commands.serve m", "tensorrt_llm"),
        ("python3 -m tensorrt_llm.serve m", "tensorrt_llm"),
        ("python3 -m dynamo.trtllm --model-path m", "tensorrt_llm"),
        ("trtllm-serve disaggregated -c disagg.yaml", ""),
        ("python -m dynamo.frontend --http-port 8000", ""),
        ("python -m sglang_router.launch_router --worker-urls http://a", ""),
        ("python -m lmcache.server", ""),
        ("python /home/vllm/other.py", ""),
        ("python -c import_vllm", ""),
        ("python -m", ""),
        ("python -W", ""),
        ("python", ""),
        ("bash -c vllm", ""),
        ("tini -- vllm serve m", ""),
        ("", ""),
    ],
)
def test_a_command_line_tells_its_engine(command: str, expected: str) -> None:
    assert engine_of(command.split()) == expected


def test_every_engine_has_a_source_of_its_name_that_reads_its_page() -> None:
    assert [one.kind for one in ENGINES if not SOURCES[one.kind].is_engine] == []


def test_a_title_stands_alone_and_a_command_line_is_none() -> None:
    assert [is_title([word]) for word in ("VLLM::APIServer_0", "sglang::scheduler", "vllm", "")] == [
        True,
        True,
        False,
        False,
    ]
    assert not is_title([])


@pytest.mark.parametrize(
    "program",
    [
        "python3 -m vllm.entrypoints.openai.api_server",
        "vllm serve",
        "/usr/bin/python3 -u /usr/local/bin/vllm serve",
        "python3 -m sglang.launch_server",
        "sglang serve",
        "trtllm-serve",
        "python3 /usr/local/bin/trtllm-serve serve",
        "python3 -m dynamo.vllm",
        "/opt/launcher --quiet vllm serve",
        "python3 /opt/own/api_server.py",
    ],
)
def test_the_arguments_of_an_engine_are_the_words_behind_its_program(program: str) -> None:
    assert behind_program([*program.split(), "m", "--port", "1"]) == ["m", "--port", "1"]


def test_where_no_program_is_known_all_words_are_arguments() -> None:
    assert behind_program(["python3", "own.py", "--port", "1"]) == ["python3", "own.py", "--port", "1"]
    assert behind_program([]) == []


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("vllm serve m", ONE),
        ("vllm serve m --tensor-parallel-size 4 --pipeline-parallel-size=2", Sizes(4, 2, 1, 1)),
        ("vllm serve m -tp 4 -pp=2", Sizes(4, 2, 1, 1)),
        ("vllm serve m --tensor_parallel_size 4 -tp 2", TWO),
        ("vllm serve m -tp 2 -dp 4", Sizes(2, 1, 1, 4)),
        ("vllm serve m -dp 8 --data-parallel-size-local 4", Sizes(1, 1, 1, 4)),
        ("vllm serve m -dp 8 --data-parallel-rank 3", ONE),
        ("vllm serve m -dp 8 -dpe", ONE),
        ("vllm serve m -tp 2 -pcp 2", Sizes(2, 1, 2, 1)),
        ("vllm serve --config c.yaml -tp 2", Sizes(2, None, 1, 1)),
        ("vllm serve m -tp auto", ONE),
        ("python -m sglang.launch_server --model-path m", ONE),
        ("python -m sglang.launch_server --tp 4 --pp-size=2", Sizes(4, 2, 1, 1)),
        ("python -m sglang.launch_server --tp-size 2 --dp-size 4", Sizes(2, 1, 1, 4)),
        ("python -m sglang.launch_server --tensor-parallel-size 2 --dp 4", Sizes(2, 1, 1, 4)),
        # attention's ranks share the GPUs of the experts
        ("python -m sglang.launch_server --tp 8 --dp 8 --enable-dp-attention", Sizes(8, 1, 1, 1)),
        ("python -m sglang.launch_server --config c.yaml --tp 2", Sizes(2, None, 1, 1)),
        ("trtllm-serve m --tp_size 4 --pp_size 2 --cp_size 2", Sizes(4, 2, 2, 1)),
        ("trtllm-serve m --extra_llm_api_options o.yaml", UNTOLD),
        ("python -m dynamo.trtllm --model-path m --tensor-parallel-size 2", TWO),
        ("python -m dynamo.sglang --model-path m --tp 2", TWO),
        ("sglang::scheduler_TP0", UNTOLD),
        ("python own_server.py --port 8000", UNTOLD),
        ("VLLM::APIServer_0", UNTOLD),
        ("", UNTOLD),
    ],
)
def test_sizes_are_read_off_the_command_line(command: str, expected: Sizes) -> None:
    assert sizes(command.split()) == expected


def test_options_are_known_under_their_short_names_and_the_last_one_wins() -> None:
    words = ["-q", "awq", "-cc.mode=3", "-cc", "{}", "-O", "0", "--max_model_len=1", "--max-model-len", "2048"]
    assert options(words) == {
        "--quantization": "awq",
        "--compilation-config.mode": "3",
        "--compilation-config": "0",
        "--max-model-len": "2048",
    }


def test_sizes_that_are_told_in_part_need_an_unknown_number_of_gpus() -> None:
    assert (Sizes(2, None, 1, 1).gpus, Sizes(2, 2, 1, 3).gpus) == (None, 12)


TIERING = """{"kv_connector": "OffloadingConnector", "kv_connector_extra_config":
 {"secondary_tiers": [{"type": "fs", "root_dir": "/mnt/kv/"}, {"type": "obj", "root_dir": "s3://bucket/x"}],
  "lmcache.local_disk": "file:///mnt/nvme2", "path_of_nothing": "/no"}}"""


FIRST_ADAPTER = '{"type": "fs", "base_path": "/mnt/e"}'
SECOND_ADAPTER = '{"type": "nixl_store", "backend": "POSIX", "backend_params": {"file_path": "/mnt/f"}}'
LMCACHE_YAML = """\
chunk_size: 256
local_disk: "file:///mnt/nvme0/"  # fast
#gds_path: /mnt/no
gds_path: '/mnt/gds'
remote_url: redis://user:secret@host:6379/0
max_local_disk_size: 5.0
extra_config:
  nixl_path: /mnt/a#b, /mnt/c # shared
"""


@pytest.mark.parametrize(
    ("arguments", "environment", "expected"),
    [
        (["vllm", "serve"], {}, ()),
        ([], {"LMCACHE_LOCAL_DISK": "file:///mnt/nvme0/, /mnt/nvme1"}, ("/mnt/nvme0", "/mnt/nvme1")),
        ([], {"LMCACHE_REMOTE_URL": "fs://host:6379/mnt/shared"}, ("/mnt/shared",)),
        ([], {"LMCACHE_REMOTE_URL": "fs:///mnt/shared"}, ("/mnt/shared",)),
        ([], {"LMCACHE_REMOTE_URL": "redis://user:secret@host:6379/0"}, ()),
        ([], {"LMCACHE_LOCAL_DISK": "True"}, ()),
        (["--kv-transfer-config", TIERING], {}, ("/mnt/kv", "/mnt/nvme2")),
        (["--kv-transfer-config=" + TIERING], {}, ("/mnt/kv", "/mnt/nvme2")),
        (["--kv_transfer_config", '{"base_path": "/mnt/a"}'], {"LMCACHE_LOCAL_DISK": "/mnt/a"}, ("/mnt/a",)),
        (["--kv-transfer-config.kv_connector_extra_config.shared_storage_path", "/mnt/b"], {}, ("/mnt/b",)),
        (["--hicache-storage-backend", "file"], {}, ("/tmp/hicache",)),
        (["--hicache-storage-backend", "file"], {"SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR": "/mnt/c"}, ("/mnt/c",)),
        (["--hicache-storage-backend", "mooncake"], {}, ()),
        (["--hicache-storage-backend-extra-config", '{"storage_dir": "/mnt/d"}'], {}, ("/mnt/d",)),
        # every adapter of LMCache's server is a tier; vLLM takes the last of two configs
        (["--l2-adapter", FIRST_ADAPTER, "--l2_adapter=" + SECOND_ADAPTER], {}, ("/mnt/e", "/mnt/f")),
        (["--kv-transfer-config", FIRST_ADAPTER, "--kv-transfer-config", SECOND_ADAPTER], {}, ("/mnt/f",)),
        (["--kv-transfer-config", "{broken"], {}, ()),
        (["--kv-transfer-config"], {}, ()),
    ],
)
def test_directories_of_tiers_are_found(
    arguments: list[str], environment: Mapping[str, str], expected: tuple[str, ...]
) -> None:
    assert kv_paths(arguments, environment) == expected


def test_directories_are_read_off_the_settings_of_lmcache() -> None:
    expected = ("/mnt/own", "/mnt/nvme0", "/mnt/gds", "/mnt/a#b", "/mnt/c")
    assert kv_paths([], {"LMCACHE_LOCAL_DISK": "/mnt/own"}, LMCACHE_YAML) == expected
    assert kv_paths([], {}, "local_disk:\nremote_url: null\n") == ()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("vllm serve m", True),
        ("vllm serve m --disable-uvicorn-access-log", False),
        ("vllm serve m --uvicorn-log-level warning", False),
        ("vllm serve m --disable-access-log-for-endpoints /health,/metrics", False),
        ("vllm serve m --disable_access_log_for_endpoints=/metrics/,/metrics", False),
        ("vllm serve m --disable-access-log-for-endpoints /health", True),
        ("VLLM::EngineCore", None),
        ("python -m sglang.launch_server --log-level-http warning", None),
        ("nginx -g daemon", None),
        ("", None),
    ],
)
def test_the_command_line_tells_whether_every_scrape_is_logged(words: str, expected: bool | None) -> None:
    assert logs_scrapes(words.split()) is expected
