"""Video files in and out: what is read is what was written, and every failure is one clear line."""

import subprocess
import sys
from fractions import Fraction
from itertools import islice
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from svd2_jax.errors import MediaError
from svd2_jax.media import VideoReader, VideoWriter, synthetic_clip

H, W = 96, 160


def clip(frames: int = 12, height: int = H, width: int = W, seed: int = 0) -> np.ndarray:
    return np.stack(list(synthetic_clip(frames, height, width, seed)))


def save(path: Path, frames: np.ndarray, fps: float = 16) -> Path:
    with VideoWriter(path, fps, *frames.shape[1:3]) as writer:
        writer.write(frames)
    return path


def load(path: Path, **options) -> np.ndarray:
    with VideoReader(path, **options) as reader:
        return np.stack(list(reader))


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = max(float(np.mean((a.astype(np.float64) - b) ** 2)), 1e-6)  # equal pictures: 108 dB
    return 10 * np.log10(255**2 / error)


def save_raw(path: Path, frames: list[np.ndarray], av_format: str, codec: str, pix_fmt: str) -> Path:
    """Writes `frames` losslessly as they are, without the writer under test."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], pix_fmt
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format=av_format)))
        container.mux(stream.encode(None))
    return path


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("media") / "clip.mp4", clip(24))


# --- what is read is what was written


@pytest.mark.parametrize("name", ["clip.gif", "clip.png", "list.ffconcat"])
def test_animated_pictures_and_lists_of_pictures_are_read(tmp_path, name):
    greys = [0, 40, 80, 120]
    first, *later = (Image.fromarray(np.full((H, W, 3), grey, np.uint8)) for grey in greys)
    if name == "list.ffconcat":
        for number, picture in enumerate((first, *later)):
            picture.save(tmp_path / f"{number}.png")
        lines = ["ffconcat version 1.0", *(f"file {number}.png" for number in range(len(greys)))]
        (tmp_path / name).write_text("\n".join(lines))
    else:
        first.save(tmp_path / name, save_all=True, append_images=later, duration=100)
    expected = np.broadcast_to(np.array(greys, np.uint8)[:, None, None, None], (len(greys), H, W, 3))
    np.testing.assert_array_equal(load(tmp_path / name), expected)


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ".webm", ".MP4"])
def test_a_clip_survives_the_round_trip(tmp_path, suffix):
    frames = clip()
    back = load(save(tmp_path / f"out{suffix}", frames))
    assert back.shape == frames.shape
    assert back.dtype == np.uint8
    # Both codecs lose most at the sharp coloured edges, where 4:2:0 halves the colour resolution; a wrong
    # matrix, range or channel order would cost more than 10 dB.
    assert min(psnr(a, b) for a, b in zip(back, frames, strict=True)) > 30
    # Colours of whole frames stay within a rounding step: a matrix or range mix-up shifts them by several.
    shift = back.mean((0, 1, 2)) - frames.mean((0, 1, 2))
    assert np.abs(shift).max() < 1.0


def test_mp4_is_what_players_expect(video):
    data = video.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")  # starts to play before it is loaded in full
    with av.open(str(video)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt, stream.average_rate) == ("h264", "yuv420p", 16)


def test_broadcast_rates_stay_exact(tmp_path):
    with VideoReader(save(tmp_path / "ntsc.mp4", clip(3), fps=30000 / 1001)) as reader:
        assert reader.fps == float(Fraction(30000, 1001))


def test_writing_in_pieces_equals_writing_at_once(tmp_path):
    frames = clip(9)
    with VideoWriter(tmp_path / "pieces.mp4", 16, H, W) as writer:
        for piece in (frames[:5], frames[5:5], frames[5:]):
            writer.write(piece)
        assert writer.frames_written == 9
    # Not equal to the bit: x264's output for equal pictures may differ a little from run to run.
    once, pieces = load(save(tmp_path / "once.mp4", frames)), load(tmp_path / "pieces.mp4")
    assert pieces.shape == frames.shape
    assert min(psnr(a, b) for a, b in zip(once, pieces, strict=True)) > 40  # neighbouring frames: below 25


def test_the_reader_says_what_to_expect(video):
    with VideoReader(video) as reader:
        assert (reader.fps, reader.frame_count, reader.size, reader.source_size) == (16.0, 24, (H, W), (H, W))
    with VideoReader(video, 32, 48, max_frames=7) as reader:
        assert (reader.frame_count, reader.size, reader.source_size) == (7, (32, 48), (H, W))
        assert len(list(reader)) == 7
    with VideoReader(video, max_frames=1000) as reader:
        assert reader.frame_count == 24


def test_a_container_without_a_count_gives_an_estimate(tmp_path):
    with VideoReader(save(tmp_path / "clip.mkv", clip(20))) as reader:
        assert reader.frame_count == pytest.approx(20, abs=1)


def test_resizing_scales_the_whole_picture(tmp_path):
    rows = np.linspace(0, 240, 64)[:, None, None]
    frames = np.broadcast_to(rows, (4, 64, 96, 3)).astype(np.uint8)
    path = save_raw(tmp_path / "ramp.mkv", list(frames), "rgb24", "ffv1", "bgr0")
    small = load(path, height=16, width=48)[0]
    # Shrinking by 4 averages over the rows of each new one (antialias): their centres lie 4 old rows apart.
    expected = np.linspace(0, 240, 64).reshape(16, 4).mean(1)
    assert small.shape == (16, 48, 3)
    np.testing.assert_allclose(small[1:-1, 0, 0], expected[1:-1], atol=1.5)  # uint8 in, filter and out
    assert np.ptp(small, axis=1).max() == 0


def test_shrinking_does_not_alias(tmp_path):
    checks = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    path = save_raw(tmp_path / "checks.mkv", [np.repeat(checks[..., None], 3, 2)], "rgb24", "ffv1", "bgr0")
    inner = load(path, height=16, width=16)[0, 1:-1, 1:-1].astype(int)  # filters are cut off at the border
    assert np.abs(inner - 127.5).max() <= 1  # picking single pixels instead would give 0 or 255


def test_gray_and_transparent_videos_come_as_rgb(tmp_path):
    gray = clip(1)[0, :, :, 1]
    (frame,) = load(save_raw(tmp_path / "gray.mkv", [gray], "gray", "ffv1", "gray"))
    np.testing.assert_allclose(frame.astype(int), np.repeat(gray[..., None], 3, 2), atol=1)
    rgba = np.dstack([clip(1)[0], np.full((H, W), 128, np.uint8)])
    (frame,) = load(save_raw(tmp_path / "alpha.mkv", [rgba], "rgba", "ffv1", "bgra"))
    np.testing.assert_array_equal(frame, rgba[..., :3])


@pytest.mark.parametrize(("matrix", "turns"), [((0, 1, -1, 0), 3), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 1)])
def test_the_rotation_mark_of_a_phone_is_applied(tmp_path, video, matrix, turns):
    data = bytearray(video.read_bytes())
    at = data.index(b"tkhd") + 4 + 40  # display matrix of the track: a, b, u, c, d, v, x, y, w
    for place, value in zip((0, 4, 12, 16), matrix, strict=True):
        data[at + place : at + place + 4] = (value * 65536).to_bytes(4, "big", signed=True)
    turned = tmp_path / "phone.mp4"
    turned.write_bytes(data)
    expected = np.rot90(load(video), turns, axes=(1, 2))
    with VideoReader(turned) as reader:
        assert reader.size == reader.source_size == expected.shape[1:3]
        np.testing.assert_array_equal(np.stack(list(reader)), expected)
    assert load(turned, height=32, width=64).shape == (24, 32, 64, 3)


def test_frames_are_decoded_only_as_they_are_asked_for(tmp_path):
    whole = save(tmp_path / "whole.mp4", clip(200, 64, 64)).read_bytes()
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(whole[: len(whole) // 2])  # the index is at the front, so the first frames are there
    with VideoReader(broken) as reader:
        assert len(list(islice(reader, 20))) == 20  # nothing has met the break yet
        with pytest.raises(MediaError, match=r"damaged after \d+ frames .*limit the run to \d+ frames"):
            list(reader)


def test_damage_in_the_middle_is_reported_not_skipped(tmp_path):
    data = bytearray(save(tmp_path / "whole.mp4", clip(200, 64, 64)).read_bytes())
    middle = len(data) // 2
    data[middle : middle + 4000] = bytes(255 - b for b in data[middle : middle + 4000])
    (tmp_path / "damaged.mp4").write_bytes(data)
    with pytest.raises(MediaError, match=r"damaged after \d+ frames"):
        load(tmp_path / "damaged.mp4")


def test_reading_and_writing_at_once_keeps_pace(tmp_path, video):
    target = tmp_path / "copy.mp4"
    with VideoReader(video) as reader, VideoWriter(target, reader.fps, *reader.size) as writer:
        for frame in reader:
            writer.write(frame[None])
    assert psnr(load(target), load(video)) > 35  # one more pass of a visually lossless codec


# --- reading failures


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(MediaError, match="no such file"):
        VideoReader(tmp_path / "none.mp4")
    with pytest.raises(MediaError, match="is a folder"):
        VideoReader(tmp_path)


@pytest.mark.parametrize("name", ["notes.txt", "notes.mp4"])
def test_a_text_file_is_not_a_video(tmp_path, name):
    (tmp_path / name).write_text("not a video\n" * 100)
    with pytest.raises(MediaError, match=r"text file|cannot be read as a video"):
        VideoReader(tmp_path / name)


def test_an_empty_file_is_not_a_video(tmp_path):
    (tmp_path / "zero.mp4").touch()
    with pytest.raises(MediaError, match="cannot be read as a video"):
        VideoReader(tmp_path / "zero.mp4")


def test_a_sound_file_has_no_video(tmp_path):
    path = tmp_path / "sound.wav"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
    with pytest.raises(MediaError, match="no video stream"):
        VideoReader(path)


def test_a_video_cut_off_before_its_first_frame(tmp_path, video):
    data = video.read_bytes()
    path = tmp_path / "cut.mp4"
    path.write_bytes(data[: data.index(b"mdat") + 40])
    with pytest.raises(MediaError, match=r"no frame can be decoded .*cut off or damaged"):
        VideoReader(path)


def test_a_video_cut_off_before_its_index(tmp_path, video):
    path = tmp_path / "cut.mp4"
    path.write_bytes(video.read_bytes()[:100])
    with pytest.raises(MediaError, match="holds no video stream"):
        VideoReader(path)


def test_a_video_without_frames(tmp_path, video):
    path = tmp_path / "none.mp4"
    data = video.read_bytes()
    for table in (b"stts", b"stsz", b"stsc", b"stco", b"ctts", b"stss"):  # the index: entry counts become 0
        at = data.index(table) + 8 + 4 * (table == b"stsz")
        data = data[:at] + bytes(4) + data[at + 4 :]
    path.write_bytes(data)
    with pytest.raises(MediaError, match="holds no video frames"):
        VideoReader(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 32}, "both height and width"),
        ({"height": 0, "width": 32}, "height must be at least 1, got 0"),
        ({"max_frames": 0}, "max_frames must be at least 1, got 0"),
    ],
)
def test_reader_options_are_checked(video, options, message):
    with pytest.raises(MediaError, match=message):
        VideoReader(video, **options)


# --- writing failures: one line, and nothing half-written


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("out.avi", r"cannot write the format '.avi'; supported are \.mp4, \.mov, \.mkv, \.webm"),
        ("out", "cannot write the format ''; supported are"),
        ("none/out.mp4", "does not exist; create it first"),
        ("folder.mp4", "is a folder, expected a file name"),
    ],
)
def test_output_paths_are_checked_before_any_frame(tmp_path, name, message):
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(MediaError, match=message):
        VideoWriter(tmp_path / name, 16, H, W)


@pytest.mark.parametrize(
    ("fps", "height", "width", "message"),
    [
        (0, H, W, "fps must be"),
        (float("nan"), H, W, "fps must be"),
        (16, 95, W, "height must be a positive even"),
        (16, H, 0, "width must be a positive even"),
    ],
)
def test_rate_and_size_are_checked(tmp_path, fps, height, width, message):
    with pytest.raises(MediaError, match=message):
        VideoWriter(tmp_path / "out.mp4", fps, height, width)


@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((1, H, W, 3), np.float32),
        np.zeros((H, W, 3), np.uint8),
        np.zeros((1, W, H, 3), np.uint8),
        np.zeros((1, H, W, 4), np.uint8),
    ],
)
def test_frames_of_another_kind_are_refused(tmp_path, frames):
    with (
        pytest.raises(MediaError, match=r"expected uint8 frames \[T, 96, 160, 3\], got"),
        VideoWriter(tmp_path / "out.mp4", 16, H, W) as writer,
    ):
        writer.write(frames)
    assert list(tmp_path.iterdir()) == []


def test_writing_outside_the_block_is_refused(tmp_path):
    writer = VideoWriter(tmp_path / "out.mp4", 16, H, W)
    with pytest.raises(MediaError, match="not open"):
        writer.write(clip(1))


def test_no_frames_make_no_file(tmp_path):
    with pytest.raises(MediaError, match="no frames were written"), VideoWriter(tmp_path / "o.mp4", 16, H, W):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, failure):
    target = tmp_path / "out.mp4"
    target.write_text("the old one")

    def write_and_fail():
        with VideoWriter(target, 16, H, W) as writer:
            writer.write(clip(3))
            assert target.read_text() == "the old one"
            raise failure

    with pytest.raises(failure):
        write_and_fail()
    assert list(tmp_path.iterdir()) == [target]
    assert target.read_text() == "the old one"


def test_success_replaces_the_old_file(tmp_path):
    target = tmp_path / "out.mp4"
    target.write_text("the old one")
    save(target, clip(3))
    assert list(tmp_path.iterdir()) == [target]
    assert len(load(target)) == 3


FULL_DISK = """
import resource, sys
import numpy as np
from svd2_jax.errors import MediaError
from svd2_jax.media import VideoWriter

size, path = int(sys.argv[1]), sys.argv[2]
noise = np.random.default_rng(0).integers(0, 256, (90, 96, 160, 3), dtype=np.uint8)
resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
try:
    with VideoWriter(path, 16, 96, 160) as writer:
        writer.write(noise)
except MediaError as error:
    print(error)
    sys.exit(3)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are a POSIX feature")
@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, share):
    """The limit strikes when the file is opened, while frames are written, and while it is finished."""
    noise = np.random.default_rng(0).integers(0, 256, (90, H, W, 3), dtype=np.uint8)
    size = int(share * save(tmp_path / "whole.mp4", noise).stat().st_size)
    target = tmp_path / "out.mp4"
    target.write_text("the old one")
    command = [sys.executable, "-c", FULL_DISK, str(size), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 3, done.stderr
    assert "out.mp4: cannot be written (" in done.stdout
    assert done.stdout.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.mp4", "whole.mp4"]
    assert target.read_text() == "the old one"


# --- the synthetic clip


def test_the_synthetic_clip_is_the_same_every_time_and_moves():
    frames = clip(6, seed=3)
    assert frames.shape == (6, H, W, 3)
    assert frames.dtype == np.uint8
    np.testing.assert_array_equal(frames, clip(6, seed=3))
    assert (frames != clip(6, seed=4)).any()
    motion = np.abs(np.diff(frames.astype(int), axis=0)).mean((1, 2, 3))
    assert (motion > 0.2).all()
    assert frames.std() > 20  # there is something to see


def test_the_synthetic_clip_is_made_as_it_is_asked_for():
    endless = synthetic_clip(10**9, 32, 32, 0)
    assert len(list(islice(endless, 3))) == 3


def test_media_loads_no_jax():
    code = "import sys, svd2_jax.media; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
