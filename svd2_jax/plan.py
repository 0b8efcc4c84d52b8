"""Works out, without weights or devices, what a stream needs and how fast it can be at best.

Shapes are traced, not computed: memory follows from what each device of the pipeline holds, time from the
arithmetic and the memory traffic of what it runs (`engine.count_flops`) and from what the hardware can do at most
(`hardware`). Real programs are slower; a plan tells which number of devices is too small, not which one is enough.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from svd2_jax.config import ModelConfig, StreamConfig
from svd2_jax.engine.costs import CostModel, costs
from svd2_jax.engine.memory import LARGEST_SHARE, StageMemory, Temporaries, stage_memory
from svd2_jax.engine.options import checked_split
from svd2_jax.engine.policy import checked_dtype
from svd2_jax.engine.shared_vae import sharing_devices
from svd2_jax.errors import ConfigError
from svd2_jax.hardware import GIB, Cost, Hardware, roofline
from svd2_jax.text import aligned, held_in, si

STAGE_COUNTS = (1, 2, 3, 4, 8)  # compared in every plan
TARGET_FPS = 16.0  # the rate Wan2.1 was trained at
EFFICIENCY = (
    0.4  # of the least time's speed; what to count on where nothing was measured (recommendation only)
)

FindTemporaries = Callable[[tuple[int, ...]], Temporaries]
"""Takes the blocks per stage; returns what the compiled programs need in passing."""


@dataclass(frozen=True)
class PlanItem:
    """Something a device computes for every chunk.

    Attributes:
      name: "encode", "timesteps", "blocks" (patch embedding and head included) or "decode"; of what devices share, this
        one's part.
      work: its arithmetic and memory traffic.
      seconds: the least time it takes.
      bound: what it waits for, "compute", "memory" or "link".
    """

    name: str
    work: Cost
    seconds: float
    bound: str


@dataclass(frozen=True)
class DevicePlan(StageMemory):
    """One device of the pipeline; sizes in bytes.

    Attributes:
      temporaries: what it needs in passing at most, while a program runs or the cache's rows are made; None if it
        was not asked for.
      parts: what it computes for every chunk, one after another.
    """

    temporaries: int | None
    parts: tuple[PlanItem, ...]

    @property
    def total(self) -> int:
        """All of its memory, with the temporaries if they are known."""
        return self.held + (self.temporaries or 0)

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
      weight_dtype: what the transformer's linear layers are held in, see `DiTConfig`.
      hardware: each device.
      devices: the pipeline, first stage first.
      vae_devices: how many of them share encoding, and how many decoding.
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
    weight_dtype: str
    hardware: Hardware
    devices: tuple[DevicePlan, ...]
    vae_devices: int
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
    temporaries: FindTemporaries | None = None,
    share_vae: bool = False,
) -> Plan:
    """Plans a stream on a pipeline; takes seconds and little memory, whatever the model's size.

    Args:
      model: sizes of the networks.
      stream: what the stream computes.
      stages: number of stages, one device each.
      hardware: each device.
      dtype: "bfloat16" or "float32", of arithmetic, and of weights and cache unless these are held in 8 bits.
      split: blocks per stage; None takes the best.
      temporaries: called once, with the split, for what only a compiler knows; other splits are taken to need
        the same.
      share_vae: whether all devices share encoding and decoding, see `engine.shared_vae`.

    Raises:
      ConfigError: unknown dtype, more stages than blocks, or a split that does not fit.
    """
    layers, compute = model.dit.num_layers, checked_dtype(dtype)
    _check_stages(model, stages, split)

    def cost_of(stages: int) -> CostModel:
        return costs(model, stream, compute, sharing_devices(stream, stages) if share_vae else 1)

    cost = cost_of(stages)
    seconds = functools.partial(_seconds, cost, hardware)
    split = split or cost.fastest_split(stages, seconds)
    transient = None if temporaries is None else temporaries(split)
    devices = _devices(cost, hardware, split, transient)

    def bounds_of(stages: int) -> Bounds:
        other = cost_of(stages)
        needed = transient and transient.shared_by(other.vae_devices)
        fastest = other.fastest_split(stages, seconds)
        return _bounds(other, hardware, _devices(other, hardware, fastest, needed))

    options = [bounds_of(count) for count in sorted({*STAGE_COUNTS, stages}) if count <= layers]
    return Plan(
        model=model.name,
        stream=stream,
        dtype=dtype,
        weight_dtype=model.dit.weight_dtype,
        hardware=hardware,
        devices=devices,
        vae_devices=cost.vae_devices,
        bounds=_bounds(cost, hardware, devices),
        bottleneck=max(range(stages), key=lambda i: devices[i].seconds),
        hop_bytes=cost.sizes.message if stages > 1 else 0,
        hop_seconds=_hop_seconds(cost.sizes.message, hardware, stages),
        first_frame_seconds=_first_frame_seconds(cost, hardware, split),
        options=tuple(options),
        recommended=_recommended(options),
    )


def _check_stages(model: ModelConfig, stages: int, split: tuple[int, ...] | None) -> None:
    layers = model.dit.num_layers
    if not 1 <= stages <= layers:
        raise ConfigError(f"stages must be 1 to {layers}, the blocks of {model.name}; got {stages}")
    checked_split(split, layers, stages)


def usable_memory(hardware: Hardware) -> int:
    """Returns the bytes of a device that a plan may fill."""
    return int(LARGEST_SHARE * hardware.memory_bytes)


def _recommended(options: Sequence[Bounds]) -> int | None:
    """Returns the fewest stages that fit and should reach the target rate, else the fastest that fit."""
    fitting = [option for option in options if option.fits]
    enough = [option for option in fitting if EFFICIENCY * option.fps >= TARGET_FPS]
    best = enough[0] if enough else max(fitting, key=lambda option: option.fps, default=None)
    return None if best is None else len(best.split)


# --- what a pipeline makes of them


def _passes(stream: StreamConfig) -> int:
    """Passes of a stage for every chunk: the stream batch takes all steps at once."""
    return 1 if stream.mode == "stream" else stream.steps


def _hop_seconds(size: int, hardware: Hardware, stages: int) -> float:
    return size / hardware.link_bandwidth if stages > 1 else 0.0


def _seconds(costs: CostModel, hardware: Hardware, work: Cost) -> float:
    return roofline(work, hardware, 8 * costs.dtype.itemsize).seconds


def _devices(
    costs: CostModel, hardware: Hardware, split: tuple[int, ...], temporaries: Temporaries | None
) -> tuple[DevicePlan, ...]:
    work, passes, stages, sharing = costs.chunk, _passes(costs.cfg), len(split), costs.vae_devices
    devices = []
    for i, memory in enumerate(stage_memory(costs.model, costs.cfg, costs.dtype, split, sharing)):
        works = {
            "encode": work.encode if i < sharing else Cost(),
            "timesteps": passes * work.condition if i == 0 else Cost(),
            "blocks": passes * (memory.blocks * work.block + work.ends),
            "decode": work.decode if i >= stages - sharing else Cost(),
        }
        parts = []
        for name, cost in works.items():
            if cost != Cost():
                least = roofline(cost, hardware, 8 * costs.dtype.itemsize)
                parts.append(PlanItem(name, cost, least.seconds, least.bound))
        devices.append(
            DevicePlan(
                **dataclasses.asdict(memory),
                temporaries=None if temporaries is None else max(temporaries.on(i, stages), memory.opening),
                parts=tuple(parts),
            )
        )
    return tuple(devices)


def _bounds(costs: CostModel, hardware: Hardware, devices: tuple[DevicePlan, ...]) -> Bounds:
    stream, stages, passes = costs.cfg, len(devices), _passes(costs.cfg)
    hop = _hop_seconds(costs.sizes.message, hardware, stages)
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
        # What devices share they do at the same time.
        ends = [
            [p.seconds for d in devices for p in d.parts if p.name == name] for name in ("encode", "decode")
        ]
        latency = live = around + sum(max(seconds, default=0.0) for seconds in ends)
    memory = max(device.total for device in devices)
    return Bounds(
        split=tuple(device.blocks for device in devices),
        chunk_seconds=chunk,
        fps=stream.chunk_frames / chunk,
        ticks=ticks,
        latency_seconds=latency,
        live_latency_seconds=live,
        memory=memory,
        fits=memory <= usable_memory(hardware),
    )


def _first_frame_seconds(costs: CostModel, hardware: Hardware, split: tuple[int, ...]) -> float:
    """Returns the time of the first group: all steps one after another, each through all stages, no overlap."""
    seconds, work = functools.partial(_seconds, costs, hardware), costs.first_group
    step = seconds(work.condition) + sum(seconds(blocks * work.block + work.ends) for blocks in split)
    step += len(split) * _hop_seconds(costs.sizes.first_message, hardware, len(split))
    return seconds(work.encode) + costs.cfg.steps * step + seconds(work.decode)


# --- as text


def report(plan: Plan) -> str:
    """Returns the plan as text for a terminal."""
    parts = (_header, _memory, _work, _summary, _options)
    return "\n\n".join("\n".join(part(plan)) for part in parts) + "".join(f"\n{x}" for x in too_full(plan))


def _header(plan: Plan) -> list[str]:
    stream, device = plan.stream, plan.hardware
    peak = device.peak_flops(8 * checked_dtype(plan.dtype).itemsize)
    return [
        f"{plan.model}, {stream.width}x{stream.height}, {_plural(stream.steps, 'step')}, {stream.task}, "
        f"mode {stream.mode}, decoder {stream.decoder}, "
        f"{plan.dtype}{held_in(plan.weight_dtype, stream.cache_dtype)}",
        f"{len(plan.devices)} x {device.name}: {device.memory_bytes / GIB:.1f} GiB at "
        f"{si(device.memory_bandwidth)}B/s, {si(peak)}FLOP/s, link {si(device.link_bandwidth)}B/s",
        *(
            [f"{plan.vae_devices} devices share encoding, and as many decoding"]
            if plan.vae_devices > 1
            else []
        ),
    ]


def _memory(plan: Plan) -> list[str]:
    rows = [("memory, GiB", "weights", "cache", "prompt", "stream", "temp", "total", "of device")]
    for i, d in enumerate(plan.devices):
        weights, cache, prompt, stream = (_gib(size) for size in (d.weights, d.cache, d.prompt, d.stream))
        temporaries = "?" if d.temporaries is None else _gib(d.temporaries)
        share = f"{100 * d.total / plan.hardware.memory_bytes:.0f} %"
        name, total = _device_name(plan, i), _gib(d.total)
        rows.append((name, weights, cache, prompt, stream, temporaries, total, share))
    total = sum(d.weights for d in plan.devices)
    largest = max(d.weights for d in plan.devices)
    bound = "" if plan.devices[0].temporaries is None else "; temp is an upper bound"
    share = f"{100 * largest / total:.0f} % of them at most on one device"
    return [*aligned(rows), f"weights: {_gib(total)} in all, {share}{bound}"]


def too_full(plan: Plan) -> list[str]:
    """Returns a line for each device whose memory is too small; they are the end of the report."""
    usable, lines = usable_memory(plan.hardware), []
    for i, device in enumerate(plan.devices):
        if device.total > usable:
            lines.append(
                f"device {i} exceeds its memory by {(device.total - usable) / GIB:.1f} GiB: it needs "
                f"{device.total / GIB:.1f} of the {usable / GIB:.1f} that are for use on a {plan.hardware.name}"
            )
    return lines


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
    return aligned(rows, left=(0, 1))


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
        if stream.task == "v2v" and bounds.live_latency_seconds > bounds.latency_seconds:
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
    return [*aligned(rows, left=(0, 1)), "", _advice(plan)]


def _advice(plan: Plan) -> str:
    chosen = next((o for o in plan.options if len(o.split) == plan.recommended), None)
    device = plan.hardware
    usable = f"{usable_memory(device) / GIB:.1f} GiB of a {device.name} that are for use here"
    if chosen is None:
        return f"recommended: none; with none of these stages does it fit into the {usable}"
    text = f"recommended: {_plural(len(chosen.split), 'stage')}, split {'+'.join(map(str, chosen.split))}: "
    likely = EFFICIENCY * chosen.fps
    rate = f"{likely:.1f} FPS at {100 * EFFICIENCY:.0f} % of the best"
    if likely < TARGET_FPS:
        return f"{text}the fastest that fits, but only {rate}"
    return f"{text}the fewest that fit and reach {TARGET_FPS:g} FPS, {rate}"


def _device_name(plan: Plan, index: int) -> str:
    device = plan.devices[index]
    return f"device {index}, blocks {device.first_block}-{device.first_block + device.blocks - 1}"


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _s(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 0.1 else f"{1e3 * seconds:.0f} ms"
