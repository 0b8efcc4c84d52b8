"""`scripts/gpu_report.py`: what it counts in a compiler's texts, written out by hand; no GPU and no plugin needed."""

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "gpu_report.py"

# A weight is transposed for a convolution and copied twice into one array, a cache is copied, two elementwise kernels
# follow each other, and the result is transposed.
HLO = """\
HloModule jit_step, is_scheduled=true, input_output_alias={ {0}: (1, {}, may-alias) }

%turn (p: bf16[1024,1024]) -> bf16[1024,1024] {
  %p = bf16[1024,1024]{1,0} parameter(0)
  ROOT %t = bf16[1024,1024]{1,0} transpose(%p), dimensions={1,0}
}

%add (q: bf16[1024,1024]) -> bf16[1024,1024] {
  %q = bf16[1024,1024]{1,0} parameter(0)
  ROOT %a = bf16[1024,1024]{1,0} add(%q, %q)
}

ENTRY %main (w: bf16[1024,1024], cache: bf16[1024,1024]) -> bf16[1024,1024] {
  %w = bf16[1024,1024]{1,0} parameter(0), sharding={replicated}
  %cache = bf16[1024,1024]{1,0} parameter(1)
  %turned = bf16[1024,1024]{1,0} fusion(%w), kind=kInput, calls=%turn
  %kept = bf16[1024,1024]{1,0} copy(%cache)
  %conv = (bf16[1024,1024]{1,0}, u8[4096]{0}) custom-call(%kept, %turned), custom_call_target="__cudnn$conv"
  %y = bf16[1024,1024]{1,0} get-tuple-element(%conv), index=0
  %one = bf16[1024,1024]{1,0} fusion(%y), kind=kLoop, calls=%add
  %two = bf16[1024,1024]{1,0} fusion(%one), kind=kLoop, calls=%add
  %joined = bf16[2048,1024]{1,0} concatenate(%w, %w), dimensions={0}
  ROOT %back = bf16[1024,1024]{1,0} fusion(%two), kind=kInput, calls=%turn
}
"""

THUNKS = """\
000: kCommandBuffer [source | next=003 (1)]
    001: kCopy [source | next=002 (1)] kCopy
    002: kCuDnn [prev=001 (1) | sink] kCuDnn
003: kConvolution [prev=000 (1) | next=000 (1)] kConvolution
004: kDynamicSliceFusion [prev=003 (1) | sink] params=2, results=2
    005: kCublasLtMatmul [source | sink] kCublasLtMatmul
000: kCommandBuffer [prev=003 (1) | sink]
    006: kConditional [source | sink] kConditional
        007: kCustomKernel [source | sink] fusion grid: [1, 1, 1]
"""


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("gpu_report", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_report"] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    yield module
    del sys.modules["gpu_report"]


def test_copies_transposes_and_chains_are_told_apart(script):
    hlo = script.read_hlo(HLO)
    assert (hlo.weight_copies, hlo.state_copies, hlo.turned) == (2, 1, 1)
    assert (hlo.chains, hlo.host) == (1, 0)
    assert hlo.moved == 17 * (2 << 20)  # arrays read and written, one by one


def test_a_call_to_the_host_is_seen(script):
    text = HLO.replace("__cudnn$conv", "xla_ffi_python_gpu_callback")
    assert script.read_hlo(text).host == 1


def test_kernels_are_counted_where_they_are_launched(script):
    thunks = script.read_thunks(THUNKS)
    assert (thunks.graphs, thunks.inside) == (2, 4)
    assert thunks.outside == {"Convolution": 1, "CublasLtMatmul": 1}


def test_a_shape_has_the_bytes_of_all_its_parts(script):
    assert script.shape_bytes("(bf16[2,3]{1,0}, f32[4]{0}, pred[])") == 12 + 16 + 1


@pytest.mark.parametrize(
    ("options", "message"), [(["--sizes", "480p"], "480p"), (["--presets", "wan-2b"], "unknown preset")]
)
def test_bad_input_is_one_line(script, options, message, tmp_path, capsys):
    code = script.exit_code(lambda: script._run([*options, "--out", str(tmp_path / "r.json")]), "")
    error = capsys.readouterr().err
    assert code == 2
    assert message in error
    assert error.count("\n") == 1
