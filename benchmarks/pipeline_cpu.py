"""Throughput of a pipeline of two stages against what its slower stage allows, each on a core of its own.

    python benchmarks/pipeline_cpu.py

Starts two processes, each bound to one core with one CPU device, that run one pipeline of twelve blocks. Needs no
weights, and two idle cores.
"""

import os
import socket
import subprocess
import sys
import time

TICKS = 30
BLOCKS = 12
SPLITS = ((12,), (6, 6), (8, 4), (10, 2))


def free_port() -> int:
    """Returns a port of this host that nobody uses."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def start(split: tuple[int, ...]) -> str:
    """Runs one process for each stage; returns what the last one prints."""
    port, count = free_port(), len(split)
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, *map(str, (port, i, count)), "+".join(map(str, split))],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=1"},
        )
        for i in range(count)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=600)[0] for process in processes]
    return "\n".join(line for line in outputs[-1].splitlines() if not line.startswith("[Gloo]"))


def work(port: str, process: str, count: str, split_text: str) -> None:
    """What each process does."""
    os.sched_setaffinity(0, {int(process)})
    import jax
    import jax.numpy as jnp

    from svd2_jax.config import DiTConfig, ModelConfig, StreamConfig, TextConfig
    from svd2_jax.engine import cluster, params
    from svd2_jax.engine.mesh import stage_meshes
    from svd2_jax.engine.params import StageWeights
    from svd2_jax.engine.pipeline import Pipeline, PipelineInput
    from svd2_jax.engine.programs import Builder

    sizes = DiTConfig(
        dim=256, ffn_dim=1024, num_heads=4, num_layers=BLOCKS, freq_dim=64, text_dim=64, text_len=32
    )
    text = TextConfig(vocab=300, dim=64, dim_attn=64, dim_ffn=64, num_heads=4, num_layers=1)
    model, cfg, dtype = (
        ModelConfig("twelve blocks", sizes, text=text),
        StreamConfig(height=256, width=256),
        jnp.float32,
    )
    split = tuple(int(n) for n in split_text.split("+"))
    with cluster.join(f"localhost:{port}", int(process), int(count)):
        mesh = stage_meshes(1, len(split))[0]
        builder = Builder(model, cfg, jnp.dtype(dtype), mesh)
        weights = StageWeights(model, params.random_items(model, 0, jnp.dtype(dtype)), mesh)
        programs = builder.denoiser(split)
        line = Pipeline(builder, lambda _: programs, weights, split, jnp.ones((1, 32, 64)))

        def latents(frames: int) -> jax.Array:
            return jax.device_put(jnp.ones((frames, *cfg.latent_size, sizes.in_channels)), mesh.home)

        noisy, again = latents(1), (latents(1),)

        def run(ticks: int) -> float:
            """Returns the milliseconds of a tick; reads a result one tick behind, as a session does."""
            started, before = time.perf_counter(), None
            for _ in range(ticks):
                line.tick(PipelineInput(noisy, line.first_timestep, again))
                clean = line.own(line.came_back[-1])
                if before is not None:
                    before.block_until_ready()
                before = clean
            before.block_until_ready()
            return 1e3 * (time.perf_counter() - started) / ticks

        line.first_group(latents(2), (latents(2),))
        run(2 * line.depth)
        print(min(run(TICKS) for _ in range(3)))


def main() -> None:
    """Measures, or is one of the processes that are measured."""
    if len(sys.argv) > 1:
        work(*sys.argv[1:])
        return
    print("split   ms a tick   its slower stage alone   throughput of 1 / bottleneck")
    whole = 0.0
    for split in SPLITS:
        tick = float(start(split))
        whole = whole or tick
        bottleneck = whole * max(split) / BLOCKS
        name = "+".join(map(str, split))
        print(f"{name:6s} {tick:10.1f} {bottleneck:24.1f} {bottleneck / tick:30.0%}", flush=True)


if __name__ == "__main__":
    main()
