from __future__ import annotations

import pytest

from kvtally.agent.hardware import SHORT_NAMES, Gpu, gpu_of


def known(sku: str) -> Gpu:
    gpu = gpu_of(sku)
    assert gpu is not None
    return gpu


def test_the_h100_has_its_dense_peak_and_the_clock_at_which_it_holds() -> None:
    gpu = known("NVIDIA H100 80GB HBM3")
    assert (gpu.dense_bf16_flops, gpu.bandwidth_bytes_per_second) == (989.4e12, 3.35e12)
    assert (gpu.fp8_factor, gpu.clock_mhz, gpu.memory_bytes) == (2, 1830, 80 * 2**30)


# SMs x FLOP of an SM and clock x MHz, worked out from the architecture's figures
@pytest.mark.parametrize(
    ("sku", "multiprocessors", "flop_per_clock"),
    [
        ("H100", 132, 4096),
        ("H100-PCIe", 114, 4096),
        ("H100-NVL", 132, 4096),
        ("A100", 108, 2048),
        ("A30", 56, 2048),
        ("A10", 72, 1024),
        ("A40", 84, 1024),
        ("L4", 58, 1024),
        ("L40S", 142, 1024),
        ("RTX6000-Ada", 142, 1024),
        ("RTX4090", 128, 512),
        ("RTX5090", 170, 512),
        ("B200", 148, 8192),
        ("MI300X", 304, 2048),
        ("MI355X", 256, 4096),
    ],
)
def test_peak_and_clock_belong_together(sku: str, multiprocessors: int, flop_per_clock: int) -> None:
    gpu = known(sku)
    assert gpu.dense_bf16_flops == pytest.approx(multiprocessors * flop_per_clock * gpu.clock_mhz * 1e6, rel=2e-3)


@pytest.mark.parametrize("sku", ["A100-SXM4-80GB", "nvidia a100-sxm4-80gb", " NVIDIA  A100 SXM4 80GB ", "A100"])
def test_drivers_spell_one_name_in_several_ways(sku: str) -> None:
    assert known(sku).name == "NVIDIA A100-SXM4-80GB"


@pytest.mark.parametrize("sku", ["", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "H1", "NVIDIA H999", "GPU"])
def test_what_is_not_in_the_table_is_unknown(sku: str) -> None:
    assert gpu_of(sku) is None


def test_every_short_name_leads_to_a_row_that_names_its_source() -> None:
    for short, name in SHORT_NAMES.items():
        gpu = known(short)
        assert gpu.name == name
        assert gpu.source


def test_every_row_is_of_a_size_that_a_gpu_can_have() -> None:
    for short in SHORT_NAMES:
        gpu = known(short)
        assert 50e12 < gpu.dense_bf16_flops < 5e15
        assert 0.2e12 < gpu.bandwidth_bytes_per_second < 10e12
        assert 1000 < gpu.clock_mhz < 3000
        assert gpu.fp8_factor in {1, 2}
