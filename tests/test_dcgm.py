from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvtally.collectors import quantities
from kvtally.collectors.base import CollectError
from kvtally.collectors.dcgm import DCGM_FIELDS, MAX_GPUS, DcgmReader
from kvtally.collectors.gpu import GpuSample

if TYPE_CHECKING:
    from kvtally.collectors.base import Reading

PAGE = (Path(__file__).parent / "fixtures" / "dcgm" / "two-gpus.prom").read_bytes()
BUSY, IDLE = "GPU-604ac76c-d9cf-fef3-62e9-d92044ab6e52", "GPU-11111111-2222-3333-4444-555555555555"
MIG = 'gpu="0",UUID="GPU-a",device="nvidia0",modelName="NVIDIA A100-SXM4-40GB"'


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def value(reading: Reading, name: str) -> float | None:
    return reading.values[quantities.index("gpu", name)]


def read(*pages: bytes, seconds: float = 10.0) -> dict[str, Reading]:
    """Readings by name after these pages, `seconds` apart."""
    clock = Clock()
    reader = DcgmReader(clock)
    readings: tuple[Reading, ...] = ()
    for page in pages:
        readings = reader.read(page)
        clock.now += seconds
    return {reading.name: reading for reading in readings}


def lines(*samples: tuple[str, str, float | str]) -> bytes:
    return "".join(f"{name}{{{labels}}} {number}\n" for name, labels, number in samples).encode()


def test_a_first_page_gives_counters_gauges_and_sums_that_begin_at_zero() -> None:
    found = read(PAGE)
    assert list(found) == [BUSY, IDLE]
    busy = found[BUSY]
    assert (busy.kind, busy.session, busy.epoch) == ("gpu", 1000.0, None)
    assert busy.attributes == {
        "index": "0",
        "sku": "NVIDIA H100 80GB HBM3",
        "mig": "0",
        "source": "dcgm",
        "host": "node-1",
    }
    assert value(busy, "energy_mj") == 119_372_437
    assert value(busy, "memory_used_bytes") == 72_011 * 2**20
    assert value(busy, "power_mw") == 612_500
    assert value(busy, "sm_clock_mhz") == 1650
    assert value(busy, "observed_ns") == 0
    assert value(busy, "graphics_ns") == 0
    assert value(busy, "clock_reasons") is None


@pytest.mark.parametrize("label", ["hostname", "Hostname"])
def test_the_host_that_gpus_are_in_is_read_however_the_exporter_spells_its_label(label: str) -> None:
    page = PAGE.replace(b"hostname=", f"{label}=".encode())
    assert [one.attributes["host"] for one in read(page).values()] == ["node-1", "node-1"]


def test_values_hold_until_the_next_page() -> None:
    found = read(PAGE, PAGE, PAGE)
    busy, idle = found[BUSY], found[IDLE]
    assert value(busy, "observed_ns") == 20
    assert value(busy, "busy_ns") == pytest.approx(16)
    assert value(busy, "memory_busy_ns") == pytest.approx(6)
    assert value(busy, "busy_cycles") == pytest.approx(16 * 1650)
    assert value(busy, "power_sampled_mj") == 612_500 * 20
    assert value(busy, "gpm_ns") == 20
    assert value(busy, "graphics_ns") == pytest.approx(15)
    assert value(busy, "tensor_ns") == pytest.approx(5)
    assert value(busy, "dram_ns") == pytest.approx(10)
    assert value(busy, "sm_ns") is None  # SM_ACTIVE is not served by default
    assert value(busy, "pcie_sent_bytes") == 20 * 2**20
    assert value(busy, "pcie_received_bytes") == 60 * 2**20
    assert value(idle, "graphics_ns") == 0
    assert value(idle, "tensor_ns") is None


def test_a_gap_between_pages_is_unknown_and_not_counted() -> None:
    found = read(PAGE, PAGE, seconds=31)
    assert value(found[BUSY], "observed_ns") == 0


def test_a_gpu_that_pods_share_is_there_once_for_each_and_counts_once() -> None:
    labels = 'gpu="0",UUID="GPU-a",modelName="NVIDIA L4",pod="{}"'
    page = lines(
        *(("DCGM_FI_DEV_GPU_UTIL", labels.format(pod), 40) for pod in ("one", "two")),
        *(("DCGM_FI_DEV_SM_CLOCK", labels.format(pod), 1000) for pod in ("one", "two")),
        *(("DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION", labels.format(pod), 77) for pod in ("one", "two")),
    )
    found = read(page, page)
    assert list(found) == ["GPU-a"]
    assert value(found["GPU-a"], "busy_ns") == pytest.approx(4)
    assert value(found["GPU-a"], "energy_mj") == 77


def test_a_pod_that_comes_or_goes_opens_no_new_target_and_loses_no_sum() -> None:
    page = 'DCGM_FI_PROF_GR_ENGINE_ACTIVE{gpu="0",UUID="GPU-a",modelName="NVIDIA L4",pod="%s"} 0.5\n'
    found = read(page.encode() % b"one", page.encode() % b"two", b"# a comment more\n" + page.encode() % b"")
    assert value(found["GPU-a"], "graphics_ns") == pytest.approx(10)


@pytest.mark.parametrize("number", ["NaN", "+Inf", "-1", "2147483632", "140737488355328", "9223372036854775794"])
def test_what_dcgm_could_not_read_is_unknown(number: str) -> None:
    page = PAGE.replace(b'pod="llama-0"} 612.5\n', b'pod="llama-0"} %b\n' % number.encode())
    assert page != PAGE
    found = read(page, page)
    assert value(found[BUSY], "power_mw") is None
    assert value(found[BUSY], "power_sampled_mj") is None
    assert value(found[BUSY], "busy_ns") == pytest.approx(8)


def test_an_energy_counter_beyond_32_bits_is_a_number() -> None:
    page = PAGE.replace(b" 119372437\n", b" 5000000000\n")
    assert value(read(page)[BUSY], "energy_mj") == 5_000_000_000


def test_older_names_and_labels_are_read() -> None:
    labels = 'gpu="3",UUID="GPU-a",device="nvidia3",Hostname="n1"'
    found = read(lines(("DCGM_FI_DEV_CLOCK_THROTTLE_REASONS", labels, 4), ("DCGM_FI_DEV_SM_CLOCK", labels, 900)))
    assert found["GPU-a"].attributes == {"index": "3", "mig": "0", "source": "dcgm", "host": "n1"}
    assert value(found["GPU-a"], "clock_reasons") == 4


# with MIG on the exporter shows instances, by the UUID of their GPU, in place of it
def mig_page(*instances: tuple[str, str, float], more: bytes = b"") -> bytes:
    samples: list[tuple[str, str, float | str]] = []
    for number, profile, active in instances:
        labels = f'{MIG},GPU_I_PROFILE="{profile}",GPU_I_ID="{number}",Hostname="n1"'
        samples += [
            ("DCGM_FI_PROF_GR_ENGINE_ACTIVE", labels, active),
            ("DCGM_FI_DEV_FB_USED", labels, 4384),
            ("DCGM_FI_DEV_GPU_UTIL", labels, 0),
            ("DCGM_FI_DEV_POWER_USAGE", labels, 250),
            ("DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION", labels, 9_000),
        ]
    return lines(*samples) + more


def test_mig_instances_have_their_shares_and_the_gpu_has_what_is_left() -> None:
    page = mig_page(("13", "1g.5gb", 1.0), ("9", "3g.20gb", 0.5))
    found = read(page, page)
    assert set(found) == {"GPU-a", "MIG-GPU-a/13/0", "MIG-GPU-a/9/0"}
    small, large, whole = (found[name] for name in ("MIG-GPU-a/13/0", "MIG-GPU-a/9/0", "GPU-a"))
    assert small.attributes == {
        "index": "0",
        "sku": "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "mig": "1",
        "parent": "GPU-a",
        "share": "1/7",
        "source": "dcgm",
        "host": "n1",
    }
    # 3g.20gb: 3/7 of the compute and 4/8 of the memory; 1 - 1/7 - 1/2 is left
    assert (large.attributes["share"], whole.attributes["share"]) == ("1/2", "5/14")
    assert [value(one, "graphics_ns") for one in (small, large, whole)] == [10, 5, None]
    assert value(large, "memory_used_bytes") == 4384 * 2**20
    # power and energy are the whole GPU's, and utilisation is nobody's
    assert [value(one, "energy_mj") for one in (small, large, whole)] == [None, None, 9_000]
    assert value(whole, "power_mw") == 250_000
    assert value(whole, "busy_ns") is None
    assert value(whole, "memory_used_bytes") is None


def test_a_gpu_that_is_shown_beside_its_instances_is_cut_all_the_same() -> None:
    page = mig_page(("1", "7g.40gb", 1.0), more=lines(("DCGM_FI_DEV_FB_USED", MIG, 6)))
    found = read(page)
    assert found["GPU-a"].attributes["share"] == "0"
    assert value(found["GPU-a"], "memory_used_bytes") == 6 * 2**20
    assert found["MIG-GPU-a/1/0"].attributes["share"] == "1"


def test_an_instance_of_an_unknown_profile_has_no_product_and_so_no_price() -> None:
    found = read(mig_page(("1", "half", 1.0)))
    assert "sku" not in found["MIG-GPU-a/1/0"].attributes
    assert "share" not in found["MIG-GPU-a/1/0"].attributes


def test_a_gpu_that_is_cut_while_it_is_watched_becomes_other_targets() -> None:
    whole = lines(("DCGM_FI_PROF_GR_ENGINE_ACTIVE", f'{MIG},Hostname="n1"', 1))
    found = read(whole, whole, mig_page(("1", "7g.40gb", 1.0)))
    assert found["GPU-a"].attributes["mig"] == "1"
    assert value(found["MIG-GPU-a/1/0"], "graphics_ns") == 0


def test_a_page_without_a_gpu_is_an_error_that_says_what_to_look_at() -> None:
    with pytest.raises(CollectError, match="the page shows no GPU") as raised:
        read(b"go_goroutines 12\n")
    assert ":9400/metrics" in raised.value.hint
    with pytest.raises(CollectError, match="the page shows no GPU"):
        read(lines(("DCGM_FI_DEV_GPU_UTIL", 'gpu="0"', 1)))


def test_more_gpus_than_a_host_can_have_are_refused() -> None:
    samples = [("DCGM_FI_DEV_GPU_UTIL", f'gpu="{number}",UUID="GPU-{number}"', 1) for number in range(MAX_GPUS + 1)]
    with pytest.raises(CollectError, match="more than 1024 GPUs"):
        read(lines(*samples))


def test_every_row_names_a_field_that_is_summed_and_no_sample_serves_two() -> None:
    means = {"graphics_util", "sm_util", "any_tensor_util", "dram_bw_util", "pcie_rx_mib_per_s", "pcie_tx_mib_per_s"}
    assert {row.field for row in DCGM_FIELDS if row.is_mean} == means
    assert {row.field for row in DCGM_FIELDS if not row.is_mean} <= set(GpuSample.__struct_fields__)
    samples = [row.sample for row in DCGM_FIELDS]
    assert len(samples) == len(set(samples))
