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
from conftest import ROOT, script
from forked import fork
from matplotlib.figure import Figure
from matplotlib.image import imread
from oracle import rs_model, unrolled_marian
from PIL import Image
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from rs_transformer.attention.collection import KINDS, attention_statistics, collect_attention
from rs_transformer.attention.figures import (
    draw_entropy_map,
    draw_heads,
    draw_heads_mean,
    draw_step,
    draw_steps,
    save_figure,
)
from rs_transformer.attention.page import write_page
from rs_transformer.checkpoints import load_translator
from rs_transformer.commands import attention as command
from rs_transformer.commands.attention import print_statistics
from rs_transformer.corpus import CorpusArguments, load_split
from rs_transformer.training.model import config_from_tokenizer
from rs_transformer.utils import plotting

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
    printed = fork("training/attention.py", trained, expanded, *options, processes=2).stdout
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
    row = f"| cross-attention | entropy | trained | {entropy.mean[0]:.3f} ± {half_width:.3f} |"
    assert row in re.sub(" +", " ", printed)
    assert "marian: 40 sentences measured in" in printed
    assert printed.splitlines()[-1] == f"open {tmp_path}/attention.html in a browser"

    pictures = ["entropy_map", "steps", *(f"sentence1_{kind}{of}" for kind in KINDS for of in ("", "_heads"))]
    assert {file.stem for file in tmp_path.iterdir()} == {"attention", "statistics", *pictures}
    for name in pictures:
        assert imread(tmp_path / f"{name}.png")[..., :3].std() > 0.05  # not blank
        assert "<svg" in (tmp_path / f"{name}.svg").read_text()
    assert "normalised entropy" in (tmp_path / "entropy_map.svg").read_text()  # matplotlib notes texts as comments
    assert "</html>" in (tmp_path / "attention.html").read_text()


def test_sentences_of_ones_own_need_no_corpus(trained, tmp_path, capsys):
    attention(trained, "--text", "a b c", "d e", "--output_dir", tmp_path, "--num_beams", 2)
    written = json.loads((tmp_path / "statistics.json").read_text())
    assert (written["decoder"], written["models"]["trained"]["sentences"]) == ("own translation", 2)
    assert written["arguments"]["num_beams"] == 2
    assert (tmp_path / "sentence2_cross_attentions.png").is_file()
    # A recipe of the same folder: its text is one sentence, and there are no pictures of sentences that it has not.
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"models: {trained}\ntext: a b c\nreference: a a a\noutput_dir: {tmp_path}\n")
    attention(recipe)
    assert json.loads((tmp_path / "statistics.json").read_text())["decoder"] == "reference"
    assert {file.name[:9] for file in tmp_path.glob("sentence*")} == {"sentence1"}
    recipe.write_text(f"models: {trained}\ndataset: nowhere\n")  # the short name works in a recipe too
    with pytest.raises(OSError, match="nowhere"):
        attention(recipe, "--output_dir", tmp_path)
    attention(trained, "--text", "a b c", "--output_dir", tmp_path, "--pictured", 0)
    assert {file.name for file in tmp_path.iterdir()} == {
        "recipe.yaml",
        "statistics.json",
        "entropy_map.png",
        "entropy_map.svg",
        "steps.png",
        "steps.svg",
    }
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
        monkeypatch.setattr(command, name, lambda *args, **kwargs: pytest.fail("something was measured"))
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
        save_figure(draw_heads_mean({"a": japanese, "b": sentence}, "cross_attentions"), tmp_path / "picture")


def images(figure):
    """Values and colour limits of the pictures in a figure, without its colour bars."""
    axes = [its for its in figure.axes if its.get_label() != "<colorbar>" and its.images]
    return [(its.images[0].get_array(), its.images[0].get_clim()) for its in axes]


def test_pictures_show_the_numbers_of_each_model_on_one_scale(tokenizer):
    sizes = config_from_tokenizer(tokenizer)
    models = {name: rs_model(seed, **sizes, encoder_layers=2, decoder_layers=2) for seed, name in enumerate("ab")}
    text = ["a b c d"]
    pair = {name: collect_attention(model, tokenizer, text, text)[0] for name, model in models.items()}
    statistics = {name: attention_statistics(model, tokenizer, text, text) for name, model in models.items()}
    entropies = [its.by_head[kind]["normalized_entropy"].mean for kind in KINDS for its in statistics.values()]
    means = [step for sentence in pair.values() for step in sentence.cross_attentions.mean(1)]
    for figure, values in (
        (draw_entropy_map(statistics), entropies),
        (draw_heads_mean(pair, "cross_attentions"), means),
        (draw_step(pair["a"], "cross_attentions", 1), means[1:2]),
    ):
        for (shown, limits), expected in zip(images(figure), values, strict=True):
            np.testing.assert_allclose(shown, expected)
            assert limits == (0, 1)
    for (shown, limits), sentence in zip(images(draw_heads(pair, "cross_attentions")), pair.values(), strict=True):
        queries, keys = sentence.cross_attentions.shape[2:]
        for step, head in np.ndindex(2, 4):
            down, across = step * (queries + 1), head * (keys + 1)
            tile = shown[down : down + queries, across : across + keys]
            np.testing.assert_allclose(tile, sentence.cross_attentions[step, head])
        assert shown.mask.sum() == shown.size - sentence.cross_attentions.size  # between them, nothing
        assert limits == (0, 1)
    panels = draw_steps(statistics).axes
    for panel, measure in ((2, "entropy"), (5, "mean_head_cosine")):
        for line, its in zip(panels[panel].lines, statistics.values(), strict=True):
            estimate = its.by_step["cross_attentions"][measure]
            np.testing.assert_allclose(line.get_ydata(), estimate.mean)
            assert line.get_xdata()[-1] == 2


def test_names_and_tokens_are_drawn_as_they_are_and_a_missing_glyph_is_told_once(
    trained, tmp_path, caplog, monkeypatch, recwarn
):
    """No formula, no label that matplotlib keeps to itself; of a character that no font has, the mend."""
    monkeypatch.setattr(logging.getLogger("rs_transformer"), "propagate", True)
    monkeypatch.setattr(plotting, "said", [])
    model, tokenizer = load_translator(str(trained))
    (sentence,) = collect_attention(model, tokenizer, ["a b c"])
    odd = replace(sentence, encoder_tokens=["$x_$", "\U0010fffd\n猫", *sentence.encoder_tokens[2:]])
    name = "_$\\foo$ 猫 \U0010fffe"
    statistics = {name: attention_statistics(model, tokenizer, ["a b c"])}
    drawings = [draw({name: odd}, "cross_attentions") for draw in (draw_heads_mean, draw_heads)]
    drawings += [draw_step(odd, "cross_attentions", 0), draw_entropy_map(statistics), draw_steps(statistics)]
    for drawing in drawings:
        _, svg = save_figure(drawing, tmp_path / "picture")
        assert (
            drawing is drawings[2] or "<!-- _$\\foo$ 猫 \ufffd" in svg.read_text()
        )  # matplotlib notes what it writes
    assert not recwarn.list
    # Each record once, however many loggers hand it on.
    records = {id(record): record.message for record in caplog.records if "No installed font" in record.message}
    (said,) = records.values()
    assert re.match("No installed font has \U0010fffd \U0010fffe: .*apt-get install fonts-noto-cjk", said)


def test_there_is_no_panel_and_no_row_for_what_nobody_knows(trained, capsys):
    model, tokenizer = load_translator(str(trained))
    few, more = (attention_statistics(model, tokenizer, ["a b c"] * number) for number in (3, 4))
    for statistics, panels in ((few, 8), (more, 10)):
        assert len(draw_steps({"a": statistics}).axes) == panels
        print_statistics({"a": statistics})
        assert ("| cka " in capsys.readouterr().out) == (panels == 10)


def test_models_of_any_depth_and_figures_of_any_size_are_drawn(tokenizer, tmp_path):
    sizes = {**config_from_tokenizer(tokenizer), "encoder_layers": 1}
    models = {str(depth): rs_model(**sizes, decoder_layers=depth) for depth in (1, 13)}
    text = [" ".join("abcdefghijkl"[:9])]
    sentences = {name: collect_attention(model, tokenizer, text, text) for name, model in models.items()}
    statistics = {name: attention_statistics(model, tokenizer, text, text) for name, model in models.items()}
    print_statistics(statistics)
    write_page(tmp_path / "page.html", sentences, statistics)
    pair = {name: its[0] for name, its in sentences.items()}
    drawings = [draw_entropy_map(statistics), draw_steps(statistics)]
    drawings += [draw(pair, "cross_attentions") for draw in (draw_heads_mean, draw_heads)]
    drawings.append(Figure(figsize=(700, 30)))  # six steps of a sentence of 480 tokens, more than a picture may have
    for drawing in drawings:
        png, _ = save_figure(drawing, tmp_path / "picture")
        with Image.open(png) as picture:  # its size alone
            assert 0 < picture.width * picture.height <= 100_000_000


def test_documented_examples_run_bertviz_included(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.+?)```", (ROOT / "docs" / "attention.md").read_text(), re.DOTALL)
    names = {}
    for block in blocks:
        exec(block.replace("runs/demo", str(trained)), names)
    sentence = names["sentence"]
    view = (tmp_path / "head_view.html").read_text()
    start = view.index("const params = ") + len("const params = ")
    parameters, _ = json.JSONDecoder().raw_decode(view, start)
    kinds = {part["name"]: part for part in parameters["attention"]}
    assert kinds["Cross"]["left_text"] == [token.replace("▁", " ") for token in sentence.decoder_tokens]
    np.testing.assert_allclose(kinds["Cross"]["attn"], sentence.cross_attentions, atol=1e-6)
    np.testing.assert_allclose(kinds["Encoder"]["attn"], sentence.encoder_attentions, atol=1e-6)
