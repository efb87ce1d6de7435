"""What `Seq2SeqTrainer` lacks for translation: token-budget batches, scores of real translations while training,
label smoothing that leaves the padding token alone, and checkpoints that a kill cannot spoil."""

import os
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader, Sampler
from transformers import (
    DataCollatorForSeq2Seq,
    MarianConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainerCallback,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, SaveStrategy, rotate_checkpoints
from transformers.utils import logging

from .decoding import DecodingArguments, translate
from .depth_schedule import DepthSchedule, GrownEarlyStopping, check_updates
from .metrics import corpus_scores
from .model_card import write_card
from .run_folder import mark_complete
from .sharded_model import embeddings_in_one_group, whole_model

logger = logging.get_logger(__name__)


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

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if self.average_checkpoints < 0:
            raise ValueError(f"average_checkpoints must be at least 0, got {self.average_checkpoints}")
        if self.frozen_embedding_updates < 0:
            raise ValueError(f"frozen_embedding_updates must be at least 0, got {self.frozen_embedding_updates}")
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
        kept = self.save_total_limit
        needed = self.average_checkpoints + int(self.load_best_model_at_end)
        if self.average_checkpoints and kept is not None and kept < needed:
            raise ValueError(
                f"average_checkpoints={self.average_checkpoints} needs save_total_limit of at least {needed} "
                f"(one more where the best model is kept), got {kept}"
            )
        if self.early_stopping_patience is not None and not self.load_best_model_at_end:
            raise ValueError("early_stopping_patience needs load_best_model_at_end: true")
        # Before 5.23 transformers checkpoints `__call__`, FSDP2's hooks with it, which the backward pass runs again.
        sharded = self.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
        if "__call__" in vars(GradientCheckpointingLayer) and sharded and self.gradient_checkpointing:
            raise ValueError(
                "gradient_checkpointing under FSDP needs transformers 5.23 or newer: before, it trains to other "
                "gradients without a word. Update transformers, or set gradient_checkpointing: false"
            )


class TokenBatchSampler(Sampler[list[int]]):
    """Batches of similar length within a token budget, as machine translation is trained.

    A batch's size is its number of sentences times its longest length. Sentences are sorted by length, those of equal
    length shuffled anew each epoch; the order of the batches is shuffled too. Since the sorted lengths are the same
    in every epoch, so is the number of batches.

    With several processes the batches are those of one process with `num_processes` times the budget, dealt out: the
    sampler yields the shares of the first batch, one a process, then those of the second. A share may thus exceed
    `max_tokens` by one sentence.

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
        bounds, start = [], 0
        for end in range(1, len(lengths)):
            if lengths[end] * (end + 1 - start) > budget and end - start >= self.num_processes:
                bounds.append((start, end))
                start = end
        if len(lengths) - start < self.num_processes and bounds:
            start = bounds.pop()[0]
        return [*bounds, (start, len(lengths))]

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
            batch = order[start:end].tolist()
            for process in range(self.num_processes):
                yield batch[process :: self.num_processes]


class SetEpochCallback(TrainerCallback):
    """Tells a batch sampler the epoch, which accelerate does not pass through all of its wrappers on a resume."""

    def __init__(self, sampler: TokenBatchSampler):
        self.sampler = sampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.sampler.set_epoch(int(state.epoch))


class FrozenEmbeddingsCallback(TrainerCallback):
    """Keeps the optimiser from the embeddings for the first updates, while a collapsed layer finds its way back."""

    def __init__(self, updates: int):
        self.updates = updates

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        if state.global_step < self.updates:
            for module in model.modules():
                if isinstance(module, nn.Embedding):
                    module.weight.grad = None


def label_smoothed_cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    epsilon: float,
    pad_token_id: int | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """Cross-entropy against the label with probability 1 - epsilon and all tokens with epsilon / vocabulary size.

    The padding token takes no part: it is never a label, and pulling its probability up would move Marian's start
    embedding, which must stay zero (see `PAD_LOGIT_BIAS`).

    Args:
        logits: `(batch, length, vocabulary)`.
        labels: `(batch, length)`, -100 where there is none.
        epsilon: smoothing, 0 … 1.
        pad_token_id: left out of the smoothing.
        num_items_in_batch: divides the sum; without it the number of labels in `labels`.
    """
    loss = label_smoothed_nll(logits.float().log_softmax(dim=-1), labels, epsilon, pad_token_id)
    return loss / number_of_items(labels, num_items_in_batch)


def label_smoothed_nll(
    log_probs: torch.Tensor, labels: torch.Tensor, epsilon: float, pad_token_id: int | None = None
) -> torch.Tensor:
    """`label_smoothed_cross_entropy` from log-probabilities, summed over the labels."""
    loss = nn.functional.nll_loss(log_probs.flatten(0, -2), labels.flatten(), ignore_index=-100, reduction="sum")
    if epsilon:
        uniform, size = log_probs.sum(dim=-1), log_probs.shape[-1]
        if pad_token_id is not None:
            uniform, size = uniform - log_probs[..., pad_token_id], size - 1
        uniform = -uniform.masked_fill(labels == -100, 0.0).sum() / size
        loss = (1 - epsilon) * loss + epsilon * uniform
    return loss


def number_of_items(labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None) -> torch.Tensor | int:
    """What a sum over tokens is divided by: the labels of the accumulated batch where the Trainer has counted them."""
    if num_items_in_batch is None:
        return (labels != -100).sum()
    if torch.is_tensor(num_items_in_batch):
        return num_items_in_batch.to(labels.device)
    return num_items_in_batch


class TranslationTrainer(Seq2SeqTrainer):
    """A `Seq2SeqTrainer` for translation models: RSMarian, `MarianMTModel`, or another of their kind.

    Args:
        args: `TranslationTrainingArguments`.
        train_dataset: `input_ids`, `labels` and, for token budgets, `length`, from `prepare_training_pairs`.
        eval_dataset: text columns `source` and `target`; translated and scored at each evaluation.
        processing_class: the tokenizer.
        decoding: how validation text is decoded; default: greedily, or by `args.eval_num_beams`.
        target_lang: chooses sacreBLEU's tokeniser.
        max_length: longest source and target in the validation loss, in tokens.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: TranslationTrainingArguments,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        decoding: DecodingArguments | None = None,
        target_lang: str | None = None,
        max_length: int = 256,
        **kwargs: Any,
    ):
        self.decoding = decoding or DecodingArguments(num_beams=args.eval_num_beams)
        self.target_lang = target_lang
        self.max_length = max_length
        kwargs.setdefault("data_collator", DataCollatorForSeq2Seq(processing_class, model=model))
        kwargs.setdefault("compute_loss_func", self.translation_loss)
        self.depth_schedule = DepthSchedule.from_args(args, model.config)
        if self.depth_schedule is not None and args.ddp_find_unused_parameters is None:
            # What belongs to a deeper step alone gets no gradient in a shallower update.
            args.ddp_find_unused_parameters = model.config.step_embeddings or model.config.step_layer_norms or None
        use_cache = model.config.use_cache
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=self._encode_for_loss(eval_dataset, processing_class) if eval_dataset is not None else None,
            processing_class=processing_class,
            **kwargs,
        )
        self.label_smoother = None  # `translation_loss` smooths
        if self.depth_schedule is not None:
            self.add_callback(self.depth_schedule)
        model.config.use_cache = use_cache  # the base class switches it off for good: the saved model would be slow
        if args.frozen_embedding_updates:
            self.add_callback(FrozenEmbeddingsCallback(args.frozen_embedding_updates))
        if args.early_stopping_patience is not None:
            grown = args.growing_updates[-1] if args.growing_updates else 0
            self.add_callback(GrownEarlyStopping(args.early_stopping_patience, grown))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the card of `model_card.py`, for `push_to_hub` too; of other models than Marian the base class's."""
        if not isinstance(self.model.config, MarianConfig):
            super().create_model_card(*args, **kwargs)
        elif self.is_world_process_zero():
            write_card(self.args.output_dir, self.hub_model_id)

    def _encode_for_loss(self, dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        if "input_ids" in dataset.column_names:
            return dataset
        bound = {"truncation": True, "max_length": self.max_length}
        return dataset.map(
            lambda batch: (
                tokenizer(batch["source"], **bound)
                | {"labels": tokenizer(text_target=batch["target"], **bound)["input_ids"]}
            ),
            batched=True,
        )

    # Sharding

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        with embeddings_in_one_group(self.model) if self.accelerator.is_fsdp2 else nullcontext():
            return super()._prepare_for_training(*args, **kwargs)

    # Loss

    def translation_loss(
        self, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Label-smoothed cross-entropy in training; in evaluation the plain one, whose exp is the perplexity."""
        epsilon = self.args.label_smoothing_factor if self.model.training else 0.0
        pad_token_id = self.processing_class.pad_token_id
        return label_smoothed_cross_entropy(outputs["logits"], labels, epsilon, pad_token_id, num_items_in_batch)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        # The labels stay here, so the model cannot know that it need not fill a cache.
        inputs = {**inputs, "use_cache": False}
        if self.depth_schedule is not None and model.training:
            inputs |= self.depth_schedule.depths(self.state.global_step)
        return super().compute_loss(model, inputs, *args, **kwargs)

    # Batches

    def get_train_dataloader(self) -> DataLoader:
        if self.args.max_tokens is None:
            return super().get_train_dataloader()
        if not isinstance(self.train_dataset, Dataset):
            raise ValueError("max_tokens needs the lengths of all pairs: set per_device_train_batch_size for a stream")
        sampler = TokenBatchSampler(
            self.train_dataset["length"][:],
            self.args.max_tokens,
            self.accelerator.num_processes,
            seed=self.args.seed,
        )
        self.add_callback(SetEpochCallback(sampler))
        dataloader = DataLoader(
            self._remove_unused_columns(self.train_dataset, description="training"),
            batch_sampler=sampler,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=self.args.dataloader_persistent_workers,
        )
        # The sampler gives every process as many batches, of varying size: nothing is to be evened out.
        config = self.accelerator.dataloader_config
        even_batches, config.even_batches = config.even_batches, False
        try:
            return self.accelerator.prepare(dataloader)
        finally:
            config.even_batches = even_batches

    # Evaluation

    def evaluate(self, eval_dataset: Dataset | None = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        if eval_dataset is not None:
            eval_dataset = self._encode_for_loss(eval_dataset, self.processing_class)
        self._evaluated = self.eval_dataset if eval_dataset is None else eval_dataset
        return super().evaluate(eval_dataset, *args, **kwargs)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        # The loss comes from the base class, by teacher forcing; the scores from free translation of the raw text
        # against the raw references, since decoding the labels again would flatter or harm them.
        kwargs["prediction_loss_only"] = True
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        sources, references = (self._evaluated[column][:] for column in ("source", "target"))
        model = whole_model(self.model, self.args.device)
        self.translations = translate(model, self.processing_class, sources, self.decoding)
        scores = corpus_scores(self.translations, references, self.target_lang)
        output.metrics.update({f"{metric_key_prefix}_{name}": scores[name] for name in ("bleu", "chrf")})
        return output

    # Checkpoints

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self.is_fsdp_enabled and "SHARDED" in str(self.accelerator.state.fsdp_plugin.state_dict_type):
            # The base class leaves it at the shards, which neither `from_pretrained` nor an average can read.
            state_dict = self.accelerator.get_state_dict(self.model)
            if self.args.should_save:
                self._save(output_dir, state_dict=state_dict)
        super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        if state_dict is not None:  # gathered from shards, with a copy for each name of a tied weight
            tied = self.model.all_tied_weights_keys
            state_dict = {name: tensor for name, tensor in state_dict.items() if name not in tied}
        super()._save(output_dir, state_dict)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save, mark the checkpoint as complete, and only then delete older ones."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()  # each process writes its own random state
        if self.args.should_save:
            run_dir = self._get_output_dir(trial=trial)
            mark_complete(Path(run_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"))
            rotate_checkpoints(run_dir, limit, self.state.best_model_checkpoint)
