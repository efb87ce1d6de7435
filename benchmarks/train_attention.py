"""A training step with eager attention against PyTorch's fused one (`sdpa`), by length and precision, on a CPU.

    python benchmarks/train_attention.py

A step is forward, backward and AdamW of RS 1x6 on one batch of random sentences, interleaved in one process. Medians
of the rounds, and the median of the rounds' ratios.
"""

import statistics

import torch
from common import build, interleave, parse_args, report, source_batch, training_step

IMPLEMENTATIONS = ("eager", "sdpa")


def main() -> None:
    args = parse_args(
        __doc__,
        d_model=(int, [256], "Widths; ffn is four times it."),
        lengths=(int, [12, 24, 48, 128, 256], "Tokens a side."),
        tokens=(int, 2048, "Tokens a side of a batch."),
        rounds=7,
    )
    torch.set_num_threads(args.threads)
    rows = []
    for d_model in args.d_model:
        for precision in (torch.bfloat16, torch.float32):
            for length in args.lengths:
                batch, steps = source_batch(args.tokens // length, length, args.seed), {}
                for implementation in IMPLEMENTATIONS:
                    model = build("RS 1x6", d_model, args.seed).train()
                    model.set_attn_implementation(implementation)
                    steps[implementation] = training_step(model, batch)
                with torch.autocast("cpu", precision, enabled=precision == torch.bfloat16):
                    seconds = interleave(steps, args.rounds)
                ratios = [
                    sdpa / eager for eager, sdpa in zip(*(seconds[name] for name in IMPLEMENTATIONS), strict=True)
                ]
                figures = {f"{name} ms": round(1000 * statistics.median(seconds[name]), 1) for name in IMPLEMENTATIONS}
                row = {"d_model": d_model, "precision": str(precision).removeprefix("torch."), "length": length}
                rows.append(row | figures | {"ratio": round(statistics.median(ratios), 2)})
    report(rows, args, ratio="sdpa / eager")


if __name__ == "__main__":
    main()
