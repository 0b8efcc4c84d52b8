"""A loaded model: opens sessions on its devices."""

from __future__ import annotations

import dataclasses
import itertools
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Self, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from svd2_jax.api import SessionSpec, TickInput, check_prompt
from svd2_jax.config import (
    ModelConfig,
    Storage,
    StreamConfig,
    check_choice,
    check_several,
    preset,
)
from svd2_jax.engine import params as params_lib
from svd2_jax.engine.balance import StageTimes, measured_split
from svd2_jax.engine.checkpoint import Checkpoint
from svd2_jax.engine.chunks import DeviceTicket
from svd2_jax.engine.costs import default_split
from svd2_jax.engine.devices import checked_mesh, host_device, threads
from svd2_jax.engine.memory import check_memory
from svd2_jax.engine.mesh import StageMesh
from svd2_jax.engine.noise import NoiseSource, SeededNoise
from svd2_jax.engine.options import DEFAULT_OPTIONS, PipelineOptions, checked_split
from svd2_jax.engine.params import EngineParams, ItemReader, StageWeights
from svd2_jax.engine.pipeline import Pipeline
from svd2_jax.engine.policy import checked_dtype, default_dtype
from svd2_jax.engine.programs import Builder, CodecPrograms, DenoiserPrograms
from svd2_jax.engine.prompt import PromptEncoder, Prompts, TextPlacement
from svd2_jax.engine.session import DeviceSession, tick_sessions
from svd2_jax.engine.stage_times import measure_stages
from svd2_jax.engine.tokenizer import Tokenizer
from svd2_jax.errors import ConfigError, SessionError
from svd2_jax.progress import working
from svd2_jax.text import blocks_named, counted
from svd2_jax.types import Device


class DeviceEngine:
    """A model on one mesh of devices; see `api.Engine`. Several meshes are several engines, see `replica`.

    Parameters are read when the first session needs them; sessions of the same shape share their compiled
    programs, and sessions on the same devices their parameters.
    """

    def __init__(
        self,
        model: ModelConfig,
        read_item: ItemReader,
        prompts: PromptEncoder,
        dtype: jnp.dtype,
        mesh: StageMesh,
        options: PipelineOptions = DEFAULT_OPTIONS,
        check_parts: Callable[[Iterable[str]], None] = lambda _: None,
    ):
        """Opens a model.

        Args:
          model: sizes.
          read_item: reads a checkpoint item onto a device.
          prompts: the text encoder.
          dtype: compute dtype.
          mesh: where streams run.
          options: how they run there.
          check_parts: raises CheckpointError where weights of a part ("vae", "taehv") are not there.
        """
        self._read_item, self._check_parts = read_item, check_parts
        self.model, self.mesh, self.prompts = model, mesh, prompts
        self._dtype, self._options = dtype, options
        checked_split(options.split, model.dit.num_layers, self.stages)
        if options.share_vae and len(mesh.local_stages) < mesh.stages:
            raise ConfigError("stages share the VAE within one process only; leave out --share-vae")
        self._weights = StageWeights(model, read_item, mesh)
        self._measured_split: tuple[int, ...] | None = None
        self._ends: dict[object, CodecPrograms] = {}
        self._denoisers: dict[object, DenoiserPrograms] = {}
        self._open: weakref.WeakSet[DeviceSession] = weakref.WeakSet()
        self._opening = 0
        self._lock = threading.Lock()  # of the two above: sessions may be opened by several threads
        self._prepared: dict[object, set[StreamConfig]] = {}  # see `_prepared_for`
        # One thread at a time hands work to the devices: a session is one stream, and two programs that start on the
        # same devices in different orders wait for each other for ever.
        self._dispatching = threading.RLock()

    @classmethod
    def from_checkpoint(
        cls,
        path: Path | str,
        dtype: str | None = None,
        text: TextPlacement = "host",
        mesh: StageMesh | None = None,
        options: PipelineOptions = DEFAULT_OPTIONS,
        blocks: int | None = None,
        weight_dtype: Storage | None = None,
    ) -> Self:
        """Opens a converted checkpoint.

        Args:
          path: the folder that `svd2 convert` wrote.
          dtype: "float32" or "bfloat16" to compute in; None: see `default_dtype`.
          text: where the text encoder lives, see `PromptEncoder`.
          mesh: see `stage_meshes`; None is one stage on JAX's default device.
          options: how the pipeline runs.
          blocks: take only the transformer's first ones, so many; None takes all.
          weight_dtype: "int8" or "fp8" for what its linear layers are held in; None: what is computed in.

        Raises:
          CheckpointError: the folder is missing, unfinished or of another format.
          ConfigError: more stages than blocks, or more blocks than there are.
        """
        check_choice("text_encoder", text, get_args(TextPlacement))
        checkpoint = Checkpoint.open(Path(path))
        checkpoint.require(("dit", "vae", "text"))
        model = checkpoint.manifest.model.with_blocks(blocks).with_weight_dtype(weight_dtype)
        mesh = checked_mesh(model, mesh)
        compute = checked_dtype(dtype or default_dtype(checkpoint.manifest, mesh.first))

        def read_item(item: str, device: Device) -> params_lib.Params:
            with working(f"reading {item}"):
                return checkpoint.restore(item, sharding=SingleDeviceSharding(device), dtype=compute)

        host = mesh.home if text == "device" else host_device()
        tokenizer = Tokenizer.from_folder(checkpoint.tokenizer_dir, model.dit.text_len)
        prompts = PromptEncoder(
            model.text, tokenizer, lambda item: read_item(item, host), keep=text != "disk"
        )
        return cls(model, read_item, prompts, compute, mesh, options, checkpoint.require)

    @classmethod
    def random(
        cls,
        model: ModelConfig | str,
        seed: int = 0,
        dtype: str = "float32",
        mesh: StageMesh | None = None,
        options: PipelineOptions = DEFAULT_OPTIONS,
        weight_dtype: Storage | None = None,
    ) -> Self:
        """Makes a model of these sizes with random weights: its pictures mean nothing, its speed does."""
        model = params_lib.with_random_text(preset(model) if isinstance(model, str) else model)
        model = model.with_weight_dtype(weight_dtype)
        mesh = checked_mesh(model, mesh)
        compute = checked_dtype(dtype)
        read_item = params_lib.random_items(model, seed, compute)
        tokenizer = Tokenizer.bytes_fallback(model.dit.text_len, model.text.vocab)
        home = mesh.home
        prompts = PromptEncoder(model.text, tokenizer, lambda item: read_item(item, home), keep=True)
        return cls(model, read_item, prompts, compute, mesh, options)

    def replica(self, mesh: StageMesh) -> Self:
        """Returns an engine of the same model on other devices.

        It shares the text encoder, and so every encoded prompt; parameters of its own are read to its own devices. No
        session of one engine waits for one of the other.

        Raises:
          ConfigError: the mesh cannot hold the model, see `from_checkpoint`.
        """
        mesh = checked_mesh(self.model, mesh)
        return type(self)(
            self.model, self._read_item, self.prompts, self._dtype, mesh, self._options, self._check_parts
        )

    def stream_config(self, **settings: Any) -> StreamConfig:
        """Returns the published video-to-video configuration at the size that the model was trained at.

        Args:
          settings: replace single fields of `StreamConfig`, on top of what is published for the `task`; `steps` is the
            number of denoising steps.

        Raises:
          ConfigError: there is no such field, or a value that it does not take.
        """
        height, width = self.model.picture
        return StreamConfig.for_task(**{"task": "v2v", "height": height, "width": width, **settings})

    def resolved(self, spec: SessionSpec) -> SessionSpec:
        """Returns the spec with the engine's own stream where it names none; see `stream_config`."""
        if not isinstance(spec, SessionSpec):
            raise ConfigError(
                f"expected a SessionSpec, got {type(spec).__name__}; as in engine.open(SessionSpec('a prompt'))"
            )
        return spec if spec.stream is not None else dataclasses.replace(spec, stream=self.stream_config())

    def __repr__(self) -> str:
        platform, sessions = self.mesh.first.platform, len(self._open)
        stages = counted(self.stages, "stage")
        return f"<DeviceEngine {self.model.name}: {self._dtype}, {stages} on {platform}, open sessions: {sessions}>"

    @property
    def dtype(self) -> jnp.dtype:
        """What it computes in."""
        return self._dtype

    @property
    def stages(self) -> int:
        """Stages of each stream's pipeline."""
        return self.mesh.stages

    def open(
        self,
        spec: SessionSpec,
        steps: Sequence[int] = (),
        *,
        noise: NoiseSource | None = None,
        prompts: Prompts | None = None,
    ) -> DeviceSession:
        """Compiles what a session needs (once per shape) and opens it.

        Args:
          spec: what to do.
          steps: numbers of denoising steps that `set_steps` may ask for later; see `prepare` for what each costs.
          noise: where Gaussians come from; None draws them from the seed.
          prompts: where text embeddings come from; None is the model's own text encoder.

        Raises:
          ConfigError: a stage does not fit into its device's memory, or there are no timesteps for some of the
            steps.
          CheckpointError: the checkpoint does not hold the decoder.
        """
        spec = self.resolved(spec)
        self._require(spec.config)
        if steps:
            self.prepare(spec, steps)
        with self._lock:
            self._opening += 1
        try:
            session = self._opened(spec, noise, prompts)
            self._open.add(session)
        finally:
            with self._lock:
                self._opening -= 1
        return session

    def _opened(self, spec: SessionSpec, noise: NoiseSource | None, prompts: Prompts | None) -> DeviceSession:
        cfg, mesh = spec.config, self.mesh
        split = self.split(cfg)
        streams = len(self._open) + self._opening
        vae_devices = self._builder(cfg).vae_devices
        check_memory(self.model, cfg, self._dtype, split, mesh, streams=streams, vae_devices=vae_devices)
        encode = (prompts or self.prompts).encode
        # Reading waits for the disk, compiling runs outside of Python: the first session gets all of it at once.
        with threads() as pool:
            reading = pool.submit(self._weights.params, split, cfg.decoder, vae_devices)
            others = [pool.submit(self.denoiser, cfg, split), pool.submit(encode, spec.prompt)]
            ends = self.ends(cfg, spec.pixels)
            params = reading.result()
            for other in others:
                other.result()
        if noise is None:
            noise = SeededNoise(
                ends.draw_first,
                lambda steps: self.denoiser(cfg.with_steps(steps), split).draw_chunk,
                spec.seed,
                mesh.home,
            )
        return DeviceSession(
            spec, params, ends, prompts or self.prompts,
            lambda embedding: self._pipeline(cfg, embedding, split), mesh.home, noise, self._dispatching,
            is_prepared=lambda steps: {cfg, cfg.with_steps(steps)} <= self._prepared_for(cfg, split),
            on_close=self._open.discard,
        )  # fmt: skip

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """How many streams may share a tick."""
        return tuple(self._options.batch_sizes)

    def prepare(self, spec: SessionSpec, steps: Sequence[int]) -> None:
        """Compiles all that live streams like this need: every batch size, these steps, and changes between them.

        Also ticks that compute one row only: where no stage has chunks in several rows, streams then run in these.

        Each number takes about as long as the first one the first time (seconds for a small model on a CPU, a minute
        for a large one), and is kept on disk. Streams that are open already may take these steps from then on.

        Args:
          spec: what the streams are like.
          steps: numbers of denoising steps besides the spec's.

        Raises:
          ConfigError: there are no timesteps for one of them.
          CheckpointError: the checkpoint does not hold the decoder.
        """
        spec = self.resolved(spec)
        cfg = spec.config
        check_several("steps", steps, "numbers, as in (1, 2)")
        asked = {cfg, *(cfg.with_steps(count) for count in steps)}
        self._require(cfg)
        split = self.split(cfg)
        prepared = self._prepared_for(cfg, split)
        several = sorted(asked | prepared, key=lambda one: one.steps)
        changes = list(itertools.permutations(several, 2)) if cfg.mode == "stream" else []
        # Those of one number of steps first, as the others share many of them.
        with threads() as pool:
            denoiser = pool.submit(self.denoiser, cfg, split, lone=True)
            self.ends(cfg, spec.pixels)
            denoiser.result()
            rest: list[Future[Any]] = [
                pool.submit(self.denoiser, other, split, lone=True) for other in several
            ]
            for before, after in changes:
                rest.append(pool.submit(self._builder(after).resize, split, before.rows))
            for one in rest:
                one.result()
        prepared.update(asked)

    def _prepared_for(self, cfg: StreamConfig, split: tuple[int, ...]) -> set[StreamConfig]:
        """Returns the configurations between which such streams can change without compiling anything."""
        shape = cfg.with_steps(1) if cfg.task == "v2v" else cfg
        return self._prepared.setdefault((shape, max(split), min(split)), set())

    def _require(self, cfg: StreamConfig) -> None:
        """Raises CheckpointError where there are no weights for a stream; at once, not when they are to be read."""
        self._check_parts({"vae", params_lib.decoder_item(cfg.decoder).split(".")[0]})

    def measure_split(
        self,
        spec: SessionSpec,
        meet: Callable[[], object] = lambda: None,
        measure: Callable[[DeviceSession], Sequence[np.ndarray]] = measure_stages,
    ) -> tuple[int, ...] | None:
        """Measures the stages on a stream of noise, and chooses how many blocks each of them has from then on.

        The split changes if by the measured times another one is faster by more than 5 % (`balance.measured_split`),
        and if it fits into memory. It takes some 30 chunks of such a stream, and the time to compile what measures.

        Args:
          spec: what the streams will be like.
          meet: waits until every process has called it; for several, which all have to measure.
          measure: what measures the stages of this process.

        Returns:
          The blocks of each stage. None where nothing is measured: with `PipelineOptions.split`, one stage, a shared
          VAE, in sequential mode, and beside sessions that are open, whose blocks stay.
        """
        spec = self.resolved(spec)
        cfg, options = spec.config, self._options
        is_settled = options.split is not None or options.share_vae or self._open or self._opening
        if self.stages == 1 or is_settled or cfg.mode != "stream":
            return None
        present = self.split(cfg)
        watched = dataclasses.replace(options, split=present, batch_sizes=(1,))
        trial = type(self)(
            self.model, self._read_item, self.prompts, self._dtype, self.mesh, watched, self._check_parts
        )
        trial._weights = self._weights
        with working("measuring the stages"), trial.open(spec) as session:
            trial._builder(cfg).tick_apart(present)  # so that it is compiled before the others are met
            meet()
            measured = measure(session)
            meet()
        # All processes go on with the same numbers, and so find the same split.
        blocks, rest = self.mesh.gather(measured).reshape(self.stages, 2, -1).transpose(1, 2, 0).tolist()
        times = [StageTimes(tuple(b), tuple(r)) for b, r in zip(blocks, rest, strict=True)]
        if (wanted := measured_split(present, times)) != present and self._fits(cfg, wanted):
            self._measured_split = wanted
        return self.split(cfg)

    def _fits(self, cfg: StreamConfig, split: tuple[int, ...]) -> bool:
        """Returns whether every device, also those of other processes, has room for a stream with this split."""
        try:
            vae_devices = self._builder(cfg).vae_devices
            check_memory(self.model, cfg, self._dtype, split, self.mesh, vae_devices=vae_devices)
            fits = True
        except ConfigError:
            fits = False
        return bool(self.mesh.gather([np.array([fits])] * len(self.mesh.local_stages)).all())

    def prepare_prompt(self, prompt: str) -> None:
        """Encodes a prompt, so that a later `set_prompt` does not make its stream wait; in any thread."""
        check_prompt(prompt)
        self.prompts.encode(prompt)

    def tick(self, work: Sequence[TickInput]) -> DeviceTicket:
        """Hands one tick of several streams to their devices, and does not wait for it; see `api.Engine`.

        Raises:
          SessionError: one of the parts cannot be taken; nothing was done.
        """
        if not isinstance(work, Sequence):
            raise SessionError(f"a tick takes a list of TickInput, got {type(work).__name__}")
        parts: list[tuple[DeviceSession, np.ndarray | None]] = []
        with self._dispatching:
            for part in work:
                if not isinstance(part, TickInput) or not isinstance(part.session, DeviceSession):
                    given = part.session if isinstance(part, TickInput) else part
                    raise SessionError(
                        "a tick takes TickInput(session, frames) with sessions of this engine, "
                        f"got {type(given).__name__}"
                    )
                part.session.check_part(part.frames)
                if part.session not in self._open:  # it has another engine's lock and programs
                    raise SessionError("a session shares ticks in the engine that opened it only")
                parts.append((part.session, part.frames))
            if len({id(session) for session, _ in parts}) < len(parts):
                raise SessionError("a session can have one part of a tick only")
            return tick_sessions(parts, self.batch_sizes)

    def params(self, cfg: StreamConfig) -> EngineParams:
        """Returns the parameters a stream needs, reading what is not on its devices yet."""
        return self._weights.params(self.split(cfg), cfg.decoder, self._builder(cfg).vae_devices)

    def ends(self, cfg: StreamConfig, pixels: str = "uint8") -> CodecPrograms:
        """Returns the compiled programs of a stream's two ends."""
        key = (cfg, pixels)
        if key not in self._ends:
            self._ends[key] = self._builder(cfg, pixels).ends()
        return self._ends[key]

    def denoiser(self, cfg: StreamConfig, split: tuple[int, ...], lone: bool = False) -> DenoiserPrograms:
        """Returns the compiled programs of a stream's stages; with `lone`, also those of ticks that compute one row."""
        key = (cfg, max(split), min(split))
        found = self._denoisers.get(key)
        if found is None or (lone and found.ticks.lone is None):
            found = self._denoisers[key] = self._builder(cfg).denoiser(split, lone)
        return found

    def pipeline(self, cfg: StreamConfig, embedding: jax.Array) -> Pipeline:
        """Returns the denoiser of a stream with a text embedding [1, P, text_dim] as its prompt."""
        return self._pipeline(cfg, embedding, self.split(cfg))

    def _pipeline(self, cfg: StreamConfig, embedding: jax.Array, split: tuple[int, ...]) -> Pipeline:
        builder = self._builder(cfg)
        return Pipeline(builder, lambda other: self.denoiser(other, split), self._weights, split, embedding)

    def split(self, cfg: StreamConfig) -> tuple[int, ...]:
        """Returns how many blocks each stage has."""
        # Beside a session that is open, blocks stay where it has them.
        if self._open and (split := self._weights.split) is not None:
            return split
        if (split := self._options.split or self._measured_split) is not None:
            return split
        kind = self.mesh.first.device_kind
        vae_devices = self._builder(cfg).vae_devices
        return default_split(self.model, cfg, self._dtype, self.stages, kind, vae_devices)

    def describe(self, cfg: StreamConfig) -> str:
        """Returns what the model is, where it runs, and the bytes of parameters on each device of this process.

        Raises:
          ConfigError: `cfg` is no StreamConfig.
        """
        if not isinstance(cfg, StreamConfig):
            raise ConfigError(f"expected a StreamConfig, got {type(cfg).__name__}; as session.spec.config")
        used = ("dit.", "vae.", params_lib.decoder_item(cfg.decoder))

        def leaves(items: dict[str, Any]) -> list[Any]:
            return jax.tree.leaves([tree for item, tree in items.items() if item.startswith(used)])

        count = sum(x.size for x in leaves(params_lib.abstract_items(self.model)))
        held = sum(
            x.size * x.dtype.itemsize for x in leaves(params_lib.abstract_items(self.model, self._dtype))
        )
        blocks = "" if (stored := self.model.dit.weight_dtype) == "compute" else f" (blocks: {stored})"
        lines = [
            f"{self.model.name}: {count / 1e6:.1f} million parameters as {self._dtype}{blocks}, "
            f"{held / 2**30:.2f} GiB in all"
        ]
        held, start = self._weights.resident_bytes(), 0
        for stage, blocks in enumerate(self.split(cfg)):
            if (device := self.mesh.devices[stage]) in held:
                lines.append(
                    f"  stage {stage}, {blocks_named(start, blocks)}: {held[device] / 2**30:.3f} GiB of "
                    f"parameters on {device.device_kind} {device.id}"
                )
            start += blocks
        return "\n".join(lines)

    def _builder(self, cfg: StreamConfig, pixels: str = "uint8") -> Builder:
        options, mesh = self._options, self.mesh
        return Builder(
            self.model, cfg, self._dtype, mesh, pixels, options.attention, self.batch_sizes, options.share_vae
        )  # fmt: skip
