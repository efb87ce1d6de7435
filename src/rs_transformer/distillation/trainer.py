"""The trainer of a student that learns from a teacher's distributions, hidden states and attention, token by token.

The losses: `losses.py`. Learning from a teacher's translations needs none of this: see `teacher_corpus.py`.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..configuration_rs_marian import SIDES
from ..training.arguments import TranslationTrainingArguments
from ..training.losses import log_probs_by_temperature, without_padding
from ..training.trainer import TranslationTrainer
from .cache import CACHE_SCHEMA, DistillationCollator
from .losses import (
    ATTENTIONS,
    DistillationLossArguments,
    attention_loss,
    check_checkpointing,
    check_depths,
    check_match,
    check_segmentation,
    hidden_state_loss,
    layer_mapping,
    top_k_word_level_loss,
    word_level_loss,
)


class DistillationTrainer(TranslationTrainer):
    """A `TranslationTrainer` whose student learns from a teacher's distributions, hidden states and attention too.

    The loss of a batch is (1 - `word_weight`) times the label-smoothed cross-entropy, plus `word_weight` times
    `word_level_loss`, plus `hidden_weight` and `attention_weight` times theirs, all divided by the number of target
    tokens of the accumulated batch. Evaluation is that of the base class.

    Args:
        distillation: weights and mappings.
        teacher: on this process's device; may be left out if only cached distributions are learned from. It is not
            trained, and not saved.

    Raises:
        ValueError: a teacher is needed and there is none, or its shapes do not allow what is asked for.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *args: Any,
        distillation: DistillationLossArguments,
        teacher: PreTrainedModel | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ):
        check_segmentation(distillation, kwargs.get("args") or (args[0] if args else None))
        if distillation.needs_teacher and teacher is None:
            raise ValueError("this distillation needs a teacher")
        self.distillation = distillation
        self.teacher = teacher.eval() if distillation.needs_teacher else None
        if teacher is not None:
            check_match(model.config, teacher.config, distillation)
        if distillation.attention_weight:
            for attending in (model, teacher):
                attending.set_attn_implementation("eager")  # the only one that returns what it attends to
        self._wanted: dict[str, Any] | None = None
        if kwargs.get("data_collator") is None:
            kwargs["data_collator"] = DistillationCollator(processing_class, model=model)
        super().__init__(model, *args, processing_class=processing_class, **kwargs)
        check_depths(self.depth_schedule, distillation)
        check_checkpointing(self.args, distillation)

    def _of_own_loss(self, args: TranslationTrainingArguments) -> list[str]:
        weights = ("word_weight", "hidden_weight", "attention_weight")
        return [*(name for name in weights if getattr(self.distillation, name)), *super()._of_own_loss(args)]

    def _loss_scale(self) -> float:
        args = self.distillation
        plain = args.word_temperature == 1 or not args.word_weight
        return super()._loss_scale() if plain and not (args.hidden_weight or args.attention_weight) else math.inf

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            self._signature_columns += CACHE_SCHEMA.names

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        inputs = dict(inputs)
        wanted = {name: inputs.pop(name) for name in CACHE_SCHEMA.names if name in inputs}
        if not self.model.training:
            return super().compute_loss(model, inputs, *args, **kwargs)
        inputs["labels"] = without_padding(inputs["labels"], self.pad_token_id)
        looking = {
            "output_hidden_states": bool(self.distillation.hidden_weight),
            "output_attentions": bool(self.distillation.attention_weight),
        }
        looking = {name: True for name, asked in looking.items() if asked}
        if self.teacher is not None:
            shown = {name: tensor for name, tensor in inputs.items() if name != "labels"}
            with torch.no_grad(), self.accelerator.autocast():
                wanted["teacher"] = self.teacher(**shown, **looking, use_cache=False)
        wanted["masks"] = {"encoder": inputs["attention_mask"].bool(), "decoder": inputs["labels"] != -100}
        self._wanted = wanted
        try:
            return super().compute_loss(model, {**inputs, **looking}, *args, **kwargs)
        finally:
            self._wanted = None

    def translation_loss(
        self, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """The weighted sum of all losses in training; in evaluation the plain cross-entropy."""
        if self._wanted is None:
            return super().translation_loss(outputs, labels, num_items_in_batch)
        args, log_probs = self.distillation, log_probs_by_temperature(outputs["logits"])
        loss = outputs["logits"].new_zeros((), dtype=torch.float32)
        if args.word_weight < 1:
            loss = loss + (1 - args.word_weight) * self.summed_cross_entropy(log_probs, labels)
        if args.word_weight:
            loss = loss + args.word_weight * self._word_loss(log_probs(args.word_temperature), labels)
        if args.hidden_weight:
            names = {f"{side}_hidden_states": side for side in SIDES}
            loss = loss + args.hidden_weight * self._match(hidden_state_loss, outputs, names)
        if args.attention_weight:
            loss = loss + args.attention_weight * self._match(attention_loss, outputs, ATTENTIONS)
        return self.per_item(loss, log_probs, labels, num_items_in_batch)

    def _word_loss(self, log_probs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        temperature = self.distillation.word_temperature
        if self.distillation.word_top_k:
            ids, values = (self._wanted[name] for name in CACHE_SCHEMA.names)
            return top_k_word_level_loss(log_probs, ids, values, labels, temperature)
        return word_level_loss(log_probs, self._wanted["teacher"].logits, labels, temperature)

    def _match(self, loss: Callable[..., torch.Tensor], outputs: Any, names: dict[str, str]) -> torch.Tensor:
        """The mean of a loss over the kinds of hidden states or attentions."""
        wanted, masks = self._wanted["teacher"], self._wanted["masks"]
        losses = []
        for name, side in names.items():
            layers = getattr(self.teacher.config, f"{side}_layers")
            mapping = layer_mapping(
                getattr(self.distillation, f"{side}_layer_mapping"),
                getattr(self.model.config, f"{side}_layers"),
                layers,
                side,
            )
            losses.append(loss(outputs[name], wanted[name], mapping, masks[side]))
        return torch.stack(losses).mean()
