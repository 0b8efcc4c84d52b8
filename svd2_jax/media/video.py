"""Videos to frames and frames to videos, files or streams, one piece at a time; a test clip and contact sheets.

The border where pixels enter and leave: outside any container or codec, inside uint8 RGB frames [H, W, 3].
Neither direction holds more than a few frames, so an hour-long file needs no more memory than a short one.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self, cast

import av
import numpy as np
from av.codec.codec import UnknownCodecError
from av.codec.context import Flags
from av.container import InputContainer, OutputContainer
from av.error import ExitError, FFmpegError, InvalidDataError, ProtocolNotFoundError
from av.stream import Disposition
from av.video.frame import PictureType
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from av.video.stream import VideoStream
from PIL import Image, ImageDraw, ImageFont

from svd2_jax import files
from svd2_jax.config import check_whole
from svd2_jax.errors import MediaError
from svd2_jax.media.urls import masked, scheme_of
from svd2_jax.text import shortened

FALLBACK_FPS = 24.0  # for the rare file whose container and codec both state no rate
MAX_FPS_DENOMINATOR = 1001  # broadcast rates such as 30000/1001 stay exact
H264_CRF = "18"  # visually lossless; smaller is better and larger on disk
VP9_CRF = "24"  # about the same quality on VP9's scale
URL_TIMEOUT_S = 10.0  # that a server may take for an answer; cameras behind slow networks take a few

# swscale's bilinear widens its filter when it shrinks a picture, which is what "antialias" means elsewhere.
# The other two flags cost nothing measurable and remove a bias of 1 to 1.5 levels from YUV to RGB.
_SCALING = int(Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT)
CAPTION_HEIGHT = 32  # pixels of a caption below a frame
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
_URL_OPTIONS = {
    "rtsp": {"rtsp_transport": "tcp"},  # a lost UDP packet spoils the picture up to the next key frame
    "rtsps": {"rtsp_transport": "tcp"},
    "udp": {"overrun_nonfatal": "1"},  # who is slow loses packets, as with any camera, and goes on
}
_MILLISECOND = Fraction(1, 1000)  # the clock of FLV; fine enough for a picture


def _reason(error: Exception) -> str:
    """The system's words for an error, without error number and path."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _url_problem(url: str, error: Exception, timeout_s: float) -> str:
    """Returns why a URL cannot be opened, and what to do."""
    if isinstance(error, (ExitError, TimeoutError)):
        return f"no answer within {timeout_s:g} s; check the address and that the server is running"
    if isinstance(error, ProtocolNotFoundError):
        return f"this build of FFmpeg knows no protocol {scheme_of(url)!r}; use rtsp, rtmp, http, udp or tcp"
    return f"cannot be opened ({_reason(error)}); check the address and that the server is running"


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
            raise MediaError(f"{path}: cannot be read as a video ({_reason(error)})") from error

    def _open_url(self, url: str) -> InputContainer:
        options = _URL_OPTIONS.get(scheme_of(url) or "", {})
        try:
            return av.open(url, "r", options=options, timeout=(self._timeout_s, self._timeout_s))
        except InvalidDataError as error:
            raise MediaError(
                f"{self._path}: what comes is no video that FFmpeg can read; check the address"
            ) from error
        except (FFmpegError, OSError, ValueError) as error:
            raise MediaError(f"{self._path}: {_url_problem(url, error, self._timeout_s)}") from error

    def _open_camera(self, device: str) -> InputContainer:
        kinds = {kind for names in av.formats_available for kind in names.split(",")}
        if device not in kinds:
            raise MediaError(f"{device}: this build of PyAV knows no such kind of camera")
        try:
            return av.open(str(self._path), "r", format=device, options=self._device_options)
        except (FFmpegError, OSError, ValueError) as error:
            raise MediaError(
                f"{self._path}: cannot be opened as a {device} camera ({_reason(error)})"
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
            damage = _reason(error)
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
            f"limit the run to {done} frames to use the part before"
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
            frame, width=width, height=height, format="rgb24", interpolation=_SCALING
        )
        return np.ascontiguousarray(np.rot90(scaled.to_ndarray(), quarter_turns))

    def close(self) -> None:
        """Closes the file; further frames cannot be read."""
        self._container.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


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
            interpolation=_SCALING,
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
            raise MediaError(f"{self.path}: cannot be written ({_reason(error)}){hint}") from error


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
            raise MediaError(f"{self._name}: {_url_problem(self._url, error, self._timeout_s)}") from error
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
        return MediaError(f"{self._name}: the receiver is gone ({_reason(error)})")

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._give_up()
            return
        try:
            self._end()
        except (FFmpegError, OSError, ValueError) as error:
            self._give_up()
            raise self._gone(error) from error


def synthetic_clip(frames: int, height: int, width: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Returns `frames` uint8 frames [H, W, 3] of a small moving scene, the same for the same arguments.

    A colour gradient and soft stripes pan slowly behind a few discs and boxes that drift, turn back at the
    borders and keep their colour: slow motion, fast motion, edges and flat areas, for demos and tests.

    Args:
      frames: length T.
      height: pixels.
      width: pixels.
      seed: chooses colours, shapes and paths.

    Raises:
      ConfigError: one of them is no whole number, or negative.
    """
    for name, value, least in (
        ("frames", frames, 0),
        ("height", height, 1),
        ("width", width, 1),
        ("seed", seed, 0),
    ):
        check_whole(name, value, least)
    return _scene(frames, height, width, seed)


def _scene(frames: int, height: int, width: int, seed: int) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = 5
    corners = rng.uniform(40, 215, (2, 2, 3)).astype(np.float32)  # colours of the gradient's corners
    colours = rng.uniform(0, 255, (shapes, 3)).astype(np.float32)
    radii = (rng.uniform(0.07, 0.16, shapes) * min(height, width)).astype(np.float32)
    starts = rng.uniform(0, 2, (shapes, 2))
    speeds = rng.uniform(0.01, 0.04, (shapes, 2)) * rng.choice([-1, 1], (shapes, 2))
    pan = float(rng.uniform(0.004, 0.01))
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    v, u = (y / max(height - 1, 1))[..., None], (x / max(width - 1, 1))[..., None]

    for t in range(frames):
        across = 0.5 - 0.5 * np.cos(np.pi * (u + pan * t))  # periodic, so the camera can pan for ever
        stripes = 18 * np.sin(2 * np.pi * (4 * (u + 2 * pan * t) + 2 * v))
        top = corners[0, 0] * (1 - across) + corners[0, 1] * across
        bottom = corners[1, 0] * (1 - across) + corners[1, 1] * across
        picture = top * (1 - v) + bottom * v + stripes
        for i in range(shapes):
            phase = starts[i] + speeds[i] * t
            bounce = (1 - np.abs(phase % 2 - 1)).astype(np.float32)  # there and back again in [0, 1]
            dy, dx = y - bounce[0] * height, x - bounce[1] * width
            distance = np.hypot(dy, dx) if i % 2 == 0 else np.maximum(np.abs(dy), np.abs(dx))
            inside = np.clip(radii[i] - distance + 0.5, 0, 1)[..., None]  # one pixel of soft edge
            picture = picture * (1 - inside) + colours[i] * inside
        yield np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def side_by_side(left: np.ndarray, right: np.ndarray, caption: str, scale: int) -> np.ndarray:
    """Returns two frames of one size beside each other, each pixel `scale` wide, and a line of text below.

    Args:
      left: uint8 [H, W, 3].
      right: uint8 [H, W, 3].
      caption: cut where it is too long.
      scale: pixels for each pixel, smoothly.

    Returns:
      uint8 [H * scale + CAPTION_HEIGHT, 2 * W * scale, 3].
    """
    height, width = left.shape[:2]
    picture = Image.fromarray(np.concatenate([left, right], axis=1))
    picture = picture.resize((2 * width * scale, height * scale), Image.Resampling.BICUBIC)
    whole = Image.new("RGB", (picture.width, picture.height + CAPTION_HEIGHT), "black")
    whole.paste(picture, (0, 0))
    font = ImageFont.load_default(CAPTION_HEIGHT * 0.6)
    draw = ImageDraw.Draw(whole)
    caption = shortened(caption, whole.width, lambda text: draw.textlength(text, font))
    draw.text((whole.width // 2, whole.height - CAPTION_HEIGHT // 2), caption, "white", font, "mm")
    return np.asarray(whole)


def contact_sheet(
    path: str | os.PathLike[str],
    inputs: Sequence[np.ndarray],
    outputs: Sequence[np.ndarray],
    prompts: Mapping[int, str],
    columns: int = 6,
) -> None:
    """Writes a PNG of evenly spaced frames: input above output, the prompt in force as caption.

    Args:
      path: file to write.
      inputs: uint8 frames [H, W, 3].
      outputs: as many frames of the same size.
      prompts: prompt by the frame from which it holds; frame 0 must be there.
      columns: frames shown at most.

    Raises:
      MediaError: the file cannot be written.
    """
    height, width = outputs[0].shape[:2]
    count = min(columns, len(outputs))
    shown = [round(i * (len(outputs) - 1) / max(count - 1, 1)) for i in range(count)]
    gap, caption = 6, 18
    sheet = Image.new("RGB", (count * (width + gap) + gap, 2 * (height + gap) + gap + caption), "white")
    draw = ImageDraw.Draw(sheet)
    for column, frame in enumerate(shown):
        left = gap + column * (width + gap)
        sheet.paste(Image.fromarray(inputs[frame]), (left, gap))
        sheet.paste(Image.fromarray(outputs[frame]), (left, 2 * gap + height))
        prompt = prompts[max(at for at in prompts if at <= frame)]
        text = shortened(f"{frame}: {prompt}", width, draw.textlength)
        draw.text((left, 2 * (gap + height) + gap // 2), text, fill="black")
    files.write_whole(Path(path), sheet.save)
