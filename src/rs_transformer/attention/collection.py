"""What each recurrence attends to: collected as arrays, and measured over a corpus.

Not for the measures themselves (`measures.py`), for pictures (`figures.py`) or for the page in which one looks around
(`page.py`).
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..decoding import IDS_ALONE, DecodingArguments, map_by_length, source_limit
from ..tokenization import convert_source_ids_to_tokens, encode, list_of_texts
from .measures import (
    BOOTSTRAP_SEED,
    Estimate,
    attention_measures,
    bootstrap_mean,
    hidden_state_measures,
    jackknife_cka,
)

# The names of the fields of `Seq2SeqLMOutput`.
KINDS = ("encoder_attentions", "decoder_attentions", "cross_attentions")
STATES = ("encoder_hidden_states", "decoder_hidden_states")

DecoderIds = tuple[list[int], list[int]]  # what the decoder reads, and what it is to say there
SentenceMeasures = dict[str, dict[str, np.ndarray]]
DrawnStates = dict[str, np.ndarray]

CKA_SENTENCES = 1000
BATCH_BYTES = 256 * 2**20  # of attention weights; they grow with the square of the length


@dataclass(frozen=True)
class SentenceAttention:
    """The attention of every step and head for one sentence pair, without padding.

    S source tokens, T target tokens, each with the end of sentence. Arrays are float32; a row is a query, and the
    weights of each row sum to 1, to the precision of the model.

    Attributes:
        encoder_tokens: the S source tokens.
        decoder_tokens: the T tokens that the decoder reads, the start token first.
        output_tokens: the T tokens that it is to say there: `decoder_tokens` one place on, the end of sentence last.
        encoder_attentions: `(encoder steps, heads, S, S)`.
        decoder_attentions: `(decoder steps, heads, T, T)`; zero above the diagonal.
        cross_attentions: `(decoder steps, heads, T, S)`.
        encoder_hidden_states: `(encoder steps + 1, S, d_model)`; the first is the embedding, with positions. In models
            with a LayerNorm after the last layer (T5, mBART; not Marian) the last is what that makes of it.
        decoder_hidden_states: `(decoder steps + 1, T, d_model)`.
    """

    encoder_tokens: list[str]
    decoder_tokens: list[str]
    output_tokens: list[str]
    encoder_attentions: np.ndarray
    decoder_attentions: np.ndarray
    cross_attentions: np.ndarray
    encoder_hidden_states: np.ndarray = field(repr=False)
    decoder_hidden_states: np.ndarray = field(repr=False)

    def tokens(self, kind: str) -> tuple[list[str], list[str]]:
        """The tokens at the rows and the columns of a kind of attention.

        A row of the cross-attention stands for the token that is said there, as is usual for alignments.
        """
        return {
            "encoder_attentions": (self.encoder_tokens, self.encoder_tokens),
            "decoder_attentions": (self.decoder_tokens, self.decoder_tokens),
            "cross_attentions": (self.output_tokens, self.encoder_tokens),
        }[kind]


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """A model of its own on the same weights: what is changed in it but these, the other one does not notice.

    A setting that other threads rely on, such as which attention is computed, can be another one in it.
    """
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


@contextmanager
def eager_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let a model compute attention so that its weights can be read, in evaluation mode; then as before.

    The model's state changes meanwhile, so no other thread may use it: take a `twin`.
    """
    before, was_training = model.config._attn_implementation, model.training
    model.set_attn_implementation("eager")
    model.eval()
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        model.train(was_training)


def collect_attention(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[str],
    targets: Sequence[str] | None = None,
    decoding: DecodingArguments | None = None,
) -> list[SentenceAttention]:
    """The attention of every step and head, and the hidden states, in one forced pass over each sentence pair.

    Args:
        model: RSMarian, `MarianMTModel` or another sequence-to-sequence model of transformers, on the device where
            it is to run. Other threads may use it meanwhile: attention is eager, as sdpa gives no weights, in a twin
            of it with the same weights.
        tokenizer: encodes the targets by `text_target=`.
        sources: sentences.
        targets: the translations that the decoder is forced to, one a sentence; without them it is forced to the
            model's own.
        decoding: how the model translates, where it does.

    Returns:
        One `SentenceAttention` a sentence, in the order of `sources`.

    Raises:
        ValueError: no sentences, an empty one, one that is longer than the model takes, another number of targets
            than of sources, or a model that gives no attention weights, or none of each position for each other.
        TypeError: a single text in the place of a list.
    """
    attend, lengths, max_tokens = _plan(twin(model), tokenizer, sources, targets, decoding or DecodingArguments())
    return map_by_length(lambda batch: list(attend(batch)), lengths, max_tokens)


def _plan(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[str],
    targets: Sequence[str] | None,
    decoding: DecodingArguments,
) -> tuple[Callable[[list[int]], Iterator[SentenceAttention]], list[int], int]:
    """Check and encode sentences: what attends to those of some indices, the lengths of all, and a batch's tokens."""
    source_ids, target_ids = encode_sentences(model, tokenizer, sources, targets)

    def attend(indices: list[int]) -> Iterator[SentenceAttention]:
        inputs = [source_ids[index] for index in indices]
        with eager_attention(model):
            if target_ids is None:
                decoder_ids = _translate_ids(model, tokenizer, inputs, decoding)
            else:
                decoder_ids = _shifted_ids(model, [target_ids[index] for index in indices])
            yield from _forced_passes(model, tokenizer, inputs, decoder_ids)

    return attend, [len(ids) for ids in source_ids], decoding.batch_tokens


def encode_sentences(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[str],
    targets: Sequence[str] | None,
) -> tuple[list[list[int]], list[list[int]] | None]:
    """The token ids of sentence pairs, or a `ValueError` that names the sentence that cannot be looked into."""
    sources, targets = list_of_texts(sources), None if targets is None else list_of_texts(targets)
    if not len(sources):
        raise ValueError("there is no sentence to look into")
    if targets is not None and len(targets) != len(sources):
        raise ValueError(f"{len(sources)} sentences have {len(targets)} references; give one for each, or none")
    limit = source_limit(model, tokenizer)
    silent = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    encoded: list[list[list[int]] | None] = []
    for what, texts in (("sentence", sources), ("reference", targets)):
        if texts is None:
            encoded.append(None)
            continue
        ids = encode(tokenizer, [text or "" for text in texts], target=what == "reference")
        for number, (text, its_ids) in enumerate(zip(texts, ids, strict=True), start=1):
            if silent.issuperset(its_ids):
                raise ValueError(f"{what} {number} is empty; leave it out: {text!r}")
            if len(its_ids) > limit:
                raise ValueError(
                    f"{what} {number} has {len(its_ids)} tokens, the model takes {limit}: split it or leave it out: "
                    f"{text[:80]!r}"
                )
        encoded.append(ids)
    return encoded[0], encoded[1]


@torch.inference_mode()
def _translate_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, input_ids: list[list[int]], args: DecodingArguments
) -> list[DecoderIds]:
    """The model's own translations, up to and with the end of sentence."""
    inputs = tokenizer.pad({"input_ids": input_ids}, return_tensors="pt").to(model.device)
    translations = []
    for ids in model.generate(**inputs, **args.generate_kwargs(model), **IDS_ALONE).tolist():
        # The first is the start token, which is the end of sentence in some models.
        end = ids.index(tokenizer.eos_token_id, 1) + 1 if tokenizer.eos_token_id in ids[1:] else len(ids)
        translations.append((ids[: end - 1], ids[1:end]))
    return translations


def _shifted_ids(model: PreTrainedModel, labels: list[list[int]]) -> list[DecoderIds]:
    """References, and the decoder's input that goes with each."""
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        shifted = model.prepare_decoder_input_ids_from_labels(labels=_padded(labels, -100)).tolist()
    else:
        shifted = [[model.config.decoder_start_token_id, *ids] for ids in labels]
    return [(ids[: len(its_labels)], its_labels) for ids, its_labels in zip(shifted, labels, strict=True)]


def _padded(ids: list[list[int]], padding: int) -> torch.Tensor:
    rows = [torch.tensor(row) for row in ids]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding)


def _forced_passes(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    input_ids: list[list[int]],
    decoder_ids: list[DecoderIds],
) -> Iterator[SentenceAttention]:
    """Attention in the order of the sentences, in batches whose attention weights fit into `BATCH_BYTES`."""
    sizes = ("encoder_layers", "decoder_layers", "num_hidden_layers")
    depth = max(getattr(model.config, name, 1) for name in sizes)
    weights = len(KINDS) * depth * getattr(model.config, "num_attention_heads", 1)
    lengths = [max(len(source), len(say)) for source, (_, say) in zip(input_ids, decoder_ids, strict=True)]
    size = max(1, BATCH_BYTES // (4 * weights * max(lengths) ** 2))
    for start in range(0, len(input_ids), size):
        batch = slice(start, start + size)
        yield from _forced_pass(model, tokenizer, input_ids[batch], decoder_ids[batch])


def _forced_pass(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    input_ids: list[list[int]],
    decoder_ids: list[DecoderIds],
) -> list[SentenceAttention]:
    inputs = tokenizer.pad({"input_ids": input_ids}, return_tensors="pt").to(model.device)
    decoder_input_ids = _padded([read for read, _ in decoder_ids], tokenizer.pad_token_id).to(model.device)
    arrays = _arrays(model, inputs, decoder_input_ids)
    sentences = []
    for row, (source, (read, say)) in enumerate(zip(input_ids, decoder_ids, strict=True)):
        encoder, decoder = slice(len(source)), slice(len(say))
        # Copies: a view would keep the padded batch in memory.
        sentences.append(
            SentenceAttention(
                encoder_tokens=convert_source_ids_to_tokens(tokenizer, source),
                decoder_tokens=tokenizer.convert_ids_to_tokens(read),
                output_tokens=tokenizer.convert_ids_to_tokens(say),
                encoder_attentions=arrays["encoder_attentions"][row, :, :, encoder, encoder].copy(),
                decoder_attentions=arrays["decoder_attentions"][row, :, :, decoder, decoder].copy(),
                cross_attentions=arrays["cross_attentions"][row, :, :, decoder, encoder].copy(),
                encoder_hidden_states=arrays["encoder_hidden_states"][row, :, encoder].copy(),
                decoder_hidden_states=arrays["decoder_hidden_states"][row, :, decoder].copy(),
            )
        )
    return sentences


@torch.inference_mode()
def _arrays(
    model: PreTrainedModel, inputs: Mapping[str, torch.Tensor], decoder_input_ids: torch.Tensor
) -> dict[str, np.ndarray]:
    """Attention and hidden states of a padded batch, `(batch, steps, …)`, or a `ValueError` if a model gives none."""
    outputs = model(
        **inputs,
        decoder_input_ids=decoder_input_ids,
        output_attentions=True,
        output_hidden_states=True,
        use_cache=False,
    )
    source_length, target_length = inputs["input_ids"].shape[1], decoder_input_ids.shape[1]
    needed = {
        "encoder_attentions": (source_length, source_length),
        "decoder_attentions": (target_length, target_length),
        "cross_attentions": (target_length, source_length),
    }
    arrays = {}
    for name in (*KINDS, *STATES):
        tensors = outputs.get(name)
        if not tensors or any(tensor is None for tensor in tensors):
            raise ValueError(
                f"{type(model).__name__} gives no {name}, even with eager attention: there is nothing to look into"
            )
        arrays[name] = torch.stack(tensors, dim=1).float().cpu().numpy()
        shape = arrays[name].shape[-2:]
        if name in needed and shape != needed[name]:
            raise ValueError(
                f"the {name} of {type(model).__name__} are no weights of each position for each other: their shape is "
                f"{shape} where {needed[name]} is needed"
            )
    return arrays


@dataclass(frozen=True)
class AttentionStatistics:
    """What the attention of a model is like over a corpus.

    Attributes:
        sentences: how many.
        by_head: for each of `KINDS` the measures of `attention_measures` that heads have, `(steps, heads)`;
            `step_cosine` is `(steps - 1, heads)`.
        by_step: the same as means over the heads, `(steps,)`, with `mean_head_cosine`, `(steps - 1,)`; and for each
            of `STATES` `cosine` and `relative_change` of `hidden_state_measures` and `cka`, the `linear_cka` of what a
            step starts from and what it makes of it, `(steps,)`.
    """

    sentences: int
    by_head: dict[str, dict[str, Estimate]]
    by_step: dict[str, dict[str, Estimate]]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, for JSON."""
        tables = {
            table: {
                group: {name: estimate.to_dict() for name, estimate in measures.items()}
                for group, measures in getattr(self, table).items()
            }
            for table in ("by_head", "by_step")
        }
        return {"sentences": self.sentences, **tables}


def attention_statistics(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[str],
    targets: Sequence[str] | None = None,
    decoding: DecodingArguments | None = None,
    *,
    progress: bool = True,
) -> AttentionStatistics:
    """Measure the attention of every step and head over a corpus.

    Means are over the sentences, each with the mean over its positions; intervals are percentiles of 1,000 bootstrap
    resamplings of the sentences (seed 12345). CKA takes one position, drawn with a seed, of each sentence, since
    positions of one sentence are not independent, and 1,000 sentences at most; its interval is a jackknife's that
    leaves out one of 20 groups of them at a time. Of fewer than 20 sentences the bounds are NaN, of fewer than 4 CKA
    is too. Under `accelerate launch` each process takes a share and all get the whole result.

    Arguments and errors are those of `collect_attention`; `progress` shows a bar where standard error is a terminal.
    """
    attend, lengths, max_tokens = _plan(twin(model), tokenizer, sources, targets, decoding or DecodingArguments())
    stride = -(-len(sources) // CKA_SENTENCES)

    def measure(indices: list[int]) -> list[tuple[SentenceMeasures, DrawnStates]]:
        return [
            (_sentence_measures(sentence), _draw(sentence, index) if index % stride == 0 else {})
            for index, sentence in zip(indices, attend(indices), strict=True)
        ]

    disable = None if progress and PartialState().is_main_process else True
    with tqdm(total=len(sources), unit=" sentences", desc="Attending", disable=disable, leave=False) as bar:
        rows = map_by_length(measure, lengths, max_tokens, advance=bar.update, shared=True)
    return _estimates(rows)


def _estimates(rows: Sequence[tuple[SentenceMeasures, DrawnStates]]) -> AttentionStatistics:
    """Means over the sentences, in their order."""
    by_head: dict[str, dict[str, Estimate]] = {kind: {} for kind in KINDS}
    by_step: dict[str, dict[str, Estimate]] = {group: {} for group in (*KINDS, *STATES)}
    for group in by_step:
        for name in rows[0][0][group]:
            values = np.stack([measures[group][name] for measures, _ in rows])
            if values.ndim == 3:
                by_head[group][name] = bootstrap_mean(values)
                values = values.mean(-1)
            by_step[group][name] = bootstrap_mean(values)
    for name in STATES:
        by_step[name]["cka"] = jackknife_cka(np.stack([drawn[name] for _, drawn in rows if drawn], axis=1))
    return AttentionStatistics(len(rows), by_head, by_step)


def _sentence_measures(sentence: SentenceAttention) -> SentenceMeasures:
    return {
        **{kind: attention_measures(getattr(sentence, kind), kind) for kind in KINDS},
        **{name: hidden_state_measures(getattr(sentence, name)) for name in STATES},
    }


def _draw(sentence: SentenceAttention, index: int) -> DrawnStates:
    """Hidden states at one position of a sentence, the same whichever process looks at it."""
    drawn = {}
    for name in STATES:
        states = getattr(sentence, name)
        position = np.random.default_rng([BOOTSTRAP_SEED, index]).integers(states.shape[1])
        drawn[name] = states[:, position]
    return drawn
