"""Memory of processes whose tensors are large; only glibc is spoken to."""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of mallopt
MAX_INT = 2**31 - 1


def keep_freed() -> None:
    """Let this process keep the memory that it frees, for what it allocates next, until `give_back`.

    glibc gives large blocks back, and the system clears every page of the next ones: a tenth to a fifth of
    what a detector's maps of 80 MB cost, up to a tenth of training. For processes that do nothing else.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, MAX_INT)


def give_back() -> None:
    """Give the system what is free now: maps of many sizes leave gaps, which would add up."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
