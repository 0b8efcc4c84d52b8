"""Throughput of pipelines on virtual CPU devices against what their slowest stage allows.

    python benchmarks/pipeline_cpu.py

Every device computes on one thread, so that two stages have a core each on a machine with two. Needs no weights.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=4 --xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
)

import time

import jax
import jax.numpy as jnp
import numpy as np

from svd2_jax.config import DiTConfig, ModelConfig, StreamConfig, TextConfig
from svd2_jax.engine import params
from svd2_jax.engine.mesh import stage_meshes
from svd2_jax.engine.params import StageWeights
from svd2_jax.engine.pipeline import Pipeline
from svd2_jax.engine.programs import Builder

TICKS = 40
MODEL = ModelConfig(
    "twelve blocks",
    DiTConfig(dim=256, ffn_dim=1024, num_heads=4, num_layers=12, freq_dim=64, text_dim=64, text_len=32),
    text=TextConfig(vocab=300, dim=64, dim_attn=64, dim_ffn=64, num_heads=4, num_layers=1),
)
CFG = StreamConfig(height=256, width=256)
DTYPE = jnp.dtype(jnp.float32)


def measure(split: tuple[int, ...]) -> tuple[float, float]:
    """Returns the seconds of a tick, and of those the seconds until the host is free again."""
    mesh = stage_meshes(1, len(split))[0]
    builder = Builder(MODEL, CFG, DTYPE, mesh)
    weights = StageWeights(MODEL, params.random_items(MODEL, 0, DTYPE), mesh)
    shape = (MODEL.dit.in_channels,)

    def latents(frames: int) -> jax.Array:
        return jax.device_put(jnp.ones((frames, *CFG.latent_size, *shape)), mesh.first)

    line = Pipeline(builder, builder.denoiser(split), weights, split, jnp.ones((1, 32, 64)))
    line.first_group(latents(2), (latents(2),))
    noisy, again = latents(1), (latents(1),)
    for _ in range(2 * line.depth):
        clean = line.chunk(noisy, line.first_timestep, again)
    clean.block_until_ready()
    started, host = time.perf_counter(), 0.0
    for _ in range(TICKS):
        handed = time.perf_counter()
        clean = line.chunk(noisy, line.first_timestep, again)
        host += time.perf_counter() - handed
        clean.block_until_ready()  # a chunk at a time, as a live stream has it
    return (time.perf_counter() - started) / TICKS, host / TICKS


def main() -> None:
    jax.config.update("jax_default_matmul_precision", "highest")
    whole = min(measure((12,))[0] for _ in range(3))
    print(f"one stage: {1e3 * whole:.1f} ms a tick")
    print("split      ms a tick   speed-up   of 12 / longest stage   host ms")
    for split in ((6, 6), (8, 4), (10, 2)):
        tick, host = min(measure(split) for _ in range(3))
        speedup = whole / tick
        print(
            f"{'+'.join(map(str, split)):8s} {1e3 * tick:11.1f} {speedup:10.2f} {speedup / (12 / max(split)):18.0%}"
            f" {1e3 * host:13.2f}"
        )


if __name__ == "__main__":
    main()
