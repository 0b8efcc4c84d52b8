"""`svd2 bench` as a user types it."""

import functools
import json

import jax
import numpy as np
import pytest

from svd2_jax import progress
from svd2_jax.bench.benchmarks import BENCHMARKS, Bench
from svd2_jax.bench.run import measure
from svd2_jax.bench.timing import Sample
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
        *SMALL, "--blocks", 2, "--repeats", 2, "--json", file, "--chart", drawn,
        *(x for part in ("text", "tick", "decode-wan", "dispatch", "first-frame") for x in ("--part", part)),
    )  # fmt: skip
    assert code == 0, err
    values = json.loads(file.read_text())
    assert [part["name"] for part in values["parts"]] == ["text", "tick", "decode-wan", "dispatch"]
    assert all(len(part["samples"]) == 2 for part in values["parts"])
    assert values["settings"]["blocks"] == 2
    assert values["ceiling"]["flops"] > 0
    assert list(values["first_frame"])[-3:] == ["load", "open", "first group"]
    tick = values["parts"][1]
    assert tick["compiled"]["aliased"] > 0  # the state is updated in place
    assert tick["work"]["flops"] > 0
    assert "random:golden, 2 blocks, 64x48, 2 steps, stream, float32" in out
    assert drawn.exists()


def test_what_a_part_compiles_is_told(bench, monkeypatch):
    def dispatch(of):
        with progress.working("compiling what it needs"):
            return Bench.dispatch(of)

    monkeypatch.setitem(BENCHMARKS, "dispatch", dispatch)
    monkeypatch.setattr(progress, "WORTH_A_LINE_S", 0)
    code, _, err = bench(*SMALL, "--blocks", 2, "--repeats", 1, "--part", "dispatch")
    assert code == 0
    *_, compiles = err.partition("measuring the ceiling")
    assert compiles.index("  compiling what it needs: ") < compiles.index("dispatch: ")


def test_a_profile_lists_the_costliest_kernels(bench, tmp_path):
    file, folder = tmp_path / "bench.json", tmp_path / "profile"
    code, out, err = bench(
        *SMALL, "--blocks", 2, "--repeats", 1, "--part", "tick", "--trace", folder, "--json", file
    )
    assert code == 0, err
    kernels = json.loads(file.read_text())["parts"][0]["kernels"]
    seconds = [kernel["seconds"] for kernel in kernels]
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[-1] > 0
    assert kernels[0]["name"] in out
    assert list(folder.glob("tick/**/*.xplane.pb"))


def test_a_file_is_no_folder_for_profiles(bench, tmp_path):
    taken = tmp_path / "taken"
    taken.write_text("")
    check_refused(bench(*SMALL, "--part", "tick", "--trace", taken), "cannot be made a folder for profiles")


def test_timed_parts_run_what_a_session_runs(engine):
    cfg = StreamConfig(height=48, width=64)
    bench = Bench.of(engine, cfg)
    part = BENCHMARKS["decode-wan"](bench)
    with engine.open(bench.spec):
        assert part.program is engine.ends(cfg).decode
    first, second = part.run(), part.run()  # the state was donated and replaced
    assert first.shape == (cfg.chunk_frames, 48, 64, 3)
    assert part.results() is second
    tick = BENCHMARKS["tick"](bench)
    jax.block_until_ready(tick.run())
    assert np.isfinite(np.asarray(tick.results())).all()
    tick.close()


def test_bad_input_is_one_line(bench, tmp_path):
    check_refused(bench(*SMALL, "--repeats", 0), "--repeats must be at least 1, got 0")
    check_refused(bench(*SMALL, "--blocks", 9), "golden has 1 to 4 blocks to take, got 9")
    check_refused(bench("--checkpoint", "random:huge"), "unknown preset 'huge'")
    check_refused(bench(*SMALL, "--chart", tmp_path / "a.jpg"), "a chart's name ends in .png")
    check_refused(bench(*SMALL, "--json", tmp_path), "is a folder")
    check_refused(bench(*SMALL, "--height", 33), "height must be a positive multiple of 16")
    assert bench(*SMALL, "--part", "nothing")[0] == 2


def test_the_reference_needs_its_environment_and_random_weights(bench, tmp_path):
    against = ["--against", "reference"]
    check_refused(bench(*SMALL, *against), "--against reference needs --reference FOLDER")
    check_refused(bench(*SMALL, "--reference", tmp_path), "--against reference needs --reference FOLDER")
    check_refused(bench(*SMALL, *against, "--reference", tmp_path), "bash scripts/reference_venv.sh")
    check_refused(
        bench("--checkpoint", "tiny", *against, "--reference", tmp_path), "--checkpoint random:PRESET"
    )


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("""read line; echo '{"error": "no torch"}'""", "the reference failed to make: no torch"),
        ("echo 'no such module' >&2; exit 1", "the reference failed to make: no such module"),
    ],
)
def test_a_worker_that_fails_is_one_line(bench, tmp_path, script, message):
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    check_refused(bench(*SMALL, "--against", "reference", "--reference", tmp_path), message)


class FakeRival:
    """Takes ten seconds and gives twice as much."""

    parts = ("decode-wan",)

    def __init__(self, bench: Bench):
        self._bench, self.prepared, self.samples = bench, [], 0

    def prepare(self, name, times):
        self.prepared.append((name, times))

    def sample(self):
        self.samples += 1
        return Sample(10.0, 10.0)

    def result(self):
        return 2 * np.ones((4, 48, 64, 3))


def test_a_rival_is_sampled_in_turn_and_its_result_compared(engine):
    bench = Bench.of(engine, StreamConfig(height=48, width=64))
    rival, rounds = FakeRival(bench), []
    found = measure(bench, "decode-wan", 2, lambda count: lambda: rounds.append(count), rival)
    assert rival.prepared == [("decode-wan", 1)]
    assert rival.samples == len(rounds) == rounds[0] == 4  # two to warm up
    assert found.against is not None
    assert found.against.seconds == (10.0, 10.0)
    assert found.against.error is not None
    assert found.ratio is not None
    assert found.ratio.least > 1
    assert measure(bench, "encode", 1, lambda _: lambda: None, rival).against is None


def test_help_has_examples(bench):
    code, out, _ = bench("--help")
    assert code == 0
    assert "svd2 bench --checkpoint random:wan-1.3b" in out
