"""BLEU and chrF with their sacreBLEU signatures, and the paired bootstrap; all of it works offline."""

from collections.abc import Mapping, Sequence
from typing import Any

from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.significance import PairedTest

from .pipeline_rs_marian import is_written_without_blanks, split_code

# What sacreBLEU's default tokeniser cannot split: Japanese and the languages of China, in their own scripts.
BLEU_TOKENIZERS = {"ja": "ja-mecab", **dict.fromkeys(("zh", "yue", "wuu", "gan", "hak", "hsn", "lzh"), "zh")}


def bleu_tokenizer(target_lang: str | None) -> str:
    """The sacreBLEU tokeniser for a target language: `ja-mecab` for Japanese, `zh` for Chinese, else `13a`.

    The language may be named by any of its codes: `ja`, `jpn_Jpan`, `jap`, `zh_CN`, `cmn_Hans`, `yue`.
    """
    if not is_written_without_blanks(target_lang):
        return "13a"
    return BLEU_TOKENIZERS.get(split_code(target_lang)[0], "13a")


def corpus_scores(
    predictions: Sequence[str], references: Sequence[str], target_lang: str | None = None
) -> dict[str, Any]:
    """Corpus BLEU and chrF (chrF2) with signatures, one reference a sentence.

    Returns:
        `bleu` and `chrf` (0 … 100), `bleu_signature`, `chrf_signature`.

    Raises:
        ValueError: the numbers of predictions and references differ, or there are none.
    """
    if len(predictions) != len(references) or not len(references):
        raise ValueError(
            f"scoring needs as many predictions as references, at least one: got {len(predictions)} and "
            f"{len(references)}"
        )
    scores = {}
    for name, metric in (("bleu", BLEU(tokenize=bleu_tokenizer(target_lang))), ("chrf", CHRF())):
        scores[name] = metric.corpus_score(list(predictions), [list(references)]).score
        scores[f"{name}_signature"] = str(metric.get_signature())
    return scores


def sentence_chrf(predictions: Sequence[str], references: Sequence[str]) -> list[float]:
    """chrF (chrF2) of each sentence, 0 … 100; of equal ones 100, empty ones included."""
    metric = CHRF()
    pairs = zip(predictions, references, strict=True)
    return [100.0 if ours == theirs else metric.sentence_score(ours, [theirs]).score for ours, theirs in pairs]


def paired_bootstrap(
    systems: Mapping[str, Sequence[str]],
    references: Sequence[str],
    target_lang: str | None = None,
    n_samples: int = 1000,
) -> list[dict[str, Any]]:
    """Paired bootstrap resampling (Koehn 2004) of every system against the first, by sacreBLEU.

    The resampling seed is sacreBLEU's: 12345, or the environment variable SACREBLEU_SEED.

    Args:
        systems: name -> translations; the first is the baseline.
        references: one a sentence.
        n_samples: resamplings.

    Returns:
        One dict a system: `system`, and for `bleu` and `chrf` the score, the bootstrap's `_mean` and `_ci` (half the
        95% interval), the `_p` value against the baseline (`None` for itself) and the `_signature`.

    Raises:
        ValueError: fewer than two systems, or one of another length than the references.
    """
    if len(systems) < 2:
        raise ValueError(f"a paired bootstrap compares at least two systems, got {len(systems)}")
    for name, translations in systems.items():
        if len(translations) != len(references):
            raise ValueError(f"{name} has {len(translations)} translations for {len(references)} references")
    metrics = {
        "bleu": BLEU(tokenize=bleu_tokenizer(target_lang), references=[list(references)]),
        "chrf": CHRF(references=[list(references)]),
    }
    named_systems = [(name, list(translations)) for name, translations in systems.items()]
    test = PairedTest(named_systems, metrics, references=None, test_type="bs", n_samples=n_samples)
    signatures, results = test()
    # Keyed by sacreBLEU's own names of the metrics, in our order, behind the column of the systems' names.
    titles = dict(zip(metrics, (title for title in results if title != "System"), strict=True))
    rows = []
    for index, name in enumerate(systems):
        row: dict[str, Any] = {"system": name}
        for key, title in titles.items():
            result = results[title][index]
            row |= {key: result.score, f"{key}_mean": float(result.mean), f"{key}_ci": float(result.ci)}
            row[f"{key}_p"] = result.p_value
            row[f"{key}_signature"] = str(signatures[title])
            if index and named_systems[index][1] == named_systems[0][1]:
                row[f"{key}_p"] = 1.0  # sacreBLEU's count of larger differences gives its smallest p to equal systems
        rows.append(row)
    return rows
