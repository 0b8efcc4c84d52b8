import dataclasses

import ml_dtypes
import numpy as np
import pytest
import weight_shapes

from convert import wan_dit
from convert.conversion import read_leaf
from convert.rules import Rule, Table, audit, best_table, keep, strip_prefixes, transpose
from convert.source import MappedFile, Tensor, contiguous_strides
from svd2_jax.config import PRESETS, DiTConfig, preset
from svd2_jax.errors import ConversionError
from svd2_jax.models import dit

TINY = preset("golden").dit
WAN = Table(wan_dit.RULES, wan_dit.IGNORED)


@dataclasses.dataclass(frozen=True)
class Shape:
    shape: tuple[int, ...]
    dtype: np.dtype = dataclasses.field(default_factory=lambda: np.dtype(np.float32))


def tensors(shapes):
    return [(name, Shape(shape)) for name, shape in shapes.items()]


def problems(shapes, extra=(), cfg=TINY):
    return audit("w", WAN, [*tensors(shapes), *extra], dit.abstract_params(cfg))[1]


@pytest.mark.parametrize(
    "name",
    [
        "blocks.0.q.weight",
        "model.blocks.0.q.weight",
        "module.model.blocks.0.q.weight",
        "model._fsdp_wrapped_module.blocks.0._fsdp_wrapped_module.q.weight",
        "_fsdp_wrapped_module.blocks.0._checkpoint_wrapped_module.q._fsdp_wrapped_module.weight",
    ],
)
def test_wrappers_are_stripped_from_any_place_of_a_name(name):
    assert strip_prefixes(name) == "blocks.0.q.weight"


def test_a_name_that_only_resembles_a_wrapper_stays():
    assert strip_prefixes("supermodel.modules.weight") == "supermodel.modules.weight"


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_each_leaf_exactly_once_in_wans_names(name):
    cfg = preset(name).dit
    assert problems(weight_shapes.wan_dit(cfg), cfg=cfg) == []


def test_diffusers_names_give_the_same_leaves():
    shapes = weight_shapes.wan_dit(TINY)
    renamed = {weight_shapes.diffusers_name(name): shape for name, shape in shapes.items()}
    table = best_table((WAN, Table(wan_dit.DIFFUSERS_RULES)), list(renamed))
    assert table.rules == wan_dit.DIFFUSERS_RULES
    wan, _ = audit("w", WAN, tensors(shapes), dit.abstract_params(TINY))
    diffusers, found = audit("w", table, tensors(renamed), dit.abstract_params(TINY))
    assert found == []
    assert diffusers == wan


def test_all_kinds_of_problems_are_reported_at_once():
    shapes = weight_shapes.wan_dit(TINY)
    del shapes["blocks.2.norm3.bias"]
    shapes["blocks.1.ffn.0.weight"] = (7, 96)
    shapes["head.modulation"] = (2,)
    shapes["surprise"] = (1,)
    shapes["blocks.4.modulation"] = (1, 6, 96)
    found = problems(shapes, extra=[("patch_embedding.bias", Shape((96,)))])
    assert found == [
        "w: blocks.1.ffn.0.weight: expected (192, 96), got (7, 96)",
        "w: head.modulation: expected a tensor that gives (2, 96), got (2,)",
        "w: surprise: unknown, shape (1,)",
        "w: blocks.4.modulation: unknown, the model has no dit.block.004/modulation",
        "w: patch_embedding.bias: duplicate, patch_embedding.bias is dit.embed/patch/bias as well",
        "w: blocks.2.norm3.bias: missing, expected for dit.block.002/norm_cross/bias",
    ]


def test_a_transform_that_fails_on_the_shape_is_a_problem_not_a_crash():
    shapes = {**weight_shapes.wan_dit(TINY), "patch_embedding.weight": (96, 16)}
    assert problems(shapes) == [
        "w: patch_embedding.weight: expected a tensor that gives (64, 96), got (96, 16)"
    ]


def test_known_buffers_are_ignored_by_the_tables_list_only():
    shapes = {**weight_shapes.wan_dit(TINY), "freqs": (1024, 64)}
    assert problems(shapes) == []


@pytest.mark.parametrize("name", ["wan-1.3b", "wan-14b"])
def test_published_sizes_are_recognised_from_the_shapes_alone(name):
    assert wan_dit.infer_config(weight_shapes.wan_dit(preset(name).dit)) == preset(name).dit


def test_heads_come_from_the_config_file_of_either_layout():
    shapes = weight_shapes.wan_dit(TINY)
    wan = {"dim": 96, "num_heads": 3, "text_len": 16, "eps": 1e-6}
    assert wan_dit.infer_config(shapes, wan) == TINY
    diffusers = {"num_attention_heads": 3, "attention_head_dim": 32, "text_len": 16}
    assert wan_dit.infer_config(shapes, diffusers) == TINY


def test_unknown_heads_ask_for_the_config_file():
    with pytest.raises(ConversionError, match=r"width 96; give the folder with its config\.json"):
        wan_dit.infer_config(weight_shapes.wan_dit(TINY))


def test_another_size_than_the_config_file_says_names_the_preset():
    shapes = weight_shapes.wan_dit(preset("wan-14b").dit)
    with pytest.raises(ConversionError, match=r"width is 5120, .* says 1536; is this a wan-14b checkpoint\?"):
        wan_dit.infer_config(shapes, {"dim": 1536, "num_heads": 12})


def test_a_missing_last_block_shows_against_the_config_file():
    settings = {"num_heads": 3, "num_layers": 4}
    shapes = {n: s for n, s in weight_shapes.wan_dit(TINY).items() if not n.startswith("blocks.3.")}
    assert wan_dit.infer_config(shapes, settings).num_layers == 4


def test_a_stray_block_number_does_not_make_a_million_layers():
    shapes = {**weight_shapes.wan_dit(TINY), "blocks.9999999.modulation": (1, 6, 96)}
    assert wan_dit.infer_config(shapes, {"num_heads": 3}).num_layers == 10


def test_the_patch_kernel_flattens_time_height_width_channel():
    x = np.arange(2 * 3 * 1 * 2 * 2).reshape(2, 3, 1, 2, 2)
    kernel = wan_dit.patch_kernel(x)
    assert kernel.shape == (12, 2)
    # Row 5 is (pt 0, ph 0, pw 1, channel 2).
    assert kernel[5].tolist() == x[:, 2, 0, 0, 1].tolist()


def mapped(tmp_path, values):
    (tmp_path / "x.bin").write_bytes(values.tobytes())
    return Tensor(
        values.shape, values.dtype, MappedFile(tmp_path / "x.bin"), 0, contiguous_strides(values.shape)
    )


@pytest.mark.parametrize("transform", [keep, transpose])
def test_casting_rounds_to_nearest_and_is_the_same_in_pieces(tmp_path, monkeypatch, transform):
    values = np.random.default_rng(0).standard_normal((37, 19), np.float32)
    values[0, :3] = [1.00390625, 1.01171875, -1.00390625]  # halfway: to the even neighbour
    bfloat16 = np.dtype(ml_dtypes.bfloat16)
    monkeypatch.setattr("convert.conversion.CAST_PIECE_BYTES", 100)
    got = read_leaf(mapped(tmp_path, values), transform, bfloat16)
    np.testing.assert_array_equal(got, transform(values).astype(bfloat16))
    first = got.T[0] if transform is transpose else got[0]
    assert first[:3].astype(float).tolist() == [1.0, 1.015625, -1.0]


def test_a_leaf_of_the_wanted_dtype_is_not_copied(tmp_path):
    values = np.ones((4, 5), np.float32)
    leaf = read_leaf(mapped(tmp_path, values), transpose, np.dtype(np.float32))
    assert not leaf.flags.owndata
    assert leaf.shape == (5, 4)


def test_rules_fill_their_groups_into_the_target():
    rule = Rule(r"layer\.(?P<n>\d+)\.(?P<part>[qk])", "item.{n:03d}/attn/{part}")
    expected = {"item.007": {"attn": {"q": Shape((1,)), "k": Shape((1,))}}}
    items, found = audit("w", Table((rule,)), [("layer.7.q", Shape((1,)))], expected)
    assert [leaf.path for leaf in items["item.007"]] == [("attn", "q")]
    assert found == ["w: layer.7.k: missing, expected for item.007/attn/k"]


def test_the_config_of_an_odd_model_keeps_its_own_sizes():
    cfg = DiTConfig(
        dim=256, ffn_dim=512, num_heads=2, num_layers=3, text_dim=64, in_channels=4, out_channels=4
    )
    assert wan_dit.infer_config(weight_shapes.wan_dit(cfg)) == cfg
