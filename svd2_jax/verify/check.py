"""What every kind of golden file needs: reading arrays, and collecting deviations."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from svd2_jax.config import Storage, StreamConfig

Arrays = Mapping[str, np.ndarray]


@dataclass
class Check:
    """Collects what one golden file shows of streams whose cache is held in `cache_dtype`."""

    cache_dtype: Storage = "compute"
    error: float = 0.0
    problems: list[str] = dataclasses.field(default_factory=list)
    _squares: float = 0.0
    _wanted_squares: float = 0.0

    @property
    def relative_error(self) -> float:
        return (self._squares / self._wanted_squares) ** 0.5 if self._wanted_squares else 0.0

    def close(self, got: Any, wanted: Any, what: str, relative: bool = False) -> None:
        """Notes the largest difference; a wrong shape or a NaN is a problem."""
        got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
        if got.shape != wanted.shape:
            self.problems.append(f"{what}: expected shape {wanted.shape}, got {got.shape}")
            return
        difference = np.abs(got - wanted) / (np.abs(wanted) if relative else 1.0)
        if not np.isfinite(difference).all():  # on either side; a comparison with NaN would pass
            self.problems.append(f"{what}: not finite")
        self.error = max(self.error, float(difference.max(initial=0.0)))
        self._squares += float(np.square(got - wanted).sum())
        self._wanted_squares += float(np.square(wanted).sum())

    def equal(self, got: Any, wanted: Any, what: str) -> None:
        """Notes a problem unless both are equal."""
        if not np.array_equal(np.asarray(got), np.asarray(wanted)):
            self.problems.append(f"{what} differs")


def load(file: Path) -> dict[str, np.ndarray]:
    """Returns the arrays of a golden file."""
    with open(file, "rb") as f, np.load(f) as arrays:  # numpy leaves a damaged file open
        return {name: arrays[name] for name in arrays.files}


def latents_last(x: np.ndarray) -> np.ndarray:
    """Latents [..., F, C, h, w] -> [..., F, h, w, C]."""
    return np.moveaxis(x, -3, -1)


def video_last(x: np.ndarray) -> np.ndarray:
    """Video or latents [B, C, T, H, W] -> [B, T, H, W, C]."""
    return np.moveaxis(x, 1, -1)


def numbered(g: Arrays, prefix: str) -> list[np.ndarray]:
    """Returns prefix0, prefix1, ... in order."""
    names = (f"{prefix}{i}" for i in range(len(g)))
    return [g[name] for name in names if name in g]


def stream_config(g: Arrays, **settings: Any) -> StreamConfig:
    """Returns the stream configuration that a golden file was made with."""
    return StreamConfig(
        timesteps=tuple(int(t) for t in g["steps"]),
        cache_frames=int(g["cache_frames"]),
        sink_frames=int(g["sink_frames"]),
        sink_threshold=float(g["adapt_sink_threshold"]),
        **settings,
    )
