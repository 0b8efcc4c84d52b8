"""Works out, without weights or devices, what a stream needs and how fast it can be at best.

Shapes are traced, not computed: memory follows from what each device of the pipeline holds, time from the
arithmetic and the memory traffic of what it runs (`engine.work`) and from what the hardware can do at most
(`hardware`). Real programs are slower; a plan tells which number of devices is too small, not which one is enough.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from svd2_jax.config import DiTConfig, ModelConfig, StreamConfig
from svd2_jax.engine.balance import best_split
from svd2_jax.engine.work import count_work
from svd2_jax.errors import ConfigError
from svd2_jax.hardware import GIB, Hardware, Work, roofline
from svd2_jax.models import dit, taehv, vae
from svd2_jax.nn import kv_cache
from svd2_jax.nn.attention import fused_if_possible
from svd2_jax.nn.kv_cache import LayerCache, WritePlan

DTYPES = {"bfloat16": jnp.bfloat16, "float32": jnp.float32}
STAGE_COUNTS = (1, 2, 3, 4, 8)  # compared in every plan
TARGET_FPS = 16.0  # the rate Wan2.1 was trained at
USABLE_MEMORY = (
    0.9  # of a device; the rest is for CUDA's context, libraries and what a program needs in passing
)

Temporaries = Callable[[tuple[int, ...]], Sequence[int]]
"""Takes the blocks per stage; returns the bytes that the compiled programs need in passing, per device."""


@dataclass(frozen=True)
class Part:
    """Something a device computes for every chunk.

    Attributes:
      name: "encode", "timesteps", "blocks" (patch embedding and head included) or "decode".
      work: its arithmetic and memory traffic.
      seconds: the least time it takes.
      bound: what it waits for, "compute" or "memory".
    """

    name: str
    work: Work
    seconds: float
    bound: str


@dataclass(frozen=True)
class DevicePlan:
    """One device of the pipeline; sizes in bytes.

    Attributes:
      first_block: its first block.
      blocks: how many it has.
      weights: its blocks, patch embedding and head; on the first device also the text and timestep embeddings and
        the VAE's encoder, on the last also the decoder. The text encoder stays on the host.
      cache: rolling KV cache. All stages run one program, so all have room for the longest stage's blocks.
      prompt: cross-attention keys and values of one prompt.
      stream: the VAE's tails and the chunks under way.
      temporaries: what the compiled programs need in passing; None if it was not asked for.
      parts: what it computes for every chunk, one after another.
    """

    first_block: int
    blocks: int
    weights: int
    cache: int
    prompt: int
    stream: int
    temporaries: int | None
    parts: tuple[Part, ...]

    @property
    def total(self) -> int:
        """All of its memory, with the temporaries if they are known."""
        return self.weights + self.cache + self.prompt + self.stream + (self.temporaries or 0)

    @property
    def seconds(self) -> float:
        """The least time for a chunk, without the hop."""
        return sum(part.seconds for part in self.parts)


@dataclass(frozen=True)
class Bounds:
    """What no program can surpass with a number of stages.

    Attributes:
      split: blocks per stage.
      chunk_seconds: between two finished chunks; a tick of the stream batch.
      fps: frames per second.
      ticks: ticks from a chunk's entry to its exit; every tick takes in a new chunk. 0 in sequential mode.
      latency_seconds: from a chunk's entry to its exit, as fast as the hardware allows.
      live_latency_seconds: the same when frames come at `TARGET_FPS` at most, so that ticks wait for them.
      memory: bytes on the fullest device.
      fits: whether that is within the usable memory of the device.
    """

    split: tuple[int, ...]
    chunk_seconds: float
    fps: float
    ticks: int
    latency_seconds: float
    live_latency_seconds: float
    memory: int
    fits: bool


@dataclass(frozen=True)
class Plan:
    """What a stream needs on a pipeline of devices, and how fast it can be.

    Attributes:
      model: name of the model.
      stream: what the stream computes.
      dtype: compute dtype.
      hardware: each device.
      devices: the pipeline, first stage first.
      bounds: of this pipeline.
      bottleneck: index of its slowest device.
      hop_bytes: what a stage hands to the next in a tick.
      hop_seconds: the least time that takes.
      first_frame_seconds: from the first group's frames to its pictures, nothing else under way.
      options: the bounds for several numbers of stages, each with its best split.
      recommended: number of stages of the option to take; None if none fits.
    """

    model: str
    stream: StreamConfig
    dtype: str
    hardware: Hardware
    devices: tuple[DevicePlan, ...]
    bounds: Bounds
    bottleneck: int
    hop_bytes: int
    hop_seconds: float
    first_frame_seconds: float
    options: tuple[Bounds, ...]
    recommended: int | None

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON, sums included."""
        values = dataclasses.asdict(self)
        for device, entry in zip(self.devices, values["devices"], strict=True):
            entry.update(total=device.total, seconds=device.seconds)
        return values


def plan(
    model: ModelConfig,
    stream: StreamConfig,
    stages: int,
    hardware: Hardware,
    dtype: str = "bfloat16",
    split: tuple[int, ...] | None = None,
    temporaries: Temporaries | None = None,
) -> Plan:
    """Plans a stream on a pipeline; takes seconds and little memory, whatever the model's size.

    Args:
      model: sizes of the networks.
      stream: what the stream computes.
      stages: number of stages, one device each.
      hardware: each device.
      dtype: "bfloat16" or "float32", of weights, cache and arithmetic.
      split: blocks per stage; None takes the best.
      temporaries: called once, with the split, for what only a compiler knows; the options assume the largest
        of its numbers on every device.

    Raises:
      ConfigError: unknown dtype, more stages than blocks, or a split that does not fit.
    """
    layers = model.dit.num_layers
    if dtype not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if not 1 <= stages <= layers:
        raise ConfigError(f"stages must be 1 to {layers}, the blocks of {model.name}; got {stages}")
    if split is not None and (len(split) != stages or min(split) < 1 or sum(split) != layers):
        raise ConfigError(
            f"split must give {stages} stages all {layers} blocks, at least one each; got {split}"
        )
    costs = _costs(model, stream, jnp.dtype(DTYPES[dtype]))
    split = split or _best_split(costs, stream, hardware, stages)
    transient = None if temporaries is None else tuple(temporaries(split))
    devices = _devices(costs, stream, hardware, split, transient)
    options = []
    for count in STAGE_COUNTS:
        if count <= layers:
            other = _best_split(costs, stream, hardware, count)
            worst = None if transient is None else (max(transient),) * count
            options.append(_bounds(costs, stream, hardware, _devices(costs, stream, hardware, other, worst)))
    return Plan(
        model=model.name,
        stream=stream,
        dtype=dtype,
        hardware=hardware,
        devices=devices,
        bounds=_bounds(costs, stream, hardware, devices),
        bottleneck=max(range(stages), key=lambda i: devices[i].seconds),
        hop_bytes=costs.chunk.hop if stages > 1 else 0,
        hop_seconds=_hop_seconds(costs.chunk.hop, hardware, stages),
        first_frame_seconds=_first_frame_seconds(costs, stream, hardware, split),
        options=tuple(options),
        recommended=_recommended(options),
    )


def _recommended(options: Sequence[Bounds]) -> int | None:
    """Returns the fewest stages that fit and may reach the target rate, else the fastest that fit."""
    fitting = [option for option in options if option.fits]
    enough = [option for option in fitting if option.fps >= TARGET_FPS]
    best = enough[0] if enough else max(fitting, key=lambda option: option.fps, default=None)
    return None if best is None else len(best.split)


# --- what the pieces cost


@dataclass(frozen=True)
class _Pieces:
    """What the devices run for one chunk and one pass through the blocks, and what a hop carries."""

    encode: Work
    condition: Work
    block: Work
    ends: Work  # patch embedding and head, which every stage runs
    decode: Work
    hop: int


@dataclass(frozen=True)
class _Costs:
    """Work of the pieces of a pipeline, and bytes of what it keeps."""

    bits: int
    layers: int
    chunk: _Pieces
    first: _Pieces  # the first group: one row, which sees only itself
    block_weights: int
    ends_weights: int
    conditioner_weights: int
    encoder_weights: int
    decoder_weights: int
    cache: int  # of one block, all rows
    prompt: int  # of one block
    encode_state: int
    decode_state: int


@functools.lru_cache(maxsize=16)
def _costs(model: ModelConfig, stream: StreamConfig, dtype: jnp.dtype) -> _Costs:
    """Traces every kind of piece once."""
    cfg, items = model.dit, _in_dtype(dit.abstract_params(model.dit), dtype)
    block, embed, head = items[dit.block_item(0)], items[dit.embed_item()], items[dit.head_item()]
    conditioner = {name: leaves for name, leaves in embed.items() if name != "patch"}
    layer = jax.eval_shape(lambda: kv_cache.init_kv_cache(cfg, stream, dtype)).layers[0]
    layer = jax.tree.map(lambda x: _array((stream.rows, *x.shape[1:]), x.dtype), layer)
    encoder, decoder = _count_encoder(model, stream, dtype), _count_decoder(model, stream, dtype)

    def pieces(encode: Work, decode: Work, rows: int, frames: int, cache: LayerCache | None) -> _Pieces:
        return _Pieces(
            encode=encode,
            condition=_count_condition(cfg, embed, rows, dtype),
            block=_count_block(cfg, stream, block, rows, frames, cache, dtype),
            ends=_count_ends(cfg, stream, embed, head, rows, frames, dtype),
            decode=decode,
            hop=_hop_bytes(cfg, stream, rows, frames, dtype),
        )

    return _Costs(
        bits=8 * dtype.itemsize,
        layers=cfg.num_layers,
        chunk=pieces(encoder.later, decoder.later, stream.rows, stream.frames_per_block, layer),
        first=pieces(encoder.first, decoder.first, 1, stream.first_latents, None),
        block_weights=_nbytes(block),
        ends_weights=_nbytes((embed["patch"], head)),
        conditioner_weights=_nbytes(conditioner),
        encoder_weights=encoder.weights,
        decoder_weights=decoder.weights,
        cache=_nbytes(layer),
        prompt=2 * cfg.text_len * cfg.dim * dtype.itemsize,
        encode_state=encoder.state,
        decode_state=decoder.state,
    )


def _count_block(
    cfg: DiTConfig,
    stream: StreamConfig,
    params: Any,
    rows: int,
    frames: int,
    cache: LayerCache | None,
    dtype: jnp.dtype,
) -> Work:
    """Counts one block on `rows` chunks with a full cache, or without a cache on chunks that see themselves."""
    tokens = frames * kv_cache.frame_tokens(cfg, stream)
    fused = fused_if_possible("gpu", dtype, cfg.head_dim) == "cudnn"
    block: Any = dit.Block(cfg)

    def run(params, x, cache, plan, length, prompt, modulation, rope):
        apply = functools.partial(block.apply, {"params": params})
        q, k, v = apply(x, modulation, rope, method="project")
        if cache is None:
            cache = LayerCache(k, v, length, length, length)
        else:
            cache = kv_cache.write(stream, cache, plan, k, v, frames)
        attention = "xla" if fused else "auto"
        return apply(x, q, cache, length, prompt, prompt, modulation, attention, method="finish"), cache

    flag, number = _array((rows,), jnp.bool_), _array((rows,), jnp.int32)
    prompt = _array((1, cfg.text_len, cfg.num_heads, cfg.head_dim), dtype)
    angles = _array((rows, tokens, cfg.head_dim // 2))
    args = (
        params, _array((rows, tokens, cfg.dim), dtype), cache, WritePlan(flag, flag, number, flag), number,
        prompt, _array((rows, 6, cfg.dim)), (angles, angles),
    )  # fmt: skip
    return count_work(run, *args, fused_attention=fused)


def _count_ends(
    cfg: DiTConfig, stream: StreamConfig, embed: Any, head: Any, rows: int, frames: int, dtype: jnp.dtype
) -> Work:
    def run(embed, head, latents, x, time):
        patches = dit.Embed(cfg).apply({"params": embed}, latents, method="patches")
        return patches, dit.Head(cfg).apply({"params": head}, x, time)

    latents = _array((rows, frames, *stream.latent_size, cfg.in_channels), dtype)
    x = _array((rows, frames * kv_cache.frame_tokens(cfg, stream), cfg.dim), dtype)
    return count_work(run, embed, head, latents, x, _array((rows, cfg.dim)))


def _count_condition(cfg: DiTConfig, embed: Any, rows: int, dtype: jnp.dtype) -> Work:
    def run(embed, timestep):
        return dit.Embed(cfg).apply({"params": embed}, timestep, dtype, method="time")

    return count_work(run, embed, _array((rows,), jnp.int32))


@dataclass(frozen=True)
class _Coder:
    """The VAE's encoder, or a decoder: work for a later chunk and for the first group, bytes it keeps."""

    later: Work
    first: Work
    weights: int
    state: int


def _count_encoder(model: ModelConfig, stream: StreamConfig, dtype: jnp.dtype) -> _Coder:
    if stream.task != "v2v":  # no video comes in
        return _Coder(later=Work(), first=Work(), weights=0, state=0)

    def pixels(frames: int) -> Any:
        return _array((1, frames, stream.height, stream.width, 3), dtype)

    start, follow = (functools.partial(f, model.vae) for f in (vae.encode_first, vae.encode))
    params = _in_dtype(vae.abstract_params(model.vae)[vae.ENCODER_ITEM], dtype)
    return _count_coder(start, follow, params, pixels(stream.first_frames), pixels(stream.chunk_frames))


def _count_decoder(model: ModelConfig, stream: StreamConfig, dtype: jnp.dtype) -> _Coder:
    def latents(frames: int) -> Any:
        return _array((1, frames, *stream.latent_size, model.vae.z_dim), dtype)

    if stream.decoder == "taehv":
        start, follow = (functools.partial(f, model.taehv) for f in (taehv.decode_first, taehv.decode))
        params = taehv.abstract_params(model.taehv)[taehv.ITEM]
    else:
        start, follow = (functools.partial(f, model.vae) for f in (vae.decode_first, vae.decode))
        params = vae.abstract_params(model.vae)[vae.DECODER_ITEM]
    first, later = latents(stream.first_latents), latents(stream.frames_per_block)
    return _count_coder(start, follow, _in_dtype(params, dtype), first, later)


def _count_coder(start: Any, follow: Any, params: Any, first: Any, later: Any) -> _Coder:
    _, state = jax.eval_shape(start, params, first)
    return _Coder(
        later=count_work(follow, params, state, later),
        first=count_work(start, params, first),
        weights=_nbytes(params),
        state=_nbytes(state),
    )


def _hop_bytes(cfg: DiTConfig, stream: StreamConfig, rows: int, frames: int, dtype: jnp.dtype) -> int:
    """Bytes between two stages: hidden states, noisy latents, timestep embeddings (1 + 6 vectors a row)."""
    hidden = frames * kv_cache.frame_tokens(cfg, stream) * cfg.dim * dtype.itemsize
    latents = frames * math.prod(stream.latent_size) * cfg.in_channels * 4
    return rows * (hidden + latents + 7 * cfg.dim * 4)


def _array(shape: tuple[int, ...], dtype: Any = jnp.float32) -> Any:
    """Returns a ShapeDtypeStruct, which stands in for an array while tracing."""
    return jax.ShapeDtypeStruct(shape, dtype)


def _in_dtype(tree: Any, dtype: jnp.dtype) -> Any:
    return jax.tree.map(lambda x: _array(x.shape, dtype), tree)


def _nbytes(tree: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


# --- what a pipeline makes of them


def _passes(stream: StreamConfig) -> int:
    """Passes of a stage for every chunk: the stream batch takes all steps at once."""
    return 1 if stream.mode == "stream" else stream.steps


def _hop_seconds(size: int, hardware: Hardware, stages: int) -> float:
    return size / hardware.link_bandwidth if stages > 1 else 0.0


def _seconds(work: Work, costs: _Costs, hardware: Hardware) -> float:
    return roofline(work, hardware, costs.bits).seconds


def _best_split(costs: _Costs, stream: StreamConfig, hardware: Hardware, stages: int) -> tuple[int, ...]:
    """Splits all blocks so that the slowest device, encoding and decoding included, is as fast as can be."""
    passes = _passes(stream)
    overheads = [passes * _seconds(costs.chunk.ends, costs, hardware)] * stages
    overheads[0] += passes * _seconds(costs.chunk.condition, costs, hardware)
    overheads[0] += _seconds(costs.chunk.encode, costs, hardware)
    overheads[-1] += _seconds(costs.chunk.decode, costs, hardware)
    block = passes * _seconds(costs.chunk.block, costs, hardware)
    return best_split([block] * costs.layers, overheads)


def _devices(
    costs: _Costs,
    stream: StreamConfig,
    hardware: Hardware,
    split: tuple[int, ...],
    temporaries: Sequence[int] | None,
) -> tuple[DevicePlan, ...]:
    passes, last, room = _passes(stream), len(split) - 1, max(split)
    devices = []
    for i, blocks in enumerate(split):
        weights = blocks * costs.block_weights + costs.ends_weights
        kept = costs.chunk.hop
        works = {"blocks": passes * (blocks * costs.chunk.block + costs.chunk.ends)}
        if i == 0:
            weights += costs.conditioner_weights + costs.encoder_weights
            kept += costs.encode_state
            works = {"encode": costs.chunk.encode, "timesteps": passes * costs.chunk.condition, **works}
        if i == last:
            weights += costs.decoder_weights
            kept += costs.decode_state
            works["decode"] = costs.chunk.decode
        parts = []
        for name, work in works.items():
            if work != Work():
                least = roofline(work, hardware, costs.bits)
                parts.append(Part(name, work, least.seconds, least.bound))
        devices.append(
            DevicePlan(
                first_block=sum(split[:i]),
                blocks=blocks,
                weights=weights,
                cache=room * costs.cache,
                prompt=room * costs.prompt,
                stream=kept,
                temporaries=None if temporaries is None else temporaries[i],
                parts=tuple(parts),
            )
        )
    return tuple(devices)


def _bounds(
    costs: _Costs, stream: StreamConfig, hardware: Hardware, devices: tuple[DevicePlan, ...]
) -> Bounds:
    stages, passes = len(devices), _passes(stream)
    hop = _hop_seconds(costs.chunk.hop, hardware, stages)
    chunk = max(device.seconds for device in devices) + passes * hop
    waits = stream.chunk_frames / TARGET_FPS
    if stream.mode == "stream":
        ticks = stream.steps * stages  # a step takes a tick on every stage
        latency, live = ticks * chunk, ticks * max(chunk, waits)
    else:
        # A chunk goes round the ring alone: the next one reads what its last step left in the cache.
        around = sum(p.seconds for d in devices for p in d.parts if p.name in ("timesteps", "blocks"))
        around += passes * stages * hop
        ticks, chunk = 0, max(chunk, around)
        latency = live = sum(device.seconds for device in devices) + passes * stages * hop
    memory = max(device.total for device in devices)
    return Bounds(
        split=tuple(device.blocks for device in devices),
        chunk_seconds=chunk,
        fps=stream.chunk_frames / chunk,
        ticks=ticks,
        latency_seconds=latency,
        live_latency_seconds=live,
        memory=memory,
        fits=memory <= USABLE_MEMORY * hardware.memory_bytes,
    )


def _first_frame_seconds(
    costs: _Costs, stream: StreamConfig, hardware: Hardware, split: tuple[int, ...]
) -> float:
    """Returns the time of the first group: all steps one after another, each through all stages, no overlap."""
    seconds = functools.partial(_seconds, costs=costs, hardware=hardware)
    step = seconds(costs.first.condition)
    step += sum(seconds(blocks * costs.first.block + costs.first.ends) for blocks in split)
    step += len(split) * _hop_seconds(costs.first.hop, hardware, len(split))
    return seconds(costs.first.encode) + stream.steps * step + seconds(costs.first.decode)


# --- as text


def report(plan: Plan) -> str:
    """Returns the plan as text for a terminal."""
    return "\n".join(
        [*_header(plan), "", *_memory(plan), "", *_work(plan), "", *_summary(plan), "", *_options(plan)]
    )


def _header(plan: Plan) -> list[str]:
    stream, device = plan.stream, plan.hardware
    peak = device.peak_flops(8 * jnp.dtype(DTYPES[plan.dtype]).itemsize)
    return [
        f"{plan.model}, {stream.width}x{stream.height}, {_plural(stream.steps, 'step')}, {stream.task}, "
        f"mode {stream.mode}, decoder {stream.decoder}, {plan.dtype}",
        f"{len(plan.devices)} x {device.name}: {device.memory_bytes / GIB:.1f} GiB at "
        f"{_si(device.memory_bandwidth)}B/s, {_si(peak)}FLOP/s, link {_si(device.link_bandwidth)}B/s",
    ]


def _memory(plan: Plan) -> list[str]:
    rows = [("memory, GiB", "weights", "cache", "prompt", "stream", "temp", "total", "of device")]
    for i, d in enumerate(plan.devices):
        weights, cache, prompt, stream = (_gib(size) for size in (d.weights, d.cache, d.prompt, d.stream))
        temporaries = "?" if d.temporaries is None else _gib(d.temporaries)
        share = f"{100 * d.total / plan.hardware.memory_bytes:.0f} %"
        name, total = _device_name(plan, i), _gib(d.total)
        rows.append((name, weights, cache, prompt, stream, temporaries, total, share))
    return _table(rows)


def _work(plan: Plan) -> list[str]:
    rows = [("work per chunk", "", "TFLOP", "GB", "ms at least", "bound by")]
    for i, device in enumerate(plan.devices):
        for j, part in enumerate(device.parts):
            rows.append(
                (
                    _device_name(plan, i) if j == 0 else "",
                    part.name,
                    f"{part.work.flops / 1e12:.3f}",
                    f"{part.work.bytes / 1e9:.3f}",
                    f"{1e3 * part.seconds:.2f}",
                    part.bound,
                )
            )
    if plan.hop_bytes:
        rows.append(
            ("each hop", "", "", f"{plan.hop_bytes / 1e9:.3f}", f"{1e3 * plan.hop_seconds:.2f}", "link")
        )
    return _table(rows, left=2)


def _summary(plan: Plan) -> list[str]:
    stream, bounds = plan.stream, plan.bounds
    slowest = plan.devices[plan.bottleneck]
    parts = ", ".join(f"{part.name} {1e3 * part.seconds:.1f}" for part in slowest.parts)
    bottleneck = (
        f"device {plan.bottleneck}: {1e3 * slowest.seconds:.1f} ms per chunk of {stream.chunk_frames} frames "
        f"({parts})"
    )
    if not bounds.ticks and len(plan.devices) > 1:
        bottleneck = (
            f"a chunk passes all stages {stream.steps} times, {1e3 * bounds.chunk_seconds:.1f} ms, alone"
        )
    if bounds.ticks:
        latency = (
            f"{_s(bounds.latency_seconds)}: {bounds.ticks} ticks "
            f"({_plural(stream.steps, 'step')} x {_plural(len(plan.devices), 'stage')}) "
            f"of {1e3 * bounds.chunk_seconds:.1f} ms"
        )
        if bounds.live_latency_seconds > bounds.latency_seconds:
            latency += (
                f"\n               {_s(bounds.live_latency_seconds)} from a live source of {TARGET_FPS:g} FPS, "
                f"as a tick waits for its {stream.chunk_frames} frames"
            )
    else:
        latency = f"{_s(bounds.latency_seconds)}: all steps of a chunk one after another"
    return [
        "the best this hardware allows; programs reach a part of it",
        f"  bottleneck   {bottleneck}",
        f"  throughput   {bounds.fps:.1f} FPS (the model was trained at {TARGET_FPS:g})",
        f"  latency      {latency}",
        f"  first frame  {_s(plan.first_frame_seconds)} after the first {stream.first_frames} frames"
        if stream.task == "v2v"
        else f"  first frame  {_s(plan.first_frame_seconds)}",
    ]


def _options(plan: Plan) -> list[str]:
    rows = [("stages", "split", "FPS", "latency", f"at {TARGET_FPS:g} FPS", "GiB", "fits")]
    for o in plan.options:
        latency, live = _s(o.latency_seconds), _s(o.live_latency_seconds)
        split, fits = "+".join(map(str, o.split)), "yes" if o.fits else "no"
        rows.append((str(len(o.split)), split, f"{o.fps:.1f}", latency, live, _gib(o.memory), fits))
    return [*_table(rows, left=2), "", _advice(plan)]


def _advice(plan: Plan) -> str:
    chosen = next((o for o in plan.options if len(o.split) == plan.recommended), None)
    device = plan.hardware
    usable = f"{USABLE_MEMORY * device.memory_bytes / GIB:.1f} GiB of a {device.name} that are for use here"
    if chosen is None:
        return f"recommended: none; with none of these stages does it fit into the {usable}"
    text = f"recommended: {_plural(len(chosen.split), 'stage')}, split {'+'.join(map(str, chosen.split))}: "
    if chosen.fps < TARGET_FPS:
        return f"{text}the fastest that fits, {chosen.fps:.1f} FPS at best; {TARGET_FPS:g} are out of reach"
    fewer = ", fewer do not fit or cannot" if len(chosen.split) > 1 else ""
    return f"{text}it fits and may reach {TARGET_FPS:g} FPS ({chosen.fps:.1f} at best){fewer}"


def _device_name(plan: Plan, index: int) -> str:
    device = plan.devices[index]
    return f"device {index}, blocks {device.first_block}-{device.first_block + device.blocks - 1}"


def _table(rows: Sequence[tuple[str, ...]], left: int = 1) -> list[str]:
    """Returns aligned lines; the first `left` columns are flush left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]

    def line(row: tuple[str, ...]) -> str:
        cells = [
            c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    return [line(row) for row in rows]


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _s(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 0.1 else f"{1e3 * seconds:.0f} ms"


def _si(value: float) -> str:
    """Returns a rate with its prefix, for example "3.35 T"."""
    for exponent, prefix in ((15, "P"), (12, "T"), (9, "G")):
        if value >= 10**exponent:
            return f"{value / 10**exponent:.4g} {prefix}"
    return f"{value:.4g} "
