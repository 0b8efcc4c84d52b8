"""Whatever is wrong, the command prints one clear message, exits with 2 and leaves nothing behind."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import weight_shapes
from safetensors.numpy import save_file
from torch_zip import Call, Global, write_torch_zip

from convert import convert_checkpoint
from svd2_jax.cli import main
from svd2_jax.config import preset
from svd2_jax.errors import ConversionError

GOLDENS = Path(__file__).parents[1] / "goldens"
GENERATOR = GOLDENS / "wan_causal/model.pt"
WAN = GOLDENS / "wan_models/Wan2.1-T2V-tiny"
TINY = preset("golden").dit


def tiny_weights(**changes):
    shapes = weight_shapes.wan_dit(TINY) | changes
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items() if shape is not None}


def missing_generator(tmp):
    return ["--generator", tmp / "nowhere.pt", "--wan", WAN], r"nowhere\.pt: no such file or folder"


def truncated(tmp):
    (tmp / "cut.pt").write_bytes(GENERATOR.read_bytes()[:100_000])
    return [
        "--generator",
        tmp / "cut.pt",
        "--wan",
        WAN,
    ], r"cut\.pt: truncated or damaged .* download it again"


def no_checkpoint(tmp):
    (tmp / "video.mp4").write_bytes(b"\0\0\0 ftypisom" * 20)
    return ["--generator", tmp / "video.mp4", "--wan", WAN], r"video\.mp4: not a checkpoint"


def forbidden_global(tmp):
    write_torch_zip(tmp / "evil.pt", {"generator": Call(Global("os", "system"), ("touch ran",))})
    return ["--generator", tmp / "evil.pt", "--wan", WAN], r"names os\.system, .* refused"


def other_model(tmp):
    write_torch_zip(tmp / "bert.pt", {f"layer.{i}.weight": np.zeros(2, np.float32) for i in range(9)})
    return (
        ["--generator", tmp / "bert.pt", "--wan", WAN],
        r"bert\.pt cannot be converted as a Wan2\.1 text-to-video transformer: .*9 tensors: layer\.0\.weight",
    )


def vae_as_generator(tmp):
    return [
        "--generator",
        WAN / "Wan2.1_VAE.pth",
        "--wan",
        WAN,
    ], r"Wan2\.1_VAE\.pth cannot be converted as a Wan2"


def generator_as_taehv(tmp):
    return ["--taehv", GENERATOR, "--wan", WAN], r"model\.pt cannot be converted as a TAEHV"


def other_size(tmp):
    config = json.loads((WAN / "config.json").read_text()) | {"dim": 1536}
    shutil.copytree(WAN, tmp / "wan")
    (tmp / "wan/config.json").chmod(0o644)
    (tmp / "wan/config.json").write_text(json.dumps(config))
    return [
        "--generator",
        GENERATOR,
        "--wan",
        tmp / "wan",
    ], r"its width is 96, .* says 1536; is this a golden checkpoint"


def parts_of_two_models(tmp):
    shapes = {"text_embedding.0.weight": (96, 64)}
    write_torch_zip(tmp / "g.pt", tiny_weights(**shapes))
    return ["--generator", tmp / "g.pt", "--wan", WAN], r"expects text width 64, the text encoder gives 48"


def out_exists(tmp):
    (tmp / "taken").mkdir()
    return [
        "--generator",
        GENERATOR,
        "--wan",
        WAN,
        "--out",
        tmp / "taken",
    ], r"taken exists; choose another place or re"


def out_without_parent(tmp):
    out = tmp / "a/b/checkpoint"
    return ["--generator", GENERATOR, "--wan", WAN, "--out", out], r"b: no such folder; create it first"


def missing_wan_folder(tmp):
    return ["--generator", GENERATOR, "--wan", tmp / "Wan"], r"Wan: no such folder; expected a Wan2\.1 folder"


def no_wan_folder(tmp):
    (tmp / "pictures").mkdir()
    return ["--wan", tmp / "pictures"], r"pictures: not a Wan2\.1 folder; expected"


def nothing_given(tmp):
    return [], r"nothing to convert; give --generator, --wan"


def heads_unknown(tmp):
    return [
        "--generator",
        GENERATOR,
    ], r"number of heads of a model of width 96; give the folder with its config"


def broken_config(tmp):
    shutil.copytree(WAN, tmp / "wan")
    (tmp / "wan/config.json").chmod(0o644)
    (tmp / "wan/config.json").write_text("{")
    return ["--wan", tmp / "wan"], r"config\.json: not valid JSON"


def missing_shard(tmp):
    folder = tmp / "wan"
    folder.mkdir()
    index = {"weight_map": {"a": "diffusion_pytorch_model-00001-of-00002.safetensors"}}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return ["--wan", folder], r"shards are missing: diffusion_pytorch_model-00001-of-00002"


def no_tokenizer(tmp):
    (tmp / "tokenizer").mkdir()
    return ["--wan", WAN, "--tokenizer", tmp / "tokenizer"], r"tokenizer: no tokenizer\.json"


CASES = (
    missing_generator,
    truncated,
    no_checkpoint,
    forbidden_global,
    other_model,
    vae_as_generator,
    generator_as_taehv,
    other_size,
    parts_of_two_models,
    out_exists,
    out_without_parent,
    missing_wan_folder,
    no_wan_folder,
    nothing_given,
    heads_unknown,
    broken_config,
    missing_shard,
    no_tokenizer,
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, capsys, case):
    options, message = case(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    options = options if "--out" in options else [*options, "--out", tmp_path / "checkpoint"]
    assert main(["convert", *map(str, options), "--no-progress"]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert error.startswith("error: ")
    assert len(error.splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_all_problems_of_all_files_are_listed_in_one_error(tmp_path):
    broken = tiny_weights(**{"blocks.1.ffn.0.bias": None, "blocks.0.norm3.bias": (5,), "head.extra": (1,)})
    write_torch_zip(tmp_path / "g.pt", broken)
    save_file({"conv1.weight": np.zeros((1,), np.float32)}, tmp_path / "unrelated.safetensors")
    with pytest.raises(ConversionError) as info:
        convert_checkpoint(out=tmp_path / "c", generator=tmp_path / "g.pt", wan=WAN, progress=False)
    assert str(info.value).splitlines() == [
        "the weights do not fit the model, 3 problems:",
        "  g.pt: blocks.0.norm3.bias: expected (96,), got (5,)",
        "  g.pt: head.extra: unknown, shape (1,)",
        "  g.pt: blocks.1.ffn.0.bias: missing, expected for dit.block.001/mlp_up/bias",
    ]


def test_an_unknown_dtype_is_refused(tmp_path):
    with pytest.raises(ConversionError, match="dtype must be one of bfloat16, float32, got 'int8'"):
        convert_checkpoint(out=tmp_path / "c", wan=WAN, dtype="int8", progress=False)


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    # The shell's limit on the size of a file (in 512 or 1024 bytes) stops writes just as a full disk does.
    command = [
        sys.executable,
        "-m",
        "convert",
        "--wan",
        str(WAN),
        "--out",
        str(tmp_path / "c"),
        "--no-progress",
    ]
    done = subprocess.run(
        ["sh", "-c", f"ulimit -f 200; exec {shlex.join(command)}"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 2
    assert re.fullmatch(r"error: .*/c: the disk is full .* nothing was kept\. .*\n", done.stderr)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_conversion_leaves_nothing(tmp_path, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("convert.conversion.read_leaf", interrupt)
    assert main(["convert", "--wan", str(WAN), "--out", str(tmp_path / "c"), "--no-progress"]) == 130
    assert capsys.readouterr().err == "interrupted; nothing was written\n"
    assert list(tmp_path.iterdir()) == []


def test_the_module_runs_as_a_command_and_its_help_shows_an_example():
    done = subprocess.run(
        [sys.executable, "-m", "convert", "--help"],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert "svd2 convert --generator model.pt --wan Wan2.1-T2V-1.3B" in done.stdout
