"""What the program finds out about the processor, and sets there: nothing that changes a result
but its speed.

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
    """Return "cuda" or "cpu" for what `--device` says; UserError if it is not there."""
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
    """Set what makes a step on a CPU faster; to be called before PyTorch starts a thread."""
    # The momenta of dead units decay to denormal numbers, which make float32 slow on Intel.
    torch.set_flush_denormal(True)
    warnings.filterwarnings("ignore", message="The value of the smallest subnormal")  # numpy's
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):  # glibc would give freed memory back and fetch it page by page
            libc.mallopt(-1, 256 << 20)  # M_TRIM_THRESHOLD
            libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD


@contextlib.contextmanager
def thread_adapter() -> Iterator[Callable[[], None]]:
    """Yield a function that lets PyTorch use as many threads as cores are free, if a second has
    passed since it last did so. Threads wait for each other at every layer: where another program
    takes the core of one, all of them come nearly to a halt. The first number of threads is the
    most, less where a container may use fewer cores, and is restored at the end. The number of
    threads changes the last bits of a result, so one that the user has set (`OMP_NUM_THREADS`) is
    kept."""
    at_first = torch.get_num_threads()
    most = min(at_first, joblib.cpu_count())  # knows affinity and the quota of a container
    cores = psutil.cpu_count() or 1
    process = psutil.Process()
    last = 0.0

    def adapt() -> None:
        nonlocal last
        if time.perf_counter() - last < 1:
            return
        first, last = last == 0, time.perf_counter()
        with contextlib.suppress(OSError, psutil.Error):  # a system that does not tell
            # Both percentages are means since the call before, and meaningless at the first.
            others = cores * psutil.cpu_percent() / 100 - process.cpu_percent() / 100
            free = most if first else int(cores - others + 0.3)  # .3: a core that is nearly free
            torch.set_num_threads(max(1, min(most, free)))

    try:
        yield (lambda: None) if "OMP_NUM_THREADS" in os.environ else adapt
    finally:
        torch.set_num_threads(at_first)
