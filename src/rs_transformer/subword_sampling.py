"""Subword regularization: a text segmented by chance, so that a model sees other pieces of it each time.

SentencePiece draws too, but, from 0.2.2 on, others in each process, whatever the seed. Here a seed gives the same
everywhere, so that a run that is resumed, or shared out over processes, goes on as it would have.
"""

import math
import random
import re
from collections.abc import Sequence
from itertools import groupby, pairwise
from typing import Any

from sentencepiece import SentencePieceProcessor
from transformers import MarianTokenizer, PreTrainedTokenizerBase

from .tokenization import encode
from .utils.sentencepiece_model import PIECES, USER_DEFINED, read_fields, read_piece

N_BEST = 64  # segmentations that a unigram model's are drawn from, as in Kudo 2018


class SubwordSampler:
    """Encodes texts as a tokenizer does, in segmentations that are drawn.

    Of a unigram model one of the 64 best, by its probability to the power of alpha (Kudo 2018,
    https://arxiv.org/abs/1804.10959); of a BPE model the one that is left when each merge is passed over with
    probability alpha (BPE-dropout, Provilkov et al. 2020, https://arxiv.org/abs/1910.13267).

    Args:
        tokenizer: a `MarianTokenizer`; it is not changed.
        alpha: above 0, at most 1; 0.1 is usual of both kinds. Of a unigram model the smaller it is, the less likely
            is the best segmentation; of a BPE model the larger.

    Raises:
        ValueError: it is no `MarianTokenizer`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, alpha: float):
        if not isinstance(tokenizer, MarianTokenizer):
            raise ValueError(f"subword_sampling needs a MarianTokenizer, got a {type(tokenizer).__name__}")
        self.tokenizer, self.alpha = tokenizer, alpha
        self._random = random.Random()
        self._drawing = object.__new__(type(tokenizer))  # `copy` would read the tokenizer's files again
        vars(self._drawing).update(vars(tokenizer))
        for side in ("spm_source", "spm_target"):
            processor = getattr(self._drawing, side)
            setattr(self._drawing, side, _DrawingProcessor(processor, alpha, self._random))
        self._drawing.current_spm = self._drawing.spm_source

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.tokenizer, self.alpha)  # a tokenizer alone would forget what draws

    def encode(self, texts: Sequence[str], seed: int, *, target: bool = False) -> list[list[int]]:
        """As `tokenization.encode`; the same texts and seed give the same ids in every process."""
        self._random.seed(seed)
        return encode(self._drawing, texts, target=target)


class _DrawingProcessor:
    """A SentencePiece model in the place of which it stands in a tokenizer, for what that calls."""

    def __init__(self, processor: SentencePieceProcessor, alpha: float, generator: random.Random):
        self.processor, self.alpha, self.random = processor, alpha, generator
        self.pieces = {processor.id_to_piece(index): index for index in range(processor.get_piece_size())}
        self.scores = {piece: processor.get_score(index) for piece, index in self.pieces.items()}
        model = list(read_fields(processor.serialized_model_proto()))
        read = [read_piece(value) for number, value, _ in model if number == PIECES]
        # What the user defined is one symbol, whatever it is made of.
        self.whole = {text for text, _, kind in read if kind == USER_DEFINED}
        longest_first = sorted(self.whole, key=len, reverse=True)
        self.symbol = re.compile("|".join([*map(re.escape, longest_first), "."]), re.DOTALL)
        self.worst = min(self.scores.values()) - 10  # of an unknown piece, as in SentencePiece
        try:
            self.is_unigram = bool(processor.nbest_encode("a", nbest_size=2, out_type=str))
        except RuntimeError:
            self.is_unigram = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.processor, name)

    def encode(self, text: str, out_type: type = str) -> list[str]:
        return self._draw_best(text) if self.is_unigram else self._leave_merges_out(text)

    def _draw_best(self, text: str) -> list[str]:
        best = self.processor.nbest_encode(text, nbest_size=N_BEST, out_type=str)
        if not best:  # an empty text
            return []
        scores = [sum(self.scores.get(piece, self.worst) for piece in pieces) for pieces in best]
        weights = [math.exp(self.alpha * (score - scores[0])) for score in scores]
        return self.random.choices(best, weights)[0]

    def _leave_merges_out(self, text: str) -> list[str]:
        symbols = self.symbol.findall(self.processor.normalize(text))
        while True:
            merges = [
                (self.scores[pair], -left, pair)
                for left, parts in enumerate(pairwise(symbols))
                if (pair := "".join(parts)) in self.pieces
                and self.whole.isdisjoint(parts)
                and self.random.random() >= self.alpha
            ]
            if not merges:
                break
            _, left, pair = max(merges)
            symbols[-left : 2 - left] = [pair]
        kinds = groupby(symbols, key=self.pieces.__contains__)
        return [piece for known, run in kinds for piece in (run if known else self._unknown("".join(run)))]

    def _unknown(self, text: str) -> list[str]:
        """The pieces of characters that are none: their bytes, where the model has these, or one unknown piece."""
        spelled = [f"<0x{byte:02X}>" for byte in text.encode()]
        return spelled if self.pieces.keys() >= set(spelled) else [text]
