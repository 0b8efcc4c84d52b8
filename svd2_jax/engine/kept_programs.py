"""What was compiled before, kept on disk: a command that ran before neither traces nor compiles when it starts again.

There are two layers in one folder:

- The engine's programs, and the shapes they are made for, are kept whole and found by what they are made from:
  function, settings, shapes and where they lie, together with all that decides what becomes of these (`_ground`). A
  key that is missing or different means to compile; nothing that is found is ever adapted.
- All else is kept by JAX's own compilation cache, which finds a program by its lowered form. This also serves the
  engine's programs where only their source has changed and they came out the same.

Loading a program runs machine code from the folder: who may write there may do anything as the user. It is made for the
user alone.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import logging
import os
import pickle
import platform
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
from jax.experimental import serialize_executable

from svd2_jax import files
from svd2_jax.errors import MediaError
from svd2_jax.types import Device

T = TypeVar("T")

CACHE_VARIABLE = "SVD2_CACHE"
MOST_BYTES = 4 * 2**30  # of each layer; beyond, what was not used for longest is removed
LEFT_BEHIND_S = 3600  # a file that is still not whole after this time never will be

_log = logging.getLogger(__name__)

_PACKAGE = Path(__file__).parents[1]
_SOURCES = ("config.py", "hardware.py", "engine", "stream", "models", "diffusion", "nn")  # all that programs are traced from
_LIBRARIES = ("jax", "jaxlib", "flax", "einops", "numpy", "ml-dtypes")  # and what that calls
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
    caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    folder = Path(os.environ.get(CACHE_VARIABLE) or caches / "svd2-jax")
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError:
        return None
    _store = Store(folder / "engine")
    if jax.config.values["jax_compilation_cache_dir"] or not os.access(folder, os.W_OK):
        return folder
    jax.config.update("jax_compilation_cache_dir", str(folder / "jax"))
    # A limit also makes JAX lock the folder, without which two processes may read what is half written.
    jax.config.update("jax_compilation_cache_max_size", MOST_BYTES)
    # Even the smallest take some 20 ms to compile, and there are hundreds of them.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    return folder


class Store:
    """A folder of pickled values under hashed names; safe for several processes and threads at once."""

    def __init__(self, folder: Path, most_bytes: int = MOST_BYTES):
        self.folder, self._most_bytes = folder, most_bytes

    def read(self, key: str) -> Any:
        """Returns the value of a key; None where there is none, or where it is damaged or another's."""
        path = self._path(key)
        try:
            content = path.read_bytes()
            digest, body = content[:32], content[32:]
            if digest != hashlib.sha256(body).digest():
                return None
            found, value = pickle.loads(body)
            if found != key:
                return None
        except Exception as e:  # whatever the file holds, the program can be compiled
            if not isinstance(e, FileNotFoundError):
                _log.info("%s is not used: %s", path, e)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # for `_make_room`
        return value

    def write(self, key: str, value: Any) -> None:
        """Keeps a value, and drops the ones that were not read for longest where it becomes too much."""
        body = pickle.dumps((key, value), protocol=5)
        try:
            self.folder.mkdir(exist_ok=True, mode=0o700)
            content = hashlib.sha256(body).digest() + body
            files.write_whole(self._path(key), lambda part: part.write_bytes(content))
            self._make_room()
        except (OSError, MediaError) as e:  # read-only or full
            _log.info("%s: nothing is kept: %s", self.folder, e)

    def _path(self, key: str) -> Path:
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:40]}.pickle"

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


def _note(event: str, **_: Any) -> None:
    # What JAX has loaded cannot be written once more: on a CPU it lacks functions then, and fails when it is called.
    if event == "/jax/compilation_cache/cache_hits":
        _compiling.from_cache = True


jax.monitoring.register_event_listener(_note)


def kept_program(
    what: Hashable, args: tuple[Any, ...], devices: Sequence[Device], build: Callable[[], tuple[Any, Any]]
) -> tuple[Any, Any]:
    """Returns an executable and its results' shapes: as kept, or else built and kept from now on.

    Args:
      what: all that decides the program but the arguments.
      args: arguments as a tree of ShapeDtypeStruct with shardings.
      devices: those of the program, in order.
      build: compiles; the shapes it returns carry no sharding.
    """
    store, client = _store, devices[0].client
    # A program over several processes has parts in each of them: those may not find it all or none at all.
    if store is None or any(d.process_index != jax.process_index() for d in devices):
        return build()
    structure = jax.tree.structure((args, {}))
    key = _key(what, structure, _leaves(args), _ground(), _hardware(devices))
    if key is None:
        return build()
    if (found := store.read(key)) is not None:
        try:
            results, executable = found
            return serialize_executable.deserialize_and_load(
                executable, structure, jax.tree.structure(results), backend=client, execution_devices=devices
            ), results
        except Exception as e:  # as in `read`
            _log.info("%s is compiled anew: %s", what, e)
    _compiling.from_cache = False
    program, results = build()
    if _compiling.from_cache:
        return program, results
    try:
        executable, _, _ = serialize_executable.serialize(program)
        store.write(key, (results, executable))
    except Exception as e:  # not every backend can
        _log.info("%s is not kept: %s", what, e)
    return program, results


def kept_value(function: Callable[..., T], *args: Hashable) -> T:
    """Returns what a function of this package makes of arguments, from before where that was asked before.

    For shapes, which take longer to trace than to read; the function must depend on its arguments alone.
    """
    store = _store
    key = None if store is None else _key(function, args, _ground())
    if store is None or key is None:
        return function(*args)
    if (value := store.read(key)) is None:
        value = function(*args)
        store.write(key, value)
    return value


def _key(*parts: Any) -> str | None:
    """Returns a text that tells these from all others, in every process; None where a part has no such text."""
    text = "\n".join(_name(part) for part in parts)
    return None if " at 0x" in text or "<locals>" in text else text


def _name(part: Any) -> str:
    if isinstance(part, tuple):
        return f"({', '.join(map(_name, part))})"
    if callable(part) and hasattr(part, "__qualname__"):
        return f"{part.__module__}.{part.__qualname__}"
    return repr(part)


def _leaves(args: Any) -> str:
    named: dict[Any, str] = {}

    def name(sharding: Any) -> str:
        if sharding not in named:
            named[sharding] = repr(sharding)
        return named[sharding]

    return "; ".join(f"{x.dtype} {x.shape} {name(x.sharding)}" for x in jax.tree.leaves(args))


def _ground() -> str:
    """Returns what all programs of this process depend on."""
    settings = sorted(jax.config.values.items())
    told = [f"{k}={v}" for k, v in settings if not any(name in k for name in _NO_MATTER)]
    variables = [f"{name}={os.environ.get(name, '')}" for name in _VARIABLES]
    return "\n".join([_sources(), _libraries(), *variables, *told])


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


def _hardware(devices: Sequence[Device]) -> str:
    client = devices[0].client
    each = [f"{d.id} {d.process_index} {d.device_kind}" for d in devices]
    return "\n".join([client.platform, client.platform_version, _topology(tuple(devices)), *each])


@functools.cache
def _topology(devices: tuple[Device, ...]) -> str:
    """Returns what JAX's own cache tells machines apart by, and which instructions this one's processor has."""
    from jax._src.lib import xla_client  # nothing public gives the version of cuDNN, for instance

    fingerprint = xla_client.get_topology_for_devices(list(devices)).fingerprint()
    return f"{fingerprint} {_processor() if devices[0].platform == 'cpu' else ''}"


@functools.cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    kept = [line for line in lines if line.startswith(("model", "flags", "Features", "CPU "))]
    return hashlib.sha256("\n".join(kept).encode()).hexdigest()
