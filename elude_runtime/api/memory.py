"""Memory that a process keeps between batches."""

from __future__ import annotations

import ctypes
import logging
import sys

logger = logging.getLogger(__name__)
_LARGEST_EVERYWHERE = 32 << 20  # HEAP_MAX_SIZE / 2 on 64 bits
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # <malloc.h>


def keep_freed(bound: int) -> bool:
    """Makes glibc keep up to `bound` freed bytes at the end of this process's heap instead of returning them to the
    system; a block as large as that is returned in any case. 0 leaves all as it is. Gives whether it was done: other C
    libraries and allocators have no such setting.

    A forward pass frees what it allocated, and each time the system takes pages back it zeroes them for the next pass:
    on a CPU up to a third of the time of a batch, more or less of it as the process happened to begin (README,
    "What serving costs").
    """
    if not bound or not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # Blocks from the one threshold on are always returned, and free memory at the heap's end beyond the other. Some
    # versions take no larger block than 32 MiB.
    blocks = next((size for size in (bound, min(bound, _LARGEST_EVERYWHERE)) if mallopt(_M_MMAP_THRESHOLD, size)), 0)
    kept = bool(mallopt(_M_TRIM_THRESHOLD, bound) and blocks)
    if kept:
        logger.info("This process keeps up to %d MiB that it freed, of blocks below %d MiB.", bound >> 20, blocks >> 20)
    else:
        logger.warning("The C library does not keep freed memory (mallopt); batches take longer.")
    return kept
