"""How long the device takes: learned from device times, robust to outliers, quick to believe a slower device.

A *cell* is one kind of tick: (batch_key, batch, steps, first group or not). Each cell has a typical time, the median of
its last device times; all cells share one *speed factor*, the median of the last few ratios of observed to typical
time. So a device that halves its speed is believed after three ticks of any kind, and one tick that took much
longer for another reason changes nothing. Device times are kept divided by the speed factor of their moment, so
that cells measured in different moments stay comparable.

Ticks overlap: while the frames of one are still being finished behind the stages, the next one runs. A tick's time is
what it adds to those before it; its *tail* is how much longer its frames take, which shows only at the end of a row of
ticks. So k ticks from an idle device on take k times and one tail.
"""

from __future__ import annotations

import bisect
import math
import statistics
from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class LatencySample:
    """What one tick took.

    Attributes:
      batch_key: of its streams.
      batch: how many streams it took.
      steps: their denoising steps.
      duration_ns: device time that it adds to the tick before it, above 0.
      first: whether it took a first group.
      tail_ns: how much longer its frames take when nothing ran before it; None where that was not measured.
      lone: whether it computed one row of each stream only.
    """

    batch_key: Hashable
    batch: int
    steps: int
    duration_ns: int
    first: bool = False
    tail_ns: int | None = None
    lone: bool = False


class Cell(NamedTuple):
    """One kind of tick."""

    batch_key: Hashable
    batch: int
    steps: int
    first: bool
    lone: bool = False


@dataclass(frozen=True)
class LatencyConfig:
    """How device times are believed.

    Attributes:
      window: device times kept of each cell, and ratios kept for the margin, at least 1.
      speed_window: ratios that the speed factor is the median of; odd, at least 1. One more than half of them make
        a change believed; fewer change nothing.
      quantile: share of ticks, 0 to 1, that should take no longer than the bound.
      least_margin: the bound is at least this share above the expected time.
      most_margin: and at most this share.
      knee_gain: share by which a larger batch must raise the throughput to be worth its latency.
    """

    window: int = 64
    speed_window: int = 5
    quantile: float = 0.95
    least_margin: float = 0.03
    most_margin: float = 0.5
    knee_gain: float = 0.1


@dataclass(frozen=True)
class TickTimes:
    """What ticks of one batch key and number of steps take, as believed at one moment.

    Attributes:
      sizes: allowed batch sizes, ascending, beginning with 1.
      expected_ns: time of a tick of each size.
      bound_ns: time that hardly any tick of that size exceeds.
      first_expected_ns: time of a first group's tick.
      first_bound_ns: time that hardly any of those exceeds.
      tails_ns: how much longer the frames of a tick of each size take when nothing ran before it; 0 where not known.
      first_tail_ns: the same of a first group's tick.
      tail_bound_ns: time that hardly any of these tails exceeds.
      knee: largest batch size that is worth its latency.
      best: batch size of the highest throughput.
      lone: the same of ticks that compute one row of each stream only; None where none was seen, and in these.
    """

    sizes: tuple[int, ...]
    expected_ns: dict[int, int]
    bound_ns: dict[int, int]
    first_expected_ns: int
    first_bound_ns: int
    tails_ns: dict[int, int]
    first_tail_ns: int
    tail_bound_ns: int
    knee: int
    best: int
    lone: TickTimes | None = None

    @property
    def of_one_row(self) -> TickTimes:
        """The times of ticks that compute one row of each stream only."""
        return self.lone or self

    def of_tick(self, size: int, first: bool, lone: bool) -> tuple[int, int, int]:
        """Returns a tick's expected time, its bound, and the tail behind it."""
        if first:
            return self.first_expected_ns, self.first_bound_ns, self.first_tail_ns
        times = self.of_one_row if lone else self
        return times.expected_ns[size], times.bound_ns[size], times.tails_ns[size]

    def size(self, ready: int, most: int) -> int:
        """Returns the largest allowed batch of at most `most` out of `ready` streams; both at least 1."""
        return self.sizes[bisect.bisect_right(self.sizes, ready if ready < most else most) - 1]

    def share_ns(self, streams: int) -> float:
        """Returns the device time of each of so many streams when all take one tick, in the best batches."""
        left, total = streams, 0
        while left:
            size = self.size(left, self.best)
            count = left // size
            total += count * self.expected_ns[size]
            left -= count * size
        return total / streams

    def least_ns(self, streams: int) -> float:
        """Returns the least device time of each of so many streams, when they need not all take part in each round."""
        return min(self.expected_ns[size] / size for size in self.sizes if size <= streams)


class LatencyModel:
    """Learns device times and predicts them. What nothing is known about takes no time at all."""

    def __init__(self, batch_sizes: Sequence[int], config: LatencyConfig | None = None):
        self.config = config or LatencyConfig()
        self.sizes = tuple(sorted(set(batch_sizes)))
        self.speed = 1.0  # above 1: the device takes longer than its typical times
        self._times: dict[Cell, deque[float]] = {}
        self._typical: dict[Cell, float] = {}
        self._tails: dict[Cell, deque[float]] = {}
        self._tail: dict[Cell, float] = {}
        self._recent: deque[tuple[Cell, int, float]] = deque(maxlen=self.config.speed_window)
        self._misses: deque[float] = deque(maxlen=self.config.window)  # observed / predicted
        self._believed: dict[tuple[Hashable, int], TickTimes] = {}

    def observe(self, sample: LatencySample) -> None:
        """Learns from one device time."""
        cell = Cell(sample.batch_key, sample.batch, sample.steps, sample.first, sample.lone)
        duration = max(1, sample.duration_ns)
        typical = self._typical.get(cell)
        if typical is None:
            self._learn(cell, duration)
        else:
            if self._recent:
                self._misses.append(duration / (typical * self.speed))
            self._recent.append((cell, duration, duration / typical))
            self.speed = statistics.median(ratio for *_, ratio in self._recent)
            # The speed now known is that of the ratio in the middle: by it, that one is learned. Learned at once,
            # the first slow ticks after a change would pass for the typical time of their cell.
            middle = len(self._recent) // 2
            if len(self._recent) == self.config.speed_window:
                self._learn(*self._recent[middle][:2])
        if sample.tail_ns is not None:
            tails = self._tails.setdefault(cell, deque(maxlen=self.config.window))
            tails.append(sample.tail_ns / self.speed)
            self._tail[cell] = statistics.median(tails)
        self._believed.clear()

    @property
    def knows_tails(self) -> bool:
        """Whether any tail is known that is not 0."""
        return any(self._tail.values())

    def doubt(self) -> None:
        """Takes a slow device to be as fast as ever, until the next device time, which is believed at once."""
        self.speed = min(self.speed, 1.0)
        self._recent.clear()
        self._misses.clear()
        self._believed.clear()

    def _learn(self, cell: Cell, duration_ns: int) -> None:
        times = self._times.setdefault(cell, deque(maxlen=self.config.window))
        times.append(duration_ns / self.speed)
        self._typical[cell] = statistics.median(times)

    def times(self, batch_key: Hashable, steps: int) -> TickTimes:
        """Returns what ticks of this batch key and number of steps take, as far as is known now."""
        found = self._believed.get((batch_key, steps))
        if found is None:
            cells = {size: Cell(batch_key, size, steps, False) for size in self.sizes}
            # Where no tick of one row was seen, they take as long as others.
            ones = {size: cell._replace(lone=True) for size, cell in cells.items()}
            seen = {size: cell for size, cell in ones.items() if cell in self._typical}
            margin = self.margin
            lone = self._predict(cells | seen, margin) if seen else None
            found = self._believed[batch_key, steps] = self._predict(cells, margin, lone)
        return found

    @property
    def margin(self) -> float:
        """Factor from an expected time to its bound."""
        if not self._misses:
            return 1 + self.config.least_margin
        ordered = sorted(self._misses)
        seen = ordered[min(len(ordered) - 1, int(self.config.quantile * len(ordered)))]
        return 1 + min(max(seen - 1, self.config.least_margin), self.config.most_margin)

    def _predict(self, cells: Mapping[int, Cell], margin: float, lone: TickTimes | None = None) -> TickTimes:
        """Returns the costs of ticks of these cells, by batch size, and of their first group."""
        first_cell = cells[1]._replace(first=True, lone=False)
        expected = {size: round(self._cell_ns(cell)) for size, cell in cells.items()}
        first = round(self._cell_ns(first_cell))
        tails = {size: self._tail_ns(cell) for size, cell in cells.items()}
        first_tail = self._tail_ns(first_cell)
        knee = self.sizes[0]
        for size in self.sizes[1:]:
            if size * expected[knee] < knee * expected[size] * (1 + self.config.knee_gain):
                break
            knee = size
        return TickTimes(
            sizes=self.sizes,
            expected_ns=expected,
            bound_ns={size: math.ceil(time * margin) for size, time in expected.items()},
            first_expected_ns=first,
            first_bound_ns=math.ceil(first * margin),
            tails_ns=tails,
            first_tail_ns=first_tail,
            tail_bound_ns=math.ceil(max(first_tail, *tails.values()) * margin),
            knee=knee,
            best=min(self.sizes, key=lambda size: expected[size] / size),
            lone=lone,
        )

    def _cell_ns(self, cell: Cell) -> float:
        typical = self._typical.get(cell)
        if typical is None:
            typical = self._guess(cell)
        return typical * self.speed

    def _tail_ns(self, cell: Cell) -> int:
        # Ticks of one row that nobody measured alone have the tail of others: their frames are decoded alike.
        tail = self._tail.get(cell, self._tail.get(cell._replace(lone=False), 0.0))
        return round(tail * self.speed)

    def _guess(self, cell: Cell) -> float:
        """Predicts a cell without device times from the others of its batch key, or of any if it has none."""
        whole = [known for known in self._typical if not known.lone]
        cells = [known for known in whole if known.batch_key == cell.batch_key] or whole
        if cell.first:
            same = [self._typical[known] / known.steps for known in cells if known.first]
            if same:
                return cell.steps * max(same)
        plain = [(known.batch * known.steps, self._typical[known]) for known in cells if not known.first]
        if not plain:  # only first groups are known: a pass over two latent frames at once, one for each step
            return (
                max((self._typical[known] / known.steps for known in cells), default=0.0)
                * cell.batch
                * cell.steps
            )
        fixed, slope = fit_line(plain)
        if cell.first:
            return cell.steps * (fixed + 2 * slope)
        return fixed + slope * cell.batch * cell.steps


def fit_line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Returns (fixed, slope), both >= 0, of the line nearest to the points (x, y), x and y above 0.

    Points of one x leave open how much is fixed; then all of it is slope.
    """
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else math.inf
    fixed = mean_y - slope * mean_x
    if slope < 0:
        return mean_y, 0.0
    if fixed < 0:  # through the origin
        return 0.0, sum(x * y for x, y in points) / sum(x * x for x, _ in points)
    return fixed, slope
