"""Scenes: the same for a seed, moving, endless, and split by photograph."""

import numpy as np
import pytest

from svd2_jax.errors import ConfigError
from tiny_model import scenes


def test_a_seed_gives_the_same_frames():
    first, again = (scenes.clip(scenes.make_scene(7), 3, 32, 48) for _ in range(2))
    assert first.shape == (3, 32, 48, 3)
    assert first.dtype == np.uint8
    np.testing.assert_array_equal(first, again)


def test_seeds_and_splits_give_different_scenes():
    made = [
        scenes.make_scene(seed, split).frame(0, 32, 48) for seed in (1, 2) for split in ("train", "held_out")
    ]
    for i, one in enumerate(made):
        assert all(np.abs(one.astype(int) - other).mean() > 5 for other in made[:i])


def test_pictures_move_a_little_from_frame_to_frame_and_much_in_the_long_run():
    moved = []
    for seed in range(8):
        first, second, late = (scenes.make_scene(seed).frame(t, 48, 80).astype(int) for t in (0, 1, 400))
        assert np.abs(second - first).mean() < 25
        moved.append(np.abs(late - first).mean())
    assert np.median(moved) > 10


def test_a_late_frame_needs_no_earlier_one():
    scene = scenes.make_scene(3)
    frames = scenes.clip(scene, 6, 32, 48)
    np.testing.assert_array_equal(frames[5], scene.frame(5, 32, 48))
    assert scene.frame(100_000, 32, 48).shape == (32, 48, 3)


def test_the_splits_share_no_photograph():
    assert not set(scenes.PHOTOGRAPHS["train"]) & set(scenes.PHOTOGRAPHS["held_out"])


@pytest.mark.parametrize("name", [name for names in scenes.PHOTOGRAPHS.values() for name in names])
def test_every_photograph_is_there(name):
    picture = scenes.photograph(name)
    assert picture.ndim == 3
    assert picture.shape[2] == 3
    assert picture.dtype == np.uint8


def test_an_unknown_split_is_refused():
    with pytest.raises(ConfigError, match="train, held_out"):
        scenes.make_scene(0, "validation")  # pyright: ignore[reportArgumentType]
