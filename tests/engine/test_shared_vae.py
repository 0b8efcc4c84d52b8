"""Devices that share encoding and decoding: the video of one device, and what each of them holds and does."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from svd2_jax.api import SessionSpec, TickInput
from svd2_jax.config import DiTConfig, ModelConfig, StreamConfig, TAEHVConfig, TextConfig, VAEConfig
from svd2_jax.engine import costs, memory
from svd2_jax.engine.autoencode import rebuild
from svd2_jax.engine.engine import DeviceEngine
from svd2_jax.engine.mesh import StageMesh, stage_meshes
from svd2_jax.engine.options import PipelineOptions
from svd2_jax.engine.params import StageWeights, random_items
from svd2_jax.engine.programs import Builder
from svd2_jax.engine.shared_vae import sharing_devices
from svd2_jax.errors import ConfigError

MODEL = ModelConfig(
    "small ends",
    DiTConfig(dim=24, ffn_dim=48, num_heads=2, num_layers=4, freq_dim=8, text_dim=12, text_len=4),
    VAEConfig(dim=4, num_res_blocks=1),
    TextConfig(vocab=300, dim=12, dim_attn=16, dim_ffn=16, num_heads=2, num_layers=1),
    taehv=TAEHVConfig(channels=(8, 8, 4, 4)),
)
F32 = jnp.dtype(jnp.float32)
TOLERANCE = 1e-4  # as for any split; programs of other shapes round differently, by some 1e-6
WIDTH = 32
STREAM = StreamConfig(height=32, width=WIDTH)  # 4 rows of latents
UNEVEN = StreamConfig(height=48, width=WIDTH)  # 6: three of four devices share
T2V = StreamConfig.for_task("t2v", 1, height=32, width=WIDTH, cache_frames=9)


@functools.cache
def engine(stages, share_vae=False):
    options = PipelineOptions(share_vae=share_vae)
    return DeviceEngine.random(MODEL, mesh=stage_meshes(1, stages)[0], options=options)


def clip(cfg, frames):
    rng = np.random.default_rng(0)
    scene = rng.integers(0, 255, (cfg.height, WIDTH + frames, 3), np.uint8)
    return np.stack([scene[:, t : t + WIDTH] for t in range(frames)])


def redraw(engine, cfg, frames=15):
    with engine.open(SessionSpec("a dog", cfg, pixels="float32")) as session:
        source = clip(cfg, frames) if cfg.task == "v2v" else None
        return np.concatenate(list(session.run(source, count=frames)))


@pytest.mark.slow  # compiles the ends twice for each configuration
@pytest.mark.parametrize(
    "cfg",
    [STREAM, dataclasses.replace(UNEVEN, decoder="taehv"), dataclasses.replace(T2V, decoder="taehv")],
    ids=["all share", "some share, tiny decoder", "t2v, tiny decoder"],
)
def test_stages_that_share_the_vae_give_the_video_of_one_device(cfg):
    together, alone = redraw(engine(4, share_vae=True), cfg), redraw(engine(1), cfg)
    np.testing.assert_allclose(together, alone, atol=TOLERANCE)
    assert together.std() > 0.01


@pytest.mark.slow
def test_two_streams_in_one_tick_share_the_vae_too():
    options = PipelineOptions(batch_sizes=(1, 2), share_vae=True)
    both = DeviceEngine.random(MODEL, mesh=stage_meshes(1, 4)[0], options=options)
    specs = [SessionSpec("a dog", STREAM, seed=i, pixels="float32") for i in range(2)]
    sessions = [both.open(spec) for spec in specs]
    frames = clip(STREAM, 13)
    for start, stop in ((0, 5), (5, 9), (9, 13)):
        work = [TickInput(s, frames[start:stop]) for s in sessions]
        chunks = both.tick(work).chunks
        if start == 0:
            firsts = [c.frames() for (c,) in chunks]
    for first, spec in zip(firsts, specs, strict=True):
        with engine(1).open(spec) as session:
            (alone,) = session.push(frames[:5])
            np.testing.assert_allclose(first, alone.frames(), atol=TOLERANCE)


@pytest.mark.slow
def test_the_shared_vae_by_itself_gives_the_clip_of_one_device():
    frames = clip(STREAM, 11)
    together, alone = (rebuild(e, STREAM, frames).astype(int) for e in (engine(4, True), engine(1)))
    assert np.abs(together - alone).max() <= 1  # what lies between two levels may be rounded to either


@pytest.mark.slow
def test_a_shared_steady_state_compiles_nothing_and_moves_nothing_but_frames():
    compiled = []

    def listen(event: str, duration: float, **_: object) -> None:
        if "compile" in event or "trace" in event:
            compiled.append(event)

    frames = clip(STREAM, 45)
    with engine(4, share_vae=True).open(SessionSpec("a dog", STREAM, pixels="float32")) as session:
        session.push(frames[:21])
        jax.monitoring.register_event_duration_secs_listener(listen)
        try:
            # "disallow" lets the explicit transfers pass, and nothing else.
            with jax.transfer_guard("disallow"):
                session.push(frames[21:])
        finally:
            jax.monitoring.unregister_event_duration_listener(listen)
    assert not compiled


@pytest.mark.slow
def test_every_device_keeps_and_updates_its_own_rows_in_place():
    ends = engine(4, share_vae=True).ends(STREAM, "float32")
    for shared in (ends.encode, ends.decode):
        program = shared._program
        donated = [x for x in jax.tree.leaves(program.args_info) if x.donated]
        size = sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in donated)
        assert size > 0
        assert program.memory_analysis().alias_size_in_bytes >= size // 4


def test_only_devices_that_get_as_many_rows_share():
    assert [sharing_devices(UNEVEN, stages) for stages in (1, 2, 3, 4, 8)] == [1, 2, 3, 3, 6]
    mesh = stage_meshes(1, 4)[0]
    builder = Builder(MODEL, UNEVEN, F32, mesh, share_vae=True)
    assert builder.vae_devices == 3
    assert mesh.leading(3).devices == mesh.devices[:3]
    assert mesh.trailing(3).devices == mesh.devices[1:]
    assert dataclasses.replace(builder, share_vae=False).vae_devices == 1


@pytest.mark.parametrize(("cfg", "count"), [(STREAM, 4), (UNEVEN, 3)])
def test_a_device_holds_the_weights_of_what_it_shares(cfg, count):
    (mesh,) = stage_meshes(1, 4)
    weights = StageWeights(MODEL, random_items(MODEL, 0, F32), mesh)
    weights.params((1, 1, 1, 1), cfg.decoder, count)
    planned = memory.stage_memory(MODEL, cfg, F32, (1, 1, 1, 1), count)
    assert weights.resident_bytes() == dict(zip(mesh.devices, (s.weights for s in planned), strict=True))


def test_a_device_remembers_its_own_rows_only():
    alone, together = (costs.costs(MODEL, STREAM, F32, count).sizes for count in (1, 4))
    for whole, part in (
        (alone.encode_state, together.encode_state),
        (alone.decode_state, together.decode_state),
    ):
        assert part == pytest.approx(whole / 4, abs=4)  # the noise scale is everywhere


def test_the_devices_together_do_the_work_of_one_and_hand_each_other_rows():
    cfg = StreamConfig(height=480, width=832)
    alone, together = (costs.costs(MODEL, cfg, F32, count).chunk for count in (1, 4))
    for whole, part in ((alone.encode, together.encode), (alone.decode, together.decode)):
        assert whole.flops <= 4 * part.flops < 1.01 * whole.flops  # rows of zeros at the edges count here
        assert whole.sent == 0
        assert 0 < part.sent < part.bytes / 50
    assert together.block == alone.block


def test_blocks_are_split_evenly_where_the_ends_are_shared():
    model = dataclasses.replace(MODEL, dit=dataclasses.replace(MODEL.dit, num_layers=40))
    split = functools.partial(costs.default_split, model, STREAM, F32, 4, "cpu")
    assert split() == (1, 19, 19, 1)  # the VAE outweighs all blocks
    assert split(vae_devices=4) == (10, 10, 10, 10)


def test_several_processes_cannot_share():
    elsewhere = types.SimpleNamespace(process_index=1)
    mesh = StageMesh((jax.devices()[0], elsewhere))
    draw = random_items(MODEL, 0, F32)
    with pytest.raises(ConfigError, match="share the VAE within one process only; leave out --share-vae"):
        DeviceEngine(MODEL, draw, types.SimpleNamespace(), F32, mesh, PipelineOptions(share_vae=True))


def test_sizes_that_are_shared_by_different_numbers_of_devices_are_both_described():
    shared = engine(4, share_vae=True)
    for cfg in (STREAM, UNEVEN):  # by four devices, and by three of them
        shared.params(cfg)
        assert "GiB of parameters" in shared.describe(cfg)
