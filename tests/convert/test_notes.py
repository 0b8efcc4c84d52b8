"""What a checkpoint will lack is said before the work, not after."""

from svd2_jax.cli import main

WAN = "wan_models/Wan2.1-T2V-tiny"


def test_missing_parts_and_a_base_transformer_are_pointed_out(golden_folder, tmp_path, capsys):
    args = ["--vae", golden_folder / WAN / "Wan2.1_VAE.pth", "--out", tmp_path / "vae"]
    assert main(["convert", *map(str, args)]) == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert [line.split(";")[0] for line in notes] == [
        "note: no transformer is given",
        "note: no text encoder is given",
        "note: no tokenizer is given",
    ]

    assert main(["convert", "--wan", str(golden_folder / WAN), "--out", str(tmp_path / "base")]) == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert len(notes) == 1
    assert "without --generator the base transformer is converted" in notes[0]


def test_a_whole_checkpoint_needs_no_note(golden_folder, tmp_path, capsys):
    generator = golden_folder / "wan_causal/model.pt"
    args = ["--generator", generator, "--wan", golden_folder / WAN, "--out", tmp_path / "all"]
    assert main(["convert", *map(str, args)]) == 0
    assert "note: " not in capsys.readouterr().err
