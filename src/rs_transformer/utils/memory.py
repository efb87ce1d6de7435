"""What the C library does with memory that was freed."""

import ctypes

# Of malloc.h.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> bool:
    """Have glibc keep freed blocks for those that come next, where it would give each large one back to the system.

    A step of a training on a CPU asks for the same large tensors again and again, and the system clears every page of
    each: up to a sixth of the time (`benchmarks/allocator.py`). The process holds what it has taken once.

    Returns:
        Whether it does; False with another C library.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    # Before 2.35 glibc takes no more than 32 MiB. The second by itself would have it give back still more.
    taken = mallopt(MMAP_THRESHOLD, 2**30) or mallopt(MMAP_THRESHOLD, 2**25)
    return bool(taken and mallopt(TRIM_THRESHOLD, 2**31 - 1))
