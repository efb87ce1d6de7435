"""Training step against depth: time, peak memory and parameters of recurrently stacked models and of stock Marian.

    python benchmarks/depth_scaling.py --plot depth_scaling.png

A step is forward, backward and AdamW on one batch of random sentences. Encoder and decoder are equally deep, RS has
one unique layer on each side. The systems of one depth take turns; the time is the median over rounds. Memory is what
the peak of a fresh process grows by while it does two steps, the model included, with a malloc that returns at once
what is freed (glibc's by default keeps far more than is in use). The plot needs matplotlib (the extra `plots`).
"""

import os
import statistics
from collections.abc import Callable
from typing import Any

import torch
from common import build, interleave, parse_args, peak_memory, report, run_twice, source_batch, training_step

SYSTEMS = ("RS 1xN", "RS 1xN, checkpointing", "Marian N")
# Read by glibc when a process starts: those that measure memory.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}


def make_step(system: str, depth: int, d_model: int, sentences: int, length: int, seed: int) -> Callable[[], None]:
    model = build(system, d_model, seed, depth).train()
    if system.endswith("checkpointing"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return training_step(model, source_batch(sentences, length, seed))


def print_growth(rows: list[dict[str, Any]], tokens: int) -> None:
    """How much memory a step costs, from the least to the greatest depth, in hidden states of the batch."""
    for d_model in dict.fromkeys(row["d_model"] for row in rows):
        for system in SYSTEMS:
            line = [row for row in rows if (row["d_model"], row["system"]) == (d_model, system)]
            steps = 2 * (line[-1]["depth"] - line[0]["depth"])
            if steps:
                mib = (line[-1]["peak MiB"] - line[0]["peak MiB"]) / steps
                states = mib * 2**20 / (tokens * d_model * 4)
                print(f"d_model {d_model}, {system}: {mib:.2f} MiB a step, {states:.2f} hidden states")


def plot(rows: list[dict[str, Any]], file: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    panels = {"ms": "training step, ms", "peak MiB": "peak memory, MiB", "parameters": "parameters"}
    for axes, (key, title) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for system, d_model in dict.fromkeys((row["system"], row["d_model"]) for row in rows):
            line = [row for row in rows if (row["system"], row["d_model"]) == (system, d_model)]
            points = [[row[axis] for row in line] for axis in ("depth", key)]
            axes.plot(*points, marker="o", markersize=3, label=f"{system}, d_model {d_model}")
        axes.set(xlabel="depth (encoder and decoder each)", ylabel=title)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    figure.savefig(file, dpi=150)


def main() -> None:
    args = parse_args(
        __doc__,
        d_model=[128],
        rounds=5,
        depths=(int, [6, 12, 24, 48, 96], "Depths of encoder and decoder."),
        sentences=(int, 32, "Sentence pairs a batch."),
        length=(int, 24, "Tokens a side."),
        plot=(str, None, "Where to draw the figures."),
    )
    torch.set_num_threads(args.threads)
    os.environ |= MALLOC
    rows = []
    for d_model in args.d_model:
        for depth in args.depths:
            shape = (depth, d_model, args.sentences, args.length, args.seed)
            steps = {system: make_step(system, *shape) for system in SYSTEMS}
            seconds = interleave(steps, args.rounds)
            del steps
            for system in SYSTEMS:
                rows.append(
                    {
                        "d_model": d_model,
                        "depth": depth,
                        "system": system,
                        "ms": round(1000 * statistics.median(seconds[system]), 1),
                        "peak MiB": round(peak_memory(run_twice, make_step, args.threads, system, *shape), 1),
                        "parameters": build(system, d_model, args.seed, depth).num_parameters(only_trainable=True),
                    }
                )
    report(rows, args, "RS has one unique layer a side")
    print_growth(rows, args.sentences * args.length)
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
