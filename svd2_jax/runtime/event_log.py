"""The event log: every event of a live run as a line of JSON."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from collections.abc import Mapping
from enum import Enum
from os import PathLike
from typing import Any

from svd2_jax.runtime.metrics import Metrics
from svd2_jax.runtime.types import SECOND, Event, FrameRecord, PromptRecord, StepChange, TickRecord

KINDS = {FrameRecord: "frame", TickRecord: "tick", StepChange: "steps", PromptRecord: "prompt"}


class JsonLines:
    """Writes every event as one line of JSON, and a summary now and then; docs/scheduling.md lists the keys.

    Every line is one write to the system, so a crash leaves whole lines. A disk that fails does not stop the
    streams: `error` keeps the reason, and nothing more is written.
    """

    def __init__(
        self,
        path: str | PathLike[str],
        metrics: Metrics | None = None,
        every_s: float = 10.0,
        about: Mapping[str, Any] | None = None,
    ):
        """Starts a new file.

        Args:
          path: the file; one that is there is replaced.
          metrics: where summaries come from; fed by somebody else, before this. None: no summaries.
          every_s: time between two summaries.
          about: what to say in the first line.

        Raises:
          OSError: the file cannot be written.
        """
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115 (closed by close())
        self._metrics, self._every_ns = metrics, round(every_s * SECOND)
        self._next_ns: int | None = None
        self._at_ns = 0
        self.error: OSError | None = None
        self._write({"kind": "start", "format": 1, **(about or {})})

    def __call__(self, event: Event) -> None:
        """Writes one event."""
        self._write(to_dict(event))
        self._at_ns = max(self._at_ns, event.at_ns)
        if self._next_ns is None:
            self._next_ns = self._at_ns + self._every_ns
        if self._at_ns >= self._next_ns:
            self._write_summary(final=False)
            self._next_ns = self._at_ns + self._every_ns

    def close(self) -> None:
        """Writes the final summary and closes the file; a second close does nothing."""
        if not self._file.closed:
            self._write_summary(final=True)
            self._file.close()

    def _write_summary(self, final: bool) -> None:
        if self._metrics is not None:
            streams = [self._metrics.summary(stream).to_dict() for stream in self._metrics.streams]
            overall = self._metrics.summary().to_dict()
            head = {"kind": "summary", "at_ns": self._at_ns, "final": final}
            self._write({**head, "all": overall, "streams": streams})

    def _write(self, line: Mapping[str, Any]) -> None:
        if self.error is not None:
            return
        data = json.dumps(line, separators=(",", ":")).encode() + b"\n"
        try:
            if (written := self._file.write(data)) != len(data):
                self._file.truncate(self._file.tell() - (written or 0))  # whole lines only
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as e:
            self.error = e


def to_dict(event: Event) -> dict[str, Any]:
    """Returns an event as plain values: its kind, and its fields by their names; those of a tick stand beside them."""
    values = {"kind": KINDS[type(event)], **dataclasses.asdict(event)}
    values.update(values.pop("tick", {}))
    return {key: value.value if isinstance(value, Enum) else value for key, value in values.items()}
