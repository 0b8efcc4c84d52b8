"""The commands as a user types them: what they write, and what they say when something is wrong."""

import contextlib
import errno
import functools
import json
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

from svd2_jax import cli
from svd2_jax.cli import device
from svd2_jax.command import EXIT_FAILED, exit_code
from svd2_jax.media import VideoReader, VideoWriter, synthetic_clip

H, W = 48, 64
SIZE = ["--height", H, "--width", W]
RANDOM = ["--checkpoint", "random:tiny"]
CODEC = 2.0  # levels: more than the codec changes in the middle one of the frames compared
CONFIGS = Path(__file__).parents[1] / "configs"


def save_clip(path: Path, frames: int, height: int = H, width: int = W) -> Path:
    with VideoWriter(path, 16, height, width) as writer:
        writer.write(np.stack(list(synthetic_clip(frames, height, width))))
    return path


def load_clip(path: Path) -> np.ndarray:
    with VideoReader(path) as reader:
        return np.stack(list(reader))


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """Mean absolute difference, in levels, of the frame in the middle.

    H.264 may code a single frame of the same pictures in another way from run to run; the session's own frames
    are compared bit for bit in tests/engine/test_session.py.
    """
    return float(np.median(np.abs(a.astype(int) - b).mean(axis=(1, 2, 3))))


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """Eleven frames: the first group, one chunk and half of another."""
    return save_clip(tmp_path_factory.mktemp("clip") / "in.mp4", 11)


@pytest.fixture
def redraw(svd2, tmp_path, clip):
    """Runs `svd2 run` of random weights on the clip; of the options given twice, the later ones win."""
    given = ["--input", clip, "--prompt", "x", "--output", tmp_path / "out.mp4", *SIZE]
    return functools.partial(svd2, "run", *RANDOM, *given)


def listing(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


@contextlib.contextmanager
def unchanged(folder: Path):
    before = listing(folder)
    yield
    assert listing(folder) == before


def check_refused(result: tuple[int, str, str], message: str) -> None:
    """Exit code 2, nothing on standard output, and one line that starts with `error:` at the end."""
    code, out, err = result
    lines = err.replace("\r", "\n").splitlines()
    assert code == 2, err
    assert "Traceback" not in err
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    assert message in lines[-1]
    assert not out


# --- svd2 run


def test_a_video_is_re_drawn_frame_for_frame(redraw, tmp_path, golden_checkpoint):
    out = tmp_path / "out.mp4"
    code, said, _ = redraw("--checkpoint", golden_checkpoint)
    assert code == 0
    assert load_clip(out).shape == (11, H, W, 3)
    assert said.splitlines()[-1].startswith(f"{out}: 11 frames, {W}x{H} at 16 fps, made in ")
    assert [p.name for p in tmp_path.iterdir()] == ["out.mp4"]


def test_the_same_seed_gives_the_same_video_and_another_prompt_another(redraw, tmp_path, golden_checkpoint):
    def pictures(name: str, *more: object) -> np.ndarray:
        code, _, err = redraw("--checkpoint", golden_checkpoint, "--output", tmp_path / name, *more)
        assert code == 0, err
        return load_clip(tmp_path / name)

    first = pictures("a.mp4", "--prompt", "a castle")
    again = pictures("b.mp4", "--prompt", "a castle")
    changed = pictures("c.mp4", "--prompt", "a castle", "--prompt-at", "9=a pencil sketch")
    # Frame 9 lies in the third group. The codec is lossy and carries a little over from one frame to the next.
    assert difference(again, first) < CODEC
    assert difference(changed[:5], first[:5]) < CODEC
    assert difference(changed[9:], first[9:]) > 2 * CODEC


def test_a_prompt_change_behind_the_end_is_pointed_out(redraw):
    code, _, err = redraw("--prompt-at", "400=b")
    assert code == 0
    assert "note: --prompt-at 400 is past the end (last frame 10): ignored" in err


@pytest.mark.parametrize("frames", [1, 4, 8])
def test_any_number_of_frames_of_the_input_can_be_taken(redraw, tmp_path, frames):
    out = tmp_path / "out.mkv"
    code, said, _ = redraw("--frames", frames, "--output", out, "--fps", 12.5)
    assert code == 0
    assert len(load_clip(out)) == frames
    assert f": {frames} frame{'s' if frames > 1 else ''}, {W}x{H} at 12.5 fps" in said


def test_options_win_over_the_config_file(svd2, tmp_path, clip):
    config = tmp_path / "small.yaml"
    config.write_text(f"height: {H}\nwidth: {W}\nmode: sequential\ntimesteps: [700, 500, 400]\n")
    out = tmp_path / "out.mp4"
    args = ["--input", clip, "--prompt", "x", "--config", config, "--steps", 1, "--output", out]
    with jax.numpy_dtype_promotion("standard"):  # Flax's norms mix bfloat16 with float32
        code, _, err = svd2("run", *RANDOM, *args, "--decoder", "taehv", "--dtype", "bfloat16", "--verbose")
    assert code == 0, err
    assert f"opening {W}x{H}, 1 step, sequential" in err
    assert "million parameters" in err
    assert "bfloat16" in err
    assert len(load_clip(out)) == 11


def test_text_alone_makes_as_many_frames_as_asked_for(svd2, tmp_path):
    out = tmp_path / "out.mp4"
    code, said, _ = svd2(
        "run", *RANDOM, "--prompt", "a dog", "--frames", 14, "--steps", 1, "--seed", 3, "--output", out, *SIZE
    )
    assert code == 0
    assert load_clip(out).shape == (14, H, W, 3)
    assert said.startswith(f"{out}: 14 frames, {W}x{H} at 16 fps")


# --- svd2 run: bad input. Each case: arguments, and what the one line must say.

CASES = {
    "missing input": (["--input", "nowhere.mp4"], "nowhere.mp4: no such file"),
    "text file": (["--input", "text.mp4"], "text.mp4: cannot be read as a video"),
    "empty file": (["--input", "empty.mp4"], "empty.mp4: cannot be read as a video"),
    "cut at the front": (["--input", "cut_early.mp4"], "cut_early.mp4: "),
    "no frames": (["--input", "sound.wav"], "sound.wav: "),
    "folder as input": (["--input", "folder"], "folder: is a folder"),
    "empty prompt": (["--prompt", "  "], "the prompt is empty"),
    "no steps": (["--steps", 0], "steps must be 1 to 4, got 0"),
    "five steps": (["--steps", 5], "steps must be 1 to 4, got 5"),
    "odd height": (["--height", 50], "height must be a positive multiple of 16, got 50; try 48"),
    "negative width": (["--width", -16], "width must be a positive multiple of 16"),
    "unknown preset": (["--checkpoint", "random:foo"], "unknown preset 'foo'; known presets are wan-1.3b"),
    "no checkpoint": (["--checkpoint", "nowhere"], "nowhere: no such checkpoint; make one with: svd2 "),
    "unfinished": (["--checkpoint", "unfinished"], "unfinished: no manifest.json"),
    "cut item": (["--checkpoint", "cut_item"], "dit.block.001/"),
    "missing item": (["--checkpoint", "missing_item"], "items are missing: dit.block.001; convert again"),
    "other version": (["--checkpoint", "other_version"], "format version 7, but this program reads version"),
    "no taehv": (["--checkpoint", "golden", "--decoder", "taehv"], "no TAEHV decoder; use --decoder wan, or convert"),
    "no vae": (["--checkpoint", "bare"], "bare: holds no VAE; convert again with --wan FOLDER or --vae"),
    "no output folder": (["--output", "a/b.mp4"], "a/b.mp4: the folder a does not exist; create it first"),
    "output is a folder": (["--output", "folder"], "folder: is a folder, expected a file name"),
    "unknown suffix": (["--output", "o.avi"], "cannot write the format '.avi'; supported are .mp4"),
    "prompt at what": (["--prompt-at", "rain"], "--prompt-at takes FRAME=TEXT, for example 120=heavy rain"),
    "prompt at minus": (["--prompt-at=-3=rain"], "--prompt-at takes FRAME=TEXT"),
    "prompt at squared": (["--prompt-at", "²=rain"], "--prompt-at takes FRAME=TEXT"),
    "prompt at nothing": (["--prompt-at", "12= "], "--prompt-at takes FRAME=TEXT"),
    "negative blend": (["--blend", -1], "--blend must be at least 0, got -1"),
    "no noise": (["--noise-scale", 0], "noise_scale must be in (0, 1], got 0.0"),
    "too much noise": (["--noise-scale", 1.5], "noise_scale must be in (0, 1], got 1.5"),
    "noise not a number": (["--noise-scale", "nan"], "noise_scale must be in (0, 1], got nan"),
    "negative seed": (["--seed", -1], "seed must be in [0, 2**32), got -1"),
    "no frame": (["--frames", 0], "--frames must be at least 1, got 0"),
    "no rate": (["--fps", 0], "fps must be above 0"),
    "small cache": (["--cache-frames", 3, "--sink-frames", 1], "cache_frames=3 leaves nothing to overwrite"),
    "many sinks": (["--sink-frames", 6], "sink_frames must be at least 0 and below cache_frames=6"),
    "sink threshold": (["--sink-threshold", 2], "sink_threshold must be in [-1, 1]"),
    "no stage": (["--stages", 0], "stages must be at least 1, got 0"),
    "many stages": (["--stages", 9], "9 stages need 9 devices, JAX sees 8 (cpu); for virtual CPU devices set XLA_FL"),
    "few blocks": (["--stages", 6], "6 stages are more than the model's 5 blocks; use at most 5"),
    "split in words": (["--split", "all"], "--split takes blocks per stage, for example 8,12,12,8; got 'all'"),
    "split too large": (["--stages", 2, "--split", "3,3"], "has to give 2 stages all 5 blocks, at least one each"),
    "id alone": (["--process-id", 1], "--coordinator"),
    "no port": (["--coordinator", "host", "--process-id", 0, "--num-processes", 2], "HOST:PORT"),
    "no config": (["--config", "nowhere.yaml"], "nowhere.yaml: cannot be read (No such file or directory)"),
    "unknown key": (["--config", "unknown.yaml"], "unknown key 'speed'; known are height, width"),
    "broken config": (["--config", "broken.yaml"], "broken.yaml: is not YAML at line 2; expected lines of"),
    "binary config": (["--config", "binary.yaml"], "binary.yaml: is not YAML"),
    "config is a list": (["--config", "list.yaml"], "list.yaml: expected lines of `name: value`, got list"),
    "config word": (["--config", "word.yaml"], "word.yaml: height must be a whole number, got 'tall'"),
    "config number": (["--config", "number.yaml"], "timesteps must be a list, got 700"),
    "config of t2v": (["--config", CONFIGS / "t2v.yaml"], "settings for the task 't2v', expected 'v2v'"),
}  # fmt: skip


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory, clip, golden_checkpoint) -> Path:
    """A folder with everything that CASES names; its listing must not change."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "folder").mkdir()
    shutil.copy(clip, folder / "in.mp4")
    (folder / "text.mp4").write_text("no video\n" * 100)
    (folder / "empty.mp4").touch()
    (folder / "cut_early.mp4").write_bytes(clip.read_bytes()[:600])
    (folder / "sound.wav").write_bytes(
        b"RIFF\x2c\0\0\0WAVEfmt \x10\0\0\0\1\0\1\0\x40\x1f\0\0\x40\x1f\0\0\1\0\x08\0data\x08\0\0\0" + bytes(8)
    )
    (folder / "unknown.yaml").write_text("speed: 3\n")
    (folder / "broken.yaml").write_text("a: [1,\n b: {")
    (folder / "binary.yaml").write_bytes(b"\xff\xfe\x00height")
    (folder / "list.yaml").write_text("- height\n")
    (folder / "word.yaml").write_text("height: tall\n")
    (folder / "number.yaml").write_text("timesteps: 700\n")
    for name in ("golden", "unfinished", "cut_item", "missing_item", "other_version", "bare"):
        shutil.copytree(golden_checkpoint, folder / name)
    (folder / "unfinished/manifest.json").unlink()
    shutil.rmtree(folder / "missing_item/dit.block.001")
    data = max((folder / "cut_item/dit.block.001").rglob("d/*"), key=lambda file: file.stat().st_size)
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    change_manifest(folder / "other_version", format_version=7)
    change_manifest(
        folder / "bare", items=[p.name for p in sorted(golden_checkpoint.iterdir()) if p.name[:3] == "dit"]
    )
    return folder


def change_manifest(checkpoint: Path, **changes: object) -> None:
    manifest = checkpoint / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | changes))


@pytest.mark.slow
def test_a_pipeline_draws_the_same_video_and_says_what_each_device_holds(redraw, tmp_path):
    assert redraw("--output", tmp_path / "one.mp4")[0] == 0
    two = ["--output", tmp_path / "two.mp4", "--stages", 2, "--split", "3,2", "--share-vae", "-v"]
    code, out, err = redraw(*two)
    assert code == 0
    assert out.startswith(f"{tmp_path / 'two.mp4'}: 11 frames")
    assert difference(load_clip(tmp_path / "one.mp4"), load_clip(tmp_path / "two.mp4")) < CODEC
    lines = [line for line in err.splitlines() if line.startswith("  stage ")]
    assert [re.sub(r"[\d.]+ GiB", "X GiB", line) for line in lines] == [
        "  stage 0, blocks 0 to 2: X GiB of parameters on cpu 0",
        "  stage 1, blocks 3 to 4: X GiB of parameters on cpu 1",
    ]


@pytest.mark.slow
def test_a_long_video_is_drawn_on_the_split_that_is_measured_first(redraw, tmp_path, monkeypatch):
    run = ["--steps", 1, "--stages", 2, "--output"]
    said = "blocks per stage, by measured times: "
    code, _, err = redraw(*run, tmp_path / "short.mp4")
    assert (code, said in err) == (0, False)
    monkeypatch.setattr(device, "MEASURED_FRAMES", 11)
    code, _, err = redraw(*run, tmp_path / "long.mp4")
    assert code == 0
    assert re.search(rf"^{said}\d\+\d$", err, re.MULTILINE)
    assert difference(load_clip(tmp_path / "short.mp4"), load_clip(tmp_path / "long.mp4")) < CODEC


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_clear_line(svd2, bad_files, monkeypatch, case):
    args, message = CASES[case]
    monkeypatch.chdir(bad_files)
    defaults = ["--input", "in.mp4", "--prompt", "x", "--output", "out.mp4", *SIZE]  # later options win
    with unchanged(bad_files):
        check_refused(svd2("run", *RANDOM, *defaults, *args), message)


def test_more_frames_than_the_input_has_are_pointed_out(redraw):
    assert "note: the input has 11 frames, not the 12 of" in redraw("--frames", 12)[2]
    assert "note: the input" not in redraw("--frames", 11)[2]


def test_a_blend_without_a_change_of_prompt_is_pointed_out(redraw, tmp_path):
    args = ["--output", tmp_path / "o.gif", "--blend", 4]
    note = "note: --blend 4 is ignored: no --prompt-at changes the prompt\n"
    assert note in redraw(*args)[2]
    assert note not in redraw(*args, "--prompt-at", "5=b")[2]


def test_a_missing_video_is_told_before_an_unknown_style(svd2, tmp_path):
    out = ["--prompt", "x", "--output", tmp_path / "out.mp4"]
    check_refused(svd2("run", "--input", tmp_path / "none.mp4", *out), "none.mp4")


def test_text_to_video_asks_for_its_length(svd2, tmp_path):
    with unchanged(tmp_path):
        result = svd2("run", *RANDOM, "--prompt", "x", "--output", tmp_path / "o.mp4")
    check_refused(result, "text-to-video needs --frames N (or give --input to re-draw a video)")


def test_a_config_for_video_is_refused_without_a_video(svd2, tmp_path):
    config = CONFIGS / "v2v_quality.yaml"
    result = svd2(
        "run", *RANDOM, "--prompt", "x", "--frames", 9, "--config", config, "--output", tmp_path / "o.mp4"
    )
    check_refused(result, "settings for the task 'v2v', expected 't2v'; add --input VIDEO")


@pytest.mark.parametrize("args", [["--steps", "two"], ["--mode", "fast"], ["--frames", "1.5"], ["--colour"]])
def test_options_that_cannot_be_parsed_are_explained(redraw, tmp_path, args):
    with unchanged(tmp_path):
        code, _, err = redraw(*args)
    check_refused((code, "", err), f"{args[0]}")
    assert err.endswith("--help` shows the options\n")


def test_a_video_that_ends_early_leaves_nothing_and_says_what_can_be_used(redraw, tmp_path):
    whole = save_clip(tmp_path / "whole.mp4", 40)  # at this size its index lies in front
    (tmp_path / "cut.mp4").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with unchanged(tmp_path):
        result = redraw("--input", tmp_path / "cut.mp4")
    check_refused(result, "cut.mp4: cut off or damaged after ")


@pytest.mark.parametrize("name", ["a.mp4", "./a.mp4", "link.mp4"])
@pytest.mark.parametrize("command", ["run", "live"])
def test_no_output_takes_the_place_of_the_input(svd2, tmp_path, monkeypatch, command, name):
    save_clip(tmp_path / "a.mp4", 5)
    (tmp_path / "link.mp4").symlink_to("a.mp4")
    monkeypatch.chdir(tmp_path)
    with unchanged(tmp_path):
        args = ["--checkpoint", "nowhere", "--input", "a.mp4", "--prompt", "a", "--output", name]
        check_refused(svd2(command, *args), f"--output {Path(name)}: is the same file as --input a.mp4")


def test_no_report_takes_the_place_of_the_input_or_of_another_output(svd2, tmp_path):
    video = save_clip(tmp_path / "demo.mp4", 5)
    sheet = tmp_path / "x.png"
    live = ["live", "--checkpoint", "nowhere", "--input", video, "--prompt", "a"]
    settings = CONFIGS / "v2v_fast.yaml"
    with unchanged(tmp_path):
        for args, message in (
            ([*live, "--metrics", video], f"--metrics {video}: is the same file as --input {video}"),
            ([*live, "--metrics", sheet, "--chart", sheet], f"--chart {sheet}: is the same file as --metrics"),
            (["demo", "--input", video, "--out", tmp_path], f"--out {video}: is the same file as --input"),
            (["bench", "--json", sheet, "--chart", sheet], f"--chart {sheet}: is the same file as --json"),
            (["simulate", video, "--json", video], f"--json {video}: is the same file as the trace"),
            (["plan", "--config", settings, "--json", settings], "is the same file as --config"),
        ):  # fmt: skip
            check_refused(svd2(*args), message)


# --- what goes wrong on the way, with a session that needs no model


class FakeSession:
    """Gives noise, then does what it was told to do."""

    def __init__(self, chunks: int, end: BaseException | None):
        self.chunks, self.end = chunks, end

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def run(self, frames=None, count=None, prompts=None, blend_chunks=0, on_step=None):
        rng = np.random.default_rng(0)
        for _ in range(self.chunks):
            yield rng.integers(0, 256, (4, H, W, 3), np.uint8)
        if self.end is not None:
            raise self.end


class FakeEngine:
    def __init__(self, session: FakeSession):
        self.session = session

    def open(self, spec):
        return self.session


@pytest.fixture
def run_fake(redraw, monkeypatch):
    def run(chunks: int, end: BaseException | None = None, *options: str) -> tuple[int, str, str]:
        monkeypatch.setattr(device, "load_engine", lambda *_, **__: FakeEngine(FakeSession(chunks, end)))
        return redraw(*options)

    return run


def test_a_second_prompt_of_a_run_is_pointed_out(run_fake):
    code, _, err = run_fake(1, None, "--prompt", "winter")
    assert code == 0
    assert "note: a run has one prompt, and 2 were given; the last is taken: 'winter'" in err


@contextlib.contextmanager
def file_size_limit(size: int):
    """Makes writing beyond `size` fail as a full disk does; Python ignores the signal that comes with it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_one_line_and_keeps_the_old_file(run_fake, tmp_path):
    (tmp_path / "out.mp4").write_text("an older video")
    with unchanged(tmp_path):
        with file_size_limit(100_000):
            result = run_fake(chunks=60)
        check_refused(result, "out.mp4: cannot be written (")


@pytest.mark.parametrize("chunks", [0, 3])
def test_an_interrupted_run_leaves_nothing(run_fake, tmp_path, chunks):
    with unchanged(tmp_path):
        code, out, err = run_fake(chunks, KeyboardInterrupt())
    assert code == 130
    assert "interrupted; nothing was written" in err
    assert "Traceback" not in err
    assert not out


def test_a_device_out_of_memory_is_one_line_that_says_what_to_try(run_fake, tmp_path):
    failure = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 GB\nmore detail")
    with unchanged(tmp_path):
        result = run_fake(1, failure)
    check_refused(
        result, "the device failed: RESOURCE_EXHAUSTED: Out of memory allocating 9 GB; try a smaller"
    )


def test_a_stream_without_frames_leaves_nothing(run_fake, tmp_path):
    with unchanged(tmp_path):
        check_refused(run_fake(0), "the input holds no frame; nothing to re-draw")


def test_a_mistake_of_ours_is_not_hidden(run_fake, tmp_path):
    with unchanged(tmp_path), pytest.raises(ZeroDivisionError):
        run_fake(1, ZeroDivisionError())


# --- the other commands


def test_convert_makes_a_checkpoint_that_run_takes(svd2, tmp_path, golden_folder):
    out = tmp_path / "ckpt"
    weights = ["--wan", golden_folder / "wan_models/Wan2.1-T2V-tiny"]
    code, said, _ = svd2("convert", *weights, "--dtype", "float32", "--out", out, "--no-progress")
    assert code == 0
    command = said.split("; next: ")[1].replace("in.mp4", "nowhere.mp4")
    check_refused(svd2(*shlex.split(command)[1:]), "nowhere.mp4: no such file")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--generator", "nowhere.pt", "--out", "new"], "nowhere.pt: no such file or folder"),
        (["--generator", "text.mp4", "--out", "new"], "text.mp4: not a checkpoint"),
        (["--wan", "folder", "--out", "new"], "folder: not a Wan2.1 folder"),
        (["--wan", "folder", "--out", "golden"], "golden exists; choose another place"),
        (["--wan", "folder", "--out", "a/b"], "a: no such folder; create it first"),
        (["--out", "new"], "nothing to convert; give --generator, --wan or both"),
    ],
)
def test_a_conversion_that_cannot_be_done_is_one_line(svd2, bad_files, monkeypatch, args, message):
    monkeypatch.chdir(bad_files)
    with unchanged(bad_files):
        check_refused(svd2("convert", *args), message)


@pytest.mark.slow
def test_the_demo_writes_a_video_and_a_contact_sheet(svd2, tmp_path):
    out = tmp_path / "a" / "b"
    code, said, _ = svd2("demo", *RANDOM, "--out", out, "--frames", 14, *SIZE)
    assert code == 0
    clip = load_clip(out / "demo.mp4")
    assert len(clip) == 14
    assert clip[0].shape == (8 * H + 32, 2 * 8 * W, 3)  # enlarged, input beside output, over a caption
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert [line.split(": ")[0] for line in said.splitlines()] == [f"{out}/demo.mp4", f"{out}/demo.png"]


def test_the_demo_refuses_a_place_it_cannot_write_to(svd2, tmp_path):
    (tmp_path / "file").touch()
    with unchanged(tmp_path):
        check_refused(
            svd2("demo", "--out", tmp_path / "file"), f"cannot be made ({os.strerror(errno.EEXIST)})"
        )
        check_refused(svd2("demo", "--out", tmp_path / "new", "--frames", 0), "--frames must be at least 1")


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_shows_an_example(svd2, command):
    code, out, _ = svd2(command, "--help")
    assert code == 0
    assert "example" in out
    assert f"\n  svd2 {command} " in out


def test_what_help_needs_loads_no_library_that_takes_long():
    heavy = {"jax", "jaxlib", "flax", "numpy", "av", "PIL", "rich", "matplotlib", "yaml", "tqdm"}
    code = f"import sys; from svd2_jax import cli; cli.parser(); sys.exit(str({heavy} & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr
    assert loaded == "set()\n"


def test_the_program_names_its_commands_and_version(svd2):
    assert all(command in svd2("--help")[1] for command in cli.COMMANDS)
    assert svd2("--version")[1].startswith("svd2-jax 0.")
    code, _, err = svd2()
    assert code == 2
    assert "COMMAND" in err


def test_every_config_names_its_task_by_being_usable(svd2, tmp_path):
    for path in sorted(CONFIGS.glob("*.yaml")):
        task = yaml.safe_load(path.read_text()).get("task", "v2v")
        source = ["--input", tmp_path / "nowhere.mp4"] if task == "v2v" else []
        result = svd2(
            "run", *RANDOM, "--prompt", "x", *source, "--config", path, "--output", tmp_path / "o.mp4"
        )
        check_refused(result, "no such file" if task == "v2v" else "text-to-video needs --frames")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_what_cannot_be_printed_for_want_of_space_is_one_line(monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert exit_code(lambda: print("a table"), "interrupted") == EXIT_FAILED
    assert capsys.readouterr().err == (
        "error: what the command prints cannot be written (No space left on device); free some space\n"
    )
