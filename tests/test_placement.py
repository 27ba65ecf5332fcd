from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kvtally.agent.placement import (
    Host,
    Placement,
    Sizes,
    accelerator_driver,
    is_vllm,
    kv_paths,
    logs_scrapes,
    options,
    place,
    sizes,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

A, B, C, D = (f"GPU-{letter * 8}-0000-0000-0000-000000000000" for letter in "abcd")
FOUR = Host((A, B, C, D), {}, has_accelerator=True)
ONE = Sizes(1, 1, 1, 1)
TWO = Sizes(2, 1, 1, 1)
UNTOLD = Sizes(None, None, 1, 1)


def placed(
    needed: Sizes, environment: Mapping[str, str], host: Host = FOUR, tree: Sequence[int] = (), *, only: bool = False
) -> Placement:
    return place(needed, environment, tree, host, is_only_engine=only)


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("/opt/venv/bin/vllm serve m", True),
        ("/usr/bin/python3 /usr/local/bin/vllm serve m", True),
        ("python3.12 -u -W ignore -m vllm.entrypoints.openai.api_server --model m", True),
        ("python -m dynamo.vllm --model m", True),
        ("python /src/vllm/entrypoints/openai/api_server.py", True),
        ("VLLM::EngineCore_DP0", True),
        ("python -m lmcache.server", False),
        ("python /home/vllm/other.py", False),
        ("python -c import_vllm", False),
        ("bash -c vllm", False),
        ("tini -- vllm serve m", False),
        ("", False),
    ],
)
def test_a_command_line_of_vllm_is_known(command: str, expected: bool) -> None:
    assert is_vllm(command.split()) is expected


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


@pytest.mark.parametrize(
    ("needed", "environment", "gpus", "evidence"),
    [
        (TWO, {"CUDA_VISIBLE_DEVICES": "2,0"}, (C, A), "CUDA_VISIBLE_DEVICES=2,0; TP 2 x PP 1"),
        (ONE, {"CUDA_VISIBLE_DEVICES": B}, (B,), f"CUDA_VISIBLE_DEVICES={B}; TP 1 x PP 1"),
        (ONE, {"CUDA_VISIBLE_DEVICES": "GPU-bb"}, (B,), "CUDA_VISIBLE_DEVICES=GPU-bb; TP 1 x PP 1"),
        (TWO, {"CUDA_VISIBLE_DEVICES": "0, 1,-1,2"}, (A, B), "CUDA_VISIBLE_DEVICES=0, 1,-1,2; TP 2 x PP 1"),
        (
            Sizes(1, 1, 1, 3),
            {"CUDA_VISIBLE_DEVICES": "1,2,3"},
            (B, C, D),
            "CUDA_VISIBLE_DEVICES=1,2,3; TP 1 x PP 1 x DP 3",
        ),
        (ONE, {"NVIDIA_VISIBLE_DEVICES": "3"}, (D,), "NVIDIA_VISIBLE_DEVICES=3; TP 1 x PP 1"),
        (Sizes(2, 2, 1, 1), {"NVIDIA_VISIBLE_DEVICES": "all"}, (A, B, C, D), "NVIDIA_VISIBLE_DEVICES=all; TP 2 x PP 2"),
        # the container holds D and B; CUDA counts them in the order of the host
        (
            ONE,
            {"NVIDIA_VISIBLE_DEVICES": f"{D},{B}", "CUDA_VISIBLE_DEVICES": "1"},
            (D,),
            f"NVIDIA_VISIBLE_DEVICES={D},{B} CUDA_VISIBLE_DEVICES=1; TP 1 x PP 1",
        ),
        (
            ONE,
            {"NVIDIA_VISIBLE_DEVICES": "void", "CUDA_VISIBLE_DEVICES": "1"},
            (B,),
            "CUDA_VISIBLE_DEVICES=1; TP 1 x PP 1",
        ),
        (UNTOLD, {"CUDA_VISIBLE_DEVICES": "3"}, (D,), "CUDA_VISIBLE_DEVICES=3; parallel sizes not told"),
        (ONE, {"CUDA_VISIBLE_DEVICES": ""}, (), "CUDA_VISIBLE_DEVICES= hides every GPU"),
        (ONE, {"CUDA_VISIBLE_DEVICES": "MIG-1f2e"}, ("MIG-1f2e",), "CUDA_VISIBLE_DEVICES=MIG-1f2e; TP 1 x PP 1"),
    ],
)
def test_the_environment_decides_first(
    needed: Sizes, environment: Mapping[str, str], gpus: tuple[str, ...], evidence: str
) -> None:
    assert placed(needed, environment) == Placement(gpus, evidence)


def test_uuids_need_no_nvml_and_indices_do() -> None:
    blind = Host(None, {}, has_accelerator=True)
    assert placed(ONE, {"NVIDIA_VISIBLE_DEVICES": A}, blind).gpus == (A,)
    assert placed(ONE, {"NVIDIA_VISIBLE_DEVICES": A, "CUDA_VISIBLE_DEVICES": "0"}, blind).gpus == (A,)
    unknown = placed(ONE, {"CUDA_VISIBLE_DEVICES": "0"}, blind)
    assert unknown.gpus is None
    assert unknown.evidence.startswith("mapping unknown: CUDA_VISIBLE_DEVICES=0 names what NVML does not know; ")


def test_a_number_that_the_sizes_do_not_give_is_no_mapping() -> None:
    assert placed(TWO, {"CUDA_VISIBLE_DEVICES": "0,1,2"}) == Placement(
        None, "mapping unknown: CUDA_VISIBLE_DEVICES=0,1,2 names 3, TP 2 x PP 1 takes 2"
    )
    assert placed(UNTOLD, {"CUDA_VISIBLE_DEVICES": "0,1"}).evidence == (
        "mapping unknown: CUDA_VISIBLE_DEVICES=0,1 names 2, and the command line does not tell how many it takes"
    )


def test_an_index_beyond_the_gpus_is_no_mapping() -> None:
    assert placed(ONE, {"CUDA_VISIBLE_DEVICES": "7"}).gpus is None


def test_nvml_decides_where_the_environment_does_not() -> None:
    host = FOUR._replace(compute_pids={D: [12], B: [11, 90], A: [91]})
    assert placed(TWO, {"NVIDIA_VISIBLE_DEVICES": "all"}, host, [10, 11, 12]) == Placement(
        (B, D), "NVML sees its processes compute there; TP 2 x PP 1"
    )
    assert placed(Sizes(4, 1, 1, 1), {}, host, [10, 11, 12]).evidence == (
        "mapping unknown: NVML sees its processes on 2, TP 4 x PP 1 takes 4"
    )


def test_nvml_that_contradicts_the_environment_is_no_mapping() -> None:
    host = FOUR._replace(compute_pids={C: [11]})
    assert placed(ONE, {"CUDA_VISIBLE_DEVICES": "0"}, host, [10, 11]) == Placement(
        None, f"mapping unknown: CUDA_VISIBLE_DEVICES=0 leaves out {C}, where NVML sees its processes"
    )
    # an engine that is loading has not reached all of its GPUs
    assert placed(Sizes(2, 1, 1, 1), {"CUDA_VISIBLE_DEVICES": "2,3"}, host, [10, 11]).gpus == (C, D)


def test_one_engine_and_one_gpu_belong_together() -> None:
    single = Host((A,), {}, has_accelerator=True)
    assert placed(UNTOLD, {}, single, only=True) == Placement((A,), "one engine and one GPU on this host")
    assert placed(ONE, {}, single, only=False).gpus is None
    assert placed(TWO, {}, single, only=True).gpus is None
    assert placed(ONE, {"CUDA_VISIBLE_DEVICES": "1"}, single, only=True).gpus is None
    assert placed(ONE, {}, FOUR, only=True) == Placement(
        None, "mapping unknown: nothing tells which of the GPUs it holds (4 on this host)"
    )


def test_no_gpu_is_told_from_none_that_can_be_seen() -> None:
    assert placed(ONE, {}, Host(None, {}, has_accelerator=False)) == Placement((), "no GPU on this host")
    assert placed(ONE, {"NVIDIA_VISIBLE_DEVICES": "all"}, Host((), {}, has_accelerator=False)).gpus == ()
    assert placed(ONE, {}, Host((), {}, has_accelerator=True)) == Placement(
        None, "mapping unknown: NVML shows no GPU here, although the kernel has an accelerator's driver"
    )


def test_drivers_of_accelerators_are_looked_up_in_the_kernels_list(tmp_path: Path) -> None:
    assert accelerator_driver(str(tmp_path))  # nothing is known
    (tmp_path / "devices").write_text("Character devices:\n  1 mem\n 10 misc\n\nBlock devices:\n254 virtblk\n")
    assert not accelerator_driver(str(tmp_path))
    (tmp_path / "devices").write_text("Character devices:\n  1 mem\n195 nvidia\n235 nvidia-uvm\n")
    assert accelerator_driver(str(tmp_path))


TIERING = """{"kv_connector": "OffloadingConnector", "kv_connector_extra_config":
 {"secondary_tiers": [{"type": "fs", "root_dir": "/mnt/kv/"}, {"type": "obj", "root_dir": "s3://bucket/x"}],
  "lmcache.local_disk": "file:///mnt/nvme2", "path_of_nothing": "/no"}}"""


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
        (["--kv-transfer-config", "{broken"], {}, ()),
        (["--kv-transfer-config"], {}, ()),
    ],
)
def test_directories_of_tiers_are_found(
    arguments: list[str], environment: Mapping[str, str], expected: tuple[str, ...]
) -> None:
    assert kv_paths(arguments, environment) == expected


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
        ("nginx -g daemon", None),
        ("", None),
    ],
)
def test_the_command_line_tells_whether_every_scrape_is_logged(words: str, expected: bool | None) -> None:
    assert logs_scrapes(words.split()) is expected
