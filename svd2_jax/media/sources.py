"""Where the frames of a live stream come from: a file at its own times, a camera or a URL. Pushed frames need none."""

from __future__ import annotations

import contextlib
import queue
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import numpy as np

from svd2_jax.errors import ConfigError
from svd2_jax.media.av_common import URL_TIMEOUT_S
from svd2_jax.media.reader import VideoReader
from svd2_jax.runtime.stream import Source
from svd2_jax.runtime.types import SECOND

LOOK_S = 0.05  # how often a source that waits for a frame looks whether it is to stop
IN_SEGMENTS = ("hls", "dash")  # containers of live streams that come many frames at once
CAMERA_FORMATS = {"linux": "v4l2", "darwin": "avfoundation", "win32": "dshow"}


def play_file(
    path: Path, height: int, width: int, rate_hz: float | None, again: bool, stop: threading.Event
) -> Source:
    """Plays a video file as if it were a camera: each frame comes when it is its time.

    Args:
      path: the file.
      height: pixels of the frames.
      width: pixels of the frames.
      rate_hz: frames per second; None is the file's own rate.
      again: whether to start over at the end, for ever.
      stop: ends the stream when it is set.

    Raises:
      MediaError: the file cannot be read; at once, not with the first frame.
    """
    reader = VideoReader(path, height, width)
    rate_hz = rate_hz or reader.fps

    def play() -> Iterator[tuple[int, np.ndarray]]:
        current, number, started = reader, 0, time.monotonic()
        while True:
            with current:
                for frame in current:
                    due = number / rate_hz
                    if stop.wait(max(0.0, started + due - time.monotonic())):
                        return
                    yield round(due * SECOND), frame
                    number += 1
            if not again:
                return
            current = VideoReader(path, height, width)

    return play()


def watch_camera(
    device: str, height: int, width: int, stop: threading.Event, rate_hz: float | None = None
) -> Source:
    """Gives a camera's frames as they come, with the camera's own timestamps.

    Args:
      device: `/dev/video0`, or with FFmpeg's name of the kind of device in front, as in `avfoundation:0` or
        `lavfi:testsrc=size=320x240:rate=16,realtime`.
      height: pixels of the frames.
      width: pixels of the frames.
      stop: ends the stream, with the camera's next frame, when it is set.
      rate_hz: frames per second to ask the camera for; None leaves it as it is.

    Raises:
      MediaError: the camera cannot be opened; at once, not with the first frame.
    """
    camera = open_camera(device, height, width, rate_hz)

    def watch() -> Iterator[tuple[int | None, np.ndarray]]:
        with camera:
            for frame in camera:
                if stop.is_set():
                    return
                yield camera.timestamp_ns, frame

    return watch()


def open_camera(device: str, height: int, width: int, rate_hz: float | None = None) -> VideoReader:
    """Opens a camera, see `watch_camera`.

    Raises:
      MediaError: it cannot be opened.
      ConfigError: this platform has no usual kind of camera.
    """
    kind, separator, name = device.partition(":")
    if not separator or not kind.isalnum():
        if sys.platform not in CAMERA_FORMATS:
            raise ConfigError(
                f"camera {device}: put FFmpeg's kind of device in front, as in v4l2:/dev/video0"
            )
        kind, name = CAMERA_FORMATS[sys.platform], device
        if kind == "v4l2" and device.isdecimal():  # as other programs number them
            name = f"/dev/video{device}"
    asked = {} if rate_hz is None or kind not in CAMERA_FORMATS.values() else {"framerate": f"{rate_hz:g}"}
    return VideoReader(name, height, width, device=kind, device_options=asked)


def watch_url(
    url: str, height: int, width: int, stop: threading.Event, timeout_s: float = URL_TIMEOUT_S
) -> Source:
    """Gives the frames of a stream's URL as they come, with the stream's own timestamps.

    Args:
      url: anything that FFmpeg opens, such as rtsp://, rtmp://, http://, udp:// or tcp://.
      height: pixels of the frames.
      width: pixels of the frames.
      stop: ends the stream at once when it is set, whether frames come or not.
      timeout_s: seconds without an answer, or without anything sent, after which it is an error.

    Raises:
      MediaError: the URL cannot be opened; at once, not with the first frame. Later, from the iterator: it broke off.
    """
    return UrlSource(url, height, width, timeout_s).watch(stop)


class UrlSource:
    """A stream's URL, connected before there is somebody to watch it. See `watch_url` for the simple way.

    Inside `with` the stream is received and dropped until `watch` is iterated, so that it starts with what is new then.
    What has a known length, such as a video file on a web server, is played from its start at its real rate instead.

    Attributes:
      fps: frames per second that the stream states.
    """

    def __init__(self, url: str, height: int, width: int, timeout_s: float = URL_TIMEOUT_S):
        """Connects and decodes the first frame; see `watch_url` for arguments and errors."""
        self._reader = VideoReader(url, height, width, timeout_s=timeout_s)
        self.fps = self._reader.fps
        self._has_length = self._reader.frame_count is not None
        self._frames: queue.Queue[tuple[int | None, np.ndarray] | Exception | None] = queue.Queue(maxsize=1)
        self._is_watched, self._is_over = threading.Event(), threading.Event()
        # A read waits for the network and cannot be called off, so it has a thread that nobody waits for.
        self._thread = threading.Thread(target=self._read, name="svd2-url", daemon=True)

    def __enter__(self) -> Self:
        if not self._has_length:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def watch(self, stop: threading.Event) -> Iterator[tuple[int | None, np.ndarray]]:
        """Yields (timestamp in ns or None, frame uint8 [H, W, 3]) until the stream ends or `stop` is set; once only."""
        self._is_watched.set()
        if self._thread.ident is None:
            self._thread.start()
        try:
            while not stop.is_set():
                try:
                    item = self._frames.get(timeout=LOOK_S)
                except queue.Empty:
                    continue
                if item is None:
                    return
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            self.close()

    def close(self) -> None:
        """Has the connection closed: with the next thing that comes, or when nothing does for the timeout."""
        self._is_over.set()
        if self._thread.ident is None:
            self._reader.close()
        with contextlib.suppress(queue.Empty):
            self._frames.get_nowait()  # lets go a thread that waits for room

    def _read(self) -> None:
        end: Exception | None = None
        try:
            with self._reader as reader:
                for frame in self._at_their_times(reader):
                    if self._is_over.is_set():
                        return
                    if self._is_watched.is_set():
                        self._frames.put((reader.timestamp_ns, frame))
        except Exception as e:
            end = e
        self._frames.put(end)

    def _at_their_times(self, reader: VideoReader) -> Iterator[np.ndarray]:
        """Yields frames as they come; those that do not come at their times, when these have come."""
        is_live = not self._has_length and reader.container not in IN_SEGMENTS
        ahead_ns: int | None = None  # of the timestamps' clock to ours
        for frame in reader:
            if not is_live and reader.timestamp_ns is not None:
                now_ns = time.monotonic_ns()
                ahead_ns = now_ns - reader.timestamp_ns if ahead_ns is None else ahead_ns
                self._is_over.wait(max(0, reader.timestamp_ns + ahead_ns - now_ns) / SECOND)
            yield frame
