"""Training sequences: the very numbers that a stream computes, and what a batch is made of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from svd2_jax.config import DiTConfig, ModelConfig, StreamConfig, TextConfig, VAEConfig
from svd2_jax.diffusion import flow_match
from svd2_jax.engine.tokenizer import Tokenizer
from svd2_jax.models import dit
from svd2_jax.models.dit import DiTParams
from svd2_jax.stream import state as state_lib
from svd2_jax.stream import step
from svd2_jax.stream.state import StageInput
from tiny_model import denoiser, fit
from tiny_model.styles import STYLES

MODEL = ModelConfig(
    "custom",
    DiTConfig(dim=24, ffn_dim=48, num_heads=2, num_layers=2, freq_dim=8, text_dim=12, text_len=4),
    VAEConfig(dim=4, num_res_blocks=1),
    TextConfig(vocab=300, dim=12, dim_attn=16, dim_ffn=24, num_heads=2, num_layers=1),
)
STREAM = StreamConfig(height=32, width=32, timesteps=(700,), sink_threshold=-1.0)
TOKENIZER = Tokenizer.bytes_fallback(MODEL.dit.text_len, MODEL.text.vocab)


def gaussian(seed, shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def params():
    drawn = denoiser.init_params(MODEL, seed=0)
    # The initial blocks change nothing, which would prove nothing.
    return jax.tree.map(lambda x: jnp.asarray(x) + 0.2 * gaussian(x.size, x.shape), drawn)


@pytest.mark.parametrize("later", [700, 450])
def test_a_training_sequence_gives_what_a_stream_computes_tick_by_tick(later):
    """Also where the noise scale is low, so that later chunks have another first timestep than the first group."""
    model, items = MODEL.dit, params()
    latents, context = gaussian(1, (9, 4, 4, 16)), gaussian(2, (1, model.text_len, model.text_dim))
    patch, conditioner = dit.split_embed(items[dit.embed_item()])
    blocks = tuple(items[dit.block_item(i)] for i in range(model.num_layers))
    of_tick = DiTParams(patch, blocks, items[dit.head_item()])
    embedded = dit.embed_text(model, conditioner, context)
    prompt = (dit.prompt_kv(model, blocks, embedded),)
    ring, count = step.Ring(always=model.num_layers), jnp.array([model.num_layers], jnp.int32)
    conditionings = [
        step.condition(model, STREAM, "rows", jnp.float32, conditioner, jnp.int32(t)) for t in (700, later)
    ]
    tick = jax.jit(step.tick, static_argnums=(0, 1, 2))  # else each operation is compiled by itself
    state, streamed = state_lib.init_stream_state(model, STREAM, jnp.float32), []
    for chunk in (latents[:2], *(latents[i : i + 1] for i in range(2, 9))):
        if chunk.shape[0] != state.message.latents.shape[1]:
            state = state_lib.open_rows(model, STREAM, state)
        entry = StageInput(chunk, jnp.array([True]), conditionings[bool(streamed)], ())
        (state,), ((clean,),) = tick(model, STREAM, ring, of_tick, [prompt], count, [state], [entry])
        streamed.append(clean)

    timestep = jnp.full((1, 9), later, jnp.int32).at[:, :2].set(700)
    start = jnp.arange(9, dtype=jnp.int32)[None]
    velocity = jax.jit(denoiser.velocity, static_argnums=(0, 1))
    flow = velocity(model, STREAM, items, latents[None], timestep, start, embedded)
    clean = flow_match.clean_prediction(latents[:, None], flow[0][:, None], timestep[0])
    # Sums in another order, through two blocks.
    np.testing.assert_allclose(clean[:, 0], jnp.concatenate(streamed), atol=2e-5)


def test_frames_see_their_first_group_the_sinks_and_the_last_frames():
    seen, count = denoiser.seen_frames(9, STREAM)
    assert [list(s[:c]) for s, c in zip(seen, count, strict=True)] == [
        [0, 1], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5],
        [0, 1, 2, 4, 5, 6], [0, 1, 2, 5, 6, 7], [0, 1, 2, 6, 7, 8],
    ]  # fmt: skip


def test_time_indices_stay_below_the_refresh_and_go_on_by_one_but_for_it():
    rng = np.random.default_rng(0)
    for _ in range(300):
        start = denoiser.random_starts(7, STREAM, rng)
        assert list(start[:3]) == [0, 1, 2]
        assert start.max() < STREAM.rope_refresh
        steps = np.diff(start[3:])
        restarts = steps != 1
        assert restarts.sum() <= 1
        assert (start[3:][1:][restarts] == STREAM.cache_frames - 1).all()


def batch(count=4, frames=4, seed=0):
    latents = np.random.default_rng(5).standard_normal((3, len(STYLES), 5, 4, 4, 16)).astype(np.float16)
    made = denoiser.random_batch(TOKENIZER, STREAM, latents, count, frames, np.random.default_rng(seed))
    return latents, made


def test_a_batch_pairs_the_input_with_one_style_of_the_same_scene():
    latents, made = batch(count=64)
    unchanged = list(STYLES).index("unchanged")
    for given, wanted in zip(made.inputs, made.targets, strict=True):
        scene = next(i for i in range(3) if (latents[i, unchanged, 3] == given[3]).all())
        style = next(i for i in range(len(STYLES)) if (latents[scene, i, 3] == wanted[3]).all())
        anchors = [i for i in range(3) if (latents[i, unchanged, :3] == given[:3]).all()]
        assert len(anchors) == 1
        assert (latents[anchors[0], style, :3] == wanted[:3]).all()
    assert made.level.shape == made.own.shape == (32,)
    assert made.noise_scale.shape == (64, 4)
    assert set(np.unique(made.level)) <= {1, 2, 3}


def test_batches_hold_the_noise_scales_that_a_stream_can_have():
    """From 0.3 to 1 as asked for; behind the first group up to `motion_range` less."""
    made = [batch(count=64, seed=seed)[1].noise_scale for seed in range(20)]
    asked, later = np.concatenate([m[:, 0] for m in made]), np.concatenate([m[:, 2] for m in made])
    assert (np.concatenate([m[:, 1] for m in made]) == asked).all()
    assert asked.min() >= 0.3
    assert asked.max() <= 1.0
    assert np.histogram(asked, np.linspace(0.3, 1.0, 8))[0].min() > 0.05 * asked.size
    assert (asked - later >= 0).all()
    assert (asked - later).max() <= STREAM.motion_range + 1e-6
    assert 0.4 * STREAM.motion_range < (asked - later).mean() < 0.6 * STREAM.motion_range


def test_the_first_group_starts_at_the_configured_timestep_whatever_its_noise_scale():
    _, made = batch(count=64)
    first = denoiser.first_timesteps(STREAM, jnp.asarray(made.noise_scale))
    assert (first[:, :2] == STREAM.timesteps[0]).all()
    assert (first[:, 2:] == np.floor(1000 * made.noise_scale[:, 2:] + 1e-4).astype(int) - 100).all()


def test_a_few_steps_lower_the_loss_on_one_batch(tmp_path):
    _, made = batch()
    run = fit.Run("x", steps=30, rate=0.02, vector_rate=5e-3, warmup=5)

    @jax.jit
    def loss(params, batch, key):
        return denoiser.loss(MODEL, STREAM, params, batch, jax.random.key(0))

    start = jax.tree.map(jnp.asarray, denoiser.init_params(MODEL, seed=0))
    before, _ = loss(start, made, None)
    trained = fit.fit(run, tmp_path, start, loss, lambda _: made, adam_only=denoiser.is_table)
    after, numbers = loss(trained, made, None)
    assert float(after) < 0.7 * float(before)
    assert all(np.isfinite(float(v)) for v in numbers.values())


def test_the_error_of_a_network_that_says_nothing_is_what_the_noise_leaves():
    """With a velocity of 0 the clean prediction is the noisy input."""
    _, made = batch(count=64)
    still = {**params(), dit.head_item(): jax.tree.map(jnp.zeros_like, params()[dit.head_item()])}
    _, numbers = jax.jit(lambda p: denoiser.loss(MODEL, STREAM, p, made, jax.random.key(0)))(still)
    first = slice(0, 32)
    scale = made.noise_scale[first, :, None, None, None]
    kept = (1 - scale) * made.inputs[first].astype(np.float32) - made.targets[first].astype(np.float32)
    expected = np.sqrt((kept**2).mean() + (scale**2).mean()) / denoiser.LATENT_SIZE
    # Gaussians of 32 * 4 * 16 * 16 elements have a mean square of 1 up to a percent.
    assert float(numbers["error_first"]) == pytest.approx(expected, rel=0.02)
