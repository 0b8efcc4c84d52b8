"""Compiles the real programs for a described H100 that is not there, and reports what they would do on one.

Needs a Python environment with JAX's CUDA plugin, but no GPU: nothing runs. Autotuning is off, so the choice among
kernels for one product or convolution may differ on a card; memory, layouts, copies and graphs do not.

Example:
  python -m venv gpu && gpu/bin/pip install -e ".[cuda13]"
  gpu/bin/python scripts/gpu_report.py --out benchmarks/gpu_report.json
  gpu/bin/python scripts/gpu_report.py --presets wan-1.3b --sizes 512x512 --steps 2 --stages 1 --out report.json
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import math
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svd2_jax import config
from svd2_jax.command import exit_code
from svd2_jax.errors import ConfigError
from svd2_jax.hardware import GIB

FLAGS = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
CUDA, CUDNN = (13, 0), (9, 28, 0)  # what the H100 is said to have; CUDA as the wheels of jax[cuda13]
H100 = f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84929347584
  cuda_compute_capability {{ major: 9 }}
  driver_version: "{CUDA[0]}.{CUDA[1]}.0" runtime_version: "{CUDA[0]}.{CUDA[1]}.0"
}}
platform_name: "CUDA" device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info {{ major: {CUDNN[0]} minor: {CUDNN[1]} }}
runtime_version {{ major: {CUDA[0]} minor: {CUDA[1]} }}
"""
SPLITS = {1: lambda layers: (layers,), 4: lambda layers: _ends_lighter(layers)}  # blocks on each stage
LARGE = 1 << 20  # bytes from which a copy of an argument counts
ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "f32": 4,
              "s64": 8, "u64": 8, "f64": 8}  # fmt: skip
NO_KERNEL = {"parameter", "constant", "bitcast", "tuple", "get-tuple-element", "opt-barrier", "partition-id",
             "after-all"}  # fmt: skip
MOVES = {"copy", "transpose", "concatenate", "reshape", "bitcast", "parameter", "convert"}
HOST = re.compile(r"callback|infeed|outfeed|\bsend\b|\brecv\b", re.IGNORECASE)


@dataclass(frozen=True)
class Op:
    """One instruction: name, result type, opcode, what follows in brackets, and the rest of its line."""

    name: str
    shape: str
    opcode: str
    arguments: str
    rest: str

    @property
    def operands(self) -> list[str]:
        """Names of the instructions that it reads."""
        return re.findall(r"%([\w.-]+)", self.arguments)


@dataclass(frozen=True)
class Hlo:
    """What the optimised HLO of a program says; bytes are upper bounds, as operands are counted whole.

    Of kernels in branches (blocks that not every stage has) only the bytes are counted, as if all branches ran.

    Attributes:
      moved: bytes that its kernels read and write.
      weight_copies: kernels that only copy, transpose or join arguments of at least a MiB that the program reads:
        weights, prompts.
      state_copies: the same for arguments that it updates in place (caches, tails).
      turned: kernels that transpose something else of at least a MiB.
      chains: elementwise kernels of at least a MiB that alone read the result of another one.
      host: calls to the host.
    """

    moved: int
    weight_copies: int
    state_copies: int
    turned: int
    chains: int
    host: int


@dataclass(frozen=True)
class Thunks:
    """How a program is handed to the GPU: graphs, kernels inside them, kinds of those outside."""

    graphs: int
    inside: int
    outside: Counter[str]


def shape_bytes(shape: str) -> int:
    """Returns the bytes of an HLO type, all parts of a tuple together."""
    parts = re.findall(r"\b(\w+)\[([\d,]*)\]", shape)
    return sum(
        ITEM_BYTES[kind] * math.prod(int(n) for n in dims.split(",") if n)
        for kind, dims in parts
        if kind in ITEM_BYTES
    )


def computations(text: str) -> Iterator[tuple[str, bool, list[Op]]]:
    """Yields (name, whether it is the entry, instructions) of each computation of an HLO module."""
    name, entry, ops = "", False, []
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line):
            entry, name, ops = bool(head[1]), head[2], []
        elif line.startswith("}"):
            yield name, entry, ops
        elif op := re.match(r"\s+(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)", line):
            arguments, _, rest = op[4].partition(")")
            # The work space of a library call comes with its result and is no result.
            shape = re.sub(r"[us]8\[\d+\]", "", op[2]) if op[2].startswith("(") else op[2]
            ops.append(Op(op[1], shape, op[3], arguments, rest))


def read_hlo(text: str) -> Hlo:
    """Counts what costs memory traffic in the optimised HLO of a program."""
    bodies = {name: ops for name, _, ops in computations(text)}
    entry = next(ops for _, is_entry, ops in computations(text) if is_entry)
    branches = re.findall(r"(?:true|false)_computation=%?([\w.-]+)", text)
    entry = entry + [op for name in branches for op in bodies[name]]
    by_name = {op.name: op for op in entry}
    updated = {int(n) for n in re.findall(r"\{[\d,]*\}: \((\d+), \{", text.splitlines()[0])}
    readers = Counter(name for op in entry for name in set(op.operands))

    def body(op: Op) -> list[Op]:
        calls = re.search(r"calls=%?([\w.-]+)", op.rest)
        return bodies.get(calls[1], []) if calls else [op]

    def argument(name: str) -> Op | None:
        op = by_name.get(name)
        while op is not None and op.opcode in ("bitcast", "copy", "reshape") and op.operands:
            op = by_name.get(op.operands[0])
        is_large = op is not None and op.opcode == "parameter" and shape_bytes(op.shape) >= LARGE
        return op if is_large else None

    def elementwise(op: Op) -> bool:
        loop = "kind=kLoop" in op.rest and shape_bytes(op.shape) >= LARGE
        return loop and all(o.opcode != "dynamic-update-slice" for o in body(op))

    moved = host = turned = chains = 0
    copies = {True: 0, False: 0}
    for op in (op for op in entry if op.opcode not in NO_KERNEL):
        moved += shape_bytes(op.shape)
        sources = [by_name[name] for name in op.operands if name in by_name]
        moved += sum(shape_bytes(source.shape) for source in sources)
        parts = {o.name: o for o in body(op)}
        for update in (o for o in parts.values() if o.opcode == "dynamic-update-slice"):
            # In place: of the array, which is an operand and the result, only the slice is touched.
            slice_ = parts.get(update.operands[1]) or by_name[update.operands[1]]
            moved -= 2 * (shape_bytes(update.shape) - shape_bytes(slice_.shape))
        targets = re.findall(r'target="([^"]*)"', op.rest)
        host += bool(HOST.search(" ".join([op.opcode, *targets])))
        inner = {o.opcode for o in parts.values()}
        if inner <= MOVES and inner & {"copy", "transpose", "concatenate"}:
            arguments = [argument(name) for name in op.operands]
            if arguments and all(arguments):
                copies[any(int(a.arguments) in updated for a in arguments if a)] += 1
            else:
                turned += "transpose" in inner and shape_bytes(op.shape) >= LARGE
        chains += elementwise(op) and any(
            elementwise(source) and readers[source.name] == 1 for source in sources
        )
    return Hlo(moved, copies[False], copies[True], turned, chains, host)


def read_thunks(text: str) -> Thunks:
    """Counts graphs and kernels in XLA's dump of a program's thunks; a graph's kernels are set in."""
    graphs, inside, outside, in_graph = 0, 0, Counter(), False
    for indent, kind in re.findall(r"^( *)\d+: k(\w+)", text, re.MULTILINE):
        if not indent:
            in_graph = kind == "CommandBuffer"
            graphs += in_graph
        if kind in ("CommandBuffer", "AsyncStart", "AsyncDone", "DynamicSliceFusion"):
            continue
        if in_graph:
            inside += 1
        else:
            outside[kind] += 1
    return Thunks(graphs, inside, outside)


def _ends_lighter(layers: int) -> tuple[int, ...]:
    """Returns four stages' blocks, fewer where encoder and decoder are."""
    ends = layers // 5
    return (ends, (layers - 2 * ends) // 2, layers - 2 * ends - (layers - 2 * ends) // 2, ends)


class Compiler:
    """Compiles with the programs' own builder for the H100 described above."""

    def __init__(self, dump: Path):
        """Loads JAX for a GPU that is not there; `dump` is where XLA writes what it makes of a program."""
        import jax
        from jax._src.cudnn import fused_attention_stablehlo as fused
        from jax.experimental import topologies

        # These ask the devices that are there.
        fused.check_compute_capability = lambda capability: float(capability) <= 9.0
        fused.is_cuda_compute_capability_equal = lambda capability: capability == "9.0"
        fused.check_cudnn_version = lambda: CUDNN[0] * 10000 + CUDNN[1] * 100 + CUDNN[2]
        self.devices = topologies.get_topology_desc("", "cuda", target_config=H100, topology="1x1x4").devices
        self.jax, self.dump = jax, dump
        self.dtype = jax.numpy.dtype(jax.numpy.bfloat16)

    def ticks(self, model: config.ModelConfig, cfg: config.StreamConfig, stages: int) -> dict[str, Any]:
        """Returns what is found in the program over the stages."""
        with self.jax.numpy_dtype_promotion("standard"):
            ticks = self._builder(model, cfg, stages).ticks(SPLITS[stages](model.dit.num_layers))
        return self._reports({"tick": ticks.tick[1]})

    def ends(self, model: config.ModelConfig, cfg: config.StreamConfig) -> dict[str, Any]:
        """Returns what is found in the encoder and decoder of a stream."""
        with self.jax.numpy_dtype_promotion("standard"):
            ends = self._builder(model, cfg, 1).ends()
        encode = {"encode first": ends.encode_first, "encode": ends.encode}
        decode = {f"decode {cfg.decoder} first": ends.decode_first, f"decode {cfg.decoder}": ends.decode}
        # The encoder is the same with both decoders, and is compiled once.
        return self._reports(decode if cfg.decoder == "taehv" else encode | decode)

    def held(self, model: config.ModelConfig, cfg: config.StreamConfig) -> int:
        """Returns the bytes of weights (without the text encoder), caches and tails on one device."""
        from svd2_jax.engine.memory import stage_memory

        return stage_memory(model, cfg, self.dtype, (model.dit.num_layers,))[0].held

    def _builder(self, model: config.ModelConfig, cfg: config.StreamConfig, stages: int) -> Any:
        from svd2_jax.engine.mesh import StageMesh
        from svd2_jax.engine.programs import Builder

        return Builder(model, cfg, self.dtype, StageMesh(tuple(self.devices[:stages])))

    def _reports(self, programs: dict[str, Any]) -> dict[str, Any]:
        reports = {name: self._report(program) for name, program in programs.items()}
        for file in self.dump.glob("*.txt"):
            file.unlink()
        return reports

    def _report(self, program: Any) -> dict[str, Any]:
        text, memory = program.as_text(), program.memory_analysis()
        module = text.split(maxsplit=2)[1].rstrip(",")
        # There is a second file, which sorts behind the first, if anything could be made a graph.
        thunks = read_thunks(max(self.dump.glob(f"*.{module}.thunk_sequence*")).read_text())
        return {
            "temporaries": memory.temp_size_in_bytes,
            "arguments": memory.argument_size_in_bytes,
            "aliased": memory.alias_size_in_bytes,
            **dataclasses.asdict(read_hlo(text)),
            "kernels": thunks.inside + thunks.outside.total(),
            "in_graphs": thunks.inside,
            "graphs": thunks.graphs,
            "outside": dict(thunks.outside),
        }


COLUMNS = (
    ("temp GiB", lambda r: f"{r['temporaries'] / GIB:.2f}"),
    ("args GiB", lambda r: f"{r['arguments'] / GIB:.2f}"),
    ("in place GiB", lambda r: f"{r['aliased'] / GIB:.2f}"),
    ("GB moved", lambda r: f"{r['moved'] / 1e9:.1f}"),
    ("copies of weights, prompts", lambda r: str(r["weight_copies"])),
    ("of state", lambda r: str(r["state_copies"])),
    ("transposes", lambda r: str(r["turned"])),
    ("chains", lambda r: str(r["chains"])),
    ("host calls", lambda r: str(r["host"])),
    ("kernels", lambda r: str(r["kernels"])),
    ("in graphs", lambda r: f"{100 * r['in_graphs'] / max(1, r['kernels']):.0f} %"),
    ("graphs", lambda r: str(r["graphs"])),
)


def table(reports: dict[str, dict[str, Any]]) -> str:
    """Returns the programs as a Markdown table."""
    rows = [["program", *(title for title, _ in COLUMNS)], ["---"] + ["---:"] * len(COLUMNS)]
    rows += [[name, *(show(report) for _, show in COLUMNS)] for name, report in reports.items()]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _size(text: str) -> tuple[int, int]:
    if not (match := re.fullmatch(r"(\d+)x(\d+)", text)):
        raise ConfigError(f"--sizes takes HEIGHTxWIDTH, for example 480x832; got {text!r}")
    return int(match[1]), int(match[2])


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--presets", nargs="+", default=["wan-1.3b"], help="default: %(default)s")
    parser.add_argument("--sizes", nargs="+", default=["512x512", "480x832"], help="default: %(default)s")
    parser.add_argument("--steps", nargs="+", type=int, default=[1, 2], help="default: %(default)s")
    parser.add_argument("--stages", nargs="+", type=int, default=[1], choices=SPLITS, help="1, 4 or both")
    parser.add_argument("--no-ends", action="store_true", help="leave out encoder and decoders")
    parser.add_argument("--out", type=Path, required=True, help="JSON file; programs that it has stay there")
    return parser.parse_args(argv)


def _run(argv: Sequence[str] | None = None) -> None:
    args = _parse(argv)
    models = {name: config.preset(name) for name in args.presets}
    cases = [
        (size, steps, config.StreamConfig.for_task("v2v", steps, height=height, width=width))
        for size in args.sizes
        for height, width in [_size(size)]
        for steps in args.steps
    ]
    if not importlib.util.find_spec("jax_plugins") or not importlib.util.find_spec("jax_plugins.xla_cuda13"):
        raise ConfigError('needs the CUDA plugin of JAX, not a GPU; use pip install -e ".[cuda13]"')
    result: dict[str, Any] = {"programs": {}, "held": {}}
    if not args.out.parent.is_dir():
        raise ConfigError(f"--out {args.out}: there is no folder {args.out.parent}")
    if args.out.exists():
        try:
            result = json.loads(args.out.read_text())
        except (OSError, ValueError) as e:
            raise ConfigError(f"--out {args.out}: is there and is no report of this script ({e})") from e
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS} --xla_dump_to={folder}".strip()
        compiler = Compiler(Path(folder))
        result |= {
            "jax": compiler.jax.__version__,
            "flags": os.environ["XLA_FLAGS"].split(" --xla_dump_to")[0],
        }

        def add(where: str, found: dict[str, Any]) -> None:
            for program, report in found.items():
                name = f"{program}, {where}"
                result["programs"][name] = report
                print(table({name: report}).splitlines()[-1], flush=True)
            args.out.write_text(json.dumps(result, indent=1) + "\n")

        for size in () if args.no_ends else args.sizes:
            height, width = _size(size)
            for decoder in ("wan", "taehv"):
                cfg = config.StreamConfig.for_task("v2v", 2, height=height, width=width, decoder=decoder)
                add(size, compiler.ends(next(iter(models.values())), cfg))
        for name, model in models.items():
            for size, steps, cfg in cases:
                where = f"{name}, {size}, {steps} step{'s'[: steps - 1]}"
                result["held"][where] = compiler.held(model, cfg)
                for stages in args.stages:
                    add(
                        where + (f", {stages} stages" if stages > 1 else ""),
                        compiler.ticks(model, cfg, stages),
                    )
    print(table(result["programs"]))


if __name__ == "__main__":
    sys.exit(exit_code(_run, "interrupted; what is finished is in the JSON file"))
