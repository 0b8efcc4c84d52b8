"""What was measured: as numbers and as text."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from svd2_jax.bench.timing import Sample, Spread
from svd2_jax.bench.trace import Kernel
from svd2_jax.hardware import Cost, Hardware, roofline
from svd2_jax.text import aligned, counted, held_in, si

MS = 1e3  # milliseconds in a second
SHOWN_KERNELS = 8  # kinds of each part; the JSON has all


@dataclass(frozen=True)
class Compiled:
    """What XLA says about an executable; on some backends its counts leave out what it gives to libraries.

    Attributes:
      flops: floating point operations; a loop whose number of passes is not known counts once.
      bytes: moved by all its kernels.
      temporaries: bytes needed in passing.
      aliased: bytes of arguments that are updated in place.
    """

    flops: float
    bytes: float
    temporaries: int
    aliased: int


@dataclass(frozen=True)
class Against:
    """The same part of another implementation, its samples taken in turn with ours.

    Attributes:
      seconds: for each repetition.
      error: largest difference between both results, as a share of the largest value; None where not compared.
    """

    seconds: tuple[float, ...]
    error: float | None = None


@dataclass(frozen=True)
class Measured:
    """A part's times.

    Attributes:
      name: see `parts.BENCHMARKS`.
      samples: one for each repetition.
      work: what one time costs, counted from its trace.
      frames: video frames that it makes; 0: none.
      compiled: what the compiler says about it.
      against: the other implementation's.
      note: what a reader has to know.
      kernels: what the profiler saw, the most costly first; empty without a profile.
    """

    name: str
    samples: tuple[Sample, ...]
    work: Cost | None = None
    frames: int = 0
    compiled: Compiled | None = None
    against: Against | None = None
    note: str = ""
    kernels: tuple[Kernel, ...] = ()

    @property
    def total(self) -> Spread:
        """Seconds until the result was there."""
        return Spread.of([sample.total_s for sample in self.samples])

    @property
    def handed(self) -> Spread:
        """Seconds until the work was handed over."""
        return Spread.of([sample.handed_s for sample in self.samples])

    @property
    def ratio(self) -> Spread | None:
        """How many times as long the other implementation takes, repetition by repetition."""
        if self.against is None:
            return None
        pairs = zip(self.against.seconds, self.samples, strict=True)
        return Spread.of([theirs / ours.total_s for theirs, ours in pairs])


@dataclass(frozen=True)
class Settings:
    """What was measured where, as plain values."""

    checkpoint: str
    blocks: int
    stream: dict[str, Any]
    dtype: str
    attention: str
    platform: str
    device: str
    threads: int
    jax: str
    xla_flags: str
    against: str | None = None
    weight_dtype: str = "compute"

    @property
    def precision(self) -> str:
        """What is computed in, and what is held in another way."""
        return self.dtype + held_in(self.weight_dtype, self.stream.get("cache_dtype", "compute"))


@dataclass(frozen=True)
class Report:
    """All that was measured in one run.

    Attributes:
      settings: of what and where.
      ceiling: what the device reached at most, in the model's dtype.
      parts: in the order of `parts.BENCHMARKS`.
      first_frame: seconds of each phase from the start of the process to the first frames.
    """

    settings: Settings
    ceiling: Hardware
    parts: tuple[Measured, ...]
    first_frame: dict[str, float] = field(default_factory=dict)

    def share(self, part: Measured) -> tuple[float, str] | None:
        """Returns the least time that the ceilings allow for a part as a share of its median, and which one binds."""
        if part.work is None:
            return None
        least = roofline(part.work, self.ceiling, 32)
        return least.seconds / part.total.median, least.bound

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON, medians and shares included."""
        values = dataclasses.asdict(self)
        values["ceiling"] = {
            "flops": self.ceiling.flops_32bit,
            "memory_bandwidth": self.ceiling.memory_bandwidth,
        }
        for part, entry in zip(self.parts, values["parts"], strict=True):
            entry["total_s"], entry["handed_s"] = (dataclasses.asdict(s) for s in (part.total, part.handed))
            if (share := self.share(part)) is not None:
                entry["share_of_ceiling"], entry["bound"] = share
            if part.ratio is not None:
                entry["ratio"] = dataclasses.asdict(part.ratio)
        return values


def text(report: Report) -> str:
    """Returns the report for a terminal."""
    blocks = (
        _header(report), _table(report), _kernels(report), _against(report), _first_frame(report), _notes(report),
    )  # fmt: skip
    return "\n\n".join("\n".join(lines) for lines in blocks if lines)


def _header(report: Report) -> list[str]:
    s, ceiling = report.settings, report.ceiling
    steps = len(s.stream["timesteps"])
    return [
        f"{s.checkpoint}, {counted(s.blocks, 'block')}, {s.stream['width']}x{s.stream['height']}, "
        f"{counted(steps, 'step')}, {s.stream['mode']}, "
        f"{s.precision}; {s.device}, {s.threads} CPU threads, jax {s.jax}",
        f"ceiling in this run: {si(ceiling.flops_32bit)}FLOP/s (matrix product), "
        f"{si(ceiling.memory_bandwidth)}B/s (copy)",
    ]


def _table(report: Report) -> list[str]:
    rows: list[Sequence[str]] = [
        ("part", "ms", "from", "to", "handed over", "frames/s", "FLOP/s", "B/s", "of ceiling", "bound by")
    ]
    for part in report.parts:
        total, share = part.total, report.share(part)
        counted = () if part.work is None else (part.work.flops, part.work.bytes)
        rates = [si(x / total.median) for x in counted] or ["", ""]
        rows.append(
            (
                part.name,
                *(_ms(x) for x in (total.median, total.least, total.most, part.handed.median)),
                f"{part.frames / total.median:.2f}" if part.frames else "",
                *(rate.strip() for rate in rates),
                "" if share is None else f"{100 * share[0]:.0f} %",
                "" if share is None else share[1],
            )
        )
    return aligned(rows) if report.parts else []


def _kernels(report: Report) -> list[str]:
    rows: list[Sequence[str]] = [("kernels", "ms", "share", "calls", "")]
    for part in report.parts:
        whole = math.fsum(kernel.seconds for kernel in part.kernels)
        for kernel in part.kernels[:SHOWN_KERNELS]:
            share = f"{100 * kernel.seconds / whole:.0f} %"
            rows.append((part.name, _ms(kernel.seconds), share, f"{kernel.calls:.1f}", kernel.name))
    return aligned(rows, left=(0, 4)) if len(rows) > 1 else []


def _against(report: Report) -> list[str]:
    rows: list[Sequence[str]] = [
        (f"against {report.settings.against}", "ours ms", "theirs ms", "ratio", "from", "to", "difference")
    ]
    for part in report.parts:
        if part.against is None or (ratio := part.ratio) is None:
            continue
        error = part.against.error
        rows.append(
            (
                part.name,
                _ms(part.total.median),
                _ms(Spread.of(part.against.seconds).median),
                *(f"{x:.2f}" for x in (ratio.median, ratio.least, ratio.most)),
                "" if error is None else f"{error:.1e}",
            )
        )
    return [*aligned(rows), "ratio: how many times as fast we are"] if len(rows) > 1 else []


def _first_frame(report: Report) -> list[str]:
    if not report.first_frame:
        return []
    phases = ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in report.first_frame.items())
    return [f"first frame after {math.fsum(report.first_frame.values()):.2f} s: {phases}"]


def _notes(report: Report) -> list[str]:
    return [f"{part.name}: {part.note}" for part in report.parts if part.note]


def _ms(seconds: float) -> str:
    ms = MS * seconds
    return f"{ms:.3f}" if ms < 10 else f"{ms:.1f}" if ms < 1000 else f"{ms:.0f}"
