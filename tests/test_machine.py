from __future__ import annotations

import json

import numpy as np
import pytest
from tests.replica_rows import FINGERPRINT, SKU, cpu, h100, shape

from kvtally.agent.facts import Replica
from kvtally.agent.hardware import gpu_of
from kvtally.agent.model_shape import shape_text
from kvtally.agent.steplaw.machine import CannotCalibrate, machine, machine_of

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
REPLICA = Replica(
    7, "10.0.0.1:8000/0", "llama-8b", "0.25.1", ("GPU-a",), SKU, "on-demand", "", {}, shape=shape_text(CONFIG)
)


def test_the_constants_of_an_8b_llama_on_one_h100() -> None:
    found = h100()
    # a layer: attention 2 x 4096 x 128 x (32 + 8) = 41,943,040, MLP 3 x 4096 x 14336 = 176,160,768; 32 layers, 2 FLOP
    assert found.linear_flop == 2 * 32 * (41_943_040 + 176_160_768) == 13_958_643_712
    assert found.attention_flop == 4 * 32 * 32 * 128 == 524_288
    assert found.kv_bytes == 2 * 32 * 8 * 128 * 2 == 131_072
    assert found.flops == found.attention_flops == 989.4e12
    assert found.bandwidth == 3350e9
    assert found.clock_mhz == 1830
    # 13.96e9 FLOP at 60 % of 989.4e12: 23.5 us, METHOD 6 measured 23
    assert found.token_seconds == pytest.approx(23.51e-6, rel=1e-3)
    assert not found.is_cpu


def test_gpus_add_their_speed_and_their_clock_stays() -> None:
    one, four = h100(gpus=1), h100(gpus=4)
    assert four.flops == 4 * one.flops
    assert four.attention_flops == 4 * one.attention_flops
    assert four.bandwidth == 4 * one.bandwidth
    assert four.clock_mhz == one.clock_mhz
    assert four.linear_flop == one.linear_flop


def test_weights_multiplied_as_8_bit_floats_are_faster_and_attention_stays_as_it_is() -> None:
    fast = machine(shape(quantization="fp8"), gpu_of(SKU), 2, token_budget=8192)
    assert fast.flops == 2 * 2 * 989.4e12
    assert fast.attention_flops == 2 * 989.4e12


def test_8_bit_weights_that_are_multiplied_at_16_bits_are_no_faster() -> None:
    config = CONFIG | {"quantization_config": {"quant_method": "gptq", "bits": 8}}
    text = json.loads(shape_text(config))
    replica = REPLICA._replace(shape=json.dumps(text))
    found = machine_of(replica, FINGERPRINT)
    assert found.shape.weight_bytes_per_parameter == 1
    assert found.flops == 989.4e12


def test_a_gpu_without_8_bit_floats_gains_nothing_by_them() -> None:
    found = machine(shape(quantization="fp8"), gpu_of("A100"), 1, token_budget=2048)
    assert found.flops == found.attention_flops == 312e12


def test_a_cpu_has_no_clock_and_never_divides_by_its_gpus() -> None:
    found = cpu()
    assert found.is_cpu
    assert found.clock_mhz is None
    assert found.flops > 0
    assert found.bandwidth > 0
    assert found.all_reduce_seconds(1000) == 0


def test_one_gpu_reduces_nothing() -> None:
    assert h100(gpus=1).all_reduce_seconds(5000) == 0


def test_two_gpus_pay_latency_and_transfer_twice_in_each_layer() -> None:
    # a token moves 4 x 4096 x 1/2 = 8192 bytes over 350e9 bytes/s; two reductions in 32 layers, 10 us each
    # 1000 tokens: 64 x (10e-6 + 1000 x 8192 / 350e9) = 64 x 33.406e-6 = 2.138 ms
    found = h100(gpus=2)
    assert found.all_reduce_seconds(1000) == pytest.approx(2.13797e-3, rel=1e-5)
    assert found.all_reduce_seconds(0) == pytest.approx(0.64e-3)
    both = found.all_reduce_seconds(np.array([0.0, 1000.0]))  # type: ignore[arg-type]  # it takes arrays as well
    assert both == pytest.approx([0.64e-3, 2.13797e-3], rel=1e-5)


def test_more_gpus_move_more_of_each_token() -> None:
    # the share is 3/4 with 4 GPUs where it is 1/2 with 2
    two, four = (h100(gpus=gpus).all_reduce_seconds(1e9) for gpus in (2, 4))
    assert four / two == pytest.approx(1.5, rel=1e-4)


def test_a_replica_gives_its_machine_by_its_fingerprint() -> None:
    found = machine_of(REPLICA._replace(eager=True), FINGERPRINT._replace(gpus=2, token_budget=4096))
    assert found == h100(gpus=2)._replace(token_budget=4096, is_eager=True)


def test_a_replica_without_a_gpu_gives_a_cpu() -> None:
    found = machine_of(REPLICA._replace(gpus=(), sku=None), FINGERPRINT._replace(gpus=0, sku=""))
    assert found.is_cpu
    assert found.clock_mhz is None


def test_a_model_whose_shape_nobody_told_cannot_be_calibrated() -> None:
    with pytest.raises(CannotCalibrate, match="llama-8b is not known") as raised:
        machine_of(REPLICA._replace(shape=""), FINGERPRINT)
    assert "model_config" in raised.value.hint


def test_an_architecture_without_formulas_cannot_be_calibrated() -> None:
    odd = json.dumps(json.loads(REPLICA.shape) | {"architecture": "MambaForCausalLM"})
    with pytest.raises(CannotCalibrate, match="MambaForCausalLM"):
        machine_of(REPLICA._replace(shape=odd), FINGERPRINT)


@pytest.mark.parametrize("sku", ["", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "Abacus 3000"])
def test_a_gpu_without_a_datasheet_row_cannot_be_calibrated(sku: str) -> None:
    with pytest.raises(CannotCalibrate, match="no datasheet row"):
        machine_of(REPLICA, FINGERPRINT._replace(sku=sku))
