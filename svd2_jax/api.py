"""What a session takes and gives. Numpy only: servers and schedulers build on this without loading JAX."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from svd2_jax.config import StreamConfig
from svd2_jax.errors import ConfigError

DEFAULT_NOISE_SCALE = 0.8


@dataclass(frozen=True)
class SessionSpec:
    """Everything that defines one session.

    Attributes:
      prompt: what to re-draw the video to; must not be blank.
      stream: what is computed (sizes, steps, cache).
      noise_scale: share of noise in (0, 1]; the higher, the freer the re-drawing. Ignored in text-to-video.
      seed: every Gaussian is a function of (seed, chunk, step).
      pixels: "uint8" frames in [0, 255], or "float32" frames in [0, 1] (unrounded, for comparisons).
    """

    prompt: str
    stream: StreamConfig = field(default_factory=StreamConfig)
    noise_scale: float = DEFAULT_NOISE_SCALE
    seed: int = 0
    pixels: Literal["uint8", "float32"] = "uint8"

    def __post_init__(self):
        check_prompt(self.prompt)
        for name, kind in (("noise_scale", (int, float)), ("seed", int)):
            value = getattr(self, name)
            if not isinstance(value, kind) or isinstance(value, bool):
                raise ConfigError(f"{name} must be a number, got {value!r}")
        if not 0.0 < self.noise_scale <= 1.0:
            raise ConfigError(
                f"noise_scale must be in (0, 1], got {self.noise_scale}; 0.8 is the published default"
            )
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed must be in [0, 2**32), got {self.seed}")
        if self.pixels not in ("uint8", "float32"):
            raise ConfigError(f"pixels must be 'uint8' or 'float32', got {self.pixels!r}")


def check_prompt(prompt: str) -> None:
    """Raises ConfigError for a blank prompt, or for something that is not text."""
    if not isinstance(prompt, str):
        raise ConfigError(f"the prompt must be text, got {type(prompt).__name__}")
    if not prompt.strip():
        raise ConfigError("the prompt is empty; say in words what the video should look like")


class Chunk(Protocol):
    """Finished frames that may still be on their way from the device."""

    @property
    def first_frame(self) -> int:
        """Index of the chunk's first frame in the output."""
        ...

    @property
    def frame_count(self) -> int:
        """Frames in the chunk."""
        ...

    def frames(self) -> np.ndarray:
        """Waits for the frames [T, H, W, 3] and returns them."""
        ...


class Session(Protocol):
    """One stream of frames, from its first frame to `close`."""

    spec: SessionSpec

    @property
    def steps(self) -> int:
        """Denoising steps that chunks entering now will take."""
        ...

    def set_steps(self, steps: int) -> None:
        """Changes the denoising steps from the next chunk on; the stream goes on where it is.

        With fewer steps, chunks that have taken as many already are finished: the next tick returns them too. With
        more, nothing is finished until the first chunk is through all of them.
        """
        ...

    def push(self, frames: np.ndarray) -> Sequence[Chunk]:
        """Takes any number of input frames, uint8 [T, H, W, 3]; returns what they complete (video-to-video)."""
        ...

    def advance(self) -> Sequence[Chunk]:
        """Makes the next chunk from noise alone (text-to-video)."""
        ...

    def set_prompt(self, prompt: str, blend_chunks: int = 0) -> None:
        """Changes the prompt from the next chunk on, in one go or over `blend_chunks` chunks."""
        ...

    def finish(self) -> Sequence[Chunk]:
        """Completes the frames still under way: as many come out as went in."""
        ...

    def run(
        self,
        frames: Iterable[np.ndarray] | None = None,
        count: int | None = None,
        prompts: Mapping[int, str] | None = None,
        blend_chunks: int = 0,
    ) -> Iterator[np.ndarray]:
        """Streams a whole clip; yields finished frames [T, H, W, 3]."""
        ...

    def close(self) -> None:
        """Frees the session's state; further calls raise SessionError."""
        ...


@dataclass(frozen=True)
class Work:
    """One stream's part of a tick.

    Attributes:
      session: the stream.
      frames: uint8 [T, H, W, 3], the stream's first group or its next chunk; None: nothing enters, and the chunks
        under way move on. A first group has its tick for itself.
    """

    session: Session
    frames: np.ndarray | None = None


class Ticket(Protocol):
    """A tick that was handed to the device."""

    @property
    def chunks(self) -> Sequence[Sequence[Chunk]]:
        """The chunks that it finishes, for each part in the order given."""
        ...

    def wait_stages(self) -> None:
        """Waits until the stages can take the next tick: for all but what comes behind them, which is decoding."""
        ...

    def wait(self) -> None:
        """Waits until the device is through with the tick and with all that finishes in it."""
        ...


class Engine(Protocol):
    """A loaded model that opens sessions."""

    @property
    def batch_sizes(self) -> Sequence[int]:
        """How many streams a tick can take, ascending, beginning with 1."""
        ...

    def open(self, spec: SessionSpec) -> Session:
        """Compiles what the session needs and returns it, ready for its first frame."""
        ...

    def prepare(self, spec: SessionSpec, steps: Sequence[int]) -> None:
        """Compiles all that streams like this need, in every batch size and for all these numbers of steps."""
        ...

    def prepare_prompt(self, prompt: str) -> None:
        """Encodes a prompt, so that a later `set_prompt` does not make its stream wait."""
        ...

    def tick(self, work: Sequence[Work]) -> Ticket:
        """Hands one tick of several streams to the device, and does not wait for it.

        Streams of the same shape and number of steps share their work, a batch size of them at once; the others
        follow one another. What one of them holds never changes what comes out of another.
        """
        ...
