"""`Seq2SeqTrainingArguments` and what this package adds, checked before anything starts."""

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from transformers import Seq2SeqTrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from ..utils.ranges import check_range

AT_LEAST_1 = (
    "max_tokens",
    "early_stopping_patience",
    "eval_num_beams",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
)
AT_LEAST_0 = (
    "average_checkpoints",
    "frozen_embedding_updates",
    "learning_rate",
    "weight_decay",
    "adam_epsilon",
    "max_grad_norm",
    "warmup_steps",
    "logging_steps",
    "eval_steps",
    "eval_delay",
    "r_drop_alpha",
    "save_steps",
    "dataloader_num_workers",
    "seed",
    "data_seed",
)
SHARES = ("label_smoothing_factor", "adam_beta1", "adam_beta2")


def check_updates(growing_updates: Sequence[int], updates: int) -> None:
    """Raise `ValueError` if a run of so many updates ends before its model has grown."""
    if growing_updates and growing_updates[-1] >= updates:
        raise ValueError(
            f"growing_updates must end before the last update ({updates}), got {list(growing_updates)}: the model "
            "would never be trained at its own depth"
        )


@dataclass
class TranslationTrainingArguments(Seq2SeqTrainingArguments):
    """`Seq2SeqTrainingArguments` and what this package adds."""

    max_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Batches by token budget: sentences times the longest side's tokens, on each device. "
            "Replaces per_device_train_batch_size."
        },
    )
    average_checkpoints: int = field(
        default=0, metadata={"help": "Average the weights of the last so many checkpoints into the final model."}
    )
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Stop after so many evaluations without a better metric_for_best_model."}
    )
    frozen_embedding_updates: int = field(
        default=0,
        metadata={"help": "Leave embeddings, and an output projection tied to them, alone for the first updates."},
    )
    subword_sampling: float | None = field(
        default=None,
        metadata={
            "help": "Segment the training pairs by chance, anew in each epoch (subword regularization): the exponent "
            "of a unigram model's probabilities, 0.1 is usual, or of a BPE model the share of the merges that are "
            "left out. For a MarianTokenizer. Default: the best segmentation."
        },
    )
    softmax_temperature: float = field(
        default=1.0,
        metadata={
            "help": "Divides the logits in training, and the loss is multiplied by it: above 1, softmax tempering "
            "(Dabre & Fujita 2020)."
        },
    )
    r_drop_alpha: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the divergence between two passes with other dropout (R-Drop, Liang et al. 2021, whose "
            "alpha it is); an update takes twice the time."
        },
    )
    eval_num_beams: int = field(default=1, metadata={"help": "Beam size of the validation translations in training."})
    growing_depths: list[int] = field(
        default_factory=list,
        metadata={"help": "Depths to train at before the model's own, as 1 2 4. For RSMarian.", "nargs": "+"},
    )
    growing_updates: list[int] = field(
        default_factory=list,
        metadata={"help": "For each of growing_depths, the update that the next depth begins with.", "nargs": "+"},
    )
    elastic_encoder_layers: int | None = field(
        default=None,
        metadata={
            "help": "Draw the encoder's depth for each update, from this to its own, so that one model works at all "
            "of them. For RSMarian."
        },
    )
    elastic_decoder_layers: int | None = field(default=None, metadata={"help": "The same for the decoder."})
    elastic_teaching: float | None = field(
        default=None,
        metadata={
            "help": "Train the full depth in every update, too, and let it teach the drawn one: the weight, 0 to 1, "
            "of its distribution beside the targets (in-place distillation, Yu & Huang 2019). An update takes up to "
            "twice the time. With elastic_*_layers."
        },
    )

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled, as the Trainer does beside the model and in each checkpoint: all but secrets."""
        return {name: None if name.endswith("_token") else value for name, value in vars(self).items()}

    def __deepcopy__(self, memo: dict[int, Any]) -> "TranslationTrainingArguments":
        copied = object.__new__(type(self))  # in memory secrets stay
        vars(copied).update(copy.deepcopy(vars(self), memo))
        return copied

    def __post_init__(self) -> None:
        self._check_ranges()
        if self.deepspeed or os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
            raise ValueError("DeepSpeed is not supported: for models that fill a GPU there is FSDP2 (docs/scaling.md)")
        super().__post_init__()
        # What accelerate's configuration chooses is the run's, and is recorded.
        self.bf16 |= self.mixed_precision == "bf16"
        self.fp16 |= self.mixed_precision == "fp16"
        if self.fp16 and self.device.type == "cpu":
            raise ValueError("fp16 needs a GPU, on a CPU nothing would be in half precision: bf16 works there, too")
        if self.max_tokens is not None:
            self._check_token_batches()
        if len(self.growing_depths) != len(self.growing_updates):
            raise ValueError(
                f"growing_depths and growing_updates go together, one for one; got {self.growing_depths} and "
                f"{self.growing_updates}"
            )
        for name in ("growing_depths", "growing_updates"):
            values = getattr(self, name)
            if values and (values[0] < 1 or sorted(set(values)) != values):
                raise ValueError(f"{name} must start at 1 at least and grow, got {values}")
        if self.max_steps > 0:
            check_updates(self.growing_updates, self.max_steps)
        if self.average_checkpoints and self.save_strategy == SaveStrategy.NO:
            raise ValueError(
                f"average_checkpoints={self.average_checkpoints} with save_strategy: no leaves nothing to average; "
                "save checkpoints, or set average_checkpoints: 0"
            )
        self._check_best_model()
        kept = self.save_total_limit
        needed = self.average_checkpoints + int(self.metric_for_best_model is not None)
        if self.average_checkpoints and kept is not None and kept < needed:
            raise ValueError(
                f"average_checkpoints={self.average_checkpoints} needs save_total_limit of at least {needed} "
                f"(one more where the best model is kept), got {kept}"
            )
        if self.n_gpu > 1:
            raise ValueError(
                f"one process with {self.n_gpu} GPUs would train to other gradients (torch.nn.DataParallel): start a "
                "process for each by accelerate launch, or show it one (CUDA_VISIBLE_DEVICES=0)"
            )
        sharded = self.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
        if sharded and (self.bf16_full_eval or self.fp16_full_eval):
            raise ValueError(
                "bf16_full_eval and fp16_full_eval cast sharded weights for good: leave them out under FSDP"
            )
        # Before 5.23 transformers checkpoints `__call__`, FSDP2's hooks with it, which the backward pass runs again.
        if "__call__" in vars(GradientCheckpointingLayer) and sharded and self.gradient_checkpointing:
            raise ValueError(
                "gradient_checkpointing under FSDP needs transformers 5.23 or newer: before, it trains to other "
                "gradients without a word. Update transformers, or set gradient_checkpointing: false"
            )
        # The defaults of transformers and of accelerate.
        fsdp_version = self.fsdp_config.get("version", 2) if self.fsdp else os.environ.get("FSDP_VERSION", 1)
        if sharded and int(fsdp_version) != 2:
            raise ValueError("FSDP's first version cannot translate what it trains: set fsdp_version to 2")

    def _check_best_model(self) -> None:
        if self.early_stopping_patience is not None and not self.load_best_model_at_end:
            raise ValueError("early_stopping_patience needs load_best_model_at_end: true")
        if self.save_strategy == SaveStrategy.BEST and self.eval_strategy == IntervalStrategy.NO:
            raise ValueError("save_strategy: best saves what an evaluation finds the best: set eval_strategy too")
        if self.save_strategy == SaveStrategy.BEST and self.metric_for_best_model is None:
            raise ValueError("save_strategy: best needs metric_for_best_model")
        # transformers takes any multiple, and where the best evaluation has no checkpoint, an earlier one, or none.
        in_steps = self.load_best_model_at_end and self.save_strategy == SaveStrategy.STEPS
        if in_steps and self.save_steps != self.eval_steps:
            raise ValueError(
                f"load_best_model_at_end needs a checkpoint of each evaluation, save_steps={self.save_steps:g} and "
                f"eval_steps={self.eval_steps:g} differ: set both alike, or save_strategy: best"
            )

    def _check_ranges(self) -> None:
        check_range(self, *(each.name for each in fields(self) if isinstance(getattr(self, each.name), float)))
        check_range(self, *AT_LEAST_1, least=1)
        check_range(self, *AT_LEAST_0, least=0)
        check_range(self, *SHARES, least=0, below=1)
        check_range(self, "softmax_temperature", above=0)
        check_range(self, "subword_sampling", above=0, most=1)
        check_range(self, "elastic_teaching", least=0, most=1)
        if self.elastic_teaching is not None and self.elastic_encoder_layers is self.elastic_decoder_layers is None:
            raise ValueError("elastic_teaching needs elastic_encoder_layers or elastic_decoder_layers")
        if self.max_steps == 0:
            raise ValueError("max_steps must be at least 1, or -1 for num_train_epochs, got 0")
        if self.max_steps < 0:
            check_range(self, "num_train_epochs", above=0)
        if self.enable_jit_checkpoint:
            raise ValueError(
                "enable_jit_checkpoint is not read here: a run goes on from the last checkpoint that it saved"
            )
        if self.generation_num_beams is not None:
            raise ValueError("generation_num_beams is not read here: give eval_num_beams")
        if self.generation_max_length is not None:
            raise ValueError("generation_max_length is not read here: give max_new_tokens, of `DecodingArguments`")

    def _check_token_batches(self) -> None:
        if self.dataloader_drop_last:
            raise ValueError("dataloader_drop_last does not go with max_tokens, which takes each pair once an epoch")
        config = self.accelerator_config
        for name, refused in (("split_batches", True), ("dispatch_batches", True), ("even_batches", False)):
            if getattr(config, name) is refused:
                raise ValueError(
                    f"accelerator_config: {name} does not go with max_tokens, whose batches vary: leave it out"
                )
        if self.auto_find_batch_size:
            raise ValueError("auto_find_batch_size does not go with max_tokens: lower max_tokens yourself")
        if (strategy := self.train_sampling_strategy) in ("sequential", "batch_rebalance"):
            raise ValueError(f"train_sampling_strategy: {strategy} does not go with max_tokens, which sorts by length")
