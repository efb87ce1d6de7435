"""Quality and speed of several models side by side, as a table and a plot, from what two scripts have written:

    SYSTEMS="runs/tanaka_vanilla6 runs/tanaka_rs6 …"        # the first is what the others are compared to
    python training/evaluate.py --systems $SYSTEMS … --output_file evaluation.json
    python training/depth_sweep.py --model_name_or_path runs/tanaka_vanilla6 --finetuned runs/tanaka_rs6 … \
        --num_beams 1 --decoding_max_tokens 1 --output_file speed.json
    python benchmarks/comparison.py evaluation.json speed.json --plot comparison.png

The plot needs matplotlib (the extra `plots`).
"""

import argparse
import json
from pathlib import Path
from typing import Any

from rs_transformer.utils.tables import markdown_table

Row = dict[str, Any]


def read(evaluation: str, speed: str) -> list[Row]:
    """The systems in the order of the evaluation, each with its speed; all must have been timed."""
    rows = json.loads(Path(evaluation).read_text())
    speeds = {row["system"]: row for row in json.loads(Path(speed).read_text())}
    if missing := [row["system"] for row in rows if row["system"] not in speeds]:
        raise SystemExit(f"{speed} has no {missing[0]}")
    fields = ("sentences_per_second", "speedup", "decoder_layers")
    return [row | {name: speeds[row["system"]][name] for name in fields} for row in rows]


def print_table(rows: list[Row]) -> None:
    header = "model", "BLEU", "chrF", "p (BLEU)", "parameters", "decoder depth", "single sentences/s", "speed-up"
    table = []
    for row in rows:
        bootstrap = row["bootstrap"]
        cells = [
            Path(row["system"]).name,
            f"{row['bleu']:.2f} ± {bootstrap['bleu_ci']:.1f}",
            f"{row['chrf']:.2f}",
            "" if bootstrap["bleu_p"] is None else f"{bootstrap['bleu_p']:.3f}",
            f"{row['parameters']:,}",
            row["decoder_layers"],
            f"{row['sentences_per_second']:.1f}",
            f"{row['speedup']:.2f}",
        ]
        table.append(cells)
    print(markdown_table(header, table))
    print(rows[0]["bootstrap"]["bleu_signature"], rows[0]["bootstrap"]["chrf_signature"], sep="\n")


def plot(rows: list[Row], file: str) -> None:
    """BLEU against sentences per second; marks as large as the model has parameters, bars of 95%."""
    import matplotlib.pyplot as plt

    plt.rc("text", parse_math=False)  # names of folders are no formulas
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    most = max(row["parameters"] for row in rows)
    for number, row in enumerate(rows):
        point = (row["sentences_per_second"], row["bleu"])
        axes.errorbar(*point, yerr=row["bootstrap"]["bleu_ci"], color="0.7", zorder=1)
        axes.scatter(*point, s=400 * row["parameters"] / most, zorder=2, alpha=0.8)
        label = Path(row["system"]).name.removeprefix("tanaka_")
        axes.annotate(label, point, xytext=(9, 4 if number % 2 else -11), textcoords="offset points", fontsize=8)
    axes.set_xlabel("sentences per second")
    axes.set_ylabel("BLEU, 95% interval")
    axes.set_title("Quality against speed; area: parameters")
    axes.margins(x=0.15)
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("evaluation", help="JSON of training/evaluate.py.")
    parser.add_argument("speed", help="JSON of training/depth_sweep.py.")
    parser.add_argument("--plot", help="Where to draw it.")
    args = parser.parse_args()
    rows = read(args.evaluation, args.speed)
    print_table(rows)
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
