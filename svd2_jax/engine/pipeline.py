"""The denoiser of one stream on the stages of its pipeline: noisy latents in, clean latents out.

Chunks are counted from 1; the first group is chunk 0. With W stages a tick works on W micro-batches at once, and
stage s is s ticks behind the first. In a stream batch of S rows a chunk takes one row after another, W ticks each, and
is finished by the (S * W)-th tick from its entry. Ticks without a new chunk push on what is under way and change
nothing else: no row's chunks, cache or noise depend on when its ticks come.

The number of rows can change in mid-stream. With fewer, a chunk that has taken as many steps as there are to be is
finished with them, and leaves in its turn; rows that no chunk enters any more are dropped. The others go on as if
those had never been, because a row depends on the rows before it only. With more, the new rows begin with the
cache of the row that was the last, which remembers the chunks that are finished, and are entered by the next one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from svd2_jax.config import StreamConfig
from svd2_jax.engine.mesh import StageMesh
from svd2_jax.engine.params import StageWeights
from svd2_jax.engine.programs import Builder, DenoiserPrograms, Program
from svd2_jax.models.dit import PromptKV
from svd2_jax.nn.kv_cache import KVCache
from svd2_jax.rows import Rows
from svd2_jax.stream.state import StageInput, StreamState


@dataclass(frozen=True, eq=False)
class Prompt:
    """A prompt as the blocks read it, and the context [1, P, E] that its keys and values were made of."""

    context: jax.Array
    kv: PromptKV


@dataclass(frozen=True, eq=False)
class PipelineInput:
    """What one stream brings to a tick; arrays are ignored where another process has the first stage.

    Attributes:
      noisy: latents [F, h, w, C] of the new chunk at `timestep`, on the first stage's device.
      timestep: int32 [] there.
      again: Gaussians there, see `engine.noise.ChunkNoise`.
      fresh: whether there is a new chunk.
    """

    noisy: Any
    timestep: Any
    again: Sequence[Any]
    fresh: bool = True


@dataclass(frozen=True, eq=False)
class Finished:
    """A chunk that is through its steps.

    Attributes:
      chunk: its number.
      clean: latents, float32 [W * F, h, w, C] over the stages; those of the last one are meant.
    """

    chunk: int
    clean: jax.Array


@dataclass(frozen=True, eq=False)
class _Chunk:
    """A chunk's number, and the prompt that it came in with."""

    number: int
    prompt: Prompt


class Pipeline:
    """Drives the programs over the stages, in order and without waiting for their results."""

    def __init__(
        self,
        builder: Builder,
        programs: Callable[[StreamConfig], DenoiserPrograms],
        weights: StageWeights,
        split: Sequence[int],
        embedding: Any,
    ):
        """Opens the pipeline.

        Args:
          builder: compiles programs for other splits and numbers of rows.
          programs: gives those for this split and a configuration that differs in its steps only.
          weights: the model on the stages' devices.
          split: blocks on each stage.
          embedding: text embedding of the first prompt.
        """
        self.mesh: StageMesh = builder.mesh
        self.split = tuple(split)
        self._builder, self._programs_for = builder, programs
        self._params = weights.params(split, builder.cfg.decoder, builder.vae_devices)
        self._flags: dict[tuple[bool, ...], jax.Array] = {}
        self._lone: dict[tuple[int, ...], jax.Array] = {}
        self._use(builder.cfg)
        self._state: StreamState = self._programs.init_state()
        self._started = False
        self._rows: Rows[_Chunk] = Rows(self.cfg.steps, self.stages)
        self._next_chunk = 1
        self.came_back: tuple[jax.Array, ...] = ()
        """Clean latents of each row that the last tick computed, or of the first group; see `Finished.clean`."""
        self._finished: dict[int, Finished] = {}  # those that are through their steps and have not left
        self._count = self._by_stage(split)  # blocks of each stage
        self._prompt = self._read_prompt(embedding)
        self._joined: tuple[list[list[Prompt]], list[PromptKV]] = ([], [])

    @property
    def stages(self) -> int:
        return self.mesh.stages

    @property
    def depth(self) -> int:
        """Ticks from a chunk's entry until it is finished, both counted."""
        return self.cfg.rows * self.stages if self.cfg.mode == "stream" else 1

    @property
    def steps(self) -> int:
        """Denoising steps of the chunks that enter now."""
        return self._rows.steps

    @property
    def first_timestep(self) -> jax.Array:
        """The configured timestep of the first step, int32 []."""
        return self._timesteps[0]

    @property
    def state(self) -> StreamState:
        """The state over the stages; the next tick takes it away."""
        return self._state

    def entering(self, fresh: bool) -> list[int | None]:
        """Returns the numbers of the chunks that the next tick takes to each of the steps."""
        new = self._next_chunk if fresh else None
        if self.cfg.mode != "stream":
            return [new] * self.cfg.steps
        coming = self._rows.enter(None if new is None else _Chunk(new, self._prompt))
        held = (coming.at(row, 0) for row in range(self.cfg.rows))
        return [found and found.chunk.number for found in held]

    def set_prompt(self, embedding: jax.Array) -> None:
        """Makes chunks that enter from now on follow another text embedding [1, P, text_dim]."""
        self._prompt = self._read_prompt(embedding)

    def set_steps(self, steps: int) -> None:
        """Changes how many denoising steps chunks take, from the next tick on.

        Raises:
          ConfigError: there are no timesteps for so many.
        """
        opened, cfg = self._builder.cfg, self._builder.cfg.with_steps(steps)
        self._rows = self._rows.with_steps(steps)
        if not self._started:
            self._use(cfg if steps < opened.steps else opened)  # for more there are no draws yet
            return
        if cfg.mode != "stream":
            self._use(cfg)
            return
        if steps > self.cfg.rows:
            self._resize(cfg)
        self._collect()
        self._drop_empty_rows()

    def first_group(self, noisy: Any, again: Sequence[Any]) -> jax.Array:
        """Takes the first group through all its steps, and gets ready for the chunks.

        Args:
          noisy: latents [F, h, w, C] on the first stage's device; ignored where another process has it.
          again: a Gaussian for every step but the first, likewise; more are ignored.

        Returns:
          The clean latents, float32 [W * F, h, w, C] over the stages; those of the last one are meant.
        """
        blank = self._blank(self._builder_for(self.cfg).entry("single", self.cfg.first_latents))
        arrival = PipelineInput(noisy, self._timesteps[0], again[: self.cfg.steps - 1])
        ((clean,),) = _all_steps(self._programs.step_first, [self], [blank], [arrival])
        self._state = self._programs.open_rows(self._state)
        self._started, self.came_back = True, (clean,)
        if self.steps > self.cfg.steps:
            self.set_steps(self.steps)
        return clean

    def tick(self, arrival: PipelineInput) -> list[Finished]:
        """Runs a tick of this stream alone, see `tick_together`."""
        return tick_together([self], [arrival])[0]

    def tick_apart(self, arrival: PipelineInput) -> None:
        """Runs a tick in which no stage hands on what it has, and so none waits for another; to measure them.

        What comes out from then on is not the stream any more.
        """
        program = self._builder_for(self.cfg).tick_apart(self.split)
        entry = self._take_in(arrival)
        (self.came_back,) = _run(program, [self], [self._row_prompts()], [entry])
        self._rows, _ = self._rows.leave()

    def own(self, over_stages: jax.Array) -> jax.Array:
        """Returns the last of this process's parts of an array over the stages."""
        return self.mesh.part(over_stages, self.mesh.local_stages[-1])

    def close(self) -> None:
        """Frees the state."""
        del self._state, self._rows, self._prompt, self._joined, self.came_back, self._finished

    def _use(self, cfg: StreamConfig) -> None:
        """Takes the programs of a configuration, and what is kept on the devices for it."""
        self.cfg = cfg
        self._programs = self._programs_for(cfg)
        self._timesteps = [self._put(np.int32(t)) for t in cfg.timesteps]
        batch = "rows" if cfg.mode == "stream" else "single"
        self._blank_later = self._blank(self._builder_for(cfg).entry(batch, cfg.frames_per_block))

    def _builder_for(self, cfg: StreamConfig) -> Builder:
        return dataclasses.replace(self._builder, cfg=cfg)

    def _resize(self, cfg: StreamConfig) -> None:
        """Takes the rows of another configuration."""
        programs = self._builder_for(cfg).resize(self.split, self.cfg.rows)
        cache, start = self._state.cache, self._state.start
        filled, held, message = programs.rest((cache.filled, cache.held, self._state.message))
        layers: list[Any] = list(cache.layers)
        del self._state, cache  # an old layer is to go when the new one is there
        for i in range(len(layers)):
            layers[i] = programs.layer(layers[i])
        self._state = StreamState(KVCache(tuple(layers), filled, held), start, message)
        self._use(cfg)

    def _drop_empty_rows(self) -> None:
        """Drops the rows that no chunk is to enter any more, once they are empty."""
        if self._rows.width == self.steps < self.cfg.rows:
            self._resize(self._builder.cfg.with_steps(self.steps))

    def _collect(self) -> None:
        """Keeps what came back with the last tick of the chunks that are finished with it."""
        for held in filter(self._rows.is_finished, self._rows.chunks):
            number, row = held.chunk.number, held.steps - 1 if len(self.came_back) > 1 else 0
            if number not in self._finished:
                self._finished[number] = Finished(number, self.came_back[row])

    def _take_in(self, arrival: PipelineInput) -> StageInput:
        """Returns what enters with a tick, and takes note of it."""
        chunks = self.entering(arrival.fresh)
        self._advance(arrival.fresh)
        conditioning = None
        if self.mesh.is_local(0):
            conditioning = self._programs.condition(self._params.conditioner, arrival.timestep)
        is_open = tuple(chunk is not None for chunk in chunks)
        return self._enter(self._blank_later, arrival.noisy, is_open, conditioning, arrival.again)

    def _advance(self, fresh: bool) -> None:
        """Takes note of a tick, and of the chunk that enters with it."""
        entering = _Chunk(self._next_chunk, self._prompt) if fresh else None
        self._rows = self._rows.enter(entering, whole=self.cfg.mode != "stream")
        self._next_chunk += fresh

    def _bring_out(self, clean: tuple[jax.Array, ...]) -> list[Finished]:
        """Returns the chunks that are finished and that no earlier one is missing before, in order."""
        self.came_back = clean
        self._collect()
        self._rows, done = self._rows.leave()
        self._drop_empty_rows()
        return [self._finished.pop(held.chunk.number) for held in done]

    def _enter_step(self, blank: list[StageInput], arrival: PipelineInput, k: int) -> StageInput:
        """Returns what enters for step k of a chunk that takes its steps one after another."""
        conditioning = None
        if self.mesh.is_local(0):
            timestep = self._timesteps[k] if k else arrival.timestep
            conditioning = self._programs.condition_first(self._params.conditioner, timestep)
        again = arrival.again[k - 1 : k] if k else arrival.again[:1]
        return self._enter(blank, arrival.noisy, (k == 0,), conditioning, again)

    def _enter(self, blank, noisy, is_open: tuple[bool, ...], conditioning, again) -> StageInput:
        """Returns what enters the first stage, as an array over all of them."""
        if not self.mesh.is_local(0):
            return self._nothing(blank)
        if is_open not in self._flags:  # there are few of them
            self._flags[is_open] = self._put(np.array(is_open))
        entry = StageInput(noisy, self._flags[is_open], conditioning, tuple(again))
        return self.mesh.join([entry, *blank[1:]])

    def _nothing(self, blank: list[StageInput]) -> StageInput:
        return self.mesh.join(blank)

    def _blank(self, shapes: StageInput) -> list[StageInput]:
        """Returns for each local stage an entry without a chunk."""
        zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
        return [jax.device_put(zeros, self.mesh.devices[s]) for s in self.mesh.local_stages]

    def _read_prompt(self, embedding: Any) -> Prompt:
        context = self._programs.embed_text(self._params.conditioner, embedding)
        context = self.mesh.replicate(context)
        return Prompt(context, self._programs.ticks.prompt_kv(self._params.dit.blocks, context))

    def _row_prompts(self) -> list[PromptKV]:
        """Returns the rows' prompts: what each row of each stage works on came in with another tick."""
        held = [self._row_prompt(row, self._rows) for row in range(self.cfg.rows)]
        if self._joined[0] != held:
            self._joined = (held, [self._over_stages(prompts) for prompts in held])
        return self._joined[1]

    def _row_prompt(self, row: int, rows: Rows[_Chunk]) -> list[Prompt]:
        """Returns the prompt of a row on each local stage; where it holds no chunk any of them will do."""
        held = [rows.at(row, stage) for stage in self.mesh.local_stages]
        some = next((found.chunk.prompt for found in held if found), self._prompt)
        return [found.chunk.prompt if found else some for found in held]

    def _lone_prompts(self, rows: Sequence[int]) -> list[PromptKV]:
        """Returns what `_row_prompts` does where each stage has one row only."""
        found = (self._rows.at(rows[stage], stage) for stage in self.mesh.local_stages)
        return [self._over_stages([held.chunk.prompt if held else self._prompt for held in found])]

    def _lone_rows(self, rows: tuple[int, ...]) -> jax.Array:
        """Returns each stage's row, int32 [W] over the stages."""
        if rows not in self._lone:  # there are few of them
            self._lone[rows] = self._by_stage(rows)
        return self._lone[rows]

    def _over_stages(self, prompts: Sequence[Prompt]) -> PromptKV:
        first, *others = prompts
        if all(other is first for other in others):
            return first.kv
        stages = self.mesh.local_stages
        return self.mesh.join([self.mesh.part(p.kv, stage) for stage, p in zip(stages, prompts, strict=True)])

    def _by_stage(self, parts: Sequence[int]) -> jax.Array:
        """Returns an array over the stages, int32 [W]."""
        mesh = self.mesh
        return mesh.join(
            [jax.device_put(np.array([parts[s]], np.int32), mesh.devices[s]) for s in mesh.local_stages]
        )

    def _put(self, x: object) -> jax.Array:
        return jax.device_put(x, self.mesh.home)


def tick_together(pipelines: Sequence[Pipeline], arrivals: Sequence[PipelineInput]) -> list[list[Finished]]:
    """Runs one tick of several streams: takes in a chunk of each, or none, and moves on what is under way.

    Args:
      pipelines: on the same devices, with the same split and configuration; as many as programs are compiled for.
      arrivals: what each of them brings.

    Returns:
      For each stream the chunks that are finished, in order.
    """
    lead = pipelines[0]
    program = lead._programs.ticks.tick[len(pipelines)]
    if lead.cfg.mode != "stream":
        for line, arrival in zip(pipelines, arrivals, strict=True):
            line._advance(arrival.fresh)
        clean = _all_steps(program, pipelines, [line._blank_later for line in pipelines], arrivals)
        return [line._bring_out(rows) for line, rows in zip(pipelines, clean, strict=True)]
    entries = [line._take_in(arrival) for line, arrival in zip(pipelines, arrivals, strict=True)]
    rows = [row for line in pipelines if (row := line._rows.lone) is not None]
    if (lone := lead._programs.ticks.lone) and len(rows) == len(pipelines):
        prompts = [line._lone_prompts(row) for line, row in zip(pipelines, rows, strict=True)]
        where = [line._lone_rows(row) for line, row in zip(pipelines, rows, strict=True)]
        clean = _run(lone[len(pipelines)], pipelines, prompts, entries, tuple(where))
        return [line._bring_out(rows) for line, rows in zip(pipelines, clean, strict=True)]
    prompts = [line._row_prompts() for line in pipelines]
    clean = _run(program, pipelines, prompts, entries)
    return [line._bring_out(rows) for line, rows in zip(pipelines, clean, strict=True)]


def _all_steps(
    program: Program,
    pipelines: Sequence[Pipeline],
    blanks: Sequence[list[StageInput]],
    arrivals: Sequence[PipelineInput],
) -> Sequence[tuple[jax.Array, ...]]:
    """Takes one chunk of each stream through all its steps, one after another; returns their clean latents."""
    clean: Sequence[tuple[jax.Array, ...]] = ()
    prompts = [[line._prompt.kv] for line in pipelines]
    lines = list(zip(pipelines, blanks, strict=True))
    for k in range(pipelines[0].cfg.steps):
        entries = [line._enter_step(blank, a, k) for (line, blank), a in zip(lines, arrivals, strict=True)]
        for hop in range(pipelines[0].stages):
            if hop:
                entries = [line._nothing(blank) for line, blank in lines]
            clean = _run(program, pipelines, prompts, entries)
    return clean


def _run(
    program: Program,
    pipelines: Sequence[Pipeline],
    prompts: Sequence[Sequence[PromptKV]],
    entries: Sequence[StageInput],
    *lone: Sequence[jax.Array],
) -> Sequence[tuple[jax.Array, ...]]:
    """Runs a compiled `step.tick` on the streams' states and returns each one's computed rows of clean latents."""
    lead = pipelines[0]
    states = tuple(line._state for line in pipelines)
    states, clean = program(
        lead._params.dit, tuple(map(tuple, prompts)), lead._count, states, tuple(entries), *lone
    )
    for line, state in zip(pipelines, states, strict=True):
        line._state = state
    return clean
