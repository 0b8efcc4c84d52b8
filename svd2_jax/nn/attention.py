"""Scaled dot-product attention over a KV cache of which only the first slots may be valid."""

from __future__ import annotations

import math
from typing import Literal

import jax
import jax.numpy as jnp
from einops import rearrange

from svd2_jax.nn.quantised import MaybeQuantised, Quantised, dequantise

AttentionImplementation = Literal["auto", "xla", "blocked", "cudnn"]

PLAIN_LOGITS_LIMIT = 1 << 24  # logits beyond which "auto" stops materialising them all (64 MiB in float32)
GPU_PLAIN_LOGITS_LIMIT = 1 << 27  # the same on a GPU (512 MiB): a loop over blocks is no part of a CUDA graph
KEY_BLOCK = 2048  # keys per block of the online softmax
CUDNN_MAX_HEAD_DIM = 128
MASKED = -1e30  # finite, so that a block without any valid key gives no NaN


def attend(
    q_BQND: jax.Array,
    k_BKND: MaybeQuantised,
    v_BKND: MaybeQuantised,
    kv_len_B: jax.Array | None = None,
    implementation: AttentionImplementation = "auto",
) -> jax.Array:
    """Returns softmax(q k^T / sqrt(D)) v of shape [B, Q, N, D] in the query's dtype; softmax in float32.

    Args:
      q_BQND: queries.
      k_BKND: keys, same dtype as the queries or quantised over D; B may be 1 to serve all rows.
      v_BKND: values, shaped and held like the keys.
      kv_len_B: int32 number of leading keys that are valid for each row (at least 1), or None for all.
      implementation: "xla" materialises the logits; "blocked" keeps an online softmax over blocks of keys, one
        head at a time (Milakov & Gimelshein 2018), for large sizes without a fused kernel; "cudnn" is the fused
        GPU kernel (16-bit, D a multiple of 8 up to 128; it gets a dequantised copy of what is in 8 bits); "auto" takes
        "xla" or, where that would be large, "blocked"; an NVIDIA GPU may have it larger than other devices.
    """
    rows = q_BQND.shape[0]
    k_BKND, v_BKND = jax.tree.map(lambda x: jnp.broadcast_to(x, (rows, *x.shape[1:])), (k_BKND, v_BKND))
    if implementation == "auto":
        logits = math.prod(q_BQND.shape[:3]) * k_BKND.shape[1]
        if PLAIN_LOGITS_LIMIT < logits <= GPU_PLAIN_LOGITS_LIMIT:
            return jax.lax.platform_dependent(
                q_BQND, k_BKND, v_BKND, kv_len_B, cuda=_attend_plain, default=_attend_blocked
            )
        implementation = "xla" if logits <= PLAIN_LOGITS_LIMIT else "blocked"
    if implementation == "cudnn":
        k_BKND, v_BKND = dequantise(k_BKND, q_BQND.dtype), dequantise(v_BKND, q_BQND.dtype)
        return jax.nn.dot_product_attention(
            q_BQND, k_BKND, v_BKND, key_value_seq_lengths=kv_len_B, implementation="cudnn"
        )
    if implementation == "blocked":
        return _attend_blocked(q_BQND, k_BKND, v_BKND, kv_len_B)
    return _attend_plain(q_BQND, k_BKND, v_BKND, kv_len_B)


def fused_if_possible(platform: str, dtype: jnp.dtype, head_dim: int) -> AttentionImplementation:
    """Returns "cudnn" where a device of this platform ("gpu", "cpu") has that kernel, else "auto"."""
    half = dtype in (jnp.bfloat16, jnp.float16)
    fits = head_dim <= CUDNN_MAX_HEAD_DIM and head_dim % 8 == 0
    return "cudnn" if platform == "gpu" and half and fits else "auto"


def _attend_plain(q_BQND, k_BKND, v_BKND, kv_len_B):
    scale = 1.0 / math.sqrt(q_BQND.shape[-1])
    keys_BKND, values_BKND = _unscaled(k_BKND, q_BQND.dtype), _unscaled(v_BKND, q_BQND.dtype)
    logits_BNQK = jnp.einsum("BQND,BKND->BNQK", q_BQND, keys_BKND, preferred_element_type=jnp.float32) * scale
    logits_BNQK = _scaled(logits_BNQK, k_BKND, "B K N 1 -> B N 1 K")
    if kv_len_B is not None:
        valid_BK = jnp.arange(k_BKND.shape[1], dtype=jnp.int32)[None, :] < kv_len_B[:, None]
        logits_BNQK = jnp.where(valid_BK[:, None, None, :], logits_BNQK, MASKED)
    weights_BNQK = _scaled(jax.nn.softmax(logits_BNQK, axis=-1), v_BKND, "B K N 1 -> B N 1 K")
    return jnp.einsum("BNQK,BKND->BQND", weights_BNQK.astype(values_BKND.dtype), values_BKND)


def _attend_blocked(q_BQND, k_BKND, v_BKND, kv_len_B):
    B, Q, N, D = q_BQND.shape
    K = k_BKND.shape[1]
    blocks = -(-K // KEY_BLOCK)
    size = -(-K // blocks)
    padded = blocks * size
    masked = kv_len_B is not None or padded != K
    length_B = jnp.full((B,), K, jnp.int32) if kv_len_B is None else kv_len_B
    scale = 1.0 / math.sqrt(D)

    def split(x_BKND):
        x_BKND = jnp.pad(x_BKND, ((0, 0), (0, padded - K), (0, 0), (0, 0)))
        return rearrange(x_BKND, "B (J K) N D -> (B N) J K D", J=blocks)

    def one_head(args):
        q_QD, k_JKD, v_JKD, length = args

        def step(carry, block):
            best_Q, total_Q, out_QD = carry
            k_KD, v_KD, j = block
            keys_KD, values_KD = _unscaled(k_KD, q_QD.dtype), _unscaled(v_KD, q_QD.dtype)
            logits_QK = jnp.einsum("QD,KD->QK", q_QD, keys_KD, preferred_element_type=jnp.float32) * scale
            logits_QK = _scaled(logits_QK, k_KD, "K 1 -> 1 K")
            if masked:
                valid_K = j * size + jnp.arange(size, dtype=jnp.int32) < length
                logits_QK = jnp.where(valid_K[None, :], logits_QK, MASKED)
            new_Q = jnp.maximum(best_Q, logits_QK.max(axis=-1))
            weights_QK = jnp.exp(logits_QK - new_Q[:, None])
            shrink_Q = jnp.exp(best_Q - new_Q)
            total_Q = total_Q * shrink_Q + weights_QK.sum(axis=-1)
            weights_QK = _scaled(weights_QK, v_KD, "K 1 -> 1 K").astype(values_KD.dtype)
            part_QD = jnp.einsum("QK,KD->QD", weights_QK, values_KD, preferred_element_type=jnp.float32)
            return (new_Q, total_Q, out_QD * shrink_Q[:, None] + part_QD), None

        # Like the queries, not plain zeros: under `shard_map` a carry has to vary over the mesh as its results do.
        out_QD = jnp.zeros_like(q_QD, jnp.float32)
        start = jnp.full_like(out_QD[:, 0], MASKED), jnp.zeros_like(out_QD[:, 0]), out_QD
        (_, total_Q, out_QD), _ = jax.lax.scan(
            step, start, (k_JKD, v_JKD, jnp.arange(blocks, dtype=jnp.int32))
        )
        return (out_QD / total_Q[:, None]).astype(q_BQND.dtype)

    q_XQD = q_BQND.transpose(0, 2, 1, 3).reshape(B * N, Q, D)
    k_XJKD, v_XJKD = jax.tree.map(split, (k_BKND, v_BKND))
    out_XQD = jax.lax.map(one_head, (q_XQD, k_XJKD, v_XJKD, jnp.repeat(length_B, N)))
    return out_XQD.reshape(B, N, Q, D).transpose(0, 2, 1, 3)


def _unscaled(x: MaybeQuantised, dtype: jnp.dtype) -> jax.Array:
    """Returns keys or values in the dtype, but for the scales that `_scaled` folds into what has one number a key."""
    return x.values.astype(dtype) if isinstance(x, Quantised) else x


def _scaled(weights: jax.Array, of: MaybeQuantised, axes: str) -> jax.Array:
    """Returns logits, or weights, times the scales of the keys, or values, that they belong to."""
    return weights * rearrange(of.scales, axes) if isinstance(of, Quantised) else weights
