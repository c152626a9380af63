"""The C library's memory allocator, told to keep what a step frees for the next step."""

from __future__ import annotations

import ctypes
import platform

# Parameters of mallopt(3), from glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Never return freed memory to the system, in this process; whether that could be arranged (glibc alone).

    On CPU every step allocates and frees the same gigabytes of activations and gradients. By default glibc gives the
    large pieces back, and the kernel clears each page again when it is next touched: a tenth of a ViT-B/32 step.
    The peak is what it was; what lies between the peaks is no longer lent to other processes.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_TRIM_THRESHOLD, -1)) and bool(mallopt(_MMAP_MAX, 0))
