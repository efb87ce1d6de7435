"""Scores are sacreBLEU's own, with signatures, offline."""

import evaluate
import pytest
import sacrebleu
from conftest import ROOT

from rs_transformer.evaluate_metric import TranslationMetric
from rs_transformer.metrics import bleu_tokenizer, corpus_scores, paired_bootstrap

REFERENCES = ["the cat sat on the mat .", "a dog barked at the moon", "it rained all day long", "we left early"] * 15
GOOD = [line.replace("dog", "wolf") for line in REFERENCES]
BAD = [" ".join(reversed(line.split())) for line in REFERENCES]


def test_scores_and_signatures_are_sacrebleus():
    scores = corpus_scores(GOOD, REFERENCES, "en")
    assert scores["bleu"] == sacrebleu.corpus_bleu(GOOD, [REFERENCES]).score
    assert scores["chrf"] == sacrebleu.corpus_chrf(GOOD, [REFERENCES]).score
    version = sacrebleu.__version__
    assert scores["bleu_signature"] == f"nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:{version}"
    assert scores["chrf_signature"] == f"nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:{version}"


def test_japanese_is_scored_by_words():
    scores = corpus_scores(["猫がとても好きです。"] * 3, ["猫がとても好きだ。"] * 3, "ja")
    assert "tok:ja-mecab" in scores["bleu_signature"]
    assert 0 < scores["bleu"] < 100


@pytest.mark.parametrize(
    ("tokenizer", "codes"),
    {
        "ja-mecab": "ja jpn jap JA ja-JP ja_XX jpn_Jpan jpn_Hira >>jpn<<",
        "zh": "zh zho chi cmn zh_CN zh-TW zh-Hant-TW cmn_Hans zho_Hant ZH yue yue_Hant lzh",
        "13a": "en ENG en_XX eng_Latn de-AT th jpn_Latn cmn_Latn mul",
    }.items(),
)
def test_every_code_of_a_language_chooses_its_tokeniser(tokenizer, codes):
    assert {code: bleu_tokenizer(code) for code in codes.split()} == dict.fromkeys(codes.split(), tokenizer)
    assert bleu_tokenizer(None) == "13a"


def test_bootstrap_tells_a_worse_system_from_an_equal_one():
    systems = {"base": GOOD, "worse": BAD, "same": list(GOOD)}
    base, worse, same = paired_bootstrap(systems, REFERENCES, "en", n_samples=200)
    assert base["bleu"] == corpus_scores(GOOD, REFERENCES)["bleu"]
    assert base["bleu_p"] is None
    assert worse["bleu_p"] < 0.05
    assert worse["chrf_p"] < 0.05
    assert same["bleu_p"] == same["chrf_p"] == 1.0
    assert "bs:200|seed:12345" in base["bleu_signature"]


@pytest.mark.parametrize("systems", [{"a": GOOD}, {"a": GOOD, "b": GOOD[:-1]}], ids=["one-system", "lengths"])
def test_what_cannot_be_compared_is_refused(systems):
    with pytest.raises(ValueError, match=r"at least two systems|b has 59 translations for 60 references"):
        paired_bootstrap(systems, REFERENCES)


@pytest.mark.parametrize("predictions", [[], GOOD[:3]])
def test_what_cannot_be_scored_is_refused(predictions):
    with pytest.raises(ValueError, match=f"got {len(predictions)} and 60"):
        corpus_scores(predictions, REFERENCES)


def test_the_evaluate_library_takes_the_metric():
    expected = corpus_scores(GOOD, REFERENCES, "en")
    assert TranslationMetric().compute(predictions=GOOD, references=REFERENCES, target_lang="en") == expected
    loaded = evaluate.load(str(ROOT / "src" / "rs_transformer" / "evaluate_metric.py"))
    assert loaded.compute(predictions=GOOD, references=REFERENCES) == expected
