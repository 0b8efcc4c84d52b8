"""A live stream as its user holds it, where its frames go, and where they come from."""

from __future__ import annotations

import dataclasses
import functools
import numbers
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from enum import Enum, auto
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import numpy as np

from svd2_jax.api import Session, SessionSpec
from svd2_jax.config import StreamConfig, check_seconds, check_whole, is_number
from svd2_jax.errors import ConfigError, SessionError
from svd2_jax.runtime.types import FrameRecord, StreamId, StreamSettings

if TYPE_CHECKING:
    from svd2_jax.runtime.loop import LiveLoop

T = TypeVar("T")

WAITING_OFFERS = 256  # messages that may wait when a frame is offered; the loop takes microseconds for each

Sink: TypeAlias = Callable[[np.ndarray, FrameRecord], object]
"""Takes a frame, uint8 [H, W, 3], when it is due, and its record. Called in a thread of the stream's own.

A sink may have an attribute `when_slow`, see `WhenSlow`; a function without it ends its stream.
"""

Source: TypeAlias = Iterable[tuple[int | None, np.ndarray]]
"""Gives (timestamp in ns, frame uint8 [H, W, 3]) when there is one: whoever iterates waits for the camera."""


class WhenSlow(Enum):
    """What happens when more frames wait for a sink than the loop keeps."""

    END = "end"  # a file: every frame matters, so its stream ends with the reason
    DROP_OLDEST = "drop-oldest"  # a viewer: only what is newest matters


class Life(Enum):
    """Where a stream is."""

    OPENING = auto()  # its programs are compiled
    LIVE = auto()  # takes frames
    DRAINING = auto()  # takes no more frames; those that are there are finished and shown
    CLOSED = auto()  # the scheduler is through with it


class Stream:
    """A live stream: what `LiveLoop.open` gives. Every method may be called from any thread."""

    def __init__(
        self, loop: LiveLoop, id: StreamId, spec: SessionSpec, settings: StreamSettings, prepared: set[int]
    ):
        """Is called by the loop. `prepared` are the numbers of steps that programs are there for."""
        self.id = id
        self.spec, self.settings = spec, settings
        """What it computes, and what it asks for; `update` changes them."""
        self.ended: Future[None] = started_future()
        """Is done when nothing is left of the stream; has the error that ended it before its time."""
        self.life = Life.OPENING
        self.error: BaseException | None = None
        """Why it ended, or is ending, before its time."""
        self._loop, self._prepared = loop, prepared
        self._takes_frames = True

    def __repr__(self) -> str:
        return f"<Stream {self.id}, {self.life.name.lower()}>"

    def offer(self, frame: np.ndarray, timestamp_ns: int | None = None) -> None:
        """Hands in a frame that is there now. It is copied; does not wait.

        Args:
          frame: uint8 [H, W, 3] of the spec's size.
          timestamp_ns: when it was taken, by the source's own clock.

        Raises:
          SessionError: the stream takes no more frames; this is not such a frame or timestamp, and the stream ends with
            this error; or so many frames wait for the loop's thread that this one is not taken.
        """
        self._check_open()
        try:
            pixels = _checked_frame(frame, self.spec.config)
            if timestamp_ns is not None and not is_number(timestamp_ns, numbers.Integral):
                raise SessionError(f"a timestamp must be a whole number of ns, or None; got {timestamp_ns!r}")
        except SessionError as e:
            self.close(e)
            raise
        arrive = functools.partial(self._loop.take_frame, self, pixels, timestamp_ns)
        if not self._loop.inbox.put(arrive, WAITING_OFFERS) and not self._loop.inbox.is_closed:
            raise SessionError(
                f"{WAITING_OFFERS} messages wait for the loop already; offer frames as they are taken, "
                f"{self.settings.rate_hz:g} a second"
            )

    def update(
        self,
        prompt: str | None = None,
        blend_chunks: int = 0,
        noise_scale: float | None = None,
        steps: int | None = None,
        min_steps: int | None = None,
    ) -> Future[None]:
        """Changes what is not None, from the next chunk on; the stream goes on meanwhile. Does not wait.

        Args:
          prompt: what to re-draw to.
          blend_chunks: chunks over which a new prompt comes in.
          noise_scale: share of noise in (0, 1].
          steps: denoising steps when there is time enough. The stream must have been opened for them.
          min_steps: steps that overload may bring it down to.

        Returns:
          Is done when the change is in place. Where it raises, the stream has ended with that error.

        Raises:
          ConfigError: a value that cannot be; nothing was changed.
          SessionError: the stream takes nothing more.
        """
        check_whole("blend_chunks", blend_chunks, 0)
        spec = _changed(self.spec, prompt=prompt, noise_scale=noise_scale)
        settings = _changed(self.settings, steps=steps, min_steps=min_steps)
        if not set(range(settings.min_steps, settings.steps + 1)) <= self._prepared:
            there = ", ".join(map(str, sorted(self._prepared)))
            raise ConfigError(
                f"stream {self.id} was opened for {there} denoising steps, and {settings.min_steps} to "
                f"{settings.steps} are asked for: name them when you open it, as in open(..., steps=(1, 2, 4))"
            )
        self._check_open()

        def change(session: Session) -> None:
            if prompt is not None:
                session.set_prompt(prompt, blend_chunks)
            if noise_scale is not None:
                session.set_noise_scale(noise_scale)

        done = started_future()
        new_settings = settings if settings != self.settings else None
        self.spec, self.settings = spec, settings
        take = functools.partial(self._loop.take_change, self, new_settings, prompt, change, done)
        if not self._loop.inbox.put(take):
            raise self._loop.not_running()
        return done

    def end(self) -> None:
        """Says that no more frames come; those that are there are still finished and shown."""
        self._takes_frames = False
        self._loop.inbox.put(functools.partial(self._loop.take_end, self))

    def close(self, error: BaseException | None = None) -> None:
        """Ends the stream at once: frames that are not due yet are dropped. `error` says why, if that is one."""
        if self.is_open and error is not None:
            self.error = error
        self._takes_frames = False
        self._loop.inbox.put(functools.partial(self._loop.take_close, self, error))

    def result(self, timeout_s: float | None = None) -> None:
        """Waits until nothing is left of the stream.

        Raises:
          BaseException: what ended it before its time.
          TimeoutError: it is not over yet.
          ConfigError: the time is no number.
        """
        check_seconds("timeout_s", timeout_s)
        self.ended.result(timeout_s)

    @property
    def is_open(self) -> bool:
        """Whether it takes frames and changes."""
        return self._takes_frames and self.life is not Life.CLOSED

    def _check_open(self) -> None:
        if not self.is_open:
            why = f"it ended with: {self.error}" if self.error is not None else "it is over"
            raise SessionError(f"stream {self.id} takes nothing more: {why}")


def feed(stream: Stream, source: Source) -> None:
    """Offers a source's frames until it ends, and then ends the stream. Waits as long as the source does.

    A source that raises closes the stream with its error. Returns early when the stream takes no more frames.
    """
    frames = None
    try:
        frames = iter(source)
        for given in frames:
            if not stream.is_open:
                break
            if not isinstance(given, Sequence) or len(given) != 2:
                raise SessionError(
                    f"a source gives pairs (timestamp in ns or None, frame), got {type(given).__name__}; "
                    "as in ((None, frame) for frame in frames)"
                )
            timestamp_ns, frame = given
            stream.offer(frame, timestamp_ns)
        stream.end()
    except Exception as e:
        if stream.is_open:  # else it was ended by somebody else: no reason to fail
            stream.close(e)
    finally:
        if (close := getattr(frames, "close", None)) is not None:
            close()


def started_future() -> Future[None]:
    """Returns a future that cannot be cancelled, so that ending it always works."""
    future: Future[None] = Future()
    future.set_running_or_notify_cancel()
    return future


def _changed(value: T, **changes: object) -> T:
    """Returns a dataclass with the changes that are not None; it checks them."""
    return dataclasses.replace(value, **{name: new for name, new in changes.items() if new is not None})  # pyright: ignore


def _checked_frame(frame: np.ndarray, cfg: StreamConfig) -> np.ndarray:
    """Returns a copy of a frame; raises SessionError if it is not one of this stream's."""
    expected = (cfg.height, cfg.width, 3)
    if not isinstance(frame, np.ndarray):
        raise SessionError(f"a frame must be a numpy array {expected}, got {type(frame).__name__}")
    if frame.shape != expected or frame.dtype != np.uint8:
        raise SessionError(f"a frame must be uint8 {expected}, got {frame.dtype} {frame.shape}")
    return np.array(frame, order="C")
