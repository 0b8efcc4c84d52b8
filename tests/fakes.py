"""A fake engine whose output is worked out by hand, and a clock that goes on when all threads have nothing to do.

A finished frame is the input frame, changed so that one sees what happened to it:
  channel 0: the input's, plus the length of the prompt, modulo 256;
  channel 1: denoising steps that its chunk has taken;
  channel 2: the input's.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from svd2_jax.api import SessionSpec, TickInput
from svd2_jax.config import StreamConfig
from svd2_jax.errors import SessionError
from svd2_jax.rows import InFlight, Rows
from svd2_jax.runtime.types import MS, SECOND

SMALL = StreamConfig(height=16, width=16)
NEVER_NS = 10**18
ROUNDS = 3  # of the polling below: a thread that wakes another one that wakes a third is seen through


class FakeClock:
    """A clock for threads that wait with `wait` only; see `svd2_jax.runtime.loop.Clock`.

    It stands still until `run` or `run_until`, and then jumps from one moment that somebody waits for to the next,
    once all threads whose names begin with "svd2-" have come to wait.
    """

    def __init__(self, start_ns: int = 1000 * SECOND):
        self._now_ns = start_ns
        self._lock = threading.Lock()
        self._waiting: dict[threading.Thread, tuple[int, int | None]] = {}  # times waited, until when
        self._woken = 0  # waits that another thread ended

    def now_ns(self) -> int:
        return self._now_ns

    def wait(self, condition: threading.Condition, until_ns: int | None) -> None:
        thread = threading.current_thread()
        with self._lock:
            count, _ = self._waiting.get(thread, (0, None))
            self._waiting[thread] = (count + 1, until_ns)
        if condition.wait(0.001):  # everybody looks again and again, as the time may have come
            self._woken += 1

    def settle(self) -> None:
        """Returns when all threads wait, and nothing that one of them did wakes another."""
        goal: dict[threading.Thread, int] = {}
        late: list[str] = []
        woken = self._woken
        for _ in range(20_000):
            if woken != self._woken:
                woken = self._woken
                goal.clear()
            alive = [t for t in threading.enumerate() if t.name.startswith("svd2-")]
            with self._lock:
                self._waiting = {t: w for t, w in self._waiting.items() if t.is_alive()}
                counts = {t: self._waiting.get(t, (0, None))[0] for t in alive}
            for thread, count in counts.items():
                goal.setdefault(thread, count + ROUNDS)
            late = [thread.name for thread, count in counts.items() if count < goal[thread]]
            if not late:
                return
            time.sleep(0.0005)
        raise AssertionError(f"threads do not come to rest: {late}")

    def run_until(self, is_so: Callable[[], object], limit_s: float = 60.0) -> None:
        """Lets the time go on until something is so."""
        end_ns = self._now_ns + round(limit_s * SECOND)
        idle = 0
        self.settle()
        while not is_so():
            with self._lock:
                times = [until for _, until in self._waiting.values() if until is not None]
            times = [t for t in times if t > self._now_ns]
            idle = (
                0 if times else idle + 1
            )  # threads that only pass something to and fro take more than one look
            assert idle < 1000, "nobody waits for a time"
            assert self._now_ns < end_ns, f"not so after {limit_s} s"
            self._now_ns = min(times, default=self._now_ns)
            self.settle()

    def run(self, seconds: float) -> None:
        """Lets the time go on for so long."""
        end_ns = self._now_ns + round(seconds * SECOND)
        self.settle()
        while self._now_ns < end_ns:
            with self._lock:
                times = [until for _, until in self._waiting.values() if until is not None]
            self._now_ns = min([t for t in times if t > self._now_ns] + [end_ns])
            self.settle()

    def sleep_until(self, until_ns: int) -> None:
        """Waits, in a thread of a test."""
        condition = threading.Condition()
        with condition:
            while self._now_ns < until_ns:
                self.wait(condition, until_ns)


def picture(value: int, cfg: StreamConfig = SMALL) -> np.ndarray:
    """A frame that can be told from others."""
    return np.full((cfg.height, cfg.width, 3), value % 256, np.uint8)


def camera(
    clock: FakeClock, count: int, rate_hz: float = 16.0, first: int = 0, stamped: bool = True
) -> Iterator[tuple[int | None, np.ndarray]]:
    """A source that gives pictures of first, first + 1, ... at a rate, from now on."""
    start_ns = clock.now_ns()
    for i in range(count):
        at_ns = start_ns + round(i * SECOND / rate_hz)
        clock.sleep_until(at_ns)
        yield at_ns if stamped else None, picture(first + i)


@dataclass(frozen=True)
class FakeChunk:
    """Finished frames."""

    first_frame: int
    pixels: np.ndarray
    error: Exception | None = None
    before_read: Callable[[], object] = lambda: None

    @property
    def frame_count(self) -> int:
        return len(self.pixels)

    def frames(self) -> np.ndarray:
        self.before_read()
        if self.error is not None:
            raise self.error
        return self.pixels

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.frames(), dtype, copy=copy)


@dataclass(frozen=True, eq=False)
class _Entered:
    """What a chunk came in with."""

    frames: np.ndarray
    prompt: int


class FakeSession:
    """A stream whose chunk is finished by its (steps)-th tick; see `svd2_jax.api.Session`."""

    def __init__(self, engine: FakeEngine, spec: SessionSpec):
        self.spec = spec
        self._engine = engine
        self._rows: Rows[_Entered] = Rows(spec.config.steps)
        self._prompts = [len(spec.prompt)]  # of the next chunks, the last one staying
        self._given = 0
        self.noise_scale = spec.noise_scale
        self.started = self.closed = False

    @property
    def steps(self) -> int:
        return self._rows.steps

    def set_steps(self, steps: int) -> None:
        self._check_open()
        if steps in self._engine.forbidden_steps:
            raise SessionError(f"no programs for {steps} steps")
        self._rows = self._rows.with_steps(steps)

    def set_prompt(self, prompt: str, blend_chunks: int = 0) -> None:
        self._check_open()
        assert prompt in self._engine.prepared_prompts, "the stream would wait for the text encoder"
        before, after, count = self._prompts[0], len(prompt), max(1, blend_chunks)
        self._prompts = [before + (after - before) * i // count for i in range(1, count + 1)]

    def set_noise_scale(self, noise_scale: float) -> None:
        self._check_open()
        self.noise_scale = noise_scale

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self._engine.open_sessions -= 1

    def tick(self, frames: np.ndarray | None) -> list[FakeChunk]:
        """Moves the rows on, with or without a new chunk."""
        self._check_open()
        expected = self.spec.config.chunk_frames if self.started else self.spec.config.first_frames
        if frames is not None and len(frames) != expected:
            raise SessionError(f"expected {expected} frames, got {len(frames)}")
        if not self.started and frames is None:
            raise SessionError("nothing has started")
        entering = None
        if frames is not None:
            entering = _Entered(frames, self._prompts[0])
            self._prompts = self._prompts[1:] or self._prompts
        self._rows, done = self._rows.enter(entering, whole=not self.started).leave()
        self.started = True
        return [self._finished(held) for held in done]

    def _finished(self, held: InFlight[_Entered]) -> FakeChunk:
        pixels = held.chunk.frames.copy()
        pixels[..., 0] += np.uint8(held.chunk.prompt % 256)
        pixels[..., 1] = held.steps
        self._given += len(pixels)
        return FakeChunk(self._given - len(pixels), pixels, self._engine.read_error, self._engine.before_read)

    def _check_open(self) -> None:
        if self.closed:
            raise SessionError("the session is closed")


@dataclass(frozen=True)
class FakeTicket:
    """A tick under way."""

    chunks: Sequence[Sequence[FakeChunk]]
    wait_stages: Callable[[], None]
    wait: Callable[[], None]


class FakeEngine:
    """An engine without a model; see `svd2_jax.api.Engine`.

    Attributes:
      device_ms: time of a tick in the stages, from the number of streams, their steps, and whether it is a first group.
      tail_ms: time in which its frames are finished behind them, while the next tick runs.
      fault: is called with the number of each tick and its sessions, and may raise.
      stages_fault: is called with the number of each tick when its stages are waited for, and may raise.
      finish_fault: the same when all of it is waited for.
      hang: numbers of ticks that never come back.
      hang_behind: numbers of ticks whose stages do, and their frames never.
      forbidden_steps: set_steps raises for these.
      read_error: reading a chunk that was made while this is set raises it.
      before_read: is called whenever a chunk is read.
      prompt_error: encoding a prompt raises it.
      ticks: (streams, steps) of each tick so far.
    """

    def __init__(
        self,
        clock: FakeClock | None = None,
        device_ms: Callable[[int, int, bool], float] = lambda streams, steps, first: 20.0,
        batch_sizes: Sequence[int] = (1, 2, 4),
    ):
        self._clock, self.device_ms, self.batch_sizes = clock, device_ms, tuple(batch_sizes)
        self.tail_ms = 0.0
        self.fault: Callable[[int, Sequence[FakeSession]], None] = lambda number, sessions: None
        self.stages_fault: Callable[[int], object] = lambda number: None
        self.finish_fault: Callable[[int], object] = lambda number: None
        self.hang: set[int] = set()
        self.hang_behind: set[int] = set()
        self.forbidden_steps: set[int] = set()
        self.read_error: Exception | None = None
        self.before_read: Callable[[], object] = lambda: None
        self.prompt_error: Exception | None = None
        self.open_error: Exception | None = None
        self.ticks: list[tuple[int, int]] = []
        self.prepared: set[int] = set()
        self.prepared_prompts: set[str] = set()
        self.sessions: list[FakeSession] = []
        self.open_sessions = 0

    def stream_config(self, **settings: Any) -> StreamConfig:
        return dataclasses.replace(SMALL, **settings)

    def resolved(self, spec: SessionSpec) -> SessionSpec:
        return spec if spec.stream is not None else dataclasses.replace(spec, stream=SMALL)

    def open(self, spec: SessionSpec, steps: Sequence[int] = ()) -> FakeSession:
        if self.open_error is not None:
            raise self.open_error
        self.open_sessions += 1
        return FakeSession(self, spec)

    def prepare(self, spec: SessionSpec, steps: Sequence[int]) -> None:
        self.prepared |= set(steps)

    def measure_split(self, spec: SessionSpec) -> None:
        pass

    def prepare_prompt(self, prompt: str) -> None:
        if self.prompt_error is not None:
            raise self.prompt_error
        self.prepared_prompts.add(prompt)

    def tick(self, work: Sequence[TickInput]) -> FakeTicket:
        sessions = [part.session for part in work if isinstance(part.session, FakeSession)]
        assert len(sessions) == len(work)
        assert len({session.steps for session in sessions}) == 1, "one tick has one number of steps"
        number, first, steps = len(self.ticks), not sessions[0].started, sessions[0].steps
        assert len(sessions) in self.batch_sizes
        assert len(sessions) == 1 or not first, "a first group has its tick for itself"
        self.ticks.append((len(sessions), steps))
        self.fault(number, sessions)
        stages_ns = round(self.device_ms(len(sessions), steps, first) * MS)
        chunks = [session.tick(part.frames) for session, part in zip(sessions, work, strict=True)]
        started_ns = self._now_ns()
        free_ns = started_ns + (NEVER_NS if number in self.hang else stages_ns)
        done_ns = free_ns + (NEVER_NS if number in self.hang_behind else round(self.tail_ms * MS))

        def wait_stages() -> None:
            self._sleep_until(free_ns)
            self.stages_fault(number)

        def wait() -> None:
            self._sleep_until(done_ns)
            self.finish_fault(number)

        return FakeTicket(chunks, wait_stages, wait)

    def _now_ns(self) -> int:
        return time.monotonic_ns() if self._clock is None else self._clock.now_ns()

    def _sleep_until(self, until_ns: int) -> None:
        if self._clock is None:
            time.sleep(max(0, until_ns - time.monotonic_ns()) / SECOND)
        else:
            self._clock.sleep_until(until_ns)


def spec(prompt: str = "a red house", steps: int = 2, **settings: object) -> SessionSpec:
    """What a small stream computes."""
    return SessionSpec(prompt, stream=dataclasses.replace(SMALL, **settings).with_steps(steps))


def expected(
    values: Iterable[int], prompt: str = "a red house", steps: int = 2
) -> list[tuple[int, int, int]]:
    """What the fake engine makes of pictures of these values, as pixels."""
    return [((v + len(prompt)) % 256, steps, v % 256) for v in values]
