"""A teacher's distributions for a student that has a part of its vocabulary, as trimming leaves it.

A text falls into more pieces for the student than for the teacher. Where both begin one, the student's next piece has
the teacher's distribution: a piece that the student lacks gives its probability to the first of those that the student
writes it with. Within a piece of the teacher's the student's next one is certain.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from transformers import MarianTokenizer, PreTrainedTokenizerBase

from ..tokenization import encode, entries_of, vocabulary_size
from ..vocabulary import TEXT_SIDES

UNKNOWN = "\ue000"  # of private use: no SentencePiece model has it


def is_part(tokenizer: PreTrainedTokenizerBase, whole: PreTrainedTokenizerBase) -> bool:
    """Whether a Marian tokenizer has no token and no SentencePiece piece that another one lacks.

    Of those whose pieces are bytes none counts as a part: they do not say which characters they stand for.
    """
    if not all(isinstance(each, MarianTokenizer) for each in (tokenizer, whole)) or has_bytes(whole):
        return False
    return all(
        entries_of(tokenizer, side).keys() <= entries_of(whole, side).keys()
        and _pieces(tokenizer, side) <= _pieces(whole, side)
        for side in TEXT_SIDES
    )


def has_bytes(tokenizer: MarianTokenizer) -> bool:
    """Whether characters that are no piece become bytes (`byte_fallback`)."""
    models = [tokenizer.spm_source, tokenizer.spm_target]
    return any(model.is_byte(index) for model in models for index in range(model.get_piece_size()))


def _pieces(tokenizer: MarianTokenizer, side: str) -> set[str]:
    model = getattr(tokenizer, f"spm_{side}")
    return set(model.id_to_piece(list(range(model.get_piece_size()))))


class Resegmentation:
    """From a student's tokens to its teacher's, and back to the student's distributions.

    Args:
        student: a tokenizer that is a part of the teacher's (`is_part`).
        teacher: the teacher's.
    """

    def __init__(self, student: MarianTokenizer, teacher: MarianTokenizer):
        self.student, self.teacher = student, teacher
        self._tokens = {side: _tokens(student, side) for side in TEXT_SIDES}
        self._teacher_tokens = _tokens(teacher, "target")
        self._first: torch.Tensor | None = None

    def teacher_ids(self, ids: Sequence[int], side: str) -> list[int]:
        """The teacher's ids of a `"source"` or `"target"` that the student has in its own; both end in `</s>`."""
        (found,) = encode(self.teacher, [self._text(ids, side)], target=side == "target")
        return found

    def log_probs(
        self, teacher_log_probs: torch.Tensor, labels: Sequence[int], teacher_labels: Sequence[int]
    ) -> torch.Tensor:
        """The distribution of each of the student's target tokens.

        Args:
            teacher_log_probs: (teacher's length or more, teacher's vocabulary).
            labels: the target in the student's ids.
            teacher_labels: in the teacher's, from `teacher_ids`.

        Returns:
            (student's length, student's vocabulary); `-inf` where the probability is 0.
        """
        wanted = torch.tensor(labels, device=teacher_log_probs.device)
        places = torch.tensor(self.places(labels, teacher_labels), device=wanted.device)
        found = teacher_log_probs.new_zeros(len(labels), vocabulary_size(self.student, "target"))
        begun = (places >= 0).nonzero().squeeze(1)
        given = teacher_log_probs[places[begun]].exp()
        first = self._first_pieces(given.shape[1]).to(wanted.device)
        shared = found[begun].index_add_(1, first, given)
        # The text's own next piece goes on in the text as it does there, whatever it would do by itself.
        rows, own = torch.arange(len(begun)), torch.tensor(teacher_labels, device=wanted.device)[places[begun]]
        share = given[rows, own]
        shared[rows, first[own]] -= share
        shared[rows, wanted[begun]] += share
        found[begun] = shared.clamp_min(0.0)
        certain = (places < 0).nonzero().squeeze(1)
        found[certain, wanted[certain]] = 1.0
        return found.log()

    def places(self, labels: Sequence[int], teacher_labels: Sequence[int]) -> list[int]:
        """For each of the student's target tokens which of the teacher's begins at the same character, or -1."""
        ours = _beginnings([self._tokens["target"][index] for index in labels], self.student.unk_token)
        theirs = _beginnings([self._teacher_tokens[index] for index in teacher_labels], self.teacher.unk_token)
        if ours[-1] != theirs[-1]:  # of where </s> stands: the text is not the same to both
            return [-1] * len(labels)
        known = {begin: place for place, begin in enumerate(theirs)}
        return [known.get(begin, -1) for begin in ours]

    def _text(self, ids: Sequence[int], side: str) -> str:
        unknown, tokens = self.student.unk_token, [self._tokens[side][index] for index in ids[:-1]]
        pieces = (UNKNOWN if token == unknown else token for token in tokens)
        return "".join(pieces).replace("▁", " ").strip()

    def _first_pieces(self, rows: int) -> torch.Tensor:
        """For each row of the teacher's output the student's token that begins it."""
        if self._first is None:
            ours, unknown = entries_of(self.student, "target"), self.student.unk_token_id
            self._first = torch.full((rows,), unknown)
            lacking = []
            for index, token in self._teacher_tokens.items():
                if token in ours:
                    self._first[index] = ours[token]
                else:
                    lacking.append((index, token))
            # Behind a character that is no piece's, a text is cut as in the middle of a word.
            texts = [UNKNOWN + token.replace("▁", " ") for _, token in lacking]
            for (index, _), pieces in zip(lacking, self.student.spm_target.encode(texts, out_type=str), strict=True):
                behind = next(place for place, piece in enumerate(pieces, start=1) if UNKNOWN in piece)
                if pieces[behind - 1].endswith(UNKNOWN) and behind < len(pieces):
                    self._first[index] = ours.get(pieces[behind], unknown)
        return self._first


def _tokens(tokenizer: MarianTokenizer, side: str) -> dict[int, str]:
    return {index: token for token, index in entries_of(tokenizer, side).items()}


def _beginnings(tokens: Sequence[str], unknown: str) -> list[int]:
    """At which character each token begins; an unknown one counts as a character."""
    lengths = [1 if token == unknown else len(token) for token in tokens]
    return [0, *accumulate(lengths[:-1])]
