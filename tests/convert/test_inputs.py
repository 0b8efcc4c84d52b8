"""A path that is not what it should be is an error that names the one that was meant, and all of them at once."""

import hashlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from convert import convert_checkpoint
from svd2_jax.cli import main, parser
from svd2_jax.errors import CheckpointError, ConversionError

ROOT = Path(__file__).parents[2]
GENERATOR = ROOT / "tests/goldens/wan_causal/model.pt"
WAN = ROOT / "tests/goldens/wan_models/Wan2.1-T2V-tiny"
SNAPSHOT = "hub/models--Wan-AI--Wan2.1-T2V-1.3B/snapshots/0fad"
WAN_FILES = (
    "diffusion_pytorch_model.safetensors",
    "config.json",
    "Wan2.1_VAE.pth",
    "models_t5_umt5-xxl-enc-bf16.pth",
    "google/umt5-xxl/tokenizer.json",
)
DIFFUSERS_FILES = (
    "transformer/diffusion_pytorch_model-00001-of-00002.safetensors",
    "transformer/diffusion_pytorch_model-00002-of-00002.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
    "tokenizer/tokenizer.json",
    "scheduler/scheduler_config.json",
)


def make(folder, names):
    """Writes safetensors files without a tensor, and empty JSON objects."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"{}" if name.endswith(".json") else b"\x02" + bytes(7) + b"{}")


def make_cache(folder):
    """A Hugging Face cache: the snapshot's files are links to blobs."""
    make(folder, ["refs/main", *(f"blobs/{number}" for number in range(len(WAN_FILES)))])
    for number, name in enumerate(WAN_FILES):
        link = folder / "snapshots/0fad" / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(folder / f"blobs/{number}")


@pytest.fixture
def convert(tmp_path, monkeypatch, capsys):
    """Runs the command in an empty folder; returns its exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)

    def run(*options):
        given = shlex.split(" ".join(map(str, options)))
        if "--out" not in given:
            given += ["--out", "new"]
        code = main(["convert", *given, "--no-progress"])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


@pytest.fixture
def refusal(convert, tmp_path):
    """Runs the command and returns its error, which is one line and leaves nothing."""

    def run(*options):
        before = sorted(tmp_path.rglob("*"))
        code, out, err = convert(*options)
        assert (code, out) == (2, "")
        assert re.fullmatch(r"error: .*\n", err)
        assert sorted(tmp_path.rglob("*")) == before
        return err

    return run


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("wan/google/umt5-xxl", "wan"),
        ("wan/google", "wan"),
        ("wan/google/umt5-xxl/tokenizer.json", "wan"),
        ("wan/Wan2.1_VAE.pth", "wan"),
        ("diffusers/transformer", "diffusers"),
        ("diffusers/vae", "diffusers"),
        ("diffusers/vae/", "diffusers"),
        ("./diffusers/text_encoder", "diffusers"),
        ("diffusers/tokenizer", "diffusers"),
        ("diffusers/scheduler", "diffusers"),
        ("link", "wan"),
        ("hub", SNAPSHOT),
        (str(Path(SNAPSHOT).parents[1]), SNAPSHOT),
        (str(Path(SNAPSHOT).parent), SNAPSHOT),
        (str(Path(SNAPSHOT).parents[1] / "blobs"), SNAPSHOT),
        (str(Path(SNAPSHOT) / "google/umt5-xxl"), SNAPSHOT),
        ("models", "models/a/wan"),
        ("models/b", "models/a/wan"),
        ("models/wrong", "models/a/wan"),
    ],
)
def test_a_folder_near_the_wan_folder_names_that_folder(refusal, tmp_path, given, meant):
    make(tmp_path / "wan", WAN_FILES)
    make(tmp_path / "diffusers", DIFFUSERS_FILES)
    make(tmp_path / "models/a/wan", WAN_FILES)
    (tmp_path / "models/b").mkdir()
    (tmp_path / "link").symlink_to("wan/google")
    make_cache(tmp_path / Path(SNAPSHOT).parents[1])
    meant_path = re.search(r"did you mean --wan (\S+)\?\n", refusal("--wan", given))
    assert meant_path is not None
    assert (tmp_path / meant_path[1]).resolve() == tmp_path / meant


@pytest.mark.parametrize("given", [".", "../vae", "../transformer"])
def test_a_subfolder_that_is_the_current_folder_names_the_one_around_it(
    refusal, tmp_path, monkeypatch, given
):
    make(tmp_path / "diffusers", DIFFUSERS_FILES)
    monkeypatch.chdir(tmp_path / "diffusers/transformer")
    assert f"did you mean --wan {tmp_path}/diffusers?" in refusal("--wan", given)


def test_names_of_folders_can_be_typed_as_they_are_suggested(refusal, tmp_path):
    make(tmp_path / "my models/wan", WAN_FILES)
    assert "did you mean --wan 'my models/wan'?" in refusal("--wan", "'my models/wan/google'")


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        (0, "no transformer (diffusion_pytorch_model*.safetensors or transformer/); download what is missing or "
            "give --generator FILE; to convert only what is there, give it with --vae, --text-encoder, --tokenizer"),
        (2, "no VAE (Wan2.1_VAE.pth or vae/); download what is missing or give --vae FILE;"),
        (3, "no text encoder (models_t5_umt5-xxl-enc-bf16.pth or text_encoder/)"),
        (4, "no tokenizer (google/umt5-xxl/ or tokenizer/)"),
    ],
)  # fmt: skip
def test_a_wan_folder_that_lacks_a_part_is_refused(refusal, tmp_path, lost, message):
    make(tmp_path / "half", [name for number, name in enumerate(WAN_FILES) if number != lost])
    make(tmp_path / "whole", WAN_FILES)  # of another size, perhaps
    error = refusal("--wan", "half")
    assert f"error: half: not a complete Wan2.1 folder: {message}" in error
    assert "did you mean" not in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--wan empty", "text_encoder/ and tokenizer/; it is empty"),
        ("--wan generator", "(generator/model.pt) with --generator, --vae"),
        ("--wan generator/model.pt", "a file; --wan expects a Wan2.1 folder; give the weights of one part"),
        ("--wan Wan-AI/Wan2.1-T2V-14B", "hf download Wan-AI/Wan2.1-T2V-14B --local-dir Wan2.1-T2V-14B"),
        ("--wan checkpoint", "checkpoint: a converted checkpoint; --wan expects a Wan2.1 folder; to use it: svd2 run"),
        ("--wan damaged", "(2) damaged/models_t5_umt5-xxl-enc-bf16.pth: not a checkpoint"),
        ("--generator checkpoint", "checkpoint: a converted checkpoint, not weights for --generator"),
        ("--wan ''", "error: --wan is empty; expected a path"),
        ("--vae wan", "its VAE alone with --vae wan/Wan2.1_VAE.pth"),
        ("--text-encoder wan", "its text encoder alone with --text-encoder wan/models_t5"),
        ("--vae .", ".: holds no weights; expected model.pt or *.safetensors; did you mean wan/Wan2.1_VAE.pth?"),
        ("--generator .", "did you mean generator/model.pt or wan/diffusion_pytorch_model.safetensors?"),
        ("--vae wan/Wan2.1_VAE.pth --tokenizer wan", "tokenizer; did you mean wan/google/umt5-xxl?"),
        ("--vae wan/Wan2.1_VAE.pth --tokenizer wan/google/umt5-xxl/tokenizer.json", "wan/google/umt5-xxl?"),
        ("--generator shards/x-00001-of-00006.safetensors", "one of 6 shards; give the folder that holds"),
        ("--vae generator/model.pt", "it is a Wan2.1 text-to-video transformer: give it with --generator"),
        ("--generator wan/Wan2.1_VAE.pth", "it is a Wan2.1 VAE: give it with --vae"),
    ],
)  # fmt: skip
def test_an_option_that_was_given_something_else_says_what_it_is(refusal, tmp_path, options, message):
    (tmp_path / "empty").mkdir()
    make(
        tmp_path, ["checkpoint/manifest.json", "shards/x-00001-of-00006.safetensors", "generator/config.json"]
    )
    make(tmp_path / "damaged", ["Wan2.1_VAE.pth"])
    (tmp_path / "damaged/models_t5_umt5-xxl-enc-bf16.pth").write_text("<html>404</html>")
    (tmp_path / "generator/model.pt").symlink_to(GENERATOR)
    (tmp_path / "wan").symlink_to(WAN)
    assert message in refusal(options)


def test_all_problems_of_the_arguments_are_one_line_with_the_inputs_first(refusal, tmp_path):
    (tmp_path / "existing").mkdir()
    assert refusal("--wan nope --out existing") == (
        "error: 2 problems: (1) nope: no such folder; expected a Wan2.1 folder; "
        "(2) existing exists; choose another place or remove it first\n"
    )
    (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04")
    error = refusal("--generator none.pt --wan nope --vae cut.pt --tokenizer existing --out a/b")
    assert re.match(
        r"error: 5 problems: \(1\) nope: .*; \(2\) none\.pt: no such file or folder; \(3\) cut\.pt: truncated .*; "
        r"\(4\) existing: no tokenizer\.json.*; \(5\) a: no such folder; create it first\n",
        error,
    )


def test_weights_of_the_wrong_kind_are_all_named(refusal):
    error = refusal(f"--vae {GENERATOR} --taehv {WAN}/Wan2.1_VAE.pth")
    assert "(1) model.pt cannot be converted as a Wan2.1 VAE" in error
    assert "(2) Wan2.1_VAE.pth cannot be converted as a TAEHV" in error


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("wan", "error: wan is an input of the conversion; choose another place for --out"),
        ("wan/new", "error: wan/new lies in the input wan; choose a place outside of it for --out"),
        ("link/new", "error: link/new lies in the input wan; choose a place outside of it for --out"),
        (".", "error: . exists and holds the input wan; choose another place for --out"),
        ("file/new", "error: file: a file, but file/new is to lie in it; choose another place"),
        ("''", "error: --out is empty; expected a path"),
        ("x" * 300, "cannot be written"),
    ],
)
def test_a_place_that_would_harm_the_inputs_or_cannot_be_made_is_refused(refusal, tmp_path, out, message):
    shutil.copytree(WAN, tmp_path / "wan")
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("wan")
    error = refusal("--wan wan --out", out)
    assert message in error
    assert "remove it" not in error


def test_a_place_that_is_taken_stays_an_error_of_the_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="exists and holds the input"):
        convert_checkpoint(out=WAN, vae=WAN / "Wan2.1_VAE.pth", progress=False)
    with pytest.raises(ConversionError, match="2 problems"):
        convert_checkpoint(out=tmp_path, vae=tmp_path / "none", progress=False)


def test_the_last_line_says_what_is_there_and_what_to_type_next(convert, tmp_path):
    code, said, _ = convert("--generator", GENERATOR, "--wan", WAN, "--out 'my ckpt'")
    assert code == 0
    holds, command = said.splitlines()[-1].split("; next: ")
    assert re.fullmatch(
        r"my ckpt: golden, bfloat16, \d\.\d+ MB: transformer, VAE, text encoder, tokenizer", holds
    )
    size = sum(f.stat().st_size for f in (tmp_path / "my ckpt").rglob("*") if f.is_file())
    assert float(re.findall(r"([\d.]+) MB", holds)[0]) == pytest.approx(size / 1e6, rel=1e-3)
    assert command.startswith("svd2 run --checkpoint 'my ckpt' --input in.mp4 --prompt ")
    assert parser().parse_args(shlex.split(command)[1:]).checkpoint == "my ckpt"


def test_the_last_line_about_one_part_says_how_to_get_the_others(convert):
    code, said, _ = convert("--vae", WAN / "Wan2.1_VAE.pth", "--dtype float32")
    assert code == 0
    holds, lacks, following = said.splitlines()[-1].split("; ")
    assert re.fullmatch(r"new: golden, float32, \d\.\d+ MB: VAE", holds)
    assert lacks == "it cannot run without transformer, text encoder, tokenizer"
    assert following == (
        f"next: svd2 convert --generator FILE --wan WAN_FOLDER --vae {WAN}/Wan2.1_VAE.pth --dtype float32 "
        "--out new-whole"
    )


def test_a_wan_folder_given_as_the_generator_is_pointed_out(tmp_path, capsys):
    assert main(["convert", "--generator", str(WAN), "--out", str(tmp_path / "c")]) == 0
    assert f"note: {WAN} is a Wan2.1 folder; to convert its other parts as well: --wan {WAN}\n" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_conversion_that_is_terminated_leaves_nothing(tmp_path, name):
    before = {path: hashlib.sha256(path.read_bytes()).digest() for path in WAN.rglob("*") if path.is_file()}
    command = [sys.executable, "-m", "convert", "--wan", WAN, "--out", tmp_path / "c", "--no-progress"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not list(tmp_path.glob(".c.*.partial/*")):
            time.sleep(0.01)
        process.send_signal(getattr(signal, name))
        _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (130, "interrupted; nothing was written\n")
    assert list(tmp_path.iterdir()) == []
    assert before == {path: hashlib.sha256(path.read_bytes()).digest() for path in before}
