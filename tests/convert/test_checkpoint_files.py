import io
import json
import zipfile

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from torch_zip import write_torch_zip

from convert.files import open_weights, weight_files
from convert.wan_folder import find_wan_folder
from svd2_jax.errors import ConversionError


def tensors(*names):
    return {name: np.full((2, 3), i, np.float32) for i, name in enumerate(names)}


def shards(folder, *, index=True):
    folder.mkdir()
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    save_file(tensors("a", "b"), folder / names[0])
    save_file(tensors("c"), folder / names[1])
    if index:
        weight_map = {"a": names[0], "b": names[0], "c": names[1]}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_safetensors_come_back_bit_for_bit(tmp_path):
    want = {"x": np.arange(6, dtype=np.float32).reshape(2, 3), "y": np.ones(3, ml_dtypes.bfloat16)}
    save_file(want, tmp_path / "w.safetensors", metadata={"format": "pt"})
    got = dict(open_weights(tmp_path / "w.safetensors").tensors)
    assert set(got) == set(want)
    for name, values in want.items():
        assert got[name].dtype == values.dtype
        np.testing.assert_array_equal(got[name].view(), values)


@pytest.mark.parametrize("index", [True, False], ids=["index", "numbered"])
def test_shards_are_read_as_one(tmp_path, index):
    source = open_weights(shards(tmp_path / "s", index=index))
    assert sorted(name for name, _ in source.tensors) == ["a", "b", "c"]
    assert len(source.files) == 2


@pytest.mark.parametrize("index", [True, False], ids=["index", "numbered"])
def test_a_missing_shard_is_reported(tmp_path, index):
    folder = shards(tmp_path / "s", index=index)
    (folder / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(ConversionError, match=r"missing: model-00001|not one complete set"):
        open_weights(folder)


def test_an_index_cannot_point_outside_its_folder(tmp_path):
    (tmp_path / "x.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../a.safetensors"}}))
    with pytest.raises(ConversionError, match="missing"):
        open_weights(tmp_path)


def test_a_folder_with_model_pt_is_that_file(tmp_path):
    write_torch_zip(tmp_path / "model.pt", tensors("a"))
    assert weight_files(tmp_path) == (tmp_path / "model.pt",)


def file_of(content):
    return lambda path: path.write_bytes(content)


def cut_torch(path):
    write_torch_zip(path, tensors("a"))
    path.write_bytes(path.read_bytes()[:-100])


def cut_safetensors(path):
    save_file(tensors("a"), path)
    path.write_bytes(path.read_bytes()[:-1])


def cut_safetensors_header(path):
    save_file(tensors("a"), path)
    path.write_bytes(path.read_bytes()[:20])


def plain_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")


def compressed_zip(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"x" * 1000)


def broken_pickle(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}q\x00X\xff")


def torch_script(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", b"")
        archive.writestr("m/constants.pkl", b"")


def quantised(path):
    header = json.dumps({"a": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")


def bad_header(entry):
    header = json.dumps({"a": entry}).encode()
    return file_of(len(header).to_bytes(8, "little") + header + b"\0" * 16)


def repeated_name(path):
    one = '"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}'
    header = f"{{{one}, {one}}}".encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")


LEGACY_HEAD = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03."  # of a real file

BAD_FILES = {
    "empty": (file_of(b""), "empty"),
    "text": (file_of(b"hello, this is no checkpoint"), "not a checkpoint"),
    "short": (file_of(b"abc"), "not a checkpoint"),
    "git lfs pointer": (file_of(b"version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    "legacy torch file": (file_of(LEGACY_HEAD), r"re-save it with PyTorch: torch\.save"),
    "truncated torch file": (cut_torch, "truncated"),
    "truncated safetensors": (cut_safetensors, "truncated at a"),
    "truncated safetensors header": (cut_safetensors_header, "truncated"),
    "zip of something else": (plain_zip, "not a PyTorch checkpoint"),
    "compressed zip": (compressed_zip, "compressed"),
    "broken pickle": (broken_pickle, "damaged, its pickle"),
    "TorchScript": (torch_script, "TorchScript"),
    "quantised": (quantised, "F8_E4M3"),
    "header of wrong size": (bad_header({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}), "damaged"),
    "header with negative offsets": (
        bad_header({"dtype": "U8", "shape": [2], "data_offsets": [-2, 0]}),
        "damaged",
    ),
    "header without dtype": (bad_header({"shape": [2]}), "damaged"),
    "repeated name": (repeated_name, "twice"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_bad_file_is_one_clear_line(tmp_path, kind):
    write, message = BAD_FILES[kind]
    write(tmp_path / "w.bin")
    with pytest.raises(ConversionError, match=message) as info:
        open_weights(tmp_path / "w.bin")
    assert len(str(info.value).splitlines()) == 1
    assert "w.bin" in str(info.value)


def test_a_missing_file_is_reported(tmp_path):
    with pytest.raises(ConversionError, match=r"nowhere\.pt: no such file"):
        open_weights(tmp_path / "nowhere.pt")


def test_every_truncation_of_a_torch_file_is_an_error_of_ours(tmp_path):
    whole = io.BytesIO()
    write_torch_zip(whole, tensors("a", "b"))
    data = whole.getvalue()
    for size in range(0, len(data) - 22, 37):  # the last 22 bytes are the directory's end record
        (tmp_path / "w.pt").write_bytes(data[:size])
        with pytest.raises(ConversionError):
            open_weights(tmp_path / "w.pt")


def test_a_wan_folder_is_found_in_both_layouts(tmp_path):
    wan = tmp_path / "wan"
    (wan / "google/umt5-xxl").mkdir(parents=True)
    for name in ("diffusion_pytorch_model.safetensors", "config.json", "Wan2.1_VAE.pth"):
        (wan / name).touch()
    found = find_wan_folder(wan, needed=("dit", "vae", "tokenizer"))
    assert found.config == wan / "config.json"
    assert found.parts == {
        "dit": wan,
        "vae": wan / "Wan2.1_VAE.pth",
        "tokenizer": wan / "google/umt5-xxl",
    }

    diffusers = tmp_path / "diffusers"
    for part in ("transformer", "vae", "text_encoder", "tokenizer"):
        (diffusers / part).mkdir(parents=True)
    (diffusers / "transformer/config.json").touch()
    found = find_wan_folder(diffusers)
    assert found.config == diffusers / "transformer/config.json"
    assert found.parts == {
        "dit": diffusers / "transformer",
        "vae": diffusers / "vae",
        "text": diffusers / "text_encoder",
        "tokenizer": diffusers / "tokenizer",
    }


def test_a_folder_of_something_else_is_refused(tmp_path):
    with pytest.raises(ConversionError, match=r"not a Wan2\.1 folder; expected"):
        find_wan_folder(tmp_path)
