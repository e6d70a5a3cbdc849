"""The device: which one to use, whether it is fast in bf16, and settings that make a CPU faster.

device = choose_device("auto")
with Threads() as threads:
    ...                  # a training step
    threads.adapt()
"""

import ctypes
import os
import platform
import sys
import time
import warnings
from pathlib import Path

import joblib
import psutil
import torch

from Common import UserError


def choose_device(device: str) -> str:
    """Return "cuda" or "cpu" for a value of `--device`; UserError if there is no such device."""
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise UserError("--device cuda: PyTorch finds no CUDA GPU here; use --device auto or cpu")
    if device == "auto":
        return "cuda" if available else "cpu"
    return device


def has_fast_bf16(device: str) -> bool:
    """Return whether the device computes faster in bfloat16 than in float32. True for processors
    with AMX and for AMD processors with AVX-512 BF16. On Intel processors that only have AVX-512
    BF16, float32 is faster."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    features = torch.cpu.get_capabilities()
    cpuinfo = Path("/proc/cpuinfo")
    vendor = cpuinfo.read_text() if cpuinfo.exists() else platform.processor()
    if "AuthenticAMD" in vendor and features.get("avx512_bf16", False):
        return True
    return features.get("amx_bf16", False)


def prepare() -> None:
    """Change settings that make training on a CPU faster. Call it before PyTorch starts threads."""
    # The momenta of dead units decay to denormal numbers, which make float32 slow on Intel.
    torch.set_flush_denormal(True)
    warnings.filterwarnings("ignore", message="The value of the smallest subnormal")  # numpy's
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        # glibc returns freed memory to the system and has to fetch it again page by page.
        if hasattr(libc, "mallopt"):
            libc.mallopt(-1, 256 << 20)  # M_TRIM_THRESHOLD
            libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD


class Threads:
    """Adapts PyTorch's number of threads to the number of free cores, as a context manager. Threads
    wait for each other at every layer, so if another program takes one thread's core, all threads
    nearly stop. The number never exceeds the initial one, nor the cores that a container may use,
    and the initial number is restored at the end. If the user has set `OMP_NUM_THREADS`, nothing is
    changed, because the number of threads affects the last bits of a result."""

    def __enter__(self) -> "Threads":
        self.at_first = torch.get_num_threads()
        self.most = min(self.at_first, joblib.cpu_count())  # respects affinity and containers
        self.is_fixed = "OMP_NUM_THREADS" in os.environ
        self.process = psutil.Process()
        self.last = time.perf_counter()
        self.free_cores()  # the first answer means nothing
        if not self.is_fixed:
            torch.set_num_threads(self.most)
        return self

    def __exit__(self, *_error: object) -> None:
        torch.set_num_threads(self.at_first)

    def adapt(self) -> None:
        """Use as many threads as cores are free. To be called often; acts once a second."""
        if self.is_fixed or time.perf_counter() - self.last < 1:
            return
        self.last = time.perf_counter()
        wanted = int(self.free_cores() + 0.3)  # a core that is 70 % free counts
        torch.set_num_threads(max(1, min(self.most, wanted)))

    def free_cores(self) -> float:
        """Return how many cores other programs have left free since the last call."""
        cores = psutil.cpu_count() or 1
        try:
            busy = cores * psutil.cpu_percent() / 100
            own = self.process.cpu_percent() / 100
        except (OSError, psutil.Error):  # the system does not report its load
            return cores
        return cores - (busy - own)
