"""Where parallel text comes from, and which pairs are kept for training."""

from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset, IterableDataset

from ..utils.ranges import check_range

AnyDataset = Dataset | IterableDataset

SPLITS = ("train", "validation", "test")
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
            "help": "More training pairs, as what `synthesize` makes of monolingual text; files as for train_file, "
            "each of its own type.",
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


def first_rows(dataset: AnyDataset, number: int) -> AnyDataset:
    """The first rows, or all where there are fewer, of which `Dataset.take` of older `datasets` makes an error."""
    return dataset.take(number if isinstance(dataset, IterableDataset) else min(number, len(dataset)))
