from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings
from tests import command_line

if TYPE_CHECKING:
    from collections.abc import Callable

GOLDEN = Path(__file__).parent / "golden"

# A landing is judged by its change, not by the luck of that run's examples: `just fuzz` looks for new ones. No example
# has a time limit, since a busy machine would decide it.
settings.register_profile("same", deadline=None, derandomize=True)
settings.register_profile("fuzz", deadline=None, max_examples=300)
settings.load_profile("same")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-goldens", action="store_true", help="write tests/golden anew: review it by diff")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compares what a person sees with the file of that name in tests/golden."""

    def compare(name: str, shown: str) -> None:
        shown = "".join(f"{line.rstrip()}\n" for line in shown.splitlines())  # tables pad their last column
        path = GOLDEN / name
        if request.config.getoption("--update-goldens"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(shown, encoding="utf-8")
        assert shown == path.read_text(encoding="utf-8"), f"{path} (after a look: pytest --update-goldens)"

    return compare


@pytest.fixture
def kvtally(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> command_line.Call:
    """The command line, in an empty folder and with nothing of ours in the environment."""
    command_line.isolate(monkeypatch, tmp_path)
    return command_line.call


@pytest.fixture(scope="session")
def demo_ledger(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The URL of a ledger that the packaged recording was replayed into; nothing writes it."""
    return command_line.replayed(tmp_path_factory.mktemp("demo") / "demo.db")
