"""The denoiser of one stream on the stages of its pipeline: noisy latents in, clean latents out.

Chunks are counted from 1; the first group is chunk 0. With W stages a tick works on W micro-batches at once, and
stage s is s ticks behind the first. In a stream batch of S rows, row r of the micro-batch that enters with chunk n
holds chunk n - r * W, so chunk n is finished by tick n + S * W - 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from svd2_jax.config import StreamConfig
from svd2_jax.engine.mesh import StageMesh
from svd2_jax.engine.params import EngineParams
from svd2_jax.engine.programs import Builder, Programs
from svd2_jax.models.dit import PromptKV
from svd2_jax.stream.state import Entry, StreamState


@dataclass(frozen=True, eq=False)
class Prompt:
    """A prompt as the blocks read it, and the context [1, P, E] that its keys and values were made of."""

    context: jax.Array
    kv: PromptKV


class Pipeline:
    """Drives the programs over the stages, in order and without waiting for any of them."""

    def __init__(
        self, builder: Builder, programs: Programs, params: EngineParams, split: Sequence[int], embedding: Any
    ):
        self.cfg: StreamConfig = builder.cfg
        self.mesh: StageMesh = builder.mesh
        self._programs, self._params, self._split = programs, params, tuple(split)
        self._ticks = programs.ticks
        self._state: StreamState = programs.init_state()
        self._here = self.mesh.devices[self.mesh.local_stages[0]]
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

    def chunk(self, noisy: Any, timestep: Any, again: Sequence[Any], fresh: bool = True) -> jax.Array:
        """Takes in a chunk, or with `fresh` False none, and moves on what is under way.

        Args:
          noisy: latents [F, h, w, C] of the chunk at `timestep`, on the first stage's device; like all inputs
            ignored where another process has it.
          timestep: int32 [] there.
          again: Gaussians, see `engine.noise.ChunkNoise`.
          fresh: whether there is a chunk.

        Returns:
          The clean predictions of all rows, float32 [W * B, F, h, w, C] over the stages. Those of the last stage
          are meant, and belong to the micro-batch that entered W - 1 ticks ago; the last row is finished.
        """
        self._prompts = [self._prompt, *self._prompts[:-1]]
        if self.cfg.mode != "stream":
            return self._all_steps(self._ticks.tick, self._blank_later, noisy, timestep, again)
        conditioning = None
        if self.mesh.is_local(0):
            conditioning = self._programs.condition(self._params.conditioner, timestep)
        entry = self._enter(self._blank_later, noisy, fresh, conditioning, again)
        return self._tick(self._ticks.tick, self._row_prompts(), entry)

    def own(self, over_stages: jax.Array) -> jax.Array:
        """Returns the last of this process's parts of an array over the stages."""
        return self.mesh.part(over_stages, self.mesh.local_stages[-1])

    def close(self) -> None:
        """Frees the state."""
        del self._state, self._prompts, self._prompt, self._joined

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

    def _row_prompt(self, row: int) -> PromptKV:
        of_stage = {s: self._prompts[row * self.stages + s] for s in self.mesh.local_stages}
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
        return jax.device_put(x, self._here)
