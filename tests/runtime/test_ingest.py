"""Frames are taken or refused by their timestamps, and get a media time that is never behind their arrival."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svd2_jax.runtime.ingest import SourceClock, take
from svd2_jax.runtime.types import MS, SECOND, Reason

INTERVAL = 50 * MS
BUDGET = 400 * MS


def taken(frames: list[tuple[int, int | None]]) -> list[int | Reason]:
    """Media times in ms, or reasons, of frames given as (arrival ms, timestamp ms)."""
    clock, outcome = SourceClock(INTERVAL), []
    for arrival, stamp in frames:
        stamp_ns = None if stamp is None else stamp * MS
        clock, media = take(clock, arrival * MS, stamp_ns, INTERVAL, BUDGET)
        outcome.append(media if isinstance(media, Reason) else round(media / MS))
    return outcome


def test_media_time_is_the_timestamp_in_our_clock():
    """The second frame was quickest, so from then on its distance counts."""
    assert taken([(1000, 0), (1040, 50), (1100, 100), (1190, 150)]) == [1000, 1040, 1090, 1140]


def test_repeated_timestamps_are_duplicates():
    assert taken([(0, 0), (50, 50), (60, 50), (70, 0)]) == [0, 50, Reason.DUPLICATE, Reason.DUPLICATE]


def test_older_timestamps_are_out_of_order():
    assert taken([(0, 0), (100, 100), (110, 50), (150, 150)]) == [0, 100, Reason.DISORDER, 150]


def test_frames_that_come_too_long_behind_their_timestamps_are_stale():
    assert taken([(0, 0), (440, 50), (510, 100), (550, 150)]) == [0, 51, Reason.STALE, 151]


def test_the_first_frame_is_never_stale():
    assert taken([(10_000, 0)]) == [10_000]


def test_a_clock_that_was_set_back_is_followed_after_a_second():
    outcome = taken([(0, 100_000), *((50 + 50 * i, 50 * i) for i in range(30))])
    assert outcome[1:21] == [Reason.DISORDER] * 20
    assert outcome[21:] == [50 + 50 * i for i in range(20, 30)]


def test_a_network_that_stays_slower_is_followed_after_a_second():
    outcome = taken([(0, 0), *((2000 + 50 * i, 50 + 50 * i) for i in range(30))])
    assert outcome[1:21] == [Reason.STALE] * 20
    assert outcome[21:] == [2000 + 50 * i for i in range(20, 30)]


def test_a_clock_that_drifts_is_followed():
    """A clock 500 ppm slow seems to fall behind by 300 ms in 10 minutes."""
    clock, media = SourceClock(INTERVAL), 0
    for i in range(12_000):
        arrival = i * INTERVAL
        clock, media = take(clock, arrival, round(arrival * 0.9995), INTERVAL, BUDGET)
        assert isinstance(media, int)
        assert 0 <= arrival - media < 1 * MS


def test_without_timestamps_arrivals_are_smoothed_to_the_rate():
    outcome = taken([(0, None), (50, None), (116, None), (150, None), (200, None)])
    assert outcome == [0, 50, 101, 150, 200]


def test_without_timestamps_a_pause_is_a_pause():
    assert taken([(0, None), (1000, None), (1050, None)]) == [0, 1000, 1050]


@given(
    st.lists(
        st.tuples(st.integers(0, 300), st.one_of(st.none(), st.integers(-100, 2000))), min_size=1, max_size=60
    )
)
def test_media_times_rise_and_are_never_behind_arrivals(frames):
    clock, arrival, last = SourceClock(INTERVAL), 0, None
    for gap, stamp in frames:
        arrival += gap * MS
        clock, media = take(clock, arrival, None if stamp is None else stamp * MS, INTERVAL, BUDGET)
        if isinstance(media, Reason):
            assert last is not None, "the first frame was refused"
            continue
        assert media <= arrival
        assert stamp is None or arrival - media <= BUDGET
        assert len(clock.timestamps) <= 32
        assert clock.gap_ns >= 0
        last = media


@pytest.mark.parametrize("stamped", [True, False])
def test_the_mean_gap_is_that_of_the_source(stamped):
    clock = SourceClock(INTERVAL)
    for i in range(200):
        at = i * 80 * MS
        clock, _ = take(clock, at + 5 * SECOND, at if stamped else None, INTERVAL, BUDGET)
    assert clock.gap_ns == pytest.approx(80 * MS, rel=0.1)
