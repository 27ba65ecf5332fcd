from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kvtally.agent.device_nodes import Nodes
from kvtally.agent.engine_command import Sizes
from kvtally.agent.placement import Host, Placement, accelerator_driver, numbers_as_host, place

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

A, B, C, D = (f"GPU-{letter * 8}-0000-0000-0000-000000000000" for letter in "abcd")
FOUR = Host((A, B, C, D), {}, has_accelerator=True)
NUMBERED = FOUR._replace(minors={3: A, 2: B, 1: C, 0: D})
VOID = {"NVIDIA_VISIBLE_DEVICES": "void"}  # CDI's
ONE = Sizes(1, 1, 1, 1)
TWO = Sizes(2, 1, 1, 1)
UNTOLD = Sizes(None, None, 1, 1)


def placed(
    needed: Sizes, environment: Mapping[str, str], host: Host = FOUR, tree: Sequence[int] = (), *, only: bool = False
) -> Placement:
    return place(needed, environment, tree, host, is_only_engine=only)


def by_nodes(
    needed: Sizes,
    opened: Sequence[int] | None,
    shown: Sequence[int] | None,
    environment: Mapping[str, str] = VOID,
    host: Host = NUMBERED,
) -> Placement:
    nodes = Nodes(*(None if minors is None else frozenset(minors) for minors in (opened, shown)))
    return place(needed, environment, [10, 11], host, nodes, is_only_engine=True)


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


@pytest.mark.parametrize(
    ("needed", "opened", "shown", "gpus", "evidence"),
    [
        (ONE, (2,), (2,), (B,), "its processes have /dev/nvidia2 open; TP 1 x PP 1"),
        (UNTOLD, (2,), (0, 2), (B,), "its processes have /dev/nvidia2 open; parallel sizes not told"),
        # ranks go by NVML's order, which is not that of the nodes
        (TWO, (0, 3), None, (A, D), "its processes have /dev/nvidia0, /dev/nvidia3 open; TP 2 x PP 1"),
        # it is loading, or one of its processes hides its files
        (TWO, (0,), (0, 3), (A, D), "its /dev shows /dev/nvidia0, /dev/nvidia3 alone; TP 2 x PP 1"),
        (ONE, None, (1,), (C,), "its /dev shows /dev/nvidia1 alone; TP 1 x PP 1"),
    ],
)
def test_device_nodes_decide_where_they_are_as_many_as_the_sizes_take(
    needed: Sizes, opened: Sequence[int] | None, shown: Sequence[int] | None, gpus: tuple[str, ...], evidence: str
) -> None:
    assert by_nodes(needed, opened, shown) == Placement(gpus, evidence)


@pytest.mark.parametrize(
    ("needed", "opened", "shown", "doubt"),
    [
        # a privileged container: CUDA has opened all that it sees
        (ONE, (0, 1), (0, 1, 2, 3), "its processes have /dev/nvidia0, /dev/nvidia1 open, TP 1 x PP 1 takes 1"),
        (ONE, None, (0, 1), "its /dev shows /dev/nvidia0, /dev/nvidia1 alone, TP 1 x PP 1 takes 1"),
        (
            UNTOLD,
            (0, 1),
            None,
            "its processes have /dev/nvidia0, /dev/nvidia1 open, and the command line does not tell how many it takes",
        ),
        (ONE, (7,), (7,), "its processes have /dev/nvidia7 open, and NVML shows not all of these"),
        # all of its files may be read, and none is a GPU's: whatever it computes on is none of these
        (ONE, (), (1,), "nothing tells which of the GPUs it holds (4 on this host)"),
        (ONE, None, (), "nothing tells which of the GPUs it holds (4 on this host)"),
        (ONE, None, None, "nothing tells which of the GPUs it holds (4 on this host)"),
    ],
)
def test_device_nodes_that_do_not_fit_are_no_mapping(
    needed: Sizes, opened: Sequence[int] | None, shown: Sequence[int] | None, doubt: str
) -> None:
    assert by_nodes(needed, opened, shown) == Placement(None, f"mapping unknown: {doubt}")


def test_what_the_environment_or_nvml_says_comes_before_device_nodes() -> None:
    assert by_nodes(ONE, (0,), None, {"NVIDIA_VISIBLE_DEVICES": B}).gpus == (B,)
    host = NUMBERED._replace(compute_pids={C: [11]})
    assert by_nodes(ONE, (0, 1), (0, 1), host=host) == Placement(
        (C,), "NVML sees its processes compute there; TP 1 x PP 1"
    )
    # an engine that is loading computes on one of the two that it holds
    assert by_nodes(TWO, (0, 1), None, host=host).gpus == (C, D)


def test_device_nodes_that_nvml_contradicts_are_no_mapping() -> None:
    host = NUMBERED._replace(compute_pids={A: [11]})
    assert by_nodes(TWO, (0, 1), None, host=host).evidence == (
        "mapping unknown: NVML sees its processes on 1, TP 2 x PP 1 takes 2; its processes have /dev/nvidia0, "
        f"/dev/nvidia1 open, and NVML sees its processes on {A}"
    )


def test_device_nodes_without_their_numbers_tell_nothing() -> None:
    assert by_nodes(ONE, (0,), (0,), host=FOUR).gpus is None
    assert by_nodes(ONE, (0,), (0,), {**VOID, "CUDA_VISIBLE_DEVICES": "0"}, FOUR).gpus == (A,)


@pytest.mark.parametrize(
    ("container", "visible", "shown", "gpus", "evidence"),
    [
        ("void", "0", (0,), (D,), "CUDA_VISIBLE_DEVICES=0 of /dev/nvidia0; TP 1 x PP 1"),
        ("void", "1", (1, 2), (C,), "CUDA_VISIBLE_DEVICES=1 of /dev/nvidia1, /dev/nvidia2; TP 1 x PP 1"),
        ("void", "1", (0, 1, 2, 3), (B,), "CUDA_VISIBLE_DEVICES=1; TP 1 x PP 1"),
        ("all", None, (0,), (D,), "NVIDIA_VISIBLE_DEVICES=all of /dev/nvidia0; TP 1 x PP 1"),
        ("all", "0", (0,), (D,), "NVIDIA_VISIBLE_DEVICES=all CUDA_VISIBLE_DEVICES=0 of /dev/nvidia0; TP 1 x PP 1"),
        # the variable's own list is what was let in, or a privileged container is shown more
        (A, "0", (0, 3), (A,), f"NVIDIA_VISIBLE_DEVICES={A} CUDA_VISIBLE_DEVICES=0; TP 1 x PP 1"),
    ],
)
def test_cuda_counts_the_gpus_that_its_container_was_let_into(
    container: str, visible: str | None, shown: Sequence[int], gpus: tuple[str, ...], evidence: str
) -> None:
    cuda = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert by_nodes(ONE, None, shown, {"NVIDIA_VISIBLE_DEVICES": container, **cuda}) == Placement(gpus, evidence)


def test_an_index_among_gpus_that_nvml_does_not_show_is_no_mapping() -> None:
    found = by_nodes(ONE, None, (0, 7), {**VOID, "CUDA_VISIBLE_DEVICES": "0"})
    assert found.evidence.startswith("mapping unknown: CUDA_VISIBLE_DEVICES=0 names what NVML does not know; ")
    assert by_nodes(ONE, None, (0, 7), {**VOID, "CUDA_VISIBLE_DEVICES": A}).gpus == (A,)


def test_one_engine_and_one_gpu_belong_together() -> None:
    single = Host((A,), {}, has_accelerator=True)
    assert placed(UNTOLD, {}, single, only=True) == Placement((A,), "one engine and one GPU on this host")
    assert placed(ONE, {}, single, only=False).gpus is None
    assert placed(TWO, {}, single, only=True).gpus is None
    assert placed(ONE, {"CUDA_VISIBLE_DEVICES": "1"}, single, only=True).gpus is None
    assert placed(ONE, {}, FOUR, only=True) == Placement(
        None, "mapping unknown: nothing tells which of the GPUs it holds (4 on this host)"
    )


M1, M2 = "MIG-11111111-0000-0000-0000-000000000000", "MIG-22222222-0000-0000-0000-000000000000"
UNTOLD_INSTANCE = f"{B} is cut into 2 MIG instances, and nothing tells which it holds"
CUT = Host((A, B), {M1: [], M2: [71]}, has_accelerator=True, instances={B: (M1, M2)})


@pytest.mark.parametrize(
    ("environment", "tree", "gpus", "evidence"),
    [
        ({"NVIDIA_VISIBLE_DEVICES": M1}, [70], (M1,), f"NVIDIA_VISIBLE_DEVICES={M1}; TP 1 x PP 1"),
        (
            {"NVIDIA_VISIBLE_DEVICES": M1, "CUDA_VISIBLE_DEVICES": "0"},
            [70],
            (M1,),
            f"NVIDIA_VISIBLE_DEVICES={M1} CUDA_VISIBLE_DEVICES=0; TP 1 x PP 1",
        ),
        # no program holds a GPU that is cut: it is the instance in which its processes compute
        ({"NVIDIA_VISIBLE_DEVICES": B}, [70, 71], (M2,), f"NVIDIA_VISIBLE_DEVICES={B}; TP 1 x PP 1"),
        ({}, [71], (M2,), "NVML sees its processes compute there; TP 1 x PP 1"),
        (
            {"NVIDIA_VISIBLE_DEVICES": B},
            [70],
            None,
            f"mapping unknown: NVIDIA_VISIBLE_DEVICES={B}: {UNTOLD_INSTANCE}",
        ),
    ],
)
def test_of_a_gpu_that_is_cut_an_engine_holds_instances(
    environment: dict[str, str], tree: list[int], gpus: tuple[str, ...] | None, evidence: str
) -> None:
    assert placed(ONE, environment, CUT, tree) == Placement(gpus, evidence)


def test_one_engine_and_one_gpu_that_is_cut_belong_together_only_through_its_one_instance() -> None:
    one = Host((A,), {}, has_accelerator=True, instances={A: (M1,)})
    assert placed(ONE, {}, one, only=True).gpus == (M1,)
    none = placed(ONE, {}, one._replace(instances={A: (M1, M2)}), only=True)
    assert none.gpus is None
    assert "is cut into 2 MIG instances" in none.evidence


def test_device_nodes_are_of_whole_gpus_and_tell_of_no_instance() -> None:
    host = CUT._replace(minors={0: A, 1: B})
    assert by_nodes(ONE, (1,), (1,), host=host) == Placement(
        None, f"mapping unknown: its processes have /dev/nvidia1 open: {UNTOLD_INSTANCE}"
    )
    assert by_nodes(ONE, (0,), (0,), host=host).gpus == (A,)
    # kvtally may be shown one instance of several, so that one alone is no evidence either
    alone = host._replace(instances={B: (M1,)})
    assert by_nodes(ONE, (1,), (1,), host=alone).evidence == (
        "mapping unknown: nothing tells which of the GPUs it holds (2 on this host)"
    )
    single = Host((B,), {}, has_accelerator=True, instances={B: (M1,)}, minors={1: B})
    assert by_nodes(ONE, (1,), (1,), host=single) == Placement((M1,), "one engine and one GPU on this host")


def test_where_processes_have_other_numbers_than_nvml_gives_them_the_reason_says_so() -> None:
    host = FOUR._replace(has_own_pids=True)
    assert placed(ONE, {}, host).evidence == (
        "mapping unknown: nothing tells which of the GPUs it holds (4 on this host); NVML numbers processes as the "
        "host does, and this container numbers its own: hostPID: true, or NVIDIA_VISIBLE_DEVICES in its environment, "
        "or gpus in kvtally.toml"
    )
    assert placed(ONE, {"CUDA_VISIBLE_DEVICES": "1"}, host).gpus == (B,)


def test_the_hosts_own_pid_namespace_is_known_by_its_number(tmp_path: Path) -> None:
    assert numbers_as_host(str(tmp_path))  # a kernel without namespaces
    link = tmp_path / "self" / "ns" / "pid"
    link.parent.mkdir(parents=True)
    link.symlink_to("pid:[4026531836]")
    assert numbers_as_host(str(tmp_path))
    link.unlink()
    link.symlink_to("pid:[4026532461]")
    assert not numbers_as_host(str(tmp_path))


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
