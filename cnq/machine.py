"""The machine a process runs on: its processor, the instructions it has, and the cores and memory that may be used."""

import os
import platform
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

_CGROUP = Path("/sys/fs/cgroup")  # a container's own limits; version 2

# Instructions that llama.cpp has code for, by the names of llama_print_system_info: what Linux calls them in /proc/cpuinfo.
_X86 = {
    "AVX": "avx", "AVX2": "avx2", "FMA": "fma", "F16C": "f16c", "AVX_VNNI": "avx_vnni", "AVX512": "avx512f",
    "AVX512_VBMI": "avx512vbmi", "AVX512_VNNI": "avx512_vnni", "AVX512_BF16": "avx512_bf16", "AMX_INT8": "amx_int8",
}  # fmt: skip
# and what macOS calls them in hw.optional.arm.
_ARM = {
    "NEON": ("asimd", "AdvSIMD"), "FP16_VA": ("asimdhp", "FEAT_FP16"), "DOTPROD": ("asimddp", "FEAT_DotProd"),
    "MATMUL_INT8": ("i8mm", "FEAT_I8MM"), "SVE": ("sve", "none"), "SME": ("sme", "FEAT_SME"),
}  # fmt: skip


@dataclass(frozen=True)
class Machine:
    """cores: physical ones that this process may use. memory: bytes, of the machine or of the container around us."""

    cpu: str
    cores: int
    memory: int


def this_machine() -> Machine:
    return Machine(_cpu(), physical_cores(), _memory())


def physical_cores() -> int:
    """Physical cores that this process may use: as many threads as an answer gains from. At least 1."""
    return min(psutil.cpu_count(logical=False) or logical_cores(), logical_cores())


def logical_cores() -> int:
    """Hardware threads that this process may use, by its affinity and its container's quota. At least 1."""
    n = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else psutil.cpu_count() or 1
    with suppress(OSError, ValueError):
        quota, period = (_CGROUP / "cpu.max").read_text().split()
        n = min(n, max(1, int(quota) // int(period)))  # "max" is no number
    return n


def free_memory() -> int:
    """Bytes that can be had without swapping."""
    free = int(psutil.virtual_memory().available)
    with suppress(OSError, ValueError, StopIteration):
        lines = (_CGROUP / "memory.stat").read_text().splitlines()
        cached = next(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
        used = int((_CGROUP / "memory.current").read_text()) - cached
        free = min(free, max(0, int((_CGROUP / "memory.max").read_text()) - used))
    return free


def _memory() -> int:
    total = int(psutil.virtual_memory().total)
    with suppress(OSError, ValueError):
        total = min(total, int((_CGROUP / "memory.max").read_text()))
    return total


def instructions() -> tuple[str, ...] | None:
    """Those that this processor has, of the ones llama.cpp has code for, by llama.cpp's names; None = it cannot be told."""
    flags = _linux_flags()
    if platform.machine().lower() not in ("arm64", "aarch64"):
        return None if flags is None else tuple(name for name, linux in _X86.items() if linux in flags)
    if flags is not None:
        return tuple(name for name, (linux, _) in _ARM.items() if linux in flags)
    if sys.platform == "darwin":
        return tuple(name for name, (_, apple) in _ARM.items() if _sysctl(f"hw.optional.arm.{apple}") == "1")
    return None


def _linux_flags() -> set[str] | None:
    for line in _cpuinfo():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return set(value.split())
    return None


def _cpu() -> str:
    for line in _cpuinfo():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return (_sysctl("machdep.cpu.brand_string") if sys.platform == "darwin" else platform.processor()) or platform.machine()


def _cpuinfo() -> list[str]:
    info = Path("/proc/cpuinfo")
    return info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []


def _sysctl(name: str) -> str:
    with suppress(OSError):
        return subprocess.run(["/usr/sbin/sysctl", "-n", name], capture_output=True, text=True).stdout.strip()
    return ""
