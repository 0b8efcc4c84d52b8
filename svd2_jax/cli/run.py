"""`svd2 run`: re-draw a video file to a prompt, or make one from text.

examples:
  svd2 run --checkpoint ckpt --input in.mp4 --prompt "a watercolour painting" --output out.mp4
  svd2 run --checkpoint ckpt --input in.mp4 --prompt "a sunny day" --prompt-at "120=heavy rain" --blend 8 \\
      --steps 4 --output out.mp4
  svd2 run --checkpoint ckpt --prompt "a dog runs on the beach" --frames 81 --output dog.mp4
  svd2 run --checkpoint ckpt-14b --stages 4 -v --input in.mp4 --prompt "a film noir" --output out.mp4
  svd2 run --checkpoint ckpt-14b --stages 2 --share-vae --weight-dtype int8 --cache-dtype int8 --input in.mp4 \\
      --prompt "a film noir" --output out.mp4

  # the same on two hosts with two devices each: the same command on both, but for --process-id
  svd2 run --checkpoint ckpt-14b --stages 4 --coordinator host0:9876 --num-processes 2 --process-id 0 \\
      --input in.mp4 --prompt "a film noir" --output out.mp4

Every host reads the checkpoint and the input; the one with the last stage (the last process) writes the output.
SLURM and Open MPI tell by themselves how many processes there are.

Without --input the video is made from the text alone (text-to-video). Pictures of random weights mean nothing, but
--checkpoint random:wan-1.3b shows what a machine can do before anything is downloaded.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from svd2_jax import files, media, shipped
from svd2_jax.cli import device
from svd2_jax.cli.options import (
    SHARE_VAE,
    ClipStreamOptions,
    EngineOptions,
    NoiseOptions,
    OptionGroup,
    blocks_per_stage,
    option,
    say,
)
from svd2_jax.errors import ConfigError
from svd2_jax.media.urls import masked, path_or_url
from svd2_jax.text import counted

if TYPE_CHECKING:
    from svd2_jax.api import SessionSpec
    from svd2_jax.config import StreamConfig
    from svd2_jax.engine.cluster import Cluster

T2V_FPS = 16.0  # the rate Wan2.1 was trained at
_SEVERAL = "several devices"
_END_BYTES = 1 << 20  # of each end of a file, to tell it from another


def _change(text: str) -> tuple[int, str]:
    frame, separator, prompt = text.partition("=")
    if not separator or not frame.strip().isdecimal() or not prompt.strip():
        raise ConfigError(f"--prompt-at takes FRAME=TEXT, for example 120=heavy rain; got {text!r}")
    return int(frame), prompt


@dataclass(frozen=True, kw_only=True)
class Options(OptionGroup):
    """What `svd2 run` takes."""

    engine: EngineOptions
    prompt: tuple[str, ...] = option("what the video should look like; --prompt-at changes it", required=True)
    output: Path | str = option("video file to write; replaced if it exists", required=True, type=path_or_url)
    input: Path | str | None = option("video file to re-draw; without it: text-to-video", type=path_or_url)
    frames: int | None = option("frames to make (text-to-video), or to take from the input")
    prompt_at: tuple[tuple[int, str], ...] = option(
        "change the prompt with the chunk that holds this frame; may be given several times",
        type=_change,
        metavar="FRAME=TEXT",
    )
    blend: int = option("number of chunks over which a prompt changes", 0, metavar="CHUNKS")
    noise: NoiseOptions
    fps: float | None = option("of the output (default: the input's, or 16)")
    stream: ClipStreamOptions
    stages: int | None = option(
        "number of stages, one device each, that the transformer is cut into: N times as many chunks are in flight. "
        "`svd2 plan` says what to expect (default 1, or as many as --split has)",
        group=_SEVERAL,
    )
    split: tuple[int, ...] | None = option(
        "blocks on each stage (default: by what each stage is measured to take before the video begins; where it is "
        f"shorter than {device.MEASURED_FRAMES} frames, blocks are weighed against encoding and decoding instead)",
        type=blocks_per_stage,
        metavar="N,N,...",
        group=_SEVERAL,
    )
    share_vae: bool = option(SHARE_VAE, False, group=_SEVERAL)
    coordinator: str | None = option(
        "where process 0 listens; the port must be free", metavar="HOST:PORT", group=_SEVERAL
    )
    process_id: int | None = option(
        "of this process, 0 to one below their number", metavar="I", group=_SEVERAL
    )
    num_processes: int | None = option("number of processes that run this command together", group=_SEVERAL)

    @property
    def stage_count(self) -> int:
        """The number of stages: as asked for, or as the split has them."""
        return len(self.split or (0,)) if self.stages is None else self.stages


def run(options: Options) -> int:
    """Re-draws or makes a video."""
    _check(options)
    input, frames = options.input, options.frames
    cfg = options.stream.stream(options.engine.sizes, "v2v" if input else "t2v")
    spec = options.noise.spec(options.prompt[-1], cfg)
    if cfg.task == "t2v" and frames is None:
        raise ConfigError("text-to-video needs --frames N (or give --input to re-draw a video)")
    prompts = dict(options.prompt_at)
    with contextlib.ExitStack() as stack:
        group = stack.enter_context(_join(options, spec))
        mesh = device.meshes(1, options.stage_count)[0]
        reader, count, fps = None, frames, T2V_FPS
        if isinstance(input, Path):
            reader = stack.enter_context(media.VideoReader(input, cfg.height, cfg.width, frames))
            count, fps = reader.frame_count, reader.fps
        if count is not None:
            _note_unused_prompts(options, count)
        options.engine.note_untrained(spec.noise_scale, (spec.prompt, *prompts.values()))
        # Where another process has the finished frames, it writes them.
        writer = _writer(options, fps, cfg, group) if mesh.is_local(-1) else None
        session = device.open_session(
            options.engine, spec, mesh, count, group.meet,
            split=options.split, share_vae=options.share_vae,
        )  # fmt: skip
        with session:
            group.meet()
            drawn = session.run(
                reader,
                frames if reader is None else None,
                prompts=prompts,
                blend_chunks=options.blend,
                on_step=group.step,
            )
            device.write(drawn, writer, count)
    if writer:
        _note_short(options, writer.frames_written)
        if writer.frames_written != count:
            _note_unused_prompts(options, writer.frames_written)
    return 0


def _check(options: Options) -> None:
    """Raises ConfigError for what contradicts itself, and says what is ignored."""
    for name, file in (("input", options.input), ("output", options.output)):
        if isinstance(file, str):
            raise ConfigError(
                f"--{name} {masked(file)}: `svd2 run` works on files; use `svd2 live` for streams"
            )
    files.check_apart(
        [("--output", options.output)], [("--input", options.input), ("--config", options.stream.config)]
    )
    *unused, prompt = options.prompt
    if unused:
        say(
            f"note: a run has one prompt, and {len(options.prompt)} were given; the last is taken: {prompt!r}. "
            "--prompt-at FRAME=TEXT changes it at a frame"
        )
    if options.frames is not None and options.frames < 1:
        raise ConfigError(f"--frames must be at least 1, got {options.frames}")
    if options.blend < 0:
        raise ConfigError(f"--blend must be at least 0, got {options.blend}")
    if options.blend and not options.prompt_at:
        say(f"note: --blend {options.blend} is ignored: no --prompt-at changes the prompt")
    if options.input is None and options.engine.checkpoint == shipped.TINY:
        raise ConfigError(
            f"the model {shipped.TINY!r} re-draws videos and makes none from text; add --input VIDEO"
        )
    if options.split and len(options.split) != options.stage_count:
        raise ConfigError(
            f"--split has {len(options.split)} stages, --stages {options.stages}; leave one of them out"
        )


def _note_short(options: Options, written: int) -> None:
    """Says that an input has fewer frames than were asked for."""
    if options.frames is not None and written < options.frames:
        say(f"note: the input has {counted(written, 'frame')}, not the {options.frames} of --frames")


def _note_unused_prompts(options: Options, frames: int) -> None:
    """Says which changes of the prompt are past the end of a video."""
    for frame in sorted(dict(options.prompt_at)):
        if frame >= frames:
            say(f"note: --prompt-at {frame} is past the end (last frame {frames - 1}): ignored")


def _join(options: Options, spec: SessionSpec) -> Cluster:
    """Meets the other processes that run the same command, if there are any."""
    from tqdm import tqdm

    from svd2_jax.engine import cluster

    engine = options.engine
    manifest = shipped.checkpoint_folder(engine.checkpoint) / "manifest.json"
    settings = spec, options.prompt_at, options.blend, options.frames
    computed = engine.dtype, engine.weight_dtype, engine.attention
    same = {
        "a model": _digest(engine.checkpoint.encode(), manifest),
        "an input": _digest(b"", options.input),
        "prompts and settings": _digest(repr((settings, computed)).encode()),
        "--stages": str(options.stage_count),
        "--split": str(options.split),
        "--share-vae": str(options.share_vae),
    }
    say = functools.partial(tqdm.write, file=sys.stderr)  # beside a progress bar
    return cluster.join(options.coordinator, options.process_id, options.num_processes, same=same, say=say)


def _digest(start: bytes, file: Path | str | None = None) -> str:
    """Returns a short digest of bytes and of a file's size and two ends, where there is one."""
    digest = hashlib.sha256(start)
    if isinstance(file, Path) and file.is_file():
        size = file.stat().st_size
        digest.update(str(size).encode())
        with file.open("rb") as f:
            for offset in (0, max(0, size - _END_BYTES)):
                f.seek(offset)
                digest.update(f.read(_END_BYTES))
    return digest.hexdigest()[:12]


def _writer(options: Options, fps: float, cfg: StreamConfig, group: Cluster) -> media.VideoWriter:
    """Returns the writer of the output, which leaves nothing where a process is lost."""
    writer = media.VideoWriter(
        Path(options.output), fps if options.fps is None else options.fps, cfg.height, cfg.width
    )
    group.on_loss(writer.remove_part)
    group.on_loss(lambda: os.write(2, b"\n"))  # ends the line of the progress bar
    return writer
