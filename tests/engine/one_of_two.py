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
from svd2_jax.engine.stage_times import SAMPLES, measure_stages

SPEC = SessionSpec("a dog", StreamConfig(height=32, width=48), pixels="float32")
FRAMES = 49
BEFORE, AFTER = (1, 2, 1), (1, 1, 2)  # a block changes processes


def draw(engine, ready=lambda: None):
    """Returns the frames, as far as they are here."""
    with engine.open(SPEC) as session:
        ready()
        done = []
        for frame in media.synthetic_clip(FRAMES, 32, 48):
            done += session.push(frame[None])
        done += session.finish()
        for chunk in done:
            chunk.wait()
        return [chunk.frames() for chunk in done if chunk.is_here]


def measure(session):
    """Measures the stages of this process, and says that a block takes twice as long on the first two."""
    assert session.pipeline.split == BEFORE
    times = measure_stages(session)
    for stage, of_stage in zip(session.pipeline.mesh.local_stages, times, strict=True):
        assert of_stage.shape == (2, SAMPLES)
        of_stage[:] = [[(2.0, 4.0, 1.0)[stage]], [0.0]]
    return times


def main():
    port, process, checkpoint, result = sys.argv[1:]
    with cluster.join(f"localhost:{port}", int(process), 2) as group:
        # Three stages: the second process drives one of them.
        engine = DeviceEngine.from_checkpoint(checkpoint, mesh=stage_meshes(1, 3)[0])
        assert engine.measure_split(SPEC, group.meet, measure) == AFTER
        if frames := draw(engine, group.meet):
            np.save(result, np.concatenate(frames))


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"  # JAX reads these when it opens its devices
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
    main()
