"""`scripts/make_eval_clips.py`: what it writes is read back as it was made, and can be evaluated."""

import json
from pathlib import Path

import numpy as np
import pytest

import make_eval_clips
from svd2_jax.evaluate import clips
from svd2_jax.media import VideoReader
from tiny_model import phrasings, scenes
from tiny_model.styles import STYLES, apply_style


@pytest.fixture
def make(tmp_path, capsys):
    def run(name: str, *options: object) -> tuple[int, Path, str]:
        out = tmp_path / name
        code = make_eval_clips.main(
            ["--out", str(out), "--height", "32", "--width", "48", *map(str, options)]
        )
        return code, out, capsys.readouterr().err

    return run


def frames_of(path: Path) -> np.ndarray:
    with VideoReader(path) as reader:
        return np.stack(list(reader))


def test_frames_come_back_as_they_were_made(make):
    code, out, _ = make(
        "clips", "--clips", 2, "--frames", 6, "--style", "sepia", "--style", "comic", "--seed", 3
    )
    assert code == 0
    folder = clips.read_folder(out)
    assert [clip.name for clip in folder.clips] == ["scene_003", "scene_004"]
    assert [style.name for style in folder.styles] == ["sepia", "comic"]
    for clip, seed in zip(folder.clips, (3, 4), strict=True):
        made = scenes.clip(scenes.make_scene(seed, "held_out"), 6, 32, 48)
        assert np.array_equal(clips.read_clip(clip.input, 32, 48, None), made)
        for style, target in zip(folder.styles, clip.targets, strict=True):
            assert np.array_equal(frames_of(target), apply_style(style.name, made))


def test_all_styles_get_phrasings_that_were_held_out_and_unchanged_comes_last(make):
    _, out, _ = make("clips", "--clips", 1, "--frames", 2)
    prompts = json.loads((out / "prompts.json").read_text())
    assert set(prompts) == set(STYLES)
    assert list(prompts)[-1] == "unchanged"
    for style, texts in prompts.items():
        assert set(texts) <= set(phrasings.phrasings(style, "held_out"))
        assert len(texts) == len(set(texts)) > 5


def test_the_same_options_make_the_same_files(make):
    folders = [make(name, "--clips", 1, "--frames", 3, "--style", "comic")[1] for name in ("a", "b")]
    first, second = (
        {path.relative_to(out): path.read_bytes() for path in out.rglob("*.json")} for out in folders
    )
    assert first == second
    a, b = (frames_of(out / "scene_000" / "comic.mkv") for out in folders)
    assert np.array_equal(a, b)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--clips", 0), "--clips must be at least 1, got 0"),
        (("--style", "oil"), "unknown style 'oil'; known: "),
        (("--height", 20), "height and width must be multiples of 16, got 20x48"),
    ],
)
def test_bad_input_is_one_line(make, options, said):
    code, out, err = make("clips", *options)
    assert (code, err.count("\n"), out.exists()) == (2, 1, False)
    assert said in err


def test_a_folder_with_something_in_it_is_left_alone(make, tmp_path):
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "mine").write_text("")
    code, _, err = make("clips")
    assert (code, err.count("\n")) == (2, 1)
    assert "is there and not empty" in err
