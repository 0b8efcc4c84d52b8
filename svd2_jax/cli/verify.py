"""`svd2 verify`: check the numbers against the reference's.

example:
  svd2 verify tests/goldens
  svd2 verify tests/goldens --dtype bfloat16 --json report.json
  svd2 verify tests/goldens --weight-dtype int8 --cache-dtype int8
  XLA_FLAGS=--xla_force_host_platform_device_count=4 svd2 verify tests/goldens --stages 4

Converts the weights found in the folder, runs every golden file there is through the same programs that
`svd2 run` uses, and prints one line each. Exit code 1 if any fails.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from svd2_jax import files, progress
from svd2_jax.cli import device
from svd2_jax.cli.options import WEIGHT_DTYPE, DType, EightBits, OptionGroup, check_reports, option, say
from svd2_jax.command import EXIT_FAILED
from svd2_jax.text import held_in


@dataclass(frozen=True, kw_only=True)
class Options(OptionGroup):
    """What `svd2 verify` takes."""

    folder: Path = option("golden folder, laid out like tests/goldens", names=["folder"], metavar="FOLDER")
    dtype: DType = option("bfloat16 checks with looser, stated tolerances (default %(default)s)", "float32")
    stages: int = option("number of devices of the pipeline that the streams run on (default %(default)s)", 1)
    weight_dtype: EightBits | None = option(WEIGHT_DTYPE)
    cache_dtype: EightBits | None = option("hold the cache in 8 bits; both with tolerances of their own")
    json: Path | None = option("write the report there as well")


def run(options: Options) -> int:
    """Checks all golden files; fails if one of them does."""
    check_reports(options.json)
    outcomes = []
    computed_in = options.dtype + held_in(options.weight_dtype or "compute", options.cache_dtype or "compute")
    with progress.shown("verifying", (lambda _: None) if sys.stderr.isatty() else say):
        with progress.working("loading JAX"):
            from svd2_jax import verify

            device.meshes(1, options.stages)
        verify.golden_files(options.folder)  # an error at once
        for outcome in device.guarded(
            verify.verify(
                options.folder, options.dtype, options.stages, options.weight_dtype, options.cache_dtype
            )
        ):
            outcomes.append(outcome)
            print(outcome.line(), flush=True)
    if options.json:
        files.write_json(options.json, verify.report(outcomes, computed_in))
    failed = [o.name for o in outcomes if not o.passed]
    written = f"; report in {options.json}" if options.json else ""
    print(f"{len(outcomes) - len(failed)} of {len(outcomes)} goldens pass in {computed_in}{written}")
    return EXIT_FAILED if failed else 0
