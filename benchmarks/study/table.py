"""The table of a study: quality with intervals, size, and speed, from what `run.py` and `speed.py` have written.

    python benchmarks/study/table.py benchmarks/study/tanaka.yaml --metric bleu --reference vanilla6

Scores are means over the seeds that are there, with the standard deviation where there are several. The difference is
to the reference system, over the seeds that both have; its interval and p come from a paired bootstrap over the
sentences (Koehn 2004), in which each resample takes the same sentences from all seeds of both systems. `length` is
the translations' over the references': BLEU punishes what is shorter.
"""

import gzip
import json
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
from run import Cell, Study, parse
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.metrics.base import Metric

from rs_transformer.metrics import bleu_tokenizer
from rs_transformer.utils.tables import markdown_table

SAMPLES, SEED = 1000, 12345


class Precision(BLEU):
    """BLEU without its brevity penalty: how right what is said is, whatever is left out."""

    def _compute_score_from_stats(self, stats: list[int]) -> Any:
        result = super()._compute_score_from_stats(stats)
        result.score /= result.bp or 1.0
        return result


METRICS = {"bleu": "BLEU", "chrf": "chrF", "precision": "BLEU without brevity penalty"}


def make_metric(name: str, target_lang: str) -> Metric:
    """One of `METRICS`."""
    if name == "chrf":
        return CHRF()
    return (BLEU if name == "bleu" else Precision)(tokenize=bleu_tokenizer(target_lang))


def read_records(study: Study) -> dict[str, list[dict[str, Any]]]:
    """The records of each system that has any, by seed."""
    records: dict[str, list[dict[str, Any]]] = {}
    for system in study.grid["systems"]:
        files = [study.record(Cell(system, seed)) for seed in study.grid["seeds"]]
        found = [json.loads(file.read_text("utf-8")) for file in files if file.is_file()]
        if found:
            records[system] = found
    return records


class Bootstrap:
    """Paired bootstrap of systems with several seeds, on one test set and by one metric."""

    def __init__(self, study: Study, test: str, metric: Metric):
        self.study, self.test, self.metric = study, test, metric
        self.references = study.pairs(test)[1]
        draws = np.random.default_rng(SEED).integers(0, len(self.references), (SAMPLES, len(self.references)))
        self.counts = np.stack([np.bincount(draw, minlength=len(self.references)) for draw in draws])
        self.known: dict[Cell, tuple[float, np.ndarray]] = {}

    def translations(self, cell: Cell) -> list[str]:
        """What a cell has made of the test set."""
        packed = self.study.translations(cell, self.test).read_bytes()
        return gzip.decompress(packed).decode().split("\n")[:-1]

    def scores(self, cell: Cell) -> tuple[float, np.ndarray]:
        """The score of a cell, and those of the resamples."""
        if cell not in self.known:
            translations = self.translations(cell)
            # Of each sentence what the metric adds up over the corpus.
            parts = np.array(self.metric._extract_corpus_statistics(translations, [self.references]))
            sums = [parts.sum(axis=0), *(self.counts @ parts)]
            score, *resampled = (self.metric._compute_score_from_stats(row.tolist()).score for row in sums)
            self.known[cell] = (score, np.array(resampled))
        return self.known[cell]

    def difference(self, system: str, reference: str, seeds: Sequence[int]) -> tuple[float, float, float, float]:
        """Mean difference over the seeds, the bounds of its 95% interval, and the two-sided p."""
        pairs = [(self.scores(Cell(system, seed)), self.scores(Cell(reference, seed))) for seed in seeds]
        observed = statistics.mean(ours[0] - theirs[0] for ours, theirs in pairs)
        resampled = np.mean([ours[1] - theirs[1] for ours, theirs in pairs], axis=0)
        low, high = np.percentile(resampled, [2.5, 97.5])
        p = (1 + np.sum(np.abs(resampled - resampled.mean()) >= abs(observed))) / (1 + SAMPLES)
        return observed, float(low), float(high), float(p)


def rows_of(study: Study, metric_name: str) -> list[list[Any]]:
    """A row for each system, those with the best mean on the first test set at the top."""
    records = read_records(study)
    first, *others = study.grid["tests"]
    target_lang = study.grid["target_lang"]
    bootstrap = Bootstrap(study, first, make_metric(metric_name, target_lang))
    words = make_metric("bleu", target_lang)
    reference = study.grid["reference"]
    speeds: dict[str, Any] = {}
    if (file := study.results / "speed.json").is_file():
        speeds = json.loads(file.read_text("utf-8"))["systems"]

    def mean(system: str, test: str) -> str:
        values = [
            record["scores"][test][metric_name]
            if metric_name in record["scores"][test]
            else (bootstrap if test == first else Bootstrap(study, test, bootstrap.metric)).scores(
                Cell(system, record["seed"])
            )[0]
            for record in records[system]
        ]
        spread = f" ({statistics.stdev(values):.2f})" if len(values) > 1 else ""
        return f"{statistics.mean(values):.2f}{spread}"

    def length(system: str) -> str:
        scored = [
            words.corpus_score(bootstrap.translations(Cell(system, record["seed"])), [bootstrap.references])
            for record in records[system]
        ]
        return f"{sum(each.sys_len for each in scored) / sum(each.ref_len for each in scored):.3f}"

    rows = []
    for system in sorted(records, key=lambda name: -float(mean(name, first).split()[0])):
        seeds = [record["seed"] for record in records[system]]
        shared = [seed for seed in seeds if seed in [record["seed"] for record in records.get(reference, [])]]
        difference = p = ""
        if system != reference and shared:
            observed, low, high, value = bootstrap.difference(system, reference, shared)
            difference, p = f"{observed:+.2f} ({low:+.2f} to {high:+.2f})", f"{value:.3f}"
        parameters = records[system][0]["parameters"]
        speed = speeds.get(system, {})
        # A seed that was scored where CTranslate2 is not has none.
        sizes = [*(record["int8_bytes"] for record in records[system]), speed.get("int8_bytes")]
        size = next(filter(None, sizes), None)
        rows.append(
            [
                system,
                len(seeds),
                mean(system, first),
                difference,
                p,
                length(system),
                *(mean(system, test) for test in others),
                f"{parameters['total']:,}",
                f"{size / 1e6:.2f}" if size else "",
                *(speed.get(name, "") for name in ("single", "batch")),
            ]
        )
    return rows


def main() -> None:
    study, args = parse(
        metric=("bleu", [*METRICS], "What the systems are ranked by."),
        reference=("", None, "The system that the others are compared to; default: the grid's."),
    )
    study.grid["reference"] = args.reference or study.grid["reference"]
    if study.grid["reference"] not in study.grid["systems"]:
        raise SystemExit(f"--reference: there is no system {args.reference!r} in the grid")
    first, *others = study.grid["tests"]
    header = ["system", "seeds", f"{METRICS[args.metric]} {first}", f"to {study.grid['reference']} (95%)", "p"]
    header += ["length", *others]
    header += ["parameters", "int8 MB", "single/s", "in batches/s"]
    rows = rows_of(study, args.metric)
    print(markdown_table(header, rows))
    scores = next(iter(read_records(study).values()))[0]["scores"]
    counts = ", ".join(f"{test} {row['sentences']:,} sentences" for test, row in scores.items())
    print(
        f"{counts}; beam {scores[first]['num_beams']}, "
        f"at most {scores[first]['max_new_tokens']} tokens; "
        f"{scores[first]['chrf_signature' if args.metric == 'chrf' else 'bleu_signature']}"
    )


if __name__ == "__main__":
    main()
