from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtally.collectors import quantities
from kvtally.collectors.gpu import GpuIntegrator, GpuSample, format_line, parse_line

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvtally.collectors.base import Reading

LOADS = Path(__file__).parent / "fixtures" / "gpu" / "h100-loads.jsonl"
GPM_NAMES = ("graphics_util", "sm_util", "any_tensor_util", "dram_bw_util", "pcie_rx_mib_per_s", "pcie_tx_mib_per_s")
GPM_QUANTITIES = ("gpm_ns", "graphics_ns", "sm_ns", "tensor_ns", "dram_ns", "pcie_received_bytes", "pcie_sent_bytes")
INTEGRALS = [quantity.name for quantity in quantities.GPU if quantity.type == "integral"]


def value(reading: Reading, name: str) -> float | None:
    return reading.values[quantities.index("gpu", name)]


def at(t: float, uuid: str = "GPU-a", index: int = 0, **values: Any) -> GpuSample:
    return GpuSample(t, uuid, index, **values)


def whole(t: float, **values: Any) -> GpuSample:
    """A sample with every gauge: half busy, a quarter of it memory, 100 W."""
    gauges = {"utilization_percent": 50, "memory_utilization_percent": 25, "power_milliwatts": 100_000}
    return at(t, **{**gauges, **values})


def means(graphics: float, received: float = 0.0) -> dict[str, float]:
    return {**dict.fromkeys(GPM_NAMES, 0.0), "graphics_util": graphics, "pcie_rx_mib_per_s": received}


def integrate(samples: Iterable[GpuSample], max_gap_seconds: float = 30.0) -> Reading:
    integrator = GpuIntegrator(7.0, max_gap_seconds)
    for sample in samples:
        integrator.add(sample)
    (reading,) = integrator.readings()
    return reading


def recorded(load: str) -> list[GpuSample]:
    lines = [json.loads(line) for line in LOADS.read_text().splitlines()]
    return [sample for line in lines if line["gpus"][0]["load"] == load for sample in parse_line(line)]


def test_a_line_of_an_old_recording_is_read_with_what_it_lacks_unknown() -> None:
    line = {
        "t": 1795409207.25,
        "gpus": [
            {
                "index": 0,
                "uuid": "GPU-nvidia-h100-80gb-hbm3-0",
                "utilization_percent": 31,
                "memory_utilization_percent": 14,
                "memory_used_bytes": 76435750912,
                "power_milliwatts": 184514,
                "energy_millijoules": 119372437,
                "sm_clock_mhz": 1875,
                "gpm": {"graphics_util": 37.95, "sm_occupancy": 5.374, "fp64_util": None},
            }
        ],
    }
    assert parse_line(line) == [
        GpuSample(
            t=1795409207.25,
            uuid="GPU-nvidia-h100-80gb-hbm3-0",
            index=0,
            name=None,
            mig=None,
            utilization_percent=31,
            memory_utilization_percent=14,
            memory_used_bytes=76435750912,
            power_milliwatts=184514,
            energy_millijoules=119372437,
            sm_clock_mhz=1875,
            clock_reasons=None,
            gpm={"graphics_util": 37.95, "sm_occupancy": 5.374, "fp64_util": None},
            gpm_seconds=None,
        )
    ]


@pytest.mark.parametrize(
    "line",
    [
        {"gpus": []},
        {"t": "yesterday", "gpus": []},
        {"t": 1.0, "gpus": {}},
        {"t": 1.0, "gpus": [{"index": 0}]},
        {"t": 1.0, "gpus": [{"uuid": "GPU-a", "index": 0, "power_milliwatts": "much"}]},
        {"t": 1.0, "gpus": [{"uuid": "GPU-a", "index": 0, "gpm": [1, 2]}]},
    ],
)
def test_a_line_of_another_shape_is_refused(line: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"Expected|Object"):
        parse_line(line)


def test_samples_survive_being_written_and_read() -> None:
    samples = [
        whole(5.5, name="NVIDIA H100 80GB HBM3", mig=False, gpm=means(12.5), gpm_seconds=2.0, clock_reasons=4),
        at(5.5, "GPU-b", 1, mig=True),
    ]
    assert parse_line(msgspec.json.decode(msgspec.json.encode(format_line(samples)))) == samples


def test_a_reading_has_the_quantities_in_their_order() -> None:
    gpm = dict(zip(GPM_NAMES, (40.0, 30.0, 20.0, 10.0, 3.0, 5.0), strict=True))
    last = whole(
        104.0,
        name="NVIDIA H100 80GB HBM3",
        mig=False,
        energy_millijoules=900,
        memory_used_bytes=2**30,
        sm_clock_mhz=1980,
        clock_reasons=4,
        gpm=gpm,
        gpm_seconds=2.0,
    )
    first = whole(100.0, name="NVIDIA H100 80GB HBM3", mig=False, sm_clock_mhz=1200)
    reading = integrate([first, last])
    assert (reading.kind, reading.name, reading.epoch, reading.session) == ("gpu", "GPU-a", None, 7.0)
    assert reading.attributes == {"index": "0", "sku": "NVIDIA H100 80GB HBM3", "mig": "0"}
    assert dict(zip((quantity.name for quantity in quantities.GPU), reading.values, strict=True)) == pytest.approx(
        {
            "energy_mj": 900,
            "observed_ns": 4.0,
            "busy_ns": 2.0,
            "memory_busy_ns": 1.0,
            "power_sampled_mj": 400_000,
            "gpm_ns": 2.0,
            "graphics_ns": 0.8,
            "sm_ns": 0.6,
            "tensor_ns": 0.4,
            "dram_ns": 0.2,
            "pcie_received_bytes": 6 * 2**20,
            "pcie_sent_bytes": 10 * 2**20,
            "memory_used_bytes": 2**30,
            "power_mw": 100_000,
            "sm_clock_mhz": 1980,
            "clock_reasons": 4,
            "busy_cycles": 3960.0,  # million: 1980 MHz for the 2 s at work
        }
    )


def test_the_first_sample_begins_all_sums_that_it_can_at_zero() -> None:
    reading = integrate([whole(100.0, sm_clock_mhz=1980, gpm={}, gpm_seconds=0.0)])
    assert [value(reading, name) for name in INTEGRALS] == [0.0] * len(INTEGRALS)


def test_what_a_gpu_never_tells_stays_unknown() -> None:
    reading = integrate(at(float(second), power_milliwatts=50_000) for second in range(5))
    assert value(reading, "power_sampled_mj") == 200_000
    assert value(reading, "observed_ns") == 4.0
    unknown = {"energy_mj", "busy_ns", "memory_busy_ns", *GPM_QUANTITIES, "memory_used_bytes", "sm_clock_mhz"}
    unknown.add("busy_cycles")
    assert {name for name in unknown if value(reading, name) is not None} == set()
    silent = integrate([at(1.0), at(2.0)])
    assert silent.values == (None,) * len(quantities.GPU)
    assert silent.attributes == {"index": "0"}


def test_a_gap_longer_than_allowed_is_not_counted() -> None:
    samples = [whole(0.0), whole(10.0), whole(41.0), whole(71.0)]
    assert value(integrate(samples), "observed_ns") == 40.0
    assert value(integrate(samples, max_gap_seconds=31.0), "observed_ns") == 71.0


def test_a_sample_without_one_gauge_is_no_idle_time() -> None:
    reading = integrate([whole(0.0), whole(1.0), whole(2.0, utilization_percent=None), whole(3.0)])
    assert value(reading, "observed_ns") == 2.0
    assert value(reading, "busy_ns") == 1.0
    assert value(reading, "power_sampled_mj") == 200_000


def test_cycles_count_while_the_gpu_is_at_work_whatever_its_clock_is_when_it_rests() -> None:
    loaded = [whole(float(t), utilization_percent=100, sm_clock_mhz=1650) for t in range(4)]
    resting = [whole(float(t), utilization_percent=0, sm_clock_mhz=1965) for t in range(4, 30)]
    reading = integrate([*loaded, *resting])
    assert value(reading, "busy_ns") == 3.0
    assert value(reading, "busy_cycles") == 3.0 * 1650  # million
    assert value(reading, "sm_clock_mhz") == 1965


def test_a_sample_without_its_clock_makes_the_clock_under_load_no_slower() -> None:
    clocks: list[int | None] = [1500, 1500, None, 1500]
    reading = integrate(whole(float(t), sm_clock_mhz=clock) for t, clock in enumerate(clocks))
    assert value(reading, "observed_ns") == 2.0
    assert value(reading, "busy_ns") == 1.0
    assert value(reading, "busy_cycles") == 1500.0


def test_without_a_clock_or_without_utilisation_there_are_no_cycles_and_the_rest_counts() -> None:
    clockless = integrate([whole(0.0), whole(1.0)])
    assert (value(clockless, "busy_ns"), value(clockless, "busy_cycles")) == (0.5, None)
    cut = integrate(at(float(t), mig=True, power_milliwatts=70_000, sm_clock_mhz=1980) for t in range(2))
    assert (value(cut, "power_sampled_mj"), value(cut, "busy_cycles")) == (70_000, None)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_a_value_that_no_gauge_can_have_counts_as_missing(bad: float) -> None:
    reading = integrate([whole(0.0), whole(1.0, power_milliwatts=bad), whole(2.0)])
    assert value(reading, "observed_ns") == 1.0
    assert value(reading, "power_sampled_mj") == 100_000


def test_a_sample_without_any_value_adds_nothing_and_its_gauges_are_unknown() -> None:
    reading = integrate([whole(0.0, energy_millijoules=5), whole(1.0), at(2.0)])
    assert value(reading, "observed_ns") == 1.0
    assert value(reading, "power_mw") is None
    assert value(reading, "energy_mj") == 5


def test_energy_is_the_raw_counter_of_the_newest_sample_that_has_it() -> None:
    samples = [whole(0.0, energy_millijoules=900), whole(1.0), whole(2.0, energy_millijoules=100), whole(3.0)]
    assert value(integrate(samples), "energy_mj") == 100


def test_gpm_means_count_for_the_time_they_state_and_over_any_gap() -> None:
    reading = integrate([whole(0.0, gpm={}, gpm_seconds=0.0), whole(600.0, gpm=means(25.0, 8.0), gpm_seconds=600.0)])
    assert value(reading, "gpm_ns") == 600.0
    assert value(reading, "graphics_ns") == 150.0
    assert value(reading, "pcie_received_bytes") == 4800 * 2**20
    assert value(reading, "observed_ns") == 0.0


def test_gpm_means_that_state_no_time_count_since_the_sample_before() -> None:
    reading = integrate([whole(0.0, gpm=means(100.0)), whole(2.0, gpm=means(50.0)), whole(3.0, gpm=means(10.0))])
    assert value(reading, "gpm_ns") == 3.0
    assert value(reading, "graphics_ns") == pytest.approx(1.1)


def test_gpm_means_without_a_metric_that_was_there_are_left_out() -> None:
    partial = means(100.0)
    del partial["sm_util"]
    samples = [whole(float(t), gpm=gpm, gpm_seconds=1.0) for t, gpm in enumerate([means(50.0), partial, means(50.0)])]
    reading = integrate(samples)
    assert value(reading, "gpm_ns") == 2.0
    assert value(reading, "graphics_ns") == 1.0


def test_gpm_without_a_metric_that_never_was_there_is_kept() -> None:
    partial = means(50.0)
    del partial["pcie_rx_mib_per_s"]
    reading = integrate([whole(0.0, gpm={}), whole(2.0, gpm=partial, gpm_seconds=2.0)])
    assert value(reading, "graphics_ns") == 1.0
    assert value(reading, "pcie_received_bytes") is None


def test_a_late_or_repeated_sample_is_left_out() -> None:
    samples = [whole(0.0), whole(10.0), whole(10.0), whole(5.0), whole(12.0)]
    assert value(integrate(samples), "observed_ns") == 12.0


def test_a_clock_set_far_back_begins_the_time_anew() -> None:
    samples = [whole(10_000.0), whole(10_010.0), whole(6_410.0), whole(6_420.0)]
    assert value(integrate(samples), "observed_ns") == 20.0


def test_gpus_are_summed_apart_and_given_by_index() -> None:
    integrator = GpuIntegrator(7.0)
    for t in (0.0, 1.0, 2.0):
        integrator.add(at(t, "GPU-b", 0, utilization_percent=100))
        integrator.add(at(t, "GPU-a", 1, utilization_percent=10))
    first, second = integrator.readings()
    assert (first.name, value(first, "busy_ns")) == ("GPU-b", 2.0)
    assert second.name == "GPU-a"
    assert value(second, "busy_ns") == pytest.approx(0.2)


def test_a_gpu_that_is_not_sampled_any_more_gives_no_reading() -> None:
    integrator = GpuIntegrator(7.0)
    integrator.add(whole(0.0))
    for t in range(0, 50, 10):
        integrator.add(at(float(t), "GPU-b", 1))
    assert [reading.name for reading in integrator.readings()] == ["GPU-b"]
    assert GpuIntegrator(7.0).readings() == ()


def test_other_attributes_are_another_target_whose_sums_begin_at_zero() -> None:
    cut = at(2.0, mig=True, power_milliwatts=100_000)
    reading = integrate([whole(0.0, mig=False), whole(1.0, mig=False), cut, at(3.0, mig=True, power_milliwatts=70_000)])
    assert reading.attributes["mig"] == "1"
    assert value(reading, "observed_ns") == 1.0
    assert value(reading, "power_sampled_mj") == 70_000
    assert value(reading, "busy_ns") is None


def test_a_name_that_could_not_be_read_once_is_kept() -> None:
    reading = integrate([whole(0.0, name="H100", mig=False), whole(1.0), whole(2.0, name="H100", mig=False)])
    assert reading.attributes == {"index": "0", "sku": "H100", "mig": "0"}
    assert value(reading, "observed_ns") == 2.0


def test_on_a_real_h100_a_copy_from_the_host_is_busy_without_any_sm() -> None:
    reading = integrate(recorded("host_to_device"))
    # Samples from 1795417159.0195656 to 1795417164.0189817, all 100 % busy; GPM over 2.99997878 and 2.00100374 s.
    assert value(reading, "observed_ns") == pytest.approx(4.9994161)
    assert value(reading, "busy_ns") == pytest.approx(4.9994161)
    assert value(reading, "memory_busy_ns") == pytest.approx(0.0999883)
    assert value(reading, "gpm_ns") == pytest.approx(5.0009825)
    assert value(reading, "sm_ns") == 0.0
    assert value(reading, "graphics_ns") == pytest.approx(0.00031, abs=1e-5)
    # 53742.14 MiB/s x 2.99997878 s + 53837.79 MiB/s x 2.00100374 s = 268955.87 MiB
    assert value(reading, "pcie_received_bytes") == pytest.approx(268_954.9 * 2**20, rel=1e-5)
    assert value(reading, "energy_mj") == 23_463_605


@pytest.mark.parametrize(
    ("load", "graphics", "sm", "tensor", "dram"),
    [
        ("idle", 0.0, 0.0, 0.0, 0.0),
        ("gemm", 99.7396, 96.3644, 93.5320, 25.8357),
        ("device_copy", 99.1575, 98.7070, 0.0, 89.2608),
        ("spin", 99.7238, 0.7552, 0.0, 0.0006),
    ],
)
def test_on_a_real_h100_every_load_shows_its_shares(
    load: str, graphics: float, sm: float, tensor: float, dram: float
) -> None:
    reading = integrate(recorded(load))
    seconds = value(reading, "gpm_ns")
    assert seconds is not None
    shares = [value(reading, name) for name in ("graphics_ns", "sm_ns", "tensor_ns", "dram_ns")]
    assert [100 * share / seconds for share in shares if share is not None] == pytest.approx(
        [graphics, sm, tensor, dram], abs=1e-3
    )


def test_on_a_real_h100_sampled_power_and_the_energy_counter_agree() -> None:
    samples = recorded("gemm")
    counted = (samples[-1].energy_millijoules or 0) - (samples[0].energy_millijoules or 0)
    assert counted == 2_087_070  # 7289156 - 5202086
    assert value(integrate(samples), "power_sampled_mj") == pytest.approx(counted, rel=0.003)


TIMES = st.lists(st.integers(1, 7), min_size=2, max_size=30)


@given(steps=TIMES, keep=st.sets(st.integers(0, 29)))
def test_while_the_gauges_hold_any_thinning_gives_the_same_sums(steps: list[int], keep: set[int]) -> None:
    times = [float(sum(steps[:count])) for count in range(len(steps) + 1)]
    kept = [t for place, t in enumerate(times) if place in keep or t in (times[0], times[-1])]
    every = integrate((whole(t) for t in times), max_gap_seconds=1e9)
    thinned = integrate((whole(t) for t in kept), max_gap_seconds=1e9)
    assert thinned.values == pytest.approx(every.values)
    assert value(every, "observed_ns") == times[-1]
    assert value(every, "busy_ns") == pytest.approx(times[-1] / 2)


@given(steps=st.lists(st.tuples(st.integers(1, 600), st.floats(0, 100), st.floats(0, 6e4)), min_size=1, max_size=20))
def test_gpm_means_taken_together_give_the_sums_of_their_parts(steps: list[tuple[int, float, float]]) -> None:
    start = whole(0.0, gpm={}, gpm_seconds=0.0)
    end = float(sum(seconds for seconds, _, _ in steps))
    parts, t = [start], 0.0
    for seconds, graphics, received in steps:
        t += seconds
        parts.append(whole(t, gpm=means(graphics, received), gpm_seconds=float(seconds)))
    graphics_mean = sum(seconds * graphics for seconds, graphics, _ in steps) / end
    received_mean = sum(seconds * received for seconds, _, received in steps) / end
    together = integrate([start, whole(end, gpm=means(graphics_mean, received_mean), gpm_seconds=end)])
    apart = integrate(parts)
    for name in GPM_QUANTITIES:
        assert value(apart, name) == pytest.approx(value(together, name))


@st.composite
def any_samples(draw: st.DrawFn) -> list[GpuSample]:
    percent = st.none() | st.floats(0, 100)
    samples = []
    for _ in range(draw(st.integers(1, 25))):
        gpm = draw(st.none() | st.fixed_dictionaries({}, optional=dict.fromkeys(GPM_NAMES, percent)))
        samples.append(
            at(
                draw(st.floats(0, 300)),
                draw(st.sampled_from(["GPU-a", "GPU-b"])),
                utilization_percent=draw(percent),
                memory_utilization_percent=draw(percent),
                power_milliwatts=draw(st.none() | st.integers(0, 10**6)),
                sm_clock_mhz=draw(st.none() | st.integers(345, 1980)),
                gpm=gpm,
                gpm_seconds=draw(st.none() | st.floats(0, 20)),
            )
        )
    return samples


@given(any_samples())
def test_sums_never_fall_and_no_share_passes_the_time_observed(samples: list[GpuSample]) -> None:
    integrator = GpuIntegrator(7.0)
    before: dict[str, Reading] = {}
    for sample in samples:
        integrator.add(sample)
        for reading in integrator.readings():
            old = before.get(reading.name, reading)
            assert (value(reading, "observed_ns") or 0) >= (value(old, "observed_ns") or 0)
            for total, parts in (("observed_ns", ("busy_ns", "memory_busy_ns")), ("gpm_ns", GPM_QUANTITIES[1:5])):
                for part in parts:
                    assert (value(reading, part) or 0) >= (value(old, part) or 0)
                    assert (value(reading, part) or 0) <= (value(reading, total) or 0) + 1e-9
            before[reading.name] = reading


@given(any_samples())
def test_once_cycles_are_known_each_step_has_them_at_its_own_clock_or_counts_nothing(samples: list[GpuSample]) -> None:
    integrator = GpuIntegrator(7.0)
    before: dict[str, Reading] = {}
    for sample in samples:
        integrator.add(sample)
        for reading in integrator.readings():
            old = before.get(reading.name)
            if old is not None and reading.name == sample.uuid and value(old, "busy_cycles") is not None:
                worked, cycles = (
                    (value(reading, name) or 0) - (value(old, name) or 0) for name in ("busy_ns", "busy_cycles")
                )
                assert cycles == pytest.approx(worked * (sample.sm_clock_mhz or 0), abs=1e-6)
            before[reading.name] = reading


@given(any_samples())
def test_other_gpus_change_nothing_and_a_replay_gives_the_same(samples: list[GpuSample]) -> None:
    together = GpuIntegrator(7.0, max_gap_seconds=1e9)
    for sample in samples:
        together.add(sample)
    for reading in together.readings():
        alone = integrate((sample for sample in samples if sample.uuid == reading.name), max_gap_seconds=1e9)
        assert alone == reading
