"""The denoiser of one stream on the stages of its pipeline: noisy latents in, clean latents out.

Chunks are counted from 1; the first group is chunk 0. With W stages a tick works on W micro-batches at once, and
stage s is s ticks behind the first. In a stream batch of S rows, row r of the micro-batch that enters with chunk n
holds chunk n - r * W, so chunk n is finished by tick n + S * W - 1.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from svd2_jax.config import StreamConfig
from svd2_jax.engine.balance import BalancePolicy
from svd2_jax.engine.mesh import StageMesh
from svd2_jax.engine.params import StageWeights
from svd2_jax.engine.programs import Builder, DenoiserPrograms, TickPrograms
from svd2_jax.engine.rebalance import Rebalancer, Stopwatch
from svd2_jax.errors import SessionError
from svd2_jax.models.dit import PromptKV
from svd2_jax.nn.kv_cache import LayerCache
from svd2_jax.stream.state import Entry, StreamState

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Prompt:
    """A prompt as the blocks read it, and the context [1, P, E] that its keys and values were made of."""

    context: jax.Array
    kv: PromptKV


class Pipeline:
    """Drives the programs over the stages, in order and without waiting for their results."""

    def __init__(
        self,
        builder: Builder,
        programs: DenoiserPrograms,
        weights: StageWeights,
        split: Sequence[int],
        embedding: Any,
        rebalance: BalancePolicy | None = None,
        stopwatch: Stopwatch | None = None,
    ):
        """Opens the pipeline.

        Args:
          builder: compiles programs for other splits.
          programs: compiled for this one.
          weights: the model on the stages' devices.
          split: blocks on each stage.
          embedding: text embedding of the first prompt.
          rebalance: when blocks move to other stages; None: never.
          stopwatch: what measures the stages; None is a new one.
        """
        self.cfg: StreamConfig = builder.cfg
        self.mesh: StageMesh = builder.mesh
        self.split = tuple(split)
        self._builder, self._programs, self._weights = builder, programs, weights
        self._params = weights.params(split, self.cfg.decoder)
        self._ticks = programs.ticks
        self._state: StreamState = programs.init_state()
        self._fresh = {flag: self._put(np.full(1, flag)) for flag in (True, False)}
        self._timesteps = [self._put(np.int32(t)) for t in self.cfg.timesteps]
        batch = "rows" if self.cfg.mode == "stream" else "single"
        self._blank_first = self._blank(builder.entry("single", self.cfg.first_latents))
        self._blank_later = self._blank(builder.entry(batch, self.cfg.frames_per_block))
        self._span = self._spans([(0, count) for count in split])
        self._prompt = self._read_prompt(embedding)
        # The prompts of the chunks under way, newest first: each chunk keeps the one that it came in with.
        self._prompts = [self._prompt] * self.depth
        self._joined: tuple[list[Prompt], list[PromptKV]] = ([], [])
        self._ticked = 0
        self._wanted: tuple[tuple[int, ...], TickPrograms] | None = None
        self._rebalancer = None
        if rebalance is not None and self._ticks.share is not None:
            self._rebalancer = Rebalancer(
                self.mesh, self.split, self._ticks.share, self._prepare, rebalance, stopwatch=stopwatch
            )  # fmt: skip

    @property
    def stages(self) -> int:
        return self.mesh.stages

    @property
    def depth(self) -> int:
        """Ticks from a chunk's entry until it is finished, both counted."""
        return self.cfg.rows * self.stages if self.cfg.mode == "stream" else 1

    @property
    def first_timestep(self) -> jax.Array:
        """The configured timestep of the first step, int32 []."""
        return self._timesteps[0]

    @property
    def state(self) -> StreamState:
        """The state over the stages; the next tick takes it away."""
        return self._state

    def set_prompt(self, embedding: jax.Array) -> None:
        """Makes chunks that enter from now on follow another text embedding [1, P, text_dim]."""
        self._prompt = self._read_prompt(embedding)

    def first_group(self, noisy: Any, again: Sequence[Any]) -> jax.Array:
        """Takes the first group through all its steps, and gets ready for the chunks.

        Args:
          noisy: latents [F, h, w, C] on the first stage's device; ignored where another process has it.
          again: a Gaussian for every step but the first, likewise.

        Returns:
          The clean latents, float32 [W, F, h, w, C] over the stages; those of the last one are meant.
        """
        clean = self._all_steps(
            self._programs.step_first, self._blank_first, noisy, self._timesteps[0], again
        )
        self._state = self._programs.open_rows(self._state)
        return clean

    def chunk(
        self,
        noisy: Any,
        timestep: Any,
        again: Sequence[Any],
        fresh: bool = True,
        given_ns: int | None = None,
    ) -> jax.Array:
        """Takes in a chunk, or with `fresh` False none, and moves on what is under way.

        Args:
          noisy: latents [F, h, w, C] of the chunk at `timestep`, on the first stage's device; like all inputs
            ignored where another process has it.
          timestep: int32 [] there.
          again: Gaussians, see `engine.noise.ChunkNoise`.
          fresh: whether there is a chunk.
          given_ns: `time.monotonic_ns` when the work that makes `noisy` was handed to the device; None is now.

        Returns:
          The clean predictions of all rows, float32 [W * B, F, h, w, C] over the stages. Those of the last stage
          are meant, and belong to the micro-batch that entered W - 1 ticks ago; the last row is finished.
        """
        if self.cfg.mode != "stream":
            self._prompts = [self._prompt]
            return self._all_steps(self._ticks.tick, self._blank_later, noisy, timestep, again)
        conditioning = None
        if self.mesh.is_local(0):
            conditioning = self._programs.condition(self._params.conditioner, timestep)
        entry = self._enter(self._blank_later, noisy, fresh, conditioning, again)
        # Only while chunks come in and go out: else the first or the last stage has less to do than usual.
        self._ticked += 1
        watched = self._rebalancer if fresh and self._ticked > self.depth else None
        move = watched.before_tick() if watched else None
        if self._wanted is not None:
            move, self._wanted = self._wanted, None
        if move is not None:
            self._take(*move)
        self._prompts = [self._prompt, *self._prompts[:-1]]
        if watched is not None and self.mesh.is_local(0):
            watched.lap(0, "encode", noisy, given_ns or time.monotonic_ns())
        given_ns = time.monotonic_ns()
        if move is not None or (watched and watched.measuring):
            clean = self._tick_apart(entry)
        else:
            clean = self._tick(self._ticks.tick, self._row_prompts(), entry)
        if move is not None:
            self._span = self._spans([(0, count) for count in self.split])
        if watched is not None:
            for stage in self.mesh.local_stages:
                watched.lap(stage, "blocks", self.mesh.part(clean, stage), given_ns)
        return clean

    def decoded(self, pixels: jax.Array) -> None:
        """Tells that the last stage's device was given a chunk to decode, and the result."""
        if self._rebalancer is not None:
            self._rebalancer.lap(self.stages - 1, "decode", pixels, time.monotonic_ns())

    def move(self, split: Sequence[int]) -> None:
        """Takes another split with the next chunk of a stream batch.

        Blocks move with their parameters and caches; no chunk is lost, delayed or computed twice. Compiles first
        where no split with the same longest and shortest stage was in use yet.

        Where several processes drive the stages, all have to call this before the same chunk.

        Args:
          split: one that `balance.towards` says can be taken in one go.

        Raises:
          SessionError: in sequential mode, where one stage works at a time and nothing is gained.
        """
        if self.cfg.mode != "stream":
            raise SessionError("blocks move in stream mode only; open the session with another split instead")
        self._wanted = tuple(split), self._prepare(split)

    def own(self, over_stages: jax.Array) -> jax.Array:
        """Returns the last of this process's parts of an array over the stages."""
        return self.mesh.part(over_stages, self.mesh.local_stages[-1])

    def close(self) -> None:
        """Frees the state."""
        if self._rebalancer is not None:
            self._rebalancer.close()
        del self._state, self._prompts, self._prompt, self._joined

    def _prepare(self, split: Sequence[int]) -> TickPrograms:
        """Gets ready for another split, in any thread, while the present one is in use."""
        self._weights.fetch(split)
        return self._builder.ticks(split, movable=True)

    def _all_steps(self, program, blank, noisy, timestep, again) -> jax.Array:
        """Runs all steps of a single chunk; the first of them at `timestep`."""
        clean: Any = None
        for k, here in enumerate([timestep, *self._timesteps[1:]]):
            conditioning = None
            if self.mesh.is_local(0):
                conditioning = self._programs.condition_first(self._params.conditioner, here)
            noise = again[k - 1 : k] if k else again[:1]
            entry = self._enter(blank, noisy, k == 0, conditioning, noise)
            for hop in range(self.stages):
                clean = self._tick(program, [self._prompt.kv], entry if hop == 0 else self._nothing(blank))
        return clean

    def _take(self, split: tuple[int, ...], ticks: TickPrograms) -> None:
        """Moves blocks between stages before a tick, and sets the spans of that tick.

        A micro-batch that waits for a stage is through with all blocks that lay before it. Those of them that move
        behind this point are left out in the coming tick; those that move before it are run on it now.
        """
        old_starts, starts = (itertools.accumulate(n[:-1], initial=0) for n in (self.split, split))
        shifts = [new - old for old, new in zip(old_starts, starts, strict=True)]
        if any(shift > 0 for shift in shifts):
            assert self._ticks.catch_up is not None
            spans = self._spans([(0, max(0, shift)) for shift in shifts])
            prompts = tuple(self._row_prompt(row, coming=True) for row in range(self.cfg.rows))
            self._state = self._ticks.catch_up(self._params.dit, prompts, spans, self._state)
        _log.info("blocks per stage: %s -> %s", "+".join(map(str, self.split)), "+".join(map(str, split)))
        layers = self._moved_layers(split)
        cache = dataclasses.replace(self._state.cache, layers=layers)
        self._state = dataclasses.replace(self._state, cache=cache)
        self._params = dataclasses.replace(self._params, dit=self._weights.dit(split))
        self.split, self._ticks = split, ticks
        if self._rebalancer is not None:
            self._rebalancer.moved(split)
        self._span = self._spans([(max(0, -shift), n) for shift, n in zip(shifts, split, strict=True)])
        again = {id(p): p for p in (self._prompt, *self._prompts)}
        again = {
            key: Prompt(p.context, ticks.prompt_kv(self._params.dit.blocks, p.context))
            for key, p in again.items()
        }
        self._prompts = [again[id(p)] for p in self._prompts]
        self._prompt = again[id(self._prompt)]

    def _moved_layers(self, split: tuple[int, ...]) -> tuple[LayerCache, ...]:
        """Returns the caches with every block's where the split has it."""
        mesh = self.mesh
        held = {s: list(mesh.part(self._state.cache.layers, s)) for s in mesh.local_stages}
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), held[mesh.local_stages[0]][0])
        homes = [(stage, j) for stage, count in enumerate(self.split) for j in range(count)]
        targets = [stage for stage, count in enumerate(split) for _ in range(count)]
        taken: dict[int, list[Any]] = {s: [] for s in mesh.local_stages}
        spare = {s: layers[self.split[s] :] for s, layers in held.items()}
        for (source, j), target in zip(homes, targets, strict=True):
            layer = held[source][j] if source in held else None
            if source != target:
                if layer is not None:
                    spare[source].append(layer)  # what has moved leaves its buffers behind
                layer = mesh.transfer(layer, like, source, target)
            if target in taken:
                taken[target].append(layer)
        for stage, layers in taken.items():
            while len(layers) < max(split):  # a stage with fewer blocks has room for as many
                layers.append(spare[stage].pop() if spare[stage] else _zeros(like, mesh.devices[stage]))
        return mesh.join([tuple(layers) for layers in taken.values()])

    def _tick_apart(self, entry) -> jax.Array:
        """Runs a tick whose hand-over is a program of its own."""
        ticks = self._ticks
        assert ticks.tick_apart is not None
        assert ticks.send is not None
        clean = self._tick(ticks.tick_apart, self._row_prompts(), entry)
        self._state = dataclasses.replace(self._state, message=ticks.send(self._state.message))
        return clean

    def _tick(self, program, prompts, entry) -> jax.Array:
        self._state, clean = program(self._params.dit, tuple(prompts), self._span, self._state, entry)
        return clean

    def _enter(self, blank, noisy, fresh, conditioning, again) -> Entry:
        """Returns what enters the first stage, as an array over all of them."""
        if not self.mesh.is_local(0):
            return self._nothing(blank)
        entry = Entry(noisy, self._fresh[fresh], conditioning, tuple(again))
        return self.mesh.join([entry, *blank[1:]])

    def _nothing(self, blank: list[Entry]) -> Entry:
        return self.mesh.join(blank)

    def _blank(self, shapes: Entry) -> list[Entry]:
        """Returns for each local stage an entry without a chunk."""
        zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
        return [jax.device_put(zeros, self.mesh.devices[s]) for s in self.mesh.local_stages]

    def _read_prompt(self, embedding: Any) -> Prompt:
        context = self._programs.embed_text(self._params.conditioner, embedding)
        context = self.mesh.replicate(context)
        return Prompt(context, self._ticks.prompt_kv(self._params.dit.blocks, context))

    def _row_prompts(self) -> list[PromptKV]:
        """Returns the rows' prompts: what each row of each stage works on came in with another tick."""
        if self._joined[0] != self._prompts:
            self._joined = (list(self._prompts), [self._row_prompt(r) for r in range(self.cfg.rows)])
        return self._joined[1]

    def _row_prompt(self, row: int, coming: bool = False) -> PromptKV:
        """Returns a row's prompts on all stages in the last tick, or in the one that is to come."""
        ago = {s: row * self.stages + s - coming for s in self.mesh.local_stages}
        of_stage = {s: self._prompts[max(0, age)] for s, age in ago.items()}
        first, *others = of_stage.values()
        if all(other is first for other in others):
            return first.kv
        return self.mesh.join([self.mesh.part(prompt.kv, s) for s, prompt in of_stage.items()])

    def _spans(self, spans: Sequence[tuple[int, int]]) -> jax.Array:
        parts = [
            jax.device_put(np.array(spans[s], np.int32), self.mesh.devices[s]) for s in self.mesh.local_stages
        ]
        return self.mesh.join(parts)

    def _put(self, x: object) -> jax.Array:
        return jax.device_put(x, self.mesh.home)


def _zeros(like: Any, device: Any) -> Any:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=device), like)
