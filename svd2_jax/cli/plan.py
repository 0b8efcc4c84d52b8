"""`svd2 plan`: say what a pipeline needs and how fast it can be, without one.

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

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from svd2_jax import files, progress
from svd2_jax.cli.options import (
    SHARE_VAE,
    WEIGHT_DTYPE,
    ClipStreamOptions,
    DType,
    EightBits,
    OptionGroup,
    blocks_per_stage,
    check_reports,
    option,
    say,
)
from svd2_jax.command import EXIT_FAILED
from svd2_jax.config import PRESETS, ModelConfig, StreamConfig, preset
from svd2_jax.errors import ConfigError
from svd2_jax.hardware import HARDWARE, Hardware, hardware

if TYPE_CHECKING:
    from svd2_jax.engine.memory import Temporaries
    from svd2_jax.plan import Plan

_WHERE = "where it is to run"
MOST_STAGES = 8  # that a plan compares


@dataclass(frozen=True, kw_only=True)
class PlannedStreamOptions(ClipStreamOptions):
    """What is computed, with what a model would say."""

    task: Literal["v2v", "t2v"] | None = option("(default v2v, or --config's)")
    dtype: DType = option("to compute in (default %(default)s)", "bfloat16")
    weight_dtype: EightBits | None = option(WEIGHT_DTYPE)

    def planned(self, model: ModelConfig) -> StreamConfig:
        """Returns the stream configuration; the task is --task's, else --config's, else video to video."""
        of_file = self.of_file().get("task", StreamConfig().task) if self.config else None
        if self.task and of_file and self.task != of_file:
            raise ConfigError(
                f"{self.config}: has settings for the task {of_file!r}, not for --task {self.task}"
            )
        return self.stream(lambda: model, self.task or of_file or StreamConfig().task)


@dataclass(frozen=True, kw_only=True)
class Options(OptionGroup):
    """What `svd2 plan` takes."""

    preset: str = option(f"model: {', '.join(PRESETS)} (default %(default)s)", "wan-14b", metavar="NAME")
    stream: PlannedStreamOptions
    hardware: str = option(
        f"each device: {', '.join(HARDWARE)} (default %(default)s)", "h100", metavar="NAME"
    )
    stages: int | None = option("devices of the pipeline (default: as many as recommended)", group=_WHERE)
    split: tuple[int, ...] | None = option(
        "blocks on each stage (default: the best)", type=blocks_per_stage, metavar="N,N,...", group=_WHERE
    )
    share_vae: bool = option(SHARE_VAE, False, group=_WHERE)
    quick: bool = option("compile nothing, and so leave out what programs need in passing", False)
    json: Path | None = option("write all numbers there as well")


def run(options: Options) -> int:
    """Plans; fails if a device is too small."""
    model = preset(options.preset).with_weight_dtype(options.stream.weight_dtype)
    device = hardware(options.hardware)
    check_reports(options.json, reads=[("--config", options.stream.config)])
    cfg = options.stream.planned(model)
    with progress.shown("working out the plan", say):
        plan = _worked_out(options, model, cfg, device)
    if options.json:
        files.write_json(options.json, plan.to_dict())
    from svd2_jax import plan as plan_lib

    print(plan_lib.report(plan))
    return EXIT_FAILED if plan_lib.too_full(plan) else 0


def _worked_out(options: Options, model: ModelConfig, cfg: StreamConfig, device: Hardware) -> Plan:
    split, share_vae, dtype = options.split, options.share_vae, options.stream.dtype
    stages = len(split) if split and options.stages is None else options.stages
    with progress.working("loading JAX"):
        devices = _virtual_devices(stages)
        from svd2_jax import plan as plan_lib
    from svd2_jax.engine.memory import compiled_temporaries
    from svd2_jax.engine.mesh import stage_meshes
    from svd2_jax.engine.policy import checked_dtype

    def temporaries(split: tuple[int, ...]) -> Temporaries:
        mesh = stage_meshes(1, len(split), devices)[0]
        return compiled_temporaries(
            model, cfg, checked_dtype(dtype), split, mesh, lambda what: say(f"compiling {what}"), share_vae
        )

    def planned(stages: int, quick: bool) -> Plan:
        find = None if quick else temporaries
        with progress.working("counting memory and arithmetic"):
            return plan_lib.plan(model, cfg, stages, device, dtype, split, find, share_vae)

    plan = planned(planned(1, quick=True).recommended or 1 if stages is None else stages, options.quick)
    while stages is None and (wanted := plan.recommended or 0) > len(plan.devices):
        plan = planned(wanted, options.quick)  # compiled, it may turn out to need more
    return plan


def _virtual_devices(stages: int | None) -> list[Any]:
    """Returns CPU devices that programs can be compiled for, one for each stage."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    # Too late in a program that has used JAX before; then its devices have to do.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", max(stages or 1, MOST_STAGES))
    return jax.devices("cpu")
