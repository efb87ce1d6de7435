"""What trimming the vocabulary saves at OPUS-MT's size: entries, and the files of the model and of CTranslate2.

    python benchmarks/trim.py --corpus data/*/train.jsonl --text data/tanaka/train.jsonl data/tatoeba/train.jsonl

The SentencePiece models are trained on the corpus; the weights are random, six layers a side in half precision, so
that nothing is said of translations (`tests/test_vocabulary.py` says what they are).
"""

import tempfile
import time
from pathlib import Path
from typing import Any

from common import build, parse_args, report

from rs_transformer.checkpoints import load_config
from rs_transformer.commands.collapse import CollapseArguments, collapse_checkpoint
from rs_transformer.commands.trim import TrimArguments, VocabularyArguments, trim_checkpoint
from rs_transformer.corpus import OptionalCorpusArguments, load_pairs
from rs_transformer.decoding import DecodingArguments
from rs_transformer.export.ctranslate2 import convert
from rs_transformer.tokenization import train_tokenizer


def write_parent(folder: Path, corpus: OptionalCorpusArguments, args: Any) -> None:
    """A stock Marian with the largest vocabulary that its corpus gives, or `--vocab_size` pieces a side."""
    pairs = load_pairs(args.corpus, corpus, "training", "corpus")
    sides = ([text for text in pairs[side] if text] for side in ("source", "target"))
    languages = {"source_lang": corpus.source_lang, "target_lang": corpus.target_lang}
    tokenizer = train_tokenizer(
        *sides, folder, vocab_size=args.vocab_size, character_coverage=args.character_coverage, **languages
    )
    (width,) = args.d_model
    build("Marian 6", width, args.seed, vocab_size=len(tokenizer)).half().save_pretrained(folder)


def sizes(system: str, folder: Path) -> dict[str, Any]:
    """A row of the table."""
    engine = folder.with_name(f"{folder.name}-int8")
    convert(str(folder), engine, "int8")
    files = {"model.safetensors, MB": folder / "model.safetensors", "CTranslate2 int8, MB": engine / "model.bin"}
    megabytes = {what: round(file.stat().st_size / 1e6, 1) for what, file in files.items()}
    return {"system": system, "entries": load_config(str(folder)).vocab_size, **megabytes}


def main() -> None:
    args = parse_args(
        __doc__,
        d_model=(int, [512], "Width; ffn is four times it."),
        corpus=(str, ["data/tanaka/train.jsonl"], "What the SentencePiece models are trained on."),
        text=(str, ["data/tanaka/train.jsonl"], "What the vocabulary is trimmed to."),
        vocab_size=(int, 32000, "Pieces of each side's SentencePiece model."),
        character_coverage=(float, 0.9995, "Share of the characters that get a piece."),
        max_vocabulary=(int, [8000], "Further rows with so many entries at most."),
        rounds=1,  # sizes of files
    )
    corpus = OptionalCorpusArguments("ja", "en")
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_parent(folder / "parent", corpus, args)
        rows.append(sizes("Marian 6", folder / "parent"))
        for most in (None, *args.max_vocabulary):
            text = VocabularyArguments(vocabulary_files=args.text, max_vocabulary=most)
            to = "the text" if most is None else f"at most {most:,}"
            trimmed = folder / f"trimmed-{most}"
            start = time.perf_counter()
            trim_checkpoint(TrimArguments(str(folder / "parent"), str(trimmed)), text, corpus)
            print(f"trimmed to {to} in {time.perf_counter() - start:.1f} s")
            rows.append(sizes(f"Marian 6, trimmed to {to}", trimmed))
            collapsed = folder / f"collapsed-{most}"
            options = CollapseArguments(str(folder / "parent"), str(collapsed))
            collapse_checkpoint(options, corpus, DecodingArguments(), text)
            rows.append(sizes(f"RS 1x6, trimmed to {to}", collapsed))
        options = CollapseArguments(str(folder / "parent"), str(folder / "collapsed"))
        collapse_checkpoint(options, corpus, DecodingArguments(), VocabularyArguments())
        rows.insert(1, sizes("RS 1x6", folder / "collapsed"))
    report(rows, args, ratio="sizes of files")


if __name__ == "__main__":
    main()
