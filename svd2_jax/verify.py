"""Runs the reference's golden outputs through our programs: the proof that the numbers are the reference's.

A golden folder holds weights in the layouts that users download, and recorded inputs and outputs; see
`tests/goldens/README.md`. Sizes and settings are read from the files.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import re
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from svd2_jax.api import SessionSpec
from svd2_jax.config import Storage, StreamConfig, TAEHVConfig
from svd2_jax.diffusion import flow_match, noise_control
from svd2_jax.engine import balance
from svd2_jax.engine.engine import DeviceEngine
from svd2_jax.engine.mesh import stage_meshes
from svd2_jax.engine.noise import RecordedNoise
from svd2_jax.engine.pipeline import Pipeline, PipelineInput
from svd2_jax.engine.policy import checked_dtype, matmul_precision
from svd2_jax.errors import ConfigError, Svd2Error
from svd2_jax.models import taehv, vae
from svd2_jax.nn import kv_cache
from svd2_jax.nn.quantised import dequantise
from svd2_jax.progress import working
from svd2_jax.rows import Rows

Arrays = Mapping[str, np.ndarray]

TOLERANCES = {
    # float32: the goldens' own; others: measured on tests/goldens, about twice the error seen there. What is held in
    # 8 bits adds its own.
    "flow_match": {"float32": 1e-6, "bfloat16": 1e-6},
    "noise_controller": {"float32": 1e-6, "bfloat16": 1e-6},
    "block_balance": {"float32": 1e-9, "bfloat16": 1e-9},
    "umt5": {"float32": 5e-5, "bfloat16": 0.25},
    "vae": {"float32": 5e-5, "bfloat16": 0.1},
    "taehv": {"float32": 5e-5, "bfloat16": 0.1},
    "latent stream": {
        "float32": 5e-5, "bfloat16": 0.1,
        "weights int8": 0.1, "weights fp8": 0.4, "cache int8": 0.045, "cache fp8": 0.3,
    },
    "end to end": {
        "float32": 5e-4, "bfloat16": 0.1,
        "weights int8": 0.03, "weights fp8": 0.14, "cache int8": 0.003, "cache fp8": 0.012,
    },
}  # fmt: skip


# What a damaged, cut or incomplete golden file raises; TypeError: an array of a shape that was not compiled.
_UNREADABLE = (
    Svd2Error,
    OSError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    zipfile.BadZipFile,
    zlib.error,
)


@dataclass(frozen=True)
class GoldenResult:
    """Result of one golden file.

    Attributes:
      name: the file's name.
      error: largest deviation found.
      relative_error: root mean square of all deviations, as a share of that of the recorded numbers.
      tolerance: largest deviation allowed.
      problems: deviations that have no size (a wrong token, a wrong ring order, an unreadable file).
      seconds: time taken, compilation included.
    """

    name: str
    error: float
    tolerance: float
    problems: tuple[str, ...] = ()
    seconds: float = 0.0
    relative_error: float = 0.0

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance and not self.problems

    def line(self) -> str:
        """Returns the outcome as one line of a report."""
        verdict = "pass" if self.passed else "FAIL"
        problems = "".join(f"; {p}" for p in self.problems)
        return (
            f"{verdict}  {self.name:34s} max error {self.error:.2e}  tolerance {self.tolerance:.0e}{problems}"
        )


@dataclass
class _Check:
    """Collects what one golden file shows of streams whose cache is held in `cache_dtype`."""

    cache_dtype: Storage = "compute"
    error: float = 0.0
    problems: list[str] = dataclasses.field(default_factory=list)
    _squares: float = 0.0
    _wanted_squares: float = 0.0

    @property
    def relative_error(self) -> float:
        return (self._squares / self._wanted_squares) ** 0.5 if self._wanted_squares else 0.0

    def close(self, got: Any, wanted: Any, what: str, relative: bool = False) -> None:
        """Notes the largest difference; a wrong shape or a NaN is a problem."""
        got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
        if got.shape != wanted.shape:
            self.problems.append(f"{what}: expected shape {wanted.shape}, got {got.shape}")
            return
        difference = np.abs(got - wanted) / (np.abs(wanted) if relative else 1.0)
        if not np.isfinite(difference).all():  # on either side; a comparison with NaN would pass
            self.problems.append(f"{what}: not finite")
        self.error = max(self.error, float(difference.max(initial=0.0)))
        self._squares += float(np.square(got - wanted).sum())
        self._wanted_squares += float(np.square(wanted).sum())

    def equal(self, got: Any, wanted: Any, what: str) -> None:
        """Notes a problem unless both are equal."""
        if not np.array_equal(np.asarray(got), np.asarray(wanted)):
            self.problems.append(f"{what} differs")


@dataclass(frozen=True)
class _RecordedPrompt:
    """Stands in for the text encoder where a golden file holds the embedding."""

    embedding: np.ndarray

    def encode(self, prompt: str) -> np.ndarray:
        return self.embedding


def verify(
    folder: Path,
    dtype: str = "float32",
    stages: int = 1,
    weight_dtype: Storage | None = None,
    cache_dtype: Storage | None = None,
) -> Iterator[GoldenResult]:
    """Converts the weights in a golden folder and yields the outcome of every golden file in it.

    Args:
      folder: laid out like `tests/goldens/`.
      dtype: "float32", or "bfloat16" with looser tolerances.
      stages: of the pipeline that the streams run on.
      weight_dtype: "int8" or "fp8" for what the transformer's linear layers are held in, also with looser tolerances.
      cache_dtype: the same for the streams' caches.

    Raises:
      ConfigError: the folder is missing or holds no golden file; fewer devices or blocks than stages.
      ConversionError: its weights cannot be converted.
    """
    precision = matmul_precision(checked_dtype(dtype))
    files, (mesh,) = golden_files(folder), stage_meshes(1, stages)
    with tempfile.TemporaryDirectory() as scratch, jax.default_matmul_precision(precision):
        with working("converting the weights"):
            checkpoint = _convert(folder, Path(scratch), dtype)
        engine = DeviceEngine.from_checkpoint(checkpoint, dtype, mesh=mesh, weight_dtype=weight_dtype)
        for file in files:
            with working(f"computing {file.name}"):
                outcome = _run(engine, file, cache_dtype or "compute")
            yield outcome


def golden_files(folder: Path) -> list[Path]:
    """Returns the golden files of a folder, sorted; raises ConfigError where there is none."""
    if not folder.is_dir():
        raise ConfigError(f"{folder}: expected a folder of golden files; there is none")
    files = [f for f in sorted(folder.iterdir()) if f.suffix == ".npz" or f.name == "block_balance.json"]
    if not files:
        raise ConfigError(f"{folder}: expected golden files (*.npz), found none")
    return files


def _convert(folder: Path, scratch: Path, dtype: str) -> Path:
    from convert import convert_checkpoint  # the converter is a consumer of this package, not a part of it

    generators = sorted(folder.glob("*/model.pt"))
    wan = sorted(p.parent for p in folder.glob("wan_models/*/config.json"))
    if not wan:
        raise ConfigError(f"{folder}: expected a Wan folder wan_models/*/config.json")
    out = scratch / "checkpoint"
    return convert_checkpoint(
        out=out, generator=generators[0] if generators else None, wan=wan[0], dtype=dtype, progress=False
    )


def _run(engine: DeviceEngine, file: Path, cache_dtype: Storage) -> GoldenResult:
    started, check = time.monotonic(), _Check(cache_dtype)
    kind, function = _kind(file)
    try:
        function(engine, check, file)
    except _UNREADABLE as e:
        check.problems.append(f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else 'no message'}")
    reasons = (engine.dtype.name, f"weights {engine.model.dit.weight_dtype}", f"cache {cache_dtype}")
    tolerance = sum(TOLERANCES.get(kind, {}).get(reason, 0.0) for reason in reasons)
    seconds = time.monotonic() - started
    return GoldenResult(
        file.stem, check.error, tolerance, tuple(check.problems), seconds, check.relative_error
    )


def _kind(file: Path) -> tuple[str, Callable[[DeviceEngine, _Check, Path], None]]:
    for pattern, kind, function in _KINDS:
        if re.fullmatch(pattern, file.stem):
            return kind, function
    return "unknown", _unknown


def _unknown(engine: DeviceEngine, check: _Check, file: Path) -> None:
    raise ConfigError(f"unknown kind of golden file; known are {', '.join(k for _, k, _ in _KINDS)}")


def _load(file: Path) -> dict[str, np.ndarray]:
    with open(file, "rb") as f, np.load(f) as arrays:  # numpy leaves a damaged file open
        return {name: arrays[name] for name in arrays.files}


def _latents_last(x: np.ndarray) -> np.ndarray:
    """Latents [..., F, C, h, w] -> [..., F, h, w, C]."""
    return np.moveaxis(x, -3, -1)


def _video_last(x: np.ndarray) -> np.ndarray:
    """Video or latents [B, C, T, H, W] -> [B, T, H, W, C]."""
    return np.moveaxis(x, 1, -1)


def _check_flow_match(engine: DeviceEngine, check: _Check, file: Path) -> None:
    g = _load(file)
    sigmas, timesteps = flow_match.schedule()
    check.close(sigmas, g["sigmas"], "sigmas", relative=True)
    check.close(timesteps, g["timesteps"], "timesteps", relative=True)
    t = jnp.asarray(g["t"], jnp.int32)

    def rows(name: str) -> jax.Array:
        return jnp.asarray(_latents_last(g[name]))[:, None]

    check.close(flow_match.add_noise(rows("clean"), rows("noise"), t), rows("noisy"), "noisy")
    check.close(flow_match.clean_prediction(rows("clean"), rows("flow"), t), rows("x0"), "x0")


def _check_noise_controller(engine: DeviceEngine, check: _Check, file: Path) -> None:
    g = _load(file)
    still = g["frames"].copy()
    still[int(g["still_from"]) :] = still[int(g["still_from"])]
    _follow_noise(check, g["frames"], g, "", "step")
    _follow_noise(check, still, g, "still_", "still_step")


def _follow_noise(check: _Check, frames: np.ndarray, g: Arrays, prefix: str, steps: str) -> None:
    pixels = noise_control.pixels_from_uint8(jnp.asarray(frames))
    count = int(g[f"{prefix}chunk_frames"])
    initial = current = jnp.float32(g[f"{prefix}initial"])
    scales, first_steps = [], []
    for end in g[f"{prefix}end_idx"]:
        level = noise_control.motion(pixels[end - count - 1], pixels[end - count : end])
        current = noise_control.next_noise_scale(level, initial, current, StreamConfig().motion_range)
        scales.append(float(current))
        first_steps.append(int(noise_control.first_timestep(current)))
    check.close(scales, g[f"{prefix}noise_scale"], f"{prefix}noise scale", relative=True)
    check.equal(first_steps, g[steps], f"{prefix}first timestep")


def _check_block_balance(engine: DeviceEngine, check: _Check, file: Path) -> None:
    for case in json.loads(file.read_text()):
        blocks = case["total_blocks"]
        costs = [sum(case["dit_times"]) / blocks] * blocks
        overheads = [t - d for t, d in zip(case["rank_times"], case["dit_times"], strict=True)]
        ours = balance.bottleneck(balance.best_split(costs, overheads), costs, overheads)
        theirs = balance.bottleneck([b - a for a, b in case["balanced"]], costs, overheads)
        check.error = max(check.error, ours - theirs)  # a better split is welcome


def _check_umt5(engine: DeviceEngine, check: _Check, file: Path) -> None:
    g = _load(file)
    prompts = json.loads((file.parent / "prompts.json").read_text())
    ids, mask = engine.prompts.tokenize(prompts)
    check.equal(ids, g["ids"], "token ids")
    check.equal(mask, g["mask"], "token mask")
    for i, prompt in enumerate(prompts):
        check.close(engine.prompts.encode(prompt), g["embeds"][i : i + 1], f"embedding {i}")


def _numbered(g: Arrays, prefix: str) -> list[np.ndarray]:
    """Returns prefix0, prefix1, ... in order."""
    names = (f"{prefix}{i}" for i in range(len(g)))
    return [g[name] for name in names if name in g]


def _check_vae(engine: DeviceEngine, check: _Check, file: Path) -> None:
    g, cfg = _load(file), engine.model.vae
    params = engine.params(StreamConfig())
    pixels = noise_control.pixels_from_uint8(jnp.asarray(g["frames"])).astype(params.dit.dtype)[None]
    state, at = None, 0
    for i, wanted in enumerate(_numbered(g, "encode_stream_")):
        frames = 1 + 4 * (wanted.shape[2] - 1) if state is None else 4 * wanted.shape[2]
        group, at = pixels[:, at : at + frames], at + frames
        if state is None:
            got, state = jax.jit(functools.partial(vae.encode_first, cfg))(params.encoder, group)
        else:
            got, state = jax.jit(functools.partial(vae.encode, cfg))(params.encoder, state, group)
        check.close(got, _video_last(wanted), f"encode_stream_{i}")
    got = jax.jit(functools.partial(vae.encode_offline, cfg))(params.encoder, pixels)
    check.close(got, _video_last(g["encode_full_normalised"]), "encode_full_normalised")

    groups = [jnp.asarray(_video_last(z), params.dit.dtype) for z in _numbered(g, "latents_")]
    video = [_video_last(v) for v in _numbered(g, "decode_stream_")]
    first, later = functools.partial(vae.decode_first, cfg), functools.partial(vae.decode, cfg)
    _check_decode(check, first, later, params.decoder, groups, video)
    got = jax.jit(functools.partial(vae.decode_offline, cfg))(params.decoder, jnp.concatenate(groups, axis=1))
    check.close(got, _video_last(g["decode_full"]), "decode_full")


def _check_decode(
    check: _Check,
    first: Callable,
    later: Callable,
    params: Any,
    groups: list[jax.Array],
    wanted: list[np.ndarray],
) -> None:
    state: Any = None
    for i, (group, video) in enumerate(zip(groups, wanted, strict=True)):
        if state is None:
            got, state = jax.jit(first)(params, group)
            got = got[:, got.shape[1] - video.shape[1] :]  # TAEHV: the reference drops the very first frame
        else:
            got, state = jax.jit(later)(params, state, group)
        check.close(got, video, f"decode_stream_{i}")


def _check_taehv(engine: DeviceEngine, check: _Check, file: Path) -> None:
    g, cfg = _load(file), TAEHVConfig()
    dtype = checked_dtype(str(engine.params(StreamConfig()).dit.dtype))
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), _taehv_by_rule(cfg, int(g["weight_seed"])))
    groups = [jnp.asarray(_latents_last(z), dtype) for z in _numbered(g, "latents_")]
    video = [_latents_last(v) for v in _numbered(g, "decode_stream_")]
    first, later = functools.partial(taehv.decode_first, cfg), functools.partial(taehv.decode, cfg)
    _check_decode(check, first, later, params, groups, video)
    got = jax.jit(functools.partial(taehv.decode_offline, cfg))(params, jnp.concatenate(groups, axis=1))
    check.close(got, _latents_last(g["decode_full_unit_range_untrimmed"]), "decode_full")


def _taehv_by_rule(cfg: TAEHVConfig, seed: int) -> Any:
    """Makes the weights the golden file stands for: a rule over the source's names and shapes, our table."""
    from convert import taehv as table

    tree = taehv.abstract_params(cfg)
    for rule in table.rules(cfg):
        *path, leaf = rule.target.split("/")
        parent = functools.reduce(lambda node, key: node[key], path, tree)
        name = re.sub(r"\\(.)", r"\1", rule.source)  # the table's names are escaped for matching
        parent[leaf] = rule.transform(_by_rule(name, _torch_shape(parent[leaf].shape), seed))
    return tree["taehv"]


def _by_rule(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    fan_in = 100 if name.endswith("bias") else int(np.prod(shape[1:]))
    rng = np.random.default_rng(zlib.crc32(name.encode()) + seed)
    return rng.standard_normal(shape).astype(np.float32) / np.float32(np.sqrt(fan_in))


def _torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape [out, in, h, w] (or [out]) of a 2-D convolution whose kernel has this shape here."""
    if len(shape) == 1:
        return shape
    *window, channels_in, channels_out = shape
    return (channels_out, channels_in, *(window or (1, 1)))


def _stream_config(g: Arrays, **settings: Any) -> StreamConfig:
    """Returns the stream configuration that a golden file was made with."""
    return StreamConfig(
        timesteps=tuple(int(t) for t in g["steps"]),
        cache_frames=int(g["cache_frames"]),
        sink_frames=int(g["sink_frames"]),
        sink_threshold=float(g["adapt_sink_threshold"]),
        **settings,
    )


def _mode(file: Path) -> str:
    return "sequential" if "sequential" in file.stem else "stream"


def _check_latent_stream(engine: DeviceEngine, check: _Check, file: Path) -> None:
    g = _load(file)
    first = _latents_last(g["first_latents"])[0]
    block = int(g["frames_per_block"])
    cfg = _stream_config(
        g,
        height=first.shape[1] * 8,
        width=first.shape[2] * 8,
        task="v2v" if first.shape[0] == block + 1 else "t2v",
        mode=_mode(file),
        frames_per_block=block,
        rope_refresh=int(g["refresh"]),
        cache_dtype=check.cache_dtype,
    )
    dtype, block_count = engine.params(cfg).dit.dtype, len(g["latents"])
    pipeline = engine.pipeline(cfg, jnp.asarray(g["context"], dtype))
    timesteps = [jnp.int32(t) for t in g["step0"]]
    inputs = [_latents_last(x) for x in g["latents"]]
    renoise = np.zeros((block_count, 0))
    if cfg.steps > 1:
        renoise = _latents_last(g["stream_noise"]).reshape(block_count, -1, *inputs[0].shape)
    # Latents that are noisy already take the place of their draws.
    draws = [first, *(_latents_last(n) for n in _numbered(g, "prepare_noise_"))]
    draws += [x for i in range(block_count) for x in (inputs[i], *renoise[i][: cfg.steps - 1])]
    source = RecordedNoise(cfg, draws)

    seen = _Seen(engine.split(cfg), kv_cache.frame_tokens(engine.model.dit, cfg))
    # In sequential mode one row takes a chunk through all its steps, all stages in one tick.
    held = Rows[int](cfg.rows, pipeline.stages if cfg.mode == "stream" else 1)
    clean = pipeline.mesh.part(pipeline.first_group(*source.first()), -1)
    check.close(clean, _latents_last(g["first_output"])[0], "first_output")
    seen.note(pipeline, None)
    outputs = [_latents_last(x) for x in g["outputs"]]
    for tick in range(1, block_count + pipeline.depth):
        fresh = tick <= block_count
        if fresh:
            start = pipeline.mesh.part(pipeline.state.start, 0)[0]
            check.equal(start, g["start_frame"][tick - 1], f"tick {tick}: start frame")
        timestep = timesteps[tick - 1] if fresh and g["step0"][tick - 1] >= 0 else pipeline.first_timestep
        noisy, again = source.chunk(pipeline.entering(fresh))
        pipeline.tick(PipelineInput(noisy, timestep, again, fresh))
        clean = pipeline.mesh.part(pipeline.came_back, -1)
        held = held.enter(tick if fresh else None)
        seen.note(pipeline, held)
        for row in range(cfg.rows):
            back = held.at(row, held.stages - 1)
            if back is None:
                continue
            at = back.chunk + row  # the tick in which one stage takes this step of the chunk
            if at > block_count:
                continue
            got = clean[row]
            if row < cfg.rows - 1:  # one stage leaves the chunk re-noised to its next step
                got = flow_match.add_noise(
                    got[None],
                    jnp.asarray(renoise[at - 1][row])[None],
                    jnp.int32(cfg.timesteps[row + 1])[None],
                )[0]
            check.close(got, outputs[at - 1][row], f"tick {at}, row {row}: output")
        held, _ = held.leave()

    rings_file = file.with_suffix("").with_suffix(".ring.json")
    layers, rows = range(engine.model.dit.num_layers), range(cfg.rows)
    exact = dtype == jnp.float32 and engine.model.dit.weight_dtype == cfg.cache_dtype == "compute"
    tipped = set()
    if rings_file.exists():
        ours = [
            [[seen.rings[layer, row, max(0, tick - row)] for row in rows] for layer in layers]
            for tick in range(1, block_count + 1)
        ]
        theirs = json.loads(rings_file.read_text())
        if exact:
            check.equal(json.dumps(ours), json.dumps(theirs), "order of the ring")
        else:  # rounding may tip an adaptive sink, and the cache then holds other chunks
            ticks = list(zip(ours, theirs, strict=True))
            tipped = {(i, r) for i in layers for r in rows if any(a[i][r] != b[i][r] for a, b in ticks)}
    for layer, row in itertools.product(layers, rows):
        if (layer, row) in tipped:
            continue
        k, v = seen.caches[layer, row, max(0, block_count - row)]
        check.close(k, g["last_k"][layer][row], f"layer {layer}, row {row}: keys")
        check.close(v, g["last_v"][layer][row], f"layer {layer}, row {row}: values")


class _Seen:
    """What each layer's cache held in each row when it had seen so many chunks.

    In a pipeline rows and stages come to a chunk in different ticks; in the recorded run row r came to it r ticks
    after row 0.
    """

    def __init__(self, split: Sequence[int], tokens: int):
        self._split, self._tokens = split, tokens
        self._last: dict[tuple[int, int], int] = {}  # the chunk that each row of each stage has seen
        self.rings: dict[tuple[int, int, int], list[int]] = {}
        self.caches: dict[tuple[int, int, int], tuple[np.ndarray, np.ndarray]] = {}

    def note(self, pipeline: Pipeline, rows: Rows[int] | None) -> None:
        """Keeps what is in the caches after a tick; None: after the first group, chunk 0, which every row has seen.

        A row that holds no chunk has to leave its caches as they are.
        """
        for stage, row in itertools.product(range(pipeline.stages), range(pipeline.cfg.rows)):
            found = None if rows is None else rows.at(row, stage if rows.stages > 1 else 0)
            chunk = found.chunk if found else self._last.get((stage, row), 0)
            self._last[stage, row] = chunk
            layers = pipeline.mesh.part(pipeline.state.cache.layers, stage)[: self._split[stage]]
            for layer, held in enumerate(layers, start=sum(self._split[:stage])):
                at = layer, row, chunk
                length = int(held.queue_len[row])
                # The ends of the positions to be overwritten, in tokens, next first.
                self.rings[at] = [int(end) * self._tokens for end in held.queue[row][:length]]
                k, v = (dequantise(x, jnp.dtype(jnp.float32)) for x in (held.k, held.v))
                self.caches[at] = np.asarray(k[row]), np.asarray(v[row])


def _check_end_to_end(engine: DeviceEngine, check: _Check, file: Path) -> None:
    g = _load(file)
    frames = g["frames"]
    cfg = _stream_config(
        g,
        height=frames.shape[1],
        width=frames.shape[2],
        mode=_mode(file),
        cache_dtype=check.cache_dtype,
    )
    shape = (-1, *cfg.latent_size, engine.model.dit.in_channels)
    draws = [_latents_last(g[name]).reshape(shape) for name in sorted(g) if re.fullmatch(r"noise_\d+", name)]
    spec = SessionSpec("recorded", cfg, _initial_noise_scale(g, cfg), pixels="float32")
    prompts = _RecordedPrompt(g["context"])
    with engine.open(spec, noise=RecordedNoise(cfg, draws), prompts=prompts) as session:
        output = np.concatenate([chunk.frames() for chunk in [*session.push(frames), *session.finish()]])
    # The recorded stream ends where its last chunk comes in; ours completes what is under way.
    check.close(output[: len(g["output"])], g["output"], "output")


def _initial_noise_scale(g: Arrays, cfg: StreamConfig) -> float:
    """Solves the noise controller's first step for the noise scale that the session was opened with."""
    pixels = noise_control.pixels_from_uint8(jnp.asarray(g["frames"]))
    first, count = cfg.first_frames, cfg.chunk_frames
    level = float(noise_control.motion(pixels[first - 1], pixels[first : first + count]))
    initial = g["noise_scale"][0] + (1 - noise_control.SMOOTHING) * cfg.motion_range * level
    return round(float(initial), 6)


_KINDS: tuple[tuple[str, str, Callable[[DeviceEngine, _Check, Path], None]], ...] = (
    (r"flow_match.*", "flow_match", _check_flow_match),
    (r"noise_controller.*", "noise_controller", _check_noise_controller),
    (r"block_balance.*", "block_balance", _check_block_balance),
    (r"umt5.*", "umt5", _check_umt5),
    (r"vae.*", "vae", _check_vae),
    (r"taehv.*", "taehv", _check_taehv),
    (r"(stream|sequential)_.*", "latent stream", _check_latent_stream),
    (r"e2e_.*", "end to end", _check_end_to_end),
)


def report(outcomes: list[GoldenResult], dtype: str) -> dict[str, Any]:
    """Returns the outcomes with what they were computed on, as plain values for JSON."""
    device = jax.devices()[0]
    return {
        "passed": all(o.passed for o in outcomes),
        "dtype": dtype,
        "device": device.device_kind,
        "platform": device.platform,
        "jax": jax.__version__,
        "goldens": [{**dataclasses.asdict(o), "passed": o.passed} for o in outcomes],
    }
