"""CLIP as a judge, with models small enough to know their answers."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from tokenizers import Tokenizer, models, pre_tokenizers

from svd2_jax.errors import CheckpointError
from svd2_jax.evaluate import clip_model
from svd2_jax.evaluate.clip_model import ClipModel

RED, BLUE = (255, 0, 0), (0, 0, 255)


def save(path, name: str, inputs: list, output: str, nodes: list, constants: list) -> None:
    value = helper.make_tensor_value_info(output, TensorProto.FLOAT, [None, 3])
    graph = helper.make_graph(nodes, name, inputs, [value], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    onnx.save(model, path)


@pytest.fixture
def folder(tmp_path):
    """A model whose vector of a picture is its mean colour, normalised, and that knows two words for such vectors."""
    pixels = helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, [None, 3, 4, 4])
    mean = helper.make_node("ReduceMean", ["pixel_values"], ["image_embeds"], axes=[2, 3], keepdims=0)
    (tmp_path / "onnx").mkdir()
    save(tmp_path / "onnx" / "vision_model.onnx", "vision", [pixels], "image_embeds", [mean], [])
    unit = {name: (np.array(rgb) / 255 - clip_model.PIXEL_MEAN) / clip_model.PIXEL_STD
            for name, rgb in (("red", RED), ("blue", BLUE))}  # fmt: skip
    table = helper.make_tensor("table", TensorProto.FLOAT, [2, 3], [*unit["red"], *unit["blue"]])
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, [None, None])
    last = helper.make_tensor("last", TensorProto.INT64, [], [-1])
    words = [
        helper.make_node("Gather", ["table", "input_ids"], ["words"], axis=0),
        helper.make_node("Gather", ["words", "last"], ["text_embeds"], axis=1),
    ]
    save(tmp_path / "onnx" / "text_model.onnx", "text", [ids], "text_embeds", words, [table, last])
    tokenizer = Tokenizer(models.WordLevel({"red": 0, "blue": 1}, unk_token="red"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def clip(*colours: tuple[int, int, int]) -> np.ndarray:
    return np.stack([np.full((6, 10, 3), colour, np.uint8) for colour in colours])


def test_frames_of_the_prompts_colour_score_highest(folder):
    model = ClipModel(folder)
    right, wrong = model.scores(clip(RED, RED), "red"), model.scores(clip(RED, RED), "blue")
    assert right.prompt == pytest.approx(100.0, abs=1e-3)
    assert right.neighbours == pytest.approx(100.0, abs=1e-3)
    assert wrong.prompt < 50.0
    half = model.scores(clip(*[RED] * 9, *[BLUE] * 9), "red")  # more frames than one batch has
    assert half.prompt == pytest.approx((right.prompt + wrong.prompt) / 2, abs=1e-3)
    assert half.neighbours == pytest.approx((16 * 100.0 + wrong.prompt) / 17, abs=1e-3)


def test_only_the_square_in_the_middle_is_seen(folder):
    frames = clip(RED, RED)
    frames[:, :, :2] = frames[:, :, -2:] = BLUE
    assert ClipModel(folder).scores(frames, "red").prompt == pytest.approx(100.0, abs=0.5)


def test_what_is_missing_or_broken_is_named(folder):
    (folder / "tokenizer.json").rename(folder / "moved.json")
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json; expected CLIP exported to ONNX"):
        ClipModel(folder)
    (folder / "moved.json").rename(folder / "tokenizer.json")
    (folder / "onnx" / "vision_model.onnx").write_bytes(b"no model")
    with pytest.raises(CheckpointError, match="cannot be loaded as CLIP"):
        ClipModel(folder)


def test_a_model_without_projection_is_refused(folder):
    pixels = helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, [None, 3, 4, 4])
    mean = helper.make_node("ReduceMean", ["pixel_values"], ["pooled"], axes=[2, 3], keepdims=0)
    save(folder / "onnx" / "vision_model.onnx", "vision", [pixels], "pooled", [mean], [])
    with pytest.raises(CheckpointError, match="no output 'image_embeds'; export it with projection"):
        ClipModel(folder)
