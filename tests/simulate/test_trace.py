"""Traces: what a few numbers turn into, what a file may hold, and that the committed ones are as generated."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from svd2_jax.errors import ConfigError
from svd2_jax.runtime.types import MS, SECOND
from svd2_jax.simulate.trace import (
    DeviceTrace,
    StreamTrace,
    Trace,
    arrivals,
    capacity_hz,
    merged,
    read_trace,
    trace_from_dict,
    trace_to_dict,
)

ROOT = Path(__file__).parents[2]
TRACES = sorted((ROOT / "traces").glob("*.json"))
DEVICE = DeviceTrace(fixed_ms=30, row_ms=20, knee_rows=1, noise=0)
SMALL = {"name": "x", "description": "", "duration_s": 10, "device": {"fixed_ms": 30, "row_ms": 20}}


def stream(**settings) -> dict:
    return {"streams": [{"rate_hz": 1, "budget_ms": 9, **settings}]}


def one(duration_s: float = 2.0, device: DeviceTrace = DEVICE, **settings) -> Trace:
    source = StreamTrace(**{"rate_hz": 10, "budget_ms": 500, "delay_ms": 0, **settings})
    return Trace("t", "", duration_s, device, (source,))


def times_ms(trace: Trace) -> list[float]:
    return [a.at_ns / MS for a in arrivals(trace, 0)]


def stamps_ms(trace: Trace) -> list[float | None]:
    return [a.timestamp_ns and a.timestamp_ns / MS for a in arrivals(trace, 0)]


def test_a_device_pays_for_rows_beyond_the_knee_and_for_every_pass_of_a_first_group():
    device = DeviceTrace(fixed_ms=30, row_ms=20, knee_rows=2)
    assert [device.tick_ms(b, s) for b, s in ((1, 1), (1, 2), (2, 1), (2, 2), (4, 2))] == [
        30,
        30,
        30,
        70,
        150,
    ]
    assert device.sequential_ms(passes=3, rows=1) == 90
    assert device.sequential_ms(passes=3, rows=4) == 210


def test_the_capacity_is_that_of_the_best_batch_that_the_streams_can_fill():
    stream = StreamTrace(rate_hz=10, budget_ms=500)
    assert capacity_hz(DEVICE, [(stream, 1)]) == pytest.approx(4 / 0.030)
    assert capacity_hz(DEVICE, [(stream, 1)] * 2) == pytest.approx(8 / 0.050)
    assert capacity_hz(DEVICE, [(stream, 1)] * 5) == pytest.approx(16 / 0.090)
    assert capacity_hz(DEVICE, [(stream, 2)] * 4) == pytest.approx(16 / 0.170)


def test_streams_that_cannot_share_a_tick_share_the_time_in_the_mix_that_they_demand():
    often, seldom = (
        StreamTrace(rate_hz=30, budget_ms=500),
        StreamTrace(rate_hz=10, budget_ms=500, batch_key="other"),
    )
    # 40 frames: 30 at 133.3 a second and 10 at 133.3 a second, as if they were one stream.
    assert capacity_hz(DEVICE, [(often, 1), (seldom, 1)]) == pytest.approx(4 / 0.030)
    assert capacity_hz(DEVICE, [(often, 1), (seldom, 2)]) == pytest.approx(
        40 / (30 * 0.030 / 4 + 10 * 0.050 / 4)
    )


def test_an_overload_is_the_time_in_which_more_is_demanded_than_the_slowed_device_can_do():
    slow = dataclasses.replace(DEVICE, speed=((2.0, 0.05), (4.0, 0.06), (6.0, 1.0)))
    trace = one(10, slow)
    assert trace.overloads == ((2.0, 6.0),)
    assert trace.peak_load == pytest.approx(10 / (0.05 * 4 / 0.030))
    assert one(10).overloads == ()


def test_a_camera_gives_a_frame_every_interval():
    assert times_ms(one(0.5)) == [0, 100, 200, 300, 400]
    assert stamps_ms(one(0.5)) == [0, 100, 200, 300, 400]
    assert times_ms(one(0.5, delay_ms=20))[:2] == [20, 120]


def test_a_stalled_camera_takes_no_frames_and_keeps_its_clock():
    assert times_ms(one(1, stalls=((0.25, 0.5),))) == [0, 100, 200, 800, 900]


def test_a_burst_hands_over_what_was_held_back():
    assert times_ms(one(1, burst_ms=400)) == [0, 400, 400, 400, 400, 800, 800, 800, 800, 1200]


def test_a_drifting_clock_gives_more_frames_and_later_timestamps():
    trace = one(100, drift_ppm=10_000, clock_s=5)
    assert len(arrivals(trace, 0)) == 1010
    assert stamps_ms(trace)[-1] == pytest.approx(1000 * (5 + 100.9))
    assert times_ms(trace)[-1] == pytest.approx(1000 * 100.9 / 1.01)


def test_jitter_never_lets_frames_overtake_unless_told_to():
    kept = one(60, jitter_ms=80)
    assert stamps_ms(kept) == sorted(stamps_ms(kept))
    assert times_ms(kept) == sorted(times_ms(kept))
    swapped = one(60, jitter_ms=80, reorder=True)
    assert stamps_ms(swapped) != sorted(stamps_ms(swapped))
    assert times_ms(swapped) == sorted(times_ms(swapped))
    assert all(0 <= t - s <= 400 for t, s in zip(times_ms(swapped), stamps_ms(swapped), strict=True))


def test_faults_of_timestamps_come_as_often_as_asked_for():
    trace = one(500, missing_share=0.1, duplicate_share=0.05, stale_share=0.02, stale_ms=450)
    stamps = stamps_ms(trace)
    assert stamps.count(None) / len(stamps) == pytest.approx(0.1, abs=0.02)
    assert len(stamps) / 5000 == pytest.approx(1.05, abs=0.02)
    late = [t - s for t, s in zip(times_ms(trace), stamps, strict=True) if s is not None]
    assert sum(d == 450 for d in late) / 5000 == pytest.approx(0.02, abs=0.01)
    assert set(late) == {0, 450}
    assert set(stamps_ms(one(5, timestamps=False))) == {None}


def test_sources_join_send_and_leave_in_order_of_time():
    source = StreamTrace(rate_hz=10, budget_ms=500, delay_ms=0, count=2, stagger_s=0.05, end_s=0.3)
    events = list(merged(Trace("t", "", 5, DEVICE, (source,))))
    assert [(at // MS, rank, index) for at, rank, index, _ in events] == [
        (0, 0, 0), (0, 1, 0), (50, 0, 1), (50, 1, 1), (100, 1, 0), (150, 1, 1), (200, 1, 0), (250, 1, 1),
        (300, 2, 0), (300, 2, 1),
    ]  # fmt: skip


def test_the_same_trace_gives_the_same_frames_and_another_seed_others():
    trace = one(20, jitter_ms=10)
    assert arrivals(trace, 0) == arrivals(one(20, jitter_ms=10), 0)
    assert arrivals(trace, 0) != arrivals(dataclasses.replace(trace, seed=1), 0)


# --- files


@pytest.mark.parametrize("path", TRACES, ids=lambda path: path.stem)
def test_a_committed_trace_is_small_and_states_what_it_demands_and_grants(path):
    trace = read_trace(path)
    assert path.stat().st_size < 200_000
    assert trace.name == path.stem
    assert trace.description.endswith(".")
    assert trace.load == pytest.approx(trace.peak_load, abs=0.001)
    assert all(f"{s.budget_ms:g} ms at {s.rate_hz:g} frames/s" in trace.budgets for s in trace.streams)
    assert (trace.peak_load > 1) == trace.name.startswith("overload")
    assert trace.peak_load <= 0.8 or trace.peak_load == pytest.approx(2, abs=0.01)


def test_there_are_traces_of_every_kind():
    assert {path.stem for path in TRACES} >= {
        "steady_16", "steady_30", "jitter", "bursts", "stalls", "device_half", "come_and_go", "overload_one",
        "overload_four", "hour",
    }  # fmt: skip


def test_the_script_writes_the_committed_traces_byte_for_byte(tmp_path):
    subprocess.run(
        [sys.executable, ROOT / "scripts" / "make_traces.py", tmp_path], check=True, capture_output=True
    )
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {p.name: p.read_bytes() for p in TRACES}


def test_a_trace_is_the_same_after_writing_and_reading():
    for path in TRACES:
        trace = read_trace(path)
        assert trace_from_dict(json.loads(json.dumps(trace_to_dict(trace)))) == trace


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rate": 1}, "unknown key 'rate'; known are name, description, duration_s"),
        ({"device": {"fixed_ms": 30}}, "device: 'row_ms' is missing"),
        ({"device": {"fixed_ms": -1, "row_ms": 1}}, "device: fixed_ms must be 0.01 to 100000, got -1"),
        ({"device": {"fixed_ms": 1, "row_ms": 1, "batch_sizes": [2, 4]}}, "device: batch_sizes must ascend from 1"),
        ({"device": {"fixed_ms": 1, "row_ms": 1, "speed": [[5, 0]]}}, "device: speed must be pairs of"),
        ({"device": {"fixed_ms": 1, "row_ms": 1, "speed": [[5, 1], [3, 1]]}}, "device: speed must be in order"),
        ({"device": {"fixed_ms": 1, "row_ms": 1, "speed": [[5]]}}, "device.speed[0] must have 2 values, got [5]"),
        ({"device": {"fixed_ms": 1, "row_ms": 1, "speed": 2}}, "device.speed must be a list, got 2"),
        ({"device": 3}, "device: expected named values, got int"),
        ({"duration_s": "long"}, "duration_s must be a number, got 'long'"),
        ({"duration_s": True}, "duration_s must be a number, got True"),
        ({"duration_s": float("nan")}, "duration_s must be 0.1 to 86400, got nan"),
        ({"duration_s": 86401}, "duration_s must be 0.1 to 86400, got 86401"),
        ({"seed": 1.5}, "seed must be a whole number, got 1.5"),
        ({"streams": []}, "name and streams must not be empty"),
        ({"streams": {}}, "streams must be a list, got {}"),
        ({"streams": [{"rate_hz": 16}]}, "streams[0]: 'budget_ms' is missing"),
        ({"streams": [{"rate_hz": 16, "budget_ms": 1, "hz": 1}]}, "streams[0]: unknown key 'hz'"),
        ({"streams": [{"rate_hz": 0, "budget_ms": 1}]}, "streams[0]: rate_hz must be 0.1 to 1000, got 0"),
        ({"streams": [{"rate_hz": 1, "budget_ms": 0}]}, "streams[0]: budget_ms must be 1 to 1000000, got 0"),
        (stream(min_steps=3), "streams[0]: min_steps must be 1 to steps=2"),
        (stream(leaves="goes"), "leaves must be one of ('ends', 'closes'), got 'goes'"),
        (stream(timestamps=1), "timestamps must be true or false, got 1"),
        (stream(missing_share=2), "streams[0]: missing_share must be 0 to 1"),
        (stream(start_s=2, end_s=1), "end_s must be behind the last start"),
        (stream(start_s=99), "start_s must be before duration_s=10, got 99"),
        ({"duration_s": 86400, "streams": [{"rate_hz": 1000, "budget_ms": 9}]}, "a trace may have 5000000 frames"),
    ],
)  # fmt: skip
def test_what_a_trace_cannot_be_is_said(change, message):
    good = {**SMALL, "streams": [{"rate_hz": 16, "budget_ms": 500}]}
    trace_from_dict(good)
    with pytest.raises(ConfigError) as e:
        trace_from_dict({**good, **change})
    assert message in str(e.value)
    assert "\n" not in str(e.value)


def test_a_file_that_is_no_trace_is_named(tmp_path):
    cases = {
        "{": "is not JSON (line 1",
        "[]": "expected named values, got list",
        "[" * 100_000: "is nested too deeply",
        "9" * 5000: "too long",
    }
    for text, message in cases.items():
        (tmp_path / "t.json").write_text(text)
        with pytest.raises(ConfigError, match=r"t\.json: ") as e:
            read_trace(tmp_path / "t.json")
        assert message in str(e.value)
    (tmp_path / "t.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"t\.json: is not JSON \(not even text\)"):
        read_trace(tmp_path / "t.json")
    with pytest.raises(ConfigError, match=r"none\.json: cannot be read"):
        read_trace(tmp_path / "none.json")


def test_times_are_whole_nanoseconds():
    assert all(isinstance(a.at_ns, int) and a.at_ns < 10 * SECOND for a in arrivals(one(1, jitter_ms=3), 0))
