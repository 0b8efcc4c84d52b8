"""URLs as sources and sinks of live streams, on this machine's own network; nothing is compiled."""

import contextlib
import functools
import http.server
import io
import itertools
import re
import socket
import threading
import time
import types
from pathlib import Path

import av
import numpy as np
import pytest
from fakes import SMALL, FakeEngine, spec

from svd2_jax import media
from svd2_jax.cli import live_run as live
from svd2_jax.cli import main
from svd2_jax.command import EXIT_BAD_INPUT
from svd2_jax.errors import MediaError
from svd2_jax.media import sources
from svd2_jax.media.sinks import UrlSink
from svd2_jax.media.urls import masked, path_or_url
from svd2_jax.runtime.scheduler import PolicyConfig
from svd2_jax.runtime.stream import WhenSlow
from svd2_jax.runtime.types import SECOND, Fate, FrameRecord, StreamSettings

H, W = SMALL.height, SMALL.width
FPS, COUNT = 8, 96  # FFmpeg looks at 5 s of a stream before it says what is in it
PATIENCE_S = 60.0  # for what has to happen; only a broken test waits as long


@pytest.fixture(scope="module")
def stream():
    """96 frames of a live stream as MPEG-TS, a key frame each second."""
    file = io.BytesIO()
    with av.open(file, "w", format="mpegts") as container:
        out = container.add_stream("libx264", rate=FPS, options={"tune": "zerolatency", "g": str(FPS)})
        out.height, out.width, out.pix_fmt = H, W, "yuv420p"
        for frame in media.synthetic_clip(COUNT, H, W):
            container.mux(out.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(out.encode(None))
    return file.getvalue()


class Peer:
    """The other side of one TCP connection: `talk` has it, until the test is over or says so."""

    def __init__(self, talk, scheme="tcp"):
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"{scheme}://127.0.0.1:{self._listening.getsockname()[1]}"
        self.is_over = threading.Event()
        self._thread = threading.Thread(target=self._serve, args=(talk,), daemon=True)

    def _serve(self, talk):
        with contextlib.suppress(OSError):  # the engine's side has left
            connection, _ = self._listening.accept()
            with connection:
                talk(connection, self.is_over)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self.is_over.set()
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)  # who waits for a connection waits no more
        self._listening.close()
        self._thread.join(PATIENCE_S)


def sends(data):
    """Sends something and leaves."""
    return Peer(lambda connection, is_over: connection.sendall(data))


def sends_and_stays(data):
    """Sends something, and then nothing."""

    def talk(connection, is_over):
        connection.sendall(data)
        is_over.wait(PATIENCE_S)

    return Peer(talk)


class Receiver(Peer):
    """Takes what is sent, until the sender ends."""

    def __init__(self, scheme="tcp"):
        super().__init__(self._receive, scheme)
        self.data, self.has_data = b"", threading.Event()

    def _receive(self, connection, is_over):
        while piece := connection.recv(1 << 16):
            self.data += piece
            self.has_data.set()

    def frames(self):
        """What was sent, as (time in s, frame) each, and the stream's properties."""
        self._thread.join(PATIENCE_S)
        with av.open(io.BytesIO(self.data), format="mpegts") as container:
            video = container.streams.video[0]
            return [(frame.time, frame) for frame in container.decode(video)], video.codec_context


def watched(url, stop=None, **options):
    return list(sources.watch_url(url, H, W, stop or threading.Event(), **options))


def record(number, shown_ns):
    return FrameRecord(0, number, None, 0, 0, Fate.SHOWN, shown_ns=shown_ns)


# --- names


@pytest.mark.parametrize(
    "url",
    ["rtsp://camera.local/s", "udp://@:9000", "HTTP://a/b.m3u8", "tcp://127.0.0.1:9?listen=1", "foo+bar://x"],
)
def test_a_url_is_a_url(url):
    assert path_or_url(url) == url


@pytest.mark.parametrize(
    "name",
    [
        "in.mp4",
        "at 12:30.mp4",
        "a:b/c:d.mp4",
        "C:\\in.mp4",
        "C:/in.mp4",
        "C://in.mp4",
        "rtsp:in.mp4",
        "./a://b",
    ],
)
def test_a_file_with_a_colon_is_a_file(name):
    assert path_or_url(name) == Path(name)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("rtsp://me:secret@host:554/s", "rtsp://me:***@host:554/s"),
        ("rtsp://me:se:cr@et/x@host/s", "rtsp://me:***@host/s"),
        ("rtsp://:secret@host/s", "rtsp://:***@host/s"),
        ("srt://host:9?passphrase=secret&mode=caller", "srt://host:9?passphrase=***&mode=caller"),
        ("http://host/s?user=me&password=secret", "http://host/s?user=me&password=***"),
        *[
            (url, url)
            for url in ("rtsp://me@host/s", "http://host:80/a@b", "rtsp://[::1]:554/a@b", "udp://@:9")
        ],
    ],
)
def test_passwords_are_not_shown(url, shown):
    assert masked(url) == shown


# --- sources


def test_a_stream_comes_with_its_own_timestamps(stream):
    with sends(stream) as peer:
        taken = watched(peer.url)
    assert [at for at, _ in taken] == [round(n * SECOND / FPS) for n in range(COUNT)]
    original = np.stack(list(media.synthetic_clip(COUNT, H, W)))
    np.testing.assert_allclose(
        [frame.mean() for _, frame in taken], original.mean((1, 2, 3)), atol=5
    )  # lossy


def test_a_stream_stops_at_once_when_nothing_comes_any_more(stream):
    stop = threading.Event()
    with sends_and_stays(stream) as peer:
        source = sources.watch_url(peer.url, H, W, stop, timeout_s=PATIENCE_S)
        next(source)
        stop.set()
        assert list(source) == []
        assert not peer.is_over.is_set()  # else it was the server that ended it


def test_a_stream_that_falls_silent_has_broken_off(stream):
    with sends_and_stays(stream) as peer, pytest.raises(MediaError) as error:
        watched(peer.url, timeout_s=1.0)
    assert re.fullmatch(rf"{peer.url}: broke off after \d+ frames \(nothing came for 1 s\)", str(error.value))


def test_a_server_that_says_nothing_is_given_up():
    with (
        sends_and_stays(b"") as peer,
        pytest.raises(MediaError, match=r"no answer within 0.3 s; check the address"),
    ):
        watched(peer.url, timeout_s=0.3)


def test_what_is_lost_on_the_way_does_not_end_a_stream(stream):
    middle = len(stream) // 2 // 188 * 188
    broken = stream[:middle] + bytes(940) + stream[middle + 940 :]
    with sends(broken) as peer:
        assert watched(peer.url)[-1][0] == round((COUNT - 1) * SECOND / FPS)
    with sends(stream[middle:]) as peer:  # begins between two key frames
        assert watched(peer.url)[-1][0] == round((COUNT - 1) * SECOND / FPS)


def test_what_comes_before_somebody_watches_is_dropped(stream):
    half = len(stream) // 2 // 188 * 188
    padding = (
        b"\x47\x1f\xff\x10" + bytes(184)
    ) * 100_000  # packets without content, more than any buffer holds
    is_read, go_on = threading.Event(), threading.Event()

    def talk(connection, is_over):
        connection.sendall(stream[:half] + padding)
        is_read.set()
        go_on.wait(PATIENCE_S)
        connection.sendall(stream[half:])

    with Peer(talk) as peer, sources.UrlSource(peer.url, H, W) as source:
        assert source.fps == FPS
        assert is_read.wait(PATIENCE_S)
        is_asked = types.SimpleNamespace(is_set=go_on.set)  # whether to stop, first when somebody watches: no
        times = [at for at, _ in source.watch(is_asked)]
    assert times[0] > 5 * SECOND  # of about 6 s
    assert times[-1] == round((COUNT - 1) * SECOND / FPS)


def test_a_file_on_a_web_server_is_played_from_its_start_at_its_rate(tmp_path):
    with media.VideoWriter(tmp_path / "in.mp4", 100, H, W) as writer:
        writer.write(np.stack(list(media.synthetic_clip(24, H, W))))

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format, *args):
            pass

    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=tmp_path)
    ) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        with sources.UrlSource(f"{url}/in.mp4", H, W) as source:
            began = time.monotonic()
            times = [at for at, _ in source.watch(threading.Event())]
        took_s = time.monotonic() - began
        with pytest.raises(MediaError, match="404 Not Found"):
            watched(f"{url}/none.mp4")
        server.shutdown()
    assert times == [round(n * SECOND / 100) for n in range(24)]
    assert took_s >= 0.23  # the last frame's time


def test_what_is_no_video_is_one_line():
    with (
        sends(b"what is this?\n" * 1000) as peer,
        pytest.raises(MediaError, match=r"is no video|is a text file"),
    ):
        watched(peer.url)


# --- sinks


def test_a_sink_sends_h264_with_the_times_at_which_frames_are_shown():
    levels, shown_s = [50, 100, 150, 200], [0, 0.125, 0.5, 0.5]
    with Receiver() as receiver:
        sink = UrlSink(receiver.url, FPS, H, W, repeat_s=PATIENCE_S)
        assert sink.when_slow is WhenSlow.DROP_OLDEST
        sink.open()
        began_ns = time.monotonic_ns() + SECOND
        for n, (level, at_s) in enumerate(zip(levels, shown_s, strict=True)):
            sink(np.full((H, W, 3), level, np.uint8), record(n, began_ns + round(at_s * SECOND)))
        assert sink.close() is None
        frames, codec = receiver.frames()
    assert sink.result() == f"{receiver.url}: 4 frames sent"
    assert (codec.name, codec.has_b_frames) == ("h264", False)
    times = [at for at, _ in frames[2:]]  # behind two black ones
    np.testing.assert_allclose(np.subtract(times, times[0]), [0, 0.125, 0.5, 0.501], atol=0.0011)  # whole ms
    assert times[0] - frames[0][0] >= 1
    seen = [frame.to_ndarray(format="rgb24").mean() for _, frame in frames]
    np.testing.assert_allclose(seen, [0, 0, *levels], atol=3)  # the codec is lossy


def test_a_sink_repeats_its_last_frame_so_that_viewers_stay_and_can_join():
    with Receiver() as receiver:
        sink = UrlSink(receiver.url, FPS, H, W, repeat_s=0.01)
        sink.open()
        sink(np.full((H, W, 3), 200, np.uint8), record(0, None))
        until(lambda: sink._writer.frames_written > 5)
        assert sink.close() is None
        frames, _ = receiver.frames()
    assert len(frames) > 5
    assert frames[-1][1].key_frame
    assert abs(frames[-1][1].to_ndarray(format="rgb24").mean() - 200) < 3
    assert sink.frames == 1


def until(is_so):
    end = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_receiver_that_leaves_is_one_error():
    with sends(b"") as peer:  # and it leaves
        sink = UrlSink(f"{peer.url}?token=secret", FPS, H, W)
        sink.open()
        frame = np.zeros((H, W, 3), np.uint8)
        with pytest.raises(MediaError, match=r"^tcp://[\d.:]+\?token=\*\*\*: the receiver is gone \(.+\)$"):
            any(sink(frame, record(n, None)) for n in itertools.count())  # until it raises
        assert sink.close() is None  # as it has been raised


def test_a_receiver_that_leaves_while_no_frame_is_shown_is_told_of_at_the_end():
    with sends(b"") as peer:
        sink = UrlSink(peer.url, FPS, H, W, repeat_s=0.01)
        sink.open()
        until(lambda: sink._error is not None)
        assert "the receiver is gone" in (sink.close() or "")


@pytest.mark.parametrize("scheme", ["rtmp", "rtsp"])  # which begin with questions
def test_a_receiver_that_does_not_answer_is_given_up(scheme):
    with Receiver(scheme) as receiver:
        sink = UrlSink(f"{receiver.url}/live/x", FPS, H, W, timeout_s=0.3)
        with pytest.raises(MediaError, match="check the address and that the server is running"):
            sink.open()
        assert (sink.close(), sink.result()) == (None, None)


def test_udp_has_whole_packets_of_the_transport_stream():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
        receiver.bind(("127.0.0.1", 0))
        receiver.settimeout(PATIENCE_S)
        sink = UrlSink(f"udp://127.0.0.1:{receiver.getsockname()[1]}", FPS, H, W)
        sink.open()
        sizes = [len(receiver.recv(1 << 16)) for _ in range(2)]
        assert sink.close() is None
    assert all(0 < size <= 1316 and size % 188 == 0 for size in sizes)


def test_http_is_a_put():
    with Receiver("http") as receiver:
        sink = UrlSink(f"{receiver.url}/live", FPS, H, W)
        sink.open()
        assert receiver.has_data.wait(PATIENCE_S)
        sink.close()
    assert receiver.data.startswith(b"PUT /live HTTP/1.1\r\n")


# --- runs


def run(source, url):
    settings = StreamSettings(rate_hz=200.0, budget_ms=60_000.0)
    plan = live.LiveRun((spec(),), settings, source, output=url)
    plan.check()
    said = []
    engine = FakeEngine(device_ms=lambda *_: 1.0)
    return live.run([engine], plan, PolicyConfig(admit_below=None), said.append), said


def test_a_run_takes_frames_from_a_url_and_sends_them_to_another(stream, capsys):
    with sends(stream) as peer, Receiver() as receiver:
        ended_well, said = run(lambda i, stop: sources.watch_url(peer.url, H, W, stop), receiver.url)
        frames, _ = receiver.frames()
    assert ended_well
    assert "stream 0: the input has ended; finishing what is in flight" in said
    sent = re.search(rf"{receiver.url}: (\d+) frames sent", capsys.readouterr().out)
    assert sent is not None
    assert len(frames) >= 2 + int(sent[1]) > 2


def test_a_run_whose_receiver_leaves_fails_with_one_line(capsys):
    def source(i, stop):
        for n in itertools.count():
            if stop.wait(0.005):
                return
            yield n * SECOND // 200, np.zeros((H, W, 3), np.uint8)

    with sends(b"") as peer:
        ended_well, said = run(source, peer.url)
    assert not ended_well
    (error,) = (line for line in said if "receiver" in line)
    assert error.startswith(f"error: stream 0 ended early: {peer.url}: the receiver is gone (")


def test_a_run_whose_receiver_is_not_there_ends_before_anything_is_measured():
    said = []
    plan = live.LiveRun(
        (spec(),), StreamSettings(8.0, 2000.0), lambda i, stop: [], output="tcp://127.0.0.1:1"
    )
    with pytest.raises(MediaError, match=r"tcp://127.0.0.1:1: cannot be opened \(Connection refused\)"):
        live.run([FakeEngine()], plan, PolicyConfig(), said.append)
    assert said == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "live --input rtsp://me:secret@127.0.0.1:1/s",
            "rtsp://me:***@127.0.0.1:1/s: cannot be opened (Connection refused); check the address and that the server "
            "is running",
        ),
        (
            "live --input foo://x",
            "foo://x: this build of FFmpeg knows no protocol 'foo'; use rtsp, rtmp, http, udp or",
        ),
        (
            "live --input rtsp://me:secret@host/s --loop",
            "--loop is for a file; rtsp://me:***@host/s is a stream",
        ),
        (
            "live --input tcp://me:secret@host:1 --streams 2",
            "--input tcp://me:***@host:1: a URL is for one stream",
        ),
        (
            "live --input {clip} --output tcp://me:secret@host:1 --streams 2",
            "--output tcp://me:***@host:1: a URL is",
        ),
        (
            "live --input {clip} --output foo://me:secret@x",
            "foo://me:***@x: cannot send to such a URL; supported are",
        ),
        (
            "run --input rtsp://me:secret@host/s --output o.mp4",
            "--input rtsp://me:***@host/s: `svd2 run` works on",
        ),
        ("run --input {clip} --output tcp://me:secret@host:1", "use `svd2 live` for streams"),
    ],
)
def test_a_url_that_cannot_be_used_is_one_line_before_anything_is_loaded(tmp_path, capsys, options, message):
    clip = tmp_path / "in.mp4"
    with media.VideoWriter(clip, FPS, H, W) as writer:
        writer.write(np.zeros((9, H, W, 3), np.uint8))
    size = ["--height", str(H), "--width", str(W)]
    options = [*options.format(clip=clip).split(), "--checkpoint", "random:tiny", "--prompt", "x", *size]
    assert main(options) == EXIT_BAD_INPUT
    (error,) = (line for line in capsys.readouterr().err.splitlines() if not line.startswith("no --output"))
    assert error.startswith("error: ")
    assert message in error
    assert "secret" not in error
