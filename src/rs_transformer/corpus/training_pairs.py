"""Training pairs as token ids, those that are too long or too unlike left out.

Not for batching (`training/batches.py`).
"""

from collections import Counter
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from datasets import IterableDataset
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..subword_sampling import SubwordSampler
from ..tokenization import encode
from .arguments import AnyDataset, CorpusArguments

logger = logging.get_logger(__name__)

DRAWS = 4  # segmentations by chance that say how long a pair may become


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
    made_by: str = "",
) -> dict:
    """Tokenise a batch of text pairs and mark those to leave out, for `Dataset.map(batched=True)`.

    `made_by` is the version of this package: of another one the cache of `datasets` is to serve nothing.

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
            "made_by": version("rs-transformer"),
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


def _log_stream(encoded: IterableDataset) -> IterableDataset:
    """Leave out the marked rows of a stream and log their number so far: after 10 pairs, 100, 1,000 and so on.

    Raises:
        ValueError: nothing is left.
    """
    keep = _Kept()
    kept = encoded.filter(keep).remove_columns("left_out")
    if next(iter(kept), None) is None:
        raise ValueError(f"no training pair is left of {keep.counts.total()}: {_in_words(keep.counts)}")
    keep.counts.clear()
    return kept


class _Kept:
    """Whether a row of a stream is kept, which it counts; a class, so that workers that are not forked can have it."""

    def __init__(self) -> None:
        self.counts: Counter = Counter()

    def __call__(self, row: dict[str, Any]) -> bool:
        self.counts[row["left_out"]] += 1
        total = self.counts.total()
        if total >= 10 and total == 10 ** (len(str(total)) - 1):
            log_left_out(Counter({reason: count for reason, count in self.counts.items() if reason}), total)
        return not row["left_out"]


def log_left_out(counts: Counter, total: int) -> None:
    """Log how many of `total` pairs were left out, and why."""
    logger.info(f"Training pairs: {total - counts.total()} of {total} kept; left out: {_in_words(counts) or 'none'}")


def _in_words(counts: Counter) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
