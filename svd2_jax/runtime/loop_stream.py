"""What the live loop's thread keeps of a stream."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from svd2_jax.api import Session
from svd2_jax.runtime.mailbox import Worker
from svd2_jax.runtime.stream import Sink, Stream
from svd2_jax.runtime.types import FrameRecord


@dataclass(eq=False)
class LoopStream:
    """What the loop's thread keeps of a stream.

    Attributes:
      stream: its handle.
      sink: takes its frames.
      sinker: the thread that calls it.
      session: its device side; None until it is open, and again once its closing began.
      closing: the call that closes its session.
      pixels: of frames that have not entered a tick, and of finished ones that are not due, by number.
      flight: numbers of the frames of each chunk on the device, oldest first.
      due: frames to pass on, oldest first, each with its pixels.
      changes: updates that are not in place yet.
      arrived: frames offered so far.
      next_frame: number of the first frame that the next chunk can begin with.
    """

    stream: Stream
    sink: Sink
    sinker: Worker
    session: Session | None = None
    closing: Future[None] | None = None
    pixels: dict[int, np.ndarray] = field(default_factory=dict)
    flight: deque[tuple[int, ...]] = field(default_factory=deque)
    due: deque[tuple[np.ndarray, FrameRecord]] = field(default_factory=deque)
    changes: set[Future[None]] = field(default_factory=set)
    arrived: int = 0
    next_frame: int = 0
