"""The web demo in `hub_cards/space/`, started as a Space starts it and driven in a real browser, headless."""

import os
import subprocess
import sys
import time
from importlib.metadata import version

import pytest
from conftest import ROOT
from forked import free_port
from huggingface_hub import RepoCard
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

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
        images = self.find("#attention img")
        return images[0].get_attribute("src") if images else None


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


def test_what_a_space_needs_is_in_its_folder():
    requirements = (SPACE / "requirements.txt").read_text().split()
    assert requirements == ["rs-transformer[train,plots]", "gradio>=6.0"]
    card = RepoCard.load(SPACE / "README.md").data
    assert (card.sdk, card.app_file) == ("gradio", "app.py")
    assert version("gradio").split(".")[0] == card.sdk_version.split(".")[0]
