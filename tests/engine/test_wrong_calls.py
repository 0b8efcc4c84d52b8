"""The Python API called wrongly: always one of our errors, which says what to do, and the session goes on."""

import threading

import numpy as np
import pytest

import svd2_jax
from svd2_jax import CheckpointError, ConfigError, SessionError, SessionSpec, StreamConfig, Svd2Error
from svd2_jax.api import TickInput
from svd2_jax.engine.engine import DeviceEngine
from svd2_jax.media import synthetic_clip

HEIGHT, WIDTH = 32, 48
STREAM = StreamConfig(height=HEIGHT, width=WIDTH)
T2V = StreamConfig.for_task("t2v", 1, height=HEIGHT, width=WIDTH, cache_frames=9)


def clip(frames):
    return np.random.default_rng(0).integers(0, 255, (frames, HEIGHT, WIDTH, 3), np.uint8)


@pytest.fixture(scope="module")
def session(engine):
    with engine.open(SessionSpec("a dog", STREAM)) as session:
        yield session


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: svd2_jax.load(None), "checkpoint must be a folder or a name, got NoneType"),
        (lambda: svd2_jax.load("nowhere"), "nowhere: no such checkpoint"),
        (lambda: svd2_jax.load("random:"), "unknown preset ''; known presets are"),
        (lambda: svd2_jax.load("random:huge"), "unknown preset 'huge'"),
        (lambda: svd2_jax.load("tiny", dtype="float16"), "dtype must be one of float32, bfloat16"),
        (lambda: svd2_jax.load("tiny", dtype=16), "dtype must be one of float32, bfloat16"),
        (lambda: svd2_jax.load("tiny", text_encoder="gpu"), "text_encoder must be one of .*, got 'gpu'"),
        (lambda: svd2_jax.load("tiny", stages="2"), "stages must be a whole number, at least 1; got '2'"),
        (lambda: svd2_jax.load_replicas(0), "replicas must be at least 1, got 0"),
        (lambda: svd2_jax.load_replicas("2"), "replicas must be a whole number, at least 1; got '2'"),
        (lambda: svd2_jax.load_replicas(9), "1 stage for each of 9 replicas need 9 devices, JAX sees 8"),
        (lambda: svd2_jax.load_replicas(2, stages=0), "stages must be at least 1, got 0"),
        (lambda: svd2_jax.load("tiny", batch_sizes=4), r"batch_sizes must be several numbers, as in \(1, 2, 4\)"),
        (lambda: svd2_jax.load("tiny", batch_sizes=("1",)), "a batch size must be a whole number"),
        (lambda: svd2_jax.load("tiny", weight_dtype="int4"), "weight_dtype must be one of"),
        (lambda: svd2_jax.load(""), "the checkpoint's name is empty, got ''"),
        (lambda: svd2_jax.load("tiny", share_vae="yes"), "share_vae must be True or False, got 'yes'"),
        (lambda: svd2_jax.load("tiny", keep_programs="x"), "keep_programs must be True or False, got 'x'"),
        (lambda: SessionSpec(7), "the prompt must be text, got int"),
        (lambda: SessionSpec(" "), "the prompt is empty"),
        (lambda: SessionSpec("x", {"height": 32}), "stream must be a StreamConfig, got dict; engine.stream_config"),
        (lambda: SessionSpec("x", noise_scale="0.5"), "noise_scale must be a number, got '0.5'"),
        (lambda: SessionSpec("x", noise_scale=float("nan")), r"noise_scale must be in \(0, 1\]"),
        (lambda: SessionSpec("x", noise_scale=True), "noise_scale must be a number, got True"),
        (lambda: SessionSpec("x", seed=1.5), "seed must be a whole number"),
        (lambda: SessionSpec("x", seed=-1), r"seed must be in \[0, 2\*\*32\), got -1"),
        (lambda: SessionSpec("x", pixels="bgr"), "pixels must be 'uint8' or 'float32'"),
        (lambda: StreamConfig(height="480"), "height must be a whole number, got '480'"),
        (lambda: StreamConfig(timesteps=700), "timesteps must be a list, got 700"),
        (lambda: StreamConfig(timesteps=[500, 700]), r"timesteps must descend, as in \(700, 500\), got \(500, 700\)"),
        (lambda: synthetic_clip("a", 32, 32), "frames must be a whole number, at least 0; got 'a'"),
        (lambda: synthetic_clip(-1, 32, 32), "frames must be at least 0, got -1"),
        (lambda: STREAM.with_steps("2"), "steps must be a whole number, 1 to 4; got '2'"),
        (lambda: STREAM.with_steps(9), "steps must be 1 to 4, got 9"),
        (lambda: StreamConfig.for_task("v2x"), "task must be one of"),
    ],
)  # fmt: skip
def test_what_cannot_be_loaded_or_made_is_refused_in_one_line(make, message):
    with pytest.raises(Svd2Error, match=message) as raised:
        make()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e: e.open("a neon city"), r"expected a SessionSpec, got str; as in engine.open\(SessionSpec"),
        (
            lambda e: e.open(SessionSpec("x", STREAM), steps=2),
            r"steps must be several numbers, as in \(1, 2\)",
        ),
        (lambda e: e.open(SessionSpec("x", STREAM), steps=("2",)), "steps must be a whole number"),
        (lambda e: e.open(SessionSpec("x", STREAM), steps=(5,)), "steps must be 1 to 4, got 5"),
        (lambda e: e.prepare(STREAM, (1,)), "expected a SessionSpec, got StreamConfig"),
        (lambda e: e.describe("x"), "expected a StreamConfig, got str"),
        (lambda e: e.prepare_prompt(None), "the prompt must be text, got NoneType"),
        (lambda e: e.stream_config(hight=32), "unknown key 'hight'; known are height, width"),
        (lambda e: e.stream_config(task="v2x"), "task must be one of"),
        (lambda e: e.stream_config(steps="2"), "steps must be a whole number"),
        (lambda e: e.stream_config(height=32.0), "height must be a whole number, got 32.0"),
        (lambda e: e.tick(TickInput(None)), "a tick takes a list of TickInput, got TickInput"),
        (lambda e: e.tick([1]), r"a tick takes TickInput\(session, frames\) .*, got int"),
        (lambda e: e.tick([TickInput(None)]), "got NoneType"),
    ],
)
def test_an_engine_refuses_wrong_arguments_in_one_line(engine, call, message):
    with pytest.raises(Svd2Error, match=message):
        call(engine)


def test_a_tick_takes_no_session_of_another_engine(engine):
    other = engine.replica(engine.mesh)
    with engine.open(SessionSpec("a dog", STREAM)) as session:
        with pytest.raises(SessionError, match="shares ticks in the engine that opened it only"):
            other.tick([TickInput(session, clip(5))])
        assert len(engine.tick([TickInput(session, clip(5))]).chunks[0]) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.push(None), "frames must be a numpy array .*, got NoneType"),
        (lambda s: s.push(clip(1).tolist()), "frames must be a numpy array .*, got list"),
        (lambda s: s.push(clip(1)[0, 0]), r"frames must be uint8 \[T, 32, 48, 3\], got uint8 \(48, 3\)"),
        (lambda s: s.push(clip(1) / 255), "got float64"),
        (lambda s: s.run(), "video to video needs the frames, .* got NoneType"),
        (lambda s: s.run("in.mp4"), "got str; media.VideoReader"),
        (lambda s: s.run(7), "got int"),
        (lambda s: s.run(clip(5), count="3"), "count must be a whole number"),
        (lambda s: s.run(clip(5), prompts=["a cat"]), "prompts are a dict of frame: prompt, got list"),
        (lambda s: s.run(clip(5), prompts={"3": "a cat"}), "the frame of a prompt must be a whole number"),
        (lambda s: s.run(clip(5), prompts={3: " "}), "the prompt is empty"),
        (lambda s: s.run(clip(5), blend_chunks=None), "blend_chunks must be a whole number"),
        (lambda s: next(s.run([1, 2])), "frames must be a numpy array .*, got int"),
        (lambda s: s.set_prompt(3), "the prompt must be text, got int"),
        (lambda s: s.set_prompt("x", "2"), "blend_chunks must be a whole number, at least 0; got '2'"),
        (lambda s: s.set_prompt("x", 1.5), "blend_chunks must be a whole number"),
        (lambda s: s.set_noise_scale("0.5"), "noise_scale must be a number, got '0.5'"),
        (lambda s: s.set_noise_scale(None), "noise_scale must be a number, got None"),
        (lambda s: s.set_noise_scale(True), "noise_scale must be a number, got True"),
        (lambda s: s.set_noise_scale(0), r"noise_scale must be in \(0, 1\], got 0"),
        (lambda s: s.set_noise_scale(1.5), r"noise_scale must be in \(0, 1\], got 1.5"),
        (lambda s: s.set_noise_scale(float("nan")), r"noise_scale must be in \(0, 1\], got nan"),
        (lambda s: s.set_steps("1"), "steps must be a whole number"),
        (lambda s: s.set_steps(None), "steps must be a whole number"),
    ],
)
def test_a_session_refuses_wrong_arguments_in_one_line_and_goes_on(session, call, message):
    with pytest.raises(Svd2Error, match=message):
        call(session)
    session.push(clip(1))


def test_there_is_no_noise_scale_to_change_in_text_to_video_nor_in_a_closed_session(engine):
    raised = pytest.raises(SessionError, match="starts from noise alone")
    with engine.open(SessionSpec("a dog", T2V)) as session, raised:
        session.set_noise_scale(0.5)
    with pytest.raises(SessionError, match="the session is closed"):
        session.set_noise_scale(0.5)
    with pytest.raises(SessionError, match="the session is closed"):
        _ = session.steps


def test_text_to_video_takes_a_count_and_no_frames(engine):
    with engine.open(SessionSpec("a dog", T2V)) as session:
        with pytest.raises(SessionError, match="takes no frames; pass count"):
            session.run(clip(5))
        with pytest.raises(SessionError, match="pass count"):
            session.run()
        with pytest.raises(ConfigError, match="count must be at least 1, got 0"):
            session.run(count=0)


def test_a_spec_without_a_stream_gets_the_size_that_the_model_was_trained_at():
    engine = svd2_jax.load("random:tiny")
    assert engine.resolved(SessionSpec("x")).config == engine.stream_config()
    assert (engine.stream_config().height, engine.stream_config().width) == (96, 160)
    with pytest.raises(ConfigError, match=r"engine\.resolved"):
        _ = SessionSpec("x").config


def test_the_published_text_to_video_settings_come_with_the_task(engine):
    assert engine.stream_config(task="t2v", height=64, width=64) == StreamConfig.for_task(
        "t2v", height=64, width=64
    )


def test_one_frame_and_several_are_taken_by_push_and_by_run(engine):
    frames, made = clip(10), []
    for source in (frames, list(frames), [frames[:7], frames[7], frames[8:]]):
        with engine.open(SessionSpec("a dog", STREAM)) as session:
            made.append(np.concatenate(list(session.run(source))))
    with engine.open(SessionSpec("a dog", STREAM)) as session:
        chunks = [chunk for frame in frames for chunk in session.push(frame)] + session.finish()
        made.append(np.concatenate(chunks))
    assert all(len(video) == 10 for video in made)
    for video in made[1:]:
        np.testing.assert_array_equal(video, made[0])


def test_engine_session_and_chunk_say_what_they_are(engine):
    assert repr(engine).startswith("<DeviceEngine golden: float32, 1 stage on cpu, open sessions: ")
    with engine.open(SessionSpec("a dog", STREAM)) as session:
        (chunk,) = session.push(clip(7))
        assert repr(chunk) == "<DeviceChunk frames 0 to 4>"
        assert repr(session) == "<DeviceSession 'a dog': 48x32, v2v, open, frames in 7, out 5>"
    assert "closed" in repr(session)


def test_a_session_used_from_many_threads_takes_every_call_as_a_whole(engine):
    """On a shared session without order, XLA says that a buffer was deleted."""
    errors, chunks = [], []
    with engine.open(SessionSpec("a dog", STREAM), steps=(1,)) as session:

        def use(number):
            try:
                for i in range(6):
                    chunks.extend(session.push(clip(4)))
                    session.set_prompt(f"a dog {number}")
                    session.set_steps(1 + i % 2)
            except BaseException as e:
                errors.append(e)

        threads = [threading.Thread(target=use, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        chunks.extend(session.finish())
    assert not errors
    assert sum(chunk.frame_count for chunk in chunks) == 4 * 6 * 4


def test_steps_that_nobody_prepared_are_refused_and_those_prepared_compile_nothing(golden_checkpoint):
    engine = DeviceEngine.from_checkpoint(golden_checkpoint)
    with engine.open(SessionSpec("a dog", STREAM)) as session:
        session.push(clip(5))
        with pytest.raises(SessionError, match=r"engine.open\(spec, steps=\(2, 1\)\), or .*engine.prepare"):
            session.set_steps(1)
        assert session.steps == 2
        engine.prepare(SessionSpec("another", STREAM), (1,))
        session.set_steps(1)
        session.push(clip(4))
        assert session.steps == 1
    three = SessionSpec("a cat", STREAM.with_steps(3))
    with engine.open(three) as other, pytest.raises(SessionError, match="would have to be compiled"):
        other.set_steps(2)  # its programs are there, those that change rows are not


@pytest.mark.parametrize("ask", [lambda e, spec: e.open(spec), lambda e, spec: e.prepare(spec, (1,))])
def test_a_missing_decoder_is_said_before_anything_is_read_or_compiled(golden_checkpoint, caplog, ask):
    engine = DeviceEngine.from_checkpoint(golden_checkpoint)
    cfg = StreamConfig(height=HEIGHT, width=WIDTH, decoder="taehv")
    with caplog.at_level("INFO", "svd2_jax.progress"), pytest.raises(CheckpointError, match="--taehv"):
        ask(engine, SessionSpec("a dog", cfg))
    assert not caplog.records
