"""`svd2 live`: re-draw a camera, a stream or a file in real time.

examples:
  svd2 live --checkpoint ckpt --input in.mp4 --loop --prompt "a watercolour painting" --output out.mp4
  svd2 live --checkpoint ckpt --camera /dev/video0 --fps 16 --prompt "a sunny day" --seconds 600 \\
      --output out.mp4 --metrics out.jsonl --chart out.png
  svd2 live --checkpoint ckpt --input in.mp4 --streams 4 --prompt "a sketch" --prompt "an oil painting" \\
      --steps 4 --min-steps 1 --budget 800 --output out.mp4

  # from and to streams: rtsp, rtmp, http, udp, tcp, and what else this build of FFmpeg knows
  svd2 live --checkpoint ckpt --input rtsp://camera.local/stream --prompt "a sunny day" --output out.mp4
  svd2 live --checkpoint ckpt --camera /dev/video0 --prompt "a sketch" --output rtmp://localhost/live/sketch

  # with the small model that comes with the package
  svd2 live --input in.mp4 --loop --fps 8 --prompt "a pencil sketch" --output out.mp4

While it runs, type a prompt and press enter to change it, `1: a prompt` for stream 1 only. Ctrl-C ends it: what is in
flight is finished, and the video can be played. docs/scheduling.md says how frames are scheduled.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from svd2_jax import files, media
from svd2_jax.api import SessionSpec
from svd2_jax.cli import device
from svd2_jax.cli.options import (
    SHARE_VAE,
    EngineOptions,
    NoiseOptions,
    OptionGroup,
    StreamOptions,
    option,
    say,
)
from svd2_jax.command import EXIT_FAILED
from svd2_jax.errors import ConfigError
from svd2_jax.media.urls import masked, path_or_url
from svd2_jax.runtime.types import StreamSettings
from svd2_jax.text import counted

if TYPE_CHECKING:
    from svd2_jax.config import StreamConfig
    from svd2_jax.runtime.stream import Source


_BESIDE = "what it tells besides the table"


@dataclass(frozen=True, kw_only=True)
class Options(OptionGroup):
    """What `svd2 live` takes."""

    engine: EngineOptions
    input: Path | str | None = option(
        "video file to play at its real rate, or URL of a stream",
        type=path_or_url,
        metavar="VIDEO",
        one_of=True,
    )
    camera: str | None = option(
        "such as /dev/video0, or avfoundation:0 with FFmpeg's kind", metavar="[KIND:]DEVICE", one_of=True
    )
    prompt: tuple[str, ...] = option(
        "what the video should look like; given several times (at most as often as there are --streams), one for each "
        "stream in turn. To change it while it runs, type another",
        required=True,
    )
    output: Path | str | None = option(
        "video file to write, with several streams one for each; or URL to send the stream to. Without it no frame is "
        "kept",
        type=path_or_url,
        metavar="VIDEO",
    )
    streams: int = option("number of streams (default %(default)s)", 1)
    loop: bool = option("play the file over and over", False)
    seconds: float | None = option("stop after S seconds", metavar="S")
    fps: float | None = option(
        "frames per second to play the file at, to ask the camera for or to expect of the URL (default: its own)"
    )
    blend: int = option(
        "chunks over which a typed prompt comes in (default %(default)s)", 4, metavar="CHUNKS"
    )
    noise: NoiseOptions
    stages: int = option("number of devices that the transformer is cut over (default %(default)s)", 1)
    replicas: int = option(
        "number of copies of the model, each on devices of its own; a stream runs on one of them, where there is room "
        "(default %(default)s)",
        1,
    )
    share_vae: bool = option(SHARE_VAE, False)
    metrics: Path | None = option("what became of each frame, line by line", metavar="JSONL", group=_BESIDE)
    chart: Path | None = option(
        "chart of the latency over time against the latency budget", metavar="PNG", group=_BESIDE
    )
    budget: float | None = option(
        "latency budget: longest time from a frame's arrival until it is shown (default: what all steps need at this "
        "rate, and a quarter more)",
        metavar="MS",
        group="deadlines",
    )
    min_steps: int = option(
        "minimum steps: lowest number of denoising steps under overload (default %(default)s)",
        1,
        group="deadlines",
    )
    stream: StreamOptions


def run(options: Options) -> int:
    """Runs live streams until their input or time is over; fails unless all of them ended well."""
    from svd2_jax.runtime import heap

    heap.share()  # before JAX, which starts threads
    _check(options)
    cfg = options.stream.stream(options.engine.sizes)
    if cfg.mode != "stream":
        raise ConfigError(
            f"{options.stream.config}: mode {cfg.mode!r} is for files; live streams take what they need of it by "
            "themselves when the budget is tight, so use --budget instead"
        )
    prompts = options.prompt
    specs = tuple(
        SessionSpec(prompts[i % len(prompts)], cfg, options.noise.noise_scale, options.noise.seed + i)
        for i in range(options.streams)
    )
    with _source(options, cfg) as (rate_hz, source):
        return _run_from(options, specs, rate_hz, source)


def _check(options: Options) -> None:
    """Raises an error for what contradicts itself and for files that cannot be written."""
    from svd2_jax.cli.live_run import output_files

    for name, value, least in (
        ("streams", options.streams, 1), ("replicas", options.replicas, 1), ("blend", options.blend, 0),
    ):  # fmt: skip
        if value < least:
            raise ConfigError(f"--{name} must be at least {least}, got {value}")
    if options.seconds is not None and not options.seconds > 0:
        raise ConfigError(f"--seconds must be above 0, got {options.seconds:g}")
    if (count := len(options.prompt)) > options.streams:
        raise ConfigError(
            f"{count} prompts for {counted(options.streams, 'stream')}: --streams {count} gives each stream "
            "its own prompt; to change the prompt while it runs, give the first one and type the others"
        )
    if options.loop and options.camera:
        raise ConfigError("--loop is for a file; a camera never ends")
    if options.camera and options.streams > 1:
        raise ConfigError("a camera can be opened once; use --streams 1, or play a file")
    for name, file in (("input", options.input), ("output", options.output)):
        if isinstance(file, str) and options.streams > 1:
            raise ConfigError(f"--{name} {masked(file)}: a URL is for one stream; use --streams 1, or a file")
    if options.loop and isinstance(options.input, str):
        raise ConfigError(
            f"--loop is for a file; {masked(options.input)} is a stream and is not started over"
        )
    if options.metrics:
        files.check_target(options.metrics)
    if options.chart:
        files.check_chart(options.chart)
    outputs = [("--output", path) for path in output_files(options.output, options.streams)]
    files.check_apart(
        [*outputs, ("--metrics", options.metrics), ("--chart", options.chart)],
        [("--input", options.input), ("--config", options.stream.config)],
    )


@contextlib.contextmanager
def _source(
    options: Options, cfg: StreamConfig
) -> Iterator[tuple[float, Callable[[int, threading.Event], Source]]]:
    """Opens the input before all that takes long, so that what cannot be read is known at once.

    Yields:
      Its frames per second, and what opens it for stream i, until the event is set.
    """
    from svd2_jax.media import sources

    input, camera, fps = options.input, options.camera, options.fps
    size = cfg.height, cfg.width

    def rate_hz(found: float) -> float:
        rate = found if fps is None else fps
        if not 0 < rate < math.inf:
            raise ConfigError(f"--fps must be above 0, got {rate:g}")
        return rate

    if camera is not None:
        with sources.open_camera(camera, *size, fps) as reader:
            rate = rate_hz(reader.fps)
        yield rate, lambda i, stop: sources.watch_camera(camera, *size, stop, fps)
    elif isinstance(input, Path):
        with media.VideoReader(input, *size) as reader:
            rate = rate_hz(reader.fps)
        yield rate, lambda i, stop: sources.play_file(input, *size, rate, options.loop, stop)
    elif input is not None:
        with sources.UrlSource(input, *size) as received:  # stays connected
            yield rate_hz(received.fps), lambda i, stop: received.watch(stop)


def _run_from(
    options: Options,
    specs: tuple[SessionSpec, ...],
    rate_hz: float,
    source: Callable[[int, threading.Event], Source],
) -> int:
    """Loads the model and runs the streams."""
    from svd2_jax.cli import live_run
    from svd2_jax.runtime.scheduler import PolicyConfig

    cfg, budget_ms = specs[0].config, options.budget
    if budget_ms is None:
        budget_ms = live_run.default_budget_ms(specs[0], rate_hz, options.stages)
    plan = live_run.LiveRun(
        specs,
        StreamSettings(rate_hz, budget_ms, cfg.steps, options.min_steps, stages=options.stages),
        source,
        options.output,
        options.metrics,
        options.chart,
        options.seconds,
        options.blend,
        options.engine.unknown_style,
        (lambda engine: engine.describe(cfg)) if options.engine.verbose else None,
        is_budget_asked=options.budget is not None,
    )
    plan.check()
    options.engine.note_untrained(specs[0].noise_scale, options.prompt)
    if options.output is None:
        say("no --output: frames are shown nowhere and not kept; the table says how fast they come")
    first, *others = device.meshes(options.replicas, options.stages)
    on_one = -(-options.streams // options.replicas)
    sizes = tuple(2**n for n in range(on_one.bit_length()))
    engine = device.load_engine(options.engine, first, batch_sizes=sizes, share_vae=options.share_vae)
    engines = [engine, *(engine.replica(mesh) for mesh in others)]
    ended_well = device.device_errors(live_run.run, engines, plan, PolicyConfig(), say)
    return 0 if ended_well else EXIT_FAILED
