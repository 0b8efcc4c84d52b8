"""Frozen configuration: model sizes (with the published presets) and what one stream computes.

Every field has its unit, range and default here and nowhere else. Values that may change from chunk to
chunk (prompt, noise scale) are not configuration; they are arguments of the session.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import numbers
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self, get_args

from svd2_jax.errors import ConfigError
from svd2_jax.validate import build, read_values

LATENT_STRIDE = 4  # video frames per latent frame, Wan2.1 VAE
SPATIAL_STRIDE = 8  # pixels per latent cell in each direction, Wan2.1 VAE
PIXEL_MULTIPLE = 16  # height and width: SPATIAL_STRIDE times the DiT's 2x2 patch
SINK_THRESHOLD_OFF = -1.0
TRAIN_TIMESTEPS = 1000  # timestep of pure noise

V2V_TIMESTEPS = (700, 500, 400, 200)  # published denoising list; a stream uses its first `steps` entries
T2V_TIMESTEPS = (1000, 750, 500, 250)  # the same for text-to-video, always followed by a clean pass at 0

Storage = Literal["compute", "int8", "fp8"]
"""What numbers are held in: what is computed in, or 8 bits and a scale for each group (fp8 is float8_e4m3fn)."""
STORAGES: tuple[Storage, ...] = get_args(Storage)


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises ConfigError for what is none of the choices."""
    if value not in choices:
        raise ConfigError(f"{name} must be one of {choices}, got {value!r}")


def is_number(value: object, kind: type = numbers.Real) -> bool:
    """Whether a value is a number of Python's or NumPy's; `True` is none."""
    return isinstance(value, kind) and not isinstance(value, bool)


def check_whole(name: str, value: Any, least: int, most: int | None = None) -> None:
    """Raises ConfigError for what is not a whole number from `least` to `most`."""
    wanted = f"at least {least}" if most is None else f"{least} to {most}"
    if not is_number(value, numbers.Integral):
        raise ConfigError(f"{name} must be a whole number, {wanted}; got {value!r}")
    if value < least or (most is not None and value > most):
        raise ConfigError(f"{name} must be {wanted}, got {value}")


def check_seconds(name: str, value: Any) -> None:
    """Raises ConfigError for what is neither a number of seconds nor None."""
    if value is not None and not is_number(value):
        raise ConfigError(f"{name} must be a number of seconds, or None; got {value!r}")


def check_flag(name: str, value: Any) -> None:
    """Raises ConfigError for what is neither True nor False."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be True or False, got {value!r}")


def check_several(name: str, value: Any, example: str) -> None:
    """Raises ConfigError for what is not several values; text is one."""
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise ConfigError(f"{name} must be several {example}; got {value!r}")


@dataclass(frozen=True)
class _Config:
    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Returns the config of plain values; raises ConfigError for unknown keys and values of another type."""
        return build(cls, values)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values that `from_dict` takes back."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class DiTConfig(_Config):
    """Sizes of the causal diffusion transformer (Wan2.1 architecture).

    Attributes:
      dim: model width E.
      ffn_dim: MLP width M.
      num_heads: attention heads N; the head dim is `dim // num_heads`.
      num_layers: transformer blocks L.
      freq_dim: width of the sinusoidal timestep embedding.
      text_dim: width of the text encoder's output.
      text_len: prompt tokens P (padded or cut).
      in_channels: latent channels in.
      out_channels: latent channels out.
      patch: patch size (time, height, width).
      eps: epsilon of all norms.
      weight_dtype: what the blocks' linear layers are held in, 8 bits with a scale for each output channel. Not of a
        checkpoint, but of whoever runs it.
    """

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    freq_dim: int = 256
    text_dim: int = 4096
    text_len: int = 512
    in_channels: int = 16
    out_channels: int = 16
    patch: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6
    weight_dtype: Storage = "compute"

    def __post_init__(self):
        check_choice("weight_dtype", self.weight_dtype, STORAGES)
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2:
            raise ConfigError(f"DiT: dim={self.dim} must split into {self.num_heads=} heads of even size")
        if self.patch[0] != 1:
            raise ConfigError(f"DiT: temporal patch size must be 1, got {self.patch=}")

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads


@dataclass(frozen=True)
class VAEConfig(_Config):
    """Sizes of the causal 3-D VAE (Wan2.1 architecture), published sizes by default.

    Attributes:
      dim: channels of the first level.
      z_dim: latent channels.
      dim_mult: channel multiplier of each level.
      num_res_blocks: residual blocks per encoder level (the decoder has one more).
      temporal_downsample: for each level but the last, whether it halves time as well as space.
      encodes_normalised: whether the encoder gives latents as `decode` takes them; Wan's have to be normalised first.
    """

    dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    encodes_normalised: bool = False

    def __post_init__(self):
        if len(self.temporal_downsample) != len(self.dim_mult) - 1:
            raise ConfigError(
                f"VAE: {self.temporal_downsample=} needs {len(self.dim_mult) - 1} entries for {self.dim_mult=}"
            )


@dataclass(frozen=True)
class TextConfig(_Config):
    """Sizes of the UMT5 text encoder, UMT5-XXL by default.

    Attributes:
      vocab: vocabulary size.
      dim: model width.
      dim_attn: total width of all heads.
      dim_ffn: width of the gated MLP.
      num_heads: attention heads.
      num_layers: encoder blocks.
      num_buckets: buckets of the relative position bias (each block has its own table).
      max_distance: distance beyond which all positions share a bucket.
    """

    vocab: int = 256384
    dim: int = 4096
    dim_attn: int = 4096
    dim_ffn: int = 10240
    num_heads: int = 64
    num_layers: int = 24
    num_buckets: int = 32
    max_distance: int = 128


@dataclass(frozen=True)
class TAEHVConfig(_Config):
    """Sizes of the tiny autoencoder's decoder (TAEHV for Wan2.1), published sizes by default.

    Attributes:
      z_dim: latent channels.
      channels: channels of the four levels.
    """

    z_dim: int = 16
    channels: tuple[int, int, int, int] = (256, 128, 64, 64)


@dataclass(frozen=True)
class ModelConfig(_Config):
    """All networks of one checkpoint.

    Attributes:
      name: the preset it was recognised as, or "custom".
      dit: the transformer.
      vae: encoder and decoder.
      text: the text encoder.
      taehv: the small decoder, where there is one.
      picture: (height, width) in pixels that the model was trained at, a stream's default.
    """

    name: str
    dit: DiTConfig
    vae: VAEConfig = field(default_factory=VAEConfig)
    text: TextConfig = field(default_factory=TextConfig)
    taehv: TAEHVConfig = field(default_factory=TAEHVConfig)
    picture: tuple[int, int] = (480, 832)

    def __post_init__(self):
        if self.dit.text_dim != self.text.dim:
            raise ConfigError(
                f"{self.name}: the DiT expects text width {self.dit.text_dim}, the text encoder gives {self.text.dim}"
            )
        if not self.dit.in_channels == self.dit.out_channels == self.vae.z_dim:
            raise ConfigError(
                f"{self.name}: latent channels differ: DiT {self.dit.in_channels} in, {self.dit.out_channels} out, "
                f"VAE {self.vae.z_dim}"
            )

    def with_blocks(self, blocks: int | None) -> ModelConfig:
        """Returns the model with only so many of the transformer's blocks; None is all of them."""
        if blocks is None:
            return self
        if not 1 <= blocks <= self.dit.num_layers:
            raise ConfigError(f"{self.name} has 1 to {self.dit.num_layers} blocks to take, got {blocks}")
        return dataclasses.replace(self, dit=dataclasses.replace(self.dit, num_layers=blocks))

    def with_weight_dtype(self, weight_dtype: Storage | None) -> ModelConfig:
        """Returns the model with its transformer's weights held in another way; None leaves them as they are."""
        if weight_dtype is None:
            return self
        return dataclasses.replace(self, dit=dataclasses.replace(self.dit, weight_dtype=weight_dtype))


PRESETS: Mapping[str, ModelConfig] = {
    "wan-1.3b": ModelConfig("wan-1.3b", DiTConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30)),
    "wan-14b": ModelConfig("wan-14b", DiTConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)),
    "golden": ModelConfig(  # the models of tests/goldens
        "golden",
        DiTConfig(dim=96, ffn_dim=192, num_heads=3, num_layers=4, freq_dim=32, text_dim=48, text_len=16),
        VAEConfig(dim=8),
        TextConfig(vocab=300, dim=48, dim_attn=64, dim_ffn=96, num_heads=4, num_layers=3),
    ),
    "tiny": ModelConfig(  # ships with the package
        "tiny",
        DiTConfig(dim=128, ffn_dim=384, num_heads=4, num_layers=5, freq_dim=64, text_dim=64, text_len=24),
        VAEConfig(dim=8, dim_mult=(1, 2, 5, 8), num_res_blocks=1, encodes_normalised=True),
        TextConfig(vocab=1024, dim=64, dim_attn=64, dim_ffn=128, num_heads=4, num_layers=2),
        picture=(96, 160),
    ),
}


def preset(name: str) -> ModelConfig:
    """Returns the preset called `name`; raises ConfigError with the known names otherwise."""
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}; known presets are {', '.join(PRESETS)}")
    return PRESETS[name]


@dataclass(frozen=True)
class StreamConfig(_Config):
    """What one stream computes: everything that shapes its compiled programs.

    Attributes:
      height: pixels, a multiple of 16.
      width: pixels, a multiple of 16.
      timesteps: denoising timesteps (1000 = pure noise), descending, one row of the stream batch each.
      task: "v2v" re-draws frames, "t2v" makes them from noise.
      mode: "stream" runs all steps at once on different chunks; "sequential" runs a chunk's steps one after
        another (lower latency, lower throughput).
      frames_per_block: latent frames per chunk.
      cache_frames: latent frames held in the rolling KV cache; best the first group and whole chunks.
      cache_dtype: what the cache is held in, 8 bits with a scale for each token and head.
      sink_frames: cache positions kept as anchors.
      keep_first: whether the first group, and with chunks of one latent frame also the first chunk, stays in the cache
        for good even without anchors, as in the reference.
      sink_threshold: mean cosine similarity in (-1, 1] below which a sink is replaced; -1 turns it off.
      rope_refresh: latent frame index at which the time index restarts at `cache_frames - 1`.
      motion_range: how much full motion lowers the noise scale, in [0, 1]; 0 keeps it where it is.
      decoder: "wan" (the VAE's own) or "taehv" (small and fast).
    """

    height: int = 480
    width: int = 832
    timesteps: tuple[int, ...] = V2V_TIMESTEPS[:2]
    task: Literal["v2v", "t2v"] = "v2v"
    mode: Literal["stream", "sequential"] = "stream"
    frames_per_block: int = 1
    cache_frames: int = 6
    cache_dtype: Storage = "compute"
    sink_frames: int = 3
    keep_first: bool = True
    sink_threshold: float = 0.2
    rope_refresh: int = 50
    motion_range: float = 0.1
    decoder: Literal["wan", "taehv"] = "wan"

    def __post_init__(self):
        for name, value in read_values(type(self), vars(self)).items():
            object.__setattr__(self, name, value)  # a tuple where a list was given
        for name in ("height", "width"):
            value = getattr(self, name)
            if value <= 0 or value % PIXEL_MULTIPLE:
                near = max(PIXEL_MULTIPLE, round(value / PIXEL_MULTIPLE) * PIXEL_MULTIPLE)
                raise ConfigError(
                    f"{name} must be a positive multiple of {PIXEL_MULTIPLE}, got {value}; try {near}"
                )
        if not 1 <= len(self.timesteps) <= 8 or not all(0 <= t <= 1000 for t in self.timesteps):
            raise ConfigError(f"timesteps must be 1 to 8 values in [0, 1000], got {self.timesteps}")
        if any(a <= b for a, b in itertools.pairwise(self.timesteps)):
            raise ConfigError(f"timesteps must descend, as in {V2V_TIMESTEPS[:2]}, got {self.timesteps}")
        if self.frames_per_block < 1:
            raise ConfigError(f"frames_per_block must be at least 1, got {self.frames_per_block}")
        if not 0 <= self.sink_frames < self.cache_frames:
            raise ConfigError(
                f"sink_frames must be at least 0 and below cache_frames={self.cache_frames}, got {self.sink_frames}"
            )
        if not any(self.sink_frames < end <= self.cache_frames for end in self._queued_ends()):
            raise ConfigError(
                f"cache_frames={self.cache_frames} leaves nothing to overwrite beside the first group and "
                f"sink_frames={self.sink_frames}; use at least {2 * self.first_latents} and more than the sinks"
            )
        if not self.keep_first and (self.sink_frames or self.frames_per_block > 1):
            raise ConfigError(
                "keep_first: false needs sink_frames=0 and frames_per_block=1, got "
                f"{self.sink_frames} and {self.frames_per_block}"
            )
        if not -1.0 <= self.sink_threshold <= 1.0 or not math.isfinite(self.sink_threshold):
            raise ConfigError(f"sink_threshold must be in [-1, 1] (-1 = off), got {self.sink_threshold}")
        if not 0.0 <= self.motion_range <= 1.0:
            raise ConfigError(f"motion_range must be in [0, 1] (0 = off), got {self.motion_range}")
        if self.rope_refresh < self.cache_frames:
            raise ConfigError(
                f"rope_refresh must be at least cache_frames={self.cache_frames}, got {self.rope_refresh}"
            )

    def _queued_ends(self) -> list[int]:
        """Ends of the cache positions that enter the eviction queue while the cache fills (see nn.kv_cache)."""
        first, block = self.first_latents, self.frames_per_block
        return [2 * first, *range(first + 2 * block, self.cache_frames + 1, block)]

    @classmethod
    def for_task(cls, task: str, steps: int = 2, **settings: Any) -> Self:
        """Returns the published configuration of a task ("v2v" or "t2v") with `steps` steps, 1 to 4.

        Text-to-video adds a clean pass at timestep 0 behind its steps, and works on blocks of three latent
        frames within the window of 21 that the model was trained on. `settings` replace single fields.
        """
        check_whole("steps", steps, 1, len(V2V_TIMESTEPS))
        defaults: dict[str, Any] = {"task": task, "timesteps": V2V_TIMESTEPS[:steps]}
        if task == "t2v":
            defaults.update(
                timesteps=(*T2V_TIMESTEPS[:steps], 0),
                frames_per_block=3,
                cache_frames=21,
                sink_frames=3,
                sink_threshold=SINK_THRESHOLD_OFF,
            )
        return cls.from_dict({**defaults, **settings})

    def with_steps(self, steps: int) -> Self:
        """Returns the configuration with another number of denoising steps.

        Fewer are the first ones of the present list; more go on along the published list. Raises ConfigError where
        that is not possible.
        """
        known = self.timesteps
        if known == V2V_TIMESTEPS[: len(known)]:
            known = V2V_TIMESTEPS
        if self.task != "v2v" and steps != self.steps:
            raise ConfigError("the steps of text-to-video end with a clean pass and cannot be changed")
        check_whole("steps", steps, 1, len(known))
        return dataclasses.replace(self, timesteps=known[:steps])

    @property
    def steps(self) -> int:
        """Denoising steps S."""
        return len(self.timesteps)

    @property
    def rows(self) -> int:
        """Rows B of the batch, each with its own cache: one per step in stream mode, else 1."""
        return self.steps if self.mode == "stream" else 1

    @property
    def first_latents(self) -> int:
        """Latent frames of the first group: the VAE's lone first frame rides along in video-to-video."""
        return self.frames_per_block + (1 if self.task == "v2v" else 0)

    @property
    def first_frames(self) -> int:
        """Pixel frames of the first group."""
        return 1 + LATENT_STRIDE * (self.first_latents - 1)

    @property
    def chunk_frames(self) -> int:
        """Pixel frames of every later chunk."""
        return LATENT_STRIDE * self.frames_per_block

    @property
    def latent_size(self) -> tuple[int, int]:
        """Latent height and width."""
        return self.height // SPATIAL_STRIDE, self.width // SPATIAL_STRIDE

    @property
    def adaptive_sinks(self) -> bool:
        """Whether sinks are replaced; like the reference only with chunks of one latent frame."""
        return (
            self.sink_threshold > SINK_THRESHOLD_OFF and self.sink_frames > 0 and self.frames_per_block == 1
        )
