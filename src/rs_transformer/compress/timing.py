"""How long a model's updates, passes and translations take: measured with weights of any values, before a training.

Not for the quality of a trained model, nor its speed beside its parent's in a report.
"""

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from operator import truediv
from typing import Any

import torch
from torch.nn import functional as F
from transformers import MarianMTModel

from ..decoding import Engine
from ..distillation.losses import top_k_word_level_loss
from ..modeling_rs_marian import PAD_LOGIT_BIAS
from ..training.losses import label_smoothed_nll, without_padding
from ..utils.measuring import interleave

WARM_UP, TIMED = 2, 5


def seconds_an_update(
    model: MarianMTModel, batches: Sequence[Mapping[str, torch.Tensor]], *, top_k: int = 0, bf16: bool = False
) -> float:
    """What an update takes that learns from references and, if `top_k`, a teacher's most probable tokens; the median.

    The model keeps its weights.

    Args:
        batches: `input_ids`, `attention_mask`, `labels` and `decoder_input_ids`, taken in turn.
    """
    was_training = model.training
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    pad = model.config.pad_token_id

    def update(batch: Mapping[str, torch.Tensor]) -> None:
        batch = dict(batch)
        labels = without_padding(batch.pop("labels"), pad)
        with torch.autocast(model.device.type, torch.bfloat16) if bf16 else nullcontext():
            logits = model(**batch, use_cache=False).logits
        log_probs = logits.float().log_softmax(-1)
        loss = label_smoothed_nll(log_probs, labels, 0.1, pad)
        if top_k:
            ids = torch.randint(logits.shape[-1], (*labels.shape, top_k), device=labels.device)
            loss = loss + top_k_word_level_loss(log_probs, ids, torch.zeros_like(ids).float(), labels)
        (loss / (labels != -100).sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    try:
        return _median_seconds(update, batches, model.device)
    finally:
        model.train(was_training)


def seconds_a_pass(model: MarianMTModel, batches: Sequence[Mapping[str, torch.Tensor]]) -> float:
    """What a teacher's pass over a batch takes; the median."""

    @torch.inference_mode()
    def look(batch: Mapping[str, torch.Tensor]) -> None:
        shown = {name: tensor for name, tensor in batch.items() if name != "labels"}
        F.log_softmax(model(**shown, use_cache=False).logits.float(), -1)

    return _median_seconds(look, batches, model.device)


def _median_seconds(work: Callable[[Any], None], batches: Sequence[Any], device: torch.device) -> float:
    seconds = []
    for number in range(WARM_UP + TIMED):
        start = time.perf_counter()
        work(batches[number % len(batches)])
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[WARM_UP:])


def endless(model: MarianMTModel, eos_token_id: int) -> MarianMTModel:
    """A copy that never ends a translation by itself, so that all translations have one length."""
    model = copy.deepcopy(model)
    model.final_logits_bias[:, [eos_token_id, model.config.pad_token_id]] = PAD_LOGIT_BIAS
    return model


def speedups(engines: Sequence[Engine], sources: Sequence[Sequence[list[int]]]) -> list[float]:
    """How many times as fast as the first engine each one translates single sentences: the median of some rounds.

    Args:
        engines: of one kind, translations of one length.
        sources: for each engine, token ids of the same sentences.
    """

    def translate(number: int) -> None:
        for ids in sources[number]:
            engines[number].translate_batch([ids])

    steps = {number: partial(translate, number) for number in range(len(engines))}
    first, *_ = seconds = list(interleave(steps, TIMED, warm_up=1).values())
    return [statistics.median(map(truediv, first, each)) for each in seconds]
