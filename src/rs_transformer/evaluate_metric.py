"""BLEU and chrF as a metric of the `evaluate` library, for programs that take their metrics from there.

A module of its own because scripts in a folder that holds an `evaluate.py`, as `training/` does, cannot import that
library. `evaluate.load` takes the path of this file; `evaluate.load("sacrebleu")` needs the network.
"""

from typing import Any

import datasets
import evaluate

from rs_transformer.metrics import corpus_scores


class TranslationMetric(evaluate.Metric):
    """`corpus_scores` as an `evaluate` metric; `evaluate.load("sacrebleu")` needs the network.

    >>> TranslationMetric().compute(predictions=["a b c d"], references=["a b c d"])["bleu"]
    100.00000000000004
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Corpus BLEU and chrF of sacreBLEU, with signatures.",
            citation="Post (2018), https://aclanthology.org/W18-6319",
            inputs_description="predictions and references: lists of strings; target_lang: chooses the tokeniser.",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(
        self, predictions: list[str], references: list[str], target_lang: str | None = None
    ) -> dict[str, Any]:
        return corpus_scores(predictions, references, target_lang)
