"""`svd2 live`: what it takes, what it refuses, and one whole run on a small model."""

import json

import numpy as np
import pytest

from svd2_jax import media
from svd2_jax.cli import main
from svd2_jax.command import EXIT_BAD_INPUT

HEIGHT, WIDTH = 48, 64  # as in tests/test_cli.py, whose programs these share
SMALL = ["--height", str(HEIGHT), "--width", str(WIDTH)]


@pytest.fixture
def clip(tmp_path):
    path = tmp_path / "in.mp4"
    with media.VideoWriter(path, 8, HEIGHT, WIDTH) as writer:
        writer.write(np.stack(list(media.synthetic_clip(9, HEIGHT, WIDTH))))
    return path


def live(clip, *options):
    return main(
        ["live", "--checkpoint", "random:tiny", "--input", str(clip), "--prompt", "x", *SMALL, *options]
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--streams", "0"], "--streams must be at least 1"),
        (["--blend", "-1"], "--blend must be at least 0"),
        (["--seconds", "0"], "--seconds must be above 0"),
        (["--fps", "0"], "--fps must be above 0"),
        (["--fps", "nan"], "--fps must be above 0"),
        (["--budget", "0"], "budget_ms must be a number above 0"),
        (["--min-steps", "3"], "min_steps must be 1 to steps=2, got 3"),
        (["--config", "configs/v2v_low_latency.yaml"], "use --budget instead"),
        (["--chart", "out.jpg"], "a chart's name ends in .png"),
        (["--budget", "0.8"], "give milliseconds, for example 1500"),
        (["--config", "configs/t2v.yaml"], "settings for the task 't2v'"),
        (["--metrics", "nowhere/out.jsonl"], "the folder nowhere does not exist"),
        (["--chart", "."], "is a folder"),
        (["--output", "out.gif"], "cannot write the format '.gif'"),
        (["--stages", "99"], "99 stages need 99 devices"),
        (["--replicas", "0"], "--replicas must be at least 1"),
        (["--replicas", "5", "--stages", "2"], "need 10 devices"),
    ],
)
def test_bad_options_are_one_line_and_nothing_is_written(clip, tmp_path, capsys, options, message):
    before = sorted(tmp_path.iterdir())
    assert live(clip, *options) == EXIT_BAD_INPUT
    err = capsys.readouterr().err.splitlines()
    assert err[-1].startswith("error: ")
    assert message in err[-1]
    assert sorted(tmp_path.iterdir()) == before


def test_an_input_that_cannot_be_read_is_known_before_anything_is_compiled(tmp_path, capsys):
    assert live(tmp_path / "none.mp4") == EXIT_BAD_INPUT
    assert capsys.readouterr().err == f"error: {tmp_path / 'none.mp4'}: no such file\n"


def test_a_camera_cannot_be_looped(capsys):
    options = ["live", "--checkpoint", "random:tiny", "--camera", "lavfi:testsrc", "--loop", "--prompt", "x"]
    assert main(options) == EXIT_BAD_INPUT
    assert "a camera never ends" in capsys.readouterr().err


def test_a_file_is_re_drawn_live(clip, tmp_path, capsys):
    out, metrics = tmp_path / "out.mp4", tmp_path / "out.jsonl"
    # One step, as each number of steps is compiled; and all the time that a slow machine may need.
    options = ["--steps", "1", "--budget", "60000", "--output", str(out), "--metrics", str(metrics)]
    assert live(clip, *options) == 0
    with media.VideoReader(out) as reader:
        assert len(list(reader)) == 9
        assert reader.fps == 8
    frames = [json.loads(line) for line in metrics.read_text().splitlines() if '"frame"' in line]
    assert [(f["number"], f["fate"], f["steps"]) for f in frames] == [(n, "shown", 1) for n in range(9)]
    assert f"{out}: 9 frames at 8 fps" in capsys.readouterr().out


@pytest.mark.slow
def test_replicas_of_several_stages_run_a_stream_each(clip, tmp_path, capsys):
    options = ["--replicas", "2", "--stages", "2", "--streams", "2", "--budget", "60000", "--steps", "1"]
    assert live(clip, *options, "--output", str(tmp_path / "out.mkv")) == 0
    shown = capsys.readouterr()
    for i in range(2):
        assert f"replica {i}, blocks per stage, by measured times: " in shown.err
        with media.VideoReader(tmp_path / f"out-{i}.mkv") as reader:
            assert len(list(reader)) == 9
    assert "of 1.00 streams (at most 1)" in shown.out  # no tick is shared


def test_a_budget_that_cannot_be_met_is_refused_with_one_that_can(clip, tmp_path, capsys):
    out = tmp_path / "out.mp4"
    assert live(clip, "--steps", "1", "--budget", "300", "--output", str(out)) == EXIT_BAD_INPUT
    err = capsys.readouterr().err
    assert "a latency budget of 300 ms is too short" in err
    assert err.endswith("for example 1500\n")
    assert not out.exists()


def test_more_prompts_than_streams_are_an_error_that_says_what_to_do(clip, capsys):
    assert live(clip, "--prompt", "y") == EXIT_BAD_INPUT
    (error,) = capsys.readouterr().err.splitlines()
    assert "2 prompts for 1 stream: --streams 2 gives each stream its own prompt" in error
    assert "type the others" in error


def test_a_run_that_keeps_nothing_says_so_before_the_work_begins(clip, tmp_path, capsys):
    note = "no --output: frames are shown nowhere and not kept"
    assert live(clip, "--stages", "99") == EXIT_BAD_INPUT  # which is found behind the note
    assert note in capsys.readouterr().err
    assert live(clip, "--stages", "99", "--output", str(tmp_path / "out.mp4")) == EXIT_BAD_INPUT
    assert note not in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        "live --input {clip} --stages 99 --prompt",
        "run --input {clip} --output out.gif --prompt sepia --prompt-at",
        "demo --out {clip} --prompt",
        "eval --clips {clip} --prompt",
    ],
)
def test_a_style_that_the_shipped_model_does_not_know_is_pointed_out(clip, capsys, command):
    """Before what each of these commands is refused for."""
    words = command.format(clip=clip).split()
    unknown = "2=anime" if "--prompt-at" in words else "anime"
    assert main([*words, unknown]) == EXIT_BAD_INPUT
    note = "note: the model 'tiny' knows 12 styles, none is named in 'anime': pencil sketch, oil painting, "
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert [line[: len(note)] for line in notes] == [note]
    assert main([*words, unknown.replace("anime", "cyberpunk"), "--noise-scale", "0.3"]) == EXIT_BAD_INPUT
    assert main([*words, unknown, "--checkpoint", "random:tiny"]) == EXIT_BAD_INPUT
    assert "note: " not in capsys.readouterr().err


@pytest.mark.parametrize("checkpoint", ["tiny", "random:tiny"])
@pytest.mark.parametrize(
    "command",
    [
        "live --input {clip} --stages 99 --prompt sepia",
        "run --input {clip} --output out.gif --prompt sepia",
        "demo --out {clip}",
        "eval --clips {clip} --prompt sepia",
    ],
)
def test_a_noise_scale_that_the_shipped_model_was_not_trained_for_is_pointed_out(
    clip, capsys, command, checkpoint
):
    words = command.format(clip=clip).split()
    assert main([*words, "--checkpoint", checkpoint, "--noise-scale", "0.2"]) == EXIT_BAD_INPUT
    note = "note: the model 'tiny' was trained for a noise scale of 0.3 to 1, not for 0.2\n"
    assert (note in capsys.readouterr().err) == (checkpoint == "tiny")
