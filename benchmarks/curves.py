"""Learning curves of training runs side by side: validation BLEU and loss by epoch, as a table and a plot.

    python benchmarks/curves.py runs/tanaka_vanilla6 runs/tanaka_rs6 --plot curves.png
    python benchmarks/curves.py runs/depth48 runs/depth96 --training_loss 20    # by update, each the mean of 20

The plot needs matplotlib (the extra `plots`).
"""

import argparse
import json
from pathlib import Path

from rs_transformer.utils.tables import markdown_table


def evaluations(run: str) -> dict[float, dict[str, float]]:
    """The validation figures of a run by epoch."""
    state = json.loads(Path(run, "trainer_state.json").read_text())
    return {round(entry["epoch"], 2): entry for entry in state["log_history"] if "eval_bleu" in entry}


def print_training_loss(runs: list[str], updates: int) -> None:
    """The training loss, averaged over so many updates, beside each other."""
    columns = {}
    for run in runs:
        means: dict[int, list[float]] = {}
        for entry in json.loads(Path(run, "trainer_state.json").read_text())["log_history"]:
            if "loss" in entry:
                means.setdefault(-(-entry["step"] // updates) * updates, []).append(entry["loss"])
        columns[Path(run).name] = {step: sum(losses) / len(losses) for step, losses in means.items()}
    rows = []
    for step in sorted(set().union(*columns.values())):
        rows.append([step, *(f"{column[step]:.3f}" if step in column else "" for column in columns.values())])
    print(markdown_table(["updates", *columns], rows))


def print_table(curves: dict[str, dict[float, dict[str, float]]]) -> None:
    rows = []
    for epoch in sorted(set().union(*curves.values())):
        cells = [f"{epoch:g}"]
        for curve in curves.values():
            entry = curve.get(epoch)
            cells += [f"{entry['eval_bleu']:.1f}", f"{entry['eval_loss']:.3f}"] if entry else ["", ""]
        rows.append(cells)
    header = ["epoch", *(f"{name} {what}" for name in curves for what in ("BLEU", "loss"))]
    print(markdown_table(header, rows))


def print_results(runs: list[str]) -> None:
    for run in runs:
        results = json.loads(Path(run, "results.json").read_text())
        for split in ("validation", "test"):
            scores = results[split]
            print(f"{Path(run).name} {split}: BLEU {scores['bleu']:.2f}, chrF {scores['chrf']:.2f}", end=", ")
            print(f"beam {scores['num_beams']}")
        training = results["training"]
        print(f"{Path(run).name}: {training['updates']} updates, {training['train_seconds'] / 60:.0f} min")
    print(scores["bleu_signature"], scores["chrf_signature"], sep="\n")


def plot(curves: dict[str, dict[float, dict[str, float]]], file: str) -> None:
    import matplotlib.pyplot as plt

    plt.rc("text", parse_math=False)  # names of folders are no formulas
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for axis, key, title in zip(axes, ("eval_bleu", "eval_loss"), ("BLEU", "cross-entropy"), strict=True):
        for name, curve in curves.items():
            axis.plot(list(curve), [entry[key] for entry in curve.values()], marker="o", markersize=3, label=name)
        axis.set(xlabel="epoch", ylabel=f"validation {title}")
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="Run folders of training/train.py.")
    parser.add_argument("--plot", help="Where to draw the curves.")
    parser.add_argument(
        "--training_loss", type=int, metavar="N", help="Print the training loss by N updates instead, and no more."
    )
    args = parser.parse_args()
    if args.training_loss:
        print_training_loss(args.runs, args.training_loss)
        return
    curves = {Path(run).name: evaluations(run) for run in args.runs}
    print_table(curves)
    print()
    print_results(args.runs)
    if args.plot:
        plot(curves, args.plot)


if __name__ == "__main__":
    main()
