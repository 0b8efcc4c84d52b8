"""One heap for all threads that keeps what it took, so that a live process stays as large as it is after a minute.

XLA on a CPU takes its scratch memory, tens of MB for a tick, from whichever thread happens to run the program, and
gives it back behind it. glibc, left alone, does two things with that. It gives threads heaps of their own ("arenas"),
eight for each core, and what one gives back no other can use: over minutes each grows to the most that ever fell to
it. And it hands the free end of a heap to the system and takes it again, tick after tick.
"""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import suppress

# malloc.h of glibc
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
# Blocks above it are mappings of their own. 32 MiB is the most that glibc allows, and what its own rule comes to after
# a block of that size was freed; the rule ends with the first setting made by hand.
_LARGEST_IN_HEAP = 32 << 20
_NEVER = (1 << 31) - 1


def share() -> None:
    """Lets threads that start from now on share the heaps that are there, in a young process one, and keep its size.

    Does nothing where the environment has settings of its own for it (`MALLOC_ARENA_MAX` and the like,
    `GLIBC_TUNABLES`), or where there are no arenas: outside Linux, or with another C library.
    """
    if sys.platform != "linux" or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    with suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_ARENA_MAX, 1)
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_IN_HEAP)
        mallopt(_M_TRIM_THRESHOLD, _NEVER)
