"""`svd2 bench`: measure how long each part takes on this machine.

examples:
  svd2 bench --checkpoint random:wan-1.3b --dtype bfloat16 --json bench.json --chart bench.png
  svd2 bench --checkpoint ckpt --height 512 --width 512 --steps 4 --part tick --part stream

  svd2 bench --checkpoint random:golden --part tick --trace profile

  # four blocks of the 1.3B model: its real width on a machine with little memory
  svd2 bench --checkpoint random:wan-1.3b --blocks 4 --height 240 --width 416 --repeats 5

  # the PyTorch implementation on the same weights, inputs and threads, in turn with ours
  bash scripts/reference_venv.sh reference
  svd2 bench --checkpoint random:golden --height 96 --width 160 --against reference --reference reference

parts: text (a prompt), encode (frames of a chunk to latents), tick (the transformer, all rows), decode-wan,
decode-taehv, stream (a chunk through a session, end to end), dispatch (a tick of the same structure with next to no
arithmetic), first-frame (from the start of the process). Every part runs the programs that a session runs.

`of ceiling` is the least time that this device allows, by a large matrix product and a large copy measured in the
same run, as a share of the time taken. Arithmetic and memory traffic are counted from the programs' traces
(matrix products and convolutions, each operand once); the JSON also has the compiler's own counts.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from svd2_jax import files, progress, shipped
from svd2_jax.cli import device
from svd2_jax.cli.options import ClipStreamOptions, EngineOptions, OptionGroup, check_reports, option, say
from svd2_jax.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from svd2_jax.bench.benchmarks import Bench
    from svd2_jax.bench.reference import ReferenceProcess
    from svd2_jax.bench.report import Measured, Report
    from svd2_jax.config import ModelConfig, StreamConfig
    from svd2_jax.engine.engine import DeviceEngine

Part = Literal["text", "encode", "tick", "decode-wan", "decode-taehv", "stream", "dispatch"]
FirstFrame = Literal["first-frame"]


@dataclass(frozen=True, kw_only=True)
class Options(OptionGroup):
    """What `svd2 bench` takes."""

    engine: EngineOptions
    part: tuple[Literal[Part, FirstFrame], ...] = option(
        "measure only this part; may be given several times (default: all)"
    )
    repeats: int = option("samples of each part, behind a warm-up (default %(default)s)", 10)
    blocks: int | None = option("take only the transformer's first N blocks (default: all)")
    restart: bool = option(
        "use compiled programs that an earlier run kept, as other commands do (default: start cold)", False
    )
    against: Literal["reference"] | None = option(
        "also run the PyTorch implementation on the same random weights, inputs and threads, in turn with ours"
    )
    reference: Path | None = option(
        "its virtual environment, made by scripts/reference_venv.sh", metavar="FOLDER"
    )
    json: Path | None = option("write all numbers there, each sample included")
    chart: Path | None = option("draw there where the time goes", metavar="FILE.png")
    trace: Path | None = option(
        "also profile a few runs of each part: its costliest kernels are listed; the profiler's files stay there",
        metavar="FOLDER",
    )
    stream: ClipStreamOptions

    def sizes(self) -> ModelConfig:
        """Returns the sizes of the model that is measured."""
        return self.engine.sizes().with_blocks(self.blocks).with_weight_dtype(self.engine.weight_dtype)


def run(options: Options) -> int:
    """Measures and prints a report."""
    cfg = options.stream.stream(options.sizes)
    _check(options)
    from svd2_jax.bench.report import text

    report = device.device_errors(_measure, options, cfg)
    print(text(report))
    if options.json:
        files.write_json(options.json, report.to_dict(), allow_nan=False)
    if options.chart:
        from svd2_jax.bench.chart import draw

        draw(options.chart, report)
    return 0


def _check(options: Options) -> None:
    """Raises an error for what contradicts itself and for files that cannot be written."""
    check_reports(options.json, options.chart, [("--config", options.stream.config)])
    if options.trace:
        try:
            options.trace.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise ConfigError(f"{options.trace}: cannot be made a folder for profiles ({e.strerror})") from e
    if (options.against is None) != (options.reference is None):
        raise ConfigError("--against reference needs --reference FOLDER, and the other way round")
    if options.repeats < 1:
        raise ConfigError(f"--repeats must be at least 1, got {options.repeats}")


def _measure(options: Options, cfg: StreamConfig) -> Report:
    from svd2_jax.bench.benchmarks import first_frame
    from svd2_jax.bench.reference import ReferenceProcess

    loaded, reference = options, None
    with ExitStack() as stack:
        if options.reference is not None:
            if shipped.random_preset(options.engine.checkpoint) is None:
                raise ConfigError(
                    f"--against reference takes random weights: --checkpoint {shipped.RANDOM}PRESET"
                )
            reference = stack.enter_context(ReferenceProcess(options.reference))
            say("the reference makes random weights")
            converted = reference.make_checkpoint(options.sizes(), options.engine.dtype or "float32")
            engine = dataclasses.replace(options.engine, checkpoint=str(converted))
            loaded = dataclasses.replace(options, engine=engine, blocks=None)  # as many as were asked for
        with progress.shown("getting ready", say):
            bench, phases = first_frame(functools.partial(_load, loaded), cfg, say)
        return _report(options, bench, phases, reference)


def _load(options: Options) -> DeviceEngine:
    (mesh,) = device.meshes(keep=options.restart)
    return device.load_engine(options.engine, mesh, options.blocks)


def _report(
    options: Options,
    bench: Bench,
    phases: dict[str, float],
    reference: ReferenceProcess | None = None,
) -> Report:
    from tqdm import tqdm

    from svd2_jax.bench.ceiling import measured
    from svd2_jax.bench.report import Report
    from svd2_jax.bench.run import cpu_threads, measure, settings

    engine = bench.engine
    home = engine.mesh.home
    against = None
    if reference is not None:
        say("the reference loads them")
        against = f"reference, {reference.load(bench, cpu_threads())}"
    say("measuring the ceiling")
    ceiling = measured(home, engine.dtype)
    parts: list[Measured] = []
    for name in get_args(Part):
        if options.part and name not in options.part:
            continue
        with ExitStack() as line:
            line.enter_context(progress.shown(f"getting {name} ready", say))

            def started(rounds: int, name: str = name, line: ExitStack = line) -> Callable[[], object]:
                line.close()
                bar = tqdm(desc=name, total=rounds, unit="run", dynamic_ncols=True)
                return line.enter_context(bar).update

            try:
                parts.append(measure(bench, name, options.repeats, started, reference, options.trace))
            except CheckpointError as e:
                if options.part:
                    raise
                say(f"note: {name} is left out: {e}")
    ceiling = measured(home, engine.dtype, ceiling)
    wanted = not options.part or get_args(FirstFrame)[0] in options.part
    where = settings(bench, options.engine.checkpoint, options.engine.attention, against)
    return Report(where, ceiling, tuple(parts), phases if wanted else {})
