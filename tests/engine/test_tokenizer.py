import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from svd2_jax.engine.tokenizer import Tokenizer, clean
from svd2_jax.errors import CheckpointError, ConfigError

GOLDENS = Path(__file__).parents[1] / "goldens"
FOLDER = GOLDENS / "wan_models" / "Wan2.1-T2V-tiny" / "google" / "umt5-xxl"


@pytest.fixture
def folder(tmp_path):
    """A copy to break."""
    return Path(shutil.copytree(FOLDER, tmp_path / "tokenizer"))


def test_ids_and_mask_equal_the_reference():
    golden = np.load(GOLDENS / "umt5.npz")
    prompts = json.loads((GOLDENS / "prompts.json").read_text(encoding="utf-8"))
    ids, mask = Tokenizer.from_folder(FOLDER, 16)(prompts)
    np.testing.assert_array_equal(ids, golden["ids"])
    np.testing.assert_array_equal(mask, golden["mask"])
    assert ids.dtype == mask.dtype == np.int32


def test_a_prompt_that_is_too_long_keeps_the_end_token():
    tokenizer = Tokenizer.from_folder(FOLDER, 8)
    ids, mask = tokenizer(["vivid colours " * 50])
    assert ids[0, -1] == tokenizer.end_id
    assert mask.tolist() == [[1] * 8]


def test_an_empty_prompt_is_the_end_token_alone():
    tokenizer = Tokenizer.from_folder(FOLDER, 4)
    ids, mask = tokenizer([""])
    assert ids.tolist() == [[tokenizer.end_id, *[tokenizer.pad_id] * 3]]
    assert mask.tolist() == [[1, 0, 0, 0]]


def test_prompts_are_cleaned_of_html_whitespace_and_broken_unicode():
    assert clean("  a\n\t b &amp;amp; c  ") == "a b & c"
    assert clean("cafÃ©") == "café"


def test_special_tokens_may_be_written_as_objects(folder):
    (folder / "special_tokens_map.json").unlink()
    config = {"eos_token": {"content": "</s>"}, "pad_token": {"content": "<pad>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.from_folder(folder, 4)
    assert (tokenizer.pad_id, tokenizer.end_id) == (0, 1)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        Tokenizer.from_folder(tmp_path / "nowhere", 8)


def test_a_missing_tokenizer_file_is_named_beside_what_is_there(folder):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json \(found: special_tokens_map\.json"):
        Tokenizer.from_folder(folder, 8)


def test_a_broken_tokenizer_file_is_named(folder):
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not a tokenizer"):
        Tokenizer.from_folder(folder, 8)


def test_broken_special_tokens_are_named(folder):
    (folder / "special_tokens_map.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"special_tokens_map\.json is not readable as JSON"):
        Tokenizer.from_folder(folder, 8)


def test_a_folder_without_an_end_token_is_refused(folder):
    (folder / "special_tokens_map.json").unlink()
    (folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="eos_token"):
        Tokenizer.from_folder(folder, 8)


def test_a_special_token_outside_the_vocabulary_is_refused(folder):
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<nowhere>", "pad_token": "<pad>"})
    )
    with pytest.raises(CheckpointError, match="<nowhere>"):
        Tokenizer.from_folder(folder, 8)


def test_the_byte_tokenizer_needs_no_file():
    ids, mask = Tokenizer.bytes_fallback(6, vocab=300)(["Ab", "a longer one"])
    assert ids.tolist()[0] == [ord("A") + 3, ord("b") + 3, 1, 0, 0, 0]
    assert mask.tolist() == [[1, 1, 1, 0, 0, 0], [1] * 6]
    assert ids[1, -1] == 1


def test_the_byte_tokenizer_stays_inside_a_small_vocabulary():
    ids, _ = Tokenizer.bytes_fallback(12, vocab=20)(["油画 city"])
    assert ids.max() < 20
    with pytest.raises(ConfigError, match="vocabulary"):
        Tokenizer.bytes_fallback(8, vocab=3)


def test_a_length_of_zero_is_refused():
    with pytest.raises(ConfigError, match="text_len"):
        Tokenizer.bytes_fallback(0, vocab=300)
