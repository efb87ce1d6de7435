"""`tokenizer.json` of a `MarianTokenizer`, for transformers.js and tokenizers, which read no SentencePiece models.

Their `Precompiled` normalizer, two re-implementations, is not SentencePiece's. So the normalization is written out
here: by NFKC, and by replacements where SentencePiece's rules say otherwise.
"""

import json
import re
import struct
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path

from transformers import MarianTokenizer

from ..tokenization import entries_of
from ..utils.sentencepiece_model import BPE, NORMAL, PIECES, UNIGRAM, model_type, read_fields, read_piece

NORMALIZER = 3  # a field of a SentencePiece model
CHARSMAP, DUMMY_PREFIX, EXTRA_BLANKS, ESCAPED = 2, 3, 4, 5  # fields of a normalizer
UNKNOWN_PIECE, CONTROL = 2, 3  # kinds of pieces beside the normal ones
SPACE = "▁"
# No text has them: noncharacters, which in a text are taken for UNKNOWN.
UNKNOWN = "\ufdd0"  # a run of characters without an id
MARK = "\ufdd1"  # before an entry that is looked up, not segmented: a run of unknown characters, a language's code
NEVER = MARK * 2  # before an entry that no text becomes, of the other side's pieces
BEGIN = "\ufdd2"  # of what SentencePiece has to segment: of the text, or behind a language's code
BLOCK = "\ufdd3"  # between characters that NFKC must not compose or reorder
# What NFKC changes since Unicode 12.1: tokenizers' is of 12.0, and browsers differ.
LATE = re.compile(
    "[\u32ff\ua7f1-\ua7f4\uab69\U00010780-\U000107ba\U0001ccd6-\U0001ccf9\U0001e030-\U0001e06d\U0001f16c"
    "\U0001fbf0-\U0001fbf9]"
)
KEPT = [chr(code) for code in range(0xFDD4, 0xFDF0)]  # for characters that NFKC would change


def write_tokenizer_json(tokenizer: MarianTokenizer, folder: str | Path) -> list[Path]:
    """Write a tokenizer as `tokenizer.json` and `tokenizer_config.json`; returns the files.

    It encodes as the source side of the `MarianTokenizer` and decodes as it does. With separate vocabularies one file
    cannot have two strings for an id: `tokenizer.json` is of the sources, and `target_tokenizer.json` decodes the
    translations (and encodes as `text_target=`). The class that `tokenizer_config.json` names is
    `PreTrainedTokenizerFast`, so the folder is to be another than the `MarianTokenizer`'s.

    One difference stays. A run of unknown characters that normalization makes to the text of a special token
    (`＜/s＞`, if `<`, `/`, `s` and `>` are unknown) is unknown here, and the special token there.

    Raises:
        ValueError: a tokenizer that the format cannot copy: not a `MarianTokenizer`, a SentencePiece model that is
            neither unigram nor BPE or has byte or user-defined pieces or another treatment of blanks, a piece without
            an id, or a character that only longer pieces have.
    """
    if not isinstance(tokenizer, MarianTokenizer):
        raise ValueError(f"tokenizer.json is made from a MarianTokenizer, got a {type(tokenizer).__name__}")
    folder = Path(folder)
    files = {folder / "tokenizer.json": tokenizer_json(tokenizer, "source")}
    if tokenizer.separate_vocabs:
        files[folder / "target_tokenizer.json"] = tokenizer_json(tokenizer, "target")
    files[folder / "tokenizer_config.json"] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": tokenizer.model_max_length,
        "clean_up_tokenization_spaces": bool(tokenizer.clean_up_tokenization_spaces),
        **{f"{name}_token": getattr(tokenizer, f"{name}_token") for name in ("eos", "pad", "unk")},
    }
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in files.items():
        file.write_text(json.dumps(content, ensure_ascii=False), "utf-8")
    return list(files)


def tokenizer_json(tokenizer: MarianTokenizer, side: str) -> dict:
    """What the file says of `"source"` or `"target"`.

    Raises:
        ValueError: as `write_tokenizer_json`.
    """
    entries = entries_of(tokenizer, side)
    model = getattr(tokenizer, f"spm_{side}").serialized_model_proto()
    kind, scores = _read_pieces(model, f"{side}.spm", entries)
    known = {piece for piece in scores if len(piece) == 1}
    added = dict(sorted(tokenizer.added_tokens_decoder.items()))
    plain = {*scores, *(str(token) for token in added.values())}
    letters = set().union(*entries)
    marked = [token for token in entries if token not in plain]
    runs = [token for token in marked if known.isdisjoint(token)]
    codes = [token for token in marked if token.startswith(">>") and token.find("<<") == len(token) - 2]
    marks = dict.fromkeys(plain, "") | dict.fromkeys([*runs, *codes], MARK)
    names = {index: marks.get(token, NEVER) + token for token, index in entries.items()}
    names = [names.get(index, f"{NEVER}{MARK}{index}") for index in range(1 + max(names))]
    unknown, *characters = _character_steps(_normalization_rules(model, f"{side}.spm"), letters)
    normalizers = [
        unknown,
        *_code_steps(codes),
        *characters,
        *_blank_steps(),
        *_run_steps(known, runs, codes),
    ]
    # BPE's vocabulary is asked for what stands alone before its merges are: none lead to an unknown run.
    lone = f"{MARK}{_unknown_character(known)}+{_behind_code(codes)}"
    alone = [] if kind == UNIGRAM else [_split(lone, "Isolated")]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": index,
                "content": str(token),
                **{name: getattr(token, name) for name in ("single_word", "lstrip", "rstrip", "special")},
                "normalized": False,
            }
            for index, token in added.items()
        ],
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*alone, _split(BEGIN, "Removed")]},
        "post_processor": _ending(tokenizer.eos_token, tokenizer.eos_token_id),
        "decoder": {"type": "Sequence", "decoders": _decoders(tokenizer.all_special_tokens)},
        "model": (_unigram if kind == UNIGRAM else _bpe)(names, scores, tokenizer.unk_token),
    }


# SentencePiece's models


def _read_pieces(model: bytes, name: str, entries: Mapping[str, int]) -> tuple[int, dict[str, float]]:
    """The type of a model and the scores of its pieces, if a tokenizer.json can have them."""
    kind, scores = model_type(model), {}
    if kind not in (UNIGRAM, BPE):
        raise ValueError(f"{name} is neither a unigram nor a BPE model: no tokenizer.json can be made from it")
    for number, value, _ in read_fields(model):
        if number == PIECES:
            piece, score, what = read_piece(value)
            if what == NORMAL:
                scores[piece] = score
            elif what not in (UNKNOWN_PIECE, CONTROL):
                raise ValueError(f"{name} has {piece!r}, a byte or a piece of the user's: tokenizer.json cannot")
    missing = [piece for piece in scores if piece not in entries]
    if missing:
        raise ValueError(
            f"{len(missing)} pieces of {name} have no id ({missing[0]!r} is one): tokenizer.json needs one of each"
        )
    open_ended = next((char for piece in scores for char in piece if char not in scores), None)
    if open_ended is not None:
        raise ValueError(f"{name} has {open_ended!r} in longer pieces, but not alone: tokenizer.json cannot")
    return kind, scores


def _normalization_rules(model: bytes, name: str) -> dict[str, str]:
    """What a model replaces before it segments a text: at each place the longest that it knows."""
    spec = {}
    for number, value, _ in read_fields(model):
        if number == NORMALIZER:
            spec = {field: content for field, content, _ in read_fields(value)}
    if not all(spec.get(field, 1) for field in (DUMMY_PREFIX, EXTRA_BLANKS, ESCAPED)):
        raise ValueError(f"{name} keeps blanks as they are, or begins texts without one: tokenizer.json cannot")
    charsmap = spec.get(CHARSMAP, b"")
    return dict(_read_charsmap(charsmap)) if charsmap else {}


def _read_charsmap(charsmap: bytes) -> Iterator[tuple[str, str]]:
    """The rules of a charsmap: a trie as a double array (Darts), and the texts that it points to, ended by zeros."""
    (size,) = struct.unpack_from("<I", charsmap)
    units = struct.unpack_from(f"<{size // 4}I", charsmap, 4)
    texts = charsmap[4 + size :]

    def base(unit: int) -> int:
        return unit >> 10 << (unit >> 6 & 8)

    children = defaultdict(list)  # of a base: those units whose place is the base and, by exclusive or, their byte
    for place, unit in enumerate(units):
        byte = unit & 0x800000FF
        if 0 < byte < 256:
            children[place ^ byte].append((byte, place))
    nodes = [(base(units[0]), b"")]
    while nodes:
        start, prefix = nodes.pop()
        for byte, place in children.get(start, ()):
            unit, text = units[place], prefix + bytes([byte])
            child = place ^ base(unit)
            if unit >> 8 & 1:
                value = units[child] & 0x7FFFFFFF
                yield text.decode(), texts[value : texts.index(0, value)].decode()
            nodes.append((child, text))


# Normalization


def _character_steps(rules: Mapping[str, str], letters: Collection[str]) -> list[dict]:
    """The rules as far as they bear upon letters, those of the vocabulary; all else becomes unknown."""

    def shows(text: str) -> bool:
        return not text or any(char == " " or char in letters for char in text)

    def visible(text: str) -> str:
        return "".join(char if char == " " or char in letters else UNKNOWN for char in text)

    needed = {
        key: value
        for key, value in rules.items()
        if shows(value) or (len(key) > 1 and any(shows(rules.get(char, char)) for char in key))
    }
    alphabet = set("<> ").union(letters, *needed)
    unknown = _replace(f"[^{_members(alphabet)}]", UNKNOWN)
    if not rules:
        return [unknown]
    # What NFKC does not do, does otherwise, or does in a new Unicode only.
    changed: dict[str, list[str]] = defaultdict(list)
    kept = []
    for char in sorted(alphabet):
        wanted = rules.get(char, char)
        if wanted != unicodedata.normalize("NFKC", char) or LATE.match(char):
            if wanted == char and char in letters:
                kept.append(char)
            else:
                changed[visible(wanted) or BLOCK].append(char)
    if len(kept) > len(KEPT):
        raise ValueError(f"NFKC changes {len(kept)} characters of the vocabulary, tokenizer.json can keep {len(KEPT)}")
    # What the rules do with several characters is what NFKC does; the others it leaves apart.
    joined, other = defaultdict(list), []
    for key, value in needed.items():
        if len(key) > 1:
            if value == unicodedata.normalize("NFKC", "".join(rules.get(char, char) for char in key)):
                for place in range(1, len(key)):
                    joined[key[place]].append(key[:place])
            else:
                other.append(key)
    return [
        unknown,
        *(_replace(_escaped(key), visible(needed[key]) + BLOCK) for key in sorted(other, key=len, reverse=True)),
        _replace(_apart(_joining({char: rules.get(char, char) for char in alphabet}), joined), BLOCK),
        *(_replace(f"[{_members(chars)}]", value) for value, chars in changed.items()),
        *map(_replace, kept, KEPT),
        {"type": "NFKC"},
        _replace(BLOCK, ""),
        *(_replace(mark, char) for char, mark in zip(kept, KEPT, strict=False)),
    ]


def _apart(joining: Iterable[str], joined: Mapping[str, Collection[str]]) -> str:
    """The places before characters that NFKC would join to what is before them, where no rule does."""
    alike: dict[str, set[str]] = defaultdict(set)
    for char in joining:
        alike[_alternatives(joined.get(char, ()))].add(char)
    places = []
    for before, chars in sorted(alike.items()):
        places.append(f"(?<!{before})" * bool(before) + f"(?=[{_members(chars)}])")
    return "|".join(places)


def _joining(characters: Mapping[str, str]) -> list[str]:
    """Those whose text NFKC composes with a character before it, or reorders; of Hangul none."""
    decomposed = (unicodedata.decomposition(chr(code)).split() for code in range(0x30000))
    marks = {chr(int(part, 16)) for parts in decomposed if parts and parts[0][0] != "<" for part in parts[1:]}
    firsts = ((char, unicodedata.normalize("NFKD", text)[:1]) for char, text in characters.items())
    return [char for char, first in firsts if first and (first in marks or unicodedata.combining(first))]


def _code_steps(codes: Collection[str]) -> list[dict]:
    """A code that a text begins with is an entry, or unknown; what follows is a text like any."""
    # tokenizers loses count of a text before the first character of which something is inserted: hence BEGIN is there.
    steps = [{"type": "Prepend", "prepend": BEGIN}]
    if codes:
        marked = "|".join(MARK + _escaped(code) for code in codes)
        steps.append(_replace(f"{BEGIN}(?={'|'.join(map(_escaped, codes))})", MARK))
        steps.append(_replace(f"(?<={marked})", BEGIN))
    return [*steps, _replace(rf"{BEGIN}>>[\s\S]*?<<", UNKNOWN + BEGIN)]


def _blank_steps() -> list[dict]:
    """One blank between words, none at the ends, then SentencePiece's sign for it, also before the first word."""
    return [
        _replace(" +", " "),
        _replace(rf"(?<={BEGIN}) |[ {SPACE}]+\z", ""),
        _replace(rf"{BEGIN}(?=[\s\S])", BEGIN + SPACE),
        _replace(" ", SPACE),
    ]


def _run_steps(known: Collection[str], runs: Collection[str], codes: Collection[str]) -> list[dict]:
    """A whole run of characters that are no pieces has the id of the entry that is called so, or is unknown."""
    first, char = f"(?<![^{_members({*known, BEGIN})}])", _unknown_character(known)
    steps = [_replace(f"{first}{char}+{_behind_code(codes)}", UNKNOWN)]
    if runs:
        entries = "|".join(map(_escaped, sorted(runs)))
        steps.insert(0, _replace(f"{first}(?=(?:{entries})(?!{char}){_behind_code(codes)})", MARK))
    return steps


def _unknown_character(known: Collection[str]) -> str:
    return f"[^{_members({*known, MARK, BEGIN})}]"


def _behind_code(codes: Collection[str]) -> str:
    """A condition, that this is no part of a code: its end is not as near as that."""
    return f"(?![^{BEGIN}]{{0,{max(map(len, codes))}}}{BEGIN})" if codes else ""


# Parts of the file


def _unigram(names: list[str], scores: Mapping[str, float], unk_token: str) -> dict:
    # Special and added tokens stand in the vocabulary, lower than any way to spell them: a text has them from the
    # splitting at added tokens alone. An unknown character is 10 lower still, which alters nothing: no piece has one.
    lowest = 2 * max(map(len, names)) * min(-1, *scores.values())
    vocab = [[name, 0 if name[0] == MARK else scores.get(name, lowest)] for name in names]
    return {"type": "Unigram", "unk_id": names.index(unk_token), "vocab": vocab, "byte_fallback": False}


def _bpe(names: list[str], scores: Mapping[str, float], unk_token: str) -> dict:
    splits = {
        piece: [(piece[:i], piece[i:]) for i in range(1, len(piece)) if piece[:i] in scores and piece[i:] in scores]
        for piece in sorted(scores, key=scores.get, reverse=True)
    }
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": unk_token,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": True,
        "vocab": {name: index for index, name in enumerate(names)},
        "merges": [list(pair) for pairs in splits.values() for pair in pairs],
    }


def _decoders(special: Iterable[str]) -> list[dict]:
    return [
        {"type": "Fuse"},
        # After a special token a blank; the piece that follows has none, if the SentencePiece model has it.
        _replace(f"(?<={'|'.join(map(_escaped, special))}){SPACE}*", " "),
        _replace(MARK, ""),
        _replace(SPACE, " "),
        _replace(r"\A\s+|\s+\z", ""),
    ]


def _ending(token: str, index: int) -> dict:
    eos = {"SpecialToken": {"id": token, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [first, eos],
        "pair": [first, second, eos],
        "special_tokens": {token: {"id": token, "ids": [index], "tokens": [token]}},
    }


def _replace(pattern: str, content: str) -> dict:
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}


def _split(pattern: str, behavior: str) -> dict:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": False}


# Regular expressions that Oniguruma and JavaScript read alike


def _escaped(text: str) -> str:
    return "".join(char if char.isalnum() or ord(char) > 127 else rf"\x{{{ord(char):x}}}" for char in text)


def _members(chars: Iterable[str]) -> str:
    """What stands in brackets for characters: ranges, where they follow each other."""
    codes = sorted(map(ord, chars))
    parts = []
    for _, group in groupby(enumerate(codes), lambda pair: pair[1] - pair[0]):
        run = [_escaped(chr(code)) for _, code in group]
        parts.append(run[0] if len(run) == 1 else f"{run[0]}-{run[-1]}")
    return "".join(parts)


def _alternatives(texts: Iterable[str]) -> str:
    """Any of some texts; those that end alike share it."""
    firsts: dict[str, set[str]] = defaultdict(set)
    for text in texts:
        firsts[text[1:]].add(text[0])
    return "|".join(f"[{_members(chars)}]{_escaped(rest)}" for rest, chars in sorted(firsts.items()))
