"""What `Seq2SeqTrainer` lacks for translation: scores of real translations while training, and checkpoints that a kill
cannot spoil; with the batches of `batches.py` and the loss of `losses.py`."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    DataCollatorForSeq2Seq,
    MarianConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Seq2SeqTrainer,
    TrainerCallback,
)
from transformers.models.marian.modeling_marian import shift_tokens_right
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, rotate_checkpoints
from transformers.utils import logging

from ..decoding import DecodingArguments, translate
from ..metrics import corpus_scores
from ..model_card import write_card
from .arguments import TranslationTrainingArguments
from .batches import SetEpochCallback, TokenBatchSampler
from .depth_schedule import DepthSchedule, GrownEarlyStopping
from .fsdp import embeddings_in_one_group, whole_model
from .losses import label_smoothed_cross_entropy, without_padding
from .run_folder import mark_complete

logger = logging.get_logger(__name__)


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
        return label_smoothed_cross_entropy(outputs["logits"], labels, epsilon, self.pad_token_id, num_items_in_batch)

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

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        # The labels stay here, so the model cannot know that it need not fill a cache.
        inputs = {**inputs, "use_cache": False}
        if "decoder_input_ids" not in inputs:  # M2M100 and its like make them of the labels themselves
            config = self.model.config
            start = (config.pad_token_id, config.decoder_start_token_id)
            inputs["decoder_input_ids"] = shift_tokens_right(inputs["labels"], *start)
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
