"""What a session takes and gives. Numpy only: servers and schedulers build on this without loading JAX."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from svd2_jax.config import StreamConfig, is_number
from svd2_jax.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

DEFAULT_NOISE_SCALE = 0.8


@dataclass(frozen=True)
class SessionSpec:
    """Everything that defines one session.

    Attributes:
      prompt: what to re-draw the video to; must not be blank.
      stream: what is computed (sizes, steps, cache); None is the engine's own, see `Engine.stream_config`.
      noise_scale: share of noise in (0, 1]; the higher, the freer the re-drawing. Ignored in text-to-video.
      seed: every Gaussian is a function of (seed, chunk, step).
      pixels: "uint8" frames in [0, 255], or "float32" frames in [0, 1] (unrounded, for comparisons).

    Raises:
      ConfigError: a value is of another type or out of its range.
    """

    prompt: str
    stream: StreamConfig | None = None
    noise_scale: float = DEFAULT_NOISE_SCALE
    seed: int = 0
    pixels: Literal["uint8", "float32"] = "uint8"

    def __post_init__(self):
        check_prompt(self.prompt)
        if self.stream is not None and not isinstance(self.stream, StreamConfig):
            raise ConfigError(
                f"stream must be a StreamConfig, got {type(self.stream).__name__}; engine.stream_config(...) makes one"
            )
        check_noise_scale(self.noise_scale)
        if not is_number(self.seed, numbers.Integral):
            raise ConfigError(f"seed must be a whole number, got {self.seed!r}")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed must be in [0, 2**32), got {self.seed}")
        if self.pixels not in ("uint8", "float32"):
            raise ConfigError(f"pixels must be 'uint8' or 'float32', got {self.pixels!r}")

    @property
    def config(self) -> StreamConfig:
        """What is computed; raises ConfigError where that is the engine's own, which `Engine.resolved` fills in."""
        if self.stream is None:
            raise ConfigError("the spec names no stream; engine.resolved(spec) fills in the engine's own")
        return self.stream


def check_prompt(prompt: str) -> None:
    """Raises ConfigError for a blank prompt, or for something that is not text."""
    if not isinstance(prompt, str):
        raise ConfigError(f"the prompt must be text, got {type(prompt).__name__}")
    if not prompt.strip():
        raise ConfigError("the prompt is empty; say in words what the video should look like")


def check_noise_scale(noise_scale: float) -> None:
    """Raises ConfigError for something that is no number in (0, 1]."""
    if not is_number(noise_scale):
        raise ConfigError(f"noise_scale must be a number, got {noise_scale!r}")
    if not 0.0 < noise_scale <= 1.0:
        raise ConfigError(f"noise_scale must be in (0, 1], got {noise_scale}; 0.8 is the published default")


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

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """The same, for `np.asarray(chunk)` and `np.concatenate(chunks)`."""
        ...


class Session(Protocol):
    """One stream of frames, from its first frame to `close`.

    Calls from several threads wait for one another: each is done as a whole.
    """

    spec: SessionSpec

    @property
    def steps(self) -> int:
        """Denoising steps that chunks entering now will take."""
        ...

    def set_steps(self, steps: int) -> None:
        """Changes the denoising steps from the next chunk on; the stream goes on where it is.

        With fewer steps, chunks that have taken as many already are finished: the next tick returns them too. With
        more, nothing is finished until the first chunk is through all of them.

        Raises:
          SessionError: these steps were not prepared (see `Engine.open`): compiling would hold the stream up.
        """
        ...

    def push(self, frames: np.ndarray) -> Sequence[Chunk]:
        """Takes input frames, uint8 [T, H, W, 3] or one [H, W, 3]; returns what they complete (video-to-video).

        Does not wait for the device; a chunk's `frames()` does.
        """
        ...

    def advance(self) -> Sequence[Chunk]:
        """Makes the next chunk from noise alone (text-to-video)."""
        ...

    def set_prompt(self, prompt: str, blend_chunks: int = 0) -> None:
        """Changes the prompt from the next chunk on, in one go or over `blend_chunks` chunks."""
        ...

    def set_noise_scale(self, noise_scale: float) -> None:
        """Changes the share of noise in (0, 1] from the next chunk on; chunks in flight keep theirs (video-to-video).

        The noise scale of a stream follows with its usual smoothing: the next chunk goes nine tenths of the way.

        Raises:
          ConfigError: it is no number in (0, 1].
          SessionError: the session is one of text-to-video, where nothing is mixed with noise, or closed.
        """
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
        """Streams a whole clip; yields finished frames [T, H, W, 3], a chunk at a time, each when it is there.

        Takes what `push` takes, any number of times: an iterable of [T, H, W, 3] or [H, W, 3], so also one array.
        """
        ...

    def close(self) -> None:
        """Frees the session's state; further calls raise SessionError."""
        ...


@dataclass(frozen=True)
class TickInput:
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


@runtime_checkable
class Engine(Protocol):
    """A loaded model that opens sessions."""

    @property
    def batch_sizes(self) -> Sequence[int]:
        """How many streams a tick can take, ascending, beginning with 1."""
        ...

    def stream_config(self, **settings: Any) -> StreamConfig:
        """Returns the published configuration at the size that the model was trained at, with other `settings`."""
        ...

    def resolved(self, spec: SessionSpec) -> SessionSpec:
        """Returns the spec with the engine's own stream where it names none."""
        ...

    def open(self, spec: SessionSpec, steps: Sequence[int] = ()) -> Session:
        """Compiles what the session needs and returns it, ready for its first frame.

        `steps` are the numbers of denoising steps that `Session.set_steps` may ask for later, besides the spec's.
        """
        ...

    def prepare(self, spec: SessionSpec, steps: Sequence[int]) -> None:
        """Compiles all that streams like this need, in every batch size and for all these numbers of steps."""
        ...

    def measure_split(self, spec: SessionSpec) -> Sequence[int] | None:
        """Measures the stages of the engine's pipeline and chooses how many blocks each of them has from then on.

        To be called before `prepare`. Returns the blocks; None where there is nothing to choose, and beside open
        sessions.
        """
        ...

    def prepare_prompt(self, prompt: str) -> None:
        """Encodes a prompt, so that a later `set_prompt` does not make its stream wait."""
        ...

    def tick(self, work: Sequence[TickInput]) -> Ticket:
        """Hands one tick of several streams to the device, and does not wait for it.

        Streams of the same shape and number of steps share their work, a batch size of them at once; the others
        follow one another. What one of them holds never changes what comes out of another.
        """
        ...
