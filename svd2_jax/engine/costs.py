"""What the pieces of a pipeline cost, counted from traced shapes, and the split that weighs them.

FLOPs and bytes are counted per chunk (`engine.count_flops`), sizes in bytes per piece. Nothing is compiled and no array
is made, so a model of any size takes about a second, once: results are cached.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import jax
import jax.numpy as jnp

from svd2_jax.config import ModelConfig, StreamConfig
from svd2_jax.engine.balance import best_split
from svd2_jax.engine.count_flops import count_cost
from svd2_jax.engine.kept_programs import kept_value
from svd2_jax.engine.params import abstract_items, decoder_item
from svd2_jax.hardware import Cost, hardware_of_device, roofline
from svd2_jax.models import dit, text_encoder, vae
from svd2_jax.models.dit import Conditioning
from svd2_jax.nn import kv_cache
from svd2_jax.nn.attention import AttentionImplementation, fused_if_possible
from svd2_jax.nn.kv_cache import LayerCache, WritePlan
from svd2_jax.nn.row_shards import RowShards
from svd2_jax.stream import pixels, state, step
from svd2_jax.stream.step import AXIS


@dataclass(frozen=True)
class ChunkCost:
    """What the devices run for one chunk, in one pass through the blocks.

    Attributes:
      encode: frames to noisy latents.
      condition: modulations of the rows' timesteps.
      block: one block, all rows.
      ends: patch embedding and head, which every stage runs.
      decode: clean latents to frames.
    """

    encode: Cost
    condition: Cost
    block: Cost
    ends: Cost
    decode: Cost


@dataclass(frozen=True)
class Sizes:
    """Bytes of what the devices hold.

    Attributes:
      block: weights of one block.
      ends: weights of patch embedding and head.
      conditioner: weights of the text and timestep embeddings.
      encoder: weights of the VAE's encoder; 0 where no video comes in.
      decoder: weights of the decoder in use.
      cache: rolling KV cache of one block, all rows.
      prompt: cross-attention keys and values of one prompt in one block.
      message: the chunks of all rows between two stages, which is also what a hop carries.
      first_message: the same of the first group.
      encode_state: what the encoder remembers of the stream; 0 where no video comes in.
      decode_state: what the decoder remembers of the stream.
    """

    block: int
    ends: int
    conditioner: int
    encoder: int
    decoder: int
    cache: int
    prompt: int
    message: int
    first_message: int
    encode_state: int
    decode_state: int


def default_split(
    model: ModelConfig,
    cfg: StreamConfig,
    dtype: jnp.dtype,
    stages: int,
    device_kind: str,
    vae_devices: int = 1,
) -> tuple[int, ...]:
    """Returns the blocks per stage that a stream starts with.

    Args:
      model: sizes of the networks.
      cfg: what the stream computes.
      dtype: compute dtype.
      stages: number of stages, at most the model's blocks.
      device_kind: JAX's name for the devices. What is known of them weighs arithmetic against memory traffic
        (`hardware.roofline`); for a device that is not known only arithmetic counts.
      vae_devices: how many of them share encoding, and how many decoding.
    """
    if stages == 1:
        return (model.dit.num_layers,)
    hardware = hardware_of_device(device_kind)

    def seconds(work: Cost) -> float:
        return float(work.flops) if hardware is None else roofline(work, hardware, 8 * dtype.itemsize).seconds

    return costs(model, cfg, dtype, vae_devices).fastest_split(stages, seconds)


@functools.lru_cache(maxsize=32)
def costs(model: ModelConfig, cfg: StreamConfig, dtype: jnp.dtype, vae_devices: int = 1) -> CostModel:
    """Returns the costs of a stream; what was counted once is remembered."""
    return CostModel(model, cfg, dtype, vae_devices)


@dataclass(frozen=True)
class CostModel:
    """What a stream costs, each kind of piece traced when it is first asked for.

    Attributes:
      model: sizes of the networks.
      cfg: what the stream computes.
      dtype: of arithmetic, and of weights and cache unless these are held in 8 bits.
      vae_devices: how many devices share encoding, and how many decoding; what both cost and keep is of each.
    """

    model: ModelConfig
    cfg: StreamConfig
    dtype: jnp.dtype
    vae_devices: int = 1

    def fastest_split(self, stages: int, seconds: Callable[[Cost], float]) -> tuple[int, ...]:
        """Returns the blocks per stage whose slowest stage is the fastest possible, encode and decode included.

        In sequential mode the split is even: a chunk goes round the ring alone, so its time is the sum over the
        stages wherever the blocks are, and memory is what is left to even out.
        """
        layers = self.model.dit.num_layers
        if self.cfg.mode != "stream":
            return best_split([1.0] * layers, [0.0] * stages)
        work = self.chunk
        overheads = [seconds(work.ends)] * stages
        overheads[0] += seconds(work.condition)
        for i in range(self.vae_devices):
            overheads[i] += seconds(work.encode)
            overheads[-1 - i] += seconds(work.decode)
        return best_split([seconds(work.block)] * layers, overheads)

    @cached_property
    def chunk(self) -> ChunkCost:
        """The work of a chunk behind the first group, once the cache is full."""
        return kept_value(CostModel._count_chunk, self)

    def _count_chunk(self) -> ChunkCost:
        cfg = self.cfg
        rows, frames = cfg.rows, cfg.frames_per_block
        with _flax_may_promote():
            return ChunkCost(
                encode=self._encode_work(),
                condition=self._condition_work("rows" if cfg.mode == "stream" else "single"),
                block=self._block_work(),
                ends=self._ends_work(rows, frames),
                decode=self._decode_work(),
            )

    @cached_property
    def first_group(self) -> ChunkCost:
        """The work of the first group: one row, which sees only itself."""
        with _flax_may_promote():
            encode = self._count_end(*self._encode_first) if self.cfg.task == "v2v" else Cost()
            return ChunkCost(
                encode=encode,
                condition=self._condition_work("single"),
                block=self._first_block_work(),
                ends=self._ends_work(1, self.cfg.first_latents),
                decode=self._count_end(*self._decode_first),
            )

    @cached_property
    def text(self) -> Cost:
        """The work of the text encoder for one prompt."""
        text, tokens = self.model.text, self.model.dit.text_len
        x, mask = _array((1, tokens, text.dim), self.dtype), _array((1, tokens), jnp.int32)
        block = functools.partial(text_encoder.run_block, text)
        with _flax_may_promote():
            one = count_cost(block, self._items[text_encoder.block_item(0)], x, mask)
        return one * text.num_layers

    @cached_property
    def sizes(self) -> Sizes:
        """Bytes of everything that a pipeline holds."""
        return kept_value(CostModel._measure_sizes, self)

    def _measure_sizes(self) -> Sizes:
        model, video = self.model.dit, self.cfg.task == "v2v"
        block, patch, conditioner, head = self._dit_params
        with _flax_may_promote():
            return Sizes(
                block=_nbytes(block),
                ends=_nbytes((patch, head)),
                conditioner=_nbytes(conditioner),
                encoder=_nbytes(self._items[vae.ENCODER_ITEM]) if video else 0,
                decoder=_nbytes(self._items[decoder_item(self.cfg.decoder)]),
                cache=_nbytes(self._layer_cache),
                prompt=2 * model.text_len * model.dim * self.dtype.itemsize,
                message=self._message_bytes(self.cfg.rows, self.cfg.frames_per_block),
                first_message=self._message_bytes(1, self.cfg.first_latents),
                encode_state=_nbytes(self._encoder_state) if video else 0,
                decode_state=_nbytes(self._decoder_state),
            )

    @property
    def _items(self) -> dict[str, Any]:
        return abstract_items(self.model, self.dtype)

    # --- the two ends of a stream

    @cached_property
    def _encode_first(self) -> tuple[Any, ...]:
        """The encoder's first function and what it takes."""
        function = functools.partial(pixels.encode_first_group, self.model.vae, shards=self._shards)
        params = self._items[vae.ENCODER_ITEM]
        frames, noise = self._frames(self.cfg.first_frames), self._latents(self.cfg.first_latents)
        return function, params, frames, noise, _array(())

    @cached_property
    def _decode_first(self) -> tuple[Any, ...]:
        """The decoder's first function and what it takes."""
        params = self._items[decoder_item(self.cfg.decoder)]
        return self._decoder(pixels.decode_first_group), params, self._latents(self.cfg.first_latents)

    @cached_property
    def _encoder_state(self) -> Any:
        return self._shapes_of_end(*self._encode_first)[0]

    @cached_property
    def _decoder_state(self) -> Any:
        return self._shapes_of_end(*self._decode_first)[0]

    def _encode_work(self) -> Cost:
        if self.cfg.task != "v2v":  # no video comes in
            return Cost()
        function = functools.partial(
            pixels.encode_chunk, self.model.vae, motion_range=self.cfg.motion_range, shards=self._shards
        )
        params, frames = self._encode_first[1], self._frames(self.cfg.chunk_frames)
        noise = self._latents(self.cfg.frames_per_block)
        return self._count_end(function, params, self._encoder_state, frames, noise, _array(()))

    def _decode_work(self) -> Cost:
        latents = self._latents(self.cfg.frames_per_block)
        return self._count_end(
            self._decoder(pixels.decode_chunk), self._decode_first[1], self._decoder_state, latents
        )

    def _decoder(self, function: Any) -> Any:
        cfg = pixels.decoder_config(self.model, self.cfg)
        return functools.partial(function, cfg, pixels="uint8", shards=self._shards)

    @property
    def _shards(self) -> RowShards | None:
        return RowShards(AXIS, self.vae_devices) if self.vae_devices > 1 else None

    @property
    def _axes(self) -> list[tuple[str, int]]:
        return [(AXIS, self.vae_devices)]

    def _count_end(self, function: Any, *args: Any) -> Cost:
        return count_cost(function, *args, axes=self._axes)

    def _shapes_of_end(self, function: Any, *args: Any) -> Any:
        return jax.make_jaxpr(function, axis_env=self._axes, return_shape=True)(*args)[1]

    # --- the transformer

    @property
    def _dit_params(self) -> tuple[Any, Any, Any, Any]:
        """The shapes of a block, the patch embedding, the conditioner and the head."""
        patch, conditioner = dit.split_embed(self._items[dit.embed_item()])
        return self._items[dit.block_item(0)], patch, conditioner, self._items[dit.head_item()]

    @cached_property
    def _layer_cache(self) -> LayerCache:
        """The cache of one block, all rows."""

        def rows() -> LayerCache:
            one = kv_cache.init_kv_cache(self.model.dit, self.cfg, self.dtype, layers=1)
            return kv_cache.resize_rows(one, self.cfg.rows).layers[0]

        return jax.eval_shape(rows)

    @property
    def _attention(self) -> tuple[bool, AttentionImplementation]:
        """Whether a GPU would take its fused kernel, and what is traced in its place (see `count_cost`)."""
        fused = fused_if_possible("gpu", self.dtype, self.model.dit.head_dim) == "cudnn"
        return fused, "xla" if fused else "auto"

    def _block_work(self) -> Cost:
        model, cfg, rows, frames = self.model.dit, self.cfg, self.cfg.rows, self.cfg.frames_per_block
        fused, attention = self._attention

        def run(params, x, cache, plan, length, prompts, conditioning, rope):
            return dit.run_block(
                model,
                cfg,
                params,
                x,
                [cache],
                [plan],
                [length],
                prompts,
                conditioning,
                rope,
                frames,
                attention,
            )

        x, prompt, conditioning, rope = self._block_inputs(rows, frames)
        flag, number = _array((rows,), jnp.bool_), _array((rows,), jnp.int32)
        plan = WritePlan(active=flag, full=flag, end=number, pop=flag)
        return count_cost(
            run, self._dit_params[0], x, self._layer_cache, plan, number,
            ((prompt, prompt),) * rows, conditioning, rope, fused_attention=fused,
        )  # fmt: skip

    def _first_block_work(self) -> Cost:
        """Counts a block without a cache: a fused kernel reads none of its empty slots."""
        fused, attention = self._attention

        def run(params, x, length, prompt, conditioning, rope):
            block: Any = functools.partial(dit.Block(self.model.dit).apply, {"params": params})
            modulation = conditioning.modulation
            q, k, v = block(x, modulation, rope, method="project")
            itself = LayerCache(k, v, length, length, length)
            return block(x, q, [itself], [length], prompt, prompt, modulation, attention, method="finish")

        x, prompt, conditioning, rope = self._block_inputs(1, self.cfg.first_latents)
        params, length = self._dit_params[0], _array((1,), jnp.int32)
        return count_cost(run, params, x, length, prompt, conditioning, rope, fused_attention=fused)

    def _block_inputs(self, rows: int, frames: int) -> Any:
        """Returns the shapes of hidden states, a prompt's keys or values, the conditioning and rotary angles."""
        model, tokens = self.model.dit, frames * kv_cache.frame_tokens(self.model.dit, self.cfg)
        prompt = _array((1, model.text_len, model.num_heads, model.head_dim), self.dtype)
        conditioning = Conditioning(
            _array((rows,), jnp.int32), _array((rows, model.dim)), _array((rows, 6, model.dim))
        )
        angles = _array((rows, tokens, model.head_dim // 2))
        return _array((rows, tokens, model.dim), self.dtype), prompt, conditioning, (angles, angles)

    def _ends_work(self, rows: int, frames: int) -> Cost:
        model, (height, width) = self.model.dit, self.cfg.latent_size
        grid = height // model.patch[1], width // model.patch[2]
        _, patch, _, head = self._dit_params

        def run(patch, head, latents, x, time):
            return dit.embed(model, patch, latents), dit.head(model, head, x, time, grid)

        latents = self._latents(rows, frames, dtype=self.dtype)
        x = _array((rows, frames * math.prod(grid), model.dim), self.dtype)
        return count_cost(run, patch, head, latents, x, _array((rows, model.dim)))

    def _condition_work(self, batch: Literal["rows", "single"]) -> Cost:
        run = functools.partial(step.condition, self.model.dit, self.cfg, batch, self.dtype)
        return count_cost(run, self._dit_params[2], _array((), jnp.int32))

    def _message_bytes(self, rows: int, frames: int) -> int:
        message = functools.partial(state.empty_message, self.model.dit, self.cfg, self.dtype, rows, frames)
        return _nbytes(jax.eval_shape(message))

    def _latents(self, *shape: int, dtype: Any = jnp.float32) -> Any:
        return _array((*shape, *self.cfg.latent_size, self.model.dit.in_channels), dtype)

    def _frames(self, count: int) -> Any:
        return _array((count, self.cfg.height // self.vae_devices, self.cfg.width, 3), jnp.uint8)


def _flax_may_promote() -> Any:
    """Flax's norms mix bfloat16 with float32; this lets them, also where that is forbidden elsewhere."""
    return jax.numpy_dtype_promotion("standard")


def _array(shape: tuple[int, ...], dtype: Any = jnp.float32) -> Any:
    """Returns a ShapeDtypeStruct, which stands in for an array while tracing."""
    return jax.ShapeDtypeStruct(shape, dtype)


def _nbytes(tree: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))
