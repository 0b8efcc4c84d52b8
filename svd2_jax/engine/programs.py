"""The compiled programs of a stream: everything the device runs, built before the stream opens."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from svd2_jax.config import ModelConfig, StreamConfig
from svd2_jax.engine import noise
from svd2_jax.engine.params import EngineParams
from svd2_jax.models import dit
from svd2_jax.nn.attention import AttentionImplementation, fused_if_possible
from svd2_jax.stream import pixels, state, step
from svd2_jax.types import Device

Program = Callable[..., Any]


@dataclass(frozen=True)
class Programs:
    """Executables for one (model, stream) pair; donated arguments are marked with *.

    Attributes:
      init_state: () -> StreamState.
      draw_first: key -> noise of the first group.
      draw_chunk: key, chunk* -> noise of a chunk, next chunk.
      prompt_kv: dit params, text embedding [1, P, text_dim] -> PromptKV.
      blend: old embedding, new embedding, weight [] -> embedding between them.
      encode_first: encoder params, frames, noise, noise scale -> InputState, noisy latents. None without video.
      encode: encoder params, InputState*, frames, noise, initial noise scale -> InputState, noisy, timestep.
      step_first: see `step.step_chunk`, for the first group: dit params, prompt, StreamState*, noisy, ...
      step_chunk: the same for a later chunk; None in stream mode.
      open_rows: StreamState -> StreamState with a cache row for every step; None in sequential mode.
      tick: see `step.tick`: dit params, prompt, StreamState*, noisy, timestep, noise; None in sequential mode.
      decode_first: decoder params, latents -> decoder state, frames.
      decode: decoder params, decoder state*, latents -> decoder state, frames.
    """

    init_state: Program
    draw_first: Program
    draw_chunk: Program
    prompt_kv: Program
    blend: Program
    encode_first: Program | None
    encode: Program | None
    step_first: Program
    step_chunk: Program | None
    open_rows: Program | None
    tick: Program | None
    decode_first: Program
    decode: Program


def build(
    model: ModelConfig,
    cfg: StreamConfig,
    params: EngineParams,
    device: Device,
    pixel_format: str = "uint8",
    attention: AttentionImplementation = "auto",
) -> Programs:
    """Compiles all programs of a stream ahead of time.

    Args:
      model: sizes of the networks.
      cfg: what the stream computes.
      params: parameters, or ShapeDtypeStructs in their place.
      device: where everything runs.
      pixel_format: see `SessionSpec.pixels`.
      attention: see `attend`; "auto" takes the fused kernel where the device has one.
    """
    if attention == "auto":
        attention = fused_if_possible(device.platform, params.dit.dtype, model.dit.head_dim)
    sharding = SingleDeviceSharding(device)
    compile_ = functools.partial(_compile, sharding, matmul_precision(params.dit.dtype))
    channels, (height, width) = model.dit.in_channels, cfg.latent_size

    def array(shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    number, scalar, flag = array((), jnp.int32), array(()), array((), jnp.bool_)
    key = array((), jax.eval_shape(lambda: jax.random.key(0)).dtype)
    context = array((1, model.dit.text_len, model.dit.text_dim), params.dit.dtype)

    def latents(count: int) -> jax.ShapeDtypeStruct:
        return array((count, height, width, channels))

    first, block = cfg.first_latents, cfg.frames_per_block
    again = (latents(block),) * (cfg.steps - 1)
    prompt_kv, prompt = compile_(functools.partial(dit.prompt_kv, model.dit), params.dit, context)
    init_state, one_row = compile_(
        functools.partial(state.init_stream_state, model.dit, cfg, params.dit.dtype)
    )
    draw_first, _ = compile_(functools.partial(noise.draw_first, cfg, channels), key)
    draw_chunk, _ = compile_(functools.partial(noise.draw_chunk, cfg, channels), key, number, donate=(1,))
    blend, _ = compile_(_blend, context, context, scalar)

    one_step = functools.partial(step.step_chunk, model.dit, cfg, attention=attention)

    def compile_step(count: int) -> Program:
        x = latents(count)
        return compile_(one_step, params.dit, prompt, one_row, x, number, number, x, flag, donate=(2,))[0]

    step_first = compile_step(first)
    step_chunk = open_rows = tick = None
    if cfg.mode == "stream":
        open_rows, all_rows = compile_(functools.partial(state.open_rows, cfg), one_row)
        tick, _ = compile_(
            functools.partial(step.tick, model.dit, cfg, attention=attention),
            params.dit, prompt, all_rows, latents(block), number, again, donate=(2,),
        )  # fmt: skip
    else:
        step_chunk = compile_step(block)

    encode_first = encode = None
    if cfg.task == "v2v":

        def frames(count: int) -> jax.ShapeDtypeStruct:
            return array((count, cfg.height, cfg.width, 3), jnp.uint8)

        encode_first, (input_state, _) = compile_(
            functools.partial(pixels.encode_first_group, model.vae),
            params.encoder, frames(cfg.first_frames), latents(first), scalar,
        )  # fmt: skip
        encode, _ = compile_(
            functools.partial(pixels.encode_chunk, model.vae),
            params.encoder, input_state, frames(cfg.chunk_frames), latents(block), scalar, donate=(1,),
        )  # fmt: skip

    decoder_cfg = model.taehv if cfg.decoder == "taehv" else model.vae
    decode_first, (decoder_state, _) = compile_(
        functools.partial(pixels.decode_first_group, decoder_cfg, pixels=pixel_format),
        params.decoder, latents(first),
    )  # fmt: skip
    decode, _ = compile_(
        functools.partial(pixels.decode_chunk, decoder_cfg, pixels=pixel_format),
        params.decoder, decoder_state, latents(block), donate=(1,),
    )  # fmt: skip
    return Programs(
        init_state, draw_first, draw_chunk, prompt_kv, blend, encode_first, encode, step_first, step_chunk,
        open_rows, tick, decode_first, decode,
    )  # fmt: skip


def matmul_precision(dtype: jnp.dtype) -> str:
    """Returns JAX's precision for products in a dtype: float32 means float32, not TensorFloat-32 or bfloat16."""
    return "highest" if dtype == jnp.float32 else "default"


def _compile(
    sharding: SingleDeviceSharding,
    precision: str,
    function: Program,
    *args: Any,
    donate: tuple[int, ...] = (),
) -> tuple[Program, Any]:
    """Returns the executable and its results as ShapeDtypeStructs placed on the device."""
    leaves, structure = jax.tree.flatten(args)
    shapes = tuple((x.shape, x.dtype) for x in leaves)
    call = function if isinstance(function, functools.partial) else functools.partial(function)
    static = (call.func, call.args, tuple(sorted(call.keywords.items())))
    return _compile_once(static, structure, shapes, donate, sharding, precision)


@functools.lru_cache(maxsize=64)
def _compile_once(static, structure, shapes, donate, sharding, precision) -> tuple[Program, Any]:
    """Compiles one program; streams that differ elsewhere share it (the VAE's do not depend on the steps)."""
    function, positional, keywords = static
    args = structure.unflatten([jax.ShapeDtypeStruct(*s, sharding=sharding) for s in shapes])
    bound = functools.partial(function, *positional, **dict(keywords))
    with jax.default_matmul_precision(precision):
        lowered = jax.jit(bound, donate_argnums=donate, out_shardings=sharding).lower(*args)
    results = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), lowered.out_info
    )
    return lowered.compile(), results


def _blend(old: jax.Array, new: jax.Array, weight: jax.Array) -> jax.Array:
    start, end = old.astype(jnp.float32), new.astype(jnp.float32)
    # Exact at both ends, and where old and new agree.
    return jnp.where(weight < 1, start + (end - start) * weight, end).astype(old.dtype)
