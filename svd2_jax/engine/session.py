"""One stream: frames in, re-drawn frames out. Offline files, servers and benchmarks drive this same object."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from svd2_jax.api import SessionSpec, check_prompt
from svd2_jax.engine.noise import ChunkNoise, NoiseSource
from svd2_jax.engine.params import EngineParams
from svd2_jax.engine.programs import Programs
from svd2_jax.engine.prompt import Prompts
from svd2_jax.errors import ConfigError, SessionError
from svd2_jax.types import Device


@dataclass(frozen=True)
class DeviceChunk:
    """A finished chunk whose frames are still on the device or on their way to the host; see `api.Chunk`."""

    first_frame: int
    frame_count: int
    pixels: jax.Array

    def frames(self) -> np.ndarray:
        """Waits for the frames [T, H, W, 3]."""
        return np.asarray(self.pixels)[: self.frame_count]


class SeededNoise:
    """Gaussians drawn on the device from (seed, chunk, step)."""

    def __init__(self, programs: Programs, seed: int, device: Device):
        self._programs = programs
        self._key = jax.device_put(jax.random.key(seed), device)
        self._chunk = jax.device_put(jnp.ones((), jnp.int32), device)

    def first(self) -> ChunkNoise:
        return self._programs.draw_first(self._key)

    def chunk(self) -> ChunkNoise:
        draws, self._chunk = self._programs.draw_chunk(self._key, self._chunk)
        return draws


class DeviceSession:
    """A session on one device; see `api.Session` for the verbs.

    Everything is dispatched without waiting: a chunk's frames are waited for only when they are read.
    """

    def __init__(
        self,
        spec: SessionSpec,
        params: EngineParams,
        programs: Programs,
        prompts: Prompts,
        device: Device,
        noise: NoiseSource | None = None,
    ):
        self.spec = spec
        self._cfg = spec.stream
        self._params, self._programs, self._prompts, self._device = params, programs, prompts, device
        self._noise = noise or SeededNoise(programs, spec.seed, device)
        self._context = self._target = self._embed(spec.prompt)
        self._prompt = programs.prompt_kv(params.dit, self._context)
        self._blend_steps: list[jax.Array] = []
        self._blend_from = self._context
        self._timesteps = [self._put(np.int32(t)) for t in self._cfg.timesteps]
        self._not_last, self._last = self._put(np.bool_(False)), self._put(np.bool_(True))
        self._noise_scale = self._put(np.float32(spec.noise_scale))
        self._state = programs.init_state()
        self._input = self._decoder = None
        self._waiting: list[np.ndarray] = []  # input frames that do not fill a chunk yet
        self._taken = self._given = self._ticks = 0
        self._closed = self._finished = False

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
        return self._submit(None)

    def finish(self) -> list[DeviceChunk]:
        """Returns the frames still under way, so that as many come out as went in.

        The last chunk is filled up by repeating the last frame, and further copies push the rows of the stream
        batch through; what they add beyond the input's length is cut off.
        """
        self._check_open()
        self._finished = True
        done: list[DeviceChunk] = []
        if self._cfg.task != "v2v" or not self._taken:
            return done
        # Rows of the stream batch hold chunks even when no frame is waiting.
        last = self._waiting[-1] if self._waiting else self._last_frame
        while self._given < self._taken:
            fill = [last] * (self._next_frames() - len(self._waiting))
            group, self._waiting = np.stack([*self._waiting, *fill]), []
            done += self._submit(group, limit=self._taken)
        return done

    def set_prompt(self, prompt: str, blend_chunks: int = 0) -> None:
        """Changes the prompt from the next chunk on, at once or linearly over `blend_chunks` chunks.

        Chunks already under way in later rows go on with the new prompt too; the stream does not restart. This
        waits for the text encoder, unless the prompt was encoded before (`engine.prompts.encode(prompt)`).
        """
        self._check_open()
        check_prompt(prompt)
        if blend_chunks < 0:
            raise ConfigError(f"blend_chunks must be at least 0, got {blend_chunks}")
        self._blend_from, self._target = self._context, self._embed(prompt)
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
            yield from (chunk.frames() for chunk in held if chunk.frame_count)
            held = done
        yield from (chunk.frames() for chunk in held if chunk.frame_count)

    def close(self) -> None:
        """Frees the stream's device memory; a second close does nothing."""
        self._closed = True
        self._state = self._input = self._decoder = self._prompt = None
        self._waiting = []

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
            while self._given < count:
                change_prompt(self._taken + self._next_frames())
                self._taken += self._next_frames()
                done = self.advance()
                yield [_cut(chunk, count) for chunk in done]
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

    def _submit(self, frames: np.ndarray | None, limit: int | None = None) -> list[DeviceChunk]:
        """Dispatches one group of frames; returns the chunk that finishes with it, if any."""
        if frames is not None:
            self._last_frame = frames[-1]
        self._update_prompt()
        pixels = self._chunk(frames) if self._ticks else self._first_group(frames)
        self._ticks += 1
        if pixels is None:
            return []
        pixels.copy_to_host_async()
        chunk = DeviceChunk(self._given, pixels.shape[0], pixels)
        self._given += chunk.frame_count
        return [chunk if limit is None else _cut(chunk, limit)]

    def _first_group(self, frames: np.ndarray | None) -> jax.Array:
        programs = self._programs
        noise, again = self._noise.first()
        noisy = noise
        if programs.encode_first is not None:
            self._input, noisy = programs.encode_first(
                self._params.encoder, self._put(frames), noise, self._noise_scale
            )
        clean = self._denoise(programs.step_first, noisy, self._timesteps[0], again)
        if programs.open_rows is not None:
            self._state = programs.open_rows(self._state)
        self._decoder, pixels = programs.decode_first(self._params.decoder, clean)
        return pixels

    def _chunk(self, frames: np.ndarray | None) -> jax.Array | None:
        programs, cfg = self._programs, self._cfg
        noise, again = self._noise.chunk()
        noisy, timestep = noise, self._timesteps[0]
        if programs.encode is not None:
            self._input, noisy, timestep = programs.encode(
                self._params.encoder, self._input, self._put(frames), noise, self._noise_scale
            )
        if programs.tick is not None:
            self._state, clean = programs.tick(
                self._params.dit, self._prompt, self._state, noisy, timestep, again
            )
            if self._ticks < cfg.rows:  # the first chunk is still on its way through the rows
                return None
        else:
            clean = self._denoise(programs.step_chunk, noisy, timestep, again)
        self._decoder, pixels = programs.decode(self._params.decoder, self._decoder, clean)
        return pixels

    def _denoise(self, program, noisy, timestep, again) -> jax.Array:
        """Runs all steps of one chunk on the one-row state; the first of them at `timestep`."""
        steps = [timestep, *self._timesteps[1:]]
        clean = noisy
        for i, here in enumerate(steps):
            last = i == len(steps) - 1
            self._state, clean, noisy = program(
                self._params.dit, self._prompt, self._state, noisy, here,
                here if last else steps[i + 1], noisy if last else again[i], self._last if last else self._not_last,
            )  # fmt: skip
        return clean

    def _update_prompt(self) -> None:
        if self._blend_steps:
            self._context = self._programs.blend(self._blend_from, self._target, self._blend_steps.pop(0))
            self._prompt = self._programs.prompt_kv(self._params.dit, self._context)

    def _embed(self, prompt: str) -> jax.Array:
        return self._put(self._prompts.encode(prompt).astype(self._params.dit.dtype))

    def _put(self, x: object) -> jax.Array:
        return jax.device_put(x, self._device)

    def _check_open(self) -> None:
        if self._closed or self._finished:
            raise SessionError(f"the session is {'closed' if self._closed else 'finished'}; open a new one")


def _cut(chunk: DeviceChunk, limit: int) -> DeviceChunk:
    """Cuts the frames beyond `limit` off a chunk."""
    count = max(0, min(chunk.frame_count, limit - chunk.first_frame))
    return DeviceChunk(chunk.first_frame, count, chunk.pixels)
