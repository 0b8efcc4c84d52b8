"""What comes with the package: a small trained model and a clip to try it on."""

from __future__ import annotations

import os
from pathlib import Path

from svd2_jax.errors import ConfigError

ASSETS = Path(__file__).parent / "assets"
TINY = "tiny"
TINY_LEAST_NOISE = 0.3  # noise scale, of those that it was trained with (training.denoiser)
DEMO_CLIP = ASSETS / "demo.mp4"
RANDOM = "random:"


def checkpoint_folder(name: str | os.PathLike[str]) -> Path:
    """Returns the folder of a checkpoint: "tiny" is the model that comes with the package, all else is a path.

    Raises:
      ConfigError: it is empty.
    """
    if not os.fspath(name):
        raise ConfigError(f"the checkpoint's name is empty, got {name!r}; give its folder, or {TINY!r}")
    return ASSETS / TINY if name == TINY else Path(name)


def random_preset(name: str | os.PathLike[str]) -> str | None:
    """Returns PRESET of "random:PRESET", which stands for random weights in its sizes; None for all else."""
    text = os.fspath(name)
    return text.removeprefix(RANDOM) if text.startswith(RANDOM) else None
