"""The study's grid and table: what is run for a cell, in which order, and what is said of it."""

import gzip
import json
import sys

import pytest
import yaml
from conftest import ROOT
from sacrebleu.metrics import BLEU

sys.path.insert(0, str(ROOT / "benchmarks" / "study"))
import run
import table

GRID = {
    "name": "task",
    "source_lang": "ja",
    "target_lang": "en",
    "reference": "deep",
    "seeds": [1, 2],
    "tests": {"one": {"file": "one/test.jsonl", "lowercase": True}},
    "defaults": {"train": {"recipe": "recipe.yaml", "train_file": ["{data}/train.jsonl"]}},
    "given": {"deep-1": "hub_cards/deep"},
    "systems": {
        "student": {"collapse": {"model_name_or_path": "{tuned}"}, "train": {"model_name_or_path": "{collapse}"}},
        "tuned": {"train": {"model_name_or_path": "{deep}", "learning_rate": 0.1}},
        "deep": {"train": {"encoder_layers": 6}},
    },
}


@pytest.fixture
def study(tmp_path) -> run.Study:
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(GRID, sort_keys=False))
    (tmp_path / "data" / "one").mkdir(parents=True)
    rows = [{"translation": {"ja": f"文{n}", "en": f"The sentence number {n} is here ."}} for n in range(40)]
    (tmp_path / "data" / "one" / "test.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return run.Study(tmp_path / "grid.yaml", tmp_path / "data", tmp_path / "work", tmp_path / "results")


def test_cells_come_after_all_that_they_are_made_from(study):
    names = [cell.name for cell in study.cells()]
    assert names == ["deep-1", "tuned-1", "student-1", "deep-2", "tuned-2", "student-2"]
    assert [cell.name for cell in study.cells(["student-2"])] == ["deep-2", "tuned-2", "student-2"]
    assert [cell.name for cell in study.cells(["deep"])] == ["deep-1", "deep-2"]


def test_commands_have_defaults_options_seed_and_the_folders_of_what_they_start_from(study):
    collapse, train = study.commands(run.Cell("student", 2))
    assert collapse[0] == "collapse"
    folders = [study.work / "student-2" / name for name in ("collapse", "train")]
    assert [collapse[1], train[1]] == folders
    assert collapse[2] == [
        *["--model_name_or_path", str(study.work / "tuned-2" / "train")],
        *["--seed", "2", "--output_dir", str(folders[0])],
    ]
    assert train[2] == [
        *[str(ROOT / "recipe.yaml"), "--train_file", f"{study.data}/train.jsonl"],
        *["--model_name_or_path", str(folders[0]), "--seed", "2", "--output_dir", str(folders[1])],
    ]
    (tuned,) = study.commands(run.Cell("tuned", 1))
    assert tuned[2][3:5] == ["--model_name_or_path", str(ROOT / "hub_cards/deep")]


def test_the_difference_is_that_of_the_means_and_its_interval_that_of_the_sentences(study):
    study.results.mkdir(parents=True)
    _, references = study.pairs("one")
    assert references[3] == "the sentence number 3 is here ."
    wrong = {"deep-1": 5, "deep-2": 9, "tuned-1": 20, "tuned-2": 24}  # translations without a right word
    for name, number in wrong.items():
        system, seed = name.rsplit("-", 1)
        lines = ["no word of it"] * number + references[number:]
        packed = gzip.compress("".join(f"{line}\n" for line in lines).encode())
        study.translations(run.Cell(system, int(seed)), "one").write_bytes(packed)
    bootstrap = table.Bootstrap(study, "one", BLEU())
    scores = {name: bootstrap.scores(run.Cell(name[:-2], int(name[-1])))[0] for name in wrong}
    for name, number in wrong.items():
        lines = ["no word of it"] * number + references[number:]
        assert scores[name] == pytest.approx(BLEU().corpus_score(lines, [references]).score)
    observed, low, high, p = bootstrap.difference("tuned", "deep", [1, 2])
    means = [(scores[f"{system}-1"] + scores[f"{system}-2"]) / 2 for system in ("tuned", "deep")]
    assert observed == pytest.approx(means[0] - means[1])
    assert low < observed < high < 0
    assert p < 0.01
    assert bootstrap.difference("deep", "deep", [1, 2]) == (0, 0, 0, 1)
