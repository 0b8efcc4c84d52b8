"""Where the frames of a live stream come from: a file at its own times, or a camera. Pushed frames need no source."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from svd2_jax.errors import ConfigError
from svd2_jax.media.video import VideoReader
from svd2_jax.runtime.stream import Source
from svd2_jax.runtime.work import SECOND

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
    asked = {} if rate_hz is None or kind not in CAMERA_FORMATS.values() else {"framerate": f"{rate_hz:g}"}
    return VideoReader(name, height, width, device=kind, device_options=asked)
