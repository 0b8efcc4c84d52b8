"""What comes with the package: a small trained model, the words that it knows, and a clip to try it on."""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from svd2_jax.errors import ConfigError

ASSETS = Path(__file__).parent / "assets"
TINY = "tiny"
TINY_LEAST_NOISE = 0.3  # noise scale, of those that it was trained with (tiny_model.denoiser)
STYLES = ASSETS / "styles.json"  # style -> what asks for it; written by scripts/train_tiny.py
UNCHANGED = "unchanged"  # the style that changes nothing
DEMO_CLIP = ASSETS / "demo.mp4"
RANDOM = "random:"


def checkpoint_folder(name: str | os.PathLike[str]) -> Path:
    """Returns the folder of a checkpoint: "tiny" is the model that comes with the package, all else is a path.

    Raises:
      ConfigError: it is empty.
    """
    if not os.fspath(name):
        raise ConfigError(f"the checkpoint's name is empty, got {name!r}; give its folder, or {TINY!r}")
    return ASSETS / TINY if name == TINY else Path(name)


def random_preset(name: str | os.PathLike[str]) -> str | None:
    """Returns PRESET of "random:PRESET", which stands for random weights in its sizes; None for all else."""
    text = os.fspath(name)
    return text.removeprefix(RANDOM) if text.startswith(RANDOM) else None


def words_of(text: str) -> tuple[str, ...]:
    """Returns the words of a text in small letters, without punctuation."""
    return tuple(re.findall(r"[^\W_]+", text.lower()))


@functools.cache
def styles() -> Mapping[str, Sequence[str]]:
    """Returns what asks for each style of the small model: words, and a few whole prompts."""
    return json.loads(STYLES.read_text(encoding="utf-8"))


def named_styles(prompt: str) -> tuple[str, ...]:
    """Returns the styles that a prompt may ask for; empty if the small model cannot know what it asks for.

    A word counts in the plural too. One word may name several styles: "paint" is of oil and of water colours.
    """
    words = words_of(prompt)
    asked = {form for word in words for form in (word, word.removesuffix("s"), word.removesuffix("es"))}
    asked.add(" ".join(words))
    return tuple(style for style, texts in styles().items() if not asked.isdisjoint(texts))
