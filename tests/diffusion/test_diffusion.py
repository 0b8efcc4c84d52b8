"""Schedule and motion-aware noise, small cases by hand (the goldens check the rest)."""

import jax.numpy as jnp
import numpy as np
import pytest

from svd2_jax.diffusion import flow_match, noise_control


def test_adding_noise_and_predicting_the_clean_latents_are_inverse():
    rng = np.random.default_rng(0)
    clean, noise = (jnp.asarray(rng.standard_normal((2, 1, 2, 2, 4), np.float32)) for _ in range(2))
    t = jnp.array([700, 200], jnp.int32)
    noisy = flow_match.add_noise(clean, noise, t)
    np.testing.assert_allclose(flow_match.clean_prediction(noisy, noise - clean, t), clean, atol=1e-6)


def test_pure_noise_has_sigma_one_and_sigma_falls_with_the_timestep():
    sigma = np.asarray(flow_match.sigma_at(jnp.arange(1001, dtype=jnp.int32)))
    assert sigma[1000] == 1.0
    assert (np.diff(sigma) >= 0).all()


def test_a_still_scene_keeps_the_noise_scale_and_full_motion_lowers_it():
    still = jnp.zeros((4, 2, 2, 3))
    flash = jnp.asarray(np.stack([np.full((2, 2, 3), (-1) ** i, np.float32) for i in range(4)]))
    scale = jnp.float32(0.8)
    assert float(noise_control.motion(still[0], still)) == 0.0
    assert float(noise_control.motion(still[0], flash)) == 1.0

    def following(level: float, motion_range: float) -> float:
        return float(noise_control.next_noise_scale(jnp.float32(level), scale, scale, motion_range))

    assert following(0.0, 0.1) == pytest.approx(0.8, abs=1e-6)
    assert following(1.0, 0.1) == pytest.approx(0.71, abs=1e-6)
    assert following(1.0, 0.0) == pytest.approx(0.8, abs=1e-6)


@pytest.mark.parametrize(("scale", "step"), [(0.8, 700), (0.7, 600), (0.65966, 559), (0.05, 0), (1.0, 900)])
def test_the_first_timestep_follows_the_noise_scale(scale, step):
    assert int(noise_control.first_timestep(jnp.float32(scale))) == step
