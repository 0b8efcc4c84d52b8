"""The converter's command line, for `python -m convert` and `svd2 convert`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from svd2_jax.errors import exit_code

DTYPES = ("bfloat16", "float32")

EXAMPLE = """\
example:
  %(prog)s --generator model.pt --wan Wan2.1-T2V-1.3B --taehv taew2_1.pth --out checkpoint

The Wan2.1 folder gives the VAE, the text encoder, the tokenizer and, without --generator, the transformer.
Weights are torch files (read without PyTorch, and without running code from them), safetensors files, or
folders of safetensors shards. Free memory needed: 3 GiB, mostly for one tensor of the text encoder.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the converter's options to a parser."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLE
    path: dict[str, Any] = {"type": Path, "metavar": "PATH"}
    parser.add_argument("--out", required=True, help="checkpoint folder to make; must not exist", **path)
    parser.add_argument(
        "--generator",
        help="StreamDiffusionV2, Self-Forcing or CausVid file (default: Wan folder's)",
        **path,
    )
    parser.add_argument("--wan", help="Wan2.1 folder, in Wan's own layout or in Diffusers'", **path)
    parser.add_argument("--taehv", help="tiny decoder (taew2_1.pth); left out by default", **path)
    parser.add_argument("--vae", help="VAE weights (default: the Wan folder's)", **path)
    parser.add_argument("--text-encoder", help="UMT5 weights (default: the Wan folder's)", **path)
    parser.add_argument("--tokenizer", help="tokenizer folder (default: the Wan folder's)", **path)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="default: %(default)s")
    parser.add_argument("--no-progress", action="store_true", help="show no progress bar")


def run(args: argparse.Namespace) -> int:
    """Converts as the parsed options say and returns the exit code; raises Svd2Error on bad input."""
    import jax

    jax.config.update("jax_platforms", "cpu")  # nothing is computed; leave the accelerators to others

    from convert.conversion import convert_checkpoint
    from svd2_jax.engine.checkpoint import Checkpoint

    out = convert_checkpoint(
        out=args.out,
        generator=args.generator,
        wan=args.wan,
        taehv=args.taehv,
        vae=args.vae,
        text_encoder=args.text_encoder,
        tokenizer=args.tokenizer,
        dtype=args.dtype,
        progress=not args.no_progress,
    )
    manifest = Checkpoint.open(out).manifest
    print(f"{out}: {manifest.model.name}, {manifest.dtype}, {len(manifest.items)} items")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; bad input becomes one message on standard error and exit code 2."""
    parser = argparse.ArgumentParser(
        prog="python -m convert", description="Converts PyTorch weights into a checkpoint for svd2-jax."
    )
    add_arguments(parser)
    args = parser.parse_args(argv)
    return exit_code(lambda: run(args), "interrupted; nothing was kept")
