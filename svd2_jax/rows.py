"""Which chunk of a stream is in which row and stage: one record for everybody who has to know.

A chunk takes its denoising steps one after another, each in a row of the stream batch, and in every row it passes all
stages of the pipeline, one a tick. So a chunk that has taken part in n ticks is, with W stages, in row (n - 1) // W and
stage (n - 1) % W, and is finished by the (steps * W)-th tick. A tick moves on all chunks in flight, and one new chunk
enters with it, or none:

    rows = Rows(steps=2, stages=2)
    rows = rows.enter("a")              # a tick: "a" is in row 0, stage 0
    rows = rows.enter()                 # "a" is in row 0, stage 1
    rows = rows.enter("b").enter()      # "b" follows, and "a" is through its second step
    rows, finished = rows.leave()       # finished[0].chunk == "a"

A chunk is whatever tells the user of the record what it is: a number, the numbers of its frames, an object.

Steps may change between two ticks (`with_steps`). A chunk can only finish at the end of a row, when it has come back
from the last stage:

- Fewer steps: chunks that have taken as many are finished, at the end of the row that they are in.
- More steps: chunks in what was their last row finish with it. All others take the new number.

Chunks leave in the order in which they entered, so one that is finished may wait for an older one.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Generic, TypeVar

Chunk = TypeVar("Chunk")


@dataclass(frozen=True)
class InFlight(Generic[Chunk]):
    """A chunk in flight.

    Attributes:
      chunk: what the user of the record knows it by.
      steps: denoising steps that it takes, unless they are changed.
      ticks: of its stream, since it entered; the tick with which it entered counts.
    """

    chunk: Chunk
    steps: int
    ticks: int


@dataclass(frozen=True)
class Rows(Generic[Chunk]):
    """The chunks of one stream that are in flight; every method returns a new record.

    Attributes:
      steps: denoising steps of the chunks that enter from now on.
      stages: of the pipeline.
      chunks: in flight, the oldest first.

    Raises:
      ValueError: fewer than one step or stage.
    """

    steps: int
    stages: int = 1
    chunks: tuple[InFlight[Chunk], ...] = ()

    def __post_init__(self):
        if self.steps < 1 or self.stages < 1:
            raise ValueError(f"steps and stages must be at least 1, got {self.steps} and {self.stages}")

    def __len__(self) -> int:
        """Returns the number of chunks in flight."""
        return len(self.chunks)

    def enter(self, chunk: Chunk | None = None, whole: bool = False) -> Rows[Chunk]:
        """Returns the record in the next tick: all chunks move on, and a new one enters unless it is None.

        Args:
          chunk: what enters.
          whole: whether it takes all its steps in this tick, as a first group does, and every chunk in sequential mode.

        Raises:
          ValueError: `whole` while other chunks are in flight.
        """
        if whole and self.chunks:
            raise ValueError(f"a chunk takes all its steps in one tick alone; {len(self)} are in flight")
        chunks = tuple([dataclasses.replace(c, ticks=c.ticks + 1) for c in self.chunks])
        if chunk is not None:
            chunks += (InFlight(chunk, self.steps, self.steps * self.stages if whole else 1),)
        return dataclasses.replace(self, chunks=chunks)

    def leave(self) -> tuple[Rows[Chunk], tuple[InFlight[Chunk], ...]]:
        """Returns the record without the chunks that are finished and have no unfinished one before them, and these.

        Their `steps` are those that they took.
        """
        done = tuple(itertools.takewhile(self.is_finished, self.chunks))
        return dataclasses.replace(self, chunks=self.chunks[len(done) :]), done

    def with_steps(self, steps: int) -> Rows[Chunk]:
        """Returns the record after a change of the steps between two ticks.

        Raises:
          ValueError: fewer than one step.
        """

        def changed(c: InFlight[Chunk]) -> InFlight[Chunk]:
            begun = -(-c.ticks // self.stages)  # steps
            return c if begun >= c.steps else dataclasses.replace(c, steps=max(begun, steps))

        return Rows(steps, self.stages, tuple([changed(c) for c in self.chunks]))

    def at(self, row: int, stage: int) -> InFlight[Chunk] | None:
        """Returns the chunk that a row of a stage worked on in the last tick; None if it held none."""
        ticks = row * self.stages + stage + 1
        # No two have taken part in equally many ticks.
        return next((c for c in self.chunks if c.ticks == ticks and ticks <= c.steps * self.stages), None)

    @property
    def lone(self) -> tuple[int, ...] | None:
        """The row of each stage that worked on a chunk in the last tick, 0 where none did; None if any had several."""
        rows = [0] * self.stages
        held: set[int] = set()
        for chunk in self.chunks:
            if chunk.ticks > chunk.steps * self.stages:  # it waits for an older one
                continue
            row, stage = divmod(chunk.ticks - 1, self.stages)
            if stage in held:
                return None
            held.add(stage)
            rows[stage] = row
        return tuple(rows)

    def is_finished(self, chunk: InFlight[Chunk]) -> bool:
        """Returns whether a chunk is through its steps."""
        return chunk.ticks >= chunk.steps * self.stages

    @property
    def width(self) -> int:
        """Rows that are needed: one for each of the steps, and more while chunks are in later ones."""
        return max(
            [self.steps, *(-(-c.ticks // self.stages) for c in self.chunks if not self.is_finished(c))]
        )

    @property
    def ticks_left(self) -> tuple[int, ...]:
        """Ticks after which each chunk can leave, the oldest first; 0: with the next `leave`."""
        own = (max(0, c.steps * self.stages - c.ticks) for c in self.chunks)
        return tuple(itertools.accumulate(own, max))
