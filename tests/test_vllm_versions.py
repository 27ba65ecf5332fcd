from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.vllm_pages import ENGINE, multiprocess, number, openmetrics, page, ray, samples

from kvtally.agent.facts import WORK
from kvtally.agent.identity import Identity, check
from kvtally.agent.unit_cost import Tokens, TokenSums
from kvtally.collectors.page import PageMapper
from kvtally.collectors.quantities import QUANTITIES
from kvtally.collectors.vllm import VllmMapping

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvtally.collectors.base import Reading

PAGES = Path(__file__).parent / "fixtures" / "pages"
VERSIONS = (
    *("0.8.5", "0.9.0", "0.9.2", "0.10.2", "0.11.2", "0.12.0", "0.14.1", "0.16.0", "0.18.0", "0.19.1"),
    *("0.20.0", "0.22.1", "0.23.0", "0.24.0", "0.26.0", "0.28.0", "0.31.0", "0.32.0", "0.33.0"),
)
EVERY = pytest.mark.parametrize("version", VERSIONS)

# The workload of tests/vllm_pages.py, worked out by hand.
WORKLOAD: dict[str, float] = {
    "prompt_tokens": 1049,
    "computed_tokens": 521,
    "hbm_tokens": 368,
    "external_tokens": 160,
    "generated_tokens": 50,
    "prefix_query_tokens": 1049,
    "prefix_hit_tokens": 368,
    "external_query_tokens": 681,
    "external_hit_tokens": 160,
    "first_tokens": 2,
    "finished_requests": 2,
    "preemptions": 0,
    "steps": 49,
    "step_tokens": 571,
    "first_token_ns": 0.5,
    "queue_ns": 0.125,
    "prefill_ns": 0.25,
    "decode_ns": 1.5,
    "inter_token_ns": 1.5,
    "request_ns": 2.0,
    "running_requests": 1,
    "waiting_requests": 2,
    "waiting_for_capacity": 2,
    "kv_usage_ppm": 0.25,
    "awake": 1,
}
# What a version cannot tell, or tells as its quantity's meaning says it does. (from, before): quantity -> value
OTHERWISE: dict[tuple[str, str], dict[str, float | None]] = {
    ("0.8", "0.16"): dict.fromkeys(("computed_tokens", "hbm_tokens", "external_tokens")),
    ("0.8", "0.11.1"): dict.fromkeys(("external_query_tokens", "external_hit_tokens", "awake")),
    ("0.8", "0.20"): {"waiting_for_capacity": None},
    ("0.8", "0.9"): {"prefix_query_tokens": 65 * 16},
    ("0.11.1", "0.16"): {"external_query_tokens": 1049},
    ("0.8", "0.23"): {"step_tokens": 1049 + 50},
}
OFFLOAD: dict[str, float] = {
    "loads": 1,
    "stores": 2,
    "load_ns": 0.25,
    "store_ns": 0.5,
    "load_bytes": 20480,
    "store_bytes": 66688,
}
TIERING: dict[str, float] = {
    "storage_read_bytes": 8192,
    "storage_read_ns": 0.125,
    "storage_write_bytes": 66688,
    "storage_write_ns": 1.0,
}


def expected(version: str) -> dict[str, float | None]:
    found: dict[str, float | None] = dict(WORKLOAD)
    for (since, before), other in OTHERWISE.items():
        if number(since) <= number(version) < number(before):
            found |= other
    return found


def read(body: str, version: str | None) -> list[Reading]:
    return list(PageMapper("host:8000", [VllmMapping()], version).read(body.encode()))


def values(reading: Reading) -> dict[str, float | None]:
    names = (quantity.name for quantity in QUANTITIES[reading.kind])
    return dict(zip(names, reading.values, strict=True))


def on_ray(version: str) -> str:
    return ray(version, suffixed=True, plain=True, labels='ReplicaId="x2kq8",WorkerId="0a1b"')


SPELLINGS: dict[str, Callable[[str], str]] = {
    "prometheus": page,
    "multiprocess": multiprocess,
    "openmetrics": openmetrics,
    "ray": on_ray,
}
SPELLED = pytest.mark.parametrize("spelling", SPELLINGS)


@EVERY
@SPELLED
def test_one_workload_is_the_same_quantities_in_every_version_and_spelling(version: str, spelling: str) -> None:
    reading, *_ = read(SPELLINGS[spelling](version), version)
    want = expected(version)
    if spelling == "ray":
        want["preemptions"] = None  # no counter is there before it has counted
    assert values(reading) == want


@EVERY
@SPELLED
def test_without_a_version_the_page_itself_says_what_it_counts(version: str, spelling: str) -> None:
    told, *_ = read(SPELLINGS[spelling](version), version)
    untold, *_ = read(SPELLINGS[spelling](version), None)
    want = values(told)
    if spelling == "multiprocess" and number(version) < (0, 9, 2):
        # blocks or tokens: its help is lost, so nobody knows
        want |= {"prefix_query_tokens": None, "prefix_hit_tokens": None}
    assert values(untold) == want
    assert (untold.detail_names, untold.details) == (told.detail_names, told.details)


@EVERY
def test_offloading_is_the_same_quantities_since_it_is_counted(version: str) -> None:
    caches = read(page(version), None)[1:]
    if number(version) < (0, 16):
        assert caches == []
        return
    (cache,) = caches
    tiers = TIERING if number(version) >= (0, 28) else dict.fromkeys(TIERING)
    found = values(cache)
    assert {name: found.pop(name) for name in (*OFFLOAD, *TIERING)} == OFFLOAD | tiers
    assert set(found.values()) == {None}


@EVERY
def test_details_are_told_from_the_version_on_that_has_them(version: str) -> None:
    (reading, *_) = read(page(version), None)
    found = dict(zip(reading.detail_names, reading.details, strict=True))
    since = {
        "finished_prompt_tokens": ("0.8", 1049),
        "finished_generated_tokens": ("0.8", 50),
        "finished_abort": ("0.8", 0),
        "finished_computed_tokens": ("0.13", 521),
        "cached_tokens": ("0.16", 528),
        "finished_error": ("0.16", 0),
        "estimated_gflop": ("0.17", 7),
        "admitted_device_tokens": ("0.32", 368),
        "admitted_host_tokens": ("0.32", 96),
        "admitted_disk_tokens": ("0.32", 64),
        "admitted_p2p_tokens": ("0.32", 0),
        "admitted_unspecified_tokens": ("0.32", 0),
    }
    want = {name: value for name, (first, value) in since.items() if number(first) <= number(version)}
    if (0, 16) <= number(version) < (0, 20):
        want["recomputed_tokens"] = 1
    assert {name: value for name, value in found.items() if "_le_" not in name} == want
    assert found["step_tokens_le_inf"] == 49


@EVERY
@pytest.mark.parametrize("is_told", [True, False])
def test_tokens_by_source_add_up_from_0_16_on(version: str, is_told: bool) -> None:
    told = version if is_told else None
    reading, *_ = read(page(version), told)
    counted = [None if value is None else round(value) for value in reading.values]
    found = check(told, counted, reading.detail_names, [round(value) for value in reading.details])
    assert found.state is (Identity.OK if number(version) >= (0, 16) else Identity.UNCHECKED)


@EVERY
@pytest.mark.parametrize("is_told", [True, False])
def test_what_is_charged_for_is_the_same_in_every_version(version: str, is_told: bool) -> None:
    reading, *_ = read(page(version), version if is_told else None)
    counts = values(reading)
    work = {name: None if (count := counts[name]) is None else round(count) for name in WORK}
    sums = TokenSums()
    sums.add(work, version if is_told else None)
    found = sums.tokens()
    is_derived = number(version) < (0, 16)
    if number(version) < (0, 11, 1):  # what came through a connector is told by nobody: it counts as computed
        assert found == Tokens(1049, 681, 368, 0, 50, derived=True)
    else:
        assert found == Tokens(1049, 521, 368, 160, 50, derived=is_derived)


@EVERY
def test_ranks_of_one_page_are_read_each_by_itself(version: str) -> None:
    double = re.sub(r"(?m)^(vllm:\S+) ([\d.]+)$", lambda line: f"{line[1]} {2 * float(line[2])}", page(version))
    second = double.replace('engine="0"', 'engine="1"').partition("\n")[2]
    found = [one for one in read(page(version) + second, None) if one.kind == "engine"]
    assert [one.name for one in found] == ["host:8000/0", "host:8000/1"]
    assert values(found[0]) == expected(version)
    assert values(found[1]) == {name: value and 2 * value for name, value in expected(version).items()}


@pytest.mark.parametrize("prefix", ["ray_vllm_", "ray_vllm:"])
@pytest.mark.parametrize(("suffixed", "plain"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("version", ["0.8.5", "0.12.0", "0.16.0", "0.26.0"])
def test_a_counter_of_ray_is_read_once_whichever_way_it_is_shown(
    version: str, prefix: str, suffixed: bool, plain: bool
) -> None:
    body = ray(version, suffixed=suffixed, plain=plain, labels='WorkerId="0a1b"', prefix=prefix)
    reading, *_ = read(body, None)
    assert values(reading) == expected(version) | {"preemptions": None}
    assert (reading.name, reading.epoch, reading.attributes["replica"]) == ("host:8000/0/0a1b", None, "0a1b")


# -- blocks or tokens


@pytest.mark.parametrize(
    ("version", "factor"), [("0.8.5", 16), ("0.9.0", 1), (None, 16), ("0.1.dev7", 16), ("0.12", 16)]
)
def test_a_version_goes_before_what_the_page_says_of_a_unit(version: str | None, factor: int) -> None:
    found = values(read(page("0.8.5"), version)[0])
    assert (found["prefix_query_tokens"], found["prefix_hit_tokens"]) == (65 * factor, 23 * factor)


@pytest.mark.parametrize("size", ['block_size="",', 'block_size="None",', 'block_size="16.0",', 'block_size="²",', ""])
def test_blocks_of_unknown_size_are_no_tokens(size: str) -> None:
    found = values(read(page("0.8.5").replace('block_size="16",', size), "0.8.5")[0])
    assert (found["prefix_query_tokens"], found["prefix_hit_tokens"]) == (None, None)
    assert found["prompt_tokens"] == 1049


@pytest.mark.parametrize("told", ["cached blocks, of 16 tokens", "what is cached"])
def test_a_text_that_names_both_units_or_none_tells_neither(told: str) -> None:
    found = values(read(page("0.8.5").replace("cached blocks", told), None)[0])
    assert (found["prefix_query_tokens"], found["prefix_hit_tokens"]) == (65 * 16, None)


def test_blocks_of_two_sizes_are_no_tokens() -> None:
    other = 'vllm:cache_config_info{block_size="32",engine="0",num_gpu_blocks="100"} 1\n'
    assert values(read(page("0.8.5") + other, "0.8.5")[0])["prefix_hit_tokens"] is None


def test_families_that_0_11_shows_on_request_are_not_added_to_their_successors() -> None:
    hidden = "".join(
        f"# HELP vllm:gpu_prefix_cache_{what}_total GPU prefix cache {what}, in terms of number of tokens.\n"
        f"vllm:gpu_prefix_cache_{what}_total{{{ENGINE}}} 7\n"
        for what in ("queries", "hits")
    )
    assert values(read(page("0.11.2") + hidden, "0.11.2")[0]) == expected("0.11.2")


def test_a_family_that_a_fork_carries_earlier_is_read() -> None:
    line = f'vllm:num_requests_waiting_by_reason{{{ENGINE},reason="capacity"}} 5\n'
    assert values(read(page("0.12.0") + line, "0.12.0")[0])["waiting_for_capacity"] == 5


# -- the pages themselves


def test_no_page_shows_a_family_that_its_version_does_not_have() -> None:
    head, *rows = (PAGES / "vllm-families.tsv").read_text().splitlines()
    versions = head.split("\t")[1:]
    known: dict[str, set[str]] = {version: set() for version in versions}
    for row in rows:
        name, *marks = row.split("\t")
        for version, mark in zip(versions, marks, strict=False):
            known[version] |= {name.removesuffix("_total")} if mark else set()
    assert versions == ["0.9.2", "0.10.2", "0.12.0", "0.16.0", "0.22.1", "0.32.0"]
    for version in versions:
        shown = {f"vllm:{one.family}".removesuffix("_total") for one in samples(version)}
        assert shown - known[version] == set()


@pytest.mark.parametrize(
    ("version", "recorded"), [("0.12.0", "cpu-v012/1795410619075.prom"), ("0.32.0", "cpu-v032/1795408686554.prom")]
)
def test_families_are_what_a_recorded_page_of_the_version_shows(version: str, recorded: str) -> None:
    body = (PAGES / recorded).read_text()
    types = dict(re.findall(r"(?m)^# TYPE (vllm:\S+) (\w+)$", body))
    helps = dict(re.findall(r"(?m)^# HELP (vllm:\S+) (.*)$", body))
    compared = 0
    for one in samples(version):
        name = f"vllm:{one.family}_total" if one.type == "counter" else f"vllm:{one.family}"
        if "kv_offload" in name:  # the recorded engine offloads nothing
            continue
        assert types[name] == one.type
        if not one.about.startswith("About "):
            assert helps[name] == one.about
            compared += 1
    assert compared > 20
