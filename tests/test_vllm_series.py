from __future__ import annotations

import pytest
from tests.vllm_pages import page, ray

from kvtally.collectors.base import CollectError
from kvtally.collectors.exposition import Series
from kvtally.collectors.page import PageMapper
from kvtally.collectors.quantities import index
from kvtally.collectors.vllm import VllmMapping
from kvtally.collectors.vllm_series import Engine, by_engine, is_read, spelled

PROMPT = index("engine", "prompt_tokens")


@pytest.mark.parametrize(
    ("shown", "registered"),
    [
        ("vllm:prompt_tokens_total", "vllm:prompt_tokens_total"),
        ("vllm_prompt_tokens_total", "vllm:prompt_tokens_total"),
        ("ray_vllm_prompt_tokens_total", "vllm:prompt_tokens_total"),
        ("ray_vllm:prompt_tokens_total", "vllm:prompt_tokens_total"),
        ("ray_vllm_prompt_tokens", "vllm:prompt_tokens_total"),
        ("ray_vllm_num_requests_running", "vllm:num_requests_running"),
        ("ray_vllm_iteration_tokens_total_sum", "vllm:iteration_tokens_total_sum"),
        ("vllm:prompt_tokens", "vllm:prompt_tokens"),  # nobody but Ray leaves the ending out
        ("process_start_time_seconds", "process_start_time_seconds"),
        ("ray_node_cpu_count", "ray_node_cpu_count"),
    ],
)
def test_a_name_is_read_in_every_spelling(shown: str, registered: str) -> None:
    assert spelled(shown) == registered


@pytest.mark.parametrize(
    ("sample", "expected"),
    [
        ("vllm:kv_offload_load_bytes_total", True),
        ("vllm:kv_offload_load_bytes_sharedstorage_total", True),
        ("vllm_kv_offload_total_bytes_sharedstorage_total", True),
        ("vllm:kv_offload_size_my_spec_count", True),
        ("vllm:kv_offload_load_bytes_created", False),
        ("vllm:kv_offload_load_bytes_sharedstorage_created", False),
        ("vllm:kv_offload_stores_skipped_total", False),
        ("vllm:prompt_tokens", False),
        ("lmcache:num_hit_tokens_total", False),
    ],
)
def test_the_name_of_a_connector_may_stand_in_its_samples(sample: str, expected: bool) -> None:
    assert is_read(sample) is expected


def names(mapper: PageMapper, body: str) -> dict[str, float | None]:
    return {one.name: one.values[PROMPT] for one in mapper.read(body.encode()) if one.kind == "engine"}


def mapper() -> PageMapper:
    return PageMapper("node:8080", [VllmMapping()])


def of_replica(replica: str, worker: str) -> str:
    labels = f'ReplicaId="{replica}",WorkerId="{worker}"' if replica else f'WorkerId="{worker}"'
    return ray("0.26.0", suffixed=True, plain=True, labels=labels).partition("\n")[2]


@pytest.mark.parametrize(
    ("replicas", "expected"),
    [
        ((("x2kq8", "0a1b"), ("z9", "7c")), ["node:8080/0/x2kq8", "node:8080/0/z9"]),
        ((("", "0a1b"), ("", "7c")), ["node:8080/0/0a1b", "node:8080/0/7c"]),
    ],
)
def test_several_replicas_of_a_node_are_several_engines(
    replicas: tuple[tuple[str, str], ...], expected: list[str]
) -> None:
    body = "".join(of_replica(*one) for one in replicas)
    assert names(mapper(), body) == dict.fromkeys(expected, 1049)


@pytest.mark.parametrize(("replica", "name"), [("x2kq8", "node:8080/0/x2kq8"), ("", "node:8080/0/0a1b")])
def test_a_replica_has_its_id_in_its_name_also_alone_so_that_a_name_never_means_two(replica: str, name: str) -> None:
    alone = of_replica(replica, "0a1b")
    assert list(names(mapper(), alone)) == [name]
    node = mapper()
    assert len(names(node, alone + of_replica("z9", "7c"))) == 2
    assert list(names(node, alone)) == [name]


def test_another_model_on_a_node_of_rays_leaves_the_names_as_they_are() -> None:
    other = of_replica("z9", "7c").replace('model_name="', 'model_name="another-')
    assert set(names(mapper(), of_replica("x2kq8", "0a1b") + other)) == {"node:8080/0/x2kq8", "node:8080/0/z9"}


def test_counters_that_ray_adds_up_over_a_node_go_with_the_histograms_of_its_workers() -> None:
    lines = of_replica("", "0a1b").splitlines()
    added = "\n".join(
        line if "_seconds_" in line or "_sum{" in line else line.replace(',WorkerId="0a1b"', "") for line in lines
    )
    (reading, *_) = mapper().read(added.encode() + b"\n")
    assert (reading.name, "replica" in reading.attributes) == ("node:8080/0", False)
    assert reading.values[PROMPT] == 1049
    assert reading.values[index("engine", "first_token_ns")] == 0.5
    assert reading.values[index("engine", "steps")] == 49


def test_a_source_that_never_counted_is_0_where_ray_shows_the_others() -> None:
    body = "".join(line + "\n" for line in of_replica("x", "w").splitlines() if "external_" not in line)
    assert "prompt_tokens_by_source" in body
    (reading, *_) = mapper().read(body.encode())
    found = {name: reading.values[index("engine", name)] for name in ("external_tokens", "external_hit_tokens")}
    # its queries are not there either: then nobody knows whether a connector was asked
    assert found == {"external_tokens": 0, "external_hit_tokens": None}


def test_hits_that_ray_does_not_show_yet_are_0_where_it_shows_the_lookups() -> None:
    body = "".join(line + "\n" for line in of_replica("x", "w").splitlines() if "prefix_cache_hits" not in line)
    (reading, *_) = mapper().read(body.encode())
    assert [reading.values[index("engine", name)] for name in ("prefix_hit_tokens", "external_hit_tokens")] == [0, 0]


def test_hits_of_an_engine_on_ray_that_has_recomputed_nothing_yet_are_all_hits() -> None:
    body = ray("0.18.0", suffixed=True, plain=False, labels='WorkerId="w"').replace("} 369", "} 368")
    body = "".join(line + "\n" for line in body.splitlines() if "recomputed" not in line)
    (reading, *_) = mapper().read(body.encode())
    assert reading.values[index("engine", "hbm_tokens")] == 368


def test_a_source_that_vllm_itself_does_not_show_is_unknown() -> None:
    body = "".join(line + "\n" for line in page("0.26.0").splitlines() if 'source="external_kv_transfer"' not in line)
    (reading, *_) = mapper().read(body.encode())
    assert reading.values[index("engine", "external_tokens")] is None


def test_the_places_of_a_series_are_told_by_engine() -> None:
    shown = [
        Series("vllm:num_requests_running", {"engine": "0", "model_name": "a"}),
        Series("vllm:num_requests_running", {"engine": "1", "model_name": "a"}),
        Series("vllm:cache_config_info", {"engine": "1", "block_size": "16"}),
        Series("vllm:kv_offload_load_bytes_fs_total", {"engine": "0", "model_name": "a"}),
    ]
    found = by_engine(shown)
    assert found[Engine("0", "a", "")].samples == {"vllm:num_requests_running": [(0, shown[0].labels)]}
    assert found[Engine("1", "a", "")].samples == {
        "vllm:num_requests_running": [(1, shown[1].labels)],
        "vllm:cache_config_info": [(2, shown[2].labels)],
    }
    named = {"vllm:kv_offload_load_bytes_total": [(3, {**shown[3].labels, "spec": "fs"})]}
    assert found[Engine("0", "a", "")].specs == {"fs": named}


def test_more_engines_than_a_page_may_show_are_refused() -> None:
    with pytest.raises(CollectError, match="513 engines"):
        by_engine([Series("vllm:num_requests_running", {"engine": str(rank)}) for rank in range(513)])
