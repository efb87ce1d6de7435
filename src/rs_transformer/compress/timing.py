"""How long a model's updates, passes and translations take: measured with weights of any values, before a training.

Not for the quality of a trained model, nor its speed beside its parent's in a report.
"""

import copy
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import cycle
from operator import truediv
from typing import Any

import torch
from torch.nn import functional as F
from transformers import MarianMTModel

from ..decoding import Engine
from ..distillation.losses import top_k_word_level_loss
from ..modeling_rs_marian import PAD_LOGIT_BIAS
from ..training.losses import label_smoothed_nll, without_padding
from ..training.model import faster_attention
from ..utils.measuring import interleave

WARM_UP, TIMED = 2, 5


Batch = Mapping[str, torch.Tensor]


def update_of(model: MarianMTModel, top_k: int = 0) -> Callable[[Batch, bool], None]:
    """An update that learns from references and, if `top_k`, a teacher's most probable tokens; the weights stay.

    Returns:
        What takes a batch, with `decoder_input_ids`, and whether to compute in bfloat16.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    pad, attention = model.config.pad_token_id, model.config._attn_implementation

    def update(batch: Batch, bf16: bool) -> None:
        model.train()
        model.set_attn_implementation(faster_attention(model.device, bf16) or attention)
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

    return update


def pass_of(model: MarianMTModel) -> Callable[[Batch], None]:
    """A teacher's look at a batch."""

    @torch.inference_mode()
    def look(batch: Batch) -> None:
        shown = {name: tensor for name, tensor in batch.items() if name != "labels"}
        F.log_softmax(model(**shown, use_cache=False).logits.float(), -1)

    return look


def seconds_of(works: Mapping[Any, Callable[[Batch], None]], batches: Sequence[Batch]) -> dict[Any, float]:
    """What each work on a batch takes, the median of some; they take turns."""

    def in_turn(work: Callable[[Batch], None]) -> Callable[[], None]:
        turn = cycle(batches)

        def step() -> None:
            work(next(turn))
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()

        return step

    seconds = interleave({name: in_turn(work) for name, work in works.items()}, TIMED, warm_up=WARM_UP)
    return {name: statistics.median(found) for name, found in seconds.items()}


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
