"""Compiled programs kept on disk."""

import os
import subprocess
import sys

import pytest

COMPILE = """
import jax, jax.numpy as jnp
from svd2_jax.engine.kept_programs import keep_programs
compiled = []
jax.monitoring.register_event_listener(lambda name, **_: compiled.append(name))
print(keep_programs())
jax.block_until_ready(jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((4, 4))))
print(compiled.count("/jax/compilation_cache/cache_hits"), compiled.count("/jax/compilation_cache/cache_misses"))
"""


def run(**variables: str) -> tuple[str, int, int]:
    """Returns (folder, programs found there, programs not found) of a new process."""
    kept = {k: v for k, v in os.environ.items() if k not in ("SVD2_CACHE", "XDG_CACHE_HOME")}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env={**kept, **variables}, capture_output=True, text=True, check=True
    )
    folder, counts = done.stdout.split("\n", 1)
    hits, misses = counts.split()
    return folder, int(hits), int(misses)


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A folder that a process has kept its programs in."""
    folder = tmp_path_factory.mktemp("caches") / "new" / "programs"
    _, hits, misses = run(SVD2_CACHE=str(folder))
    assert hits == 0
    assert misses > 0
    return folder


def test_next_process_compiles_nothing(filled):
    folder, hits, misses = run(SVD2_CACHE=str(filled))
    assert folder == str(filled)
    assert hits > 0
    assert misses == 0


def test_stands_among_the_users_caches(tmp_path):
    folder, _, _ = run(XDG_CACHE_HOME=str(tmp_path))
    assert folder == str(tmp_path / "svd2-jax")


def test_leaves_what_jax_was_told(tmp_path, filled):
    folder, _, _ = run(SVD2_CACHE=str(filled), JAX_COMPILATION_CACHE_DIR=str(tmp_path))
    assert folder == "None"


def test_folder_that_cannot_be_made_is_done_without(tmp_path):
    (tmp_path / "file").write_text("")
    folder, hits, misses = run(SVD2_CACHE=str(tmp_path / "file" / "programs"))
    assert (folder, hits, misses) == ("None", 0, 0)
