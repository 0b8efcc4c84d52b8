"""The parts of a stream as calls to repeat: each runs the programs that a session runs, with its state donated."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from svd2_jax import media
from svd2_jax.api import SessionSpec
from svd2_jax.config import DiTConfig, ModelConfig, StreamConfig
from svd2_jax.engine.costs import costs
from svd2_jax.engine.engine import DeviceEngine
from svd2_jax.engine.pipeline import Pipeline, PipelineInput
from svd2_jax.hardware import Cost
from svd2_jax.text import counted

Decoder = Literal["wan", "taehv"]

PROMPT = "a watercolour painting of a harbour at dawn"
CHUNKS_AT_ONCE = 4  # through a session
NARROW = 32  # model width where only the number of arrays and programs counts
NARROW_PICTURE = 16  # pixels: one token per latent frame


@dataclass(frozen=True)
class Benchmark:
    """Something to time.

    Attributes:
      name: see `BENCHMARKS`.
      run: hands the work to the device and returns what to wait for.
      work: what it costs, counted from its trace; None where that says nothing.
      program: its compiled executable, where it is one.
      times: how often a run does it; all else here is told of one time.
      frames: video frames that it makes.
      warm_up: runs until it is as it stays.
      results: the array that it gave last, to compare with another implementation's.
      close: frees what it holds.
      note: what a reader has to know.
    """

    name: str
    run: Callable[[], Any]
    work: Cost | None = None
    program: Any = None
    times: int = 1
    frames: int = 0
    warm_up: int = 2
    results: Callable[[], Any] = lambda: None
    close: Callable[[], None] = lambda: None
    note: str = ""


@dataclass(frozen=True)
class Inputs:
    """What all parts are given, the same for another implementation; float32 unless said otherwise.

    Attributes:
      first: uint8 [T, H, W, 3] frames of the first group.
      chunk: uint8 [T, H, W, 3] frames of every later chunk.
      first_latents: [F, h, w, C].
      latents: [F, h, w, C] of a later chunk.
      embedding: [1, P, text_dim] of a prompt.
    """

    first: np.ndarray
    chunk: np.ndarray
    first_latents: np.ndarray
    latents: np.ndarray
    embedding: np.ndarray

    @classmethod
    def draw(cls, model: ModelConfig, cfg: StreamConfig) -> Inputs:
        """Returns inputs of a stream: a moving scene, Gaussians as latents and as a prompt."""
        clip = media.synthetic_clip(cfg.first_frames + cfg.chunk_frames, cfg.height, cfg.width)
        frames, rng = np.stack(list(clip)), np.random.default_rng(0)

        def gaussian(*shape: int) -> np.ndarray:
            return rng.standard_normal(shape, np.float32)

        cell = (*cfg.latent_size, model.dit.in_channels)
        return cls(
            frames[: cfg.first_frames],
            frames[cfg.first_frames :],
            gaussian(cfg.first_latents, *cell),
            gaussian(cfg.frames_per_block, *cell),
            gaussian(1, model.dit.text_len, model.dit.text_dim),
        )


@dataclass(frozen=True)
class Bench:
    """A model and a stream to take parts from.

    Attributes:
      engine: the model on its device, one stage.
      cfg: what the stream computes.
      spec: a session of it.
      inputs: what goes in.
    """

    engine: DeviceEngine
    cfg: StreamConfig
    spec: SessionSpec
    inputs: Inputs

    @classmethod
    def of(cls, engine: DeviceEngine, cfg: StreamConfig) -> Bench:
        """Returns the parts of a stream on an engine."""
        return cls(engine, cfg, SessionSpec(PROMPT, cfg), Inputs.draw(engine.model, cfg))

    def text(self) -> Benchmark:
        """Encoding a prompt: as `set_prompt` does it for one that was not encoded before."""
        prompts, text, count = self.engine.prompts, self.engine.model.text, 0

        def run() -> Any:
            nonlocal count
            count += 1
            return prompts.encode(f"{PROMPT}, {count}")

        blocks = f"{counted(text.num_layers, 'block')}, on the host unless told otherwise"
        return Benchmark("text", run, self._costs.text, note=blocks)

    def encode(self) -> Benchmark:
        """Frames of a chunk to noisy latents."""
        ends, params = self.engine.ends(self.cfg), self.engine.params(self.cfg).encoder
        assert ends.encode_first is not None
        first, frames = (jax.device_put(x, ends.frames) for x in (self.inputs.first, self.inputs.chunk))
        scale = jax.device_put(np.float32(self.spec.noise_scale), ends.scale)
        noise = [self._put(np.zeros_like(x)) for x in (self.inputs.first_latents, self.inputs.latents)]
        state, noisy = ends.encode_first(params, first, noise[0], scale)

        def run() -> Any:
            nonlocal state, noisy
            assert ends.encode is not None
            state, noisy, _ = ends.encode(params, state, frames, noise[1], scale)
            return noisy

        return Benchmark(
            "encode", run, self._costs.chunk.encode, ends.encode, frames=self.cfg.chunk_frames,
            results=lambda: noisy,
        )  # fmt: skip

    def tick(self) -> Benchmark:
        """A pass of the transformer over all rows, embeddings of the timesteps included; the cache is full."""
        cfg, pipeline = self.cfg, self._pipeline()
        chunk, layers = self._costs.chunk, self.engine.model.dit.num_layers
        once = chunk.condition + layers * chunk.block + chunk.ends
        return Benchmark(
            "tick",
            self._tick(pipeline),
            once * (1 if cfg.mode == "stream" else cfg.steps),
            self.engine.denoiser(cfg, pipeline.split).ticks.tick[1],
            frames=cfg.chunk_frames,
            warm_up=cfg.cache_frames // cfg.frames_per_block + pipeline.depth,
            results=lambda: pipeline.came_back[-1],
            close=pipeline.close,
        )

    def decode(self, decoder: Decoder) -> Benchmark:
        """Clean latents of a chunk to frames, with either decoder.

        Raises:
          CheckpointError: the checkpoint has no such decoder.
        """
        cfg = dataclasses.replace(self.cfg, decoder=decoder)
        ends, params = self.engine.ends(cfg), self.engine.params(cfg).decoder
        assert ends.decode_first is not None
        latents = self._put(self.inputs.latents)
        state, pixels = ends.decode_first(params, self._put(self.inputs.first_latents))

        def run() -> Any:
            nonlocal state, pixels
            assert ends.decode is not None
            state, pixels = ends.decode(params, state, latents)
            return pixels

        work = costs(self.engine.model, cfg, self.engine.dtype).chunk.decode
        return Benchmark(
            f"decode-{decoder}", run, work, ends.decode, frames=cfg.chunk_frames, results=lambda: pixels
        )

    def stream(self) -> Benchmark:
        """A chunk through a session, end to end: frames in, frames out.

        A run is several chunks, each read when the next one is under way, as `DeviceSession.run` does it. It ends
        with nothing under way, so that no work is left for whoever runs in turn with it.
        """
        cfg, session = self.cfg, self.engine.open(self.spec)
        session.push(self.inputs.first)

        def run() -> None:
            held: list[Any] = []
            for _ in range(CHUNKS_AT_ONCE):
                done = session.push(self.inputs.chunk)
                for chunk in held:
                    chunk.frames()
                held = done
            for chunk in held:
                chunk.frames()

        chunk, layers = self._costs.chunk, self.engine.model.dit.num_layers
        tick = chunk.condition + layers * chunk.block + chunk.ends
        work = chunk.encode + tick * (1 if cfg.mode == "stream" else cfg.steps) + chunk.decode
        full = cfg.cache_frames // cfg.frames_per_block + session.pipeline.depth
        return Benchmark(
            "stream", run, work, times=CHUNKS_AT_ONCE, frames=cfg.chunk_frames,
            warm_up=-(-full // CHUNKS_AT_ONCE), close=session.close,
        )  # fmt: skip

    def dispatch(self) -> Benchmark:
        """A tick of the same structure with next to no arithmetic: what is left is handing it over."""
        model = self.engine.model
        dit = DiTConfig(
            NARROW, NARROW, 1, model.dit.num_layers, NARROW, model.dit.text_dim, 8,
            model.dit.in_channels, model.dit.out_channels, model.dit.patch, model.dit.eps,
            model.dit.weight_dtype,
        )  # fmt: skip
        vae = dataclasses.replace(model.vae, dim=NARROW // 4)  # never run
        narrow = DeviceEngine.random(
            dataclasses.replace(model, dit=dit, vae=vae),
            dtype=self.engine.dtype.name,
            mesh=self.engine.mesh,
        )
        cfg = dataclasses.replace(self.cfg, height=NARROW_PICTURE, width=NARROW_PICTURE)
        tick = Bench.of(narrow, cfg).tick()
        note = f"{dit.num_layers} blocks of width {NARROW}; see the time to hand over"
        return dataclasses.replace(tick, name="dispatch", work=None, program=None, frames=0, note=note)

    @property
    def _costs(self) -> Any:
        return costs(self.engine.model, self.cfg, self.engine.dtype)

    def _pipeline(self) -> Pipeline:
        embedding = self._put(self.inputs.embedding.astype(self.engine.dtype))
        pipeline = self.engine.pipeline(self.cfg, embedding)
        pipeline.first_group(self._put(self.inputs.first_latents), self._again(self.inputs.first_latents))
        return pipeline

    def _tick(self, pipeline: Pipeline) -> Callable[[], Any]:
        noisy, again = self._put(self.inputs.latents), self._again(self.inputs.latents)

        def run() -> Any:
            pipeline.tick(PipelineInput(noisy, pipeline.first_timestep, again))
            return pipeline.came_back

        return run

    def _again(self, like: np.ndarray) -> tuple[Any, ...]:
        return tuple(self._put(np.zeros_like(like)) for _ in range(self.cfg.steps - 1))

    def _put(self, x: Any) -> jax.Array:
        return jax.device_put(x, self.engine.mesh.home)


BENCHMARKS: dict[str, Callable[[Bench], Benchmark]] = {
    "text": Bench.text,
    "encode": Bench.encode,
    "tick": Bench.tick,
    "decode-wan": lambda bench: bench.decode("wan"),
    "decode-taehv": lambda bench: bench.decode("taehv"),
    "stream": Bench.stream,
    "dispatch": Bench.dispatch,
}


def first_frame(
    load: Callable[[], DeviceEngine], cfg: StreamConfig, say: Callable[[str], None]
) -> tuple[Bench, dict[str, float]]:
    """Opens a model, and returns it with the seconds that each phase took until the first frames were there.

    Only in a process that has done nothing else do these tell of a cold start.

    Args:
      load: opens the model.
      cfg: what the stream computes.
      say: told what comes next.
    """
    phases = {} if (running := seconds_running()) is None else {"start": running}
    last = time.perf_counter()

    def ends(phase: str) -> None:
        nonlocal last
        now = time.perf_counter()
        phases[phase], last = now - last, now

    engine = load()
    ends("load")
    say("compiling")
    bench = Bench.of(engine, cfg)
    with engine.open(bench.spec) as session:
        ends("open")
        for chunk in session.push(bench.inputs.first):
            chunk.frames()
    ends("first group")
    return bench, phases


def seconds_running() -> float | None:
    """Returns for how long this process has been running; None where the system does not say (Linux does)."""
    try:
        after_name = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started = int(after_name[19]) / os.sysconf("SC_CLK_TCK")  # field 22, man 5 proc
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started
    except (OSError, AttributeError, ValueError, IndexError):
        return None
