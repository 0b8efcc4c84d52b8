"""The numbers that are reported: each against values worked out by hand."""

import json
import random
import sys
from contextlib import closing

import pytest

from svd2_jax.errors import SessionError
from svd2_jax.runtime.event_log import JsonLines
from svd2_jax.runtime.metrics import BUCKETS, STORED_PROMPTS, Histogram, Metrics
from svd2_jax.runtime.types import (
    MS,
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

BUDGET = 500 * MS


def shown(number, arrival_ms, latency_ms, stream=0, steps=2, timestamp_ms=None):
    arrival = round(arrival_ms * MS)
    fate = Fate.SHOWN if latency_ms * MS <= BUDGET else Fate.LATE
    timestamp = None if timestamp_ms is None else round(timestamp_ms * MS)
    end = arrival + round(latency_ms * MS)
    return FrameRecord(stream, number, timestamp, arrival, arrival + BUDGET, fate, arrival, end, end, steps)


def dropped(number, arrival_ms, reason=Reason.OVERLOAD, stream=0):
    arrival = round(arrival_ms * MS)
    return FrameRecord(stream, number, None, arrival, arrival + BUDGET, Fate.DROPPED, reason=reason)


def tick(number, start_ms, length_ms, streams=(0,), steps=2, queued=0):
    parts = tuple(TickEntry(s, (), steps=steps) for s in streams)
    return TickRecord(
        Tick(number, parts, 0), round(start_ms * MS), round((start_ms + length_ms) * MS), queued
    )


def fed(*events):
    metrics = Metrics()
    for event in events:
        metrics(event)
    return metrics


def test_nothing_is_summed_up_without_a_division_by_zero():
    summary = Metrics().summary()
    assert summary.is_balanced
    assert summary.frames_in == 0
    assert summary.latency_p99_ms is None
    assert summary.miss_rate == summary.fps_shown == summary.utilisation == 0


def test_each_input_frame_is_counted_once_under_its_fate():
    metrics = fed(shown(0, 0, 300), shown(2, 80, 600), dropped(1, 40), dropped(3, 120, Reason.CLOSED))
    summary = metrics.summary(0)
    assert (summary.frames_in, summary.shown, summary.late, summary.inside) == (4, 1, 1, 0)
    assert summary.dropped == {"closed": 1, "overload": 1}
    assert (summary.miss_rate, summary.drop_rate) == (0.5, 0.5)
    assert summary.is_balanced


def test_a_frame_that_arrived_is_inside_until_its_fate_is_known():
    metrics = Metrics()
    for number in range(3):
        metrics.arrived(7, number)
    metrics(shown(1, 0, 100, stream=7))
    assert metrics.summary(7).inside == metrics.summary().inside == 2
    assert metrics.summary(7).is_balanced


def test_a_frame_reported_twice_is_noticed():
    summary = fed(shown(0, 0, 100), shown(0, 0, 100)).summary()
    assert summary.repeated == 1
    assert not summary.is_balanced


def test_a_frame_that_is_never_reported_stays_inside():
    assert fed(shown(0, 0, 100), shown(2, 80, 100)).summary().inside == 1


def test_latency_quantiles_are_exact_to_half_a_percent():
    draw = random.Random(1)
    values = [draw.lognormvariate(5.5, 0.6) for _ in range(5000)]
    summary = fed(*(shown(i, 40 * i, v) for i, v in enumerate(values))).summary(0)
    ordered = sorted(values)
    for share, got in (
        (0.5, summary.latency_p50_ms),
        (0.95, summary.latency_p95_ms),
        (0.99, summary.latency_p99_ms),
    ):
        exact = ordered[-(-len(ordered) * round(share * 100) // 100) - 1]
        assert got == pytest.approx(exact, rel=0.0051)  # half of a 1 % bin, and the rounding to ns
    assert summary.latency_max_ms == pytest.approx(max(values), abs=1e-6)


def test_few_latencies_have_exact_ends():
    one = Histogram()
    one.add(123_456_789)
    assert one.quantile_ns(0.5) == one.quantile_ns(0.99) == 123_456_789
    one.add(0)
    assert one.quantile_ns(0.5) == 1000  # all up to a microsecond is one bin


def test_time_to_first_frame_counts_from_the_first_arrival():
    metrics = fed(shown(0, 100, 250), shown(1, 140, 300), shown(0, 1000, 400, stream=1))
    assert metrics.summary(0).time_to_first_ms == 250
    assert metrics.summary().time_to_first_ms == 400  # the longest of all streams


def test_jitter_is_the_deviation_from_the_rate():
    metrics = Metrics()
    metrics.opened(0, StreamSettings(rate_hz=25, budget_ms=500))
    for number, at in ((0, 300), (1, 340), (2, 384), (4, 460)):  # 40, 44 and 76 for two intervals
        metrics(shown(number, at - 300, 300))
    summary = metrics.summary(0)
    assert summary.jitter_ms == pytest.approx((0 + 4 + 4) / 3)
    assert summary.jitter_p95_ms == pytest.approx(4, rel=0.0051)


def test_jitter_follows_timestamps_through_a_stall_of_the_source():
    metrics = Metrics()
    metrics.opened(0, StreamSettings(rate_hz=25, budget_ms=500))
    metrics(shown(0, 0, 300, timestamp_ms=5000))
    metrics(shown(1, 2000, 300, timestamp_ms=7000))
    assert metrics.summary(0).jitter_ms == 0


def test_frames_per_second_are_intervals_by_time():
    assert fed(*(shown(i, 40 * i, 300) for i in range(26))).summary(0).fps_shown == pytest.approx(25)


def test_a_tick_counts_for_each_of_its_streams_with_an_equal_share():
    metrics = fed(
        tick(0, 100, 100, (0, 1), queued=6),
        tick(1, 300, 100, (0,), queued=2),
        shown(0, 0, 400),
        shown(0, 0, 400, stream=1),
    )
    both, first, second = metrics.summary(), metrics.summary(0), metrics.summary(1)
    assert (both.ticks, both.batch_mean, both.batch_max) == (2, 1.5, 2)
    assert both.utilisation == pytest.approx(200 / 400)
    assert first.utilisation == pytest.approx(150 / 400)
    assert second.utilisation == pytest.approx(50 / 400)
    assert (both.queue_mean, both.queue_max) == (4, 6)


def test_steps_are_averaged_over_shown_frames():
    metrics = fed(
        shown(0, 0, 300, steps=2),
        tick(0, 0, 10, steps=1),
        StepChange(0, 10 * MS, 2, 1),
        shown(1, 40, 300, steps=1),
    )
    summary = metrics.summary(0)
    assert (summary.steps_mean, summary.steps_now, summary.step_changes) == (1.5, 1, 1)


def test_recent_numbers_forget_what_is_past():
    metrics = fed(*(shown(i, 40 * i, 600) for i in range(100)))  # all late, during 4 s
    for i in range(100, 300):
        metrics(shown(i, 40 * i, 200))
    assert metrics.summary(0, recent=True).late == 0
    assert metrics.summary(0, recent=True).latency_p50_ms == 200
    assert metrics.summary(0).late == 100


def test_recent_numbers_are_those_of_two_to_four_seconds():
    metrics = fed(*(shown(i, 40 * i, 200) for i in range(1000)))
    assert 50 <= metrics.summary(0, recent=True).shown <= 100


def test_a_timeline_widens_its_buckets_and_loses_no_frame():
    metrics = fed(*(shown(i, 1000 * i, 200 + i % 7) for i in range(3000)), dropped(3000, 3_000_000))
    timeline = metrics.timeline(0)
    buckets = timeline.items()
    assert len(buckets) <= BUCKETS
    assert timeline.width_ns == 100 * MS * 2**6  # 3000 s in 600 buckets: 6.4 s each
    assert sum(b.displayed for _, b in buckets) == 3000
    assert sum(b.dropped for _, b in buckets) == 1
    assert max(b.latency.high_ns for _, b in buckets) == 206 * MS
    assert buckets == sorted(buckets, key=lambda item: item[0])


def test_memory_stays_bounded_however_long_it_runs():
    metrics = fed(*(shown(i, 40 * i, 100 + i % 300) for i in range(20_000)))
    numbers = metrics._streams[0]
    bins = len(numbers.total.latency._bins)
    for i in range(20_000, 60_000):
        metrics(shown(i, 40 * i, 100 + i % 300))
    assert len(numbers.total.latency._bins) == bins
    assert len(metrics.timeline(0).buckets) <= BUCKETS
    assert not numbers.open_numbers


def test_streams_that_left_long_ago_count_in_the_totals_only():
    metrics = Metrics(stored_streams=10)
    for stream in range(100):
        metrics(shown(0, 1000 * stream, 200, stream=stream))
    assert metrics.streams == tuple(range(90, 100))
    assert metrics.summary().frames_in == metrics.summary().shown == 100
    with pytest.raises(SessionError, match="no numbers of stream 0 are stored"):
        metrics.summary(0)


def test_a_stream_with_frames_inside_is_not_forgotten():
    metrics = Metrics(stored_streams=3)
    metrics.arrived(0, 0)
    for stream in range(1, 20):
        metrics(shown(0, 1000 * stream, 200, stream=stream))
    assert 0 in metrics.streams
    assert metrics.summary().is_balanced


def test_lines_hold_every_event_and_a_final_summary(tmp_path):
    path, metrics = tmp_path / "run.jsonl", Metrics()
    events = [
        tick(0, 0, 100, queued=5), shown(0, 0, 300), StepChange(0, 5 * MS, 2, 1), dropped(1, 40, Reason.STALE)
    ]  # fmt: skip
    with closing(JsonLines(path, metrics, about={"command": "test"})) as lines:
        for event in events:
            metrics(event)
            lines(event)
        assert len(path.read_text().splitlines()) == 5  # written at once
    start, *middle, end = map(json.loads, path.read_text().splitlines())
    assert start == {"kind": "start", "format": 1, "command": "test"}
    assert [line["kind"] for line in middle] == ["tick", "frame", "steps", "frame"]
    assert middle[1]["shown_ns"] == 300 * MS
    assert middle[0]["entries"] == [{"stream": 0, "frames": [], "fill": 0, "steps": 2, "first": False}]
    assert (middle[0]["number"], middle[0]["done_ns"], middle[0]["queued"]) == (0, 100 * MS, 5)
    assert (middle[1]["fate"], middle[1]["reason"]) == ("shown", None)
    assert (middle[3]["fate"], middle[3]["reason"]) == ("dropped", "stale")
    assert end["final"] is True
    assert end["all"] == metrics.summary().to_dict()
    assert end["streams"] == [metrics.summary(0).to_dict()]


def test_lines_hold_a_summary_now_and_then(tmp_path):
    metrics, path = Metrics(), tmp_path / "run.jsonl"
    with closing(JsonLines(path, metrics, every_s=10)) as lines:
        for i in range(1000):  # 40 s
            metrics(shown(i, 40 * i, 300))
            lines(shown(i, 40 * i, 300))
    kinds = [json.loads(line)["kind"] for line in path.read_text().splitlines()]
    assert kinds.count("summary") == 4
    assert kinds.count("frame") == 1000


@pytest.mark.skipif(sys.platform != "linux", reason="the file that is always full is Linux's")
def test_a_full_disk_does_not_stop_the_stream():
    lines = JsonLines("/dev/full", Metrics())
    lines(shown(0, 0, 300))
    assert isinstance(lines.error, OSError)
    lines.close()


def test_a_summary_can_be_written_as_json():
    text = json.dumps(fed(shown(0, 0, 300), dropped(1, 40)).summary().to_dict())
    assert json.loads(text)["dropped"] == {"overload": 1}


def test_a_stream_is_labelled_with_its_latest_prompt_and_the_latest_few_are_kept():
    metrics = Metrics()
    metrics.opened(0, StreamSettings(rate_hz=25, budget_ms=500), "door", "a pencil\n sketch")
    assert metrics.summary(0).label == "door: a pencil sketch"
    metrics(PromptRecord(0, 40 * MS, "winter", 5))
    assert metrics.summary(0).label == "door: winter"
    assert metrics.summary(0).to_dict()["prompt"] == "winter"
    assert list(metrics.timeline(0).prompts) == [(0, "a pencil\n sketch"), (40 * MS, "winter")]
    for number in range(1000):
        metrics(PromptRecord(0, (50 + number) * MS, str(number), 5))
    assert len(metrics.timeline(0).prompts) == STORED_PROMPTS
    assert metrics.timeline(0).prompts[-1] == (1049 * MS, "999")
    assert metrics.summary().label == "all"


def test_a_change_of_prompt_is_a_line(tmp_path):
    with closing(JsonLines(tmp_path / "run.jsonl")) as lines:
        lines(PromptRecord(3, 40 * MS, "winter", 5))
    line = json.loads((tmp_path / "run.jsonl").read_text().splitlines()[1])
    assert line == {"kind": "prompt", "stream": 3, "at_ns": 40 * MS, "prompt": "winter", "frame": 5}


@pytest.mark.parametrize("seconds", [5, 5.5, 6, 6.9])
def test_the_recent_load_is_that_of_the_time_it_speaks_of_however_old_the_frames_are(seconds):
    metrics = Metrics()
    for number in range(
        round(10 * seconds)
    ):  # a tick of 60 ms and a frame every 100 ms, shown 3 s after it came
        metrics(tick(number, 3000 + 100 * number, 60))
        metrics(shown(number, 100 * number, 3100))
    for stream in (None, 0):
        assert metrics.summary(stream, recent=True).utilisation == pytest.approx(
            0.6, abs=0.04
        )  # half a tick in 2 s
