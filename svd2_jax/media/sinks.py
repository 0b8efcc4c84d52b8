"""Where the frames of a live stream go: a video file, a URL, or nowhere. A callback is a sink by itself."""

from __future__ import annotations

import queue
import threading
import time
from pathlib import Path

import numpy as np

from svd2_jax.errors import MediaError, Svd2Error
from svd2_jax.media.urls import masked
from svd2_jax.media.video import URL_TIMEOUT_S, UrlWriter, VideoWriter
from svd2_jax.runtime.loop import WhenSlow
from svd2_jax.runtime.work import MS, SECOND, FrameRecord

LOOK_S = 0.05  # how often somebody who waits for a receiver looks whether it is gone


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
            return f"{self.path}: {self.frames} frames at {self._fps:g} fps"
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
        self._name, self._timeout_s, self._repeat_s = masked(url), timeout_s, repeat_s
        self._writer = UrlWriter(url, fps, height, width)
        self._next: queue.Queue[tuple[np.ndarray, int] | None] = queue.Queue(maxsize=1)
        self._is_connected = threading.Event()
        self._error: Exception | None = None
        self._has_told = False
        # It alone touches the connection, as a call of FFmpeg that waits for the network cannot be called off.
        self._thread = threading.Thread(target=self._send, name="svd2-url", daemon=True)

    def open(self) -> None:
        """Connects; raises MediaError."""
        self._thread.start()
        is_connected = self._is_connected.wait(self._timeout_s)
        self._raise_if_gone(None if is_connected else "does not answer")

    def close(self) -> str | None:
        """Ends the connection; returns what went wrong, unless a call has raised it."""
        if self._thread.ident is None or self._has_told:
            return None
        try:
            self._put(None)
            self._thread.join(self._timeout_s)
            self._raise_if_gone("takes nothing" if self._thread.is_alive() else None)
        except MediaError as e:
            return str(e)
        return None

    def result(self) -> str | None:
        """Returns what became of it, for the user, or None where that has been said."""
        return None if self._has_told else f"{self._name}: {self.frames} frames sent"

    def __call__(self, frame: np.ndarray, record: FrameRecord) -> None:
        """Takes the next shown frame; raises MediaError when the receiver is gone."""
        self._put((frame, time.monotonic_ns() if record.shown_ns is None else record.shown_ns))
        self.frames += 1

    def _put(self, item: tuple[np.ndarray, int] | None) -> None:
        end = time.monotonic() + self._timeout_s
        while True:
            self._raise_if_gone("takes nothing" if time.monotonic() > end else None)
            try:
                return self._next.put(item, timeout=LOOK_S)
            except queue.Full:
                continue

    def _raise_if_gone(self, problem: str | None) -> None:
        error = self._error
        if error is None and problem is not None:
            error = MediaError(f"{self._name}: the receiver {problem} for {self._timeout_s:g} s")
        if error is not None:
            self._has_told = True
            raise error

    def _send(self) -> None:
        try:
            with self._writer as writer:
                self._is_connected.set()
                began_ns, frame = time.monotonic_ns(), np.zeros((*writer.size, 3), np.uint8)
                while not self._has_told:  # else nobody waits for it any more
                    try:
                        item = self._next.get(timeout=self._repeat_s if writer.frames_written else 0)
                    except queue.Empty:
                        writer.write(frame, (time.monotonic_ns() - began_ns) // MS, is_key=True)
                        continue
                    if item is None:
                        return
                    frame, shown_ns = item
                    writer.write(frame, (shown_ns - began_ns) // MS)
        except Exception as e:
            self._error = e
        finally:
            self._is_connected.set()
