"""What every test runs under: CPU with eight virtual devices, strict types, full precision."""

import ctypes
import gc
import os

# XLA reads these when the backend starts, which no import of ours does.
os.environ["JAX_PLATFORMS"] = "cpu"
# Most of the tests' time goes into compiling: at level 0 it takes half as long, and the programs are the same but for
# what LLVM makes of them. XLA_FLAGS=--xla_backend_optimization_level=3 tests what users run.
os.environ["XLA_FLAGS"] = (
    f"--xla_backend_optimization_level=0 {os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
)

from pathlib import Path

# Of all workers and of the commands they start: most tests want the same few programs.
os.environ["SVD2_CACHE"] = str(Path(__file__).parents[1] / ".pytest_cache" / "programs")

import jax
import pytest

from svd2_jax.engine import programs
from svd2_jax.engine.kept_programs import keep_programs

MOST_MAPS = 3000

keep_programs()

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(scope="module", autouse=True)
def no_hoard_of_programs():
    """Lets go of a module's programs: each has dozens of memory maps, and Linux gives a process 65 530 in all.

    Long before that, compiling takes ten times as long; then the process crashes. A thousand maps are 150 MB as well,
    which the C library would keep for later.
    """
    yield
    if (maps := Path("/proc/self/maps")).exists() and maps.read_bytes().count(b"\n") > MOST_MAPS:
        programs._compile_once.cache_clear()
        jax.clear_caches()
        gc.collect()
        if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc's
            trim(0)


@pytest.fixture(scope="session")
def golden_folder() -> Path:
    """The reference's recorded outputs and the weights they were made with."""
    return Path(__file__).parent / "goldens"


@pytest.fixture(scope="session")
def golden_checkpoint(golden_folder, tmp_path_factory) -> Path:
    """The golden weights, converted to float32."""
    from convert import convert_checkpoint

    return convert_checkpoint(
        out=tmp_path_factory.mktemp("golden") / "checkpoint",
        generator=golden_folder / "wan_causal" / "model.pt",
        wan=golden_folder / "wan_models" / "Wan2.1-T2V-tiny",
        dtype="float32",
        progress=False,
    )


@pytest.fixture(scope="session")
def engine(golden_checkpoint):
    """The golden model on one device."""
    from svd2_jax.engine.engine import DeviceEngine

    return DeviceEngine.from_checkpoint(golden_checkpoint)


@pytest.fixture
def svd2(capsys):
    """Runs a command as a user types it; returns its exit code, standard output and standard error."""
    from svd2_jax import cli

    def run(*args: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = cli.main([str(a) for a in args])
        except SystemExit as e:  # argparse
            code = e.code if isinstance(e.code, int) else 1
        return code, *capsys.readouterr()

    return run
