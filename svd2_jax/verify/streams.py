"""Golden files of whole streams: latents tick by tick with their caches, and video end to end."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from svd2_jax.api import SessionSpec
from svd2_jax.config import StreamConfig
from svd2_jax.diffusion import flow_match, noise_control
from svd2_jax.engine.engine import DeviceEngine
from svd2_jax.engine.noise import RecordedNoise
from svd2_jax.engine.pipeline import Pipeline, PipelineInput
from svd2_jax.nn import kv_cache
from svd2_jax.nn.quantised import dequantise
from svd2_jax.rows import Rows
from svd2_jax.verify.check import Arrays, Check, latents_last, load, numbered, stream_config


@dataclass(frozen=True)
class _RecordedPrompt:
    """Stands in for the text encoder where a golden file holds the embedding."""

    embedding: np.ndarray

    def encode(self, prompt: str) -> np.ndarray:
        return self.embedding


def _mode(file: Path) -> str:
    return "sequential" if "sequential" in file.stem else "stream"


def check_latent_stream(engine: DeviceEngine, check: Check, file: Path) -> None:
    """Compares a stream of latents tick by tick, and the caches at its end."""
    g = load(file)
    cfg = _latent_config(g, check, _mode(file))
    dtype, block_count = engine.params(cfg).dit.dtype, len(g["latents"])
    pipeline = engine.pipeline(cfg, jnp.asarray(g["context"], dtype))
    timesteps = [jnp.int32(t) for t in g["step0"]]
    renoise = _renoise_draws(g, cfg)
    source = RecordedNoise(cfg, _draws(g, renoise))
    seen = _Seen(engine.split(cfg), kv_cache.frame_tokens(engine.model.dit, cfg))
    # In sequential mode one row takes a chunk through all its steps, all stages in one tick.
    held = Rows[int](cfg.rows, pipeline.stages if cfg.mode == "stream" else 1)
    clean = pipeline.mesh.part(pipeline.first_group(*source.first()), -1)
    check.close(clean, latents_last(g["first_output"])[0], "first_output")
    seen.note(pipeline, None)
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
        _check_outputs(check, g, cfg, held, clean, renoise)
        held, _ = held.leave()
    exact = dtype == jnp.float32 and engine.model.dit.weight_dtype == cfg.cache_dtype == "compute"
    layers = range(engine.model.dit.num_layers)
    tipped = _check_rings(check, file, seen, layers, range(cfg.rows), block_count, exact)
    for layer, row in itertools.product(layers, range(cfg.rows)):
        if (layer, row) not in tipped:
            k, v = seen.caches[layer, row, max(0, block_count - row)]
            check.close(k, g["last_k"][layer][row], f"layer {layer}, row {row}: keys")
            check.close(v, g["last_v"][layer][row], f"layer {layer}, row {row}: values")


def _latent_config(g: Arrays, check: Check, mode: str) -> StreamConfig:
    frames, _, height, width = g["first_latents"].shape[-4:]
    block = int(g["frames_per_block"])
    return stream_config(
        g,
        height=height * 8,
        width=width * 8,
        task="v2v" if frames == block + 1 else "t2v",
        mode=mode,
        frames_per_block=block,
        rope_refresh=int(g["refresh"]),
        cache_dtype=check.cache_dtype,
    )


def _renoise_draws(g: Arrays, cfg: StreamConfig) -> list[list[np.ndarray]]:
    """Returns for each chunk the draws with which it is noised for its second step, its third, ..."""
    if cfg.steps == 1:
        return [[] for _ in g["latents"]]
    shape = latents_last(g["latents"][0]).shape
    draws = latents_last(g["stream_noise"]).reshape(len(g["latents"]), -1, *shape)
    return [list(chunk[: cfg.steps - 1]) for chunk in draws]


def _draws(g: Arrays, renoise: list[list[np.ndarray]]) -> list[np.ndarray]:
    """Returns all draws in order. Latents that are noisy already take the place of their draws."""
    draws = [latents_last(g["first_latents"])[0], *(latents_last(n) for n in numbered(g, "prepare_noise_"))]
    for latents, again in zip(g["latents"], renoise, strict=True):
        draws += [latents_last(latents), *again]
    return draws


def _check_outputs(
    check: Check,
    g: Arrays,
    cfg: StreamConfig,
    held: Rows[int],
    clean: jax.Array,
    renoise: list[list[np.ndarray]],
) -> None:
    """Compares what the last stage has put out in a tick, row by row."""
    for row in range(cfg.rows):
        back = held.at(row, held.stages - 1)
        if back is None:
            continue
        at = back.chunk + row  # the tick in which one stage takes this step of the chunk
        if at > len(g["latents"]):
            continue
        got = clean[row]
        if row < cfg.rows - 1:  # one stage leaves the chunk re-noised to its next step
            noise, timestep = jnp.asarray(renoise[at - 1][row]), jnp.int32(cfg.timesteps[row + 1])
            got = flow_match.add_noise(got[None], noise[None], timestep[None])[0]
        check.close(got, latents_last(g["outputs"][at - 1])[row], f"tick {at}, row {row}: output")


def _check_rings(
    check: Check, file: Path, seen: _Seen, layers: range, rows: range, ticks: int, exact: bool
) -> set[tuple[int, int]]:
    """Compares the order of each ring after each tick.

    Returns:
      The (layer, row) whose rings differ where the numbers are not exact: rounding may tip an adaptive sink, and the
      cache then holds other chunks.
    """
    recorded = file.with_suffix("").with_suffix(".ring.json")
    if not recorded.exists():
        return set()
    ours = [
        [[seen.rings[layer, row, max(0, tick - row)] for row in rows] for layer in layers]
        for tick in range(1, ticks + 1)
    ]
    theirs = json.loads(recorded.read_text())
    if exact:
        check.equal(json.dumps(ours), json.dumps(theirs), "order of the ring")
        return set()
    both = list(zip(ours, theirs, strict=True))
    places = itertools.product(layers, rows)
    return {(layer, row) for layer, row in places if any(a[layer][row] != b[layer][row] for a, b in both)}


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


def check_end_to_end(engine: DeviceEngine, check: Check, file: Path) -> None:
    """Compares the frames of a whole session."""
    g = load(file)
    frames = g["frames"]
    cfg = stream_config(
        g,
        height=frames.shape[1],
        width=frames.shape[2],
        mode=_mode(file),
        cache_dtype=check.cache_dtype,
    )
    shape = (-1, *cfg.latent_size, engine.model.dit.in_channels)
    draws = [latents_last(g[name]).reshape(shape) for name in sorted(g) if re.fullmatch(r"noise_\d+", name)]
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
