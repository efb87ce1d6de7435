"""Parallel corpora in, cleaned and checked, as `datasets`: columns `source` and `target`, then token ids.

Not for the forms of files (`utils/text_files.py`), tokenizer training (`tokenization.py`), or batching
(`training/batches.py`).
"""

import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from itertools import chain, islice, zip_longest
from operator import getitem
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import (
    Dataset,
    Features,
    IterableDataset,
    Value,
    concatenate_datasets,
    load_dataset,
    load_dataset_builder,
)
from datasets.exceptions import DatasetGenerationError
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from .pipeline_rs_marian import split_code
from .subword_sampling import SubwordSampler
from .tokenization import encode
from .utils.ranges import check_range
from .utils.text_files import FORMS, Way, columns_of, digest, form_of, read_columns, read_lines

logger = logging.get_logger(__name__)

SPLITS = ("train", "validation", "test")
PAIR = Features({"source": Value("string"), "target": Value("string")})
AnyDataset = Dataset | IterableDataset
# Of `CorpusArguments`: what those have no use for that only translate.
TRAINING_OPTIONS = (
    "streaming",
    "shuffle_buffer_size",
    "max_source_length",
    "max_target_length",
    "max_length_ratio",
    "preprocessing_num_workers",
    "synthetic_file",
    "synthetic_weight",
)

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
DRAWS = 4  # segmentations by chance that say how long a pair may become
BATCH = 100_000  # pairs that are looked at together
TESTS = {
    "is missing": pc.is_null,
    "is blank": lambda texts: pc.equal(pc.utf8_trim_whitespace(texts), ""),
    "has a line break in it": lambda texts: pc.match_substring(texts, "\n"),
}


@dataclass
class CorpusArguments:
    """Where the parallel text comes from, and which pairs are kept for training."""

    source_lang: str = field(metadata={"help": "Source language, as the corpus names it (for example ja)."})
    target_lang: str = field(metadata={"help": "Target language, as the corpus names it (for example en)."})
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "A dataset on the Hub or in a folder. Or give files, below.", "aliases": ["--dataset"]},
    )
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "Its configuration, where it has several."}
    )
    train_file: list[str] | None = field(
        default=None,
        metadata={
            "help": "jsonl, csv, tsv or parquet files, or two plain-text files (source, target), line by line.",
            "nargs": "+",
        },
    )
    validation_file: list[str] | None = field(
        default=None, metadata={"help": "Likewise, for validation.", "nargs": "+"}
    )
    test_file: list[str] | None = field(default=None, metadata={"help": "Likewise, for the final test.", "nargs": "+"})
    synthetic_file: list[str] | None = field(
        default=None,
        metadata={
            "help": "More training pairs, as what `synthesize` makes of monolingual text; files as for train_file.",
            "nargs": "+",
        },
    )
    synthetic_weight: float = field(
        default=1.0,
        metadata={"help": "How often an epoch has each synthetic pair: 2 is twice, 0.5 is half of them, drawn once."},
    )
    source_column: str | None = field(
        default=None, metadata={"help": "Text column of the source, if there is no `translation` column."}
    )
    target_column: str | None = field(
        default=None, metadata={"help": "Text column of the target, if there is no `translation` column."}
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "Read the training corpus as a stream, without a copy on disk; needs max_steps."},
    )
    shuffle_buffer_size: int = field(default=10_000, metadata={"help": "Pairs held for shuffling when streaming."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use the first so many training pairs."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use the first so many validation pairs."})
    max_source_length: int = field(
        default=256, metadata={"help": "Longest source in tokens; longer training pairs are left out."}
    )
    max_target_length: int = field(
        default=256, metadata={"help": "Longest target in tokens; longer training pairs are left out."}
    )
    max_length_ratio: float = field(
        default=9.0,
        metadata={"help": "Largest ratio of the sides' lengths in tokens (the default is Moses' clean-corpus-n)."},
    )
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes for tokenising."})

    def __post_init__(self) -> None:
        sizes = ("max_source_length", "max_target_length", "max_length_ratio", "shuffle_buffer_size")
        numbers = ("max_train_samples", "max_eval_samples", "preprocessing_num_workers")
        check_range(self, *sizes, *numbers, least=1)
        check_range(self, "synthetic_weight", above=0)
        if self.synthetic_file and self.streaming:
            raise ValueError("synthetic_file and streaming do not go together: a stream has no end to add pairs at")
        if self.source_lang is not None and self.source_lang == self.target_lang:
            raise ValueError(f"source_lang and target_lang are both {self.source_lang!r}; name two languages")
        if (self.source_column is None) != (self.target_column is None):
            raise ValueError("source_column and target_column go together; give both or neither")
        if self.source_column is not None and self.source_column == self.target_column:
            raise ValueError(f"source_column and target_column are both {self.source_column!r}; name two columns")

    def files(self, split: str) -> list[str] | None:
        return getattr(self, f"{split}_file")

    def all_files(self) -> list[str]:
        """The files that were given, and those in a folder that was: what no output may replace."""
        names = [f"{split}_file" for split in SPLITS] + ["synthetic_file"]
        files = [file for name in names for file in getattr(self, name) or ()]
        if self.dataset_name is not None:
            files += map(str, Path(self.dataset_name).rglob("*"))
        return files

    def has_split(self, split: str) -> bool:
        """Whether files or a dataset name were given for `split`; a named dataset may still lack the split."""
        return self.files(split) is not None or self.dataset_name is not None

    def split_name(self, split: str) -> str | None:
        """What a split is called where its scores are shown: its first file, with the folder, or the dataset."""
        files = self.files(split)
        return self.dataset_name if files is None else "/".join(Path(files[0]).parts[-2:])


@dataclass
class OptionalCorpusArguments(CorpusArguments):
    """Parallel text for what can do without: the languages need not be named where there is none."""

    source_lang: str | None = field(default=None, metadata={"help": "Source language, as the corpus names it."})
    target_lang: str | None = field(default=None, metadata={"help": "Target language, as the corpus names it."})


def load_split(args: CorpusArguments, split: str, streaming: bool = False) -> AnyDataset:
    """Load one split as a dataset with the text columns `source` and `target`, in the corpus's order.

    Files are read again whenever their content has changed; every value is the text that stands in the file, see
    `read_columns`. Of the train and validation splits it is the first pairs, where the arguments say how many.
    Synthetic pairs follow those of the train split, each as often as its weight says.

    Args:
        args: where to look; `{split}_file` wins over `dataset_name`.
        split: `"train"`, `"validation"` or `"test"`.
        streaming: return an `IterableDataset` that reads as it goes.

    Returns:
        The pairs. In a train split a text may be None, where the corpus has no value.

    Raises:
        FileNotFoundError: a file that is not there.
        ValueError: an unknown file type, a missing column or language, what is no text, sides of unequal length or
            exchanged, no pair at all, or (train apart) a missing text; says where.
    """
    if args.files(split) is None and args.dataset_name is None:
        raise ValueError(f"no {split} data: give {split}_file or dataset_name")
    limit = {"train": args.max_train_samples, "validation": args.max_eval_samples}.get(split)
    files = args.files(split) or _files_in_folder(args, split)
    try:
        if files:
            _check_files(files, args, f"{split}_file")
            dataset = _read_files(files, args, streaming, limit)
        else:
            dataset = load_dataset(args.dataset_name, args.dataset_config_name, split=split, streaming=streaming)
            dataset = select_text(dataset, args, where=f"the {split} split")
    except DatasetGenerationError as error:
        raise (error.__cause__ or error) from None
    if limit is not None:
        dataset = dataset.take(limit)
    _check_pairs(dataset, args, split)
    if split == "train" and args.synthetic_file:
        synthetic = _load_synthetic(args.synthetic_file, args)
        logger.info(f"Training pairs: {len(dataset)}, and {len(synthetic)} synthetic ones.")
        dataset = concatenate_datasets([part.cast(PAIR) for part in (dataset, synthetic)])
    return dataset


def load_evaluation_splits(args: CorpusArguments) -> dict[str, Dataset]:
    """The validation and test data that were given, in the corpus's order and unfiltered."""
    splits = {}
    for split in ("validation", "test"):
        if args.files(split) is None and args.dataset_name is None:
            continue
        try:
            dataset = load_split(args, split)
        except ValueError as error:
            if args.files(split) is not None or "Unknown split" not in str(error):
                raise
            continue
        if not len(dataset):
            raise ValueError(f"the {split} split is empty")
        splits[split] = dataset
    return splits


def load_pairs(files: list[str], args: CorpusArguments, what: str, option: str) -> Dataset:
    """The pairs of files that are no split, as text columns `source` and `target`; a text may be None, as in `train`.

    Args:
        files: as for `train_file`.
        what: the pairs are, in messages.
        option: that names the files, likewise.

    Raises:
        FileNotFoundError, ValueError: as `load_split`.
    """
    _check_files(files, args, option)
    pairs = _read_files(files, args, streaming=False, limit=None)
    _check_pairs(pairs, args, what)
    return pairs


def _load_synthetic(files: list[str], args: CorpusArguments) -> Dataset:
    # The columns that were named are those of the corpus.
    args = replace(args, source_column=None, target_column=None)
    pairs = load_pairs(files, args, "synthetic", "synthetic_file")
    times, share = divmod(args.synthetic_weight, 1)
    drawn = pairs.shuffle(seed=0).take(round(share * len(pairs)))
    return concatenate_datasets([*[pairs] * int(times), drawn])


def _files_in_folder(args: CorpusArguments, split: str) -> list[str]:
    """The files of a split in a folder, as `datasets` finds them; none where it is to read them by a card's options.

    Its readers take numbers and missing values for such.
    """
    if not os.path.isdir(args.dataset_name):
        return []
    config = load_dataset_builder(args.dataset_name, args.dataset_config_name).config
    files = [str(file) for file in (config.data_files or {}).get(split, [])]
    given = {name: getattr(config, name) for name in ("name", "version", "data_dir", "data_files", "description")}
    usual = {"sep": "\t"} if {form_of(file) for file in files} == {".tsv"} else {}
    return files if all(map(form_of, files)) and type(config)(**given, **usual) == config else []


def _check_files(files: list[str], args: CorpusArguments, option: str) -> None:
    """Raise unless files are there, each once, of one type, and as many as it takes."""
    for number, file in enumerate(files):
        if not Path(file).is_file():
            raise FileNotFoundError(f"{option}: there is no file {file!r}")
        if any(os.path.samefile(file, other) for other in files[:number]):
            raise ValueError(f"{option} names {file!r} twice: {' '.join(files)}")
    forms = {form_of(file) for file in files}
    if len(forms) > 1 or (forms == {""} and len(files) != 2):
        raise ValueError(
            f"{option} takes {', '.join(FORMS)} files of one type, or two plain-text files (source, target), all "
            f"of them gzipped (.gz) or not; got {' '.join(files)}"
        )
    if forms == {""}:
        # Of the two languages, each name has the other one's: corpus.en corpus.ja, or train.en.txt train.ja.txt.
        languages = (args.source_lang, args.target_lang)
        named = [[lang for lang in languages if lang in Path(file).name.split(".")] for file in files]
        if named == [[args.target_lang], [args.source_lang]]:
            raise ValueError(
                f"{option} takes the source first, which is {args.source_lang}: exchange {' and '.join(files)}"
            )
        check_same_length(*files)


def _read_files(files: list[str], args: CorpusArguments, streaming: bool, limit: int | None) -> AnyDataset:
    columns: list[Way] = []
    groups = [tuple(files)]
    if form_of(files[0]):
        names = columns_of(files[0])
        if not names:
            raise ValueError(f"{files[0]} is empty")
        columns = text_columns(names, args, where=files[0])
        groups = [(file,) for file in files]
    first = next(_read_pairs(groups, columns), None)
    if first is None:
        raise ValueError(f"there is no pair in {' '.join(files)}")
    options = {"groups": groups, "columns": tuple(columns), "limit": limit}
    if streaming:
        return IterableDataset.from_generator(_read_pairs, features=PAIR, gen_kwargs=options)
    # With features each row is encoded by them, which takes five times as long; a missing text has no type without.
    features = PAIR if None in first.values() else None
    # The digest has the cache serve what is in the files now.
    return Dataset.from_generator(_read_pairs, features=features, gen_kwargs=options | {"digest": digest(files)})


def _read_pairs(
    groups: Sequence[tuple[str, ...]], columns: Sequence[Way], limit: int | None = None, digest: str = ""
) -> Iterator[dict[str, str | None]]:
    """The pairs of files: each group is one with columns, or two plain-text ones. `datasets` may share groups out."""
    tables = (
        read_columns(group[0], columns) if columns else zip(*map(read_lines, group), strict=True) for group in groups
    )
    for source, target in islice(chain.from_iterable(tables), limit):
        yield {"source": source, "target": target}


def check_same_length(source: str, target: str) -> None:
    """Raise `ValueError` unless both plain-text files have the same number of lines."""
    for number, pair in enumerate(zip_longest(read_lines(source), read_lines(target)), start=1):
        if None in pair:
            shorter = source if pair[0] is None else target
            raise ValueError(
                f"{source} and {target} are not parallel: {shorter} ends at line {number - 1}, the other goes on"
            )


def select_text(dataset: AnyDataset, args: CorpusArguments, where: str) -> AnyDataset:
    """Bring a dataset to the text columns `source` and `target`, as `text_columns` finds them.

    Raises:
        ValueError: names the missing column or language and those that there are, or a column that is not text.
    """
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(f"{where} is empty")
    ways = text_columns(first, args, where)
    for way in ways:
        value = reduce(getitem, way, first)
        kind = getattr((dataset.features or {}).get(way[0]), "dtype", "string")
        if not isinstance(value, str | None) or (len(way) == 1 and kind not in ("string", "large_string")):
            raise ValueError(f"{where}: {'.'.join(way)!r} must be text, the first is {value!r}")
    if len(ways[0]) > 1:
        return dataset.map(_unpack, fn_kwargs={"ways": ways}, remove_columns=list(first), features=PAIR)
    names = [name for (name,) in ways]
    dataset = dataset.remove_columns([column for column in first if column not in names])
    return dataset.rename_columns({o: n for o, n in zip(names, ("source", "target"), strict=True) if o != n})


def text_columns(columns: Mapping[str, Any], args: CorpusArguments, where: str) -> list[Way]:
    """The ways to the source's and the target's text in rows like `columns`.

    Takes the columns that `source_column` and `target_column` name, else a `translation` column
    (`{"ja": …, "en": …}`), else columns named by the languages, else `source` and `target`.

    Raises:
        ValueError: names the missing column or language and those that there are.
    """
    languages = (args.source_lang, args.target_lang)
    if args.source_column is not None:
        names = (args.source_column, args.target_column)
        missing = [name for name in names if name not in columns]
        if missing:
            raise ValueError(f"{where} has no column {missing[0]!r}; its columns: {', '.join(columns)}")
    elif isinstance(columns.get("translation"), Mapping):
        missing = [language for language in languages if language not in columns["translation"]]
        if missing:
            raise ValueError(
                f"{where} has no language {missing[0]!r}; its languages: {', '.join(columns['translation'])}"
                " (source_lang and target_lang choose two)"
            )
        return [("translation", language) for language in languages]
    elif set(languages) <= set(columns):
        names = languages
    elif {"source", "target"} <= set(columns):
        names = ("source", "target")
    else:
        raise ValueError(
            f"{where} has neither a `translation` column nor columns {languages[0]!r} and {languages[1]!r}; its "
            f"columns: {', '.join(columns)}. Name the text columns with source_column and target_column"
        )
    return [(name,) for name in names]


def _unpack(row: dict[str, Any], ways: Sequence[Way]) -> dict[str, str | None]:
    (_, source), (_, target) = ways
    return {"source": row["translation"][source], "target": row["translation"][target]}


def _check_pairs(dataset: AnyDataset, args: CorpusArguments, split: str) -> None:
    """Look at the pairs of a split; of a stream at the first ones.

    Raises:
        ValueError: there are none, the sides are exchanged, or a text to evaluate on is missing.
    """
    sample = list(dataset.take(SAMPLE))
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


def _joined(table: pa.Table) -> pa.Array:
    joined = pc.binary_join_element_wise(table["source"], table["target"], "\n", null_handling="replace")
    return joined.combine_chunks() if isinstance(joined, pa.ChunkedArray) else joined


@dataclass
class PairFilter:
    """Says why a training pair is left out, if it is: emptiness, length, or the ratio of the lengths.

    Lengths are in tokens, the end of sentence included.
    """

    max_source_length: int
    max_target_length: int
    max_length_ratio: float

    def reason(self, source: str | None, target: str | None, source_length: int, target_length: int) -> str:
        """The reason for leaving the pair out, or `""` for a pair that is kept."""
        if not (source and source.strip()):
            return "empty source"
        if not (target and target.strip()):
            return "empty target"
        if source_length > self.max_source_length:
            return f"source over {self.max_source_length} tokens"
        if target_length > self.max_target_length:
            return f"target over {self.max_target_length} tokens"
        if max(source_length, target_length) > self.max_length_ratio * min(source_length, target_length):
            return f"length ratio over {self.max_length_ratio:g}"
        return ""


def encode_pairs(
    batch: dict[str, list],
    tokenizer: PreTrainedTokenizerBase,
    pair_filter: PairFilter,
    sampling: SubwordSampler | None = None,
) -> dict:
    """Tokenise a batch of text pairs and mark those to leave out, for `Dataset.map(batched=True)`.

    With `sampling` the length is the greatest of some draws, which later ones are not to exceed.
    """
    sources, targets = ([text or "" for text in batch[side]] for side in ("source", "target"))
    input_ids, labels = encode(tokenizer, sources), encode(tokenizer, targets, target=True)
    reasons = [
        pair_filter.reason(source, target, len(source_ids), len(target_ids))
        for source, target, source_ids, target_ids in zip(sources, targets, input_ids, labels, strict=True)
    ]
    lengths = [max(len(source), len(target)) for source, target in zip(input_ids, labels, strict=True)]
    if sampling is not None:
        kept = [row for row, reason in enumerate(reasons) if not reason]  # drawing takes longest for the longest
        sources, targets = ([texts[row] for row in kept] for texts in (sources, targets))
        draws = [
            sampling.encode(texts, seed, target=texts is targets)
            for seed in range(DRAWS)
            for texts in (sources, targets)
        ]
        most = min(pair_filter.max_source_length, pair_filter.max_target_length)
        for row, *drawn in zip(kept, *draws, strict=True):
            lengths[row] = max(lengths[row], min(most, max(map(len, drawn))))
    return {"input_ids": input_ids, "labels": labels, "length": lengths, "left_out": reasons}


def prepare_training_pairs(
    dataset: AnyDataset,
    tokenizer: PreTrainedTokenizerBase,
    args: CorpusArguments,
    positions: int | None = None,
    sampling: SubwordSampler | None = None,
) -> AnyDataset:
    """Tokenise and filter a training corpus.

    Args:
        dataset: text columns `source` and `target`, from `load_split`.
        tokenizer: encodes the target side by `text_target=`.
        args: the bounds of the filter.
        positions: what the model has; longer pairs are left out, whatever `args` allow.
        sampling: if the pairs are to be segmented by chance when they are trained on.

    Returns:
        A dataset with `input_ids`, `labels` (token ids, both ending in end of sentence) and `length` (the longer
        side, in tokens); with `sampling` the texts, too, and `length` is what a segmentation has at most. How many
        pairs were left out, and why, is logged; of a stream, as it goes.

    Raises:
        ValueError: nothing is left; says why.
    """
    bounds = [min(bound, positions or bound) for bound in (args.max_source_length, args.max_target_length)]
    options = {
        "batched": True,
        "fn_kwargs": {
            "tokenizer": tokenizer,
            "pair_filter": PairFilter(*bounds, args.max_length_ratio),
            "sampling": sampling,
        },
        "remove_columns": None if sampling else ["source", "target"],
    }
    if isinstance(dataset, IterableDataset):
        return _log_stream(dataset.map(encode_pairs, **options))
    encoded = dataset.map(encode_pairs, num_proc=args.preprocessing_num_workers, desc="Tokenising", **options)
    reasons = encoded["left_out"][:]
    left_out = Counter(filter(None, reasons))
    log_left_out(left_out, len(encoded))
    kept = [index for index, reason in enumerate(reasons) if not reason]
    if not kept:
        raise ValueError(f"no training pair is left of {len(encoded)}: {_in_words(left_out)}")
    return encoded.select(kept).remove_columns("left_out")


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


def _log_stream(encoded: IterableDataset) -> IterableDataset:
    """Leave out the marked rows of a stream and log their number so far: after 10 pairs, 100, 1,000 and so on.

    Raises:
        ValueError: nothing is left.
    """
    counts: Counter = Counter()

    def keep(row: dict[str, Any]) -> bool:
        counts[row["left_out"]] += 1
        total = counts.total()
        if total >= 10 and total == 10 ** (len(str(total)) - 1):
            log_left_out(Counter({reason: count for reason, count in counts.items() if reason}), total)
        return not row["left_out"]

    kept = encoded.filter(keep).remove_columns("left_out")
    if next(iter(kept), None) is None:
        raise ValueError(f"no training pair is left of {counts.total()}: {_in_words(counts)}")
    counts.clear()
    return kept


def log_left_out(counts: Counter, total: int) -> None:
    """Log how many of `total` pairs were left out, and why."""
    logger.info(f"Training pairs: {total - counts.total()} of {total} kept; left out: {_in_words(counts) or 'none'}")


def _in_words(counts: Counter) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in counts.most_common())


def read_sentences(file: str, column: str, option: str = "input_file") -> list[str]:
    """The lines of a plain-text file, or a text column of a jsonl, csv, tsv or parquet file; at least one.

    A blank line is a sentence, too. `translation.en` is a column within a column.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: there is no such column, a text is missing or is none; says in which line.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f"{option}: there is no file {file!r}")
    if not form_of(file):
        sentences = list(read_lines(file))
    else:
        columns = columns_of(file)
        way = (column,) if column in columns else tuple(column.split("."))  # translation.en
        if columns and way[0] not in columns:
            raise ValueError(f"{file} has no column {column!r}; its columns: {', '.join(columns)}")
        sentences = [text for (text,) in read_columns(file, [way])]
        if None in sentences:
            raise ValueError(
                f"{file}: {column!r} is missing in record {sentences.index(None) + 1}; write an empty string for a "
                "blank text"
            )
    if not sentences:
        raise ValueError(f"{file} is empty")
    return sentences
