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

import copy
import inspect
import math
import threading
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import torch
from packaging.version import Version
from torch import nn
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, StoppingCriteriaList
from transformers import __version__ as transformers_version
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.generation.candidate_generator import CandidateGenerator
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateEncoderDecoderOutput
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

logger = logging.get_logger(__name__)

# What differs between releases of transformers, all of it here. First the oldest and the newest that were tested.
TESTED_TRANSFORMERS = ("5.18.0", "5.24.0")

# 5.24 renamed `past_key_values` to `cache`, in arguments and in outputs; the old name goes in 5.40.
CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"

# What transformers hands through every `forward`, down to the attention; what its decorators take out on the way; and
# what `generate` gives to a `forward` or an encoder beside that.
HANDED_THROUGH = TransformersKwargs.__optional_keys__
OF_DECORATORS = {"return_dict", "use_cache", "output_cross_attentions", "debug_io", "debug_io_dir", "prune_layers"}
OF_GENERATE = {"labels", "tokenizer", "assistant_tokenizer"}


def takes_old_name(function: Callable, until: str = "5.40.0") -> Callable:
    """Have a function with an argument `cache` take `past_key_values` too, deprecated, where transformers does.

    As transformers' `deprecate_kwarg`, which would drop one of two different caches.

    Raises:
        ValueError: when called with one cache by the one name and another by the other.
    """
    if CACHE == "past_key_values":
        return function

    @wraps(function)
    def renamed(*args, **kwargs):
        if "past_key_values" in kwargs:
            old, new = kwargs.pop("past_key_values"), kwargs.get(CACHE)
            if old is not None and new is not None and old is not new:
                raise ValueError(
                    "past_key_values and cache are two names of one argument, and were given two caches: give one "
                    "(PEFT's prefix tuning gives both in `generate` from transformers 5.24 on)"
                )
            if not is_torchdynamo_compiling():
                warnings.warn(
                    f"`past_key_values` is deprecated and will be removed in version {until} for "
                    f"`{type(args[0]).__name__}.{function.__name__}`. Use `cache` instead.",
                    FutureWarning,
                    stacklevel=2,
                )
            kwargs[CACHE] = old if new is None else new
        return function(*args, **kwargs)

    return renamed


def strict_forward(forward: Callable) -> Callable:
    """Give a `forward` that is written with `cache` the names of this transformers, and refuse unknown arguments.

    Raises:
        TypeError: when called with an argument that neither the `forward` nor transformers knows; None is none given,
            as for `generate`. `**kwargs` alone would swallow a renamed `cache`, and each step would then be decoded
            as if it were the first.
    """
    signature = inspect.signature(forward)
    parameters = [p.replace(name=CACHE) if p.name == "cache" else p for p in signature.parameters.values()]
    known = HANDED_THROUGH | OF_DECORATORS | OF_GENERATE | {p.name for p in parameters}

    @wraps(forward)
    def checked(self, *args, **kwargs):
        for name, value in kwargs.items():
            if name not in known and value is not None:
                raise TypeError(f"{type(self).__name__}.forward() got an unexpected keyword argument {name!r}")
        if CACHE in kwargs:
            kwargs["cache"] = kwargs.pop(CACHE)
        return forward(self, *args, **kwargs)

    checked.__signature__ = signature.replace(parameters=parameters)
    return takes_old_name(checked) if CACHE in known else checked


def handed_through(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Of a stack's arguments those that its layers know: transformers' decorators add others, such as `use_cache`."""
    return {name: value for name, value in kwargs.items() if name in HANDED_THROUGH}


def update_cache(
    cache: Cache, key_states: torch.Tensor, value_states: torch.Tensor, step: int, kwargs: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """`Cache.update`, which is told of the attention's other arguments from 5.24 on."""
    more = {"kwargs": kwargs} if CACHE == "cache" else {}
    return cache.update(key_states, value_states, step, **more)


# Of each class that was asked: whether its cached steps are right.
cache_verdicts: dict[type, bool] = {}
cache_verdicts_lock = threading.Lock()


class CheckedGenerationMixin(GenerationMixin):
    """Generation that does not trust a transformers newer than `TESTED_TRANSFORMERS`.

    There, the first `generate` of a process compares one cached step with the same step uncached; where they differ,
    or the cached one fails, it decodes without a cache, and says so once. Put it before the classes that have
    `generate`. Nothing is checked under `torch.compile`, in training mode, where dropout tells the two apart, and
    where PEFT has put its prefix into the cache.
    """

    # How far the logits of a cached step may lie from the uncached one's, as a part of their spread: rounding gives
    # up to 0.02 (bfloat16, 96 steps), and 0.03 where activations are quantised.
    cache_tolerance = 0.05

    @partial(takes_old_name, until="6.0.0")
    @wraps(GenerationMixin.generate)
    def generate(self, *args, **kwargs):
        if kwargs.get("use_cache") is False or self._cache_is_right():
            return super().generate(*args, **kwargs)
        # Assisted decoding is the same search, and cannot do without a cache.
        off = {"cache_implementation": None, "prompt_lookup_num_tokens": None, "assistant_early_exit": None}
        off["use_cache"] = False
        given = inspect.signature(GenerationMixin.generate).bind(self, *args, **kwargs).arguments
        options = given.pop("kwargs", {})
        given = {name: value for name, value in given.items() if name not in ("self", "assistant_model")}
        options = {name: value for name, value in options.items() if name not in {*off, CACHE, "assistant_tokenizer"}}
        if given.get("generation_config") is not None:
            given["generation_config"] = copy.deepcopy(given["generation_config"])
            given["generation_config"].update(**off)
        other = self._with_generation_config(copy.deepcopy(self.generation_config))
        other.generation_config.update(**off)
        return super(CheckedGenerationMixin, other).generate(**given, **options)

    def _with_generation_config(self, generation_config: GenerationConfig) -> "CheckedGenerationMixin":
        """This model, all of its modules and tensors shared, with another generation configuration."""
        other = copy.copy(self)
        other.generation_config = generation_config
        return other

    def _cache_is_right(self) -> bool:
        if (verdict := cache_verdicts.get(type(self))) is not None:
            return verdict
        if is_torchdynamo_compiling() or self._is_compiled() or self._is_prefixed() or self.training:
            return True
        with cache_verdicts_lock:
            if type(self) not in cache_verdicts:
                verdict, fault = True, None
                if Version(transformers_version) > Version(TESTED_TRANSFORMERS[1]):
                    verdict, fault = self._judge_cache()
                if fault:
                    logger.warning_once(
                        f"transformers {transformers_version} is newer than {TESTED_TRANSFORMERS[1]}, the newest that "
                        f"the code of {type(self).__name__} was tested with, and {fault}. It decodes without a cache: "
                        "right, but slower. Update rs-transformer and the source beside the model, or install "
                        f"transformers=={TESTED_TRANSFORMERS[1]}."
                    )
                if verdict is None:
                    return True
                cache_verdicts[type(self)] = verdict
        return cache_verdicts[type(self)]

    def _is_compiled(self) -> bool:
        return self._compiled_call_impl is not None or hasattr(self.forward, "_torchdynamo_orig_callable")

    def _is_prefixed(self) -> bool:
        """Whether PEFT puts a prefix into the cache."""
        return "prepare_inputs_for_generation" in vars(self)

    def _judge_cache(self) -> tuple[bool | None, str | None]:
        """Whether decoding with a cache is right, None if this model cannot tell; and what is wrong with it."""
        try:
            error, passed_over = self._cached_step_errors()
        except Exception as failure:
            return False, f"decoding with a cache fails ({type(failure).__name__}: {failure})"
        if not passed_over > self.cache_tolerance:
            return None, None
        if error <= self.cache_tolerance:
            return True, None
        return False, "decoding with a cache gives other results than without"

    @torch.no_grad()
    def _cached_step_errors(self) -> tuple[float, float]:
        """How far the logits of a translation's second step lie from the same without a cache, in their deviations.

        Returns:
            The cached step's, and for comparison those of a step that sees its own token alone, as if it were the
            first: NaN if the model gives no finite logits, and small if it hardly looks at the tokens before.
        """
        names = ("decoder_start_token_id", "pad_token_id")
        special = {name: getattr(self.generation_config, name, None) for name in names}
        special = {name: getattr(self.config, name, None) if i is None else i for name, i in special.items()}
        search = GenerationConfig(**special, min_length=3, max_length=3, return_dict_in_generate=True)
        search.output_logits = True
        device = "cpu" if self.device.type == "meta" else self.device  # offloaded: accelerate moves the inputs
        source = torch.linspace(0, self.config.vocab_size - 1, 8, device=device).long()[None]
        inputs = {self.main_input_name: source, "attention_mask": torch.ones_like(source)}
        output = super(CheckedGenerationMixin, self._with_generation_config(search)).generate(**inputs)
        prefix = output.sequences[:, :-1]
        uncached, alone = (
            self(**inputs, decoder_input_ids=ids, use_cache=False).logits[:, -1].float()
            for ids in (prefix, prefix[:, -1:])
        )
        kept = ~(uncached < -1e3)  # without the entries that a bias bars
        uncached, alone, cached = uncached[kept], alone[kept], output.logits[-1].float()[kept]
        errors = [(logits - uncached - (logits - uncached).mean()).norm() for logits in (cached, alone)]
        return tuple((error / (uncached - uncached.mean()).norm()).item() for error in errors)


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
        with torch.random.fork_rng(devices=[]):  # a seed gives the weights that it gives Marian
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


def check_cache_depth(cache: Cache, depth: int) -> None:
    """Raise `ValueError` if a cache was filled at another depth than it is to be used at, or has too few layers."""
    cache = getattr(cache, "self_attention_cache", cache)
    if len(cache.layers) < depth and cache.layer_class_to_replicate is None:
        raise ValueError(
            f"the cache has {len(cache.layers)} layers, which is less depth than this call's ({depth}): make it from "
            "the configuration of this model"
        )
    length = cache.get_seq_length()
    if length and (cache.get_seq_length(depth - 1) != length or cache.get_seq_length(depth)):
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
            check_cache_depth(cache, len(steps))
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
        self._tied_weights_keys = None
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


def cache_of_steps(cache: EncoderDecoderCache, first: int, last: int) -> EncoderDecoderCache:
    """The part of a dynamic cache that belongs to the steps `first` … `last` - 1; its layers are the cache's own."""
    sides = [DynamicCache(), DynamicCache()]
    for side, whole in zip(sides, (cache.self_attention_cache, cache.cross_attention_cache), strict=True):
        side.layers = whole.layers[first:last]
    return EncoderDecoderCache(*sides)


# Of a draft, where nobody says; transformers' own 20 are for longer texts, and a draft that is wrong costs them all.
DRAFTED_TOKENS = 5


@dataclass
class Draft:
    """What the first steps propose.

    Args:
        tokens: (batch, drafted).
        probabilities: those that each token was drawn from, (batch, vocabulary) each; none in greedy search.
        states: after the draft's last step, of all tokens that the cache of the other steps has not seen yet but the
            last drafted one, (batch, tokens, d_model).
    """

    tokens: torch.Tensor
    probabilities: list[torch.Tensor]
    states: torch.Tensor


class SelfSpeculation:
    """Greedy search or sampling in which the decoder's first steps draft what all of its steps then verify at once.

    Leviathan et al. 2023 (https://arxiv.org/abs/2211.17192), with the model as its own draft. Where the draft's steps
    are the first steps of the whole, which the layer map says, the rest of the steps go on from the draft's hidden
    states, and nothing is computed twice; else the draft has a cache of its own. The sentences of a batch keep as
    many tokens as the one that keeps the fewest, so that their caches are of one length.

    Args:
        model: an `RSMarianForConditionalGeneration`.
        draft_depth, depth: steps that draft, and steps that verify.
        draft_tokens: most tokens of a draft; it may change as `num_assistant_tokens_schedule` says.
        cache: a dynamic one, as deep as the model.
        encoder_outputs, attention_mask, decoder_attention_mask: as `generate` hands them to the model.
        generation_config: of the search, with transformers' `num_assistant_tokens_schedule` (either heuristic one
            holds for one call) and `assistant_confidence_threshold`.
        logits_processor: of the search; the draft's too.

    Raises:
        ValueError: no token is to be drafted.
    """

    def __init__(
        self,
        model: "RSMarianForConditionalGeneration",
        draft_depth: int,
        draft_tokens: int,
        depth: int,
        cache: EncoderDecoderCache,
        encoder_outputs: BaseModelOutput,
        attention_mask: torch.Tensor | None,
        decoder_attention_mask: torch.Tensor | None,
        generation_config: GenerationConfig,
        logits_processor: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    ):
        self.model, self.config, self.process = model, generation_config, logits_processor
        self.draft_depth, self.depth = draft_depth, depth
        self.source = {"encoder_hidden_states": encoder_outputs[0], "encoder_attention_mask": attention_mask}
        self.target_mask = decoder_attention_mask
        if draft_tokens < 1:
            raise ValueError(f"num_assistant_tokens must be at least 1, got {draft_tokens}")
        self.tokens_of_draft = draft_tokens
        layer_maps = [model.config.layer_map("decoder", steps) for steps in (draft_depth, depth)]
        self.goes_on = layer_maps[1][:draft_depth] == layer_maps[0]
        if self.goes_on:
            self.draft_cache = cache_of_steps(cache, 0, draft_depth)
            self.cache = cache_of_steps(cache, draft_depth, depth)
        else:
            own = EncoderDecoderCache(*(DynamicCache(config=model.config) for _ in range(2)))
            self.draft_cache = cache_of_steps(own, 0, draft_depth)
            self.cache = cache_of_steps(cache, 0, depth)

    def draft(self, input_ids: torch.Tensor, unfinished: torch.Tensor) -> Draft:
        """Draft tokens until there are enough, or one is not to be relied on, or every sentence has ended.

        Args:
            input_ids: the tokens so far, (batch, length).
            unfinished: sentences that go on, (batch,), boolean.
        """
        length, drafting = input_ids.shape[1], unfinished
        states, probabilities = [], []
        for _ in range(min(self.tokens_of_draft, self.config.max_length - length)):
            new = input_ids[:, self.draft_cache.get_seq_length() :]
            states.append(self._decode(self.draft_cache, input_ids=new, decoder_depth=self.draft_depth))
            distribution = self.process(input_ids, self._logits(states[-1][:, -1])).softmax(-1)
            tokens = self._pick(distribution)
            if self.config.do_sample:
                probabilities.append(distribution)
            if self.config._pad_token_tensor is not None:
                tokens = torch.where(drafting, tokens, self.config._pad_token_tensor)
            input_ids = torch.cat([input_ids, tokens[:, None]], -1)
            unsure = distribution.gather(1, tokens[:, None])[:, 0] < self.config.assistant_confidence_threshold
            if (unsure & drafting).any():
                break
            if self.config._eos_token_tensor is not None:
                drafting = drafting & ~torch.isin(tokens, self.config._eos_token_tensor)
                if not drafting.any():
                    break
        return Draft(input_ids[:, length:], probabilities, torch.cat(states, 1))

    def verify(self, input_ids: torch.Tensor, draft: Draft) -> torch.Tensor:
        """The logits of all steps where the draft has its tokens, (batch, drafted, vocabulary)."""
        drafted = draft.tokens.shape[1]
        if self.goes_on:
            given = {"inputs_embeds": draft.states, "first_step": self.draft_depth}
        else:
            tokens = torch.cat([input_ids, draft.tokens[:, :-1]], -1)
            given = {"input_ids": tokens[:, self.cache.get_seq_length() :]}
        return self._logits(self._decode(self.cache, decoder_depth=self.depth, **given)[:, -drafted:])

    def choose(self, scores: torch.Tensor, draft: Draft, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens that follow, by the scores of all steps, and where they are the draft's, (batch,) each."""
        drafted = draft.tokens[:, position]
        if not self.config.do_sample:
            tokens = scores.argmax(-1)
            return tokens, tokens == drafted
        wanted, proposed = scores.softmax(-1), draft.probabilities[position]
        ratio = (wanted / proposed).gather(1, drafted[:, None])[:, 0]
        accepted = torch.rand_like(ratio) < ratio
        # What the draft gives too little of; nothing but rounding can reject a token where that is nothing.
        rest = (wanted - proposed).clamp(min=0)
        rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, wanted)
        return torch.where(accepted, drafted, self._pick(rest)), accepted

    def keep(self, length: int, all_accepted: bool) -> None:
        """Forget in the caches what comes after the first `length` tokens, and say how the draft has done."""
        for cache in (self.draft_cache, self.cache):
            if surplus := cache.get_seq_length() - length:
                for layer in cache.self_attention_cache.layers:
                    layer.crop(-surplus)
        if self.config.num_assistant_tokens_schedule != "constant":
            self.tokens_of_draft = self.tokens_of_draft + 2 if all_accepted else max(1, self.tokens_of_draft - 1)

    def _decode(self, cache: EncoderDecoderCache, **given: Any) -> torch.Tensor:
        inputs = given.get("input_ids", given.get("inputs_embeds"))
        mask = self.target_mask
        if mask is not None:
            more = cache.get_seq_length() + inputs.shape[1] - mask.shape[1]
            mask = torch.cat([mask, mask.new_ones(len(mask), more)], -1)
        given |= {CACHE: cache, "use_cache": True, "attention_mask": mask, **self.source}
        return self.model.model.decoder(**given).last_hidden_state

    def _logits(self, states: torch.Tensor) -> torch.Tensor:
        return (self.model.lm_head(states) + self.model.final_logits_bias).float()

    def _pick(self, distribution: torch.Tensor) -> torch.Tensor:
        """A token of each sentence, (batch,), of a distribution that need not sum to one."""
        return distribution.multinomial(1)[:, 0] if self.config.do_sample else distribution.argmax(-1)


class RSMarianForConditionalGeneration(CheckedGenerationMixin, RSMarianPreTrainedModel, MarianMTModel):
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

    @partial(takes_old_name, until="6.0.0")
    @wraps(GenerationMixin.generate, assigned=())
    def generate(self, *args, **kwargs):
        """See `GenerationMixin.generate`.

        Args:
            draft_decoder_depth (`int`, *optional*):
                Self-speculative decoding: the decoder at this depth drafts tokens, which all of its steps (those of
                `decoder_depth`, if that is given) verify in one pass. Greedy search gives what it gives without, to
                rounding, and sampling draws from the same distribution. At least the unique layers, and less than the
                depth. Of transformers' options of assisted generation it heeds `num_assistant_tokens` (default: 5),
                `num_assistant_tokens_schedule` and `assistant_confidence_threshold`.

        Raises:
            ValueError: a draft of an impossible depth, or with what it does not go together with: beams, a cache that
                is not dynamic, a compiled model, and options that choose or need another decoding loop.
        """
        draft_decoder_depth = kwargs.pop("draft_decoder_depth", None)
        if draft_decoder_depth is None:
            return super().generate(*args, **kwargs)
        self._check_draft_depth(draft_decoder_depth, kwargs.get("decoder_depth"))
        for name in ("assistant_model", "prompt_lookup_num_tokens", "custom_generate", "stop_strings", "synced_gpus"):
            if kwargs.get(name):
                raise ValueError(f"draft_decoder_depth and {name} exclude each other")
        if self._is_compiled():
            raise ValueError("draft_decoder_depth needs a model that is not compiled")
        if self._is_prefixed():
            raise ValueError("draft_decoder_depth and PEFT's prefixes exclude each other")
        if self._cache_is_right():
            given = inspect.signature(GenerationMixin.generate).bind(self, *args, **kwargs).arguments
            configs = (given.get("generation_config"), self.generation_config)
            said = [kwargs.get("num_assistant_tokens")]
            said += [getattr(config, "num_assistant_tokens", None) for config in configs]
            tokens = next((number for number in said if number is not None), DRAFTED_TOKENS)
            kwargs["custom_generate"] = partial(
                type(self)._speculative_decoding,
                draft_depth=draft_decoder_depth,
                draft_tokens=tokens,
                streamer=kwargs.get("streamer"),  # which transformers hands to no loop but its own
            )
        return super().generate(*args, **kwargs)

    def _check_draft_depth(self, draft_depth: int, decoder_depth: int | None) -> None:
        least, depth = self.config.decoder_unique_layers, decoder_depth or self.config.decoder_layers
        if least >= depth:
            raise ValueError(
                f"draft_decoder_depth needs a decoder with more steps than unique layers ({least}), this call's has "
                f"{depth}"
            )
        if type(draft_depth) is not int or not least <= draft_depth < depth:
            raise ValueError(
                f"draft_decoder_depth must be a whole number in decoder_unique_layers ({least})..{depth - 1}, less "
                f"than the decoder's depth ({depth}), got {draft_depth!r}"
            )

    def _speculative_decoding(
        self,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        draft_depth: int,
        draft_tokens: int,
        streamer: BaseStreamer | None = None,
        **model_kwargs,
    ) -> torch.Tensor | GenerateEncoderDecoderOutput:
        """The loop of `generate` with a draft; its arguments are those of `GenerationMixin._sample`.

        A token is chosen, and the search told of it, as if it had been decoded alone: logits processors and stopping
        criteria see what they see without a draft.
        """
        cache = model_kwargs.get(CACHE)
        self._check_draft_search(generation_config, cache)
        depth = model_kwargs.get("decoder_depth") or self.config.decoder_layers
        inputs = {n: model_kwargs.get(n) for n in ("encoder_outputs", "attention_mask", "decoder_attention_mask")}
        speculation = SelfSpeculation(
            self,
            draft_depth,
            draft_tokens,
            depth,
            cache,
            **inputs,
            generation_config=generation_config,
            logits_processor=logits_processor,
        )
        returned = generation_config.return_dict_in_generate
        all_scores = () if returned and generation_config.output_scores else None
        all_logits = () if returned and generation_config.output_logits else None
        pads = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
        unfinished = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
        while unfinished.any():
            draft = speculation.draft(input_ids, unfinished)
            verified = speculation.verify(input_ids, draft)
            for position in range(draft.tokens.shape[1]):
                logits = verified[:, position]
                scores = logits_processor(input_ids, logits.clone())
                tokens, accepted = speculation.choose(scores, draft, position)
                if pads:
                    tokens = torch.where(unfinished, tokens, generation_config._pad_token_tensor)
                input_ids = torch.cat([input_ids, tokens[:, None]], -1)
                if all_scores is not None:
                    all_scores += (scores,)
                if all_logits is not None:
                    all_logits += (logits,)
                if streamer is not None:
                    streamer.put(tokens.cpu())
                all_accepted = bool((accepted | ~unfinished).all())
                unfinished = unfinished & ~stopping_criteria(input_ids, all_scores)
                if not all_accepted or not unfinished.any():
                    break
            speculation.keep(input_ids.shape[1] - 1, all_accepted)
        if streamer is not None:
            streamer.end()
        if not returned:
            return input_ids
        cache.is_updated.update(dict.fromkeys(range(depth), True))
        return GenerateEncoderDecoderOutput(
            sequences=input_ids, scores=all_scores, logits=all_logits, **{CACHE: cache}
        )

    def _check_draft_search(self, generation_config: GenerationConfig, cache: Cache | None) -> None:
        """Raise `ValueError` if a search cannot be had with a draft."""
        if generation_config.num_beams > 1:
            raise ValueError(
                "draft_decoder_depth is for greedy search and sampling: give num_beams=1, got "
                f"{generation_config.num_beams}"
            )
        for name in ("output_attentions", "output_hidden_states"):
            if getattr(generation_config, name):
                raise ValueError(f"draft_decoder_depth and {name} exclude each other")
        sides = [cache.self_attention_cache, cache.cross_attention_cache] if cache is not None else []
        if not sides or any(type(side) is not DynamicCache or side.offloading for side in sides):
            raise ValueError("draft_decoder_depth needs a dynamic cache: leave use_cache and cache_implementation out")
        if len(sides[0].layers) < self.config.decoder_layers or cache.get_seq_length():
            raise ValueError("draft_decoder_depth needs an empty cache, made from the configuration of this model")

    def _get_candidate_generator(self, *args, model_kwargs: dict[str, Any], **kwargs) -> CandidateGenerator:
        # transformers hands everything to the draft model, whose depth is its own and which may be of another kind.
        own = {name: value for name, value in model_kwargs.items() if name not in ("encoder_depth", "decoder_depth")}
        return super()._get_candidate_generator(*args, model_kwargs=own, **kwargs)


__all__ = [
    "RSMarianForConditionalGeneration",
    "RSMarianModel",
    "RSMarianPreTrainedModel",
]
