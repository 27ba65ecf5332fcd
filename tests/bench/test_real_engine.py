from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import pytest
from tests.bench import meter
from tests.daemon_process import DaemonProcess
from tests.loopback import Tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

PYTHON = "KVTALLY_VLLM_PYTHON"
MISSING = (
    f"set ${PYTHON} to a Python that has vLLM 0.11.1 or later (`pip install vllm` into a venv of its own; without a "
    "GPU, vLLM's CPU build): this test serves a tiny random model with it, and skipping it would prove nothing"
)
SEED = 20261123
READY_SECONDS = 300
CLIENTS = 4
SHARED_TOKENS = 256  # of the prompts' beginnings: what the prefix cache finds
BLOCK_TOKENS = 32
# on a CPU: no network, one core that it is bound to, a cache of 1 GiB
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_CPU_OMP_THREADS_BIND": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "OMP_NUM_THREADS": "1",
}
OPTIONS = (
    *("--served-model-name", "tiny", "--load-format", "dummy", "--host", "127.0.0.1", "--max-model-len", "4096"),
    *(
        "--block-size",
        str(BLOCK_TOKENS),
        "--enforce-eager",
        "--enable-prefix-caching",
        "--enable-prompt-tokens-details",
    ),
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


class Request(NamedTuple):
    """One request: token ids, so that the length of its prompt is exact."""

    prompt: tuple[int, ...]
    generate: int


class Driver:
    """Sends requests side by side and keeps what the engine says that each took."""

    def __init__(self, port: int) -> None:
        self.answered = Tokens()
        self.requests = 0
        self.unanswered: list[Request] = []
        self._port = port
        self._lock = threading.Lock()

    def send(self, requests: Sequence[Request], clients: int = CLIENTS) -> None:
        """Return when all are answered, or have failed because the engine was killed."""
        with ThreadPoolExecutor(clients) as pool:
            list(pool.map(self._send, requests))

    def _send(self, request: Request) -> None:
        body = {
            "model": "tiny",
            "prompt": request.prompt,
            "max_tokens": request.generate,
            "temperature": 0,
            "ignore_eos": True,
        }
        with contextlib.closing(HTTPConnection("127.0.0.1", self._port, timeout=600)) as connection:
            try:
                connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
                answer = connection.getresponse()
                text = answer.read()
            except (OSError, HTTPException):
                with self._lock:
                    self.unanswered.append(request)
                return
        assert answer.status == 200, text
        usage = json.loads(text)["usage"]
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        assert usage["prompt_tokens"] == len(request.prompt)
        with self._lock:
            self.requests += 1
            self.answered = self.answered.plus(Tokens(usage["prompt_tokens"], cached, usage["completion_tokens"]))


def traffic(seed: int, count: int) -> list[Request]:
    """Requests of which most share one of three beginnings."""
    chance = random.Random(seed)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(chance.randrange(16, 2048) for _ in range(count))

    beginnings = [tokens(SHARED_TOKENS) for _ in range(3)]
    return [
        Request((*chance.choice([*beginnings, ()]), *tokens(chance.randrange(50, 600))), chance.randrange(4, 64))
        for _ in range(count)
    ]


class Vllm:
    """A real engine on a loopback port; it may be killed and started again."""

    def __init__(self, python: str, model: Path, port: int, log: Path) -> None:
        self.name = f"127.0.0.1:{port}"
        self.killed_ns = 0
        self._port = port
        self._command = (python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", str(port))
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> Self:
        """Return when it answers."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*self._command, *OPTIONS],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | ENVIRONMENT,
                start_new_session=True,  # so that its workers can be killed with it
            )
        deadline = time.monotonic() + READY_SECONDS
        while not self._answers():
            ended = self._process.poll() is not None
            assert not ended, f"vLLM does not start:\n{self._end_of_log()}"
            assert time.monotonic() < deadline, f"vLLM is not ready after {READY_SECONDS} s:\n{self._end_of_log()}"
            time.sleep(0.25)
        return self

    def _answers(self) -> bool:
        with contextlib.closing(HTTPConnection("127.0.0.1", self._port, timeout=5)) as connection:
            try:
                connection.request("GET", "/health")
                return connection.getresponse().status == 200
            except (OSError, HTTPException):
                return False

    def _end_of_log(self) -> str:
        return "\n".join(self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-40:])

    def kill(self) -> None:
        """Kill it with all its workers, as an out-of-memory killer would."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self.killed_ns = time.time_ns()
            self._process = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.kill()


@pytest.fixture(scope="module")
def python() -> str:
    found = shutil.which(os.environ.get(PYTHON, ""))
    if found is None:
        pytest.fail(MISSING)
    done = subprocess.run([found, "-c", "import vllm, transformers, tokenizers"], capture_output=True, check=False)
    if done.returncode:
        pytest.fail(f"{found}: {done.stderr.decode().strip().splitlines()[-1]}; {MISSING}")
    return found


@pytest.fixture(scope="module")
def model(python: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    script = Path(__file__).with_name("tiny_model.py")
    subprocess.run([python, str(script), str(folder)], check=True, capture_output=True)
    return folder


@pytest.fixture
def engine(python: str, model: Path, tmp_path: Path) -> Iterator[Vllm]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with Vllm(python, model, port, tmp_path / "vllm.log") as running:
        yield running


@pytest.fixture
def daemon(engine: Vllm, tmp_path: Path) -> Iterator[DaemonProcess]:
    """It knows the port and nothing else; the engine has not been asked for anything when it reads it first."""
    port = engine.name.partition(":")[2]
    with DaemonProcess(tmp_path, f"[scrape]\nports = [{port}]\n", "--interval", "1") as running:
        running.wait_until("the first scrape", lambda: running.knows(engine.name))
        yield running


@contextlib.contextmanager
def beside(work: Callable[[], None]) -> Iterator[None]:
    """Do two things at once."""
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(work)
        yield
        done.result()


def tokens_of(cost: dict[str, Any]) -> Tokens:
    (group,) = cost["groups"]
    tokens = group["tokens"]
    assert tokens["prompt"] == tokens["computed"] + sum(tokens["cached"].values())
    return Tokens(tokens["prompt"], tokens["cached"]["hbm"], tokens["generated"])


def two_intervals() -> None:
    """What was served is counted by then."""
    time.sleep(2.5)


def test_real_engine_cost_is_what_the_engine_answered_to_the_token(engine: Vllm, daemon: DaemonProcess) -> None:
    driver = Driver(int(engine.name.partition(":")[2]))
    for part in (1, 2):
        with beside(lambda seed=part: driver.send(traffic(SEED + seed, 60))):  # type: ignore[misc]  # a default binds it
            time.sleep(2 + part)
            daemon.kill()
            time.sleep(1.5 * part)
            daemon.start()
    two_intervals()
    engine.kill()
    engine.start()
    cpu_ns, scrapes = meter.cpu_ns(daemon.pid), len(daemon.rows(engine.name))
    driver.send(traffic(SEED + 3, 120))
    two_intervals()
    cpu_ns = meter.cpu_ns(daemon.pid) - cpu_ns
    scrapes = len(daemon.rows(engine.name)) - scrapes
    assert daemon.stop() == 0
    cost = daemon.cost()
    print(  # noqa: T201  # what a real run is for
        f"\n{driver.requests} requests, as the engine answered {driver.answered}, kvtally cost {tokens_of(cost)}; "
        f"CPU of kvtally {cpu_ns / 1e6 / scrapes:.2f} ms a scrape over {scrapes}; findings "
        + ", ".join(finding["kind"] for finding in cost["findings"])
    )
    assert not driver.unanswered
    assert driver.answered.cached > 0
    assert tokens_of(cost) == driver.answered
    assert len(daemon.findings("not_watched")) == 2
    assert len(daemon.findings("engine_restarted")) == 1
    assert daemon.findings("tokens_lost", "identity_broken", "counter_backwards") == []
    assert cpu_ns / scrapes < 50e6  # a fault of a factor, not a benchmark


def test_real_engine_that_dies_at_work_leaves_a_finding_with_the_span_of_what_nobody_counted(
    engine: Vllm, daemon: DaemonProcess
) -> None:
    driver = Driver(int(engine.name.partition(":")[2]))
    driver.send(traffic(SEED + 4, 30))
    two_intervals()
    long = [Request(request.prompt[:300], 3000) for request in traffic(SEED + 5, 8)]
    with beside(lambda: driver.send(long, clients=len(long))):
        time.sleep(2.3)
        engine.kill()
    assert len(driver.unanswered) == len(long)
    time.sleep(1.2)  # the page's process_start_time_seconds is up to a second early: boot time is a whole second
    engine.start()
    driver.send(traffic(SEED + 6, 30))
    two_intervals()
    assert daemon.stop() == 0
    cost = daemon.cost()
    counted = tokens_of(cost)
    print(  # noqa: T201  # as above
        f"\nas the engine answered {driver.answered}, kvtally cost {counted}, "
        f"unanswered {sum(len(one.prompt) for one in long)} prompt tokens; "
        + "; ".join(f"{one['kind']}: {one['message']}" for one in cost["findings"])
    )
    (finding,) = daemon.findings("tokens_lost")
    _, target, start_ns, end_ns = finding
    assert target == f"engine/{engine.name}/0"
    assert start_ns < engine.killed_ns < end_ns
    assert "tokens_lost" in {one["kind"] for one in cost["findings"]}
    assert driver.answered.prompt <= counted.prompt <= driver.answered.prompt + sum(len(one.prompt) for one in long)
    most = sum(one.generate for one in long)
    assert driver.answered.generated <= counted.generated < driver.answered.generated + most
