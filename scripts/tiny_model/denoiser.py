"""Training of the transformer and the text encoder, for exactly the way a stream uses them.

A training sequence is a stream in one pass: every latent frame is a row that sees itself and what the rolling cache
would hold at that time, its anchors and the last frames, through the very blocks that a tick runs. A sequence has one
noise level, as one row of the stream batch has. Level 0 is the noisy *input*; from level 1 on what is noised is a
clean prediction: the network's own, or the target. The answer is always the clean *styled* latent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import register_dataclass

from svd2_jax.api import DEFAULT_NOISE_SCALE
from svd2_jax.config import V2V_TIMESTEPS, DiTConfig, ModelConfig, StreamConfig, TextConfig
from svd2_jax.diffusion import flow_match, noise_control
from svd2_jax.engine.params import abstract_items
from svd2_jax.engine.tokenizer import Tokenizer
from svd2_jax.models import dit, text_encoder
from svd2_jax.nn.kv_cache import LayerCache
from svd2_jax.nn.random_params import random_params
from svd2_jax.nn.rope import rope_tables
from tiny_model import phrasings
from tiny_model.styles import STYLES

Params = Any

LATENT_SIZE = 8.0
"""Deviation of the latents in each channel. Pure noise has 1: at the published noise scale of 0.8 the picture is twice
as strong as the noise, so that a small network can still see it, and little of it gets lost between two steps."""

LATER_LEVELS = (0.5, 0.25, 0.25)  # how often each noise level from 1 on is trained, in half of the sequences
NOISE_SCALES = (0.3, 1.0)  # of the sequences that do not have the default
DEFAULT_SHARE = 0.4  # of the sequences that have the default noise scale
OWN_PREDICTION = 0.6  # share of these that start from the network's own prediction
OTHER_ANCHORS = 0.3  # share of the sequences whose anchors show another scene
ABSOLUTE_WEIGHT = 0.5  # of the mean absolute error beside the mean squared one


@register_dataclass
@dataclass(frozen=True)
class Batch:
    """What one training step sees.

    Attributes:
      inputs: float [B, N, h, w, C] latents of the input; the first two frames are a stream's first group.
      targets: the same of the styled clip.
      start: int32 [B, N] time index of each frame.
      noise_scale: float32 [B, N] of the first noise level; lower where a frame moves.
      level: int32 [B / 2] noise level, 1 to 3, of the second half of the sequences; the first half has level 0.
      own: bool [B / 2] whether these start from the network's own prediction, else from the target.
      ids: int32 [B, P] prompt tokens.
      mask: int32 [B, P] 1 for tokens, 0 for padding.
    """

    inputs: jax.Array
    targets: jax.Array
    start: jax.Array
    noise_scale: jax.Array
    level: jax.Array
    own: jax.Array
    ids: jax.Array
    mask: jax.Array


def init_params(model: ModelConfig, seed: int) -> dict[str, Params]:
    """Returns parameters of all items of the transformer and the text encoder, float32.

    Every block starts as one that changes nothing, and the head's output has the size of the latents.
    """
    shapes = {k: v for k, v in abstract_items(model).items() if k.startswith(("dit.", "text."))}
    drawn = random_params(shapes, seed)

    def one(path: tuple[Any, ...], x: np.ndarray) -> np.ndarray:
        names = [str(entry.key) for entry in path]
        if names[0].startswith("dit.block") and names[-1] == "kernel" and names[-2] in ("o", "mlp_down"):
            return np.zeros_like(x)
        if names[-1] == "modulation":
            return np.full_like(x, 0.0) + _initial_modulation(x.shape[0])[:, None]
        if names[-2:] == ["time_proj", "kernel"]:
            return 0.1 * x
        if names[0] == dit.head_item() and names[-1] == "kernel":
            return np.float32(0.2 * LATENT_SIZE) * x
        return x

    return jax.tree_util.tree_map_with_path(one, drawn)


def _initial_modulation(count: int) -> np.ndarray:
    """Shifts and scales of 0; gates (of blocks) of 1."""
    return np.array([0, 0, 1, 0, 0, 1] if count == 6 else [0, 0], np.float32)


def is_table(path: tuple[Any, ...]) -> bool:
    """Whether a parameter, though a matrix, is a table of vectors: token embeddings, position biases, modulations."""
    return str(path[-1].key) in ("embedding", "position_bias", "modulation")


def seen_frames(frames: int, cfg: StreamConfig) -> tuple[np.ndarray, np.ndarray]:
    """Returns what each latent frame of a stream sees: frames int32 [N, at most], and how many, int32 [N].

    The first `first_latents` see each other. Later ones see the sinks, the frames that are left of the cache, and
    themselves; entries beyond the number are padding.
    """
    seen = np.zeros((frames, cfg.cache_frames), np.int32)
    count = np.zeros(frames, np.int32)
    for n in range(frames):
        last = max(n, cfg.first_latents - 1)
        visible = list(range(last + 1))
        if len(visible) > cfg.cache_frames:
            visible = visible[: cfg.sink_frames] + visible[cfg.sink_frames - cfg.cache_frames :]
        seen[n, : len(visible)], count[n] = visible, len(visible)
    return seen[:, : count.max()], count


def velocity(
    model: DiTConfig,
    cfg: StreamConfig,
    params: Mapping[str, Params],
    latents_BNhwC: jax.Array,
    timestep_BN: jax.Array,
    start_BN: jax.Array,
    context_BPE: jax.Array,
) -> jax.Array:
    """Returns the velocity [B, N, h, w, C] of whole streams, each from its first latent frame on.

    Args:
      model: sizes.
      cfg: geometry of the cache.
      params: trees of all items of the transformer.
      latents_BNhwC: noisy latents.
      timestep_BN: int32 noise level of each frame.
      start_BN: int32 time index of each frame.
      context_BPE: embedded prompts.
    """
    batch, frames, height, width, _ = latents_BNhwC.shape
    grid = (height // model.patch[1], width // model.patch[2])
    patch, conditioner = dit.split_embed(params[dit.embed_item()])
    rows = latents_BNhwC.reshape(batch * frames, 1, *latents_BNhwC.shape[2:])
    conditioning = dit.condition(model, conditioner, timestep_BN.reshape(-1), rows.dtype)
    rope = rope_tables(model.head_dim, start_BN.reshape(-1), 1, *grid, max_frame=cfg.rope_refresh + 1)
    seen, count = seen_frames(frames, cfg)
    kv_len = jnp.tile(jnp.asarray(count * (grid[0] * grid[1]), jnp.int32), batch)
    none = jnp.zeros((0,), jnp.int32)

    def cached(x_RQND: jax.Array) -> jax.Array:
        """Keys or values of each row -> those of all frames that it sees, one behind the other."""
        x = x_RQND.reshape(batch, frames, *x_RQND.shape[1:])[:, seen]
        return x.reshape(batch * frames, -1, *x_RQND.shape[2:])

    x = dit.embed(model, patch, rows)
    block = dit.Block(model)
    for layer in range(model.num_layers):
        item = {"params": params[dit.block_item(layer)]}
        qkv: Any = block.apply(item, x, conditioning.modulation, rope, method="project")
        q, k, v = qkv
        pair: Any = block.apply(item, context_BPE, method="prompt_kv")
        prompt = [jnp.repeat(part, frames, axis=0) for part in pair]
        cache = LayerCache(cached(k), cached(v), none, none, none)
        x = block.apply(
            item, x, q, [cache], [kv_len], *prompt, conditioning.modulation, "xla", method="finish"
        )  # pyright: ignore
    out = dit.head(model, params[dit.head_item()], x, conditioning.time, grid)  # pyright: ignore
    return out.reshape(latents_BNhwC.shape)


def embed_prompts(
    cfg: TextConfig, params: Mapping[str, Params], ids: jax.Array, mask: jax.Array
) -> jax.Array:
    """Returns prompt embeddings [B, P, text_dim] of token ids [B, P]; see `text_encoder.encode`."""
    x = text_encoder.embed(params[text_encoder.EMBED_ITEM], ids)
    for layer in range(cfg.num_layers):
        x = text_encoder.run_block(cfg, params[text_encoder.block_item(layer)], x, mask)
    return text_encoder.head(params[text_encoder.HEAD_ITEM], x, mask)


def loss(
    model: ModelConfig, cfg: StreamConfig, params: Mapping[str, Params], batch: Batch, key: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the loss and the error of each level, as shares of the latents' size."""
    first_key, again_key = jax.random.split(key)
    inputs, targets = batch.inputs.astype(jnp.float32), batch.targets.astype(jnp.float32)
    shape = inputs.shape
    _, conditioner = dit.split_embed(params[dit.embed_item()])
    context = dit.embed_text(model.dit, conditioner, embed_prompts(model.text, params, batch.ids, batch.mask))

    def predict(params: Mapping[str, Params], noisy: jax.Array, timestep_BN: jax.Array, part: slice, context):
        flow = velocity(model.dit, cfg, params, noisy, timestep_BN, batch.start[part], context[part])
        flat = (-1, 1, *shape[2:])
        clean = flow_match.clean_prediction(noisy.reshape(flat), flow.reshape(flat), timestep_BN.reshape(-1))
        return clean.reshape(noisy.shape)

    scale = batch.noise_scale[:, :, None, None, None]
    entering = noise_control.mix(inputs, jax.random.normal(first_key, shape), scale)
    first_step = first_timesteps(cfg, batch.noise_scale)
    half = shape[0] // 2
    later = slice(half, None)
    frozen = jax.lax.stop_gradient((params, context))
    own = jax.lax.stop_gradient(predict(frozen[0], entering[later], first_step[later], later, frozen[1]))
    clean = jnp.where(batch.own[:, None, None, None, None], own, targets[later])
    step = jnp.asarray(V2V_TIMESTEPS, jnp.int32)[batch.level]
    again = flow_match.add_noise(clean, jax.random.normal(again_key, clean.shape), step)
    noisy = jnp.concatenate([entering[:half], again])
    step_BN = jnp.repeat(step[:, None], shape[1], axis=1)
    timestep = jnp.concatenate([first_step[:half], step_BN])
    error = (predict(params, noisy, timestep, slice(None), context) - targets) / LATENT_SIZE
    value = jnp.square(error).mean() + ABSOLUTE_WEIGHT * jnp.abs(error).mean()
    return value, {
        "error_first": jnp.sqrt(jnp.square(error[:half]).mean()),
        "error_later": jnp.sqrt(jnp.square(error[later]).mean()),
    }


def first_timesteps(cfg: StreamConfig, noise_scale_BN: jax.Array) -> jax.Array:
    """Returns each frame's first denoising timestep, int32 [B, N]: in a stream's first group the configured one."""
    is_first = jnp.arange(noise_scale_BN.shape[1]) < cfg.first_latents
    return jnp.where(is_first, cfg.timesteps[0], noise_control.first_timestep(noise_scale_BN))


def random_batch(
    tokenizer: Tokenizer,
    cfg: StreamConfig,
    latents: np.ndarray,
    count: int,
    frames: int,
    rng: np.random.Generator,
) -> Batch:
    """Returns `count` (even) sequences of `frames` latent frames.

    Their source are latents of scenes in all styles, [scenes, styles, N, h, w, C], N at least `frames`.

    A part of the sequences has anchors from another scene, as a stream has whose camera has moved on, and time
    indices as long after the start or just behind a refresh.
    """
    scenes, styles = latents.shape[:2]
    chosen, style = rng.integers(scenes, size=count), rng.integers(styles, size=count)
    anchors = np.where(rng.random(count) < OTHER_ANCHORS, rng.integers(scenes, size=count), chosen)
    names, sinks = list(STYLES), cfg.sink_frames

    def sequences(style: np.ndarray | int) -> np.ndarray:
        whole = np.array(latents[chosen, style, :frames])
        whole[:, :sinks] = latents[anchors, style, :sinks]
        return whole

    is_default = rng.random(count) < DEFAULT_SHARE
    scale = np.where(is_default, DEFAULT_NOISE_SCALE, rng.uniform(*NOISE_SCALES, count))[:, None]
    scale = np.repeat(scale, frames, axis=1)
    scale[:, cfg.first_latents :] -= cfg.motion_range * rng.random((count, 1))
    ids, mask = tokenizer([phrasings.sample(names[i], "train", rng) for i in style])
    batch: Any = Batch  # of NumPy arrays, until they are on a device
    return batch(
        inputs=sequences(names.index("unchanged")),
        targets=sequences(style),
        start=np.stack([random_starts(frames, cfg, rng) for _ in range(count)]),
        noise_scale=scale.astype(np.float32),
        level=rng.choice(len(LATER_LEVELS), size=count // 2, p=LATER_LEVELS).astype(np.int32) + 1,
        own=rng.random(count // 2) < OWN_PREDICTION,
        ids=ids,
        mask=mask,
    )


def random_starts(frames: int, cfg: StreamConfig, rng: np.random.Generator) -> np.ndarray:
    """Returns time indices, int32 [N], of a stream's anchors and, some time later, of its last frames."""
    sinks, last = cfg.sink_frames, cfg.rope_refresh
    index = np.arange(frames)
    kind = rng.random()
    if kind < 0.6:  # later
        index[sinks:] += rng.integers(last - frames + 1)
    elif kind < 0.8 and frames > sinks + 1:  # just behind a refresh, which restarts at `cache_frames - 1`
        cut = rng.integers(sinks + 1, frames)
        index[sinks:cut] += last - cut
        index[cut:] = cfg.cache_frames - 1 + np.arange(frames - cut)
    return index.astype(np.int32)
