"""The training loop: any step function over batches that depend on the step only, resumable at every save."""

from __future__ import annotations

import concurrent.futures
import functools
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import register_dataclass
from tqdm import tqdm

from svd2_jax.types import Device

Params = Any
Loss = Callable[[Params, Any, jax.Array], tuple[jax.Array, Mapping[str, jax.Array]]]
"""(params, batch, key) -> (loss, numbers to show)."""

EMA_HALF_LIFE = 0.02  # of the averaged parameters, as a share of the steps so far
KEPT_CHECKPOINTS = 2
CLIP_NORM = 1.0
LOG_EVERY = 50


@register_dataclass
@dataclass(frozen=True)
class TrainState:
    """All that a run is resumed from.

    Attributes:
      step: int32 [] steps done.
      params: parameters, float32.
      average: their moving average, which is what is used afterwards.
      optimiser: its state.
    """

    step: jax.Array
    params: Params
    average: Params
    optimiser: Any


@dataclass(frozen=True)
class Run:
    """How long and how fast one run learns.

    Attributes:
      name: of its folder.
      steps: in all.
      rate: peak learning rate of matrices (Muon), reached after `warmup` steps, then falling as a cosine.
      vector_rate: the same for all other parameters (Adam).
      warmup: steps.
      seed: of all random numbers.
      save_every: steps between two saves, and between two sample pictures.
    """

    name: str
    steps: int
    rate: float
    vector_rate: float
    warmup: int = 50
    seed: int = 0
    save_every: int = 500


def optimiser(run: Run, adam_only: Callable[[tuple[Any, ...]], bool] = lambda _: False) -> Any:
    """Returns Muon for matrices and kernels, Adam for everything else and where `adam_only(path)` is true."""

    def schedule(rate: float) -> optax.Schedule:
        warmup = min(run.warmup, run.steps // 2)
        return optax.warmup_cosine_decay_schedule(0.0, rate, warmup, run.steps, 0.05 * rate)

    def dimensions(params: Params) -> Any:
        def of(path: tuple[Any, ...], x: jax.Array) -> Any:
            if x.ndim < 2 or adam_only(path):
                return None
            return optax.contrib.MuonDimensionNumbers(tuple(range(x.ndim - 1)), (x.ndim - 1,))

        return jax.tree_util.tree_map_with_path(of, params)

    return optax.chain(
        optax.clip_by_global_norm(CLIP_NORM),
        optax.contrib.muon(
            schedule(run.rate),
            muon_weight_dimension_numbers=dimensions,
            adam_learning_rate=schedule(run.vector_rate),
        ),
    )


def fit(
    run: Run,
    folder: Path,
    params: Params,
    loss: Loss,
    batch_at: Callable[[int], Any],
    sample: Callable[[Params, Path], None] | None = None,
    adam_only: Callable[[tuple[Any, ...]], bool] = lambda _: False,
    devices: Sequence[Device] | None = None,
) -> Params:
    """Trains, and returns the averaged parameters.

    It resumes from what was saved in `folder`; a complete run returns at once. Batches are cut over the devices
    along their first axis. Numbers are appended to `log.jsonl`.

    Args:
      run: how long and how fast.
      folder: of this run; made if it is not there.
      params: to start from, float32.
      loss: see `Loss`.
      batch_at: the batch of a step; called ahead of time, in a thread.
      sample: draws pictures of what the parameters do, to a file.
      adam_only: parameters that are no linear map although they are matrices, by their path.
      devices: to train on, as many of them as divide a batch; None is all of JAX's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    update = optimiser(run, adam_only)
    mesh = Mesh(np.array(_fitting(devices or jax.devices(), batch_at(0))), ("data",))
    everywhere, cut = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))

    def init(params: Params) -> TrainState:
        return TrainState(jnp.zeros((), jnp.int32), params, params, update.init(params))

    state = jax.jit(init, out_shardings=everywhere)(jax.device_put(params, everywhere))
    options = ocp.CheckpointManagerOptions(max_to_keep=KEPT_CHECKPOINTS)
    with (
        ocp.CheckpointManager((folder / "state").absolute(), options=options) as saved,
        concurrent.futures.ThreadPoolExecutor(1) as ahead,
        (folder / "log.jsonl").open("a", encoding="utf-8") as log,
        tqdm(total=run.steps, desc=run.name, unit="step") as bar,
    ):
        if saved.latest_step() is not None:
            state = saved.restore(saved.latest_step(), args=ocp.args.StandardRestore(state))
        done = int(state.step)
        bar.update(done)
        show = _Numbers(bar, log)
        compiled = jax.jit(functools.partial(_step, run, update, loss), donate_argnums=0)
        following = ahead.submit(batch_at, done)
        for step in range(done + 1, run.steps + 1):
            batch = jax.device_put(following.result(), cut)
            following = ahead.submit(batch_at, step)
            state, numbers = compiled(state, batch)
            show(numbers)
            if step % run.save_every == 0 or step == run.steps:
                saved.save(step, args=ocp.args.StandardSave(state))
                if sample:
                    sample(state.average, folder / f"sample_{step:06d}.png")
    return state.average


def _step(
    run: Run, update: Any, loss: Loss, state: TrainState, batch: Any
) -> tuple[TrainState, Mapping[str, jax.Array]]:
    """Returns the state after a step, and the numbers to show."""
    key = jax.random.fold_in(jax.random.key(run.seed), state.step)
    (value, numbers), gradient = jax.value_and_grad(loss, has_aux=True)(state.params, batch, key)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # as Optax is written
        change, optimiser_state = update.update(gradient, state.optimiser, state.params)
        params = optax.apply_updates(state.params, change)
    # A share of what was learned so far: short at the start, long at the end.
    weight = 1.0 - 0.5 ** (1.0 / (1.0 + EMA_HALF_LIFE * state.step.astype(jnp.float32)))
    average = optax.incremental_update(params, state.average, weight)
    return TrainState(state.step + 1, params, average, optimiser_state), {"loss": value, **numbers}


class _Numbers:
    """Smooths the numbers of the steps; shows them in the progress bar and the log, every `LOG_EVERY` steps."""

    def __init__(self, bar: tqdm, log: TextIO):
        self._bar, self._log, self._started = bar, log, time.monotonic()
        self._smooth: dict[str, float] = {}
        self._before: Mapping[str, jax.Array] = {}

    def __call__(self, numbers: Mapping[str, jax.Array]) -> None:
        """Takes those of the next step; they may not be computed yet."""
        self._bar.update()
        # Of the step before: whoever reads those of this one waits, and leaves the device without work.
        for name, value in self._before.items():
            self._smooth[name] = 0.98 * self._smooth.get(name, float(value)) + 0.02 * float(value)
        self._before = numbers
        if self._bar.n % LOG_EVERY == 0 or self._bar.n == self._bar.total:
            self._bar.set_postfix({name: f"{value:.3f}" for name, value in self._smooth.items()})
            seconds = round(time.monotonic() - self._started, 1)
            self._log.write(json.dumps({"step": self._bar.n, "seconds": seconds, **self._smooth}) + "\n")
            self._log.flush()


def _fitting(devices: Sequence[Device], batch: Any) -> list[Device]:
    """Returns the first devices, as many as every array of a batch can be cut into along its first axis."""
    largest = math.gcd(*(x.shape[0] for x in jax.tree.leaves(batch)))
    return list(devices)[: max(n for n in range(1, len(devices) + 1) if largest % n == 0)]
