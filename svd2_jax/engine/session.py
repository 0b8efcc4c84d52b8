"""One stream: frames in, re-drawn frames out. Offline files, servers and benchmarks drive this same object."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import jax
import numpy as np

from svd2_jax.api import SessionSpec, check_noise_scale, check_prompt
from svd2_jax.config import check_whole
from svd2_jax.engine.chunks import DeviceChunk, DeviceTicket, cut, read
from svd2_jax.engine.noise import NoiseSource
from svd2_jax.engine.params import EngineParams
from svd2_jax.engine.pipeline import Finished, Pipeline, PipelineInput, tick_together
from svd2_jax.engine.programs import CodecPrograms
from svd2_jax.engine.prompt import Prompts
from svd2_jax.errors import SessionError
from svd2_jax.text import counted
from svd2_jax.types import Device

Verb = TypeVar("Verb", bound=Callable[..., Any])


def _one_at_a_time(verb: Verb) -> Verb:
    """Lets a verb of a session wait until no other thread is handing work to the devices."""

    @functools.wraps(verb)
    def waiting(self: DeviceSession, *args: Any, **kwargs: Any) -> Any:
        with self._lock:
            return verb(self, *args, **kwargs)

    return waiting  # pyright: ignore[reportReturnType]


class DeviceSession:
    """A session on the stages of one pipeline; see `api.Session` for the verbs.

    Everything is dispatched without waiting: a chunk's frames are waited for only when they are read.
    """

    def __init__(
        self,
        spec: SessionSpec,
        params: EngineParams,
        programs: CodecPrograms,
        prompts: Prompts,
        pipeline: Callable[[jax.Array], Pipeline],
        device: Device,
        noise: NoiseSource,
        lock: AbstractContextManager[Any] | None = None,
        is_prepared: Callable[[int], bool] = lambda _: True,
        on_close: Callable[[DeviceSession], None] = lambda _: None,
    ):
        """Opens the session.

        Args:
          spec: what to do.
          params: that its programs read.
          programs: of its two ends.
          prompts: the text encoder.
          pipeline: makes the denoiser for a text embedding on `device`.
          device: where inputs go.
          noise: where Gaussians come from.
          lock: held while work is handed to the devices, by all sessions on them; one thread may take it several times.
            None: a lock of its own.
          is_prepared: whether these denoising steps compile nothing.
          on_close: is told of the end.
        """
        self.spec = spec
        self._cfg = spec.config
        self._lock, self._is_prepared = lock or threading.RLock(), is_prepared
        self._params, self._programs, self._prompts, self._device = params, programs, prompts, device
        self._noise = noise
        self._embedding = self._target = self._embed(spec.prompt)
        self._blend_steps: list[jax.Array] = []
        self._blend_from = self._embedding
        self._pipeline = pipeline(self._embedding)
        self._noise_scale = self._put_scale(spec.noise_scale)
        self._input = self._decoder = None
        self._waiting: list[np.ndarray] = []  # input frames that do not fill a chunk yet
        self._taken = self._given = 0
        self._started = False
        self._closed = self._finished = False
        self._on_close = on_close

    def __repr__(self) -> str:
        cfg, state = self._cfg, "closed" if self._closed else "finished" if self._finished else "open"
        return (
            f"<DeviceSession {self.spec.prompt!r}: {cfg.width}x{cfg.height}, {cfg.task}, {state}, "
            f"frames in {self._taken}, out {self._given}>"
        )

    @property
    def has_output(self) -> bool:
        """Whether finished frames come out in this process: the one that drives the last stage."""
        return self._programs.decode is not None

    @property
    def steps(self) -> int:
        """Denoising steps of the chunks that enter now."""
        self._check_open()
        return self._pipeline.steps

    @property
    def pipeline(self) -> Pipeline:
        """The denoiser."""
        return self._pipeline

    # --- the verbs of api.Session

    @_one_at_a_time
    def push(self, frames: np.ndarray) -> list[DeviceChunk]:
        """Takes input frames, uint8 [T, H, W, 3] or one [H, W, 3], and returns the chunks they complete."""
        self._check_open()
        if self._cfg.task != "v2v":
            raise SessionError("a text-to-video session takes no frames; call advance()")
        frames = self._checked_frames(frames)
        self._taken += len(frames)
        self._waiting.extend(frames.copy())  # the caller may reuse its buffer
        done = []
        while len(self._waiting) >= (need := self._next_frames()):
            group, self._waiting = np.stack(self._waiting[:need]), self._waiting[need:]
            done += self._tick(group)
        return done

    @_one_at_a_time
    def advance(self) -> list[DeviceChunk]:
        """Makes the next chunk of a text-to-video session."""
        self._check_open()
        if self._cfg.task != "t2v":
            raise SessionError("a video-to-video session needs frames; call push(frames)")
        self._taken += self._next_frames()
        return self._tick(None)

    @_one_at_a_time
    def finish(self) -> list[DeviceChunk]:
        """Returns the frames still under way, so that as many come out as went in.

        The last chunk is filled up by repeating the last frame, and ticks without a new chunk push on what the
        rows and stages hold; frames beyond the input's length are cut off.
        """
        self._check_open()
        self._finished = True
        done: list[DeviceChunk] = []
        if self._waiting:
            fill = [self._waiting[-1]] * (self._next_frames() - len(self._waiting))
            group, self._waiting = np.stack([*self._waiting, *fill]), []
            done += self._tick(group)
        while self._given < self._taken:
            done += self._tick(None, fresh=False)
        return [cut(chunk, self._taken) for chunk in done]

    @_one_at_a_time
    def set_steps(self, steps: int) -> None:
        """Changes the denoising steps from the next chunk on; see `api.Session` and docs/streaming.md.

        Raises:
          ConfigError: there are no timesteps for so many.
          SessionError: the session is closed, or these steps were not prepared.
        """
        self._check_open()
        self._cfg.with_steps(steps)
        if steps == self.steps:
            return
        if not self._is_prepared(steps):
            raise SessionError(
                f"{counted(steps, 'denoising step')} would have to be compiled, which holds the stream up for "
                f"seconds or minutes; open it with engine.open(spec, steps=({self._cfg.steps}, {steps})), or call "
                f"engine.prepare(spec, ({self._cfg.steps}, {steps})) first, in another thread if the stream is to go on"
            )
        self._pipeline.set_steps(steps)

    def set_prompt(self, prompt: str, blend_chunks: int = 0) -> None:
        """Changes the prompt from the next chunk on, at once or linearly over `blend_chunks` chunks.

        Chunks already under way keep the prompt that they came in with; the stream does not restart. This waits
        for the text encoder, unless the prompt was encoded before (`engine.prompts.encode(prompt)`).
        """
        self._check_open()
        check_prompt(prompt)
        check_whole("blend_chunks", blend_chunks, 0)
        target, count = self._embed(prompt), max(1, blend_chunks)
        with self._lock:
            self._check_open()
            self._blend_from, self._target = self._embedding, target
            self._blend_steps = [self._put(np.float32(i / count)) for i in range(1, count + 1)]

    @_one_at_a_time
    def set_noise_scale(self, noise_scale: float) -> None:
        """Changes the share of noise from the next chunk on; see `api.Session`. Nothing is compiled for it."""
        self._check_open()
        if self._cfg.task != "v2v":
            raise SessionError(
                "a text-to-video session starts from noise alone; its noise scale cannot change"
            )
        check_noise_scale(noise_scale)
        self._noise_scale = self._put_scale(noise_scale)

    def run(
        self,
        frames: Iterable[np.ndarray] | None = None,
        count: int | None = None,
        prompts: Mapping[int, str] | None = None,
        blend_chunks: int = 0,
        on_step: Callable[[], object] = lambda: None,
    ) -> Iterator[np.ndarray]:
        """Streams a clip and yields finished frames [T, H, W, 3], one chunk behind the device.

        Yields nothing where another process has the last stage, and has to be run to its end there too.

        Args:
          frames: input frames, an iterable of uint8 [H, W, 3] or [T, H, W, 3], or one array of them (video-to-video).
          count: how many frames to make (text-to-video).
          prompts: prompt changes by frame: the chunk that holds this input (or output) frame is the first to
            be drawn to the new prompt.
          blend_chunks: see `set_prompt`.
          on_step: called whenever a chunk was handed to the device, and whenever one was waited for.

        Raises:
          SessionError: the session cannot be run like this; see also `push`.
          ConfigError: a prompt or a number cannot be what it is.
        """
        self._check_open()
        if self._cfg.task == "v2v":
            if not isinstance(frames, Iterable) or isinstance(frames, (str, bytes)):
                raise SessionError(
                    f"video to video needs the frames, arrays uint8 [H, W, 3], got {type(frames).__name__}; "
                    "media.VideoReader(path, height, width) reads them from a file"
                )
        elif frames is not None:
            raise SessionError("a text-to-video session takes no frames; pass count")
        elif count is None:
            raise SessionError("text-to-video needs to know how many frames to make; pass count")
        if count is not None:
            check_whole("count", count, 1)
        check_whole("blend_chunks", blend_chunks, 0)
        if not isinstance(prompts or {}, Mapping):
            raise SessionError(f"prompts are a dict of frame: prompt, got {type(prompts).__name__}")
        for frame, prompt in (prompts or {}).items():
            check_whole("the frame of a prompt", frame, 0)
            check_prompt(prompt)
        changes = sorted((prompts or {}).items())
        for _, prompt in changes:  # now, so that no change makes the stream wait for the text encoder
            self._prompts.encode(prompt)
        return self._run_frames(frames, count, changes, blend_chunks, on_step)

    def _run_frames(self, frames, count, changes, blend_chunks, on_step) -> Iterator[np.ndarray]:
        held: list[DeviceChunk] = []
        for done in self._run_chunks(frames, count, changes, blend_chunks):
            on_step()
            # Reading waits for the device: read a chunk only once the next one is under way.
            yield from read(held, on_step)
            held = done
        yield from read(held, on_step)

    def parts_apart(self, frames: np.ndarray | None, count: int) -> Iterator[tuple[int, bool, int, Any]]:
        """Dispatches the parts of a chunk again and again, so that they can be timed; see `measure_stages`.

        Encodes `count + 1` times. Runs the stages `count` times with the hand-over, behind which all begin at once, and
        each time once more without, so that none waits for another. Decodes `count + 1` times. The stream is of no use
        afterwards.

        Yields, in the order in which devices work, the stage, whether it is its blocks or the rest,
        `time.monotonic_ns` before the part was dispatched, and what is there when the device is through with it.
        """
        pipeline, mesh = self._pipeline, self._pipeline.mesh
        arrival: Any = None
        for _ in range(count + 1):
            given_ns = time.monotonic_ns()
            arrival = self._take_in(frames, fresh=True)
            if self._has_input:
                yield 0, False, given_ns, arrival.noisy
        for run in (pipeline.tick, pipeline.tick_apart) * count:
            given_ns = time.monotonic_ns()
            run(arrival)
            for stage in mesh.local_stages:
                yield stage, True, given_ns, mesh.part(pipeline.came_back, stage)
        for _ in range(count + 1):
            given_ns = time.monotonic_ns()
            (chunk,) = self._bring_out([Finished(0, pipeline.came_back[-1])])
            if self.has_output:
                yield mesh.stages - 1, False, given_ns, chunk.result

    @_one_at_a_time
    def close(self) -> None:
        """Frees the stream's device memory; a second close does nothing."""
        if self._closed:
            return
        self._closed = True
        self._on_close(self)
        self._input = self._decoder = None
        self._waiting = []
        self._pipeline.close()

    def __enter__(self) -> DeviceSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- inner workings

    def _run_chunks(self, frames, count, changes, blend_chunks) -> Iterator[list[DeviceChunk]]:
        def change_prompt(next_group_ends: int) -> None:
            while changes and changes[0][0] < next_group_ends:
                self.set_prompt(changes.pop(0)[1], blend_chunks)

        if frames is None:
            while self._taken < count:
                change_prompt(self._taken + self._next_frames())
                yield [cut(chunk, count) for chunk in self.advance()]
            yield [cut(chunk, count) for chunk in self.finish()]
            return
        for frame in (frame for some in frames for frame in self._checked_frames(some)):
            if len(self._waiting) + 1 == self._next_frames():
                change_prompt(self._taken + 1)
            if done := self.push(frame):
                yield done
        change_prompt(self._taken)
        yield self.finish()

    def _next_frames(self) -> int:
        return self._cfg.chunk_frames if self._started else self._cfg.first_frames

    def check_part(self, frames: np.ndarray | None) -> None:
        """Raises SessionError for what cannot be this session's part of a tick."""
        self._check_open()
        if self._cfg.task != "v2v" or self._waiting:
            raise SessionError(
                "a session shares ticks only in video to video, and without frames left by push()"
            )
        if frames is None:
            if not self._started:
                raise SessionError("a session starts with its first group; pass its frames")
            return
        frames = self._checked_frames(frames)
        if len(frames) != self._next_frames():
            raise SessionError(f"this part of a tick takes {self._next_frames()} frames, got {len(frames)}")

    def _checked_frames(self, frames: np.ndarray) -> np.ndarray:
        """Returns frames as [T, H, W, 3]; raises SessionError for what are none."""
        expected = (self._cfg.height, self._cfg.width, 3)
        if not isinstance(frames, np.ndarray):
            raise SessionError(f"frames must be a numpy array [T, H, W, 3], got {type(frames).__name__}")
        if frames.ndim == 3:
            frames = frames[None]
        if frames.ndim != 4 or frames.shape[1:] != expected or frames.dtype != np.uint8:
            raise SessionError(
                f"frames must be uint8 [T, {', '.join(map(str, expected))}], got {frames.dtype} {frames.shape}"
            )
        return frames

    @property
    def is_started(self) -> bool:
        """Whether the first group was taken in."""
        return self._started

    def _tick(self, frames: np.ndarray | None, fresh: bool = True) -> list[DeviceChunk]:
        """Dispatches a tick of this session alone, with or without a new chunk; returns what finishes with it."""
        return _tick_batch([(self, frames, fresh)])[0]

    def _first_group(self, frames: np.ndarray | None) -> list[DeviceChunk]:
        programs = self._programs
        self._started = True
        noisy, again = self._noise.first() if self._has_input else (None, ())
        if programs.encode_first is not None:
            self._input, noisy = programs.encode_first(
                self._params.encoder, jax.device_put(frames, programs.frames), noisy, self._noise_scale
            )
        pixels = self._pipeline.own(self._pipeline.first_group(noisy, again))
        if programs.decode_first is not None:
            self._decoder, pixels = programs.decode_first(self._params.decoder, pixels)
        return [self._chunk(pixels, self._cfg.first_frames)]

    def _take_in(self, frames: np.ndarray | None, fresh: bool) -> PipelineInput:
        """Dispatches what comes before the stages."""
        programs, pipeline = self._programs, self._pipeline
        noisy, again = self._noise.chunk(pipeline.entering(fresh)) if self._has_input else (None, ())
        timestep = pipeline.first_timestep
        if programs.encode is not None and fresh:
            self._input, noisy, timestep = programs.encode(
                self._params.encoder,
                self._input,
                jax.device_put(frames, programs.frames),
                noisy,
                self._noise_scale,
            )
        return PipelineInput(noisy, timestep, again, fresh)

    def _bring_out(self, finished: Sequence[Finished]) -> list[DeviceChunk]:
        """Dispatches what comes behind the stages; returns the finished chunks."""
        programs, pipeline, chunks = self._programs, self._pipeline, []
        for done in finished:
            pixels = pipeline.own(done.clean)
            if programs.decode is not None:
                self._decoder, pixels = programs.decode(self._params.decoder, self._decoder, pixels)
            chunks.append(self._chunk(pixels, self._cfg.chunk_frames))
        return chunks

    def _chunk(self, pixels: jax.Array, count: int) -> DeviceChunk:
        if self.has_output:
            with jax.transfer_guard_device_to_host(
                "allow"
            ):  # jax 0.12 does not count it as meant where it is
                pixels.copy_to_host_async()
        self._given += count
        return DeviceChunk(self._given - count, count, pixels, self.has_output)

    @property
    def _has_input(self) -> bool:
        return self._pipeline.mesh.is_local(0)

    def _update_prompt(self) -> None:
        if self._blend_steps:
            self._embedding = self._programs.blend(self._blend_from, self._target, self._blend_steps.pop(0))
            self._pipeline.set_prompt(self._embedding)

    def _embed(self, prompt: str) -> jax.Array:
        return self._put(self._prompts.encode(prompt).astype(self._params.dit.dtype))

    def _put_scale(self, noise_scale: float) -> jax.Array:
        return jax.device_put(np.float32(noise_scale), self._programs.scale or self._device)

    def _put(self, x: object) -> jax.Array:
        return jax.device_put(x, self._device)

    def _check_open(self) -> None:
        if self._closed or self._finished:
            raise SessionError(f"the session is {'closed' if self._closed else 'finished'}; open a new one")


def tick_sessions(
    parts: Sequence[tuple[DeviceSession, np.ndarray | None]], batch_sizes: Sequence[int]
) -> DeviceTicket:
    """Dispatches one tick of several sessions, see `api.Engine.tick`; each part has passed `check_part`.

    Sessions that have the same devices, sizes and rows share programs, as many at once as the largest batch size that
    they fill; the others follow one another.
    """
    groups: dict[Hashable, list[int]] = {}
    for i, (session, frames) in enumerate(parts):
        session._taken += 0 if frames is None else len(frames)
        line = session.pipeline
        groups.setdefault((line.cfg, line.mesh, line.split) if session.is_started else i, []).append(i)
    chunks: list[list[DeviceChunk]] = [[] for _ in parts]
    for group in groups.values():
        while group:
            size = max(size for size in batch_sizes if size <= len(group))
            batch, group = group[:size], group[size:]
            entering = [(*parts[i], parts[i][1] is not None) for i in batch]
            for i, done in zip(batch, _tick_batch(entering), strict=True):
                chunks[i] = done
    return DeviceTicket(chunks, [session.pipeline.came_back for session, _ in parts])


def _tick_batch(
    parts: Sequence[tuple[DeviceSession, np.ndarray | None, bool]],
) -> list[list[DeviceChunk]]:
    """Dispatches one tick of sessions that share their programs, or the first group of one session.

    Each part is the session, its frames, and whether something new enters.
    """
    for session, _, fresh in parts:
        if fresh:
            session._update_prompt()
    lead, frames, _ = parts[0]
    if not lead.is_started:
        return [lead._first_group(frames)]
    arrivals = [session._take_in(frames, fresh) for session, frames, fresh in parts]
    finished = tick_together([session.pipeline for session, _, _ in parts], arrivals)
    return [session._bring_out(done) for (session, _, _), done in zip(parts, finished, strict=True)]
