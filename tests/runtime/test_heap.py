"""How many heaps the C library has for threads, in processes of their own."""

import os
import platform
import subprocess
import sys

import pytest

THREADS = """
import ctypes, re, sys, threading
from svd2_jax.runtime import heap

if "share" in sys.argv:
    heap.share()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
together = threading.Barrier(9)

def allocate():
    libc.malloc(10_000)
    together.wait()

for _ in range(8):
    threading.Thread(target=allocate).start()
together.wait()
libc.fopen.restype = ctypes.c_void_p
libc.malloc_info.argtypes = [ctypes.c_int, ctypes.c_void_p]
libc.fflush.argtypes = [ctypes.c_void_p]
out = ctypes.c_void_p(libc.fopen(b"/dev/stdout", b"w"))
libc.malloc_info(0, out)
libc.fflush(out)
"""


def heaps(*args: str, **environment: str) -> int:
    """Returns how many heaps a process has in which eight threads took memory."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    run = subprocess.run(
        [sys.executable, "-c", THREADS, *args], env={**clean, **environment}, capture_output=True, check=True
    )
    return run.stdout.count(b"<heap nr=")


def test_threads_share_one_heap_once_they_are_told_to():
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("only glibc has several heaps")
    assert heaps() > 2
    assert heaps("share") == 1
    assert heaps("share", MALLOC_ARENA_MAX="3") == 3  # whoever sets this knows better
    assert heaps("share", GLIBC_TUNABLES="glibc.malloc.arena_max=3") == 3
