"""Measures the peak memory of a piece of work, in MB (10⁶ bytes); lets a command keep freed memory, which makes it faster."""

import contextlib
import ctypes
import resource
import sys
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed() -> None:
    """Let this process keep the memory that it frees. Does nothing without glibc.

    By default glibc gives the memory of large tensors back to the system, which then has to clear it for the next ones. Only
    commands call this, not the library, because it changes the whole process.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def reset(device: torch.device) -> bool:
    """Start to measure the peak. Returns False if the system cannot forget an earlier peak; only Linux and CUDA can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc: give back free memory, else using it again would not count
    try:
        CLEAR.write_text("5")
        return True
    except OSError:
        return False


def peak(device: torch.device) -> float:
    """The most memory that the GPU, or this process with all its libraries on a CPU, has held since `reset`."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 1e6, 1)
    try:
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return round(int(line.split()[1]) * 1024 / 1e6, 1)
    except (OSError, StopIteration):
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kilobytes on Linux, bytes on macOS
        return round(most / 1e6 if sys.platform == "darwin" else most * 1024 / 1e6, 1)


def held(peak_mb: float, device: str) -> str:
    """The result of `peak` in words."""
    where = "of PyTorch on the GPU" if device.startswith("cuda") else "of the whole process"
    return f"peak memory {where} {peak_mb:,.0f} MB"
