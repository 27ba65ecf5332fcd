from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from email.parser import HeaderParser
from pathlib import Path
from typing import NamedTuple

import pytest

import kvtally

ROOT = Path(__file__).parents[1]
FOLDERS = ("agent", "collectors", "migrations")
PACKED = f"kvtally-{kvtally.__version__}"
LEFT_BEHIND = {".pyc", ".db", ".db-wal", ".db-shm"}


class Built(NamedTuple):
    """A wheel and an sdist of this checkout."""

    wheel: Path
    sdist: Path


def build(source: Path, folder: Path, *targets: str) -> None:
    options = [word for target in targets for word in ("-t", target)]
    command = [sys.executable, "-m", "hatchling", "build", *options, "-d", str(folder)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("dist")
    build(ROOT, folder, "wheel", "sdist")
    return Built(folder / f"{PACKED}-py3-none-any.whl", folder / f"{PACKED}.tar.gz")


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_wheel_installs_one_package_and_nothing_else(built: Built) -> None:
    assert {name.split("/")[0] for name in contents(built.wheel)} == {"kvtally", f"{PACKED}.dist-info"}


def test_the_wheel_holds_every_file_of_the_three_folders_and_of_the_front_door(built: Built) -> None:
    expected = {f"kvtally/{name}" for name in ("__init__.py", "__main__.py", "py.typed")}
    for folder in FOLDERS:
        files = (path for path in (ROOT / folder).rglob("*") if path.is_file() and path.suffix not in LEFT_BEHIND)
        expected |= {f"kvtally/{path.relative_to(ROOT)}" for path in files}
    assert {name for name in contents(built.wheel) if name.startswith("kvtally/")} == expected


@pytest.mark.parametrize("name", ["agent/rate_card.toml", "agent/rates_owned_example.toml"])
def test_the_wheel_carries_its_data(built: Built, name: str) -> None:
    assert contents(built.wheel)[f"kvtally/{name}"] == (ROOT / name).read_bytes()


def test_the_wheel_carries_a_recording_for_the_demo(built: Built) -> None:
    data = [name for name in contents(built.wheel) if name.startswith("kvtally/agent/demo/") and ".tar." in name]
    assert len(data) == 1


def test_the_wheel_names_its_licence_and_its_command(built: Built) -> None:
    files = contents(built.wheel)
    assert files[f"{PACKED}.dist-info/licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()
    assert b"Apache License" in (ROOT / "LICENSE").read_bytes()
    metadata = HeaderParser().parsestr(files[f"{PACKED}.dist-info/METADATA"].decode())
    assert (metadata["Name"], metadata["Version"]) == ("kvtally", kvtally.__version__)
    assert (metadata["License-Expression"], metadata["Requires-Python"]) == ("Apache-2.0", ">=3.11")
    assert b"kvtally = kvtally.agent.cli:main" in files[f"{PACKED}.dist-info/entry_points.txt"]


def test_the_wheel_imports_from_its_own_files(built: Built, tmp_path: Path) -> None:
    with zipfile.ZipFile(built.wheel) as archive:
        archive.extractall(tmp_path)
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import kvtally.agent.config, kvtally.agent.ledger, kvtally.collectors.base, kvtally.migrations\n"
        "print(*(sys.modules[name].__file__ for name in sorted(sys.modules) if name.startswith('kvtally')), sep='\\n')"
    )
    done = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, check=True)
    files = done.stdout.split()
    assert len(files) > 5
    assert all(Path(file).is_relative_to(tmp_path) for file in files)


def test_the_sdist_builds_the_same_wheel_without_the_links_of_a_checkout(built: Built, tmp_path: Path) -> None:
    with tarfile.open(built.sdist) as archive:
        assert not [member.name for member in archive if member.issym() or member.islnk()]
        archive.extractall(tmp_path, filter="data")
    build(tmp_path / PACKED, tmp_path / "dist", "wheel")
    assert contents(tmp_path / "dist" / built.wheel.name) == contents(built.wheel)


def test_a_checkout_reaches_its_folders_through_links_that_do_not_leave_it() -> None:
    for folder in FOLDERS:
        link = ROOT / "src/kvtally" / folder
        assert link.is_symlink()
        assert link.readlink() == Path("../..") / folder


def test_the_lock_pins_every_requirement_with_hashes_and_names_no_place() -> None:
    text = (ROOT / "requirements.lock").read_text()
    assert not [word for word in ("://", "--index", "--find-links", "file:", "/work", "/root") if word in text]
    pins = [line for line in text.replace("\\\n", "").splitlines() if line and not line.lstrip().startswith("#")]
    assert all("==" in pin and "--hash=sha256:" in pin for pin in pins)
