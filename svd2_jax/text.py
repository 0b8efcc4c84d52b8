"""Text for terminals and charts: aligned tables, rates with their prefix, what has to fit into a width."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence


def aligned(rows: Sequence[Sequence[str]], left: Container[int] = (0,)) -> list[str]:
    """Returns the rows as lines of aligned cells; columns in `left` are flush left, the others flush right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]

    def line(row: Sequence[str]) -> str:
        cells = enumerate(zip(row, widths, strict=True))
        return "  ".join(c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in cells).rstrip()

    return [line(row) for row in rows]


def blocks_named(first: int, count: int) -> str:
    """Returns what a stage's blocks are called: "block 4", "blocks 0 to 3"."""
    return f"block {first}" if count == 1 else f"blocks {first} to {first + count - 1}"


def counted(count: int, noun: str) -> str:
    """Returns "1 frame", "5 frames"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def held_in(weight_dtype: str, cache_dtype: str) -> str:
    """Returns what is held in another way than it is computed in, to go behind the dtype; may be nothing."""
    held = (("weights", weight_dtype), ("cache", cache_dtype))
    return "".join(f", {what} {storage}" for what, storage in held if storage != "compute")


def measured_blocks(split: Sequence[int]) -> str:
    """Returns what people are told of a split that was measured."""
    return f"blocks per stage, by measured times: {'+'.join(map(str, split))}"


def percent(share: float) -> str:
    """Returns a share from 0 to 1 in percent, small ones to two digits."""
    return f"{100 * share:.0f} %" if share >= 0.1 or share == 0 else f"{100 * share:.2g} %"


def shortened(text: str, width: float, measured: Callable[[str], float]) -> str:
    """Returns a text that is no wider than `width` as it is `measured`, cut at its end; one character at least."""
    while measured(text) > width and len(text) > 1:
        text = text[:-2].rstrip() + "…"
    return text


def si(value: float) -> str:
    """Returns a rate with its prefix, for example "3.35 T"; the unit is to follow."""
    for exponent, prefix in ((15, "P"), (12, "T"), (9, "G"), (6, "M")):
        if value >= 10**exponent:
            return f"{value / 10**exponent:.4g} {prefix}"
    return f"{value:.4g} "
