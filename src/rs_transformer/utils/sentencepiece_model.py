"""SentencePiece's model files: their pieces, how these spell a text, and a model without some of them."""

import math
import struct
from collections.abc import Collection, Iterator
from itertools import pairwise
from typing import Any

# Of sentencepiece_model.proto. Its Python module runs on few versions of protobuf, and is not needed for this little.
PIECES, TRAINER = 1, 2  # fields of a model
TEXT, SCORE, KIND = 1, 2, 3  # fields of a piece
MODEL_TYPE = 3  # a field of how it was trained
UNIGRAM, BPE = 1, 2  # model types
NORMAL, USER_DEFINED, UNUSED = 1, 4, 5  # kinds of pieces that a text is segmented by; the others are marks and bytes

UNKNOWN_PENALTY = 10.0  # what a character that is no piece scores below the worst piece


class Subwords:
    """What a SentencePiece model says of its pieces.

    Attributes:
        scores: of the pieces that a text is segmented by.
        pieces: all.
        unknown: the score of a character that is none of them.
        fixed: the pieces that have to stay: marks, bytes, what the user defined or barred, and, of a unigram model,
            those with the lowest and the highest score, by which it reckons what an unknown character and what a
            user's piece costs.
    """

    def __init__(self, model: bytes):
        self.scores: dict[str, float] = {}
        self.fixed: set[str] = set()
        self.type, normal = model_type(model), {}
        for number, value, _ in read_fields(model):
            if number == PIECES:
                text, score, kind = read_piece(value)
                if kind in (NORMAL, USER_DEFINED, UNUSED):
                    self.scores[text] = score
                if kind == NORMAL:
                    normal[text] = score
                else:
                    self.fixed.add(text)
        self.pieces = self.scores.keys() | self.fixed
        self.unknown = min(self.scores.values(), default=0.0) - UNKNOWN_PENALTY
        if self.type == UNIGRAM and normal:
            self.fixed |= {min(normal, key=normal.get), max(normal, key=normal.get)}

    def parts(self, piece: str) -> set[str]:
        """What a BPE model merges on the way to a piece, whichever text it stands in; nothing of other models."""
        parts: set[str] = set()
        if self.type != BPE or piece not in self.scores:
            return parts
        symbols = list(piece)
        while len(symbols) > 1:
            merged = [left + right for left, right in pairwise(symbols)]
            best = max(range(len(merged)), key=lambda place: self.scores.get(merged[place], -math.inf))
            if merged[best] not in self.scores:
                break
            parts.add(merged[best])
            symbols[best : best + 2] = [merged[best]]
        return parts

    def spelled(self, piece: str, kept: Collection[str]) -> tuple[list[str], float]:
        """The most probable shorter pieces that a unigram model writes a piece with, and their score.

        Args:
            kept: the pieces that there are.
        """
        end = len(piece)
        scores, begins = [0.0, *[-math.inf] * end], [0] * (end + 1)
        for begin in range(end):
            for stop in range(begin + 1, end + (begin > 0)):
                part = piece[begin:stop]
                if part in kept and part in self.scores:
                    score = self.scores[part]
                elif stop == begin + 1:
                    score = self.unknown
                else:
                    continue
                if scores[begin] + score > scores[stop]:
                    scores[stop], begins[stop] = scores[begin] + score, begin
        parts: list[str] = []
        while end:
            parts.append(piece[begins[end] : end])
            end = begins[end]
        return parts[::-1], scores[-1]


def without_pieces(model: bytes, kept: Collection[str]) -> bytes:
    """A SentencePiece model with those of its pieces that are kept; the rest as it is, byte for byte."""
    fields = read_fields(model)
    return b"".join(whole for number, value, whole in fields if number != PIECES or read_piece(value)[0] in kept)


def model_type(model: bytes) -> int:
    """What a SentencePiece model was trained as."""
    trainers = [value for number, value, _ in read_fields(model) if number == TRAINER]
    return {number: part for number, part, _ in read_fields(b"".join(trainers))}.get(MODEL_TYPE, UNIGRAM)


def read_piece(message: bytes) -> tuple[str, float, int]:
    """Text, score and kind of a piece."""
    fields = {number: value for number, value, _ in read_fields(message)}
    (score,) = struct.unpack("<f", fields.get(SCORE, bytes(4)))
    return str(fields[TEXT], "utf-8"), score, fields.get(KIND, NORMAL)


def read_fields(message: bytes) -> Iterator[tuple[int, Any, bytes]]:
    """The fields of a protocol buffer: number, value (an integer, or bytes), and the bytes of the whole field."""
    place = 0
    while place < len(message):
        start = place
        key, place = _varint(message, place)
        if key & 7 == 0:
            value, place = _varint(message, place)
        else:
            length, place = {1: (8, place), 5: (4, place)}.get(key & 7) or _varint(message, place)
            value = message[place : place + length]
            place += length
        yield key >> 3, value, message[start:place]


def _varint(message: bytes, place: int) -> tuple[int, int]:
    """The integer that begins at a place, seven bits a byte, and the place behind it."""
    value = shift = 0
    while True:
        byte = message[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return value, place
