"""Prompts for each look, as people type them: many to train on, others held out to see what was understood.

A look's phrasings come in three groups: short ones ("pencil drawing", "draw it in graphite"), orders ("turn it into
a pencil drawing") and subjects ("a pencil drawing of a harbour"). Orders and subjects are templates times what fills
them; every fifth combination is held out, so that a held-out phrasing is new as a whole while its words are not.
Held-out short phrasings are written by hand.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, product
from types import MappingProxyType
from typing import get_args

import numpy as np

from svd2_jax.dataset import Split
from svd2_jax.errors import ConfigError

HELD_OUT_EVERY = 5  # of the combinations of a template with what fills it
MOST_LOOKS = 5  # a word in the phrasings of more looks tells nothing about which one is meant
# Words that any prompt may have and that few looks have by chance ("show me where it is hot", "let it snow").
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


@dataclass(frozen=True)
class _Words:
    """What a look is called.

    Attributes:
      things: noun phrases with their article, for `ORDERS`; also used alone, with and without it.
      subjects: templates with "{subject}", for `SUBJECTS`.
      short: whole phrasings for training.
      held_out: whole phrasings that are held out, of words which occur in training.
    """

    things: tuple[str, ...]
    subjects: tuple[str, ...]
    short: tuple[str, ...]
    held_out: tuple[str, ...]


_WORDS: Mapping[str, _Words] = MappingProxyType(
    {
        "unchanged": _Words(
            things=(
                "the original video",
                "the original",
                "the original picture",
                "the real video",
                "a plain video",
                "the normal video",
            ),
            subjects=(
                "{subject}, unchanged",
                "{subject}, no effect",
                "{subject} as it is",
                "the original video of {subject}",
                "a plain video of {subject}",
                "{subject} in natural colours",
                "{subject} in natural colors",
            ),
            short=(
                "unchanged",
                "no change",
                "no changes",
                "no effect",
                "no effects",
                "no style",
                "no filter",
                "without any filter",
                "without effects",
                "leave it as it is",
                "leave it unchanged",
                "leave the video as it is",
                "leave the picture alone",
                "keep it as it is",
                "keep the video as it was",
                "keep everything the same",
                "keep the original",
                "do nothing",
                "do not change it",
                "don't change anything",
                "back to normal",
                "back to the original",
                "natural colours",
                "natural colors",
                "just the camera",
                "remove the filter",
                "turn the effect off",
                "as filmed",
            ),
            held_out=(
                "leave everything as it is",
                "keep it unchanged",
                "keep the picture as it was",
                "don't change the video",
                "without any effect",
                "back to the original video",
                "remove the effect",
                "turn the filter off",
            ),
        ),
        "pencil_sketch": _Words(
            things=(
                "a pencil sketch",
                "a pencil drawing",
                "a graphite drawing",
                "a graphite sketch",
                "a sketch",
                "a hand drawn sketch",
                "a charcoal drawing",
                "a black and white drawing",
            ),
            subjects=(
                "a pencil sketch of {subject}",
                "pencil drawing of {subject}",
                "a graphite drawing of {subject}",
                "a sketch of {subject}",
                "{subject} drawn in pencil",
                "{subject}, pencil on paper",
                "a quick drawing of {subject}",
            ),
            short=(
                "pencil",
                "graphite",
                "charcoal",
                "draw it in graphite",
                "draw it in pencil",
                "draw it with a pencil",
                "draw this with a soft pencil",
                "sketch it",
                "sketch this",
                "sketched in pencil",
                "drawn by hand",
                "hand drawn",
                "pencil on white paper",
                "pencil lines on paper",
                "soft grey pencil",
                "soft gray pencil strokes",
                "grey pencil strokes on white paper",
                "a page of my sketchbook",
                "an artist's sketchbook",
                "shaded with a pencil",
            ),
            held_out=(
                "draw this in pencil",
                "sketch this in graphite",
                "graphite on white paper",
                "soft pencil lines",
                "drawn with a soft pencil",
                "sketched by hand",
            ),
        ),
        "oil_painting": _Words(
            things=(
                "an oil painting",
                "a painting in oil",
                "a van Gogh",
                "a van Gogh painting",
                "an impressionist painting",
                "an old master painting",
                "an oil on canvas",
                "a Rembrandt",
            ),
            subjects=(
                "an oil painting of {subject}",
                "oil painting of {subject}",
                "{subject}, oil on canvas",
                "{subject} painted in oil",
                "{subject} by van Gogh",
                "{subject} painted by an old master",
                "an impressionist painting of {subject}",
            ),
            short=(
                "oil",
                "oil paint",
                "oils",
                "oil colours",
                "oil colors",
                "van Gogh",
                "Rembrandt",
                "impressionist",
                "make it look like van Gogh's brush",
                "in the style of van Gogh",
                "in the style of the old masters",
                "thick brush strokes",
                "thick paint on canvas",
                "paint it in oil",
                "paint this in oils",
                "paint it on canvas",
                "painted with a thick brush",
                "heavy brush strokes of oil paint",
                "a canvas in a museum",
                "rich oil colours on canvas",
            ),
            held_out=(
                "paint this in oil",
                "thick oil paint",
                "painted in oils on canvas",
                "van Gogh's brush strokes",
                "in the style of Rembrandt",
                "heavy oil paint on canvas",
            ),
        ),
        "watercolour": _Words(
            things=(
                "a watercolour painting",
                "a watercolor painting",
                "a watercolour",
                "a watercolor",
                "an aquarelle",
                "a soft watercolour sketch",
                "a pale watercolor wash",
            ),
            subjects=(
                "a watercolour of {subject}",
                "a watercolor of {subject}",
                "watercolour painting of {subject}",
                "watercolor painting of {subject}",
                "{subject} in watercolour",
                "{subject} painted in watercolor",
                "an aquarelle of {subject}",
            ),
            short=(
                "watercolours",
                "watercolors",
                "aquarelle style painting",
                "in watercolour",
                "in watercolor",
                "paint it in watercolour",
                "paint it in watercolor",
                "paint it with watercolours",
                "paint this with watercolors",
                "soft washes of colour",
                "soft washes of color",
                "pale washes on wet paper",
                "wet paint on wet paper",
                "light washes and white paper",
                "loose watercolour washes",
                "loose watercolor washes",
                "painted with water and a soft brush",
                "soft pastel watercolour",
                "delicate watercolor",
            ),
            held_out=(
                "paint this in watercolour",
                "paint this in watercolor",
                "delicate watercolour washes",
                "pale watercolours on white paper",
                "loose washes of colour",
                "soft pastel watercolor",
            ),
        ),
        "neon_night": _Words(
            things=(
                "a neon city at night",
                "a neon night",
                "a cyberpunk city",
                "a cyberpunk night",
                "a neon sign",
                "a glowing neon world",
                "a synthwave video",
            ),
            subjects=(
                "{subject} in neon lights",
                "{subject} in neon light at night",
                "a neon outline of {subject}",
                "cyberpunk picture of {subject}",
                "{subject}, cyberpunk",
                "{subject} glowing in the dark",
                "{subject} at night with neon signs",
            ),
            short=(
                "neon",
                "neon lights",
                "neon glow",
                "cyberpunk",
                "synthwave",
                "neon city at night",
                "city lights at night",
                "night club",
                "Tokyo at night",
                "Blade Runner",
                "like Blade Runner",
                "a night in Tokyo",
                "glowing magenta and cyan edges",
                "glowing edges in the dark",
                "pink and cyan neon in the dark",
                "neon outlines at night",
                "make it glow in the dark",
                "make it glow like neon",
                "dark city, neon signs",
                "neon signs in the rain",
                "light it with neon",
            ),
            held_out=(
                "neon signs at night",
                "glowing neon edges",
                "make it glow in neon lights",
                "cyberpunk city at night",
                "pink neon in the dark",
                "Tokyo in neon light",
            ),
        ),
        "sunset": _Words(
            things=(
                "a sunset",
                "a sunset scene",
                "a warm sunset",
                "an evening at sunset",
                "a golden hour video",
                "an orange evening",
                "a summer evening",
            ),
            subjects=(
                "{subject} at sunset",
                "{subject} at dusk",
                "{subject} in the golden hour",
                "{subject} in the evening sun",
                "sunset over {subject}",
                "{subject} under an orange sky",
                "{subject} in warm evening light",
            ),
            short=(
                "sunset",
                "at sunset",
                "at dusk",
                "dusk",
                "golden hour",
                "evening",
                "evening light",
                "evening sun",
                "warm evening light",
                "orange and purple sky",
                "an orange sky",
                "the sun is going down",
                "the sun goes down",
                "the last light of the day",
                "low sun in the evening",
                "light it like a sunset",
                "make the sun go down",
                "make it evening",
                "warm orange light",
                "a glowing red sky",
                "purple evening sky",
            ),
            held_out=(
                "warm sunset light",
                "the golden hour",
                "orange evening light",
                "the sun goes down at dusk",
                "a purple and orange sky",
                "low evening sun",
            ),
        ),
        "winter": _Words(
            things=(
                "a winter day",
                "a snowy winter day",
                "a winter scene",
                "a snowy scene",
                "a winter wonderland",
                "a cold day",
                "a frozen world",
            ),
            subjects=(
                "{subject} in winter",
                "{subject} in the snow",
                "{subject} on a snowy day",
                "{subject} covered in snow",
                "{subject} on a cold winter day",
                "winter picture of {subject}",
                "snow on {subject}",
            ),
            short=(
                "winter",
                "snow",
                "snowy",
                "frost",
                "ice",
                "in winter",
                "in the snow",
                "covered in snow",
                "covered in ice",
                "cover it in snow",
                "cover everything with snow",
                "let it snow",
                "make it snow",
                "make it winter",
                "make it cold",
                "fresh snow everywhere",
                "ice and snow",
                "white with snow",
                "cold blue winter light",
                "a frosty morning",
                "frozen and white",
                "deep winter",
                "Christmas snow",
            ),
            held_out=(
                "make everything snowy",
                "cover it in ice",
                "cold winter light",
                "fresh snow in winter",
                "snow everywhere",
                "a frosty winter morning",
            ),
        ),
        "thermal": _Words(
            things=(
                "a thermal image",
                "a thermal camera",
                "a heat camera",
                "a heat map",
                "a thermal video",
                "a thermal scan",
                "a picture of a heat camera",
            ),
            subjects=(
                "a thermal image of {subject}",
                "thermal camera view of {subject}",
                "{subject} in thermal vision",
                "{subject} seen by a heat camera",
                "heat map of {subject}",
                "{subject} through a thermal camera",
                "the heat of {subject}",
            ),
            short=(
                "thermal",
                "thermal vision",
                "thermal imaging",
                "thermal view",
                "thermal colours",
                "thermal colors",
                "heat vision",
                "heat",
                "Predator vision",
                "heat signature",
                "temperature map",
                "show the heat",
                "show the temperature",
                "show me where it is hot",
                "hot and cold colours",
                "hot and cold colors",
                "hot is yellow, cold is blue",
                "film it with a thermal camera",
                "seen by a thermal camera",
                "through a heat camera",
                "body heat",
            ),
            held_out=(
                "show the body heat",
                "film it with a heat camera",
                "seen through a thermal camera",
                "show me the temperature",
                "thermal heat vision",
                "heat camera view",
            ),
        ),
        "blueprint": _Words(
            things=(
                "a blueprint",
                "a technical drawing",
                "an architect's plan",
                "a construction plan",
                "a technical blueprint",
                "an engineering drawing",
                "a cyanotype plan",
            ),
            subjects=(
                "a blueprint of {subject}",
                "blueprint drawing of {subject}",
                "a technical drawing of {subject}",
                "an engineering drawing of {subject}",
                "{subject} as white lines on blue paper",
                "construction plan of {subject}",
                "{subject}, blueprint",
            ),
            short=(
                "technical",
                "blueprints",
                "architect's drawing",
                "draw it as a blueprint",
                "draw it like an architect",
                "draw the plans",
                "draw it in white lines on blue paper",
                "white lines on blue",
                "white lines on blue paper",
                "white ink on blue paper",
                "plans of an engineer",
                "engineer's plan",
                "technical plan",
                "construction lines",
                "a plan on blue grid paper",
                "blue grid paper",
                "the plans of a machine",
                "cyanotype",
                "an architect drew this",
            ),
            held_out=(
                "draw it like an engineer",
                "draw it as a technical plan",
                "white lines on grid paper",
                "architect's blueprint",
                "an engineer's blueprint",
                "white construction lines on blue",
            ),
        ),
        "comic": _Words(
            things=(
                "a comic book",
                "a comic",
                "a cartoon",
                "a comic strip",
                "a pop art print",
                "a graphic novel",
                "a page of a comic book",
                "an American comic",
            ),
            subjects=(
                "a comic of {subject}",
                "comic book drawing of {subject}",
                "a cartoon of {subject}",
                "pop art of {subject}",
                "{subject} in a comic book",
                "{subject} as pop art",
                "{subject} with bold black outlines",
            ),
            short=(
                "pop art",
                "comics",
                "comic book art",
                "cartoon",
                "Lichtenstein",
                "like Roy Lichtenstein",
                "in the style of Lichtenstein",
                "superhero comic",
                "bold black outlines",
                "bold outlines and flat colours",
                "bold outlines and flat colors",
                "flat colours with black outlines",
                "flat colors with black outlines",
                "halftone dots",
                "halftone print",
                "bright flat colours, printed dots",
                "printed comic",
                "ink it like a comic",
                "make it pop art",
                "draw a comic",
                "draw it as a cartoon",
            ),
            held_out=(
                "draw it as a comic",
                "ink it like a cartoon",
                "in the style of a comic book",
                "bold black outlines and halftone dots",
                "printed pop art",
                "superhero comic book",
            ),
        ),
        "mosaic": _Words(
            things=(
                "a mosaic",
                "a tile mosaic",
                "a Roman mosaic",
                "a pixel art picture",
                "a pixelated video",
                "a wall of tiles",
                "an 8 bit game",
            ),
            subjects=(
                "a mosaic of {subject}",
                "mosaic tiles showing {subject}",
                "{subject} made of tiles",
                "{subject} in pixel art",
                "pixel art of {subject}",
                "{subject} made of big pixels",
                "a Roman mosaic of {subject}",
            ),
            short=(
                "pixel art",
                "mosaic tiles",
                "tiles",
                "pixels",
                "pixelate it",
                "pixelate this",
                "pixelated",
                "big pixels",
                "big square pixels",
                "square tiles",
                "coloured tiles",
                "colored tiles",
                "made of tiles",
                "made of square blocks",
                "make it out of tiles",
                "build it out of blocks",
                "coloured stones on a Roman floor",
                "small square stones",
                "8 bit",
                "retro game pixels",
                "ceramic tiles",
            ),
            held_out=(
                "make it out of pixels",
                "build it out of tiles",
                "made of coloured tiles",
                "big square blocks",
                "retro pixel art",
                "small ceramic tiles",
            ),
        ),
        "sepia": _Words(
            things=(
                "an old sepia photograph",
                "a sepia photo",
                "an old photograph",
                "an old photo",
                "a vintage photograph",
                "an antique photograph",
                "a faded brown photo",
                "a sepia film",
            ),
            subjects=(
                "an old sepia photograph of {subject}",
                "sepia photo of {subject}",
                "an old photograph of {subject}",
                "{subject} in sepia",
                "{subject} a hundred years ago",
                "a vintage photo of {subject}",
                "{subject} in an old brown picture",
            ),
            short=(
                "sepia",
                "sepia tone",
                "sepia tones",
                "sepia toned",
                "vintage",
                "vintage photo",
                "old brown tones",
                "brown and faded",
                "faded photograph",
                "yellowed photograph",
                "a hundred years ago",
                "a hundred years old",
                "an old picture of my grandmother",
                "from an old family album",
                "as if from 1900",
                "in 1900",
                "make it old",
                "make it look old",
                "make it look a hundred years old",
                "nineteenth century photograph",
                "daguerreotype",
            ),
            held_out=(
                "make it sepia toned",
                "faded sepia tones",
                "a photograph from 1900",
                "an old family photograph",
                "a yellowed old photo",
                "make it look vintage",
            ),
        ),
        "infrared": _Words(
            things=(
                "an infrared photograph",
                "an infrared photo",
                "an infrared film",
                "a false colour picture",
                "a false color picture",
                "an infrared picture",
                "an Aerochrome film",
            ),
            subjects=(
                "an infrared photograph of {subject}",
                "infrared photo of {subject}",
                "{subject} in infrared",
                "{subject} on infrared film",
                "{subject} in false colours",
                "{subject} in false colors",
                "a pink infrared picture of {subject}",
            ),
            short=(
                "infrared",
                "infrared colours",
                "infrared colors",
                "false colour",
                "false color",
                "false colours",
                "false colors",
                "Aerochrome",
                "Kodak Aerochrome",
                "pink leaves",
                "pink trees",
                "pink trees under a dark sky",
                "pink leaves and a dark sky",
                "make the leaves pink",
                "make the trees pink",
                "shot on infrared film",
                "filmed in infrared",
                "infrared light",
                "a pink world",
                "a dream in pink",
                "false colour infrared",
                "false color infrared",
            ),
            held_out=(
                "shot on Aerochrome",
                "shot in infrared light",
                "filmed on infrared film",
                "pink infrared trees",
                "make the trees and leaves pink",
                "infrared in false colours",
            ),
        ),
    }
)
STYLES = tuple(look.replace("_", " ") for look in _WORDS if look != "unchanged")
"""What the looks that change a picture are called."""


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


def _split(text: str) -> tuple[str, ...]:
    """The words of a text in small letters."""
    return tuple(re.findall(r"[^\W_]+", text.lower()))


@lru_cache(maxsize=1)
def _vocabulary() -> tuple[dict[str, set[str]], dict[tuple[str, ...], str]]:
    """The looks that each telling word stands for, and the look of each phrasing."""
    shared = set(chain.from_iterable(map(_split, (GRAMMAR, *ORDERS, *SUBJECTS))))
    by_word: dict[str, set[str]] = {}
    by_phrasing: dict[tuple[str, ...], str] = {}
    for look, split in product(_WORDS, get_args(Split)):
        for words in map(_split, phrasings(look, split)):
            by_phrasing[words] = look
            for word in set(words) - shared:
                by_word.setdefault(word, set()).add(look)
    return {word: looks for word, looks in by_word.items() if len(looks) <= MOST_LOOKS}, by_phrasing


@lru_cache(maxsize=64)
def _groups(look: str, split: Split) -> tuple[tuple[str, ...], ...]:
    """Short phrasings, orders and subjects of a look."""
    if look not in _WORDS:
        raise ConfigError(f"no phrasings for look {look!r}; known: {', '.join(_WORDS)}")
    if split not in ("train", "held_out"):
        raise ConfigError(f"unknown split {split!r}; known: train, held_out")
    words = _WORDS[look]
    short = words.held_out
    if split == "train":
        short = (*words.short, *words.things, *map(_bare, words.things))
    orders = _combinations(ORDERS, [{"thing": thing, "bare": _bare(thing)} for thing in words.things], split)
    subjects = _combinations(words.subjects, [{"subject": subject} for subject in SUBJECTS], split)
    return tuple(_as_typed(group, split) for group in (short, orders, subjects))


def phrasings(look: str, split: Split) -> tuple[str, ...]:
    """All phrasings of `look` in `split`, always in the same order, none twice.

    Raises:
      ConfigError: the look or the split is unknown.
    """
    return tuple(dict.fromkeys(chain.from_iterable(_groups(look, split))))


def sample(look: str, split: Split, rng: np.random.Generator) -> str:
    """One phrasing of `look` in `split`: a group is drawn first, so that the few short ones are not rare.

    Raises:
      ConfigError: the look or the split is unknown.
    """
    groups = _groups(look, split)
    group = groups[rng.integers(len(groups))]
    return group[rng.integers(len(group))]


def named_looks(prompt: str) -> tuple[str, ...]:
    """The looks that `prompt` may ask for; empty if a model trained on these phrasings cannot know what it asks for.

    A word counts, in the plural too, if it is in the phrasings of few looks and not in the templates that all of them
    share. A whole phrasing counts even without such a word ("make it old").
    """
    by_word, by_phrasing = _vocabulary()
    words = _split(prompt)
    forms = {form for word in words for form in (word, word.removesuffix("s"), word.removesuffix("es"))}
    found = {by_phrasing.get(words)}.union(*(by_word.get(form, ()) for form in forms))
    return tuple(look for look in _WORDS if look in found)


def all_text(split: Split = "train") -> Iterator[str]:
    """Yields every phrasing of every look in `split`, to train a tokenizer on."""
    for look in _WORDS:
        yield from phrasings(look, split)
