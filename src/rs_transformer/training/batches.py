"""Batches by token budget, as machine translation is trained."""

import json
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import IterableDataset, Sampler
from transformers import TrainerCallback

from ..subword_sampling import SubwordSampler


class TokenBatchSampler(Sampler[list[int]]):
    """Batches of similar length within a token budget, as machine translation is trained.

    A batch's size is its number of sentences times its longest length. Sentences are sorted by length, those of equal
    length shuffled anew each epoch; the order of the batches is shuffled too. Since the sorted lengths are the same
    in every epoch, so is the number of batches.

    With several processes the batches are those of one process with `num_processes` times the budget, dealt out: the
    sampler yields the shares of the first batch, one a process, then those of the second. Every process gets as many
    shares as the others, none of them empty; a batch of fewer sentences than processes is therefore filled up from its
    neighbours. A share that exceeds `max_tokens` does so by one sentence: without that one it lies below.

    Args:
        lengths: of every sentence pair, in tokens.
        max_tokens: the budget of each process.
        num_processes: how many processes share the batches.
        seed: of the shuffling, together with the epoch.

    Raises:
        ValueError: a sentence is longer than the budget, or there are fewer sentences than processes.
    """

    def __init__(self, lengths: Sequence[int], max_tokens: int, num_processes: int = 1, seed: int = 0):
        if len(lengths) < num_processes:
            raise ValueError(f"{num_processes} processes cannot share {len(lengths)} training pairs; start fewer")
        self.lengths = torch.as_tensor(lengths)
        self.num_processes = num_processes
        self.seed = seed
        self.epoch = 0
        longest = int(self.lengths.max())
        if longest > max_tokens:
            raise ValueError(
                f"max_tokens={max_tokens} is less than the longest training pair ({longest} tokens); raise it, or "
                "lower max_source_length and max_target_length"
            )
        self.bounds = self._bounds(self.lengths.sort().values.tolist(), max_tokens * num_processes)

    def _bounds(self, lengths: list[int], budget: int) -> list[tuple[int, int]]:
        """Where the batches of sorted lengths begin and end."""
        starts = [0]
        for end in range(1, len(lengths)):
            count = end - starts[-1]
            if lengths[end] * (count + 1) > budget and count >= self.num_processes:
                starts.append(end)
        # What is left for the last batch can be too little: it takes from the batch before, and that one in its turn.
        # A batch filled so has one sentence for each process.
        latest = len(lengths) - self.num_processes
        for number in range(len(starts) - 1, -1, -1):
            starts[number] = min(starts[number], latest - (len(starts) - 1 - number) * self.num_processes)
        if starts[0] < 0:  # the first has nothing to take from: what it has goes to the second
            starts[:2] = [0]
        return list(zip(starts, [*starts[1:], len(lengths)], strict=True))

    @property
    def sampler(self) -> "TokenBatchSampler":
        """Where accelerate looks for `set_epoch`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.bounds) * self.num_processes

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        shuffled = torch.randperm(len(self.lengths), generator=generator)
        order = shuffled[self.lengths[shuffled].sort(stable=True).indices]
        for number in torch.randperm(len(self.bounds), generator=generator).tolist():
            start, end = self.bounds[number]
            for share in order[start:end].tensor_split(self.num_processes):  # the longer ones, the fewer
                yield share.tolist()


# What a pair is segmented anew from, and how long it may become.
TEXT_COLUMNS = ("source", "target", "length")


def check_texts(columns: Collection[str]) -> None:
    """Raise `ValueError` unless there is what can be segmented by chance."""
    if not set(TEXT_COLUMNS) <= set(columns):
        raise ValueError(
            f"subword_sampling segments the texts anew: the training pairs need columns {', '.join(TEXT_COLUMNS)}, as "
            "`prepare_training_pairs` leaves them with `sampling`"
        )


class SamplingCollator:
    """Segments the texts of a batch by chance, before another collator makes tensors of it.

    What is drawn depends on the seed, the epoch and the texts alone, so that it is the same after a resume and in
    every worker.

    Args:
        collate: gets the features with the ids that were drawn.
        sampler: draws.
        seed: of the drawing.
    """

    def __init__(self, collate: Callable[[list[dict[str, Any]]], dict[str, Any]], sampler: SubwordSampler, seed: int):
        self.collate, self.sampler, self.seed = collate, sampler, seed
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # workers that stay see what is set

    def set_epoch(self, epoch: int) -> None:
        self.epoch.fill_(epoch)

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        features = [dict(feature) for feature in features]
        check_texts(features[0])
        texts = {side: [feature.pop(side) for feature in features] for side in ("source", "target")}
        state = json.dumps([self.seed, int(self.epoch), texts])
        seed = zlib.crc32(state.encode())
        drawn = {
            "input_ids": self.sampler.encode(texts["source"], seed),
            "labels": self.sampler.encode(texts["target"], seed + 1, target=True),
        }
        for number, feature in enumerate(features):
            longest = feature.pop("length")
            for name, ids in drawn.items():
                if len(ids[number]) <= longest:  # else it keeps its best segmentation: a batch has a budget
                    feature[name] = ids[number]
        return self.collate(features)


class WholeStream(IterableDataset):
    """A stream that every process reads, to take its share of each batch: they have as many batches as each other.

    Of one by `datasets` accelerate would give each process some files, of which one ends before the other.
    """

    def __init__(self, stream: Any):
        self.stream = stream

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.stream, "set_epoch"):
            self.stream.set_epoch(epoch)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.stream)


class EpochSeeded(Sampler[int]):
    """A sampler whose order is that of a seed and the epoch, in every process and after a resume.

    Args:
        sampler: draws from its `generator`.
        seed: of the drawing, together with the epoch.
    """

    def __init__(self, sampler: Any, seed: int):
        self.sampler, self.seed, self.epoch = sampler, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        self.sampler.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(self.sampler)


class SetEpochCallback(TrainerCallback):
    """Tells a sampler the epoch, which accelerate does not pass through all of its wrappers on a resume."""

    def __init__(self, sampler: Any):
        self.sampler = sampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.sampler.set_epoch(int(state.epoch))
