"""Time and memory of a training step: RS 1x6 against stock Marian with 6 layers, interleaved in one process.

    python benchmarks/train_step.py

A step is forward, backward and AdamW on one batch of random sentences. The time is the median over rounds, the ratio
the median of the rounds' ratios; peak memory is that of a fresh process for each system.
"""

from collections.abc import Callable

import torch
from common import (
    SYSTEMS,
    build,
    interleave,
    parse_args,
    peak_memory,
    report,
    row,
    run_twice,
    source_batch,
    training_step,
)


def make_step(system: str, d_model: int, sentences: int, length: int, seed: int) -> Callable[[], None]:
    model = build(system, d_model, seed).train()
    return training_step(model, source_batch(sentences, length, seed))


def main() -> None:
    args = parse_args(__doc__, sentences=(int, 32, "Sentence pairs a batch."), length=(int, 24, "Tokens a side."))
    torch.set_num_threads(args.threads)
    rows = []
    for d_model in args.d_model:
        shape = (args.sentences, args.length, args.seed)
        steps = {system: make_step(system, d_model, *shape) for system in SYSTEMS}
        seconds = interleave(steps, args.rounds)
        memory = {
            system: peak_memory(run_twice, make_step, args.threads, system, d_model, *shape) for system in SYSTEMS
        }
        rows.append(row(d_model, "training step", seconds, memory))
    report(rows, args)


if __name__ == "__main__":
    main()
