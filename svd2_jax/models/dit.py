"""The causal diffusion transformer (Wan2.1 architecture with a rolling KV cache).

Modules define parameters; everything that changes from tick to tick is an argument and a result. The forward
pass is split where a pipeline cuts it: `condition` (timestep modulations), `embed`, `run_block`, `head`.
Parameters are one leaf per layer and layers are unrolled, because stacked weights are copied every tick on a
GPU.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax.linen.dtypes import promote_dtype
from jax.tree_util import register_dataclass

from svd2_jax.config import TRAIN_TIMESTEPS, DiTConfig, StreamConfig
from svd2_jax.nn import kv_cache
from svd2_jax.nn.attention import AttentionImplementation, attend
from svd2_jax.nn.kv_cache import LayerCache, WritePlan
from svd2_jax.nn.quantised import Quantised, quantise
from svd2_jax.nn.rope import apply_rope

TIMESTEP_PERIOD = 10000.0
_BLOCK = "dit.block."
Params = dict[str, Any]


@register_dataclass
@dataclass(frozen=True)
class DiTParams:
    """What a tick reads: the patch embedding, the blocks in order, the head."""

    patch: Params
    blocks: tuple[Params, ...]
    head: Params

    @property
    def dtype(self) -> jnp.dtype:
        """The parameters' dtype, which is the compute dtype."""
        return self.patch["patch"]["kernel"].dtype


@register_dataclass
@dataclass(frozen=True)
class PromptKV:
    """Cross-attention keys and values of a prompt, per layer [1, P, N, D]; computed once per prompt."""

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]


@register_dataclass
@dataclass(frozen=True)
class Conditioning:
    """What the timesteps of the rows contribute.

    Attributes:
      timestep: int32 [B] in [0, 1000].
      time: float32 [B, E] its embedding, for the head.
      modulation: float32 [B, 6, E] its projection, for the blocks.
    """

    timestep: jax.Array
    time: jax.Array
    modulation: jax.Array


def _layer_norm(x: jax.Array, eps: float) -> jax.Array:
    """Normalises over the last axis in float32, without scale; returns float32."""
    x = x.astype(jnp.float32)
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt((centred * centred).mean(axis=-1, keepdims=True) + eps)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, computed in float32, with a learned scale."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the normalised x in x's dtype."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt((y * y).mean(axis=-1, keepdims=True) + self.eps)
        return y.astype(x.dtype) * _over_last(scale, x)


def _over_last(vector: jax.Array, x: jax.Array) -> jax.Array:
    """Reshapes a vector so that it broadcasts over the last axis of x; in x's dtype."""
    return vector.astype(x.dtype).reshape((1,) * (x.ndim - 1) + vector.shape)


class Dense(nn.Module):
    """A linear layer, as Flax has it, whose kernel may be quantised over its inputs."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., in] -> [..., features]."""
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        scales = None
        if isinstance(kernel, Quantised):
            # Exact in 16 bits; the scale of an output channel is taken out of its sum.
            kernel, scales = kernel.values.astype(x.dtype), kernel.scales
        x, kernel, bias = promote_dtype(x, kernel, bias)
        y = jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))
        if scales is not None:
            y = (y.astype(jnp.float32) * _over_last(scales[0], y)).astype(y.dtype)
        return y + _over_last(bias, y)


class Attention(nn.Module):
    """Projections of one attention: queries and keys are normalised over all heads together."""

    cfg: DiTConfig

    def setup(self):
        """Defines the four projections and the two norms."""
        self.q, self.k, self.v, self.o = (Dense(self.cfg.dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(self.cfg.eps), RMSNorm(self.cfg.eps)

    def query(self, x: jax.Array) -> jax.Array:
        """[B, Q, E] -> [B, Q, N, D]."""
        return self._heads(self.norm_q(self.q(x)))

    def key_value(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[B, K, E] -> keys and values [B, K, N, D]."""
        return self._heads(self.norm_k(self.k(x))), self._heads(self.v(x))

    def out(self, y_BQND: jax.Array) -> jax.Array:
        """[B, Q, N, D] -> [B, Q, E]."""
        return self.o(y_BQND.reshape(*y_BQND.shape[:2], -1))

    def _heads(self, x):
        return x.reshape(*x.shape[:2], self.cfg.num_heads, self.cfg.head_dim)


class Block(nn.Module):
    """One transformer block: cached self-attention, cross-attention to the prompt, MLP.

    The cache write lies between `project` and `finish`, so that a pipeline stage can gate either side of it.
    """

    cfg: DiTConfig

    def setup(self):
        """Defines the block's parameters."""
        cfg = self.cfg
        self.modulation = self.param("modulation", nn.initializers.normal(cfg.dim**-0.5), (6, cfg.dim))
        self.self_attn, self.cross_attn = Attention(cfg), Attention(cfg)
        self.norm_cross = nn.LayerNorm(epsilon=cfg.eps, use_fast_variance=False)
        self.mlp_up, self.mlp_down = Dense(cfg.ffn_dim), Dense(cfg.dim)

    def project(
        self, x: jax.Array, modulation_B6E: jax.Array, rope: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns rotated queries and keys and the values [B, Q, N, D] of hidden states x [B, Q, E]."""
        shift, scale = self._modulation(modulation_B6E)[:2]
        y = self._modulate(x, shift, scale)
        k, v = self.self_attn.key_value(y)
        return apply_rope(self.self_attn.query(y), *rope), apply_rope(k, *rope), v

    def finish(
        self,
        x: jax.Array,
        q_BQND: jax.Array,
        caches: Sequence[LayerCache],
        kv_lens: Sequence[jax.Array],
        prompt_k: jax.Array,
        prompt_v: jax.Array,
        modulation_B6E: jax.Array,
        attention: AttentionImplementation,
    ) -> jax.Array:
        """Returns the block's output [B, Q, E] from its queries and the caches that hold the chunks themselves."""
        _, _, gate, mlp_shift, mlp_scale, mlp_gate = self._modulation(modulation_B6E)
        # Each stream's rows look into its own cache: caches of several streams are never copied together.
        seen = [
            attend(q, cache.k, cache.v, kv_len_B, attention)
            for q, cache, kv_len_B in zip(_over_streams(q_BQND, caches), caches, kv_lens, strict=True)
        ]
        x = _add(x, self.self_attn.out(_joined(seen)), gate)
        q = self.cross_attn.query(self.norm_cross(x))
        x = x + self.cross_attn.out(attend(q, prompt_k, prompt_v, implementation=attention))
        y = self._modulate(x, mlp_shift, mlp_scale)
        return _add(x, self.mlp_down(nn.gelu(self.mlp_up(y), approximate=True)), mlp_gate)

    def prompt_kv(self, context_BPE: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the cross-attention keys and values [B, P, N, D] of an embedded prompt [B, P, E]."""
        return self.cross_attn.key_value(context_BPE)

    def __call__(self, x, modulation_B6E, rope, context_BPE):
        """Defines all parameters (for initialisation): the block on a chunk that sees only itself."""
        q, k, v = self.project(x, modulation_B6E, rope)
        none = jnp.zeros((0,), jnp.int32)
        chunk = LayerCache(k, v, none, none, none)
        length = jnp.full((x.shape[0],), x.shape[1], jnp.int32)
        return self.finish(x, q, [chunk], [length], *self.prompt_kv(context_BPE), modulation_B6E, "xla")

    def _modulation(self, modulation_B6E):
        summed = self.modulation.astype(jnp.float32)[None] + modulation_B6E
        return [summed[:, i, None] for i in range(6)]

    def _modulate(self, x, shift, scale):
        return (_layer_norm(x, self.cfg.eps) * (1 + scale) + shift).astype(x.dtype)


def _over_streams(x: jax.Array, caches: Sequence[LayerCache]) -> list[jax.Array]:
    """Splits an array over all rows into each stream's, as many as its cache has."""
    if len(caches) == 1:
        return [x]
    ends = list(itertools.accumulate(cache.k.shape[0] for cache in caches))
    return [x[end - cache.k.shape[0] : end] for end, cache in zip(ends, caches, strict=True)]


def _joined(parts: Sequence[jax.Array]) -> jax.Array:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def _add(x: jax.Array, y: jax.Array, gate: jax.Array) -> jax.Array:
    """Returns x + y * gate in x's dtype, summed in float32."""
    return (x.astype(jnp.float32) + y.astype(jnp.float32) * gate).astype(x.dtype)


class Embed(nn.Module):
    """Patch, prompt and timestep embeddings."""

    cfg: DiTConfig

    def setup(self):
        """Defines the embeddings' parameters."""
        dim = self.cfg.dim
        self.patch = nn.Dense(dim)
        self.text_in, self.text_out = nn.Dense(dim), nn.Dense(dim)
        self.time_in, self.time_out, self.time_proj = nn.Dense(dim), nn.Dense(dim), nn.Dense(6 * dim)

    def patches(self, x_BFHWC: jax.Array) -> jax.Array:
        """Latents [B, F, h, w, C] -> tokens [B, Q, E]."""
        _, q, r = self.cfg.patch
        return self.patch(rearrange(x_BFHWC, "B F (h q) (w r) C -> B (F h w) (q r C)", q=q, r=r))

    def text(self, context_BPT: jax.Array) -> jax.Array:
        """Text encoder output [B, P, text_dim] -> [B, P, E]."""
        return self.text_out(nn.gelu(self.text_in(context_BPT), approximate=True))

    def time(self, timestep_B: jax.Array, dtype: jnp.dtype) -> Conditioning:
        """Timesteps, int32 [B] in [0, 1000] -> their embedding and block modulations, computed in `dtype`."""
        wave = jnp.asarray(_timestep_waves(self.cfg.freq_dim), dtype)[timestep_B]
        time = self.time_out(nn.silu(self.time_in(wave)))
        modulation = self.time_proj(nn.silu(time)).reshape(-1, 6, self.cfg.dim)
        return Conditioning(timestep_B, time.astype(jnp.float32), modulation.astype(jnp.float32))

    def __call__(self, x_BFHWC, context_BPT, timestep_B):
        """Defines all parameters (for initialisation)."""
        return self.patches(x_BFHWC), self.text(context_BPT), self.time(timestep_B, jnp.float32)


@functools.cache
def _timestep_waves(channels: int) -> np.ndarray:
    """Sinusoidal embedding [1001, channels] of every timestep; angles up to 1000 rad need float64."""
    half = channels // 2
    frequencies = TIMESTEP_PERIOD ** -(np.arange(half, dtype=np.float64) / half)
    angles = np.outer(np.arange(TRAIN_TIMESTEPS + 1, dtype=np.float64), frequencies)
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32)


class Head(nn.Module):
    """Final norm, modulation and projection to patches of velocity."""

    cfg: DiTConfig

    @nn.compact
    def __call__(self, x: jax.Array, time_BE: jax.Array) -> jax.Array:
        """Returns patches [B, Q, patch * C_out] of hidden states [B, Q, E]."""
        cfg = self.cfg
        table = self.param("modulation", nn.initializers.normal(cfg.dim**-0.5), (2, cfg.dim))
        shift, scale = (table.astype(jnp.float32)[i][None] + time_BE for i in range(2))
        y = _layer_norm(x, cfg.eps) * (1 + scale[:, None]) + shift[:, None]
        return nn.Dense(math.prod(cfg.patch) * cfg.out_channels, name="proj")(y.astype(x.dtype))


def _apply(module: nn.Module, params: Params, *args: Any, method: str | None = None) -> Any:
    """Runs a module as a pure function of its parameters."""
    return module.apply({"params": params}, *args, method=method)


def condition(cfg: DiTConfig, conditioner: Params, timestep_B: jax.Array, dtype: jnp.dtype) -> Conditioning:
    """Returns the modulations of the rows' timesteps (int32 [B]), computed in `dtype`."""
    return _apply(Embed(cfg), conditioner, timestep_B, dtype, method="time")


def embed_text(cfg: DiTConfig, conditioner: Params, context_BPT: jax.Array) -> jax.Array:
    """Returns the context [B, P, E] of text embeddings [B, P, text_dim]."""
    return _apply(Embed(cfg), conditioner, context_BPT, method="text")


def prompt_kv(cfg: DiTConfig, blocks: tuple[Params, ...], context_BPE: jax.Array) -> PromptKV:
    """Returns the blocks' cross-attention keys and values of an embedded prompt [1, P, E]."""
    pairs = []
    for params in blocks:
        # Else XLA:GPU copies all blocks' projections together, to make one product of them.
        context_BPE = jax.lax.optimization_barrier(context_BPE)
        pairs.append(_apply(Block(cfg), params, context_BPE, method="prompt_kv"))
    return PromptKV(tuple(k for k, _ in pairs), tuple(v for _, v in pairs))


def embed(cfg: DiTConfig, patch: Params, x_BFHWC: jax.Array) -> jax.Array:
    """Returns the tokens [B, Q, E] of latents [B, F, h, w, C]."""
    return _apply(Embed(cfg), patch, x_BFHWC, method="patches")


def run_block(
    cfg: DiTConfig,
    stream: StreamConfig,
    params: Params,
    x: jax.Array,
    caches: Sequence[LayerCache],
    plans: Sequence[WritePlan],
    kv_lens: Sequence[jax.Array],
    prompts: Sequence[tuple[jax.Array, jax.Array]],
    conditioning: Conditioning,
    rope: tuple[jax.Array, jax.Array],
    frames: int,
    attention: AttentionImplementation,
    used: jax.Array | None = None,
) -> tuple[jax.Array, tuple[LayerCache, ...]]:
    """Runs one block on hidden states x [B, Q, E]; returns its output and the written caches.

    The B rows are those of one stream after the other.

    Args:
      cfg: sizes.
      stream: cache geometry.
      params: the block's parameters.
      x: hidden states [B, Q, E].
      caches: the block's cache of each stream.
      plans: where each stream's chunks go in it.
      kv_lens: int32 [rows] tokens of each stream's cache that are valid after the write.
      prompts: cross-attention keys and values [1, P, N, D] of each row's prompt.
      conditioning: the rows' modulations.
      rope: cosines and sines of the rows' positions.
      frames: latent frames of the chunk.
      attention: see `attend`.
      used: bool [] whether the block is there at all; where False, x and the caches come back as they were. None
        is True, without a branch. A branch may read a cache and must not return it: that would copy it.
    """
    block = Block(cfg)
    modulation = conditioning.modulation

    def project():
        return _apply(block, params, x, modulation, rope, method="project")

    def finish():
        k, v = (jnp.concatenate([prompt[i] for prompt in prompts]) for i in (0, 1))
        return _apply(block, params, x, q, caches, kv_lens, k, v, modulation, attention, method="finish")

    def written():
        streams = zip(caches, plans, _over_streams(k, caches), _over_streams(v, caches), strict=True)
        return tuple(kv_cache.write(stream, *one, frames) for one in streams)

    if used is None:
        q, k, v = project()
        caches = written()
        return finish(), caches
    heads = x.reshape(*x.shape[:2], cfg.num_heads, cfg.head_dim)
    q, k, v = jax.lax.cond(used, project, lambda: (heads, heads, heads))
    plans = [dataclasses.replace(plan, active=plan.active & used) for plan in plans]
    caches = written()
    return jax.lax.cond(used, finish, lambda: x), caches


def head(
    cfg: DiTConfig, params: Params, x: jax.Array, time_BE: jax.Array, grid: tuple[int, int]
) -> jax.Array:
    """Returns the velocity, float32 [B, F, h, w, C], of hidden states [B, Q, E] on a token grid (h, w)."""
    patches = _apply(Head(cfg), params, x, time_BE)
    _, q, r = cfg.patch
    h, w = grid
    return rearrange(
        patches.astype(jnp.float32), "B (F h w) (q r c) -> B F (h q) (w r) c", h=h, w=w, q=q, r=r
    )


def embed_item() -> str:
    """Returns the checkpoint item of the embeddings."""
    return "dit.embed"


def block_item(index: int) -> str:
    """Returns the checkpoint item of block `index`."""
    return f"{_BLOCK}{index:03d}"


def is_block(item: str) -> bool:
    """Returns whether a checkpoint item is a block."""
    return item.startswith(_BLOCK)


def head_item() -> str:
    """Returns the checkpoint item of the head."""
    return "dit.head"


def abstract_params(cfg: DiTConfig) -> dict[str, Params]:
    """Returns the shapes (float32 ShapeDtypeStruct) of every checkpoint item of the DiT; computes nothing."""

    def shapes(module: nn.Module, *args: Any) -> Params:
        return jax.eval_shape(lambda: module.init(jax.random.key(0), *args))["params"]

    hidden, time = jnp.zeros((1, 1, cfg.dim)), jnp.zeros((1, cfg.dim))
    latents, context = jnp.zeros((1, *cfg.patch, cfg.in_channels)), jnp.zeros((1, 1, cfg.text_dim))
    angles = jnp.zeros((1, 1, cfg.head_dim // 2))
    block = shapes(Block(cfg), hidden, jnp.zeros((1, 6, cfg.dim)), (angles, angles), hidden)
    return {
        embed_item(): shapes(Embed(cfg), latents, context, jnp.zeros((1,), jnp.int32)),
        **{block_item(i): block for i in range(cfg.num_layers)},
        head_item(): shapes(Head(cfg), hidden, time),
    }


def stored_block(cfg: DiTConfig, block: Params) -> Params:
    """Returns a block's parameters with the kernels of its linear layers held as the configuration says."""

    def one(path: tuple[Any, ...], leaf: jax.Array) -> Any:
        return quantise(leaf, cfg.weight_dtype, axis=0) if path[-1].key == "kernel" else leaf

    return jax.tree_util.tree_map_with_path(one, block)


def split_embed(item: Params) -> tuple[Params, Params]:
    """Splits the item of the embeddings: the patch embedding, which a tick reads, and the rest, the conditioner.

    The conditioner (timestep and text) is large and needed once per chunk or prompt: it stays out of the tick.
    """
    return {"patch": item["patch"]}, {name: leaves for name, leaves in item.items() if name != "patch"}
