"""What people type that a corpus does not have: variants of sentence pairs, made by rule, to test and to train with.

Each variant changes source and reference alike: without the full stop, in upper case, kana in half width, letters and
digits in full width, with an emoji at the end, with another name, with other digits, and two sentences in one line.
"""

import random
import re
import unicodedata
from collections.abc import Callable, Sequence

Pair = tuple[str, str]
EMOJI = "😀"
# To train with: others beside the one that is tested.
MORE_EMOJI = "😀😃😄😁😆😅😂🙂😉😊😍😘😎😢😭😡😱👍👎👏🙏💪❤💕✨🎉🔥🌸🍣🍺☕🎂🚗✈🏠📷🎵⚽🐱🐶"
# What is exchanged for what, by language: names that Tatoeba's sentences have, and others that are as well known.
NAMES = {
    "ja": {"トム": "ケンジ", "メアリー": "サラ"},
    "en": {"Tom": "Kenji", "Mary": "Sarah"},
}
FULL_STOPS = "。.．"
HALF_WIDTH = {unicodedata.normalize("NFKC", chr(code)): chr(code) for code in range(0xFF61, 0xFFA0)}
VOICED = {"\u3099": "ﾞ", "\u309a": "ﾟ"}
FULL_WIDTH = {code: code + 0xFEE0 for code in range(0x21, 0x7F) if chr(code).isalnum()}
DIGITS = str.maketrans("123456789１２３４５６７８９", "234567891２３４５６７８９１")


def half_width(text: str) -> str:
    """Katakana as people have typed it on old keyboards."""
    found = []
    for character in text:
        base, *marks = unicodedata.normalize("NFD", character)
        known = base in HALF_WIDTH and all(mark in VOICED for mark in marks)
        found.append("".join([HALF_WIDTH[base], *(VOICED[mark] for mark in marks)]) if known else character)
    return "".join(found)


def exchange_names(pair: Pair, languages: Pair) -> Pair:
    """The same sentence of somebody else; as it was unless both sides name the person."""
    if not NAMES.keys() >= set(languages):
        return pair
    for ours, theirs in zip(*(NAMES[language].items() for language in languages), strict=True):
        if all(name.search(text) for name, text in zip(map(_word, (ours[0], theirs[0])), pair, strict=True)):
            sides = zip(pair, (ours, theirs), strict=True)
            first, second = (_word(old).sub(new, text) for text, (old, new) in sides)
            return first, second
    return pair


def exchange_digits(pair: Pair, languages: Pair) -> Pair:
    """Other numbers; as it was unless both sides have the same ones."""
    numbers = [re.findall(r"[0-9]+", unicodedata.normalize("NFKC", text)) for text in pair]
    if not numbers[0] or sorted(numbers[0]) != sorted(numbers[1]):
        return pair
    if any(re.search(r"[0-9](st|nd|rd|th)\b", text) for text in pair):
        return pair
    first, second = (text.translate(DIGITS) for text in pair)
    return first, second


def _word(name: str) -> re.Pattern[str]:
    """A name as a word of its own; Japanese has no spaces."""
    return re.compile(rf"\b{name}\b" if name.isascii() else name)


def on_source(change: Callable[[str], str]) -> Callable[[Pair, Pair], Pair]:
    """A variant in which the reference stays."""
    return lambda pair, languages: (change(pair[0]), pair[1])


VARIANTS: dict[str, Callable[[Pair, Pair], Pair]] = {
    "no full stop": on_source(lambda text: text.rstrip(FULL_STOPS)),
    "upper case": on_source(str.upper),
    "half-width kana": on_source(half_width),
    "full-width letters and digits": on_source(lambda text: text.translate(FULL_WIDTH)),
    "an emoji": lambda pair, languages: (pair[0] + EMOJI, f"{pair[1]} {EMOJI}"),
    "another name": exchange_names,
    "other digits": exchange_digits,
}


def joined(pairs: list[Pair], languages: Pair) -> list[Pair]:
    """Two sentences each, as one writes them one after the other."""
    gaps = ["" if language == "ja" else " " for language in languages]
    sides = zip(pairs[::2], pairs[1::2], strict=False)
    return [(one[0] + gaps[0] + two[0], one[1] + gaps[1] + two[1]) for one, two in sides]


def augmented(pairs: Sequence[Pair], languages: Pair, seed: int) -> list[Pair]:
    """Pairs to train with beside the original ones: each variant of a twenty-fifth of them, and a tenth joined.

    Emoji are drawn from forty, names and digits are those of the rules.
    """
    draw = random.Random(seed)
    found: list[Pair] = []
    for variant, change in VARIANTS.items():
        for pair in draw.sample(list(pairs), len(pairs) // 25):
            changed = change(pair, languages)
            if variant == "an emoji":
                changed = (pair[0] + (emoji := draw.choice(MORE_EMOJI)), f"{pair[1]} {emoji}")
            if changed != pair:
                found.append(changed)
    return found + joined(draw.sample(list(pairs), len(pairs) // 5), languages)
