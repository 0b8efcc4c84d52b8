"""Whole conversions: the golden weights in the very layouts that users download, and their variants."""

import hashlib
import json
import shutil
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import weight_shapes
from safetensors.numpy import load_file, save_file
from torch_zip import write_torch_zip

from convert import convert_checkpoint
from convert.files import open_weights
from convert.source import Source
from svd2_jax.config import preset
from svd2_jax.engine.checkpoint import Checkpoint
from svd2_jax.models import dit, taehv, text_encoder, vae

GOLDENS = Path(__file__).parents[1] / "goldens"
GENERATOR = GOLDENS / "wan_causal/model.pt"
WAN = GOLDENS / "wan_models/Wan2.1-T2V-tiny"
TINY = preset("golden")


def weights(path):
    source: Source = open_weights(path)
    return {name.removeprefix("model."): np.array(t.view()) for name, t in source.tensors}


def items(path):
    checkpoint = Checkpoint.open(path)
    return {item: checkpoint.restore(item) for item in checkpoint.manifest.items}


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    out = tmp_path_factory.mktemp("golden") / "checkpoint"
    return convert_checkpoint(out=out, generator=GENERATOR, wan=WAN, dtype="float32", progress=False)


def test_the_golden_folder_gives_every_item_of_the_tiny_preset(converted):
    manifest = Checkpoint.open(converted).manifest
    expected = (
        dit.abstract_params(TINY.dit)
        | vae.abstract_params(TINY.vae)
        | text_encoder.abstract_params(TINY.text)
    )
    assert manifest.model == TINY
    assert set(manifest.items) == set(expected)
    got = items(converted)
    for item, tree in expected.items():
        assert jax.tree.map(lambda x: x.shape, got[item]) == jax.tree.map(lambda x: x.shape, tree)
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(got[item]))


def test_leaves_hold_the_source_values_in_our_order(converted):
    source = weights(GENERATOR)
    checkpoint = Checkpoint.open(converted)
    block = checkpoint.restore("dit.block.002")
    np.testing.assert_array_equal(block["mlp_up"]["kernel"], source["blocks.2.ffn.0.weight"].T)
    np.testing.assert_array_equal(block["self_attn"]["o"]["bias"], source["blocks.2.self_attn.o.bias"])
    np.testing.assert_array_equal(
        block["cross_attn"]["norm_k"]["scale"], source["blocks.2.cross_attn.norm_k.weight"]
    )
    np.testing.assert_array_equal(block["norm_cross"]["bias"], source["blocks.2.norm3.bias"])
    np.testing.assert_array_equal(block["modulation"], source["blocks.2.modulation"][0])
    patch = checkpoint.restore("dit.embed")["patch"]["kernel"]
    np.testing.assert_array_equal(
        patch.reshape(1, 2, 2, 16, 96), source["patch_embedding.weight"].transpose(2, 3, 4, 1, 0)
    )


def test_the_manifest_names_every_source_with_its_sha256(converted):
    manifest = Checkpoint.open(converted).manifest
    files = (GENERATOR, WAN / "Wan2.1_VAE.pth", WAN / "models_t5_umt5-xxl-enc-bf16.pth")
    assert [(s.file, s.sha256) for s in manifest.sources] == [
        (f.name, hashlib.sha256(f.read_bytes()).hexdigest()) for f in files
    ]


def test_the_tokenizer_is_copied(converted):
    folder = Checkpoint.open(converted).tokenizer_dir
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        assert (folder / name).read_bytes() == (WAN / "google/umt5-xxl" / name).read_bytes()


def test_bfloat16_is_the_default_and_is_the_rounded_float32(converted, tmp_path):
    out = convert_checkpoint(out=tmp_path / "c", vae=WAN / "Wan2.1_VAE.pth", progress=False)
    assert Checkpoint.open(out).manifest.dtype == "bfloat16"
    whole = Checkpoint.open(converted)
    want = {item: whole.restore(item) for item in ("vae.encoder", "vae.decoder")}
    assert_same(items(out), jax.tree.map(lambda x: x.astype(jnp.bfloat16), want))


def test_without_a_generator_the_base_model_is_used(tmp_path):
    out = convert_checkpoint(out=tmp_path / "c", wan=WAN, dtype="float32", progress=False)
    base = load_file(WAN / "diffusion_pytorch_model.safetensors")
    kernel = Checkpoint.open(out).restore("dit.block.001")["self_attn"]["q"]["kernel"]
    np.testing.assert_array_equal(kernel, base["blocks.1.self_attn.q.weight"].T)


def fsdp(name):
    return "model._fsdp_wrapped_module." + name.replace("blocks.1.", "blocks.1._fsdp_wrapped_module.")


LAYOUTS = {
    "generator_ema": lambda w: {"generator_ema": w, "step": 10},
    "state_dict": lambda w: {"state_dict": {f"module.model.{n}": v for n, v in w.items()}},
    "no top key": lambda w: w,
    "fsdp": lambda w: {"generator": {fsdp(n): v for n, v in w.items()}},
    "with a buffer": lambda w: {"generator": {**w, "freqs": np.zeros((4, 2))}},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_checkpoint_layout_gives_the_same_items(converted, tmp_path, layout):
    folder = tmp_path / "generator"
    folder.mkdir()
    write_torch_zip(folder / "model.pt", LAYOUTS[layout](weights(GENERATOR)))
    shutil.copyfile(WAN / "config.json", folder / "config.json")
    out = convert_checkpoint(out=tmp_path / "c", generator=folder, dtype="float32", progress=False)
    whole = Checkpoint.open(converted)
    assert_same(items(out), {item: whole.restore(item) for item in dit.abstract_params(TINY.dit)})


def test_a_sharded_diffusers_folder_gives_the_same_transformer(converted, tmp_path):
    folder = tmp_path / "diffusers/transformer"
    folder.mkdir(parents=True)
    renamed = {weight_shapes.diffusers_name(n): v for n, v in weights(GENERATOR).items()}
    names = sorted(renamed)
    stem = "diffusion_pytorch_model-{}-of-00002.safetensors"
    weight_map = {n: stem.format("00001" if i < 40 else "00002") for i, n in enumerate(names)}
    for shard in set(weight_map.values()):
        save_file({n: renamed[n] for n in names if weight_map[n] == shard}, folder / shard)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    settings = {"num_attention_heads": 3, "attention_head_dim": 32, "num_layers": 4, "text_len": 16}
    (folder / "config.json").write_text(json.dumps(settings))
    out = convert_checkpoint(
        out=tmp_path / "c",
        wan=tmp_path / "diffusers",
        vae=WAN / "Wan2.1_VAE.pth",
        text_encoder=WAN / "models_t5_umt5-xxl-enc-bf16.pth",
        tokenizer=WAN / "google/umt5-xxl",
        dtype="float32",
        progress=False,
    )
    manifest = Checkpoint.open(out).manifest
    assert manifest.model == TINY
    assert [s.file for s in manifest.sources[:2]] == [stem.format("00001"), stem.format("00002")]
    whole = Checkpoint.open(converted)
    assert_same(items(out), {item: whole.restore(item) for item in manifest.items})


def test_taehv_becomes_one_item_without_its_encoder(tmp_path):
    rules = taehv_weights()
    write_torch_zip(tmp_path / "taew2_1.pth", rules)
    out = convert_checkpoint(
        out=tmp_path / "c", taehv=tmp_path / "taew2_1.pth", dtype="float32", progress=False
    )
    checkpoint = Checkpoint.open(out)
    assert checkpoint.manifest.items == ("taehv",)
    tree = checkpoint.restore("taehv")
    expected = taehv.abstract_params(checkpoint.manifest.model.taehv)["taehv"]
    assert jax.tree.map(lambda x: x.shape, tree) == jax.tree.map(lambda x: x.shape, expected)
    np.testing.assert_array_equal(tree["conv_in"]["bias"], rules["decoder.1.bias"])


def taehv_weights():
    """Small values by name for a decoder of the published layout, plus an encoder tensor that is not used."""
    channels = (256, 128, 64, 64)
    shapes = {"encoder.0.weight": (8, 3, 3, 3), **weight_shapes.conv("decoder.1", channels[0], 16)}
    for stage, start in enumerate((3, 9, 15)):
        width, out = channels[stage], channels[stage + 1]
        for block in range(3):
            for layer, inp in ((0, 2 * width), (2, width), (4, width)):
                shapes |= weight_shapes.conv(f"decoder.{start + block}.conv.{layer}", width, inp)
        growth = 1 if stage == 0 else 2
        shapes[f"decoder.{start + 4}.conv.weight"] = (growth * width, width, 1, 1)
        shapes[f"decoder.{start + 5}.weight"] = (out, width, 3, 3)
    shapes |= weight_shapes.conv("decoder.22", 3, channels[3])
    rngs = {name: np.random.default_rng(zlib.crc32(name.encode())) for name in shapes}
    return {name: rngs[name].standard_normal(shape, np.float32) for name, shape in shapes.items()}


def test_single_parts_can_be_converted_alone(converted, tmp_path):
    out = convert_checkpoint(out=tmp_path / "c", vae=WAN / "Wan2.1_VAE.pth", dtype="float32", progress=False)
    checkpoint = Checkpoint.open(out)
    assert set(checkpoint.manifest.items) == {"vae.encoder", "vae.decoder"}
    assert checkpoint.manifest.model.vae == TINY.vae
    assert_same(checkpoint.restore("vae.decoder"), Checkpoint.open(converted).restore("vae.decoder"))


def test_nothing_but_the_checkpoint_is_left_beside_it(converted):
    assert [p.name for p in converted.parent.iterdir()] == ["checkpoint"]
