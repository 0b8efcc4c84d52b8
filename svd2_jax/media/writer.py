"""Frames to videos, files or streams, one frame at a time."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self, cast

import av
import numpy as np
from av.codec.codec import UnknownCodecError
from av.codec.context import Flags
from av.container import OutputContainer
from av.error import FFmpegError
from av.video.frame import PictureType
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from av.video.stream import VideoStream

from svd2_jax import files
from svd2_jax.errors import MediaError
from svd2_jax.media.av_common import SCALING, URL_TIMEOUT_S, reason, url_problem
from svd2_jax.media.urls import masked, scheme_of

MAX_FPS_DENOMINATOR = 1001  # broadcast rates such as 30000/1001 stay exact
H264_CRF = "18"  # visually lossless; smaller is better and larger on disk
VP9_CRF = "24"  # about the same quality on VP9's scale
_BT709 = 1  # ITU-T H.273 code of BT.709: matrix, primaries and transfer share it


class _Encoding(NamedTuple):
    codec: str
    options: dict[str, str]
    container_options: dict[str, str]
    container: str = ""  # FFmpeg's name, for URLs; the suffix of a file says it


_H264 = {"crf": H264_CRF, "preset": "fast"}
_ENCODINGS = {
    ".mp4": _Encoding("libx264", _H264, {"movflags": "faststart"}),
    ".mov": _Encoding("libx264", _H264, {"movflags": "faststart"}),
    ".mkv": _Encoding("libx264", _H264, {}),
    ".webm": _Encoding("libvpx-vp9", {"crf": VP9_CRF, "b": "0", "deadline": "realtime", "cpu-used": "5"}, {}),
}

# zerolatency: no B-frames, no look-ahead, no frame threads, so that each frame leaves as soon as it is encoded.
_H264_LIVE = {"crf": "21", "preset": "veryfast", "tune": "zerolatency"}
_FLV = _Encoding("libx264", _H264_LIVE, {"flvflags": "no_duration_filesize"}, "flv")
_MPEGTS = _Encoding("libx264", _H264_LIVE, {}, "mpegts")
_HTTP = _Encoding("libx264", _H264_LIVE, {"method": "PUT"}, "mpegts")
_URL_ENCODINGS = {
    "rtmp": _FLV, "rtmps": _FLV, "rtsp": _Encoding("libx264", _H264_LIVE, {"rtsp_transport": "tcp"}, "rtsp"),
    "udp": _Encoding("libx264", _H264_LIVE, {"pkt_size": "1316"}, "mpegts"),  # 7 packets of MPEG-TS, as is usual
    "tcp": _MPEGTS, "srt": _MPEGTS, "http": _HTTP, "https": _HTTP,
}  # fmt: skip
_MILLISECOND = Fraction(1, 1000)  # the clock of FLV; fine enough for a picture


class _Encoder:
    """What writers of files and of streams share: encodes uint8 RGB frames into a container.

    Attributes:
      size: (height, width) of the frames.
      fps: frames per second.
      frames_written: frames so far.
    """

    def __init__(self, name: str, encoding: _Encoding, fps: float, height: int, width: int):
        """Checks rate and size; `name` is how messages call the target. Raises MediaError."""
        self._rate = Fraction(fps).limit_denominator(MAX_FPS_DENOMINATOR) if 0 < fps < 1e4 else Fraction(0)
        if not self._rate:
            raise MediaError(f"fps must be above 0 and below 10000, got {fps}")
        for axis, value in (("height", height), ("width", width)):
            if value < 2 or value % 2:
                raise MediaError(f"{axis} must be a positive even number of pixels, got {value}")
        self.size, self.fps = (height, width), fps
        self._name, self._encoding = name, encoding
        self._reformatter = VideoReformatter()
        self._container: OutputContainer | None = None
        self._stream: VideoStream | None = None
        self.frames_written = 0

    def _add_stream(self, container: OutputContainer) -> VideoStream:
        stream = cast(
            VideoStream,
            container.add_stream(self._encoding.codec, rate=self._rate, options=dict(self._encoding.options)),
        )
        stream.height, stream.width = self.size
        stream.pix_fmt = "yuv420p"
        # Said outright, because players guess the matrix from the picture size when it is not.
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        context.color_range = int(ColorRange.MPEG)
        return stream

    def _encode(self, frame: np.ndarray, pts: int, time_base: Fraction, is_key: bool = False) -> None:
        """Writes a frame, uint8 [H, W, 3], at `pts` in units of `time_base`, in seconds."""
        assert self._container is not None
        assert self._stream is not None
        yuv = self._to_yuv(frame)
        yuv.pts, yuv.time_base = pts, time_base
        yuv.pict_type = PictureType.I if is_key else PictureType.NONE
        self._container.mux(self._stream.encode(yuv))
        self.frames_written += 1

    def _to_yuv(self, frame: np.ndarray) -> av.VideoFrame:
        rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        return self._reformatter.reformat(
            rgb,
            format="yuv420p",
            interpolation=SCALING,
            dst_colorspace=Colorspace.ITU709,
            dst_color_range=ColorRange.MPEG,
        )

    def _end(self) -> None:
        """Writes what the encoder still holds, and closes the target."""
        assert self._container is not None
        assert self._stream is not None
        self._container.mux(self._stream.encode(None))
        self._container.close()
        self._container = None

    def _give_up(self) -> None:
        """Closes the target; what goes wrong in that is not worth hiding the cause."""
        with suppress(Exception):
            if self._container is not None:
                self._container.close()
        self._container = None

    def _check_frames(self, frames: np.ndarray) -> None:
        expected = (*self.size, 3)
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1:] != expected:
            raise MediaError(
                f"{self._name}: expected uint8 frames [T, {', '.join(map(str, expected))}], "
                f"got {frames.dtype} {list(frames.shape)}"
            )

    def _raise_if_no_encoder(self, error: BaseException) -> None:
        if isinstance(error, UnknownCodecError):
            raise MediaError(
                f"{self._name}: this build of PyAV has no encoder {self._encoding.codec!r}; "
                "install the `av` wheel from the package index"
            ) from error


class VideoWriter(_Encoder):
    """Writes uint8 RGB frames to a video file that appears under its name only once it is whole.

    Until then the frames go to a hidden file beside the target. Leaving the `with` block normally finishes it
    and moves it into place, replacing a file of that name; leaving it by any exception, a keyboard interrupt
    included, removes it and leaves the target as it was.

    The suffix chooses the format: H.264 for .mp4, .mov and .mkv, VP9 for .webm.

    Attributes:
      path: file to write.
      size: (height, width) of its frames.
      fps: frames per second.
      frames_written: frames so far.
    """

    def __init__(self, path: str | os.PathLike[str], fps: float, height: int, width: int):
        """Checks what can be checked before any frame is made; the file is opened by `with`.

        Args:
          path: file to write, in a folder that exists.
          fps: frames per second.
          height: pixels, even (video codecs store colour at half size).
          width: pixels, even.

        Raises:
          MediaError: the path, the rate or the size cannot be used.
        """
        self.path = Path(path)
        suffix = self.path.suffix.lower()
        files.check_target(self.path)
        if suffix not in _ENCODINGS:
            raise MediaError(
                f"{self.path}: cannot write the format {suffix!r}; supported are {', '.join(_ENCODINGS)}"
            )
        super().__init__(str(self.path), _ENCODINGS[suffix], fps, height, width)
        self._part = files.part_of(self.path)

    def __enter__(self) -> Self:
        try:
            self._container = av.open(
                str(self._part), "w", container_options=self._encoding.container_options
            )
            self._stream = self._add_stream(self._container)
        except BaseException as error:
            self._discard()
            self._raise_if_media(error)
            raise
        return self

    def write(self, frames: np.ndarray) -> None:
        """Appends `frames`, uint8 [T, H, W, 3] of the writer's size, T >= 0."""
        if self._container is None:
            raise MediaError(f"{self.path}: not open; write inside `with VideoWriter(...) as writer:`")
        self._check_frames(frames)
        try:
            for frame in frames:
                self._encode(frame, self.frames_written, 1 / self._rate)
        except (FFmpegError, OSError, ValueError) as error:
            self._raise_if_media(error)
            raise

    def _finish(self) -> None:
        if not self.frames_written:
            raise MediaError(f"{self.path}: no frames were written, so there is no video to keep")
        self._end()
        os.replace(self._part, self.path)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._discard()
            return
        try:
            self._finish()
        except BaseException as error:
            self._discard()
            self._raise_if_media(error)
            raise

    def remove_part(self) -> None:
        """Removes the unfinished file and nothing else: safe from any thread, before a process is ended."""
        with suppress(OSError):
            self._part.unlink(missing_ok=True)

    def _discard(self) -> None:
        """Closes and removes the unfinished file."""
        self._give_up()
        self.remove_part()

    def _raise_if_media(self, error: BaseException) -> None:
        """Raises MediaError for what encoding and writing can fail with, does nothing for the rest."""
        self._raise_if_no_encoder(error)
        if isinstance(error, (FFmpegError, OSError, ValueError)):
            full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
            hint = "; free some space or write elsewhere" if full else ""
            raise MediaError(f"{self.path}: cannot be written ({reason(error)}){hint}") from error


class UrlWriter(_Encoder):
    """Sends uint8 RGB frames to a URL as H.264, each at once: no B-frames, a key frame about every second.

    The scheme chooses the container: FLV for rtmp, MPEG-TS for udp, tcp, srt and http (a PUT), RTSP for rtsp.

    Attributes:
      size: (height, width) of its frames.
      fps: frames per second, about.
      frames_written: frames so far, with two black ones at the start.
    """

    def __init__(self, url: str, fps: float, height: int, width: int, timeout_s: float = URL_TIMEOUT_S):
        """Checks what can be checked without connecting; `with` connects.

        Args:
          url: where to send to.
          fps: frames per second, about; each frame has a time of its own.
          height: pixels, even.
          width: pixels, even.
          timeout_s: seconds that the receiver may take to answer, and later to take what is sent.

        Raises:
          MediaError: nothing can be sent to such a URL, or rate or size cannot be used.
        """
        scheme, name = scheme_of(url), masked(url)
        if scheme not in _URL_ENCODINGS:
            raise MediaError(f"{name}: cannot send to such a URL; supported are {', '.join(_URL_ENCODINGS)}")
        super().__init__(name, _URL_ENCODINGS[scheme], fps, height, width)
        self._url, self._timeout_s, self._last_ms = url, timeout_s, -1

    def __enter__(self) -> Self:
        timeout = "timeout" if self._encoding.container == "rtsp" else "rw_timeout"  # in microseconds
        options = {
            **self._encoding.container_options,
            timeout: str(round(self._timeout_s * 1e6)),
            "flush_packets": "1",
        }
        # FFmpeg's own thread connects and sends, as PyAV connects with Python's lock held and without a time limit.
        fifo = {
            "fifo_format": self._encoding.container,
            "format_opts": ":".join(f"{key}={value}" for key, value in options.items()),
            "queue_size": "1",
            "attempt_recovery": "0",
        }
        try:
            self._container = av.open(self._url, "w", "fifo", container_options=fifo)
            self._stream = self._add_stream(self._container)
            context = self._stream.codec_context
            context.time_base, context.gop_size = _MILLISECOND, max(1, round(self.fps))
            if self._encoding.container != "mpegts":  # which repeats the headers, for who comes later
                context.flags |= Flags.global_header
            # The queue has room for one: the second waits until the connection is there, and raises if it cannot be.
            for at_ms in range(2):
                self._encode(np.zeros((*self.size, 3), np.uint8), at_ms, _MILLISECOND)
        except (FFmpegError, OSError, ValueError) as error:
            self._give_up()
            self._raise_if_no_encoder(error)
            raise MediaError(f"{self._name}: {url_problem(self._url, error, self._timeout_s)}") from error
        self._last_ms = 1
        return self

    def write(self, frame: np.ndarray, at_ms: int, is_key: bool = False) -> None:
        """Sends a frame.

        Args:
          frame: uint8 [H, W, 3] of the writer's size.
          at_ms: when it is shown, in ms since the stream was opened; at least 1 ms after the one before is taken.
          is_key: makes it a key frame, with which a viewer can begin.

        Raises:
          MediaError: the receiver is gone or takes nothing, or the frame is of another kind.
        """
        if self._container is None:
            raise MediaError(f"{self._name}: not open; write inside `with UrlWriter(...) as writer:`")
        self._check_frames(frame[None])
        self._last_ms = max(at_ms, self._last_ms + 1)
        try:
            self._encode(frame, self._last_ms, _MILLISECOND, is_key)
        except (FFmpegError, OSError, ValueError) as error:
            raise self._gone(error) from error

    def _gone(self, error: Exception) -> MediaError:
        return MediaError(f"{self._name}: the receiver is gone ({reason(error)})")

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._give_up()
            return
        try:
            self._end()
        except (FFmpegError, OSError, ValueError) as error:
            self._give_up()
            raise self._gone(error) from error
