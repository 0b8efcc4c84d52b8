"""The session on the golden model: frames in, frames out."""

import dataclasses

import jax
import numpy as np
import pytest

from svd2_jax.api import SessionSpec
from svd2_jax.config import StreamConfig, TAEHVConfig, preset
from svd2_jax.engine.engine import DeviceEngine
from svd2_jax.errors import CheckpointError, ConfigError, SessionError

HEIGHT, WIDTH = 32, 48
STREAM = StreamConfig(height=HEIGHT, width=WIDTH)
SEQUENTIAL = StreamConfig(height=HEIGHT, width=WIDTH, mode="sequential")
ONE_STEP = StreamConfig(height=HEIGHT, width=WIDTH, timesteps=(700,))
T2V = StreamConfig.for_task("t2v", 1, height=HEIGHT, width=WIDTH, cache_frames=9)


def clip(frames, seed=0):
    rng = np.random.default_rng(seed)
    scene = rng.integers(0, 255, (HEIGHT, WIDTH + frames, 3), np.uint8)
    return np.stack([scene[:, t : t + WIDTH] for t in range(frames)])


def redraw(engine, cfg=STREAM, frames=13, prompt="a dog", seed=0, **run):
    with engine.open(SessionSpec(prompt, cfg, seed=seed)) as session:
        source = clip(frames) if cfg.task == "v2v" else None
        return np.concatenate(list(session.run(source, count=frames, **run)))


@pytest.mark.parametrize(
    "cfg", [STREAM, SEQUENTIAL, ONE_STEP, T2V], ids=["stream", "sequential", "1 step", "t2v"]
)
@pytest.mark.parametrize("frames", [1, 4, 5, 6, 9, 12])
def test_as_many_frames_come_out_as_go_in(engine, cfg, frames):
    assert redraw(engine, cfg, frames).shape == (frames, HEIGHT, WIDTH, 3)


@pytest.mark.parametrize("steps", [1, 2])
def test_the_tiny_decoder_loses_no_frame_either(steps):
    engine = DeviceEngine.random(
        dataclasses.replace(preset("golden"), taehv=TAEHVConfig(channels=(8, 8, 4, 4)))
    )
    cfg = StreamConfig(height=HEIGHT, width=WIDTH, timesteps=STREAM.timesteps[:steps], decoder="taehv")
    assert redraw(engine, cfg, 10).shape == (10, HEIGHT, WIDTH, 3)


@pytest.mark.parametrize("cfg", [STREAM, SEQUENTIAL, T2V], ids=["stream", "sequential", "t2v"])
def test_same_seed_gives_the_same_video_and_another_seed_another(engine, cfg):
    first, again, other = (redraw(engine, cfg, seed=s) for s in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_frames_pushed_one_by_one_give_the_same_video(engine):
    frames = clip(11)
    with (
        engine.open(SessionSpec("a dog", STREAM)) as whole,
        engine.open(SessionSpec("a dog", STREAM)) as single,
    ):
        at_once = [*whole.push(frames), *whole.finish()]
        one_by_one = [c for f in frames for c in single.push(f[None])] + single.finish()
        for a, b in zip(at_once, one_by_one, strict=True):
            assert a.first_frame == b.first_frame
            np.testing.assert_array_equal(a.frames(), b.frames())


def test_a_caller_may_reuse_its_frame_buffer(engine):
    frames, buffer = clip(9), np.empty((1, HEIGHT, WIDTH, 3), np.uint8)
    with engine.open(SessionSpec("a dog", SEQUENTIAL)) as session:
        done = []
        for frame in frames:
            buffer[0] = frame
            done += session.push(buffer)
            buffer[:] = 0
        got = np.concatenate([c.frames() for c in done])
    np.testing.assert_array_equal(got, redraw(engine, SEQUENTIAL, 9))


def test_a_second_session_equals_a_fresh_one(engine, golden_checkpoint):
    redraw(engine, STREAM, 20, prompt="something else", seed=9)
    fresh = DeviceEngine.from_checkpoint(golden_checkpoint)
    np.testing.assert_array_equal(redraw(engine, STREAM), redraw(fresh, STREAM))


def test_two_sessions_at_once_do_not_disturb_each_other(engine):
    frames = clip(13)
    with (
        engine.open(SessionSpec("a dog", STREAM)) as a,
        engine.open(SessionSpec("a cat", STREAM, seed=5)) as b,
    ):
        done = []
        for i in range(0, 13, 4):
            done += a.push(frames[i : i + 4])
            b.push(frames[::-1][i : i + 4])
        done += a.finish()
    np.testing.assert_array_equal(np.concatenate([c.frames() for c in done]), redraw(engine, STREAM))


@pytest.mark.parametrize("cfg", [STREAM, SEQUENTIAL, T2V], ids=["stream", "sequential", "t2v"])
def test_a_new_prompt_shows_from_the_chunk_that_holds_its_frame(engine, cfg):
    plain = redraw(engine, cfg, 29)
    changed = redraw(engine, cfg, 29, prompts={15: "a neon street"})
    # The chunk of frames 13-16 (video-to-video) or 9-20 (text-to-video). The one before it, still on its way
    # through the second row of a stream batch, keeps its prompt.
    start = 9 if cfg is T2V else 13
    differs = (plain != changed).any(axis=(1, 2, 3))
    assert not differs[:start].any()
    assert differs[start:].all()


def test_a_change_to_the_same_prompt_changes_nothing(engine):
    plain = redraw(engine, STREAM, 21)
    np.testing.assert_array_equal(redraw(engine, STREAM, 21, prompts={9: "a dog"}), plain)
    np.testing.assert_array_equal(redraw(engine, STREAM, 21, prompts={9: "a dog"}, blend_chunks=3), plain)


def test_a_blend_moves_linearly_and_ends_at_the_new_prompt(engine):
    with engine.open(SessionSpec("a dog", SEQUENTIAL)) as session:
        old, frames = np.asarray(session._embedding), clip(21)
        session.push(frames[:5])
        session.set_prompt("a neon street", blend_chunks=4)
        new, seen = engine.prompts.encode("a neon street"), []
        for i in range(5, 21, 4):
            session.push(frames[i : i + 4])
            seen.append(np.asarray(session._embedding))
    for i, context in enumerate(seen, start=1):
        np.testing.assert_allclose(context, old + (new - old) * i / 4, atol=1e-5)


def test_a_prompt_change_during_a_blend_starts_from_where_the_blend_is(engine):
    with engine.open(SessionSpec("a dog", SEQUENTIAL)) as session:
        frames = clip(13)
        session.push(frames[:5])
        session.set_prompt("a neon street", blend_chunks=4)
        session.push(frames[5:9])
        half = np.asarray(session._embedding)
        session.set_prompt("a dog", blend_chunks=2)
        session.push(frames[9:13])
        wanted = half + (engine.prompts.encode("a dog") - half) / 2
        np.testing.assert_allclose(np.asarray(session._embedding), wanted, atol=1e-5)


@pytest.mark.parametrize("cfg", [STREAM, SEQUENTIAL, T2V], ids=["stream", "sequential", "t2v"])
def test_steady_state_compiles_nothing_and_moves_nothing_but_frames(engine, cfg):
    compiled = []

    def listen(event: str, duration: float, **_: object) -> None:
        if "compile" in event or "trace" in event:
            compiled.append(event)

    with engine.open(SessionSpec("a dog", cfg)) as session:

        def chunk(i):
            return session.push(clip(4, seed=i)) if cfg.task == "v2v" else session.advance()

        for i in range(4):
            chunk(i)
        jax.monitoring.register_event_duration_secs_listener(listen)
        try:
            # "disallow" lets the explicit transfer of the chunk's frames pass, and nothing else.
            with jax.transfer_guard("disallow"):
                for i in range(16):
                    chunk(i)
        finally:
            jax.monitoring.unregister_event_duration_listener(listen)
    assert not compiled


@pytest.mark.parametrize("cfg", [STREAM, SEQUENTIAL], ids=["stream", "sequential"])
def test_donated_state_is_updated_in_place(engine, cfg):
    ends, denoiser = engine.ends(cfg), engine.denoiser(cfg, engine.split(cfg))
    for program in (denoiser.step_first, ends.encode, ends.decode, denoiser.ticks.tick[1]):
        donated = [x for x in jax.tree.leaves(program.args_info) if x.donated]
        size = sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in donated)
        assert size > 0
        assert program.memory_analysis().alias_size_in_bytes >= size


def test_noise_of_a_chunk_is_the_same_in_both_modes(engine):
    def draws(cfg, chunks):
        draw = engine.denoiser(cfg, engine.split(cfg)).draw_chunk
        latents, again = draw(jax.random.key(7), jax.device_put(np.array(chunks, np.int32)))
        return np.asarray(latents), np.asarray(again[0])

    third, second_again = draws(STREAM, [3, 2])  # the chunk before takes its second step
    np.testing.assert_array_equal(third, draws(SEQUENTIAL, [3, 3])[0])
    np.testing.assert_array_equal(second_again, draws(SEQUENTIAL, [2, 2])[1])
    assert (third != draws(STREAM, [2, 1])[0]).any()


def test_a_session_says_what_it_cannot_take(engine):
    with engine.open(SessionSpec("a dog", STREAM)) as session:
        with pytest.raises(SessionError, match=r"uint8 \[T, 32, 48, 3\], got uint8 \(1, 32, 32, 3\)"):
            session.push(np.zeros((1, 32, 32, 3), np.uint8))
        with pytest.raises(SessionError, match="got float32"):
            session.push(np.zeros((1, HEIGHT, WIDTH, 3), np.float32))
        with pytest.raises(SessionError, match="push"):
            session.advance()
        with pytest.raises(ConfigError, match="prompt is empty"):
            session.set_prompt(" \n")
        with pytest.raises(ConfigError, match="blend_chunks"):
            session.set_prompt("a cat", -1)
        assert session.finish() == []
        with pytest.raises(SessionError, match="finished"):
            session.push(clip(1))
    with pytest.raises(SessionError, match="closed"):
        session.push(clip(1))
    session.close()
    with engine.open(SessionSpec("a dog", T2V)) as session, pytest.raises(SessionError, match="advance"):
        session.push(clip(1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"height": 40}, "height must be a positive multiple of 16, got 40"),
        ({"timesteps": ()}, "timesteps must be 1 to 8"),
        ({"timesteps": (1001,)}, r"timesteps must be 1 to 8 values in \[0, 1000\]"),
        ({"mode": "fast"}, "mode must be one of"),
        ({"cache_frames": 3, "sink_frames": 0}, "leaves nothing to overwrite .*; use at least 4"),
        ({"sink_frames": 6}, "sink_frames must be at least 0 and below cache_frames=6"),
        ({"sink_threshold": 2.0}, "sink_threshold must be in"),
        ({"keep_first": False}, "keep_first: false needs sink_frames=0 and frames_per_block=1, got 3 and 1"),
        ({"motion_range": -0.1}, "motion_range must be in"),
        ({"rope_refresh": 5}, "rope_refresh must be at least cache_frames"),
    ],
)
def test_a_stream_configuration_that_cannot_work_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        StreamConfig(**{"height": HEIGHT, "width": WIDTH, **change})


def test_a_missing_decoder_says_how_to_get_it(engine):
    cfg = StreamConfig(height=HEIGHT, width=WIDTH, decoder="taehv")
    with pytest.raises(CheckpointError, match="--taehv"):
        engine.open(SessionSpec("a dog", cfg))


@pytest.mark.parametrize("text", ["host", "device", "disk"])
def test_the_text_encoder_gives_the_same_wherever_it_lives(engine, golden_checkpoint, text):
    other = DeviceEngine.from_checkpoint(golden_checkpoint, text=text)
    np.testing.assert_array_equal(other.prompts.encode("a dog"), engine.prompts.encode("a dog"))
