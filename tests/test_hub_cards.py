"""The models in `hub_cards/`: complete, small, and as good as their cards say."""

import gzip
import json
import re

import pytest
from conftest import ROOT, script
from forked import fork
from huggingface_hub import ModelCard

from rs_transformer.checkpoints import load_translator
from rs_transformer.commands.publish import files_to_publish, lay_out
from rs_transformer.configuration_rs_marian import REMOTE_CODE_FILES
from rs_transformer.decoding import DecodingArguments, translate
from rs_transformer.model_card import build_card, card_disagreements

HUB = ROOT / "hub_cards"
DATA = ROOT / "training" / "data"
TANAKA = ["rs-marian-ja-en-tanaka", "rs-marian-ja-en-scratch", "marian-ja-en"]
# The cells of the study that the models of everyday sentences are.
EVERYDAY = {
    "rs-marian-ja-en": "everyday/compressed_robust_long-1",
    "rs-marian-en-ja": "everyday_en_ja/compressed_robust-1",
}
MODELS = [*EVERYDAY, *TANAKA]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    """The cards name their folders as they lie in a clone."""
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("name", MODELS)
def test_a_card_says_what_the_files_beside_it_say(name):
    card = ModelCard.load(HUB / name / "README.md")
    assert card.content.strip() == build_card(HUB / name, f"hub_cards/{name}").content.strip()
    assert card_disagreements(HUB / name) == []
    assert card.data.license
    assert f"tok:{'ja-mecab' if 'en-ja' in name else '13a'}" in card.text


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_holds_what_is_published_and_nothing_else(name):
    files = sorted(file.name for file in (HUB / name).iterdir())
    assert files == sorted(files_to_publish(HUB / name))
    assert sum((HUB / name / file).stat().st_size for file in files) < 12e6
    for file in (HUB / name).glob("*.[jy]*"):
        assert not re.search(r'["\s]/(tmp|home|root|work)/|"is_local"|"local_files_only"', file.read_text()), file


@pytest.mark.parametrize("name", MODELS)
def test_the_source_lies_here_once_and_leaves_as_files(name, tmp_path):
    lay_out(HUB / name, tmp_path / "laid out", f"org/{name}")
    for file in REMOTE_CODE_FILES:
        own = ROOT / "src" / "rs_transformer" / file
        assert (HUB / name / file).resolve() == own
        left = tmp_path / "laid out" / file
        assert left.read_text() == own.read_text()
        assert not left.is_symlink()


def check_scores(name, system, test_file, tmp_path, *decoding):
    """`evaluate` gives a system the scores that a model's card has of its test set."""
    output = tmp_path / "scores.json"
    files = ["--test_file", test_file, "--output_file", output]
    source_lang, target_lang = re.search(r"marian-(\w\w)-(\w\w)", name).groups()
    languages = ["--source_lang", source_lang, "--target_lang", target_lang]
    script("evaluate")("--systems", system, *languages, *files, *decoding)
    (measured,) = json.loads(output.read_text())
    said = {
        result.metric_type: result
        for result in ModelCard.load(HUB / name / "README.md").data.eval_results
        if result.dataset_split == "test" and "engine" not in result.metric_args
    }
    for metric in ("bleu", "chrf"):
        # Another processor's kernels may break a tie otherwise, in a sentence or two.
        assert measured[metric] == pytest.approx(said[metric].metric_value, abs=0.1)
        assert measured[f"{metric}_signature"] == said[metric].metric_args["signature"]


@pytest.mark.parametrize("name", TANAKA)
def test_evaluation_gives_the_scores_of_the_card(name, tmp_path):
    decoding = ["--num_beams", 5, "--max_new_tokens", 64]
    check_scores(name, f"hub_cards/{name}", DATA / "tanaka-excerpt" / "test.jsonl", tmp_path, *decoding)


@pytest.mark.parametrize(("name", "cell"), EVERYDAY.items())
def test_an_everyday_card_has_the_scores_of_the_translations_of_the_study_which_are_the_models(name, cell, tmp_path):
    test_file = DATA / "tatoeba-test" / "test.jsonl"
    packed = ROOT / f"benchmarks/results/study/{cell}.test.txt.gz"
    (tmp_path / "translations.txt").write_bytes(gzip.decompress(packed.read_bytes()))
    check_scores(name, tmp_path / "translations.txt", test_file, tmp_path)
    known = (tmp_path / "translations.txt").read_text("utf-8").splitlines()[:100]
    model, tokenizer = load_translator(str(HUB / name))
    pairs = [json.loads(line)["translation"] for line in test_file.read_text("utf-8").splitlines()[:100]]
    sources = [pair[tokenizer.source_lang] for pair in pairs]
    translations = translate(model, tokenizer, sources, DecodingArguments(num_beams=5, max_new_tokens=128))
    assert sum(map(str.__eq__, translations, known)) >= 97  # ties, likewise


@pytest.mark.parametrize("laid_out", [False, True], ids=["in-the-clone", "laid-out"])
def test_the_shipped_model_translates_from_its_own_source_as_its_card_shows(laid_out, tmp_path):
    """Without this package, as `trust_remote_code=True` loads it; where it lies, and in an empty place."""
    text = (HUB / "rs-marian-ja-en" / "README.md").read_text()
    (remote,) = (code for code in re.findall(r"```python\n(.+?)```", text, re.DOTALL) if "trust_remote_code" in code)
    if laid_out:
        lay_out(HUB / "rs-marian-ja-en", tmp_path / "hub_cards" / "rs-marian-ja-en", "org/rs-marian-ja-en")
    code = f"import sys; sys.modules['rs_transformer'] = None\n{remote}print(translator('猫が好きです。'))\n"
    done = fork("-c", code, cwd=tmp_path if laid_out else ROOT)
    assert done.stdout.strip().endswith("[{'translation_text': 'I like cats.'}]")
