"""Translation of whole lists: sorted into length buckets, batched by tokens, shared out over processes.

Not for single requests (`pipeline_rs_marian.py`).
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .pipeline_rs_marian import is_blank
from .tokenization import encode, list_of_texts
from .utils.ranges import check_range

logger = logging.get_logger(__name__)

Result = TypeVar("Result")

# For `generate`: nothing beside the token ids, whatever a checkpoint's generation configuration asks for.
IDS_ALONE = {
    "return_dict_in_generate": False,
    "output_scores": False,
    "output_logits": False,
    "output_attentions": False,
    "output_hidden_states": False,
}


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

    @property
    def batch_tokens(self) -> int:
        """Source tokens of a decoding batch, padding included, so that its beams fit into `decoding_max_tokens`."""
        return max(1, self.decoding_max_tokens // self.num_beams)

    def search_kwargs(self) -> dict:
        """What `generate` and a `GenerationConfig` take of the search."""
        beam_search = {"length_penalty": self.length_penalty} if self.num_beams > 1 else {}
        return {"num_beams": self.num_beams, **beam_search}

    def generate_kwargs(self, model: PreTrainedModel) -> dict:
        """Arguments for `generate`; the length is at most what the model has positions for."""
        # `max_length` counts the start token. Checkpoints set it, and `generate` warns of `max_new_tokens` beside it;
        # one that a checkpoint has would win.
        max_length = self.max_new_tokens + 1
        positions = getattr(model.config, "max_position_embeddings", max_length)
        bounds = {"max_length": min(max_length, positions), "max_new_tokens": None}
        return {**self.search_kwargs(), "do_sample": False, **bounds}


@dataclass
class DraftedDecodingArguments(DecodingArguments):
    """How to decode."""

    draft_decoder_depth: int | None = field(
        default=None,
        metadata={
            "help": "Steps of the decoder of an RSMarian that draft tokens for all of its steps to verify: the same "
            "translations, sooner (num_beams 1)."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "draft_decoder_depth", least=1)
        if self.draft_decoder_depth is not None and self.num_beams > 1:
            raise ValueError(f"draft_decoder_depth needs num_beams 1, got {self.num_beams}")

    def generate_kwargs(self, model: PreTrainedModel) -> dict:
        kwargs = super().generate_kwargs(model)
        if self.draft_decoder_depth is None:
            return kwargs
        if model.config.model_type != "rs_marian":
            raise ValueError(f"draft_decoder_depth is for RSMarian models, got a {type(model).__name__}")
        return {**kwargs, "draft_decoder_depth": self.draft_decoder_depth}


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
    output = model.generate(**inputs, **args.generate_kwargs(model), **IDS_ALONE, num_return_sequences=n_best)
    texts = tokenizer.batch_decode(output, skip_special_tokens=True)
    return [texts[start : start + n_best] for start in range(0, len(texts), n_best)]


def map_by_length(
    function: Callable[[list[int]], Sequence[Result]],
    lengths: Sequence[int],
    max_tokens: int,
    *,
    advance: Callable[[int], None] = lambda items: None,
    shared: bool = False,
) -> list[Result]:
    """A function over items in batches of similar length (`length_batches`), its results in the order of the items.

    Args:
        function: takes the indices of a batch, returns a result for each.
        lengths: of the items.
        max_tokens: of a batch, padding included.
        advance: called with the number of items that a batch has done; of all processes together, where they share.
        shared: each process takes a share of the batches, and all get all results, which must be picklable.
    """
    state = PartialState()
    number, processes = (state.process_index, state.num_processes) if shared else (0, 1)
    batches, left = list(length_batches(lengths, max_tokens)), len(lengths)
    results: list[tuple[int, Result]] = []
    for batch in batches[number::processes]:
        results.extend(zip(batch, function(batch), strict=True))
        # The main process counts for all, since the others do as much in the same time.
        step = min(len(batch) * processes, left)
        left -= step
        advance(step)
    if processes > 1:
        results = gather_object(results)
    return [result for _, result in sorted(results, key=lambda pair: pair[0])]


class Engine(Protocol):
    """Translates a batch of token ids into `n_best` hypotheses each, the best first."""

    tokenizer: PreTrainedTokenizerBase

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


def decode_all(
    engine: Engine,
    input_ids: Sequence[list[int]],
    max_tokens: int,
    *,
    advance: Callable[[int], None] = lambda items: None,
    shared: bool = False,
) -> list[list[str]]:
    """The hypotheses of every source, in order; an empty one for a blank source, whatever the engine makes of it.

    Args:
        engine: any of them.
        input_ids: from `encode_sources`.
        max_tokens, advance, shared: as for `map_by_length`; `DecodingArguments.batch_tokens`.
    """
    filled = [index for index, ids in enumerate(input_ids) if not is_blank(engine.tokenizer, ids)]
    advance(len(input_ids) - len(filled))
    found = map_by_length(
        lambda batch: engine.translate_batch([input_ids[filled[position]] for position in batch]),
        [len(input_ids[index]) for index in filled],
        max_tokens,
        advance=advance,
        shared=shared,
    )
    hypotheses = dict(zip(filled, found, strict=True))
    return [hypotheses.get(index, [""]) for index in range(len(input_ids))]


def encode_sources(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sentences: Iterable[str]
) -> list[list[int]]:
    """Token ids of sentences; one that is longer than the model takes is cut, with a warning that names it.

    A sentence in which nothing is to be seen has the ids of an empty one.
    """
    sentences = list_of_texts(sentences)
    limit = source_limit(model, tokenizer)
    encoded = encode(tokenizer, sentences)
    empty = tokenizer("")["input_ids"]
    encoded = [
        empty if is_blank(tokenizer, ids, sentence) else ids for sentence, ids in zip(sentences, encoded, strict=True)
    ]
    for sentence, ids in zip(sentences, encoded, strict=True):
        if len(ids) > limit and PartialState().is_main_process:
            logger.warning(
                f"A sentence of {len(ids)} tokens is cut to the {limit} that the model takes: {sentence[:80]!r}…"
            )
    return [ids if len(ids) <= limit else [*ids[: limit - 1], ids[-1]] for ids in encoded]


def translate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sentences: Iterable[str],
    args: DecodingArguments | None = None,
    *,
    progress: bool = True,
) -> list[str]:
    """Translate sentences; under `accelerate launch` each process takes a share and all get the whole result.

    Args:
        model: any sequence-to-sequence model, on the device where it is to run.
        sentences: source text, one sentence each, in a list or any other iterable. One that is longer than the model
            takes is cut, with a warning that names it.
        args: how to decode.
        progress: show a bar with sentences per second (where standard error is a terminal).

    Returns:
        The translations, in the order of `sentences`.

    Raises:
        TypeError: a single text in the place of a list.
    """
    args = args or DecodingArguments()
    encoded = encode_sources(model, tokenizer, sentences)
    engine = TransformersEngine(model, tokenizer, args)
    was_training = model.training
    model.eval()
    disable = None if progress and PartialState().is_main_process else True
    with tqdm(total=len(encoded), unit=" sentences", desc="Translating", disable=disable, leave=False) as bar:
        hypotheses = decode_all(engine, encoded, args.batch_tokens, advance=bar.update, shared=True)
    model.train(was_training)
    return [texts[0] for texts in hypotheses]


def timed_translate(*args, **kwargs) -> tuple[list[str], float]:
    """`translate`, and the sentences per second of the whole call (all processes together)."""
    start = time.perf_counter()
    translations = translate(*args, **kwargs)
    return translations, len(translations) / (time.perf_counter() - start)
