"""Several sequence-to-sequence models as one: the mean of their distributions at every step of the search."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .generation_rs_marian import CheckedGenerationMixin
from .versions_rs_marian import CACHE, strict_forward


class EnsembleForSeq2SeqLM(CheckedGenerationMixin, PreTrainedModel):
    """An ensemble that decodes like one model: greedy, beam and sampling, with one cache.

    The distribution of the next token is the mean of the models' distributions. Not to be trained or saved.

    Args:
        models: with one vocabulary and the same special tokens; widths, depths and architectures may differ. The
            configuration is that of the first.

    Raises:
        ValueError: none, or another size of vocabulary or other special tokens than the first has.
    """

    main_input_name = "input_ids"
    # The attention is that of each model.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True

    def __init__(self, models: Sequence[PreTrainedModel]):
        models = list(models)
        if not models:
            raise ValueError("an ensemble needs at least one model")
        for name in ("decoder_start_token_id", "pad_token_id", "eos_token_id"):
            values = [getattr(model.config, name, None) for model in models]
            if len(set(map(str, values))) > 1:
                raise ValueError(f"the models of an ensemble must agree in {name}, got {values}")
        sizes = [model.get_output_embeddings().weight.shape[0] for model in models]
        if len(set(sizes)) > 1:
            raise ValueError(f"the models of an ensemble must have one vocabulary, got sizes {sizes}")
        super().__init__(copy.deepcopy(models[0].config))
        self.models = nn.ModuleList(models)
        self.generation_config = models[0].generation_config
        self.encoder = _EnsembleEncoder(models)
        self.depths = [_decoder_depth(model) for model in models]
        if limits := [
            m.config.max_position_embeddings for m in models if hasattr(m.config, "max_position_embeddings")
        ]:
            self.config.max_position_embeddings = min(limits)

    def get_encoder(self, *args: Any, **kwargs: Any) -> nn.Module:
        return self.encoder

    def prepare_decoder_input_ids_from_labels(self, labels: torch.Tensor) -> torch.Tensor:
        return self.models[0].prepare_decoder_input_ids_from_labels(labels)

    @strict_forward
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        encoder_outputs: BaseModelOutput | None = None,
        cache: EncoderDecoderCache | None = None,
        use_cache: bool | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Seq2SeqLMOutput:
        """Log-probabilities as `logits`, (batch, length, vocabulary).

        `encoder_outputs` are those of the models side by side along the width, `cache` has theirs one after another
        along the layers, so that whatever reorders or repeats them needs not know of the ensemble.
        """
        if kwargs.get("labels") is not None:
            raise ValueError("an ensemble has no loss: give labels to one model, which trains by itself")
        if encoder_outputs is None:
            encoder_outputs = self.encoder(input_ids, attention_mask)
        states = encoder_outputs[0].split(self.encoder.widths, dim=-1)
        caches: Sequence[EncoderDecoderCache | None] = [None] * len(self.models)
        if use_cache:
            cache = self._filled_up(cache)
            caches = self._views(cache)
        log_probabilities = []
        for model, state, own_cache in zip(self.models, states, caches, strict=True):
            output = model(
                encoder_outputs=BaseModelOutput(last_hidden_state=state.to(model.dtype)),
                attention_mask=attention_mask,
                decoder_input_ids=decoder_input_ids,
                decoder_attention_mask=decoder_attention_mask,
                use_cache=bool(use_cache),
                **{CACHE: own_cache},
            )
            log_probabilities.append(output.logits.float().log_softmax(-1))
        mean = torch.stack(log_probabilities).logsumexp(0) - torch.tensor(float(len(self.models))).log()
        return Seq2SeqLMOutput(logits=mean, encoder_last_hidden_state=encoder_outputs[0], **{CACHE: cache})

    def _filled_up(self, cache: EncoderDecoderCache | None) -> EncoderDecoderCache:
        """The cache that `generate` has made for the first model, or none, with the layers of all models."""
        if cache is not None and len(cache.self_attention_cache.layers) == sum(self.depths):
            return cache
        if cache is not None and cache.get_seq_length():
            raise ValueError("the cache is not that of this ensemble")
        if cache is not None and not isinstance(cache.self_attention_cache, DynamicCache):
            kind = type(cache.self_attention_cache).__name__
            raise ValueError(f"an ensemble decodes with a dynamic cache, not a {kind}: leave cache_implementation out")
        sides = [DynamicCache(), DynamicCache()]
        for side in sides:
            side.layers = [side.layer_class_to_replicate() for _ in range(sum(self.depths))]
        filled = EncoderDecoderCache(*sides)
        if cache is None:
            return filled
        # `generate` keeps the object that it has made.
        cache.self_attention_cache, cache.cross_attention_cache = sides
        cache.is_updated = filled.is_updated
        return cache

    def _views(self, cache: EncoderDecoderCache) -> list[EncoderDecoderCache]:
        views, start = [], 0
        for depth in self.depths:
            sides = []
            for whole in (cache.self_attention_cache, cache.cross_attention_cache):
                view = DynamicCache()
                view.layers = whole.layers[start : start + depth]
                sides.append(view)
            views.append(EncoderDecoderCache(*sides))
            start += depth
        return views


class _EnsembleEncoder(nn.Module):
    """The encoders' last hidden states, side by side along the width."""

    main_input_name = "input_ids"

    def __init__(self, models: Sequence[PreTrainedModel]):
        super().__init__()
        self.encoders = nn.ModuleList(model.get_encoder() for model in models)
        self.widths = [model.config.hidden_size for model in models]

    @strict_forward
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutput:
        states = [encoder(input_ids, attention_mask=attention_mask)[0] for encoder in self.encoders]
        return BaseModelOutput(last_hidden_state=torch.cat(states, dim=-1))


def _decoder_depth(model: PreTrainedModel) -> int:
    names = ("decoder_layers", "num_decoder_layers", "num_hidden_layers")
    return next(getattr(model.config, name) for name in names if getattr(model.config, name, None) is not None)
