"""What was compiled before, kept on disk: a command that ran before neither traces nor compiles when it starts again.

The engine's programs are kept whole, as loaded executables with the shapes of their results. One is found by what it is
made from: function, settings, shapes and where they lie, together with all that decides what becomes of these
(`_surroundings`) and the source of this package. Where only the source has changed, it is traced, lowered and found by
what comes out. Nothing that is found is adapted: a key that is not there means to compile.

All else, mostly single operations, is kept by JAX's own compilation cache, in a folder beside.

Loading a program runs machine code from these folders: who may write there may do anything as the user. They are made
for the user alone.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import logging
import math
import os
import pickle
import re
import threading
import time
import warnings
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
from jax._src.config import persistent_cache_min_compile_time_secs  # for one thread; `jax.config` is for all
from jax.experimental import serialize_executable

from svd2_jax import files
from svd2_jax.errors import MediaError
from svd2_jax.progress import working
from svd2_jax.types import Device

T = TypeVar("T")

CACHE_VARIABLE = "SVD2_CACHE"
MOST_BYTES = 4 * 2**30  # of each layer; beyond, what was not used for longest is removed
LEFT_BEHIND_S = 3600  # a file that is still not whole after this time never will be

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_log = logging.getLogger(__name__)

_PACKAGE = Path(__file__).parents[1]
# All that programs are traced from, and what that calls.
_SOURCES = ("config.py", "hardware.py", "engine", "stream", "models", "diffusion", "nn")
_LIBRARIES = ("jax", "jaxlib", "flax", "einops", "numpy", "ml-dtypes")
_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "NVIDIA_TF32_OVERRIDE")
# Settings of JAX that say where things are kept and what is told of them, not what a program is. The precision of
# products is part of each key by itself.
_NO_MATTER = (
    "compilation_cache", "persistent_cache", "jax_log_", "jax_explain_", "jax_dump_", "jax_logging_level",
    "jax_platforms", "jax_num_cpu_devices", "jax_default_matmul_precision",
)  # fmt: skip


def keep_programs() -> Path | None:
    """Has every program that is compiled from now on kept, and taken from there the next time.

    Does nothing where JAX was told to keep none (`JAX_ENABLE_COMPILATION_CACHE`), and leaves JAX's own cache alone
    where it was told of another place (`JAX_COMPILATION_CACHE_DIR`). From a folder that cannot be written, programs are
    only taken.

    Returns:
      The folder: the environment's `SVD2_CACHE`, else "svd2-jax" where the user's caches are; None if nothing is kept.
    """
    global _store
    _store = None
    if not jax.config.values["jax_enable_compilation_cache"]:
        return None
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        folder = Path(os.environ.get(CACHE_VARIABLE) or f"{caches}/svd2-jax").expanduser()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except (OSError, RuntimeError):  # a user may have no home
        return None
    _store = Store(folder / "engine")
    if jax.config.values["jax_compilation_cache_dir"] or not os.access(folder, os.W_OK):
        return folder
    jax.config.update("jax_compilation_cache_dir", str(folder / "jax"))
    # A limit also makes JAX lock the folder, without which two processes may read what is half written.
    jax.config.update("jax_compilation_cache_max_size", MOST_BYTES)
    # Even the smallest take some 20 ms to compile, and there are hundreds of them.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    # What JAX cannot read it compiles; nobody needs to do anything about it.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache entry")
    return folder


class Store:
    """A folder of pickled values, each under a hexadecimal key; safe for several processes and threads at once."""

    def __init__(self, folder: Path, most_bytes: int = MOST_BYTES):
        self.folder, self._most_bytes = folder, most_bytes

    def read(self, key: str) -> Any:
        """Returns the value of a key; None where there is none, or where it is damaged or another's."""
        path = self._path(key)
        try:
            content = path.read_bytes()
            digest, body = content[:32], content[32:]
            if digest != hashlib.sha256(key.encode() + body).digest():
                return None
            value = pickle.loads(body)
        except Exception as e:  # whatever the file holds, the program can be compiled
            if not isinstance(e, FileNotFoundError):
                _log.info("%s is not used: %s", path, e)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # for `_make_room`
        return value

    def write(self, key: str, value: Any) -> None:
        """Keeps a value, and drops the ones that were not read for longest where it becomes too much."""
        body = pickle.dumps(value, protocol=5)
        try:
            self.folder.mkdir(exist_ok=True, mode=0o700)
            content = hashlib.sha256(key.encode() + body).digest() + body
            files.write_whole(self._path(key), lambda part: part.write_bytes(content))
            self._make_room()
        except (OSError, MediaError) as e:  # read-only or full
            _log.info("%s: nothing is kept: %s", self.folder, e)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.pickle"

    def _make_room(self) -> None:
        held = []
        for entry in os.scandir(self.folder):
            with contextlib.suppress(FileNotFoundError):  # another process makes room as well
                stat = entry.stat()
                if ".part" in entry.name:
                    if time.time() - stat.st_mtime > LEFT_BEHIND_S:
                        os.unlink(entry)
                    continue
                held.append((stat.st_mtime, stat.st_size, entry.path))
        excess = sum(size for _, size, _ in held) - self._most_bytes
        for _, size, path in sorted(held):
            if excess <= 0:
                break
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            excess -= size


_store: Store | None = None
_compiling = threading.local()
_not_by_jax = functools.partial(persistent_cache_min_compile_time_secs, math.inf)


def _note(event: str, **_: Any) -> None:
    # What JAX has loaded cannot be written once more: on a CPU it lacks functions then, and fails when it is called.
    if event == "/jax/compilation_cache/cache_hits":
        _compiling.from_cache = True


jax.monitoring.register_event_listener(_note)


def kept_program(
    name: str,
    what: Hashable,
    args: tuple[Any, ...],
    devices: tuple[Device, ...],
    trace: Callable[[], tuple[jax.stages.Traced, jax.stages.Lowered]],
    options: Mapping[str, Any],
    writable: bool = True,
) -> tuple[Any, Any]:
    """Returns an executable and its results' shapes: as kept, or else compiled, and kept from now on.

    Args:
      name: what people call it.
      what: all that decides the program but the arguments and the devices.
      args: arguments as a tree of ShapeDtypeStruct with shardings.
      devices: those of the program, in order.
      trace: traces and lowers it.
      options: XLA's; part of `what` too.
      writable: whether XLA can write it down; otherwise it is compiled, and nobody tries.
    """
    # A program over several processes has parts in each of them: those may not find it all or none at all. Into JAX's
    # cache process 0 alone writes. On GPUs it must not: XLA tunes such a program in all processes at once, and one that
    # compiles it would wait, for up to 24 h, for one that has found it.
    over_processes = any(d.process_index != jax.process_index() for d in devices)
    store = _store if writable and not over_processes else None
    structure = jax.tree.structure((args, {}))
    identity = None if store is None else _identity(what, structure, _leaves(args), _hardware(devices))
    if store is None or identity is None:
        by_jax = store is None and writable and not (over_processes and devices[0].platform == "gpu")
        with working(f"compiling {name}"), contextlib.nullcontext() if by_jax else _not_by_jax():
            return _compile(trace()[1], options)
    load = functools.partial(_load, store, structure, devices)
    made_from = _digest(identity, _sources())
    with working(f"loading {name}"):
        found = load(store.read(made_from))
    if found is None:
        with working(f"compiling {name}"):
            traced, lowered = trace()
            # The lowered form alone does not tell which arguments it leaves out.
            key = _digest(identity, _ADDRESS.sub("", str(traced.jaxpr)), lowered.as_text())
            found = load(key) or _compile_and_keep(store, key, lowered, options)
        store.write(made_from, key)
    return found


def _load(store: Store, structure: Any, devices: tuple[Device, ...], key: Any) -> tuple[Any, Any] | None:
    """Returns the executable and the results' shapes of a key; None where they are not there or cannot be used."""
    if key is None or (kept := store.read(key)) is None:
        return None
    try:
        results, executable = kept
        return serialize_executable.deserialize_and_load(
            executable, structure, jax.tree.structure(results), devices[0].client, devices
        ), results
    except Exception as e:  # whatever the file holds, the program can be compiled
        _log.info("a kept program is not used: %s", e)
        return None


def _compile(lowered: jax.stages.Lowered, options: Mapping[str, Any]) -> tuple[Any, Any]:
    results = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), lowered.out_info)
    return lowered.compile(dict(options)), results


def _compile_and_keep(
    store: Store, key: str, lowered: jax.stages.Lowered, options: Mapping[str, Any]
) -> tuple[Any, Any]:
    _compiling.from_cache = False
    with _not_by_jax():  # it need not be kept twice
        program, results = _compile(lowered, options)
    if not _compiling.from_cache:
        try:
            executable, _, _ = serialize_executable.serialize(program)
            store.write(key, (results, executable))
        except Exception as e:  # not every backend can
            _log.info("a program is not kept: %s", e)
    return program, results


@functools.lru_cache(maxsize=1024)
def kept_value(function: Callable[..., T], *args: Hashable) -> T:
    """Returns what a function of this package makes of arguments, from before where that was asked before.

    For shapes, which take longer to trace than to read; the function must depend on its arguments alone.
    """
    store = _store
    identity = None if store is None else _identity(function, args)
    if store is None or identity is None:
        return function(*args)
    key = _digest(identity, _sources())
    if (value := store.read(key)) is None:
        value = function(*args)
        store.write(key, value)
    return value


def _identity(*parts: Any) -> str | None:
    """Returns text that only these parts in these surroundings have, in any process; None if a part has none."""
    text = "\n".join([*map(_name, parts), _surroundings()])
    return None if _ADDRESS.search(text) or "<locals>" in text else text


def _digest(*texts: str) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def _name(part: Any) -> str:
    if isinstance(part, tuple):
        return f"({', '.join(map(_name, part))})"
    if isinstance(part, str):
        return part
    if callable(part) and hasattr(part, "__qualname__"):
        return f"{part.__module__}.{part.__qualname__}"
    return repr(part)


_sharding_name = functools.lru_cache(maxsize=1024)(repr)  # there are few, for many arrays


def _leaves(args: Any) -> str:
    return "; ".join(f"{x.dtype} {x.shape} {_sharding_name(x.sharding)}" for x in jax.tree.leaves(args))


def _surroundings() -> str:
    """Returns what all programs of this process depend on, but for this package."""
    settings = sorted(jax.config.values.items())
    set_to = [f"{k}={v}" for k, v in settings if not any(name in k for name in _NO_MATTER)]
    variables = [f"{name}={os.environ.get(name, '')}" for name in _VARIABLES]
    return "\n".join([_libraries(), *variables, *set_to])


@functools.cache
def _sources() -> str:
    digest = hashlib.sha256()
    for name in _SOURCES:
        path = _PACKAGE / name
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(str(file.relative_to(_PACKAGE)).encode())
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


@functools.cache
def _libraries() -> str:
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in _LIBRARIES)


@functools.cache
def _hardware(devices: tuple[Device, ...]) -> str:
    """Returns what devices and machines are told apart by."""
    # What JAX's own cache tells them apart by. Nothing public gives a CPU's instructions, or the version of cuDNN.
    from jax._src.lib import xla_client  # pyright: ignore[reportPrivateImportUsage]

    topology = xla_client.get_topology_for_devices(list(devices)).fingerprint()
    client = devices[0].client
    each = [f"{d.id} {d.process_index} {d.device_kind}" for d in devices]
    return "\n".join([client.platform, client.platform_version, str(topology), *each])
