"""Alignments of pieces by a model's own cross-attention, counted over a corpus."""

from collections import Counter, defaultdict
from collections.abc import Sequence

import torch
from accelerate import PartialState
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..decoding import map_by_length
from ..pipeline_rs_marian import LANGUAGE_CODE
from ..tokenization import entries_of
from .collection import eager_attention, twin

BATCH_TOKENS = 2048
PREDICTED = 8


def count_links(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    source_ids: Sequence[Sequence[int]],
    target_ids: Sequence[Sequence[int]],
    predicted: int = PREDICTED,
) -> dict[int, Counter[int]]:
    """For source ids, how often a target id is aligned with them.

    A target piece is aligned with the source piece that its position attends to most, by the mean over steps and heads
    in a forced pass; and so is, by its probability, each of the pieces that the model thinks most probable there, for
    these are what it will say. Special tokens and what begins a source as `>>deu<<` are aligned with nothing.

    Args:
        model: any that gives cross-attention; other threads may use it meanwhile.
        source_ids, target_ids: of sentence pairs, each with its end of sentence.
        predicted: how many of the model's own pieces count at each position.
    """
    links: dict[int, Counter[int]] = defaultdict(Counter)
    forced = twin(model)
    silent, silent_targets = (torch.tensor(_silent(tokenizer, side)).to(model.device) for side in ("source", "target"))

    @torch.inference_mode()
    def count(batch: list[int]) -> list[None]:
        inputs = tokenizer.pad({"input_ids": [source_ids[index] for index in batch]}, return_tensors="pt")
        inputs = inputs.to(model.device)
        labels = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(target_ids[index]) for index in batch], True, tokenizer.pad_token_id
        ).to(model.device)
        shifted = forced.prepare_decoder_input_ids_from_labels(labels=labels)
        outputs = forced(**inputs, decoder_input_ids=shifted, output_attentions=True, use_cache=False)
        weights = sum(step.mean(1) for step in outputs.cross_attentions)
        # Much attends to the end of sentence, which says nothing of what becomes what.
        weights = weights.masked_fill(torch.isin(inputs["input_ids"], silent)[:, None], -1)
        most, positions = weights.max(-1)
        sources = inputs["input_ids"].gather(1, positions)
        probabilities, pieces = outputs.logits.softmax(-1).topk(min(predicted, outputs.logits.shape[-1]))
        said = torch.cat([labels[..., None], pieces], -1)
        counts = torch.cat([torch.ones_like(probabilities[..., :1]), probabilities], -1)
        there = (most >= 0) & (labels != tokenizer.pad_token_id)
        aligned = there[..., None] & ~torch.isin(said, silent_targets)
        sources = sources[..., None].expand_as(said)[aligned].tolist()
        for source, target, count in zip(sources, said[aligned].tolist(), counts[aligned].tolist(), strict=True):
            links[source][target] += count
        return [None] * len(batch)

    lengths = [max(map(len, pair)) for pair in zip(source_ids, target_ids, strict=True)]
    disable = None if PartialState().is_main_process else True
    with (
        eager_attention(forced),
        tqdm(total=len(lengths), unit=" pairs", desc="Aligning", disable=disable, leave=False) as bar,
    ):
        map_by_length(count, lengths, BATCH_TOKENS, advance=bar.update)
    return dict(links)


def _silent(tokenizer: PreTrainedTokenizerBase, side: str) -> list[int]:
    """The ids of special tokens, and of codes such as `>>deu<<`."""
    special = set(tokenizer.all_special_tokens)
    entries = entries_of(tokenizer, side).items()
    return [index for token, index in entries if token in special or LANGUAGE_CODE.fullmatch(token)]
