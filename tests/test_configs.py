"""The stream presets in configs/ say what their headers promise."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from svd2_jax.config import T2V_TIMESTEPS, V2V_TIMESTEPS, StreamConfig

CONFIGS = Path(__file__).parent.parent / "configs"
DEFAULT = StreamConfig()
EXPECTED = {
    "v2v": DEFAULT,
    "v2v_fast": dataclasses.replace(
        DEFAULT, cache_frames=5, sink_frames=2, sink_threshold=-1.0, decoder="taehv"
    ),
    "v2v_quality": dataclasses.replace(DEFAULT, timesteps=V2V_TIMESTEPS),
    "v2v_low_latency": dataclasses.replace(DEFAULT, mode="sequential"),
    "t2v": dataclasses.replace(
        DEFAULT,
        task="t2v",
        frames_per_block=3,
        timesteps=(*T2V_TIMESTEPS, 0),
        cache_frames=21,
        sink_threshold=-1.0,
    ),
}


def test_every_preset_is_covered():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_preset_loads_as_its_header_says(name):
    text = (CONFIGS / f"{name}.yaml").read_text()
    assert StreamConfig.from_dict(yaml.safe_load(text)) == EXPECTED[name]
    header = [line for line in text.splitlines() if line.startswith("#")]
    assert any(f"svd2 run --checkpoint ckpt --config configs/{name}.yaml" in line for line in header)
    assert any(line.startswith("# Expect: ") for line in header)
