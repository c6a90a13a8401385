"""glibc's allocator settings, and recognition of out-of-memory errors."""

from __future__ import annotations

import ctypes
import os

# Parameter numbers and environment variables of mallopt(3).
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
VARIABLES = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**34)}


def keep_freed_memory() -> None:
    """Make glibc reuse freed memory of any size, in this process and its child processes.

    By default glibc returns large blocks to the system, which zeroes every page at the next request: a fifth of the
    time of a loss over a large vocabulary. Reuse costs a tenth more memory. Variables that the environment already
    sets, and other C libraries, are left unchanged.
    """
    if VARIABLES.keys() & os.environ.keys():
        return
    os.environ |= VARIABLES
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch ran out of memory: a GPU raises its own exception type, a CPU only a message."""
    import torch

    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return any(words in str(error) for words in ("can't allocate memory", "could not create a primitive"))
