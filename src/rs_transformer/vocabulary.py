"""Trimming: a Marian or RSMarian model with the entries of its vocabulary that a text needs, and no others.

At OPUS-MT's size the embeddings are most of a collapsed model. What stays computes as before; what goes is spelled by
smaller pieces. For models in memory; folders are the business of `commands/trim.py`.
"""

import atexit
import copy
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from transformers import GenerationConfig, MarianMTModel, MarianTokenizer, PretrainedConfig
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE

from .layer_transfer import build_like, check_marian
from .pipeline_rs_marian import LANGUAGE_CODE
from .tokenization import check_tokenizer, count_tokens, entries_of
from .utils.sentencepiece_model import UNIGRAM, Subwords, without_pieces

TEXT_SIDES = ("source", "target")
CHARACTERS = ("all", "text")
# The tensors with a row for each entry of the source's or the target's vocabulary.
ROWS = {
    "model.shared.weight": "source",
    "model.encoder.embed_tokens.weight": "source",
    "model.decoder.embed_tokens.weight": "target",
    "lm_head.weight": "target",
    "final_logits_bias": "target",
}
FILES = {"source": ("source.spm", "vocab.json"), "target": ("target.spm", "target_vocab.json")}
UNKNOWN_SHARE = 0.5  # of a text's characters, from which on it is of another language
PRUNED = 0.1  # of a vocabulary, at a time


@dataclass(frozen=True)
class TrimPlan:
    """What of a vocabulary stays.

    Attributes:
        ids: for `"source"` and `"target"`, the ids that stay in the order of their new ones; the same where both sides
            have one vocabulary.
        tokens: for each side, the tokens and pieces that stay.
        pieces: for each side, how many pieces its SentencePiece model keeps.
        covered: for each side, the share of the text's known tokens that stay.
    """

    ids: dict[str, list[int]]
    tokens: dict[str, frozenset[str]]
    pieces: dict[str, int]
    covered: dict[str, float]


def trim_vocabulary(
    model: MarianMTModel,
    tokenizer: MarianTokenizer,
    sources: Iterable[str],
    targets: Iterable[str],
    *,
    coverage: float = 1.0,
    max_vocabulary: int | None = None,
    characters: str = "all",
) -> tuple[MarianMTModel, MarianTokenizer]:
    """A copy of a model and of its tokenizer with the entries that a text needs; neither is changed.

    A text all of whose tokens stay is segmented as before, and the logits of the entries that stay are the same; other
    text falls apart into smaller pieces. Special and added tokens, codes (`>>deu<<`) and byte pieces always stay, and
    of a BPE model what a piece that stays is merged from. Trimmed by the same text again, nothing goes.

    Args:
        model: a `MarianMTModel` or an RSMarian.
        tokenizer: its tokenizer.
        sources, targets: texts of both sides, read once each; they need not be translations of each other.
        coverage: share of each side's tokens, above 0, at most 1, that the most frequent pieces are kept for. 1: all
            that occur.
        max_vocabulary: entries at most, of each vocabulary where there are two; those go that the text is spelled best
            without, of a BPE model the rarest.
        characters: the single characters that stay, so that any text can be spelled: `"all"` that the pieces have, or
            those of the `"text"`, others becoming unknown.

    Raises:
        TypeError: not a Marian model.
        ValueError: as `plan_trim`.
    """
    options = {"coverage": coverage, "max_vocabulary": max_vocabulary, "characters": characters}
    return apply_trim(model, tokenizer, plan_trim(model, tokenizer, sources, targets, **options))


def plan_trim(
    model: MarianMTModel,
    tokenizer: MarianTokenizer,
    sources: Iterable[str],
    targets: Iterable[str],
    *,
    coverage: float = 1.0,
    max_vocabulary: int | None = None,
    characters: str = "all",
) -> TrimPlan:
    """Choose what stays; see `trim_vocabulary`.

    Raises:
        TypeError: not a Marian model.
        ValueError: a tokenizer of another kind or of another model, an option out of its range, a text that is empty
            or of another language, or a vocabulary that cannot be as small.
    """
    check_belonging(model, tokenizer)
    counts = count_sides(tokenizer, sources, targets)
    options = {"coverage": coverage, "max_vocabulary": max_vocabulary, "characters": characters}
    return plan_from_counts(model, tokenizer, counts, **options)


def check_belonging(model: MarianMTModel, tokenizer: MarianTokenizer) -> None:
    """Raise unless a model's vocabulary can be trimmed with a tokenizer; as `plan_trim`."""
    check_marian(model)
    if not isinstance(tokenizer, MarianTokenizer):
        raise ValueError(f"a vocabulary is trimmed with its MarianTokenizer, got a {type(tokenizer).__name__}")
    check_tokenizer(model, tokenizer)
    if tokenizer.separate_vocabs and model.config.share_encoder_decoder_embeddings:
        raise ValueError("the tokenizer has two vocabularies, the model one: they do not belong together")


def count_sides(tokenizer: MarianTokenizer, sources: Iterable[str], targets: Iterable[str]) -> "Counts":
    """The tokens of both sides of a text, counted: what takes long, and serves several plans.

    Raises:
        ValueError: a side is empty or of another language.
    """
    texts = {"source": sources, "target": targets}
    return {side: _Side(tokenizer, side, texts[side]) for side in TEXT_SIDES}


def plan_from_counts(
    model: MarianMTModel,
    tokenizer: MarianTokenizer,
    counts: "Counts",
    *,
    coverage: float = 1.0,
    max_vocabulary: int | None = None,
    characters: str = "all",
) -> TrimPlan:
    """`plan_trim` from what `count_sides` has counted."""
    if not 0 < coverage <= 1:
        raise ValueError(f"coverage must be more than 0 and at most 1, got {coverage}")
    if characters not in CHARACTERS:
        raise ValueError(f"characters must be one of {', '.join(CHARACTERS)}, got {characters!r}")
    common = _common_ids(model, tokenizer)
    ids, tokens = {}, {}
    for group in _groups(tokenizer):
        entries = entries_of(tokenizer, group[0])
        sides = [counts[side] for side in group]
        floor = _floor(entries, sides, common, characters)
        chosen = _choose(entries, sides, common, floor, coverage, max_vocabulary)
        stay = common | {entries[token] for token in chosen if token in entries}
        # Padding and its like have one id on both sides: with two vocabularies they come first.
        order = sorted(stay, key=lambda index: (tokenizer.separate_vocabs and index not in common, index))
        ids |= dict.fromkeys(group, order)
        tokens |= dict.fromkeys(group, frozenset(chosen))
    pieces = {side: len(counts[side].subwords.pieces & tokens[side]) for side in TEXT_SIDES}
    return TrimPlan(ids, tokens, pieces, {side: counts[side].covered(tokens[side]) for side in TEXT_SIDES})


def least_vocabulary(
    model: MarianMTModel, tokenizer: MarianTokenizer, counts: "Counts", characters: str = "all"
) -> int:
    """The least `max_vocabulary` that is possible: special tokens, codes and single characters."""
    common = _common_ids(model, tokenizer)
    sizes = []
    for group in _groups(tokenizer):
        entries = entries_of(tokenizer, group[0])
        floor = _floor(entries, [counts[side] for side in group], common, characters)
        sizes.append(_entries_in(entries, common, floor))
    return max(sizes)


def apply_trim(
    model: MarianMTModel, tokenizer: MarianTokenizer, plan: TrimPlan
) -> tuple[MarianMTModel, MarianTokenizer]:
    """The copies with what a plan keeps.

    Raises:
        ValueError: the model has other tensors than Marian's.
    """
    new = {side: {old: index for index, old in enumerate(plan.ids[side])} for side in TEXT_SIDES}
    return _trimmed_model(model, plan, new["target"]), _trimmed_tokenizer(tokenizer, plan, new)


def removed_entries(model: MarianMTModel, plan: TrimPlan) -> dict[str, int]:
    """How many rows of each side's embeddings a plan removes, those without a token among them."""
    return {side: rows - len(plan.ids[side]) for side, rows in embedding_rows(model).items()}


def embedding_rows(model: MarianMTModel) -> dict[str, int]:
    """How many rows the embeddings of each side have."""
    sides = {"source": model.get_input_embeddings(), "target": model.get_decoder().embed_tokens}
    return {side: embeddings.weight.shape[0] for side, embeddings in sides.items()}


def count_pieces(tokenizer: MarianTokenizer) -> dict[str, int]:
    """How many pieces the SentencePiece model of each side has."""
    return {side: getattr(tokenizer, f"spm_{side}").get_piece_size() for side in TEXT_SIDES}


class _Side:
    """One side of a text, and the SentencePiece model that it is segmented by.

    Attributes:
        counts: how often each token occurs.
        known: those that have an id or are a piece; the others are runs of unknown characters.
    """

    def __init__(self, tokenizer: MarianTokenizer, side: str, texts: Iterable[str]):
        entries = entries_of(tokenizer, side)
        self.subwords = Subwords(getattr(tokenizer, f"spm_{side}").serialized_model_proto())
        self.counts = count_tokens(tokenizer, texts, target=side == "target")
        if not self.counts:
            raise ValueError(f"there is no {side} text to trim the vocabulary to: give some sentences")
        self._check_language(side, entries)
        self.known = {token for token in self.counts if token in entries or token in self.subwords.scores}

    def floor(self, characters: str) -> set[str]:
        """What stays whatever its frequency."""
        singles = {piece for piece in self.subwords.scores if len(piece) == 1}
        if characters == "text":
            singles &= {char for token in self.known for char in token}
        return self.subwords.fixed | singles

    def _check_language(self, side: str, entries: Mapping[str, int]) -> None:
        lengths = {token: len(token.replace("▁", "")) * number for token, number in self.counts.items()}
        unknown = {token: length for token, length in lengths.items() if token not in entries}
        share = sum(unknown.values()) / max(1, sum(lengths.values()))
        if share > UNKNOWN_SHARE:
            example = max(unknown, key=unknown.get)
            raise ValueError(
                f"{share:.0%} of the characters of the {side} text are unknown to the model, {example[:20]!r} among "
                "them: give text of its language; if the sides are exchanged, put the source first"
            )

    @cached_property
    def total(self) -> int:
        return sum(self.counts[token] for token in self.known)

    def covered(self, kept: Collection[str]) -> float:
        """The share of the known tokens that are kept."""
        return sum(self.counts[token] for token in self.known if token in kept) / max(1, self.total)

    def most_frequent(self, kept: Collection[str], coverage: float) -> Iterator[str]:
        """The most frequent tokens that, with those kept anyway, are this share of all; the same ones every time."""
        covered = sum(self.counts[token] for token in self.known if token in kept)
        for token in sorted(self.known.difference(kept), key=lambda token: (-self.counts[token], token)):
            if covered >= coverage * self.total:
                return
            covered += self.counts[token]
            yield token


Counts = Mapping[str, _Side]  # of "source" and "target"


def _groups(tokenizer: MarianTokenizer) -> list[Sequence[str]]:
    """The sides that have a vocabulary together."""
    return [[side] for side in TEXT_SIDES] if tokenizer.separate_vocabs else [TEXT_SIDES]


def _floor(entries: Mapping[str, int], sides: Sequence[_Side], common: Collection[int], characters: str) -> set[str]:
    """The tokens of one vocabulary that stay whatever the text."""
    fixed = {token for token, index in entries.items() if index in common or LANGUAGE_CODE.fullmatch(token)}
    return fixed.union(*(side.floor(characters) for side in sides))


def _entries_in(entries: Mapping[str, int], common: Collection[int], chosen: Collection[str]) -> int:
    return len({*common, *(entries[token] for token in chosen if token in entries)})


def _choose(
    entries: Mapping[str, int],
    sides: Sequence[_Side],
    common: Collection[int],
    floor: Collection[str],
    coverage: float,
    max_vocabulary: int | None,
) -> set[str]:
    """The tokens of one vocabulary that stay, and pieces that have no entry in it.

    Args:
        sides: those that the vocabulary is for.
        common: ids that stay.
        floor: tokens that stay.
    """
    chosen = set(floor)
    size = _entries_in(entries, common, chosen)
    if max_vocabulary is not None and size > max_vocabulary:
        raise ValueError(
            f"max_vocabulary must be at least {size}, got {max_vocabulary}: so many are special tokens, codes and "
            "single characters. Raise it, or keep the characters of the text alone, not all"
        )
    # Shares, so that a side with more text has no more say.
    shares: Counter[str] = Counter()
    for side in sides:
        for token in side.most_frequent(chosen, coverage):
            shares[token] += side.counts[token] / side.total
    prunes = all(side.subwords.type == UNIGRAM for side in sides)
    for token in sorted(shares, key=lambda token: (-shares[token], entries.get(token, -1), token)):
        added = {token}.union(*(side.subwords.parts(token) for side in sides)) - chosen
        size += sum(part in entries for part in added)
        if max_vocabulary is not None and size > max_vocabulary and not prunes:
            break
        chosen |= added
    if prunes and max_vocabulary is not None and size > max_vocabulary:
        return _prune(entries, sides, chosen, floor, size - max_vocabulary)
    return chosen


def _prune(
    entries: Mapping[str, int], sides: Sequence[_Side], chosen: Collection[str], floor: Collection[str], number: int
) -> set[str]:
    """Make a vocabulary smaller as SentencePiece does a unigram model (Kudo 2018).

    The tokens go without which the text loses least of its probability, some at a time, and what it is then spelled
    with is counted anew: so what rare words are written with stays, which may be rarer than they are.

    Args:
        chosen: the tokens of one vocabulary, of which some are to go.
        floor: those that stay.
        number: how many are to go.
    """
    kept = set(chosen)
    shares = [{token: side.counts[token] / side.total for token in sorted(side.known)} for side in sides]
    going = sorted(set().union(*shares) - kept)
    spelled: list[dict[str, tuple[list[str], float]]] = [{} for _ in sides]  # of each side's tokens
    while True:
        for side, share, parts in zip(sides, shares, spelled, strict=True):
            for token in going:
                if left := share.pop(token, 0.0):
                    for part in side.subwords.spelled(token, kept)[0]:
                        share[part] = share.get(part, 0.0) + left
            for token in [token for token, (pieces, _) in parts.items() if not kept.issuperset(pieces)]:
                del parts[token]
        if not number:
            return kept
        losses = dict.fromkeys((token for token in kept.difference(floor) if token in entries), 0.0)
        for side, share, parts in zip(sides, shares, spelled, strict=True):
            for token in [token for token in share if token in losses and token in side.subwords.scores]:
                if token not in parts:
                    parts[token] = side.subwords.spelled(token, kept)
                losses[token] += share[token] * (side.subwords.scores[token] - parts[token][1])
        going = sorted(losses, key=lambda token: (losses[token], -entries[token]))
        going = going[: min(number, max(1, round(PRUNED * len(kept))))]
        number -= len(going)
        kept.difference_update(going)


def _common_ids(model: MarianMTModel, tokenizer: MarianTokenizer) -> set[int]:
    """The ids that stay, and are the same on both sides: of special and added tokens, and what configurations name."""
    named = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    for config in (model.config, model.generation_config):
        for name, value in config.to_dict().items():
            if name.endswith("_token_id") and value is not None:
                named.update(value if isinstance(value, list) else [value])
    rows = min(embedding_rows(model).values())
    return {index for index in named if 0 <= index < rows}


def _trimmed_model(model: MarianMTModel, plan: TrimPlan, new: Mapping[int, int]) -> MarianMTModel:
    config = copy.deepcopy(model.config)
    config.name_or_path = ""
    config.vocab_size = len(plan.ids["source"])
    if config.decoder_vocab_size is not None:
        config.decoder_vocab_size = len(plan.ids["target"])
    _renumber(config, new)
    with torch.device("meta"):
        wanted = type(model)(config).state_dict().keys()
    state = model.state_dict()
    if strange := sorted(state.keys() ^ wanted):
        raise ValueError(f"other tensors than Marian's: {strange[0]}; merge or unload adapters before trimming")
    for name, side in ROWS.items():
        if name in state:
            rows = torch.tensor(plan.ids[side], device=state[name].device)
            state[name] = state[name].index_select(state[name].dim() - 1 if name == "final_logits_bias" else 0, rows)
    trimmed = build_like(type(model), config, state, like=model)
    _renumber(trimmed.generation_config, new)
    return trimmed


def _renumber(config: PretrainedConfig | GenerationConfig, new: Mapping[int, int]) -> None:
    """Give the ids that a configuration names their new numbers; what was barred and is gone needs no bar."""
    for name, value in config.to_dict().items():
        if value is None:
            continue
        if name.endswith("_token_id"):
            value = [new.get(index, index) for index in value] if isinstance(value, list) else new.get(value, value)
        elif name in ("suppress_tokens", "begin_suppress_tokens"):
            value = [new[index] for index in value if index in new] or None
        elif name == "bad_words_ids":
            value = [[new[index] for index in word] for word in value if new.keys() >= set(word)] or None
        elif name == "sequence_bias":
            pairs = value.items() if isinstance(value, Mapping) else value
            value = [[[new[i] for i in ids], bias] for ids, bias in pairs if new.keys() >= set(ids)] or None
        else:
            continue
        setattr(config, name, value)


def _trimmed_tokenizer(
    tokenizer: MarianTokenizer, plan: TrimPlan, new: Mapping[str, Mapping[int, int]]
) -> MarianTokenizer:
    # A copy of a MarianTokenizer, in another process or not, reads its files again: they stay while this process does.
    folder = Path(tempfile.mkdtemp(prefix="trimmed-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    tokenizer.save_pretrained(folder)
    for side, (spm, vocabulary) in FILES.items():
        model = without_pieces((folder / spm).read_bytes(), plan.tokens[side])
        (folder / spm).write_bytes(model)
        if (folder / vocabulary).is_file():
            entries = json.loads((folder / vocabulary).read_text("utf-8"))
            kept = {token: new[side][index] for token, index in entries.items() if index in new[side]}
            kept = {token: kept[token] for token in sorted(kept, key=kept.get)}
            (folder / vocabulary).write_text(json.dumps(kept, ensure_ascii=False, indent=1), "utf-8")
    config = json.loads((folder / TOKENIZER_CONFIG_FILE).read_text("utf-8"))
    added = {new["source"][int(index)]: token for index, token in config["added_tokens_decoder"].items()}
    (folder / TOKENIZER_CONFIG_FILE).write_text(json.dumps(config | {"added_tokens_decoder": added}), "utf-8")
    trimmed = type(tokenizer).from_pretrained(folder)
    trimmed.name_or_path = tokenizer.name_or_path
    for name in ("is_local", "local_files_only"):
        trimmed.init_kwargs.pop(name, None)  # they would be saved
    return trimmed
