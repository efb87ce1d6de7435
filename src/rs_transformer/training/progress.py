"""What a training run says of itself on the screen: a summary at its start, then a bar or a line at each interval."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.utils import logging

from .arguments import TranslationTrainingArguments

logger = logging.get_logger(__name__)

# What is shown of what the Trainer logs: its name on the screen and its form.
SHOWN = {
    "loss": ("loss", ".3f"),
    "learning_rate": ("learning rate", ".2e"),
    "grad_norm": ("gradient norm", ".2f"),
    "eval_loss": ("loss", ".3f"),
    "eval_bleu": ("BLEU", ".2f"),
    "eval_chrf": ("chrF", ".2f"),
}
# What the base class measures of an evaluation beside.
SPEED = ("_runtime", "_per_second", "_compilation_time", "_preparation_time")


def log_line(logs: Mapping[str, Any], update: int, updates: int) -> str:
    """One line of what the Trainer logs at an update, or `""` if nothing of it is for the screen."""
    figures = [f"{shown} {logs[name]:{form}}" for name, (shown, form) in SHOWN.items() if name in logs]
    # Of validation sets by name, and by one's own metrics.
    figures += [
        f"{name.removeprefix('eval_')} {value:.4g}"
        for name, value in logs.items()
        if name.startswith("eval_") and name not in SHOWN and not name.endswith(SPEED) and isinstance(value, float)
    ]
    if not figures:
        return ""
    what = "validation: " if any(name.startswith("eval_") for name in logs) else ""
    epoch = f"  epoch {logs['epoch']:.2f}" if "epoch" in logs else ""
    return f"update {update:,} of {updates:,}  {what}{'  '.join(figures)}{epoch}"


class LogLines(PrinterCallback):
    """A line at each logging interval, where there is no terminal."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and (line := log_line(logs or {}, state.global_step, state.max_steps)):
            print(line, flush=True)


class ProgressBar(ProgressCallback):
    """A bar, and above it the same line."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        line = log_line(logs or {}, state.global_step, state.max_steps)
        if state.is_world_process_zero and self.training_bar is not None and line:
            self.training_bar.write(line)


class StartSummary(TrainerCallback):
    """Says what is about to be trained, once the number of updates is known."""

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        print(model_line(model))
        print(updates_line(args, state.global_step, state.max_steps), flush=True)


def model_line(model: nn.Module) -> str:
    """Parameters, vocabulary and layer maps of a model."""
    config = model.config
    stored = model.num_parameters(only_trainable=True)
    line = f"Model: {type(model).__name__}, vocabulary {config.vocab_size:,}, {stored:,} parameters stored"
    if getattr(config, "encoder_layer_map", None) is None:
        return line
    applied = stored
    maps = []
    for side, stack in (("encoder", model.get_encoder()), ("decoder", model.get_decoder())):
        layer_map = getattr(config, f"{side}_layer_map")
        sizes = [sum(parameter.numel() for parameter in layer.parameters()) for layer in stack.layers]
        applied += sum(sizes[layer] for layer in layer_map) - sum(sizes)
        maps.append(f"{side} steps apply layers {' '.join(map(str, layer_map))}")
    return f"{line}, {applied:,} if no step shared; {', '.join(maps)}"


def updates_line(args: TranslationTrainingArguments, done: int, updates: int) -> str:
    """How many updates of what size there will be, and where."""
    shares = args.world_size * args.gradient_accumulation_steps
    if args.max_tokens is not None:
        size = f"at most {args.max_tokens * shares:,} tokens (padding included, each side)"
    else:
        size = f"{args.train_batch_size * shares:,} pairs"
    where = f"{args.world_size} process{'es' if args.world_size > 1 else ''} on {args.device.type}"
    return f"Updates: {updates - done:,}{f' more, {updates:,} in all,' if done else ''} of {size}; {where}"
