"""Time and memory of translation: RS 1x6 against stock Marian with 6 layers, interleaved in one process.

    python benchmarks/generate.py

Greedy and beam search at batch 1 and 16. The weights are random, which is fair for speed since every translation is
forced to the same number of tokens. Medians and ratios as in train_step.py.
"""

from collections.abc import Callable

import torch
from common import SYSTEMS, build, interleave, parse_args, peak_memory, report, row, source_batch
from transformers import PreTrainedModel

CASES = ((1, 1), (1, 4), (16, 1), (16, 4))


def make_step(
    model: PreTrainedModel, sentences: int, num_beams: int, length: int, new_tokens: int, seed: int
) -> Callable[[], None]:
    model.eval()
    inputs = source_batch(sentences, length, seed)
    del inputs["labels"]

    def step() -> None:
        model.generate(**inputs, num_beams=num_beams, min_new_tokens=new_tokens, max_new_tokens=new_tokens)

    return step


def one_step(threads: int, system: str, d_model: int, *shape: int) -> None:
    torch.set_num_threads(threads)
    make_step(build(system, d_model, shape[-1]), *shape)()


def main() -> None:
    args = parse_args(
        __doc__, length=(int, 24, "Tokens of a source."), new_tokens=(int, 24, "Tokens of every translation.")
    )
    torch.set_num_threads(args.threads)
    rows = []
    for d_model in args.d_model:
        for sentences, num_beams in CASES:
            shape = (sentences, num_beams, args.length, args.new_tokens, args.seed)
            steps = {system: make_step(build(system, d_model, args.seed), *shape) for system in SYSTEMS}
            seconds = interleave(steps, args.rounds)
            memory = {system: peak_memory(one_step, args.threads, system, d_model, *shape) for system in SYSTEMS}
            rows.append(row(d_model, f"batch {sentences}, beam {num_beams}", seconds, memory))
    report(rows, args)


if __name__ == "__main__":
    main()
