"""Depth that changes while training: stacks that grow, and stacks of sampled ("elastic") depth.

A recurrently stacked model has the same parameters at any depth, so an update may run at any: the schedule says at
which, and `forward` takes it as `encoder_depth` and `decoder_depth`.
"""

import random
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import EarlyStoppingCallback, PretrainedConfig, TrainerCallback

from ..configuration_rs_marian import SIDES, RSMarianConfig
from .arguments import TranslationTrainingArguments, check_updates


class DepthSchedule(TrainerCallback):
    """The depth of each update; one and the same in all processes, and after a resume.

    Args:
        config: of the model, an RSMarian.
        growing_depths: the depths that both sides start with, one after the other, before their own; a side that is
            less deep stays at its own.
        growing_updates: for each of them, the update that the next one begins with.
        elastic_layers: for `"encoder"` and `"decoder"`, the least depth; that of an update is drawn evenly from there
            to the depth that the side has at that time.
        seed: of the draws.

    Raises:
        ValueError: the model is not recurrently stacked, or cannot run at such a depth.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        growing_depths: Sequence[int] = (),
        growing_updates: Sequence[int] = (),
        elastic_layers: Mapping[str, int] | None = None,
        seed: int = 0,
    ):
        if not isinstance(config, RSMarianConfig):
            raise ValueError(
                f"growing_depths and elastic_*_layers need a recurrently stacked model, not a {config.model_type}"
            )
        self.own = {side: getattr(config, f"{side}_layers") for side in SIDES}
        self.growing_depths = list(growing_depths)
        self.growing_updates = list(growing_updates)
        self.elastic_layers = dict(elastic_layers or {})
        self.seed = seed
        deepest = max(self.own.values())
        if self.growing_depths and self.growing_depths[-1] >= deepest:
            raise ValueError(f"growing_depths must stay below the model's depth {deepest}, got {self.growing_depths}")
        for side in SIDES:
            least = getattr(config, f"{side}_unique_layers")
            if self.growing_depths and self.growing_depths[0] < least:
                raise ValueError(
                    f"growing_depths must start at {side}_unique_layers ({least}) at least, got {self.growing_depths}"
                )
            depth = self.elastic_layers.get(side, self.own[side])
            if not least <= depth <= self.own[side]:
                raise ValueError(
                    f"elastic_{side}_layers must lie between {side}_unique_layers ({least}) and {side}_layers "
                    f"({self.own[side]}), got {depth}"
                )

    @classmethod
    def from_args(cls, args: TranslationTrainingArguments, config: PretrainedConfig) -> "DepthSchedule | None":
        """The schedule that training arguments ask for, None if the depth stays as it is."""
        elastic = {side: getattr(args, f"elastic_{side}_layers") for side in SIDES}
        elastic = {side: depth for side, depth in elastic.items() if depth is not None}
        if not (elastic or args.growing_depths):
            return None
        return cls(config, args.growing_depths, args.growing_updates, elastic, args.seed)

    def depths(self, update: int) -> dict[str, int]:
        """`encoder_depth` and `decoder_depth` of an update, counted from 0."""
        depths = {}
        for side, depth in self._grown(update).items():
            least = min(self.elastic_layers.get(side, depth), depth)
            depths[f"{side}_depth"] = random.Random(f"{self.seed} {side} {update}").randint(least, depth)
        return depths

    def full_depths(self, update: int) -> dict[str, int]:
        """The greatest depths that the update could have."""
        return {f"{side}_depth": depth for side, depth in self._grown(update).items()}

    def _grown(self, update: int) -> dict[str, int]:
        grown = [depth for depth, end in zip(self.growing_depths, self.growing_updates, strict=True) if update < end]
        return {side: min(grown[0], own) if grown else own for side, own in self.own.items()}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        check_updates(self.growing_updates, state.max_steps)  # known by now if the run is counted in epochs


class GrownEarlyStopping(EarlyStoppingCallback):
    """Early stopping that counts no evaluation of a model that is still growing, and goes on counting after a resume.

    Args:
        grown: the update from which on the model is trained at its own depth.
    """

    def __init__(self, early_stopping_patience: int, grown: int = 0):
        super().__init__(early_stopping_patience)
        self.grown, self.began = grown, 0

    @property
    def over(self) -> bool:
        """Whether the training has ended."""
        return self.early_stopping_patience_counter >= self.early_stopping_patience

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self.began = state.global_step  # whose evaluation, by eval_on_start, is that of the checkpoint once more
        name = type(self).__name__
        saved = state.stateful_callbacks.setdefault(name, self.state())["attributes"] if state.global_step else {}
        self.early_stopping_patience_counter = saved.get("early_stopping_patience_counter", 0)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any, **kwargs: Any) -> None:
        if state.global_step > max(self.grown, self.began):
            super().on_evaluate(args, state, control, metrics, **kwargs)

    def state(self) -> dict[str, Any]:
        return super().state() | {
            "args": {"early_stopping_patience": self.early_stopping_patience, "grown": self.grown}
        }
