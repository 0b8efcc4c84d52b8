import jax
import jax.numpy as jnp
import numpy as np
import pytest

from svd2_jax.nn.resample import UpsampledConv, unfold_frames, upsampled_conv


def test_frames_are_unfolded_from_the_channels_in_order():
    x = jnp.arange(8.0).reshape(1, 2, 1, 1, 4)
    assert unfold_frames(x, 2).reshape(4, 2).tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]


def doubled_then_convolved(x_BTHWC: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Returns what `upsampled_conv` is to give, pixel by pixel."""
    doubled = np.pad(x_BTHWC.repeat(2, axis=2).repeat(2, axis=3), ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)))
    height, width = doubled.shape[2] - 2, doubled.shape[3] - 2
    return sum(
        doubled[:, :, i : i + height, j : j + width] @ kernel[i, j] for i in range(3) for j in range(3)
    )


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 3), (5, 4)])
def test_it_equals_the_convolution_of_doubled_pixels(height, width):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3, height, width, 5), np.float32)
    kernel = rng.standard_normal((3, 3, 5, 4), np.float32)
    y = jax.jit(upsampled_conv)(x, kernel)
    assert y.shape == (2, 3, 2 * height, 2 * width, 4)
    np.testing.assert_allclose(y, doubled_then_convolved(x, kernel), atol=2e-5)


def test_it_is_as_exact_in_bfloat16_as_the_convolution_of_doubled_pixels():
    rng = np.random.default_rng(1)
    x, kernel = (
        jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in ((1, 2, 8, 8, 64), (3, 3, 64, 16))
    )
    exact = doubled_then_convolved(*(np.asarray(a, np.float32) for a in (x, kernel)))
    doubled = x[0].repeat(2, axis=1).repeat(2, axis=2)
    plain = jax.lax.conv_general_dilated(
        doubled, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    error, plain_error = (
        np.sqrt(np.mean((np.asarray(y, np.float32) - exact) ** 2)) for y in (upsampled_conv(x, kernel), plain)
    )
    assert upsampled_conv(x, kernel).dtype == jnp.bfloat16
    assert error < 1.5 * plain_error


def test_a_bias_is_added_where_there_is_one():
    x = jnp.ones((1, 1, 2, 2, 3))
    with_bias, without = UpsampledConv(2), UpsampledConv(2, use_bias=False)
    params = with_bias.init(jax.random.key(0), x)["params"]
    assert without.init(jax.random.key(0), x)["params"].keys() == {"kernel"}
    y = with_bias.apply({"params": {**params, "bias": jnp.asarray([1.0, 2.0])}}, x)
    plain = without.apply({"params": {"kernel": params["kernel"]}}, x)
    np.testing.assert_allclose(y, plain + jnp.asarray([1.0, 2.0]).reshape(1, 1, 1, 1, 2), rtol=1e-6)
