"""`training/attention.py`: figures, pictures and a page of one model or two; and what docs/attention.md shows."""

import json
import logging
import re
import shutil
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest
from conftest import ROOT, launch, script
from matplotlib.image import imread
from oracle import unrolled_marian
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from rs_transformer import attention_report
from rs_transformer.attention_analysis import KINDS, attention_statistics, collect_attention
from rs_transformer.attention_figures import draw_heads, draw_heads_mean, save_figure
from rs_transformer.corpus import CorpusArguments, load_split
from rs_transformer.decoding import load_translator
from rs_transformer.plotting import font_families

attention = script("attention")


@pytest.fixture(scope="module")
def expanded(trained, tmp_path_factory):
    """The trained model as a stock `MarianMTModel`."""
    folder = tmp_path_factory.mktemp("expanded") / "marian"
    unrolled_marian(AutoModelForSeq2SeqLM.from_pretrained(trained)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(trained).save_pretrained(folder)
    return folder


def test_two_models_on_a_dataset_give_figures_pictures_and_a_page(trained, expanded, task, tmp_path):
    options = ["--dataset", task["test"].parent, "--max_sentences", 40, "--pictured", 1, "--output_dir", tmp_path]
    printed = launch("attention.py", trained, expanded, *options, processes=2).stdout
    written = json.loads((tmp_path / "statistics.json").read_text())
    assert written["decoder"] == "reference"
    ours, marians = written["models"]["trained"], written["models"]["marian"]
    dataset = load_split(CorpusArguments("fw", "bw", test_file=[str(task["test"])]), "test").select(range(40))
    expected = attention_statistics(*load_translator(str(trained)), dataset["source"][:], dataset["target"][:])
    for table in ("by_head", "by_step"):
        for group, measures in expected.to_dict()[table].items():
            for name, estimate in measures.items():
                for bound, values in estimate.items():
                    for found in (ours, marians):
                        np.testing.assert_allclose(found[table][group][name][bound], values, atol=1e-4)
    entropy = expected.by_step["cross_attentions"]["entropy"]
    half_width = (entropy.high[0] - entropy.low[0]) / 2
    assert f"| cross-attention | entropy | trained | {entropy.mean[0]:.3f} ± {half_width:.3f} |" in printed
    assert "marian: 40 sentences measured in" in printed

    pictures = ["entropy_map", "steps", *(f"sentence1_{kind}{of}" for kind in KINDS for of in ("", "_heads"))]
    assert {file.stem for file in tmp_path.iterdir()} == {"attention", "statistics", *pictures}
    for name in pictures:
        assert imread(tmp_path / f"{name}.png")[..., :3].std() > 0.05  # not blank
        assert "<svg" in (tmp_path / f"{name}.svg").read_text()
    assert "normalised entropy" in (tmp_path / "entropy_map.svg").read_text()  # matplotlib notes texts as comments
    assert "</html>" in (tmp_path / "attention.html").read_text()


def test_sentences_of_ones_own_need_no_corpus(trained, tmp_path, capsys):
    attention(trained, "--text", "a b c", "d e", "--output_dir", tmp_path / "own", "--num_beams", 2)
    written = json.loads((tmp_path / "own" / "statistics.json").read_text())
    assert (written["decoder"], written["models"]["trained"]["sentences"]) == ("own translation", 2)
    assert (tmp_path / "own" / "sentence2_cross_attentions.png").is_file()
    forced = ["--text", "a b c", "--reference", "a a a"]
    attention(trained, *forced, "--output_dir", tmp_path / "forced")
    assert json.loads((tmp_path / "forced" / "statistics.json").read_text())["decoder"] == "reference"
    assert "nan" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--text", "a b", "--split", "test", "--dataset", "corpus"], "give text to look at, or a dataset"),
        ([], r"give text to look at, or a dataset \(test_file or dataset_name\)"),
        (["--text", "a b", "--reference", "b a", "--own_translation", "true"], "give one of the two options"),
        (["--reference", "b a", "--dataset", "corpus"], "reference belongs to text"),
        (["--dataset", "corpus", "--max_sentences", 0], "max_sentences must be at least 1, got 0"),
        (["--dataset", "corpus", "--pictured", -1], "pictured must be at least 0, got -1"),
        (["--text", "a b", " "], "sentence 2 is empty"),
        (["--text", "a b", "--source_lang", "bw", "--target_lang", "fw"], "translates from fw to bw"),
        (["--text", "a b", "--output_dir", ROOT / "Makefile"], "is a file"),
    ],
)
def test_bad_input_is_named_before_anything_is_measured(trained, monkeypatch, tmp_path, options, message):
    for name in ("collect_attention", "attention_statistics"):
        monkeypatch.setattr(attention_report, name, lambda *args, **kwargs: pytest.fail("something was measured"))
    with pytest.raises(ValueError, match=message):
        attention(trained, "--output_dir", tmp_path, *options)


def test_a_tokenizer_that_names_no_languages_serves_for_sentences_of_ones_own(trained, task, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "model")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["source_lang"], config["target_lang"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="sentence 2 is empty"):  # the languages were no obstacle
        attention(folder, "--output_dir", tmp_path, "--text", "a b", " ")
    with pytest.raises(ValueError, match="names no languages: give source_lang and target_lang"):
        attention(folder, "--output_dir", tmp_path, "--test_file", task["test"])


def test_models_are_one_or_two_different_ones(trained):
    for models in ([trained, trained], [trained, "b", "c"]):
        with pytest.raises(ValueError, match="one model or of two different ones"):
            attention(*models, "--text", "a b")


def test_without_matplotlib_it_says_what_to_install(trained, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"attention needs matplotlib: pip install .rs-transformer\[plots\]"):
        attention(trained, "--text", "a b")


def test_japanese_is_drawn_with_a_font_that_has_it(trained, tmp_path):
    (sentence,) = collect_attention(*load_translator(str(trained)), ["a b c"])
    tokens = ["猫が", "好き", "だ", "。", *["々"] * len(sentence.encoder_tokens)][: len(sentence.encoder_tokens)]
    japanese = replace(sentence, encoder_tokens=tokens)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Glyph .* missing")
        for draw in (draw_heads_mean, draw_heads):
            save_figure(draw({"a": japanese, "b": sentence}, "cross_attentions"), tmp_path / "picture")


def test_a_character_that_no_font_has_is_named_with_the_mend(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("rs_transformer"), "propagate", True)
    font_families(["\U0010fffd"])
    assert re.search("No installed font has \U0010fffd.*apt-get install fonts-noto-cjk", caplog.text)


def test_deep_and_shallow_models_are_drawn_together(trained, tmp_path):
    model, tokenizer = load_translator(str(trained))
    deep = AutoModelForSeq2SeqLM.from_pretrained(trained, decoder_layers=13).eval()
    pair = {name: collect_attention(m, tokenizer, ["a b"], ["b a"])[0] for name, m in (("6", model), ("13", deep))}
    for draw in (draw_heads_mean, draw_heads):
        for file in save_figure(draw(pair, "cross_attentions"), tmp_path / draw.__name__):
            assert file.is_file()


def test_documented_examples_run_bertviz_included(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.+?)```", (ROOT / "docs" / "attention.md").read_text(), re.DOTALL)
    names = {}
    for block in blocks:
        exec(block.replace("runs/demo", str(trained)), names)
    sentence = names["sentence"]
    view = (tmp_path / "head_view.html").read_text()
    assert all(json.dumps(token.replace("▁", " ")) in view for token in sentence.output_tokens[:-1])
    assert f"{sentence.cross_attentions[1, 0, 0, 0]:.6f}"[:6] in view
