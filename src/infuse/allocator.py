"""How the process's memory allocator treats the activations that every step frees and asks for again."""

import ctypes
import sys
from functools import cache

# From glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD = 32 * 1024**2


@cache
def keep_freed_memory() -> None:
    """Let glibc keep freed memory, up to 2 GiB, instead of handing it back to the system.

    By default large tensors come as fresh pages each time, which costs as much as small operations on them do
    (docs/decisions.md). Does nothing where the C library is another one.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
    mallopt(_TRIM_THRESHOLD, 2**31 - 1)
