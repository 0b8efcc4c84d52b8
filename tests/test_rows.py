"""The record of rows: small truths by hand, and every history against a list of rows and stages that moves."""

import dataclasses
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svd2_jax.rows import InFlight, Rows


def run(rows, *chunks):
    """Runs a tick for each chunk (None: nothing enters); returns the record and what left with each tick."""
    left = []
    for chunk in chunks:
        rows, done = rows.enter(chunk).leave()
        left.append([c.chunk for c in done])
    return rows, left


def places(rows, width):
    """What each row of each stage holds, as a list for each stage."""
    at = [[rows.at(row, stage) for row in range(width)] for stage in range(rows.stages)]
    return [[found and found.chunk for found in of_stage] for of_stage in at]


def test_a_chunk_is_in_one_row_after_another():
    rows, left = run(Rows(steps=3), "a", "b", "c", "d")
    assert left == [[], [], ["a"], ["b"]]
    assert places(rows, 3) == [["d", "c", None]]  # "b" was in the last row and has left
    assert len(rows) == 2


def test_in_every_row_a_chunk_passes_all_stages():
    rows = Rows(steps=2, stages=2)
    seen = []
    for chunk in ("a", "b", "c", "d"):
        rows = rows.enter(chunk)
        seen.append(places(rows, 2))
    assert seen == [
        [["a", None], [None, None]],
        [["b", None], ["a", None]],
        [["c", "a"], ["b", None]],
        [["d", "b"], ["c", "a"]],
    ]
    rows, done = rows.leave()
    assert done == (InFlight("a", steps=2, ticks=4),)


def test_ticks_without_a_chunk_push_on_what_is_in_flight():
    assert run(Rows(steps=3), "a", None, None, None)[1] == [[], [], ["a"], []]


def test_a_first_group_takes_all_its_steps_in_one_tick():
    rows, done = Rows[str](steps=4, stages=3).enter("a", whole=True).leave()
    assert [c.chunk for c in done] == ["a"]
    assert done[0].steps == 4
    assert len(rows) == 0


def test_with_fewer_steps_what_has_taken_as_many_is_finished():
    rows, _ = run(Rows(steps=4), "a", "b", "c")  # in rows 2, 1 and 0
    rows, done = rows.with_steps(2).leave()
    assert [(c.chunk, c.steps) for c in done] == [("a", 3), ("b", 2)]
    assert run(rows, "d", "e")[1] == [["c"], ["d"]]


def test_with_fewer_steps_a_chunk_goes_on_to_the_end_of_its_row():
    rows, _ = run(Rows(steps=4, stages=3), "a", None, None, None)  # in row 1, stage 0
    rows = rows.with_steps(1)
    assert rows.ticks_left == (2,)
    rows, left = run(rows, None, None)
    assert left == [[], ["a"]]


def test_a_finished_chunk_waits_for_an_older_one():
    rows, _ = run(Rows(steps=2, stages=2), "a", "b", None)  # "a" in row 1, stage 0; "b" in row 0, stage 1
    rows = rows.with_steps(1)
    assert [rows.is_finished(c) for c in rows.chunks] == [False, True]
    assert rows.ticks_left == (1, 1)
    assert rows.leave()[1] == ()
    rows = rows.enter("c")
    assert places(rows, 2) == [["c", None], [None, "a"]]  # "b" is in no row any more
    assert [c.chunk for c in rows.leave()[1]] == ["a", "b"]


def test_with_more_steps_only_a_chunk_in_its_last_row_finishes_as_before():
    rows, _ = run(Rows(steps=2, stages=2), "a", "b", None)  # "a" in row 1, stage 0; "b" at the end of row 0
    rows = rows.with_steps(3)
    assert [(c.chunk, c.steps) for c in rows.chunks] == [("a", 2), ("b", 3)]
    assert rows.ticks_left == (1, 4)


def test_steps_that_change_to_and_fro_change_nothing_that_goes_on():
    rows, _ = run(Rows(steps=3), "a", "b")
    assert rows.with_steps(4).with_steps(3) == rows
    finished = rows.with_steps(1)
    assert finished.with_steps(3).leave()[1] == finished.leave()[1]


def test_rows_beyond_the_steps_are_needed_while_chunks_are_in_them():
    rows, _ = run(Rows(steps=3, stages=2), "a", None, None, None, None)  # in row 2, stage 0
    rows = rows.with_steps(1)
    assert rows.width == 3
    rows, left = run(rows, "b")
    assert (left, rows.width) == ([["a"]], 1)
    assert Rows(steps=2).width == 2


@pytest.mark.parametrize(("steps", "stages"), [(0, 1), (1, 0), (-1, 2)])
def test_there_is_at_least_one_step_and_stage(steps, stages):
    with pytest.raises(ValueError, match="at least 1"):
        Rows(steps, stages)


def test_there_is_at_least_one_step_after_a_change():
    with pytest.raises(ValueError, match="at least 1"):
        Rows(2).with_steps(0)


def test_a_chunk_that_takes_all_its_steps_at_once_is_alone():
    with pytest.raises(ValueError, match="1 are in flight"):
        Rows(2).enter("a").enter("b", whole=True)


@dataclasses.dataclass
class ListModel:
    """The stages as lists of rows that are handed round a ring, as a device does it; chunks are numbers.

    Each micro-batch is [steps, row 0, row 1, ...]: the steps were set when it entered the first stage, and only fall.
    """

    steps: int
    stages: int

    def __post_init__(self):
        self.batches = [[self.steps] for _ in range(self.stages)]
        self.finished, self.given, self.taken = {}, 0, 0

    def tick(self, enters):
        back = self.batches.pop()[1:]
        new = [self.taken if enters else None]
        self.taken += enters
        self.batches.insert(0, [self.steps, *new, *back])
        return self.leave()

    def change(self, steps):
        self.steps = steps
        for batch in self.batches:
            batch[0] = min(batch[0], steps)
        self.collect()

    def collect(self):
        steps, *rows = self.batches[-1]
        for row, chunk in enumerate(rows):
            if chunk is not None and row + 1 >= steps:
                self.finished[chunk] = row + 1
                self.batches[-1][row + 1] = None

    def leave(self):
        self.collect()
        done = []
        while self.given in self.finished:
            done.append((self.given, self.finished.pop(self.given)))
            self.given += 1
        return done


@given(
    st.integers(1, 4),
    st.integers(1, 4),
    st.lists(st.tuples(st.sampled_from(["enter", "push"]) | st.integers(1, 4)), max_size=60),
)
def test_the_record_is_what_happens_on_the_stages(steps, stages, history):
    model, rows, entered = ListModel(steps, stages), Rows[int](steps, stages), 0
    for (action,) in history:
        if isinstance(action, int):
            model.change(action)
            rows = rows.with_steps(action)
            continue
        before = rows.ticks_left
        rows = rows.enter(entered if action == "enter" else None)
        entered += action == "enter"
        expected = model.tick(action == "enter")
        here = {place for place in ((r, s) for r in range(8) for s in range(stages)) if rows.at(*place)}
        rows, done = rows.leave()
        assert [(c.chunk, c.steps) for c in done] == expected
        assert len([left for left in before if left <= 1]) == len([c for c in done if c.ticks > 1])
        held = {
            (row, stage): chunk
            for stage, (_, *chunks) in enumerate(model.batches)
            for row, chunk in enumerate(chunks)
            if chunk is not None
        }
        assert {place: rows.at(*place) for place in held} == {
            place: next(c for c in rows.chunks if c.chunk == chunk) for place, chunk in held.items()
        }
        assert set(held) <= here
        highest = max((row + 1 for row, _ in held), default=0)
        assert rows.width == max(rows.steps, highest)


def test_a_lone_row_is_one_of_each_stage():
    draw = random.Random(0)
    seen = set()
    for _ in range(300):
        steps, stages = draw.randint(1, 4), draw.randint(1, 3)
        rows = Rows(steps, stages)
        for chunk in range(20):
            if draw.random() < 0.1:
                rows = rows.with_steps(draw.randint(1, 4))
            rows = rows.enter(chunk if draw.random() < 0.3 else None)
            held = [[row for row in range(4) if rows.at(row, stage)] for stage in range(stages)]
            alone = all(len(some) < 2 for some in held)
            assert rows.lone == (tuple(some[0] if some else 0 for some in held) if alone else None)
            seen.add(alone)
            rows, _ = rows.leave()
    assert seen == {True, False}
