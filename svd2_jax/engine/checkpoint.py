"""Converted checkpoints on disk: a folder with a manifest, one Orbax item per part, and the tokenizer.

Items are small (one transformer block each), so writing needs memory for one of them and a pipeline stage
reads only its own, straight into its sharding. The folder is written beside its place under another name and
renamed at the end: what has the right name is complete.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import json
import logging
import os
import secrets
import shutil
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import numpy as np

from svd2_jax.config import ModelConfig
from svd2_jax.errors import CheckpointError, ConfigError

FORMAT = "svd2-jax checkpoint"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"

# Leaves are stored in chunks, and chunks gathered into files, of these sizes: what is in flight while writing
# is a few of them. A leaf that is one chunk would be held in memory once more.
CHUNK_BYTES = 32 << 20
DATA_FILE_BYTES = 256 << 20

PARTS = {  # what an item belongs to, by the first part of its name, and the converter's option that gives it
    "dit": ("transformer", "--generator FILE or --wan FOLDER"),
    "vae": ("VAE", "--wan FOLDER or --vae FILE"),
    "text": ("text encoder", "--wan FOLDER or --text-encoder FILE"),
    "taehv": ("TAEHV decoder", "--taehv FILE"),
}

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class SourceFile:
    """A file the checkpoint was made from: its name and SHA-256 in hex."""

    file: str
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds.

    Attributes:
      model: sizes of all networks; those of parts that are absent are the nearest preset's.
      dtype: "bfloat16" or "float32", of every leaf.
      items: names of the items, in order.
      sources: files it was converted from.
      format_version: of the folder's layout.
    """

    model: ModelConfig
    dtype: str
    items: tuple[str, ...]
    sources: tuple[SourceFile, ...] = ()
    format_version: int = FORMAT_VERSION

    def to_json(self) -> str:
        """Returns the text of the manifest file."""
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Reads the manifest's text; raises CheckpointError if it is of another format or damaged."""
        try:
            values = json.loads(text)
        except ValueError as e:
            raise CheckpointError(f"not valid JSON ({e})") from None
        if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
            raise CheckpointError(f"not the manifest of a {FORMAT}")
        version = values.get("format_version")
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"format version {version}, but this program reads version {FORMAT_VERSION}; "
                "convert the weights again"
            )
        try:
            return cls(
                model=ModelConfig.from_dict(values["model"]),
                dtype=str(values["dtype"]),
                items=tuple(values["items"]),
                sources=tuple(SourceFile(**source) for source in values["sources"]),
            )
        except (KeyError, TypeError, AttributeError, ConfigError) as e:
            raise CheckpointError(f"damaged manifest ({type(e).__name__}: {e})") from None


class CheckpointWriter:
    """Writes a checkpoint folder; leaves nothing behind unless `finish` was reached.

    ```
    with CheckpointWriter(path) as writer:
        writer.write_item("dit.embed", tree)
        writer.finish(manifest)
    ```
    """

    def __init__(self, path: str | Path):
        """Checks the place; raises CheckpointError if it is taken or nothing can be made in its parent folder.

        Also in one of several processes: there Orbax writes NumPy arrays in process 0 only.
        """
        self.path = Path(path)
        if jax.distributed.is_initialized():
            raise CheckpointError(
                f"{self.path}: one process writes a checkpoint; start it without the others"
            )
        parent = self.path.parent
        with _readable_errors(self.path):
            if self.path.exists() or self.path.is_symlink():
                raise CheckpointError(f"{self.path} exists; choose another place or remove it first")
            if not parent.exists():
                raise CheckpointError(f"{parent}: no such folder; create it first")
            if not parent.is_dir():
                raise CheckpointError(
                    f"{parent}: a file, but {self.path} is to lie in it; choose another place"
                )
            if not os.access(parent, os.W_OK | os.X_OK):
                raise CheckpointError(f"{parent}: this folder cannot be written to; choose another place")
        self._folder = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}.partial")

    def __enter__(self) -> Self:
        with _readable_errors(self.path):
            self._folder.mkdir()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)  # renamed away if finished

    def write_item(self, name: str, tree: Mapping[str, Any]) -> None:
        """Writes one item, a nested dict of arrays; raises CheckpointError if the disk is full."""
        import orbax.checkpoint as ocp

        save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), tree)
        with _signals_held(), _readable_errors(self.path), _checkpointer() as checkpointer:
            checkpointer.save(
                (self._folder / name).absolute(),
                ocp.args.PyTreeSave(tree, save_args, ocdbt_target_data_file_size=DATA_FILE_BYTES),
            )
            # Orbax's note that it is done: it holds the path of this machine, and nothing reads it. What says that the
            # folder is complete is its name.
            (self._folder / name / "commit_success.txt").unlink(missing_ok=True)

    def add_tokenizer(self, files: Mapping[str, Path]) -> None:
        """Copies the tokenizer's files, target name -> source."""
        with _readable_errors(self.path):
            (self._folder / TOKENIZER).mkdir()
            for name, source in files.items():
                shutil.copyfile(source, self._folder / TOKENIZER / name)

    def finish(self, manifest: Manifest) -> None:
        """Writes the manifest and gives the folder its name."""
        with _readable_errors(self.path):
            (self._folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
            self._folder.rename(self.path)


@dataclass(frozen=True)
class Checkpoint:
    """A converted checkpoint, opened for reading."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Opens a checkpoint folder; raises CheckpointError if missing, unfinished or of another format."""
        path = Path(path).absolute()
        hint = "make one with: svd2 convert --generator model.pt --wan WAN_FOLDER --out CHECKPOINT"
        if not path.exists():
            raise CheckpointError(f"{path}: no such checkpoint; {hint}")
        if not path.is_dir():
            raise CheckpointError(f"{path}: a file, not a converted checkpoint; {hint}")
        try:
            manifest = Manifest.from_json((path / MANIFEST).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(
                f"{path}: no {MANIFEST}; not a converted checkpoint, or an interrupted conversion; {hint}"
            ) from None
        except (OSError, UnicodeDecodeError) as e:
            raise CheckpointError(f"{path}: {MANIFEST} cannot be read ({e})") from None
        except CheckpointError as e:
            raise CheckpointError(f"{path}: {e}") from None
        missing = [item for item in manifest.items if not (path / item).is_dir()]
        if missing:
            raise CheckpointError(
                f"{path}: incomplete, items are missing: {', '.join(missing)}; convert again"
            )
        return cls(path, manifest)

    @property
    def tokenizer_dir(self) -> Path:
        """The folder of the tokenizer's files; raises CheckpointError if the checkpoint has none."""
        folder = self.path / TOKENIZER
        if not folder.is_dir():
            raise CheckpointError(f"{self.path}: no tokenizer; convert again with one in the --wan folder")
        return folder

    def require(self, parts: Iterable[str]) -> None:
        """Raises CheckpointError, with what to do, where a part ("dit", "vae", "text", "taehv") is not there."""
        held = {item.split(".")[0] for item in self.manifest.items}
        for part in parts:
            if part not in held:
                name, source = PARTS[part]
                instead = "use --decoder wan, or " if part == "taehv" else ""
                raise CheckpointError(f"{self.path}: holds no {name}; {instead}convert again with {source}")

    def abstract(self, item: str) -> dict[str, Any]:
        """Returns the item's tree as ShapeDtypeStructs."""
        with self._reading(item) as (checkpointer, folder):
            metadata = checkpointer.metadata(folder).item_metadata
            if metadata is None:  # Orbax logs why and goes on
                raise ValueError("its description cannot be read")
            return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), metadata.tree)

    def restore(self, item: str, sharding: Any = None, dtype: Any = None) -> dict[str, Any]:
        """Returns the item's tree as JAX arrays.

        Args:
          item: one of `manifest.items`.
          sharding: a `jax.sharding.Sharding` for all leaves, or a tree of them; each device reads its own
            part. Default: the first local device.
          dtype: casts while reading (round to nearest); default: as stored.

        Raises:
          CheckpointError: no such item, or its files are damaged.
        """
        import orbax.checkpoint as ocp

        if sharding is None:
            sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        tree = self.abstract(item)
        if isinstance(sharding, jax.sharding.Sharding):
            one = sharding
            sharding = jax.tree.map(lambda _: one, tree)
        restore_args = jax.tree.map(
            lambda leaf, place: ocp.ArrayRestoreArgs(
                sharding=place, dtype=dtype or leaf.dtype, global_shape=leaf.shape
            ),
            tree,
            sharding,
        )
        with self._reading(item) as (checkpointer, folder):
            return checkpointer.restore(folder, ocp.args.PyTreeRestore(tree, restore_args))

    @contextlib.contextmanager
    def _reading(self, item: str) -> Iterator[tuple[Any, Path]]:
        if item not in self.manifest.items:
            self.require([item.split(".")[0]])
            raise CheckpointError(f"{self.path}: holds no item {item!r}; convert again")
        try:
            with _checkpointer() as checkpointer:
                yield checkpointer, self.path / item
        except Exception as e:
            # Orbax raises its bare class for a damaged file, with pages of detail and the reason as cause; an
            # exception of a kind of its own is a defect of ours.
            if type(e) is not Exception and not isinstance(e, (ValueError, OSError, KeyError)):
                raise
            reason = _first_line(e.__cause__ or e)
            raise CheckpointError(f"{self.path}: {item} is damaged ({reason}); convert again") from e


@contextlib.contextmanager
def _checkpointer() -> Iterator[Any]:
    """Yields an Orbax checkpointer that neither copies what it writes, nor logs, nor waits for other processes."""
    import orbax.checkpoint as ocp

    # Else every restore ends in a barrier of all processes, but each process reads items of its own.
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me})
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # what fails is raised as well
    try:
        with ocp.Checkpointer(_handler(), multiprocessing_options=alone) as checkpointer:
            yield checkpointer
    finally:
        logger.setLevel(level)


def _handler() -> Any:
    """Returns Orbax's handler of trees with our ways of writing NumPy arrays and of reading."""
    import orbax.checkpoint as ocp
    from orbax.checkpoint import type_handlers

    class Writer(type_handlers.NumpyHandler):
        """Lets a leaf that failed wait for the others: Orbax closes the event loop under their feet else."""

        running = 0

        async def _open_and_write(self, *args: Any, **kwargs: Any) -> None:
            self.running += 1
            failed = True
            try:
                await super()._open_and_write(*args, **kwargs)
                failed = False
            finally:
                self.running -= 1
                while failed and self.running:
                    await asyncio.sleep(0.01)

    class Reader(type_handlers.ArrayHandler):
        """Lets the other leaves finish when one fails, for the same reason."""

        async def deserialize(self, infos: Any, args: Any = None) -> Any:
            read = super().deserialize
            single = [read([info], [arg]) for info, arg in zip(infos, args, strict=True)]
            leaves = []
            for result in await asyncio.gather(*single, return_exceptions=True):
                if isinstance(result, BaseException):
                    raise result
                leaves += result
            return leaves

    registry = type_handlers.create_type_handler_registry(
        # The stock handler copies every array first, in case the caller changes it meanwhile. We wait.
        (np.ndarray, Writer(deepcopy_host_arrays=False)),
        (jax.Array, Reader()),
    )
    # Uncompressed: trained weights shrink little, and a stream should start fast.
    return ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=registry)


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Lets what interrupts the program wait; Orbax's threads would go on writing into a folder that is removed."""
    if threading.current_thread() is not threading.main_thread():  # signals are handled there
        yield
        return
    came: list[int] = []
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    handled = [number for number, handler in before.items() if callable(handler)]
    for number in handled:
        signal.signal(number, lambda number, _: came.append(number))
    try:
        yield
    finally:
        for number in handled:
            signal.signal(number, before[number])
        if came:
            signal.raise_signal(came[0])


@contextlib.contextmanager
def _readable_errors(path: Path) -> Iterator[None]:
    """Turns a failed write into one line; Orbax reports a full disk as ValueError with the system's text."""
    try:
        yield
    except (OSError, ValueError) as e:
        if any(os.strerror(number) in str(e) for number in _DISK_FULL):
            raise CheckpointError(
                f"{path}: the disk is full (or a size limit was reached); nothing was kept. Free some space "
                "or choose another place"
            ) from e
        if isinstance(e, OSError):
            raise CheckpointError(f"{path}: cannot be written ({_first_line(e)}); nothing was kept") from e
        raise


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
