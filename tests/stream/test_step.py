"""The streaming step: the cache against full recomputation, rows against single streams."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from svd2_jax.config import DiTConfig, StreamConfig
from svd2_jax.models import dit
from svd2_jax.nn.random_params import random_params
from svd2_jax.stream import state as state_lib
from svd2_jax.stream import step

MODEL = DiTConfig(dim=24, ffn_dim=48, num_heads=2, num_layers=2, freq_dim=8, text_dim=12, text_len=4)
TIMESTEPS = (700, 500, 400)
SIZE = (4, 4)  # latent height and width


@functools.cache
def params():
    shapes = dit.abstract_params(MODEL)
    return dit.assemble(
        MODEL, lambda item: jax.tree.map(jnp.asarray, random_params(shapes[item], (0, len(item))))
    )


@functools.cache
def prompt():
    return dit.prompt_kv(MODEL, params(), gaussian(1, (1, MODEL.text_len, MODEL.text_dim)))


def gaussian(seed, shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def config(**settings):
    return StreamConfig(height=32, width=32, **{"timesteps": TIMESTEPS, **settings})


def latents(seed, frames=1):
    return gaussian(100 + seed, (frames, *SIZE, MODEL.in_channels))


@functools.cache
def programs(cfg):
    return (
        jax.jit(functools.partial(step.step_chunk, MODEL, cfg)),
        jax.jit(functools.partial(step.tick, MODEL, cfg)),
    )


def after_first_group(cfg):
    one_step = programs(cfg)[0]
    state, noisy = state_lib.init_stream_state(MODEL, cfg, jnp.float32), latents(0, cfg.first_latents)
    for i, t in enumerate(cfg.timesteps):
        last = i == cfg.steps - 1
        following = cfg.timesteps[min(i + 1, cfg.steps - 1)]
        state, _, noisy = one_step(
            params(), prompt(), state, noisy, jnp.int32(t), jnp.int32(following), latents(50, cfg.first_latents),
            jnp.bool_(last),
        )  # fmt: skip
    return state_lib.open_rows(cfg, state) if cfg.mode == "stream" else state


def run_ticks(cfg, ticks, active_noise=lambda tick, row: latents(1000 + 10 * tick + row)):
    state, outputs = after_first_group(cfg), []
    for tick in range(ticks):
        noise = tuple(active_noise(tick, row) for row in range(cfg.rows - 1))
        state, out = programs(cfg)[1](
            params(), prompt(), state, latents(1 + tick), jnp.int32(cfg.timesteps[0]), noise
        )
        outputs.append(out)
    return state, outputs


@pytest.mark.parametrize("threshold", [-1.0, 0.9])
def test_a_chunk_in_the_cache_gives_what_a_recomputation_without_cache_gives(threshold):
    """While nothing is evicted, streaming equals attending to all past chunks at their own noise level."""
    cfg = config(timesteps=(700,), cache_frames=8, sink_frames=3, sink_threshold=threshold)
    chunks = [latents(0, 2), *(latents(1 + i) for i in range(4))]
    _, outputs = run_ticks(cfg, 4)
    whole = StreamConfig(
        height=32, width=32, timesteps=(700,), task="t2v", frames_per_block=6, cache_frames=12, sink_frames=0,
        sink_threshold=-1.0,
    )  # fmt: skip
    # One block of all six frames: its last frame attends to everything, as the last streamed chunk does, but
    # its earlier frames see the future, so compare a one-layer model, where keys do not depend on attention.
    one_layer = DiTConfig(**{**MODEL.to_dict(), "num_layers": 1})
    one = dit.DiTParams(params().embed, params().blocks[:1], params().head)
    one_prompt = dit.PromptKV(prompt().k[:1], prompt().v[:1])

    def last_chunk(stream, groups):
        state = state_lib.init_stream_state(one_layer, stream, jnp.float32)
        for group in groups:
            state, clean, _ = step.step_chunk(
                one_layer, stream, one, one_prompt, state, group, jnp.int32(700), jnp.int32(700),
                jnp.zeros_like(group), jnp.bool_(True),
            )  # fmt: skip
        return clean[-1]

    np.testing.assert_allclose(
        last_chunk(cfg, chunks), last_chunk(whole, [jnp.concatenate(chunks)]), atol=1e-5
    )
    assert np.isfinite(np.asarray(outputs)).all()


def test_each_row_of_the_stream_batch_is_a_stream_of_its_own_step():
    """Row r sees its own past only: the first row equals a one-step stream with the same inputs."""
    cfg, single = config(), config(timesteps=TIMESTEPS[:1])
    state = after_first_group(cfg)
    # The single stream starts from the same cache, so only the rows' isolation is compared.
    alone = state_lib.StreamState(
        jax.tree.map(lambda x: x[:1], state.cache),
        state.start,
        state.ticks,
        state.rows[:0],
        state.row_starts[:0],
    )
    for tick in range(6):
        args = (params(), prompt())
        noise = tuple(latents(1000 + 10 * tick + r) for r in range(2))
        state, _ = programs(cfg)[1](*args, state, latents(1 + tick), jnp.int32(700), noise)
        alone, _ = programs(single)[1](*args, alone, latents(1 + tick), jnp.int32(700), ())
    for together, one in zip(state.cache.layers, alone.cache.layers, strict=True):
        np.testing.assert_allclose(together.k[:1], one.k, atol=1e-5)
        np.testing.assert_array_equal(together.queue[:1], one.queue)


def test_rows_without_a_chunk_give_zeros_and_keep_their_cache():
    cfg = config()
    before = after_first_group(cfg)
    state, out = programs(cfg)[1](
        params(), prompt(), before, latents(1), jnp.int32(700), (latents(2), latents(3))
    )
    assert not np.asarray(out).any()
    assert np.asarray(state.rows[0]).any()
    assert not np.asarray(state.rows[1]).any()
    for old, new in zip(before.cache.layers, state.cache.layers, strict=True):
        np.testing.assert_array_equal(old.k[1:], new.k[1:])
        assert (np.asarray(old.k[0]) != np.asarray(new.k[0])).any()


def test_a_chunk_leaves_the_last_row_after_as_many_ticks_as_steps():
    cfg = config()
    _, outputs = run_ticks(cfg, 4)
    assert [bool(np.asarray(o).any()) for o in outputs] == [False, False, True, True]


def test_the_time_index_restarts_below_the_refresh_and_stays_in_range():
    cfg = config(timesteps=(700,), rope_refresh=8)
    state, starts = after_first_group(cfg), []
    for tick in range(8):
        starts.append(int(state.start))
        state, _ = programs(cfg)[1](params(), prompt(), state, latents(1 + tick), jnp.int32(700), ())
    assert starts == [2, 3, 4, 5, 6, 7, 5, 6]


@pytest.mark.parametrize("settings", [{}, {"mode": "sequential"}, {"timesteps": (700,)}])
def test_a_step_keeps_the_state_s_shapes_and_traces_once(settings):
    cfg, traces = config(**settings), 0

    def counted(*args):
        nonlocal traces
        traces += 1
        if cfg.mode == "stream":
            return step.tick(MODEL, cfg, *args)
        return step.step_chunk(MODEL, cfg, *args)

    program, state = jax.jit(counted, donate_argnums=2), after_first_group(cfg)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), state)
    for tick in range(20):
        inputs = (params(), prompt(), state, latents(tick), jnp.int32(700))
        if cfg.mode == "stream":
            state, _ = program(*inputs, tuple(latents(r) for r in range(cfg.rows - 1)))
        else:
            state, _, _ = program(*inputs, jnp.int32(500), latents(1), jnp.bool_(True))
        assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == shapes
    assert traces == 1
