"""Training and decoding on one GPU: RS 1x6 against stock Marian with 6 layers, in turns in one process.

    python benchmarks/gpu.py --output gpu.json

Random weights and sentences. Training is forward, backward and AdamW in bfloat16 by autocast; decoding is greedy, in
half precision, every translation forced to the same number of tokens. Medians over rounds, and the median of the
rounds' ratios; peak memory is the allocator's.
"""

import statistics
from collections.abc import Callable
from typing import Any

import torch
from common import SYSTEMS, build, interleave, parse_args, report, source_batch, training_step


def make_training(system: str, d_model: int, vocabulary: int, sentences: int, length: int, seed: int) -> Callable:
    inputs = {name: tensor.cuda() for name, tensor in source_batch(sentences, length, seed).items()}
    step = training_step(build(system, d_model, seed, vocab_size=vocabulary).cuda().train(), inputs)

    def timed() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            step()
        torch.cuda.synchronize()

    return timed


def make_decoding(system: str, d_model: int, vocabulary: int, sentences: int, length: int, seed: int) -> Callable:
    inputs = {name: tensor.cuda() for name, tensor in source_batch(sentences, length, seed).items()}
    del inputs["labels"]
    model = build(system, d_model, seed, vocab_size=vocabulary).cuda().half().eval()

    def timed() -> None:
        model.generate(**inputs, num_beams=1, min_new_tokens=length, max_new_tokens=length)
        torch.cuda.synchronize()

    return timed


def peak(make: Callable, *shape: Any) -> float:
    """MiB that building a model and two of its steps allocate at most."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step = make(*shape)
    step()
    step()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def main() -> None:
    args = parse_args(
        __doc__,
        d_model=[512],
        sentences=(int, 128, "Sentence pairs a batch."),
        length=(int, 32, "Tokens a side."),
        vocabulary=(int, 32000, "Entries of the vocabulary."),
    )
    rows = []
    for d_model in args.d_model:
        shape = (d_model, args.vocabulary, args.sentences, args.length, args.seed)
        for what, make in (("training", make_training), ("decoding", make_decoding)):
            memory = {system: peak(make, system, *shape) for system in SYSTEMS}
            seconds = interleave({system: make(system, *shape) for system in SYSTEMS}, args.rounds)
            ratios = [one / other for one, other in zip(*(seconds[system] for system in SYSTEMS), strict=True)]
            work = args.sentences * (args.length if what == "training" else 1)
            figures: dict[str, Any] = {"d_model": d_model, "what": what}
            for system in SYSTEMS:
                figures[f"{system} a second"] = round(work / statistics.median(seconds[system]))
                figures[f"{system} MiB"] = round(memory[system])
            rows.append(figures | {"time ratio": round(statistics.median(ratios), 3)})
    print(f"{torch.cuda.get_device_name()}; target tokens a second in training, sentences a second in decoding")
    report(rows, args)


if __name__ == "__main__":
    main()
