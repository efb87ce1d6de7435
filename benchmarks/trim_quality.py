"""What trimming the vocabulary costs a trained model: the translations that stay, BLEU, and the files.

    python benchmarks/study/run.py benchmarks/study/mixed.yaml
    python benchmarks/trim_quality.py --model runs/study/mixed/elastic_own-1/train \\
        --text data/tanaka/train.jsonl data/tatoeba/train.jsonl --test_file data/tatoeba/test.jsonl

Greedily, without further training. A sentence is whole if all its pieces, and those of the parent's translation, stay;
such translations must be the parent's. BLEU is told of the whole ones and of the others, parent's and trimmed model's;
tokens are those of the test sources and references.
"""

import tempfile
from pathlib import Path

from common import parse_args, report
from transformers import MarianTokenizer

from rs_transformer.checkpoints import load_translator
from rs_transformer.commands.trim import TrimArguments, VocabularyArguments, trim_checkpoint
from rs_transformer.corpus import OptionalCorpusArguments
from rs_transformer.decoding import DecodingArguments, translate
from rs_transformer.export.ctranslate2 import convert
from rs_transformer.metrics import corpus_scores
from rs_transformer.tokenization import count_tokens, encode
from rs_transformer.utils.text_files import read_columns

DECODING = DecodingArguments(num_beams=1, max_new_tokens=128)


def int8_megabytes(model: str, folder: Path) -> float:
    convert(model, folder, "int8")
    return (folder / "model.bin").stat().st_size / 1e6


def bleu(translations: list[str], references: list[str], rows: list[int], language: str) -> float | None:
    if not rows:
        return None
    found = corpus_scores([translations[row] for row in rows], [references[row] for row in rows], language)
    return round(found["bleu"], 2)


def lengths(tokenizer: MarianTokenizer, sources: list[str], references: list[str]) -> dict[str, int]:
    """How many tokens the test set has."""
    return {
        "source tokens": count_tokens(tokenizer, sources).total(),
        "target tokens": count_tokens(tokenizer, references, target=True).total(),
    }


def main() -> None:
    args = parse_args(
        __doc__,
        model=(str, "hub_cards/marian-ja-en", "A trained model's folder."),
        text=(str, ["data/tanaka/train.jsonl"], "What the vocabulary is trimmed to."),
        test_file=(str, ["data/tatoeba/test.jsonl"], "Pairs that are translated."),
        lowercase=(int, 0, "1: the model writes lower case, so compare with references in lower case."),
        max_vocabulary=(int, [8000], "Further rows with so many entries at most."),
        source_lang=(str, "ja", "The model's source language."),
        target_lang=(str, "en", "Its target language."),
        rounds=1,  # nothing is timed
    )
    corpus = OptionalCorpusArguments(args.source_lang, args.target_lang)
    columns = [("translation", args.source_lang), ("translation", args.target_lang)]
    pairs = [row for file in args.test_file for row in read_columns(file, columns)]
    sources = [str(source) for source, _ in pairs]
    references = [str(target).lower() if args.lowercase else str(target) for _, target in pairs]
    model, tokenizer = load_translator(args.model)
    before = translate(model, tokenizer, sources, DECODING)
    ids = [encode(tokenizer, texts, target=bool(side)) for side, texts in enumerate((sources, before))]
    pieces = [set(tokenizer.convert_ids_to_tokens([*source, *target])) for source, target in zip(*ids, strict=True)]
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        size = int8_megabytes(args.model, Path(temporary, "parent-int8"))
        rows.append({"trimmed to": "", "entries": len(tokenizer), "int8 MB": round(size, 2)})
        rows[0] |= lengths(tokenizer, sources, references)
        rows[0]["BLEU"] = bleu(before, references, list(range(len(sources))), args.target_lang)
        for most in (None, *args.max_vocabulary):
            folder = str(Path(temporary, f"trimmed-{most}"))
            text = VocabularyArguments(vocabulary_files=args.text, max_vocabulary=most)
            trim_checkpoint(TrimArguments(args.model, folder), text, corpus)
            model, trimmed = load_translator(folder)
            after = translate(model, trimmed, sources, DECODING)
            kept = set(trimmed.get_vocab())
            whole = [row for row in range(len(sources)) if pieces[row] <= kept]
            others = [row for row in range(len(sources)) if not pieces[row] <= kept]
            rows.append(
                {
                    "trimmed to": "the text" if most is None else f"{most:,} at most",
                    "entries": len(trimmed),
                    "int8 MB": round(int8_megabytes(folder, Path(f"{folder}-int8")), 2),
                    **lengths(trimmed, sources, references),
                    "BLEU": bleu(after, references, list(range(len(sources))), args.target_lang),
                    "whole": len(whole),
                    "of these the same": sum(before[row] == after[row] for row in whole),
                    "others": len(others),
                    "BLEU of others before": bleu(before, references, others, args.target_lang),
                    "and after": bleu(after, references, others, args.target_lang),
                }
            )
    columns = list(rows[-1])
    rows = [{column: row.get(column, "") for column in columns} for row in rows]
    report(rows, args, ratio="translations of a trained model")


if __name__ == "__main__":
    main()
