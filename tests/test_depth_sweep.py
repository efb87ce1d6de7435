"""`training/depth_sweep.py`: one checkpoint at many depths, and models fine-tuned at theirs, in one run."""

import json
import re
import sys

import pytest
from conftest import script
from oracle import unrolled_marian
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from rs_transformer import with_depth
from rs_transformer.commands import depth_sweep

LANGUAGES = ["--source_lang", "fw", "--target_lang", "bw"]
SEARCH = ["--num_beams", 1, "--max_new_tokens", 16]


def sweep(model, task, *options) -> None:
    script("depth_sweep")("--model_name_or_path", model, "--test_file", task["test"], *LANGUAGES, *SEARCH, *options)


def test_sweep_measures_every_depth_and_fine_tuned_models_beside(trained, task, tmp_path, capsys):
    shallow = tmp_path / "shallow"
    with_depth(AutoModelForSeq2SeqLM.from_pretrained(trained), decoder_layers=1).save_pretrained(shallow)
    AutoTokenizer.from_pretrained(trained).save_pretrained(shallow)
    depths = ["--encoder_depths", 1, 2, "--decoder_depths", 2, 1, "--finetuned", shallow, "--rounds", 2]
    files = ["--output_file", tmp_path / "sweep.json", "--plot_file", tmp_path / "sweep.svg"]
    sweep(trained, task, *depths, *files)
    printed = capsys.readouterr().out
    rows = json.loads((tmp_path / "sweep.json").read_text())
    measured = [(row["encoder_layers"], row["decoder_layers"]) for row in rows]
    assert measured == [(2, 2), (1, 2), (1, 1), (2, 1), (2, 1)]
    full, *_, cut, finetuned = rows
    assert full["bleu"] == json.loads((trained / "results.json").read_text())["test"]["bleu"]
    assert full["speedup"] == 1.0
    assert cut["bleu"] == finetuned["bleu"] < full["bleu"]
    assert (cut["system"], finetuned["system"]) == (str(trained), str(shallow))
    assert {row["parameters"] for row in rows} == {85504}
    assert all(len(row["rounds"]) == 2 and row["split"] == "test" for row in rows)
    assert f"| {trained} | 2 | 1 | {cut['bleu']:.2f} |" in re.sub(" +", " ", printed)
    assert full["bleu_signature"] in printed
    assert "test set, beam 1, 2 rounds" in printed
    assert "<svg" in (tmp_path / "sweep.svg").read_text()


def test_impossible_depths_and_models_are_named_before_anything_is_measured(trained, task, tmp_path, monkeypatch):
    monkeypatch.setattr(depth_sweep, "translate", lambda *args, **kwargs: pytest.fail("something was translated"))
    with pytest.raises(ValueError, match="decoder_layers must be at least 1, got 0"):
        sweep(trained, task, "--decoder_depths", 2, 0)
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        sweep(trained, task, "--rounds", 0)
    with pytest.raises(FileNotFoundError, match="output_file: there is no folder 'nowhere'"):
        sweep(trained, task, "--output_file", "nowhere/sweep.json")
    with pytest.raises(ValueError, match=r"plot_file: the suffix of 'sweep.txt' must be one of .*png"):
        sweep(trained, task, "--plot_file", "sweep.txt")
    unrolled_marian(AutoModelForSeq2SeqLM.from_pretrained(trained)).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(trained).save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="MarianMTModel is not recurrently stacked"):
        sweep(tmp_path, task)


def test_plot_without_matplotlib_says_what_to_install(trained, task, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"pip install .rs-transformer\[plots\]"):
        sweep(trained, task, "--plot_file", "sweep.png")
