"""The models in `hub_cards/`: complete, small, and as good as their cards say."""

import json
import re

import pytest
from conftest import ROOT, script
from forked import fork
from huggingface_hub import ModelCard

from rs_transformer.commands.publish import files_to_publish, lay_out
from rs_transformer.configuration_rs_marian import REMOTE_CODE_FILES
from rs_transformer.model_card import build_card, card_disagreements

HUB = ROOT / "hub_cards"
DATA = ROOT / "training" / "data"
# With the text that each is scored on, and the longest translation there.
MODELS = {
    "rs-marian-ja-en": (DATA / "tatoeba-test" / "test.jsonl", 128),
    "rs-marian-ja-en-tanaka": (DATA / "tanaka-excerpt" / "test.jsonl", 64),
    "rs-marian-ja-en-scratch": (DATA / "tanaka-excerpt" / "test.jsonl", 64),
    "marian-ja-en": (DATA / "tanaka-excerpt" / "test.jsonl", 64),
}


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
    assert "tok:13a" in card.text


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


@pytest.mark.parametrize("name", MODELS)
def test_evaluation_gives_the_scores_of_the_card(name, tmp_path):
    output, (test_file, longest) = tmp_path / "scores.json", MODELS[name]
    languages = ["--source_lang", "ja", "--target_lang", "en"]
    decoding = ["--num_beams", 5, "--max_new_tokens", longest]
    script("evaluate")(
        "--systems", f"hub_cards/{name}", *languages, "--test_file", test_file, *decoding, "--output_file", output
    )
    (measured,) = json.loads(output.read_text())
    said = {
        result.metric_type: result
        for result in ModelCard.load(HUB / name / "README.md").data.eval_results
        if result.dataset_split == "test"
    }
    for metric in ("bleu", "chrf"):
        # Another processor's kernels may break a tie otherwise, in a sentence or two.
        assert measured[metric] == pytest.approx(said[metric].metric_value, abs=0.1)
        assert measured[f"{metric}_signature"] == said[metric].metric_args["signature"]


@pytest.mark.parametrize("laid_out", [False, True], ids=["in-the-clone", "laid-out"])
def test_the_shipped_model_translates_from_its_own_source_as_its_card_shows(laid_out, tmp_path):
    """Without this package, as `trust_remote_code=True` loads it; where it lies, and in an empty place."""
    text = (HUB / "rs-marian-ja-en" / "README.md").read_text()
    (remote,) = (code for code in re.findall(r"```python\n(.+?)```", text, re.DOTALL) if "trust_remote_code" in code)
    if laid_out:
        lay_out(HUB / "rs-marian-ja-en", tmp_path / "hub_cards" / "rs-marian-ja-en", "org/rs-marian-ja-en")
    code = f"import sys; sys.modules['rs_transformer'] = None\n{remote}print(translator('猫が好きです。'))\n"
    done = fork("-c", code, cwd=tmp_path if laid_out else ROOT)
    assert done.stdout.strip().endswith("[{'translation_text': 'i like cats.'}]")
