"""UMT5's encoder, which turns prompt tokens into the context of the DiT's cross attention.

Source: Wan2.1 (`wan/modules/t5.py`), UMT5 (every block has its own relative position bias). It is split into
the items "text.embed", "text.block.000", ... and "text.head" with one function each, so that the 11 GB of
UMT5-XXL need not be in memory at once. Computed in the parameters' dtype; norms, logits and the softmax in
float32. Axes: B prompts, P tokens, E model width, N heads, D head dim; Q and K are P as query and as key.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from svd2_jax.config import TextConfig

Params = Any  # nested dict of arrays, the parameters of one item

EMBED_ITEM = "text.embed"
HEAD_ITEM = "text.head"
NORM_EPS = 1e-6


def block_item(layer: int) -> str:
    """Returns the name of the checkpoint item that holds block `layer`."""
    return f"text.block.{layer:03d}"


class _RMSNorm(nn.Module):
    """Divides by the root mean square over the channels (no mean removed), times a learned scale."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones_init(), (x.shape[-1],))
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + NORM_EPS)
        return x32.astype(x.dtype) * scale.reshape((1,) * (x.ndim - 1) + (-1,))


class _Attention(nn.Module):
    """Self-attention with a learned bias per distance; unlike usual the logits are not scaled."""

    cfg: TextConfig

    @nn.compact
    def __call__(self, x_BPE: jax.Array, mask_BP: jax.Array) -> jax.Array:
        cfg = self.cfg
        batch, tokens, width = x_BPE.shape
        heads = (batch, tokens, cfg.num_heads, cfg.dim_attn // cfg.num_heads)
        q_BQND = _linear(cfg.dim_attn, "q")(x_BPE).reshape(heads)
        k_BKND = _linear(cfg.dim_attn, "k")(x_BPE).reshape(heads)
        v_BKND = _linear(cfg.dim_attn, "v")(x_BPE).reshape(heads)
        buckets = (cfg.num_buckets, cfg.num_heads)
        table = self.param("position_bias", nn.initializers.normal(), buckets)
        buckets_QK = relative_buckets(tokens, cfg.num_buckets, cfg.max_distance)
        bias_QKN = table.astype(jnp.float32)[buckets_QK]
        logits_BNQK = jnp.einsum("BQND,BKND->BNQK", q_BQND, k_BKND, preferred_element_type=jnp.float32)
        logits_BNQK = logits_BNQK + jnp.moveaxis(bias_QKN, -1, 0)[None]
        logits_BNQK = jnp.where(mask_BP[:, None, None, :] > 0, logits_BNQK, jnp.finfo(jnp.float32).min)
        weights_BNQK = jax.nn.softmax(logits_BNQK, axis=-1).astype(x_BPE.dtype)
        y_BQND = jnp.einsum("BNQK,BKND->BQND", weights_BNQK, v_BKND)
        return _linear(width, "o")(y_BQND.reshape(batch, tokens, cfg.dim_attn))


class _MLP(nn.Module):
    cfg: TextConfig

    @nn.compact
    def __call__(self, x_BPE: jax.Array) -> jax.Array:
        cfg = self.cfg
        gate = nn.gelu(_linear(cfg.dim_ffn, "gate")(x_BPE), approximate=True)
        up = _linear(cfg.dim_ffn, "up")(x_BPE)
        return _linear(cfg.dim, "down")(up * gate)


class Block(nn.Module):
    """One encoder block; parameters of the items "text.block.000", "text.block.001", ..."""

    cfg: TextConfig

    @nn.compact
    def __call__(self, x_BPE: jax.Array, mask_BP: jax.Array) -> jax.Array:
        x_BPE = x_BPE + _Attention(self.cfg, name="attn")(_RMSNorm(name="norm_attn")(x_BPE), mask_BP)
        return x_BPE + _MLP(self.cfg, name="mlp")(_RMSNorm(name="norm_mlp")(x_BPE))


def _linear(features: int, name: str) -> nn.Dense:
    return nn.Dense(features, use_bias=False, name=name)


def relative_buckets(tokens: int, num_buckets: int, max_distance: int) -> np.ndarray:
    """Returns the int32 bucket [query, key] of every distance between two tokens (T5).

    The first half of the buckets is for keys at or before the query, the second for keys behind it. Within a
    half, small distances have a bucket each, larger ones share logarithmically up to `max_distance`.
    """
    position = np.arange(tokens)
    distance = position[None, :] - position[:, None]
    half = num_buckets // 2
    exact = half // 2
    size = np.abs(distance)
    # Single precision as in the source: the rounding decides the bucket at its edges.
    log = np.log(np.maximum(size, 1).astype(np.float32) / np.float32(exact))
    shared = exact + (log / np.float32(math.log(max_distance / exact)) * np.float32(half - exact)).astype(int)
    bucket = np.where(size < exact, size, np.minimum(shared, half - 1))
    return (bucket + half * (distance > 0)).astype(np.int32)


def embed(params: Params, ids: jax.Array) -> jax.Array:
    """Returns token embeddings [B, P, E] of int32 `ids` [B, P]; `params` is the tree of "text.embed"."""
    return params["embedding"][ids]


def run_block(cfg: TextConfig, params: Params, x: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns activations [B, P, E] after one block.

    Args:
      cfg: sizes (static).
      params: tree of one "text.block.NNN".
      x: activations [B, P, E] in the parameters' dtype.
      mask: int32 [B, P], 1 for tokens and 0 for padding, which no token attends to.
    """
    return cast(jax.Array, Block(cfg).apply({"params": params}, x, mask))


def head(params: Params, x: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns the normed activations [B, P, E], zero at padding; `params` is the tree of "text.head"."""
    y = cast(jax.Array, _RMSNorm().apply({"params": params["norm"]}, x))
    return jnp.where(mask[:, :, None] > 0, y, jnp.zeros((), y.dtype))


Run = Callable[..., jax.Array]
"""Runs a function of static arguments, a tuple, and of arrays."""


def run_jitted(function: Callable[..., jax.Array], static: tuple[Any, ...], *arrays: Any) -> jax.Array:
    """Runs a function wherever its arrays are."""
    return _jitted(function, len(static))(*static, *arrays)


@functools.cache
def _jitted(function: Callable[..., jax.Array], static: int) -> Callable[..., jax.Array]:
    return jax.jit(function, static_argnums=tuple(range(static)))


def encode(
    cfg: TextConfig,
    read_item: Callable[[str], Params],
    ids: jax.typing.ArrayLike,
    mask: jax.typing.ArrayLike,
    run: Run = run_jitted,
) -> jax.Array:
    """Returns prompt embeddings [B, P, E] in the parameters' dtype, zero at padding.

    Runs block by block, so that no more than one block's parameters need to be there at a time.

    Args:
      cfg: sizes.
      read_item: returns the tree of a text item; asked once for each, in order.
      ids: int32 [B, P].
      mask: int32 [B, P], 1 for tokens and 0 for padding.
      run: how its functions run.
    """
    x = run(embed, (), read_item(EMBED_ITEM), ids)
    for layer in range(cfg.num_layers):
        x = run(run_block, (cfg,), read_item(block_item(layer)), x, mask)
    return run(head, (), read_item(HEAD_ITEM), x, mask)


def abstract_params(cfg: TextConfig, dtype: Any = jnp.float32) -> dict[str, Params]:
    """Returns {item: tree} of ShapeDtypeStruct for all text items; computes nothing."""

    def init_block() -> Params:
        x, mask = jnp.zeros((1, 1, cfg.dim)), jnp.ones((1, 1), jnp.int32)
        block = Block(cfg).init(jax.random.key(0), x, mask)["params"]
        return jax.tree.map(lambda leaf: leaf.astype(dtype), block)

    block = jax.eval_shape(init_block)
    return {
        EMBED_ITEM: {"embedding": jax.ShapeDtypeStruct((cfg.vocab, cfg.dim), dtype)},
        **{block_item(layer): block for layer in range(cfg.num_layers)},
        HEAD_ITEM: {"norm": {"scale": jax.ShapeDtypeStruct((cfg.dim,), dtype)}},
    }
