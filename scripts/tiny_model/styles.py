"""Styles: clip to clip by classical image processing, one named function each, for training pairs of a stylizer.

A style maps every frame by itself: the same frame gives the same output wherever it stands in a clip, so nothing
flickers and any clip length works, a stream included. What is fixed to the screen (paper, vignette, halftone,
grid) is coarse and weak. The styles are told apart by colour and tone first, then by structures of 3 pixels and
more at 96 lines, the size for which lengths are given; they grow with the picture's height.

Inside, pictures are float32 [T, H, W, 3] in [0, 1] and maps are float32 [T, H, W]. Sums over channels are written
out, because a matrix product may round one frame differently among others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import Any, cast

import numpy as np
from scipy import ndimage

from svd2_jax.errors import ConfigError

Array = np.ndarray[Any, np.dtype[Any]]
Style = Callable[[Array], Array]  # uint8 [T, H, W, 3] -> uint8 [T, H, W, 3]

REFERENCE_HEIGHT = 96  # lines of the picture for which lengths in pixels are given below
MIN_SIDE = 16
FRAMES_AT_ONCE = 4  # keeps the temporaries of 96x160 frames in the cache; a speed matter only

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


# Helpers ----------------------------------------------------------------------------------------------------------


def _floats(clip: Array) -> Array:
    return clip.astype(np.float32) * np.float32(1 / 255)


def _bytes(picture: Array) -> Array:
    return np.clip(picture * 255 + 0.5, 0, 255).astype(np.uint8)


def _luma(picture: Array) -> Array:
    red, green, blue = LUMA
    return red * picture[..., 0] + green * picture[..., 1] + blue * picture[..., 2]


def _colour(*rgb: int) -> Array:
    return np.array(rgb, np.float32) / 255


def _pixels(length: float, height: int) -> int:
    """A length given for 96 lines, in whole pixels of a picture of `height` lines, at least 1."""
    return max(1, round(length * height / REFERENCE_HEIGHT))


def _odd(length: float, height: int) -> int:
    return 2 * (_pixels(length, height) // 2) + 1


def _box(array: Array, size: int) -> Array:
    """Mean over size x size pixels of maps [T, H, W] or pictures [T, H, W, 3]."""
    across = ndimage.uniform_filter1d(array, size, axis=2, mode="nearest")
    return ndimage.uniform_filter1d(across, size, axis=1, mode="nearest")


def _blur(array: Array, size: float) -> Array:
    """Two boxes of `size` pixels, made odd: about a Gaussian of sigma size / 2.4, as fast for any `size`."""
    pixels = _odd(size, array.shape[1])
    return array if pixels == 1 else _box(_box(array, pixels), pixels)


def _ramp(values: Array, low: float, high: float) -> Array:
    """0 below `low`, 1 above `high`, smooth between."""
    t = np.clip((values - low) * (1 / (high - low)), 0, 1)
    return t * t * (3 - 2 * t)


def _mix(first: Array, second: Array, weight: Array | float) -> Array:
    """`first` where `weight` is 0, `second` where it is 1; a map weighs all channels alike."""
    amount = weight[..., None] if isinstance(weight, np.ndarray) and weight.ndim < first.ndim else weight
    return first + (second - first) * amount


def _saturate(picture: Array, amount: float) -> Array:
    """Scales the distance from grey by `amount`; may leave [0, 1]."""
    grey = _luma(picture)[..., None]
    return grey + (picture - grey) * amount


def _contrast(values: Array, amount: float) -> Array:
    """An S-curve that keeps 0, 1/2 and 1; `amount` 0 changes nothing, 1 is smoothstep."""
    t = np.clip(values, 0, 1)
    return t + amount * (t * t * (3 - 2 * t) - t)


def _tone_table(stops: Sequence[tuple[float, tuple[int, int, int]]]) -> Array:
    """Colours [256, 3] along a line of (position in [0, 1], colour) stops."""
    at = np.linspace(0, 1, 256)
    positions = [position for position, _ in stops]
    channels = [np.interp(at, positions, [colour[c] for _, colour in stops]) for c in range(3)]
    return (np.stack(channels, axis=-1) / 255).astype(np.float32)


def _toned(values: Array, table: Array) -> Array:
    return table[(np.clip(values, 0, 1) * 255 + 0.5).astype(np.uint8)]


def _slopes(values: Array) -> tuple[Array, Array]:
    """Central differences of a map per pixel at 96 lines, downwards and to the right."""
    scale = values.shape[1] / REFERENCE_HEIGHT / 2
    padded = np.pad(values, ((0, 0), (1, 1), (1, 1)), mode="edge")
    down = (padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]) * scale
    right = (padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2]) * scale
    return down, right


def _edges(values: Array, size: float = 3) -> Array:
    """Strength of the edges of a map after a blur of `size`: lines of about 3 pixels, around 0.1 at a clear edge."""
    down, right = _slopes(_blur(values, size))
    return np.sqrt(down * down + right * right)


def _picture_edges(picture: Array, size: float = 3) -> Array:
    """As `_edges`, of luma and of the two colour differences, so that edges between equally light areas count."""
    smooth = _blur(picture, size)
    red, green, blue = smooth[..., 0], smooth[..., 1], smooth[..., 2]
    total = np.zeros(red.shape, np.float32)
    for values, weight in ((_luma(smooth), 1.0), (red - green, 0.25), (green - blue, 0.15)):
        down, right = _slopes(values)
        total += weight * (down * down + right * right)
    return np.sqrt(total)


def _painted(picture: Array, size: float) -> Array:
    """Kuwahara's filter, softened: each pixel mixes the means of the four size x size squares that touch it.

    A calm square weighs far more than a busy one, so patches come out flat with crisp borders, like brush strokes
    of `size` pixels; the soft weights keep the borders from jumping when the picture moves.
    """
    height, width = picture.shape[1:3]
    square = _odd(size, height)
    reach = square // 2
    if not reach:
        return picture
    luma = _luma(picture)
    stack = np.concatenate([picture, luma[..., None], (luma * luma)[..., None]], axis=-1)
    padded = np.pad(stack, ((0, 0), (reach, reach), (reach, reach), (0, 0)), mode="edge")
    means = _box(padded, square)
    spread = np.maximum(means[..., 4] - means[..., 3] ** 2, 0) + 2e-4  # about 3.6 steps of 255, squared
    calm = (1e-3 / spread) ** 2
    calm *= calm
    weighted = means[..., :3] * calm[..., None]
    total, weights = np.zeros_like(picture), np.zeros_like(luma)
    for top in (0, 2 * reach):
        for left in (0, 2 * reach):
            here = (slice(None), slice(top, top + height), slice(left, left + width))
            total += weighted[here]
            weights += calm[here]
    return total / weights[..., None]


@lru_cache(maxsize=16)
def _grain(height: int, width: int, size: float, seed: int) -> Array:
    """Fixed smooth noise [H, W] of mean 0 in about [-1, 1] with bumps of `size` pixels at 96 lines."""
    pixels = _pixels(size, height)
    rows, columns = height // pixels + 2, width // pixels + 2
    coarse = np.random.default_rng(seed).uniform(-1, 1, (rows, columns))
    y, x = np.mgrid[0:height, 0:width] / pixels
    return ndimage.map_coordinates(coarse, (y, x), order=1, mode="nearest").astype(np.float32)


@lru_cache(maxsize=16)
def _vignette(height: int, width: int) -> Array:
    """Map [H, W]: 0 in the middle, 1 in the corners."""
    y, x = np.linspace(-1, 1, height)[:, None], np.linspace(-1, 1, width)[None, :]
    return np.clip((x * x + y * y) / 2, 0, 1).astype(np.float32)


@lru_cache(maxsize=16)
def _dots(height: int, width: int, pitch: float) -> Array:
    """Halftone screen [H, W] in [0, 1]: 1 in the middle of dots that stand `pitch` pixels apart, turned by 45°."""
    y, x = np.mgrid[0:height, 0:width] * (np.pi / (pitch * height / REFERENCE_HEIGHT))
    return (0.5 + 0.5 * np.cos(x + y) * np.cos(x - y)).astype(np.float32)


@lru_cache(maxsize=16)
def _grid(height: int, width: int) -> Array:
    """Map [H, W]: soft lines 16 pixels apart at 96 lines."""
    pitch = 16 * height / REFERENCE_HEIGHT
    y, x = np.mgrid[0:height, 0:width]
    near = [np.abs((axis / pitch + 0.5) % 1 - 0.5) * pitch for axis in (y, x)]
    half = max(1.0, height / REFERENCE_HEIGHT)
    return np.clip(1.5 - np.minimum(*near) / half, 0, 1).astype(np.float32)


@lru_cache(maxsize=16)
def _joints(height: int, width: int, tile: int) -> Array:
    """Map [H, W]: how light each pixel of a tile is, less at its rim."""
    y, x = np.mgrid[0:height, 0:width] % tile
    rim = max(1, tile // 8)
    inside = (y < tile - rim) & (x < tile - rim)
    return np.where(inside, 1.0, 0.72).astype(np.float32)


def _from_top(height: int) -> Array:
    """Map [H, 1]: 0 at the top line, 1 at the bottom."""
    return np.linspace(0, 1, height, dtype=np.float32)[:, None]


# Styles ------------------------------------------------------------------------------------------------------------


def unchanged(clip: Array) -> Array:
    """The clip as it is."""
    return clip.copy()


def pencil_sketch(clip: Array) -> Array:
    """Soft grey pencil strokes and light shading on white paper."""
    height, width = clip.shape[1:3]
    picture = _floats(clip)
    luma = _luma(picture)
    soft = _blur(luma, 2)
    dodge = np.clip((soft + 0.1) / (_blur(luma, 5) + 0.1), 0, 1)
    strokes = 1 - 0.6 * _ramp(1 - dodge, 0.015, 0.2)
    lines = 1 - 0.6 * _ramp(_picture_edges(picture, 2), 0.03, 0.16)
    shading = 0.56 + 0.44 * _ramp(soft + 0.07 * _grain(height, width, 3, 1), -0.05, 0.6)
    tone = np.maximum(strokes * lines, 0.35) * shading
    return _bytes(tone[..., None] * _colour(250, 250, 247))


def oil_painting(clip: Array) -> Array:
    """Thick, crisp brush strokes in deep, golden colours, as under old varnish."""
    painted = _painted(_floats(clip), 5)
    rich = _contrast(_saturate(painted, 1.35) * 0.9, 0.8)
    relief = rich + 0.6 * (rich - _blur(rich, 5))
    return _bytes(relief * np.array([1.0, 0.88, 0.62], np.float32) + _colour(14, 8, 4))


def watercolour(clip: Array) -> Array:
    """Pale, soft washes with darker rims that leave the paper white in the lights."""
    height, width = clip.shape[1:3]
    washes = _painted(_blur(_floats(clip), 2), 5)
    luma = _luma(washes)
    pigment = np.clip(_saturate(washes, 2.1) + _colour(0, 4, 14), 0, 1)
    pale = 1 - (1 - pigment) * 0.58
    rims = _ramp(_edges(luma, 2), 0.02, 0.14)
    wet = _mix(pale, _colour(252, 251, 246), 0.9 * _ramp(luma + 0.1 * _grain(height, width, 9, 2), 0.5, 0.95))
    inked = 1 - rims[..., None] * (1 - _colour(126, 146, 176)) * 0.8
    return _bytes(wet * inked + 0.015 * _grain(height, width, 3, 3)[..., None])


def neon_night(clip: Array) -> Array:
    """Night: blue-black surfaces with edges that glow magenta and cyan."""
    picture = _floats(clip)
    smooth = _blur(picture, 3)
    luma = _luma(smooth)
    edges = _ramp(_picture_edges(picture), 0.02, 0.11)
    warm = _ramp(_blur(picture[..., 0] - picture[..., 2], 9) + 0.5 * (_blur(luma, 13) - 0.5), -0.2, 0.25)
    tube = _mix(np.broadcast_to(_colour(0, 235, 255), picture.shape), _colour(255, 20, 190), warm)
    base = _toned(luma, _NIGHT)
    glow = _blur(edges, 9)
    light = np.clip(0.85 * edges + 0.75 * glow, 0, 1.2)
    return _bytes(base + tube * light[..., None] + 0.35 * _ramp(edges, 0.7, 1)[..., None])


def sunset(clip: Array) -> Array:
    """Low evening sun: orange light, purple shadows, glowing lights, the sky violet towards the top."""
    picture = _floats(clip)
    luma = _luma(picture)
    graded = _mix(picture * _colour(255, 178, 120), _toned(luma, _EVENING), 0.62)
    top = 1 - _from_top(clip.shape[1])
    sky = _mix(np.ones(3, np.float32), _colour(165, 128, 255), top[..., None] ** 1.5)
    violet = _colour(22, 4, 52) * top[..., None]
    glow = _blur(_ramp(luma, 0.55, 1), 13)
    return _bytes(graded * sky + violet + glow[..., None] * _colour(90, 50, 12))


def winter(clip: Array) -> Array:
    """A cold day: faded, bluish colours and white snow on the lights and on upward edges."""
    height = clip.shape[1]
    picture = _floats(clip)
    luma = _luma(picture)
    cold = _mix(picture, _toned(luma, _FROST), 0.78)
    soft = _blur(luma, 3)
    drop = _pixels(3, height)
    above = np.concatenate([np.repeat(soft[:, :1], drop, axis=1), soft[:, :-drop]], axis=1)
    ledges = _ramp(above - soft, 0.08, 0.25)
    ground = 0.2 * _from_top(height) ** 2
    snow = np.maximum(_ramp(0.5 * (soft + luma) + ground, 0.52, 0.95), 0.8 * ledges)
    return _bytes(_mix(cold, _colour(244, 250, 255), snow * 0.9))


def thermal(clip: Array) -> Array:
    """A heat camera: soft shapes from cold blue over magenta and orange to white-hot."""
    picture = _blur(_floats(clip), 3)
    heat = _luma(picture) + 0.25 * (picture[..., 0] - picture[..., 2])
    return _bytes(_toned(_contrast(heat, 0.8), _IRON))


def blueprint(clip: Array) -> Array:
    """White construction lines on deep blue paper with a faint grid."""
    height, width = clip.shape[1:3]
    picture = _floats(clip)
    lines = _ramp(_picture_edges(picture), 0.022, 0.1)
    paper = _toned(_blur(_luma(picture), 5), _BLUE_PAPER) + _grid(height, width)[..., None] * _colour(
        20, 28, 36
    )
    return _bytes(_mix(paper, _colour(235, 246, 255), lines))


def comic(clip: Array) -> Array:
    """A printed comic: few flat, loud colours, black outlines and coarse dots in the shadows."""
    height, width = clip.shape[1:3]
    picture = _painted(_floats(clip), 3)
    luma = _luma(picture)
    steps = 4
    level = _contrast(luma, 0.5) * steps
    below = np.floor(level)
    flat = (below + _ramp(level - below, 0.3, 0.7)) / steps
    colours = np.clip(_saturate(picture, 2.2) + (flat - luma)[..., None] + 0.1, 0, 1)
    dots = _ramp(_dots(height, width, 6), 0.4, 0.8) * (1 - _ramp(luma, 0.2, 0.5))
    outlines = _ramp(_picture_edges(picture, 2), 0.05, 0.13)
    return _bytes((colours + 0.1 * dots[..., None]) * (1 - 0.95 * outlines[..., None]))


def mosaic(clip: Array) -> Array:
    """Square tiles of one colour each with slightly darker joints."""
    frames, height, width = clip.shape[:3]
    tile = max(2, _pixels(8, height))
    rows, columns = -(-height // tile), -(-width // tile)
    padding = ((0, 0), (0, rows * tile - height), (0, columns * tile - width), (0, 0))
    padded = np.pad(_floats(clip), padding, mode="edge")
    means = padded.reshape(frames, rows, tile, columns, tile, 3).mean(axis=4).mean(axis=2)
    means = _contrast(_saturate(means, 1.35), 0.4)
    tiled = np.repeat(np.repeat(means, tile, axis=1), tile, axis=2)[:, :height, :width]
    return _bytes(tiled * _joints(height, width, tile)[..., None])


def sepia(clip: Array) -> Array:
    """An old brown photograph: lifted blacks, creamy lights, darker corners."""
    luma = _contrast(_luma(_floats(clip)), 0.4)
    dark = 1 - 0.4 * _vignette(*clip.shape[1:3])
    return _bytes(_toned(luma, _BROWN) * dark[..., None])


def infrared(clip: Array) -> Array:
    """False-colour infrared film: greens turn pink and white, blues dark, the rest rose and teal."""
    picture = _floats(clip)
    red, green, blue = picture[..., 0], picture[..., 1], picture[..., 2]
    luma = _luma(picture)
    leaves = _ramp(green - np.maximum(blue, 0.85 * red), 0.0, 0.15)
    sky = _ramp(blue - np.maximum(red, 0.9 * green), 0.0, 0.2)
    near = np.clip(luma + 0.45 * leaves - 0.45 * sky * luma, 0, 1)
    toned = _toned(_contrast(near, 0.4), _FALSE_COLOUR)
    glow = _blur(near * near, 9)
    return _bytes(toned + 0.12 * glow[..., None] + 0.3 * (picture - luma[..., None])[..., ::-1])


_NIGHT = _tone_table([(0, (2, 2, 12)), (0.5, (14, 10, 52)), (1, (52, 28, 104))])
_EVENING = _tone_table(
    [
        (0, (38, 12, 58)),
        (0.3, (140, 42, 88)),
        (0.6, (240, 118, 46)),
        (0.85, (255, 190, 84)),
        (1, (255, 232, 160)),
    ]
)
_FROST = _tone_table(
    [(0, (30, 54, 100)), (0.4, (116, 154, 208)), (0.75, (196, 220, 248)), (1, (244, 250, 255))]
)
_IRON = _tone_table(
    [
        (0, (0, 0, 28)),
        (0.2, (32, 8, 150)),
        (0.48, (186, 0, 150)),
        (0.68, (245, 70, 24)),
        (0.86, (255, 200, 0)),
        (1, (255, 255, 220)),
    ]
)
_BLUE_PAPER = _tone_table([(0, (8, 40, 120)), (1, (24, 84, 184))])
_BROWN = _tone_table([(0, (58, 40, 26)), (0.5, (164, 126, 84)), (1, (252, 234, 194))])
_FALSE_COLOUR = _tone_table(
    [
        (0, (4, 48, 58)),
        (0.2, (36, 84, 100)),
        (0.45, (190, 62, 124)),
        (0.7, (250, 120, 168)),
        (1, (255, 240, 246)),
    ]
)

STYLES: Mapping[str, Style] = MappingProxyType(
    {
        style.__name__: cast(Style, style)
        for style in (
            unchanged,
            pencil_sketch,
            oil_painting,
            watercolour,
            neon_night,
            sunset,
            winter,
            thermal,
            blueprint,
            comic,
            mosaic,
            sepia,
            infrared,
        )
    }
)


def apply_style(name: str, clip: Array) -> Array:
    """`clip` in the style `name`: a new uint8 array [T, H, W, 3], each frame made from the same frame alone.

    Args:
      name: a key of `STYLES`.
      clip: uint8 [T, H, W, 3], T >= 0, H and W at least 16.

    Raises:
      ConfigError: the style is unknown or the clip is not of that form.
    """
    if name not in STYLES:
        raise ConfigError(f"unknown style {name!r}; known: {', '.join(STYLES)}")
    if clip.dtype != np.uint8 or clip.ndim != 4 or clip.shape[3] != 3 or min(clip.shape[1:3]) < MIN_SIDE:
        raise ConfigError(
            f"expected uint8 frames [T, H, W, 3] with H and W at least {MIN_SIDE}, "
            f"got {clip.dtype} {list(clip.shape)}"
        )
    out = np.empty_like(clip)
    for start in range(0, len(clip), FRAMES_AT_ONCE):
        piece = slice(start, start + FRAMES_AT_ONCE)
        out[piece] = STYLES[name](clip[piece])
    return out
