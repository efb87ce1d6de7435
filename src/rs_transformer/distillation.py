"""Learning from a teacher's distributions, hidden states and attention, token by token: the loss and its trainer.

Word-level knowledge distillation (Hinton et al. 2015; Kim & Rush 2016) and the matching of intermediate layers (Jiao
et al. 2020, TinyBERT), between the layers of a teacher and the steps of a recurrently stacked student. Learning from a
teacher's translations needs none of this: see `teacher_corpus.py`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from datasets import Dataset, concatenate_datasets
from torch import nn
from torch.nn import functional as F
from transformers import DataCollatorForSeq2Seq, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from .configuration_rs_marian import SIDES
from .decoding import length_batches
from .depth_schedule import DepthSchedule
from .launching import PatientGroup
from .sharding import Rows, map_shards
from .trainer import TranslationTrainer, label_smoothed_nll, number_of_items

ATTENTIONS = {"encoder_attentions": "encoder", "decoder_attentions": "decoder", "cross_attentions": "decoder"}
CACHE_SCHEMA = pa.schema({"teacher_ids": pa.list_(pa.int32()), "teacher_log_probs": pa.list_(pa.float16())})


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
        if not 0 <= self.word_weight <= 1:
            raise ValueError(f"word_weight must lie in 0..1, got {self.word_weight}")
        if self.word_temperature <= 0:
            raise ValueError(f"word_temperature must be above 0, got {self.word_temperature}")
        for name in ("word_top_k", "hidden_weight", "attention_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
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


# Losses: sums over tokens, divided by the number of target tokens of the whole (accumulated) batch.


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


def check_depths(schedule: DepthSchedule | None, args: DistillationLossArguments) -> None:
    """Raise `ValueError` if depth is to change in training and the student's every step is to match a teacher's."""
    if schedule is not None and (args.hidden_weight or args.attention_weight):
        raise ValueError(
            "hidden_weight and attention_weight need every step in each update: leave growing_depths and "
            "elastic_*_layers out"
        )


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


# The teacher's most probable tokens, once for all epochs


@torch.inference_mode()
def cache_top_k(
    dataset: Dataset,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    top_k: int,
    output: str | Path,
    *,
    teacher_digest: str,
    max_tokens: int = 4096,
    shard_size: int = 2000,
) -> Dataset:
    """Add the teacher's `top_k` most probable tokens at each target position to encoded pairs; kept in `output`.

    Resumable and shared out over processes like the teacher's decoding (`map_shards`).

    Args:
        dataset: `input_ids` and `labels`, from `prepare_training_pairs`.
        teacher: in evaluation mode.
        top_k: at most the vocabulary.
        output: the parquet file.
        teacher_digest: tells the teacher from another of the same name.
        max_tokens: budget of a batch.

    Returns:
        `dataset` with `teacher_ids` and `teacher_log_probs`, each target length times `top_k` long; half precision.

    Raises:
        ValueError: `output` comes from other pairs, another teacher or another `top_k`.
    """
    collator = DataCollatorForSeq2Seq(tokenizer, model=teacher)

    def most_probable(rows: Rows, advance: Callable[[int], None]) -> Rows:
        columns: Rows = {name: [None] * len(rows["labels"]) for name in CACHE_SCHEMA.names}
        lengths = [max(map(len, pair)) for pair in zip(rows["input_ids"], rows["labels"], strict=True)]
        for batch in length_batches(lengths, max_tokens):
            features = [{"input_ids": rows["input_ids"][i], "labels": rows["labels"][i]} for i in batch]
            inputs = collator(features).to(teacher.device)
            del inputs["labels"]
            log_probs = teacher(**inputs, use_cache=False).logits.float().log_softmax(-1)
            values, ids = log_probs.topk(top_k)
            for row, index in enumerate(batch):
                length = len(rows["labels"][index])
                columns["teacher_ids"][index] = ids[row, :length].flatten().tolist()
                columns["teacher_log_probs"][index] = values[row, :length].half().flatten().cpu().numpy()
            advance(len(batch))
        return columns

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
        kwargs.setdefault("data_collator", DistillationCollator(processing_class, model=model))
        super().__init__(model, *args, processing_class=processing_class, **kwargs)
        check_depths(self.depth_schedule, distillation)

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            self._signature_columns += CACHE_SCHEMA.names

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        inputs = dict(inputs)
        wanted = {name: inputs.pop(name) for name in CACHE_SCHEMA.names if name in inputs}
        if not self.model.training:
            return super().compute_loss(model, inputs, *args, **kwargs)
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
        args, items = self.distillation, number_of_items(labels, num_items_in_batch)
        log_probs = outputs["logits"].float().log_softmax(-1)  # once for both losses
        loss = log_probs.new_zeros(())
        if args.word_weight < 1:
            smoothing, pad_token_id = self.args.label_smoothing_factor, self.processing_class.pad_token_id
            loss = loss + (1 - args.word_weight) * label_smoothed_nll(log_probs, labels, smoothing, pad_token_id)
        if args.word_weight:
            loss = loss + args.word_weight * self._word_loss(log_probs, labels)
        if args.hidden_weight:
            names = {f"{side}_hidden_states": side for side in SIDES}
            loss = loss + args.hidden_weight * self._match(hidden_state_loss, outputs, names)
        if args.attention_weight:
            loss = loss + args.attention_weight * self._match(attention_loss, outputs, ATTENTIONS)
        return loss / items

    def _word_loss(self, log_probs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        temperature = self.distillation.word_temperature
        if temperature != 1:
            log_probs = (log_probs / temperature).log_softmax(-1)
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
