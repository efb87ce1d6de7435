"""Lexical shortlists: the target pieces that a source sentence can need, so that no other logits are computed.

Each source piece has the pieces that it is aligned with in a corpus and itself; every sentence has the most frequent
pieces, the end of sentence and unknown. Not for the alignments (`attention/alignment.py`).
"""

import copy
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import torch
from torch import nn
from transformers import MarianMTModel, PreTrainedTokenizerBase

from .decoding import TransformersEngine, generate_texts
from .tokenization import entries_of, vocabulary

# Of what no alignment has, and is there all the same.
LEAST_PROBABILITY = 1e-6


@dataclass(frozen=True)
class Shortlist:
    """The target pieces that source pieces can become.

    Attributes:
        candidates: of source ids, target ids and their probabilities given the source's. Those of `end`, with which
            every source ends, are there for every sentence.
        end: the source id of the end of sentence.
    """

    candidates: Mapping[int, Mapping[int, float]]
    end: int

    def entries(self, source_ids: Iterable[int]) -> list[int]:
        """The target ids that a sentence, or a batch of them, can need, in order."""
        found = set(self.candidates[self.end])
        for index in set(source_ids):
            found.update(self.candidates.get(index, ()))
        return sorted(found)

    def save(self, file: str | Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """Write what Marian's `--shortlist` reads: a line for each pair, `target source probability`.

        Raises:
            ValueError: a token has a blank in it, at which engines cut.
        """
        sources, targets = _names(tokenizer)
        with open(file, "w", encoding="utf-8") as lines:
            for source, row in sorted(self.candidates.items()):
                for target, probability in row.items():
                    lines.write(f"{targets[target]} {sources[source]} {probability:.6g}\n")

    @classmethod
    def load(cls, file: str | Path, tokenizer: PreTrainedTokenizerBase) -> "Shortlist":
        """Read what `save` has written with a tokenizer of the same vocabulary.

        Raises:
            ValueError: there is no such file, a line is no such pair, or the tokenizer has not its tokens.
        """
        sources, targets = (vocabulary(tokenizer, side) for side in ("source", "target"))
        candidates: dict[int, dict[int, float]] = {}
        if not Path(file).is_file():
            raise ValueError(f"there is no shortlist {file}: export the model with shortlist=true")
        with open(file, encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    target, source, probability = line.rstrip("\n").split(" ")
                    chance = float(probability)
                except ValueError:
                    raise ValueError(f"{file}, line {number} is not `target source probability`: {line!r}") from None
                for side, token, entries in (("target", target, targets), ("source", source, sources)):
                    if token not in entries:
                        raise ValueError(
                            f"{file} is a shortlist of another vocabulary: the tokenizer has no {side} token {token!r}"
                        )
                candidates.setdefault(sources[source], {})[targets[target]] = chance
        end = sources[tokenizer.eos_token]
        if targets[tokenizer.eos_token] not in candidates.get(end, {}):
            raise ValueError(f"{file} has no {tokenizer.eos_token} for every sentence: no translation could end")
        return cls(candidates, end)

    def write_vmap(self, file: str | Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """Write CTranslate2's vocabulary map: `source<tab>targets`, and those of every sentence with no source.

        Raises:
            ValueError: a token has a blank in it, at which engines cut.
        """
        sources, targets = _names(tokenizer)
        with open(file, "w", encoding="utf-8") as lines:
            for source in (self.end, *sorted(self.candidates.keys() - {self.end})):
                name = "" if source == self.end else sources[source]
                lines.write(f"{name}\t{' '.join(targets[target] for target in self.candidates[source])}\n")


def _names(tokenizer: PreTrainedTokenizerBase) -> list[dict[int, str]]:
    """The tokens of source and target by their ids."""
    sides = [vocabulary(tokenizer, side) for side in ("source", "target")]
    if cut := [token for side in sides for token in side if any(blank in token for blank in " \t\n")]:
        raise ValueError(f"engines cut a shortlist at blanks, and the tokenizer has the token {cut[0]!r}")
    return [{index: token for token, index in side.items()} for side in sides]


def make_shortlist(
    tokenizer: PreTrainedTokenizerBase,
    links: Mapping[int, Counter[int]],
    frequencies: Counter[int],
    *,
    candidates: int = 100,
    frequent: int = 100,
    min_probability: float = 0.0,
) -> Shortlist:
    """A shortlist from counts over a corpus.

    Args:
        links: for source ids, how often a target id is aligned with them.
        frequencies: of target ids.
        candidates: target pieces of a source piece, the most probable ones.
        frequent: target pieces of every sentence, the most frequent ones.
        min_probability: of a target piece given the source piece; less probable ones are left out.
    """
    sources, targets = (vocabulary(tokenizer, side) for side in ("source", "target"))
    rows: dict[int, dict[int, float]] = {}
    for token, source in sources.items():
        counts = links.get(source, Counter())
        total = counts.total()
        row = {
            target: count / total
            for target, count in counts.most_common(candidates)
            if count / total >= min_probability
        }
        # Names, numbers and tokens that were added stay what they are, whether the corpus has them or not.
        if token in targets:
            row.setdefault(targets[token], LEAST_PROBABILITY)
        if row:
            rows[source] = row
    end, total = sources[tokenizer.eos_token], max(1, frequencies.total())
    rows[end] = {targets[token]: 1.0 for token in (tokenizer.eos_token, tokenizer.unk_token) if token in targets}
    others = Counter({target: count for target, count in frequencies.items() if target not in rows[end]})
    rows[end] |= {target: count / total for target, count in others.most_common(frequent)}
    return Shortlist(rows, end)


def coverage(
    tokenizer: PreTrainedTokenizerBase,
    shortlist: Shortlist,
    source_ids: Sequence[Sequence[int]],
    target_ids: Sequence[Sequence[int]] | None = None,
) -> dict[str, float]:
    """What a shortlist has of sentences, each by itself.

    Returns:
        `entries`, the mean number of target pieces that a sentence keeps; with targets `coverage`, the share of their
        tokens that are among those, the end of sentence aside.
    """
    kept = [set(shortlist.entries(ids)) for ids in source_ids]
    found = {"entries": sum(map(len, kept)) / len(kept)}
    if target_ids is not None:
        end = entries_of(tokenizer, "target")[tokenizer.eos_token]
        there = [index in its for its, ids in zip(kept, target_ids, strict=True) for index in ids if index != end]
        found["coverage"] = sum(there) / max(1, len(there))
    return found


class KeptProjection(nn.Module):
    """An output projection of which some rows are computed; the other logits are minus infinity.

    Args:
        projection: of the whole vocabulary.
        entries: the rows that are computed.
    """

    def __init__(self, projection: nn.Linear, entries: Sequence[int]):
        super().__init__()
        self.size = projection.weight.shape[0]
        kept = torch.tensor(entries, device=projection.weight.device)
        self.register_buffer("kept", kept, persistent=False)
        self.register_buffer("weight", projection.weight.detach()[kept], persistent=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        logits = hidden_states.new_full((*hidden_states.shape[:-1], self.size), -torch.inf)
        logits[..., self.kept] = nn.functional.linear(hidden_states, self.weight)
        return logits


def restricted(model: MarianMTModel, entries: Sequence[int]) -> MarianMTModel:
    """A model that says nothing but some target ids, of which alone it computes logits; its `generate` is as usual.

    Log-probabilities are exact over that set. It has the weights of the model, which stays as it is, so that other
    threads may use it meanwhile. Not for training or saving.

    Args:
        model: RSMarian or `MarianMTModel`.
        entries: what `Shortlist.entries` has for the sources of a batch.

    Raises:
        ValueError: the entries are of another vocabulary.
    """
    size = model.lm_head.weight.shape[0]
    if max(entries) >= size:
        raise ValueError(f"the shortlist has the target id {max(entries)}, the model {size} entries: it is another's")
    if "forward" in vars(model):
        raise ValueError("a model that hooks have spread over devices cannot be restricted to a shortlist")
    other = copy.copy(model)
    other.__dict__.pop("_compiled_call", None)  # it is the whole model's
    other._modules = {**model._modules, "lm_head": KeptProjection(model.lm_head, entries)}
    return other


@dataclass
class ShortlistEngine(TransformersEngine):
    """Decoding in PyTorch, each batch over what the shortlist has for its sources."""

    shortlist: Shortlist = field(kw_only=True)

    def translate_batch(self, input_ids: Sequence[list[int]]) -> list[list[str]]:
        model = restricted(self.model, self.shortlist.entries(chain.from_iterable(input_ids)))
        return generate_texts(model, self.tokenizer, input_ids, self.decoding, self.n_best)
