"""The command line: `svd2 run | live | convert | verify | eval | bench | plan | simulate | demo`."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import logging
import math
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import yaml
from tqdm import tqdm

from svd2_jax import files, media, progress, shipped
from svd2_jax.api import DEFAULT_NOISE_SCALE, Engine, SessionSpec, check_prompt
from svd2_jax.config import PRESETS, STORAGES, ModelConfig, StreamConfig, preset
from svd2_jax.errors import ConfigError, EngineError, MediaError, OptionParser, exit_code
from svd2_jax.hardware import HARDWARE, Hardware, hardware
from svd2_jax.media.urls import masked, path_or_url
from svd2_jax.text import counted, held_in, measured_blocks
from svd2_jax.validate import read_values

if TYPE_CHECKING:
    from svd2_jax.engine.cluster import Cluster
    from svd2_jax.engine.engine import DeviceEngine, PipelineOptions
    from svd2_jax.engine.mesh import StageMesh
    from svd2_jax.engine.session import DeviceSession
    from svd2_jax.evaluate.run import Rebuild
    from svd2_jax.plan import Plan
    from svd2_jax.runtime.stream import Source

T = TypeVar("T")

EXIT_FAILED = 1
_END_BYTES = 1 << 20  # of each end of a file, to tell it from another
MOST_STAGES = 8  # that a plan compares
# Of a clip, from which on measuring the stages, some 120 frames' work, is little beside it.
MEASURED_FRAMES = 1000
T2V_FPS = 16.0  # the rate Wan2.1 was trained at
EIGHT_BITS = STORAGES[1:]
DEMO_PROMPTS = ("a neon city at night", "an oil painting", "a pencil sketch")
DEMO_HEIGHT = 384  # pixels of the demo's picture, about: small frames are enlarged

RUN_EXAMPLES = """\
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
LIVE_EXAMPLES = """\
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
VERIFY_EXAMPLES = """\
example:
  svd2 verify tests/goldens
  svd2 verify tests/goldens --dtype bfloat16 --json report.json
  svd2 verify tests/goldens --weight-dtype int8 --cache-dtype int8
  XLA_FLAGS=--xla_force_host_platform_device_count=4 svd2 verify tests/goldens --stages 4

Converts the weights found in the folder, runs every golden file there is through the same programs that
`svd2 run` uses, and prints one line each. Exit code 1 if any fails.
"""
PLAN_EXAMPLES = """\
examples:
  svd2 plan --preset wan-14b --stages 4
  svd2 plan --preset wan-1.3b --stages 4 --share-vae --weight-dtype int8 --quick
  svd2 plan --preset wan-14b --hardware rtx4090 --split 5,5,5,5,5,5,5,5
  svd2 plan --preset wan-1.3b --hardware rtx4090 --config configs/v2v_fast.yaml --json plan.json
  svd2 plan --preset wan-14b --task t2v --steps 4 --quick

Nothing is loaded and no accelerator is needed: memory and work follow from shapes, and the real programs are
compiled for as many virtual CPU devices as there are stages. Times are the least that the hardware's stated peaks
allow. `temp` is what programs need in passing, an upper bound: a GPU's fused attention needs less.

A plan fills up to 90 % of a device. JAX takes 75 % of a GPU's memory unless it is told otherwise: run with
XLA_CLIENT_MEM_FRACTION=0.9 where the plan says "of device" is above 75 %. Exit code 1 if a device is too small.
"""
DEMO_EXAMPLES = """\
examples:
  svd2 demo --out out
  svd2 demo --input in.mp4 --prompt "a watercolour painting" --prompt "thermal camera" --out out

Re-draws a short clip with the small model that comes with the package, with two changes of prompt on the way, and
writes demo.mp4, input beside output, and demo.png, a contact sheet.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code; bad input becomes one line on standard error."""
    parser = _parser()
    args = parser.parse_args(argv)
    return exit_code(lambda: args.command(args), "interrupted; nothing was written")


def entry_point() -> None:
    """The console command."""
    sys.exit(main())


def _parser() -> argparse.ArgumentParser:
    from convert import cli as convert_cli
    from svd2_jax.bench import cli as bench_cli
    from svd2_jax.evaluate import cli as evaluate_cli
    from svd2_jax.simulate import cli as simulate_cli

    parser = OptionParser(
        prog="svd2",
        description="Live video re-drawn to a text prompt.",
        epilog="`svd2 COMMAND --help` shows each command's options and examples.",
    )
    version = importlib.metadata.version("svd2-jax")
    parser.add_argument("--version", action="version", version=f"svd2-jax {version}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, function: Any, text: str, examples: str | None) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name,
            help=text,
            description=text,
            epilog=examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.set_defaults(command=function)
        return added

    _add_run(command("run", _run, "re-draw a video file to a prompt, or make one from text", RUN_EXAMPLES))
    _add_live(command("live", _live, "re-draw a camera, a stream or a file in real time", LIVE_EXAMPLES))
    convert_cli.add_arguments(
        command(
            "convert",
            convert_cli.run,
            "convert published PyTorch weights into a checkpoint folder",
            convert_cli.EXAMPLES,
        )
    )
    _add_verify(command("verify", _verify, "check the numbers against the reference's", VERIFY_EXAMPLES))
    _add_eval(
        command("eval", _eval, "measure the quality of the pictures on a folder of clips", None),
        evaluate_cli.add_arguments,
    )
    _add_bench(
        command("bench", _bench, "measure how long each part takes on this machine", bench_cli.EXAMPLES),
        bench_cli.add_arguments,
    )
    _add_plan(
        command("plan", _plan, "say what a pipeline needs and how fast it can be, without one", PLAN_EXAMPLES)
    )
    simulate_cli.add_arguments(
        command("simulate", simulate_cli.run, "try the scheduler on recorded loads, without a model", None)
    )
    _add_demo(command("demo", _demo, "see it work in a minute, nothing to download", DEMO_EXAMPLES))
    return parser


# --- svd2 run


def _add_run(parser: argparse.ArgumentParser) -> None:
    _add_checkpoint(parser)
    parser.add_argument(
        "--prompt",
        required=True,
        action="append",
        help="what the video should look like; --prompt-at changes it",
    )
    parser.add_argument(
        "--output", required=True, type=path_or_url, help="video file to write; replaced if it exists"
    )
    parser.add_argument("--input", type=path_or_url, help="video file to re-draw; without it: text-to-video")
    parser.add_argument(
        "--frames", type=int, help="frames to make (text-to-video), or to take from the input"
    )
    parser.add_argument(
        "--prompt-at", action="append", default=[], metavar="FRAME=TEXT",
        help="change the prompt with the chunk that holds this frame; may be given several times",
    )  # fmt: skip
    parser.add_argument(
        "--blend", type=int, default=0, metavar="CHUNKS", help="number of chunks over which a prompt changes"
    )
    _add_noise(parser)
    parser.add_argument("--fps", type=float, help="of the output (default: the input's, or 16)")

    shape = _add_shape(parser, "what is computed (defaults: published settings of the task)")
    shape.add_argument(
        "--mode", choices=("stream", "sequential"),
        help="stream: all steps at once on different chunks, highest throughput; sequential: one chunk at a "
        "time, lowest latency (default stream)",
    )  # fmt: skip
    _add_machine(parser)
    pipeline = parser.add_argument_group("several devices")
    pipeline.add_argument(
        "--stages", type=int, metavar="N",
        help="number of stages, one device each, that the transformer is cut into: N times as many chunks are in "
        "flight. `svd2 plan` says what to expect (default 1, or as many as --split has)",
    )  # fmt: skip
    pipeline.add_argument(
        "--split", metavar="N,N,...",
        help="blocks on each stage (default: by what each stage is measured to take before the video begins; where it "
        f"is shorter than {MEASURED_FRAMES} frames, blocks are weighed against encoding and decoding instead)",
    )  # fmt: skip
    _add_share_vae(pipeline)
    pipeline.add_argument(
        "--coordinator", metavar="HOST:PORT", help="where process 0 listens; the port must be free"
    )
    pipeline.add_argument(
        "--process-id", type=int, metavar="I", help="of this process, 0 to one below their number"
    )
    pipeline.add_argument(
        "--num-processes", type=int, metavar="N", help="number of processes that run this command together"
    )


def _add_share_vae(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--share-vae", action="store_true",
        help="let all stages' devices encode and decode together, each a part of the picture's rows; stages are then "
        "not measured (default: the first one encodes, the last one decodes)",
    )  # fmt: skip


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint", default=shipped.TINY, metavar="FOLDER",
        help=f"folder that `svd2 convert` wrote; {shipped.TINY}: the small model that comes with the package "
        f"(default); {shipped.RANDOM}PRESET: random weights ({', '.join(PRESETS)})",
    )  # fmt: skip


def _add_noise(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--noise-scale", type=float, default=DEFAULT_NOISE_SCALE, metavar="X",
        help="above 0, up to 1: the higher, the freer the re-drawing; lower stays closer to the input. The small model "
        f"was trained for {shipped.TINY_LEAST_NOISE:g} to 1 (default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--seed", type=int, default=0, help="the same seed gives the same video (default %(default)s)"
    )


def _add_shape(parser: argparse.ArgumentParser, title: str) -> argparse._ArgumentGroup:
    """Adds what `_stream_config` reads."""
    shape = parser.add_argument_group(title)
    shape.add_argument(
        "--config", type=Path, metavar="YAML", help="stream settings, e.g. configs/v2v_fast.yaml"
    )
    shape.add_argument("--steps", type=int, help="denoising steps, 1 to 4 (default 2, or --config's)")
    shape.add_argument(
        "--height", type=int, help="pixels, a multiple of 16 (default: what the model was trained at)"
    )
    shape.add_argument("--width", type=int, help="the same")
    shape.add_argument(
        "--decoder", choices=("wan", "taehv"), help="taehv is smaller and faster (default wan, or --config's)"
    )
    shape.add_argument("--cache-frames", type=int, metavar="N", help="latent frames remembered")
    shape.add_argument(
        "--cache-dtype", choices=EIGHT_BITS,
        help="hold the cache in 8 bits: half its memory (default: what is computed in)",
    )  # fmt: skip
    shape.add_argument("--sink-frames", type=int, metavar="N", help="of these, kept as anchors")
    shape.add_argument("--sink-threshold", type=float, metavar="X",
                       help="similarity below which an anchor is replaced; -1: never")  # fmt: skip
    return shape


def _add_machine(parser: argparse.ArgumentParser) -> None:
    machine = parser.add_argument_group("where and how it runs")
    machine.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="to compute in (default: the checkpoint's; float32 for a small one on a CPU and for random weights)",
    )
    _add_weight_dtype(machine)
    machine.add_argument(
        "--attention", choices=("auto", "xla", "blocked", "cudnn"), default="auto",
        help="auto: the fused kernel where there is one (default %(default)s)",
    )  # fmt: skip
    machine.add_argument(
        "--text-encoder", choices=("host", "device", "disk"), default="host",
        help="where it lives: host memory (default), the accelerator, or read anew for every prompt",
    )  # fmt: skip
    machine.add_argument(
        "-v", "--verbose", action="store_true",
        help="say what is loaded, and how large it is on each device",
    )  # fmt: skip


def _add_weight_dtype(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--weight-dtype", choices=EIGHT_BITS,
        help="hold the transformer's linear layers in 8 bits: half their memory (default: what is computed in)",
    )  # fmt: skip


def _unknown_style(checkpoint: str, prompt: str) -> str | None:
    """Returns a note that no word of a prompt names a style of the shipped model; None for other models."""
    if checkpoint != shipped.TINY or shipped.named_styles(prompt):
        return None
    styles = [name.replace("_", " ") for name in shipped.styles() if name != shipped.UNCHANGED]
    return (
        f"note: the model {shipped.TINY!r} knows {len(styles)} styles, none is named in {prompt!r}: "
        + ", ".join(styles)
    )


def _note_untrained(args: argparse.Namespace, prompts: Iterable[str]) -> None:
    """Says what of a noise scale and of prompts the shipped model was not trained for."""
    if args.checkpoint == shipped.TINY and args.noise_scale < shipped.TINY_LEAST_NOISE:
        _say(
            f"note: the model {shipped.TINY!r} was trained for a noise scale of {shipped.TINY_LEAST_NOISE:g} to 1, "
            f"not for {args.noise_scale:g}"
        )
    for prompt in dict.fromkeys(prompts):
        if note := _unknown_style(args.checkpoint, prompt):
            _say(note)


def _run(args: argparse.Namespace) -> int:
    for name in ("input", "output"):
        if isinstance(url := getattr(args, name), str):
            raise ConfigError(
                f"--{name} {masked(url)}: `svd2 run` works on files; use `svd2 live` for streams"
            )
    files.check_apart([("--output", args.output)], _inputs(args))
    *unused, prompt = args.prompt
    if unused:
        _say(
            f"note: a run has one prompt, and {len(args.prompt)} were given; the last is taken: {prompt!r}. "
            "--prompt-at FRAME=TEXT changes it at a frame"
        )
    cfg = _stream_config(args)
    spec = SessionSpec(prompt, cfg, args.noise_scale, args.seed)
    prompts = dict(_parse_prompt_at(text) for text in args.prompt_at)
    if args.frames is not None and args.frames < 1:
        raise ConfigError(f"--frames must be at least 1, got {args.frames}")
    if args.blend < 0:
        raise ConfigError(f"--blend must be at least 0, got {args.blend}")
    if args.blend and not prompts:
        _say(f"note: --blend {args.blend} is ignored: no --prompt-at changes the prompt")
    if cfg.task == "t2v" and args.frames is None:
        raise ConfigError("text-to-video needs --frames N (or give --input to re-draw a video)")
    options = _pipeline_options(args)
    with _join(args, spec, prompts) as group:
        _prepare_devices()
        mesh = _mesh(args)
        if cfg.task == "t2v":
            _note_untrained(args, (prompt, *prompts.values()))
            writer = _writer(args, T2V_FPS, cfg, mesh, group)
            with _open(args, spec, mesh, options, args.frames, group.meet) as session:
                group.meet()
                frames = session.run(
                    count=args.frames, prompts=prompts, blend_chunks=args.blend, on_step=group.step
                )
                _write(frames, writer, args.frames)
        else:
            with media.VideoReader(args.input, cfg.height, cfg.width, args.frames) as reader:
                _note_untrained(args, (prompt, *prompts.values()))
                writer = _writer(args, reader.fps, cfg, mesh, group)
                with _open(args, spec, mesh, options, reader.frame_count, group.meet) as session:
                    group.meet()
                    frames = session.run(reader, prompts=prompts, blend_chunks=args.blend, on_step=group.step)
                    _write(frames, writer, reader.frame_count)
    if writer and args.frames is not None and writer.frames_written < args.frames:
        _say(
            f"note: the input has {counted(writer.frames_written, 'frame')}, not the {args.frames} of --frames"
        )
    for frame in sorted(prompts):
        if writer and frame >= writer.frames_written:
            _say(
                f"note: --prompt-at {frame} is past the end (last frame {writer.frames_written - 1}): ignored"
            )
    return 0


def _inputs(args: argparse.Namespace) -> list[tuple[str, Path | str | None]]:
    """Returns the files that a command reads, each with its option."""
    return [("--input", args.input), ("--config", args.config)]


def _join(args: argparse.Namespace, spec: SessionSpec, prompts: Mapping[int, str]) -> Cluster:
    """Meets the other processes that run the same command, if there are any."""
    from svd2_jax.engine import cluster

    manifest = shipped.checkpoint_folder(args.checkpoint) / "manifest.json"
    settings = (
        spec,
        sorted(prompts.items()),
        args.blend,
        args.frames,
        args.dtype,
        args.weight_dtype,
        args.attention,
    )
    same = {
        "a model": _digest(args.checkpoint.encode(), manifest),
        "an input": _digest(b"", args.input),
        "prompts and settings": _digest(repr(settings).encode()),
        "--stages": str(_stages(args)),
        "--split": str(args.split),
        "--share-vae": str(args.share_vae),
    }
    say = functools.partial(tqdm.write, file=sys.stderr)  # beside a progress bar
    return cluster.join(args.coordinator, args.process_id, args.num_processes, same=same, say=say)


def _digest(start: bytes, file: Path | None = None) -> str:
    """Returns a short digest of bytes and of a file's size and two ends, where there is one."""
    digest = hashlib.sha256(start)
    if file is not None and file.is_file():
        size = file.stat().st_size
        digest.update(str(size).encode())
        with file.open("rb") as f:
            for offset in (0, max(0, size - _END_BYTES)):
                f.seek(offset)
                digest.update(f.read(_END_BYTES))
    return digest.hexdigest()[:12]


def _stages(args: argparse.Namespace) -> int:
    """Returns the number of stages: as asked for, or as the split has them."""
    if args.stages is not None:
        return args.stages
    return len(_parse_split(args.split) or (0,))


def _mesh(args: argparse.Namespace) -> StageMesh:
    from svd2_jax.engine.mesh import stage_meshes

    return stage_meshes(1, _stages(args))[0]


def _pipeline_options(args: argparse.Namespace) -> PipelineOptions:
    from svd2_jax.engine.engine import PipelineOptions

    split = _parse_split(args.split)
    if split is not None and len(split) != _stages(args):
        raise ConfigError(
            f"--split {args.split} has {len(split)} stages, --stages {args.stages}; leave one of them out"
        )
    return PipelineOptions(args.attention, split, share_vae=args.share_vae)


def _parse_split(text: str | None) -> tuple[int, ...] | None:
    if not text:
        return None
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise ConfigError(f"--split takes blocks per stage, for example 8,12,12,8; got {text!r}")
    return tuple(int(count) for count in text.split(","))


def _writer(
    args: argparse.Namespace, fps: float, cfg: StreamConfig, mesh: StageMesh, group: Cluster
) -> media.VideoWriter | None:
    """Returns the writer of the output; None where another process has the finished frames."""
    if not mesh.is_local(-1):
        return None
    writer = media.VideoWriter(args.output, _fps(args, fps), cfg.height, cfg.width)
    group.on_loss(writer.remove_part)
    group.on_loss(lambda: os.write(2, b"\n"))  # ends the line of the progress bar
    return writer


def _fps(args: argparse.Namespace, default: float) -> float:
    return default if args.fps is None else args.fps


def _stream_config(args: argparse.Namespace) -> StreamConfig:
    """Returns the stream configuration: the task's published one, then --config, then single options."""
    settings: dict[str, Any] = _read_yaml(args.config) if args.config else {}
    task = "v2v" if args.input else "t2v"
    # A file holds differences from StreamConfig's defaults, so one that names no task is for video-to-video.
    if args.config and (of_file := settings.pop("task", StreamConfig().task)) != task:
        hint = "" if args.input else "; add --input VIDEO, or `task: t2v` to the file"
        raise ConfigError(f"{args.config}: has settings for the task {of_file!r}, expected {task!r}{hint}")
    for name in (
        "height", "width", "mode", "decoder", "cache_frames", "cache_dtype", "sink_frames", "sink_threshold",
    ):  # fmt: skip
        value = getattr(args, name)
        if value is not None:
            settings[name] = value
    if args.steps is not None:
        settings.pop("timesteps", None)
    if task == "t2v" and getattr(args, "checkpoint", None) == shipped.TINY:
        raise ConfigError(
            f"the model {shipped.TINY!r} re-draws videos and makes none from text; add --input VIDEO"
        )
    if not {"height", "width"} <= settings.keys():
        height, width = _model(args).picture
        settings = {"height": height, "width": width, **settings}
    return StreamConfig.for_task(task, 2 if args.steps is None else args.steps, **settings)


def _model(args: argparse.Namespace) -> ModelConfig:
    """Returns the model that the options name: its sizes, and what its weights are held in."""
    if "preset" in args:
        model = preset(args.preset)
    elif (name := shipped.random_preset(args.checkpoint)) is not None:
        model = preset(name)
    else:
        from svd2_jax.engine.checkpoint import Checkpoint

        model = Checkpoint.open(shipped.checkpoint_folder(args.checkpoint)).manifest.model
    return model.with_blocks(getattr(args, "blocks", None)).with_weight_dtype(args.weight_dtype)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as e:
        raise ConfigError(f"{path}: cannot be read ({e.strerror})") from e
    except (UnicodeDecodeError, yaml.YAMLError) as e:
        mark = getattr(e, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}: is not YAML{where}; expected lines of `name: value`") from e
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected lines of `name: value`, got {type(values).__name__}")
    try:
        read_values(StreamConfig, values)
    except ConfigError as e:
        raise ConfigError(f"{path}: {e}") from e
    return values


def _parse_prompt_at(text: str) -> tuple[int, str]:
    frame, separator, prompt = text.partition("=")
    if not separator or not frame.strip().isdecimal() or not prompt.strip():
        raise ConfigError(f"--prompt-at takes FRAME=TEXT, for example 120=heavy rain; got {text!r}")
    return int(frame), prompt


def _open(
    args: argparse.Namespace,
    spec: SessionSpec,
    mesh: StageMesh,
    options: PipelineOptions,
    frame_count: int | None,
    meet: Callable[[], object] = lambda: None,
) -> DeviceSession:
    """Loads the model, compiles its programs and opens the session; measures the stages first for a long video."""
    started = time.monotonic()
    engine = _engine(args, mesh, options)
    cfg, stages = spec.config, len(mesh.devices)
    _say(
        f"opening {cfg.width}x{cfg.height}, {counted(cfg.steps, 'step')}, {cfg.mode}"
        + (f", {stages} stages" if stages > 1 else "")
        + "; programs are compiled the first time only"
    )
    with progress.shown("getting ready", _say):
        is_long = frame_count is None or frame_count >= MEASURED_FRAMES
        if is_long and (split := _device_errors(engine.measure_split, spec, meet)):
            _say(measured_blocks(split))
        session = _device_errors(engine.open, spec)
    if args.verbose:
        _say(engine.describe(spec.config))
    _say(f"ready after {time.monotonic() - started:.1f} s")
    return session


def _prepare_devices(keep: bool = True) -> None:
    from svd2_jax.engine.engine import prepare_devices  # late: JAX takes a second to load

    prepare_devices(keep)


def _engine(args: argparse.Namespace, mesh: StageMesh, options: PipelineOptions) -> DeviceEngine:
    from svd2_jax.engine.engine import DeviceEngine

    if args.verbose:
        logging.basicConfig(format="%(message)s")
        logging.getLogger("svd2_jax").setLevel(logging.INFO)
    if shipped.random_preset(args.checkpoint) is not None:
        model = _model(args)
        _say(f"random weights in the sizes of {model.name}: the pictures will mean nothing")
        return DeviceEngine.random(model, dtype=args.dtype or "float32", mesh=mesh, options=options)
    _say(f"loading {args.checkpoint}")
    folder, blocks = shipped.checkpoint_folder(args.checkpoint), getattr(args, "blocks", None)
    return DeviceEngine.from_checkpoint(
        folder, args.dtype, args.text_encoder, mesh, options, blocks, args.weight_dtype
    )


def _write(frames: Iterable[np.ndarray], writer: media.VideoWriter | None, total: int | None) -> None:
    """Writes finished frames with a progress bar, then says what was written."""
    if writer is None:
        for _ in _guarded(frames):
            pass
        print("done; the process with the last stage has written the output")
        return
    started, count = time.monotonic(), 0
    with writer, tqdm(total=total, unit="frame", desc="re-drawing", dynamic_ncols=True) as bar:
        for chunk in _guarded(frames):
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


def _guarded(items: Iterable[T]) -> Iterator[T]:
    """Yields the items of something that makes them on the device."""
    iterator = iter(items)
    while (item := _device_errors(next, iterator, None)) is not None:
        yield item


def _device_errors(function: Any, *args: Any) -> Any:
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


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# --- svd2 live


def _add_live(parser: argparse.ArgumentParser) -> None:
    _add_checkpoint(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--input",
        type=path_or_url,
        metavar="VIDEO",
        help="video file to play at its real rate, or URL of a stream",
    )
    source.add_argument(
        "--camera", metavar="[KIND:]DEVICE", help="such as /dev/video0, or avfoundation:0 with FFmpeg's kind"
    )
    parser.add_argument(
        "--prompt", required=True, action="append",
        help="what the video should look like; given several times (at most as often as there are --streams), one for "
        "each stream in turn. To change it while it runs, type another",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=path_or_url, metavar="VIDEO",
        help="video file to write, with several streams one for each; or URL to send the stream to. Without it no "
        "frame is kept",
    )  # fmt: skip
    parser.add_argument(
        "--streams", type=int, default=1, metavar="N", help="number of streams (default %(default)s)"
    )
    parser.add_argument("--loop", action="store_true", help="play the file over and over")
    parser.add_argument("--seconds", type=float, metavar="S", help="stop after S seconds")
    parser.add_argument(
        "--fps",
        type=float,
        help="frames per second to play the file at, to ask the camera for or to expect of the URL (default: its own)",
    )
    parser.add_argument(
        "--blend", type=int, default=4, metavar="CHUNKS",
        help="chunks over which a typed prompt comes in (default %(default)s)",
    )  # fmt: skip
    _add_noise(parser)
    report = parser.add_argument_group("what it tells besides the table")
    report.add_argument(
        "--metrics", type=Path, metavar="JSONL", help="what became of each frame, line by line"
    )
    report.add_argument(
        "--chart",
        type=Path,
        metavar="PNG",
        help="chart of the latency over time against the latency budget",
    )
    pace = parser.add_argument_group("deadlines")
    pace.add_argument(
        "--budget", type=float, metavar="MS",
        help="latency budget: longest time from a frame's arrival until it is shown (default: what all steps need at "
        "this rate, and a quarter more)",
    )  # fmt: skip
    pace.add_argument(
        "--min-steps", type=int, default=1, metavar="N",
        help="minimum steps: lowest number of denoising steps under overload (default %(default)s)",
    )  # fmt: skip
    _add_shape(parser, "what is computed (defaults: published settings)")
    _add_machine(parser)
    parser.add_argument(
        "--stages", type=int, default=1, metavar="N",
        help="number of devices that the transformer is cut over (default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--replicas", type=int, default=1, metavar="N",
        help="number of copies of the model, each on devices of its own; a stream runs on one of them, where there is "
        "room (default %(default)s)",
    )  # fmt: skip
    _add_share_vae(parser)
    parser.set_defaults(mode=None, split=None)


def _live(args: argparse.Namespace) -> int:
    from svd2_jax.cli import live
    from svd2_jax.media import sources
    from svd2_jax.runtime import heap

    heap.share()  # before JAX, which starts threads
    for name, least in (("streams", 1), ("replicas", 1), ("blend", 0)):
        if getattr(args, name) < least:
            raise ConfigError(f"--{name} must be at least {least}, got {getattr(args, name)}")
    if args.seconds is not None and not args.seconds > 0:
        raise ConfigError(f"--seconds must be above 0, got {args.seconds:g}")
    if len(args.prompt) > args.streams:
        count = len(args.prompt)
        raise ConfigError(
            f"{count} prompts for {counted(args.streams, 'stream')}: --streams {count} gives each stream "
            "its own prompt; to change the prompt while it runs, give the first one and type the others"
        )
    if args.loop and args.camera:
        raise ConfigError("--loop is for a file; a camera never ends")
    if args.camera and args.streams > 1:
        raise ConfigError("a camera can be opened once; use --streams 1, or play a file")
    for name in ("input", "output"):
        if isinstance(url := getattr(args, name), str) and args.streams > 1:
            raise ConfigError(f"--{name} {masked(url)}: a URL is for one stream; use --streams 1, or a file")
    if args.loop and isinstance(args.input, str):
        raise ConfigError(f"--loop is for a file; {masked(args.input)} is a stream and is not started over")
    for path in filter(None, (args.metrics, args.chart)):
        files.check_target(path)
    outputs = [("--output", path) for path in live.output_files(args.output, args.streams)]
    files.check_apart([*outputs, ("--metrics", args.metrics), ("--chart", args.chart)], _inputs(args))
    cfg = _stream_config(argparse.Namespace(**{**vars(args), "input": True}))
    if cfg.mode != "stream":
        raise ConfigError(
            f"{args.config}: mode {cfg.mode!r} is for files; live streams take what they need of it by themselves "
            "when the budget is tight, so use --budget instead"
        )
    specs = tuple(
        SessionSpec(args.prompt[i % len(args.prompt)], cfg, args.noise_scale, args.seed + i)
        for i in range(args.streams)
    )
    # Opened once before all that takes long, so that what cannot be read is known at once.
    if isinstance(args.input, str):
        with sources.UrlSource(args.input, cfg.height, cfg.width) as received:  # stays connected
            return _live_from(args, specs, _fps(args, received.fps), lambda i, stop: received.watch(stop))
    with (
        sources.open_camera(args.camera, cfg.height, cfg.width, args.fps)
        if args.camera
        else media.VideoReader(args.input, cfg.height, cfg.width)
    ) as reader:
        rate_hz = _fps(args, reader.fps)

    def source(i: int, stop: threading.Event) -> Source:
        if args.camera:
            return sources.watch_camera(args.camera, cfg.height, cfg.width, stop, args.fps)
        return sources.play_file(args.input, cfg.height, cfg.width, rate_hz, args.loop, stop)

    return _live_from(args, specs, rate_hz, source)


def _live_from(
    args: argparse.Namespace,
    specs: tuple[SessionSpec, ...],
    rate_hz: float,
    source: Callable[[int, threading.Event], Source],
) -> int:
    """Runs live streams whose input has been opened once: it is there, and its rate is known."""
    from svd2_jax.cli import live
    from svd2_jax.runtime.scheduler import PolicyConfig
    from svd2_jax.runtime.types import StreamSettings

    cfg = specs[0].config
    if not 0 < rate_hz < math.inf:
        raise ConfigError(f"--fps must be above 0, got {rate_hz:g}")
    settings = StreamSettings(
        rate_hz=rate_hz,
        budget_ms=live.default_budget_ms(specs[0], rate_hz, args.stages)
        if args.budget is None
        else args.budget,
        steps=cfg.steps,
        min_steps=args.min_steps,
        stages=args.stages,
    )

    remark = functools.partial(_unknown_style, args.checkpoint)
    describe = (lambda engine: engine.describe(cfg)) if args.verbose else None
    plan = live.LiveRun(
        specs,
        settings,
        source,
        args.output,
        args.metrics,
        args.chart,
        args.seconds,
        args.blend,
        remark,
        describe,
    )
    plan.check()
    _note_untrained(args, args.prompt)
    if args.output is None:
        _say("no --output: frames are shown nowhere and not kept; the table says how fast they come")
    _prepare_devices()
    from svd2_jax.engine.engine import PipelineOptions
    from svd2_jax.engine.mesh import stage_meshes

    on_one = -(-args.streams // args.replicas)
    sizes = tuple(2**n for n in range(on_one.bit_length()))
    options = PipelineOptions(args.attention, batch_sizes=sizes, share_vae=args.share_vae)
    first, *others = stage_meshes(args.replicas, args.stages)
    engine = _engine(args, first, options)
    engines = [engine, *(engine.replica(mesh) for mesh in others)]
    ended_well = _device_errors(live.run, engines, plan, PolicyConfig(), _say)
    return 0 if ended_well else EXIT_FAILED


# --- svd2 verify


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="golden folder, laid out like tests/goldens")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32",
        help="bfloat16 checks with looser, stated tolerances (default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--stages", type=int, default=1, metavar="N",
        help="number of devices of the pipeline that the streams run on (default %(default)s)",
    )  # fmt: skip
    _add_weight_dtype(parser)
    parser.add_argument(
        "--cache-dtype",
        choices=EIGHT_BITS,
        help="hold the cache in 8 bits; both with tolerances of their own",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there as well")


def _verify(args: argparse.Namespace) -> int:
    if args.json:
        files.check_target(args.json)
    outcomes = []
    computed_in = args.dtype + held_in(args.weight_dtype or "compute", args.cache_dtype or "compute")
    with progress.shown("verifying", (lambda _: None) if sys.stderr.isatty() else _say):
        with progress.working("loading JAX"):
            from svd2_jax import verify
            from svd2_jax.engine.mesh import stage_meshes

            _prepare_devices()
        stage_meshes(1, args.stages)
        verify.golden_files(args.folder)  # an error at once
        for outcome in _guarded(
            verify.verify(args.folder, args.dtype, args.stages, args.weight_dtype, args.cache_dtype)
        ):
            outcomes.append(outcome)
            print(outcome.line(), flush=True)
    if args.json:
        files.write_json(args.json, verify.report(outcomes, computed_in))
    failed = [o.name for o in outcomes if not o.passed]
    written = f"; report in {args.json}" if args.json else ""
    print(f"{len(outcomes) - len(failed)} of {len(outcomes)} goldens pass in {computed_in}{written}")
    return EXIT_FAILED if failed else 0


# --- svd2 eval


def _add_eval(
    parser: argparse.ArgumentParser, add_arguments: Callable[[argparse.ArgumentParser], None]
) -> None:
    _add_checkpoint(parser)
    add_arguments(parser)
    _add_noise(parser)
    _add_shape(parser, "what is computed (defaults: published settings)")
    _add_machine(parser)
    parser.set_defaults(mode=None, input=True)  # video to video


def _eval(args: argparse.Namespace) -> int:
    from svd2_jax.evaluate import cli as evaluate_cli

    def open_model() -> tuple[Engine, Rebuild]:
        _prepare_devices()
        from svd2_jax.engine.autoencode import rebuild
        from svd2_jax.engine.engine import PipelineOptions
        from svd2_jax.engine.mesh import stage_meshes

        engine = _engine(args, stage_meshes(1, 1)[0], PipelineOptions(args.attention))
        return engine, functools.partial(rebuild, engine, cfg)

    cfg = _stream_config(args)
    _note_untrained(args, args.prompt)
    return _device_errors(evaluate_cli.run, args, cfg, open_model)


# --- svd2 bench


def _add_bench(
    parser: argparse.ArgumentParser, add_arguments: Callable[[argparse.ArgumentParser], None]
) -> None:
    _add_checkpoint(parser)
    add_arguments(parser)
    shape = _add_shape(parser, "what is computed (defaults: published settings)")
    shape.add_argument("--mode", choices=("stream", "sequential"), help="(default stream, or --config's)")
    _add_machine(parser)
    parser.set_defaults(input=True)  # video to video


@dataclasses.dataclass(frozen=True)
class _BenchModel:
    """See `bench.cli.Model`."""

    args: argparse.Namespace

    def load(self, converted: Path | None = None) -> DeviceEngine:
        _prepare_devices(keep=self.args.restart)
        from svd2_jax.engine.engine import PipelineOptions
        from svd2_jax.engine.mesh import stage_meshes

        options = dict(vars(self.args))
        if converted is not None:  # with as many blocks as were asked for
            options.update(checkpoint=str(converted), blocks=None)
        args = argparse.Namespace(**options)
        return _engine(args, stage_meshes(1, 1)[0], PipelineOptions(args.attention))

    def random_sizes(self) -> ModelConfig:
        if shipped.random_preset(self.args.checkpoint) is None:
            raise ConfigError(
                f"--against reference takes random weights: --checkpoint {shipped.RANDOM}PRESET"
            )
        return _model(self.args)


def _bench(args: argparse.Namespace) -> int:
    from svd2_jax.bench import cli as bench_cli

    return _device_errors(bench_cli.run, args, _stream_config(args), _BenchModel(args), _say)


# --- svd2 plan


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", default="wan-14b", metavar="NAME",
                        help=f"model: {', '.join(PRESETS)} (default %(default)s)")  # fmt: skip
    shape = _add_shape(parser, "what is computed (defaults: published settings of the task)")
    shape.add_argument("--task", choices=("v2v", "t2v"), help="(default v2v, or --config's)")
    shape.add_argument("--mode", choices=("stream", "sequential"), help="(default stream, or --config's)")
    shape.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16",
                       help="to compute in (default %(default)s)")  # fmt: skip
    _add_weight_dtype(shape)
    machine = parser.add_argument_group("where it is to run")
    machine.add_argument("--hardware", default="h100", metavar="NAME",
                         help=f"each device: {', '.join(HARDWARE)} (default %(default)s)")  # fmt: skip
    machine.add_argument(
        "--stages", type=int, metavar="N", help="devices of the pipeline (default: as many as recommended)"
    )
    machine.add_argument("--split", metavar="N,N,...", help="blocks on each stage (default: the best)")
    _add_share_vae(machine)
    parser.add_argument(
        "--quick", action="store_true", help="compile nothing, and so leave out what programs need in passing"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there as well")


def _plan(args: argparse.Namespace) -> int:
    model, device, split = _model(args), hardware(args.hardware), _parse_split(args.split)
    if args.json:
        files.check_target(args.json)
        files.check_apart([("--json", args.json)], [("--config", args.config)])
    cfg = _planned_stream(args)
    with progress.shown("working out the plan", _say):
        plan = _worked_out(args, model, cfg, device, split)
    if args.json:
        files.write_json(args.json, plan.to_dict())
    from svd2_jax import plan as plan_lib

    print(plan_lib.report(plan))
    return EXIT_FAILED if plan_lib.too_full(plan) else 0


def _worked_out(
    args: argparse.Namespace,
    model: ModelConfig,
    cfg: StreamConfig,
    device: Hardware,
    split: tuple[int, ...] | None,
) -> Plan:
    stages = len(split) if split and args.stages is None else args.stages
    with progress.working("loading JAX"):
        devices = _virtual_devices(stages)
        from svd2_jax import plan as plan_lib
    from svd2_jax.engine.memory import Temporaries, compiled_temporaries
    from svd2_jax.engine.mesh import stage_meshes
    from svd2_jax.engine.policy import checked_dtype

    def temporaries(split: tuple[int, ...]) -> Temporaries:
        mesh, dtype = stage_meshes(1, len(split), devices)[0], checked_dtype(args.dtype)
        return compiled_temporaries(
            model, cfg, dtype, split, mesh, lambda what: _say(f"compiling {what}"), args.share_vae
        )

    def planned(stages: int, quick: bool) -> plan_lib.Plan:
        find = None if quick else temporaries
        with progress.working("counting memory and arithmetic"):
            return plan_lib.plan(model, cfg, stages, device, args.dtype, split, find, args.share_vae)

    if stages is None:
        plan, stages = None, planned(1, quick=True).recommended or 1
        while plan is None or (plan.recommended or 0) > stages:
            stages = (
                stages if plan is None else plan.recommended or 1
            )  # compiled, it may turn out to need more
            plan = planned(stages, args.quick)
    else:
        plan = planned(stages, args.quick)
    return plan


def _planned_stream(args: argparse.Namespace) -> StreamConfig:
    """Returns the stream configuration; the task is --task's, else --config's, else video to video."""
    of_file = _read_yaml(args.config).get("task", StreamConfig().task) if args.config else None
    if args.task and of_file and args.task != of_file:
        raise ConfigError(f"{args.config}: has settings for the task {of_file!r}, not for --task {args.task}")
    task = args.task or of_file or StreamConfig().task
    return _stream_config(argparse.Namespace(**vars(args), input=task == "v2v"))


def _virtual_devices(stages: int | None) -> list[Any]:
    """Returns CPU devices that programs can be compiled for, one for each stage."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    # Too late in a program that has used JAX before; then its devices have to do.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", max(stages or 1, MOST_STAGES))
    return jax.devices("cpu")


# --- svd2 demo


def _add_demo(parser: argparse.ArgumentParser) -> None:
    _add_checkpoint(parser)
    parser.add_argument(
        "--input", type=Path, default=shipped.DEMO_CLIP, help="video to re-draw (default: a cat)"
    )
    parser.add_argument(
        "--prompt", action="append", metavar="TEXT",
        help="what it should look like; given several times, the clip is cut into as many equal parts, one prompt each "
        "(default: " + ", ".join(DEMO_PROMPTS) + ")",
    )  # fmt: skip
    parser.add_argument("--frames", type=int, help="of the clip (default: all)")
    parser.add_argument(
        "--out", type=Path, default=Path("out"), help="folder for the results (default %(default)s)"
    )
    _add_noise(parser)
    _add_shape(parser, "what is computed (defaults: published settings)")
    _add_machine(parser)
    parser.set_defaults(mode=None, stages=1, split=None, share_vae=False)


def _demo(args: argparse.Namespace) -> int:
    if args.frames is not None and args.frames < 1:
        raise ConfigError(f"--frames must be at least 1, got {args.frames}")
    video, sheet = args.out / "demo.mp4", args.out / "demo.png"
    files.check_apart([("--out", video), ("--out", sheet)], _inputs(args))
    cfg, texts = _stream_config(args), args.prompt or DEMO_PROMPTS
    for text in texts:
        check_prompt(text)
    _note_untrained(args, texts)
    with media.VideoReader(args.input, cfg.height, cfg.width, args.frames) as reader:
        clip, fps = list(reader), reader.fps
    if len(clip) < len(texts):
        raise ConfigError(
            f"{len(texts)} prompts cannot share {counted(len(clip), 'frame')}; give fewer prompts or more frames"
        )
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise MediaError(f"{args.out}: cannot be made ({os.strerror(e.errno or 0)})") from e
    prompts = {round(i * len(clip) / len(texts)): text for i, text in enumerate(texts)}
    scale = max(1, round(DEMO_HEIGHT / cfg.height))
    height = cfg.height * scale + media.CAPTION_HEIGHT
    writer = media.VideoWriter(video, fps, height, 2 * cfg.width * scale)
    shown: list[np.ndarray] = []

    def beside_input(chunks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        for chunk in chunks:
            pairs = []
            for frame in chunk:
                prompt = prompts[max(at for at in prompts if at <= len(shown))]
                pairs.append(media.side_by_side(clip[len(shown)], frame, prompt, scale))
                shown.append(frame)
            yield np.stack(pairs)

    changes = {frame: prompt for frame, prompt in prompts.items() if frame}
    spec = SessionSpec(prompts[0], cfg, args.noise_scale, args.seed)
    _prepare_devices()
    with _open(args, spec, _mesh(args), _pipeline_options(args), len(clip)) as session:
        _write(beside_input(session.run(clip, prompts=changes)), writer, len(clip))
    media.contact_sheet(sheet, clip, shown, prompts)
    print(f"{sheet}: input above output, prompts as captions")
    return 0
