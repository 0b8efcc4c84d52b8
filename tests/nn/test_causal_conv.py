import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from svd2_jax.nn.causal_conv import causal_conv3d

SHAPES = [  # (kernel size, time stride, frames)
    ((3, 3, 3), 1, 4),
    ((3, 3, 3), 1, 1),
    ((3, 1, 1), 1, 2),
    ((3, 1, 1), 2, 4),
    ((1, 3, 3), 1, 2),
]


def make(kernel_size, time_stride, frames, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2, frames, 5, 6, 3), np.float32)
    kernel = rng.standard_normal((*kernel_size, 3, 4), np.float32)
    bias = rng.standard_normal(4, np.float32)
    tail = rng.standard_normal((2, kernel_size[0] - time_stride, 5, 6, 3), np.float32)
    return tuple(jnp.asarray(a) for a in (x, kernel, bias, tail))


@pytest.mark.parametrize("is_start", [False, True])
@pytest.mark.parametrize("formulation", ["taps", "stacked"])
@pytest.mark.parametrize(("kernel_size", "time_stride", "frames"), SHAPES)
def test_every_formulation_equals_the_3d_convolution(kernel_size, time_stride, frames, formulation, is_start):
    x, kernel, bias, tail = make(kernel_size, time_stride, frames)
    tail = None if is_start else tail
    convolve = functools.partial(causal_conv3d, x, kernel, bias, tail, time_stride=time_stride)
    y, tail = convolve(formulation=formulation)
    full, tail_full = convolve(formulation="conv3d")
    np.testing.assert_allclose(y, full, atol=2e-5)  # other order of a sum of 81 products
    np.testing.assert_array_equal(tail, tail_full)
    assert y.shape == (2, frames // time_stride, 5, 6, 4)


def test_a_picture_at_the_start_of_a_stream_costs_one_2d_convolution():
    x, kernel, bias, _ = make((3, 3, 3), 1, 1)
    text = jax.jit(functools.partial(causal_conv3d, formulation="taps")).lower(x, kernel, bias).as_text()
    assert text.count("stablehlo.convolution") == 1


@pytest.mark.parametrize(("kernel_size", "time_stride"), [((3, 3, 3), 1), ((3, 1, 1), 2)])
def test_a_stream_cut_into_pieces_equals_the_whole_one(kernel_size, time_stride):
    x, kernel, bias, _ = make(kernel_size, time_stride, 8)
    whole, tail_whole = causal_conv3d(x, kernel, bias, time_stride=time_stride)
    tail, pieces = None, []
    for piece in (x[:, :2], x[:, 2:6], x[:, 6:]):
        y, tail = causal_conv3d(piece, kernel, bias, tail, time_stride=time_stride)
        pieces.append(y)
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), whole, atol=2e-5)
    np.testing.assert_array_equal(tail, tail_whole)


def test_frames_one_by_one_equal_the_whole_stream():
    x, kernel, bias, _ = make((3, 3, 3), 1, 5)
    whole, _ = causal_conv3d(x, kernel, bias)
    tail = jnp.zeros((2, 2, 5, 6, 3), jnp.float32)
    for t in range(5):
        y, tail = causal_conv3d(x[:, t : t + 1], kernel, bias, tail)
        np.testing.assert_allclose(y[:, 0], whole[:, t], atol=2e-5)


def test_no_frame_depends_on_a_later_one():
    x, kernel, bias, tail = make((3, 3, 3), 1, 4)
    y, _ = causal_conv3d(x, kernel, bias, tail)
    changed, _ = causal_conv3d(x.at[:, 2:].set(9.0), kernel, bias, tail)
    np.testing.assert_array_equal(y[:, :2], changed[:, :2])
    assert not np.array_equal(y[:, 2], changed[:, 2])


def test_the_oldest_tap_of_a_three_frame_kernel_sees_two_frames_back():
    x = jnp.arange(1.0, 5.0).reshape(1, 4, 1, 1, 1)
    kernel = jnp.asarray([1.0, 0.0, 0.0]).reshape(3, 1, 1, 1, 1)
    y, tail = causal_conv3d(x, kernel, jnp.zeros(1))
    assert y.ravel().tolist() == [0.0, 0.0, 1.0, 2.0]
    assert tail.ravel().tolist() == [3.0, 4.0]


def test_a_stride_of_two_halves_the_frames_and_remembers_one():
    x = jnp.arange(1.0, 5.0).reshape(1, 4, 1, 1, 1)
    kernel = jnp.asarray([100.0, 10.0, 1.0]).reshape(3, 1, 1, 1, 1)
    y, tail = causal_conv3d(x, kernel, jnp.zeros(1), jnp.zeros((1, 1, 1, 1, 1)), time_stride=2)
    assert y.ravel().tolist() == [12.0, 234.0]
    assert tail.ravel().tolist() == [4.0]


def test_no_frames_give_no_frames_and_the_same_tail():
    x, kernel, bias, tail = make((3, 3, 3), 1, 0)
    y, new_tail = causal_conv3d(x, kernel, bias, tail)
    assert y.shape == (2, 0, 5, 6, 4)
    np.testing.assert_array_equal(new_tail, tail)


def test_an_odd_number_of_frames_cannot_be_halved():
    x, kernel, bias, tail = make((3, 1, 1), 2, 3)
    with pytest.raises(ValueError, match="multiple of"):
        causal_conv3d(x, kernel, bias, tail, time_stride=2)


def test_a_donated_tail_gives_the_same_frames():
    x, kernel, bias, _ = make((3, 3, 3), 1, 6)
    step = jax.jit(causal_conv3d, donate_argnums=3)
    kept = donated = jnp.zeros((2, 2, 5, 6, 3), jnp.float32)
    donated = donated + 0.0
    for t in range(6):
        y_kept, kept = causal_conv3d(x[:, t : t + 1], kernel, bias, kept)
        y_donated, donated = step(x[:, t : t + 1], kernel, bias, donated)
        np.testing.assert_allclose(y_kept, y_donated, atol=2e-5)
    np.testing.assert_array_equal(kept, donated)
