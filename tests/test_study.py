"""The study's grid and table: what is run for a cell, in which order, and what is said of it."""

import gzip
import json
import sys

import pytest
import yaml
from conftest import ROOT
from sacrebleu.metrics import BLEU

from rs_transformer.utils.files import write_json

sys.path.insert(0, str(ROOT / "benchmarks" / "study"))
import corpora
import run
import table
import variants

SCORED = {"scores": {"one": {"bleu": 1.0}}}
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


def test_what_is_scored_is_made_again_only_where_a_cell_that_is_not_needs_its_model(study, monkeypatch):
    deep, tuned, student = (run.Cell(system, 2) for system in ("deep", "tuned", "student"))
    made = []
    monkeypatch.setattr(run, "is_finished", lambda folder: folder in made)
    runner = run.Runner(study, jobs=1, deadline=0)
    study.results.mkdir(parents=True)
    for cell in (deep, tuned):
        study.record(cell).touch()
    assert runner.missing([deep, tuned, student]) == [deep, tuned, student]
    made.append(study.model(tuned))
    assert runner.missing([deep, tuned, student]) == [student]
    study.record(student).touch()
    assert runner.missing([deep, tuned, student]) == []
    # What is given is made from nothing.
    given = run.Cell("deep", 1)
    assert runner.missing([given]) == [given]


def test_a_cell_whose_options_have_changed_since_it_was_begun_is_not_gone_on_with(study, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(run.Runner, "_call", lambda self, command, arguments, log: calls.append(command))
    monkeypatch.setattr(run.Runner, "score", lambda self, cell, commands, log: write_json(SCORED, study.record(cell)))
    study.results.mkdir(parents=True)
    runner, cell = run.Runner(study, jobs=1, deadline=0), run.Cell("tuned", 2)
    runner.make(cell)
    study.grid["systems"]["tuned"]["train"]["learning_rate"] = 0.2
    with pytest.raises(RuntimeError, match="tuned-2 was begun by other commands"):
        runner.make(cell)
    assert calls == ["train"]


def test_another_name_is_put_only_where_both_languages_have_it():
    assert variants.exchange_names(("トムだ。", "It's Tom."), ("ja", "en")) == ("ケンジだ。", "It's Kenji.")
    assert variants.exchange_names(("Das ist Tom.", "It's Tom."), ("de", "en")) == ("Das ist Tom.", "It's Tom.")


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


def test_a_grid_has_the_systems_of_its_base_on_its_own_corpus(study, tmp_path):
    grid = {
        "base": "grid.yaml",
        "name": "other",
        "corpus": "two",
        "source_lang": "en",
        "target_lang": "ja",
        "seeds": [3],
    }
    grid["tests"] = {"two": {"file": "{corpus}/{source_lang}.jsonl"}}
    grid["defaults"] = {"train": {"train_file": ["{data}/{corpus}/train.{source_lang}.jsonl"]}}
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(grid))
    (tmp_path / "data" / "two").mkdir()
    (tmp_path / "data" / "two" / "en.jsonl").write_text('{"translation": {"en": "Three.", "ja": "三。"}}\n')
    other = run.Study(tmp_path / "other.yaml", tmp_path / "data", tmp_path / "work", tmp_path / "results")
    assert [cell.name for cell in other.cells(["student"])] == ["deep-3", "tuned-3", "student-3"]
    (command,) = other.commands(run.Cell("deep", 3))
    assert command[2][:2] == ["--train_file", f"{other.data}/two/train.en.jsonl"]
    assert other.pairs("two") == (["Three."], ["三。"])


def test_lower_case_english_gets_the_case_that_its_words_mostly_have():
    text = ["I saw Mary in Tokyo.", "Yesterday I saw Mary.", "It was in May.", "May I? You may.", "You may go."]
    truecaser = corpora.Truecaser(text)
    cased = truecaser('"may i go?" mary  asked. mr. x. said: "you may, i\'m sure."')
    assert cased == '"May I go?" Mary  asked. Mr. x. Said: "you may, I\'m sure."'


def test_what_is_held_out_has_no_side_in_the_training_set(monkeypatch):
    monkeypatch.setattr(corpora, "HELD_OUT", 20)
    rows = [(f"Word {n // 2}.", f"語{n // 3}。") for n in range(200)] + [("WORD 1.", "語1。")]
    train, test = corpora.held_out(rows)
    assert len(test) == 20
    assert set(test) <= set(rows)
    for side in (0, 1):
        assert {pair[side].lower() for pair in train}.isdisjoint(pair[side].lower() for pair in test)


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
