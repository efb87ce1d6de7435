# Copyright 2026 The rs-transformer authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Configuration of recurrently stacked Marian models, and the layer maps.

Self-contained: this file travels to the Hub beside the weights, as remote code.
"""

import math
import re
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import MarianConfig
from transformers.utils import cached_file, logging

logger = logging.get_logger(__name__)

SIDES = ("encoder", "decoder")
LAYER_SHARINGS = ("cycle", "sequence", "cycle_rev", "sandwich")
REMOTE_CODE_FILES = (
    "configuration_rs_marian.py",
    "generation_rs_marian.py",
    "modeling_rs_marian.py",
    "pipeline_rs_marian.py",
    "versions_rs_marian.py",
)
AUTO_MAP = {
    "AutoConfig": "configuration_rs_marian.RSMarianConfig",
    "AutoModel": "modeling_rs_marian.RSMarianModel",
    "AutoModelForSeq2SeqLM": "modeling_rs_marian.RSMarianForConditionalGeneration",
}
CUSTOM_PIPELINES = {
    "translation": {
        "impl": "pipeline_rs_marian.TranslationPipeline",
        "pt": ["AutoModelForSeq2SeqLM"],
        "type": "text",
    }
}


def layer_map(depth: int, unique_layers: int, sharing: str, side: str = "decoder") -> list[int]:
    """For each step of a stack, the index of the unique layer that the step applies.

    Args:
        depth: number of steps, at least 1.
        unique_layers: number of stored layers, 1 … `depth`.
        sharing: one of `LAYER_SHARINGS`. For depth 6 and 3 unique layers: `"cycle"` 0 1 2 0 1 2,
            `"sequence"` 0 0 1 1 2 2, `"cycle_rev"` 0 1 2 2 1 0 (all three: Takase & Kiyono 2021),
            `"sandwich"` 0 1 1 1 1 2 (Subformer, Reid et al. 2021; with 2 unique layers the first and the
            last step share the outer one). Every scheme is 0 1 2 … when `unique_layers == depth`.
        side: `"encoder"` or `"decoder"`, for error messages.

    Returns:
        `depth` indices; every unique layer occurs.

    Raises:
        ValueError: for a depth, number of unique layers or scheme that is out of range.
    """
    if sharing not in LAYER_SHARINGS:
        raise ValueError(f"layer_sharing must be one of {', '.join(LAYER_SHARINGS)}, got {sharing!r}")
    if depth < 1:
        raise ValueError(f"{side}_layers must be at least 1, got {depth}")
    if not 1 <= unique_layers <= depth:
        raise ValueError(f"{side}_unique_layers must lie in 1..{side}_layers ({depth}), got {unique_layers}")
    steps = range(depth)
    if unique_layers == depth:
        return list(steps)
    if sharing == "cycle":
        return [step % unique_layers for step in steps]
    if sharing == "sequence":
        return [step * unique_layers // depth for step in steps]
    if sharing == "cycle_rev":
        # All rounds run forwards but the last one, which runs backwards.
        last_round = unique_layers * max(1, math.ceil(depth / unique_layers) - 1)
        return [
            step % unique_layers if step < last_round else unique_layers - 1 - step % unique_layers for step in steps
        ]
    if unique_layers == 1:
        return [0] * depth
    if unique_layers == 2:
        return [0, *[1] * (depth - 2), 0]
    middle = [1 + step * (unique_layers - 2) // (depth - 2) for step in range(depth - 2)]
    return [0, *middle, unique_layers - 1]


class TranslationTasks(dict):
    """The custom pipelines of a checkpoint: "translation", and "translation_ja_to_en" by its pattern."""

    def __contains__(self, task: object) -> bool:
        return super().__contains__(self._plain(task))

    def __getitem__(self, task: str) -> dict[str, Any]:
        return super().__getitem__(self._plain(task))

    @staticmethod
    def _plain(task: object) -> object:
        return "translation" if re.fullmatch(r"translation_[\w-]+_to_[\w-]+", str(task)) else task


@strict
class RSMarianConfig(MarianConfig):
    r"""Configuration of a recurrently stacked Marian model (Dabre & Fujita 2021, https://arxiv.org/abs/2106.10002).

    A [`MarianConfig`] in which `encoder_layers` and `decoder_layers` are depths (how many layer applications the
    hidden state goes through), while `encoder_unique_layers` and `decoder_unique_layers` say how many layers are
    stored. Depth can be changed when loading: `from_pretrained(folder, decoder_layers=3)`. The defaults are a model
    of OPUS-MT size with one unique layer on each side, the paper's recurrently stacked model.

    Args:
        encoder_layers (`int`, *optional*, defaults to 6): Depth of the encoder.
        decoder_layers (`int`, *optional*, defaults to 6): Depth of the decoder.
        encoder_unique_layers (`int`, *optional*, defaults to 1): Stored encoder layers, 1 … `encoder_layers`.
        decoder_unique_layers (`int`, *optional*, defaults to 1): Stored decoder layers, 1 … `decoder_layers`.
        layer_sharing (`str`, *optional*, defaults to `"cycle"`):
            How steps are mapped to unique layers: `"cycle"`, `"sequence"`, `"cycle_rev"` or `"sandwich"`, see
            `layer_map`.
        encoder_layer_sharing (`str`, *optional*), decoder_layer_sharing (`str`, *optional*):
            The same for one side, where it differs from `layer_sharing`.
        deepnorm (`bool`, *optional*, defaults to `False`):
            Scale the residual branch by alpha and the initialisation by beta as DeepNet does (Wang et al. 2022,
            https://arxiv.org/abs/2203.00555), so that very deep post-norm stacks train.
        deepnorm_encoder_layers (`int`, *optional*), deepnorm_decoder_layers (`int`, *optional*):
            The depths that alpha and beta come from: those the model was built with, kept when the depth changes.
        step_embeddings (`bool`, *optional*, defaults to `False`):
            Learn a vector of width `d_model` for each step but the first, added to the hidden state that the step
            starts from, as the Universal Transformer marks its steps (Dehghani et al. 2019,
            https://arxiv.org/abs/1807.03819).
        step_layer_norms (`bool`, *optional*, defaults to `False`):
            Give each step LayerNorms of its own (two in the encoder, three in the decoder); attention and
            feed-forward stay shared.
        step_biases (`bool`, *optional*, defaults to `False`):
            Give each step biases of its own for the projections of attention and feed-forward, whose matrices stay
            shared.
        step_adapter_rank (`int`, *optional*, defaults to 0):
            Add a low-rank matrix of each step's own to each shared one, of this rank (relaxed sharing, Bae et al.
            2024, https://arxiv.org/abs/2410.20672); 0: none.
        tie_encoder_decoder_layers (`bool`, *optional*, defaults to `False`):
            Give the decoder the encoder's projections of self-attention and feed-forward (after Xia et al. 2019,
            https://ojs.aaai.org/index.php/AAAI/article/view/4487); LayerNorms and cross-attention stay its own. Both
            sides have as many unique layers, heads and feed-forward units.
        marian_positions (`bool`, *optional*, defaults to `False`):
            Sinusoidal positions with the frequencies of Marian's own engine, exp(-i ln 10000 / (d_model / 2 - 1)),
            and not 10000^(-2i / d_model), which transformers has: for models that come from that engine or go to it.

    Raises:
        ValueError: names the field, its value and the allowed range.
    """

    model_type = "rs_marian"

    max_position_embeddings: int = 512
    encoder_layers: int = 6
    encoder_ffn_dim: int = 2048
    encoder_attention_heads: int = 8
    decoder_layers: int = 6
    decoder_ffn_dim: int = 2048
    decoder_attention_heads: int = 8
    activation_function: str = "swish"
    d_model: int = 512
    scale_embedding: bool = True
    encoder_unique_layers: int = 1
    decoder_unique_layers: int = 1
    # None only on the copy that `get_text_config(decoder=True)` makes, where each `decoder_x` is written over `x`.
    layer_sharing: str | None = "cycle"
    encoder_layer_sharing: str | None = None
    decoder_layer_sharing: str | None = None
    deepnorm: bool = False
    deepnorm_encoder_layers: int | None = None
    deepnorm_decoder_layers: int | None = None
    step_embeddings: bool = False
    step_layer_norms: bool = False
    step_biases: bool = False
    step_adapter_rank: int = 0
    tie_encoder_decoder_layers: bool = False
    marian_positions: bool = False

    def __post_init__(self, **kwargs):
        custom_pipelines = kwargs.pop("custom_pipelines", None)
        super().__post_init__(**kwargs)
        # Where the package is installed its registered pipeline serves; the one in the checkpoint is for remote code,
        # and transformers would ask for `trust_remote_code` as soon as it saw it.
        if custom_pipelines and __name__.startswith("transformers_modules."):
            self.custom_pipelines = TranslationTasks(custom_pipelines)
        for name in ("layer_sharing", "encoder_layer_sharing", "decoder_layer_sharing"):
            sharing = getattr(self, name)
            if sharing not in LAYER_SHARINGS and (sharing is not None or name == "layer_sharing"):
                raise ValueError(f"{name} must be one of {', '.join(LAYER_SHARINGS)}, got {sharing!r}")
        if self.step_embeddings and (self.encoder_layerdrop or self.decoder_layerdrop):
            raise ValueError("step_embeddings need every step: set encoder_layerdrop and decoder_layerdrop to 0")
        largest = min(self.d_model, self.encoder_ffn_dim, self.decoder_ffn_dim)
        if not 0 <= self.step_adapter_rank <= largest:
            raise ValueError(f"step_adapter_rank must lie in 0..{largest}, got {self.step_adapter_rank}")
        if self.marian_positions and self.d_model % 2:
            raise ValueError(f"marian_positions need an even d_model, got {self.d_model}")
        for what in ("unique_layers", "attention_heads", "ffn_dim") if self.tie_encoder_decoder_layers else ():
            ours, theirs = (getattr(self, f"{side}_{what}") for side in SIDES)
            if ours != theirs:
                raise ValueError(
                    f"tie_encoder_decoder_layers needs encoder_{what} and decoder_{what} to be equal, got {ours} and "
                    f"{theirs}"
                )
        self.encoder_layer_map, self.decoder_layer_map  # noqa: B018 (raises on an impossible combination)
        for side in SIDES:
            heads = getattr(self, f"{side}_attention_heads")
            if heads < 1 or self.d_model % heads:
                raise ValueError(
                    f"{side}_attention_heads must be at least 1 and divide d_model ({self.d_model}), got {heads}"
                )
        if self.deepnorm:
            self.deepnorm_encoder_layers = self.deepnorm_encoder_layers or self.encoder_layers
            self.deepnorm_decoder_layers = self.deepnorm_decoder_layers or self.decoder_layers

    @classmethod
    def get_config_dict(cls, *args, **kwargs) -> tuple[dict, dict]:
        """As the base class; a stock Marian's shares nothing, until `collapse` or an argument says otherwise."""
        fields, unused = super().get_config_dict(*args, **kwargs)
        if fields.get("model_type") == "marian":
            for side in SIDES:
                depth = fields.get(f"{side}_layers", getattr(cls, f"{side}_layers"))
                fields.setdefault(f"{side}_unique_layers", depth)
        return fields, unused

    @property
    def has_step_parameters(self) -> bool:
        """Whether a step has parameters of its own."""
        return bool(self.step_embeddings or self.step_layer_norms or self.step_biases or self.step_adapter_rank)

    @property
    def encoder_layer_map(self) -> list[int]:
        """For each encoder step, the index of the unique layer that it applies."""
        return self.layer_map("encoder", self.encoder_layers)

    @property
    def decoder_layer_map(self) -> list[int]:
        """For each decoder step, the index of the unique layer that it applies."""
        return self.layer_map("decoder", self.decoder_layers)

    def layer_map(self, side: str, depth: int) -> list[int]:
        """The layer map that a side (`"encoder"` or `"decoder"`) has at some depth, its own or another.

        Raises:
            ValueError: less depth than unique layers, or than 1.
        """
        sharing = getattr(self, f"{side}_layer_sharing") or self.layer_sharing
        return layer_map(depth, getattr(self, f"{side}_unique_layers"), sharing, side)

    @property
    def encoder_residual_scale(self) -> float:
        """DeepNet's alpha of the encoder, 1.0 without `deepnorm`."""
        return 0.81 * self._deepnet_encoder_power() if self.deepnorm else 1.0

    @property
    def decoder_residual_scale(self) -> float:
        """DeepNet's alpha of the decoder, 1.0 without `deepnorm`."""
        return (3 * self.deepnorm_decoder_layers) ** 0.25 if self.deepnorm else 1.0

    @property
    def encoder_init_gain(self) -> float:
        """DeepNet's beta of the encoder, for `deepnorm` only."""
        return 0.87 / self._deepnet_encoder_power()

    @property
    def decoder_init_gain(self) -> float:
        """DeepNet's beta of the decoder, for `deepnorm` only."""
        return (12 * self.deepnorm_decoder_layers) ** -0.25

    def _deepnet_encoder_power(self) -> float:
        return (self.deepnorm_encoder_layers**4 * self.deepnorm_decoder_layers) ** (1 / 16)

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        output["auto_map"] = dict(AUTO_MAP)
        output["custom_pipelines"] = {task: dict(options) for task, options in CUSTOM_PIPELINES.items()}
        return output

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs) -> None:
        """Save the configuration and, beside it, the source files that `trust_remote_code=True` needs."""
        if not Path(save_directory).is_file():
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            self._save_remote_code(Path(save_directory))
        super().save_pretrained(str(save_directory), push_to_hub=push_to_hub, **kwargs)

    def _upload_modified_files(
        self, working_dir: str | Path, repo_id: str, files_timestamps: dict[str, float], *args, **kwargs
    ):
        # The source files are written before transformers notes what is there, and would count as not modified.
        others = {name: time for name, time in files_timestamps.items() if name not in REMOTE_CODE_FILES}
        return super()._upload_modified_files(working_dir, repo_id, others, *args, **kwargs)

    def _save_remote_code(self, folder: Path) -> None:
        for name in REMOTE_CODE_FILES:
            source = Path(__file__).with_name(name)
            if not source.is_file():
                # Loaded as remote code, of which transformers fetches only what it has been asked for so far. It keeps
                # what is from the Hub by commit, and the rest has to be of the same.
                commit = Path(__file__).parent.name
                revision = commit if re.fullmatch("[0-9a-f]{40}", commit) else None
                try:
                    source = cached_file(self._name_or_path, name, revision=revision)
                except (OSError, ValueError) as error:  # the weights are worth more than this file
                    logger.warning(f"{folder} is saved without {name}, which was not found: {error}")
                    continue
            if Path(source).resolve() != (folder / name).resolve():
                shutil.copyfile(source, folder / name)


__all__ = ["LAYER_SHARINGS", "RSMarianConfig", "layer_map"]
