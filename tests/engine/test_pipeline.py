"""The pipeline over several devices: any number of stages and any split give one result.

Most tests work on latents, so that no VAE has to be compiled.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from svd2_jax.api import SessionSpec
from svd2_jax.config import DiTConfig, ModelConfig, StreamConfig, TextConfig, VAEConfig
from svd2_jax.engine import params
from svd2_jax.engine.engine import DeviceEngine
from svd2_jax.engine.mesh import StageMesh, stage_meshes
from svd2_jax.engine.options import PipelineOptions
from svd2_jax.engine.params import StageWeights
from svd2_jax.engine.pipeline import Pipeline, PipelineInput, tick_together
from svd2_jax.engine.programs import Builder
from svd2_jax.engine.stage_times import SAMPLES, measure_stages
from svd2_jax.errors import ConfigError

BLOCKS = 6
MODEL = ModelConfig(
    "six blocks",
    DiTConfig(dim=24, ffn_dim=48, num_heads=2, num_layers=BLOCKS, freq_dim=8, text_dim=12, text_len=4),
    VAEConfig(dim=8),
    TextConfig(vocab=300, dim=12, dim_attn=16, dim_ffn=16, num_heads=2, num_layers=1),
)
SHALLOW = dataclasses.replace(
    MODEL, dit=dataclasses.replace(MODEL.dit, num_layers=3)
)  # compiles in half the time
DTYPE = jnp.dtype(jnp.float32)
TOLERANCE = 1e-4  # what is asked of any split; programs of other shapes round differently, by some 1e-6
CHUNKS = 22  # the ring is full after 6, the time index restarts at 9
HEIGHT, WIDTH = 32, 48


def config(steps=2, **settings):
    """Adaptive sinks and the refresh of the time index are at work within a few chunks."""
    settings = {"height": 32, "width": 32, "sink_threshold": 0.9, "rope_refresh": 9, **settings}
    return StreamConfig.for_task("v2v", steps, **settings)


def gaussian(*key, shape):
    return np.random.default_rng(key).standard_normal(shape, np.float32)


def embedding(seed):
    return jnp.asarray(gaussian(7, seed, shape=(1, MODEL.dit.text_len, MODEL.dit.text_dim)))


def pipeline(cfg, split, model=MODEL, lone=False, batch_sizes=(1,)):
    mesh = stage_meshes(1, len(split))[0]
    builder = Builder(model, cfg, DTYPE, mesh, batch_sizes=batch_sizes)
    weights = StageWeights(model, params.random_items(model, 0, DTYPE), mesh)

    def programs(cfg):
        return dataclasses.replace(builder, cfg=cfg).denoiser(split, lone)

    return Pipeline(builder, programs, weights, split, embedding(0))


def stream(line, chunks=CHUNKS, prompts=None, steps=None):
    """Drives a pipeline and returns the finished chunks' latents, float32 [chunks, F, h, w, C]."""
    cfg, shape = line.cfg, (*line.cfg.latent_size, MODEL.dit.in_channels)
    put = functools.partial(jax.device_put, device=line.mesh.first)

    def noise(chunk, step, frames=cfg.frames_per_block):
        return put(gaussian(max(chunk, 0), step, shape=(frames, *shape)))

    first = cfg.first_latents
    line.first_group(noise(0, 0, first), tuple(noise(0, s, first) for s in range(1, cfg.steps)))
    done = []
    for tick in range(1, chunks + line.depth):
        if prompts and tick in prompts:
            line.set_prompt(embedding(prompts[tick]))
        if steps and tick in steps:
            line.set_steps(steps[tick])
        fresh = tick <= chunks
        latents, *again = (noise(chunk or 0, s) for s, chunk in enumerate(line.entering(fresh)))
        timestep = put(np.int32(690 - 10 * (tick % 3)))  # follows the motion, chunk by chunk
        for finished in line.tick(PipelineInput(latents, timestep, again, fresh)):
            done.append(np.asarray(line.mesh.part(finished.clean, -1)))
    line.close()
    return np.stack(done)


def with_pauses(lines, seed, prompts, steps=None):
    """Drives pipelines that share ticks, in which chunks enter or not; returns each one's finished chunks."""
    draw, cfg = np.random.default_rng(seed), lines[0].cfg
    shape, put = (
        (*cfg.latent_size, MODEL.dit.in_channels),
        functools.partial(jax.device_put, device=lines[0].mesh.first),
    )

    def noise(line, chunk, step, frames=cfg.frames_per_block):
        return put(gaussian(line, chunk or 0, step, shape=(frames, *shape)))

    first, done = cfg.first_latents, [[] for _ in lines]
    for i, line in enumerate(lines):
        line.first_group(noise(i, 0, 0, first), tuple(noise(i, 0, s, first) for s in range(1, cfg.steps)))
    for tick in range(60):
        arrivals = []
        for i, line in enumerate(lines):
            if tick in prompts:
                line.set_prompt(embedding(prompts[tick] + i))
            if steps and tick in steps:
                line.set_steps(steps[tick])
            fresh = bool(draw.random() < 0.3) and tick < 45
            latents, *again = (noise(i, chunk, s) for s, chunk in enumerate(line.entering(fresh)))
            arrivals.append(PipelineInput(latents, put(np.int32(690 - 10 * (tick % 3))), again, fresh))
        for i, finished in enumerate(tick_together(lines, arrivals)):
            done[i] += [np.asarray(lines[i].mesh.part(one.clean, -1)) for one in finished]
    for line in lines:
        line.close()
    return done


@pytest.mark.parametrize(
    ("steps", "split", "streams", "changes"),
    [
        (2, (3,), 2, {}),
        (3, (1, 1, 1), 1, {}),
        (3, (2, 1), 1, {10: 2, 20: 3}),
    ],
)
def test_ticks_that_compute_one_row_give_what_those_of_all_rows_give(steps, split, streams, changes):
    drawn = []
    for lone in (False, True):
        lines = [
            pipeline(config(steps), split, SHALLOW, lone, batch_sizes=(1, streams)[:streams])
            for _ in range(streams)
        ]
        ran = counted(lines[0])
        drawn.append(with_pauses(lines, 3, {7: 1, 12: 2, 30: 3}, changes))
        assert ("lone" in ran) == lone
        assert "tick" in ran  # chunks in several rows are computed together
    for whole, one in zip(*drawn, strict=True):
        assert len(whole) > 9
        np.testing.assert_allclose(np.stack(one), np.stack(whole), atol=TOLERANCE)


def counted(line):
    """Returns the kinds of ticks that a pipeline has run, as they happen."""
    ran, use = set(), line._use

    def counting(cfg):
        use(cfg)
        ticks = line._programs.ticks
        kinds = {
            kind: {n: functools.partial(note, kind, program) for n, program in programs.items()}
            for kind, programs in (("tick", ticks.tick), ("lone", ticks.lone or {}))
        }
        line._programs = dataclasses.replace(line._programs, ticks=dataclasses.replace(ticks, **kinds))

    def note(kind, program, *args):
        ran.add(kind)
        return program(*args)

    line._use = counting
    counting(line.cfg)
    return ran


PROMPTS = {5: 1, 6: 2, 7: 3, 15: 4}  # changes in a row, as in a blend


@functools.cache
def on_one_stage(cfg):
    return stream(pipeline(cfg, (BLOCKS,)), prompts=PROMPTS)


@pytest.mark.parametrize(
    ("steps", "split"),
    [
        (2, (3, 3)),
        (2, (2, 3, 1)),
        (2, (1,) * BLOCKS),
        # Splits with the same longest and shortest stage share their programs.
        (2, (1, 2, 1, 2)),
        (2, (2, 1, 2, 1)),
        (1, (1, 2, 2, 1)),
        (4, (2, 2, 2)),
    ],
)
def test_any_number_of_stages_and_any_split_give_the_result_of_one_stage(steps, split):
    cfg = config(steps)
    got = stream(pipeline(cfg, split), prompts=PROMPTS)
    np.testing.assert_allclose(got, on_one_stage(cfg), atol=TOLERANCE)


def test_sequential_mode_gives_the_result_of_one_stage():
    cfg = config(3, mode="sequential")
    np.testing.assert_allclose(
        stream(pipeline(cfg, (2, 1, 3)), prompts=PROMPTS), on_one_stage(cfg), atol=TOLERANCE
    )


def test_the_prompt_of_a_chunk_is_the_one_it_came_in_with():
    cfg = config(2)
    changed = stream(pipeline(cfg, (3, 3)), prompts={9: 1})
    plain = stream(pipeline(cfg, (3, 3)))
    np.testing.assert_array_equal(changed[:8], plain[:8])
    assert (np.abs(changed[8:] - plain[8:]).max(axis=(1, 2, 3, 4)) > 1e-3).all()


# --- weights and cache in 8 bits


def relative_error(got, wanted):
    return float(np.sqrt(np.square(got - wanted).mean() / np.square(wanted).mean()))


T2V = StreamConfig.for_task("t2v", 1, height=32, width=32)


@pytest.mark.parametrize(
    ("cfg", "split", "changes", "storage"),
    [
        (config(2), (3,), {}, "int8"),
        (config(2), (3,), {"steps": {4: 1, 9: 2}}, "fp8"),
        (config(2), (2, 1), {}, "fp8"),
        (config(2), (1, 2), {"steps": {4: 1, 9: 2}}, "int8"),
        (config(2, mode="sequential"), (2, 1), {}, "int8"),
        (T2V, (2, 1), {}, "fp8"),
    ],
    ids=["one stage", "other steps", "two stages", "other steps on two stages", "sequential", "t2v"],
)
def test_a_stream_in_8_bits_stays_close_to_the_plain_one(cfg, split, changes, storage):
    wanted = stream(pipeline(cfg, split, SHALLOW), **changes)
    small = dataclasses.replace(cfg, cache_dtype=storage)
    got = stream(pipeline(small, split, SHALLOW.with_weight_dtype(storage)), **changes)
    # About twice of what is seen: that of the roundings, which does not add up over a stream.
    assert 0 < relative_error(got, wanted) < {"int8": 0.02, "fp8": 0.08}[storage]


# --- what is compiled


@functools.cache
def builder(stages, dtype=DTYPE):
    return Builder(MODEL, config(2), jnp.dtype(dtype), stage_meshes(1, stages)[0])


COLLECTIVES = r"\b(collective-permute|all-gather|all-reduce|all-to-all|reduce-scatter|collective-broadcast)"


SPLITS = pytest.mark.parametrize("split", [(2, 2, 2), (1, 2, 2, 1)])


@SPLITS
def test_a_tick_is_one_collective_permute_and_nothing_else_between_devices(split):
    text = builder(len(split)).ticks(split).tick[1].as_text()
    assert re.findall(COLLECTIVES + r"(?:-start)?\(", text) == ["collective-permute"]


def test_one_stage_needs_no_collective():
    assert not re.findall(COLLECTIVES, builder(1).ticks((BLOCKS,)).tick[1].as_text())


@SPLITS
def test_a_tick_updates_the_state_in_place_and_copies_no_parameter(split):
    programs = dataclasses.replace(builder(len(split)), batch_sizes=(1, 2)).ticks(split)
    together = programs.tick[2]
    for program in (programs.tick[1], together):
        donated = [x for x in jax.tree.leaves(program.args_info) if x.donated]
        size = sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in donated) // len(split)
        memory = program.memory_analysis()
        assert memory.alias_size_in_bytes == size > 0
        # Nothing comes out besides the state but the clean latents and a table of pointers.
        clean = 2 * 4 * 4 * 16 * 4 * (2 if program is together else 1)
        leaves = len(donated) + 1
        assert memory.output_size_in_bytes - size <= clean + 16 * leaves
        # The CPU's attention transposes keys; the caches and the parameters themselves are never copied.
        args, _ = program.args_info
        shapes = [(x.shape[0] // len(split), *x.shape[1:]) for x in jax.tree.leaves(args)]
        large = {shape for shape in shapes if np.prod(shape) >= 24 * 24}
        assert {(2, 24, 2, 12), (24, 24), (24, 48)} <= large
        copied = re.findall(r"f32\[([\d,]+)\][^=]* copy\(", program.as_text())
        assert not large & {tuple(int(n) for n in shape.split(",")) for shape in copied}


@SPLITS
def test_nothing_goes_between_devices_in_a_tick_that_is_measured(split):
    assert not re.findall(COLLECTIVES, builder(len(split)).tick_apart(split).as_text())


def test_splits_of_the_same_longest_and_shortest_stage_share_their_programs():
    cfg, compiled = config(2), []

    def listen(event: str, duration: float, **_: object) -> None:
        if "backend_compile" in event:
            compiled.append(event)

    stream(pipeline(cfg, (2, 4)))
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        stream(pipeline(cfg, (4, 2)))
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not compiled


# --- who holds what


def test_each_device_reads_and_holds_its_own_blocks_only():
    mesh, read = stage_meshes(1, 4)[0], []
    draw = params.random_items(MODEL, 0, DTYPE)

    def read_item(item, device):
        read.append((item, device))
        return draw(item, device)

    weights = StageWeights(MODEL, read_item, mesh)
    held = weights.params((1, 2, 2, 1), "wan")
    assert len(read) == len(set(read))
    starts = (0, 1, 3, 5, 6)
    for stage, device in enumerate(mesh.devices):
        blocks = sorted(item for item, at in read if at == device and "block" in item)
        assert blocks == [f"dit.block.{i:03d}" for i in range(starts[stage], starts[stage + 1])]
    shapes = params.abstract_items(MODEL)

    def size(*items):
        return sum(x.size * 4 for item in items for x in jax.tree.leaves(shapes[item]))

    ends = size("dit.head") + sum(x.size * 4 for x in jax.tree.leaves(shapes["dit.embed"]["patch"]))
    block, bytes_held = size("dit.block.000"), list(weights.resident_bytes().values())
    assert bytes_held[1] == bytes_held[2] == 2 * block + ends
    assert bytes_held[0] == block + size("dit.head", "dit.embed", "vae.encoder")
    assert bytes_held[3] == block + ends + size("vae.decoder")
    # A position that a stage does not use costs nothing: it is the buffer of its first block.
    first, second = (mesh.part(held.dit.blocks[j]["mlp_up"]["kernel"], 0) for j in (0, 1))
    assert first.unsafe_buffer_pointer() == second.unsafe_buffer_pointer()


def test_another_split_takes_the_blocks_that_are_there_and_leaves_no_copy():
    mesh = stage_meshes(1, 2)[0]
    weights = StageWeights(MODEL, params.random_items(MODEL, 0, DTYPE), mesh)
    before = weights.dit((3, 3))
    kernel = np.asarray(mesh.part(before.blocks[0]["mlp_up"]["kernel"], 1))
    total = sum(weights.resident_bytes().values())
    after = weights.dit((4, 2))
    np.testing.assert_array_equal(mesh.part(after.blocks[3]["mlp_up"]["kernel"], 0), kernel)
    assert sum(weights.resident_bytes().values()) == total


# --- the measured split


def took(seconds_per_block, rest=None):
    """Measures what it is told: seconds of a block on each stage, and of the rest."""

    def measure(session):
        mesh, split = session.pipeline.mesh, session.pipeline.split
        blocks = [seconds * count for seconds, count in zip(seconds_per_block, split, strict=True)]
        both = zip(blocks, rest or [0.0] * len(split), strict=True)
        times = [np.repeat(np.float32([[b], [r]]), SAMPLES, axis=1) for b, r in both]
        return [times[stage] for stage in mesh.local_stages]

    return measure


def measured(engine, seconds_per_block, rest=None):
    """Measures the split of an engine whose devices take these times."""
    return engine.measure_split(SHARED, measure=took(seconds_per_block, rest))


SHARED = SessionSpec("a dog", StreamConfig(height=HEIGHT, width=WIDTH), pixels="float32")


def test_streams_that_share_ticks_and_change_steps_run_on_the_split_that_was_measured():
    options = PipelineOptions(batch_sizes=(1, 2))
    model = dataclasses.replace(SHALLOW, vae=VAEConfig(dim=4, num_res_blocks=1))
    engine = DeviceEngine.random(model, mesh=stage_meshes(1, 2)[0], options=options)
    assert engine.split(SHARED.config) == (2, 1)
    assert measured(engine, (3.0, 1.0)) == (1, 2)
    frames = clip(17, 0)
    with engine.open(SHARED, steps=(1, 2)) as session:
        assert session.pipeline.split == (1, 2)
        assert engine.measure_split(SHARED) is None  # beside an open session blocks stay
        chunks = session.push(frames[:13])
        session.set_steps(1)
        chunks += [*session.push(frames[13:]), *session.finish()]
        got = np.concatenate([chunk.frames() for chunk in chunks])
    assert len(got) == 17
    with DeviceEngine.random(model).open(SHARED) as session:
        first = np.concatenate([chunk.frames() for chunk in session.push(frames[:9])])
    np.testing.assert_allclose(got[: len(first)], first, atol=TOLERANCE)


def test_a_split_stays_where_little_is_gained_or_nothing_can_be_measured():
    mesh = stage_meshes(1, 2)[0]
    engine = DeviceEngine.random("golden", mesh=mesh)
    assert measured(engine, (1.0, 1.0), (0.0, 1.0)) == (3, 1)  # 3 and 2, against 2 and 3
    sequential = dataclasses.replace(SHARED, stream=dataclasses.replace(SHARED.config, mode="sequential"))
    assert engine.measure_split(sequential) is None
    for options in (PipelineOptions(split=(3, 1)), PipelineOptions(share_vae=True)):
        engine = DeviceEngine.random("golden", mesh=mesh, options=options)
        assert engine.measure_split(SHARED) is None
    assert DeviceEngine.random("golden").measure_split(SHARED) is None


def test_a_split_that_does_not_fit_is_not_taken():
    class Full(DeviceEngine):
        def _fits(self, cfg, split):  # a CPU does not say how large it is
            assert split == (1, 3)
            return False

    assert measured(Full.random("golden", mesh=stage_meshes(1, 2)[0]), (3.0, 1.0)) == (3, 1)


@pytest.mark.parametrize("cfg", [SHARED.config, T2V], ids=["v2v", "t2v"])
def test_stages_are_measured_by_what_they_do(cfg):
    """Four blocks take longer than one; only the ends have something else to do."""
    large = dataclasses.replace(MODEL.dit, dim=512, ffn_dim=2048, num_layers=6)
    model = dataclasses.replace(MODEL, dit=large, vae=VAEConfig(dim=4, num_res_blocks=1))
    options = PipelineOptions(split=(4, 1, 1))
    engine = DeviceEngine.random(model, mesh=stage_meshes(1, 3)[0], options=options)
    with engine.open(SessionSpec("a dog", cfg)) as session:
        times = np.median(measure_stages(session), axis=2)
    assert times.shape == (3, 2)
    assert times[0, 0] > 1.5 * times[1, 0] > 0
    assert (times[:, 1] > 0).tolist() == [True, False, True]


# --- sessions


def clip(frames, seed):
    rng = np.random.default_rng(seed)
    scene = rng.integers(0, 255, (HEIGHT, WIDTH + frames, 3), np.uint8)
    return np.stack([scene[:, t : t + WIDTH] for t in range(frames)])


@pytest.mark.slow
def test_two_streams_on_replicas_of_two_stages_equal_their_own_single_runs():
    cfg = StreamConfig(height=HEIGHT, width=WIDTH)
    specs = [
        SessionSpec("a dog", cfg, seed=1, pixels="float32"),
        SessionSpec("a neon street", cfg, 0.7, seed=2, pixels="float32"),
    ]
    inputs = [clip(27, seed) for seed in (0, 1)]
    meshes = stage_meshes(2, 2)
    engine = DeviceEngine.random("golden", mesh=meshes[0])
    engines = engine, engine.replica(meshes[1])
    assert engines[1].prompts is engine.prompts  # nothing is encoded, nor the text encoder read, twice
    sessions = [each.open(spec) for each, spec in zip(engines, specs, strict=True)]
    devices = [{d for x in jax.tree.leaves(s._pipeline.state) for d in x.devices()} for s in sessions]
    assert [len(d) for d in devices] == [2, 2]
    assert not devices[0] & devices[1]
    chunks = [[], []]
    for at in range(0, 27, 3):
        for session, frames, done in zip(sessions, inputs, chunks, strict=True):
            done += session.push(frames[at : at + 3])
    together = [
        np.concatenate([c.frames() for c in [*done, *s.finish()]])
        for s, done in zip(sessions, chunks, strict=True)
    ]
    single = DeviceEngine.random("golden")
    for spec, frames, got in zip(specs, inputs, together, strict=True):
        with single.open(spec) as session:
            alone = np.concatenate(list(session.run(frames)))
        np.testing.assert_allclose(got, alone, atol=TOLERANCE)
    assert np.abs(together[0] - together[1]).max() > 0.1


# --- bad input


def test_more_stages_than_devices_says_how_to_get_virtual_ones():
    with pytest.raises(
        ConfigError,
        match=r"9 stages need 9 devices, JAX sees 8 .*XLA_FLAGS=--xla_force_host_platform_device_count=9",
    ):
        stage_meshes(1, 9)
    with pytest.raises(ConfigError, match="4 stages for each of 3 replicas need 12 devices"):
        stage_meshes(3, 4)
    with pytest.raises(ConfigError, match="stages must be at least 1, got 0"):
        stage_meshes(1, 0)


def test_more_stages_than_blocks_is_refused():
    with pytest.raises(ConfigError, match="5 stages are more than the model's 4 blocks"):
        DeviceEngine.random("golden", mesh=stage_meshes(1, 5)[0])


@pytest.mark.parametrize("split", [(2, 1), (4,), (4, 0)])
def test_a_split_that_does_not_add_up_is_refused(split):
    with pytest.raises(ConfigError, match="has to give 2 stages all 4 blocks"):
        DeviceEngine.random("golden", mesh=stage_meshes(1, 2)[0], options=PipelineOptions(split=split))


def test_arrays_over_the_stages_keep_their_buffers():
    mesh = StageMesh(tuple(jax.devices()[:2]))
    parts = [jax.device_put(np.full((2, 3), s, np.float32), d) for s, d in enumerate(mesh.devices)]
    joined = mesh.join(parts)
    assert joined.shape == (4, 3)
    for stage, part in enumerate(parts):
        assert mesh.part(joined, stage).unsafe_buffer_pointer() == part.unsafe_buffer_pointer()
