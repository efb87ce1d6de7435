"""Translation of whole lists: sorted into length buckets, batched by tokens, shared out over processes.

Not for single requests (`pipeline_rs_marian.py`).
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .utils.ranges import check_range

logger = logging.get_logger(__name__)


@dataclass
class DecodingArguments:
    """How to decode."""

    num_beams: int = field(default=5, metadata={"help": "Beam size; 1 is greedy search."})
    length_penalty: float = field(
        default=1.0, metadata={"help": "Exponent of the length that beam scores are divided by."}
    )
    max_new_tokens: int = field(default=256, metadata={"help": "Longest translation, in tokens."})
    decoding_max_tokens: int = field(
        default=4096, metadata={"help": "Source tokens of a decoding batch, padding and beams included."}
    )

    def __post_init__(self) -> None:
        check_range(self, "num_beams", "max_new_tokens", "decoding_max_tokens", least=1)
        check_range(self, "length_penalty")

    def search_kwargs(self) -> dict:
        """What `generate` and a `GenerationConfig` take of the search."""
        beam_search = {"length_penalty": self.length_penalty} if self.num_beams > 1 else {}
        return {"num_beams": self.num_beams, **beam_search}

    def generate_kwargs(self, model: PreTrainedModel) -> dict:
        """Arguments for `generate`; the length is at most what the model has positions for."""
        # `max_length` counts the start token. Checkpoints set it, and `generate` warns of `max_new_tokens` beside it.
        max_length = self.max_new_tokens + 1
        positions = getattr(model.config, "max_position_embeddings", max_length)
        return {**self.search_kwargs(), "max_length": min(max_length, positions)}


def source_limit(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """The longest source that a model takes, in tokens."""
    return min(
        tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", tokenizer.model_max_length)
    )


def length_batches(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, the longest first, each of at most `max_tokens` with padding.

    A single sentence that is longer still makes a batch of its own.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and lengths[batch[0]] * (len(batch) + 1) > max_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


@torch.inference_mode()
def generate_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    input_ids: Sequence[list[int]],
    args: DecodingArguments,
    n_best: int = 1,
) -> list[list[str]]:
    """Translate one batch of token ids; `n_best` hypotheses a sentence, the best first, `n_best` at most the beam."""
    inputs = tokenizer.pad({"input_ids": list(input_ids)}, return_tensors="pt").to(model.device)
    output = model.generate(**inputs, **args.generate_kwargs(model), num_return_sequences=n_best)
    texts = tokenizer.batch_decode(output, skip_special_tokens=True)
    return [texts[start : start + n_best] for start in range(0, len(texts), n_best)]


class Engine(Protocol):
    """Translates a batch of token ids into `n_best` hypotheses each, the best first."""

    def translate_batch(self, input_ids: Sequence[list[int]]) -> list[list[str]]: ...


@dataclass
class TransformersEngine:
    """Decoding in PyTorch."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    decoding: DecodingArguments
    n_best: int = 1

    def translate_batch(self, input_ids: Sequence[list[int]]) -> list[list[str]]:
        return generate_texts(self.model, self.tokenizer, input_ids, self.decoding, self.n_best)


def encode_sources(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sentences: Sequence[str]
) -> list[list[int]]:
    """Token ids of sentences; one that is longer than the model takes is cut, with a warning that names it."""
    limit = source_limit(model, tokenizer)
    encoded = [tokenizer(sentence, verbose=False)["input_ids"] for sentence in sentences]
    for sentence, ids in zip(sentences, encoded, strict=True):
        if len(ids) > limit and PartialState().is_main_process:
            logger.warning(
                f"A sentence of {len(ids)} tokens is cut to the {limit} that the model takes: {sentence[:80]!r}…"
            )
    return [ids if len(ids) <= limit else [*ids[: limit - 1], ids[-1]] for ids in encoded]


def translate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sentences: Sequence[str],
    args: DecodingArguments | None = None,
    *,
    progress: bool = True,
) -> list[str]:
    """Translate sentences; under `accelerate launch` each process takes a share and all get the whole result.

    Args:
        model: any sequence-to-sequence model, on the device where it is to run.
        sentences: source text, one sentence each. One that is longer than the model takes is cut, with a warning
            that names it.
        args: how to decode.
        progress: show a bar with sentences per second (where standard error is a terminal).

    Returns:
        The translations, in the order of `sentences`.
    """
    args = args or DecodingArguments()
    state = PartialState()
    encoded = encode_sources(model, tokenizer, sentences)
    batches = list(length_batches([len(ids) for ids in encoded], max(1, args.decoding_max_tokens // args.num_beams)))
    was_training = model.training
    model.eval()
    results: list[tuple[int, str]] = []
    disable = None if progress and state.is_main_process else True
    with tqdm(total=len(encoded), unit=" sentences", desc="Translating", disable=disable, leave=False) as bar:
        for batch in batches[state.process_index :: state.num_processes]:
            hypotheses = generate_texts(model, tokenizer, [encoded[i] for i in batch], args)
            results.extend((index, text) for index, (text,) in zip(batch, hypotheses, strict=True))
            bar.update(min(len(batch) * state.num_processes, bar.total - bar.n))
    model.train(was_training)
    if state.num_processes > 1:
        results = gather_object(results)
    return [text for _, text in sorted(results)]


def timed_translate(*args, **kwargs) -> tuple[list[str], float]:
    """`translate`, and the sentences per second of the whole call (all processes together)."""
    start = time.perf_counter()
    translations = translate(*args, **kwargs)
    return translations, len(translations) / (time.perf_counter() - start)
