"""`svd2 eval` as a user types it: what it prints and writes, and what it says when something is wrong."""

import functools
import json

import numpy as np
import pytest
from PIL import Image

from svd2_jax.media import VideoWriter, synthetic_clip

SIZE = ("--height", 32, "--width", 32)


@pytest.fixture
def evaluate(svd2):
    return functools.partial(svd2, "eval", "--checkpoint", "random:tiny")


@pytest.fixture
def videos(tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    with VideoWriter(folder / "a.mp4", 16, 32, 32) as writer:
        writer.write(np.stack(list(synthetic_clip(13, 32, 32))))
    return folder


@pytest.mark.slow  # compiles a stream
def test_a_folder_of_videos_becomes_numbers_and_a_chart(evaluate, videos, tmp_path):
    numbers, chart = tmp_path / "eval.json", tmp_path / "eval.png"
    code, out, err = evaluate(
        "--clips", videos, *SIZE, "--prompt", "a sketch", "--prompt", "an oil painting", "--steps", 1,
        "--minutes", 3, "--fps", 0.2, "--json", numbers, "--chart", chart,
    )  # fmt: skip
    assert code == 0
    assert "evaluating" in err
    assert out.splitlines()[0].startswith("VAE alone on the clips themselves: ")
    for name in ("warp error", "flicker", "change of the prompt", "3 minutes of a: a sketch", "brightness"):
        assert name in out
    report = json.loads(numbers.read_text())
    assert [(s["clip"], s["prompt"], s["frames"]) for s in report["streams"]] == [
        ("a", "a sketch", 13),
        ("a", "an oil painting", 13),
    ]
    assert report["settings"]["stream"]["timesteps"] == [700]
    assert len(report["long"]["minutes"]) == 3
    with Image.open(chart) as image:
        assert image.format == "PNG"
        assert image.width > 1000
    assert {p.name for p in tmp_path.iterdir()} == {"videos", "eval.json", "eval.png"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "say what to re-draw to"),
        (("--prompt", "x", "--style", "sepia"), "knows no styles"),
        (("--prompt", "x", "--frames", 1), "--frames must be at least 2, got 1"),
        (("--prompt", "x", "--minutes", -1), "--minutes must be at least 0, got -1"),
        (("--prompt", "x", "--fps", 0), "--fps must be above 0, got 0"),
        (("--prompt", "x", "--noise-scale", 2), "noise_scale must be in (0, 1]"),
        (("--prompt", "x", "--chart", "a.jpg"), "a.jpg: a chart's name ends in .png"),
        (("--prompt", "x", "--json", "none/a.json"), "none does not exist"),
        (
            ("--prompt", "x", "--clip", "none"),
            "none: has no vision_model.onnx; expected CLIP exported to ONNX",
        ),
    ],
)
def test_bad_input_is_one_line(evaluate, videos, options, said):
    code, out, err = evaluate("--clips", videos, *SIZE, *options)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert said in err


def test_what_is_no_folder_of_clips_is_one_line(evaluate, videos, tmp_path):
    (tmp_path / "empty").mkdir()
    for folder, said in ((tmp_path / "none", "is no folder"), (tmp_path / "empty", "holds no clips")):
        code, _, err = evaluate("--clips", folder, "--prompt", "x", *SIZE)
        assert (code, err.count("\n")) == (2, 1)
        assert said in err
    (videos / "b.mp4").write_bytes(b"no video")
    code, _, err = evaluate("--clips", videos, "--prompt", "x", *SIZE)
    assert (code, err.count("\n")) == (2, 1)
    assert "b.mp4: cannot be read as a video" in err


def test_settings_for_text_to_video_are_refused(evaluate, videos, tmp_path):
    (tmp_path / "t2v.yaml").write_text("task: t2v\n")
    code, _, err = evaluate("--clips", videos, "--prompt", "x", "--config", tmp_path / "t2v.yaml")
    assert (code, err.count("\n")) == (2, 1)
    assert "settings for the task 't2v'" in err
