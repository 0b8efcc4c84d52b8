"""Run by test_processes.py: one of two processes that draw one stream; the one with its end saves the frames.

python one_of_two.py PORT PROCESS_ID CHECKPOINT RESULT.npy
"""

import os
import sys

import numpy as np

from svd2_jax import media
from svd2_jax.api import SessionSpec
from svd2_jax.config import StreamConfig
from svd2_jax.engine import cluster
from svd2_jax.engine.engine import DeviceEngine
from svd2_jax.engine.mesh import stage_meshes

SPEC = SessionSpec("a dog", StreamConfig(height=32, width=48), pixels="float32")
FRAMES = 49
MOVES = {4: (2, 1, 1), 5: (1, 1, 2), 6: (1, 2, 1)}  # blocks that change processes, back and forth


def draw(engine, moves=None, ready=lambda: None):
    """Returns the frames, as far as they are here."""
    with engine.open(SPEC) as session:
        ready()
        done = []
        for number, frame in enumerate(media.synthetic_clip(FRAMES, 32, 48)):
            if moves and number % 4 == 0 and number // 4 in moves:
                session._pipeline.move(moves[number // 4])
            done += session.push(frame[None])
        done += session.finish()
        for chunk in done:
            chunk.wait()
        return [chunk.frames() for chunk in done if chunk.is_here]


def main():
    port, process, checkpoint, result = sys.argv[1:]
    with cluster.join(f"localhost:{port}", int(process), 2) as group:
        # Three stages: the second process drives one of them.
        engine = DeviceEngine.from_checkpoint(checkpoint, mesh=stage_meshes(1, 3)[0])
        if frames := draw(engine, MOVES, group.meet):
            np.save(result, np.concatenate(frames))


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"  # JAX reads these when it opens its devices
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
    main()
