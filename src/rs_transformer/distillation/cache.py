"""A teacher's most probable tokens for every target token, computed once and kept on disk."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, concatenate_datasets
from torch import nn
from torch.nn import functional as F
from transformers import DataCollatorForSeq2Seq, PreTrainedModel, PreTrainedTokenizerBase

from ..decoding import map_by_length
from ..utils.map_shards import Rows, map_shards
from ..utils.processes import PatientGroup
from .resegmentation import Resegmentation

CACHE_SCHEMA = pa.schema({"teacher_ids": pa.list_(pa.int32()), "teacher_log_probs": pa.list_(pa.float16())})


def cache_top_k(
    dataset: Dataset,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    top_k: int,
    output: str | Path,
    *,
    teacher_digest: str,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
    max_tokens: int = 4096,
    shard_size: int = 2000,
) -> Dataset:
    """Add the teacher's `top_k` most probable tokens at each target position to encoded pairs; kept in `output`.

    Resumable and shared out over processes like the teacher's decoding (`map_shards`).

    Args:
        dataset: `input_ids` and `labels`, from `prepare_training_pairs`.
        teacher: in evaluation mode.
        tokenizer: of the pairs.
        top_k: at most the vocabulary.
        output: the parquet file.
        teacher_digest: tells the teacher from another of the same name.
        teacher_tokenizer: the teacher's own, where `tokenizer` is a part of it (`resegmentation`).
        max_tokens: budget of a batch.

    Returns:
        `dataset` with `teacher_ids` and `teacher_log_probs`, each target length times `top_k` long; half precision.

    Raises:
        ValueError: `output` comes from other pairs, another teacher or another `top_k`.
    """
    collator = DataCollatorForSeq2Seq(teacher_tokenizer or tokenizer, model=teacher)
    resegmentation = None if teacher_tokenizer is None else Resegmentation(tokenizer, teacher_tokenizer)

    def most_probable(rows: Rows, advance: Callable[[int], None]) -> Rows:
        def of_batch(batch: list[int]) -> list[tuple[Any, Any]]:
            features = [{"input_ids": rows["input_ids"][i], "labels": rows["labels"][i]} for i in batch]
            labels = [pair["labels"] for pair in features]
            if resegmentation is None:
                shown = features
            else:
                sides = {"input_ids": "source", "labels": "target"}
                shown = [
                    {name: resegmentation.teacher_ids(pair[name], side) for name, side in sides.items()}
                    for pair in features
                ]
            found = _log_probs(teacher, collator(shown))
            if resegmentation is None:
                found = [found[row, : len(target)] for row, target in enumerate(labels)]
            else:
                found = [
                    resegmentation.log_probs(found[row], target, pair["labels"])
                    for row, (target, pair) in enumerate(zip(labels, shown, strict=True))
                ]
            return [_top_k(log_probs, top_k) for log_probs in found]

        lengths = [max(map(len, pair)) for pair in zip(rows["input_ids"], rows["labels"], strict=True)]
        found = map_by_length(of_batch, lengths, max_tokens, advance=advance)
        return dict(zip(CACHE_SCHEMA.names, map(list, zip(*found, strict=True)), strict=True))

    file = map_shards(
        dataset.select_columns(["input_ids", "labels"]),
        most_probable,
        output,
        schema=CACHE_SCHEMA,
        settings={"teacher_weights": teacher_digest, "top_k": top_k, "max_tokens": max_tokens},
        shard_size=shard_size,
        desc="Teacher's distributions",
    )
    with PatientGroup().main_process_first(local=True):
        return concatenate_datasets([dataset.flatten_indices(), Dataset.from_parquet(str(file))], axis=1)


@torch.inference_mode()
def _log_probs(teacher: PreTrainedModel, inputs: Any) -> torch.Tensor:
    """The teacher's log-probabilities at each target position of a padded batch."""
    inputs = inputs.to(teacher.device)
    del inputs["labels"]
    return teacher(**inputs, use_cache=False).logits.float().log_softmax(-1)


def _top_k(log_probs: torch.Tensor, top_k: int) -> tuple[list[int], np.ndarray]:
    """Ids and log-probabilities of the most probable tokens of each position, target length times k."""
    values, ids = log_probs.topk(top_k)
    return ids.flatten().tolist(), values.half().flatten().cpu().numpy()


class DistillationCollator(DataCollatorForSeq2Seq):
    """`DataCollatorForSeq2Seq` that makes (batch, length, k) of the cached columns; padding gets token 0 and log 0."""

    def __call__(self, features: list[dict[str, Any]], return_tensors: str | None = None) -> Any:
        cached = [{name: feature.pop(name) for name in CACHE_SCHEMA.names if name in feature} for feature in features]
        lengths = [len(feature["labels"]) for feature in features]
        batch = super().__call__(features, return_tensors)
        for name in cached[0]:
            rows = [
                torch.as_tensor(row[name]).reshape(length, -1) for row, length in zip(cached, lengths, strict=True)
            ]
            batch[name] = nn.utils.rnn.pad_sequence(rows, batch_first=True)
            missing = batch["labels"].shape[1] - batch[name].shape[1]
            batch[name] = F.pad(batch[name], (0, 0, 0, missing))
        return batch
