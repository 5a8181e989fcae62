"""Memory of workers whose maps are large."""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's mallopt
MAX_INT = 2**31 - 1


def keep_freed() -> None:
    """Let this process keep the memory that it frees, for what it allocates next; only glibc is asked.

    glibc gives each block of more than 32 MiB back at once, and the system clears every page of the next
    one: that is a tenth to a fifth of what a detector's maps of 80 MB cost. The most memory that the
    process ever has stays the same.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, MAX_INT)
