import dataclasses
import gc
import json
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from svd2_jax.config import preset
from svd2_jax.engine.checkpoint import FORMAT_VERSION, Checkpoint, CheckpointWriter, Manifest, SourceFile
from svd2_jax.errors import CheckpointError

ITEMS = {
    "dit.embed": {
        "patch": {"kernel": np.arange(32, dtype=np.float32).reshape(8, 4), "bias": np.ones(8, np.float32)}
    },
    "dit.head": {"modulation": np.full((8, 2), 1 + 2**-9, np.float32)},
}
MANIFEST = Manifest(preset("golden"), "float32", tuple(ITEMS), (SourceFile("model.pt", "ab" * 32),))


def write(path, items=ITEMS, manifest=MANIFEST):
    with CheckpointWriter(path) as writer:
        for name, tree in items.items():
            writer.write_item(name, tree)
        writer.finish(manifest)
    return path


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write(tmp_path_factory.mktemp("written") / "checkpoint")


def test_items_and_manifest_come_back(written):
    checkpoint = Checkpoint.open(written)
    assert checkpoint.manifest == MANIFEST
    for name, tree in ITEMS.items():
        jax.tree.map(np.testing.assert_array_equal, checkpoint.restore(name), tree)


def test_no_file_names_the_folder_that_it_was_written_in(written):
    folder = str(written.parent).encode()
    assert not [file for file in written.rglob("*") if file.is_file() and folder in file.read_bytes()]


def test_leaves_go_to_the_first_local_device_by_default(written):
    bias = Checkpoint.open(written).restore("dit.embed")["patch"]["bias"]
    assert bias.devices() == {jax.local_devices()[0]}


def test_leaves_go_straight_to_the_sharding_given(written):
    mesh = jax.make_mesh((len(jax.devices()),), ("x",))
    sharding = NamedSharding(mesh, PartitionSpec("x"))
    tree = Checkpoint.open(written).restore("dit.embed", sharding)
    for leaf in jax.tree.leaves(tree):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    np.testing.assert_array_equal(tree["patch"]["kernel"], ITEMS["dit.embed"]["patch"]["kernel"])


def test_a_tree_of_shardings_places_each_leaf(written):
    mesh = jax.make_mesh((len(jax.devices()),), ("x",))
    split, whole = NamedSharding(mesh, PartitionSpec("x")), NamedSharding(mesh, PartitionSpec())
    tree = Checkpoint.open(written).restore("dit.embed", {"patch": {"kernel": split, "bias": whole}})
    assert tree["patch"]["kernel"].sharding.is_equivalent_to(split, 2)
    assert tree["patch"]["bias"].sharding.is_equivalent_to(whole, 1)


def test_a_cast_while_reading_rounds_to_nearest(written):
    leaf = Checkpoint.open(written).restore("dit.head", dtype=jnp.bfloat16)["modulation"]
    assert leaf.dtype == jnp.bfloat16
    np.testing.assert_array_equal(leaf, ITEMS["dit.head"]["modulation"].astype(jnp.bfloat16))


def test_abstract_gives_shapes_and_dtypes_without_reading(written):
    tree = Checkpoint.open(written).abstract("dit.embed")
    assert tree["patch"]["kernel"] == jax.ShapeDtypeStruct((8, 4), jnp.float32)


def test_bfloat16_and_jax_arrays_and_transposed_views_are_written_as_they_are(tmp_path):
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    tree = {"view": values.T, "jax": jnp.ones(3), "bf16": values.astype(jnp.bfloat16)}
    path = write(tmp_path / "c", {"item": tree}, dataclasses.replace(MANIFEST, items=("item",)))
    got = Checkpoint.open(path).restore("item")
    assert got["bf16"].dtype == jnp.bfloat16
    jax.tree.map(np.testing.assert_array_equal, got, tree)


def test_a_leaf_larger_than_a_chunk_comes_back(tmp_path, monkeypatch):
    monkeypatch.setattr("svd2_jax.engine.checkpoint.CHUNK_BYTES", 1000)
    tree = {"kernel": np.random.default_rng(0).standard_normal((37, 53), np.float32)}
    path = write(tmp_path / "c", {"item": tree}, dataclasses.replace(MANIFEST, items=("item",)))
    np.testing.assert_array_equal(Checkpoint.open(path).restore("item")["kernel"], tree["kernel"])


def test_a_writer_that_never_finished_leaves_nothing(tmp_path):
    with CheckpointWriter(tmp_path / "c") as writer:
        writer.write_item("dit.head", ITEMS["dit.head"])
        assert [p.name.endswith(".partial") for p in tmp_path.iterdir()] == [True]
    assert list(tmp_path.iterdir()) == []


def test_a_writer_refuses_a_place_that_is_taken(tmp_path):
    (tmp_path / "c").write_text("mine")
    with pytest.raises(CheckpointError, match="exists; choose another place or remove it first"):
        CheckpointWriter(tmp_path / "c")


def test_the_tokenizer_folder_is_found_or_missed_clearly(tmp_path, written):
    (tmp_path / "tokenizer.json").write_text("{}")
    with CheckpointWriter(tmp_path / "c") as writer:
        writer.write_item("dit.head", ITEMS["dit.head"])
        writer.add_tokenizer({"tokenizer.json": tmp_path / "tokenizer.json"})
        writer.finish(dataclasses.replace(MANIFEST, items=("dit.head",)))
    assert (Checkpoint.open(tmp_path / "c").tokenizer_dir / "tokenizer.json").read_text() == "{}"
    with pytest.raises(CheckpointError, match="no tokenizer; convert again"):
        _ = Checkpoint.open(written).tokenizer_dir


def test_an_unknown_item_names_those_there_are(written):
    with pytest.raises(
        CheckpointError,
        match=r"holds no TAEHV decoder; use --decoder wan, or convert again with --taehv FILE",
    ):
        Checkpoint.open(written).restore("taehv")


def remove_item(folder):
    shutil.rmtree(folder / "dit.head")


def remove_manifest(folder):
    (folder / "manifest.json").unlink()


def edit_manifest(**changes):
    def edit(folder):
        path = folder / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


DAMAGES = {
    "item missing": (remove_item, r"incomplete, items are missing: dit\.head; convert again"),
    "manifest missing": (
        remove_manifest,
        r"no manifest\.json; not a converted checkpoint, or an interrupted",
    ),
    "manifest cut": (lambda folder: (folder / "manifest.json").write_text("{"), "not valid JSON"),
    "manifest of something else": (edit_manifest(format="tar"), "not the manifest"),
    "other version": (
        edit_manifest(format_version=FORMAT_VERSION + 1),
        "format version 2, .* reads version 1",
    ),
    "odd model": (edit_manifest(model={"name": "x"}), "damaged manifest"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_wrong_with_a_checkpoint_is_said_when_it_is_opened(tmp_path, written, damage):
    change, message = DAMAGES[damage]
    folder = shutil.copytree(written, tmp_path / "c")
    change(folder)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(folder)


def test_opening_nothing_or_a_file_says_how_to_convert(tmp_path):
    (tmp_path / "model.pt").write_text("")
    for name, message in (
        ("nowhere", "no such checkpoint"),
        ("model.pt", "a file, not a converted checkpoint"),
    ):
        with pytest.raises(CheckpointError, match=f"{message}; make one with: svd2 convert"):
            Checkpoint.open(tmp_path / name)


def test_a_damaged_item_is_an_error_of_ours(tmp_path, written):
    folder = shutil.copytree(written, tmp_path / "c")
    for data in (folder / "dit.head").rglob("d/*"):
        data.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"dit\.head is damaged .*; convert again"):
        Checkpoint.open(folder).restore("dit.head")


def test_a_damaged_item_leaves_no_reads_behind(golden_checkpoint, tmp_path):
    """Whatever was still reading would complain later, in the middle of something else."""
    copy = tmp_path / "copy"
    shutil.copytree(golden_checkpoint, copy)
    data = max((copy / "dit.block.001").rglob("d/*"), key=lambda file: file.stat().st_size)
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    complaints = []
    hook, sys.unraisablehook = sys.unraisablehook, complaints.append
    try:
        for _ in range(3):
            with pytest.raises(CheckpointError, match=r"dit\.block\.001 is damaged"):
                Checkpoint.open(copy).restore("dit.block.001")
            gc.collect()
    finally:
        sys.unraisablehook = hook
    assert not complaints
