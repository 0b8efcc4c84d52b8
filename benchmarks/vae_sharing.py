"""What sharing the VAE between the devices of a pipeline is worth: worked out for GPUs, measured on two CPU devices.

    JAX_PLATFORMS=cpu python benchmarks/vae_sharing.py

The first part asks `svd2_jax.plan` for bounds. The second one times a VAE of a third of the real width, with random
weights, on one of two virtual devices and on both, in turn; each device may use one thread. See vae_sharing.md.
"""

import dataclasses
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from svd2_jax import plan as plan_lib
from svd2_jax.bench.timing import Sample, in_turn, timed
from svd2_jax.config import StreamConfig, VAEConfig, preset
from svd2_jax.engine.costs import costs
from svd2_jax.engine.mesh import StageMesh, stage_meshes
from svd2_jax.engine.params import EngineParams, StageWeights, random_items
from svd2_jax.engine.programs import Builder, CodecPrograms
from svd2_jax.engine.shared_vae import sharing_devices
from svd2_jax.hardware import hardware
from svd2_jax.text import aligned

DEVICES = 2
FLAGS = f"--xla_force_host_platform_device_count={DEVICES} --xla_cpu_multi_thread_eigen=false"
PLANNED = [("wan-1.3b", "h100"), ("wan-1.3b", "rtx4090"), ("wan-14b", "h100"), ("wan-14b", "rtx4090")]
STAGES = (1, 2, 4)
FULL = StreamConfig(height=480, width=832)
SMALL = StreamConfig(height=128, width=128)  # 16 rows of latents
NARROW = VAEConfig(dim=32)
REPEATS = 5


def predicted() -> None:
    """Prints the bounds of pipelines whose ends are on one device each, and of those that share them."""
    header = "model,each device,stages,VAE,split,ms a chunk,encode,blocks,decode,FPS"
    rows: list[tuple[str, ...]] = [tuple(header.split(","))]
    for name, device in PLANNED:
        for stages in STAGES:
            for share_vae in (False, True) if stages > 1 else (False,):
                plan = plan_lib.plan(preset(name), FULL, stages, hardware(device), share_vae=share_vae)
                slowest = plan.devices[plan.bottleneck]
                ms = {part.name: f"{1e3 * part.seconds:.1f}" for part in slowest.parts}
                rows.append(
                    (
                        name, device, str(stages), "shared" if share_vae else "at the ends",
                        "+".join(map(str, plan.bounds.split)), f"{1e3 * plan.bounds.chunk_seconds:.1f}",
                        *(ms.get(part, "-") for part in ("encode", "blocks", "decode")),
                        f"{plan.bounds.fps:.0f}",
                    )
                )  # fmt: skip
    print("\n".join(aligned(rows, left=(0, 1, 3, 4))))
    model, count = preset("wan-1.3b"), sharing_devices(FULL, 4)
    work = costs(model, FULL, jnp.dtype(jnp.bfloat16), count).chunk
    for name, part in (("encode", work.encode), ("decode", work.decode)):
        print(f"{name} over {count} devices: each sends {part.sent / 1e6:.1f} MB a chunk")


def encoder(ends: CodecPrograms, params: EngineParams, mesh: StageMesh) -> Callable[[], Any]:
    """Returns a call that encodes the next chunk, its state donated."""
    first, noise = (
        jax.device_put(np.zeros((count, *SMALL.latent_size, 16), np.float32), mesh.first)
        for count in (SMALL.first_latents, SMALL.frames_per_block)
    )
    group, chunk = (
        jax.device_put(np.zeros((count, SMALL.height, SMALL.width, 3), np.uint8), ends.frames)
        for count in (SMALL.first_frames, SMALL.chunk_frames)
    )
    scale = jax.device_put(np.float32(0.8), ends.scale)
    assert ends.encode_first is not None
    state, _ = ends.encode_first(params.encoder, group, first, scale)

    def run() -> Any:
        nonlocal state
        assert ends.encode is not None
        state, noisy, _ = ends.encode(params.encoder, state, chunk, noise, scale)
        return noisy

    return run


def decoder(ends: CodecPrograms, params: EngineParams, mesh: StageMesh) -> Callable[[], Any]:
    """Returns a call that decodes the next chunk, its state donated."""
    first, latents = (
        jax.device_put(np.zeros((count, *SMALL.latent_size, 16), np.float32), mesh.last)
        for count in (SMALL.first_latents, SMALL.frames_per_block)
    )
    assert ends.decode_first is not None
    state, _ = ends.decode_first(params.decoder, first)

    def run() -> Any:
        nonlocal state
        assert ends.decode is not None
        state, frames = ends.decode(params.decoder, state, latents)
        return frames

    return run


def measured() -> None:
    """Prints how long both ends take on one of the devices and on all of them, and the processor time of that."""
    model = dataclasses.replace(preset("wan-1.3b").with_blocks(DEVICES), vae=NARROW)
    dtype, (mesh,) = jnp.dtype(jnp.float32), stage_meshes(1, DEVICES)
    weights = StageWeights(model, random_items(model, 0, dtype), mesh)
    print(
        f"\n{SMALL.width}x{SMALL.height}, float32, {DEVICES} devices of one thread each on {os.cpu_count()} cores"
    )
    for name, end in (("encode", encoder), ("decode", decoder)):
        sides: list[Callable[[], Sample]] = []
        spent: list[list[float]] = [[], []]
        for share_vae in (False, True):
            builder = Builder(model, SMALL, dtype, mesh, share_vae=share_vae)
            params = weights.params((1,) * DEVICES, "wan", builder.vae_devices)
            run = end(builder.ends(), params, mesh)

            def side(run: Any = run, kept: list[float] = spent[share_vae]) -> Sample:
                before = time.process_time()
                sample = timed(run, jax.block_until_ready)
                kept.append(time.process_time() - before)
                return sample

            sides.append(side)
        samples = in_turn(sides, REPEATS, warm_up=2)
        alone, together = ([sample.total_s for sample in side] for side in samples)
        ratios = sorted(a / b for a, b in zip(alone, together, strict=True))
        one, all_ = (statistics.median(side) for side in (alone, together))
        cpu_one, cpu_all = (statistics.median(side[2:]) for side in spent)
        print(
            f"{name}: {one:.2f} s on one device, {all_:.2f} s on {DEVICES}: {statistics.median(ratios):.2f} times as "
            f"fast (from {ratios[0]:.2f} to {ratios[-1]:.2f}); processor time {cpu_one:.2f} and {cpu_all:.2f} s"
        )


if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = f"{FLAGS} {os.environ.get('XLA_FLAGS', '')}"  # read when JAX makes its devices
    predicted()
    measured()
