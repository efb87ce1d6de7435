"""Tokenizers of every kind of SentencePiece model, as OPUS-MT has them: one vocabulary of two models."""

import json
from collections.abc import Callable
from pathlib import Path

import sentencepiece
from conftest import ROOT
from transformers import MarianTokenizer

from rs_transformer.corpus import CorpusArguments, load_split

EXCERPT = CorpusArguments("ja", "en", train_file=[str(ROOT / "training/data/tanaka-excerpt/train.jsonl")])
PAIRS = load_split(EXCERPT, "train").take(2000)
SIDES = {"source": PAIRS["source"][:], "target": PAIRS["target"][:]}
# SentencePiece models of every kind. A small coverage leaves rare characters without a piece.
KINDS = {
    "unigram": {},
    "unigram-unknown": {"character_coverage": 0.98},
    "unigram-bytes": {"byte_fallback": True, "character_coverage": 0.98, "vocab_size": 1550},
    "unigram-user": {"user_defined_symbols": ["て", "ing"]},
    "bpe": {"model_type": "bpe"},
    "bpe-bytes": {"model_type": "bpe", "byte_fallback": True, "character_coverage": 0.98, "vocab_size": 1550},
    "bpe-user": {"model_type": "bpe", "user_defined_symbols": ["て", "ing"]},
}


def make_tokenizer(kind: str, made_once: Callable[..., Path]) -> MarianTokenizer:
    """A tokenizer by the name of its kind."""
    return MarianTokenizer.from_pretrained(made_once(f"subwords-{kind}", lambda folder: write(folder, KINDS[kind])))


def write(folder, options):
    pieces = []
    for side, texts in SIDES.items():
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_prefix=str(folder / side),
            minloglevel=2,
            **{"vocab_size": 1300, **options},
        )
        (folder / f"{side}.model").rename(folder / f"{side}.spm")
        pieces += [line.split("\t")[0] for line in (folder / f"{side}.vocab").read_text().split("\n") if line]
    entries = dict.fromkeys(["</s>", "<unk>", *(piece for piece in pieces if piece != "<s>"), "<pad>"])
    (folder / "vocab.json").write_text(json.dumps({entry: index for index, entry in enumerate(entries)}))
