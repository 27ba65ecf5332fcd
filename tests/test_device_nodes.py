from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest
from tests.rights import without_rights

from kvtally.agent.device_nodes import NVIDIA_MAJOR, Nodes, nodes_of, nvidia_major

if TYPE_CHECKING:
    from pathlib import Path

# Nodes that are everywhere stand in for GPUs': the kernel's list here gives their driver, number 1, NVIDIA's name
NULL, FULL, URANDOM = 3, 7, 9
DEVICES = "Character devices:\n  5 /dev/tty\n  1 nvidia\n  1 nvidiactl\n 10 misc\n\nBlock devices:\n  7 loop\n"


class Machine:
    """A /proc of our own making: processes with open files and a root of their own."""

    def __init__(self, proc: Path) -> None:
        self.proc = proc
        (proc / "devices").write_text(DEVICES)

    def process(self, pid: int, *opened: str, shown: tuple[str, ...] | None = None, state: str = "S") -> None:
        folder = self.proc / str(pid)
        (folder / "fd").mkdir(parents=True)
        (folder / "stat").write_text(f"{pid} (a) b) {state} 1 1 0 -1\n")
        for number, target in enumerate(opened):
            (folder / "fd" / str(number)).symlink_to(target)
        if shown is not None:
            (folder / "root" / "dev").mkdir(parents=True)
            for number, target in enumerate(shown):
                (folder / "root" / "dev" / f"nvidia{number}").symlink_to(target)

    def nodes(self, *tree: int) -> Nodes:
        return nodes_of(tree, str(self.proc))


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_a_tree_has_open_what_any_of_its_processes_has(machine: Machine) -> None:
    machine.process(100, "/dev/tty", "socket:[77]", "/dev/null", shown=("/dev/null", "/dev/full", "/dev/urandom"))
    machine.process(101, "/dev/full", "/dev/null", "/dev/full")
    machine.process(102)
    assert machine.nodes(100, 101, 102) == Nodes(frozenset((NULL, FULL)), frozenset((NULL, FULL, URANDOM)))


def test_a_node_is_told_by_its_number_and_not_by_its_name(machine: Machine) -> None:
    machine.process(100, "/dev/null", shown=("/dev/urandom",))  # docker run --device /dev/nvidia9:/dev/nvidia0
    assert machine.nodes(100) == Nodes(frozenset((NULL,)), frozenset((URANDOM,)))


def test_nodes_of_other_drivers_and_those_that_all_gpus_share_are_no_gpus(machine: Machine, tmp_path: Path) -> None:
    machine.process(100, "/dev/tty", "/dev/ptmx", shown=("/dev/tty",))
    (tmp_path / "100" / "root" / "dev" / "nvidia-caps").mkdir()
    (tmp_path / "100" / "root" / "dev" / "full").symlink_to("/dev/full")
    assert machine.nodes(100) == Nodes(frozenset(), frozenset())


def test_what_is_no_device_by_its_path_is_not_asked_for(machine: Machine, tmp_path: Path) -> None:
    """A file on a server that is gone would keep us waiting."""
    (tmp_path / "link").symlink_to("/dev/null")
    machine.process(100, str(tmp_path / "link"))
    assert machine.nodes(100).opened == frozenset()


def test_a_file_that_was_just_closed_and_a_process_that_is_gone_are_passed_over(machine: Machine) -> None:
    machine.process(100, "/dev/null", "/dev/there-is-no-such-node")
    assert machine.nodes(100, 101).opened == frozenset((NULL,))


def test_what_one_process_of_a_tree_hides_may_be_any_node(machine: Machine, tmp_path: Path) -> None:
    machine.process(100, "/dev/null", shown=("/dev/full",))
    machine.process(101)
    (tmp_path / "101" / "fd").rmdir()
    (tmp_path / "101" / "fd").touch()  # an error of any kind but that it is gone
    assert machine.nodes(100, 101) == Nodes(None, frozenset((FULL,)))


def test_a_process_that_has_ended_hides_nothing(machine: Machine, tmp_path: Path) -> None:
    machine.process(100, "/dev/null")
    machine.process(101, state="Z")
    (tmp_path / "101" / "fd").rmdir()
    (tmp_path / "101" / "fd").touch()
    assert machine.nodes(100, 101).opened == frozenset((NULL,))


def test_without_rights_nothing_is_known(machine: Machine, tmp_path: Path) -> None:
    machine.process(100, "/dev/null", shown=("/dev/null",))
    with without_rights(tmp_path / "100"):
        assert machine.nodes(100) == Nodes()


def test_of_no_process_nothing_is_known(machine: Machine) -> None:
    assert machine.nodes() == Nodes()


@pytest.mark.parametrize(
    ("devices", "major"),
    [
        (DEVICES, 1),
        ("Character devices:\n195 nvidia-frontend\n510 nvidia-uvm\n", 195),
        ("Character devices:\n  1 mem\n242 nvidia-caps\n", NVIDIA_MAJOR),
        ("", NVIDIA_MAJOR),
        (None, NVIDIA_MAJOR),
    ],
)
def test_the_drivers_number_is_the_kernels_or_else_the_one_that_nvidia_has(
    tmp_path: Path, devices: str | None, major: int
) -> None:
    if devices is not None:
        (tmp_path / "devices").write_text(devices)
    assert nvidia_major(str(tmp_path)) == major


def test_the_kernels_own_proc_shows_the_nodes_of_a_process(tmp_path: Path) -> None:
    """The real /proc, through links of its own; only the driver's number is made up."""
    (tmp_path / "devices").write_text(DEVICES)
    null = subprocess.DEVNULL
    with subprocess.Popen(["sleep", "60"], stdin=null, stdout=null, stderr=null) as process:
        (tmp_path / str(process.pid)).symlink_to(f"/proc/{process.pid}")
        found = nodes_of([process.pid], str(tmp_path))
        process.kill()
    assert found == Nodes(frozenset((NULL,)), frozenset())  # a GPU's node would be of number 195
