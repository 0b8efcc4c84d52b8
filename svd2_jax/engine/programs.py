"""The compiled programs of a stream: everything the devices run, built before the stream opens."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from svd2_jax.config import DiTConfig, ModelConfig, StreamConfig
from svd2_jax.engine import noise, shared_vae
from svd2_jax.engine.kept_programs import kept_program, kept_value
from svd2_jax.engine.mesh import StageMesh, on
from svd2_jax.engine.params import abstract_items, decoder_item
from svd2_jax.engine.policy import (
    ONEDNN_CONVOLVES,
    CompilerOptions,
    compiler_options,
    computes_by_onednn,
    matmul_precision,
)
from svd2_jax.models import dit
from svd2_jax.models.dit import DiTParams
from svd2_jax.nn import kv_cache
from svd2_jax.nn.attention import AttentionImplementation, fused_if_possible
from svd2_jax.nn.causal_conv import convolving_with_onednn
from svd2_jax.stream import pixels, state, step
from svd2_jax.stream.state import StageInput
from svd2_jax.stream.step import AXIS, Ring
from svd2_jax.text import counted

Program = Callable[..., Any]
OVER = PartitionSpec(AXIS)
EVERYWHERE = PartitionSpec()
DIT_SPECS = DiTParams(patch=EVERYWHERE, blocks=OVER, head=EVERYWHERE)  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True)
class TickPrograms:
    """Programs over the stages that depend on how many blocks a stage has room for; donated arguments: *.

    Attributes:
      prompt_kv: blocks, context [1, P, E] -> PromptKV.
      tick: for each number of streams that can share a tick, see `step.tick`: dit params, prompts, blocks of each
        stage, StreamStates*, Entries -> StreamStates, each row's clean latents.
      lone: the same with one row of each stage computed, rows int32 [W] over the stages behind the Entries; empty where
        there is one row. None: not asked for.
    """

    prompt_kv: Program
    tick: Mapping[int, Program]
    lone: Mapping[int, Program] | None


@dataclass(frozen=True)
class ResizePrograms:
    """Programs that give a stream in progress another number of rows.

    Attributes:
      layer: LayerCache -> LayerCache, one block's at a time, so that no two caches are there at once.
      rest: counters of the cache and Message -> the same.
    """

    layer: Program
    rest: Program


@dataclass(frozen=True)
class DenoiserPrograms:
    """Programs between noisy and clean latents; donated arguments: *.

    Attributes:
      init_state: () -> StreamState.
      step_first: `step.tick` for the first group, one chunk that takes its steps one after another.
      open_rows: StreamState -> StreamState with a cache row for every row of the batch, and an empty ring.
      embed_text: conditioner, text embedding [1, P, text_dim] -> context [1, P, E].
      condition_first: conditioner, timestep [] -> Conditioning of one row.
      condition: conditioner, timestep [] of row 0 -> Conditioning of all rows.
      draw_chunk: key, number of the chunk in each step [S] -> their Gaussians.
      ticks: what later chunks run.
    """

    init_state: Program
    step_first: Program
    open_rows: Program
    embed_text: Program
    condition_first: Program
    condition: Program
    draw_chunk: Program
    ticks: TickPrograms


@dataclass(frozen=True)
class CodecPrograms:
    """Programs at the two ends of a stream, on the first and the last stage's device; donated arguments: *.

    Those that touch frames are None where another process has the device. Where devices share the VAE, they take and
    give latents on the first and the last one likewise, while frames and states lie over all (`shared_vae`).

    Attributes:
      frames: where the encoder takes frames [T, H, W, 3]; None where another process has it.
      scale: where it takes the noise scale, likewise.
      draw_first: key -> noise of the first group.
      blend: old embedding, new embedding, weight [] -> embedding between them.
      encode_first: encoder params, frames, noise, noise scale -> InputState, noisy latents.
      encode: encoder params, InputState*, frames, noise, initial noise scale -> InputState, noisy, timestep.
      decode_first: decoder params, clean latents -> decoder state, frames.
      decode: decoder params, decoder state*, clean latents -> decoder state, frames.
    """

    frames: Sharding | None
    scale: Sharding | None
    draw_first: Program
    blend: Program
    encode_first: Program | None
    encode: Program | None
    decode_first: Program | None
    decode: Program | None


@dataclass(frozen=True)
class Builder:
    """Compiles the programs of one (model, stream, stages) ahead of time, from shapes alone.

    Attributes:
      model: sizes of the networks.
      cfg: what the stream computes.
      dtype: compute dtype.
      mesh: the stages' devices.
      pixel_format: see `SessionSpec.pixels`.
      attention: see `attend`; "auto" takes the fused kernel where the device has one.
      batch_sizes: numbers of streams that can share a tick.
      share_vae: whether all devices share encoding and decoding, or as many as `shared_vae.sharing_devices` says.
    """

    model: ModelConfig
    cfg: StreamConfig
    dtype: jnp.dtype
    mesh: StageMesh
    pixel_format: str = "uint8"
    attention: AttentionImplementation = "auto"
    batch_sizes: tuple[int, ...] = (1,)
    share_vae: bool = False

    def ends(self) -> CodecPrograms:
        """Compiles what runs before the first and behind the last stage."""
        model, cfg, mesh = self.model, self.cfg, self.mesh
        items = abstract_items(model, self.dtype)
        first, block = cfg.first_latents, cfg.frames_per_block
        scalar, embedding = _array(()), self._embedding

        encoders, decoders = mesh.leading(self.vae_devices), mesh.trailing(self.vae_devices)
        frames = scale = encode_first = encode = decode_first = decode = None
        if cfg.task == "v2v" and mesh.is_local(0):
            encoder = items["vae.encoder"]
            frames, scale = (shared_vae.sharding(encoders, spec) for spec in (shared_vae.ROWS, EVERYWHERE))
            encode_first, (input_state, _) = self._compile_vae(
                encoders, shared_vae.ENCODE_FIRST, functools.partial(pixels.encode_first_group, model.vae),
                encoder, self._frames(cfg.first_frames), self._latents(first), scalar,
            )  # fmt: skip
            encode, _ = self._compile_vae(
                encoders, shared_vae.ENCODE,
                functools.partial(pixels.encode_chunk, model.vae, motion_range=cfg.motion_range),
                encoder, input_state, self._frames(cfg.chunk_frames), self._latents(block), scalar, donate=(1,),
            )  # fmt: skip
        if mesh.is_local(-1):
            decoder, decoder_cfg = items[decoder_item(cfg.decoder)], pixels.decoder_config(model, cfg)
            decode_first, (decoder_state, _) = self._compile_vae(
                decoders, shared_vae.DECODE_FIRST,
                functools.partial(pixels.decode_first_group, decoder_cfg, pixels=self.pixel_format),
                decoder, self._latents(first),
            )  # fmt: skip
            decode, _ = self._compile_vae(
                decoders, shared_vae.DECODE,
                functools.partial(pixels.decode_chunk, decoder_cfg, pixels=self.pixel_format),
                decoder, decoder_state, self._latents(block), donate=(1,),
            )  # fmt: skip
        draw_first = functools.partial(noise.draw_first, cfg, model.dit.in_channels)
        return CodecPrograms(
            frames=frames,
            scale=scale,
            draw_first=self._compile_on(mesh.home, draw_first, self._key)[0],
            blend=self._compile_on(mesh.home, _blend, embedding, embedding, scalar)[0],
            encode_first=encode_first,
            encode=encode,
            decode_first=decode_first,
            decode=decode,
        )

    def denoiser(self, split: Sequence[int], lone: bool = False) -> DenoiserPrograms:
        """Compiles what runs on the stages, for so many blocks on each; see `ticks`."""
        model, cfg, mesh = self.model, self.cfg, self.mesh
        _, conditioner = dit.split_embed(abstract_items(model, self.dtype)[dit.embed_item()])
        embed_text = functools.partial(dit.embed_text, model.dit)

        def condition(batch: Literal["rows", "single"]) -> Program:
            function = functools.partial(step.condition, model.dit, cfg, batch, self.dtype)
            return self._compile_on(mesh.home, function, conditioner, _array((), jnp.int32))[0]

        one_row = self._one_row(max(split))
        init_state = functools.partial(state.init_stream_state, model.dit, cfg, self.dtype, max(split))
        draw_chunk = functools.partial(noise.draw_chunk, cfg, model.dit.in_channels)
        open_rows = self._compile_over(
            functools.partial(state.open_rows, model.dit, cfg), (OVER,), one_row,
            donate=(0,) if cfg.rows == 1 else (),
        )  # fmt: skip
        return DenoiserPrograms(
            init_state=self._compile_over(init_state, ()),
            step_first=self._tick(split, self._one_at_a_time(split), one_row, cfg.first_latents, 1),
            open_rows=open_rows,
            embed_text=self._compile_on(mesh.home, embed_text, conditioner, self._embedding)[0],
            condition_first=condition("single"),
            condition=condition(self._batch),
            draw_chunk=self._compile_on(mesh.home, draw_chunk, self._key, _array((cfg.steps,), jnp.int32))[0],
            ticks=self.ticks(split, lone),
        )

    def ticks(self, split: Sequence[int], lone: bool = False) -> TickPrograms:
        """Compiles the programs of later chunks; splits of the same longest and shortest stage share them."""
        context = _array((1, self.model.dit.text_len, self.model.dit.dim), self.dtype)
        prompt_kv = self._compile_over(
            functools.partial(dit.prompt_kv, self.model.dit),
            (OVER, EVERYWHERE),
            self.dit_params(max(split)).blocks,
            self._same(context),
        )
        ring, cfg = self._ring(split), self.cfg
        several = self.batch_sizes if cfg.mode == "stream" and cfg.rows > 1 else ()
        return TickPrograms(
            prompt_kv,
            {n: self._later_tick(split, ring, n) for n in self.batch_sizes},
            {n: self._later_tick(split, ring, n, lone=True) for n in several} if lone else None,
        )

    def tick_apart(self, split: Sequence[int]) -> Program:
        """Compiles the tick of one stream in which no stage waits for another, to measure them."""
        return self._later_tick(split, dataclasses.replace(self._ring(split), send=False), 1)

    def resize(self, split: Sequence[int], rows: int) -> ResizePrograms:
        """Compiles what gives a stream of so many rows those of this configuration."""
        before = dataclasses.replace(self, cfg=self.cfg.with_steps(rows))._rows(split)
        cache, wanted = before.cache, self.cfg.rows

        def compiled(function: Program, tree: Any) -> Program:
            return self._compile_over(functools.partial(function, rows=wanted), (OVER,), tree)

        rest = compiled(_resize_rest, (cache.filled, cache.held, before.message))
        return ResizePrograms(compiled(kv_cache.resize_rows, cache.layers[0]), rest)

    def dit_params(self, positions: int) -> DiTParams:
        """Returns the transformer's shapes over the stages, with room for so many blocks on each."""
        items = abstract_items(self.model, self.dtype)
        patch, _ = dit.split_embed(items[dit.embed_item()])
        block = self.mesh.abstract(items[dit.block_item(0)])
        return DiTParams(self._same(patch), (block,) * positions, self._same(items[dit.head_item()]))

    def entry(self, batch: Literal["rows", "single"], frames: int) -> StageInput:
        """Returns the shapes of what enters the first stage."""
        rows = self.cfg.rows if batch == "rows" else 1
        again = rows - 1 if batch == "rows" else min(1, self.cfg.steps - 1)
        message = _shapes(state.empty_message, self.model.dit, self.cfg, self.dtype, rows, frames)
        latents = self._latents(frames)
        return StageInput(latents, _array((rows,), jnp.bool_), message.conditioning, (latents,) * again)

    @property
    def vae_devices(self) -> int:
        """How many devices share encoding, and how many decoding."""
        return shared_vae.sharing_devices(self.cfg, self.mesh.stages) if self.share_vae else 1

    @property
    def _embedding(self) -> Any:
        return _array((1, self.model.dit.text_len, self.model.dit.text_dim), self.dtype)

    @property
    def _key(self) -> Any:
        return _array((), jax.eval_shape(lambda: jax.random.key(0)).dtype)

    @property
    def _batch(self) -> Literal["rows", "single"]:
        return "rows" if self.cfg.mode == "stream" else "single"

    @property
    def _attention(self) -> AttentionImplementation:
        if self.attention != "auto":
            return self.attention
        return fused_if_possible(self.mesh.first.platform, self.dtype, self.model.dit.head_dim)

    def _ring(self, split: Sequence[int]) -> Ring:
        """Returns how later chunks' ticks are laid out."""
        if self.cfg.mode != "stream":
            return self._one_at_a_time(split)
        return Ring(self.mesh.stages, min(split))

    def _one_at_a_time(self, split: Sequence[int]) -> Ring:
        # One stage at a time has something to do: the others skip their blocks.
        return Ring(self.mesh.stages, max(split) if self.mesh.stages == 1 else 0, "single")

    def _prompts(self, split: Sequence[int], rows: int) -> Any:
        model = self.model.dit
        kv = self.mesh.abstract(_array((1, model.text_len, model.num_heads, model.head_dim), self.dtype))
        layers = (kv,) * max(split)
        return (dit.PromptKV(layers, layers),) * rows

    def _one_row(self, positions: int) -> Any:
        return self.mesh.abstract(
            _shapes(state.init_stream_state, self.model.dit, self.cfg, self.dtype, positions)
        )

    def _rows(self, split: Sequence[int]) -> Any:
        """Returns the shapes of a state behind the first group."""
        return self.mesh.abstract(_shapes(_opened, self.model.dit, self.cfg, self.dtype, max(split)))

    def _later_tick(self, split: Sequence[int], ring: Ring, streams: int, lone: bool = False) -> Program:
        return self._tick(split, ring, self._rows(split), self.cfg.frames_per_block, streams, lone)

    def _tick(
        self, split: Sequence[int], ring: Ring, state_: Any, frames: int, streams: int, lone: bool = False
    ) -> Program:
        prompts = self._prompts(split, 1 if lone or ring.batch != "rows" else self.cfg.rows)
        entry = self.mesh.abstract(self.entry(ring.batch, frames))
        function = functools.partial(step.tick, self.model.dit, self.cfg, ring, attention=self._attention)
        specs = (DIT_SPECS, OVER, OVER, OVER, OVER)
        params = self.dit_params(max(split))
        number = self.mesh.abstract(_array((1,), jnp.int32))
        each = ((prompts,) * streams, number, (state_,) * streams, (entry,) * streams)
        if lone:
            specs, each = (*specs, OVER), (*each, (number,) * streams)
        return self._compile_over(function, specs, params, *each, donate=(3,))

    def _latents(self, *shape: int) -> Any:
        return _array((*shape, *self.cfg.latent_size, self.model.dit.in_channels))

    def _frames(self, count: int) -> Any:
        return _array((count, self.cfg.height, self.cfg.width, 3), jnp.uint8)

    def _same(self, tree: Any) -> Any:
        sharding = self.mesh.everywhere
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)

    def _compile_on(self, device: Any, function: Program, *args: Any) -> Any:
        """Returns an executable for one device, and its results as shapes there."""
        return _compile(function, on(device, args), (), SingleDeviceSharding(device), self.dtype)

    def _compile_over(
        self, function: Program, specs: tuple[Any, ...], *args: Any, donate: tuple[int, ...] = ()
    ) -> Program:
        """Returns an executable over the stages; its results lie over them."""
        return _compile(function, args, donate, _Over(self.mesh.mesh, specs, OVER), self.dtype)[0]

    def _compile_vae(
        self,
        devices: StageMesh,
        layout: shared_vae.Layout,
        function: functools.partial[Any],
        *args: Any,
        donate: tuple[int, ...] = (),
    ) -> Any:
        """Returns a program of one device or of several that share it, and its results as shapes there."""
        shards = shared_vae.row_shards(devices)
        if shards is None:
            where = SingleDeviceSharding(devices.first)
            return _compile(function, on(devices.first, args), donate, where, self.dtype, is_vae=True)
        program, results = _compile(
            functools.partial(function, shards=shards), shared_vae.abstract(devices, layout, args), donate,
            _Over(devices.mesh, layout.arguments, layout.results), self.dtype, is_vae=True,
        )  # fmt: skip
        return shared_vae.SharedProgram(program, devices, layout, args[layout.latents]), results


@dataclass(frozen=True)
class _Over:
    """Where a program over several devices runs, and the specs of its arguments and results."""

    mesh: Mesh
    arguments: tuple[Any, ...]
    results: Any


def run_where_it_lies(function: Program, static: tuple[Any, ...], params: Any, *args: Any) -> Any:
    """Runs a function of static arguments and arrays where its parameters lie; compiles once for their shapes."""
    leaf = jax.tree.leaves(params)[0]
    (device,) = leaf.devices()
    shapes = on(device, (params, *args))
    bound = functools.partial(function, *static)
    program, _ = _compile(bound, shapes, (), SingleDeviceSharding(device), leaf.dtype)
    return program(params, *args)


def _array(shape: tuple[int, ...], dtype: Any = jnp.float32) -> Any:
    """Returns a ShapeDtypeStruct, which stands in for an array."""
    return jax.ShapeDtypeStruct(shape, dtype)


def _compile(
    function: Program,
    args: tuple[Any, ...],
    donate: tuple[int, ...],
    where: SingleDeviceSharding | _Over,
    dtype: jnp.dtype,
    is_vae: bool = False,
) -> tuple[Program, Any]:
    """Returns an executable and its results' shapes, as everything that the engine runs is compiled.

    Args:
      function: pure; arguments bound to it are hashable.
      args: ShapeDtypeStructs with shardings.
      donate: arguments that the program takes over.
      where: where it runs, and how arguments and results lie there.
      dtype: what it computes in.
      is_vae: whether it encodes or decodes.
    """
    leaves, structure = jax.tree.flatten(args)
    shapes = tuple((x.shape, x.dtype, x.sharding) for x in leaves)
    call = functools.partial(function)  # of a partial: one with all that is bound
    static = (call.func, call.args, tuple(sorted(call.keywords.items())))
    devices = tuple(where.mesh.devices.flat if isinstance(where, _Over) else where.device_set)
    how = matmul_precision(dtype), compiler_options(devices[0].platform, is_vae)
    return _compile_once(static, structure, shapes, donate, where, devices, *how)


@functools.lru_cache(maxsize=1024)
def _compile_once(
    static, structure, shapes, donate, where, devices, precision: str, options: CompilerOptions
) -> tuple[Program, Any]:
    """Compiles one program; streams that differ elsewhere share it (the VAE's do not depend on the steps)."""
    args = structure.unflatten([jax.ShapeDtypeStruct(*s[:2], sharding=s[2]) for s in shapes])
    by_onednn = computes_by_onednn(options)
    out: Any = where
    if isinstance(where, _Over):
        out = jax.tree.map(functools.partial(NamedSharding, where.mesh), where.results)

    def trace() -> tuple[jax.stages.Traced, jax.stages.Lowered]:
        function, positional, keywords = static
        bound = functools.partial(function, *positional, **dict(keywords))
        if isinstance(where, _Over):
            bound = jax.shard_map(bound, mesh=where.mesh, in_specs=where.arguments, out_specs=where.results)
        # Flax's norms mix bfloat16 with float32, which may be forbidden elsewhere.
        is_float32 = precision == matmul_precision(jnp.dtype(jnp.float32))
        mixing = contextlib.nullcontext() if is_float32 else jax.numpy_dtype_promotion("standard")
        convolving = convolving_with_onednn() if by_onednn and ONEDNN_CONVOLVES else contextlib.nullcontext()
        with jax.default_matmul_precision(precision), mixing, convolving:
            traced = jax.jit(bound, donate_argnums=donate, out_shardings=out).trace(*args)
            return traced, traced.lower()

    # XLA of jax 0.12 cannot write down what oneDNN computes, and ends the process over some such programs.
    what = static, donate, where, precision, options
    program, results = kept_program(_title(static), what, args, devices, trace, dict(options), not by_onednn)
    return program, jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        results,
        jax.tree.broadcast(out, results),
    )


def _title(static: tuple[Callable[..., Any], tuple[Any, ...], Any]) -> str:
    """Returns what people call a program: its function, and the steps of a stream's."""
    function, bound, _ = static
    steps = [counted(x.steps, "step") for x in bound if isinstance(x, StreamConfig)]
    return ", ".join([function.__name__.strip("_").replace("_", " "), *steps])


def _shapes(function: Callable[..., Any], *args: Any) -> Any:
    """Returns the shapes of what a function makes."""
    return kept_value(_traced_shapes, function, *args)


def _traced_shapes(function: Callable[..., Any], *args: Any) -> Any:
    return jax.eval_shape(lambda: function(*args))


def _opened(model: DiTConfig, cfg: StreamConfig, dtype: jnp.dtype, layers: int) -> state.StreamState:
    """Returns a state behind the first group."""
    return state.open_rows(model, cfg, state.init_stream_state(model, cfg, dtype, layers))


def _resize_rest(rest: Any, rows: int) -> Any:
    filled, held, message = rest
    return *kv_cache.resize_rows((filled, held), rows), state.resize_message(message, rows)


def _blend(old: jax.Array, new: jax.Array, weight: jax.Array) -> jax.Array:
    start, end = old.astype(jnp.float32), new.astype(jnp.float32)
    # Exact at both ends, and where old and new agree.
    return jnp.where(weight < 1, start + (end - start) * weight, end).astype(old.dtype)
