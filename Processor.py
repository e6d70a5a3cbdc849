"""The device: which one to use, whether it is fast in bf16, and settings that make a CPU faster.

device = choose_device("auto")
with thread_adapter() as adapt_threads:
    ...                                 # a training step
    adapt_threads()
"""

import contextlib
import ctypes
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterator
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


@contextlib.contextmanager
def thread_adapter() -> Iterator[Callable[[], None]]:
    """Yield a function that sets PyTorch's number of threads to the number of free cores, at most
    once a second. Threads wait for each other at every layer, so if another program takes one
    thread's core, all threads nearly stop. The number never exceeds the initial one, nor the cores
    that a container may use, and the initial number is restored at the end. If the user has set
    `OMP_NUM_THREADS`, nothing is changed, because the number of threads affects the last bits of a
    result."""
    at_first = torch.get_num_threads()
    most = min(at_first, joblib.cpu_count())  # respects CPU affinity and container limits
    cores = psutil.cpu_count() or 1
    process = psutil.Process()
    last = 0.0

    def adapt() -> None:
        nonlocal last
        if time.perf_counter() - last < 1:
            return
        first, last = last == 0, time.perf_counter()
        with contextlib.suppress(OSError, psutil.Error):  # the system does not report its load
            # Both percentages are averages since the previous call; the first ones mean nothing.
            others = cores * psutil.cpu_percent() / 100 - process.cpu_percent() / 100
            free = most if first else int(cores - others + 0.3)  # a core that is 70 % free counts
            torch.set_num_threads(max(1, min(most, free)))

    try:
        yield (lambda: None) if "OMP_NUM_THREADS" in os.environ else adapt
    finally:
        torch.set_num_threads(at_first)
