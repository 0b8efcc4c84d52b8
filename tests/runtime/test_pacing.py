"""Finished frames are shown at the source's rhythm, in order, and in time if they were done in time."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from svd2_jax.runtime.pacing import Playout, chunk_finished, show_time
from svd2_jax.runtime.types import MS, SECOND

INTERVAL = 50 * MS
BUDGET = 700 * MS
GUARD = 2 * MS


def play(chunks: list[tuple[int, list[int]]], nominal_ms: int = 400) -> list[int]:
    """When frames are shown, in ms: chunks are (done ms, media times in ms), and frames come at their media times."""
    playout, shown = Playout(0), []
    for done, medias in chunks:
        playout = chunk_finished(playout, nominal_ms * MS, medias[0] * MS, done * MS, BUDGET)
        for media in medias:
            deadline = media * MS + BUDGET
            playout, due = show_time(playout, media * MS, done * MS, deadline, INTERVAL, GUARD)
            shown.append(round(due / MS))
    return shown


def test_chunks_become_an_even_flow():
    chunks = [(300 + 200 * i, [200 * i, 200 * i + 50, 200 * i + 100, 200 * i + 150]) for i in range(5)]
    assert play(chunks) == [400 + 50 * i for i in range(20)]


def test_a_late_chunk_moves_those_behind_it_but_not_in_a_burst():
    shown = play([(300, [0, 50, 100, 150]), (690, [200, 250, 300, 350]), (700, [400, 450, 500, 550])])
    assert shown[4:8] == [690, 740, 790, 840]
    assert shown[8:] == [890, 940, 990, 1040]  # 490 behind, as the second chunk


def test_the_delay_shrinks_by_a_twentieth_of_the_time_when_chunks_need_less():
    """The slow chunk is one of the two that do not count from the 16th on."""
    playout = chunk_finished(Playout(0, last_ns=0), 400 * MS, 0, 600 * MS, BUDGET)
    assert playout.delay_ns == 600 * MS
    delays = []
    for i in range(1, 50):
        at = 600 * MS + i * 200 * MS
        playout = chunk_finished(playout, 400 * MS, at - 300 * MS, at, BUDGET)
        delays.append(playout.delay_ns // MS)
    assert delays[:14] == [600] * 14
    assert delays[14:34] == [600 - 10 * i for i in range(1, 21)]
    assert set(delays[34:]) == {400}


def test_the_first_group_is_no_measure_for_the_chunks_behind_it():
    playout = chunk_finished(Playout(0), 400 * MS, 0, 600 * MS, BUDGET)
    playout, due = show_time(playout, 0, 600 * MS, BUDGET, INTERVAL, GUARD)
    assert due == 600 * MS
    playout = chunk_finished(playout, 400 * MS, 500 * MS, 1000 * MS, BUDGET)
    assert playout.delay_ns == 580 * MS  # and not 600


def test_one_slow_tick_delays_two_chunks_and_not_those_behind_them():
    playout = Playout(0, last_ns=0)
    for i in range(60):
        needed = {40: 560, 41: 450}.get(i, 400) * MS
        playout = chunk_finished(playout, 350 * MS, i * 200 * MS, i * 200 * MS + needed, BUDGET)
        assert playout.delay_ns == 400 * MS
    for i in range(60, 63):  # a third one is no accident
        playout = chunk_finished(playout, 350 * MS, i * 200 * MS, i * 200 * MS + 500 * MS, BUDGET)
    assert playout.delay_ns == 500 * MS


def test_the_nominal_delay_is_taken_at_once_when_it_grows():
    playout = chunk_finished(Playout(100 * MS), 400 * MS, 0, 50 * MS, BUDGET)
    assert playout.delay_ns == 400 * MS


def test_frames_of_a_burst_keep_half_an_interval():
    """Four frames of one moment would otherwise be shown together."""
    assert play([(300, [0, 0, 0, 0])]) == [400, 425, 450, 475]


def test_no_frame_waits_past_its_deadline_for_the_rhythm():
    assert play([(690, [0, 0, 0, 0])]) == [690, 698, 698, 698]


def test_what_is_done_too_late_is_shown_at_once():
    assert play([(900, [0, 50, 250, 300])]) == [900, 900, 948, 998]


@st.composite
def flows(draw):
    at, flow, done = 0, [], 0
    for _ in range(draw(st.integers(1, 20))):
        medias = []
        for _ in range(draw(st.integers(1, 4))):
            at += draw(st.integers(0, 300))
            medias.append(at)
        done = max(done, at) + draw(st.integers(1, 900))
        flow.append((done, medias))
    return flow, draw(st.integers(0, 900))


@given(flows())
def test_frames_are_shown_in_order_and_in_time_if_done_in_time(case):
    flow, nominal = case
    shown = play(flow, nominal)
    assert all(a <= b for a, b in itertools.pairwise(shown))
    due = iter(shown)
    for done, medias in flow:
        for media in medias:
            at = next(due)
            assert at >= done
            assert at <= max(media + BUDGET // MS - GUARD // MS, done)


def test_a_delay_is_never_longer_than_the_budget():
    playout = chunk_finished(Playout(0), 2 * SECOND, 0, 3 * SECOND, BUDGET)
    assert playout.delay_ns == BUDGET
