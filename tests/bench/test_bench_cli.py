"""`svd2 bench` as a user types it."""

import functools
import json

import jax
import numpy as np
import pytest

from svd2_jax.bench.parts import PARTS, Bench
from svd2_jax.config import StreamConfig

SMALL = [
    "--checkpoint",
    "random:golden",
    "--height",
    48,
    "--width",
    64,
]  # as in tests/engine, whose programs these share


@pytest.fixture
def bench(svd2):
    return functools.partial(svd2, "bench")


def check_refused(result: tuple[int, str, str], message: str) -> None:
    code, out, err = result
    assert (code, out) == (2, "")
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith("error: ")
    assert message in err.splitlines()[-1]


def test_parts_of_a_smaller_model_are_measured_and_written(bench, tmp_path):
    file, drawn = tmp_path / "bench.json", tmp_path / "bench.png"
    code, out, err = bench(
        *SMALL, "--blocks", 2, "--repeats", 2, "--json", file, "--picture", drawn,
        *(x for part in ("text", "tick", "decode-wan", "dispatch", "first-frame") for x in ("--part", part)),
    )  # fmt: skip
    assert code == 0, err
    values = json.loads(file.read_text())
    assert [part["name"] for part in values["parts"]] == ["text", "tick", "decode-wan", "dispatch"]
    assert all(len(part["samples"]) == 2 for part in values["parts"])
    assert values["settings"]["blocks"] == 2
    assert values["ceiling"]["flops"] > 0
    assert list(values["first_frame"])[-4:] == ["weights", "compile", "prompt", "first group"]
    tick = values["parts"][1]
    assert tick["compiled"]["aliased"] > 0  # the state is updated in place
    assert tick["work"]["flops"] > 0
    assert "golden, 2 blocks, 64x48, 2 steps, stream, float32" in out
    assert drawn.exists()


def test_timed_parts_run_what_a_session_runs(engine):
    cfg = StreamConfig(height=48, width=64)
    bench = Bench.of(engine, cfg)
    part = PARTS["decode-wan"](bench)
    with engine.open(bench.spec):
        assert part.program is engine.ends(cfg).decode
    first, second = part.run(), part.run()  # the state was donated and replaced
    assert first.shape == (cfg.chunk_frames, 48, 64, 3)
    assert part.results() is second
    tick = PARTS["tick"](bench)
    jax.block_until_ready(tick.run())
    assert all(np.isfinite(np.asarray(x)).all() for x in tick.results())
    tick.close()


def test_bad_input_is_one_line(bench, tmp_path):
    check_refused(bench(*SMALL, "--repeats", 0), "--repeats must be at least 1, got 0")
    check_refused(bench(*SMALL, "--blocks", 9), "golden has 1 to 4 blocks to take, got 9")
    check_refused(bench("--checkpoint", "random:huge"), "unknown preset 'huge'")
    check_refused(bench(*SMALL, "--picture", tmp_path / "a.jpg"), "a picture's name ends in .png")
    check_refused(bench(*SMALL, "--json", tmp_path), "is a folder")
    check_refused(bench(*SMALL, "--height", 33), "height must be a positive multiple of 16")
    assert bench(*SMALL, "--part", "nothing")[0] == 2


def test_help_has_examples(bench):
    code, out, _ = bench("--help")
    assert code == 0
    assert "svd2 bench --checkpoint random:wan-1.3b" in out
