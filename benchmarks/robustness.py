"""What people type that test sets do not have: scores of variants of a test set, made by rule, beside the clean ones.

    python benchmarks/robustness.py --models runs/small/model --test_file data/study/everyday/test.jsonl

Each variant changes source and reference alike, in the sentences that it can change, and is compared with these as
they were: without the full stop, in upper case, kana in half width, letters and digits in full width, with an emoji at
the end, with another name, with other digits, and two sentences in one line. `kept` is the share of translations that
have the emoji, the name or the digits of their reference. Greedy, in PyTorch.
"""

import re
import unicodedata
from collections.abc import Callable
from pathlib import Path

from common import parse_args, report

from rs_transformer.checkpoints import load_translator
from rs_transformer.decoding import DecodingArguments, translate
from rs_transformer.metrics import corpus_scores
from rs_transformer.utils.text_files import read_columns

Pair = tuple[str, str]
EMOJI = "😀"
# What is exchanged for what, by language; names are Tatoeba's most frequent, and others that are as well known.
NAMES = {
    "ja": {"トム": "ケンジ", "メアリー": "サラ", "ボブ": "ルイス", "ナンシー": "アンナ"},
    "en": {"Tom": "Kenji", "Mary": "Sarah", "Bob": "Louis", "Nancy": "Anna"},
}
FULL_STOPS = "。.．"
HALF_WIDTH = {unicodedata.normalize("NFKC", chr(code)): chr(code) for code in range(0xFF61, 0xFFA0)}
VOICED = {"\u3099": "ﾞ", "\u309a": "ﾟ"}
FULL_WIDTH = {code: code + 0xFEE0 for code in range(0x21, 0x7F) if chr(code).isalnum()}
DIGITS = str.maketrans("123456789", "234567891")


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
    for ours, theirs in zip(*(NAMES.get(language, {}).items() for language in languages), strict=True):
        if ours[0] in pair[0] and theirs[0] in pair[1]:
            return pair[0].replace(*ours), pair[1].replace(*theirs)
    return pair


def exchange_digits(pair: Pair, languages: Pair) -> Pair:
    """Other numbers; as it was unless both sides have the same ones."""
    numbers = [re.findall(r"[0-9]+", unicodedata.normalize("NFKC", text)) for text in pair]
    if not numbers[0] or sorted(numbers[0]) != sorted(numbers[1]):
        return pair
    return pair[0].translate(DIGITS).translate(_full(DIGITS)), pair[1].translate(DIGITS)


def _full(table: dict[int, int]) -> dict[int, int]:
    return {code + 0xFEE0: other + 0xFEE0 for code, other in table.items()}


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


def kept(variant: str, translations: list[str], changed: list[Pair]) -> str:
    """The share of translations that have what their reference must have; nothing where it must not."""
    needed: Callable[[str], list[str]] | None = {
        "an emoji": lambda text: [EMOJI],
        "another name": lambda text: [name for names in NAMES.values() for name in names.values() if name in text],
        "other digits": lambda text: re.findall(r"[0-9]+", text),
    }.get(variant)
    if needed is None:
        return ""
    pairs = zip(translations, changed, strict=True)
    found = [all(part in text for part in needed(reference)) for text, (_, reference) in pairs]
    return f"{sum(found) / len(found):.0%}"


def joined(pairs: list[Pair], languages: Pair) -> list[Pair]:
    """Two sentences each, as one writes them one after the other."""
    gaps = ["" if language == "ja" else " " for language in languages]
    sides = zip(pairs[::2], pairs[1::2], strict=False)
    return [(one[0] + gaps[0] + two[0], one[1] + gaps[1] + two[1]) for one, two in sides]


class Model:
    """A model that translates each text once."""

    def __init__(self, folder: str, max_new_tokens: int):
        self.model, self.tokenizer = load_translator(folder)
        self.decoding = DecodingArguments(num_beams=1, max_new_tokens=max_new_tokens)
        self.known: dict[str, str] = {}

    def translate(self, pairs: list[Pair]) -> list[str]:
        sources = [source for source, _ in pairs]
        missing = [source for source in dict.fromkeys(sources) if source not in self.known]
        self.known |= zip(missing, translate(self.model, self.tokenizer, missing, self.decoding), strict=True)
        return [self.known[source] for source in sources]


def rows_of(model: Model, pairs: list[Pair], languages: Pair) -> list[dict[str, object]]:
    """A row for the clean sentences, and one for each variant that changes any."""

    def bleu(translations: list[str], references: list[Pair]) -> str:
        score = corpus_scores(translations, [target for _, target in references], languages[1])["bleu"]
        return f"{score:.2f}"

    rows: list[dict[str, object]] = []

    def add(variant: str, clean: list[str], references: list[Pair], changed: list[Pair]) -> None:
        texts = model.translate(changed)
        rows.append({"variant": variant, "sentences": len(changed), "clean BLEU": bleu(clean, references)})
        rows[-1] |= {"BLEU": bleu(texts, changed), "kept": kept(variant, texts, changed)}

    clean = model.translate(pairs)
    add("clean", clean, pairs, pairs)
    for variant, change in VARIANTS.items():
        changed = [(pair, text, change(pair, languages)) for pair, text in zip(pairs, clean, strict=True)]
        if changed := [row for row in changed if row[2] != row[0]]:
            references, before, after = map(list, zip(*changed, strict=True))
            add(variant, before, references, after)
    separate = [f"{one} {two}" for one, two in zip(clean[::2], clean[1::2], strict=False)]
    two = joined(pairs, languages)
    add("two sentences in a line", separate, two, two)
    return rows


def main() -> None:
    args = parse_args(
        __doc__,
        models=(str, ["hub_cards/rs-marian-ja-en"], "Folders of models."),
        test_file=(str, "data/study/everyday/test.jsonl", "Sentence pairs."),
        source_lang=(str, "ja", "The models' source language."),
        target_lang=(str, "en", "Their target language."),
        lowercase=(int, 0, "1: the models write lower case, so compare with references in lower case."),
        sentences=(int, 1000, "How many of the pairs."),
        max_new_tokens=(int, 128, "Longest translation."),
        rounds=1,  # nothing is timed
    )
    languages = (args.source_lang, args.target_lang)
    columns = [("translation", language) for language in languages]
    pairs = [(str(source), str(target)) for source, target in read_columns(args.test_file, columns)][: args.sentences]
    if args.lowercase:
        pairs = [(source, target.lower()) for source, target in pairs]
    rows = []
    for folder in args.models:
        found = rows_of(Model(folder, args.max_new_tokens), pairs, languages)
        rows += [{"model": Path(folder).name} | row for row in found]
    report(rows, args, ratio="BLEU of the same sentences as they were, and changed")
    print(corpus_scores(["a"], ["a"], args.target_lang)["bleu_signature"])


if __name__ == "__main__":
    main()
