"""What a session hands to its devices, in which order, and that it waits for none of it; devices are fakes."""

import types

import numpy as np
import pytest

from svd2_jax.api import SessionSpec
from svd2_jax.config import StreamConfig
from svd2_jax.engine.pipeline import Finished
from svd2_jax.engine.programs import CodecPrograms
from svd2_jax.engine.session import DeviceSession, tick_sessions

CFG = StreamConfig(height=16, width=16)
CHUNKS = 4


class Pending:
    """A result that a device still works on; whoever waits for it is written down."""

    def __init__(self, log, name, frames=0):
        self.log, self.name, self.frames_there = log, name, frames

    def copy_to_host_async(self):
        self.log.append(f"copy {self.name}")

    def block_until_ready(self):
        self.log.append(f"wait {self.name}")
        return self

    def __array__(self, dtype=None, copy=None):
        self.log.append(f"read {self.name}")
        return np.zeros((self.frames_there, CFG.height, CFG.width, 3), np.uint8)


class FakeMesh:
    """Stages that are all in this process."""

    def is_local(self, stage):
        return True


class FakePipeline:
    """A denoiser that finishes each chunk with the tick it enters with."""

    steps, first_timestep, cfg, split = 1, None, CFG, (1,)
    mesh = FakeMesh()

    def __init__(self, log):
        self.log, self.ticks, self.came_back = log, 0, ()

    def first_group(self, noisy, again):
        self.log.append("tick 0")
        return Pending(self.log, "latents 0")

    def entering(self, fresh):
        return [self.ticks + 1 if fresh else None]

    def tick(self, arrival):
        self.ticks += 1
        self.log.append(f"tick {self.ticks}")
        self.came_back = (Pending(self.log, f"latents {self.ticks}"),)
        return [Finished(self.ticks, self.came_back[0])]

    def own(self, latents):
        return latents

    def close(self):
        pass


@pytest.fixture
def log():
    return []


@pytest.fixture
def session(log, monkeypatch):
    def tick_together(lines, arrivals):
        return [line.tick(arrival) for line, arrival in zip(lines, arrivals, strict=True)]

    monkeypatch.setattr("svd2_jax.engine.session.tick_together", tick_together)

    def program(name, *results):
        count = iter(range(1, 100))

        def run(*args):
            log.append(f"{name} {next(count)}")
            return tuple(Pending(log, result) for result in results)

        return run

    def first(name, *results):
        def run(*args):
            log.append(f"{name} 0")
            return tuple(results)

        return run

    def decode(params, state, latents):
        number = latents.name.removeprefix("latents ")
        log.append(f"decode {number}")
        return state, Pending(log, f"frames {number}", CFG.chunk_frames)

    ends = CodecPrograms(
        frames=None, scale=None, draw_first=None, blend=None,
        encode_first=first("encode", Pending(log, "state"), Pending(log, "noisy")),
        encode=program("encode", "state", "noisy", "timestep"),
        decode_first=first("decode", Pending(log, "state"), Pending(log, "frames 0", CFG.first_frames)),
        decode=decode,
    )  # fmt: skip
    noise = types.SimpleNamespace(first=lambda: (None, ()), chunk=lambda entering: (None, ()))
    prompts = types.SimpleNamespace(encode=lambda prompt: np.zeros((1, 1, 1), np.float32))
    params = types.SimpleNamespace(
        dit=types.SimpleNamespace(dtype=np.dtype(np.float32)), encoder=None, decoder=None
    )
    spec = SessionSpec("a dog", CFG)
    return DeviceSession(spec, params, ends, prompts, lambda embedding: FakePipeline(log), None, noise)


def clip(chunks):
    return np.zeros((CFG.first_frames + chunks * CFG.chunk_frames, CFG.height, CFG.width, 3), np.uint8)


def handed_over(number):
    return [f"encode {number}", f"tick {number}", f"decode {number}", f"copy frames {number}"]


def test_the_next_chunk_is_handed_over_before_the_frames_of_one_are_waited_for(session, log):
    for _ in session.run(clip(CHUNKS)):
        pass
    expected = handed_over(0)
    for number in range(1, CHUNKS + 1):
        expected += [*handed_over(number), f"read frames {number - 1}"]
    assert log == [*expected, f"read frames {CHUNKS}"]


def test_pushing_frames_waits_for_nothing(session, log):
    chunks = session.push(clip(CHUNKS))
    assert log == [step for number in range(CHUNKS + 1) for step in handed_over(number)]
    chunks[1].frames()
    assert log[-1] == "read frames 1"


def test_a_shared_tick_is_handed_over_behind_a_decoder_that_is_still_at_work(session, log):
    frames = clip(1)
    for part in (frames[: CFG.first_frames], frames[CFG.first_frames :]):
        ticket = tick_sessions([(session, part)], (1,))
    assert log == [*handed_over(0), *handed_over(1)]
    ticket.wait_stages()
    assert log[8:] == ["wait latents 1"]
    ticket.wait()
    assert set(log[9:]) == {"wait frames 1", "wait latents 1"}
