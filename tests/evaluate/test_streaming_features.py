"""`benchmarks/streaming_features.py` on an engine that gives back what it takes, and what it keeps and refuses."""

import contextlib
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from svd2_jax.config import StreamConfig
from svd2_jax.errors import ConfigError

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "streaming_features.py"
FRAMES = 25
STYLES = ("sunset", "winter")


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("streaming_features", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


class Chunk:
    def __init__(self, first_frame: int, pixels: np.ndarray):
        self.first_frame, self.frame_count, self._pixels = first_frame, len(pixels), pixels

    def frames(self) -> np.ndarray:
        return self._pixels


class Session:
    """Gives each chunk as it is, darker by as much as its noise scale is above 0.7, when it has come in."""

    def __init__(self, spec):
        self._spec, self._waiting, self._taken = spec, [], 0

    def push(self, frames):
        self._waiting += list(frames)
        cfg = self._spec.stream
        if len(self._waiting) < (cfg.chunk_frames if self._taken else cfg.first_frames):
            return []
        return self.finish()

    def finish(self):
        if not self._waiting:
            return []
        pixels = np.stack(self._waiting) * (1 - max(0.0, self._spec.noise_scale - 0.7))
        self._waiting, first = [], self._taken
        self._taken += len(pixels)
        return [Chunk(first, pixels.astype(np.uint8))]

    def set_prompt(self, prompt, blend_chunks=0):
        pass

    def close(self):
        pass


class Engine:
    def open(self, spec):
        return Session(spec)

    def prepare_prompt(self, prompt):
        pass


@contextlib.contextmanager
def silent(total):
    class Bar:
        def update(self, count=1):
            pass

    yield Bar()


@pytest.fixture
def bench(script):
    options = script.Options("abc", STYLES, (2, 9), FRAMES, 0)
    return script.Bench(Engine(), StreamConfig(height=32, width=48), options, minutes=3, rate_hz=0.5)


@pytest.mark.slow
def test_settings_are_compared_on_the_same_clips(script, bench, tmp_path):
    part = script.Comparison(
        "a title",
        "a text",
        (script.Setting("dark (default)"), script.Setting("bright", noise_scale=0.7)),
        lambda bench: [*bench.clips("whole"), *bench.cuts("behind a cut")],
        timed=True,
    )
    found = part.measure(bench, tmp_path / "a.png", silent)
    assert (tmp_path / "a.png").stat().st_size > 0
    streams = found["streams"]
    assert len(streams) == 2 * (4 + 4)
    assert [s["setting"] for s in streams[:3]] == ["dark (default)", "bright", "dark (default)"]
    assert streams[8]["clip"] == "scene 2 to 9, sunset"
    assert {s["frames_behind"] for s in streams} == {0}
    # what lies behind a cut is measured like the clip of the same scene
    alone, behind = (
        next(s for s in streams if s["clip"] == c) for c in ("scene 9, sunset", "scene 2 to 9, sunset")
    )
    for key in ("psnr_db", "ssim", "warp_error", "flicker"):
        assert behind[key] == pytest.approx(alone[key])
    lines = part.table(found)
    assert sum(line.startswith("| bright | ") for line in lines) == 2
    assert all("better in" in line for line in lines if line.startswith("| bright"))
    assert not any("better in" in line for line in lines if line.startswith("| dark"))


def test_slow_clips_move_slower(bench):
    def moved(clips):
        return np.abs(np.diff(clips[0].frames.astype(float), axis=0)).mean()

    assert moved(bench.clips("slow", 0.25)) < 0.7 * moved(bench.clips("fast"))


def test_a_change_that_nobody_sees_never_happens(script, bench, tmp_path):
    part = script.ChangeOfPrompt()
    found = json.loads(json.dumps(script.plain(part.measure(bench, tmp_path / "a.png", silent))))
    assert len(found["changes"]) == 2 * 2 * len(script.BLENDS)
    rows = part.table(found)[-len(script.BLENDS) :]
    assert all("never | never" in row for row in rows)
    change = found["changes"][0]
    assert change["largest_jump"] == change["largest_without"] > 0


def test_a_long_stream_tells_what_drifts(script, bench, tmp_path):
    part = script.LongStreams()
    found = part.measure(bench, tmp_path / "a.png", silent)
    streams = found["streams"]
    assert list(streams) == ["refresh", "no refresh"]
    assert len(streams["refresh"]["minutes"]) == 3
    assert streams["refresh"] == streams["no refresh"]
    streams["refresh"]["drift"]["flicker"] = -0.123
    text = "\n".join(part.table(found))
    assert "**-12.3 %**" in text
    assert "- refresh: more than 10 % drift" in text


def test_results_of_other_weights_are_left_out(script, tmp_path):
    path = tmp_path / "a.json"
    assert script.read_results(path, "abc") == {}
    path.write_text(json.dumps({"weights": "abc", "parts": {"noise": {}}}))
    assert script.read_results(path, "abc") == {"noise": {}}
    assert script.read_results(path, "xyz") == {}
    path.write_text("[]")
    with pytest.raises(ConfigError, match="holds no results of this script"):
        script.read_results(path, "abc")


def test_a_digest_changes_with_any_file(script, tmp_path):
    (tmp_path / "a").write_text("1")
    before = script.digest(tmp_path)
    (tmp_path / "a").write_text("2")
    assert script.digest(tmp_path) != before


BAD = {
    "style": (["--style", "sepia", "--style", "pink"], "unknown style 'pink'; known: unchanged, "),
    "one style": (["--style", "sepia"], "--style: give two or more"),
    "one scene": (["--scene", "1"], "--scene: give two or more"),
    "frames": (["--frames", "24"], "--frames must be at least 25, got 24"),
    "minutes": (["--minutes", "0"], "--minutes must be at least 1 and --fps above 0, got 0"),
    "rate": (["--fps", "nan"], "--fps above 0, got 10 and nan"),
    "seed": (["--seed", "-1"], "seed must be in [0, 2**32), got -1"),
    "checkpoint": (["--checkpoint", "nowhere"], "nowhere: is no folder"),
    "out": (["--out", "nowhere/a"], "the folder nowhere does not exist; create it first"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(script, case, capsys):
    options, message = BAD[case]
    assert script.main(options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
