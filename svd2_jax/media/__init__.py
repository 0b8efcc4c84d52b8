"""Where frames come from and go to: files and cameras. Colour and geometry are in `reader` and `writer`.

Importing the package loads neither NumPy nor PyAV; the first use of a name does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from svd2_jax.media import images, reader, writer

        return next(getattr(module, name) for module in (images, reader, writer) if hasattr(module, name))
