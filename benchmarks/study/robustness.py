"""What people type that test sets do not have: scores of variants of a test set, made by rule, beside the clean ones.

    python benchmarks/study/robustness.py --models runs/small/model --test_file data/study/everyday/test.jsonl

The variants are those of `variants.py`. Each is compared, in the sentences that it changes, with these as they were.
`kept` is the share of translations that have the emoji, the name or the digits of their reference. Greedy, in PyTorch.
"""

import argparse
import re
from collections.abc import Callable
from pathlib import Path

from variants import EMOJI, NAMES, VARIANTS, Pair, joined

from rs_transformer.checkpoints import load_translator
from rs_transformer.decoding import DecodingArguments, translate
from rs_transformer.metrics import corpus_scores
from rs_transformer.utils.files import write_json
from rs_transformer.utils.tables import markdown_table
from rs_transformer.utils.text_files import read_columns


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["hub_cards/rs-marian-ja-en"], help="Folders.")
    parser.add_argument("--test_file", default="data/study/everyday/test.jsonl", help="Sentence pairs.")
    parser.add_argument("--source_lang", default="ja")
    parser.add_argument("--target_lang", default="en")
    parser.add_argument("--lowercase", action="store_true", help="The models write lower case: so are references.")
    parser.add_argument("--sentences", type=int, default=1000, help="How many of the pairs.")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="Longest translation.")
    parser.add_argument("--output", help="Where to write the figures as JSON.")
    args = parser.parse_args()
    languages = (args.source_lang, args.target_lang)
    columns = [("translation", language) for language in languages]
    pairs = [(str(source), str(target)) for source, target in read_columns(args.test_file, columns)][: args.sentences]
    if args.lowercase:
        pairs = [(source, target.lower()) for source, target in pairs]
    rows = []
    for folder in args.models:
        found = rows_of(Model(folder, args.max_new_tokens), pairs, languages)
        rows += [{"model": Path(folder).name} | row for row in found]
    print(markdown_table(list(rows[0]), [list(row.values()) for row in rows]))
    print(corpus_scores(["a"], ["a"], args.target_lang)["bleu_signature"])
    if args.output:
        write_json({"options": vars(args), "rows": rows}, args.output)


if __name__ == "__main__":
    main()
