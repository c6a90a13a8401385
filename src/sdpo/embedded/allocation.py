"""How a process of ours gets its memory, and how it is told that there is none left."""

from __future__ import annotations

import ctypes
import os

# glibc's own numbers and names of two of its settings (mallopt(3)).
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
VARIABLES = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**34)}


def keep_freed_memory() -> None:
    """Let glibc hand out again what was freed, in this process and those that it starts, for tensors of any size.

    By itself it returns large pieces to the system, which must fill each page with zeros when it is asked for anew: a
    fifth of the time of a loss over a large vocabulary. The price is a tenth more memory. What is set in the
    environment already is left alone; other C libraries are, too.
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
    """Whether torch failed for want of memory: on a GPU by an exception of its own, on a CPU by a message alone."""
    import torch

    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return any(words in str(error) for words in ("can't allocate memory", "could not create a primitive"))
