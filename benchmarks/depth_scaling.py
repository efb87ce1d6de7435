"""Training step against depth: time, peak memory and parameters of recurrently stacked models and of stock Marian.

    python benchmarks/depth_scaling.py --plot depth_scaling.png

A step is forward, backward and AdamW on one batch of random sentences. Encoder and decoder are equally deep, RS has
one unique layer on each side. The systems of one depth take turns; the time is the median over rounds. Memory is what
the peak of a fresh process grows by while it does two steps, the model included. The plot needs matplotlib (the extra
`plots`).
"""

import statistics
from collections.abc import Callable
from typing import Any

import torch
from common import build, interleave, parse_args, peak_memory, report, source_batch

SYSTEMS = ("RS 1xN", "RS 1xN, checkpointing", "Marian N")
Shape = tuple[int, int, int, int, int]  # depth, d_model, sentences, length, seed


def make_step(system: str, depth: int, d_model: int, sentences: int, length: int, seed: int) -> Callable[[], None]:
    model = build(system, d_model, seed, depth).train()
    if system.endswith("checkpointing"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    inputs = source_batch(sentences, length, seed)

    def step() -> None:
        model(**inputs, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def two_steps(threads: int, system: str, shape: Shape) -> None:
    torch.set_num_threads(threads)
    step = make_step(system, *shape)
    step()
    step()


def plot(rows: list[dict[str, Any]], file: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    panels = {"ms": "training step, ms", "peak MiB": "peak memory, MiB", "parameters": "parameters"}
    for axes, (key, title) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for system in SYSTEMS:
            line = [row for row in rows if row["system"] == system]
            points = [[row[axis] for row in line] for axis in ("depth", key)]
            axes.plot(*points, marker="o", markersize=3, label=system)
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
                        "peak MiB": round(peak_memory(two_steps, args.threads, system, shape), 1),
                        "parameters": build(system, d_model, args.seed, depth).num_parameters(only_trainable=True),
                    }
                )
    hidden_state = args.sentences * args.length * 4 / 2**20
    report(rows, args, f"a hidden state of the batch is d_model x {hidden_state:.6f} MiB")
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
