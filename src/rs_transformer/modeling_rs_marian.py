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
"""Recurrently stacked Marian: every unique layer is stored once and applied as the layer map says.

What differs from Marian is said here, all else is inherited. The step of the recurrence, not the layer, indexes the
KV cache; it is passed down at call time and no module state changes in a forward pass, so that threads can share a
model. Self-contained: this file travels to the Hub beside the weights, as remote code.
"""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.loss.loss_utils import ForMaskedLMLoss
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPastAndCrossAttentions,
    Seq2SeqLMOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.marian.modeling_marian import (
    MarianAttention,
    MarianDecoder,
    MarianDecoderLayer,
    MarianEncoder,
    MarianEncoderLayer,
    MarianModel,
    MarianMTModel,
    MarianPreTrainedModel,
    MarianSinusoidalPositionalEmbedding,
    eager_attention_forward,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, is_torchdynamo_compiling, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_rs_marian import RSMarianConfig
from .generation_rs_marian import RSMarianGenerationMixin
from .versions_rs_marian import CACHE, handed_through, strict_forward, update_cache

logger = logging.get_logger(__name__)

# Added to the logit of the padding token, which is also Marian's start token and must never be generated: its
# probability is exactly zero, and so is the gradient that a tied output projection sends to its embedding. Finite,
# since other engines and half precision take the bias too.
PAD_LOGIT_BIAS = -1e4


def step_projection_name(projection: str) -> str:
    """What a layer's projection, such as `self_attn.q_proj` or `fc1`, is called among those of a step."""
    return projection.replace(".", "_") if "." in projection else f"feed_forward_{projection}"


class StepProjection(nn.Module):
    """What a step adds to the output of a shared projection: a bias, a low-rank product with the input, or both.

    Args:
        linear: the shared projection; with `bias` it loses its own.
        rank: of the product, which starts from zero; 0: none.
    """

    def __init__(self, linear: nn.Linear, bias: bool, rank: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(linear.out_features)) if bias else None
        self.down = nn.Parameter(torch.empty(rank, linear.in_features)) if rank else None
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank)) if rank else None

    def forward(self, hidden_states: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        if self.bias is not None:
            output = output + self.bias.to(output.dtype)  # under autocast it is of the greater precision
        if self.down is not None:
            output = output + nn.functional.linear(nn.functional.linear(hidden_states, self.down), self.up)
        return output


@dataclass(frozen=True)
class StepModules:
    """What belongs to a step and not to its layer, for the layer's `forward`.

    No module, tuple or mapping: accelerate would move what is in it to the layer's device.

    Args:
        norms: has the LayerNorms of the step under the layer's names; None: they are the layer's.
        next_embedding: for the step that follows; added to the output, which that one starts from.
        projections: a `StepProjection` for each of the layer's projections, `self_attn_q_proj` … `feed_forward_fc2`.
            No name ends as a module of the layer does, lest PEFT took it for one.
        part: what these names begin with in the part of the layer that this is given to.
    """

    norms: nn.Module | None = None
    next_embedding: nn.Module | None = None
    projections: nn.ModuleDict | None = None
    part: str = ""

    def of(self, part: str) -> "StepModules":
        """What of it an attention, or the feed-forward, needs."""
        return StepModules(projections=self.projections, part=f"{part}_")

    def project(self, layer: nn.Module, name: str, hidden_states: torch.Tensor) -> torch.Tensor:
        """Apply a projection of the layer, or of its attention, as this step does."""
        output = getattr(layer, name)(hidden_states)
        if self.projections is None:
            return output
        return self.projections[self.part + name](hidden_states, output)


class RSMarianAttention(MarianAttention):
    """Marian's attention with the place in the KV cache given by the caller's `step`, and what the step has `own`."""

    @strict_forward
    def forward(
        self,
        hidden_states: torch.Tensor,
        key_value_states: torch.Tensor | None = None,
        cache: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        step: int | None = None,
        own: StepModules = StepModules(),
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        is_cross_attention = key_value_states is not None
        query_states = self._split_heads(own.project(self, "q_proj", hidden_states))

        own_cache, is_updated = cache, False
        if isinstance(cache, EncoderDecoderCache):
            is_updated = is_cross_attention and cache.is_updated.get(step, False)
            own_cache = cache.cross_attention_cache if is_cross_attention else cache.self_attention_cache

        if is_updated:
            # The source does not change between tokens: its keys and values are computed once per step.
            key_states, value_states = own_cache.layers[step].keys, own_cache.layers[step].values
        else:
            current_states = key_value_states if is_cross_attention else hidden_states
            key_states = self._split_heads(own.project(self, "k_proj", current_states))
            value_states = self._split_heads(own.project(self, "v_proj", current_states))
            if cache is not None:
                key_states, value_states = update_cache(own_cache, key_states, value_states, step, kwargs)
                if is_cross_attention and isinstance(cache, EncoderDecoderCache):
                    cache.is_updated[step] = True

        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attn_output, attn_weights = attention_interface(
            self,
            query_states,
            key_states,
            value_states,
            attention_mask,
            dropout=self.dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        attn_output = attn_output.reshape(*hidden_states.shape[:-1], -1).contiguous()
        return own.project(self, "out_proj", attn_output), attn_weights

    def _split_heads(self, states: torch.Tensor) -> torch.Tensor:
        return states.view(*states.shape[:-1], -1, self.head_dim).transpose(1, 2)


class MarianEnginePositionalEmbedding(MarianSinusoidalPositionalEmbedding):
    """Positions as Marian's own engine computes them: its slowest wave is 1/10000, which transformers' stay above."""

    def create_weight(self) -> torch.Tensor:
        positions, dim = self.weight.shape
        waves, steps = (torch.arange(size, dtype=torch.float64, device="cpu") for size in (dim // 2, positions))
        frequencies = torch.exp(-math.log(10000) * waves / max(dim // 2 - 1, 1))
        angles = steps[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=-1).to(self.weight.dtype)


def position_embedding(config: RSMarianConfig) -> MarianSinusoidalPositionalEmbedding:
    """The sinusoidal positions that a configuration asks for."""
    kind = MarianEnginePositionalEmbedding if config.marian_positions else MarianSinusoidalPositionalEmbedding
    return kind(config.max_position_embeddings, config.d_model)


class StepEmbedding(nn.Module):
    """Adds a learned vector, at first zero, to every position: what a step starts from."""

    def __init__(self, d_model: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(d_model))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + self.weight


class RSMarianLayerMixin:
    """The two parts of a post-norm layer, with DeepNet's scale on the residual branch."""

    residual_scale: float
    norm_names: tuple[str, ...]

    def leave_to_steps(self, config: RSMarianConfig) -> None:
        """Have no parameters that the steps have of their own; they would stay behind in files and optimisers."""
        if config.step_layer_norms:
            for name in self.norm_names:
                delattr(self, name)
        if config.step_biases:
            for projection in self.projections().values():
                projection.bias = None

    def projections(self) -> dict[str, nn.Linear]:
        """Those of attention and feed-forward, by the names that `StepModules` has for them."""
        return {
            step_projection_name(name): module
            for name, module in self.named_modules()
            if isinstance(module, nn.Linear)
        }

    def mark_deepnorm(self, gain: float) -> None:
        """Note at each projection how it is initialised: by beta, but queries and keys without it.

        At the projections, since transformers passes over modules without parameters of their own in custom code.
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                module.init_gain = 1.0 if name.endswith(("q_proj", "k_proj")) else gain

    def add_and_norm(self, residual: torch.Tensor, hidden_states: torch.Tensor, norm: nn.LayerNorm) -> torch.Tensor:
        hidden_states = nn.functional.dropout(hidden_states, p=self.dropout, training=self.training)
        return norm(torch.add(hidden_states, residual, alpha=self.residual_scale))

    def feed_forward(self, hidden_states: torch.Tensor, own: StepModules) -> torch.Tensor:
        own = own.of("feed_forward")
        hidden_states = self.activation_fn(own.project(self, "fc1", hidden_states))
        hidden_states = nn.functional.dropout(hidden_states, p=self.activation_dropout, training=self.training)
        return own.project(self, "fc2", hidden_states)


class RSMarianEncoderLayer(RSMarianLayerMixin, MarianEncoderLayer):
    norm_names = ("self_attn_layer_norm", "final_layer_norm")

    def __init__(self, config: RSMarianConfig):
        super().__init__(config)
        self.residual_scale = config.encoder_residual_scale
        with torch.random.fork_rng(devices=[]):  # what is drawn next is what is so in Marian, which has no such layer
            self.self_attn = RSMarianAttention(
                config.d_model, config.encoder_attention_heads, dropout=config.attention_dropout, config=config
            )
        if config.deepnorm:
            self.mark_deepnorm(config.encoder_init_gain)
        self.leave_to_steps(config)

    @strict_forward
    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor,
        own: StepModules = StepModules(),
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        norms = self if own.norms is None else own.norms
        attn_output, _ = self.self_attn(
            hidden_states, attention_mask=attention_mask, own=own.of("self_attn"), **kwargs
        )
        hidden_states = self.add_and_norm(hidden_states, attn_output, norms.self_attn_layer_norm)
        hidden_states = self.add_and_norm(hidden_states, self.feed_forward(hidden_states, own), norms.final_layer_norm)
        return hidden_states if own.next_embedding is None else own.next_embedding(hidden_states)


class RSMarianDecoderLayer(RSMarianLayerMixin, MarianDecoderLayer):
    norm_names = ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm")

    def __init__(self, config: RSMarianConfig, layer_idx: int):
        super().__init__(config, layer_idx=layer_idx)
        self.residual_scale = config.decoder_residual_scale
        attention = partial(
            RSMarianAttention,
            config.d_model,
            config.decoder_attention_heads,
            dropout=config.attention_dropout,
            is_decoder=True,
            config=config,
            layer_idx=layer_idx,
        )
        self.self_attn = attention(is_causal=True)
        self.encoder_attn = attention()
        if config.deepnorm:
            self.mark_deepnorm(config.decoder_init_gain)
        self.leave_to_steps(config)

    @strict_forward
    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = True,
        step: int = 0,
        own: StepModules = StepModules(),
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        norms = self if own.norms is None else own.norms
        kwargs.update({CACHE: cache, "step": step})
        attn_output, _ = self.self_attn(
            hidden_states, attention_mask=attention_mask, own=own.of("self_attn"), **kwargs
        )
        hidden_states = self.add_and_norm(hidden_states, attn_output, norms.self_attn_layer_norm)
        if encoder_hidden_states is not None:
            attn_output, _ = self.encoder_attn(
                hidden_states,
                key_value_states=encoder_hidden_states,
                attention_mask=encoder_attention_mask,
                own=own.of("encoder_attn"),
                **kwargs,
            )
            hidden_states = self.add_and_norm(hidden_states, attn_output, norms.encoder_attn_layer_norm)
        hidden_states = self.add_and_norm(hidden_states, self.feed_forward(hidden_states, own), norms.final_layer_norm)
        return hidden_states if own.next_embedding is None else own.next_embedding(hidden_states)


def keep_apart(model: PreTrainedModel, names: Collection[str]) -> None:
    """Have `tie_weights` leave alone, from now on, weights that the configuration calls tied and that are not.

    Args:
        names: of those weights, as in `all_tied_weights_keys`.
    """
    for prefix, module in model.named_modules() if names else ():
        start = f"{prefix}." if prefix else ""
        for attribute in ("_tied_weights_keys", "all_tied_weights_keys"):
            if ties := getattr(module, attribute, None):
                setattr(module, attribute, {name: tie for name, tie in ties.items() if start + name not in names})


class RSMarianPreTrainedModel(MarianPreTrainedModel):
    config: RSMarianConfig

    def tie_weights(self, missing_keys: set[str] | None = None, recompute_mapping: bool = True) -> None:
        # A checkpoint may hold two weights where its configuration says one. When it is loaded they are left apart,
        # but the next call, for new tokens or after a resume, would tie them, and one would be lost.
        tied = set(self.all_tied_weights_keys)
        super().tie_weights(missing_keys, recompute_mapping)
        keep_apart(self, tied - self.all_tied_weights_keys.keys())

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MarianSinusoidalPositionalEmbedding):
            module.weight.requires_grad_(False)  # loading makes a new parameter, and forgets
        elif isinstance(module, RSMarianForConditionalGeneration):
            init.constant_(module.final_logits_bias[:, self.config.pad_token_id], PAD_LOGIT_BIAS)
        elif isinstance(module, StepEmbedding):
            init.zeros_(module.weight)
        elif isinstance(module, StepProjection):
            for name, parameter in module.named_parameters(recurse=False):
                # The product of the two is zero, and has a gradient.
                init.normal_(parameter, std=self.config.init_std) if name == "down" else init.zeros_(parameter)
        elif hasattr(module, "init_gain"):
            init.xavier_normal_(module.weight, gain=module.init_gain)


class RSMarianStackMixin:
    """What tells the steps of a stack apart, if the configuration asks for it."""

    def add_step_parameters(self, config: RSMarianConfig, side: str) -> None:
        depth = getattr(config, f"{side}_layers")
        self.step_norms = self.step_embeddings = self.step_projections = None
        left_over = []  # in the file of a model that is loaded at less depth
        if config.step_layer_norms:
            self.step_norms = nn.ModuleList(
                nn.ModuleDict({name: nn.LayerNorm(config.d_model) for name in self.layers[0].norm_names})
                for _ in range(depth)
            )
            left_over.append(r"\.step_norms\.\d+\.")
        if config.step_embeddings:
            self.step_embeddings = nn.ModuleList(StepEmbedding(config.d_model) for _ in range(depth - 1))
            left_over.append(r"\.step_embeddings\.\d+\.")
        if config.step_biases or config.step_adapter_rank:
            self.step_projections = nn.ModuleList(
                nn.ModuleDict(
                    {
                        name: StepProjection(linear, config.step_biases, config.step_adapter_rank)
                        for name, linear in self.layers[0].projections().items()
                    }
                )
                for _ in range(depth)
            )
            left_over.append(r"\.step_projections\.\d+\.")
        self._keys_to_ignore_on_load_unexpected = left_over
        # `device_map="auto"` is to have all that a step applies on one device: its layer or, with more, the stack.
        whole = self if left_over else self.layers[0]
        self._no_split_modules = [type(whole).__name__]

    def steps(self, side: str, depth: int | None) -> list[tuple[nn.Module, StepModules]]:
        """The layer of each step, and what the step has of its own.

        Args:
            side: `"encoder"` or `"decoder"`.
            depth: other than the configuration's, if not None.

        Raises:
            ValueError: less depth than unique layers, or more than the configuration's.
        """
        layer_map = self.layer_map
        if depth is not None and type(depth) is not int:
            raise ValueError(f"{side}_depth must be an integer, got {depth!r}")
        if depth is not None and depth != len(layer_map):
            if not len(self.layers) <= depth < len(layer_map):
                raise ValueError(
                    f"{side}_depth must lie in {side}_unique_layers ({len(self.layers)})..{side}_layers "
                    f"({len(layer_map)}), got {depth}; for more, load the model with more {side}_layers"
                )
            layer_map = self.config.layer_map(side, depth)
        nothing = [None] * len(layer_map)
        norms = nothing if self.step_norms is None else self.step_norms
        projections = nothing if self.step_projections is None else self.step_projections
        embeddings = [*nothing]
        if self.step_embeddings is not None:
            embeddings[:-1] = self.step_embeddings[: len(layer_map) - 1]  # nothing follows the last step
        return [
            (self.layers[unique_layer], StepModules(norms[step], embeddings[step], projections[step]))
            for step, unique_layer in enumerate(layer_map)
        ]


class RSMarianEncoder(RSMarianStackMixin, RSMarianPreTrainedModel, MarianEncoder):
    """Encoder of `config.encoder_layers` steps over `config.encoder_unique_layers` stored layers."""

    def __init__(self, config: RSMarianConfig):
        # Marian's own constructor would build as many layers as the model is deep.
        super(MarianEncoder, self).__init__(config)
        self.dropout = config.dropout
        self.layerdrop = config.encoder_layerdrop
        self.padding_idx = config.pad_token_id
        self.max_source_positions = config.max_position_embeddings
        self.embed_scale = math.sqrt(config.d_model) if config.scale_embedding else 1.0
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model, self.padding_idx)
        self.embed_positions = position_embedding(config)
        self.layer_map = config.encoder_layer_map
        self.layers = nn.ModuleList([RSMarianEncoderLayer(config) for _ in range(config.encoder_unique_layers)])
        self.add_step_parameters(config, "encoder")
        self.gradient_checkpointing = False
        self.post_init()

    @strict_forward
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        encoder_depth: int | None = None,
        decoder_depth: int | None = None,  # `MarianModel` gives both sides the same arguments
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutput:
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids) * self.embed_scale

        check_length(inputs_embeds.shape[1], self.embed_positions, "input")
        hidden_states = inputs_embeds + self.embed_positions(inputs_embeds.shape[:-1])
        hidden_states = nn.functional.dropout(hidden_states, p=self.dropout, training=self.training)
        attention_mask = create_bidirectional_mask(
            config=self.config, inputs_embeds=inputs_embeds, attention_mask=attention_mask
        )
        kwargs = handed_through(kwargs)
        for layer, own in self.steps("encoder", encoder_depth):
            if self.training and self.layerdrop > 0.0 and torch.rand([]) < self.layerdrop:
                continue
            hidden_states = layer(hidden_states, attention_mask, own=own, **kwargs)
        return BaseModelOutput(last_hidden_state=hidden_states)


def check_length(length: int | torch.Tensor, positions: nn.Embedding, what: str) -> None:
    """Raise `ValueError` if there are more tokens than positions, where a graph is not recorded."""
    if type(length) is int and length > positions.num_embeddings and not is_torchdynamo_compiling():
        raise ValueError(
            f"the {what} has {length} tokens, and the model {positions.num_embeddings} positions "
            "(max_position_embeddings): give less at once, by sentences or cut by the tokenizer's truncation=True"
        )


def check_cache_depth(cache: Cache, depth: int, deepest: int) -> None:
    """Raise `ValueError` if a cache was filled at another depth than it is to be used at, or has too few layers.

    Layers beyond the `deepest` that the model uses are nobody's: PEFT makes as many as the encoder has.
    """
    cache = getattr(cache, "self_attention_cache", cache)
    if len(cache.layers) < depth and cache.layer_class_to_replicate is None:
        raise ValueError(
            f"the cache has {len(cache.layers)} layers, which is less depth than this call's ({depth}): make it from "
            "the configuration of this model"
        )
    length = cache.get_seq_length()
    if length and (cache.get_seq_length(depth - 1) != length or (depth < deepest and cache.get_seq_length(depth))):
        raise ValueError(
            f"the cache was filled at another depth than this call's ({depth}): give the same decoder_depth to all "
            "calls that share a cache"
        )


class RSMarianDecoder(RSMarianStackMixin, RSMarianPreTrainedModel, MarianDecoder):
    """Decoder of `config.decoder_layers` steps over `config.decoder_unique_layers` stored layers."""

    def __init__(self, config: RSMarianConfig):
        super(MarianDecoder, self).__init__(config)
        self.dropout = config.dropout
        self.layerdrop = config.decoder_layerdrop
        self.padding_idx = config.pad_token_id
        self.max_target_positions = config.max_position_embeddings
        self.embed_scale = math.sqrt(config.d_model) if config.scale_embedding else 1.0
        self.embed_tokens = nn.Embedding(config.decoder_vocab_size, config.d_model, self.padding_idx)
        self.embed_positions = position_embedding(config)
        self.layer_map = config.decoder_layer_map
        self.layers = nn.ModuleList(
            [RSMarianDecoderLayer(config, layer_idx=index) for index in range(config.decoder_unique_layers)]
        )
        self.add_step_parameters(config, "decoder")
        self.gradient_checkpointing = False
        self.post_init()

    @strict_forward
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        encoder_depth: int | None = None,
        decoder_depth: int | None = None,
        first_step: int = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """See `MarianDecoder.forward`.

        Args:
            cache (`Cache`, *optional*):
                With one, as in `generate`, no step is dropped in training mode, since the next call needs what each
                leaves there. Without one, layerdrop makes none either.
            first_step (`int`, *optional*, defaults to 0):
                Apply the steps from this one on. `inputs_embeds` are then the hidden states that a call with this
                `decoder_depth` gives, and the cache has layers for these steps alone.
        """
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of decoder_input_ids or decoder_inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if not first_step:
            inputs_embeds = inputs_embeds * self.embed_scale

        drops_steps = self.training and self.layerdrop > 0.0 and cache is None
        if use_cache and cache is None and not drops_steps:
            # The depth fields of the config make the stock caches as deep as the recurrence.
            cache = DynamicCache(config=self.config)
            if encoder_hidden_states is not None or self.config.is_encoder_decoder:
                cache = EncoderDecoderCache(cache, DynamicCache(config=self.config))

        batch_size, seq_length = inputs_embeds.shape[:-1]
        past_length = cache.get_seq_length() if cache is not None else 0
        steps = self.steps("decoder", decoder_depth)[first_step:]
        if cache is not None and not is_torchdynamo_compiling():
            check_cache_depth(cache, len(steps), self.config.decoder_layers - first_step)
        if attention_mask is None and not is_torchdynamo_compiling():
            attention_mask = torch.ones(batch_size, past_length + seq_length, device=inputs_embeds.device)
        self_attention_cache = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
        causal_mask = create_causal_mask(self.config, inputs_embeds, attention_mask, self_attention_cache)
        encoder_attention_mask = create_bidirectional_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=encoder_attention_mask,
            encoder_hidden_states=encoder_hidden_states,
        )

        if first_step:
            hidden_states = inputs_embeds
            if self.step_embeddings is not None:
                hidden_states = self.step_embeddings[first_step - 1](hidden_states)
        else:
            check_length(past_length + seq_length, self.embed_positions, "decoder's input")
            position_ids = torch.arange(seq_length, device=inputs_embeds.device) + past_length
            hidden_states = inputs_embeds + self.embed_positions((batch_size, seq_length), position_ids=position_ids)
            hidden_states = nn.functional.dropout(hidden_states, p=self.dropout, training=self.training)
        kwargs = {CACHE: cache, **handed_through(kwargs)}
        for step, (layer, own) in enumerate(steps):
            if drops_steps and torch.rand([]) < self.layerdrop:
                continue
            hidden_states = layer(
                hidden_states,
                causal_mask,
                encoder_hidden_states,  # positional, as reentrant gradient checkpointing needs it
                encoder_attention_mask=encoder_attention_mask,
                use_cache=use_cache,
                step=step,
                own=own,
                **kwargs,
            )
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden_states, **{CACHE: cache})


class RSMarianModel(RSMarianPreTrainedModel, MarianModel):
    """The bare encoder and decoder, without a language modelling head."""

    def __init__(self, config: RSMarianConfig):
        super(MarianModel, self).__init__(config)
        entries = min(config.vocab_size, config.decoder_vocab_size)
        if config.pad_token_id is None or not 0 <= config.pad_token_id < entries:
            raise ValueError(f"pad_token_id must lie in 0..{entries - 1}, the vocabulary, got {config.pad_token_id}")
        entries, start = config.decoder_vocab_size, config.decoder_start_token_id
        if start is not None and not 0 <= start < entries:
            raise ValueError(f"decoder_start_token_id must lie in 0..{entries - 1}, the vocabulary, got {start}")
        self._tied_weights_keys = None
        self._keys_to_ignore_on_load_missing = [r"embed_positions\.weight"]  # sinusoids are not saved
        if config.share_encoder_decoder_embeddings:
            self.shared = nn.Embedding(config.vocab_size, config.d_model, config.pad_token_id)
            self._tied_weights_keys = {
                "decoder.embed_tokens.weight": "shared.weight",
                "encoder.embed_tokens.weight": "shared.weight",
            }
        self.encoder = RSMarianEncoder(config)
        self.decoder = RSMarianDecoder(config)
        if config.tie_encoder_decoder_layers:
            self._tied_weights_keys = (self._tied_weights_keys or {}) | self._layer_ties()
        self.post_init()

    def _layer_ties(self) -> dict[str, str]:
        """The decoder's tensors that are the encoder's: the projections that both sides' layers have."""
        names = [
            f"{name}.{tensor}"
            for name, module in self.encoder.layers.named_modules(prefix="layers")
            if isinstance(module, nn.Linear)
            for tensor, _ in module.named_parameters()
        ]
        return {f"decoder.{name}": f"encoder.{name}" for name in names}

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        tied = super().get_expanded_tied_weights_keys(all_submodels)
        # Without tied embeddings transformers ties nothing.
        return tied | {n: tie for n, tie in (self._tied_weights_keys or {}).items() if n.startswith("decoder.layers.")}


class RSMarianForConditionalGeneration(RSMarianGenerationMixin, RSMarianPreTrainedModel, MarianMTModel):
    """Recurrently stacked Marian for translation.

    Equal, to rounding, to a `MarianMTModel` whose layers are copies of the shared ones. The cache, `hidden_states` and
    `attentions` have one entry per step. Unlike Marian's, the loss ignores padding tokens among the labels and honours
    `num_items_in_batch`, so that gradient accumulation gives the gradient of the large batch.
    """

    def __init__(self, config: RSMarianConfig):
        super(MarianMTModel, self).__init__(config)
        self.model = RSMarianModel(config)
        if config.share_encoder_decoder_embeddings:
            self._tied_weights_keys = {
                "lm_head.weight": "model.shared.weight",
                "model.decoder.embed_tokens.weight": "model.shared.weight",
                "model.encoder.embed_tokens.weight": "model.shared.weight",
            }
        target_vocab_size = config.vocab_size if config.share_encoder_decoder_embeddings else config.decoder_vocab_size
        self.register_buffer("final_logits_bias", torch.zeros((1, target_vocab_size)))
        self.final_logits_bias[:, config.pad_token_id] = PAD_LOGIT_BIAS
        self.lm_head = nn.Linear(config.d_model, target_vocab_size, bias=False)
        # Marian's says that the bias may be missing; it is always saved, and the model is another without it.
        self._keys_to_ignore_on_load_missing = None
        self.post_init()

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        model, shares = self.model, self.config.share_encoder_decoder_embeddings
        apart = shares and model.decoder.embed_tokens.weight is not model.encoder.embed_tokens.weight
        others = (model.shared, model.decoder.embed_tokens) if apart else ()
        embeddings = super(MarianMTModel, self).resize_token_embeddings(
            new_num_tokens, pad_to_multiple_of, mean_resizing
        )
        entries = embeddings.weight.shape[0]
        if apart:  # not tied, and Marian has put the encoder's in their place
            model.shared, model.decoder.embed_tokens = (
                self._get_resized_embeddings(other, entries, mean_resizing=mean_resizing) for other in others
            )
            self.tie_weights()
        if shares:
            self._resize_output(entries)
        return embeddings

    def resize_decoder_token_embeddings(self, new_num_tokens: int) -> nn.Embedding:
        embeddings = super().resize_decoder_token_embeddings(new_num_tokens)
        self._resize_output(embeddings.weight.shape[0])
        return embeddings

    def _resize_output(self, entries: int) -> None:
        """Give projection and bias as many entries as there are embeddings.

        Marian forgets the rows that fill up to a multiple, and a projection of its own that is said to be tied.
        """
        self._resize_final_logits_bias(entries)
        self.final_logits_bias = self.final_logits_bias.to(self.lm_head.weight.dtype)  # what is added is in float32
        if self.lm_head.weight.shape[0] != entries:
            self.set_output_embeddings(self._get_resized_lm_head(self.lm_head, entries))

    @strict_forward
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: tuple[torch.Tensor] | BaseModelOutput | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        encoder_depth: int | None = None,
        decoder_depth: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Seq2SeqLMOutput:
        """See `MarianMTModel.forward`.

        Args:
            labels (`torch.LongTensor` of shape `(batch_size, target_length)`, *optional*):
                Target token ids, -100 or the padding token where there is none. Shifted right, the labels are the
                decoder's input.
            num_items_in_batch (`torch.Tensor` or `int`, *optional*):
                What to divide the summed loss by: the number of target tokens in the whole accumulated batch.
                Without it the loss is the mean over the target tokens of this batch.
            encoder_depth (`int`, *optional*), decoder_depth (`int`, *optional*):
                Run at less depth than the configuration's, as if the model had been loaded with that
                `encoder_layers` or `decoder_layers`; at least the unique layers. `generate` takes them too; the draft
                of assisted generation keeps to its own. A cache belongs to one `decoder_depth`, and `encoder_outputs`
                have an encoder depth already.
        """
        if labels is not None:
            if use_cache:
                logger.warning_once("The `use_cache` argument is changed to `False` since `labels` is provided.")
            use_cache = False
            if decoder_input_ids is None and decoder_inputs_embeds is None:
                decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)

        outputs = super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            encoder_outputs=encoder_outputs,
            inputs_embeds=inputs_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            encoder_depth=encoder_depth,
            decoder_depth=decoder_depth,
            **{CACHE: cache},
            **kwargs,
        )
        if labels is None:
            return outputs
        vocab_size = outputs.logits.shape[-1]
        labels = labels.masked_fill(labels == self.config.pad_token_id, -100)
        loss = ForMaskedLMLoss(outputs.logits, labels, vocab_size, num_items_in_batch=num_items_in_batch)
        return Seq2SeqLMOutput(loss=loss, **outputs)


__all__ = [
    "RSMarianForConditionalGeneration",
    "RSMarianModel",
    "RSMarianPreTrainedModel",
]
