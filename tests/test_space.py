"""The web demo in `hub_cards/space/`, started as a Space starts it and driven in a real browser, headless."""

import json
import os
import runpy
import subprocess
import sys
import time
import urllib.error
import urllib.request
from importlib.metadata import version
from types import SimpleNamespace

import pytest
from conftest import ROOT
from forked import free_port
from huggingface_hub import RepoCard
from oracle import marian
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from rs_transformer.training.model import config_from_tokenizer
from rs_transformer.utils import plotting

pytest_plugins = ["browser"]

SPACE = ROOT / "hub_cards" / "space"


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The demo as a process of its own."""
    port = free_port()
    offline = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1", "GRADIO_SERVER_PORT": str(port)}
    log = tmp_path_factory.mktemp("space") / "log.txt"
    with log.open("w") as file:
        command = [sys.executable, SPACE / "app.py"]
        server = subprocess.Popen(command, env={**os.environ, **offline}, stdout=file, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 120
    while address not in log.read_text():
        assert server.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)
    yield address
    server.terminate()
    server.wait(timeout=30)


@pytest.fixture
def page(browser, address):
    browser.get(address)
    return Page(browser)


class Page:
    """What a visitor sees and does."""

    def __init__(self, browser):
        self.browser = browser
        self.until(lambda: self.find("#translate"))

    def find(self, selector):
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def until(self, what):
        return WebDriverWait(self.browser, 60).until(lambda _: what())

    def set_depth(self, value):
        (number,) = self.find("#depth input[type=number]")
        number.send_keys(Keys.CONTROL, "a")
        number.send_keys(str(value), Keys.TAB)

    def translate(self, text):
        (box,) = self.find("#text textarea")
        box.clear()
        box.send_keys(text)
        self.find("#translate")[0].click()

    def rows(self):
        cells = [cell.text for cell in self.find("#table [role=gridcell]")]
        return [cells[start : start + 3] for start in range(0, len(cells), 3)]

    def text(self):
        return self.browser.find_element(By.TAG_NAME, "body").text

    def picture(self):
        # In one go: the page may put another picture in its place meanwhile.
        return self.browser.execute_script("return document.querySelector('#attention img')?.src")


def test_the_page_begins_with_an_example_translated(page):
    assert page.until(page.rows)[0][:2] == ["彼は水泳が得意だ。", "He is good at swimming."]
    assert [label.text for label in page.find("#step label")] == ["1", "2"]
    assert page.until(page.picture)


def test_a_visitor_translates_sees_times_and_looks_at_a_step(page):
    page.translate("猫が好きです。彼女は毎朝七時に起きる。")
    rows = page.until(lambda: [row for row in page.rows() if row[1]][1:] and page.rows())
    assert [row[0] for row in rows] == ["猫が好きです。", "彼女は毎朝七時に起きる。"]
    assert "cat" in rows[0][1]
    assert all(float(row[2].replace(",", "")) > 0 for row in rows)
    first = page.until(page.picture)
    page.find("#step label")[0].click()
    assert page.until(lambda: page.picture() not in (None, first) and page.picture())


def test_a_shallower_decoder_translates_and_has_fewer_steps_to_look_at(page):
    page.set_depth(1)
    page.translate("猫が好きです。")
    page.until(lambda: page.rows() and page.rows()[0][0] == "猫が好きです。")
    page.until(lambda: [label.text for label in page.find("#step label")] == ["1"])


def test_nothing_and_too_much_are_refused_with_a_reason(page):
    page.translate(" ")
    page.until(lambda: "Type a sentence" in page.text())
    page.translate("猫が好きです。" * 21)
    page.until(lambda: "21 sentences are too many at once" in page.text())


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("upload", b"--x\r\nContent-Disposition: form-data; name=files; filename=a\r\n\r\na\r\n--x--\r\n", "no files"),
        ("call/translate", json.dumps({"data": ["x" * 2**20, 2]}).encode(), "2,000 characters at most"),
        ("call/translate", iter([b'{"data": ["x", 2]}']), "2,000 characters at most"),  # of a length that nobody says
        (
            "run/translate",
            json.dumps({"data": ["x" * 2001, 2]}).encode(),
            "2,001 characters are too many at once: 2,000 at",
        ),
        ("run/translate", json.dumps({"data": ["x", 10**6]}).encode(), "greater than maximum value 6"),
    ],
)
def test_files_large_requests_and_other_depths_are_not_taken(address, path, body, message):
    kind = "multipart/form-data; boundary=x" if path == "upload" else "application/json"
    request = urllib.request.Request(f"{address}/gradio_api/{path}", body, {"Content-Type": kind})
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request)
    assert message in caught.value.read().decode()


def load_app(monkeypatch, model):
    """The names of the app, loaded in this process with a model."""
    monkeypatch.setenv("MODEL", str(model))
    return SimpleNamespace(**runpy.run_path(str(SPACE / "app.py")))


def test_a_model_of_other_languages_has_its_own_examples_or_none(trained, monkeypatch, tmp_path):
    app = load_app(monkeypatch, trained)
    assert app.examples() == []
    assert "`trained`, `fw to bw`" in app.introduction()
    for language, first in (("deu_Latn", "Er kann gut schwimmen."), ("jap", "彼は水泳が得意だ。"), (None, None)):
        monkeypatch.setattr(app.tokenizer, "source_lang", language)
        assert app.examples()[:1] == ([first] if first else [])
    # What is kept of a visitor is text, whatever was looked at.
    rows, translated, *_ = app.answer("a b c", 2)
    assert [row[:2] for row in rows] == [["a b c", "c b a"]]
    assert app.show_step(translated, 0, 1).axes
    assert translated == (2, [("a b c", "c b a")])
    for sentence, step in ((1, 1), (0, 3), (0, 0), (None, 1)):
        assert app.show_step(translated, sentence, step) is None
    shallower, own = (app.translator(depth).model.model.decoder.layers[0].fc1.weight for depth in (1, 2))
    assert shallower.data_ptr() == own.data_ptr()
    # A long sentence may have a long translation; what is longer than the model reads has nothing to look into.
    asked = []

    def endless(text, max_new_tokens):
        asked.append(max_new_tokens)
        return [{"translation_text": "c " * max_new_tokens}]

    monkeypatch.setitem(app.translate.__globals__, "translator", lambda depth: endless)
    assert app.translate("a b c", 2)[1].pairs == []
    app.translate("a b c d e f g h", 2)
    assert asked == [2 * 4 + 32, 2 * 9 + 32]
    monkeypatch.setattr(plotting, "_system_fonts", lambda: iter(()))
    assert "No font" not in app.introduction()
    monkeypatch.setattr(app.tokenizer, "get_vocab", lambda: {"猫": 0, "好": 1})
    assert "No font of the server has 好 猫 and the like" in app.introduction()


def test_without_a_model_the_page_says_how_to_name_one(tokenizer, tmp_path, monkeypatch, capsys):
    marian(**config_from_tokenizer(tokenizer)).save_pretrained(tmp_path / "marian")
    tokenizer.save_pretrained(tmp_path / "marian")
    for folder, why in ((tmp_path / "marian", "it is a marian model, whose depth is fixed"), (tmp_path / "none", "")):
        (notice,) = (
            block.value for block in load_app(monkeypatch, folder).demo.blocks.values() if block.elem_id == "notice"
        )
        assert notice == capsys.readouterr().err.splitlines()[-1]
        assert why in notice
        assert "Set the variable MODEL to a folder or a Hub id" in notice


def test_what_a_space_needs_is_in_its_folder():
    requirements = (SPACE / "requirements.txt").read_text().split()
    assert requirements == ["rs-transformer[train,plots]", "gradio>=6.0"]
    card = RepoCard.load(SPACE / "README.md").data
    assert (card.sdk, card.app_file) == ("gradio", "app.py")
    assert version("gradio").split(".")[0] == card.sdk_version.split(".")[0]
