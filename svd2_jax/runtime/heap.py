"""One heap for all threads, so that a process which runs for hours stays as large as it is after a minute.

glibc gives threads heaps of their own ("arenas"), eight for each core. XLA on a CPU takes its scratch memory, tens of
MB for a tick, from whichever thread happens to run the program, and what one arena gives back no other can use: over
minutes every arena grows to the most that ever fell to it, and the process with them, though what is in use does not.
"""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import suppress

_M_ARENA_MAX = -8  # malloc.h of glibc


def share() -> None:
    """Lets threads that start from now on share the heaps that are there: in a young process, one.

    Does nothing where the environment says how many there are to be (`MALLOC_ARENA_MAX`), or where there are no arenas:
    outside Linux, or with another C library.
    """
    if sys.platform != "linux" or "MALLOC_ARENA_MAX" in os.environ:
        return
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)
