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
"""Generation with recurrently stacked Marian: caches that are checked before they are relied on, and self-speculation.

Self-contained: this file travels to the Hub beside the weights, as remote code.
"""

import copy
import inspect
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import torch
from packaging.version import Version
from torch import nn
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)
from transformers import __version__ as transformers_version
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.generation.candidate_generator import CandidateGenerator
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateEncoderDecoderOutput
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import is_torchdynamo_compiling, logging

from .versions_rs_marian import CACHE, TESTED_TRANSFORMERS, takes_old_name

logger = logging.get_logger(__name__)

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
        model: "RSMarianGenerationMixin",
        draft_depth: int,
        draft_tokens: int,
        depth: int,
        cache: EncoderDecoderCache,
        encoder_outputs: BaseModelOutput,
        attention_mask: torch.Tensor | None,
        decoder_attention_mask: torch.Tensor | None,
        generation_config: GenerationConfig,
        logits_processor: LogitsProcessorList,
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
        process = self._copied_processors()  # those that count see each token once, when it is verified
        for _ in range(min(self.tokens_of_draft, self.config.max_length - length)):
            new = input_ids[:, self.draft_cache.get_seq_length() :]
            states.append(self._decode(self.draft_cache, input_ids=new, decoder_depth=self.draft_depth))
            distribution = process(input_ids, self._logits(states[-1][:, -1])).softmax(-1)
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

    def _copied_processors(self) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """The logits processors with states of their own, but with the models and tokenizers that they have."""
        copied = []
        for each in self.process:
            held = getattr(each, "__dict__", {}).values()
            owners = [getattr(value, "__self__", None) for value in held]  # of methods, such as those of a trie
            shared = [value for value in held if isinstance(value, (nn.Module, PreTrainedTokenizerBase))]
            try:
                copied.append(copy.deepcopy(each, {id(value): value for value in (*shared, *owners)}))
            except (TypeError, RuntimeError):  # what cannot be copied, as a grammar's matcher
                copied.append(each)
        return LogitsProcessorList(copied)

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


class RSMarianGenerationMixin(CheckedGenerationMixin):
    """Checked generation, in which the decoder's first steps can draft, of `RSMarianForConditionalGeneration`."""

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
        given = inspect.signature(GenerationMixin.generate).bind(self, *args, **kwargs).arguments
        configs = (given.get("generation_config"), self.generation_config)
        for name in ("assistant_model", "prompt_lookup_num_tokens", "custom_generate", "stop_strings", "synced_gpus"):
            said = [kwargs[name]] if name in kwargs else [getattr(config, name, None) for config in configs]
            if any(said):
                raise ValueError(f"draft_decoder_depth and {name} exclude each other")
        if self._is_compiled():
            raise ValueError("draft_decoder_depth needs a model that is not compiled")
        if self._is_prefixed():
            raise ValueError("draft_decoder_depth and PEFT's prefixes exclude each other")
        if self._cache_is_right():
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
        least = self.config.decoder_unique_layers
        depth = self.config.decoder_layers if decoder_depth is None else decoder_depth
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
        mode = generation_config.get_generation_mode()
        if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            raise ValueError(f"draft_decoder_depth is for greedy search and sampling, and not for {mode.value}")
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
