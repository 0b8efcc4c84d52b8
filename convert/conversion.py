"""The conversion itself: find the parts, audit them all, then write one item at a time."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from tqdm import tqdm

from convert.components import COMPONENTS, FoundComponent, model_config, recognise
from convert.inputs import Problems, open_inputs, open_writer
from convert.rules import Leaf
from convert.source import Source, Tensor, sha256
from convert.wan_folder import look_into
from svd2_jax.config import ModelConfig
from svd2_jax.engine.checkpoint import PARTS, CheckpointWriter, Manifest, SourceFile
from svd2_jax.errors import ConversionError

DTYPES: Mapping[str, np.dtype] = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
}
CAST_PIECE_BYTES = 64 << 20

PathLike = str | Path


def convert_checkpoint(
    *,
    out: PathLike,
    generator: PathLike | None = None,
    wan: PathLike | None = None,
    taehv: PathLike | None = None,
    vae: PathLike | None = None,
    text_encoder: PathLike | None = None,
    tokenizer: PathLike | None = None,
    dtype: str = "bfloat16",
    progress: bool = True,
) -> Path:
    """Converts weights into a checkpoint folder and returns its path.

    Every weight path is a torch zip file, a safetensors file, an index of shards or a folder that holds one
    of these. A `wan` folder must hold all parts that nothing else gives. Without one, parts that are not given are
    left out; the manifest lists what is there.

    Args:
      out: the folder to make; must not exist.
      generator: the transformer's weights; without it those of the `wan` folder are used.
      wan: a Wan2.1 folder, in Wan's own layout or in Diffusers'.
      taehv: the tiny decoder's weights.
      vae: the VAE's weights, instead of those of the `wan` folder.
      text_encoder: the UMT5 encoder's weights, instead of those of the `wan` folder.
      tokenizer: the folder of the tokenizer, instead of that of the `wan` folder.
      dtype: "bfloat16" or "float32", of every leaf.
      progress: whether to show a progress bar on standard error.

    Raises:
      ConversionError: a source is missing, damaged, unsafe or of another model; all problems are listed.
      CheckpointError: `out` is taken or cannot be written. Nothing is left behind in either case.
    """
    if dtype not in DTYPES:
        raise ConversionError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    options = {
        "--generator": generator,
        "--wan": wan,
        "--taehv": taehv,
        "--vae": vae,
        "--text-encoder": text_encoder,
        "--tokenizer": tokenizer,
    }
    problems = Problems()
    paths = _given_paths(options, out, problems)
    weights = {name: paths[c.option] for name, c in COMPONENTS.items() if c.option in paths}
    inputs = open_inputs(weights, paths.get("--wan"), paths.get("--tokenizer"), problems)
    writer = problems.caught(open_writer, Path(out), paths.values(), inputs.folders) if out else None
    problems.raise_all()
    assert writer is not None
    parts = _recognise_all(inputs.sources, inputs.settings)
    model = model_config({name: part.config for name, part in parts.items()})
    if progress:
        for note in _notes(parts, paths, bool(inputs.tokenizer)):
            print(f"note: {note}", file=sys.stderr)
    with writer:
        _write(writer, model, inputs.sources, parts, dtype, inputs.tokenizer, progress)
    return writer.path


def _given_paths(
    options: Mapping[str, PathLike | None], out: PathLike, problems: Problems
) -> dict[str, Path]:
    """Returns the paths that were given, by option; notes where none or an empty one was."""
    if all(path is None for option, path in options.items() if option != "--tokenizer"):
        problems.add("nothing to convert; give --generator, --wan or both")
    for option, path in (*options.items(), ("--out", out)):
        if path == "":  # a shell's variable that is not set; Path would make it the current folder
            problems.add(f"{option} is empty; expected a path")
    return {option: Path(path) for option, path in options.items() if path}


def _notes(parts: Mapping[str, FoundComponent], paths: Mapping[str, Path], tokenizer: bool) -> Iterator[str]:
    """Says, before hours of work, what `svd2 run` will miss in this checkpoint."""
    for name in ("dit", "vae", "text"):
        if name not in parts:
            title, source = PARTS[name]
            yield f"no {title} is given; a stream needs it: {source}"
    if not tokenizer:
        yield "no tokenizer is given; a stream needs it: --wan FOLDER or --tokenizer FOLDER"
    generator = paths.get("--generator")
    if generator and "--wan" not in paths and len(look_into(generator).parts) > 1:
        yield f"{generator} is a Wan2.1 folder; to convert its other parts as well: --wan {generator}"
    if "dit" in parts and not generator:
        yield "without --generator the base transformer is converted, which was not distilled to few steps"


def _recognise_all(sources: Mapping[str, Source], settings: Mapping[str, Any]) -> dict[str, FoundComponent]:
    """Returns every part; raises one ConversionError that lists the problems of all of them."""
    unlike = Problems()
    parts = {
        name: part
        for name, source in sources.items()
        if (part := unlike.caught(lambda n=name, s=source: recognise(n, s, settings if n == "dit" else {})))
    }
    unlike.raise_all()
    problems = [line for part in parts.values() for line in part.problems]
    if problems:
        count = "one problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise ConversionError("\n  ".join([f"the weights do not fit the model, {count}:", *problems]))
    return parts


def _write(
    writer: CheckpointWriter,
    model: ModelConfig,
    sources: Mapping[str, Source],
    parts: Mapping[str, FoundComponent],
    dtype: str,
    tokenizer_files: Mapping[str, Path],
    progress: bool,
) -> None:
    items = {item: leaves for part in parts.values() for item, leaves in part.items.items()}
    files = dict.fromkeys(file for source in sources.values() for file in source.files)
    itemsize = DTYPES[dtype].itemsize
    total = sum(f.stat().st_size for f in files) + sum(
        leaf.tensor.size * itemsize for leaves in items.values() for leaf in leaves
    )
    with tqdm(total=total, unit="B", unit_scale=True, disable=not progress) as bar:
        hashes = []
        for file in files:
            bar.set_description(f"checksum {file.name}")
            hashes.append(SourceFile(file.name, sha256(file, bar.update)))
        for item, leaves in items.items():
            bar.set_description(item)
            writer.write_item(item, _tree(leaves, DTYPES[dtype]))
            for leaf in leaves:
                leaf.tensor.release()
                bar.update(leaf.tensor.size * itemsize)
    if tokenizer_files:
        writer.add_tokenizer(tokenizer_files)
    writer.finish(Manifest(model, dtype, tuple(items), tuple(hashes)))


def _tree(leaves: list[Leaf[Tensor]], dtype: np.dtype) -> dict[str, Any]:
    """Returns an item's nested dict of arrays of `dtype`; they may still be views of the source file."""
    tree: dict[str, Any] = {}
    for leaf in leaves:
        *folders, name = leaf.path
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[name] = read_leaf(leaf.tensor, leaf.transform, dtype)
    return tree


def read_leaf(tensor: Tensor, transform: Callable[[np.ndarray], np.ndarray], dtype: np.dtype) -> np.ndarray:
    """Returns the transformed tensor in `dtype`, rounded to nearest.

    A tensor that has the dtype already stays a view of the file, in whatever order the transform gave it.
    Otherwise it is cast in pieces and what was read is given back after each, so that the memory needed is
    that of the result.
    """
    leaf = transform(tensor.view())
    if leaf.dtype == dtype and leaf.flags.aligned:
        return leaf
    cast = np.empty(leaf.shape, dtype)
    for piece in _pieces(leaf):
        cast[piece] = leaf[piece]
        tensor.release()
    return cast


def _pieces(array: np.ndarray) -> Iterator[tuple[slice, ...]]:
    """Yields slices that cover an array in memory order, each of about CAST_PIECE_BYTES."""
    if array.ndim == 0 or array.nbytes <= CAST_PIECE_BYTES:
        yield (slice(None),) * array.ndim
        return
    axis = int(np.argmax(np.abs(array.strides)))
    step = max(1, array.shape[axis] * CAST_PIECE_BYTES // array.nbytes)
    for start in range(0, array.shape[axis], step):
        yield tuple(slice(start, start + step) if a == axis else slice(None) for a in range(array.ndim))
