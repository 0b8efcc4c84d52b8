"""`svd2 plan` as a user types it: what it prints and writes, and what it says when something is wrong."""

import functools
import json
from pathlib import Path

import pytest

from svd2_jax import progress

CONFIGS = Path(__file__).parents[1] / "configs"
SMALL = ["--preset", "golden", "--height", 48, "--width", 64]


@pytest.fixture
def plan(svd2):
    return functools.partial(svd2, "plan")


def check_refused(result: tuple[int, str, str], message: str) -> None:
    code, out, err = result
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("error: ")
    assert err.count("\n") == 1
    assert message in err


def said(err: str) -> list[str]:
    """Returns what is said, without what a slow machine is busy with."""
    return [line for line in err.splitlines() if not line.startswith("  ")]


def test_the_real_programs_are_compiled_and_their_needs_are_part_of_the_plan(plan, tmp_path):
    file = tmp_path / "plan.json"
    code, out, err = plan(
        *SMALL, "--split", "3,1", "--task", "t2v", "--steps", 1, "--decoder", "taehv", "--json", file
    )
    assert code == 0
    assert said(err) == ["compiling the tick, 3 blocks a stage", "compiling encoder and decoder"]
    assert "golden, 64x48, 2 steps, t2v, mode stream, decoder taehv, bfloat16" in out  # and one clean pass
    assert "2 x h100: 79.1 GiB" in out
    values = json.loads(file.read_text())
    assert [d["blocks"] for d in values["devices"]] == [3, 1]
    assert all(d["temporaries"] > 0 for d in values["devices"])


def test_a_quick_plan_of_the_large_model_says_what_fits_on_four_devices(plan):
    code, out, err = plan("--stages", 4, "--quick")
    assert (code, said(err)) == (0, [])
    assert "4 x h100" in out
    assert (
        "29 % of them at most on one device" in out
    )  # a quarter of the model, and a little for uneven stages
    assert "recommended: 2 stages" in out


def test_a_plan_with_a_shared_vae_says_how_many_devices_share_it(plan):
    out = plan("--stages", 4, "--quick", *SMALL, "--share-vae")[1]
    assert "3 devices share encoding, and as many decoding" in out  # of 6 rows of latents


def test_without_stages_the_recommended_number_is_planned(plan):
    assert "2 x h100" in plan("--quick")[1]
    assert (
        "1 x h100" in plan("--quick", "--preset", "wan-1.3b", "--decoder", "taehv", "--hardware", "h100")[1]
    )


def test_a_pipeline_that_does_not_fit_is_planned_and_fails(plan):
    code, out, err = plan("--quick", "--stages", 2, "--hardware", "rtx4090")
    assert (code, err) == (1, "")
    assert out.splitlines()[-1].startswith("device 1 exceeds its memory by ")


def test_settings_of_a_stream_come_from_its_file_and_options(plan):
    config = CONFIGS / "v2v_fast.yaml"
    assert "decoder taehv" in plan("--quick", "--preset", "golden", "--config", config)[1]
    assert "t2v" in plan("--quick", "--preset", "golden", "--config", CONFIGS / "t2v.yaml")[1].splitlines()[0]
    options = ("--mode", "sequential", "--cache-frames", 8, "--dtype", "float32", "--decoder", "wan")
    out = plan("--quick", *SMALL, "--config", config, *options)[1]
    assert "64x48" in out
    assert "mode sequential, decoder wan, float32" in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--preset", "wan-15b"], "unknown preset 'wan-15b'; known presets are wan-1.3b, wan-14b, golden, tiny"),
        (["--hardware", "h1000"], "unknown hardware 'h1000'; known are h100, "),
        (["--stages", 41], "stages must be 1 to 40, the blocks of wan-14b; got 41"),
        (["--stages", 0], "stages must be 1 to 40, the blocks of wan-14b; got 0"),
        (["--split", "8,12,12,9"], "the split has to give 4 stages all 40 blocks"),
        (["--split", "20,20", "--stages", 3], "the split has to give 3 stages all 40 blocks"),
        (["--split", "20;20"], "--split takes blocks per stage, for example 8,12,12,8; got '20;20'"),
        (["--height", 100], "height must be a positive multiple of 16, got 100; try 96"),
        (["--steps", 9], "steps must be 1 to 4, got 9"),
        (["--config", "missing.yaml"], "missing.yaml: cannot be read"),
        (["--config", CONFIGS / "t2v.yaml", "--task", "v2v"], "has settings for the task 't2v', not for --task v2v"),
        (["--json", "no/such/folder/plan.json"], "the folder no/such/folder does not exist"),
    ],
)  # fmt: skip
def test_what_cannot_be_planned_is_one_line(plan, args, message):
    check_refused(plan("--quick", *args), message)


def test_the_help_shows_examples_and_how_much_memory_jax_takes(plan):
    code, out, _ = plan("--help")
    assert code == 0
    assert "svd2 plan --preset wan-14b --stages 4" in out
    assert "XLA_CLIENT_MEM_FRACTION" in out


def test_weights_and_cache_in_8_bits_take_about_half_the_memory(plan, tmp_path):
    def device(*options):
        file = tmp_path / "plan.json"
        code, out, _ = plan("--quick", "--preset", "wan-1.3b", "--stages", 1, "--json", file, *options)
        assert code == 0
        return out, json.loads(file.read_text())["devices"][0]

    _, plain = device()
    out, small = device("--weight-dtype", "int8", "--cache-dtype", "fp8")
    assert "bfloat16, weights int8, cache fp8" in out
    assert "bfloat16, cache fp8" in device("--cache-dtype", "fp8")[0]
    # One byte in place of two, and a float32 for each head of 128; the anchors' means stay as they are.
    assert small["cache"] == pytest.approx(plain["cache"] * (1 + 4 / 128) / 2, rel=0.01)
    kernels = 30 * (8 * 1536**2 + 2 * 1536 * 8960)
    assert plain["weights"] - small["weights"] == pytest.approx(kernels, rel=0.01)


def test_an_unknown_way_to_hold_the_cache_is_refused(plan, tmp_path):
    config = tmp_path / "stream.yaml"
    config.write_text("cache_dtype: int4\n")
    check_refused(
        plan("--config", config), "cache_dtype must be one of ('compute', 'int8', 'fp8'), got 'int4'"
    )
    code, _, err = plan("--weight-dtype", "int4")
    assert code == 2
    assert "argument --weight-dtype: invalid choice: 'int4'" in err.splitlines()[-1]


def test_a_plan_says_at_once_that_it_loads_jax(plan, monkeypatch):
    monkeypatch.setattr(progress, "WORTH_A_LINE_S", 0)
    assert plan(*SMALL, "--quick")[2].startswith("  loading JAX: ")
