"""One stream: frames in, re-drawn frames out. Offline files, servers and benchmarks drive this same object."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import jax
import numpy as np

from svd2_jax.api import SessionSpec, check_prompt
from svd2_jax.engine.noise import NoiseSource, SeededNoise
from svd2_jax.engine.params import EngineParams
from svd2_jax.engine.pipeline import Pipeline
from svd2_jax.engine.programs import EndPrograms
from svd2_jax.engine.prompt import Prompts
from svd2_jax.errors import ConfigError, SessionError
from svd2_jax.types import Device


@dataclass(frozen=True)
class DeviceChunk:
    """A finished chunk whose frames are still on the device or on their way to the host; see `api.Chunk`.

    Attributes:
      first_frame: index of its first frame in the output.
      frame_count: frames in it.
      result: the frames; where another process has the last stage, something that is there when they are.
      is_here: whether this process has the frames.
    """

    first_frame: int
    frame_count: int
    result: jax.Array
    is_here: bool = True

    def frames(self) -> np.ndarray:
        """Waits for the frames [T, H, W, 3]."""
        if not self.is_here:
            raise SessionError("these frames are in the process that drives the last stage; read them there")
        return np.asarray(self.result)[: self.frame_count]

    def wait(self) -> None:
        """Waits until the chunk is finished as far as this process works on it."""
        self.result.block_until_ready()


class DeviceSession:
    """A session on the stages of one pipeline; see `api.Session` for the verbs.

    Everything is dispatched without waiting: a chunk's frames are waited for only when they are read.
    """

    def __init__(
        self,
        spec: SessionSpec,
        params: EngineParams,
        programs: EndPrograms,
        prompts: Prompts,
        pipeline: Callable[[jax.Array], Pipeline],
        device: Device,
        noise: NoiseSource | None = None,
        on_close: Callable[[DeviceSession], None] = lambda _: None,
    ):
        """Opens the session; `pipeline` makes the denoiser for a text embedding on `device`, where inputs go."""
        self.spec = spec
        self._cfg = spec.stream
        self._params, self._programs, self._prompts, self._device = params, programs, prompts, device
        self._noise = noise or SeededNoise(programs.draw_first, programs.draw_chunk, spec.seed, device)
        self._embedding = self._target = self._embed(spec.prompt)
        self._blend_steps: list[jax.Array] = []
        self._blend_from = self._embedding
        self._pipeline = pipeline(self._embedding)
        self._noise_scale = self._put(np.float32(spec.noise_scale))
        self._input = self._decoder = None
        self._waiting: list[np.ndarray] = []  # input frames that do not fill a chunk yet
        self._taken = self._given = self._ticks = 0
        self._closed = self._finished = False
        self._on_close = on_close

    @property
    def has_output(self) -> bool:
        """Whether finished frames come out in this process: the one that drives the last stage."""
        return self._programs.decode is not None

    # --- the verbs of api.Session

    def push(self, frames: np.ndarray) -> list[DeviceChunk]:
        """Takes input frames, uint8 [T, H, W, 3], and returns the chunks they complete."""
        self._check_open()
        if self._cfg.task != "v2v":
            raise SessionError("a text-to-video session takes no frames; call advance()")
        expected = (self._cfg.height, self._cfg.width, 3)
        if not isinstance(frames, np.ndarray):
            raise SessionError(f"frames must be a numpy array [T, H, W, 3], got {type(frames).__name__}")
        if frames.ndim != 4 or frames.shape[1:] != expected or frames.dtype != np.uint8:
            raise SessionError(
                f"frames must be uint8 [T, {', '.join(map(str, expected))}], got {frames.dtype} {frames.shape}"
            )
        self._taken += len(frames)
        self._waiting.extend(frames.copy())  # the caller may reuse its buffer
        done = []
        while len(self._waiting) >= (need := self._next_frames()):
            group, self._waiting = np.stack(self._waiting[:need]), self._waiting[need:]
            done += self._submit(group)
        return done

    def advance(self) -> list[DeviceChunk]:
        """Makes the next chunk of a text-to-video session."""
        self._check_open()
        if self._cfg.task != "t2v":
            raise SessionError("a video-to-video session needs frames; call push(frames)")
        self._taken += self._next_frames()
        return self._submit(None)

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
            done += self._submit(group, limit=self._taken)
        while self._given < self._taken:
            done += self._submit(None, limit=self._taken, fresh=False)
        return done

    def set_prompt(self, prompt: str, blend_chunks: int = 0) -> None:
        """Changes the prompt from the next chunk on, at once or linearly over `blend_chunks` chunks.

        Chunks already under way keep the prompt that they came in with; the stream does not restart. This waits
        for the text encoder, unless the prompt was encoded before (`engine.prompts.encode(prompt)`).
        """
        self._check_open()
        check_prompt(prompt)
        if blend_chunks < 0:
            raise ConfigError(f"blend_chunks must be at least 0, got {blend_chunks}")
        self._blend_from, self._target = self._embedding, self._embed(prompt)
        count = max(1, blend_chunks)
        self._blend_steps = [self._put(np.float32(i / count)) for i in range(1, count + 1)]

    def run(
        self,
        frames: Iterable[np.ndarray] | None = None,
        count: int | None = None,
        prompts: Mapping[int, str] | None = None,
        blend_chunks: int = 0,
    ) -> Iterator[np.ndarray]:
        """Streams a clip and yields finished frames [T, H, W, 3], one chunk behind the device.

        Yields nothing where another process has the last stage, and has to be run to its end there too.

        Args:
          frames: input frames, uint8 [H, W, 3] each (video-to-video).
          count: how many frames to make (text-to-video).
          prompts: prompt changes by frame: the chunk that holds this input (or output) frame is the first to
            be drawn to the new prompt.
          blend_chunks: see `set_prompt`.
        """
        changes = sorted((prompts or {}).items())
        for _, prompt in changes:  # now, so that no change makes the stream wait for the text encoder
            self._prompts.encode(prompt)
        held: list[DeviceChunk] = []
        for done in self._run_chunks(frames, count, changes, blend_chunks):
            # Reading waits for the device: read a chunk only once the next one is under way.
            yield from _read(held)
            held = done
        yield from _read(held)

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
            if count is None:
                raise SessionError("text-to-video needs to know how many frames to make; pass count")
            while self._taken < count:
                change_prompt(self._taken + self._next_frames())
                yield [_cut(chunk, count) for chunk in self.advance()]
            yield [_cut(chunk, count) for chunk in self.finish()]
            return
        for frame in frames:
            if len(self._waiting) + 1 == self._next_frames():
                change_prompt(self._taken + 1)
            if done := self.push(frame[None]):
                yield done
        change_prompt(self._taken)
        yield self.finish()

    def _next_frames(self) -> int:
        return self._cfg.chunk_frames if self._ticks else self._cfg.first_frames

    def _submit(
        self, frames: np.ndarray | None, limit: int | None = None, fresh: bool = True
    ) -> list[DeviceChunk]:
        """Dispatches one group of frames, or with `fresh` False none; returns the chunk that finishes, if any."""
        if fresh:
            self._update_prompt()
        result = self._chunk(frames, fresh) if self._ticks else self._first_group(frames)
        count = self._cfg.chunk_frames if self._ticks else self._cfg.first_frames
        self._ticks += 1
        if result is None:
            return []
        if self.has_output:
            result.copy_to_host_async()
        chunk = DeviceChunk(self._given, count, result, self.has_output)
        self._given += count
        return [chunk if limit is None else _cut(chunk, limit)]

    def _first_group(self, frames: np.ndarray | None) -> jax.Array:
        programs = self._programs
        noisy, again = self._noise.first() if self._has_input else (None, ())
        if programs.encode_first is not None:
            self._input, noisy = programs.encode_first(
                self._params.encoder, self._put(frames), noisy, self._noise_scale
            )
        clean = self._pipeline.first_group(noisy, again)
        if programs.decode_first is None:
            return self._pipeline.own(clean)
        self._decoder, pixels = programs.decode_first(self._params.decoder, self._pipeline.own(clean))
        return pixels

    def _chunk(self, frames: np.ndarray | None, fresh: bool) -> jax.Array | None:
        """Returns the chunk that this tick finishes, see `DeviceChunk.result`; None while none does."""
        programs, pipeline = self._programs, self._pipeline
        noisy, again = self._noise.chunk(fresh) if self._has_input else (None, ())
        timestep, given_ns = pipeline.first_timestep, time.monotonic_ns()
        if programs.encode is not None and fresh:
            self._input, noisy, timestep = programs.encode(
                self._params.encoder, self._input, self._put(frames), noisy, self._noise_scale
            )
        clean = pipeline.own(pipeline.chunk(noisy, timestep, again, fresh, given_ns))
        if self._ticks < pipeline.depth:  # the first chunk is still on its way through the rows and stages
            return None
        if programs.decode is None:
            return clean
        self._decoder, pixels = programs.decode(self._params.decoder, self._decoder, clean)
        pipeline.decoded(pixels)
        return pixels

    @property
    def _has_input(self) -> bool:
        return self._pipeline.mesh.is_local(0)

    def _update_prompt(self) -> None:
        if self._blend_steps:
            self._embedding = self._programs.blend(self._blend_from, self._target, self._blend_steps.pop(0))
            self._pipeline.set_prompt(self._embedding)

    def _embed(self, prompt: str) -> jax.Array:
        return self._put(self._prompts.encode(prompt).astype(self._params.dit.dtype))

    def _put(self, x: object) -> jax.Array:
        return jax.device_put(x, self._device)

    def _check_open(self) -> None:
        if self._closed or self._finished:
            raise SessionError(f"the session is {'closed' if self._closed else 'finished'}; open a new one")


def _read(chunks: Iterable[DeviceChunk]) -> Iterator[np.ndarray]:
    """Waits for chunks and yields the frames of those that are in this process."""
    for chunk in chunks:
        if not chunk.is_here:
            chunk.wait()
        elif chunk.frame_count:
            yield chunk.frames()


def _cut(chunk: DeviceChunk, limit: int) -> DeviceChunk:
    """Cuts the frames beyond `limit` off a chunk."""
    count = max(0, min(chunk.frame_count, limit - chunk.first_frame))
    return dataclasses.replace(chunk, frame_count=count)
