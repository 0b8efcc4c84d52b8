"""Where the frames of a live stream go: a video file, or nowhere. A callback is a sink by itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from svd2_jax.errors import MediaError, Svd2Error
from svd2_jax.media.video import VideoWriter
from svd2_jax.runtime.stream import WhenSlow
from svd2_jax.runtime.work import SECOND, FrameRecord


class VideoSink:
    """Writes a stream's frames to a video file, or drops them where there is none.

    A frame is placed by the time at which it was taken: where none was shown, the one before it stays, as on a screen.
    """

    when_slow = WhenSlow.END

    def __init__(self, path: Path | None, fps: float, height: int, width: int):
        """Checks what can be checked; `open` opens the file."""
        self.path, self.frames = path, 0
        self._fps = fps
        self._writer = None if path is None else VideoWriter(path, fps, height, width)
        self.is_kept = self.has_failed = self._is_open = False
        self._first: FrameRecord | None = None
        self._last: np.ndarray | None = None

    def open(self) -> None:
        """Opens the file; raises MediaError."""
        if self._writer is not None:
            self._writer.__enter__()
            self._is_open = True

    def close(self) -> str | None:
        """Finishes the file, or removes it if it has no frame or could not be written; returns what went wrong."""
        if self._writer is None or not self._is_open:
            return None
        self._is_open = False
        lost = MediaError("nothing to keep") if self.has_failed or not self.frames else None
        try:
            self._writer.__exit__(type(lost) if lost else None, lost, None)
        except Svd2Error as e:
            self.has_failed = True
            return str(e)
        self.is_kept = lost is None
        return None

    def __call__(self, frame: np.ndarray, record: FrameRecord) -> None:
        """Takes the next shown frame."""
        self._first = self._first or record
        place = self._place(record, self._first)
        if place >= self.frames:  # else frames come faster than the file plays
            held = frame if self._last is None else self._last
            self._write(held, place - self.frames)
            self._write(frame, 1)
            self.frames = place + 1
        self._last = frame

    def _place(self, record: FrameRecord, first: FrameRecord) -> int:
        """Returns which frame of the file this is."""
        arrived = record.arrival_ns - first.arrival_ns
        since = arrived
        if record.timestamp_ns is not None and first.timestamp_ns is not None:
            # A camera's clock that jumps must not stop the picture for long.
            since = min(record.timestamp_ns - first.timestamp_ns, arrived + SECOND)
        return round(since * self._fps / SECOND)

    def _write(self, frame: np.ndarray, times: int) -> None:
        if self._writer is None or not self._is_open:
            return
        try:
            for _ in range(times):
                self._writer.write(frame[None])
        except BaseException:
            self.has_failed = True
            raise
