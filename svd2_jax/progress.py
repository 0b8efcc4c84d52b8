"""What the program is busy with while somebody waits: compiling, reading weights, measuring.

Whoever does such work wraps it in `working`. It is logged ("svd2_jax.progress", INFO), and `shown` tells it to a
person: one line that is kept up to date on a terminal, a line every few seconds elsewhere.
"""

from __future__ import annotations

import functools
import itertools
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

QUIET_S = 2.5  # longest time without a line where the output is no terminal
WORTH_A_LINE_S = 1.0  # what is over sooner gets no line of its own

_log = logging.getLogger(__name__)
_numbers = itertools.count()


@contextmanager
def working(what: str) -> Iterator[None]:
    """Tells that the block works on something, such as "compiling tick"; in any thread."""
    number, started = next(_numbers), time.monotonic()
    _log.info("%s", what, extra={"work": number})
    took = "failed"
    try:
        yield
        took = f"{time.monotonic() - started:.1f} s"
    finally:
        _log.info("%s: %s", what, took, extra={"work": number, "ended": True})


@contextmanager
def shown(
    title: str,
    say: Callable[[str], None] | None = None,
    stream: TextIO | None = None,
    quiet_s: float = QUIET_S,
) -> Iterator[None]:
    """Tells a person what `working` blocks of all threads are at, while this block runs.

    Args:
      title: what all of it is for, such as "getting ready".
      say: takes a line, of what took long, and where the stream is no terminal also of what is not over yet; None
        prints it on standard error.
      stream: terminal whose last line is kept up to date; None: standard error.
      quiet_s: longest time without a line where the stream is no terminal.
    """
    terminal = stream or sys.stderr
    follower = _Follower(title, say or functools.partial(print, file=sys.stderr, flush=True))
    before = _log.level, _log.propagate
    _log.addHandler(follower)
    _log.setLevel(logging.INFO)
    _log.propagate = False  # told once
    try:
        with _live_line(follower.line, terminal) if terminal.isatty() else _spoken(follower, quiet_s):
            yield
    finally:
        _log.removeHandler(follower)
        _log.setLevel(before[0])
        _log.propagate = before[1]


class _Follower(logging.Handler):
    """Follows the records of `working`."""

    def __init__(self, title: str, say: Callable[[str], None]):
        super().__init__()
        self._title, self._say = title, say
        self._now: dict[int, tuple[str, float]] = {}  # what, since when
        self._started = self._said = time.monotonic()

    def emit(self, record: logging.LogRecord) -> None:
        """Takes a record; logging calls it from one thread at a time."""
        number, now = getattr(record, "work", None), time.monotonic()
        if number is None:
            return
        if not getattr(record, "ended", False):
            self._now[number] = record.getMessage(), now
        elif (work := self._now.pop(number, None)) and now - work[1] >= WORTH_A_LINE_S:
            self.tell(f"{work[0]}: {now - work[1]:.1f} s")

    def line(self) -> str:
        """Returns what is not over yet, and for how long all of it has gone on."""
        whats = dict.fromkeys(what for what, _ in list(self._now.values()))
        return f"{self._title}, {time.monotonic() - self._started:.0f} s: {', '.join(whats) or 'starting'}"

    def tell(self, text: str) -> None:
        """Says a line."""
        self._said = time.monotonic()
        self._say(f"  {text}")

    def tell_after(self, quiet_s: float) -> None:
        """Says what is not over yet where nothing was said for so many seconds."""
        if time.monotonic() - self._said >= quiet_s:
            self.tell(self.line())


@contextmanager
def _live_line(line: Callable[[], str], terminal: TextIO) -> Iterator[None]:
    """Keeps a line at the end of a terminal; what is printed meanwhile comes above it."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    def now() -> Text:
        return Text(line(), style="dim", no_wrap=True, overflow="ellipsis")

    # What goes to a file must not come out on the terminal instead.
    console, into_it = Console(file=terminal), sys.stdout.isatty()
    with Live(console=console, get_renderable=now, transient=True, redirect_stdout=into_it):
        yield


@contextmanager
def _spoken(follower: _Follower, quiet_s: float) -> Iterator[None]:
    """Has the follower say what it knows every few seconds."""
    over = threading.Event()

    def speak() -> None:
        while not over.wait(quiet_s / 10):
            follower.tell_after(quiet_s)

    thread = threading.Thread(target=speak, name="svd2-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
