"""Prompts to token ids: UMT5's tokenizer as its Hugging Face folder describes it, without transformers."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ftfy
import numpy as np
import tokenizers

from svd2_jax.errors import CheckpointError, ConfigError

TOKENIZER_FILE = "tokenizer.json"
# Where a folder names its special tokens; the later file fills what the earlier one lacks.
SPECIAL_TOKEN_FILES = ("tokenizer_config.json", "special_tokens_map.json")
BYTE_PAD, BYTE_END, BYTE_OFFSET = 0, 1, 3  # ids of the byte tokenizer, as in ByT5


def clean(text: str) -> str:
    """Returns the prompt with broken Unicode and (doubly escaped) HTML repaired and whitespace collapsed."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


class Tokenizer:
    """Turns prompts into ids and a mask of fixed length; see `from_folder` and `bytes_fallback`."""

    def __init__(self, encode: Callable[[str], Sequence[int]], end_id: int, pad_id: int, text_len: int):
        """Wraps `encode`, which returns the ids of a cleaned prompt without special tokens."""
        if text_len < 1:
            raise ConfigError(f"text_len must be at least 1, got {text_len}")
        self._encode = encode
        self.end_id = end_id
        self.pad_id = pad_id
        self.text_len = text_len

    @classmethod
    def from_folder(cls, path: str | Path, text_len: int) -> Tokenizer:
        """Returns the tokenizer of a Hugging Face folder such as Wan2.1's `google/umt5-xxl`.

        Args:
          path: folder with tokenizer.json and a file that names the end and padding tokens.
          text_len: length P of all results.

        Raises:
          CheckpointError: a file is missing or broken, or a special token is not in the vocabulary.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise CheckpointError(f"tokenizer folder {folder} does not exist")
        file = folder / TOKENIZER_FILE
        if not file.is_file():
            found = ", ".join(sorted(entry.name for entry in folder.iterdir())) or "nothing"
            raise CheckpointError(
                f"{folder} holds no {TOKENIZER_FILE} (found: {found}); download the whole folder"
            )
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the package raises bare Exception
            raise CheckpointError(f"{file} is not a tokenizer: {error}") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        names = _special_tokens(folder)
        ids = {}
        for role in ("eos_token", "pad_token"):
            if role not in names:
                raise CheckpointError(f"{folder}: none of {', '.join(SPECIAL_TOKEN_FILES)} names the {role}")
            ids[role] = tokenizer.token_to_id(names[role])
            if ids[role] is None:
                raise CheckpointError(f"{file}: the {role} {names[role]!r} is not in the vocabulary")

        def encode(text: str) -> Sequence[int]:
            return tokenizer.encode(text, add_special_tokens=False).ids

        return cls(encode, ids["eos_token"], ids["pad_token"], text_len)

    @classmethod
    def bytes_fallback(cls, text_len: int, vocab: int) -> Tokenizer:
        """Returns a tokenizer that needs no file, one token per UTF-8 byte, for models with random weights.

        Args:
          text_len: length P of all results.
          vocab: size of the vocabulary; bytes beyond it wrap around.

        Raises:
          ConfigError: the vocabulary has no room for any byte.
        """
        room = vocab - BYTE_OFFSET
        if room < 1:
            raise ConfigError(
                f"the byte tokenizer needs a vocabulary of more than {BYTE_OFFSET}, got {vocab}"
            )

        def encode(text: str) -> Sequence[int]:
            return [BYTE_OFFSET + byte % room for byte in text.encode()]

        return cls(encode, BYTE_END, BYTE_PAD, text_len)

    def __call__(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Returns (ids, mask), both int32 [B, P]: prompt, end token, padding; mask 1 up to the end token.

        A prompt that is too long loses its last tokens, never the end token.
        """
        ids = np.full((len(texts), self.text_len), self.pad_id, np.int32)
        mask = np.zeros((len(texts), self.text_len), np.int32)
        for row, text in enumerate(texts):
            tokens = [*list(self._encode(clean(text)))[: self.text_len - 1], self.end_id]
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = 1
        return ids, mask


def _special_tokens(folder: Path) -> dict[str, str]:
    """Returns the text of each named special token; a token is written as text or as {"content": text}."""
    names: dict[str, str] = {}
    for name in SPECIAL_TOKEN_FILES:
        file = folder / name
        if not file.is_file():
            continue
        try:
            values: Any = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{file} is not readable as JSON: {error}") from error
        if not isinstance(values, dict):
            raise CheckpointError(f"{file} must hold a JSON object, got {type(values).__name__}")
        for role, token in values.items():
            token = token.get("content") if isinstance(token, dict) else token
            if role.endswith("_token") and isinstance(token, str):
                names.setdefault(role, token)
    return names
