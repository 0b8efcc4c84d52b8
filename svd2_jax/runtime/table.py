"""A table of a live run for the terminal, refreshed in place; plain lines elsewhere only at the end."""

from __future__ import annotations

import threading
from contextlib import suppress
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from svd2_jax.runtime.metrics import Metrics, Summary
from svd2_jax.text import percent

REFRESH_HZ = 4.0
MOST_ROWS = 12  # of streams in the live table, the newest
GONE = (OSError, ValueError, SystemExit)  # raised when nobody reads what is printed; the last one by rich
GOOD, FAIR, BAD = "green", "yellow", "red"
MISS_FAIR, MISS_BAD = 0.001, 0.01  # shares of late frames: the goals below capacity and in overload


def view(metrics: Metrics, live: bool = False) -> Group:
    """Returns a table with a row for each stream, and one over all where there are several; below it, the device.

    Args:
      metrics: where the numbers come from.
      live: FPS, latency, jitter, steps and the device's load are those of the last seconds, and only the newest 12
        streams have rows; else all numbers are those of the whole run.
    """
    streams = metrics.streams
    shown = (*(streams[-MOST_ROWS:] if live else streams), None)
    *rows, overall = [(metrics.summary(stream), metrics.summary(stream, recent=live)) for stream in shown]
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")  # fits into 80 columns
    table.add_column("stream")  # the one that gives way where the terminal is narrow
    for name in ("in", "shown", "late", "dropped", "FPS", "p50", "p95", "p99", "of ms", "jitter", "steps"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        _add_row(table, *row)
    if len(streams) != 1:
        table.add_section()
        _add_row(table, *overall)
    return Group(table, _device_lines(*overall))


def _device_lines(whole: Summary, now: Summary) -> Text:
    """Returns a line about the device (load, batches, queue), and one about what was late or dropped and why."""
    first = "-" if whole.time_to_first_ms is None else f"{whole.time_to_first_ms:.0f} ms"
    parts = [
        f"device busy {percent(now.utilisation)}",
        f"{whole.ticks} ticks of {now.batch_mean:.2f} streams (at most {whole.batch_max})",
        f"queue {now.queue_mean:.1f} (at most {whole.queue_max})",
        f"first frame after {first}",
    ]
    lines = Text(" · ".join(parts), style="dim")
    dropped = ", ".join(f"{count} {reason}" for reason, count in whole.dropped.items())
    if whole.late or dropped:
        lines.append(f"\nlate: {whole.late} · dropped: {dropped or 0}")
    if not whole.is_balanced:
        lines.append(
            f"\n{whole.repeated} frames were reported twice: please report this as a fault", style=BAD
        )
    return lines


class LiveTable:
    """Shows what metrics hold while a block runs: about four times a second on a terminal, else once at its end.

    with LiveTable(loop.metrics):
        loop.wait()
    """

    def __init__(self, metrics: Metrics, console: Console | None = None, refresh_hz: float = REFRESH_HZ):
        """Creates the table.

        Args:
          metrics: where the numbers come from.
          console: where it is printed; None is stdout.
          refresh_hz: how often.
        """
        self._metrics, self._console, self._every_s = metrics, console or Console(), 1 / refresh_hz
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._live: Live | None = None
        self.note = ""

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live = Live(self._now(), console=self._console, auto_refresh=False, transient=True)
            self._live.start()
            self._thread = threading.Thread(target=self._refresh, name="svd2-table", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, at: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        with suppress(*GONE):
            if self._live is not None:
                self._live.stop()
            if self._metrics.streams:
                self._console.print(view(self._metrics))

    def _now(self) -> Group:
        """Returns the table of this moment."""
        lines = view(self._metrics, live=True)
        return Group(lines, Text(self.note, style="dim")) if self.note else lines

    def _refresh(self) -> None:
        with suppress(*GONE):
            while not self._stop.wait(self._every_s):
                if self._live is not None:
                    self._live.update(self._now(), refresh=True)


def _add_row(table: Table, whole: Summary, now: Summary) -> None:
    budget = whole.budget_ms
    table.add_row(
        Text(whole.label, no_wrap=True, overflow="ellipsis"),
        str(whole.frames_in),
        str(whole.shown + whole.late),
        _coloured(whole.miss_rate),
        _coloured(whole.drop_rate),
        f"{now.fps_shown:.1f}",
        _latency(now.latency_p50_ms, budget),
        _latency(now.latency_p95_ms, budget),
        _latency(now.latency_p99_ms, budget),
        f"{budget:.0f}",
        "-" if now.jitter_ms is None else f"{now.jitter_ms:.1f}",
        f"{now.steps_mean:.2f}" if now.steps_mean else "-",
    )


def _coloured(share: float) -> Text:
    colour = "" if share == 0 else GOOD if share < MISS_FAIR else FAIR if share < MISS_BAD else BAD
    return Text(percent(share), style=colour)


def _latency(ms: float | None, budget_ms: float) -> Text:
    if ms is None:
        return Text("-")
    return Text(f"{ms:.0f}", style=BAD if ms > budget_ms else FAIR if ms > 0.9 * budget_ms else GOOD)
