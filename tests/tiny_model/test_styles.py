"""Styles keep the form of a clip, treat each frame by itself and can be told apart."""

import itertools

import numpy as np
import pytest

from svd2_jax.errors import ConfigError
from svd2_jax.media import synthetic_clip
from tiny_model.styles import STYLES, apply_style

FRAMES, HEIGHT, WIDTH = 6, 96, 160


@pytest.fixture(scope="module")
def clip() -> np.ndarray:
    return np.stack(list(synthetic_clip(FRAMES, HEIGHT, WIDTH, seed=3)))


@pytest.fixture(scope="module")
def drawn(clip: np.ndarray) -> dict[str, np.ndarray]:
    return {name: apply_style(name, clip) for name in STYLES}


def test_styles_stand_in_their_order():
    expected = (
        "unchanged pencil_sketch oil_painting watercolour neon_night sunset winter thermal blueprint comic mosaic "
        "sepia infrared"
    )
    assert list(STYLES) == expected.split()


@pytest.mark.parametrize("name", STYLES)
def test_a_style_keeps_shape_and_type_and_leaves_its_input_alone(name: str, clip: np.ndarray):
    before = clip.copy()
    out = apply_style(name, clip)
    assert out.shape == clip.shape
    assert out.dtype == np.uint8
    assert not np.shares_memory(out, clip)
    np.testing.assert_array_equal(clip, before)


@pytest.mark.parametrize("name", STYLES)
@pytest.mark.parametrize("size", [(16, 16), (33, 50), (200, 120)])
def test_a_style_takes_any_size(name: str, size: tuple[int, int]):
    small = np.stack(list(synthetic_clip(1, *size)))
    assert apply_style(name, small).shape == small.shape
    assert apply_style(name, small[:0]).shape == (0, *size, 3)


@pytest.mark.parametrize("name", STYLES)
def test_a_frame_is_drawn_alike_alone_and_among_others(
    name: str, clip: np.ndarray, drawn: dict[str, np.ndarray]
):
    for t in (0, FRAMES - 1):
        np.testing.assert_array_equal(apply_style(name, clip[t : t + 1])[0], drawn[name][t])
    np.testing.assert_array_equal(apply_style(name, clip[::-1]), drawn[name][::-1])


@pytest.mark.parametrize("level", [0, 255])
@pytest.mark.parametrize("name", STYLES)
def test_a_flat_picture_stays_nearly_flat(name: str, level: int):
    # What is fixed to the screen is weak: the joints of a white mosaic, the strongest of it, are at 26 of 255.
    out = apply_style(name, np.full((1, HEIGHT, WIDTH, 3), level, np.uint8)).astype(float)
    assert np.abs(out - out.mean(axis=(1, 2), keepdims=True)).mean() < 30


def test_unchanged_changes_nothing(clip: np.ndarray, drawn: dict[str, np.ndarray]):
    np.testing.assert_array_equal(drawn["unchanged"], clip)


@pytest.mark.parametrize(("first", "second"), list(itertools.combinations(STYLES, 2)))
def test_two_styles_differ_clearly(first: str, second: str, drawn: dict[str, np.ndarray]):
    # A mean difference of 12 of 255 per value is seen at a glance; the closest pair of this clip is at about 20.
    difference = np.abs(drawn[first].astype(int) - drawn[second]).mean()
    assert difference > 12


def test_a_mosaic_tile_has_one_colour_inside_its_joints(drawn: dict[str, np.ndarray]):
    tiles = drawn["mosaic"].reshape(FRAMES, HEIGHT // 8, 8, WIDTH // 8, 8, 3)[:, :, :7, :, :7]
    assert np.ptp(tiles, axis=(2, 4)).max() == 0


def test_an_unknown_style_is_refused_with_the_known_ones(clip: np.ndarray):
    with pytest.raises(
        ConfigError, match=r"unknown style 'cubism'; known: unchanged, pencil_sketch, .*infrared"
    ):
        apply_style("cubism", clip)


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((96, 160, 3), np.uint8),
        np.zeros((1, 96, 160, 4), np.uint8),
        np.zeros((1, 96, 160, 3), np.float32),
        np.zeros((1, 15, 160, 3), np.uint8),
    ],
)
def test_what_is_no_clip_is_refused(wrong: np.ndarray):
    with pytest.raises(ConfigError, match=r"expected uint8 frames \[T, H, W, 3\]"):
        apply_style("sepia", wrong)
