"""The table of a live run, as it looks in a terminal and in a file."""

import io
import re
import threading

import pytest
from rich.console import Console
from test_metrics import dropped, shown, tick

from svd2_jax.runtime.metrics import Metrics
from svd2_jax.runtime.table import LiveTable, view
from svd2_jax.runtime.types import Reason, StreamSettings


def run(streams=2):
    metrics = Metrics()
    for stream in range(streams):
        metrics.opened(stream, StreamSettings(rate_hz=25, budget_ms=500), f"camera {stream}")
        for number in range(100):
            if number % 10 == 9:
                metrics(dropped(number, 40 * number, Reason.OVERLOAD, stream))
            else:
                metrics(shown(number, 40 * number, 600 if number == 50 else 300, stream))
        metrics(tick(stream, 0, 1000, (stream,), queued=3))
    return metrics


def text(*things, width=140):
    console = Console(file=io.StringIO(), width=width)
    for thing in things:
        console.print(thing)
    return console.file.getvalue()


def test_each_stream_has_a_row_and_all_together():
    metrics = run(2)
    lines = text(view(metrics)).splitlines()
    assert lines[0].split()[:6] == ["stream", "in", "shown", "late", "dropped", "FPS"]
    rows = {re.sub(r"\s+", " ", line).strip() for line in lines}
    assert {r.split(" 300 300 ")[0] for r in rows} >= {
        "camera 0 100 90 1.1 % 10 % 22.7",
        "camera 1 100 90 1.1 % 10 % 22.7",
        "all 200 180 1.1 % 10 % 45.7",
    }


def test_the_table_fits_into_eighty_columns_after_hours():
    metrics = run(3)
    for number in range(100, 110_000, 10_000):
        metrics(shown(number, 40 * number, 300))
    assert "…" not in text(view(metrics), width=80)


@pytest.mark.parametrize(
    ("width", "row"), [(80, "0: a neon city at n…"), (140, "0: a neon city at night, [bold] signs ")]
)
def test_prompts_are_cut_as_late_as_the_width_allows(width, row):
    metrics = run(2)
    metrics.opened(0, StreamSettings(rate_hz=25, budget_ms=500), "0", "a neon city at night, [bold] signs")
    table = view(metrics).renderables[0]
    lines = text(table, width=width).splitlines()
    assert len(lines) == len(text(table, width=300).splitlines())
    assert max(map(len, lines)) <= width
    assert lines[1].startswith(row)
    assert lines[1].split()[-1] == "2.00"


def test_one_stream_needs_no_row_for_all():
    metrics = run(1)
    assert "all" not in text(view(metrics))


def test_the_live_table_shows_the_newest_streams_and_recent_numbers():
    metrics = run(15)
    for number in range(100, 250):  # 6 s, faster than before
        metrics(shown(number, 40 * number, 100, stream=14))
    lines = text(view(metrics, live=True)).splitlines()
    assert [line.split()[:2] for line in lines[1:13]] == [["camera", str(i)] for i in range(3, 15)]
    assert lines[12].split()[2:10] == ["250", "240", "0.42", "%", "4", "%", "25.0", "100"]
    assert lines[13].split()[:3] == ["all", "1650", "1500"]
    assert "camera 0" in text(view(metrics))


def test_a_run_without_frames_has_a_table():
    metrics = Metrics()
    metrics.opened(0, StreamSettings(rate_hz=25, budget_ms=500))
    assert "stream 0" in text(view(metrics))


def test_the_device_has_a_line_that_says_why_frames_were_dropped():
    words = text(view(run(1)))
    assert "1 ticks of 1.00 streams" in words
    assert "queue 3.0 (at most 3)" in words
    assert "first frame after 300 ms" in words
    assert "late: 1 · dropped: 10 overload" in words


def test_a_frame_that_was_reported_twice_is_told_of():
    metrics = run(1)
    metrics(shown(99, 4000, 300))
    assert "reported twice" in text(view(metrics))


def test_outside_a_terminal_the_table_comes_once():
    console = Console(file=io.StringIO(), width=140)
    with LiveTable(run(2), console, refresh_hz=1000):
        assert console.file.getvalue() == ""
    assert console.file.getvalue().count("camera 1") == 1
    assert "\x1b" not in console.file.getvalue()


def test_on_a_terminal_the_table_is_renewed_in_place_and_its_thread_ends():
    before = set(threading.enumerate())
    written = threading.Event()

    class Screen(io.StringIO):
        count = 0

        def write(self, words):
            self.count += "camera 0" in words
            if self.count >= 3:
                written.set()
            return super().write(words)

    screen = Screen()
    console = Console(file=screen, width=140, force_terminal=True, _environ={"TERM": "xterm"})
    with LiveTable(run(2), console, refresh_hz=1000) as table:
        table.note = "type a prompt"
        assert written.wait(30)
    assert "\x1b[" in screen.getvalue()
    assert set(threading.enumerate()) == before
