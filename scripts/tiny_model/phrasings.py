"""Prompts for each style, as people type them: many to train on, others held out to see what was understood.

A style's phrasings come in three groups: short ones ("pencil drawing", "draw it in graphite"), orders ("turn it into
a pencil drawing") and subjects ("a pencil drawing of a harbour"). Orders and subjects are templates times what fills
them; every fifth combination is held out, so that a held-out phrasing is new as a whole while its words are not.
Held-out short phrasings are written by hand.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import chain, product
from pathlib import Path
from typing import get_args

import numpy as np

from svd2_jax.errors import ConfigError
from svd2_jax.shipped import words_of
from tiny_model import Split

HELD_OUT_EVERY = 5  # of the combinations of a template with what fills it
MOST_STYLES = 5  # a word in the phrasings of more styles tells nothing about which one is meant
# Words that any prompt may have and that few styles have by chance ("show me where it is hot", "let it snow").
GRAMMAR = "any at do don from go goes going if just let off out over s t through under was where"

ORDERS = (
    "turn it into {thing}",
    "make it {thing}",
    "make it look like {thing}",
    "turn this into {thing}",
    "turn the video into {thing}",
    "show it as {thing}",
    "show me {thing}",
    "change it to {thing}",
    "change this into {thing}",
    "please make this look like {thing}",
    "I want {thing}",
    "as {thing}",
    "like {thing}",
    "everything like {thing}",
    "{bare} style",
    "{bare} look",
    "in {bare} style",
    "{bare}, please",
)
SUBJECTS = (
    "a street",
    "a cat",
    "people walking",
    "a harbour",
    "a harbor",
    "a city",
    "a mountain lake",
    "a face",
    "a flower",
    "a dog in the park",
    "a car",
    "two friends",
    "a house by the sea",
    "trees",
    "a woman",
    "a man on a bike",
    "a boat",
    "an old castle",
    "my room",
)


_WORDS: Mapping[str, Mapping[str, list[str]]] = tomllib.loads(
    Path(__file__).with_suffix(".toml").read_text(encoding="utf-8")
)


def _bare(thing: str) -> str:
    """`thing` without its article."""
    article, _, rest = thing.partition(" ")
    return rest if article in ("a", "an", "the") else thing


def _combinations(templates: Sequence[str], fillings: Sequence[Mapping[str, str]], split: Split) -> list[str]:
    """Templates filled, of one split: each template and each filling has phrasings in both."""
    return [
        template.format(**filling)
        for row, template in enumerate(templates)
        for column, filling in enumerate(fillings)
        if ((row + column) % HELD_OUT_EVERY == 0) == (split == "held_out")
    ]


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _as_typed(phrasings: Sequence[str], split: Split) -> tuple[str, ...]:
    """`phrasings` without repetitions, and for some of them how they look with capitals or a full stop.

    Held-out ones are not written all in capitals: a tokenizer that keeps them apart knows few such words.
    """
    unique = list(dict.fromkeys(phrasings))
    variants = [_capital(text) for text in unique[::3]]
    if split == "train":
        variants += [text.upper() for text in unique[1::9]] + [_capital(text) + "." for text in unique[2::9]]
    return tuple(dict.fromkeys(unique + variants))


@lru_cache(maxsize=64)
def _groups(style: str, split: Split) -> tuple[tuple[str, ...], ...]:
    """Short phrasings, orders and subjects of a style."""
    if style not in _WORDS:
        raise ConfigError(f"no phrasings for style {style!r}; known: {', '.join(_WORDS)}")
    if split not in ("train", "held_out"):
        raise ConfigError(f"unknown split {split!r}; known: train, held_out")
    words = _WORDS[style]
    short = words["held_out"]
    if split == "train":
        short = [*words["short"], *words["things"], *map(_bare, words["things"])]
    orders = _combinations(
        ORDERS, [{"thing": thing, "bare": _bare(thing)} for thing in words["things"]], split
    )
    subjects = _combinations(words["subjects"], [{"subject": subject} for subject in SUBJECTS], split)
    return tuple(_as_typed(group, split) for group in (short, orders, subjects))


def phrasings(style: str, split: Split) -> tuple[str, ...]:
    """All phrasings of `style` in `split`, always in the same order, none twice.

    Raises:
      ConfigError: the style or the split is unknown.
    """
    return tuple(dict.fromkeys(chain.from_iterable(_groups(style, split))))


def sample(style: str, split: Split, rng: np.random.Generator) -> str:
    """One phrasing of `style` in `split`: a group is drawn first, so that the few short ones are not rare.

    Raises:
      ConfigError: the style or the split is unknown.
    """
    groups = _groups(style, split)
    group = groups[rng.integers(len(groups))]
    return group[rng.integers(len(group))]


def telling_words() -> dict[str, list[str]]:
    """What asks for each style, in alphabetical order: words, and whole phrasings that hold none ("make it old").

    A word is telling if it is in the phrasings of few styles and not in the templates that all of them share.
    """
    shared = set(chain.from_iterable(map(words_of, (GRAMMAR, *ORDERS, *SUBJECTS))))
    by_word: dict[str, set[str]] = {}
    by_phrasing: dict[tuple[str, ...], str] = {}
    for style, split in product(_WORDS, get_args(Split)):
        for words in map(words_of, phrasings(style, split)):
            by_phrasing[words] = style
            for word in set(words) - shared:
                by_word.setdefault(word, set()).add(style)
    found: dict[str, set[str]] = {style: set() for style in _WORDS}
    for word, styles in by_word.items():
        if len(styles) <= MOST_STYLES:
            for style in styles:
                found[style].add(word)
    telling = set().union(*found.values())
    for words, style in by_phrasing.items():
        if telling.isdisjoint(words):
            found[style].add(" ".join(words))
    return {style: sorted(texts) for style, texts in found.items()}


def all_text(split: Split = "train") -> Iterator[str]:
    """Yields every phrasing of every style in `split`, to train a tokenizer on."""
    for style in _WORDS:
        yield from phrasings(style, split)
