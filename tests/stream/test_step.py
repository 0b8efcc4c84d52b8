"""The streaming step: the cache against full recomputation, rows against single streams."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from svd2_jax.config import DiTConfig, StreamConfig
from svd2_jax.models import dit
from svd2_jax.models.dit import DiTParams
from svd2_jax.nn.random_params import random_params
from svd2_jax.stream import state as state_lib
from svd2_jax.stream import step
from svd2_jax.stream.state import StageInput

MODEL = DiTConfig(dim=24, ffn_dim=48, num_heads=2, num_layers=2, freq_dim=8, text_dim=12, text_len=4)
TIMESTEPS = (700, 500, 400)
SIZE = (4, 4)  # latent height and width


@functools.cache
def items():
    shapes = dit.abstract_params(MODEL)
    return {item: jax.tree.map(jnp.asarray, random_params(shapes[item], (0, len(item)))) for item in shapes}


def conditioner():
    return dit.split_embed(items()[dit.embed_item()])[1]


def params(model=MODEL):
    blocks = tuple(items()[dit.block_item(i)] for i in range(model.num_layers))
    return DiTParams(dit.split_embed(items()[dit.embed_item()])[0], blocks, items()[dit.head_item()])


@functools.cache
def prompt(model=MODEL):
    context = dit.embed_text(model, conditioner(), gaussian(1, (1, model.text_len, model.text_dim)))
    return (dit.prompt_kv(model, params(model).blocks, context),)


def gaussian(seed, shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def config(**settings):
    return StreamConfig(height=32, width=32, **{"timesteps": TIMESTEPS, **settings})


def latents(seed, frames=1):
    return gaussian(100 + seed, (frames, *SIZE, MODEL.in_channels))


def tick_once(cfg, batch, model, state, noisy, timestep, noise, fresh):
    conditioning = step.condition(model, cfg, batch, jnp.float32, conditioner(), timestep)
    is_open = [fresh] + [True] * (cfg.rows - 1 if batch == "rows" else 0)
    entry = StageInput(noisy, jnp.array(is_open), conditioning, noise)
    ring = step.Ring(always=model.num_layers, batch=batch)
    prompts = prompt(model) * (cfg.rows if batch == "rows" else 1)
    count = jnp.array([model.num_layers], jnp.int32)
    (state,), (rows,) = step.tick(model, cfg, ring, params(model), [prompts], count, [state], [entry])
    return state, jnp.stack(rows)


@functools.cache
def program(cfg, batch, model=MODEL):
    """Returns a jitted (state, noisy, timestep, noise, fresh) -> (state, clean)."""
    prompt(model)  # made before the trace, and kept
    return jax.jit(functools.partial(tick_once, cfg, batch, model))


def all_steps(cfg, state, noisy, model=MODEL):
    """Takes one chunk through all its steps, one after another."""
    clean = None
    for k, t in enumerate(cfg.timesteps):
        noise = (latents(50, noisy.shape[0]),) if cfg.steps > 1 else ()
        state, clean = program(cfg, "single", model)(state, noisy, jnp.int32(t), noise, k == 0)
    return state, clean


def after_first_group(cfg):
    state = state_lib.init_stream_state(MODEL, cfg, jnp.float32)
    state, _ = all_steps(cfg, state, latents(0, cfg.first_latents))
    return state_lib.open_rows(MODEL, cfg, state)


def renoise(tick, row):
    """The draw for what enters row `row` in a tick."""
    return latents(1000 + 10 * tick + row)


def run_ticks(cfg, ticks):
    state, outputs = after_first_group(cfg), []
    for tick in range(ticks):
        noise = tuple(renoise(tick, row) for row in range(1, cfg.rows))
        state, clean = program(cfg, "rows")(
            state, latents(1 + tick), jnp.int32(cfg.timesteps[0]), noise, True
        )
        outputs.append(clean[-1])
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

    def last_chunk(stream, groups):
        state = state_lib.init_stream_state(one_layer, stream, jnp.float32)
        for group in groups:
            message = state_lib.empty_message(one_layer, stream, jnp.float32, 1, group.shape[0])
            state = state_lib.StreamState(state.cache, state.start, message)
            state, clean = all_steps(stream, state, group, one_layer)
        return clean[0, -1]

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
        jax.tree.map(lambda x: x[:1], state.cache), state.start, jax.tree.map(lambda x: x[:1], state.message)
    )
    for tick in range(6):
        noise = tuple(renoise(tick, r) for r in (1, 2))
        state, _ = program(cfg, "rows")(state, latents(1 + tick), jnp.int32(700), noise, True)
        alone, _ = program(single, "rows")(alone, latents(1 + tick), jnp.int32(700), (), True)
    for together, one in zip(state.cache.layers, alone.cache.layers, strict=True):
        np.testing.assert_allclose(together.k[:1], one.k, atol=1e-5)
        np.testing.assert_array_equal(together.queue[:1], one.queue)


def test_rows_without_a_chunk_give_zeros_and_keep_their_cache():
    cfg = config()
    before = after_first_group(cfg)
    noise = (latents(2), latents(3))
    state, clean = program(cfg, "rows")(before, latents(1), jnp.int32(700), noise, True)
    assert not np.asarray(clean[1:]).any()
    assert np.asarray(clean[0]).any()
    assert state.message.active.tolist() == [True, False, False]
    for old, new in zip(before.cache.layers, state.cache.layers, strict=True):
        np.testing.assert_array_equal(old.k[1:], new.k[1:])
        assert (np.asarray(old.k[0]) != np.asarray(new.k[0])).any()


@pytest.mark.parametrize("batch", ["rows", "single"])
def test_a_tick_without_a_fresh_chunk_changes_nothing(batch):
    cfg = config()
    before = after_first_group(cfg)
    if batch == "single":
        before = state_lib.init_stream_state(MODEL, cfg, jnp.float32)
    noise = (latents(2, before.message.latents.shape[1]),) * (2 if batch == "rows" else 1)
    noisy = latents(1, before.message.latents.shape[1])
    state, clean = program(cfg, batch)(before, noisy, jnp.int32(700), noise, False)
    assert not np.asarray(clean).any()
    assert not np.asarray(state.message.active).any()
    np.testing.assert_array_equal(state.start, before.start)
    jax.tree.map(np.testing.assert_array_equal, state.cache, before.cache)


def test_a_chunk_leaves_the_last_row_after_as_many_ticks_as_steps():
    cfg = config()
    _, outputs = run_ticks(cfg, 4)
    assert [bool(np.asarray(o).any()) for o in outputs] == [False, False, True, True]


def test_the_time_index_restarts_below_the_refresh_and_stays_in_range():
    cfg = config(timesteps=(700,), rope_refresh=8)
    state, starts = after_first_group(cfg), []
    for tick in range(8):
        starts.append(int(state.start[0]))
        state, _ = program(cfg, "rows")(state, latents(1 + tick), jnp.int32(700), (), True)
    assert starts == [2, 3, 4, 5, 6, 7, 5, 6]


@pytest.mark.parametrize("settings", [{}, {"mode": "sequential"}, {"timesteps": (700,)}])
def test_a_step_keeps_the_state_s_shapes_and_traces_once(settings):
    cfg, traces = config(**settings), 0
    batch = "rows" if cfg.mode == "stream" else "single"

    def counted(*args):
        nonlocal traces
        traces += 1
        return tick_once(cfg, batch, MODEL, *args)

    prompt()  # made before the trace, and kept
    jitted, state = jax.jit(counted, donate_argnums=0), after_first_group(cfg)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), state)
    for tick in range(20):
        noise = tuple(latents(r) for r in range(cfg.rows - 1 if batch == "rows" else 1))
        state, _ = jitted(state, latents(tick), jnp.int32(700), noise, True)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == shapes
    assert traces == 1


def bits(x):
    return np.asarray(x).view(f"u{x.dtype.itemsize}") if x.dtype != np.bool_ else np.asarray(x)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_message_arrives_at_the_next_stage_bit_for_bit(dtype):
    """Float32 latents travel beside bfloat16 hidden states; NaNs, denormals and negative zeros too."""
    cfg, stages = config(), 4
    rng = np.random.default_rng(0)
    empty = state_lib.empty_message(MODEL, cfg, dtype, 2, 1)

    def noise(x):
        raw = rng.integers(0, 256, (stages * x.shape[0], *x.shape[1:], x.dtype.itemsize), np.uint8)
        return raw[..., 0] > 127 if x.dtype == jnp.bool_ else raw.view(x.dtype)[..., 0]

    sent = jax.tree.map(noise, empty)
    mesh = jax.make_mesh((stages,), (step.AXIS,), axis_types=(jax.sharding.AxisType.Auto,))
    over = jax.sharding.PartitionSpec(step.AXIS)
    send = jax.shard_map(functools.partial(step.send, stages), mesh=mesh, in_specs=over, out_specs=over)
    arrived = jax.jit(send)(jax.tree.map(jnp.asarray, sent))
    for a, b in zip(jax.tree.leaves(sent), jax.tree.leaves(arrived), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(bits(np.roll(a, a.shape[0] // stages, axis=0)), bits(np.asarray(b)))
