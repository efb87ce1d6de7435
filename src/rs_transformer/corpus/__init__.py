"""Parallel corpora in, cleaned and checked, as `datasets`: columns `source` and `target`, then token ids."""

from .arguments import SPLITS, TRAINING_OPTIONS, AnyDataset, CorpusArguments, OptionalCorpusArguments
from .checks import check_script, warn_of_long_pairs, warn_of_overlap
from .loading import load_evaluation_splits, load_pairs, load_split, read_sentences
from .training_pairs import PairFilter, encode_pairs, prepare_training_pairs

__all__ = [
    "SPLITS",
    "TRAINING_OPTIONS",
    "AnyDataset",
    "CorpusArguments",
    "OptionalCorpusArguments",
    "PairFilter",
    "check_script",
    "encode_pairs",
    "load_evaluation_splits",
    "load_pairs",
    "load_split",
    "prepare_training_pairs",
    "read_sentences",
    "warn_of_long_pairs",
    "warn_of_overlap",
]
