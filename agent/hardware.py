"""GPUs by the name that NVML gives them: what the datasheet says of their speed and memory."""

from __future__ import annotations

import re
from typing import NamedTuple

_TERA = 10**12
_GIGA = 10**9
_GIB = 2**30
_VENDOR = re.compile(r"^(?:nvidia|amd instinct|amd|tesla) ")


class Gpu(NamedTuple):
    """One kind of GPU, by its datasheet; its figures are peaks that no kernel reaches.

    dense_bf16_flops    FLOP/s of the matrix units in bf16 or fp16 with fp32 sums, without sparsity
    fp8_factor          how many times faster 8-bit floats are; 1 where the matrix units know none
    clock_mhz           SM clock at which that peak holds: the peak over (SMs x FLOP of an SM and clock)
    memory_bytes        as sold; the driver keeps some
    source              where the figures were read, and which of them are ASSUMED
    """

    name: str
    dense_bf16_flops: float
    bandwidth_bytes_per_second: float
    fp8_factor: float
    clock_mhz: float
    memory_bytes: int
    source: str


def _gpu(  # noqa: PLR0917  # a line of a table
    name: str, tera_flops: float, giga_bytes: float, fp8_factor: float, clock_mhz: float, gib: int, source: str
) -> Gpu:
    return Gpu(name, tera_flops * _TERA, giga_bytes * _GIGA, fp8_factor, clock_mhz, gib * _GIB, source)


# "via" names the page on which a datasheet's figure was read; sheets that print sparse peaks are halved. The clock
# follows from the peak: 132 SMs x 4096 FLOP x 1830 MHz = 989.4 TFLOP/s (NVIDIA forum, thread 244727).
_HOPPER = "NVIDIA H100 datasheet (989.4 dense), via glennklockwood.com/garden/processors/h100 and hpctech.co.jp"
_AMPERE = "NVIDIA A100 datasheet, via github.com/winston-zhang-orz/gpu-specs and astroC86/gpu-datasheet"
_ADA = "NVIDIA datasheet, via github.com/winston-zhang-orz/gpu-specs"
_BLACKWELL = "NVIDIA Blackwell datasheet, via glennklockwood.com/garden/processors/B200"
_RTX_PRO = "NVIDIA: 188 SMs, FP32 peak, bandwidth; bf16 ASSUMED at 4 x FP32 as the Blackwell RTX whitepaper has it"
_RTX = "NVIDIA whitepaper of that generation (fp32 sums), from memory: ASSUMED"
_CDNA = "AMD Instinct datasheet, from memory, memory via aiwiki.ai and wiaix.com: ASSUMED"

_GPUS = (
    _gpu("NVIDIA H100 80GB HBM3", 989.4, 3350, 2, 1830, 80, _HOPPER),
    _gpu("NVIDIA H100 PCIe", 756, 2000, 2, 1620, 80, _HOPPER + "; clock: NVIDIA forum thread 244727"),
    _gpu("NVIDIA H100 NVL", 835.5, 3900, 2, 1545, 94, "NVIDIA H100 datasheet (1671 sparse), from memory: ASSUMED"),
    _gpu("NVIDIA H800", 989.4, 3350, 2, 1830, 80, "NVIDIA H800 datasheet, via github.com/astroC86/gpu-datasheet"),
    _gpu("NVIDIA H200", 989.4, 4800, 2, 1830, 141, "NVIDIA H200 datasheet, via github.com/astroC86/gpu-datasheet"),
    _gpu("NVIDIA H200 NVL", 835.5, 4800, 2, 1545, 141, "NVIDIA H200 datasheet (1671 sparse), from memory: ASSUMED"),
    _gpu("NVIDIA H20", 148, 4000, 2, 1980, 96, "willitrunai.com/es/gpus/h20-96gb; clock ASSUMED: the card's highest"),
    _gpu("NVIDIA GH200 480GB", 989.4, 4000, 2, 1830, 96, "NVIDIA GH200 datasheet, from memory: ASSUMED"),
    _gpu("NVIDIA GH200 144G HBM3e", 989.4, 4900, 2, 1830, 144, "NVIDIA GH200 datasheet, from memory: ASSUMED"),
    _gpu("NVIDIA A100-SXM4-80GB", 312, 2039, 1, 1410, 80, _AMPERE + "; bandwidth: the SXM column"),
    _gpu("NVIDIA A100 80GB PCIe", 312, 1935, 1, 1410, 80, _AMPERE),
    _gpu("NVIDIA A100-SXM4-40GB", 312, 1555, 1, 1410, 40, _AMPERE),
    _gpu("NVIDIA A100-PCIE-40GB", 312, 1555, 1, 1410, 40, _AMPERE),
    _gpu("NVIDIA A40", 149.7, 696, 1, 1740, 48, "NVIDIA A40 datasheet, via github.com/astroC86/gpu-datasheet"),
    _gpu("NVIDIA A30", 165, 933, 1, 1440, 24, "NVIDIA A30 datasheet, from memory: ASSUMED"),
    _gpu("NVIDIA A10", 125, 600, 1, 1695, 24, _ADA.replace("NVIDIA", "NVIDIA A10")),
    _gpu("NVIDIA L4", 121, 300, 2, 2040, 24, _ADA + "; bandwidth ASSUMED"),
    _gpu("NVIDIA L40", 181, 864, 2, 2490, 48, "NVIDIA L40 datasheet, from memory: ASSUMED"),
    _gpu("NVIDIA L40S", 362, 864, 2, 2490, 48, _ADA),
    _gpu("NVIDIA RTX A6000", 154.8, 768, 1, 1800, 48, _RTX),
    _gpu("NVIDIA RTX 6000 Ada Generation", 364.2, 960, 2, 2505, 48, _RTX),
    _gpu("NVIDIA RTX PRO 6000 Blackwell Server Edition", 480, 1597, 2, 2493, 96, _RTX_PRO),
    _gpu("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 500, 1792, 2, 2597, 96, _RTX_PRO),
    _gpu("NVIDIA GeForce RTX 3090", 71, 936, 1, 1695, 24, _RTX),
    _gpu("NVIDIA GeForce RTX 4090", 165.2, 1008, 2, 2520, 24, _RTX),
    _gpu("NVIDIA GeForce RTX 5090", 209.5, 1792, 2, 2407, 32, _RTX),
    _gpu("NVIDIA B200", 2250, 8000, 2, 1856, 180, _BLACKWELL + " (HGX, 1000 W); 148 SMs"),
    _gpu("NVIDIA GB200", 2500, 8000, 2, 2062, 186, _BLACKWELL + " (1200 W); 148 SMs ASSUMED"),
    _gpu("NVIDIA B300 SXM6 AC", 2250, 8000, 2, 1856, 270, _BLACKWELL.replace("B200", "B300") + " (HGX); 148 SMs"),
    _gpu("AMD Instinct MI300X", 1307.4, 5300, 2, 2100, 192, _CDNA),
    _gpu("AMD Instinct MI325X", 1307.4, 6000, 2, 2100, 256, _CDNA),
    _gpu("AMD Instinct MI355X", 2516.6, 8000, 2, 2400, 288, _CDNA),
)

# What people say for them: the model that is meant where nothing more is said
SHORT_NAMES = {
    "H100": "NVIDIA H100 80GB HBM3",
    "H100-PCIe": "NVIDIA H100 PCIe",
    "H100-NVL": "NVIDIA H100 NVL",
    "H800": "NVIDIA H800",
    "H200": "NVIDIA H200",
    "H200-NVL": "NVIDIA H200 NVL",
    "H20": "NVIDIA H20",
    "GH200": "NVIDIA GH200 480GB",
    "A100": "NVIDIA A100-SXM4-80GB",
    "A100-80GB": "NVIDIA A100-SXM4-80GB",
    "A100-40GB": "NVIDIA A100-SXM4-40GB",
    "A40": "NVIDIA A40",
    "A30": "NVIDIA A30",
    "A10": "NVIDIA A10",
    "L4": "NVIDIA L4",
    "L40": "NVIDIA L40",
    "L40S": "NVIDIA L40S",
    "A6000": "NVIDIA RTX A6000",
    "RTX6000-Ada": "NVIDIA RTX 6000 Ada Generation",
    "RTX-PRO-6000": "NVIDIA RTX PRO 6000 Blackwell Server Edition",
    "RTX3090": "NVIDIA GeForce RTX 3090",
    "RTX4090": "NVIDIA GeForce RTX 4090",
    "RTX5090": "NVIDIA GeForce RTX 5090",
    "B200": "NVIDIA B200",
    "GB200": "NVIDIA GB200",
    "B300": "NVIDIA B300 SXM6 AC",
    "MI300X": "AMD Instinct MI300X",
    "MI325X": "AMD Instinct MI325X",
    "MI355X": "AMD Instinct MI355X",
}


def _plain(name: str) -> str:
    """A name in the form in which old and new drivers, and people, agree."""
    return _VENDOR.sub("", " ".join(re.split(r"[\s_-]+", name.casefold())).strip())


_BY_NAME = {_plain(gpu.name): gpu for gpu in _GPUS}
_BY_NAME |= {_plain(short): _BY_NAME[_plain(name)] for short, name in SHORT_NAMES.items()}


def gpu_of(sku: str) -> Gpu | None:
    """The GPU of a product name (as NVML or amdsmi gives it) or a short name; None if unknown, or a slice of one."""
    return _BY_NAME.get(_plain(sku))
