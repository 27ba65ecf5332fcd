"""What is read of this host itself, as rows for docs/metrics.md: its collectors work without a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvtally.collectors.family import Family

if TYPE_CHECKING:
    from collections.abc import Mapping

_SAMPLED = "held until the next sample, 30 s at most"
_COPIES = "copies count as busy: loading KV from the host shows 100 %"
_GPM = "Hopper and later; a mean since the last reading, of its own time and not of the interval"
_LINK = "bytes on the link, protocol included: 7 % more than what was copied"
_OF_DEVICE = "page-cache hits are not among them; all programs are"
_DISK = "diskstats: field"
_NFS_DIRECT = "a read at the end of a file counts whole with O_DIRECT"
_NFS_TIME = "from the call to the last byte: the wait for a slot is in it"
_LUSTRE = "a line that is missing has counted nothing yet; whoever writes to a stats file clears it"
_POOL = "the pagepool's are among them, so that no device bytes are known; since the mount or an mmpmon reset"
_GDS = "whole MiB, the rest cut off; compatibility mode is not here"
_CEPH = "unverified: known from the kernel's source"


def _nvml(quantity: str, name: str, unit: str = "percent", scale: float = 0.01, trap: str = _SAMPLED) -> Family:
    return Family(quantity, name, unit=unit, scale=scale, trap=trap)


def _file(
    quantity: str, name: str, unit: str = "bytes", scale: float = 1.0, *, trap: str = "", since: str = ""
) -> Family:
    return Family(quantity, name, unit=unit, scale=scale, trap=trap, since=since)


HOST_FIELDS: Mapping[str, tuple[Family, ...]] = {
    "NVIDIA GPUs (NVML and GPM)": (
        _nvml("energy_mj", "nvmlDeviceGetTotalEnergyConsumption", "mJ", 1, "Volta and later; read every 10 s"),
        _nvml("observed_ns", "(the time between two samples)", "seconds", 1),
        _nvml("busy_ns", "nvmlDeviceGetUtilizationRates: gpu", trap=f"{_COPIES}; {_SAMPLED}; not of a GPU with MIG"),
        _nvml("memory_busy_ns", "nvmlDeviceGetUtilizationRates: memory", trap="time in use, not bandwidth"),
        _nvml("power_sampled_mj", "nvmlDeviceGetPowerUsage", "mW", 1),
        _nvml("gpm_ns", "(the time between two GPM samples)", "seconds", 1, _GPM),
        _nvml("graphics_ns", "GPM GRAPHICS_UTIL", trap=f"one thread that spins counts as 100 %; {_GPM}"),
        _nvml("sm_ns", "GPM SM_UTIL", trap=_GPM),
        _nvml("tensor_ns", "GPM ANY_TENSOR_UTIL", trap=_GPM),
        _nvml("dram_ns", "GPM DRAM_BW_UTIL", trap=_GPM),
        _nvml("pcie_received_bytes", "GPM PCIE_RX_PER_SEC", "MiB/s", 2**20, _LINK),
        _nvml("pcie_sent_bytes", "GPM PCIE_TX_PER_SEC", "MiB/s", 2**20, _LINK),
        _nvml("memory_used_bytes", "nvmlDeviceGetMemoryInfo: used", "bytes", 1, ""),
        _nvml("power_mw", "nvmlDeviceGetPowerUsage", "mW", 1, ""),
        _nvml("sm_clock_mhz", "nvmlDeviceGetClockInfo: SM", "MHz", 1, "noise where the GPU rests at the end"),
        _nvml("clock_reasons", "nvmlDeviceGetCurrentClocksEventReasons", "bit mask", 1, ""),
        _nvml("busy_cycles", "SM clock times utilization.gpu", "MHz x percent"),
    ),
    "An engine's processes (/proc)": (
        _file(
            "cpu_ns",
            "stat: utime and stime",
            "clock ticks",
            trap="what a process did after the last scrape before its end is lost",
        ),
        _file("read_call_bytes", "io: rchar", trap="page-cache hits included; mmap not"),
        _file("write_call_bytes", "io: wchar"),
        _file("read_bytes", "io: read_bytes", trap="page-cache hits are not among them; mmap is"),
        _file("write_bytes", "io: write_bytes", trap="at the time of the write, not of the flush"),
        _file(
            "worker_cpu_ns",
            "stat: utime and stime by comm",
            "clock ticks",
            trap="of `Worker`s and SGLang's `scheduler`s, else of `EngineCore`s; before vLLM 0.10.1 no title tells",
        ),
        _file("processes", "(processes of the tree)", "processes"),
        _file("resident_bytes", "stat: rss", "pages", trap="shared pages count in each process"),
    ),
    "Disks (/proc/diskstats), and a mount by its block devices": (
        _file("reads", f"{_DISK} 1, reads completed", "operations"),
        _file("read_bytes", f"{_DISK} 3, sectors read", "sectors", 512, trap=_OF_DEVICE),
        _file("read_ns", f"{_DISK} 4, time reading", "milliseconds", 1e-3, trap="summed over what ran side by side"),
        _file("writes", f"{_DISK} 5, writes completed", "operations"),
        _file("write_bytes", f"{_DISK} 7, sectors written", "sectors", 512),
        _file("write_ns", f"{_DISK} 8, time writing", "milliseconds", 1e-3, trap="summed over what ran side by side"),
    ),
    "The cgroup of an engine (version 2, io.stat)": (
        _file("read_bytes", "rbytes", trap="page-cache hits are not among them; network filesystems are not seen"),
        _file("reads", "rios", "operations"),
        _file("write_bytes", "wbytes"),
        _file("writes", "wios", "operations"),
    ),
    "NFS (/proc/self/mountstats)": (
        _file("app_read_bytes", "bytes: normalread + directread", trap=f"mmap is not among them; {_NFS_DIRECT}"),
        _file("app_write_bytes", "bytes: normalwrite + directwrite"),
        _file("read_bytes", "bytes: serverread", trap="mounts of one export share it"),
        _file("reads", "READ and READ_PLUS: operations", "operations"),
        _file("read_ns", "READ and READ_PLUS: execute", "milliseconds", 1e-3, trap=_NFS_TIME),
        _file("write_bytes", "bytes: serverwrite"),
        _file("writes", "WRITE: operations", "operations"),
        _file("write_ns", "WRITE: execute", "milliseconds", 1e-3, trap=_NFS_TIME),
    ),
    "Lustre (llite and osc stats)": (
        _file("app_read_bytes", "llite read_bytes: sum", trap=_LUSTRE),
        _file("app_write_bytes", "llite write_bytes: sum", trap=_LUSTRE),
        _file("read_bytes", "osc read_bytes: sum", trap="mmap is among these alone"),
        _file("reads", "osc ost_read: samples", "requests"),
        _file("read_ns", "osc ost_read: sum", "microseconds", 1e-6),
        _file("write_bytes", "osc write_bytes: sum"),
        _file("writes", "osc ost_write: samples", "requests"),
        _file("write_ns", "osc ost_write: sum", "microseconds", 1e-6),
    ),
    "IBM Storage Scale (mmpmon fs_io_s)": (
        _file("app_read_bytes", "_br_", trap=_POOL),
        _file("reads", "_rdc_", "operations", trap="calls of programs"),
        _file("app_write_bytes", "_bw_"),
        _file("writes", "_wc_", "operations", trap="calls of programs"),
    ),
    "GPUDirect Storage (/proc/driver/nvidia-fs/stats)": (
        _file("read_bytes", "Reads: readMiB", "MiB", 2**20, trap=f"{_GDS}; a block device below counts the same bytes"),
        _file("reads", "Reads: n", "operations"),
        _file("write_bytes", "Writes: writeMiB", "MiB", 2**20, trap=_GDS),
        _file("writes", "Writes: n", "operations"),
    ),
    "CephFS (kernel client, metrics/size in debugfs)": (
        _file("read_bytes", "read: total_sz", trap=_CEPH, since="Linux 5.14"),
        _file("reads", "read: total", "requests", since="Linux 5.14"),
        _file("write_bytes", "write: total_sz", since="Linux 5.14"),
        _file("writes", "write: total", "requests", since="Linux 5.14"),
    ),
}
HOST_NOT_READ: Mapping[str, str] = {
    "nvmlDeviceGetPcieThroughput": "each call blocks for 20 ms; GPM tells the same",
    "NVLink (fields 138 to 141, GPM 60 and 61)": "bytes between GPUs: nothing is paid by them",
    "energy, power and clocks of a MIG instance": "the driver tells them of the whole GPU alone",
    "what a page cache gave, by itself": "the kernel counts it for nobody; the two figures of a mount tell it",
    "pagepool hits of Storage Scale, on its clients": "mmpmon does not tell them; the bridge does",
    "BeeGFS": "`beegfs-ctl --clientstats` asks the servers, and what its columns count is unverified",
    "NFS, Lustre and CephFS servers": "what their own exporters tell is of all clients together",
}
