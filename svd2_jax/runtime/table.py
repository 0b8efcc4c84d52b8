"""A table of a live run for the terminal, refreshed in place; plain lines elsewhere only at the end."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from svd2_jax.runtime.metrics import Metrics, Summary

REFRESH_HZ = 4.0
MOST_ROWS = 12  # of streams in the live table, those that are active latest
GONE = (OSError, ValueError, SystemExit)  # raised when nobody reads what is printed; the last one by rich
GOOD, FAIR, BAD = "green", "yellow", "red"
MISS_FAIR, MISS_BAD = 0.001, 0.01  # shares of late frames: the goals below capacity and in overload


def summary_table(
    streams: Sequence[Summary], overall: Summary, recent: Sequence[Summary] = (), hidden: int = 0
) -> Table:
    """Returns a table with a row for each stream, and one for all of them.

    Args:
      streams: numbers of the whole run, for each stream.
      overall: the same over all streams.
      recent: numbers of the last seconds in the same order, which replace FPS and latency; empty at the end.
      hidden: streams that have no row.
    """
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")  # fits into 80 columns
    table.add_column("stream")  # the one that gives way where the terminal is narrow
    for name in ("in", "shown", "late", "dropped", "FPS", "p50", "p95", "p99", "of ms", "jitter", "steps"):
        table.add_column(name, justify="right", no_wrap=True)
    for i, whole in enumerate(streams):
        _add_row(table, whole, recent[i] if recent else whole)
    if len(streams) + hidden != 1:
        table.add_section()
        _add_row(table, overall, recent[-1] if len(recent) > len(streams) else overall)
    return table


def device_line(whole: Summary, recent: Summary | None = None) -> Text:
    """Returns a line about the device (load, batches, queue), and one about what was late or dropped and why."""
    now = recent or whole
    first = "-" if whole.time_to_first_ms is None else f"{whole.time_to_first_ms:.0f} ms"
    parts = [
        f"device busy {_percent(now.utilisation)}",
        f"{whole.ticks} ticks of {now.batch_mean:.2f} streams (at most {whole.batch_max})",
        f"queue {now.queue_mean:.1f} (at most {whole.queue_max})",
        f"first frame after {first}",
    ]
    line = Text(" · ".join(parts), style="dim")
    dropped = ", ".join(f"{count} {reason}" for reason, count in whole.dropped.items())
    if whole.late or dropped:
        line.append(f"\nlate: {whole.late} · dropped: {dropped or 0}")
    if whole.repeated or not whole.is_balanced:
        line.append(
            f"\n{whole.repeated} frames were reported twice: please report this as a fault", style=BAD
        )
    return line


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
                self._console.print(self.final())

    def final(self) -> Group:
        """Returns the table of the whole run."""
        metrics = self._metrics
        streams = [metrics.summary(stream) for stream in metrics.streams]
        return Group(summary_table(streams, metrics.summary()), device_line(metrics.summary()))

    def _now(self) -> Group:
        """Returns the table of this moment."""
        metrics, shown = self._metrics, self._metrics.streams[-MOST_ROWS:]
        streams = [metrics.summary(stream) for stream in shown]
        recent = [metrics.summary(stream, recent=True) for stream in (*shown, None)]
        table = summary_table(streams, metrics.summary(), recent, len(metrics.streams) - len(shown))
        lines = [table, device_line(metrics.summary(), recent[-1])]
        return Group(*lines, Text(self.note, style="dim")) if self.note else Group(*lines)

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
    return Text(_percent(share), style=colour)


def _latency(ms: float | None, budget_ms: float) -> Text:
    if ms is None:
        return Text("-")
    return Text(f"{ms:.0f}", style=BAD if ms > budget_ms else FAIR if ms > 0.9 * budget_ms else GOOD)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.1 or share == 0 else f"{100 * share:.2g} %"
