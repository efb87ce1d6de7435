"""Speed of greedy decoding by decoder depth: one RS model whose decoder layer is applied 6, 3, 2 and 1 times.

    python benchmarks/decoder_depth.py

The depths take turns in one process. The weights are random, which is fair for speed since every translation is
forced to the same number of tokens. Medians; a speed-up is the median of the rounds' ratios to depth 6.
"""

import statistics
from typing import Any

import torch
from common import build, interleave, parse_args, report
from generate import make_step

from rs_transformer import with_depth

DEPTHS = (6, 3, 2, 1)
BATCHES = (1, 16)


def measure(d_model: int, sentences: int, length: int, new_tokens: int, rounds: int, seed: int) -> dict[str, Any]:
    """Milliseconds of a batch at each decoder depth, and the speed-ups."""
    model = build("RS 1x6", d_model, seed)
    steps = {
        str(depth): make_step(with_depth(model, decoder_layers=depth), sentences, 1, length, new_tokens, seed)
        for depth in DEPTHS
    }
    seconds = interleave(steps, rounds)
    figures: dict[str, Any] = {"d_model": d_model, "batch": sentences}
    figures |= {f"depth {depth} ms": round(1000 * statistics.median(seconds[depth]), 1) for depth in seconds}
    for depth in list(seconds)[1:]:
        ratios = [full / shallow for full, shallow in zip(seconds[str(DEPTHS[0])], seconds[depth], strict=True)]
        figures[f"speed-up {depth}"] = round(statistics.median(ratios), 2)
    return figures


def main() -> None:
    args = parse_args(
        __doc__, length=(int, 24, "Tokens of a source."), new_tokens=(int, 24, "Tokens of every translation.")
    )
    torch.set_num_threads(args.threads)
    rows = [
        measure(d_model, sentences, args.length, args.new_tokens, args.rounds, args.seed)
        for d_model in args.d_model
        for sentences in BATCHES
    ]
    report(rows, args, ratio="depth 6 / depth")


if __name__ == "__main__":
    main()
