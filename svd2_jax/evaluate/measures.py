"""Measures of pictures and of streams, in NumPy; docs/evaluation.md says the same in words.

Frames are uint8 RGB [H, W, 3] and clips [T, H, W, 3]. All numbers are of values in [0, 1]: differences are taken in
floating point, never between bytes, which wrap around.
"""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import ndimage

from svd2_jax.errors import ConfigError

LUMA = (0.299, 0.587, 0.114)  # of red, green and blue, ITU-R BT.601
MOST_DB = 100.0  # the PSNR of equal clips, which would be infinite
SSIM_SIGMA = 1.5  # pixels of the window, Wang et al. 2004
NEAREST_SIGMA = 1.0  # pixels of the blur before styles are told apart
CELLS = 8  # local means in each direction, for flicker
FLOW_LINES = 160  # optical flow is computed on pictures reduced to about this height
# Relative and absolute (pixels squared) error allowed there and back, Sundaram et al. 2010.
FLOW_SLACK = (0.01, 0.5)


def require_tools() -> None:
    """Raises ConfigError if the package that the measures need is not installed."""
    _skimage("metrics")


def _skimage(module: str) -> Any:
    """Imports a module of scikit-image."""
    try:
        return importlib.import_module(f"skimage.{module}")
    except ImportError:
        raise ConfigError(
            'measuring pictures needs scikit-image; install it: pip install "svd2-jax[eval]"'
        ) from None


def unit(frames: np.ndarray) -> np.ndarray:
    """Returns uint8 values as float32 in [0, 1]."""
    return frames.astype(np.float32) / 255.0


def luma(frame: np.ndarray) -> np.ndarray:
    """Returns the brightness [..., H, W] in [0, 1] of uint8 frames."""
    return unit(frame) @ np.asarray(LUMA, np.float32)


# --- likeness of two clips


@dataclass(frozen=True)
class Likeness:
    """How like two clips are.

    Attributes:
      psnr_db: peak signal-to-noise ratio of the whole clip.
      ssim: structural similarity, mean of the frames; 1 for equal clips.
    """

    psnr_db: float
    ssim: float


def psnr_db(mean_squared_error: float) -> float:
    """Returns the PSNR of an error in [0, 1], at most `MOST_DB`."""
    return MOST_DB if mean_squared_error <= 0 else min(MOST_DB, -10 * math.log10(mean_squared_error))


def squared_error(a: np.ndarray, b: np.ndarray) -> float:
    """Returns the mean squared difference of frames or clips."""
    return float(np.mean(np.square(unit(a) - unit(b)), dtype=np.float64))


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Returns the structural similarity of two frames: Gaussian windows, mean of the channels (Wang et al. 2004).

    Pictures must be at least 11 pixels high and wide; those of a stream are.
    """
    return float(
        _skimage("metrics").structural_similarity(
            unit(a), unit(b), channel_axis=-1, data_range=1.0, gaussian_weights=True, sigma=SSIM_SIGMA,
            use_sample_covariance=False,
        )
    )  # fmt: skip


def likeness(a: np.ndarray, b: np.ndarray) -> Likeness:
    """Compares two clips of the same shape, frame by frame."""
    errors = [squared_error(x, y) for x, y in zip(a, b, strict=True)]
    similar = [ssim(x, y) for x, y in zip(a, b, strict=True)]
    return Likeness(psnr_db(float(np.mean(errors))), float(np.mean(similar)))


def blurred(clip: np.ndarray) -> np.ndarray:
    """Returns a clip in [0, 1] without its finest detail, float16 to take less room; see `nearest`."""
    smooth = np.empty(clip.shape, np.float16)
    for frame, out in zip(clip, smooth, strict=True):
        out[...] = ndimage.gaussian_filter(unit(frame), (NEAREST_SIGMA, NEAREST_SIGMA, 0))
    return smooth


def nearest(clip: np.ndarray, targets: Sequence[np.ndarray]) -> int:
    """Returns which target has the least mean squared difference from a clip; all of them `blurred`."""

    def distance(target: np.ndarray) -> float:
        squares = [np.mean(np.square(a.astype(np.float32) - b)) for a, b in zip(clip, target, strict=True)]
        return float(np.mean(squares))

    return min(range(len(targets)), key=lambda i: distance(targets[i]))


# --- steadiness of a stream


@dataclass(frozen=True)
class Flow:
    """Where the pixels of a frame are in another one.

    Attributes:
      offset: float32 [2, H, W], rows and columns to go.
      valid: bool [H, W], False where there is no such place, or where the way back does not lead home.
    """

    offset: np.ndarray
    valid: np.ndarray


@dataclass(frozen=True)
class Motion:
    """The optical flow of a clip of T frames, in both directions.

    Attributes:
      to_previous: T - 1 of them, from frame t + 1 to frame t.
      to_next: T - 1 of them, from frame t to frame t + 1.
    """

    to_previous: tuple[Flow, ...]
    to_next: tuple[Flow, ...]


@dataclass(frozen=True)
class Steadiness:
    """How a stream changes from frame to frame; means over time, NaN where there was nothing to take one of.

    Attributes:
      warp_error: mean absolute difference from the frame before, moved along the input's optical flow.
      flicker: mean absolute second difference over time of the brightness of 8 x 8 parts of the picture.
      distance: mean absolute difference from the frame before.
    """

    warp_error: float
    flicker: float
    distance: float


def motion(clip: np.ndarray) -> Motion:
    """Returns a clip's optical flow (TV-L1, Zach et al. 2007)."""
    pairs = [_flows(a, b) for a, b in itertools.pairwise(clip)]
    return Motion(tuple(back for _, back in pairs), tuple(there for there, _ in pairs))


def _flows(a: np.ndarray, b: np.ndarray) -> tuple[Flow, Flow]:
    """Returns the flow from `a` to `b` and back."""
    there, back = _offset(a, b), _offset(b, a)
    return Flow(there, consistent(there, back)), Flow(back, consistent(back, there))


def _offset(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    size = a.shape[:2]
    factor = max(1, round(size[0] / FLOW_LINES))
    small = [_reduced(luma(frame), factor) for frame in (a, b)]
    offset = np.asarray(_skimage("registration").optical_flow_tvl1(*small), np.float32)
    if factor == 1:
        return offset
    scale = (1, size[0] / offset.shape[1], size[1] / offset.shape[2])
    return factor * np.asarray(ndimage.zoom(offset, scale, order=1, mode="nearest", grid_mode=True))


def _reduced(values: np.ndarray, factor: int) -> np.ndarray:
    """Returns the means of squares of `factor` pixels; what is left over below and at the right is not looked at."""
    height, width = (n // factor * factor for n in values.shape)
    squares = values[:height, :width].reshape(height // factor, factor, width // factor, factor)
    return squares.mean(axis=(1, 3))


def consistent(there: np.ndarray, back: np.ndarray) -> np.ndarray:
    """Returns where a flow stays inside the picture and leads home again, bool [H, W]."""
    places = _places(there)
    limit = np.array(there.shape[1:]).reshape(2, 1, 1) - 1
    inside = np.all((places >= 0) & (places <= limit), axis=0)
    returned = np.stack([_sample(part, places) for part in back])
    error = np.square(there + returned).sum(axis=0)
    lengths = np.square(there).sum(axis=0) + np.square(returned).sum(axis=0)
    relative, absolute = FLOW_SLACK
    return inside & (error <= relative * lengths + absolute)


def _places(offset: np.ndarray) -> np.ndarray:
    """Returns the rows and columns [2, H, W] that a flow leads to."""
    return np.indices(offset.shape[1:], np.float32) + offset


def _sample(values: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Returns values [H, W] at fractional places [2, H, W], bilinearly."""
    return np.asarray(ndimage.map_coordinates(values, places, order=1, mode="nearest"))


def warped(frame: np.ndarray, flow: Flow) -> np.ndarray:
    """Returns a uint8 frame moved to where a flow comes from, float32 [H, W, 3] in [0, 1]."""
    places = _places(flow.offset)
    return np.stack([_sample(unit(frame[..., c]), places) for c in range(3)], axis=-1)


def warp_error(before: np.ndarray, now: np.ndarray, flow: Flow) -> float:
    """Returns the mean absolute difference of a frame from the one before, moved along the flow to it.

    Args:
      before: uint8 [H, W, 3].
      now: uint8 [H, W, 3].
      flow: from `now` to `before`; only its valid pixels count.

    Returns:
      A value in [0, 1]; NaN if no pixel is valid.
    """
    if not flow.valid.any():
        return math.nan
    return float(np.abs(unit(now) - warped(before, flow))[flow.valid].mean())


def distance(before: np.ndarray, now: np.ndarray) -> float:
    """Returns the mean absolute difference, in [0, 1], of two uint8 frames."""
    return float(np.abs(unit(now) - unit(before)).mean())


def local_means(frame: np.ndarray) -> np.ndarray:
    """Returns the mean brightness of 8 x 8 parts of a picture that are as equal as its size allows."""
    values = luma(frame)
    rows, columns = (np.arange(CELLS) * n // CELLS for n in values.shape)
    sums = np.add.reduceat(np.add.reduceat(values, rows, axis=0), columns, axis=1)
    heights, widths = (
        np.diff(starts, append=n) for starts, n in zip((rows, columns), values.shape, strict=True)
    )
    return sums / (heights[:, None] * widths[None, :])


class SteadinessMeter:
    """Takes in the frames of a stream, of any length, and tells how steady they are."""

    def __init__(self):
        self._frames: list[np.ndarray] = []  # the last one
        self._means: list[np.ndarray] = []  # of the last two
        self._values: tuple[list[float], list[float], list[float]] = ([], [], [])

    def add(self, frame: np.ndarray, flow: Flow | None) -> None:
        """Takes the next frame; `flow` leads from it to the one before, None for the first frame."""
        errors, flickers, distances = self._values
        if self._frames and flow is not None:
            errors.append(warp_error(self._frames[-1], frame, flow))
            distances.append(distance(self._frames[-1], frame))
        means = local_means(frame)
        if len(self._means) == 2:
            flickers.append(float(np.abs(means - 2 * self._means[1] + self._means[0]).mean()))
        self._frames, self._means = [frame], [*self._means[-1:], means]

    def take(self) -> Steadiness:
        """Returns the means since the last call."""
        found = Steadiness(*map(mean, self._values))
        self._values = ([], [], [])
        return found


def steadiness(clip: np.ndarray, of_input: Motion) -> Steadiness:
    """Returns how steady a clip is whose input had this motion."""
    meter = SteadinessMeter()
    for frame, flow in zip(clip, (None, *of_input.to_previous), strict=True):
        meter.add(frame, flow)
    return meter.take()


def mean(values: Iterable[float]) -> float:
    """Returns the mean of the values that are numbers; NaN without any."""
    numbers = [value for value in values if not math.isnan(value)]
    return float(np.mean(numbers)) if numbers else math.nan


# --- what drifts


@dataclass(frozen=True)
class Tone:
    """Mean brightness, standard deviation of the brightness, and mean of a pixel's largest less its least channel."""

    brightness: float
    contrast: float
    saturation: float


def tone(frame: np.ndarray) -> Tone:
    """Returns the tone of a uint8 frame."""
    values, channels = luma(frame), unit(frame)
    saturation = channels.max(axis=-1) - channels.min(axis=-1)
    return Tone(float(values.mean()), float(values.std()), float(saturation.mean()))


# --- a change of the prompt


def shares_of_old(changed: np.ndarray, old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Returns for each frame how much of the old picture is left in a stream whose prompt has changed.

    With root mean square distances, that to the new stream by the sum of both: 0 is the new picture, 1 the old one.

    Args:
      changed: clip uint8 [T, H, W, 3] of the stream whose prompt changes.
      old: of the one that keeps the old prompt.
      new: of the one that had the new prompt from the start.

    Returns:
      float64 [T]; NaN where all three are equal.
    """

    def distances(other: np.ndarray) -> np.ndarray:
        return np.sqrt([squared_error(a, b) for a, b in zip(changed, other, strict=True)])

    from_old, from_new = distances(old), distances(new)
    total = from_old + from_new
    return np.divide(from_new, total, out=np.full(len(total), np.nan), where=total > 0)


def first_below(shares: np.ndarray, start: int, limit: float) -> int | None:
    """Returns the first frame from `start` on whose share is below the limit; None if there is none."""
    found = np.flatnonzero(shares[start:] < limit)
    return start + int(found[0]) if len(found) else None


def stays_below(shares: np.ndarray, start: int, limit: float) -> int | None:
    """Returns the frame from `start` on from which all shares are below the limit; None if the last one is not."""
    above = np.flatnonzero(~(shares[start:] < limit))
    settled = start + (int(above[-1]) + 1 if len(above) else 0)
    return settled if settled < len(shares) else None
