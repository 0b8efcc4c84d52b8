"""Golden files of single parts: schedules, noise, the split, text encoder, VAE and TAEHV."""

from __future__ import annotations

import functools
import json
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from svd2_jax.config import StreamConfig, TAEHVConfig
from svd2_jax.diffusion import flow_match, noise_control
from svd2_jax.engine import balance
from svd2_jax.engine.engine import DeviceEngine
from svd2_jax.engine.policy import checked_dtype
from svd2_jax.models import taehv, vae
from svd2_jax.verify.check import Arrays, Check, latents_last, load, numbered, video_last


def check_flow_match(engine: DeviceEngine, check: Check, file: Path) -> None:
    """Compares the noise schedule, noising and clean predictions."""
    g = load(file)
    sigmas, timesteps = flow_match.schedule()
    check.close(sigmas, g["sigmas"], "sigmas", relative=True)
    check.close(timesteps, g["timesteps"], "timesteps", relative=True)
    t = jnp.asarray(g["t"], jnp.int32)

    def rows(name: str) -> jax.Array:
        return jnp.asarray(latents_last(g[name]))[:, None]

    check.close(flow_match.add_noise(rows("clean"), rows("noise"), t), rows("noisy"), "noisy")
    check.close(flow_match.clean_prediction(rows("clean"), rows("flow"), t), rows("x0"), "x0")


def check_noise_controller(engine: DeviceEngine, check: Check, file: Path) -> None:
    """Compares noise scales and first timesteps with moving and with still frames."""
    g = load(file)
    still = g["frames"].copy()
    still[int(g["still_from"]) :] = still[int(g["still_from"])]
    _follow_noise(check, g["frames"], g, "", "step")
    _follow_noise(check, still, g, "still_", "still_step")


def _follow_noise(check: Check, frames: np.ndarray, g: Arrays, prefix: str, steps: str) -> None:
    pixels = noise_control.pixels_from_uint8(jnp.asarray(frames))
    count = int(g[f"{prefix}chunk_frames"])
    initial = current = jnp.float32(g[f"{prefix}initial"])
    scales, first_steps = [], []
    for end in g[f"{prefix}end_idx"]:
        level = noise_control.motion(pixels[end - count - 1], pixels[end - count : end])
        current = noise_control.next_noise_scale(level, initial, current, StreamConfig().motion_range)
        scales.append(float(current))
        first_steps.append(int(noise_control.first_timestep(current)))
    check.close(scales, g[f"{prefix}noise_scale"], f"{prefix}noise scale", relative=True)
    check.equal(first_steps, g[steps], f"{prefix}first timestep")


def check_block_balance(engine: DeviceEngine, check: Check, file: Path) -> None:
    """Compares the slowest stage of our split with that of the reference's."""
    for case in json.loads(file.read_text()):
        blocks = case["total_blocks"]
        costs = [sum(case["dit_times"]) / blocks] * blocks
        overheads = [t - d for t, d in zip(case["rank_times"], case["dit_times"], strict=True)]
        ours = balance.bottleneck(balance.best_split(costs, overheads), costs, overheads)
        theirs = balance.bottleneck([b - a for a, b in case["balanced"]], costs, overheads)
        check.error = max(check.error, ours - theirs)  # a better split is welcome


def check_umt5(engine: DeviceEngine, check: Check, file: Path) -> None:
    """Compares token ids, masks and embeddings of prompts."""
    g = load(file)
    prompts = json.loads((file.parent / "prompts.json").read_text())
    ids, mask = engine.prompts.tokenize(prompts)
    check.equal(ids, g["ids"], "token ids")
    check.equal(mask, g["mask"], "token mask")
    for i, prompt in enumerate(prompts):
        check.close(engine.prompts.encode(prompt), g["embeds"][i : i + 1], f"embedding {i}")


def check_vae(engine: DeviceEngine, check: Check, file: Path) -> None:
    """Compares the encoder and the decoder, chunk by chunk and over a whole clip."""
    g, cfg = load(file), engine.model.vae
    params = engine.params(StreamConfig())
    pixels = noise_control.pixels_from_uint8(jnp.asarray(g["frames"])).astype(params.dit.dtype)[None]
    first, later = (jax.jit(functools.partial(f, cfg)) for f in (vae.encode_first, vae.encode))
    state, at = None, 0
    for i, wanted in enumerate(numbered(g, "encode_stream_")):
        frames = 1 + 4 * (wanted.shape[2] - 1) if state is None else 4 * wanted.shape[2]
        group, at = pixels[:, at : at + frames], at + frames
        if state is None:
            got, state = first(params.encoder, group)
        else:
            got, state = later(params.encoder, state, group)
        check.close(got, video_last(wanted), f"encode_stream_{i}")
    got = jax.jit(functools.partial(vae.encode_offline, cfg))(params.encoder, pixels)
    check.close(got, video_last(g["encode_full_normalised"]), "encode_full_normalised")

    groups = [jnp.asarray(video_last(z), params.dit.dtype) for z in numbered(g, "latents_")]
    video = [video_last(v) for v in numbered(g, "decode_stream_")]
    first, later = functools.partial(vae.decode_first, cfg), functools.partial(vae.decode, cfg)
    _check_decode(check, first, later, params.decoder, groups, video)
    got = jax.jit(functools.partial(vae.decode_offline, cfg))(params.decoder, jnp.concatenate(groups, axis=1))
    check.close(got, video_last(g["decode_full"]), "decode_full")


def _check_decode(
    check: Check,
    first: Callable,
    later: Callable,
    params: Any,
    groups: list[jax.Array],
    wanted: list[np.ndarray],
) -> None:
    first, later = jax.jit(first), jax.jit(later)
    state: Any = None
    for i, (group, video) in enumerate(zip(groups, wanted, strict=True)):
        if state is None:
            got, state = first(params, group)
            got = got[:, got.shape[1] - video.shape[1] :]  # TAEHV: the reference drops the very first frame
        else:
            got, state = later(params, state, group)
        check.close(got, video, f"decode_stream_{i}")


def check_taehv(engine: DeviceEngine, check: Check, file: Path) -> None:
    """Compares the small decoder, chunk by chunk and over a whole clip."""
    g, cfg = load(file), TAEHVConfig()
    dtype = checked_dtype(str(engine.params(StreamConfig()).dit.dtype))
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), _taehv_by_rule(cfg, int(g["weight_seed"])))
    groups = [jnp.asarray(latents_last(z), dtype) for z in numbered(g, "latents_")]
    video = [latents_last(v) for v in numbered(g, "decode_stream_")]
    first, later = functools.partial(taehv.decode_first, cfg), functools.partial(taehv.decode, cfg)
    _check_decode(check, first, later, params, groups, video)
    got = jax.jit(functools.partial(taehv.decode_offline, cfg))(params, jnp.concatenate(groups, axis=1))
    check.close(got, latents_last(g["decode_full_unit_range_untrimmed"]), "decode_full")


def _taehv_by_rule(cfg: TAEHVConfig, seed: int) -> Any:
    """Makes the weights the golden file stands for: a rule over the source's names and shapes, our table."""
    from convert import taehv as table

    tree = taehv.abstract_params(cfg)
    for rule in table.rules(cfg):
        *path, leaf = rule.target.split("/")
        parent = functools.reduce(lambda node, key: node[key], path, tree)
        name = re.sub(r"\\(.)", r"\1", rule.source)  # the table's names are escaped for matching
        parent[leaf] = rule.transform(_by_rule(name, _torch_shape(parent[leaf].shape), seed))
    return tree["taehv"]


def _by_rule(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    fan_in = 100 if name.endswith("bias") else int(np.prod(shape[1:]))
    rng = np.random.default_rng(zlib.crc32(name.encode()) + seed)
    return rng.standard_normal(shape).astype(np.float32) / np.float32(np.sqrt(fan_in))


def _torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape [out, in, h, w] (or [out]) of a 2-D convolution whose kernel has this shape here."""
    if len(shape) == 1:
        return shape
    *window, channels_in, channels_out = shape
    return (channels_out, channels_in, *(window or (1, 1)))
