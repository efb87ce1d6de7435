"""What can be wrong with parallel text, looked for before anything long begins."""

import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..pipeline_rs_marian import split_code
from ..tokenization import encode
from .arguments import AnyDataset, CorpusArguments, first_rows

logger = logging.get_logger(__name__)

# How Unicode's names of letters begin, and the languages that are written in these and not in Latin ones.
SCRIPTS = {
    "HIRAGANA": "ja",
    "KATAKANA": "ja",
    "CJK": "ja zh yue wuu",
    "HANGUL": "ko",
    "CYRILLIC": "ru uk be bg mk",
    "ARABIC": "ar fa ps ur ug",
    "HEBREW": "he yi",
    "GREEK": "el",
    "ARMENIAN": "hy",
    "GEORGIAN": "ka",
    "ETHIOPIC": "am ti",
    "DEVANAGARI": "hi mr ne",
    "BENGALI": "bn as",
    "GUJARATI": "gu",
    "TAMIL": "ta",
    "TELUGU": "te",
    "KANNADA": "kn",
    "MALAYALAM": "ml",
    "SINHALA": "si",
    "THAI": "th",
    "LAO": "lo",
    "KHMER": "km",
    "MYANMAR": "my",
}
# Of these, those that few languages share: what is written so is of none that is not named above.
ONE_LANGUAGE_SCRIPTS = [name for name in SCRIPTS if name not in ("CYRILLIC", "ARABIC", "DEVANAGARI", "BENGALI")]
SAMPLE = 200  # pairs that are looked at to see which side is which
BATCH = 100_000  # pairs that are looked at together
NOT_NORMAL = "is not in Unicode's normal form C, in which models write"
TESTS = {
    "is missing": pc.is_null,
    "is blank": lambda texts: pc.equal(pc.utf8_trim_whitespace(texts), ""),
    "has a line break in it": lambda texts: pc.match_substring(texts, "\n"),
    # Which SentencePiece makes of it: a translation would be scored as another text.
    NOT_NORMAL: lambda texts: pc.not_equal(pc.utf8_normalize(texts, form="NFC"), texts),
}


def check_pairs(dataset: AnyDataset, args: CorpusArguments, split: str) -> None:
    """Look at the pairs of a split; of a stream at the first ones.

    Raises:
        ValueError: there are none, the sides are exchanged, or a text to evaluate on is missing.
    """
    sample = list(first_rows(dataset, SAMPLE))
    if not sample:
        raise ValueError(f"the {split} split is empty")
    sides = [" ".join(row[side] or "" for row in sample) for side in ("source", "target")]
    if sides[0] == sides[1] and sides[0].strip():
        logger.warning(f"Source and target of the {split} split are the same text in the first {len(sample)} pairs.")
    _check_scripts(sides, args, split)
    if isinstance(dataset, IterableDataset):
        return
    kinds = TESTS if split in ("validation", "test") else ["has a line break in it"]  # the filter counts the others
    for side in ("source", "target"):
        for kind in kinds:
            if kind == NOT_NORMAL and side == "source":
                continue
            rows = _rows_where(dataset, side, TESTS[kind])
            if not rows:
                continue
            what = f"the {side} of {len(rows)} {split} pairs {kind}, first in row {rows[0]}"
            if kind == "is missing":
                raise ValueError(f"{what}: leave the pairs out, or write an empty string for a blank text")
            logger.warning(f"{what[0].upper()}{what[1:]}.")


def _rows_where(dataset: Dataset, side: str, test: Callable[[pa.ChunkedArray], pa.ChunkedArray]) -> list[int]:
    """The rows, from 1, in which a test holds."""
    rows: list[int] = []
    for start, batch in enumerate(dataset.select_columns([side]).with_format("arrow").iter(BATCH)):
        rows += [start * BATCH + index + 1 for index in pc.indices_nonzero(test(batch[side])).to_pylist()]
    return rows


def _check_scripts(sides: Sequence[str], args: CorpusArguments, split: str) -> None:
    """Raise `ValueError` if a language's letters are all on the other language's side."""
    letters = [_letters(side) for side in sides]
    for side, language in enumerate((args.source_lang, args.target_lang)):
        shares = [_share(found, _scripts_of(language)) for found in letters]
        if letters[side] and shares[side] < 0.01 and shares[1 - side] > 0.5:
            raise ValueError(
                f"source and target of the {split} split look exchanged: what should be {args.source_lang} is "
                f"{sides[0][:40]!r}, what should be {args.target_lang} is {sides[1][:40]!r}"
            )


def check_script(texts: Sequence[str], language: str, where: str) -> None:
    """Raise `ValueError` if sentences have hardly a letter of their language, or are written as others alone are."""
    sample = " ".join(texts[:SAMPLE])
    letters, own = _letters(sample), _scripts_of(language)
    code, script, _ = split_code(language)
    foreign = ONE_LANGUAGE_SCRIPTS if len(code) == 2 and not own and not script else []
    if letters and ((own and _share(letters, own) < 0.01) or _share(letters, foreign) > 0.5):
        raise ValueError(f"{where} is not written as {language} is: {sample[:40]!r}; give text of that language")


def _letters(text: str) -> Counter[str]:
    """How many letters a text has of each script, as Unicode's names of letters begin."""
    return Counter(unicodedata.name(c, "").split(" ")[0] for c in text if c.isalpha())


def _scripts_of(language: str) -> list[str]:
    """The scripts that a language is written in, where it is not written in Latin ones."""
    code, script, _ = split_code(language)
    return [name for name, codes in SCRIPTS.items() if code in codes.split() and script != "latn"]


def _share(letters: Counter[str], scripts: Sequence[str]) -> float:
    return sum(map(letters.__getitem__, scripts)) / max(1, letters.total())


def warn_of_overlap(train: AnyDataset, evaluated: Mapping[str, Dataset]) -> None:
    """Warn of evaluation pairs that are training pairs, too, by text: their scores say little of other text.

    A stream is not looked at. Short sentences recur in most corpora, so this is not an error.
    """
    if isinstance(train, IterableDataset):
        return
    for split, dataset in evaluated.items():
        pairs = pc.unique(_joined(dataset.with_format("arrow")[:]))
        seen = pa.array([False] * len(pairs))
        for batch in train.select_columns(["source", "target"]).with_format("arrow").iter(BATCH):
            seen = pc.or_(seen, pc.is_in(pairs, value_set=_joined(batch)))
        if number := pc.sum(seen).as_py():
            example = pairs.filter(seen)[0].as_py().split("\n")[0]
            logger.warning(
                f"{number} of {len(pairs)} different {split} pairs ({number / len(pairs):.1%}) are training pairs, "
                f"too, as {example[:80]!r}: scores on them are no measure of other text."
            )


def warn_of_long_pairs(
    evaluated: Mapping[str, Dataset], tokenizer: PreTrainedTokenizerBase, positions: int | None
) -> None:
    """Warn of evaluation pairs that are longer than the model takes, which are cut to `positions` tokens."""
    if positions is None:
        return
    for split, dataset in evaluated.items():
        for side in ("source", "target"):
            encoded = encode(tokenizer, dataset[side][:], target=side == "target")
            longer = [row for row, ids in enumerate(encoded, start=1) if len(ids) > positions]
            if longer:
                logger.warning(
                    f"The {side} of {len(longer)} {split} pairs, first in row {longer[0]}, is longer than the "
                    f"{positions} tokens that the model takes: it is cut."
                )


def _joined(table: pa.Table) -> pa.Array:
    joined = pc.binary_join_element_wise(table["source"], table["target"], "\n", null_handling="replace")
    return joined.combine_chunks() if isinstance(joined, pa.ChunkedArray) else joined
