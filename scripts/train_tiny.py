"""Trains the small model that ships with the package, from nothing but two packages' sample photographs.

python scripts/train_tiny.py --out runs/tiny
python scripts/train_tiny.py --out runs/tiny --only vae      # one part: vae, transformer, export
python scripts/train_tiny.py --quick                         # all parts in a few minutes, to see that they work

Interrupt it at any time: it resumes from the last save. Needs `pip install -e ".[train]"`.
"""

from __future__ import annotations

import argparse
import functools
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from svd2_jax import files, shipped
from svd2_jax.command import OptionParser, exit_code
from svd2_jax.config import LATENT_STRIDE, StreamConfig, VAEConfig, preset
from svd2_jax.diffusion.noise_control import pixels_from_uint8
from svd2_jax.engine.checkpoint import MANIFEST, TOKENIZER, CheckpointWriter, Manifest
from svd2_jax.engine.tokenizer import Tokenizer
from svd2_jax.errors import ConfigError
from svd2_jax.models import vae
from tiny_model import autoencoder, bpe, denoiser, fit, pairs, phrasings, scenes
from tiny_model.fit import Run

WINDOW = 64  # pixels of the VAE's training clips in both directions
WINDOW_FRAMES = 9
PICTURES_BATCH, CLIPS_BATCH, WIDE_CLIPS_BATCH = 8, 2, 16
LATENT_NOISE = 0.05
SEQUENCE = 7  # latent frames: the cache holds six, so the last one comes after an eviction
LONG_BATCH = 4
# Latent frames and sequences of the first part: styles are learned frame by frame.
SHORT, SHORT_BATCH, WIDE_SHORT_BATCH = 3, 12, 96
SCENES = 256


def main() -> int:
    """Trains what is not trained yet, and returns the exit code."""
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/tiny"), help="folder of all that is made")
    parser.add_argument("--only", choices=("vae", "transformer", "export"), help="one part")
    parser.add_argument("--checkpoint", type=Path, help="folder to export to (default OUT/checkpoint)")
    parser.add_argument("--quick", action="store_true", help="a hundredth of everything, to try it out")
    args = parser.parse_args()
    return exit_code(lambda: _run(args), "interrupted; the same command goes on where it was saved last")


def _run(args: argparse.Namespace) -> None:
    # A short run's files are not a long run's.
    folder, share = (args.out / "quick", 0.01) if args.quick else (args.out, 1.0)
    checkpoint = args.checkpoint or folder / "checkpoint"
    if checkpoint.exists() and not (checkpoint / MANIFEST).is_file():
        raise ConfigError(f"{checkpoint}: is there and is not a checkpoint; name another place")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ConfigError(f"{folder}: cannot be made ({e.strerror})") from e
    scenes.photograph(scenes.PHOTOGRAPHS["train"][0])  # fails at once where they are not installed
    trained_vae = train_vae(folder, share)  # what is trained already returns at once
    if args.only == "vae":
        return
    transformer = train_transformer(folder, trained_vae, share)
    if args.only != "transformer":
        export(folder, checkpoint, {**trained_vae, **transformer})


def train_vae(folder: Path, share: float = 1.0) -> autoencoder.Params:
    """Returns the trained VAE with latents of one size in all channels, float32 on the host."""
    cfg = preset("tiny").vae
    pool = pairs.window_pool(folder / "windows.npy", _part(1200, share), 4, WINDOW_FRAMES, WINDOW, seed=0)
    shown = np.stack([pool[i] for i in np.linspace(0, len(pool) - 1, 8).astype(int)])
    sample = functools.partial(autoencoder.draw_sample, cfg, shown[:, :5])

    def batch(run: Run, count: int, frames: int, step: int) -> np.ndarray:
        rng = np.random.default_rng([run.seed, step])
        clips = rng.integers(len(pool), size=count)
        first = rng.integers(WINDOW_FRAMES - frames + 1, size=count)
        flip = rng.random(count) < 0.5
        chosen = [pool[i, t : t + frames] for i, t in zip(clips, first, strict=True)]
        return np.stack([c[:, :, ::-1] if f else c for c, f in zip(chosen, flip, strict=True)])

    def trained(run: Run, params: autoencoder.Params, count: int, frames: int, noise: float):
        loss = functools.partial(autoencoder.loss, cfg, noise)
        at = functools.partial(batch, run, count, frames)
        return fit.fit(run, folder / run.name, params, loss, at, sample)

    pictures = Run("vae-pictures", _part(3000, share), rate=0.02, vector_rate=2e-3, seed=1)
    clips = Run("vae-clips", _part(7000, share), rate=0.01, vector_rate=1e-3, seed=2)
    # Only from the third latent frame on is the network's memory what it is in a stream.
    streams = Run("vae-streams", _part(1200, share), rate=0.005, vector_rate=5e-4, seed=5)
    wide = Run("vae-wide", _part(1600, share), rate=0.008, vector_rate=8e-4, seed=6)
    params = jax.tree.map(jnp.asarray, autoencoder.init_params(cfg, seed=0))
    params = trained(pictures, params, PICTURES_BATCH, 1, 0.0)
    params = trained(clips, params, CLIPS_BATCH, 1 + LATENT_STRIDE, LATENT_NOISE)
    params = trained(streams, params, CLIPS_BATCH, WINDOW_FRAMES, LATENT_NOISE)
    params = trained(wide, params, WIDE_CLIPS_BATCH, WINDOW_FRAMES, LATENT_NOISE)
    some = np.stack([pool[i] for i in np.linspace(0, len(pool) - 1, min(len(pool), 200)).astype(int)])
    latents = np.asarray(_encode(cfg, params, some), np.float64)
    mean, deviation = latents.mean(axis=(0, 1, 2, 3)), latents.std(axis=(0, 1, 2, 3))
    return autoencoder.scale_latents(
        cfg, jax.tree.map(np.asarray, params), mean, deviation, denoiser.LATENT_SIZE
    )


def train_transformer(folder: Path, trained_vae: autoencoder.Params, share: float = 1.0) -> denoiser.Params:
    """Returns the transformer and text encoder, float32 on the host, trained on latents of a trained VAE."""
    model, cfg = preset("tiny"), tiny_stream()
    bpe.train_tokenizer(folder / TOKENIZER, model.text.vocab)
    tokenizer = Tokenizer.from_folder(folder / TOKENIZER, model.dit.text_len)
    frames = 1 + LATENT_STRIDE * (SEQUENCE - 1)
    latents = pairs.latent_pool(
        folder / "latents.npy",
        lambda clips: np.concatenate([np.asarray(_encode(model.vae, trained_vae, c[None])) for c in clips]),
        _part(SCENES, share),
        (SEQUENCE, *cfg.latent_size, model.vae.z_dim),
        frames,
        (cfg.height, cfg.width),
        seed=10_000,
    )

    def trained(run: Run, params: denoiser.Params, count: int, frames: int) -> denoiser.Params:
        def batch(step: int) -> denoiser.Batch:
            rng = np.random.default_rng([run.seed, step])
            return denoiser.random_batch(tokenizer, cfg, latents, count, frames, rng)

        loss = functools.partial(denoiser.loss, model, cfg)
        return fit.fit(run, folder / run.name, params, loss, batch, adam_only=denoiser.is_table)

    short = Run("transformer-short", _part(5600, share), rate=0.02, vector_rate=2e-3, seed=3)
    long = Run("transformer-long", _part(200, share), rate=0.005, vector_rate=5e-4, seed=4)
    wide = Run("transformer-wide", _part(2600, share), rate=0.012, vector_rate=1.2e-3, seed=7)
    params = jax.tree.map(jnp.asarray, denoiser.init_params(model, seed=0))
    params = trained(short, params, SHORT_BATCH, SHORT)
    params = trained(long, params, LONG_BATCH, SEQUENCE)
    params = trained(wide, params, WIDE_SHORT_BATCH, SHORT)
    return jax.tree.map(np.asarray, params)


def tiny_stream() -> StreamConfig:
    """Returns what a stream of the tiny model computes: its own picture size, everything else as published."""
    height, width = preset("tiny").picture
    return StreamConfig(height=height, width=width)


def export(folder: Path, checkpoint: Path, items: Mapping[str, autoencoder.Params]) -> None:
    """Writes the checkpoint, in bfloat16, of all items; one that is there is replaced."""
    new = checkpoint.with_name(f".{checkpoint.name}.new")
    shutil.rmtree(new, ignore_errors=True)  # of an export that was interrupted
    with CheckpointWriter(new) as writer:
        for name, tree in items.items():
            writer.write_item(name, jax.tree.map(lambda x: np.asarray(x, ml_dtypes.bfloat16), tree))
        writer.add_tokenizer({file.name: file for file in sorted((folder / TOKENIZER).iterdir())})
        writer.finish(Manifest(preset("tiny"), "bfloat16", tuple(items)))
    shutil.rmtree(checkpoint, ignore_errors=True)
    new.rename(checkpoint)
    files.write_json(checkpoint.with_name(shipped.STYLES.name), phrasings.telling_words())
    print(
        f"{checkpoint}: {sum(x.size for x in jax.tree.leaves(items)) / 1e6:.2f} million parameters, bfloat16"
    )


# Parameters are an argument: as constants of the program they make XLA:CPU of jax 0.10 compute wrong latents, each
# compilation others (seen at 100 clips of 9 frames).
@functools.partial(jax.jit, static_argnums=0)
def _encode(cfg: VAEConfig, params: autoencoder.Params, clips: jax.Array) -> jax.Array:
    latents, _ = vae.encode_first(cfg, params[vae.ENCODER_ITEM], pixels_from_uint8(clips))
    return latents


def _part(steps: int, share: float) -> int:
    return max(2, round(steps * share))


if __name__ == "__main__":
    sys.exit(main())
