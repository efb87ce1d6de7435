"""Splits, files and sentences as datasets with the text columns `source` and `target`.

Not for the forms of files (`utils/text_files.py`).
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from importlib.metadata import version
from itertools import chain, islice, zip_longest
from operator import getitem
from pathlib import Path
from typing import Any

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
from transformers.utils import logging

from ..utils.text_files import FORMS, Way, columns_of, digest, form_of, read_columns, read_lines
from .arguments import AnyDataset, CorpusArguments, first_rows
from .checks import check_pairs

logger = logging.get_logger(__name__)

PAIR = Features({"source": Value("string"), "target": Value("string")})


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
    if files == []:
        raise ValueError(f"Unknown split {split!r}: {args.dataset_name} has no file of it")
    try:
        if files:
            _check_files(files, args, f"{split}_file")
            dataset = _read_files(files, args, streaming, limit)
        else:
            # Otherwise all splits would be downloaded for this one.
            streams = streaming or args.streaming
            dataset = load_dataset(args.dataset_name, args.dataset_config_name, split=split, streaming=streams)
            dataset = select_text(dataset, args, where=f"the {split} split")
            if streams and not streaming:
                dataset = Dataset.from_list(list(dataset if limit is None else dataset.take(limit)), features=PAIR)
    except DatasetGenerationError as error:
        raise (error.__cause__ or error) from None
    if limit is not None:
        dataset = first_rows(dataset, limit)
    check_pairs(dataset, args, split)
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
            # The latter where it streams.
            if args.files(split) is not None or not re.search("Unknown split|Bad split", str(error)):
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
    check_pairs(pairs, args, what)
    return pairs


def _load_synthetic(files: list[str], args: CorpusArguments) -> Dataset:
    """The synthetic pairs, each file's by its own form and columns, as often as their weight says."""
    # The columns that were named are those of the corpus.
    args = replace(args, source_column=None, target_column=None)
    _check_there(files, "synthetic_file")
    plain = [file for file in files if not form_of(file)]
    groups = [*([plain] if plain else []), *([file] for file in files if form_of(file))]
    loaded = [load_pairs(group, args, "synthetic", "synthetic_file") for group in groups]
    pairs = concatenate_datasets([part.cast(PAIR) for part in loaded])
    times, share = divmod(args.synthetic_weight, 1)
    drawn = first_rows(pairs.shuffle(seed=0), round(share * len(pairs)))
    return concatenate_datasets([*[pairs] * int(times), drawn])


def _files_in_folder(args: CorpusArguments, split: str) -> list[str] | None:
    """The files of a split in a folder, as `datasets` finds them; None where it is to read them by a card's options.

    Its readers take numbers and missing values for such.
    """
    if not os.path.isdir(args.dataset_name):
        return None
    config = load_dataset_builder(args.dataset_name, args.dataset_config_name).config
    files = [str(file) for each in (config.data_files or {}).values() for file in each]
    given = {name: getattr(config, name) for name in ("name", "version", "data_dir", "data_files", "description")}
    usual = {"sep": "\t"} if {form_of(file) for file in files} == {".tsv"} else {}
    if not files or not all(map(form_of, files)) or type(config)(**given, **usual) != config:
        return None
    return [str(file) for file in config.data_files.get(split, [])]


def _check_there(files: list[str], option: str) -> None:
    """Raise unless files are there, each once."""
    for number, file in enumerate(files):
        if not Path(file).is_file():
            raise FileNotFoundError(f"{option}: there is no file {file!r}")
        if any(os.path.samefile(file, other) for other in files[:number]):
            raise ValueError(f"{option} names {file!r} twice: {' '.join(files)}")


def _check_files(files: list[str], args: CorpusArguments, option: str) -> None:
    """Raise unless files are there, each once, of one type, and as many as it takes."""
    _check_there(files, option)
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
    # The digest has the cache serve what is in the files now, as this version reads it.
    made_of = f"{digest(files)} {version('rs-transformer')}"
    return Dataset.from_generator(_read_pairs, features=features, gen_kwargs=options | {"digest": made_of})


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
    if len(ways[0]) > 1 or isinstance(dataset, IterableDataset):  # which renames no columns one to another
        return dataset.map(_unpack, fn_kwargs={"ways": ways}, remove_columns=list(first), features=PAIR)
    names = [name for (name,) in ways]
    dataset = dataset.remove_columns([column for column in first if column not in names])
    dataset = dataset.rename_columns({o: n for o, n in zip(names, ("source", "target"), strict=True) if o != n})
    return dataset if dataset.features == PAIR else dataset.cast(PAIR)


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
    return {side: reduce(getitem, way, row) for side, way in zip(("source", "target"), ways, strict=True)}


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
