from __future__ import annotations

import json
import re
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest
from tests.loopback import Server, answer

from kvtally.agent.config import load
from kvtally.agent.doctor import answer_of, examine
from kvtally.agent.replica import About
from kvtally.agent.sources import Found
from kvtally.collectors.base import CollectError, NoData, Reading
from kvtally.collectors.quantities import QUANTITIES

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator, Mapping

    from tests.command_line import Call

    from kvtally.agent.doctor import Checked

PAGES = Path(__file__).parent / "fixtures" / "pages"
V012 = (PAGES / "cpu-v012" / "1795410619075.prom").read_bytes()
V016 = (PAGES / "cpu-v016" / "1795410049451.prom").read_bytes()
V032 = (PAGES / "cpu-v032" / "1795408686554.prom").read_bytes()
LMCACHE = (PAGES / "h100-v025-lmcache" / "1795409582483.prom").read_bytes()
WITHOUT_LMCACHE = b"".join(line for line in LMCACHE.splitlines(keepends=True) if not line.startswith(b"lmcache"))
# nothing of this machine but its loopback
QUIET = """
[scrape]
discover = false
[gpu]
enabled = false
[host]
disks = false
processes = false
cgroup = false
"""


def engine(page: bytes, version: str | None) -> Server:
    """Serves a page as an engine of that version does; None: /version is not there."""

    def talk(connection: socket.socket, target: str) -> bool:
        if target.startswith("/version"):
            known = json.dumps({"version": version}).encode()
            connection.sendall(answer(b"", "404 Not Found") if version is None else answer(known))
        else:
            connection.sendall(answer(page))
        return True

    return Server(talk)


@pytest.fixture
def examined(kvtally: Call) -> Iterator[Callable[..., tuple[int, str]]]:
    """Calls the doctor on engines that serve these pages: its status, and what it shows, their ports counted up."""
    with ExitStack() as stack:

        def call(*pages: tuple[bytes, str | None], form: str = "json", gpu: str = '"GPU-{}"') -> tuple[int, str]:
            servers = [stack.enter_context(engine(page, version)) for page, version in pages]
            tables = "".join(
                f'[[engine]]\nurl = "http://{server.origin}/metrics"\ngpus = [{gpu.format(number)}]\n'
                for number, server in enumerate(servers)
            )
            Path("kvtally.toml").write_text(QUIET + tables, encoding="utf-8")
            status, out, err = kvtally("doctor", "--format", form, "--ledger", "sqlite:////nowhere/ledger.db")
            assert err == ""
            for number, server in enumerate(servers):
                out = out.replace(server.origin, f"127.0.0.1:{8000 + number}")
            return status, out

        yield call


def test_what_is_found_is_shown(examined: Callable[..., tuple[int, str]], golden: Callable[[str, str], None]) -> None:
    pages = [(V032, "0.32.0"), (V012, "0.12.0"), (V016, "0.17.1"), (WITHOUT_LMCACHE, None), (LMCACHE, "0.25.1")]
    pages += [(b"<html>hello</html>", "0.32.0")]
    for form, name in (("table", "doctor.txt"), ("json", "doctor.json")):
        status, out = examined(*pages, form=form)
        assert status == 0
        golden(name, out)


def test_without_an_engine_the_answer_is_no(kvtally: Call) -> None:
    Path("kvtally.toml").write_text(QUIET, encoding="utf-8")
    status, out, err = kvtally("doctor")
    assert (status, err) == (1, "")
    found = json.loads(out)
    assert (found["metered_engines"], found["verdict"]) == (0, "Nothing can be metered here yet.")
    first = found["targets"][0]
    assert (first["target"], first["state"]) == ("engine", "failed")
    assert "looking for them is switched off" in first["summary"]


def test_ports_that_were_tried_are_named_as_spans(kvtally: Call) -> None:
    text = QUIET.replace("discover = false", "ports = [1, 3, 4, 5, 2, 9]")
    Path("kvtally.toml").write_text(text, encoding="utf-8")
    status, out, _ = kvtally("doctor", "--format", "table")
    assert status == 1
    assert "no vLLM engine answers on this host's ports 1 to 5, 9" in out


def test_an_engine_that_is_well_is_ok_and_the_answer_is_yes(examined: Callable[..., tuple[int, str]]) -> None:
    status, out = examined((V032, "0.32.0"))
    assert status == 0
    found = json.loads(out)
    target = found["targets"][0]
    assert target == {
        "target": "engine 127.0.0.1:8000",
        "state": "ok",
        "summary": "vLLM 0.32.0, tiny, whole page read",
        "missing": [],
        "hint": "",
    }
    assert found["verdict"] == "1 engine can be metered: `kvtally run` does it"


def test_an_engine_before_0_16_is_partial_and_the_hint_is_to_upgrade(examined: Callable[..., tuple[int, str]]) -> None:
    status, out = examined((V012, "0.12.0"))
    assert status == 0
    target = json.loads(out)["targets"][0]
    assert target["state"] == "partial"
    assert [(each["what"], each["hint"]) for each in target["missing"]] == [
        ("prompt tokens by source", "vLLM counts them since 0.16: upgrade")
    ]


def test_tokens_of_an_outer_tier_without_its_families_name_the_variable_to_set(
    examined: Callable[..., tuple[int, str]],
) -> None:
    _, out = examined((WITHOUT_LMCACHE, "0.25.1"))
    (missing,) = json.loads(out)["targets"][0]["missing"]
    assert missing["what"] == "LMCache's families"
    assert "PROMETHEUS_MULTIPROC_DIR" in missing["hint"]
    _, out = examined((LMCACHE, "0.25.1"))
    (with_them,) = (one for one in json.loads(out)["targets"] if one["target"].startswith("engine"))
    assert with_them["missing"] == []
    assert "cache: lmcache" in with_them["summary"]


def test_a_page_without_token_counters_cannot_be_metered(examined: Callable[..., tuple[int, str]]) -> None:
    hidden = (b"vllm:prompt_tokens", b"vllm:generation_tokens")
    page = b"".join(line for line in V032.splitlines(keepends=True) if not line.startswith(hidden))
    status, out = examined((page, "0.32.0"))
    assert status == 1
    target = json.loads(out)["targets"][0]
    assert target["state"] == "failed"
    assert {"prompt_tokens", "generated_tokens"} <= {each["what"] for each in target["missing"]}
    assert any("--disable-log-stats" in each["hint"] for each in target["missing"])


def test_an_engine_whose_gpus_nobody_knows_says_what_to_write(examined: Callable[..., tuple[int, str]]) -> None:
    found = checked_engine(About(mapping="two engines and two GPUs"))
    (missing,) = found.missing
    assert missing.what == "which GPUs it holds"
    assert missing.hint == (
        'two engines and two GPUs. In kvtally.toml: engine = [{ url = "http://127.0.0.1:8000/metrics", '
        'gpus = ["GPU-…"] }]'
    )
    assert found.state == "partial"
    _, out = examined((V032, "0.32.0"), gpu="")
    assert json.loads(out)["targets"][0]["state"] == "ok"


@pytest.mark.parametrize("config", ["[scrape]\nfrequency = 5\n", "[[engine]]\nurl = 'ftp://x/metrics'\n"])
def test_a_config_that_is_wrong_is_a_wrong_call(config: str, kvtally: Call) -> None:
    Path("kvtally.toml").write_text(config, encoding="utf-8")
    status, out, err = kvtally("doctor")
    assert (status, out, err.count("\n")) == (2, "", 1)


def test_the_ledger_is_looked_at_too(kvtally: Call) -> None:
    Path("kvtally.toml").write_text(QUIET, encoding="utf-8")

    def ledger(*arguments: str) -> dict[str, str]:
        found = json.loads(kvtally("doctor", *arguments).out)["targets"][-1]
        assert found["target"] == "ledger"
        return {key: found[key] for key in ("state", "summary", "hint")}

    there = f"{Path.cwd()}/on.db"
    arguments = ("--ledger", "sqlite:///on.db")
    assert ledger(*arguments) == {
        "state": "no_data",
        "summary": f"{there}: not there yet",
        "hint": "`kvtally run` makes it",
    }
    assert not Path(there).exists()
    kvtally("ledger", "upgrade", *arguments)
    assert ledger(*arguments) == {"state": "ok", "summary": there, "hint": ""}
    Path(there).write_bytes(b"")
    assert ledger(*arguments)["hint"] == "run `kvtally ledger upgrade`"
    Path(there).write_text("this is no database, and long enough to be looked at " * 3, encoding="utf-8")
    damaged = ledger(*arguments)
    assert damaged["state"] == "failed"
    assert re.search("damaged or not a SQLite database", damaged["summary"])


class Page(NamedTuple):
    """A source that gives what a test says."""

    source: str
    gives: tuple[Reading, ...] | Exception
    name: str = "127.0.0.1:8000"
    restricted: bool = False

    def collect(self) -> tuple[Reading, ...]:
        if isinstance(self.gives, Exception):
            raise self.gives
        return self.gives


class Host(NamedTuple):
    """The sources of a host."""

    engines: tuple[Page, ...]
    abouts: Mapping[str, About]


def reading(kind: str, name: str, attributes: Mapping[str, str], **told: float | None) -> Reading:
    values = tuple(told.get(quantity.name, 0.0) for quantity in QUANTITIES[kind])  # type: ignore[index]  # a kind
    return Reading(kind, name, attributes, values)  # type: ignore[arg-type]  # as above


def checked(page: Page, about: About, *others: Page) -> list[Checked]:
    config = load(None, {"KVTALLY_GPU__ENABLED": "false"}, ())
    host = Host((page,), {page.name: about})
    return examine(config, host, Found((), None), lambda: 0, others)  # type: ignore[arg-type]  # what it reads of them


def checked_engine(about: About, *gives: Reading, restricted: bool = False) -> Checked:
    one = reading("engine", "127.0.0.1:8000/0", {"version": "0.32.0", "model": "m"})
    return checked(Page("vllm", gives or (one,), restricted=restricted), about)[0]


HELD = About(gpus=("GPU-a",))


def test_ranks_are_counted_and_a_restricted_page_is_said_so() -> None:
    ranks = [reading("engine", f"127.0.0.1:8000/{rank}", {"version": "0.32.0", "model": "m"}) for rank in range(3)]
    assert checked_engine(HELD, *ranks, restricted=True).summary == (
        "vLLM 0.32.0, m, 3 ranks, asked for the wanted families alone"
    )


def test_each_family_that_is_missing_says_what_is_lost() -> None:
    told = dict.fromkeys(("steps", "awake", "running_requests", "first_tokens", "prefill_ns", "prefix_hit_tokens"))
    one = Reading(
        "engine",
        "127.0.0.1:8000/0",
        {"version": "0.32.0"},
        tuple(None if quantity.name in told else 0.0 for quantity in QUANTITIES["engine"]),
    )
    found = checked_engine(HELD, one)
    assert {missing.what for missing in found.missing} == set(told)
    assert all(missing.costs for missing in found.missing)


def test_an_engine_that_hides_its_version_is_partial() -> None:
    one = reading("engine", "127.0.0.1:8000/0", {"model": "m"})
    (missing,) = checked_engine(HELD, one).missing
    assert missing.what == "the engine's version"
    assert "proxy" in missing.hint


def test_a_page_that_cannot_be_read_is_failed_with_its_reason() -> None:
    found = checked(Page("vllm", CollectError("connection refused", "is it up?")), HELD)[0]
    assert (found.state, found.summary, found.hint) == ("failed", "connection refused", "is it up?")
    empty = checked(Page("vllm", ()), HELD)[0]
    assert (empty.state, empty.summary) == ("failed", "the page names no engine")


def test_other_sources_say_what_they_see_or_why_not() -> None:
    gpu = reading("gpu", "GPU-a", {"sku": "NVIDIA H100 80GB HBM3"})
    processes = reading("process", "127.0.0.1:8000", {}, processes=3.0)
    disk = reading("filesystem", "vda", {"mounts": "/"})
    others = [
        Page("nvml", (gpu,)),
        Page("processes", (processes,)),
        Page("diskstats", (disk,)),
        Page("cgroup", NoData("no cgroup v2 here", "nothing")),
        Page("other", OSError("broken")),
    ]
    one = reading("engine", "127.0.0.1:8000/0", {"version": "0.32.0", "model": "m"})
    found = checked(Page("vllm", (one,)), HELD, *others)[1:]
    assert [(each.target, each.state, each.summary) for each in found] == [
        ("nvml", "ok", "GPU-a NVIDIA H100 80GB HBM3 (with GPM)"),
        ("processes", "ok", "3 processes"),
        ("diskstats", "ok", "vda (/)"),
        ("cgroup", "no_data", "no cgroup v2 here"),
        ("other", "failed", "OSError: broken"),
    ]


def test_a_gpu_that_is_switched_off_is_no_data() -> None:
    one = reading("engine", "127.0.0.1:8000/0", {"version": "0.32.0", "model": "m"})
    found = checked(Page("vllm", (one,)), HELD)[1]
    assert (found.target, found.state) == ("gpu", "no_data")
    assert found.summary.startswith("switched off in the config: no GPU seconds")


def test_several_engines_are_counted_in_the_verdict() -> None:
    one = checked_engine(HELD)
    assert answer_of([one, one])["verdict"] == "2 engines can be metered: `kvtally run` does it"
