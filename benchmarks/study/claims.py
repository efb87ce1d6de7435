"""What each claim is worth on each corpus: differences of systems over all studies, as a table and a plot.

    python benchmarks/study/claims.py --data data --study_data data/study --plot docs/claims.png

From what `run.py` has written, on each study's first test set, over the seeds that both systems have. Intervals are
those of `table.py`; where a study has not both systems the cell is empty. The plot needs matplotlib (extra `plots`).
"""

import argparse
from pathlib import Path

from run import RESULTS, Study
from sacrebleu.metrics import BLEU
from table import Bootstrap, read_records

from rs_transformer.metrics import bleu_tokenizer
from rs_transformer.utils.tables import markdown_table

HERE = Path(__file__).resolve().parent
# Of each study the corpus, as the pages call it, and which of the two folders has it.
STUDIES = {
    "tanaka": ("excerpt", "data"),
    "everyday": ("everyday", "study_data"),
    "documentation": ("documentation", "study_data"),
    "interface": ("interface", "study_data"),
}
# What is compared: pairs of a system and what it is compared to, of which the first counts that a study has.
CLAIMS = {
    "RS 1x6 to vanilla 6": [("rs6", "vanilla6")],
    "RS 1x6, norms and biases of the steps' own, to vanilla 6": [("rs6_own", "vanilla6")],
    "RS 1x6 to vanilla 1": [("rs6", "vanilla1"), ("rs6_own", "vanilla1")],
    "wide RS 1x6 to vanilla 6 of its size": [("wide_rs6", "vanilla6")],
    "RS 1x12 with two decoder steps to RS 1x6": [("rs12_2_grown", "rs6"), ("rs12_2", "rs6")],
    "the same to RS 1x6 with two": [("rs12_2", "rs6_2")],
    "RS 1x24 with two decoder steps to the same": [("rs24_2", "rs6_2")],
    "transferred to trained directly": [("collapsed", "rs6"), ("collapsed_own", "rs6_own")],
    "transferred to vanilla 6": [("collapsed", "vanilla6"), ("collapsed_own", "vanilla6")],
    "transferred, distilled, two decoder steps, to vanilla 6": [
        ("distilled_decoder2", "vanilla6"),
        ("distilled_own_decoder2", "vanilla6"),
        ("compressed", "vanilla6"),
        ("student2", "vanilla6"),
        ("student2_brief", "vanilla6_again"),
    ],
    "the same, to RS with two decoder steps, trained directly": [
        ("compressed", "rs6_2"),
        ("student2", "rs6_2"),
        ("student2_brief", "rs6_2"),
    ],
    "the same, to narrow vanilla 6 of its size, trained directly": [
        ("distilled_decoder2", "narrow6"),
        ("distilled_own_decoder2", "narrow6"),
        ("compressed", "narrow6"),
        ("student2", "narrow6"),
        ("student2_brief", "narrow6"),
    ],
    "RS 1x6 to narrow vanilla 6 of its size": [("rs6", "narrow6")],
    "RS 1x6, norms and biases of the steps' own, to the same": [("rs6_own", "narrow6")],
    "RS to narrow vanilla 6 of its size, both distilled": [
        ("distilled_own", "distilled_narrow6"),
        ("student2", "taught_narrow6"),
        ("student2_brief", "taught_narrow6_brief"),
        ("compressed_16k", "taught_narrow_16k"),
    ],
    "RS, two decoder steps, to vanilla 6-2, both distilled": [
        ("distilled_decoder2", "distilled_vanilla6_2"),
        ("distilled_own_decoder2", "distilled_vanilla6_2"),
    ],
}

Difference = tuple[float, float, float, int]


def differences(study: Study) -> dict[str, Difference]:
    """For each claim that a study has both systems of: difference, bounds of its 95% interval, number of seeds."""
    records = read_records(study)
    metric = BLEU(tokenize=bleu_tokenizer(study.grid["target_lang"]))
    bootstrap = Bootstrap(study, next(iter(study.grid["tests"])), metric)
    found = {}
    for claim, comparisons in CLAIMS.items():
        for system, reference in comparisons:
            seeds = [{record["seed"] for record in records.get(name, [])} for name in (system, reference)]
            if shared := sorted(set.intersection(*seeds)):
                found[claim] = (*bootstrap.difference(system, reference, shared)[:3], len(shared))
                break
    return found


def plot(found: dict[str, dict[str, Difference]], file: str) -> None:
    """A line for each claim, a mark and its interval for each corpus."""
    import matplotlib.pyplot as plt

    claims = [claim for claim in CLAIMS if any(claim in rows for rows in found.values())]
    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    axes.axvline(0, color="0.6", linewidth=1)
    for number, (corpus, rows) in enumerate(found.items()):
        places = [place for place, claim in enumerate(claims) if claim in rows]
        means, lows, highs, _ = zip(*(rows[claims[place]] for place in places), strict=True)
        errors = [[mean - low for mean, low in zip(means, lows, strict=True)]]
        errors.append([high - mean for mean, high in zip(means, highs, strict=True)])
        offset = 0.15 * (number - (len(found) - 1) / 2)
        axes.errorbar(means, [place + offset for place in places], xerr=errors, fmt="o", capsize=2, label=corpus)
    axes.set_yticks(range(len(claims)), claims)
    axes.invert_yaxis()
    axes.set_xlabel("BLEU, 95% intervals")
    figure.legend(loc="outside upper center", ncols=len(found))  # where it hides no interval
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data", help="The folder of the corpora as they are.")
    parser.add_argument("--study_data", default="data/study", help="The folder that corpora.py has made.")
    parser.add_argument("--results", type=Path, default=RESULTS, help="Where the cells' records are.")
    parser.add_argument("--plot", help="Where to draw them, a PNG or SVG file.")
    args = parser.parse_args()
    found = {}
    for name, (corpus, folder) in STUDIES.items():
        study = Study(HERE / f"{name}.yaml", Path(getattr(args, folder)), Path("runs"), args.results)
        found[corpus] = differences(study)
    rows = []
    for claim in CLAIMS:
        row = [claim]
        for measured in found.values():
            mean, low, high, seeds = measured.get(claim, (0.0, 0.0, 0.0, 0))
            several = f", {seeds} seeds" if seeds > 1 else ""
            row.append(f"{mean:+.2f} ({low:+.2f} to {high:+.2f}{several})" if seeds else "")
        rows.append(row)
    print(markdown_table(["BLEU", *found], rows))
    if args.plot:
        plot(found, args.plot)


if __name__ == "__main__":
    main()
