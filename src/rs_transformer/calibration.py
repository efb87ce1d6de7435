"""Calibration: a collapsed model learns, in a few hundred updates, to go through its parent's hidden states.

The method `"calibrated"` of `layer_transfer.collapse`.
"""

import re
from collections.abc import Iterable, Mapping

import torch
from tqdm.auto import tqdm
from transformers import MarianMTModel, get_linear_schedule_with_warmup

from .configuration_rs_marian import SIDES

# All but embeddings and the output layer.
STACK_PARAMETER = re.compile(r"model\.(encoder|decoder)\.(layers|step_norms|step_embeddings|step_projections)\.")
BATCH = ("input_ids", "attention_mask", "labels")
UPDATES = 400
LEARNING_RATE = 5e-3
OUTPUT_WEIGHT = 1.0
BETAS = (0.9, 0.98)
MAX_GRAD_NORM = 1.0


def calibrate(
    child: MarianMTModel,
    parent: MarianMTModel,
    batches: Iterable[Mapping[str, torch.Tensor]],
    *,
    updates: int = UPDATES,
    learning_rate: float = LEARNING_RATE,
    output_weight: float = OUTPUT_WEIGHT,
) -> list[float]:
    """Train the layers of `child` in place to give the parent's hidden state after each step, and its predictions.

    The loss is the squared distance of the hidden states of each step, in units of the parent's variance there,
    averaged over the steps of each side, plus `output_weight` times the Kullback-Leibler divergence of the output
    distributions in nats. Each step of the child goes on from its own previous one, as it will have to. Embeddings
    stay as they are, no reference translation is learned from, and there is no dropout.

    Args:
        child: of the parent's depth and width.
        parent: the model to come close to.
        batches: `input_ids`, `attention_mask` (batch, source length) and `labels` (batch, target length; -100 or the
            padding token where there is none). Gone through again if there are fewer than `updates`.
        updates: of Adam, a tenth of them warming up, then linear decay to nothing.
        learning_rate: its peak.
        output_weight: of the divergence of the outputs.

    Returns:
        The loss of each update.

    Raises:
        ValueError: no batches, or one that lacks something, another depth, or a loss that is not finite (the learning
            rate is too high).
    """
    for side in SIDES:
        ours, theirs = (getattr(model.config, f"{side}_layers") for model in (child, parent))
        if ours != theirs:
            raise ValueError(
                f"the child has {side}_layers {ours} and the parent {theirs}: calibration is step by step"
            )
    layers = [parameter for name, parameter in child.named_parameters() if STACK_PARAMETER.match(name)]
    optimizer = torch.optim.Adam(layers, lr=learning_rate, betas=BETAS)
    schedule = get_linear_schedule_with_warmup(optimizer, updates // 10, updates)
    modes = [(model, model.training) for model in (child, parent)]
    child.eval()
    parent.eval()
    losses: list[float] = []
    bar = tqdm(total=updates, unit=" updates", desc="Calibrating", disable=None, leave=False)
    try:
        for batch in _cycle(batches, updates):
            batch = {name: batch[name].to(child.device) for name in _checked(batch)}
            with torch.enable_grad():
                loss = calibration_loss(child, parent, batch, output_weight)
            _update(loss, layers, optimizer)
            schedule.step()
            losses.append(loss.item())
            if not torch.isfinite(loss):
                raise ValueError(
                    f"calibration diverged at update {len(losses)}: lower the learning rate ({learning_rate:g})"
                )
            bar.set_postfix(loss=f"{losses[-1]:.4f}", refresh=False)
            bar.update()
    finally:
        bar.close()
        for model, training in modes:
            model.train(training)
        child.zero_grad()
    return losses


def _checked(batch: Mapping[str, torch.Tensor]) -> tuple[str, ...]:
    """What is taken of a batch.

    Raises:
        ValueError: it is no mapping, or lacks one of them.
    """
    if not isinstance(batch, Mapping):
        raise ValueError(f"calibration takes a list of batches, each a mapping, got a {type(batch).__name__} as batch")
    if missing := [name for name in BATCH if name not in batch]:
        raise ValueError(f"a calibration batch has no {' and no '.join(missing)}, only {', '.join(batch)}")
    if (batch["labels"] == -100).all():
        raise ValueError("a calibration batch has no target: all of its labels are -100")
    return BATCH


def _update(loss: torch.Tensor, layers: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """One update of some parameters alone; the others get no gradient."""
    for parameter, gradient in zip(layers, torch.autograd.grad(loss, layers), strict=True):
        parameter.grad = gradient
    torch.nn.utils.clip_grad_norm_(layers, MAX_GRAD_NORM)
    optimizer.step()


def calibration_loss(
    child: MarianMTModel, parent: MarianMTModel, batch: Mapping[str, torch.Tensor], output_weight: float
) -> torch.Tensor:
    """The loss that `calibrate` minimises, for one batch."""
    inputs = {
        "input_ids": batch["input_ids"],
        "attention_mask": batch["attention_mask"],
        "decoder_input_ids": parent.prepare_decoder_input_ids_from_labels(batch["labels"]),
        "output_hidden_states": True,
        "use_cache": False,
    }
    with torch.no_grad():
        wanted = parent(**inputs)
    given = child(**inputs)
    labels = batch["labels"]
    targets = (labels != -100) & (labels != parent.config.pad_token_id)
    masks = {"encoder": batch["attention_mask"].bool(), "decoder": targets}
    loss = given.logits.new_zeros(())
    for side, mask in masks.items():
        pairs = list(zip(given[f"{side}_hidden_states"], wanted[f"{side}_hidden_states"], strict=True))[1:]
        loss = loss + sum(_distance(state[mask], target[mask]) for state, target in pairs) / len(pairs)
    ours, theirs = (output.logits[masks["decoder"]].float().log_softmax(-1) for output in (given, wanted))
    # A barred token has probability 0 in both and may have the logarithm -inf.
    divergence = theirs.exp() * (theirs - ours).masked_fill(theirs == ours, 0.0)
    return loss + output_weight * divergence.sum() / len(ours)


def _distance(states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean squared distance of (tokens, width), in units of the targets' variance over the tokens."""
    variance = (targets - targets.mean(0)).float().square().mean()
    return (states - targets).float().square().mean() / variance


def _cycle(batches: Iterable[Mapping[str, torch.Tensor]], number: int) -> Iterable[Mapping[str, torch.Tensor]]:
    """`number` batches, from the start again when they end."""
    done = 0
    while done < number:
        before = done
        for batch in batches:
            yield batch
            done += 1
            if done == number:
                return
        if done == before:
            only = "no calibration batches" if not done else f"only {done} calibration batches, to be read once"
            raise ValueError(f"there are {only}; give a list or a DataLoader, which can be read again")
