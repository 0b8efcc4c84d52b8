"""Runs every golden file of a folder."""

from __future__ import annotations

import dataclasses
import re
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from svd2_jax.config import Storage
from svd2_jax.engine.engine import DeviceEngine
from svd2_jax.engine.mesh import stage_meshes
from svd2_jax.engine.policy import checked_dtype, matmul_precision
from svd2_jax.errors import ConfigError, Svd2Error
from svd2_jax.progress import working
from svd2_jax.verify import parts, streams
from svd2_jax.verify.check import Check

TOLERANCES = {
    # float32: the goldens' own; others: measured on tests/goldens, about twice the error seen there. What is held in
    # 8 bits adds its own.
    "flow_match": {"float32": 1e-6, "bfloat16": 1e-6},
    "noise_controller": {"float32": 1e-6, "bfloat16": 1e-6},
    "block_balance": {"float32": 1e-9, "bfloat16": 1e-9},
    "umt5": {"float32": 5e-5, "bfloat16": 0.25},
    "vae": {"float32": 5e-5, "bfloat16": 0.1},
    "taehv": {"float32": 5e-5, "bfloat16": 0.1},
    "latent stream": {
        "float32": 5e-5, "bfloat16": 0.1,
        "weights int8": 0.1, "weights fp8": 0.4, "cache int8": 0.045, "cache fp8": 0.3,
    },
    "end to end": {
        "float32": 5e-4, "bfloat16": 0.1,
        "weights int8": 0.03, "weights fp8": 0.14, "cache int8": 0.003, "cache fp8": 0.012,
    },
}  # fmt: skip


# What a damaged, cut or incomplete golden file raises; TypeError: an array of a shape that was not compiled.
_UNREADABLE = (
    Svd2Error,
    OSError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    zipfile.BadZipFile,
    zlib.error,
)


@dataclass(frozen=True)
class GoldenResult:
    """Result of one golden file.

    Attributes:
      name: the file's name.
      error: largest deviation found.
      relative_error: root mean square of all deviations, as a share of that of the recorded numbers.
      tolerance: largest deviation allowed.
      problems: deviations that have no size (a wrong token, a wrong ring order, an unreadable file).
      seconds: time taken, compilation included.
    """

    name: str
    error: float
    tolerance: float
    problems: tuple[str, ...] = ()
    seconds: float = 0.0
    relative_error: float = 0.0

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance and not self.problems

    def line(self) -> str:
        """Returns the outcome as one line of a report."""
        verdict = "pass" if self.passed else "FAIL"
        problems = "".join(f"; {p}" for p in self.problems)
        return (
            f"{verdict}  {self.name:34s} max error {self.error:.2e}  tolerance {self.tolerance:.0e}{problems}"
        )


def verify(
    folder: Path,
    dtype: str = "float32",
    stages: int = 1,
    weight_dtype: Storage | None = None,
    cache_dtype: Storage | None = None,
) -> Iterator[GoldenResult]:
    """Converts the weights in a golden folder and yields the outcome of every golden file in it.

    Args:
      folder: laid out like `tests/goldens/`.
      dtype: "float32", or "bfloat16" with looser tolerances.
      stages: of the pipeline that the streams run on.
      weight_dtype: "int8" or "fp8" for what the transformer's linear layers are held in, also with looser tolerances.
      cache_dtype: the same for the streams' caches.

    Raises:
      ConfigError: the folder is missing or holds no golden file; fewer devices or blocks than stages.
      ConversionError: its weights cannot be converted.
    """
    precision = matmul_precision(checked_dtype(dtype))
    files, (mesh,) = golden_files(folder), stage_meshes(1, stages)
    with tempfile.TemporaryDirectory() as scratch, jax.default_matmul_precision(precision):
        with working("converting the weights"):
            checkpoint = _convert(folder, Path(scratch), dtype)
        engine = DeviceEngine.from_checkpoint(checkpoint, dtype, mesh=mesh, weight_dtype=weight_dtype)
        for file in files:
            with working(f"computing {file.name}"):
                outcome = _run(engine, file, cache_dtype or "compute")
            yield outcome


def golden_files(folder: Path) -> list[Path]:
    """Returns the golden files of a folder, sorted; raises ConfigError where there is none."""
    if not folder.is_dir():
        raise ConfigError(f"{folder}: expected a folder of golden files; there is none")
    files = [f for f in sorted(folder.iterdir()) if f.suffix == ".npz" or f.name == "block_balance.json"]
    if not files:
        raise ConfigError(f"{folder}: expected golden files (*.npz), found none")
    return files


def _convert(folder: Path, scratch: Path, dtype: str) -> Path:
    from convert import convert_checkpoint  # the converter is a consumer of this package, not a part of it

    generators = sorted(folder.glob("*/model.pt"))
    wan = sorted(p.parent for p in folder.glob("wan_models/*/config.json"))
    if not wan:
        raise ConfigError(f"{folder}: expected a Wan folder wan_models/*/config.json")
    out = scratch / "checkpoint"
    return convert_checkpoint(
        out=out, generator=generators[0] if generators else None, wan=wan[0], dtype=dtype, progress=False
    )


def _run(engine: DeviceEngine, file: Path, cache_dtype: Storage) -> GoldenResult:
    started, check = time.monotonic(), Check(cache_dtype)
    kind, function = _kind(file)
    try:
        function(engine, check, file)
    except _UNREADABLE as e:
        check.problems.append(f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else 'no message'}")
    reasons = (engine.dtype.name, f"weights {engine.model.dit.weight_dtype}", f"cache {cache_dtype}")
    tolerance = sum(TOLERANCES.get(kind, {}).get(reason, 0.0) for reason in reasons)
    seconds = time.monotonic() - started
    return GoldenResult(
        file.stem, check.error, tolerance, tuple(check.problems), seconds, check.relative_error
    )


def _kind(file: Path) -> tuple[str, Callable[[DeviceEngine, Check, Path], None]]:
    for pattern, kind, function in _KINDS:
        if re.fullmatch(pattern, file.stem):
            return kind, function
    return "unknown", _unknown


def _unknown(engine: DeviceEngine, check: Check, file: Path) -> None:
    raise ConfigError(f"unknown kind of golden file; known are {', '.join(k for _, k, _ in _KINDS)}")


_KINDS: tuple[tuple[str, str, Callable[[DeviceEngine, Check, Path], None]], ...] = (
    (r"flow_match.*", "flow_match", parts.check_flow_match),
    (r"noise_controller.*", "noise_controller", parts.check_noise_controller),
    (r"block_balance.*", "block_balance", parts.check_block_balance),
    (r"umt5.*", "umt5", parts.check_umt5),
    (r"vae.*", "vae", parts.check_vae),
    (r"taehv.*", "taehv", parts.check_taehv),
    (r"(stream|sequential)_.*", "latent stream", streams.check_latent_stream),
    (r"e2e_.*", "end to end", streams.check_end_to_end),
)


def report(outcomes: list[GoldenResult], dtype: str) -> dict[str, Any]:
    """Returns the outcomes with what they were computed on, as plain values for JSON."""
    device = jax.devices()[0]
    return {
        "passed": all(o.passed for o in outcomes),
        "dtype": dtype,
        "device": device.device_kind,
        "platform": device.platform,
        "jax": jax.__version__,
        "goldens": [{**dataclasses.asdict(o), "passed": o.passed} for o in outcomes],
    }
