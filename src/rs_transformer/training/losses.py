"""Cross-entropy with label smoothing that leaves the padding token alone, and R-Drop's divergence."""

from collections.abc import Callable
from functools import cache

import torch
from torch import nn

BARRED = -1e3  # a bias below it bars a token


def label_smoothed_cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    epsilon: float,
    pad_token_id: int | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """Cross-entropy against the label with probability 1 - epsilon and all tokens with epsilon / vocabulary size.

    The padding token takes no part: it is no target, and pulling its probability up would move Marian's start
    embedding, which must stay zero (see `PAD_LOGIT_BIAS`).

    Args:
        logits: `(batch, length, vocabulary)`.
        labels: `(batch, length)`, -100 or the padding token where there is none.
        epsilon: smoothing, 0 … 1.
        pad_token_id: left out of the labels and of the smoothing.
        num_items_in_batch: divides the sum; without it the number of targets in `labels`.
    """
    labels = without_padding(labels, pad_token_id)
    loss = label_smoothed_nll(logits.float().log_softmax(dim=-1), labels, epsilon, pad_token_id)
    return loss / number_of_items(labels, num_items_in_batch)


def label_smoothed_nll(
    log_probs: torch.Tensor,
    labels: torch.Tensor,
    epsilon: float,
    pad_token_id: int | None = None,
    barred: torch.Tensor | None = None,
) -> torch.Tensor:
    """`label_smoothed_cross_entropy` from log-probabilities, summed over the labels.

    Args:
        barred: `(vocabulary,)`, True for the tokens that the model cannot say, padding among them, where there are
            others: they take no part in the smoothing either.
    """
    labels = without_padding(labels, pad_token_id)
    loss = nn.functional.nll_loss(log_probs.flatten(0, -2), labels.flatten(), ignore_index=-100, reduction="sum")
    if epsilon:
        if barred is not None:
            uniform, size = log_probs.masked_fill(barred, 0.0).sum(dim=-1), (~barred).sum()
        else:
            uniform, size = log_probs.sum(dim=-1), log_probs.shape[-1]
            if pad_token_id is not None:
                uniform, size = uniform - log_probs[..., pad_token_id], size - 1
        uniform = -uniform.masked_fill(labels == -100, 0.0).sum() / size
        loss = (1 - epsilon) * loss + epsilon * uniform
    return loss


def log_probs_by_temperature(logits: torch.Tensor) -> Callable[[float], torch.Tensor]:
    """Log-probabilities in float32 at a temperature, computed once for each that is asked for."""

    @cache
    def log_probs(temperature: float) -> torch.Tensor:
        scaled = logits.float() if temperature == 1 else logits.float() / temperature
        return scaled.log_softmax(dim=-1)

    return log_probs


def symmetric_divergence(log_probs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """KL(p || q) + KL(q || p) of the predictions of two passes (R-Drop), summed over the target tokens, in nats.

    Args:
        log_probs: of both passes, one behind the other along the batch, (2 · batch, length, vocabulary).
        labels: likewise, (2 · batch, length); where it is -100 there is no target.
    """
    p, q = log_probs.chunk(2)
    # A barred token has probability 0 in both and may have the logarithm -inf.
    divergences = ((p.exp() - q.exp()) * (p - q).masked_fill(p == q, 0.0)).sum(-1)
    return divergences.masked_fill(labels.chunk(2)[0] == -100, 0.0).sum()


def divergence_from(
    teacher_logits: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor, pad_token_id: int | None
) -> torch.Tensor:
    """KL(teacher || student) of predictions, (batch, length, vocabulary), summed over the target tokens, in nats."""
    wanted, given = (each.float().log_softmax(dim=-1) for each in (teacher_logits, logits))
    # A barred token has probability 0 in both and may have the logarithm -inf.
    divergences = (wanted.exp() * (wanted - given).masked_fill(wanted == given, 0.0)).sum(-1)
    return divergences.masked_fill(without_padding(labels, pad_token_id) == -100, 0.0).sum()


def barred_tokens(model: nn.Module, pad_token_id: int | None) -> torch.Tensor | None:
    """The tokens that a Marian's bias bars, `(vocabulary,)`, if there are others than padding."""
    bias = getattr(model, "final_logits_bias", None)
    if bias is None:
        return None
    barred = bias.flatten() < BARRED
    if pad_token_id is not None:
        barred[pad_token_id] = True
    return barred if barred.sum() > (pad_token_id is not None) else None


def without_padding(labels: torch.Tensor, pad_token_id: int | None) -> torch.Tensor:
    """Labels with -100 in the place of the padding token, which is no target; None: there is no such token."""
    return labels if pad_token_id is None else labels.masked_fill(labels == pad_token_id, -100)


def number_of_items(labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None) -> torch.Tensor | int:
    """What a sum over tokens is divided by: the labels of the accumulated batch where the Trainer has counted them."""
    if num_items_in_batch is None:
        return (labels != -100).sum()
    if torch.is_tensor(num_items_in_batch):
        return num_items_in_batch.to(labels.device)
    return num_items_in_batch
