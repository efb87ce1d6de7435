"""What a student learns from a teacher besides its translations: distributions, hidden states and attention.

Word-level knowledge distillation (Hinton et al. 2015; Kim & Rush 2016) and the matching of intermediate layers (Jiao
et al. 2020, TinyBERT), between the layers of a teacher and the steps of a recurrently stacked student.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional as F
from transformers import PreTrainedConfig, TrainingArguments

from ..configuration_rs_marian import SIDES
from ..training.depth_schedule import DepthSchedule
from ..utils.ranges import check_range

ATTENTIONS = {"encoder_attentions": "encoder", "decoder_attentions": "decoder", "cross_attentions": "decoder"}


@dataclass
class DistillationLossArguments:
    """What the student learns from the teacher besides its translations."""

    word_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight, 0 to 1, of the cross-entropy against the teacher's distribution (word-level "
            "distillation); the rest goes to the cross-entropy against the targets."
        },
    )
    word_temperature: float = field(
        default=1.0, metadata={"help": "Divides the logits of both; the loss is multiplied by its square."}
    )
    word_top_k: int = field(
        default=0,
        metadata={
            "help": "Take the teacher's so many most probable tokens alone, computed once and kept on disk; 0: its "
            "whole distribution, computed with each batch."
        },
    )
    hidden_weight: float = field(
        default=0.0, metadata={"help": "Weight of the distance between hidden states of the mapped layers."}
    )
    attention_weight: float = field(
        default=0.0, metadata={"help": "Weight of the divergence between attentions of the mapped layers."}
    )
    encoder_layer_mapping: list[int] | None = field(
        default=None,
        metadata={
            "help": "For each encoder step of the student the teacher's layer, from 0, or -1 for none. Default: "
            "evenly spaced, the last step to the last layer.",
            "nargs": "+",
        },
    )
    decoder_layer_mapping: list[int] | None = field(
        default=None, metadata={"help": "Likewise for the decoder.", "nargs": "+"}
    )

    def __post_init__(self) -> None:
        check_range(self, "word_weight", least=0, most=1)
        check_range(self, "word_temperature", above=0)
        check_range(self, "word_top_k", "hidden_weight", "attention_weight", least=0)
        if self.word_top_k and not self.word_weight:
            raise ValueError("word_top_k needs a word_weight above 0")

    @property
    def active(self) -> bool:
        """Whether anything is learned from more than the teacher's translations."""
        return bool(self.word_weight or self.hidden_weight or self.attention_weight)

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher has to run along in the training."""
        return bool(self.hidden_weight or self.attention_weight or (self.word_weight and not self.word_top_k))


def layer_mapping(given: Sequence[int] | None, steps: int, layers: int, side: str) -> list[int]:
    """The teacher's layer for each step of the student: as given and checked, or at even intervals up to the last.

    Raises:
        ValueError: not one entry a step, or an entry outside of -1 … `layers` - 1.
    """
    if given is None:
        return [-(-(step + 1) * layers // steps) - 1 for step in range(steps)]
    if len(given) != steps:
        raise ValueError(
            f"{side}_layer_mapping needs an entry for each of the student's {steps} steps, got {len(given)}"
        )
    for layer in given:
        if not -1 <= layer < layers:
            raise ValueError(f"{side}_layer_mapping holds the teacher's layers 0..{layers - 1}, or -1, got {layer}")
    return list(given)


def check_match(student: PreTrainedConfig, teacher: PreTrainedConfig, args: DistillationLossArguments) -> None:
    """Raise `ValueError` if hidden states or attentions are to be matched and the models' shapes do not allow it."""
    if not (args.hidden_weight or args.attention_weight):
        return
    for side in SIDES:
        if getattr(student, f"{side}_layerdrop", 0):
            raise ValueError(f"hidden_weight and attention_weight need every step: set {side}_layerdrop to 0")
        steps, layers = (getattr(config, f"{side}_layers", None) for config in (student, teacher))
        if steps is None or layers is None:
            raise ValueError("hidden_weight and attention_weight need models with encoder_layers and decoder_layers")
        layer_mapping(getattr(args, f"{side}_layer_mapping"), steps, layers, side)
        heads = [getattr(config, f"{side}_attention_heads") for config in (student, teacher)]
        if args.attention_weight and heads[0] != heads[1]:
            raise ValueError(
                f"attention_weight needs equal {side}_attention_heads, got {heads[0]} (student) and {heads[1]} "
                "(teacher)"
            )
    if args.attention_weight and student.attention_dropout:
        raise ValueError(
            "attention_weight compares attention after dropout: set attention_dropout to 0, got "
            f"{student.attention_dropout}"
        )
    if args.hidden_weight and student.hidden_size != teacher.hidden_size:
        raise ValueError(
            f"hidden_weight needs equal widths, got d_model {student.hidden_size} (student) and {teacher.hidden_size} "
            "(teacher)"
        )


def word_level_loss(
    log_probs: torch.Tensor, teacher_logits: torch.Tensor, labels: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """Cross-entropy of the student against the teacher's distribution, summed over the target tokens, in nats.

    -T² Σ softmax(teacher / T) · log softmax(student / T); the square keeps the gradient's size (Hinton et al. 2015).

    Args:
        log_probs: log softmax(student / T), (batch, length, vocabulary).
        teacher_logits: of the same shape; log-probabilities are logits too.
        labels: (batch, length); where it is -100 nothing is learned.
        temperature: T.
    """
    targets = (teacher_logits.float() / temperature).softmax(-1)
    # A barred token has probability 0 and may have the logarithm -inf.
    losses = -(targets * log_probs).masked_fill(targets == 0, 0.0).sum(-1)
    return temperature**2 * losses.masked_fill(labels == -100, 0.0).sum()


def top_k_word_level_loss(
    log_probs: torch.Tensor,
    teacher_ids: torch.Tensor,
    teacher_log_probs: torch.Tensor,
    labels: torch.Tensor,
    temperature: float = 1.0,
) -> torch.Tensor:
    """`word_level_loss` against the teacher's k most probable tokens, their probabilities made to sum to 1.

    Args:
        log_probs: log softmax(student / T), (batch, length, vocabulary).
        teacher_ids: (batch, length, k).
        teacher_log_probs: of the same shape, at temperature 1.
    """
    return word_level_loss(log_probs.gather(-1, teacher_ids), teacher_log_probs, labels, temperature)


def check_segmentation(args: DistillationLossArguments, training: Any) -> None:
    """Raise `ValueError` if distributions are kept of one segmentation and others are to be trained on."""
    if args.word_top_k and getattr(training, "subword_sampling", None):
        raise ValueError("word_top_k keeps the distributions of one segmentation: leave subword_sampling out")


def check_depths(schedule: DepthSchedule | None, args: DistillationLossArguments) -> None:
    """Raise `ValueError` if depth is to change in training and the student's every step is to match a teacher's."""
    if schedule is not None and (args.hidden_weight or args.attention_weight):
        raise ValueError(
            "hidden_weight and attention_weight need every step in each update: leave growing_depths and "
            "elastic_*_layers out"
        )


def check_checkpointing(training: TrainingArguments, args: DistillationLossArguments) -> None:
    """Raise `ValueError` if attention is to be learned through reentrant checkpointing, which hands on no gradient."""
    # The second name is that of releases before 5.24.
    kinds = ("activation_checkpointing", "gradient_checkpointing")
    on = any(getattr(training, kind, False) for kind in kinds)
    options = [getattr(training, f"{kind}_kwargs", None) or {} for kind in kinds]
    if args.attention_weight and on and any(each.get("use_reentrant") for each in options):
        raise ValueError("attention_weight learns nothing through reentrant checkpointing: leave use_reentrant out")


def hidden_state_loss(
    states: Sequence[torch.Tensor], targets: Sequence[torch.Tensor], mapping: Sequence[int], mask: torch.Tensor
) -> torch.Tensor:
    """Squared distance of mapped hidden states in units of the teacher's variance, summed over tokens.

    The variance is each token's own, over the width, so that a batch's loss is the sum of its tokens'.

    Args:
        states: `hidden_states` of the student: embeddings, then each step, (batch, length, width).
        targets: those of the teacher: embeddings, then each layer.
        mapping: from `layer_mapping`.
        mask: (batch, length), true where there is a token.
    """
    pairs = [(step, layer) for step, layer in enumerate(mapping) if layer >= 0]
    loss = states[0].new_zeros((), dtype=torch.float32)
    for step, layer in pairs:
        state, target = states[step + 1][mask].float(), targets[layer + 1][mask].float()
        distance = (state - target).square().mean(-1)
        loss = loss + (distance / target.var(-1, correction=0).clamp_min(1e-6)).sum() / len(pairs)
    return loss


def attention_loss(
    attentions: Sequence[torch.Tensor], targets: Sequence[torch.Tensor], mapping: Sequence[int], mask: torch.Tensor
) -> torch.Tensor:
    """Kullback-Leibler divergence of mapped attentions from the teacher's in nats, mean of heads, summed over queries.

    Args:
        attentions: of each step of the student, (batch, heads, queries, keys).
        targets: of each layer of the teacher.
        mapping: from `layer_mapping`.
        mask: (batch, queries), true where there is a token.
    """
    pairs = [(step, layer) for step, layer in enumerate(mapping) if layer >= 0]
    loss = attentions[0].new_zeros((), dtype=torch.float32)
    for step, layer in pairs:
        given, wanted = (maps.transpose(1, 2)[mask].float() for maps in (attentions[step], targets[layer]))
        smallest = torch.finfo(torch.float32).tiny
        divergence = F.kl_div(given.clamp_min(smallest).log(), wanted, reduction="none").sum(-1)
        loss = loss + divergence.mean(-1).sum() / len(pairs)
    return loss
