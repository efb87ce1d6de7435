"""What each claim is worth on each corpus: differences of systems over all studies, as a table and a plot.

    python benchmarks/study/claims.py --data data --study_data data/study --plot docs/claims.png

From what `run.py` has written, on each study's first test set, over the seeds that both systems have. Intervals are
those of `table.py`, over sentences; where both systems have several seeds, a second list has those over trainings, by
Welch's t-test (SciPy). Where a study has not both systems, or its test set is not there, the cell is empty. The plot
needs matplotlib (extra `plots`).
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

from run import RESULTS, Cell, Study
from table import METRICS, Bootstrap, make_metric, read_records

from rs_transformer.utils.tables import markdown_table

HERE = Path(__file__).resolve().parent
# Of each study the corpus, as the pages call it, and which of the two folders has it.
STUDIES = {
    "tanaka": ("excerpt", "data"),
    "everyday": ("everyday", "study_data"),
    "documentation": ("documentation", "study_data"),
    "interface": ("interface", "study_data"),
}
# What is compared: a system and another, which is taken off; of several pairs the first counts that a study has. A
# student is transferred, taught, and has two decoder steps.
CLAIMS = {
    "RS 1x6 − vanilla 6": [("rs6", "vanilla6_again"), ("rs6", "vanilla6")],
    "RS 1x6, norms and biases of the steps' own, − vanilla 6": [("rs6_own", "vanilla6")],
    "RS 1x6 − vanilla 1": [("rs6", "vanilla1")],
    "RS 1x6, norms and biases of the steps' own, − vanilla 1": [("rs6_own", "vanilla1")],
    "wide RS 1x6 − vanilla 6 of its size": [("wide_rs6", "vanilla6")],
    "RS 12-2 − RS 6-6": [("rs12_2_grown", "rs6"), ("rs12_2", "rs6")],
    "RS 12-2 − RS 6-2": [("rs12_2", "rs6_2")],
    "RS 24-2 − RS 6-2": [("rs24_2", "rs6_2")],
    "RS 6-6 − RS 6-2": [("rs6", "rs6_2")],
    "transferred RS − RS trained directly": [("collapsed", "rs6"), ("collapsed_own", "rs6_own")],
    "transferred RS − vanilla 6": [("collapsed", "vanilla6"), ("collapsed_own", "vanilla6")],
    "student − its parent, vanilla 6": [
        ("distilled_decoder2", "vanilla6"),
        ("student2", "vanilla6"),
        ("compressed_16k", "vanilla6_16k"),
        ("student2_brief", "vanilla6_again"),
    ],
    "student, taught three times as long, − its parent": [("student2_long", "vanilla6_again")],
    "student − its own shape, trained directly": [("student2", "rs6_2"), ("compressed", "rs6_2")],
    "RS 1x6 − narrow vanilla 6 of its size, both trained directly": [("rs6", "narrow6")],
    "RS 1x6, norms and biases of the steps' own, − the same": [("rs6_own", "narrow6")],
    "student − narrow vanilla 6 of its size, trained directly": [
        ("distilled_decoder2", "narrow6"),
        ("student2", "narrow6"),
        ("compressed", "narrow6"),
        ("student2_brief", "narrow6"),
    ],
    "student − narrow vanilla 6, taught in as many updates": [
        ("distilled_own", "distilled_narrow6"),
        ("compressed_16k", "taught_narrow_16k"),
        ("student2_brief", "taught_narrow6_brief"),
    ],
    "student − narrow vanilla 6, taught three times as long": [("student2_brief", "taught_narrow6_long")],
    "the same, both taught so long": [("student2_long", "taught_narrow6_long")],
    "student − vanilla 6-2, taught": [
        ("distilled_decoder2", "distilled_vanilla6_2"),
        ("compressed_16k", "taught_vanilla6_2_16k"),
    ],
}


@dataclass(frozen=True)
class Difference:
    """A mean over seeds, its 95% interval over sentences, the two systems, whether one device trained both, and the
    scores of their seeds."""

    mean: float
    low: float
    high: float
    seeds: int
    systems: tuple[str, str]
    same_device: bool
    scores: tuple[list[float], list[float]]

    def __str__(self) -> str:
        several = f", {self.seeds} seeds" if self.seeds > 1 else ""
        mark = "" if self.same_device else " †"
        return f"{self.mean:+.2f} ({self.low:+.2f} to {self.high:+.2f}{several}){mark}"

    def over_trainings(self) -> tuple[float, float]:
        """The 95% interval of Welch's t-test over the seeds."""
        from scipy.stats import ttest_ind

        return ttest_ind(*self.scores, equal_var=False).confidence_interval()


def differences(study: Study, metric_name: str) -> dict[str, Difference]:
    """For each claim that a study has both systems of; of a study whose test set is not there none."""
    records, test = read_records(study), next(iter(study.grid["tests"]))
    try:
        bootstrap = Bootstrap(study, test, make_metric(metric_name, study.grid["target_lang"]))
    except FileNotFoundError as error:
        print(f"{study.grid['name']} is left out: {error}\n")
        return {}
    found = {}
    for claim, comparisons in CLAIMS.items():
        for system, reference in comparisons:
            ours, theirs = (
                {record["seed"]: record for record in records.get(name, [])} for name in (system, reference)
            )
            if shared := sorted(ours.keys() & theirs.keys()):
                bounds = bootstrap.difference(system, reference, shared)[:3]
                alike = all(ours[seed]["device"] == theirs[seed]["device"] for seed in shared)
                scores = tuple(
                    [bootstrap.scores(Cell(name, seed))[0] for seed in shared] for name in (system, reference)
                )
                found[claim] = Difference(*bounds, len(shared), (system, reference), alike, scores)
                break
    return found


def plot(found: dict[str, dict[str, Difference]], file: str) -> None:
    """A line for each claim, a mark and its interval for each corpus."""
    import matplotlib.pyplot as plt

    claims = [claim for claim in CLAIMS if any(claim in rows for rows in found.values())]
    figure, axes = plt.subplots(figsize=(10, 6.5), layout="constrained")
    axes.axvline(0, color="0.6", linewidth=1)
    for number, (corpus, rows) in enumerate(found.items()):
        places = [place for place, claim in enumerate(claims) if claim in rows]
        drawn = [rows[claims[place]] for place in places]
        errors = [[each.mean - each.low for each in drawn], [each.high - each.mean for each in drawn]]
        offset = 0.15 * (number - (len(found) - 1) / 2)
        means, heights = [each.mean for each in drawn], [place + offset for place in places]
        axes.errorbar(means, heights, xerr=errors, fmt="o", capsize=2, label=corpus)
    axes.set_yticks(range(len(claims)), claims)
    axes.invert_yaxis()
    axes.set_xlabel("difference in BLEU (right: the first one is better), 95% over sentences")
    figure.legend(loc="outside upper center", ncols=len(found))  # where it hides no interval
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data", help="The folder of the corpora as they are.")
    parser.add_argument("--study_data", default="data/study", help="The folder that corpora.py has made.")
    parser.add_argument("--results", type=Path, default=RESULTS, help="Where the cells' records are.")
    parser.add_argument("--metric", default="bleu", choices=METRICS, help="What the systems are compared by.")
    parser.add_argument("--plot", help="Where to draw them, a PNG or SVG file.")
    args = parser.parse_args()
    found = {}
    for name, (corpus, folder) in STUDIES.items():
        study = Study(HERE / f"{name}.yaml", Path(getattr(args, folder)), Path("runs"), args.results)
        found[corpus] = differences(study, args.metric)
    rows = [[claim, *(str(measured.get(claim, "")) for measured in found.values())] for claim in CLAIMS]
    print(markdown_table([METRICS[args.metric], *found], rows))
    print("\n† trained on different devices. The systems, as the grids call them:\n")
    for claim in CLAIMS:
        pairs = {corpus: rows[claim].systems for corpus, rows in found.items() if claim in rows}
        names = (f"{' − '.join(systems)} ({corpus})" for corpus, systems in pairs.items())
        print(f"{claim}: {', '.join(names)}")
    print("\nWhere both have several seeds, 95% over trainings:\n")
    for corpus, measured in found.items():
        for claim, difference in measured.items():
            if difference.seeds > 1:
                low, high = difference.over_trainings()
                print(f"{claim} ({corpus}): {difference.mean:+.2f} ({low:+.2f} to {high:+.2f})")
    if args.plot:
        plot(found, args.plot)


if __name__ == "__main__":
    main()
