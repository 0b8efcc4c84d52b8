"""Finds the parts of a Wan2.1 folder, and the folder that was meant where another one is given."""

from __future__ import annotations

import functools
import os
import shlex
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from convert.files import MOST_SUGGESTIONS, WEIGHT_SUFFIXES, folders_below, read_json, weights_below
from svd2_jax.engine.checkpoint import MANIFEST
from svd2_jax.errors import ConversionError

_LEVELS_UP = 3  # WAN/google/umt5-xxl/tokenizer.json
_LEVELS_BESIDE = 3  # from models--NAME/blobs to models--NAME/snapshots/HASH
_FEWEST_PARTS = 2  # of a folder worth to be suggested: one alone is no Wan2.1 folder
_PUBLISHER = "Wan-AI"  # on Hugging Face


class _Place(NamedTuple):
    title: str
    files: str  # in Wan's layout and in Diffusers'
    option: str  # that gives it instead


PLACES: Mapping[str, _Place] = {
    "dit": _Place("transformer", "diffusion_pytorch_model*.safetensors or transformer/", "--generator FILE"),
    "vae": _Place("VAE", "Wan2.1_VAE.pth or vae/", "--vae FILE"),
    "text": _Place("text encoder", "models_t5_umt5-xxl-enc-bf16.pth or text_encoder/", "--text-encoder FILE"),
    "tokenizer": _Place("tokenizer", "google/umt5-xxl/ or tokenizer/", "--tokenizer FOLDER"),
}


@dataclass(frozen=True)
class WanFolder:
    """Where the parts of a Wan2.1 folder lie, in Wan's own layout or in Diffusers'; only those that are there.

    Attributes:
      parts: by their name in PLACES.
      config: the transformer's config.json.
    """

    parts: Mapping[str, Path]
    config: Path | None = None


def look_into(folder: Path) -> WanFolder:
    """Returns which parts of a Wan2.1 folder are there; none if it is something else, or no folder."""
    if not folder.is_dir():
        return WanFolder({})

    def first(*names: str) -> Path | None:
        return next((folder / name for name in names if (folder / name).exists()), None)

    has_weights = any(folder.glob("diffusion_pytorch_model*.safetensors*")) and not _is_autoencoder(folder)
    found = {
        "dit": folder if has_weights else first("transformer"),
        "vae": first("Wan2.1_VAE.pth", "vae"),
        "text": first("models_t5_umt5-xxl-enc-bf16.pth", "text_encoder"),
        "tokenizer": first("google/umt5-xxl", "tokenizer"),
    }
    return WanFolder(
        {name: path for name, path in found.items() if path is not None},
        first("transformer/config.json", "config.json"),
    )


def _is_autoencoder(folder: Path) -> bool:
    """Whether a folder is Diffusers' of a VAE, whose weights have the same name as a transformer's."""
    try:
        return str(read_json(folder / "config.json").get("_class_name")).startswith("Autoencoder")
    except ConversionError:
        return False


def find_wan_folder(folder: Path, needed: Collection[str] = tuple(PLACES)) -> WanFolder:
    """Returns where the parts of a Wan2.1 folder lie.

    Args:
      folder: what the user gave.
      needed: the parts that nothing else gives.

    Raises:
      ConversionError: it is no Wan2.1 folder or lacks a part; says which folder was meant if that can be found.
    """
    found = look_into(folder)
    missing = [name for name in PLACES if name in needed and name not in found.parts]
    if found.parts and not missing:
        return found
    above, below, beside = _near(folder)
    worth = functools.partial(_best, needed=needed, held=found.parts)
    # What lies beside the folder may have been meant only if the folder itself says nothing.
    if meant := worth(above) or worth(below):
        hint = _did_you_mean(meant)
    else:
        hint = _way_out(folder, found, missing) or _did_you_mean(worth(beside))
    raise ConversionError(_what_is_wrong(folder, found, missing) + hint)


def is_converted(folder: Path) -> bool:
    """Whether a folder looks like a checkpoint that the converter wrote."""
    return (folder / MANIFEST).is_file()


def _what_is_wrong(folder: Path, found: WanFolder, missing: Collection[str]) -> str:
    if not folder.exists():
        return f"{folder}: no such folder; expected a Wan2.1 folder"
    if not folder.is_dir():
        return f"{folder}: a file; --wan expects a Wan2.1 folder"
    if is_converted(folder):
        return f"{folder}: a converted checkpoint; --wan expects a Wan2.1 folder"
    if found.parts:
        lacks = ", ".join(f"no {PLACES[name].title} ({PLACES[name].files})" for name in missing)
        return f"{folder}: not a complete Wan2.1 folder: {lacks}"
    empty = "" if any(folder.iterdir()) else "; it is empty"
    return (
        f"{folder}: not a Wan2.1 folder; expected diffusion_pytorch_model*.safetensors, Wan2.1_VAE.pth, "
        "models_t5_umt5-xxl-enc-bf16.pth and google/umt5-xxl/, or Diffusers' transformer/, vae/, text_encoder/ "
        f"and tokenizer/{empty}"
    )


def _way_out(folder: Path, found: WanFolder, missing: Collection[str]) -> str:
    """Returns what can be done about a folder when no better one is around it or in it; may be nothing."""
    if is_converted(folder):
        return f"; to use it: svd2 run --checkpoint {shlex.quote(str(folder))}"
    if found.parts:
        options = " ".join(PLACES[name].option for name in missing)
        alone = ", ".join(PLACES[name].option.split()[0] for name in found.parts)
        return (
            f"; download what is missing or give {options}; to convert only what is there, give it with "
            f"{alone} instead of --wan"
        )
    if not folder.exists() and folder.parts[:1] == (_PUBLISHER,):
        return f"; to download it: hf download {folder} --local-dir {folder.name}"
    single = [folder] if folder.suffix in WEIGHT_SUFFIXES and folder.is_file() else weights_below(folder)
    if single:
        names = ", ".join(str(path) for path in single[:MOST_SUGGESTIONS])
        return f"; give the weights of one part ({names}) with --generator, --vae, --text-encoder or --taehv"
    return ""


def _did_you_mean(folders: Collection[Path]) -> str:
    names = " or ".join(f"--wan {shlex.quote(str(folder))}" for folder in islice(folders, MOST_SUGGESTIONS))
    return f"; did you mean {names}?" if names else ""


def _best(folders: Iterable[Path], needed: Collection[str], held: Collection[str]) -> list[Path]:
    """Returns the Wan2.1 folders that lack the fewest of the parts needed, if fewer than a folder with `held`."""
    lacks: dict[Path, int] = {}
    for folder in {os.path.realpath(path): path for path in folders}.values():
        parts = look_into(folder).parts
        if len(parts) >= _FEWEST_PARTS:
            lacks[folder] = len(set(needed) - set(parts))
    fewest = min(lacks.values(), default=0)
    if held and fewest >= len(set(needed) - set(held)):
        return []
    return [folder for folder, count in lacks.items() if count == fewest]


def _near(folder: Path) -> tuple[list[Path], Iterator[Path], Iterator[Path]]:
    """Returns the folders around a folder, in it and beside it, the nearest first."""
    absolute = Path(os.path.abspath(folder))  # not resolved: a link of the user's keeps its name
    parents = absolute.parents
    if ".." not in folder.parts:  # then as the user names them, as far as that goes
        parents = (*folder.parents, *absolute.parents[len(folder.parents) :])
    above = list(parents[:_LEVELS_UP])
    nearest = next((path for path in above if path.is_dir()), absolute)
    in_root = os.path.realpath(nearest) == absolute.anchor  # not all of the disk
    real = Path(os.path.realpath(folder))  # a Hugging Face cache holds links
    above = [*(real.parents[:_LEVELS_UP] if real != absolute else ()), *above]
    return above, folders_below(folder), iter(()) if in_root else folders_below(nearest, _LEVELS_BESIDE)
