"""The converter's command line, for `python -m convert` and `svd2 convert`."""

from __future__ import annotations

import argparse
import contextlib
import shlex
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from svd2_jax.errors import OptionParser, exit_code
from svd2_jax.text import si

DTYPES = ("bfloat16", "float32")
DEFAULT_DTYPE = "bfloat16"

EXAMPLES = """\
examples:
  %(prog)s --generator model.pt --wan Wan2.1-T2V-1.3B --taehv taew2_1.pth --out ckpt-1.3b
  %(prog)s --wan Wan2.1-T2V-1.3B-Diffusers --out ckpt-base

  # one part alone, which cannot run by itself
  %(prog)s --vae Wan2.1-T2V-1.3B/Wan2.1_VAE.pth --out vae

The Wan2.1 folder gives the VAE, the text encoder, the tokenizer and, without --generator, the transformer; it is an
error if it lacks one of them that no other option gives. Without --wan only what is given is converted.
Weights are torch files (read without PyTorch, and without running code from them), safetensors files, or
folders of safetensors shards. Free memory needed: 3 GiB, mostly for one tensor of the text encoder.
"""
NEEDED = ("dit", "vae", "text")  # by every stream, and the tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the converter's options to a parser."""
    path: dict[str, Any] = {"metavar": "PATH"}
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
    parser.add_argument("--dtype", choices=DTYPES, default=DEFAULT_DTYPE, help="default: %(default)s")
    parser.add_argument("--no-progress", action="store_true", help="show no progress bar")


def run(args: argparse.Namespace) -> int:
    """Converts as the parsed options say and returns the exit code; raises Svd2Error on bad input."""
    import jax

    jax.config.update("jax_platforms", "cpu")  # nothing is computed; leave the accelerators to others

    from convert.conversion import convert_checkpoint

    with _ended_as_by_ctrl_c():
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
    print(_summary(out, args))
    return 0


@contextlib.contextmanager
def _ended_as_by_ctrl_c() -> Iterator[None]:
    """Makes the system's other ways to end a program, a closed terminal for instance, leave nothing behind either."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    main = threading.current_thread() is threading.main_thread()  # signals are for others elsewhere
    before = {n: signal.getsignal(n) for n in numbers if main and signal.getsignal(n) is signal.SIG_DFL}
    for number in before:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _summary(out: Path, args: argparse.Namespace) -> str:
    """Returns what a checkpoint holds and the command to type next, in one line."""
    from svd2_jax.engine.checkpoint import PARTS, TOKENIZER, Checkpoint

    manifest = Checkpoint.open(out).manifest
    in_items = {item.split(".")[0] for item in manifest.items}
    has_tokenizer = (out / TOKENIZER).is_dir()
    held = [PARTS[part][0] for part in PARTS if part in in_items] + [TOKENIZER] * has_tokenizer
    lacking = [PARTS[part][0] for part in NEEDED if part not in in_items] + [TOKENIZER] * (not has_tokenizer)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    holds = f"{out}: {manifest.model.name}, {manifest.dtype}, {si(size)}B: {', '.join(held)}"
    if lacking:
        return (
            f"{holds}; it cannot run without {', '.join(lacking)}; next: {_whole_conversion(lacking, args)}"
        )
    hint = " (faster: with --decoder taehv)" if "taehv" in in_items else ""
    command = ["svd2", "run", "--checkpoint", shlex.quote(str(out)), "--input", "in.mp4"]
    command += ["--prompt", '"a watercolour painting"', "--output", "out.mp4"]
    return f"{holds}; next: {' '.join(command)}{hint}"


def _whole_conversion(lacking: Sequence[str], args: argparse.Namespace) -> str:
    """Returns the command that converts what was given and what it lacks; capitals are left to the user."""
    given = {
        "--generator": args.generator or ("FILE" if "transformer" in lacking else None),
        "--wan": args.wan or (None if list(lacking) == ["transformer"] else "WAN_FOLDER"),
        "--taehv": args.taehv,
        "--vae": args.vae,
        "--text-encoder": args.text_encoder,
        "--tokenizer": args.tokenizer,
        "--dtype": None if args.dtype == DEFAULT_DTYPE else args.dtype,
        "--out": f"{str(args.out).rstrip('/')}-whole",
    }
    words = [word for option, value in given.items() if value is not None for word in (option, str(value))]
    return shlex.join(["svd2", "convert", *words])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; bad input becomes one message on standard error and exit code 2."""
    parser = OptionParser(
        prog="python -m convert",
        description="Converts PyTorch weights into a checkpoint for svd2-jax.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    args = parser.parse_args(argv)
    return exit_code(lambda: run(args), "interrupted; nothing was kept")
