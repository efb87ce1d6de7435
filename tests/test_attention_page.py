"""The attention page in a real browser, headless: what it shows, its keys, and what it saves."""

import json
import os
import time
from dataclasses import replace
from urllib.parse import unquote

import numpy as np
import pytest
from oracle import marian, rs_model
from reverse_task import reverse_pairs
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.select import Select

from rs_transformer.attention.collection import attention_statistics, collect_attention
from rs_transformer.attention.measures import attention_measures
from rs_transformer.attention.page import write_page
from rs_transformer.training.model import config_from_tokenizer

pytest_plugins = ["browser"]

SOURCES, TARGETS = (list(side) for side in zip(*reverse_pairs(24, seed=5), strict=True))


@pytest.fixture(scope="module")
def models(tokenizer):
    """Attention and statistics of an RS model and of a shallower vanilla one."""
    sizes = config_from_tokenizer(tokenizer)
    both = {
        "rs <b>": rs_model(**sizes, encoder_layers=3, decoder_layers=3),
        "vanilla": marian(**sizes, encoder_layers=6, decoder_layers=6, encoder_attention_heads=2),
    }
    first = (SOURCES[:3], TARGETS[:3])
    sentences = {name: collect_attention(model, tokenizer, *first) for name, model in both.items()}
    statistics = {name: attention_statistics(model, tokenizer, SOURCES, TARGETS) for name, model in both.items()}
    # Text that would end the script, or be taken for markup.
    first = sentences["rs <b>"][0]
    sentences["rs <b>"][0] = replace(first, encoder_tokens=["</script>", "<b>猫", *first.encoder_tokens[2:]])
    return sentences, statistics


@pytest.fixture
def page(browser, models, tmp_path):
    write_page(tmp_path / "page.html", *models, title="Attention <1>")
    browser.get((tmp_path / "page.html").as_uri())
    yield browser
    assert browser.get_log("browser") == []


def shown(page, panel):
    """What a panel's heat-map says of each cell: tokens and weight."""
    script = """return [...document.querySelectorAll("section")[arguments[0]].querySelectorAll(".map tbody tr")]
        .map((row) => [...row.cells].slice(1).map((cell) => cell.title))"""
    return page.execute_script(script, panel)


def expected(sentence, kind, step, head):
    attention = getattr(sentence, kind)[step]
    weights = attention.mean(0) if head is None else attention[head]
    queries, keys = sentence.tokens(kind)
    return queries, keys, weights


def check(page, models, number, kind, step, head):
    for panel, sentences in enumerate(models[0].values()):
        attention = getattr(sentences[number], kind)
        own_head = None if head is None else min(head, attention.shape[1] - 1)
        queries, keys, weights = expected(sentences[number], kind, min(step, len(attention) - 1), own_head)
        cells = shown(page, panel)
        found = np.array([[float(cell.rsplit(": ", 1)[1]) for cell in row] for row in cells])
        np.testing.assert_allclose(found, weights, atol=6e-5)
        assert [[cell.rsplit(": ", 1)[0] for cell in row] for row in cells] == [
            [f"{query} → {key}" for key in keys] for query in queries
        ]


def choose(page, name, text):
    Select(page.find_element(By.ID, name)).select_by_visible_text(text)


def press(page, *keys):
    page.find_element(By.TAG_NAME, "body").send_keys(*keys)


def chosen(page):
    """What the four selects show; read in one go, since the page may be playing the steps."""
    read = "return arguments[0].map(name => document.getElementById(name).selectedOptions[0].text)"
    return page.execute_script(read, ["sentence", "kind", "step", "head"])


def test_sentence_kind_step_and_head_are_chosen_and_both_models_shown(page, models):
    assert page.title == "Attention <1>"
    assert headings(page) == ["rs <b>", "vanilla"]
    check(page, models, 0, "cross_attentions", 0, None)
    titles = {"encoder_attentions": "encoder self-attention", "decoder_attentions": "decoder self-attention"}
    for kind, title in titles.items():
        choose(page, "kind", title)
        choose(page, "step", "3")
        choose(page, "head", "2")
        check(page, models, 0, kind, 2, 1)
    number_three = Select(page.find_element(By.ID, "sentence")).options[2].text
    assert number_three.replace(" ", "") == f"3:{SOURCES[2].replace(' ', '')}"
    choose(page, "sentence", number_three)
    check(page, models, 2, "decoder_attentions", 2, 1)


def test_heat_maps_fill_their_panels_and_each_token_stands_at_its_column(page):
    """Upright where there is room, otherwise written upwards."""
    read = """return [...document.querySelectorAll(".map")].map((table) => {
        const place = (element) => {
            const r = element.getBoundingClientRect();
            return [r.left, r.right, r.top, r.bottom];
        };
        return [place(table), table.closest("section").clientWidth, place(table.rows[1].cells[1]),
            [...table.querySelectorAll("thead span")].map(place),
            [...table.rows[1].cells].slice(1).map(place)];
    })"""
    for wide, steep in ((1800, False), (1000, True)):
        page.set_window_size(wide, 1200)
        until(lambda steep=steep: bool(page.find_elements(By.CSS_SELECTOR, ".map.steep")) == steep)
        for (left, right, *_), room, first, labels, cells in page.execute_script(read):
            assert right - left > 0.9 * room
            for label, cell in zip(labels, cells, strict=True):
                assert sum(label[:2]) == pytest.approx(sum(cell[:2]), abs=3)  # the middles, twice
                assert label[1] - label[0] <= cell[1] - cell[0]
                assert 0 <= first[2] - label[3] < 12  # right above the map


def test_a_model_with_fewer_steps_or_heads_shows_its_last_and_says_so(page, models):
    choose(page, "step", "6")
    assert headings(page) == ["rs <b> (step 3, its last)", "vanilla"]
    check(page, models, 0, "cross_attentions", 5, None)
    choose(page, "kind", "encoder self-attention")
    choose(page, "head", "4")
    assert headings(page) == ["rs <b> (step 3, its last)", "vanilla (head 2, its last)"]
    check(page, models, 0, "encoder_attentions", 5, 3)


def test_everything_is_reached_from_the_keyboard(page, models):
    press(page, Keys.ARROW_RIGHT, "h", "s")
    assert chosen(page)[1:] == ["cross-attention", "2", "1"]
    check(page, models, 1, "cross_attentions", 1, 0)
    press(page, "k", Keys.ARROW_LEFT, "H", "S")
    assert chosen(page)[1:] == ["encoder self-attention", "1", "mean of all"]
    check(page, models, 0, "encoder_attentions", 0, None)
    press(page, Keys.ARROW_LEFT, "H")  # round to the last
    assert chosen(page)[2:] == ["6", "4"]
    assert status(page) == "Sentence 1, encoder self-attention, step 6, head 4"
    press(page, Keys.TAB)  # the first control, where the keys are the control's own
    assert page.switch_to.active_element.get_attribute("id") == "sentence"
    page.switch_to.active_element.send_keys(Keys.ARROW_DOWN)
    assert chosen(page)[0].startswith("2:")
    assert chosen(page)[2:] == ["6", "4"]
    press(page, "p")
    until(lambda: chosen(page)[2] == "1")
    press(page, "p")


def test_weights_are_read_from_the_keyboard(page, models):
    for _ in range(7):  # four selects, two buttons, then the first heat-map
        page.switch_to.active_element.send_keys(Keys.TAB)
    heat_map = page.switch_to.active_element
    assert heat_map.get_attribute("aria-label") == "rs <b>, cross-attention: weights"
    heat_map.send_keys(Keys.ARROW_DOWN, Keys.ARROW_DOWN, Keys.ARROW_RIGHT)
    queries, keys, weights = expected(models[0]["rs <b>"][0], "cross_attentions", 0, None)
    assert status(page) == f"{queries[2]} → {keys[1]}: {weights[2, 1]:.4f}"
    heat_map.send_keys("h", Keys.ARROW_RIGHT)  # it keeps the focus when another head is shown
    queries, keys, weights = expected(models[0]["rs <b>"][0], "cross_attentions", 0, 0)
    assert status(page) == f"{queries[0]} → {keys[1]}: {weights[0, 1]:.4f}"


def test_the_models_stand_side_by_side(page):
    first, second = (panel.rect for panel in page.find_elements(By.TAG_NAME, "section"))
    assert first["y"] == second["y"]
    assert first["x"] + first["width"] <= second["x"]


def headings(page):
    return [heading.text for heading in page.find_elements(By.TAG_NAME, "h2")]


def status(page):
    return page.find_element(By.ID, "status").text


def until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_step_and_head_map_shows_normalised_entropy_and_chooses(page, models):
    for kind in ("cross_attentions", "encoder_attentions", "decoder_attentions"):
        for panel, sentences in zip(page.find_elements(By.TAG_NAME, "section"), models[0].values(), strict=True):
            found = [float(button.text) for button in panel.find_elements(By.CSS_SELECTOR, ".overview button")]
            values = attention_measures(getattr(sentences[0], kind), kind)["normalized_entropy"]
            np.testing.assert_allclose(np.reshape(found, values.shape), values, atol=6e-3)
        press(page, "k")
    page.find_elements(By.CSS_SELECTOR, "section:nth-child(2) .overview button")[4 * 4 + 2].click()
    check(page, models, 0, "cross_attentions", 4, 2)
    pressed = page.find_elements(By.CSS_SELECTOR, "[aria-pressed=true]")
    assert [button.get_attribute("data-step") for button in pressed] == ["2", "4"]  # the other model has three steps


def test_corpus_figures_stand_below(page, models):
    rows = """return [...document.querySelectorAll("section")[arguments[0]].querySelectorAll(".figures tbody tr")]
        .map((row) => [...row.cells].map((cell) => cell.textContent))"""
    for kind, side in (("cross_attentions", "decoder"), ("encoder_attentions", "encoder")):
        for panel, statistics in enumerate(models[1].values()):
            found = {name: cells for name, *cells in page.execute_script(rows, panel)}
            estimate = statistics.by_step[kind]["entropy"]
            half_widths = (estimate.high - estimate.low) / 2
            expected = [f"{mean:.3f} ±{half:.3f}" for mean, half in zip(estimate.mean, half_widths, strict=True)]
            assert found["entropy"] == expected
            change = statistics.by_step[f"{side}_hidden_states"]["relative_change"].mean
            assert [cell.split()[0] for cell in found["hidden states: relative change"]] == [
                f"{value:.3f}" for value in change
            ]
            assert [cell.split()[:1] for cell in found["mean head cosine"]][:2] == [
                [],
                [f"{statistics.by_step[kind]['mean_head_cosine'].mean[0]:.3f}"],
            ]
        press(page, "k")


def test_what_is_shown_is_saved_as_json(page, models, downloads):
    choose(page, "step", "5")
    press(page, "s", "h", "h", "j")
    file = downloads / "cross_attentions-sentence2.json"
    until(lambda: file.is_file() and os.path.getsize(file) > 0)
    saved = json.loads(file.read_text())
    assert (saved["sentence"], saved["kind"]) == (2, "cross_attentions")
    for model, step, (name, sentences) in zip(saved["models"], (3, 5), models[0].items(), strict=True):
        queries, keys, weights = expected(sentences[1], "cross_attentions", step - 1, 1)
        assert (model["name"], model["queries"], model["keys"]) == (name, queries, keys)
        assert (model["step"], model["head"]) == (step, 2)  # what is shown of the model, not what was chosen
        np.testing.assert_allclose(model["shown"], weights, atol=1e-5)
        np.testing.assert_allclose(model["all"], sentences[1].cross_attentions, atol=1e-5)
        assert model["statistics"] == models[1][name].to_dict()


def test_a_translation_of_one_token_is_shown(page, models):
    one = np.ones((1, 2, 1, 1), np.float32)
    lone = {"decoder_attentions": one, "decoder_tokens": ["<pad>"], "output_tokens": ["</s>"]}
    sentence = replace(models[0]["vanilla"][0], **lone)
    sentence = replace(sentence, cross_attentions=sentence.cross_attentions[:1, :2, :1])
    file = unquote(page.current_url.removeprefix("file://"))
    write_page(file, {"vanilla": [sentence]}, models[1])
    page.refresh()
    press(page, "K")
    assert status(page) == "Sentence 1, decoder self-attention, step 1, mean of all heads"
    assert [button.text for button in page.find_elements(By.CSS_SELECTOR, ".overview button")] == ["–", "–"]


def test_it_asks_for_nothing_and_may_not(page, tmp_path):
    assert page.execute_script("return performance.getEntriesByType('resource').length") == 0
    text = (tmp_path / "page.html").read_text()
    assert "http://" not in text
    assert "https://" not in text
    assert "default-src 'none'" in text
