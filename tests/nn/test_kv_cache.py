"""The ring with sinks against a list model, and by hand."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from svd2_jax.config import DiTConfig, StreamConfig
from svd2_jax.errors import ConfigError
from svd2_jax.nn import kv_cache
from svd2_jax.nn.quantised import dequantise

DIT = DiTConfig(dim=8, ffn_dim=8, num_heads=2, num_layers=1)


def config(**settings_) -> StreamConfig:
    return StreamConfig(height=16, width=16, timesteps=(700,), **settings_)


class ListRing:
    """The eviction order as the reference keeps it, with Python lists (one row, one token a frame)."""

    def __init__(self, cfg):
        self.cfg, self.queue, self.filled, self.held = cfg, [], 0, 0
        self.slots = [None] * cfg.cache_frames

    def write(self, start, frames, value):
        cfg = self.cfg
        end = start + frames
        if end > cfg.cache_frames or self.filled >= cfg.cache_frames:
            self.filled = cfg.cache_frames
            target = self.queue[0]
            per_position = 1 if cfg.mode == "stream" else cfg.steps
            if self.held < per_position - 1:
                self.held += 1
            else:
                self.held = 0
                self.queue.pop(0)
                if target > cfg.sink_frames:
                    self.queue.append(target)
            end = target
        else:
            following = end + frames
            if not cfg.keep_first:
                if self.queue[-1:] != [end]:
                    self.queue += range(end - frames + 1, end + 1)
            elif cfg.sink_frames < following <= cfg.cache_frames and self.queue[-1:] != [following]:
                self.queue.append(following)
            self.filled = end
        self.slots[end - frames : end] = [value] * frames


def run(cfg, groups):
    """Writes groups of (start, frames, value) and returns the list model and the cache."""
    ring, cache = ListRing(cfg), kv_cache.init_kv_cache(DIT, cfg, jnp.float32)
    for start, frames, value in groups:
        ring.write(start, frames, value)
        cache = write(cfg, cache, start, frames, jnp.full((1, frames, 2, 4), value, jnp.float32))
    return ring, cache


def write(cfg, cache, start, frames, kv, active=True):
    return _write(cfg, frames, cache, np.array([start], np.int32), kv, np.array([active]))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _write(cfg, frames, cache, start, kv, active):
    plan, cache = kv_cache.plan_write(cfg, cache, start, active, frames)
    layer = kv_cache.write(cfg, cache.layers[0], plan, kv, kv, frames)
    return dataclasses.replace(cache, layers=(layer,))


def queue_of(cache):
    layer = cache.layers[0]
    return [int(x) for x in layer.queue[0, : int(layer.queue_len[0])]]


def slots_of(cache):
    return [float(x) for x in cache.layers[0].k[0, :, 0, 0]]


@settings(max_examples=15, deadline=None)
@given(
    task=st.sampled_from(["v2v", "t2v"]),
    block=st.sampled_from([1, 3]),
    cache_frames=st.integers(4, 12),
    sinks=st.integers(0, 5),
    chunks=st.integers(0, 14),
    mode=st.sampled_from(["stream", "sequential"]),
)
def test_the_ring_writes_where_the_list_model_writes(task, block, cache_frames, sinks, chunks, mode):
    try:
        cfg = config(
            task=task,
            frames_per_block=block,
            cache_frames=cache_frames,
            sink_frames=sinks,
            sink_threshold=-1.0,
            mode=mode,
        )
    except ConfigError:  # nothing to overwrite: the list model would pop from an empty list
        reject()
    if mode == "sequential":
        cfg = dataclasses.replace(cfg, timesteps=(700, 500))
    writes, value, start = [], 0, 0
    for frames in [cfg.first_latents] + [block] * chunks:
        for _ in range(cfg.steps):
            value += 1
            writes.append((start, frames, value))
        start += frames
    ring, cache = run(cfg, writes)
    assert queue_of(cache) == ring.queue
    assert int(cache.filled[0]) == ring.filled
    assert slots_of(cache) == [s or 0 for s in ring.slots]


def test_a_full_cache_of_six_with_three_sinks_rotates_through_the_last_three():
    cfg = config(cache_frames=6, sink_frames=3, sink_threshold=-1.0)
    _, cache = run(cfg, [(0, 2, 1)] + [(i, 1, i) for i in range(2, 10)])
    assert slots_of(cache) == [1, 1, 2, 9, 7, 8]
    assert queue_of(cache) == [5, 6, 4]


def test_without_the_first_group_kept_the_oldest_frame_goes_first():
    cfg = config(cache_frames=6, sink_frames=0, keep_first=False)
    _, cache = run(cfg, [(0, 2, 1)] + [(i, 1, i) for i in range(2, 10)])
    assert slots_of(cache) == [6, 7, 8, 9, 4, 5]
    assert queue_of(cache) == [5, 6, 1, 2, 3, 4]


def test_sequential_steps_queue_a_position_once():
    cfg = config(cache_frames=6, sink_frames=0, keep_first=False, mode="sequential")
    cfg = dataclasses.replace(cfg, timesteps=(700, 500))
    groups = [(0, 2, 1)] + [(i, 1, i) for i in range(2, 10)]
    ring, cache = run(cfg, [group for group in groups for _ in range(2)])
    assert queue_of(cache) == ring.queue
    assert sorted(ring.queue) == [1, 2, 3, 4, 5, 6]
    assert slots_of(cache) == ring.slots


def test_a_row_without_a_chunk_leaves_its_cache_untouched():
    cfg = config()
    _, cache = run(cfg, [(0, 2, 1)] + [(i, 1, i) for i in range(2, 8)])
    after = write(cfg, cache, 8, 1, jnp.full((1, 1, 2, 4), 9.0), active=False)
    jax.tree.map(np.testing.assert_array_equal, after, cache)


def test_an_unlike_frame_queues_the_least_similar_sink_in_front_once():
    cfg = config(cache_frames=6, sink_frames=3, sink_threshold=0.5)
    axis = np.eye(8, dtype=np.float32)

    def frame(direction):
        return jnp.asarray(direction.reshape(1, 1, 2, 4))

    cache = kv_cache.init_kv_cache(DIT, cfg, jnp.float32)
    cache = write(cfg, cache, 0, 2, jnp.concatenate([frame(axis[0]), frame(axis[0])], axis=1))
    for start in range(2, 6):  # sink 2 is not written yet at the first of these, which counts as similarity 0
        cache = write(cfg, cache, start, 1, frame(axis[0]))
    assert queue_of(cache) == [3, 4, 5, 6]
    cache = write(cfg, cache, 6, 1, frame(axis[0]))
    assert queue_of(cache) == [4, 5, 6], "a sink is not queued again"
    cache = write(cfg, cache, 7, 1, frame(axis[0] + axis[1]))
    assert queue_of(cache) == [5, 6, 4], "similarity 0.7 is above the threshold"
    cache = write(cfg, cache, 8, 1, frame(axis[7]))
    assert queue_of(cache) == [5, 6, 4], "sink 0 was queued in front and took this very write"
    assert slots_of(cache) == [0, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("cache_frames", [4, 6])
def test_a_stream_that_re_anchors_at_every_step_never_outgrows_the_queue(cache_frames):
    cfg = StreamConfig(
        height=16, width=16, timesteps=(700, 500, 400, 200), mode="sequential", cache_frames=cache_frames,
        sink_frames=2, sink_threshold=1.0,
    )  # fmt: skip
    cache = write(cfg, kv_cache.init_kv_cache(DIT, cfg, jnp.float32), 0, 2, jnp.ones((1, 2, 2, 4)))
    rng = np.random.default_rng(0)
    for start in range(2, 60):
        for _ in range(cfg.steps):
            kv = jnp.asarray(rng.standard_normal((1, 1, 2, 4), np.float32))
            cache = write(cfg, cache, start, 1, kv)
            entries = queue_of(cache)
            assert len(entries) <= kv_cache.queue_capacity(cfg)
            if start >= cache_frames:  # every position beyond the sinks stays in the queue
                regular = [e for e in entries if e > cfg.sink_frames]
                assert len(regular) == len(set(regular)) >= 1


@pytest.mark.parametrize(("storage", "error"), [("int8", 0.5 / 127), ("fp8", 1 / 16)])
def test_a_cache_in_8_bits_holds_what_a_plain_one_holds_in_the_same_order(storage, error):
    """Adaptive anchors are compared before anything is rounded, so both take the same turns."""
    plain = dataclasses.replace(config(sink_threshold=0.2), timesteps=(700, 500))
    small = dataclasses.replace(plain, cache_dtype=storage)
    caches = {cfg: kv_cache.init_kv_cache(DIT, cfg, jnp.float32) for cfg in (plain, small)}
    rng, scene, turns = np.random.default_rng(0), np.zeros((1, 2, 2, 4), np.float32), []
    for start in (0, *range(2, 26)):  # full after six, and replaced one by one from there
        frames = 1 if start else 2
        scene = scene[:, :frames] * 0.8 + rng.standard_normal((1, frames, 2, 4), np.float32)
        for cfg in caches:
            caches[cfg] = write(cfg, caches[cfg], start, frames, jnp.asarray(scene))
        assert queue_of(caches[small]) == queue_of(caches[plain])
        turns.append(queue_of(caches[plain])[0])
        layers = [caches[cfg].layers[0] for cfg in (plain, small)]
        for wanted, got in ((layers[0].k, layers[1].k), (layers[0].v, layers[1].v)):
            got = dequantise(got, jnp.dtype(jnp.float32))
            assert (np.abs(got - wanted) <= error * np.abs(wanted).max(axis=-1, keepdims=True) * 1.0001).all()
        np.testing.assert_array_equal(layers[0].sink_means, layers[1].sink_means)
    # Anchors were replaced, and all others in turn.
    assert {*turns[4:]} >= {4, 5, 6}
    assert min(turns) <= plain.sink_frames
    rows = kv_cache.resize_rows(caches[small], 2)
    np.testing.assert_array_equal(rows.layers[0].k.values[1], caches[small].layers[0].k.values[0])
    np.testing.assert_array_equal(rows.layers[0].k.scales[1], caches[small].layers[0].k.scales[0])
