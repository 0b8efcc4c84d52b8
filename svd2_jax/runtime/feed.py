"""The way in of one stream: a source is pulled, and its frames are offered."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

import numpy as np

from svd2_jax.runtime.loop import Stream

Source: TypeAlias = Iterable[tuple[int | None, np.ndarray]]
"""Gives (timestamp in ns, frame uint8 [H, W, 3]) when there is one: whoever iterates waits for the camera."""


def feed(stream: Stream, source: Source) -> None:
    """Offers a source's frames until it ends, and then ends the stream. Waits as long as the source does.

    A source that raises closes the stream with its error. Returns early when the stream takes no more frames.
    """
    frames = None
    try:
        frames = iter(source)
        for timestamp_ns, frame in frames:
            if not stream.is_open:
                break
            stream.offer(frame, timestamp_ns)
        stream.end()
    except Exception as e:
        if stream.is_open:  # else it was ended by somebody else: no reason to fail
            stream.close(e)
    finally:
        if (close := getattr(frames, "close", None)) is not None:
            close()
