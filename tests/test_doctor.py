from __future__ import annotations

import json
import os
import random
import re
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from tests.ledgers import SECOND, START, Deployment, FakeEngine, new_ledger
from tests.loopback import Server, answer

from kvtally.agent.cli.doctor import _age
from kvtally.agent.config import Access, Config, Engine, Gpu
from kvtally.agent.config import Page as Listed
from kvtally.agent.doctor import answer_of, examine
from kvtally.agent.ledger.place import WriterLock
from kvtally.agent.look import Found
from kvtally.agent.model_shape import shape_text
from kvtally.agent.render.listing import doctor_table
from kvtally.agent.replica import About
from kvtally.collectors.base import CollectError, NoData, Reading
from kvtally.collectors.quantities import QUANTITIES

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator, Mapping

    from tests.command_line import Call

    from kvtally.agent.doctor import Checked

FIXTURES = Path(__file__).parent / "fixtures"
PAGES = FIXTURES / "pages"
LLAMA = FIXTURES / "model_configs" / "llama-3.1-8b.json"
V012 = (PAGES / "cpu-v012" / "1795410619075.prom").read_bytes()
V016 = (PAGES / "cpu-v016" / "1795410049451.prom").read_bytes()
V032 = (PAGES / "cpu-v032" / "1795408686554.prom").read_bytes()
V025_LMCACHE = (PAGES / "h100-v025-lmcache" / "1795409582483.prom").read_bytes()
LMCACHE_MP = next((PAGES / "lmcache-mp-056").glob("*.prom")).read_bytes()
DCGM = (FIXTURES / "dcgm" / "two-gpus.prom").read_bytes()
SGLANG = b"""\
sglang:prompt_tokens_total{model_name="qwen"} 10000.0
sglang:generation_tokens_total{model_name="qwen"} 700.0
sglang:cached_tokens_total{cache_source="device",model_name="qwen"} 2048.0
sglang:num_requests_total{model_name="qwen"} 9.0
sglang:num_running_reqs{engine_type="unified",model_name="qwen",moe_ep_rank="0",pp_rank="0",tp_rank="0"} 3.0
"""
EPP = b"""\
llm_d_epp_request_total{fairness_id="",model_name="chat",priority="0",target_model_name="llama-8b"} 7
llm_d_epp_request_input_tokens_sum{fairness_id="",model_name="chat",priority="0",target_model_name="llama-8b"} 700
"""
CACHED = b"""\
llm_d_epp_request_cached_tokens_sum{fairness_id="",model_name="chat",priority="0",target_model_name="llama-8b"} 400
"""
URL = "http://127.0.0.1:8000/metrics"
FIRST_GPU, SECOND_GPU = "GPU-604ac76c-d9cf-fef3-62e9-d92044ab6e52", "GPU-11111111-2222-3333-4444-555555555555"
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
[storage]
enabled = false
"""


def without(page: bytes, *names: bytes) -> bytes:
    """A page without the samples that begin so."""
    return b"".join(line for line in page.splitlines(keepends=True) if not line.startswith(names))


def serving(page: bytes, version: str | None) -> Server:
    """Serves a page as an engine of that version does; None: /version is not there."""

    def talk(connection: socket.socket, target: str) -> bool:
        if target.startswith("/version"):
            known = json.dumps({"version": version}).encode()
            connection.sendall(answer(b"", "404 Not Found") if version is None else answer(known))
        else:
            connection.sendall(answer(page))
        return True

    return Server(talk)


class Served(NamedTuple):
    """What stands at one address, and what the config says of it beside its address."""

    page: bytes
    version: str | None = None
    table: str = "engine"
    told: str = 'gpus = ["{first}"]'


def beside(page: bytes, told: str = "") -> Served:
    return Served(page, table="page", told=told)


@pytest.fixture
def doctor(kvtally: Call) -> Iterator[Callable[..., tuple[int, str]]]:
    """Calls the doctor on what is served: its status, and what it shows, with ports counted up from 8000."""
    with ExitStack() as stack:

        def call(
            *served: Served, form: str = "json", scrape: str = "", ledger: str = "/nowhere/ledger.db"
        ) -> tuple[int, str]:
            servers = [stack.enter_context(serving(one.page, one.version)) for one in served]
            named = {"first": FIRST_GPU, "second": SECOND_GPU, "model": str(LLAMA)}
            named |= {f"at{number}": server.origin for number, server in enumerate(servers)}
            tables = "".join(
                f'[[{one.table}]]\nurl = "http://{server.origin}/metrics"\n{one.told.format(**named)}\n'
                for one, server in zip(served, servers, strict=True)
            )
            quiet = QUIET.replace("discover = false", f"discover = false\n{scrape}")
            Path("kvtally.toml").write_text(quiet + tables, encoding="utf-8")
            status, out, err = kvtally("doctor", "--format", form, "--ledger", f"sqlite:///{ledger}")
            assert err == ""
            for number, server in enumerate(servers):
                out = out.replace(server.origin, f"127.0.0.1:{8000 + number}")
            return status, out

        yield call


def target(out: str, name: str = "engine 127.0.0.1:8000") -> dict[str, Any]:
    (found,) = [one for one in json.loads(out)["targets"] if one["target"] == name]
    assert isinstance(found, dict)
    return found


MODEL = 'gpus = ["{first}"]\nmodel_config = "{model}"'
DEPLOYMENT = (
    Served(V032, "0.32.0", told=MODEL),
    Served(V012, "0.12.0", told='gpus = ["GPU-c"]'),
    Served(V016, "0.17.1", told="gpus = []"),
    Served(without(V025_LMCACHE, b"lmcache"), None, told='connector = "LMCacheConnectorV1"'),
    Served(V025_LMCACHE, "0.25.1", told='gpus = ["{second}"]\nmodel_config = "{model}"\nkv_paths = ["/kv"]'),
    Served(b"<html>hello</html>", "0.32.0", told=""),
    Served(SGLANG, told="gpus = []"),
    Served(V032.replace(b"_created{", b"_born{"), "0.32.0", told='gpus = []\nrole = "decode"'),
    beside(DCGM),
    beside(LMCACHE_MP, 'engines = ["{at0}"]'),
    beside(EPP),
)


@pytest.mark.parametrize("columns", [80, 110])
def test_what_is_found_is_shown(
    doctor: Callable[..., tuple[int, str]],
    golden: Callable[[str, str], None],
    monkeypatch: pytest.MonkeyPatch,
    columns: int,
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    status, out = doctor(*DEPLOYMENT, form="table")
    assert status == 1
    golden(f"doctor-{columns}.txt", out)


def test_what_is_found_is_told_in_json(
    doctor: Callable[..., tuple[int, str]], golden: Callable[[str, str], None]
) -> None:
    _, out = doctor(*DEPLOYMENT[:3], DEPLOYMENT[8])
    golden("doctor.json", out)


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
    assert "no engine answers on this host's ports 1 to 5, 9" in out


def test_an_engine_that_cannot_be_read_makes_the_answer_no_beside_one_that_can(
    doctor: Callable[..., tuple[int, str]],
) -> None:
    able = (Served(V032, "0.32.0", told=MODEL), beside(DCGM))
    gone = Served(V032, told='name = "gone"\naccess.bearer_token_file = "/nowhere/token"')
    status, out = doctor(*able, gone)
    assert (status, target(out, "engine gone")["state"]) == (1, "failed")
    told = json.loads(out)
    assert (told["metered_engines"], told["engines_failed"]) == (1, 1)
    assert told["verdict"] == (
        "1 engine can be metered: `kvtally run` does it. 1 cannot be: gone; see above. Savings can be told once there "
        "is evidence."
    )
    assert (doctor(*able)[0], json.loads(doctor(*able)[1])["engines_failed"]) == (0, 0)


def test_an_engine_whose_savings_can_be_told_is_ok_and_the_answer_is_yes(
    doctor: Callable[..., tuple[int, str]],
) -> None:
    status, out = doctor(Served(V032, "0.32.0", told=MODEL), beside(DCGM))
    assert status == 0
    found = target(out)
    assert {key: found[key] for key in ("state", "summary", "version", "missing", "warnings", "hint")} == {
        "state": "ok",
        "summary": "vLLM 0.32.0, tiny, whole page read",
        "version": "0.32.0",
        "missing": [],
        "warnings": [],
        "hint": "",
    }
    assert found["savings"]["rung"] == "M3"  # the page has estimated operations
    assert [each["rung"] for each in found["savings"]["above"]] == ["M4", "M2/M5"]
    assert not set(found["counted"]) & set(found["not_counted"])
    assert len(found["counted"]) + len(found["not_counted"]) == len(QUANTITIES["engine"])
    assert json.loads(out)["verdict"] == (
        "1 engine can be metered: `kvtally run` does it. Savings can be told once there is evidence."
    )


def test_an_engine_without_estimates_of_its_work_reaches_m1_and_the_hint_names_the_flag(
    doctor: Callable[..., tuple[int, str]],
) -> None:
    page = without(V032, b"vllm:estimated")
    status, out = doctor(Served(page, "0.32.0", told=MODEL), beside(DCGM))
    savings = target(out)["savings"]
    assert (status, savings["rung"], savings["refused"]) == (0, "M1", [])
    assert savings["above"][0] == {
        "rung": "M3",
        "adds": "how much attention there was",
        "hint": "vLLM >= 0.17 with --enable-mfu-metrics",
    }
    idle = re.sub(rb"(vllm:estimated_flops_per_gpu_total\{[^}]*\}) .*", rb"\1 0.0", V032)
    _, out = doctor(Served(idle, "0.32.0", told=MODEL), beside(DCGM))
    assert target(out)["savings"]["above"][0]["hint"] == "--enable-mfu-metrics"  # it has worked: the flag is not set


@pytest.mark.parametrize(
    ("page", "version", "missing", "refused"),
    [
        (
            V012,
            "0.12.0",
            {"prompt tokens by source": "vLLM counts them since 0.16: upgrade"},
            {
                "computed_tokens": "vLLM counts prompt tokens by source since 0.16: upgrade",
                "hbm_tokens": "vLLM counts prompt tokens by source since 0.16: upgrade",
                "lengths of prompts": "vLLM tells since 0.13 (request_prefill_kv_computed_tokens): upgrade",
            },
        ),
        (V016, "0.16.0", {"clean counts of recomputed tokens": "clean since 0.20"}, {}),
        (without(V025_LMCACHE, b"lmcache"), "0.25.1", {"the outer tier's families": "PROMETHEUS_MULTIPROC_DIR"}, {}),
        (V025_LMCACHE, "0.25.1", {}, {}),
        (V032, "0.32.0", {}, {}),
        (V032, None, {"the engine's version": "/version does not answer; a proxy in front"}, {}),
    ],
)
def test_every_release_says_what_it_lacks(
    doctor: Callable[..., tuple[int, str]],
    page: bytes,
    version: str | None,
    missing: Mapping[str, str],
    refused: Mapping[str, str],
) -> None:
    status, out = doctor(Served(page, version, told=MODEL), beside(DCGM))
    found = target(out)
    for told, expected in ((found["missing"], missing), (found["savings"]["refused"], refused)):
        assert [each["what"] for each in told] == list(expected)
        assert [each["hint"] for each in told if expected[each["what"]] not in each["hint"]] == []
    assert status == bool(refused)


def test_another_engine_is_metered_and_hints_for_vllm_are_kept_from_it(
    doctor: Callable[..., tuple[int, str]],
) -> None:
    status, out = doctor(Served(SGLANG, told=MODEL), beside(DCGM))
    found = target(out)
    assert (status, found["state"], found["summary"]) == (1, "partial", "SGLang version unknown, qwen, whole page read")
    assert "steps" in {each["what"] for each in found["savings"]["refused"]}
    hints = json.dumps([found["missing"], found["savings"]])
    assert "vLLM" not in hints
    assert "--enable-" not in hints


def test_a_page_without_token_counters_cannot_be_metered(doctor: Callable[..., tuple[int, str]]) -> None:
    """As vLLM shows it with --disable-log-stats: of the process, and nothing of its own."""
    page = without(V032, b"vllm:") + b'vllm:num_requests_running{engine="0",model_name="tiny"} 0.0\n'
    status, out = doctor(Served(page, "0.32.0", told=MODEL))
    assert status == 1
    found = target(out)
    assert found["state"] == "failed"
    told = {each["what"]: each["hint"] for each in found["missing"]}
    assert {told["prompt_tokens"], told["generated_tokens"]} == {"start vLLM without --disable-log-stats"}
    assert json.loads(out)["verdict"] == "Nothing can be metered here yet."


def test_a_server_of_lmcache_is_named_with_the_engines_that_it_serves(doctor: Callable[..., tuple[int, str]]) -> None:
    engine = Served(without(V025_LMCACHE, b"lmcache"), "0.25.1", told=MODEL + '\nconnector = "LMCacheMPConnector"')
    _, out = doctor(engine, beside(DCGM))
    (missing,) = target(out)["missing"]
    assert (
        "list the page of LMCache's server (--http-port), in kvtally.toml, in a [[page]] of its own" in missing["hint"]
    )
    # it is joined by the connector, and nothing is missing then
    status, out = doctor(engine, beside(DCGM), beside(LMCACHE_MP))
    assert (status, target(out)["missing"]) == (0, [])
    assert "cache: lmcache" in target(out)["summary"]
    page = target(out, "page:127.0.0.1:8002")
    assert (page["state"], page["missing"]) == ("ok", [])
    assert page["summary"].startswith("LMCache multiprocess server: ")
    assert "lookup_tokens" in page["counted"]


def test_a_cache_whose_engines_nobody_knows_says_so(doctor: Callable[..., tuple[int, str]]) -> None:
    _, out = doctor(Served(V032, "0.32.0", told=MODEL + '\nconnector = "NixlConnector"'), beside(LMCACHE_MP))
    (missing,) = target(out, "page:127.0.0.1:8001")["missing"]
    assert (missing["what"], missing["hint"]) == ("the engines behind it", "name them: engines = […] of its [[page]]")
    _, out = doctor(Served(V032, "0.32.0", told=MODEL), beside(LMCACHE_MP, 'engines = ["{at0}", "old:8000"]'))
    (missing,) = target(out, "page:127.0.0.1:8001")["missing"]
    assert missing["costs"] == "it is said to serve old:8000, and no such engine is read here"


def test_events_that_lmcache_dropped_make_its_counts_lower_bounds(doctor: Callable[..., tuple[int, str]]) -> None:
    page = re.sub(rb"(event_bus_dropped_events_total\{[^}]*\}) .*", rb"\1 1234.0", LMCACHE_MP)
    _, out = doctor(Served(V032, "0.32.0", told=MODEL), beside(page, 'engines = ["{at0}"]'))
    (missing,) = target(out, "page:127.0.0.1:8001")["missing"]
    assert missing["costs"] == "LMCache has dropped 1,234 events since its start, so its counts are lower bounds"


@pytest.mark.parametrize(("health", "lacks"), [(0, ["a working LMCache"]), (1, [])])
def test_an_lmcache_that_says_it_is_out_of_order_is_told_on(
    health: int, lacks: list[str], doctor: Callable[..., tuple[int, str]]
) -> None:
    page = V025_LMCACHE + f'lmcache:lmcache_is_healthy{{model_name="m"}} {health}.0\n'.encode()
    _, out = doctor(Served(page, "0.25.1", told=MODEL), beside(DCGM))
    assert [one["what"] for one in target(out)["missing"] if "LMCache" in one["what"]] == lacks
    assert (target(out)["state"] == "partial") is bool(lacks)


def test_a_gateway_that_is_told_of_no_cached_tokens_names_the_flag_of_vllm(
    doctor: Callable[..., tuple[int, str]],
) -> None:
    engine = Served(V032, "0.32.0", told=MODEL)
    _, out = doctor(engine, beside(EPP), beside(EPP + CACHED))
    (missing,) = target(out, "page:127.0.0.1:8001")["missing"]
    assert (missing["what"], missing["hint"]) == (
        "cached tokens",
        "start vLLM with --enable-prompt-tokens-details",
    )
    assert target(out, "page:127.0.0.1:8002")["missing"] == []


FRESH_MP = b"""\
lmcache_mp_l1_memory_usage_bytes{backend="dram",l1_tag="_default"} 0.0
lmcache_mp_event_bus_dropped_events_total 0.0
"""


def test_a_page_that_names_a_family_when_it_is_used_has_counted_nothing_yet(
    doctor: Callable[..., tuple[int, str]],
) -> None:
    engine = Served(V032, "0.32.0", told=MODEL)
    _, out = doctor(engine, beside(FRESH_MP, 'engines = ["{at0}"]'), beside(LMCACHE_MP, 'engines = ["{at0}"]'))
    fresh, used = target(out, "page:127.0.0.1:8001"), target(out, "page:127.0.0.1:8002")
    assert fresh["summary"].endswith(", nothing counted yet")
    assert fresh["not_counted"] == []
    assert "yet" not in used["summary"]
    assert used["not_counted"]


def test_of_sglang_reuse_is_counted_without_lookups(doctor: Callable[..., tuple[int, str]]) -> None:
    _, out = doctor(Served(SGLANG, "0.5.10", told=MODEL))
    found = target(out)
    assert "hbm_tokens" in found["counted"]
    assert "prefix_hit_tokens" in found["not_counted"]
    assert "prefix_hit_tokens" not in {missing["what"] for missing in found["missing"]}


def test_a_page_that_is_an_engines_or_nobodys_is_failed_with_what_to_do(
    doctor: Callable[..., tuple[int, str]],
) -> None:
    _, out = doctor(Served(V032, "0.32.0"), beside(V032), beside(b"go_goroutines 7\n"))
    engine, other = target(out, "page:127.0.0.1:8001"), target(out, "page:127.0.0.1:8002")
    assert (engine["state"], engine["hint"]) == ("failed", "list it under [[engine]], not under [[page]]")
    assert other["state"] == "failed"
    assert "LMCache multiprocess server" in other["hint"]


def test_what_files_of_targets_complain_of_is_shown(doctor: Callable[..., tuple[int, str]]) -> None:
    Path("targets.json").write_text("[", encoding="utf-8")
    _, out = doctor(Served(V032, "0.32.0"), scrape='file_sd = ["targets.json", "gone.json"]')
    told = [one for one in json.loads(out)["targets"] if one["target"] == "scrape.file_sd"]
    assert [one["state"] for one in told] == ["partial", "partial"]
    assert {one["summary"] for one in told} == {
        f"{Path.cwd()}/gone.json: there is no such file",
        f"{Path.cwd()}/targets.json: not in the format of file_sd: Input data was truncated",
    }


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
    empty = f"{there}, nobody writes it now, no interval yet, no calibration kept"
    assert ledger(*arguments) == {"state": "ok", "summary": empty, "hint": ""}
    with WriterLock(there):
        assert f", process {os.getpid()} writes it, " in ledger(*arguments)["summary"]
    assert ledger(*arguments)["summary"] == empty
    Path(there).write_bytes(b"")
    assert ledger(*arguments)["hint"] == "run `kvtally ledger upgrade`"
    Path(there).write_text("this is no database, and long enough to be looked at " * 3, encoding="utf-8")
    damaged = ledger(*arguments)
    assert damaged["state"] == "failed"
    assert re.search("damaged or not a SQLite database", damaged["summary"])


def test_a_ledger_with_evidence_says_how_new_it_is_and_that_savings_can_be_asked_for(
    doctor: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    path = new_ledger(tmp_path)
    deployment = Deployment(path, {"a:1": About(gpus=())})
    engine = FakeEngine("a:1/0")
    for second in range(0, 1200, 5):
        deployment.scrape(START + second * SECOND, [engine])
    deployment.close()
    served = (Served(V032, "0.32.0", told=MODEL), beside(DCGM))
    with WriterLock(path):
        status, out = doctor(*served, ledger=path)
    told = re.escape(f"{path}, process {os.getpid()} writes it, newest interval ")
    assert re.fullmatch(told + r"\d+ \w+ old, no calibration kept", target(out, "ledger")["summary"])
    assert (status, json.loads(out)["verdict"]) == (
        0,
        (
            f"1 engine can be metered: process {os.getpid()} writes the ledger. Savings can be told as far as there is "
            "evidence: `kvtally savings`."
        ),
    )
    # some pages of it are overwritten, and not the first
    whole = Path(path).stat().st_size
    with Path(path).open("r+b") as file:
        file.seek(whole * 2 // 3)
        file.write(random.Random(1).randbytes(12_000))
    _, out = doctor(*served, ledger=path)
    damaged = target(out, "ledger")
    assert (damaged["state"], "damaged" in damaged["summary"]) == ("failed", True)
    assert json.loads(out)["verdict"].endswith("once there is evidence.")


@pytest.mark.parametrize(
    ("age_ns", "text"),
    [
        (-5, "0 seconds"),
        (1_999_999_999, "1 second"),
        (59 * SECOND, "59 seconds"),
        (60 * SECOND, "1 minute"),
        (7200 * SECOND, "2 hours"),
        (90_000 * SECOND, "1 day"),
    ],
)
def test_ages_are_told_in_the_largest_unit_that_they_fill(age_ns: int, text: str) -> None:
    assert _age(age_ns) == text


class Page(NamedTuple):
    """A source that gives what a test says."""

    source: str
    gives: tuple[Reading, ...] | Exception
    name: str = "127.0.0.1:8000"
    restricted: bool = False
    url: str = URL
    limits: Mapping[str, str] = {}
    sources: tuple[str, ...] = ()

    def collect(self) -> tuple[Reading, ...]:
        if isinstance(self.gives, Exception):
            raise self.gives
        return self.gives


class Host(NamedTuple):
    """The sources of a host."""

    engines: tuple[Page, ...]
    abouts: Mapping[str, About]
    pages: tuple[Page, ...] = ()


def values_of(kind: str, told: Mapping[str, float | None]) -> tuple[float | None, ...]:
    """What is told of the quantities of a kind, and 0 for the others."""
    return tuple(told.get(quantity.name, 0.0) for quantity in QUANTITIES[kind])  # type: ignore[index]  # a kind


def reading(
    kind: str, name: str, attributes: Mapping[str, str], details: Mapping[str, float] = {}, **told: float | None
) -> Reading:
    names, values = tuple(details), values_of(kind, told)
    return Reading(kind, name, attributes, values, detail_names=names, details=tuple(details.values()))  # type: ignore[arg-type]  # as above


def vllm(name: str = "127.0.0.1:8000/0", /, **told: float | None) -> Reading:
    about = {"version": "0.32.0", "model": "m", "engine": "vllm"}
    details = {"request_prompt_tokens_le_8": 1.0, "request_computed_tokens_le_8": 1.0}
    return reading("engine", name, about, details)._replace(values=values_of("engine", told))


def gpu(name: str = "GPU-a", /, **told: float | None) -> Reading:
    return reading("gpu", name, {"sku": "NVIDIA H100 80GB HBM3"})._replace(values=values_of("gpu", told))


def checked(page: Page, about: About, *others: Page, config: Config | None = None) -> list[Checked]:
    config = config or Config(gpu=Gpu(enabled=False))
    host = Host((page,), {page.name: about, **OTHERS})
    return examine(config, host, Found((), None), lambda: 0, others)  # type: ignore[arg-type]  # what it reads of them


def refused(about: About, *others: Page, engine: Reading | None = None) -> list[tuple[str, str]]:
    """What keeps the savings of an engine from being told: what, and its hint."""
    found = checked(Page("vllm", (engine or vllm(),)), about, *others)[0].readiness
    assert found is not None
    assert (found.rung is None) == bool(found.refused)
    return [(each.costs, each.hint) for each in found.refused]


FACTS = {"shape": shape_text(json.loads(LLAMA.read_text(encoding="utf-8")), weight_dtype="auto", kv_dtype="auto")}
OTHERS = {"b": About(gpus=("GPU-b",))}
HELD = About(gpus=("GPU-a",), facts=FACTS)
NVML = Page("nvml", (gpu(), gpu("GPU-b")))


def test_an_engine_with_all_that_savings_need_is_refused_nothing() -> None:
    assert refused(HELD, NVML) == []


@pytest.mark.parametrize(
    ("about", "others", "costs", "hint"),
    [
        (
            HELD._replace(facts={}),
            [NVML],
            "no step law can be set up",
            (
                "say where its config.json lies, in kvtally.toml, in the [[engine]] with "
                f'url = "{URL}": model_config = "/models/x/config.json"'
            ),
        ),
        (
            HELD._replace(gpus=None, mapping="two engines and two GPUs"),
            [NVML],
            "no seconds in which it worked",
            "two engines and two GPUs",
        ),
        (
            HELD,
            [],
            "its GPU is not read here",
            "let NVIDIA_VISIBLE_DEVICES show it to kvtally, or list the page of dcgm-exporter under [[page]]",
        ),
        (
            HELD._replace(gpus=("GPU-a", "GPU-b", "GPU-c", "GPU-d"), per_replica=4),
            [NVML],
            "its GPUs serve b too, and utilisation does not tell whose work it was",
            "give each engine GPUs of its own",
        ),
        (
            HELD._replace(gpus=("GPU-a", "GPU-c", "GPU-d")),
            [NVML],
            "2 of its 3 GPUs are not read here",
            "let NVIDIA_VISIBLE_DEVICES show it to kvtally, or list the page of dcgm-exporter under [[page]]",
        ),
        (
            HELD._replace(facts={"shape": FACTS["shape"].replace("LlamaForCausalLM", "MambaForCausalLM")}),
            [NVML],
            "the formulas of MambaForCausalLM are unknown",
            "only decoders with full attention (MHA, GQA, MLA), dense or MoE, are known",
        ),
        (
            HELD,
            [Page("nvml", (gpu()._replace(attributes={"sku": "NVIDIA H100 MIG 1g.10gb"}),))],
            "there is no datasheet row for NVIDIA H100 MIG 1g.10gb",
            "whole GPUs of NVIDIA's and AMD's data-centre lines have one",
        ),
        (
            HELD,
            [Page("nvml", (gpu(gpm_ns=None, observed_ns=None),))],
            "neither GPM nor utilization.gpu of its GPUs can be read",
            "`nvml` below says why",
        ),
        (
            HELD._replace(gpus=()),
            [],
            "an engine without a GPU is timed by the CPU seconds of its processes, and these are not seen",
            "run kvtally as the same user and in the same PID namespace (Kubernetes: shareProcessNamespace: true)",
        ),
    ],
)
def test_each_thing_that_savings_need_and_lack_has_its_hint(
    about: About, others: list[Page], costs: str, hint: str
) -> None:
    assert refused(about, *others) == [(costs, hint)]


@pytest.mark.parametrize("lacking", ["gpm_ns", "observed_ns"])
def test_one_way_of_knowing_how_long_a_gpu_worked_is_enough(lacking: str) -> None:
    assert refused(HELD, Page("nvml", (gpu(**{lacking: None}),))) == []


def test_an_engine_without_a_gpu_is_timed_by_its_processes() -> None:
    tree = reading("process", "127.0.0.1:8000", {}, processes=1.0)._replace(parts={"7": (1.0,) * 8})
    about = HELD._replace(gpus=())
    assert refused(about, Page("process:127.0.0.1:8000", (tree,))) == []
    assert len(refused(about, Page("process:b", (tree._replace(name="b"),)))) == 1  # another engine's
    assert len(refused(about, Page("process:127.0.0.1:8000", NoData("hidden")))) == 1


def test_steps_and_first_tokens_are_needed() -> None:
    told = [costs for costs, _ in refused(HELD, NVML, engine=vllm(steps=None, first_tokens=None))]
    assert told == [
        "steps are not counted, and the law is one of steps",
        "requests that gave their first token are not counted",
    ]


@pytest.mark.parametrize("about", [HELD._replace(role="decode"), HELD._replace(facts={**FACTS, "role": "decode"})])
def test_an_engine_that_decodes_for_others_has_no_savings_of_its_own_and_that_is_no_fault(about: About) -> None:
    decoding = checked(Page("vllm", (vllm(),)), about, NVML)[0]
    assert decoding.readiness is not None
    assert (decoding.readiness.rung, decoding.readiness.is_due) == (None, False)
    assert decoding.readiness.refused[0].hint == "they are told of the prefill engine of its group"
    # a role that config gives goes before what the command line tells
    facts = {**FACTS, "role": "decode"}
    prefilling = checked(Page("vllm", (vllm(),)), HELD._replace(role="prefill", facts=facts), NVML)[0]
    assert prefilling.readiness is not None
    assert prefilling.readiness.rung == "M1"
    answer = answer_of([prefilling, decoding])
    assert (answer["metered_engines"], answer["engines_with_savings"], answer["engines_without_savings"]) == (2, 1, 0)
    assert answer["verdict"].endswith("Savings can be told once there is evidence.")


def test_the_verdict_counts_engines_and_their_savings() -> None:
    able = checked(Page("vllm", (vllm(),)), HELD, NVML)[0]
    unable = checked(Page("vllm", (vllm(),)), HELD)[0]
    told = [answer_of(list(each))["verdict"] for each in ((able, able), (able, able, unable), (unable,))]
    assert told == [
        "2 engines can be metered: `kvtally run` does it. Savings can be told once there is evidence.",
        (
            "3 engines can be metered: `kvtally run` does it. Savings of 2 of them can be told once there is evidence; "
            "of 1 not: see above."
        ),
        "1 engine can be metered: `kvtally run` does it. No savings can be told yet: see above.",
    ]
    decoding = checked(Page("vllm", (vllm(),)), HELD._replace(role="decode"))[0]
    assert answer_of([decoding])["verdict"] == "1 engine can be metered: `kvtally run` does it."


def test_an_engine_whose_gpus_nobody_knows_says_what_to_write() -> None:
    found = checked(Page("vllm", (vllm(),), url="http://h:1/m"), About(mapping="two engines and two GPUs"))[0]
    (missing,) = found.missing
    assert (missing.what, found.state) == ("which GPUs it holds", "partial")
    assert missing.hint == (
        'two engines and two GPUs. Name them in kvtally.toml, in the [[engine]] with url = "http://h:1/m": '
        'gpus = ["GPU-…"]'
    )
    assert checked(Page("vllm", (vllm(),)), About(gpus=()))[0].missing == ()


def test_every_engine_is_called_by_its_title() -> None:
    engine = vllm()._replace(attributes={"engine": "tensorrt-llm", "model": "m"})
    assert checked(Page("trtllm", (engine,)), HELD)[0].summary.startswith("TensorRT-LLM version unknown, m")


def test_ranks_are_counted_and_a_restricted_page_is_said_so() -> None:
    ranks = tuple(vllm(f"127.0.0.1:8000/{rank}") for rank in range(3))
    assert checked(Page("vllm", ranks, restricted=True), HELD)[0].summary == (
        "vLLM 0.32.0, m, 3 ranks, asked for the wanted families alone"
    )


def test_each_family_that_is_missing_says_what_is_lost() -> None:
    told = dict.fromkeys(("steps", "awake", "running_requests", "first_tokens", "prefill_ns", "prefix_hit_tokens"))
    found = checked(Page("vllm", (vllm(**told),)), HELD)[0]
    # tokens by source tell of reuse: that lookups do not is no loss then
    assert {missing.what for missing in found.missing} == set(told) - {"prefix_hit_tokens"}
    assert all(missing.costs for missing in found.missing)
    told_by_nobody = checked(Page("vllm", (vllm(prefix_hit_tokens=None, hbm_tokens=None),)), HELD)[0]
    assert "reuse is not counted" in {missing.costs for missing in told_by_nobody.missing}
    assert set(found.not_counted) == set(told)
    assert set(found.counted) == {quantity.name for quantity in QUANTITIES["engine"]} - set(told)


@pytest.mark.parametrize(
    ("connector", "hint"),
    [
        ("LMCacheMPConnector", "list the page of LMCache's server"),
        ("LMCacheConnectorV1", "internal_api_server_enabled"),
        ("MooncakeStoreConnector", "list the page of Mooncake's client"),
        ("DynamoConnector", "DYN_KVBM_METRICS=true"),
        ("", "PROMETHEUS_MULTIPROC_DIR"),
    ],
)
def test_an_outer_tier_without_its_families_has_the_hint_of_its_connector(connector: str, hint: str) -> None:
    about = HELD._replace(facts={**FACTS, "connector": connector})
    (missing,) = checked(Page("vllm", (vllm(external_tokens=512.0),)), about)[0].missing
    assert missing.what == "the outer tier's families"
    assert hint in missing.hint
    cache = reading("cache", "127.0.0.1:8000/kv_offload", {"cache": "vllm offload"})
    assert checked(Page("vllm", (vllm(external_tokens=512.0), cache)), about)[0].missing == ()


def test_an_engine_that_is_handed_kv_and_has_no_role_lacks_it() -> None:
    moved = reading("cache", "127.0.0.1:8000/0/nixl", {"cache": "nixl", "transfer": "1"}, load_bytes=4096.0)
    handed = Page("vllm", (vllm(external_tokens=512.0), moved))
    (missing,) = checked(handed, HELD)[0].missing
    assert missing == (
        "its role",
        (
            "KV comes to it from other engines (nixl): prompts count where they were prefilled and here again, and "
            "transfers as reuse"
        ),
        f'say it in kvtally.toml, in the [[engine]] with url = "{URL}": role = "decode" (or "prefill", or "both")',
    )
    known = (HELD._replace(role="both"), HELD._replace(facts={**FACTS, "role": "decode"}))
    assert [checked(handed, about)[0].missing for about in known] == [(), ()]
    # nothing was fetched, or nothing that was fetched was loaded
    still = moved._replace(values=values_of("cache", {}))
    for page in (Page("vllm", (vllm(external_tokens=512.0), still)), Page("vllm", (vllm(), moved))):
        assert checked(page, HELD)[0].missing == ()


def test_a_page_that_cannot_be_read_is_failed_with_its_reason() -> None:
    found = checked(Page("vllm", CollectError("connection refused", "is it up?")), HELD)[0]
    assert (found.state, found.summary, found.hint) == ("failed", "connection refused", "is it up?")
    empty = checked(Page("vllm", ()), HELD)[0]
    assert (empty.state, empty.summary) == ("failed", "the page names no engine")


def test_other_sources_say_what_they_see_or_why_not() -> None:
    mount = reading("filesystem", "/kv", {"mounts": "/kv", "paths": "/kv/a,/kv/b", "fstype": "nfs4"}, reads=None)
    others = [
        Page("nvml", (gpu(), gpu("GPU-b", gpm_ns=None)), limits={"GPU-b gpm": "No permission"}),
        Page("processes", (reading("process", "127.0.0.1:8000", {}, processes=3.0),)),
        Page("diskstats", (reading("filesystem", "vda", {"mounts": "/"}),)),
        Page("mount:/kv", (mount,)),
        Page("mount:/gone", NoData("process 7 is gone", "shareProcessNamespace: true")),
        Page("cgroup", NoData("no cgroup v2 here", "nothing")),
        Page("other", OSError("broken")),
    ]
    found = checked(Page("vllm", (vllm(),)), HELD, *others)[1:]
    assert [(each.target, each.state, each.summary, each.hint) for each in found] == [
        (
            "nvml",
            "ok",
            "GPU-a NVIDIA H100 80GB HBM3 (with GPM), GPU-b NVIDIA H100 80GB HBM3 (without GPM)",
            "",
        ),
        ("processes", "ok", "3 processes", ""),
        ("diskstats", "ok", "vda (/)", ""),
        ("mount:/kv", "ok", "/kv, nfs4, holds /kv/a,/kv/b", ""),
        ("mount:/gone", "no_data", "process 7 is gone", "shareProcessNamespace: true"),
        ("cgroup", "no_data", "no cgroup v2 here", "nothing"),
        ("other", "failed", "OSError: broken", ""),
    ]
    assert [(each.what, each.costs) for each in found[0].missing] == [("GPU-b gpm", "No permission")]
    assert found[3].not_counted == ("reads",)


def test_one_process_is_one_process() -> None:
    page = Page("processes", (reading("process", "127.0.0.1:8000", {}, processes=1.0),))
    assert checked(Page("vllm", (vllm(),)), HELD, page)[-1].summary == "1 process"


def test_the_parts_of_a_tree_count_as_counted() -> None:
    """What a process tree has counted stands in its parts, and its own values hold the gauges alone."""
    tree = reading("process", "127.0.0.1:8000", {}, cpu_ns=None, read_bytes=None)
    tree = tree._replace(parts={"7": (1.0, *(None,) * 7)})
    found = checked(Page("vllm", (vllm(),)), HELD, Page("process", (tree,)))[2]
    assert found.not_counted == ("read_bytes",)


def test_gpus_that_are_not_read_at_all_are_a_line_of_their_own() -> None:
    engine = Page("vllm", (vllm(),))
    off = checked(engine, HELD)[1]
    assert (off.target, off.state) == ("gpu", "no_data")
    assert off.summary.startswith("switched off in the config: no GPU seconds")
    assert off.hint == "gpu.enabled = true reads this host's GPUs"
    without = checked(engine, HELD, config=Config())[1]
    assert without.summary.startswith("no NVIDIA driver on this host: ")
    assert "NVIDIA_VISIBLE_DEVICES" in without.hint
    broken = checked(engine, HELD, Page("nvml", CollectError("the driver went away")), config=Config())
    assert [each.target for each in broken[1:]] == ["nvml"]  # there is a driver
    exported = checked(engine, HELD, Page("page:h:9400", (gpu(),)), config=Config())
    assert [each.target for each in exported[1:]] == ["page:h:9400"]


def test_credentials_that_others_can_read_are_told_for_engines_and_pages(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "110")
    access = Access(bearer_token_file="/run/token")  # a path
    config = Config(
        engines=(Engine("http://10.0.0.7:8000/metrics", "127.0.0.1:8000", access=access),),
        pages=(Listed("https://10.0.0.8:9400/metrics", "dcgm", access=Access(insecure_skip_verify=True)),),
    )
    dcgm = Page("page:dcgm", (gpu(),))
    found = checked(Page("vllm", (vllm(),)), HELD, dcgm, config=config)
    assert [(each.target, each.warnings) for each in found] == [
        ("engine 127.0.0.1:8000", ("the secret goes to 10.0.0.7 in clear text: use https",)),
        (
            "page:dcgm",
            ("the server's certificate is not checked: set ca_file instead of insecure_skip_verify",),
        ),
    ]
    answer = answer_of(found)
    assert answer["targets"][0]["warnings"] == list(found[0].warnings)
    doctor_table(answer)
    assert "\n        unsafe  the secret goes to 10.0.0.7 in clear text: use https\n" in capsys.readouterr().out
