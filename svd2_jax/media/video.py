"""Video files to frames and frames to video files, one piece at a time; a procedural test clip and contact sheets.

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
from av.container import InputContainer, OutputContainer
from av.error import FFmpegError
from av.stream import Disposition
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from av.video.stream import VideoStream
from PIL import Image, ImageDraw, ImageFont

from svd2_jax import files
from svd2_jax.errors import MediaError
from svd2_jax.text import shortened

FALLBACK_FPS = 24.0  # for the rare file whose container and codec both state no rate
MAX_FPS_DENOMINATOR = 1001  # broadcast rates such as 30000/1001 stay exact
H264_CRF = "18"  # visually lossless; smaller is better and larger on disk
VP9_CRF = "24"  # about the same quality on VP9's scale

# swscale's bilinear widens its filter when it shrinks a picture, which is what "antialias" means elsewhere.
# The other two flags cost nothing measurable and remove a bias of 1 to 1.5 levels from YUV to RGB.
_SCALING = int(Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT)
CAPTION_HEIGHT = 32  # pixels of a caption below a frame
_BT709 = 1  # ITU-T H.273 code of BT.709: matrix, primaries and transfer share it


class _Encoding(NamedTuple):
    codec: str
    options: dict[str, str]
    container_options: dict[str, str]


_H264 = {"crf": H264_CRF, "preset": "fast"}
_ENCODINGS = {
    ".mp4": _Encoding("libx264", _H264, {"movflags": "faststart"}),
    ".mov": _Encoding("libx264", _H264, {"movflags": "faststart"}),
    ".mkv": _Encoding("libx264", _H264, {}),
    ".webm": _Encoding("libvpx-vp9", {"crf": VP9_CRF, "b": "0", "deadline": "realtime", "cpu-used": "5"}, {}),
}


def _reason(error: Exception) -> str:
    """The system's words for an error, without error number and path."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


class VideoReader:
    """Iterates over the frames of a video file: uint8 RGB [H, W, 3], decoded only as they are asked for.

    The whole picture is scaled to the asked size, nothing is cropped, and the file's rotation mark is applied
    first. Frames come as they were coded: a variable frame rate is not resampled.

    Opening decodes the first frame, so a file that cannot be used is known before anything slow starts.

    Attributes:
      fps: frames per second, the average for a variable frame rate.
      frame_count: frames to expect, never more than `max_frames`; an estimate for a progress bar where the
        container states only a duration, None where it states neither.
      size: (height, width) of the frames handed out.
      source_size: (height, width) of the file's picture, after rotation.
      timestamp_ns: of the last frame handed out, by the file's or the camera's clock; None where it has none.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        height: int | None = None,
        width: int | None = None,
        max_frames: int | None = None,
        device: str | None = None,
        device_options: Mapping[str, str] | None = None,
    ):
        """Opens `path`.

        Args:
          path: a video file of any container and codec FFmpeg reads, or the name of a camera.
          height: pixels of the frames handed out; the file's own when None.
          width: the same; given together with `height` or not at all.
          max_frames: stop after this many frames.
          device: FFmpeg's name of the kind of camera, such as "v4l2"; None for a file.
          device_options: FFmpeg's options for the camera.

        Raises:
          MediaError: the file is missing, a folder, not a video, damaged or without frames.
        """
        self._path, self._device, self._device_options = Path(path), device, dict(device_options or {})
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
            self._stream.thread_type = "AUTO"  # decodes ahead by at most one frame per core
            self._decoded = self._decode()
            first = next(self._decoded, None)
            if first is None:
                raise MediaError(f"{self._path}: holds no video frames; record or export it again")
        except BaseException:
            self._container.close()
            raise
        self._pending: av.VideoFrame | None = first
        turned = first.rotation % 180 != 0
        self.source_size = (first.width, first.height) if turned else (first.height, first.width)
        self.size = self.source_size if height is None or width is None else (height, width)
        rate = self._stream.average_rate or self._stream.guessed_rate
        self.fps = float(rate) if rate else FALLBACK_FPS
        self.frame_count = self._expected_frames()

    def _open(self) -> InputContainer:
        if self._device is not None:
            return self._open_camera(self._device)
        if self._path.is_dir():
            raise MediaError(f"{self._path}: is a folder, expected a video file")
        if not self._path.exists():
            raise MediaError(f"{self._path}: no such file")
        try:
            container = av.open(str(self._path), "r")
        except (FFmpegError, OSError, ValueError) as error:
            raise MediaError(f"{self._path}: cannot be read as a video ({_reason(error)})") from error
        if container.format.name == "tty":  # FFmpeg renders plain text files as a terminal
            container.close()
            raise MediaError(f"{self._path}: is a text file, expected a video file")
        return container

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
        raise MediaError(f"{self._path}: holds no video stream, expected a video file")

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
                if packet.is_corrupt:  # with frame threads the decoder may swallow its own error for these
                    yield from self._stream.decode(None)
                    break
                yield from self._stream.decode(packet)
            else:
                return
        except (FFmpegError, OSError, ValueError) as error:
            damage = _reason(error)
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


class VideoWriter:
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
        self._rate = Fraction(fps).limit_denominator(MAX_FPS_DENOMINATOR) if 0 < fps < 1e4 else Fraction(0)
        if not self._rate:
            raise MediaError(f"fps must be above 0 and below 10000, got {fps}")
        for name, value in (("height", height), ("width", width)):
            if value < 2 or value % 2:
                raise MediaError(f"{name} must be a positive even number of pixels, got {value}")
        self.size, self.fps = (height, width), fps
        self._encoding = _ENCODINGS[suffix]
        self._part = files.part_of(self.path)
        self._reformatter = VideoReformatter()
        self._container: OutputContainer | None = None
        self._stream: VideoStream | None = None
        self.frames_written = 0

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

    def write(self, frames: np.ndarray) -> None:
        """Appends `frames`, uint8 [T, H, W, 3] of the writer's size, T >= 0."""
        if self._container is None or self._stream is None:
            raise MediaError(f"{self.path}: not open; write inside `with VideoWriter(...) as writer:`")
        expected = (*self.size, 3)
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1:] != expected:
            raise MediaError(
                f"{self.path}: expected uint8 frames [T, {', '.join(map(str, expected))}], "
                f"got {frames.dtype} {list(frames.shape)}"
            )
        try:
            for frame in frames:
                self._container.mux(self._stream.encode(self._to_yuv(frame)))
                self.frames_written += 1
        except (FFmpegError, OSError, ValueError) as error:
            self._raise_if_media(error)
            raise

    def _to_yuv(self, frame: np.ndarray) -> av.VideoFrame:
        rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        yuv = self._reformatter.reformat(
            rgb,
            format="yuv420p",
            interpolation=_SCALING,
            dst_colorspace=Colorspace.ITU709,
            dst_color_range=ColorRange.MPEG,
        )
        yuv.pts, yuv.time_base = self.frames_written, 1 / self._rate
        return yuv

    def _finish(self) -> None:
        assert self._container is not None
        assert self._stream is not None
        if not self.frames_written:
            raise MediaError(f"{self.path}: no frames were written, so there is no video to keep")
        self._container.mux(self._stream.encode(None))
        self._container.close()
        self._container = None
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
        """Closes and removes the unfinished file; what goes wrong in that is not worth hiding the cause."""
        with suppress(Exception):
            if self._container is not None:
                self._container.close()
        self._container = None
        self.remove_part()

    def _raise_if_media(self, error: BaseException) -> None:
        """Raises MediaError for what encoding and writing can fail with, does nothing for the rest."""
        if isinstance(error, UnknownCodecError):
            raise MediaError(
                f"{self.path}: this build of PyAV has no encoder {self._encoding.codec!r}; "
                "install the `av` wheel from the package index"
            ) from error
        if isinstance(error, (FFmpegError, OSError, ValueError)):
            full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
            hint = "; free some space or write elsewhere" if full else ""
            raise MediaError(f"{self.path}: cannot be written ({_reason(error)}){hint}") from error


def synthetic_clip(frames: int, height: int, width: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Yields `frames` uint8 frames [H, W, 3] of a small moving scene, the same for the same arguments.

    A colour gradient and soft stripes pan slowly behind a few discs and boxes that drift, turn back at the
    borders and keep their colour: slow motion, fast motion, edges and flat areas, for demos and tests.

    Args:
      frames: length T.
      height: pixels.
      width: pixels.
      seed: chooses colours, shapes and paths.
    """
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
