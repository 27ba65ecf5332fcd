from __future__ import annotations

from typing import TYPE_CHECKING

from kvtally.collectors.engine_page import EnginePage
from kvtally.collectors.http import Response
from kvtally.collectors.kvbm import NOT_READ, KvbmMapping
from kvtally.collectors.quantities import CACHE, index
from kvtally.collectors.side_page import SidePage

if TYPE_CHECKING:
    from kvtally.collectors.base import Reading

# DYN_KVBM_METRICS=true, port 6880: no labels, no _total
PAGE = b"""\
# HELP kvbm_matched_tokens The number of matched tokens
# TYPE kvbm_matched_tokens counter
kvbm_matched_tokens 8192
# HELP kvbm_offload_blocks_d2h The number of offload blocks from device to host
# TYPE kvbm_offload_blocks_d2h counter
kvbm_offload_blocks_d2h 640
kvbm_offload_blocks_h2d 320
kvbm_offload_blocks_d2d 0
kvbm_offload_blocks_d2o 16
kvbm_onboard_blocks_h2d 192
kvbm_onboard_blocks_d2d 64
kvbm_onboard_blocks_o2d 8
kvbm_object_read_failures 1
# TYPE kvbm_host_cache_hit_rate gauge
kvbm_host_cache_hit_rate 0.75
"""


class Page:
    """Answers every GET with one page, and has no version."""

    def __init__(self, body: bytes, url: str) -> None:
        self.url = url
        self._body = body

    def get(self, target: str | None = None) -> Response:
        return Response(200, b"{}" if target and target.endswith("/version") else self._body, "text/plain")

    def close(self) -> None:
        pass


def read(body: bytes = PAGE) -> tuple[Reading, ...]:
    return SidePage("gpu1:6880", Page(body, "http://gpu1:6880/metrics"), lambda _: ("gpu1:8081",)).collect()


def test_matched_tokens_are_tokens_and_blocks_are_details_by_where_they_went() -> None:
    (reading,) = read()
    found = {quantity.name: value for quantity, value in zip(CACHE, reading.values, strict=True) if value is not None}
    assert found == {"lookup_hit_tokens": 8192}
    assert (reading.kind, reading.name) == ("cache", "gpu1:6880/kvbm")
    assert reading.attributes == {"source": "kvbm", "cache": "dynamo kvbm", "engines": "gpu1:8081"}
    assert dict(zip(reading.detail_names, reading.details, strict=True)) == {
        "offloaded_device_to_host_blocks": 640,
        "offloaded_host_to_disk_blocks": 320,
        "offloaded_device_to_disk_blocks": 0,
        "offloaded_device_to_object_blocks": 16,
        "onboarded_host_to_device_blocks": 192,
        "onboarded_disk_to_device_blocks": 64,
        "onboarded_object_to_device_blocks": 8,
    }


def test_a_release_before_object_stores_lacks_only_those() -> None:
    (reading,) = read(b"".join(line + b"\n" for line in PAGE.splitlines() if b"2o" not in line and b"o2" not in line))
    assert reading.values[index("cache", "lookup_hit_tokens")] == 8192
    assert len(reading.details) == 5


def test_a_dynamo_worker_s_page_is_that_of_the_engine_whose_families_it_passes_on() -> None:
    worker = """\
dynamo_component_requests_total{dynamo_component="backend",dynamo_endpoint="generate",dynamo_namespace="d"} 40
dynamo_component_kvstats_active_blocks{dynamo_component="backend",dynamo_namespace="d"} 17
dynamo_component_kvstats_gpu_prefix_cache_hit_rate{dynamo_component="backend",dynamo_namespace="d"} 0.5
vllm:prompt_tokens_total{engine="0",model_name="qwen"} 900.0
vllm:generation_tokens_total{engine="0",model_name="qwen"} 300.0
vllm:num_requests_running{engine="0",model_name="qwen"} 2.0
"""
    page = EnginePage("gpu1:8081", Page(worker.encode(), "http://gpu1:8081/metrics"), restrict=False)
    (reading,) = page.collect()
    assert (reading.kind, reading.name, reading.attributes["engine"]) == ("engine", "gpu1:8081/0", "vllm")
    assert reading.values[index("engine", "prompt_tokens")] == 900
    assert reading.values[index("engine", "generated_tokens")] == 300


def test_ratios_over_a_sliding_window_are_not_read() -> None:
    assert not any(KvbmMapping().wants(name) for name, _ in NOT_READ)
