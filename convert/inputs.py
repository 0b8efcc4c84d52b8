"""Opens what is to be converted; whatever is wrong with the arguments is found before the work, all at once."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from convert.components import COMPONENTS, is_like
from convert.files import TOKENIZER_FILES, did_you_mean, folders_below, open_weights, read_json, weights_below
from convert.source import Source
from convert.wan_folder import PLACES, WanFolder, find_wan_folder, is_converted, look_into
from svd2_jax.engine.checkpoint import CheckpointWriter
from svd2_jax.errors import CheckpointError, ConversionError, Svd2Error

_MOST_OPENED = 20  # files, in search of what was meant
_TOKENIZER_LEVELS = 6  # huggingface/hub/models--NAME/snapshots/HASH/google/umt5-xxl

P = ParamSpec("P")
T = TypeVar("T")


class Problems:
    """Errors that are collected, to be raised as one."""

    def __init__(self) -> None:
        """Starts without any."""
        self._errors: list[Svd2Error] = []

    def add(self, message: str) -> None:
        """Keeps a problem of the inputs."""
        self._errors.append(ConversionError(message))

    def caught(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """Returns what `work` returns, or None if it raises an error of ours or of the system, which is kept."""
        try:
            return work(*args, **kwargs)
        except (ConversionError, CheckpointError) as e:
            self._errors.append(e)
        except OSError as e:  # a folder that may not be read, a name that is too long
            self.add(f"{e.filename}: cannot be read ({e.strerror})")
        return None

    def raise_all(self) -> None:
        """Raises the only error, or one ConversionError that says all of them in one line."""
        errors = {str(e): e for e in self._errors}
        if len(errors) == 1:
            raise self._errors[0]
        if errors:
            numbered = (f"({number}) {text}" for number, text in enumerate(errors, 1))
            raise ConversionError(f"{len(errors)} problems: {'; '.join(numbered)}")


@dataclass(frozen=True)
class Inputs:
    """What to convert.

    Attributes:
      sources: opened weights, by component.
      settings: the transformer's config.json; empty if there is none.
      tokenizer: the tokenizer's files by name.
      folders: that were given and are what they should be.
    """

    sources: Mapping[str, Source]
    settings: Mapping[str, Any]
    tokenizer: Mapping[str, Path]
    folders: Collection[Path]


def open_inputs(
    weights: Mapping[str, Path], wan: Path | None, tokenizer: Path | None, problems: Problems
) -> Inputs:
    """Returns what the paths hold, and from the Wan2.1 folder what they leave open; see `convert_checkpoint`.

    Args:
      weights: by component.
      wan: the Wan2.1 folder.
      tokenizer: the tokenizer's folder.
      problems: takes whatever is wrong; if there is any, the result is not complete.
    """
    given = {**weights, **({} if tokenizer is None else {"tokenizer": tokenizer})}
    found, wan_folders = WanFolder({}), []
    if wan is not None:
        needed = [name for name in PLACES if name not in given]
        if problems.caught(find_wan_folder, wan, needed):
            wan_folders = [wan]
        found = (
            problems.caught(look_into, wan) or found
        )  # what an incomplete folder holds may be damaged as well
    chosen = {**found.parts, **given}

    sources = {name: problems.caught(_open, name, chosen[name]) for name in COMPONENTS if name in chosen}
    config = found.config
    if config is None and "dit" in chosen and (chosen["dit"] / "config.json").is_file():
        config = chosen["dit"] / "config.json"
    settings = problems.caught(read_json, config) if config else None
    files = problems.caught(_tokenizer_files, chosen.get("tokenizer"))
    opened = {name: source for name, source in sources.items() if source is not None}
    good = [*wan_folders, *(chosen[name] for name in opened), *([chosen["tokenizer"]] if files else [])]
    return Inputs(opened, settings or {}, files or {}, [path for path in good if path.is_dir()])


def open_writer(out: Path, given: Collection[Path], folders: Collection[Path]) -> CheckpointWriter:
    """Returns the writer of a checkpoint folder.

    Args:
      out: the folder to make.
      given: paths of the inputs; `out` must not be or hold one.
      folders: of the inputs; `out` must not lie in one.

    Raises:
      CheckpointError: it does, or the folder cannot be made there.
    """
    place = Path(os.path.realpath(out))
    for path in given:
        real = Path(os.path.realpath(path))
        if place == real:
            raise CheckpointError(f"{out} is an input of the conversion; choose another place for --out")
        if place in real.parents and place.exists():
            raise CheckpointError(f"{out} exists and holds the input {path}; choose another place for --out")
    for folder in folders:
        if Path(os.path.realpath(folder)) in place.parents:
            raise CheckpointError(f"{out} lies in the input {folder}; choose a place outside of it for --out")
    return CheckpointWriter(out)


def _open(name: str, path: Path) -> Source:
    """Opens the weights of a component; raises ConversionError, with what was meant if that can be found."""
    component = COMPONENTS[name]
    if path.is_dir():
        if is_converted(path):
            raise ConversionError(
                f"{path}: a converted checkpoint, not weights for {component.option}; "
                f"to use it: svd2 run --checkpoint {shlex.quote(str(path))}"
            )
        part = look_into(path).parts.get(name)
        if part not in (None, path):
            raise ConversionError(
                f"{path}: a Wan2.1 folder; give it with --wan, or its {PLACES[name].title} alone with "
                f"{component.option} {shlex.quote(str(part))}"
            )
    try:
        return open_weights(path)
    except ConversionError as e:
        raise ConversionError(f"{e}{did_you_mean(_weights_meant(name, path))}") from None


def _weights_meant(name: str, folder: Path) -> list[Path]:
    """Returns the weights of a component that lie in a folder or deeper; none if it is a file."""
    meant = []
    for path in weights_below(folder)[:_MOST_OPENED] if folder.is_dir() else []:
        source = Problems().caught(open_weights, path)
        if source is not None and is_like(name, source):
            meant.append(path)
    return meant


def _tokenizer_files(folder: Path | None) -> Mapping[str, Path]:
    """Returns the tokenizer's files by name; raises ConversionError if the folder holds no tokenizer."""
    if folder is None:
        return {}
    if not folder.exists():
        raise ConversionError(f"{folder}: no such folder; expected the folder of a Hugging Face tokenizer")
    files = {name: folder / name for name in TOKENIZER_FILES if (folder / name).is_file()}
    if TOKENIZER_FILES[0] in files:
        return files
    what = "a file" if folder.is_file() else f"no {TOKENIZER_FILES[0]}"
    near = [folder.parent] if folder.is_file() else folders_below(folder, _TOKENIZER_LEVELS)
    meant = [path for path in near if (path / TOKENIZER_FILES[0]).is_file()]
    raise ConversionError(
        f"{folder}: {what}; expected the folder of a Hugging Face tokenizer{did_you_mean(meant)}"
    )
