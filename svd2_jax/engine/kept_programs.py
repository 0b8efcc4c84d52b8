"""Compiled programs kept on disk: a command that ran before starts without compiling."""

from __future__ import annotations

import os
from pathlib import Path

import jax

CACHE_VARIABLE = "SVD2_CACHE"
MOST_BYTES = 4 * 2**30  # beyond, what was not used for longest is removed


def keep_programs() -> Path | None:
    """Has JAX keep every program it compiles from now on, and take it from there the next time.

    Does nothing where JAX was told already (`JAX_COMPILATION_CACHE_DIR`, `JAX_ENABLE_COMPILATION_CACHE`), or where
    the folder cannot be written.

    Returns:
      The folder: the environment's `SVD2_CACHE`, else "svd2-jax" where the user's caches are; None if nothing was
      changed.
    """
    if (
        jax.config.values["jax_compilation_cache_dir"]
        or not jax.config.values["jax_enable_compilation_cache"]
    ):
        return None
    caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    folder = Path(os.environ.get(CACHE_VARIABLE) or caches / "svd2-jax")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    if not os.access(folder, os.W_OK):
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # A limit also makes JAX lock the folder, without which two processes may read what is half written.
    jax.config.update("jax_compilation_cache_max_size", MOST_BYTES)
    # Even the smallest take some 20 ms to compile, and there are hundreds of them.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    return folder
