"""Where frames come from and go to: files and cameras. Colour and geometry are in `reader` and `writer`."""

from svd2_jax.media.images import CAPTION_HEIGHT, contact_sheet, side_by_side, synthetic_clip
from svd2_jax.media.reader import VideoReader
from svd2_jax.media.writer import VideoWriter

__all__ = [
    "CAPTION_HEIGHT",
    "VideoReader",
    "VideoWriter",
    "contact_sheet",
    "side_by_side",
    "synthetic_clip",
]
