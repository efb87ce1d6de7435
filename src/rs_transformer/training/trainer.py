"""What `Seq2SeqTrainer` lacks for translation: scores of real translations while training, and checkpoints that a kill
cannot spoil; with the batches of `batches.py` and the loss of `losses.py`."""

import inspect
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import fields, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Sampler
from transformers import (
    DataCollatorForSeq2Seq,
    MarianConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    Seq2SeqTrainer,
)
from transformers.models.marian.modeling_marian import shift_tokens_right
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import (
    PREFIX_CHECKPOINT_DIR,
    EvalLoopOutput,
    PredictionOutput,
    TrainOutput,
    has_length,
    seed_worker,
)
from transformers.utils import logging

from ..configuration_rs_marian import SIDES
from ..decoding import IDS_ALONE, DecodingArguments, translate
from ..metrics import corpus_scores
from ..model_card import write_card
from ..modeling_rs_marian import RSMarianForConditionalGeneration
from ..subword_sampling import SubwordSampler
from ..tokenization import encode
from ..utils.files import writing_weights
from .arguments import TranslationTrainingArguments
from .batches import (
    TEXT_COLUMNS,
    EpochSeeded,
    SamplingCollator,
    SetEpochCallback,
    TokenBatchSampler,
    WholeStream,
    check_texts,
)
from .depth_schedule import DepthSchedule, GrownEarlyStopping
from .fsdp import load_whole_state, shared_weights_in_one_group, whole_model
from .losses import (
    barred_tokens,
    divergence_from,
    label_smoothed_cross_entropy,
    label_smoothed_nll,
    log_probs_by_temperature,
    number_of_items,
    symmetric_divergence,
    without_padding,
)
from .progress import LogLines, ProgressBar
from .run_folder import (
    average_checkpoints,
    checkpoint_to_resume,
    complete_checkpoints,
    load_weights,
    make_way,
    mark_complete,
    remove_old_checkpoints,
    update_of,
)

logger = logging.get_logger(__name__)

SCORES = ("bleu", "chrf")
# Where a checkpoint's state keeps what the base class forgets: the seconds and the losses up to there.
PROGRESS = "TrainingProgress"
# Of an optimizer's groups what arguments say.
SETTINGS = ("initial_lr", "weight_decay", "betas", "eps")


def encode_texts(
    batch: dict[str, list[str]], tokenizer: PreTrainedTokenizerBase, max_length: int, made_by: str = ""
) -> dict[str, list]:
    """Token ids of a batch of texts, and of their translations if they have some, for `Dataset.map(batched=True)`."""
    source_ids = encode(tokenizer, batch["source"], max_length=max_length)
    ids = {"input_ids": source_ids, "attention_mask": [[1] * len(row) for row in source_ids]}
    if "target" in batch:
        ids["labels"] = encode(tokenizer, batch["target"], target=True, max_length=max_length)
    return ids


class TranslationTrainer(Seq2SeqTrainer):
    """A `Seq2SeqTrainer` for translation models: RSMarian, `MarianMTModel`, or another of their kind.

    Args:
        args: `TranslationTrainingArguments`.
        train_dataset: `input_ids`, `labels` and, for token budgets, `length`, from `prepare_training_pairs`.
        eval_dataset: text columns `source` and `target`, or several such datasets by name; translated and scored at
            each evaluation. One without text gives the loss alone.
        processing_class: the tokenizer.
        decoding: how validation text is decoded; default: greedily, or by `args.eval_num_beams`.
        target_lang: chooses sacreBLEU's tokeniser.
        max_length: longest source and target in the validation loss, in tokens; at most what the model takes.

    Attributes:
        translations: of the dataset that was evaluated or predicted last; of several, by name.
        weights_from: after training, whose weights the model has: the last update's, the best checkpoint's, or an
            average's.

    Raises:
        ValueError: a training pair is longer than the model takes, or `metric_for_best_model` is none that there is.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: TranslationTrainingArguments,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        decoding: DecodingArguments | None = None,
        target_lang: str | None = None,
        max_length: int = 256,
        **kwargs: Any,
    ):
        self.decoding = decoding or DecodingArguments(num_beams=args.eval_num_beams)
        self.target_lang = target_lang
        positions = getattr(model.config, "max_position_embeddings", None)
        self.max_length = max_length if positions is None else min(max_length, positions)
        self.translations: list[str] | dict[str, list[str]] = []
        self.weights_from = "the given model"
        self._scored = [0.0, 0]
        check_lengths(train_dataset, positions)
        if kwargs.get("data_collator") is None:
            kwargs["data_collator"] = DataCollatorForSeq2Seq(processing_class, model=model)
        if kwargs.get("compute_loss_func") is None:
            kwargs["compute_loss_func"] = self.update_loss
        elif options := self._of_own_loss(args):
            raise ValueError(f"{options[0]} is of the trainer's own loss, not of another one (compute_loss_func)")
        self._taught_logits: torch.Tensor | None = None
        # The loss of a stream's batches since its last update, and that update.
        self._not_applied: torch.Tensor | None = None
        self._applied_at = -1
        self.segmentation: SamplingCollator | None = None
        if args.subword_sampling:
            if getattr(train_dataset, "column_names", None) is not None:  # a stream may not know them
                check_texts(train_dataset.column_names)
            sampling = SubwordSampler(processing_class, args.subword_sampling)
            seed = args.seed if args.data_seed is None else args.data_seed
            self.segmentation = SamplingCollator(kwargs["data_collator"], sampling, seed)
        self.depth_schedule = DepthSchedule.from_args(args, model.config)
        if self.depth_schedule is not None and args.ddp_find_unused_parameters is None:
            # What belongs to a deeper step alone gets no gradient in a shallower update.
            args.ddp_find_unused_parameters = model.config.has_step_parameters or None
        use_cache = model.config.use_cache
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=(
                {name: self._encode_for_loss(each, processing_class) for name, each in eval_dataset.items()}
                if isinstance(eval_dataset, dict)
                else self._encode_for_loss(eval_dataset, processing_class)
            ),
            processing_class=processing_class,
            **kwargs,
        )
        self.label_smoother = None  # `translation_loss` smooths
        self._barred = barred_tokens(model, self.pad_token_id)
        if args.average_checkpoints and self._has_adapter():
            raise ValueError(
                "average_checkpoints averages whole models, and checkpoints of an adapter (PEFT) have its weights "
                "alone: set average_checkpoints: 0"
            )
        for theirs, ours in ((PrinterCallback, LogLines), (ProgressCallback, ProgressBar)):
            if self.pop_callback(theirs) is not None:
                self.add_callback(ours)
        if self.depth_schedule is not None:
            self.add_callback(self.depth_schedule)
        model.config.use_cache = use_cache  # the base class switches it off for good: the saved model would be slow
        self._check_metric()
        if args.early_stopping_patience is not None:
            grown = args.growing_updates[-1] if args.growing_updates else 0
            self.add_callback(GrownEarlyStopping(args.early_stopping_patience, grown))

    def _of_own_loss(self, args: TranslationTrainingArguments) -> list[str]:
        """The options that are given of the loss that the trainer has."""
        usual = {"r_drop_alpha": 0, "softmax_temperature": 1, "elastic_teaching": 0}
        return [name for name, value in usual.items() if (getattr(args, name) or value) != value]

    def _has_adapter(self) -> bool:
        return not isinstance(self.model, PreTrainedModel) or getattr(self.model, "_hf_peft_config_loaded", False)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the card of `model_card.py`, for `push_to_hub` too.

        Of other models than Marian, and of adapters (PEFT), whose folder holds no model, it is the base class's.

        Arguments are those of the base class. Of them `license`, `tags`, `dataset`, `dataset_tags` and
        `finetuned_from` come into our card as well, before what `card.yaml` says; name, language and task are the
        folder's, the tokenizer's and the model's own.
        """
        whole = any(Path(self.args.output_dir).glob("model*.safetensors"))
        if self._has_adapter() or not whole or not isinstance(self.model.config, MarianConfig):
            super().create_model_card(*args, **kwargs)
        elif self.is_world_process_zero():
            said = inspect.signature(super().create_model_card).bind(*args, **kwargs).arguments
            lists = {
                name: [value] if isinstance(value, str) else list(value or [])
                for name, value in ((name, said.get(name)) for name in ("tags", "dataset_tags", "dataset"))
            }
            facts = {
                "license": said.get("license"),
                "tags": lists["tags"],
                "dataset": ", ".join(lists["dataset"]),
                "datasets": lists["dataset_tags"],
                "base_model": said.get("finetuned_from"),
            }
            facts = {name: value for name, value in facts.items() if value}
            write_card(self.args.output_dir, self.hub_model_id, **facts)

    def _check_metric(self) -> None:
        """Raise `ValueError` if the metric that chooses the best model will not be among an evaluation's."""
        metric = self.args.metric_for_best_model
        if metric is None or self.compute_metrics is not None or self.eval_dataset is None:
            return
        sets = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"": self.eval_dataset}
        known = []
        for name, dataset in sets.items():
            has_text = {"source", "target"} <= set(getattr(dataset, "column_names", None) or ())
            known += [f"{name}_{score}" if name else score for score in ("loss", *(SCORES if has_text else ()))]
        if metric.removeprefix("eval_") not in known:
            raise ValueError(f"metric_for_best_model must be one of {', '.join(known)}, got {metric!r}")

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As the base class; `True` goes on from the last complete checkpoint, not from one that a kill cut short."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = checkpoint_to_resume(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(f"there is no complete checkpoint in {self.args.output_dir} to go on from")
        return super().train(resume_from_checkpoint, *args, **kwargs)

    # Sharding

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        self._started, self._seconds_before, self._first_loss = time.time(), 0.0, None
        accelerator, one_group = self.accelerator, nullcontext()
        if accelerator.is_fsdp2:
            one_group = shared_weights_in_one_group(self.model, accelerator.state.fsdp_plugin)
        with one_group:
            return super()._prepare_for_training(*args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Their state of a checkpoint, with the rates and the other settings that this run is given.

        The rate of `reduce_lr_on_plateau`, which is no share of the first one, stays the checkpoint's.
        """
        scheduler = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)
        given = [{name: group.get(name) for name in SETTINGS} for group in self.optimizer.param_groups]
        super()._load_optimizer_and_scheduler(checkpoint)
        for number, (group, settings) in enumerate(zip(self.optimizer.param_groups, given, strict=True)):
            rate, before = settings["initial_lr"], group.get("initial_lr")
            if rate is not None and before and rate != before and hasattr(scheduler, "base_lrs"):
                group["lr"] *= rate / before  # every schedule is a share of it
                scheduler.base_lrs[number] = rate
                scheduler._last_lr[number] = group["lr"]
            group |= {name: value for name, value in settings.items() if value is not None}

    # Loss

    def update_loss(
        self, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """`translation_loss`; where the full depth teaches another one, the mean of what both of them learn."""
        loss = self.translation_loss(outputs, labels, num_items_in_batch)
        if self._taught_logits is None:
            return loss
        weight = self.args.elastic_teaching
        taught = self.translation_loss({"logits": self._taught_logits}, labels, num_items_in_batch)
        divergence = divergence_from(outputs["logits"].detach(), self._taught_logits, labels, self.pad_token_id)
        passes = 2 if self.args.r_drop_alpha else 1
        labels = without_padding(labels[: len(labels) // passes], self.pad_token_id)
        divergence = divergence / passes / number_of_items(labels, num_items_in_batch)
        return (loss + (1 - weight) * taught + weight * divergence) / 2

    def translation_loss(
        self, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Label-smoothed cross-entropy in training, tempered and with R-Drop's divergence if there is to be some.

        In evaluation the plain one, whose exp is the perplexity.
        """
        logits, pad = outputs["logits"], self.pad_token_id
        if not self.model.training:
            self._tally(logits, labels)
            return label_smoothed_cross_entropy(logits, labels, 0.0, pad, num_items_in_batch)
        log_probs = log_probs_by_temperature(logits)
        return self.per_item(self.summed_cross_entropy(log_probs, labels), log_probs, labels, num_items_in_batch)

    def summed_cross_entropy(self, log_probs: Callable[[float], torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
        """Label-smoothed cross-entropy at the temperature of the training, and times it."""
        temperature, smoothing = self.args.softmax_temperature, self.args.label_smoothing_factor
        barred = None if self._barred is None else self._barred.to(labels.device)
        nll = label_smoothed_nll(log_probs(temperature), labels, smoothing, self.pad_token_id, barred)
        return temperature * nll

    def per_item(
        self,
        loss: torch.Tensor,
        log_probs: Callable[[float], torch.Tensor],
        labels: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None,
    ) -> torch.Tensor:
        """A training loss summed over target tokens, with R-Drop's divergence if asked for, for each of them.

        With R-Drop it is half of the paper's, the mean of the two passes, so that the learning rate keeps its meaning.

        Args:
            loss: of both passes where there are two.
            log_probs: by temperature, (2 · batch, length, vocabulary) where there are two passes.
            labels: likewise, (2 · batch, length).
        """
        labels = without_padding(labels, self.pad_token_id)
        if self.args.r_drop_alpha:
            divergence = symmetric_divergence(log_probs(1.0), labels)
            loss = loss / 2 + self.args.r_drop_alpha / 4 * divergence
            labels = labels.chunk(2)[0]
        return loss / number_of_items(labels, num_items_in_batch)

    @property
    def pad_token_id(self) -> int | None:
        """The token that is no target; None where a tokenizer pads by the end of sentence, which has to be learned."""
        tokenizer = self.processing_class
        return None if tokenizer.pad_token_id == tokenizer.eos_token_id else tokenizer.pad_token_id

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | int | None:
        # What is not learned is not counted either.
        for batch in batch_samples:
            if "labels" in batch:
                batch["labels"] = without_padding(batch["labels"], self.pad_token_id)
        return super()._get_num_items_in_batch(batch_samples, device)

    def _tally(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Count a batch of an evaluation, but not the sentences that only fill up the last batch of all processes."""
        rows, state = len(labels), self.accelerator.gradient_state
        if state.end_of_dataloader and state.remainder > 0:
            rows = min(max(state.remainder - self.accelerator.process_index * rows, 0), rows)
        if rows:
            labels = without_padding(labels[:rows], self.pad_token_id)
            nll = label_smoothed_cross_entropy(logits[:rows], labels, 0.0, self.pad_token_id, num_items_in_batch=1)
            self._scored[0] += nll.item()
            self._scored[1] += int(number_of_items(labels, None))

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = super()._prepare_inputs(inputs)
        if self.args.r_drop_alpha and self.model.training:
            inputs = {name: torch.cat([each, each]) for name, each in inputs.items()}  # two passes in one
        return inputs

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        # The labels stay here, so the model cannot know that it need not fill a cache.
        inputs = {**inputs, "use_cache": False}
        if "decoder_input_ids" not in inputs:  # M2M100 and its like make them of the labels themselves
            config = self.model.config
            start = (config.pad_token_id, config.decoder_start_token_id)
            inputs["decoder_input_ids"] = shift_tokens_right(inputs["labels"], *start)
        if self.depth_schedule is None or not model.training:
            return super().compute_loss(model, inputs, *args, **kwargs)
        update = self.state.global_step
        depths, full = self.depth_schedule.depths(update), self.depth_schedule.full_depths(update)
        if self.args.elastic_teaching is None or depths == full:
            return super().compute_loss(model, {**inputs, **depths}, *args, **kwargs)
        # The full depth last: it has all parameters, which is what DDP looks for in the last of several passes.
        shown = {name: each for name, each in inputs.items() if name != "labels"}
        self._taught_logits = model(**shown, **depths).logits
        try:
            return super().compute_loss(model, {**inputs, **full}, *args, **kwargs)
        finally:
            self._taught_logits = None

    # Training

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(model, *args, **kwargs)
        if self._not_applied is not None:
            if self._applied_at != self.state.global_step:
                self._not_applied.zero_()
                self._applied_at = self.state.global_step
            self._not_applied += loss.detach().nan_to_num(0.0, 0.0, 0.0)  # as the base class sums
        if self.state.global_step < self.args.frozen_embedding_updates:
            # While a collapsed layer finds its way back. Before the gradients are clipped, whose norm is that of the
            # others alone.
            for module in model.modules():
                if isinstance(module, nn.Embedding):
                    module.weight.grad = None
        return loss

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        given = inspect.signature(super()._init_training_state).bind(*args, **kwargs).arguments
        self._updates_an_epoch = given["num_update_steps_per_epoch"]
        epoch, batches = super()._init_training_state(*args, **kwargs)
        self.state.compute_steps(self.args, self.state.max_steps)  # not those of the checkpoint
        saved = self.state.stateful_callbacks.get(PROGRESS, {}).get("attributes", {})
        before = saved.get("updates_an_epoch", self._updates_an_epoch)
        if self.args.max_steps <= 0 and before != self._updates_an_epoch:
            raise ValueError(
                f"the checkpoint is of a run with {before} updates an epoch, and now, by other processes or batches, "
                f"there are {self._updates_an_epoch}: give max_steps, since epochs cannot be counted on"
            )
        if has_length(self.train_dataset) or "epoch" not in saved:
            return epoch, batches
        # The base class takes `max_steps` for the length of a stream, and would skip all batches in its first pass.
        batches = saved["updates_of_epoch"] * self.args.gradient_accumulation_steps
        return saved["epoch"], 0 if self.args.ignore_data_skip else batches

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        self._restore_progress()
        # Of a stream `state.epoch` is the share of `max_steps`, and not how many times it was gone through.
        given = inspect.signature(super()._run_epoch).bind(*args, **kwargs).arguments
        goes_on = given["resume_from_checkpoint"] is not None and given["epoch"] == given["epochs_trained"]
        done = given["steps_trained_in_current_epoch"] // self.args.gradient_accumulation_steps if goes_on else 0
        self._epoch, self._epoch_began = given["epoch"], self.state.global_step - done
        if self.segmentation is not None:
            self.segmentation.set_epoch(given["epoch"])
        stopping = [each for each in self.callback_handler.callbacks if isinstance(each, GrownEarlyStopping)]
        if self.state.global_step >= self.state.max_steps or any(each.over for each in stopping):
            # The run had ended when its last checkpoint was saved; the base class would make one more update.
            self.control.should_training_stop = True
        else:
            if not has_length(self.train_dataset):
                self._not_applied = torch.zeros_like(self._tr_loss)
            before = self.state.global_step
            super()._run_epoch(*args, **kwargs)
            self._drop_left_over()
            self._not_applied = None
            if not (has_length(self.train_dataset) or goes_on) and self.state.global_step == before:
                raise ValueError(
                    "a pass of the stream has fewer batches than gradient_accumulation_steps "
                    f"({self.args.gradient_accumulation_steps}), and no update: lower it, or bring more text"
                )

    def _drop_left_over(self) -> None:
        """What is left over where a stream ends amid an update would be added to the next one."""
        if self._not_applied is not None and self._applied_at == self.state.global_step:
            self.model.zero_grad()
            self._tr_loss -= self._not_applied
            self._applied_at = -1

    def _keep_progress(self) -> None:
        self.state.stateful_callbacks[PROGRESS] = {
            "args": {},
            "attributes": {
                "seconds": self._seconds_before + time.time() - self._started,
                "logged_at": self._globalstep_last_logged,
                "logged_loss": self._total_loss_scalar,
                "loss": self.accelerator.gather(self._tr_loss).mean().item(),
                "first_loss": self._first_loss,
                "epoch": self._epoch,
                "updates_of_epoch": self.state.global_step - self._epoch_began,
                "updates_an_epoch": self._updates_an_epoch,
            },
        }

    def _restore_progress(self) -> None:
        """Go on with the time and the losses of the checkpoint that the run goes on from."""
        if (saved := self.state.stateful_callbacks.pop(PROGRESS, None)) is None:
            return
        progress = saved["attributes"]
        self._seconds_before = progress["seconds"]
        self._globalstep_last_logged = progress["logged_at"]
        self._total_loss_scalar = progress["logged_loss"]
        self._tr_loss += progress["loss"]
        self._first_loss = progress["first_loss"]
        self._initial_global_step = 0

    def _maybe_log_save_evaluate(self, tr_loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        self._drop_left_over()  # before it is logged at the end of a pass
        if self.state.global_step == 1 and self._first_loss is None:
            self._first_loss = self.accelerator.gather(tr_loss).mean().item()
        if self.control.should_log or self.control.should_evaluate or self.control.should_save:
            self._check_weights()
        super()._maybe_log_save_evaluate(tr_loss, *args, **kwargs)

    def _check_weights(self) -> None:
        """Raise `ValueError` if the weights are no longer finite: of that there is to be no checkpoint and no card."""
        norm = torch.nn.utils.get_total_norm([each for each in self.model.parameters() if each.is_floating_point()])
        if not torch.isfinite(norm.full_tensor() if isinstance(norm, DTensor) else norm):
            self._say_diverged(f"at update {self.state.global_step} the weights are no longer finite")

    def _check_loss(self, mean: float) -> None:
        """Raise `ValueError` if the loss has ended above where it began and far above that of guessing."""
        last = next((entry["loss"] for entry in reversed(self.state.log_history) if "loss" in entry), mean)
        output = self.model.get_output_embeddings()
        guessing = self._loss_scale() * math.log(output.weight.shape[0]) if output is not None else math.inf
        if self._first_loss is not None and last > max(self._first_loss, 2 * guessing):
            self._say_diverged(
                f"the loss ended at {last:.4g}, began at {self._first_loss:.4g}, and is {guessing:.4g} where all "
                "tokens are equally likely"
            )

    def _loss_scale(self) -> float:
        """How many times a cross-entropy the loss is, roughly; infinite where nobody knows."""
        return self.args.softmax_temperature or 1.0

    def _say_diverged(self, how: str) -> NoReturn:
        raise ValueError(
            f"training diverged: {how}. Lower learning_rate ({self.args.learning_rate:g}), or raise warmup_steps "
            f"({self.args.warmup_steps:g})"
        )

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> TrainOutput:
        self._restore_progress()
        self._check_weights()
        best = Path(self.args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}")
        if self.state.best_global_step and best.is_dir():  # also in a folder that was renamed since
            self.state.best_model_checkpoint = str(best)
        with self._nothing_deleted():
            outcome = super()._finalize_training(trial, num_train_samples, start_time - self._seconds_before)
        self._check_loss(outcome.training_loss)
        self.weights_from = self._choose_weights()
        logger.info(f"The model has the weights of {self.weights_from}.")
        return outcome

    # What the base class counts by layers and sentences

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """As the base class, with a layer's parameters counted at each of its steps, as in a stock model of copies."""
        operations = super().floating_point_ops(inputs)
        if not isinstance(self.model, RSMarianForConditionalGeneration):
            return operations
        schedule, update = self.depth_schedule, self.state.global_step
        passes = [{} if schedule is None else schedule.depths(update)]
        if self.args.elastic_teaching is not None and schedule.full_depths(update) not in passes:
            passes.append(schedule.full_depths(update))
        stacks = {side: getattr(self.model.model, side) for side in SIDES}
        stored = sum(each.numel() for each in {p for stack in stacks.values() for p in stack.layers.parameters()})
        total = 0
        for depths in passes:
            taken = [layer for s, stack in stacks.items() for layer, _ in stack.steps(s, depths.get(f"{s}_depth"))]
            applied = sum(each.numel() for layer in taken for each in layer.parameters())
            total += operations + 6 * inputs[self.model.main_input_name].numel() * (applied - stored)
        return total

    def set_initial_training_values(self, args: TranslationTrainingArguments, dataloader: DataLoader) -> tuple:
        """As the base class, which takes every update for one of `per_device_train_batch_size` sentences a process."""
        values = list(super().set_initial_training_values(args, dataloader))
        if args.max_tokens is not None and args.max_steps > 0:
            _, updates_an_epoch, pairs, *_, max_steps = values
            values[3] = pairs * max_steps / updates_an_epoch
        return tuple(values)

    # The final model

    def _choose_weights(self) -> str:
        """Average the last checkpoints, if asked to; of the average and the best one keep what validates better.

        Returns:
            Whose weights the model has, in words.
        """
        args, last = self.args, self.state.global_step
        best = self.state.best_model_checkpoint if args.load_best_model_at_end else None
        unaveraged = f"update {last}" if best is None else f"{Path(best).name}, the best of validation"
        if not args.average_checkpoints:
            return unaveraged
        grown = args.growing_updates[-1] if args.growing_updates else 0  # until then it has less depth
        found = complete_checkpoints(args.output_dir)
        checkpoints = [folder for folder in found if grown < update_of(folder) <= last]
        checkpoints = checkpoints[-args.average_checkpoints :]
        if not checkpoints:
            logger.warning(f"{args.output_dir} has no checkpoint to average: the weights stay as they are.")
            return unaveraged
        if len(checkpoints) < args.average_checkpoints:
            logger.warning(
                f"There are only {len(checkpoints)} checkpoints to average, not {args.average_checkpoints}."
            )
        average = f"the average of {', '.join(folder.name for folder in checkpoints)}"
        logger.info(f"Averaging {', '.join(folder.name for folder in checkpoints)}")
        best_score = None if best is None else self._validation_score()
        self._load_whole(average_checkpoints(checkpoints))
        if best is None:
            return average
        score = self._validation_score()
        scores = f"{args.metric_for_best_model} {score:.4g} on validation, the best checkpoint {best_score:.4g}"
        if score > best_score if args.greater_is_better else score < best_score:
            return f"{average}, which has {scores}"
        self._load_whole(load_weights(best))
        return f"{Path(best).name}: the average has {scores}"

    def _validation_score(self) -> float:
        """`metric_for_best_model` of the model as it is, without a trace in the logs."""
        sets = self.eval_dataset if isinstance(self.eval_dataset, dict) else {None: self.eval_dataset}
        metrics: dict[str, float] = {}
        training, self.is_in_train = self.is_in_train, True  # else the weights could be cast for good
        for name in sets:
            prefix = "eval" if name is None else f"eval_{name}"
            loss_only = True if self.compute_metrics is None else None
            loader = self.get_eval_dataloader(name)
            metrics |= self.evaluation_loop(loader, "Evaluation", loss_only, metric_key_prefix=prefix).metrics
        self.is_in_train = training
        return metrics[f"eval_{self.args.metric_for_best_model.removeprefix('eval_')}"]

    def _load_whole(self, state: Mapping[str, torch.Tensor]) -> None:
        model = self.accelerator.unwrap_model(self.model)
        missing, unexpected = load_whole_state(model, state)
        expected = {*model.all_tied_weights_keys, *(model._keys_to_ignore_on_save or ())}
        if unexpected or set(missing) - expected:
            raise ValueError(f"the checkpoints do not fit the model: {unexpected or sorted(set(missing) - expected)}")
        model.tie_weights()

    # Batches

    def get_train_dataloader(self) -> DataLoader:
        if self.segmentation is None:
            return self._train_dataloader()
        self._set_signature_columns_if_needed()
        collator, columns = self.data_collator, self._signature_columns
        self.data_collator, self._signature_columns = self.segmentation, [*columns, *TEXT_COLUMNS]
        try:
            return self._train_dataloader()
        finally:
            self.data_collator, self._signature_columns = collator, columns

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        sampler = super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        if isinstance(sampler, LengthGroupedSampler):
            # Left to itself it draws from the process's own generator: otherwise after a resume, and in each process.
            sampler = EpochSeeded(sampler, seed)
        elif hasattr(sampler, "set_epoch"):  # that of batch_rebalance, whose seed is always 42
            sampler.seed = seed
        else:
            return sampler
        self.pop_callback(SetEpochCallback)
        self.add_callback(SetEpochCallback(sampler))
        return sampler

    def _train_dataloader(self) -> DataLoader:
        if self.args.max_tokens is None:
            with self._stream_shared_out():
                return super().get_train_dataloader()
        if not isinstance(self.train_dataset, Dataset):
            raise ValueError("max_tokens needs the lengths of all pairs: set per_device_train_batch_size for a stream")
        sampler = TokenBatchSampler(
            self.train_dataset["length"][:],
            self.args.max_tokens,
            self.accelerator.num_processes,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
        )
        self.pop_callback(SetEpochCallback)  # of a training before
        self.add_callback(SetEpochCallback(sampler))
        workers = self.args.dataloader_num_workers
        dataloader = DataLoader(
            self._remove_unused_columns(self.train_dataset, description="training"),
            batch_sampler=sampler,
            collate_fn=self.data_collator,
            num_workers=workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            multiprocessing_context=self.args.dataloader_multiprocessing_context,
            in_order=self.args.dataloader_in_order,
            worker_init_fn=partial(seed_worker, num_workers=workers, rank=self.args.process_index),
        )
        # The sampler gives every process as many batches, of varying size: nothing is to be evened out.
        config = self.accelerator.dataloader_config
        even_batches, config.even_batches = config.even_batches, False
        try:
            return self.accelerator.prepare(dataloader)
        finally:
            config.even_batches = even_batches

    @contextmanager
    def _stream_shared_out(self) -> Iterator[None]:
        """Have each of several processes take its batches from a stream.

        Left to itself accelerate has the main process send them, which cannot be where batches differ in width.
        """
        config, stream = self.accelerator.dataloader_config, self.train_dataset
        if has_length(stream) or self.accelerator.num_processes == 1:
            yield
            return
        dispatch, config.dispatch_batches = config.dispatch_batches, False
        self.train_dataset = WholeStream(stream)
        try:
            yield
        finally:
            self.train_dataset, config.dispatch_batches = stream, dispatch

    # Evaluation

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        given = self.eval_dataset[eval_dataset] if isinstance(eval_dataset, str) else eval_dataset
        given = self.eval_dataset if given is None else given
        if given is None:
            raise ValueError("evaluation needs an eval_dataset")
        # Not the base class's, which with persistent workers hands out the batches of another dataset.
        return self.get_test_dataloader(given)

    def get_test_dataloader(self, test_dataset: Dataset) -> DataLoader:
        encoded = self._encode_for_loss(test_dataset, self.processing_class)
        # The whole set is scored, and workers end with it: the Trainer keeps none of these loaders.
        own = {"dataloader_drop_last": False, "dataloader_persistent_workers": False}
        before = {name: getattr(self.args, name) for name in own}
        vars(self.args).update(own)
        try:
            dataloader = super().get_test_dataloader(encoded)
        finally:
            vars(self.args).update(before)
        dataloader.text = encoded
        return dataloader

    def _encode_for_loss(self, dataset: Any, tokenizer: PreTrainedTokenizerBase) -> Any:
        """Token ids beside the text columns, cut to what the model takes, where they are not there yet."""
        columns = getattr(dataset, "column_names", None) or ()
        if "input_ids" in columns or "source" not in columns:
            return dataset
        # A function that knew the trainer would be pickled with all of it, for the fingerprint of the dataset.
        options = {"tokenizer": tokenizer, "max_length": self.max_length, "made_by": version("rs-transformer")}
        return dataset.map(encode_texts, batched=True, fn_kwargs=options)

    def evaluate(
        self,
        eval_dataset: str | Dataset | dict[str, Dataset] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
        **search: Any,
    ) -> dict[str, float]:
        """Loss, BLEU and chrF of a dataset, of one of `self.eval_dataset` by its name, or of several.

        Args:
            search: of this call alone, by the names of `DecodingArguments`; `max_length` counts the start token.
        """
        datasets = self.eval_dataset if eval_dataset is None else eval_dataset
        if not isinstance(datasets, dict):
            with self._search(search):
                return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        metrics, translations = {}, {}
        for name, dataset in datasets.items():
            each = name if eval_dataset is None else dataset
            metrics |= self.evaluate(each, ignore_keys, f"{metric_key_prefix}_{name}", **search)
            translations[name] = self.translations
        self.translations = translations
        return metrics

    def predict(
        self,
        test_dataset: Dataset,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "test",
        **search: Any,
    ) -> PredictionOutput:
        """As `evaluate`; scores need a `target`. `predictions` are the base class's, see `predict_with_generate`."""
        with self._search(search):
            return super().predict(test_dataset, ignore_keys, metric_key_prefix)

    @contextmanager
    def _search(self, options: Mapping[str, Any]) -> Iterator[None]:
        """Decode by other options."""
        options, before = dict(options), self.decoding
        if (length := options.pop("max_length", None)) is not None:
            options["max_new_tokens"] = length - 1
        known = [option.name for option in fields(DecodingArguments)]
        if unknown := sorted(options.keys() - set(known)):
            raise TypeError(f"the search takes max_length, {', '.join(known)}; not {unknown[0]}")
        self.decoding = replace(before, **options)
        try:
            yield
        finally:
            self.decoding = before

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **search: Any,
    ) -> tuple[torch.Tensor | None, Any, Any]:
        labels, loss = inputs.get("labels"), None  # the collator says None where there are none
        if prediction_loss_only or not self.args.predict_with_generate:
            if labels is None:
                return None, None, None  # there is nothing to force the decoder with
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if labels is not None:
            labels = self._prepare_input(labels)
            loss, _, _ = super().prediction_step(model, inputs, True)  # by `translation_loss`, not by the model's own
        sources = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        search = self.decoding.generate_kwargs(self.model) | IDS_ALONE | search
        _, generated, _ = super().prediction_step(model, sources, False, ignore_keys, **search)
        return loss, generated, labels

    def evaluation_loop(
        self, dataloader: DataLoader, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        # The loss comes from the base class's loop, by teacher forcing, but is the mean over tokens, not over batches;
        # the scores from free translation of the raw text against the raw references, since decoding the labels again
        # would flatter or harm them.
        self._scored = [0.0, 0]
        with self._weights_kept():
            return self._evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)

    @contextmanager
    def _weights_kept(self) -> Iterator[None]:
        """Bring the weights back that `bf16_full_eval` and `fp16_full_eval` cast, which would be saved so."""
        modules = list(self.model.modules()) if self.args.bf16_full_eval or self.args.fp16_full_eval else []
        parameters = {each: each.data for module in modules for each in module.parameters(recurse=False)}
        buffers = [dict(module._buffers) for module in modules]
        try:
            yield
        finally:
            for parameter, data in parameters.items():
                parameter.data = data
            for module, own in zip(modules, buffers, strict=True):
                module._buffers.update(own)

    def _evaluation_loop(self, dataloader: DataLoader, *args: Any, metric_key_prefix: str, **kwargs: Any) -> Any:
        output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        nll, tokens = map(sum, zip(*gather_object([self._scored]), strict=True))
        if tokens:
            output.metrics[f"{metric_key_prefix}_loss"] = nll / tokens
        text = getattr(dataloader, "text", None)
        columns = getattr(text, "column_names", None) or ()
        self.translations = []
        if "source" in columns:
            model = whole_model(self.model, self.args.device)
            with in_own_precision(model):
                self.translations = translate(model, self.processing_class, list(text["source"]), self.decoding)
        if {"source", "target"} <= set(columns):
            scores = corpus_scores(self.translations, list(text["target"]), self.target_lang)
            output.metrics.update({f"{metric_key_prefix}_{name}": scores[name] for name in SCORES})
        return output

    # Checkpoints

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        with writing_weights(output_dir or self.args.output_dir):
            self._save_whole(output_dir, _internal_call)

    def _save_whole(self, output_dir: str | None, _internal_call: bool) -> None:
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
        checkpoint = Path(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.args.should_save:
            make_way(checkpoint)
        self._keep_progress()
        with self._nothing_deleted(), writing_weights(checkpoint):
            super()._save_checkpoint(model, trial)
        del self.state.stateful_callbacks[PROGRESS]
        self.accelerator.wait_for_everyone()  # each process writes its own random state
        if self.args.should_save:
            mark_complete(checkpoint)
            remove_old_checkpoints(checkpoint.parent, self.args.save_total_limit, self.state.best_model_checkpoint)

    @contextmanager
    def _nothing_deleted(self) -> Iterator[None]:
        """The base class deletes folders that are not the run's own."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            yield
        finally:
            self.args.save_total_limit = limit


@contextmanager
def in_own_precision(model: nn.Module) -> Iterator[None]:
    """Without the mixed precision that accelerate has put around `forward`: as a saved model translates."""
    mixed = vars(model).get("forward")
    if mixed is not None and hasattr(model, "_original_forward"):
        model.forward = model._original_forward
    try:
        yield
    finally:
        if mixed is not None:
            model.forward = mixed


def check_lengths(pairs: Any, positions: int | None) -> None:
    """Raise `ValueError` if one of the prepared training pairs is longer than the model takes; not for streams."""
    if positions is not None and isinstance(pairs, Dataset) and "length" in pairs.column_names and len(pairs):
        longest = max(pairs["length"][:])
        if longest > positions:
            raise ValueError(
                f"the longest training pair has {longest} tokens and the model {positions} positions: lower "
                f"max_source_length and max_target_length to {positions}"
            )
