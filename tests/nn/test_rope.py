"""Rotary embedding by hand."""

import jax.numpy as jnp
import numpy as np

from svd2_jax.nn.rope import apply_rope, rope_tables, split_head_dim


def test_a_head_of_128_gives_44_channels_to_time_and_42_to_each_direction():
    assert split_head_dim(128) == (44, 42, 42)


def test_tokens_run_through_frames_rows_and_columns():
    cos, sin = rope_tables(12, jnp.array([5], jnp.int32), frames=2, height=2, width=3, max_frame=10)
    assert cos.shape == (1, 12, 6)
    time, row, col = (np.arctan2(sin[0, :, c], cos[0, :, c]) for c in (0, 2, 4))  # first frequency is 1
    np.testing.assert_allclose(np.cos(time), np.cos([5] * 6 + [6] * 6), atol=1e-6)
    np.testing.assert_allclose(row, ([0] * 3 + [1] * 3) * 2, atol=1e-6)
    np.testing.assert_allclose(col, [0, 1, 2] * 4, atol=1e-6)


def test_scores_depend_on_the_distance_in_time_only():
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.standard_normal((1, 1, 1, 12), np.float32)) for _ in range(2))

    def score(at_q, at_k):
        def rotated(x, at):
            return apply_rope(x, *rope_tables(12, jnp.array([at], jnp.int32), 1, 1, 1, max_frame=60))

        return float((rotated(q, at_q) * rotated(k, at_k)).sum())

    assert abs(score(7, 3) - score(50, 46)) < 1e-5
    assert abs(score(7, 3) - score(8, 3)) > 1e-3
