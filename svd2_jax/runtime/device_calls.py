"""What the live loop has called in the threads that wait for the device."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeAlias

import numpy as np

from svd2_jax.api import Chunk, Engine, Session, Ticket, TickInput
from svd2_jax.runtime.mailbox import attempt
from svd2_jax.runtime.types import TickEntry

HandedOver: TypeAlias = tuple[Ticket | None, list[Future[TickInput]]]
"""A tick on its way, None where no stream could take part; and of each stream its input, or why there is none."""


def hand_over(engine: Engine, inputs: Sequence[tuple[Session, TickEntry, list[np.ndarray]]]) -> HandedOver:
    """Hands a tick to the engine. A stream whose input cannot be made is left out."""
    prepared = [attempt(functools.partial(_prepared, *one)) for one in inputs]
    work = [one.result() for one in prepared if one.exception() is None]
    return engine.tick(work) if work else None, prepared


def see_through(handed: Future[HandedOver], free: Callable[[], object]) -> list[Future[Any]]:
    """Waits for a tick, and calls `free` when its stages are through.

    Returns:
      Of each stream the frames of its finished chunks, or why there are none.
    """
    ticket, inputs = handed.result()
    if ticket is None:
        return inputs
    ticket.wait_stages()
    free()
    ticket.wait()
    done = iter(ticket.chunks)
    return [
        attempt(functools.partial(_read, next(done))) if one.exception() is None else one for one in inputs
    ]


def _prepared(session: Session, entry: TickEntry, frames: Sequence[np.ndarray]) -> TickInput:
    """Gives a session its steps, and returns its input; the last frame is repeated to make a whole chunk."""
    if session.steps != entry.steps:
        session.set_steps(entry.steps)
    return TickInput(session, np.stack([*frames, *[frames[-1]] * entry.fill]) if frames else None)


def _read(chunks: Sequence[Chunk]) -> list[list[np.ndarray]]:
    """Returns the frames of finished chunks, each of which can be freed by itself."""
    return [[frame.copy() for frame in chunk.frames()] for chunk in chunks]
