"""Runs the reference's golden outputs through our programs: the proof that the numbers are the reference's.

A golden folder holds weights in the layouts that users download, and recorded inputs and outputs; see
`tests/goldens/README.md`. Sizes and settings are read from the files.
"""

from svd2_jax.verify.run import TOLERANCES, GoldenResult, golden_files, report, verify

__all__ = ["TOLERANCES", "GoldenResult", "golden_files", "report", "verify"]
