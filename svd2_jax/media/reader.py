"""Videos and streams to frames, one frame at a time: uint8 RGB [H, W, 3]; everything about containers ends here."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Self

import av
import numpy as np
from av.container import InputContainer
from av.error import ExitError, FFmpegError, InvalidDataError
from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from svd2_jax.errors import MediaError
from svd2_jax.media.av_common import SCALING, URL_TIMEOUT_S, reason, url_problem
from svd2_jax.media.urls import masked, scheme_of

FALLBACK_FPS = 24.0  # for the rare file whose container and codec both state no rate
_URL_OPTIONS = {
    "rtsp": {"rtsp_transport": "tcp"},  # a lost UDP packet spoils the picture up to the next key frame
    "rtsps": {"rtsp_transport": "tcp"},
    "udp": {"overrun_nonfatal": "1"},  # who is slow loses packets, as with any camera, and goes on
}


class VideoReader:
    """Iterates over the frames of a video file or a stream: uint8 RGB [H, W, 3], decoded as they are asked for.

    The whole picture is scaled to the asked size, nothing is cropped, and the file's rotation mark is applied
    first. Frames come as they were coded: a variable frame rate is not resampled.

    Opening decodes the first frame, so a file that cannot be used is known before anything slow starts.

    A damaged file is an error. A stream that loses packets goes on with what can be decoded.

    Attributes:
      fps: frames per second, the average for a variable frame rate.
      frame_count: frames to expect, never more than `max_frames`; an estimate for a progress bar where the
        container states only a duration, None where it states neither.
      size: (height, width) of the frames handed out.
      source_size: (height, width) of the file's picture, after rotation.
      timestamp_ns: of the last frame handed out, by the file's or the camera's clock; None where it has none.
      container: FFmpeg's name of the container, such as "hls".
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        height: int | None = None,
        width: int | None = None,
        max_frames: int | None = None,
        device: str | None = None,
        device_options: Mapping[str, str] | None = None,
        timeout_s: float = URL_TIMEOUT_S,
    ):
        """Opens `path`.

        Args:
          path: a video file of any container and codec FFmpeg reads, the URL of a stream, or the name of a camera.
          height: pixels of the frames handed out; the file's own when None.
          width: the same; given together with `height` or not at all.
          max_frames: stop after this many frames.
          device: FFmpeg's name of the kind of camera, such as "v4l2"; None for a file.
          device_options: FFmpeg's options for the camera.
          timeout_s: seconds that a URL may take to answer, and later to send something; then it is an error.

        Raises:
          MediaError: the file is missing, a folder, not a video, damaged or without frames; the URL cannot be opened.
        """
        self._url = os.fspath(path) if device is None and scheme_of(os.fspath(path)) else None
        self._path = Path(path) if self._url is None else masked(self._url)  # as messages show it
        self._device, self._device_options, self._timeout_s = device, dict(device_options or {}), timeout_s
        if (height is None) != (width is None):
            raise MediaError(f"give both height and width or neither, got {height=} and {width=}")
        for name, value in (("height", height), ("width", width), ("max_frames", max_frames)):
            if value is not None and value < 1:
                raise MediaError(f"{name} must be at least 1, got {value}")
        self._max_frames = max_frames
        self._frames_given = 0
        self.timestamp_ns: int | None = None
        self._reformatter = VideoReformatter()
        self._container = self._open()
        try:
            self._stream = self._video_stream()
            # For files, decoding ahead by at most one frame per core; a stream's frames are not to wait for the next.
            self._stream.thread_type = "AUTO" if self._url is None else "SLICE"
            self._decoded = self._decode()
            first = next(self._decoded, None)
            if first is None:
                hint = "record or export it again" if self._url is None else "check what is sent there"
                raise MediaError(f"{self._path}: holds no video frames; {hint}")
        except BaseException:
            self._container.close()
            raise
        self._pending: av.VideoFrame | None = first
        turned = first.rotation % 180 != 0
        self.source_size = (first.width, first.height) if turned else (first.height, first.width)
        self.size = self.source_size if height is None or width is None else (height, width)
        rate = self._stream.average_rate or self._stream.guessed_rate
        self.fps = float(rate) if rate else FALLBACK_FPS
        self.container = self._container.format.name
        self.frame_count = self._expected_frames()

    def _open(self) -> InputContainer:
        if self._device is not None:
            return self._open_camera(self._device)
        container = self._open_file(Path(self._path)) if self._url is None else self._open_url(self._url)
        if container.format.name == "tty":  # FFmpeg renders plain text files as a terminal
            container.close()
            raise MediaError(f"{self._path}: is a text file, expected a video")
        return container

    def _open_file(self, path: Path) -> InputContainer:
        if path.is_dir():
            raise MediaError(f"{path}: is a folder, expected a video file")
        if not path.exists():
            raise MediaError(f"{path}: no such file")
        try:
            return av.open(str(path), "r")
        except (FFmpegError, OSError, ValueError) as error:
            raise MediaError(f"{path}: cannot be read as a video ({reason(error)})") from error

    def _open_url(self, url: str) -> InputContainer:
        options = _URL_OPTIONS.get(scheme_of(url) or "", {})
        try:
            return av.open(url, "r", options=options, timeout=(self._timeout_s, self._timeout_s))
        except InvalidDataError as error:
            raise MediaError(
                f"{self._path}: what comes is no video that FFmpeg can read; check the address"
            ) from error
        except (FFmpegError, OSError, ValueError) as error:
            raise MediaError(f"{self._path}: {url_problem(url, error, self._timeout_s)}") from error

    def _open_camera(self, device: str) -> InputContainer:
        kinds = {kind for names in av.formats_available for kind in names.split(",")}
        if device not in kinds:
            raise MediaError(f"{device}: this build of PyAV knows no such kind of camera")
        try:
            return av.open(str(self._path), "r", format=device, options=self._device_options)
        except (FFmpegError, OSError, ValueError) as error:
            raise MediaError(
                f"{self._path}: cannot be opened as a {device} camera ({reason(error)})"
            ) from error

    def _video_stream(self) -> VideoStream:
        for stream in self._container.streams.video:
            if not stream.disposition & Disposition.attached_pic:  # cover art of a sound file
                return stream
        raise MediaError(f"{self._path}: holds no video stream, expected a video")

    def _expected_frames(self) -> int | None:
        stream, count = self._stream, self._stream.frames
        if not count and stream.duration and stream.time_base:
            count = round(float(stream.duration * stream.time_base) * self.fps)
        if not count and self._container.duration:
            count = round(self._container.duration / av.time_base * self.fps)
        if not count:
            return None
        return count if self._max_frames is None else min(count, self._max_frames)

    def _decode(self) -> Iterator[av.VideoFrame]:
        damage = "the file ends early"
        try:
            for packet in self._container.demux(self._stream):
                if self._url is not None:
                    with suppress(InvalidDataError):  # lost packets, or before the first key frame
                        yield from self._stream.decode(packet)
                    continue
                if packet.is_corrupt:  # with frame threads the decoder may swallow its own error for these
                    yield from self._stream.decode(None)
                    break
                yield from self._stream.decode(packet)
            else:
                return
        except (FFmpegError, OSError, ValueError) as error:
            damage = reason(error)
            if self._url is not None:
                damage = f"nothing came for {self._timeout_s:g} s" if isinstance(error, ExitError) else damage
                raise MediaError(
                    f"{self._path}: broke off after {self._frames_given} frames ({damage})"
                ) from error
        done = self._frames_given
        if not done:
            raise MediaError(f"{self._path}: no frame can be decoded ({damage}); it is cut off or damaged")
        raise MediaError(
            f"{self._path}: cut off or damaged after {done} frames ({damage}); "
            f"limit the run to {done} frames (--frames {done}) to use the part before"
        )

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> np.ndarray:
        if self._frames_given == self._max_frames:
            raise StopIteration
        frame, self._pending = self._pending or next(self._decoded, None), None
        if frame is None:
            raise StopIteration
        self._frames_given += 1
        self.timestamp_ns = None
        if frame.pts is not None and frame.time_base:
            self.timestamp_ns = round(10**9 * frame.pts * frame.time_base)
        return self._to_rgb(frame)

    def _to_rgb(self, frame: av.VideoFrame) -> np.ndarray:
        quarter_turns = round(frame.rotation / 90) % 4  # counterclockwise, as np.rot90 turns
        height, width = self.size if quarter_turns % 2 == 0 else self.size[::-1]
        scaled = self._reformatter.reformat(
            frame, width=width, height=height, format="rgb24", interpolation=SCALING
        )
        return np.ascontiguousarray(np.rot90(scaled.to_ndarray(), quarter_turns))

    def close(self) -> None:
        """Closes the file; further frames cannot be read."""
        self._container.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
