"""Phrasings: enough of them, each for one style, held-out ones new as a whole but made of known words."""

import re
from collections import defaultdict

import numpy as np
import pytest

from svd2_jax import shipped
from svd2_jax.errors import ConfigError
from svd2_jax.shipped import named_styles
from tiny_model.phrasings import all_text, phrasings, sample, telling_words
from tiny_model.styles import STYLES


def _plain(text: str) -> str:
    return text.lower().rstrip(".")


def _words(text: str) -> list[str]:
    return re.findall(r"[\w']+", text.lower())


@pytest.mark.parametrize("style", STYLES)
def test_each_style_has_many_phrasings(style: str):
    assert len(set(map(_plain, phrasings(style, "train")))) >= 60
    assert len(set(map(_plain, phrasings(style, "held_out")))) >= 15


@pytest.mark.parametrize("style", STYLES)
def test_no_held_out_phrasing_is_trained_on_in_any_writing(style: str):
    train = set(map(_plain, all_text("train")))
    assert not train & set(map(_plain, phrasings(style, "held_out")))


def test_every_phrasing_belongs_to_one_style():
    owners = defaultdict(set)
    for style in STYLES:
        for text in (*phrasings(style, "train"), *phrasings(style, "held_out")):
            owners[_plain(text)].add(style)
    assert {text: styles for text, styles in owners.items() if len(styles) > 1} == {}


def test_every_held_out_word_occurs_in_train():
    known = {word for text in all_text("train") for word in _words(text)}
    assert {word for text in all_text("held_out") for word in _words(text)} <= known


def test_phrasings_are_filled_in_and_tidy():
    for text in (*all_text("train"), *all_text("held_out")):
        assert text == " ".join(text.split())
        assert "{" not in text
        assert not re.search(r"\b(a|an|the) (a|an|the)\b|\ba [aeiou]", text.lower()), text


@pytest.mark.parametrize(
    ("style", "text"),
    [
        ("unchanged", "leave it as it is"),
        ("pencil_sketch", "pencil drawing of a harbour"),
        ("oil_painting", "turn it into an oil painting"),
        ("watercolour", "a watercolor painting"),
        ("neon_night", "cyberpunk"),
        ("winter", "a snowy winter day"),
        ("thermal", "thermal vision"),
        ("mosaic", "pixel art"),
        ("sepia", "an old sepia photograph"),
    ],
)
def test_common_prompts_are_among_them(style: str, text: str):
    assert text in (*phrasings(style, "train"), *phrasings(style, "held_out"))


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_samples_come_from_the_split_and_repeat_with_the_seed(split):
    first, second = (
        [sample("winter", split, rng) for _ in range(50)]
        for rng in (np.random.default_rng(5), np.random.default_rng(5))
    )
    assert first == second
    assert set(first) <= set(phrasings("winter", split))
    assert len(set(first)) > 20


def test_unknown_styles_and_splits_are_refused():
    with pytest.raises(ConfigError, match=r"no phrasings for style 'cubism'; known: unchanged, "):
        phrasings("cubism", "train")
    with pytest.raises(ConfigError, match=r"unknown split 'test'"):
        sample("winter", "test", np.random.default_rng(0))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("style", STYLES)
def test_every_phrasing_names_its_style(style: str):
    texts = (*phrasings(style, "train"), *phrasings(style, "held_out"))
    assert [text for text in texts if style not in named_styles(text)] == []


@pytest.mark.parametrize(
    ("prompt", "style"),
    [
        ("Cyberpunk!", "neon_night"),
        ("a watercolor", "watercolour"),
        ("VAN GOGH", "oil_painting"),
        ("sketches of my dog", "pencil_sketch"),
        ("make it old", "sepia"),  # known as a whole only
        ("leave it as it is", "unchanged"),
    ],
)
def test_other_words_name_a_style_too(prompt: str, style: str):
    assert style in named_styles(prompt)


@pytest.mark.parametrize(
    "prompt",
    [
        "make it anime",
        "turn it into Lego",
        "in the style of Picasso",
        "a cat in a city",
        "please, a bike",
        "x",
    ],
)
def test_words_that_all_styles_share_name_none(prompt: str):
    assert named_styles(prompt) == ()


def test_the_package_holds_the_words_of_these_phrasings():
    assert list(shipped.styles()) == list(STYLES)
    assert shipped.styles() == telling_words()


@pytest.mark.parametrize("style", STYLES)
def test_a_style_is_named_by_its_own_name(style: str):
    assert style in named_styles(style.replace("_", " "))
