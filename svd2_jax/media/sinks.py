"""Where the frames of a live stream go: a video file, a URL, or nowhere. A callback is a sink by itself."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np

from svd2_jax.errors import MediaError, Svd2Error
from svd2_jax.media.av_common import URL_TIMEOUT_S
from svd2_jax.media.urls import masked
from svd2_jax.media.writer import UrlWriter, VideoWriter
from svd2_jax.runtime.stream import WhenSlow
from svd2_jax.runtime.types import MS, SECOND, FrameRecord
from svd2_jax.text import counted


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

    def result(self) -> str | None:
        """Returns what became of it, for the user, or None where that has been said or there was no file."""
        if self.is_kept:
            return f"{self.path}: {counted(self.frames, 'frame')} at {self._fps:g} fps"
        if self.path is not None and not self.has_failed:
            return f"{self.path}: not written, as no frame was shown"
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


class UrlSink:
    """Sends a stream's frames to a URL, for viewers: each at the time at which it is shown.

    From `open` on, the last frame is sent again (at first a black one) after each second without a new one. So
    receivers that disconnect who is silent stay, and players that come in between have a picture.

    Attributes:
      frames: frames that were taken.
    """

    when_slow = WhenSlow.DROP_OLDEST

    def __init__(
        self,
        url: str,
        fps: float,
        height: int,
        width: int,
        timeout_s: float = URL_TIMEOUT_S,
        repeat_s: float = 1.0,
    ):
        """Checks what can be checked; `open` connects.

        Args:
          url: where to send to, see `UrlWriter`.
          fps: frames per second, about.
          height: pixels, even.
          width: pixels, even.
          timeout_s: seconds that the receiver may take to answer, and later to take a frame.
          repeat_s: seconds after which the last frame is sent again.

        Raises:
          MediaError: nothing can be sent to such a URL, or rate or size cannot be used.
        """
        self.frames = 0
        self._name, self._repeat_s = masked(url), repeat_s
        self._writer = UrlWriter(url, fps, height, width, timeout_s)
        self._last = np.zeros((height, width, 3), np.uint8)
        self._opened_ns: int | None = None
        self._error: MediaError | None = None
        self._has_told = False
        self._lock = threading.Lock()  # of the writer
        self._is_closed = threading.Event()

    def open(self) -> None:
        """Connects; raises MediaError."""
        self._writer.__enter__()
        self._opened_ns = time.monotonic_ns()
        threading.Thread(target=self._repeat, name="svd2-url", daemon=True).start()

    def close(self) -> str | None:
        """Ends the connection; returns what went wrong, unless a call has raised it."""
        if self._opened_ns is None or self._is_closed.is_set():
            return None
        self._is_closed.set()
        with self._lock:
            try:
                self._writer.__exit__(None if self._error is None else type(self._error))
            except MediaError as e:
                self._error = e
        return None if self._error is None or self._has_told else str(self._error)

    def result(self) -> str | None:
        """Returns what became of it, for the user."""
        return None if self._opened_ns is None else f"{self._name}: {counted(self.frames, 'frame')} sent"

    def __call__(self, frame: np.ndarray, record: FrameRecord) -> None:
        """Takes the next shown frame; raises MediaError when the receiver is gone."""
        self._last = frame
        self._send(frame, time.monotonic_ns() if record.shown_ns is None else record.shown_ns)
        if self._error is not None:
            self._has_told = True
            raise self._error
        self.frames += 1

    def _send(self, frame: np.ndarray, at_ns: int, is_key: bool = False) -> None:
        with self._lock:
            if self._error is None and not self._is_closed.is_set():
                try:
                    self._writer.write(frame, (at_ns - (self._opened_ns or 0)) // MS, is_key)
                except MediaError as e:
                    self._error = e

    def _repeat(self) -> None:
        sent = self._writer.frames_written
        while not self._is_closed.wait(self._repeat_s):
            if sent == self._writer.frames_written:
                self._send(self._last, time.monotonic_ns(), is_key=True)
            sent = self._writer.frames_written
