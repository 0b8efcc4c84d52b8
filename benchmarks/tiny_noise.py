"""How the small model does over the noise scales and the denoising steps that the options offer.

python scripts/make_eval_clips.py --out clips --clips 2 --frames 17
python benchmarks/tiny_noise.py --clips clips

Runs `svd2 eval` for each pair, and writes OUT.md and OUT.json. Needs pip install "svd2-jax[train]".
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import tempfile
from pathlib import Path

from tqdm import tqdm

from svd2_jax import cli, files, shipped
from svd2_jax.command import exit_code
from svd2_jax.errors import EngineError

NOISE_SCALES = (0.3, 0.6, 0.8, 0.9, 1.0)
DEFAULT_STEPS, DEFAULT_SCALE = 2, 0.8
# Every noise scale at the default steps, every number of steps at the lowest noise scale and at the default.
PAIRS = (
    *((scale, DEFAULT_STEPS) for scale in NOISE_SCALES),
    *((scale, steps) for steps in (1, 3, 4) for scale in (NOISE_SCALES[0], DEFAULT_SCALE)),
)


def main() -> int:
    """Measures all pairs and returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clips", type=Path, required=True, help="folder that make_eval_clips.py made")
    parser.add_argument("--checkpoint", default=shipped.TINY, help="the model (default: the shipped one)")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).with_suffix(""), help="OUT.md and OUT.json"
    )
    args = parser.parse_args()
    return exit_code(lambda: _run(args), "interrupted; nothing was written")


def _run(args: argparse.Namespace) -> None:
    rows = []
    for scale, steps in tqdm(PAIRS, unit="setting"):
        means = evaluated(args, scale, steps)
        rows.append({"noise_scale": scale, "steps": steps, **means})
    files.write_json(args.out.with_suffix(".json"), {"checkpoint": args.checkpoint, "rows": rows})
    files.write_whole(args.out.with_suffix(".md"), lambda part: part.write_text(table(rows)))


def evaluated(args: argparse.Namespace, scale: float, steps: int) -> dict[str, float]:
    """Returns the means that `svd2 eval` gives for one setting."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        options = ["eval", "--checkpoint", args.checkpoint, "--clips", args.clips, "--noise-scale", scale]
        options += ["--steps", steps, "--json", report, "--no-progress"]
        with contextlib.redirect_stdout(io.StringIO()):
            if cli.main([str(option) for option in options]):
                raise EngineError(f"svd2 eval failed for noise scale {scale} and {steps} steps, see above")
        means = json.loads(report.read_text())["means"]
    return {**means["to_target"], "nearest_is_right": means["nearest_is_right"]}


def table(rows: list[dict[str, float]]) -> str:
    """Returns the rows as Markdown."""
    lines = [
        "# The small model over noise scales and steps",
        "",
        "Two held-out scenes of 17 frames in all styles, against what the style's own image processing gives:",
        "",
        "```",
        "python scripts/make_eval_clips.py --out clips --clips 2 --frames 17",
        "python benchmarks/tiny_noise.py --clips clips",
        "```",
        "",
        "| noise scale | steps | PSNR | SSIM | nearest style is the one asked for |",
        "|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: (row["steps"], row["noise_scale"])):
        lines.append(
            f"| {row['noise_scale']:g} | {row['steps']} | {row['psnr_db']:.1f} dB | {row['ssim']:.3f} | "
            f"{row['nearest_is_right']:.0%} |"
        )
    return "\n".join(lines).replace("%", " %") + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
