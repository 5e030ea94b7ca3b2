"""What the C library does with memory that was freed."""

import ctypes
import platform

# Of glibc's malloc.h: the free memory at the heap's end, and the size of a block, from which on
# the system gets them back at once.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
NO_TRIM, LARGEST_KEPT = 2**31 - 1, 2**30


def keep_freed_memory() -> bool:
    """Keep what is freed, in this process, for what is allocated next; whether that can be asked.

    A training step frees all that its layers kept and takes as much again in the next. Left to
    itself, glibc gives most of it back to the system, which hands it out again page by page,
    zeroed. Only glibc is asked; anywhere else nothing changes.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    # The block size first: without it, the other would fix it at 128 KiB.
    return bool(
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT) and libc.mallopt(M_TRIM_THRESHOLD, NO_TRIM)
    )
