"""Measures what the stages of a running pipeline take, and decides together with other processes when blocks move.

Devices are timed from outside, without making them wait: a thread for each device waits for the results in
which a measured tick is known to be done there. In a measured tick the hand-over to the next stage is a program
of its own, because behind it all stages are equally late.

Every process has to take the same decision before the same tick. So what was measured goes over the mesh with a
small collective, whose result is read one measurement later, and all decide by the same numbers. A process that is
more than a few ticks ahead of its devices waits for them then.
"""

from __future__ import annotations

import atexit
import logging
import queue
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import jax
import numpy as np

from svd2_jax.engine import balance
from svd2_jax.engine.balance import BalancePolicy, Balancer, StageTimes
from svd2_jax.engine.mesh import StageMesh

INTERVAL = 8  # ticks from one measured tick to the next
NUMBERS = 3
"""What a stage tells the others: seconds of its blocks, seconds of the rest, and whether the coming split is ready:
1 yes, 0 not yet, -1 it cannot be had."""

Split = tuple[int, ...]

_log = logging.getLogger(__name__)


class Stopwatch:
    """Times what devices work on, in the order in which it was given to them.

    A lap begins when the device is through with what it had before, or when the work was handed over if it had
    nothing left to do, and ends when its result is there.
    """

    def __init__(self):
        self._queues: dict[Any, queue.SimpleQueue] = {}
        weakref.finalize(self, _end_watching, self._queues)  # where nobody calls `close`

    def lap(self, device: Any, result: Any, given_ns: int, note: Callable[[float], None] | None) -> None:
        """Calls `note` with the seconds of a lap when it is over; without one the lap only marks a start.

        Args:
          device: where the result comes from; laps of one device are in order.
          result: array or arrays on this device alone.
          given_ns: `time.monotonic_ns` when the work was handed over.
          note: called in another thread.
        """
        if device not in self._queues:
            self._queues[device] = queue.SimpleQueue()
            name = f"stopwatch of {device}"
            threading.Thread(target=_watch, args=(self._queues[device],), name=name, daemon=True).start()
        self._queues[device].put((result, given_ns, note))

    def wait(self) -> None:
        """Returns when all laps so far are over."""
        for waiting in self._queues.values():
            over = threading.Event()
            waiting.put(over)
            over.wait()

    def close(self) -> None:
        """Ends the threads."""
        _end_watching(self._queues)


def _end_watching(queues: dict[Any, queue.SimpleQueue]) -> None:
    for waiting in queues.values():
        waiting.put(None)
    queues.clear()


def _watch(waiting: queue.SimpleQueue) -> None:
    ready_ns = 0
    while (lap := waiting.get()) is not None:
        if isinstance(lap, threading.Event):
            lap.set()
            continue
        result, given_ns, note = lap
        try:
            jax.block_until_ready(result)
        except Exception:  # the stream itself meets the same failure, and says so
            del lap, result
            continue
        start_ns, ready_ns = max(ready_ns, given_ns), time.monotonic_ns()
        if note is not None:
            note((ready_ns - start_ns) / 1e9)
        del lap, result


_preparing: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


@atexit.register
def _wait_for_compilers() -> None:
    """A compiler that is interrupted by the end of Python aborts the process.

    Not left to an executor, for which Python waits first of all: a process that ends because a peer was lost
    (`engine.cluster`) does not wait.
    """
    for thread in list(_preparing):
        thread.join()


def _fulfil(future: Future, function: Callable[[Split], Any], split: Split) -> None:
    try:
        future.set_result(function(split))
    except BaseException as e:  # told to whoever asks for the result
        future.set_exception(e)


class Rebalancer:
    """Watches one pipeline and says when it should take another split, and which.

    Of every `interval` ticks one is measured, and in another the stages tell each other what it took.
    """

    def __init__(
        self,
        mesh: StageMesh,
        split: Split,
        share: Callable[[jax.Array], jax.Array],
        prepare: Callable[[Split], Any],
        policy: BalancePolicy | None = None,
        interval: int = INTERVAL,
        stopwatch: Stopwatch | None = None,
    ):
        """Starts watching.

        Args:
          mesh: the pipeline's devices.
          split: blocks per stage now.
          share: a program that gives every stage the numbers of all, float32 [W * NUMBERS] over the stages.
          prepare: gets ready for a split, in another thread: compiles what is not compiled yet.
          policy: when blocks move.
          interval: ticks from one measured tick to the next, at least 3.
          stopwatch: what measures; None is a new one.
        """
        self._mesh, self._share, self._prepare, self._interval = mesh, share, prepare, interval
        self._balancer: Balancer = balance.init_balancer(split, policy)
        self._stopwatch = stopwatch or Stopwatch()
        self._coming: tuple[Split, Future] | None = None
        self._target = split
        self._laps: dict[tuple[int, str], float] | None = None  # of the last measured tick
        self._shared: jax.Array | None = None
        self._ticks = 0
        self.measuring = self._is_mark = self._is_off = False

    def before_tick(self) -> tuple[Split, Any] | None:
        """Returns the split to take before the coming tick, with what `prepare` returned for it, or None.

        The pipeline answers with `moved`. Sets `measuring`: whether the coming tick is one to be measured.
        """
        at, self._ticks = self._ticks % self._interval, self._ticks + 1
        self.measuring, self._is_mark = at == 0, at == self._interval - 1
        if at == self._interval // 2:
            # Half-way, because it makes all stages wait for each other, which would be measured as their own time.
            self._tell()
        if not self.measuring:
            return None
        self._laps = {}
        return self._decide()

    def moved(self, split: Split) -> None:
        """Tells that the pipeline takes another split with the coming tick, which is not like others to measure."""
        if self._coming is None or split != self._coming[0]:
            self._target = split  # somebody else wants it so
        self._balancer = balance.moved(self._balancer, split)
        self._shared = self._laps = self._coming = None
        self.measuring = False
        if split != self._target:
            self._approach()

    def lap(self, stage: int, what: str, result: Any, given_ns: int) -> None:
        """Tells what a local stage was given to do, in order: "blocks", "encode" or "decode", and its result."""
        if self.measuring and self._laps is not None:
            laps = self._laps
            self._stopwatch.lap(
                self._mesh.devices[stage],
                result,
                given_ns,
                lambda seconds: laps.update({(stage, what): seconds}),
            )
        elif self._is_mark:
            self._stopwatch.lap(self._mesh.devices[stage], result, given_ns, None)

    @property
    def measured(self) -> tuple[StageTimes, ...]:
        """What was measured under the present split, oldest first; the same in every process."""
        return self._balancer.history

    def close(self) -> None:
        """Stops watching."""
        self._stopwatch.close()
        self._shared = self._laps = self._coming = None

    def _decide(self) -> tuple[Split, Any] | None:
        """Takes in what the stages told each other; returns the move that all are ready for."""
        if self._shared is None:
            return None
        numbers = np.asarray(self._mesh.part(self._shared, self._mesh.local_stages[0]))
        blocks, rest, ready = numbers.reshape(self._mesh.stages, NUMBERS).T.tolist()
        self._shared = None
        if self._coming is not None:
            split, future = self._coming
            if min(ready) < 0:
                # The stream goes on as it is. Asking again would fail again.
                reason = future.exception() if future.done() else "another process failed"
                _log.warning(
                    "cannot get ready for the split %s (%s); blocks stay where they are", split, reason
                )
                self._coming, self._is_off = None, True
            return (split, future.result()) if min(ready) > 0 else None
        if self._is_off:
            return None
        self._balancer, wanted = balance.observe(self._balancer, StageTimes(tuple(blocks), tuple(rest)))
        if wanted is not None:
            self._target = wanted
            self._approach()
        return None

    def _approach(self) -> None:
        """Gets ready for the next split on the way to the target."""
        split = balance.towards(self._balancer.counts, self._target)
        future: Future = Future()
        self._coming = split, future
        thread = threading.Thread(target=_fulfil, args=(future, self._prepare, split), daemon=True)
        _preparing.add(thread)
        thread.start()

    def _tell(self) -> None:
        """Sends what the last measured tick took, and whether the coming split is ready, to all stages."""
        if self._laps is None and self._coming is None:
            return
        self._stopwatch.wait()  # long over, unless this process is far ahead of its devices
        ready = 0
        if self._coming is not None and self._coming[1].done():
            ready = -1 if self._coming[1].exception() else 1
        laps, parts = self._laps or {}, []
        for stage in self._mesh.local_stages:
            rest = sum(s for (at, what), s in laps.items() if at == stage and what != "blocks")
            numbers = np.array([laps.get((stage, "blocks"), 0.0), rest, ready], np.float32)
            parts.append(jax.device_put(numbers, self._mesh.devices[stage]))
        self._shared = self._share(self._mesh.join(parts))
