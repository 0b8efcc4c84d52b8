"""Options as frozen dataclasses: a field is an option, with the field's name, type and default.

Here is how that works, and the groups of options that several commands share.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, Self, Union, get_args, get_origin

from svd2_jax import files, shipped
from svd2_jax.api import DEFAULT_NOISE_SCALE, SessionSpec
from svd2_jax.config import PRESETS, ModelConfig, StreamConfig, preset
from svd2_jax.errors import ConfigError
from svd2_jax.validate import field_types, read_values

_METAVARS = {int: "N", float: "X", Path: "FILE"}
EightBits = Literal["int8", "fp8"]
DType = Literal["float32", "bfloat16"]
WEIGHT_DTYPE = (
    "hold the transformer's linear layers in 8 bits: half their memory (default: what is computed in)"
)
SHARE_VAE = (
    "let all stages' devices encode and decode together, each a part of the picture's rows; stages are then not "
    "measured (default: the first one encodes, the last one decodes)"
)


def option(help: str, default: Any = None, **settings: Any) -> Any:
    """Returns a field that is an option; where it is not given, a tuple is () and all else the default.

    Settings are `names`, where they do not follow from the field's; `group`, its title in `--help`; `one_of=True`, for
    options of which exactly one has to be given; and what else `ArgumentParser.add_argument` takes.
    """
    return dataclasses.field(default=default, metadata={"help": help, **settings})


class OptionGroup:
    """Base of frozen dataclasses whose fields are options, or such groups themselves."""

    title: ClassVar[str | None] = None
    """Of the options in `--help` that name no group."""

    @classmethod
    def add_to(cls, parser: argparse.ArgumentParser) -> None:
        """Adds the options to a parser."""
        one_of = None
        for field, kind in cls._fields():
            if isinstance(kind, type) and issubclass(kind, OptionGroup):
                kind.add_to(parser)
                continue
            settings = {"group": cls.title, "default": field.default, **_settings(kind), **field.metadata}
            names = settings.pop("names", [f"--{field.name.replace('_', '-')}"])
            target = _titled(parser, settings.pop("group"))
            if settings.pop("one_of", False):
                target = one_of = one_of or parser.add_mutually_exclusive_group(required=True)
            target.add_argument(*names, **settings)

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> Self:
        """Returns the options that were parsed."""
        values = {}
        for field, kind in cls._fields():
            if isinstance(kind, type) and issubclass(kind, OptionGroup):
                values[field.name] = kind.from_args(args)
            else:
                value = getattr(args, field.name)
                values[field.name] = tuple(value or ()) if get_origin(kind) is tuple else value
        return cls(**values)

    @classmethod
    def _fields(cls) -> list[tuple[dataclasses.Field[Any], Any]]:
        kinds = field_types(cls)
        return [(f, kinds[f.name]) for f in dataclasses.fields(cls)]  # pyright: ignore[reportArgumentType]


def _titled(parser: argparse.ArgumentParser, title: str | None) -> argparse._ActionsContainer:
    """Returns the parser's group of this title, made where it is not there."""
    if title is None:
        return parser
    return next((g for g in parser._action_groups if g.title == title), None) or parser.add_argument_group(
        title
    )


def _settings(kind: Any) -> dict[str, Any]:
    """Returns what `add_argument` takes for a field of this type; an option of a tuple may be given several times."""
    if get_origin(kind) is tuple:
        return {**_settings(get_args(kind)[0]), "action": "append", "default": None}
    if get_origin(kind) in (Union, UnionType):
        kind = next(member for member in get_args(kind) if member is not NoneType)
    if kind is bool:
        return {"action": "store_true"}
    if get_origin(kind) is Literal:
        return {"choices": get_args(kind)}
    return {"type": kind, "metavar": _METAVARS.get(kind)}


def say(text: str) -> None:
    """Tells the user something beside a command's results."""
    print(text, file=sys.stderr, flush=True)


def check_reports(
    json: Path | None, chart: Path | None = None, reads: Iterable[tuple[str, Path | None]] = ()
) -> None:
    """Raises MediaError for reports that could not be written, or would replace what is read or one another."""
    if json:
        files.check_target(json)
    if chart:
        files.check_chart(chart)
    files.check_apart([("--json", json), ("--chart", chart)], reads)


def blocks_per_stage(text: str) -> tuple[int, ...]:
    """Returns the blocks on each stage that `--split` gives."""
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise ConfigError(f"--split takes blocks per stage, for example 8,12,12,8; got {text!r}")
    return tuple(int(count) for count in text.split(","))


@dataclass(frozen=True, kw_only=True)
class EngineOptions(OptionGroup):
    """Which model it is, and how it runs."""

    title = "where and how it runs"

    checkpoint: str = option(
        f"folder that `svd2 convert` wrote; {shipped.TINY}: the small model that comes with the package (default); "
        f"{shipped.RANDOM}PRESET: random weights ({', '.join(PRESETS)})",
        shipped.TINY,
        metavar="FOLDER",
        group=None,
    )
    dtype: DType | None = option(
        "to compute in (default: the checkpoint's; float32 for a small one on a CPU and for random weights)"
    )
    weight_dtype: EightBits | None = option(WEIGHT_DTYPE)
    attention: Literal["auto", "xla", "blocked", "cudnn"] = option(
        "auto: the fused kernel where there is one (default %(default)s)", "auto"
    )
    text_encoder: Literal["host", "device", "disk"] = option(
        "where it lives: host memory (default), the accelerator, or read anew for every prompt", "host"
    )
    verbose: bool = option(
        "say what is loaded, and how large it is on each device", False, names=("-v", "--verbose")
    )

    def sizes(self) -> ModelConfig:
        """Returns the model's sizes."""
        if (name := shipped.random_preset(self.checkpoint)) is not None:
            return preset(name)
        from svd2_jax.engine.checkpoint import Checkpoint

        return Checkpoint.open(shipped.checkpoint_folder(self.checkpoint)).manifest.model

    def unknown_style(self, prompt: str) -> str | None:
        """Returns a note that no word of a prompt names a style of the shipped model; None for other models."""
        if self.checkpoint != shipped.TINY or shipped.named_styles(prompt):
            return None
        styles = [name.replace("_", " ") for name in shipped.styles() if name != shipped.UNCHANGED]
        known = f"note: the model {shipped.TINY!r} knows {len(styles)} styles"
        return f"{known}, none is named in {prompt!r}: {', '.join(styles)}"

    def note_untrained(self, noise_scale: float, prompts: Iterable[str]) -> None:
        """Says what of a noise scale and of prompts the shipped model was not trained for."""
        if self.checkpoint == shipped.TINY and noise_scale < shipped.TINY_LEAST_NOISE:
            say(
                f"note: the model {shipped.TINY!r} was trained for a noise scale of {shipped.TINY_LEAST_NOISE:g} to "
                f"1, not for {noise_scale:g}"
            )
        for prompt in dict.fromkeys(prompts):
            if note := self.unknown_style(prompt):
                say(note)


@dataclass(frozen=True, kw_only=True)
class NoiseOptions(OptionGroup):
    """How freely it re-draws."""

    noise_scale: float = option(
        "above 0, up to 1: the higher, the freer the re-drawing; lower stays closer to the input. The small model "
        f"was trained for {shipped.TINY_LEAST_NOISE:g} to 1 (default %(default)s)",
        DEFAULT_NOISE_SCALE,
    )
    seed: int = option("the same seed gives the same video (default %(default)s)", 0)

    def spec(self, prompt: str, cfg: StreamConfig) -> SessionSpec:
        """Returns the session of a prompt."""
        return SessionSpec(prompt, cfg, self.noise_scale, self.seed)


@dataclass(frozen=True, kw_only=True)
class StreamOptions(OptionGroup):
    """What is computed."""

    title = "what is computed (defaults: published settings of the task)"

    config: Path | None = option("stream settings, e.g. configs/v2v_fast.yaml", metavar="YAML")
    steps: int | None = option("denoising steps, 1 to 4 (default 2, or --config's)")
    height: int | None = option("pixels, a multiple of 16 (default: what the model was trained at)")
    width: int | None = option("the same")
    decoder: Literal["wan", "taehv"] | None = option(
        "taehv is smaller and faster (default wan, or --config's)"
    )
    cache_frames: int | None = option("latent frames remembered")
    cache_dtype: EightBits | None = option(
        "hold the cache in 8 bits: half its memory (default: what is computed in)"
    )
    sink_frames: int | None = option("of these, kept as anchors")
    sink_threshold: float | None = option("similarity below which an anchor is replaced; -1: never")

    def stream(self, sizes: Callable[[], ModelConfig], task: str = "v2v") -> StreamConfig:
        """Returns the stream configuration: the task's published one, then --config, then single options.

        `sizes` finds the model's, and is called only where nothing else says how large the picture is.
        """
        settings = self.of_file()
        # A file holds differences from StreamConfig's defaults, so one that names no task is for video-to-video.
        of_file = settings.pop("task", StreamConfig().task)
        if self.config and of_file != task:
            hint = "; add --input VIDEO, or `task: t2v` to the file" if task == "t2v" else ""
            raise ConfigError(
                f"{self.config}: has settings for the task {of_file!r}, expected {task!r}{hint}"
            )
        for name in (
            "height", "width", "mode", "decoder", "cache_frames", "cache_dtype", "sink_frames", "sink_threshold",
        ):  # fmt: skip
            if (value := getattr(self, name, None)) is not None:
                settings[name] = value
        if self.steps is not None:
            settings.pop("timesteps", None)
        if not {"height", "width"} <= settings.keys():
            height, width = sizes().picture
            settings = {"height": height, "width": width, **settings}
        return StreamConfig.for_task(task, 2 if self.steps is None else self.steps, **settings)

    def of_file(self) -> dict[str, Any]:
        """Returns the settings in --config's file; empty without one."""
        if self.config is None:
            return {}
        import yaml

        try:
            values = yaml.safe_load(self.config.read_text())
        except OSError as e:
            raise ConfigError(f"{self.config}: cannot be read ({e.strerror})") from e
        except (UnicodeDecodeError, yaml.YAMLError) as e:
            mark = getattr(e, "problem_mark", None)
            where = f" at line {mark.line + 1}" if mark else ""
            raise ConfigError(f"{self.config}: is not YAML{where}; expected lines of `name: value`") from e
        if not isinstance(values, dict):
            raise ConfigError(f"{self.config}: expected lines of `name: value`, got {type(values).__name__}")
        try:
            return read_values(StreamConfig, values)
        except ConfigError as e:
            raise ConfigError(f"{self.config}: {e}") from e


@dataclass(frozen=True, kw_only=True)
class ClipStreamOptions(StreamOptions):
    """What is computed of a clip, which need not be there in real time."""

    mode: Literal["stream", "sequential"] | None = option(
        "stream: all steps at once on different chunks, highest throughput; sequential: one chunk at a time, lowest "
        "latency (default stream, or --config's)"
    )
