"""What commands do with a model on a device: load it, open a session, write what comes out. Loads JAX when called."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from svd2_jax import progress, shipped
from svd2_jax.cli.options import EngineOptions, say
from svd2_jax.errors import EngineError, MediaError
from svd2_jax.text import counted, measured_blocks

if TYPE_CHECKING:
    import numpy as np

    from svd2_jax.api import SessionSpec
    from svd2_jax.engine.engine import DeviceEngine
    from svd2_jax.engine.mesh import StageMesh
    from svd2_jax.engine.session import DeviceSession
    from svd2_jax.media import VideoWriter

T = TypeVar("T")

# Of a clip, from which on measuring the stages, some 120 frames' work, is little beside it.
MEASURED_FRAMES = 1000


def meshes(replicas: int = 1, stages: int = 1, keep: bool = True) -> Sequence[StageMesh]:
    """Returns the devices of pipelines, once JAX has some; if `keep`, compiled programs are kept on disk."""
    from svd2_jax.engine.devices import prepare_devices
    from svd2_jax.engine.mesh import stage_meshes

    prepare_devices(keep)
    return stage_meshes(replicas, stages)


def load_engine(
    options: EngineOptions,
    mesh: StageMesh,
    blocks: int | None = None,
    **pipeline: Any,
) -> DeviceEngine:
    """Returns the model that the options name, loaded: its first `blocks`, or all; `pipeline` as `PipelineOptions`."""
    from svd2_jax.engine.engine import DeviceEngine
    from svd2_jax.engine.options import PipelineOptions

    on_devices = PipelineOptions(options.attention, **pipeline)
    if options.verbose:
        logging.basicConfig(format="%(message)s")
        logging.getLogger("svd2_jax").setLevel(logging.INFO)
    if shipped.random_preset(options.checkpoint) is not None:
        sizes = options.sizes().with_blocks(blocks)
        say(f"random weights in the sizes of {sizes.name}: the pictures will mean nothing")
        return DeviceEngine.random(
            sizes, 0, options.dtype or "float32", mesh, on_devices, options.weight_dtype
        )
    say(f"loading {options.checkpoint}")
    folder = shipped.checkpoint_folder(options.checkpoint)
    return DeviceEngine.from_checkpoint(
        folder, options.dtype, options.text_encoder, mesh, on_devices, blocks, options.weight_dtype
    )


def open_session(
    options: EngineOptions,
    spec: SessionSpec,
    mesh: StageMesh,
    frame_count: int | None,
    meet: Callable[[], object] = lambda: None,
    **pipeline: Any,
) -> DeviceSession:
    """Loads the model, compiles its programs and opens the session; measures the stages first for a long video.

    A `frame_count` of None is one that is not known; `meet` waits for the other processes.
    """
    started = time.monotonic()
    engine = load_engine(options, mesh, **pipeline)
    cfg, stages = spec.config, len(mesh.devices)
    say(
        f"opening {cfg.width}x{cfg.height}, {counted(cfg.steps, 'step')}, {cfg.mode}"
        + (f", {stages} stages" if stages > 1 else "")
        + "; programs are compiled the first time only"
    )
    with progress.shown("getting ready", say):
        is_long = frame_count is None or frame_count >= MEASURED_FRAMES
        if is_long and (split := device_errors(engine.measure_split, spec, meet)):
            say(measured_blocks(split))
        session = device_errors(engine.open, spec)
    if options.verbose:
        say(engine.describe(cfg))
    say(f"ready after {time.monotonic() - started:.1f} s")
    return session


def write(frames: Iterable[np.ndarray], writer: VideoWriter | None, total: int | None) -> None:
    """Writes finished frames with a progress bar, then says what was written."""
    from tqdm import tqdm

    if writer is None:
        for _ in guarded(frames):
            pass
        print("done; the process with the last stage has written the output")
        return
    started, count = time.monotonic(), 0
    with writer, tqdm(total=total, unit="frame", desc="re-drawing", dynamic_ncols=True) as bar:
        for chunk in guarded(frames):
            writer.write(chunk)
            count += len(chunk)
            bar.update(len(chunk))
        if not count:
            raise MediaError("the input holds no frame; nothing to re-draw")
    seconds = time.monotonic() - started
    height, width = writer.size
    print(
        f"{writer.path}: {counted(count, 'frame')}, {width}x{height} at {writer.fps:g} fps, "
        f"made in {seconds:.1f} s ({count / seconds:.2f} frames/s)"
    )


def guarded(items: Iterable[T]) -> Iterator[T]:
    """Yields the items of something that makes them on the device."""
    iterator = iter(items)
    while (item := device_errors(lambda: next(iterator, None))) is not None:
        yield item


def device_errors(function: Callable[..., T], *args: Any) -> T:
    """Calls a function; a failing device becomes one line that says what to try."""
    import jax

    try:
        return function(*args)
    except (jax.errors.JaxRuntimeError, NotImplementedError) as e:  # the latter: an --attention it has not
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        hint = "; try a smaller --height and --width, fewer --steps or --dtype bfloat16"
        raise EngineError(
            f"the device failed: {reason}{hint if 'RESOURCE_EXHAUSTED' in reason else ''}"
        ) from e
