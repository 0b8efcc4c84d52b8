"""Finds the weight files at a path and opens them, whatever their format."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from convert.read_safetensors import looks_like_safetensors, read_safetensors
from convert.read_torch import read_torch
from convert.source import MappedFile, Source, Tensor
from svd2_jax.errors import ConversionError

INDEX_SUFFIX = ".safetensors.index.json"
WEIGHT_SUFFIXES = (".pt", ".pth", ".ckpt", ".safetensors")
MOST_SUGGESTIONS = 3  # of paths that may have been meant
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")

_ZIP_MAGIC = b"PK\x03\x04"
_LEGACY_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9\x20j\xa8P\x19."  # a pickled magic number
_LFS_POINTER = b"version https://git-lfs"
_HEAD_BYTES = 64
_MOST_FOLDERS = 500  # of each level; a home folder may have been given
_SHARD_NUMBER = re.compile(r"-(\d+)-of-(\d+)\.safetensors$")


def read_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file; raises ConversionError if it is missing or not one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise ConversionError(f"{path}: cannot be read ({e.strerror})") from None
    except ValueError as e:
        raise ConversionError(f"{path}: not valid JSON ({e})") from None
    if not isinstance(content, dict):
        raise ConversionError(f"{path}: expected a JSON object")
    return content


def open_weights(path: Path) -> Source:
    """Opens a weight file, or the weight files of a folder, without reading tensor data.

    A folder holds `model.pt`, or one set of safetensors files, sharded or not.
    Raises ConversionError with the reason if anything is missing, cut short or of another format.
    """
    files = weight_files(path)
    pairs = tuple(pair for file in files for pair in _read(file).items())
    label = files[0].name if len(files) == 1 else f"{path.name}/ ({len(files)} shards)"
    return Source(label, pairs, files)


def weight_files(path: Path) -> tuple[Path, ...]:
    """Returns the files that hold the weights at `path`; raises ConversionError if one is missing."""
    if not path.exists():
        raise ConversionError(f"{path}: no such file or folder")
    if path.is_file():
        shard = _SHARD_NUMBER.search(path.name)
        if shard and int(shard[2]) > 1:
            raise ConversionError(
                f"{path}: one of {int(shard[2])} shards; give the folder that holds all of them: {path.parent}"
            )
        return _index_files(path) if path.name.endswith(INDEX_SUFFIX) else (path,)
    if (path / "model.pt").is_file():
        return (path / "model.pt",)
    indices = sorted(path.glob("*" + INDEX_SUFFIX))
    if len(indices) > 1:
        raise ConversionError(f"{path}: several indices, give one: {', '.join(i.name for i in indices)}")
    if indices:
        return _index_files(indices[0])
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise ConversionError(f"{path}: holds no weights; expected model.pt or *.safetensors")
    _check_shard_numbers(files)
    return tuple(files)


def weights_below(folder: Path) -> list[Path]:
    """Returns what may be given as weights in a folder or deeper: files, or folders of shards; the nearest first."""
    found: dict[Path, None] = {}
    for path in (folder, *folders_below(folder)):
        for file in sorted(f for suffix in WEIGHT_SUFFIXES for f in path.glob(f"*{suffix}")):
            found[path if _SHARD_NUMBER.search(file.name) else file] = None
    return list(found)


def did_you_mean(paths: Sequence[Path]) -> str:
    """Returns the end of a message that names the paths that may have been meant, or nothing."""
    names = " or ".join(str(path) for path in paths[:MOST_SUGGESTIONS])
    return f"; did you mean {names}?" if names else ""


def folders_below(folder: Path, levels: int = 4) -> Iterator[Path]:
    """Yields the folders in a folder, level by level; hidden ones are left out.

    Four levels lead from huggingface/ to hub/models--NAME/snapshots/HASH.
    """
    level = [folder]
    for _ in range(levels):
        level = list(islice((sub for path in level for sub in _subfolders(path)), _MOST_FOLDERS))
        yield from level


def _subfolders(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith(".") and path.is_dir())
    except OSError:  # no folder, or not ours to read
        return []


def _index_files(index: Path) -> tuple[Path, ...]:
    """Returns the shards that an index lists; raises ConversionError if one is missing."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise ConversionError(f"{index}: not an index of safetensors shards (no weight_map)")
    names = sorted(set(weight_map.values()))
    outside = [n for n in names if Path(n).name != n]
    missing = [n for n in names if not (index.parent / n).is_file()]
    if outside or missing:
        raise ConversionError(f"{index}: shards are missing: {', '.join(outside or missing)}")
    return tuple(index.parent / n for n in names)


def _check_shard_numbers(files: Sequence[Path]) -> None:
    """Raises ConversionError unless files numbered like -00001-of-00006 are all there, and nothing else."""
    numbers = [m and (int(m[1]), int(m[2])) for m in (_SHARD_NUMBER.search(f.name) for f in files)]
    if len(files) == 1 and numbers[0] in (None, (1, 1)):
        return
    if numbers != [(i + 1, len(files)) for i in range(len(files))]:
        raise ConversionError(
            f"{files[0].parent}: its safetensors files are not one complete set: "
            f"{', '.join(f.name for f in files)}"
        )


def _read(path: Path) -> dict[str, Tensor]:
    file = MappedFile(path)
    head = file.map[:_HEAD_BYTES]
    if head.startswith(_ZIP_MAGIC):
        return read_torch(file)
    if looks_like_safetensors(head):
        return read_safetensors(file)
    if head.startswith(_LEGACY_MAGIC):
        raise ConversionError(
            f"{path}: the old torch format (before PyTorch 1.6), which cannot be mapped; re-save it with "
            "PyTorch: torch.save(torch.load(FILE, map_location='cpu'), NEW_FILE)"
        )
    if head.startswith(_LFS_POINTER):
        raise ConversionError(f"{path}: a Git LFS pointer, not the file itself; fetch it with: git lfs pull")
    raise ConversionError(f"{path}: not a checkpoint; expected a torch zip file or a safetensors file")
