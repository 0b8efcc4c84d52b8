"""Several streams in one tick, ticks without a chunk, and steps that change in mid-stream."""

import dataclasses

import jax
import numpy as np
import pytest

from svd2_jax import media
from svd2_jax.api import SessionSpec, TickInput
from svd2_jax.config import StreamConfig
from svd2_jax.engine.engine import DeviceEngine
from svd2_jax.engine.mesh import stage_meshes
from svd2_jax.engine.options import PipelineOptions
from svd2_jax.errors import ConfigError, SessionError

HEIGHT, WIDTH = 32, 48
CONFIG = StreamConfig(height=HEIGHT, width=WIDTH)
THREE_STEPS = CONFIG.with_steps(3)
SEQUENTIAL = dataclasses.replace(CONFIG, mode="sequential")
TOLERANCE = 2e-4  # pixels in [0, 1]; programs for more streams round their products differently, by some 1e-5
BATCHES = PipelineOptions(batch_sizes=(1, 2))


@pytest.fixture(scope="module")
def batched(golden_checkpoint):
    """The golden model, for up to two streams in a tick."""
    return DeviceEngine.from_checkpoint(golden_checkpoint, options=BATCHES)


@pytest.fixture(scope="module")
def staged(golden_checkpoint):
    """The golden model, which has two blocks, on two devices."""
    return DeviceEngine.from_checkpoint(golden_checkpoint, mesh=stage_meshes(1, 2)[0])


def clip(frames, seed=0):
    return np.stack(list(media.synthetic_clip(frames, HEIGHT, WIDTH, seed)))


def spec(seed=0, cfg=CONFIG):
    return SessionSpec(f"a dog number {seed}", cfg, seed=seed, pixels="float32")


def groups(chunks, seed=0):
    """The first group and so many chunks of a clip."""
    frames = clip(5 + 4 * chunks, seed)
    return [frames[:5], *(frames[5 + 4 * i : 9 + 4 * i] for i in range(chunks))]


def drive(engine, spec, chunks, steps=None, idle=()):
    """One stream alone; changes the steps before some chunks, and takes ticks without a chunk before some."""
    with engine.open(spec, steps=set((steps or {}).values())) as session:
        out = []
        for n, group in enumerate(groups(chunks, spec.seed)):
            if steps and n in steps:
                session.set_steps(steps[n])
            for _ in range(idle.count(n)):
                out += engine.tick([TickInput(session)]).chunks[0]
            out += session.push(group)
        out += session.finish()
        firsts = [chunk.first_frame for chunk in out]
        assert firsts == [0, *(5 + 4 * i for i in range(chunks))]
        return np.concatenate([chunk.frames() for chunk in out])


@pytest.mark.parametrize("cfg", [CONFIG, SEQUENTIAL], ids=["stream", "sequential"])
@pytest.mark.parametrize("stages", [1, 2])
def test_streams_that_share_ticks_give_what_each_gives_alone(batched, golden_checkpoint, stages, cfg):
    """They join and leave at any chunk, and take part in some ticks without a chunk."""
    engine = batched
    if stages == 2:
        (mesh,) = stage_meshes(1, 2)
        engine = DeviceEngine.from_checkpoint(golden_checkpoint, mesh=mesh, options=BATCHES)
    with engine.open(spec(1, cfg)) as a, engine.open(spec(2, cfg)) as b:
        inputs, out = {a: groups(7, 1), b: groups(4, 2)}, {a: [], b: []}

        def tick(*sessions, idle=()):
            work = [TickInput(s, inputs[s].pop(0)) for s in sessions] + [TickInput(s) for s in idle]
            ticket = engine.tick(work)
            ticket.wait()
            for part, chunks in zip(work, ticket.chunks, strict=True):
                out[part.session] += chunks

        tick(a)
        tick(a)
        tick(b)  # joins
        tick(a, b)
        tick(b, a)
        if cfg.mode == "stream":
            tick(a, idle=(b,))
            tick(b, idle=(a,))
        else:
            tick(a)
            tick(b)
        tick(a)
        tick(a, b)
        out[b] += b.finish()
        b.close()  # leaves
        tick(a)
        out[a] += a.finish()
        for session, chunks in ((a, 7), (b, 4)):
            got = np.concatenate([chunk.frames() for chunk in out[session]])
            np.testing.assert_allclose(
                got, drive(engine, session.spec, chunks), atol=TOLERANCE, err_msg=session.spec.prompt
            )


def test_what_a_stream_holds_never_changes_another_s_output(batched):
    def beside(neighbour):
        with batched.open(spec(1)) as session, batched.open(neighbour) as other:
            session.push(groups(0, 1)[0])
            other.push(groups(0, neighbour.seed)[0])
            out = []
            for mine, theirs in zip(groups(5, 1)[1:], groups(5, neighbour.seed)[1:], strict=True):
                chunks = batched.tick([TickInput(session, mine), TickInput(other, theirs)]).chunks
                out += [chunk.frames() for chunk in chunks[0]]
        return np.concatenate(out)

    np.testing.assert_array_equal(beside(spec(2)), beside(spec(3)))


@pytest.mark.parametrize("stages", [1, 2])
def test_ticks_without_a_chunk_change_nothing_but_when_chunks_come_out(golden_checkpoint, stages):
    # An engine of its own: where another test has prepared ticks of one row, they come in and round differently.
    engine = DeviceEngine.from_checkpoint(golden_checkpoint, mesh=stage_meshes(1, stages)[0])
    np.testing.assert_array_equal(
        drive(engine, spec(), 7, idle=(2, 3, 3, 3, 3, 6, 6)), drive(engine, spec(), 7)
    )


def test_with_fewer_steps_the_rows_that_stay_go_on_as_if_there_had_never_been_more(engine):
    def first_predictions(steps):
        with engine.open(spec(cfg=THREE_STEPS), steps=(1, 2)) as session:
            seen = []
            for n, group in enumerate(groups(10)):
                if n in steps:
                    session.set_steps(steps[n])
                session.push(group)
                if n:
                    seen.append(np.asarray(session.pipeline.came_back[0]))
        return np.stack(seen)

    plain = first_predictions({})
    for steps in ({6: 1}, {3: 2, 7: 1}, {2: 1, 6: 3}):
        # Programs for other numbers of rows round their products differently.
        np.testing.assert_allclose(first_predictions(steps), plain, atol=1e-5)


@pytest.mark.parametrize("cfg", [CONFIG, SEQUENTIAL], ids=["stream", "sequential"])
def test_fewer_steps_change_the_chunks_from_those_under_way_on(engine, cfg):
    before, after = drive(engine, spec(cfg=cfg), 8), drive(engine, spec(cfg=cfg), 8, steps={6: 1})
    unchanged = 5 + 4 * (4 if cfg.mode == "stream" else 5)
    np.testing.assert_array_equal(after[:unchanged], before[:unchanged])
    assert (after[unchanged:] != before[unchanged:]).any(axis=(1, 2, 3)).all()


@pytest.mark.parametrize(
    ("stages", "steps"),
    [
        (1, {0: 4, 3: 1}),
        (1, {0: 2, 1: 3, 2: 2, 3: 3}),
        (1, {6: 1, 7: 2, 8: 3}),
        (2, {3: 2, 8: 1}),
        (2, {0: 1, 6: 3}),
        (2, {2: 1, 3: 3, 4: 1, 5: 2}),
    ],
)
def test_any_change_of_steps_loses_no_chunk_and_keeps_their_order(engine, staged, stages, steps):
    engine = engine if stages == 1 else staged
    frames = drive(engine, spec(cfg=THREE_STEPS), 9, steps=steps, idle=(4, 7, 7))
    assert len(frames) == 5 + 4 * 9
    assert np.isfinite(frames).all()


def test_a_change_of_steps_shows_no_larger_jump_than_an_ordinary_chunk_boundary(engine):
    chunks = 30

    def jumps(frames):
        """Mean absolute difference between the last frame of a chunk and the first of the next."""
        return np.abs(np.diff(frames, axis=0)).mean(axis=(1, 2, 3))[4::4]

    plain = [drive(engine, spec(cfg=CONFIG.with_steps(n)), chunks) for n in (1, 2, 3)]
    ordinary = max(jumps(frames)[4:].max() for frames in plain)
    # With the change, the chunks that took another number of steps than those before them: what is under way is
    # finished with the steps that it has taken.
    for steps, others in (
        ({12: 1}, (10, 11)),
        ({12: 2}, (11,)),
        ({6: 1, 15: 3}, (4, 5, 15)),
        ({6: 2, 15: 3}, (5, 15)),
    ):
        changed = jumps(drive(engine, spec(cfg=THREE_STEPS), chunks, steps=steps))
        assert max(changed[chunk - 1] for chunk in others) <= ordinary


def test_a_prepared_engine_compiles_nothing_while_streams_come_and_go(batched):
    batched.prepare(spec(), [1, 2])
    compiled = []

    def listen(event: str, duration: float, **_: object) -> None:
        if "compile" in event or "trace" in event:
            compiled.append(event)

    def life(a_seed, b_seed):
        with batched.open(spec(a_seed)) as a, batched.open(spec(b_seed)) as b:
            a.push(groups(0)[0])
            b.push(groups(0)[0])
            for steps in (2, 1, 2):
                for session in (a, b):
                    session.set_steps(steps)
                    session.set_prompt(f"prompt {steps}", blend_chunks=2)
                for group in groups(3)[1:]:
                    batched.tick([TickInput(a, group), TickInput(b, group)]).wait()
                    batched.tick([TickInput(a)]).wait()

    batched.prepare_prompt("prompt 1")
    batched.prepare_prompt("prompt 2")
    for seed in (11, 12, 13, 14):
        batched.prepare_prompt(f"a dog number {seed}")
    life(11, 12)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        life(13, 14)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not compiled


def test_a_part_that_cannot_be_taken_is_refused_before_anything_happens(engine):
    with engine.open(spec(1), steps=(1,)) as a, engine.open(spec(2)) as b:
        first, chunk, *_ = groups(2)
        for work, message in (
            ([TickInput(a)], "starts with its first group"),
            ([TickInput(a, first[:4])], "takes 5 frames, got 4"),
            ([TickInput(a, first), TickInput(a, first)], "one part of a tick only"),
            ([TickInput(b, first), TickInput(a, chunk)], "takes 5 frames, got 4"),
            ([TickInput(a, first[:, :16])], r"uint8 \[T, 32, 48, 3\]"),
        ):
            with pytest.raises(SessionError, match=message):
                engine.tick(work)
        started = engine.tick([TickInput(a, first), TickInput(b, first)])  # one after the other
        assert [len(chunks) for chunks in started.chunks] == [1, 1]
        with pytest.raises(ConfigError, match="steps must be 1 to 4, got 5"):
            a.set_steps(5)
        a.set_steps(1)
        tickets = engine.tick([TickInput(a, chunk), TickInput(b, chunk)])  # of different steps: likewise
        assert [len(chunks) for chunks in tickets.chunks] == [1, 0]
        started.wait()  # later than its state was given away
        b.close()
        with pytest.raises(SessionError, match="closed"):
            engine.tick([TickInput(b, chunk)])
        a.push(first[:1])
        with pytest.raises(SessionError, match="left by push"):
            engine.tick([TickInput(a, chunk)])


@pytest.mark.parametrize("sizes", [(), (2, 4), (1, 4, 2), (1, 1)])
def test_batch_sizes_have_to_ascend_from_one(sizes):
    with pytest.raises(ConfigError, match="batch_sizes must ascend from 1"):
        PipelineOptions(batch_sizes=sizes)


# --- noise scales that change in mid-stream


def redraw(engine, scales, chunks=7, noise_scale=0.8):
    """One stream's frames for each chunk; sets these noise scales before some chunks."""
    with engine.open(dataclasses.replace(spec(1), noise_scale=noise_scale)) as session:
        out = []
        for n, group in enumerate(groups(chunks, 1)):
            for scale in scales.get(n, ()):
                session.set_noise_scale(scale)
            out += session.push(group)
        return [chunk.frames() for chunk in [*out, *session.finish()]]


@pytest.mark.parametrize("stages", [1, 2])
def test_a_noise_scale_changes_the_chunks_that_enter_from_then_on(engine, staged, stages):
    engine = engine if stages == 1 else staged
    as_it_was, changed = redraw(engine, {}), redraw(engine, {4: (0.5,)})
    for n, (before, after) in enumerate(zip(as_it_was, changed, strict=True)):
        # Chunks in flight at the change keep theirs, and nothing that they leave behind depends on later ones.
        assert (before == after).all() == (n < 4), n


def test_a_noise_scale_set_before_the_first_group_is_that_of_the_session(engine):
    for got, wanted in zip(redraw(engine, {0: (0.5,)}), redraw(engine, {}, noise_scale=0.5), strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_a_noise_scale_that_is_set_back_before_the_next_chunk_changes_nothing(engine):
    for got, wanted in zip(redraw(engine, {2: (0.8,), 4: (0.3, 0.8)}), redraw(engine, {}), strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_streams_of_different_noise_scales_share_ticks_and_change_them_without_compiling(batched):
    scales = {1: {3: 0.4}, 2: {3: 1.0, 5: 0.6}}
    specs = {1: spec(1), 2: dataclasses.replace(spec(2), noise_scale=0.5)}
    with batched.open(specs[1]) as a, batched.open(specs[2]) as b:
        out = {1: a.push(groups(0, 1)[0]), 2: b.push(groups(0, 2)[0])}
        compiled = []

        def listen(event, duration, **_):
            if "compile" in event or "trace" in event:
                compiled.append(event)

        jax.monitoring.register_event_duration_secs_listener(listen)
        try:
            for n in range(1, 7):
                for session in (a, b):
                    if n in scales[session.spec.seed]:
                        session.set_noise_scale(scales[session.spec.seed][n])
                work = [TickInput(s, groups(6, s.spec.seed)[n]) for s in (a, b)]
                for seed, chunks in zip((1, 2), batched.tick(work).chunks, strict=True):
                    out[seed] += chunks
        finally:
            jax.monitoring.unregister_event_duration_listener(listen)
        for session in (a, b):
            out[session.spec.seed] += session.finish()
        assert not compiled
        together = {seed: np.concatenate([chunk.frames() for chunk in done]) for seed, done in out.items()}
    for seed, one in specs.items():
        with batched.open(one) as session:
            alone = []
            for n, group in enumerate(groups(6, seed)):
                if n in scales[seed]:
                    session.set_noise_scale(scales[seed][n])
                alone += session.push(group)
            alone += session.finish()
            wanted = np.concatenate([chunk.frames() for chunk in alone])
        np.testing.assert_allclose(together[seed], wanted, atol=TOLERANCE)
