"""The chart of a live run: it is written, as large as it says, whatever happened."""

import math
import subprocess
import sys

import pytest
from matplotlib.figure import Figure
from PIL import Image

from svd2_jax.charts import live
from svd2_jax.charts.live import _bins, _broken
from svd2_jax.runtime.metrics import Metrics
from svd2_jax.runtime.types import (
    MS,
    SECOND,
    Fate,
    FrameRecord,
    PromptRecord,
    Reason,
    StepChange,
    StreamSettings,
    Tick,
    TickEntry,
    TickRecord,
)


def made_up(streams=3, seconds=60.0, rate_hz=16.0, budget_ms=800):
    """A run with an overload in its middle third, a stall, and a few frames of each kind of fault."""
    metrics, budget, ticks = Metrics(), budget_ms * MS, 0
    start = 5000 * SECOND
    for stream in range(streams):
        metrics.opened(
            stream,
            StreamSettings(rate_hz, budget_ms),
            ("camera", "screen", "file")[stream % 3] + f" {stream}",
        )
    for number in range(round(seconds * rate_hz)):
        at = start + round(number * SECOND / rate_hz)
        share = number / (seconds * rate_hz)
        busy = 1 / 3 < share < 2 / 3
        for stream in range(streams):
            if stream == 1 and 0.75 < share < 0.85:
                continue
            wave = math.sin(number / 40 + stream) * 30 + (number * 7919 % 53)
            latency = (420 + 60 * stream + wave + (180 if busy else 0)) * MS
            dropped = (Reason.OVERLOAD if busy and number % (2 + stream) == 0 else None) or (
                Reason.DUPLICATE if number % 211 == 5 else Reason.STALE if number % 307 == 9 else None
            )
            if dropped:
                metrics(FrameRecord(stream, number, at, at, at + budget, Fate.DROPPED, reason=dropped))
                continue
            if busy and number % 97 == 0:
                latency += 250 * MS
            end = at + round(latency)
            fate = Fate.SHOWN if end <= at + budget else Fate.LATE
            metrics(FrameRecord(stream, number, at, at, at + budget, fate, at, end, end, 1 if busy else 2))
        if number % 4 == 0:
            steps = 1 if busy else 2
            sizes = [streams] if number % 3 else [1, max(1, streams - 1)]
            for size in sizes:
                parts = tuple(TickEntry(s, (), steps=steps) for s in range(size))
                took = round(90 * MS / len(sizes) * (2 if busy else 1))
                metrics(TickRecord(Tick(ticks, parts, took), at, at + took, size * 3 + number % 5))
                ticks += 1
        if number == round(seconds * rate_hz / 3) + 1:
            for stream in range(streams):
                metrics(StepChange(stream, at, 2, 1))
    return metrics


@pytest.mark.parametrize("streams", [1, 3, 12])
def test_a_chart_is_1600_pixels_wide(tmp_path, streams):
    path = tmp_path / "run.png"
    live.draw(path, made_up(streams, seconds=6))
    with Image.open(path) as image:
        assert image.width == 1600
        assert 300 < image.height < 3000
        assert len(image.convert("RGB").getcolors(2**24) or []) > 50


def test_nothing_is_drawn_of_nothing(tmp_path):
    live.draw(tmp_path / "empty.png", Metrics())
    assert (tmp_path / "empty.png").stat().st_size > 0


def test_one_dropped_frame_can_be_drawn(tmp_path):
    metrics = Metrics()
    metrics(FrameRecord(0, 0, None, 0, 1, Fate.DROPPED, reason=Reason.CLOSED))
    live.draw(tmp_path / "one.png", metrics)
    assert (tmp_path / "one.png").stat().st_size > 0


@pytest.mark.parametrize("prompt", ["$5", "a $\\bad$ sign", "a very long prompt " * 50])
def test_every_prompt_can_be_drawn(tmp_path, prompt):
    metrics = made_up(1, seconds=2)
    metrics(PromptRecord(0, 5001 * SECOND, prompt, 8))
    live.draw(tmp_path / "prompt.png", metrics)
    assert (tmp_path / "prompt.png").stat().st_size > 0


def test_every_reason_to_drop_a_frame_has_a_colour():
    assert set(live.DROPS) == set(Reason)
    assert len(set(live.DROPS.values())) == len(Reason)


def test_bins_hold_every_frame_whatever_their_width():
    metrics = made_up(1, seconds=120)
    timeline, summary = metrics.timeline(0), metrics.summary(0)
    for width_ns in (timeline.width_ns, 8 * timeline.width_ns):
        bins = _bins(timeline, width_ns, 5000 * SECOND)
        assert len(bins) <= -(-120 * SECOND // width_ns) + 1
        assert sum(tally.displayed for _, tally in bins) == summary.shown + summary.late
        assert -width_ns / SECOND < bins[0][0] < bins[-1][0] < 120 + width_ns / SECOND


def test_a_line_breaks_where_a_stream_paused():
    timeline = made_up(2, seconds=60).timeline(1)
    shown = [(at, t) for at, t in _bins(timeline, timeline.width_ns, 5000 * SECOND) if t.displayed]
    assert sum(tally is None for _, tally in _broken(shown, 1.0)) == 1


def test_the_load_of_the_device_has_a_panel_of_its_own():
    metrics = Metrics()
    for number in range(40):  # busy for 100 of 200 ms
        at = number * 200 * MS
        metrics(TickRecord(Tick(number, (TickEntry(0, ()),), 0), at, at + 100 * MS, 0))
    panels = Figure().subplots(3)
    live._device(panels, _bins(metrics.timeline(), SECOND, 0), SECOND)
    busy, batch, queue = panels
    assert [axes.get_ylabel() for axes in panels] == ["busy, %", "batch", "queue"]
    assert [bar.get_height() for bar in busy.patches] == pytest.approx([50] * 8)
    assert [bar.get_height() for bar in batch.patches] == [1] * 8
    assert [bar.get_height() for bar in queue.patches] == [0] * 8


def test_changes_of_the_prompt_stand_where_they_were_made_cut_to_the_room_they_have():
    axes = Figure(figsize=(live.WIDTH, 2), dpi=100).add_axes((0.05, 0, 0.9, 1))  # 144 pixels a second
    axes.set_xlim(0, 10)
    live._prompts(axes, [(-5000, "a pencil sketch"), (4, "winter, " * 20), (9, "oil"), (9.1, "a mosaic")])
    assert [line.get_xdata()[0] for line in axes.lines] == [4, 9, 9.1]
    begin, middle, end = axes.texts
    assert begin.get_text() == "a pencil sketch"
    assert middle.get_text().startswith("winter, winter, ")
    assert middle.get_text().endswith("…")
    assert middle.get_window_extent().x1 < 80 + 9 * 144
    assert (end.get_text(), end.xy[0]) == ("a mosaic", 9.1)


def test_a_live_run_without_a_chart_loads_no_matplotlib():
    script = "import sys, svd2_jax.cli.live; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
