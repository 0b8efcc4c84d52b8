"""The model that comes with the package: its pictures are as good as when it was trained."""

import functools
import json

import numpy as np
import pytest

import svd2_jax
from svd2_jax import media, shipped
from svd2_jax.config import preset
from svd2_jax.engine.autoencode import rebuild
from svd2_jax.evaluate import measures
from tiny_model import phrasings, scenes
from tiny_model.styles import STYLES, apply_style

SCENES, FRAMES = (0, 3), 17
# Half a decibel below what was measured when it was trained: a wrong cache, schedule or layer costs more.
VAE_PSNR_DB = {0: 23.8, 3: 32.2}
REDRAWN_PSNR_DB = 22.4
# The same for (noise scale, steps), behind the first group, of four styles. Weights that were trained around 0.8
# only drew coloured tiles from the second group on where the noise is lower.
NOISE_PSNR_DB = {(0.3, 2): 27.3, (0.6, 2): 29.0, (0.9, 2): 26.9, (0.8, 1): 28.8, (0.6, 4): 28.4}
# Of 26; then it was 24: "draw it like an engineer" does nothing, and one infrared picture is nearer to a sketch.
RIGHT = 23


@functools.cache
def engine():
    return svd2_jax.load("tiny")


@functools.cache
def clip(seed):
    return scenes.clip(scenes.make_scene(seed, "held_out"), FRAMES, *preset("tiny").picture)


@functools.cache
def redrawn(style, seed, noise_scale=0.8, steps=2):
    """A held-out scene, re-drawn to a held-out phrasing."""
    prompt = phrasings.phrasings(style, "held_out")[seed]
    cfg = engine().stream_config(steps=steps)
    with engine().open(svd2_jax.SessionSpec(prompt, cfg, noise_scale)) as session:
        return np.concatenate(list(session.run(clip(seed))))


def test_the_small_model_is_as_small_as_it_says():
    folder = shipped.checkpoint_folder("tiny")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["dtype"] == "bfloat16"
    assert engine().model == preset("tiny")
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= 16_000_000
    assert shipped.DEMO_CLIP.stat().st_size <= 500_000
    assert len(list(media.VideoReader(shipped.DEMO_CLIP))) == 96


def test_another_checkpoint_is_a_path():
    assert shipped.checkpoint_folder("ckpt/tiny").parts == ("ckpt", "tiny")


@pytest.mark.slow
@pytest.mark.parametrize("seed", SCENES)
def test_the_vae_redraws_scenes_that_it_has_not_seen(seed):
    drawn = rebuild(engine(), engine().stream_config(), clip(seed))
    assert measures.likeness(drawn, clip(seed)).psnr_db > VAE_PSNR_DB[seed]


@pytest.mark.slow
def test_the_style_that_was_asked_for_is_the_nearest():
    wrong = []
    for seed in SCENES:
        targets = [measures.blurred(apply_style(name, clip(seed))) for name in STYLES]
        for number, style in enumerate(STYLES):
            if measures.nearest(measures.blurred(redrawn(style, seed)), targets) != number:
                wrong.append((style, seed))
    assert len(SCENES) * len(STYLES) - len(wrong) >= RIGHT, wrong


@pytest.mark.slow
def test_the_pictures_are_as_near_to_their_targets_as_when_the_model_was_trained():
    drawn = [(redrawn(style, seed), apply_style(style, clip(seed))) for style in STYLES for seed in SCENES]
    assert np.mean([measures.likeness(*pair).psnr_db for pair in drawn]) > REDRAWN_PSNR_DB


@pytest.mark.slow
@pytest.mark.parametrize(("noise_scale", "steps"), NOISE_PSNR_DB)
def test_other_noise_scales_and_steps_are_drawn_as_well(noise_scale, steps):
    drawn = [
        measures.likeness(redrawn(style, 3, noise_scale, steps)[5:], apply_style(style, clip(3))[5:]).psnr_db
        for style in ("oil_painting", "neon_night", "sunset", "sepia")
    ]
    assert np.mean(drawn) > NOISE_PSNR_DB[noise_scale, steps]
