"""One tick of a pipeline, as each of its stages computes it.

The blocks of the transformer lie in contiguous ranges on the stages of a ring. In a tick every stage runs its
blocks on the micro-batch that waits for it and hands it to the next stage. The first stage takes chunks in, the
last one turns hidden states into clean predictions, which go back to the first with the same ring: there the
rows of the stream batch shift by one. With W stages, W micro-batches are under way, and what comes back entered
W ticks ago. One stage is the same code with W = 1.

Pure functions of (params, state, inputs), to be run under `shard_map` over the axis `AXIS` where there is more
than one stage. Noise is an argument: whoever draws it decides on what it depends.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from svd2_jax.config import DiTConfig, StreamConfig
from svd2_jax.diffusion import flow_match
from svd2_jax.models import dit
from svd2_jax.models.dit import Conditioning, DiTParams, PromptKV
from svd2_jax.nn import kv_cache
from svd2_jax.nn.attention import AttentionImplementation
from svd2_jax.nn.kv_cache import KVCache
from svd2_jax.nn.rope import rope_tables
from svd2_jax.stream.state import Message, StageInput, StreamState

AXIS = "stage"
Rows = tuple[jax.Array, ...]
"""Something for each row of one stream."""
Messages = TypeVar("Messages")
"""A message, or what else goes from stage to stage with them."""
Tree = TypeVar("Tree")


@dataclass(frozen=True)
class Ring:
    """How a program is laid out over the stages; static.

    Attributes:
      stages: number of stages W.
      always: leading blocks that every stage has; each of the others is run by those stages that have it.
      batch: "rows": a stream batch, into whose row 0 a new chunk enters; "single": one chunk takes all its steps.
      send: whether a tick ends with the hand-over to the next stage; without, no stage waits for another.
    """

    stages: int = 1
    always: int = 0
    batch: Literal["rows", "single"] = "rows"
    send: bool = True


def condition(
    model: DiTConfig,
    cfg: StreamConfig,
    batch: Literal["rows", "single"],
    dtype: jnp.dtype,
    conditioner: Any,
    timestep: jax.Array,
) -> Conditioning:
    """Returns what the rows' timesteps contribute: row 0 is at `timestep` (int32 []), the others as configured."""
    timestep_B = timestep[None]
    if batch == "rows":
        timestep_B = jnp.concatenate([timestep_B, jnp.asarray(cfg.timesteps[1:], jnp.int32)])
    return dit.condition(model, conditioner, timestep_B, dtype)


def tick(
    model: DiTConfig,
    cfg: StreamConfig,
    ring: Ring,
    params: DiTParams,
    prompts: Sequence[Sequence[PromptKV]],
    count: jax.Array,
    states: Sequence[StreamState],
    entries: Sequence[StageInput],
    lone: Sequence[jax.Array] | None = None,
    attention: AttentionImplementation = "auto",
) -> tuple[tuple[StreamState, ...], tuple[Rows, ...]]:
    """Runs one tick: every row under way on this stage passes through its blocks.

    Several streams of one shape may share a tick, so that the blocks' parameters are read once for all of them. They
    meet in matrix products over tokens only; each has its own cache, counters and prompts.

    Args:
      model: sizes of the DiT.
      cfg: what the stream computes.
      ring: layout over the stages.
      params: the stage's parameters.
      prompts: for each stream the cross-attention keys and values of each computed row's prompt.
      count: int32 [1] how many blocks the stage has.
      states: the stage's state of each stream.
      entries: what enters the first stage, of each stream.
      lone: for each stream the one row, int32 [1], that can hold a chunk on this stage; only this row is computed, as
        if there were no others. None: all rows are.
      attention: see `attend`.

    Returns:
      The states, and for each stream the clean prediction of each computed row, float32 [F, h, w, C], which mean
      something on the last stage only; rows without a chunk are zero. The last row's is finished.
    """
    parts = [
        (state.cache, state.message, state.message, entry)
        for state, entry in zip(states, entries, strict=True)
    ]
    if lone is not None:
        parts = [_lone_part(*one) for one in zip(states, entries, lone, strict=True)]
    batch = ring.batch if lone is None else "single"
    caches, waiting = [cache for cache, *_ in parts], [message for _, _, message, _ in parts]
    messages = []
    for state, (_, back, message, entry) in zip(states, parts, strict=True):
        entered = _enter(model, batch, params, state.start, back, entry)
        messages.append(_where_stage(ring, 0, entered, message))
    hidden, clean, caches = _run_blocks(model, cfg, ring, params, prompts, count, caches, messages, attention)
    messages = [_passed_on(ring, *one) for one in zip(messages, waiting, hidden, clean, strict=True)]
    came = lone
    if ring.send:
        # All computing before the hand-over: then a GPU runs it as one graph.
        messages, clean, caches = jax.lax.optimization_barrier((messages, clean, caches))
        messages, came = send(ring.stages, (messages, lone))
    if lone is not None:
        assert came is not None
        caches = [_put_row(s.cache, c, row) for s, c, row in zip(states, caches, lone, strict=True)]
        messages = [_put_message(s.message, m, row) for s, m, row in zip(states, messages, came, strict=True)]
    starts = [_next_start(cfg, state.start, entry) for state, entry in zip(states, entries, strict=True)]
    after = tuple(StreamState(*one) for one in zip(caches, starts, messages, strict=True))
    return after, tuple(tuple(rows) for rows in clean)


def _passed_on(
    ring: Ring, message: Message, waiting: Message, hidden: jax.Array, clean: jax.Array
) -> Message:
    """Returns what a stage hands on: to the next stage half-way results, behind the last one clean latents."""
    if ring.stages == 1:  # nothing is half-way: what only travels between stages stays as it was
        return dataclasses.replace(
            message, hidden=waiting.hidden, conditioning=waiting.conditioning, latents=clean
        )
    passed = dataclasses.replace(message, hidden=hidden)
    finished = dataclasses.replace(passed, latents=clean)
    return _where_stage(ring, ring.stages - 1, finished, passed)


def send(stages: int, messages: Messages) -> Messages:
    """Hands every stage's messages to the next one, the last one's to the first: one collective in all."""
    if stages == 1:
        return messages
    packed, unpack = _pack(messages)
    return unpack(jax.lax.ppermute(packed, AXIS, [(s, (s + 1) % stages) for s in range(stages)]))


def _lone_part(
    state: StreamState, entry: StageInput, row: jax.Array
) -> tuple[KVCache, Message, Message, StageInput]:
    """Returns one row of a stage: its cache, what came back in the row before, what waits in it, and what enters."""
    (r,) = row
    before = jnp.maximum(r - 1, 0)
    back = _row(state.message, before)
    goes_on = back.active & (r > 0) & _row(entry.open, r)
    noise = (_row(jnp.stack(entry.noise), before)[0],) if entry.noise else ()
    enters = StageInput(entry.latents, entry.open[:1] & (r == 0), _row(entry.conditioning, r), noise)
    back = dataclasses.replace(back, active=goes_on)
    return _row(state.cache, r), back, _row(state.message, r), enters


def _row(tree: Tree, r: jax.Array) -> Tree:
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, r, 1), tree)


def _put_row(tree: Tree, new: Tree, row: jax.Array) -> Tree:
    return jax.tree.map(lambda x, one: jax.lax.dynamic_update_slice_in_dim(x, one, row[0], 0), tree, new)


def _put_message(message: Message, new: Message, row: jax.Array) -> Message:
    """Returns the message with one row anew; the others hold no chunk."""
    return _put_row(dataclasses.replace(message, active=jnp.zeros_like(message.active)), new, row)


def _enter(
    model: DiTConfig,
    batch: Literal["rows", "single"],
    params: DiTParams,
    start: jax.Array,
    back: Message,
    entry: StageInput,
) -> Message:
    """Returns the micro-batch that the first stage starts with.

    Args:
      model: sizes.
      batch: see `Ring`.
      params: the stage's parameters.
      start: int32 [1] time index of a new chunk's first latent frame.
      back: what has come back from the last stage.
      entry: what enters.
    """
    if batch == "rows":
        latents, start, active = entry.latents[None], start, entry.open[:1]
        if entry.noise:
            again = flow_match.add_noise(
                back.latents[:-1], jnp.stack(entry.noise), entry.conditioning.timestep[1:]
            )
            goes_on = back.active[:-1] & entry.open[1:]
            again = jnp.where(_over_latents(goes_on), again, 0.0)
            latents = jnp.concatenate([latents, again])
            start = jnp.concatenate([start, back.start[:-1]])
            active = jnp.concatenate([active, goes_on])
    else:
        again = back.latents
        if entry.noise:
            again = flow_match.add_noise(again, entry.noise[0][None], entry.conditioning.timestep)
        latents = jnp.where(_over_latents(entry.open), entry.latents[None], again)
        start = jnp.where(entry.open, start, back.start)
        active = entry.open | back.active
    hidden = dit.embed(model, params.patch, latents.astype(params.dtype))
    return Message(hidden, latents, entry.conditioning, start, active)


def _run_blocks(
    model: DiTConfig,
    cfg: StreamConfig,
    ring: Ring,
    params: DiTParams,
    prompts: Sequence[Sequence[PromptKV]],
    count: jax.Array,
    caches: Sequence[KVCache],
    messages: Sequence[Message],
    attention: AttentionImplementation,
) -> tuple[list[jax.Array], list[jax.Array], list[KVCache]]:
    """Returns each stream's hidden states behind the stage's blocks, clean predictions made of them, and cache."""
    frames, height, width = messages[0].latents.shape[1:4]
    grid = (height // model.patch[1], width // model.patch[2])
    planned = [
        kv_cache.plan_write(cfg, cache, message.start, message.active, frames)
        for cache, message in zip(caches, messages, strict=True)
    ]
    plans, caches = [plan for plan, _ in planned], [cache for _, cache in planned]
    kv_lens = [cache.filled * (grid[0] * grid[1]) for cache in caches]
    every = messages[0]
    if len(messages) > 1:
        every = jax.tree.map(lambda *rows: jnp.concatenate(rows), *messages)
    # The refresh keeps the time index of a chunk's first frame below `rope_refresh`.
    rope = rope_tables(model.head_dim, every.start, frames, *grid, max_frame=cfg.rope_refresh + frames)
    x, layers = every.hidden, []
    busy = every.active.any()
    for j, block in enumerate(params.blocks):
        used = None if j < ring.always else busy & (j < count[0])
        pairs = [(prompt.k[j], prompt.v[j]) for rows in prompts for prompt in rows]
        x, layer = dit.run_block(
            model,
            cfg,
            block,
            x,
            [cache.layers[j] for cache in caches],
            plans,
            kv_lens,
            pairs,
            every.conditioning,
            rope,
            frames,
            attention,
            used,
        )
        layers.append(layer)
    velocity = dit.head(model, params.head, x, every.conditioning.time, grid)
    clean = flow_match.clean_prediction(every.latents, velocity, every.conditioning.timestep)
    clean = jnp.where(_over_latents(every.active), clean, 0.0)
    after = [
        KVCache(of_stream, cache.filled, cache.held)
        for of_stream, cache in zip(zip(*layers, strict=True), caches, strict=True)
    ]
    return jnp.split(x, len(messages)), jnp.split(clean, len(messages)), after


def _where_stage(ring: Ring, stage: int, here: Message, elsewhere: Message) -> Message:
    """Returns `here` on one stage and `elsewhere` on the others."""
    if ring.stages == 1:
        return here
    # A select, not a branch: it stays inside the graph of a GPU.
    is_here = jax.lax.axis_index(AXIS) == stage
    return jax.tree.map(lambda a, b: jnp.where(is_here, a, b), here, elsewhere)


def _over_latents(flag_B: jax.Array) -> jax.Array:
    return flag_B[:, None, None, None, None]


def _next_start(cfg: StreamConfig, start: jax.Array, entry: StageInput) -> jax.Array:
    """Moves the time index behind a new chunk.

    At the refresh it restarts, so that an endless stream stays in trained range.
    """
    following = start + entry.latents.shape[0]
    following = jnp.where(following >= cfg.rope_refresh, cfg.cache_frames - 1, following)
    return jnp.where(entry.open[:1], following, start)


def _pack(messages: Any) -> tuple[jax.Array, Any]:
    """Returns messages as one flat array of bits, and the function that makes messages of it again."""
    leaves, structure = jax.tree.flatten(messages)
    # Integers: nothing on the way may round a float32, or quieten a NaN.
    unit = jnp.uint16 if min(x.dtype.itemsize for x in leaves if x.dtype != jnp.bool_) == 2 else jnp.uint32

    def to_bits(x: jax.Array) -> jax.Array:
        x = x.astype(jnp.int32) if x.dtype == jnp.bool_ else x
        return jax.lax.bitcast_convert_type(x, unit).reshape(-1)

    def from_bits(bits: jax.Array, like: jax.Array) -> jax.Array:
        dtype = jnp.int32 if like.dtype == jnp.bool_ else like.dtype
        parts = np.dtype(dtype).itemsize // np.dtype(unit).itemsize
        bits = bits.reshape(like.shape if parts == 1 else (*like.shape, parts))
        return jax.lax.bitcast_convert_type(bits, dtype).astype(like.dtype)

    packed = [to_bits(x) for x in leaves]

    def unpack(bits: jax.Array) -> Message:
        ends = np.cumsum([x.size for x in packed])
        pieces = (bits[end - x.size : end] for end, x in zip(ends, packed, strict=True))
        return structure.unflatten([from_bits(b, x) for b, x in zip(pieces, leaves, strict=True)])

    return jnp.concatenate(packed), unpack
