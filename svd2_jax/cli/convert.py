"""`svd2 convert`: convert published PyTorch weights into a checkpoint folder.

examples:
  svd2 convert --generator model.pt --wan Wan2.1-T2V-1.3B --taehv taew2_1.pth --out ckpt-1.3b
  svd2 convert --wan Wan2.1-T2V-1.3B-Diffusers --out ckpt-base

  # one part alone, which cannot run by itself
  svd2 convert --vae Wan2.1-T2V-1.3B/Wan2.1_VAE.pth --out vae

The Wan2.1 folder gives the VAE, the text encoder, the tokenizer and, without --generator, the transformer; it is an
error if it lacks one of them that no other option gives. Without --wan only what is given is converted.
Weights are torch files (read without PyTorch, and without running code from them), safetensors files, or
folders of safetensors shards. Free memory needed: 3 GiB, mostly for one tensor of the text encoder.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from svd2_jax.cli.options import OptionGroup, option
from svd2_jax.cli.terminal import Interrupts
from svd2_jax.text import si

DEFAULT_DTYPE = "bfloat16"

NEEDED = ("dit", "vae", "text")  # by every stream, and the tokenizer


@dataclass(frozen=True, kw_only=True)
class Options(OptionGroup):
    """What `svd2 convert` takes."""

    out: str = option("checkpoint folder to make; must not exist", required=True, metavar="PATH")
    generator: str | None = option(
        "StreamDiffusionV2, Self-Forcing or CausVid file (default: Wan folder's)", metavar="PATH"
    )
    wan: str | None = option("Wan2.1 folder, in Wan's own layout or in Diffusers'", metavar="PATH")
    taehv: str | None = option("tiny decoder (taew2_1.pth); left out by default", metavar="PATH")
    vae: str | None = option("VAE weights (default: the Wan folder's)", metavar="PATH")
    text_encoder: str | None = option("UMT5 weights (default: the Wan folder's)", metavar="PATH")
    tokenizer: str | None = option("tokenizer folder (default: the Wan folder's)", metavar="PATH")
    dtype: Literal["bfloat16", "float32"] = option("default: %(default)s", DEFAULT_DTYPE)
    no_progress: bool = option("show no progress bar", False)


def run(options: Options) -> int:
    """Converts, and says what to type next."""
    import jax

    jax.config.update("jax_platforms", "cpu")  # nothing is computed; leave the accelerators to others

    from convert.conversion import convert_checkpoint

    settings = dataclasses.asdict(options)
    del settings["no_progress"]
    with Interrupts():  # a terminal that is closed leaves nothing behind either
        out = convert_checkpoint(**settings, progress=not options.no_progress)
    print(_summary(out, options))
    return 0


def _summary(out: Path, options: Options) -> str:
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
        return f"{holds}; it cannot run without {', '.join(lacking)}; next: {_whole_conversion(lacking, options)}"
    hint = " (faster: with --decoder taehv)" if "taehv" in in_items else ""
    command = ["svd2", "run", "--checkpoint", shlex.quote(str(out)), "--input", "in.mp4"]
    command += ["--prompt", '"a watercolour painting"', "--output", "out.mp4"]
    return f"{holds}; next: {' '.join(command)}{hint}"


def _whole_conversion(lacking: Sequence[str], options: Options) -> str:
    """Returns the command that converts what was given and what it lacks; capitals are left to the user."""
    given = {
        "--generator": options.generator or ("FILE" if "transformer" in lacking else None),
        "--wan": options.wan or (None if list(lacking) == ["transformer"] else "WAN_FOLDER"),
        "--taehv": options.taehv,
        "--vae": options.vae,
        "--text-encoder": options.text_encoder,
        "--tokenizer": options.tokenizer,
        "--dtype": None if options.dtype == DEFAULT_DTYPE else options.dtype,
        "--out": f"{str(options.out).rstrip('/')}-whole",
    }
    words = [word for option, value in given.items() if value is not None for word in (option, str(value))]
    return shlex.join(["svd2", "convert", *words])
