"""What a command has of its terminal: lines that are typed, Ctrl-C, and somebody who may not listen any more."""

from __future__ import annotations

import codecs
import contextlib
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any, Self, TextIO

LOOK_S = 0.2  # how often it is looked whether the end has come


class Interrupts:
    """Counts Ctrl-C, SIGTERM and SIGHUP once they are held; before, each of them interrupts the program."""

    def __init__(self):
        self.count = 0
        self._held = False
        self._before: dict[int, Any] = {}

    def hold(self) -> None:
        """From now on, counts."""
        self._held = True

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # signals are for others elsewhere
            numbers = [signal.SIGINT, signal.SIGTERM]
            if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # no nohup
                numbers.append(signal.SIGHUP)
            for number in numbers:
                self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take(self, *_: object) -> None:
        if not self._held:
            raise KeyboardInterrupt
        self.count += 1


def heard(say: Callable[[str], None], stream: TextIO) -> Callable[[str], None]:
    """Returns `say`, which writes to a stream that nobody may read any more: that must not end the streams."""

    def safely(text: str) -> None:
        try:
            say(text)
        except BrokenPipeError:
            with contextlib.suppress(OSError, ValueError):  # else Python complains again at its end
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        except (OSError, ValueError):
            pass

    return safely


class TypedLines:
    """Takes lines that are typed while a block runs; on a terminal they can be shown while they are typed."""

    def __init__(
        self,
        take: Callable[[str], None],
        show: Callable[[str], None] | None,
        stream: TextIO | None = None,
    ):
        """Takes what to call with a whole line, and with what is typed of the next one so far.

        Without `show` the terminal itself shows what is typed.
        """
        self._take, self._show, self._stream = take, show, stream or sys.stdin
        self._stop = threading.Event()
        self._before: Any = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        try:
            fd = self._stream.fileno()
        except (OSError, ValueError, AttributeError):  # closed, or not a file
            return self
        body = self._read_lines
        if os.isatty(fd):
            with contextlib.suppress(OSError, AttributeError):  # not the terminal that the process belongs to
                if os.tcgetpgrp(fd) != os.getpgrp():  # in the background: reading would stop the process
                    return self
            if self._show is not None:
                try:
                    import termios
                    import tty
                except ImportError:  # not on Windows
                    return self
                self._before = termios.tcgetattr(fd)
                tty.setcbreak(fd, termios.TCSANOW)  # what was typed while programs were compiled is kept
                body = self._read_keys
        self._thread = threading.Thread(target=body, args=(fd,), name="svd2-typed", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(1.0)
        if self._before is not None:
            import termios

            termios.tcsetattr(self._stream.fileno(), termios.TCSADRAIN, self._before)

    def _read_keys(self, fd: int) -> None:
        assert self._show is not None
        decoder, typed = codecs.getincrementaldecoder("utf-8")("replace"), ""
        while data := self._read(fd, 1):
            if data == b"\x1b":
                self._skip_escape(fd)
                continue
            for key in decoder.decode(data):
                if key in "\r\n":
                    line, typed = typed.strip(), ""
                    if line:
                        self._take(line)
                elif key in "\x7f\b":
                    typed = typed[:-1]
                    self._show(typed)
                elif key.isprintable():
                    typed += key
                    self._show(typed)

    def _skip_escape(self, fd: int) -> None:
        """Skips an arrow or the like, `ESC [ ... letter`; its bytes are there already."""
        inside = False
        while select.select([fd], [], [], 0)[0]:
            byte = os.read(fd, 1)
            if inside and b"@" <= byte <= b"~":
                return
            if not inside and byte not in (b"[", b"O"):
                return
            inside = True

    def _read_lines(self, fd: int) -> None:
        pending = b""
        while data := self._read(fd, 4096):
            *lines, pending = (pending + data).split(b"\n")
            self._take_lines(lines)
        self._take_lines([pending])

    def _take_lines(self, lines: Iterable[bytes]) -> None:
        for line in lines:
            if text := line.decode(errors="replace").strip():
                self._take(text)

    def _read(self, fd: int, most: int) -> bytes:
        """Waits for what is typed; nothing at its end, or when the block ends."""
        while not self._stop.is_set():
            if select.select([fd], [], [], LOOK_S)[0]:
                with contextlib.suppress(OSError):
                    return os.read(fd, most)
                return b""
        return b""
