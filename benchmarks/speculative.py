"""Self-speculative decoding of a trained model against plain greedy search: the same translations, and how soon.

    python training/train.py training/recipes/tanaka_elastic.yaml
    python benchmarks/speculative.py --model runs/tanaka_elastic --test_file data/tatoeba/test.jsonl

Plain search and each draft depth take turns at every sentence of the first ones. Then all sentences are translated in
padded batches, by several threads at once, which one search does after another: their times are rough.
"""

import argparse
import operator
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import transformers
from common import print_table
from transformers import BatchEncoding, PreTrainedModel

from rs_transformer.checkpoints import load_translator
from rs_transformer.corpus import CorpusArguments, load_split

ROUNDS = 10


SENTENCES_TO_WARM_UP = 10


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="An RSMarian that decodes at several depths.")
    parser.add_argument("--test_file", required=True, help="Sentence pairs, as the commands read them.")
    parser.add_argument("--sentences", type=int, default=2000, help="How many of them, in batches.")
    parser.add_argument("--timed", type=int, default=300, help="How many of these one by one.")
    parser.add_argument("--draft_depths", type=int, nargs="+", default=[1, 2, 3, 4], help="Steps that draft.")
    parser.add_argument("--num_assistant_tokens", type=int, default=5, help="Most tokens of a draft.")
    parser.add_argument("--confidence", type=float, default=0.4, help="assistant_confidence_threshold.")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="Longest translation.")
    parser.add_argument("--batch_size", type=int, default=16, help="Sentences of a padded batch.")
    parser.add_argument("--workers", type=int, default=8, help="Threads that translate batches at once.")
    parser.add_argument("--threads", type=int, default=1, help="Threads of PyTorch.")
    return parser.parse_args()


class Counter:
    """Counts the calls of a decoder at its full depth."""

    def __init__(self, model: PreTrainedModel):
        self.passes, self.depth = 0, model.config.decoder_layers
        model.get_decoder().register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.passes += kwargs.get("decoder_depth") in (None, self.depth)


def generate(model: PreTrainedModel, inputs: BatchEncoding, options: dict[str, Any]) -> list[list[int]]:
    """The tokens of each translation of a batch, without start and padding."""
    output = model.generate(**inputs, **options)
    return [[token for token in row if token != model.config.pad_token_id] for row in output.tolist()]


def one_by_one(
    model: PreTrainedModel, inputs: Sequence[BatchEncoding], systems: dict[str, dict[str, Any]]
) -> dict[str, tuple[list[list[int]], float, int]]:
    """Each sentence by each system in turn: the translations, all seconds, and passes at full depth."""
    counter = Counter(model)
    found: dict[str, list[list[int]]] = {name: [] for name in systems}
    seconds, passes = dict.fromkeys(systems, 0.0), dict.fromkeys(systems, 0)
    for number, sentence in enumerate(inputs):
        for name in list(systems) if number % 2 else list(reversed(systems)):
            before, start = counter.passes, time.perf_counter()
            found[name] += generate(model, sentence, systems[name])
            seconds[name] += time.perf_counter() - start
            passes[name] += counter.passes - before
    return {name: (found[name], seconds[name], passes[name]) for name in systems}


def in_batches(
    model: PreTrainedModel, batches: Sequence[BatchEncoding], options: dict[str, Any], workers: int
) -> tuple[list[list[int]], float]:
    """All translations by several threads at once, and the seconds."""
    start = time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:
        results = list(pool.map(lambda batch: generate(model, batch, options), batches))
    return [row for rows in results for row in rows], time.perf_counter() - start


def same(ours: Sequence[list[int]], theirs: Sequence[list[int]]) -> str:
    return f"{sum(map(operator.eq, ours, theirs))} of {len(theirs)}"


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    model, tokenizer = load_translator(args.model)
    model.eval()
    plain = {"num_beams": 1, "max_length": args.max_new_tokens + 1}
    draft = {
        "num_assistant_tokens": args.num_assistant_tokens,
        "assistant_confidence_threshold": args.confidence,
    }
    systems = {"greedy": plain}
    systems |= {f"draft {depth}": {**plain, **draft, "draft_decoder_depth": depth} for depth in args.draft_depths}
    languages = {"source_lang": tokenizer.source_lang, "target_lang": tokenizer.target_lang}
    dataset = load_split(CorpusArguments(test_file=[args.test_file], **languages), "test")
    sentences = dataset["source"][: args.sentences]
    inputs = [tokenizer([sentence], return_tensors="pt") for sentence in sentences]
    batches = [
        tokenizer(sentences[start : start + args.batch_size], padding=True, return_tensors="pt")
        for start in range(0, len(sentences), args.batch_size)
    ]
    one_by_one(model, inputs[:SENTENCES_TO_WARM_UP], systems)
    alone = one_by_one(model, inputs[: args.timed], systems)
    together = {name: in_batches(model, batches, options, args.workers) for name, options in systems.items()}
    tokens = sum(map(len, alone["greedy"][0]))
    rows = []
    for name, (found, seconds, passes) in alone.items():
        batched, batched_seconds = together[name]
        row = {"search": name, "the same": same(found, alone["greedy"][0])}
        row |= {"tokens a pass at full depth": f"{tokens / passes:.2f}"}
        row |= {"ms a sentence": f"{1000 * seconds / len(found):.1f}"}
        row |= {"times as fast": f"{alone['greedy'][1] / seconds:.2f}"}
        row |= {"the same in batches": same(batched, together["greedy"][0])}
        rows.append(row | {"times as fast in batches": f"{together['greedy'][1] / batched_seconds:.2f}"})
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, {args.threads} thread(s); depth "
        f"{model.config.decoder_layers}; {len(inputs)} sentences in batches of {args.batch_size} by {args.workers} "
        f"threads at once, the first {args.timed} ({tokens} tokens) one by one"
    )
    print_table(rows)


if __name__ == "__main__":
    main()
