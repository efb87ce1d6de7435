"""SentencePiece training from a parallel corpus to a `MarianTokenizer` folder. Not a tokenizer of our own."""

import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sentencepiece
from transformers import MarianTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .pipeline_rs_marian import (
    LANGUAGE_CODE,
    as_plain_code,
    find_language,
    is_reversed,
    known_languages,
    leading_code,
    live_tokens,
    target_codes,
    without_ends,
)
from .utils.ranges import check_range

MODEL_TYPES = ("unigram", "bpe")
VOCABULARIES = ("merged", "joint", "separate")


@dataclass
class TokenizerArguments:
    """The tokenizer: one that exists, or one to be trained on the training corpus."""

    tokenizer_name_or_path: str | None = field(
        default=None, metadata={"help": "A tokenizer on the Hub or in a folder. Without it one is trained."}
    )
    vocabulary: str = field(
        default="merged",
        metadata={
            "help": "merged: a SentencePiece model for each side, one vocabulary (as OPUS-MT); joint: one model and "
            "one vocabulary; separate: a model and a vocabulary for each side.",
            "choices": list(VOCABULARIES),
        },
    )
    vocab_size: int = field(default=8000, metadata={"help": "Pieces of each SentencePiece model that is trained."})
    spm_model_type: str = field(
        default="unigram",
        metadata={"help": "What SentencePiece trains.", "choices": list(MODEL_TYPES)},
    )
    character_coverage: float = field(
        default=1.0, metadata={"help": "Share of the characters that get a piece of their own."}
    )
    tokenizer_sample_size: int = field(
        default=5_000_000, metadata={"help": "Sentences a side that the SentencePiece training draws at most."}
    )

    def __post_init__(self) -> None:
        check_range(self, "vocab_size", least=4)  # three are control pieces
        # SentencePiece's own bounds.
        check_range(self, "character_coverage", least=0.98, most=1)
        check_range(self, "tokenizer_sample_size", least=101)


def list_of_texts(texts: Iterable[str]) -> list[str]:
    """The texts of any iterable, as a list.

    Raises:
        TypeError: a single text, whose letters would count as texts.
    """
    check_is_no_text(texts)
    return list(texts)


def check_is_no_text(texts: Any) -> None:
    """Raise `TypeError` for a single text in the place of several: its letters would count as texts."""
    if isinstance(texts, str):
        raise TypeError(f"expected a list of texts, got a single one: put it into a list: {texts[:80]!r}")


def encode(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], *, target: bool = False, max_length: int | None = None
) -> list[list[int]]:
    """Token ids of texts in which no special token is live but a language's code.

    `</s>`, `<pad>` and the like in a text become pieces, or unknown: as tokens they would end it, or be no target.
    `>>deu<<` at the beginning of a source, blanks apart, is a code, if a `MarianTokenizer` has it. Tokens that were
    added to one stay tokens in texts without those.

    Args:
        tokenizer: any; targets are encoded by `text_target=`.
        texts: sources, or targets.
        max_length: longer ones are cut to so many tokens.

    Raises:
        ValueError: a text is missing, or something else (`nan`, of a table's empty cell).
        TypeError: a single text in the place of a list.
    """
    texts = list_of_texts(texts)
    if None in texts:
        raise ValueError(f"{'target' if target else 'source'} {texts.index(None) + 1} of {len(texts)} is missing")
    for number, text in enumerate(texts, start=1):
        if not isinstance(text, str):
            side = "target" if target else "source"
            raise ValueError(f"{side} {number} of {len(texts)} is no text but {text!r:.80} ({type(text).__name__})")
    texts = [as_plain_code(tokenizer, text, target) for text in texts]
    live = live_tokens(tokenizer)
    options = {} if max_length is None else {"truncation": True, "max_length": max_length}
    encoded: dict[int, list[int]] = {}
    # Tokenizers in Python, as Marian's is, split all added tokens if they split any: only where there is need.
    for split in (False, True):
        rows = [row for row, text in enumerate(texts) if bool(live.search(text)) == split]
        if rows:
            side = {"text_target" if target else "text": [texts[row] for row in rows]}
            found = tokenizer(**side, split_special_tokens=split, verbose=False, **options)["input_ids"]
            encoded |= zip(rows, found, strict=True)
    return [without_ends(tokenizer, encoded[row]) for row in range(len(texts))]


def count_tokens(tokenizer: MarianTokenizer, texts: Iterable[str], *, target: bool = False) -> Counter[str]:
    """How often each token comes out of texts, as `encode` has them: also those that have no id of their own."""
    check_is_no_text(texts)
    counts: Counter[str] = Counter()
    live = live_tokens(tokenizer)
    texts = (as_plain_code(tokenizer, text, target) for text in texts)
    if target:
        tokenizer._switch_to_target_mode()
    try:
        for text in texts:
            counts.update(tokenizer.tokenize(text, split_special_tokens=bool(live.search(text))))
    finally:
        tokenizer._switch_to_input_mode()
    return counts


def train_tokenizer(
    sources: Iterable[str],
    targets: Iterable[str],
    folder: str | Path,
    *,
    source_lang: str,
    target_lang: str,
    vocab_size: int = 8000,
    vocabulary: str = "merged",
    character_coverage: float = 1.0,
    sample_size: int = 5_000_000,
    model_max_length: int = 512,
    model_type: str = "unigram",
) -> MarianTokenizer:
    """Train SentencePiece models and write a `MarianTokenizer` folder.

    The vocabulary is laid out as OPUS-MT's: `</s>` 0, `<unk>` 1, the pieces, `<pad>` last; with
    `vocabulary="separate"` both sides have the same number of entries, so that their padding ids agree. Codes that
    sources begin with, `>>deu<<` or `>>bt<<`, are entries before it.

    Args:
        sources, targets: sentences, read once each (twice for `"joint"`, where `targets` follow `sources`).
        folder: written to; made if need be.
        vocab_size: pieces of each model, its three control pieces included.
        vocabulary: `"merged"`, `"joint"` or `"separate"`, see `TokenizerArguments`.
        model_type: `"unigram"` or `"bpe"`.
        sample_size: sentences that the training draws at most, for corpora larger than memory.

    Raises:
        ValueError: the corpus is empty or too small for `vocab_size`; says which size it allows.
    """
    if model_type not in MODEL_TYPES:
        raise ValueError(f"model_type must be one of {', '.join(MODEL_TYPES)}, got {model_type!r}")
    if vocabulary not in VOCABULARIES:
        raise ValueError(f"vocabulary must be one of {', '.join(VOCABULARIES)}, got {vocabulary!r}")
    for side in (sources, targets):
        check_is_no_text(side)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    options = {
        "vocab_size": vocab_size,
        "character_coverage": character_coverage,
        "input_sentence_size": sample_size,
        "model_type": model_type,
    }
    codes: set[str] = set()
    sources = _without_codes(sources, codes)
    if vocabulary == "joint":
        source_model = target_model = _train_model(_chain(sources, targets), "joint corpus", options)
    else:
        source_model = _train_model(sources, f"{source_lang} side", options)
        target_model = _train_model(targets, f"{target_lang} side", options)
    (folder / "source.spm").write_bytes(source_model)
    (folder / "target.spm").write_bytes(target_model)

    source_pieces, target_pieces = (_pieces(model) + sorted(codes) for model in (source_model, target_model))
    files = {"source_spm": folder / "source.spm", "target_spm": folder / "target.spm", "vocab": folder / "vocab.json"}
    if vocabulary == "separate":
        _write_vocabulary(files["vocab"], source_pieces)
        files["target_vocab_file"] = folder / "target_vocab.json"
        _write_vocabulary(files["target_vocab_file"], target_pieces)
    else:
        _write_vocabulary(files["vocab"], source_pieces + target_pieces)
    tokenizer = MarianTokenizer(
        **{name: str(path) for name, path in files.items()},
        source_lang=source_lang,
        target_lang=target_lang,
        model_max_length=model_max_length,
        separate_vocabs=vocabulary == "separate",
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def check_language_pair(tokenizer: PreTrainedTokenizerBase, source_lang: str | None, target_lang: str | None) -> None:
    """Raise `ValueError` if a tokenizer says that its model translates the other way round, in whichever codes."""
    known = (getattr(tokenizer, "source_lang", None), getattr(tokenizer, "target_lang", None))
    if is_reversed(known, source_lang, target_lang):
        raise ValueError(
            f"the model translates from {known[0]} to {known[1]}, not from {source_lang} to {target_lang}: exchange "
            "source_lang and target_lang, or choose another model"
        )


def tell_languages(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    source_lang: str | None,
    target_lang: str | None,
    options: tuple[str, str] = ("source_lang", "target_lang"),
) -> tuple[str, int | None]:
    """Tell the tokenizer of a model with several languages its two, in whichever codes; others need nothing.

    OPUS-MT models with several target languages take `>>code<<` before the source. Models whose tokenizer has
    `src_lang` (M2M100, NLLB, mBART-50) take the target's code as the first token.

    Args:
        name: of the model, in messages.
        options: that name the languages, likewise.

    Returns:
        What each source has to begin with, mostly nothing, and the `forced_bos_token_id` of the model, or None.

    Raises:
        ValueError: a language that the model does not know, or none where it has to be told one.
    """
    if marian := target_codes(tokenizer):
        wanted = find_language(target_lang, marian)
        if wanted is None:
            known = ", ".join(code.strip("<>") for code in marian[:20])
            raise ValueError(f"{name} has several target languages: give {options[1]}, one of {known} …")
        return f"{wanted} ", None
    known = known_languages(tokenizer) if hasattr(tokenizer, "src_lang") else []
    if not known:
        return "", None
    if None in (source_lang, target_lang):
        raise ValueError(f"{name} is multilingual: give {options[0]} and {options[1]}")
    source, target = (find_language(code, known) for code in (source_lang, target_lang))
    if None in (source, target):
        wanted, option = (source_lang, options[0]) if source is None else (target_lang, options[1])
        raise ValueError(f"{name} knows no language {wanted!r}: give {option} as one of {', '.join(known[:20])} …")
    tokenizer.src_lang, tokenizer.tgt_lang = source, target
    if type(tokenizer).__name__.startswith("MBartTokenizer"):  # of mBART-25, whose targets end with it, and so start
        return "", None
    # The tokens of M2M100 are not the codes themselves.
    token_id = getattr(tokenizer, "get_lang_id", tokenizer.convert_tokens_to_ids)
    return "", token_id(target)


def with_code(tokenizer: PreTrainedTokenizerBase, prefix: str, sources: Iterable[str]) -> list[str]:
    """Sources with the code that they have to begin with, but for those that begin with one, or are blank."""
    return [prefix + each if each.strip() and not leading_code(tokenizer, each) else each for each in sources]


def same_vocabulary(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase) -> str:
    """In what two tokenizers differ that would give a text other ids, or `""`: entries, SentencePiece models."""
    for attribute, what in (("get_vocab", "vocabulary"), ("target_encoder", "target vocabulary")):
        entries = [getattr(tokenizer, attribute, None) for tokenizer in (first, second)]
        ours, theirs = (value() if callable(value) else value or {} for value in entries)
        if ours != theirs:
            example = next((entry for entry in ours if theirs.get(entry) != ours[entry]), None)
            detail = "" if example is None else f", {example!r} has id {ours[example]} and {theirs.get(example)}"
            return f"the {what} differs ({len(ours)} and {len(theirs)} entries{detail})"
    for side in ("spm_source", "spm_target"):
        models = [getattr(tokenizer, side, None) for tokenizer in (first, second)]
        ours, theirs = (model and model.serialized_model_proto() for model in models)
        if ours != theirs:
            return f"the SentencePiece models of the {side.removeprefix('spm_')} differ"
    return ""


def entries_of(tokenizer: PreTrainedTokenizerBase, side: str) -> dict[str, int]:
    """The tokens of `"source"` or `"target"` and their ids, added ones among them: all that a text can become."""
    if side == "target" and getattr(tokenizer, "separate_vocabs", False):
        return tokenizer.target_encoder | tokenizer.added_tokens_encoder
    return tokenizer.get_vocab()


def vocabulary_size(tokenizer: PreTrainedTokenizerBase, side: str) -> int:
    """How many embeddings the tokens of a side need: ids may have gaps, and added tokens stand behind padding."""
    return 1 + max(entries_of(tokenizer, side).values())


def vocabulary(tokenizer: PreTrainedTokenizerBase, side: str) -> dict[str, int]:
    """The tokens of `"source"` or `"target"` and their ids, in order, without padding, which other engines lack.

    An engine numbers them anew; their embeddings are the rows of the ids here.
    """
    entries = entries_of(tokenizer, side)
    padding = tokenizer.pad_token
    return {token: entries[token] for token in sorted(entries, key=entries.get) if token != padding}


def check_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `ValueError` if a tokenizer has ids that a model has not, or another padding token."""
    sides = [("source", "entries", "vocabulary", model.get_input_embeddings())]
    if hasattr(tokenizer, "separate_vocabs"):
        sides.append(("target", "target entries", "decoder vocabulary", model.get_decoder().embed_tokens))
    for side, entries, what, embeddings in sides:
        needed, rows = vocabulary_size(tokenizer, side), embeddings.weight.shape[0]
        if needed > rows:
            raise ValueError(
                f"the tokenizer has {needed} {entries}, the model's {what} {rows}: they do not belong together"
            )
    padding = getattr(model.config, "pad_token_id", None)
    if padding is not None and tokenizer.pad_token_id != padding:
        raise ValueError(
            f"the tokenizer's padding token is {tokenizer.pad_token_id}, the model's {padding}: they do not belong "
            "together"
        )


def check_vocabulary(
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    source: Sequence[str] | None,
    target: Sequence[str] | None,
) -> None:
    """Raise `ValueError` unless the vocabularies of an exported model, None if there is none, are the tokenizer's."""
    for side, found in (("source", source), ("target", target)):
        if found != list(vocabulary(tokenizer, side)):
            raise ValueError(f"{folder} has not the {side} vocabulary of the tokenizer: convert its model again")


def convert_source_ids_to_tokens(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """`convert_ids_to_tokens` for sources: that of a `MarianTokenizer` with two vocabularies is for targets alone."""
    if not getattr(tokenizer, "separate_vocabs", False):
        return tokenizer.convert_ids_to_tokens(ids)
    names = {index: token for token, index in entries_of(tokenizer, "source").items()}
    return [names[index] for index in ids]


def _without_codes(sources: Iterable[str | None], codes: set[str]) -> Iterator[str | None]:
    """The sources without the codes that they begin with, which are added to a set."""
    for source in sources:
        if source and (code := LANGUAGE_CODE.match(source)):
            codes.add(code.group().strip())
            source = source[code.end() :]
        yield source


def _chain(*sides: Iterable[str]) -> Iterable[str]:
    for side in sides:
        yield from side


def _train_model(sentences: Iterable[str], what: str, options: dict) -> bytes:
    model = io.BytesIO()
    # SentencePiece ends a sentence at a line end; a stray one inside would make two.
    lines = (" ".join(sentence.split()) for sentence in sentences if sentence and sentence.strip())
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            shuffle_input_sentence=True,
            minloglevel=2,
            **options,
        )
    except RuntimeError as error:
        size = options["vocab_size"]
        if allowed := re.search(r"value <= (\d+)", str(error)):
            raise ValueError(
                f"the {what} of the training corpus is too small for vocab_size={size}: "
                f"it allows at most {allowed.group(1)} pieces. Set vocab_size to that or less, or bring more text"
            ) from error
        if needed := re.search(r"smaller than required_chars. (\d+) vs (\d+)", str(error)):
            raise ValueError(
                f"vocab_size={size} is too small for the {what} of the training corpus, which has {needed.group(2)} "
                "different characters. Raise vocab_size, or lower character_coverage (0.9995 is usual for Japanese)"
            ) from error
        raise ValueError(f"no SentencePiece model of the {what}: {error}") from error
    return model.getvalue()


def _pieces(model: bytes) -> list[str]:
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = range(processor.get_piece_size())
    return [processor.id_to_piece(i) for i in ids if not (processor.is_control(i) or processor.is_unknown(i))]


def _write_vocabulary(file: Path, pieces: list[str]) -> None:
    entries = dict.fromkeys(["</s>", "<unk>", *pieces, "<pad>"])
    content = json.dumps({entry: index for index, entry in enumerate(entries)}, ensure_ascii=False, indent=1)
    file.write_text(content, "utf-8")
