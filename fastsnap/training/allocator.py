"""The C allocator, told to keep the memory that a step frees for the next step."""

import ctypes
import platform

# glibc's malloc.h. By default it gives large blocks back to the system when they are freed, so that every step maps
# its activations again, and the system has to clear the pages.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_KEPT = 32 * 2**20  # bytes of a block, the most that glibc allows
KEPT_IN_ALL = 2**30  # bytes free at the top of the heap before any are given back


def keep_freed_memory() -> bool:
    """Keep freed memory in this process; returns whether the C library can. For a process of its own that trains
    or evaluates, once.

    The peak does not grow, memory is just not given back in between.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT) and mallopt(M_TRIM_THRESHOLD, KEPT_IN_ALL))
