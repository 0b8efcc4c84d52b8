"""Where frames come from and go to: files and cameras. Colour and geometry are in `video`."""

from svd2_jax.media.video import (
    CAPTION_HEIGHT,
    VideoReader,
    VideoWriter,
    contact_sheet,
    side_by_side,
    synthetic_clip,
)

__all__ = [
    "CAPTION_HEIGHT",
    "VideoReader",
    "VideoWriter",
    "contact_sheet",
    "side_by_side",
    "synthetic_clip",
]
