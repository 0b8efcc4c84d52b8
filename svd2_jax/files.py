"""Files that are written: whether they can be, known before the work, and whole or not at all behind it."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from svd2_jax.errors import MediaError


def check_target(path: Path) -> None:
    """Raises MediaError for a file that could not be written, before the work for it is done."""
    if path.is_dir():
        raise MediaError(f"{path}: is a folder, expected a file name to write")
    if not path.parent.is_dir():
        raise MediaError(f"{path}: the folder {path.parent} does not exist; create it first")
    if not os.access(path.parent, os.W_OK):
        raise MediaError(f"{path}: the folder {path.parent} cannot be written to")


def check_chart(path: Path) -> None:
    """Raises MediaError for a file that a chart could not be written to, before the work for it is done."""
    check_target(path)
    if path.suffix.lower() != ".png":
        raise MediaError(f"{path}: a chart's name ends in .png")


def check_apart(
    outputs: Iterable[tuple[str, Path | str | None]], inputs: Iterable[tuple[str, Path | str | None]] = ()
) -> None:
    """Raises MediaError where an output is the same file as an input or as another output, however it is written.

    Args:
      outputs: each with the option that named it. URLs and None are no files.
      inputs: likewise.
    """
    named = [(option, path) for option, path in inputs if isinstance(path, Path)]
    for option, path in outputs:
        if not isinstance(path, Path) or (path.exists() and not path.is_file()):  # a pipe can take several
            continue
        for other, there in named:
            if _is_same(path, there):
                raise MediaError(f"{option} {path}: is the same file as {other} {there}; choose another")
        named.append((option, path))


def _is_same(a: Path, b: Path) -> bool:
    if a.exists() and b.exists():
        return os.path.samefile(a, b)
    return os.path.realpath(a) == os.path.realpath(b)


def part_of(path: Path) -> Path:
    """Returns a hidden name beside a file, for what will become it; the suffix stays, as it may choose the format."""
    return path.with_name(f".{path.stem}.{secrets.token_hex(4)}.part{path.suffix}")


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Has a file written beside its place and moves it there when it is whole; otherwise leaves all as it was.

    Args:
      path: the file; one that is there is replaced. What is there and no file, a pipe for instance, is written to.
      write: writes the file whose name it is given.

    Raises:
      MediaError: the file cannot be written.
    """
    in_place = path.exists() and not path.is_file()
    part = path if in_place else part_of(path)
    try:
        write(part)
        if not in_place:
            os.replace(part, path)
    except OSError as e:
        raise MediaError(f"{path}: cannot be written ({e.strerror or e})") from e
    finally:
        if not in_place:
            part.unlink(missing_ok=True)


def write_json(path: Path, values: Any, *, allow_nan: bool = True) -> None:
    """Writes plain values as a JSON file, see `write_whole`; without `allow_nan`, raises ValueError for NaN."""
    text = json.dumps(values, indent=1, allow_nan=allow_nan) + "\n"
    write_whole(path, lambda part: part.write_text(text))
