"""A loaded model: opens sessions on a device."""

from __future__ import annotations

from pathlib import Path
from typing import Self

import jax
import jax.numpy as jnp

from svd2_jax.api import SessionSpec
from svd2_jax.config import ModelConfig, StreamConfig, preset
from svd2_jax.engine import params as params_lib
from svd2_jax.engine import programs as programs_lib
from svd2_jax.engine.checkpoint import Checkpoint
from svd2_jax.engine.noise import NoiseSource
from svd2_jax.engine.params import EngineParams, ItemReader
from svd2_jax.engine.programs import Programs
from svd2_jax.engine.prompt import PromptEncoder, Prompts, TextPlacement
from svd2_jax.engine.session import DeviceSession
from svd2_jax.engine.tokenizer import Tokenizer
from svd2_jax.errors import ConfigError, EngineError
from svd2_jax.nn.attention import AttentionImplementation
from svd2_jax.types import Device

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


class DeviceEngine:
    """A model on one device; see `api.Engine`.

    Parameters are read when the first session needs them; sessions of the same shape share their compiled
    programs and parameters.
    """

    def __init__(
        self,
        model: ModelConfig,
        read_item: ItemReader,
        prompts: PromptEncoder,
        device: Device,
        attention: AttentionImplementation = "auto",
    ):
        self.model, self.device, self.prompts = model, device, prompts
        self._read_item = read_item
        self._attention: AttentionImplementation = attention
        self._items: dict[str, params_lib.Params] = {}
        self._programs: dict[tuple[StreamConfig, str], Programs] = {}

    @classmethod
    def from_checkpoint(
        cls,
        path: Path | str,
        dtype: str | None = None,
        text: TextPlacement = "host",
        device: Device | None = None,
        attention: AttentionImplementation = "auto",
    ) -> Self:
        """Opens a converted checkpoint.

        Args:
          path: the folder that `svd2 convert` wrote.
          dtype: "float32" or "bfloat16" to compute in; None takes the checkpoint's.
          text: where the text encoder lives, see `PromptEncoder`.
          device: the accelerator; None takes JAX's default.
          attention: see `attend`.

        Raises:
          CheckpointError: the folder is missing, unfinished or of another format.
        """
        checkpoint = Checkpoint.open(Path(path))
        checkpoint.require(("dit", "vae", "text"))
        model, device = checkpoint.manifest.model, device or jax.devices()[0]
        compute = checked_dtype(dtype or checkpoint.manifest.dtype)

        def reader(target: Device) -> ItemReader:
            sharding = jax.sharding.SingleDeviceSharding(target)
            return lambda item: checkpoint.restore(item, sharding=sharding, dtype=compute)

        host = device if text == "device" else _host_device()
        tokenizer = Tokenizer.from_folder(checkpoint.tokenizer_dir, model.dit.text_len)
        prompts = PromptEncoder(model.text, tokenizer, reader(host), keep=text != "disk")
        return cls(model, reader(device), prompts, device, attention)

    @classmethod
    def random(
        cls,
        preset_name: str,
        seed: int = 0,
        dtype: str = "float32",
        device: Device | None = None,
        attention: AttentionImplementation = "auto",
    ) -> Self:
        """Makes a model of a preset's sizes with random weights: its pictures mean nothing, its speed does."""
        model = params_lib.with_random_text(preset(preset_name))
        device = device or jax.devices()[0]
        reader = params_lib.random_items(model, seed, checked_dtype(dtype), device)
        tokenizer = Tokenizer.bytes_fallback(model.dit.text_len, model.text.vocab)
        return cls(model, reader, PromptEncoder(model.text, tokenizer, reader, keep=True), device, attention)

    def open(
        self, spec: SessionSpec, noise: NoiseSource | None = None, prompts: Prompts | None = None
    ) -> DeviceSession:
        """Compiles what a session needs (once per shape) and opens it.

        Args:
          spec: what to do.
          noise: where Gaussians come from; None draws them from the seed.
          prompts: where text embeddings come from; None is the model's own text encoder.
        """
        params = self.params(spec.stream)
        programs = self.programs(spec.stream, spec.pixels)
        return DeviceSession(spec, params, programs, prompts or self.prompts, self.device, noise)

    def params(self, cfg: StreamConfig) -> EngineParams:
        """Returns the parameters a stream needs, reading what is not on the device yet."""
        return params_lib.read_params(self.model, self._item, cfg.decoder)

    def programs(self, cfg: StreamConfig, pixels: str = "uint8") -> Programs:
        """Returns the compiled programs of a stream."""
        key = (cfg, pixels)
        if key not in self._programs:
            self._programs[key] = programs_lib.build(
                self.model, cfg, self.params(cfg), self.device, pixels, self._attention
            )
        return self._programs[key]

    def describe(self, cfg: StreamConfig) -> str:
        """Returns one line on the model, its size on the device and where it runs."""
        leaves = jax.tree.leaves(self.params(cfg))
        count, size = sum(x.size for x in leaves), sum(x.nbytes for x in leaves)
        return (
            f"{self.model.name}: {count / 1e6:.1f} million parameters, {size / 2**30:.2f} GiB as {leaves[0].dtype}, "
            f"on {self.device.device_kind} {self.device.id}"
        )

    def _item(self, item: str) -> params_lib.Params:
        if item not in self._items:
            self._items[item] = self._read_item(item)
        return self._items[item]


def checked_dtype(name: str) -> jnp.dtype:
    """Returns the dtype called `name`; raises ConfigError for anything but float32 and bfloat16."""
    if name not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    return jnp.dtype(DTYPES[name])


def _host_device() -> Device:
    """Returns JAX's CPU device; raises EngineError where JAX was told to leave it out."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError as e:
        raise EngineError(
            f"the text encoder cannot live in host memory ({str(e).splitlines()[0]}); add cpu to JAX_PLATFORMS, as in "
            "JAX_PLATFORMS=cuda,cpu, or use --text-encoder device"
        ) from e
