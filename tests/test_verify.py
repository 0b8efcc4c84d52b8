"""`svd2 verify` passes on the reference's own numbers and notices when anything differs."""

import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from svd2_jax import cli, verify
from svd2_jax.engine.engine import DeviceEngine
from svd2_jax.engine.mesh import stage_meshes
from svd2_jax.verify.run import _run as compare

GOLDENS = Path(__file__).parent / "goldens"
WAN = Path("wan_models/Wan2.1-T2V-tiny")
QUICK = ("block_balance", "flow_match", "noise_controller", "umt5")
FILES = sorted(file.name for file in verify.golden_files(GOLDENS))
# One for each kind of tick; tests/engine/test_pipeline.py compares stages under more settings.
IN_STAGES = (
    "stream_3frame_blocks", "stream_4step", "stream_rope_refresh", "stream_2step_adaptive_sink_high",
    "sequential_2step", "e2e_stream_2step",
)  # fmt: skip


@pytest.fixture
def make_folder(tmp_path):
    """Makes a golden folder with the weights and some of the files, linked."""

    def make(*names: str) -> Path:
        folder = tmp_path / "goldens"
        folder.mkdir()
        rings = [str(Path(name).with_suffix(".ring.json")) for name in names]
        for name in ("wan_causal", "wan_models", "prompts.json", *names, *rings):
            if (GOLDENS / name).exists():
                os.symlink(GOLDENS / name, folder / name)
        return folder

    return make


@pytest.fixture
def svd2(capsys):
    """Runs `svd2 verify`; returns its exit code and the lines of standard output and standard error."""

    def run(*args: object) -> tuple[int, list[str], list[str]]:
        code = cli.main(["verify", *map(str, args)])
        captured = capsys.readouterr()
        return code, captured.out.splitlines(), captured.err.replace("\r", "\n").splitlines()

    return run


def change(file: Path, **arrays: np.ndarray) -> None:
    """Replaces arrays of a golden file, which may be a link."""
    with np.load(file) as content:
        changed = {name: content[name] for name in content.files} | arrays
    file.unlink()
    np.savez(file, **changed)  # pyright: ignore[reportArgumentType]


def array(name: str, file: str) -> np.ndarray:
    with np.load(GOLDENS / file) as content:
        return content[name]


@pytest.fixture(scope="module")
def single(golden_checkpoint):
    """The golden model, in an engine that goes with this module: the programs of all goldens are many."""
    return DeviceEngine.from_checkpoint(golden_checkpoint)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if Path(n).stem in QUICK else pytest.mark.slow) for n in FILES]
)
def test_the_reference_s_numbers_are_reproduced(single, name):
    outcome = compare(single, GOLDENS / name, "compute")
    assert outcome.passed, outcome.line()


@pytest.fixture(scope="module")
def staged(golden_checkpoint):
    """The golden model on four devices."""
    return DeviceEngine.from_checkpoint(golden_checkpoint, mesh=stage_meshes(1, 4)[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_STAGES)
def test_a_pipeline_of_four_stages_reproduces_them_too(staged, name):
    outcome = compare(staged, GOLDENS / f"{name}.npz", "compute")
    assert outcome.passed, outcome.line()


def test_more_stages_than_devices_or_blocks_is_refused(svd2, make_folder):
    folder = make_folder("flow_match.npz")
    assert svd2(folder, "--stages", 9)[2][-1].startswith("error: 9 stages need 9 devices, JAX sees 8 (cpu)")
    assert svd2(folder, "--stages", 5)[2][-1].startswith("error: 5 stages are more than the model's 4 blocks")


def test_the_report_says_what_was_computed_where(svd2, make_folder, tmp_path):
    report = tmp_path / "report.json"
    code, out, _ = svd2(make_folder("flow_match.npz", "umt5.npz"), "--json", report)
    assert code == 0
    assert out[-1] == f"2 of 2 goldens pass in float32; report in {report}"
    values = json.loads(report.read_text())
    goldens = values.pop("goldens")
    assert values == {
        "passed": True, "dtype": "float32", "device": jax.devices()[0].device_kind, "platform": "cpu",
        "jax": jax.__version__,
    }  # fmt: skip
    assert [g["name"] for g in goldens] == ["flow_match", "umt5"]
    for g in goldens:
        assert 0 < g["error"] < g["tolerance"] == verify.TOLERANCES[g["name"]]["float32"]
        assert g["problems"] == []
        assert g["passed"] is True
        assert g["seconds"] > 0


def test_bfloat16_has_tolerances_of_its_own(svd2, make_folder):
    with jax.numpy_dtype_promotion("standard"):  # Flax's norms mix bfloat16 with float32
        code, out, _ = svd2(make_folder("umt5.npz"), "--dtype", "bfloat16")
    assert code == 0
    assert "tolerance 2e-01" in out[0]
    assert out[1] == "1 of 1 goldens pass in bfloat16"


@pytest.mark.slow
@pytest.mark.parametrize(("storage", "stages"), [("int8", 4), ("fp8", 1)])
def test_weights_and_cache_in_8_bits_stay_within_tolerances_of_their_own(
    svd2, make_folder, tmp_path, storage, stages
):
    report = tmp_path / "report.json"
    options = ["--weight-dtype", storage, "--cache-dtype", storage, "--stages", stages, "--json", report]
    code, out, _ = svd2(make_folder("e2e_stream_2step.npz"), *options)
    assert code == 0
    assert out[1].startswith(f"1 of 1 goldens pass in float32, weights {storage}, cache {storage}")
    values = json.loads(report.read_text())
    assert values["dtype"] == f"float32, weights {storage}, cache {storage}"
    (golden,) = values["goldens"]
    of = verify.TOLERANCES["end to end"]
    assert golden["tolerance"] == pytest.approx(
        of["float32"] + of[f"weights {storage}"] + of[f"cache {storage}"]
    )
    assert golden["error"] > of["float32"]  # it was in 8 bits
    assert 0 < golden["relative_error"] < 0.1


def test_a_number_that_differs_a_little_fails(svd2, make_folder):
    folder = make_folder("flow_match.npz", "noise_controller.npz")
    x0 = array("x0", "flow_match.npz")
    x0.flat[7] += 1e-4
    change(folder / "flow_match.npz", x0=x0)
    code, out, _ = svd2(folder)
    assert code == 1
    assert out[0].startswith("FAIL  flow_match")
    assert "tolerance 1e-06" in out[0]
    assert out[1].startswith("pass  noise_controller")
    assert out[2] == "1 of 2 goldens pass in float32"


def test_a_weight_that_differs_a_little_fails(svd2, make_folder):
    """The transformer of the Wan folder is used where there is no generator, so it can be changed."""
    folder = make_folder("stream_1step.npz")
    (folder / "wan_causal").unlink()
    (folder / "wan_models").unlink()
    shutil.copytree(GOLDENS / WAN, folder / WAN)
    file = folder / WAN / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["blocks.1.self_attn.q.weight"] = weights["blocks.1.self_attn.q.weight"] * np.float32(1.02)
    file.unlink()
    save_file(weights, file)
    code, out, _ = svd2(folder)
    assert code == 1
    assert out[0].startswith("FAIL  stream_1step")


def test_a_prompt_that_differs_fails(svd2, make_folder):
    folder = make_folder("umt5.npz")
    prompts = json.loads((GOLDENS / "prompts.json").read_text())
    (folder / "prompts.json").unlink()
    (folder / "prompts.json").write_text(json.dumps(["at night", *prompts[1:]]))
    code, out, _ = svd2(folder)
    assert code == 1
    assert "token ids differs" in out[0]


def broken_files(folder: Path) -> dict[str, str]:
    """Breaks one file in each way; returns what the line about it says."""
    sample = (GOLDENS / "flow_match.npz").read_bytes()
    (folder / "mystery.npz").write_bytes(sample)
    (folder / "flow_match_cut.npz").write_bytes(sample[: len(sample) // 2])
    (folder / "flow_match_text.npz").write_text("no arrays")
    (folder / "flow_match_empty.npz").touch()
    np.savez(folder / "flow_match_other.npz", something=np.zeros(3))
    (folder / "flow_match_nan.npz").write_bytes(sample)
    change(folder / "flow_match_nan.npz", x0=array("x0", "flow_match.npz") * np.nan)
    (folder / "flow_match_gone.npz").symlink_to("nowhere")
    return {
        "mystery": "unknown kind of golden file; known are flow_match",
        "flow_match_cut": "BadZipFile",
        "flow_match_text": "ValueError",
        "flow_match_empty": "EOFError",
        "flow_match_other": "KeyError",
        "flow_match_nan": "x0: not finite",
        "flow_match_gone": "FileNotFoundError",
    }


def test_a_file_that_is_unknown_or_damaged_fails_and_the_others_still_run(svd2, make_folder):
    folder = make_folder("noise_controller.npz")
    expected = broken_files(folder)
    code, out, _ = svd2(folder)
    lines = {line.split()[1]: line for line in out[:-1]}
    assert code == 1
    assert lines.pop("noise_controller").startswith("pass")
    assert set(lines) == set(expected)
    for name, message in expected.items():
        assert lines[name].startswith("FAIL")
        assert message in lines[name]
    assert out[-1] == f"1 of {len(expected) + 1} goldens pass in float32"


def test_arrays_of_another_shape_fail_and_do_not_stop_the_rest(svd2, make_folder):
    folder = make_folder("noise_controller.npz", "flow_match.npz")
    change(folder / "flow_match.npz", noise=array("noise", "flow_match.npz")[:, :1])
    change(folder / "noise_controller.npz", frames=array("frames", "noise_controller.npz")[0])
    code, out, _ = svd2(folder)
    assert code == 1
    assert [line[:4] for line in out[:2]] == ["FAIL", "FAIL"]


# --- bad input


def check_refused(result: tuple[int, list[str], list[str]], message: str) -> None:
    code, out, err = result
    assert code == 2
    assert [line for line in err if line.startswith("error: ")] == err[-1:]
    assert message in err[-1]
    assert not out


def test_a_folder_that_is_none_is_refused(svd2, tmp_path):
    check_refused(svd2(tmp_path / "nowhere"), "nowhere: expected a folder of golden files; there is none")
    (tmp_path / "file").touch()
    check_refused(svd2(tmp_path / "file"), "file: expected a folder of golden files")


def test_a_folder_without_golden_files_is_refused(svd2, tmp_path):
    check_refused(svd2(tmp_path), "expected golden files (*.npz), found none")


def test_a_folder_without_weights_is_refused(svd2, make_folder):
    folder = make_folder("flow_match.npz")
    (folder / "wan_models").unlink()
    check_refused(svd2(folder), "expected a Wan folder wan_models/*/config.json")


def test_damaged_weights_are_refused(svd2, make_folder):
    folder = make_folder("flow_match.npz")
    model = (folder / "wan_causal/model.pt").read_bytes()
    (folder / "wan_causal").unlink()
    (folder / "wan_causal").mkdir()
    (folder / "wan_causal/model.pt").write_bytes(model[:100_000])
    check_refused(svd2(folder), "model.pt: truncated or damaged")


def test_a_report_that_cannot_be_written_is_refused_before_anything_runs(svd2, make_folder, tmp_path):
    folder = make_folder("flow_match.npz")
    check_refused(svd2(folder, "--json", tmp_path / "a/b.json"), "does not exist; create it first")
    check_refused(svd2(folder, "--json", tmp_path), "is a folder, expected a file name to write")
