"""The live service on a real engine: what comes out is what a session gives that runs by itself."""

import time

import numpy as np
import pytest

from svd2_jax.api import SessionSpec
from svd2_jax.config import StreamConfig
from svd2_jax.engine.engine import DeviceEngine
from svd2_jax.engine.mesh import stage_meshes
from svd2_jax.engine.options import PipelineOptions
from svd2_jax.runtime.types import StreamSettings
from svd2_jax.service import LiveService


@pytest.mark.slow
@pytest.mark.parametrize("stages", [1, 2])
def test_live_streams_give_the_frames_of_sessions_that_run_alone(golden_checkpoint, stages):
    options = PipelineOptions(batch_sizes=(1, 2))
    engine = DeviceEngine.from_checkpoint(golden_checkpoint, mesh=stage_meshes(1, stages)[0], options=options)
    cfg = StreamConfig(height=16, width=16, timesteps=(700, 500))
    count, rng = 5 + 4 * 2 + 3, np.random.default_rng(0)
    clips = [rng.integers(0, 256, (count, 16, 16, 3), np.uint8) for _ in range(2)]
    specs = [SessionSpec(prompt, stream=cfg, seed=i) for i, prompt in enumerate(("a red house", "a cat"))]
    alone = [np.concatenate(list(engine.open(s).run(clip))) for s, clip in zip(specs, clips, strict=True)]

    def camera(clip):
        for i, frame in enumerate(clip):
            time.sleep(0.05)
            yield i * 50_000_000, frame

    shown = [[], []]
    with LiveService(engine) as service:
        service.warm_up(specs[0], (2,))
        settings = StreamSettings(
            rate_hz=20, budget_ms=60_000, min_steps=2, stages=stages
        )  # no haste: nothing may be dropped
        streams = [
            service.open(s, settings, lambda frame, _, i=i: shown[i].append(frame), camera(clips[i]))
            for i, s in enumerate(specs)
        ]
        for stream in streams:
            stream.result(timeout_s=300)
    for frames, wanted in zip(shown, alone, strict=True):
        np.testing.assert_array_equal(np.stack(frames), wanted)
