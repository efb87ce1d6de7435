"""The page in `hub_cards/web/` with the shipped model, in Chromium without a window; and transformers.js in Node."""

import http.server
import json
import re
import shutil
import threading
import time
import unicodedata
from types import SimpleNamespace

import pytest
from conftest import ROOT, odd_tokenizer, run, script
from oracle import marian, rs_model
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait
from test_pipeline import LINES

from rs_transformer.checkpoints import load_translator
from rs_transformer.commands import publish as commands_publish
from rs_transformer.decoding import DecodingArguments, TransformersEngine
from rs_transformer.export import web
from rs_transformer.pipeline_rs_marian import LINE_END, is_blank_text, split_into_sentences
from rs_transformer.training.model import config_from_tokenizer

pytest_plugins = ["browser"]

MODEL, BACK = (ROOT / "hub_cards" / f"rs-marian-{direction}" for direction in ("ja-en", "en-ja"))
TOO_LONG = f"“{'b' * 20}…” has 257 tokens, at most 256 are possible. Cut it into sentences."
# A translator that says what its model's file has.
STUB = """
export const env = { backends: { onnx: { wasm: {} } } };
export async function pipeline(task, folder) {
  const answer = await fetch(`models/${folder}/model.onnx`);
  if (!answer.ok) throw new Error(`there is no ${folder}`);
  const text = await answer.text();
  const tokenizer = () => ({ input_ids: { dims: [1, 3] } });
  const model = { config: { max_position_embeddings: 9 } };
  return Object.assign(async () => [{ translation_text: text }], { tokenizer, model });
}
"""
SENTENCES = [
    json.loads(line)["translation"]["ja"]
    for line in (ROOT / "training" / "data" / "tanaka-excerpt" / "test.jsonl").read_text("utf-8").splitlines()[:8]
]


class Site:
    """A folder served over HTTP, until it is closed: another one from the time on when `folder` is."""

    def __init__(self, folder, seconds=0):
        self.folder = folder

        class Handler(http.server.SimpleHTTPRequestHandler):
            def translate_path(handler, path):
                handler.directory = str(self.folder)
                return super().translate_path(path)

            def do_GET(handler):
                time.sleep(seconds)
                del handler.headers["If-Modified-Since"]  # versions are of the same second
                if handler.path == "/index.html":  # as some servers do
                    handler.send_response(308)
                    handler.send_header("Location", "/")
                    handler.end_headers()
                else:
                    super().do_GET()

            def log_message(handler, *args):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://localhost:{self.server.server_port}/"  # a secure context, as https is
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture(scope="module")
def folder(made_once):
    """The page of both directions as it is published, and a second depth: a model again, which the page does not know.

    In float32, for int8 is rounded otherwise by each processor.
    """

    def fill(folder):
        options = ["--space", "web", "--other_models", BACK, "--quantization", "float32", "--output_dir", folder]
        script("publish")(MODEL, "--repo", "org/rs-web", *options)
        page = json.loads((folder / "models.json").read_text())
        page["models"].insert(1, page["models"][0] | {"decoder_layers": 6})
        (folder / "models.json").write_text(json.dumps(page))

    return made_once("web-page", fill)


@pytest.fixture
def site(folder):
    site = Site(folder)
    yield site
    site.close()


@pytest.fixture(scope="module")
def expected():
    """What PyTorch gives, greedily."""
    model, tokenizer = load_translator(str(MODEL))
    engine = TransformersEngine(model, tokenizer, DecodingArguments(num_beams=1, max_new_tokens=64))
    return [engine.translate_batch([tokenizer(sentence)["input_ids"]])[0][0] for sentence in SENTENCES]


class Page:
    """What a visitor sees and does."""

    def __init__(self, browser, address):
        self.browser = browser
        browser.get(address)

    def __getitem__(self, name):
        return self.browser.find_element(By.ID, name)

    def wait_for(self, pattern):
        WebDriverWait(self.browser, 60).until(
            lambda _: re.search(pattern, self["status"].text) or self["problem"].text
        )
        assert not self["problem"].text
        return self["status"].text

    def works_offline(self):
        return (
            WebDriverWait(self.browser, 30)
            .until(lambda _: re.search(r"Works offline\s(.+)", self["figures"].text))[1]
            .startswith("from now on")
        )

    def translate(self, sentences):
        self["source"].clear()
        self["source"].send_keys("\n".join(sentences), Keys.CONTROL, Keys.ENTER)
        self.wait_for(rf"^{len(sentences)} sentence")
        return [item.text for item in self.browser.find_elements(By.CSS_SELECTOR, "#translations .target")]


def test_it_translates_as_python_does_and_without_a_server_from_the_second_time_on(browser, folder, site, expected):
    page = Page(browser, site.address)
    page.wait_for("Ready after")
    assert page.works_offline()
    assert page["source-label"].text == "Japanese to English"
    assert page.translate(SENTENCES) == expected
    megabytes = sum(file.stat().st_size for file in (folder / "models" / "ja-en-depth2").rglob("*.*")) / 1e6
    assert re.search(rf"Model and tokenizer\s{megabytes:.1f} MB", page["figures"].text)
    asked = browser.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert asked
    assert all(address.startswith((site.address, "data:")) for address in asked)
    site.close()
    browser.refresh()
    page.wait_for("Ready after")
    assert page.translate(SENTENCES[:2]) == expected[:2]
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def test_an_example_and_another_depth_are_chosen_by_keyboard_on_a_narrow_screen(browser, site):
    browser.set_window_size(360, 740)
    page = Page(browser, site.address)
    page.wait_for("Ready after")
    assert browser.execute_script(
        "return document.documentElement.scrollWidth <= document.documentElement.clientWidth"
    )
    browser.execute_script("document.getElementById('status').textContent = ''")  # so that it must load again
    page["model"].send_keys(Keys.ARROW_DOWN)
    assert page["model"].get_property("value") == "Japanese to English, 6 decoder steps"
    page.wait_for("Ready after")
    seen = []
    for _ in range(4):  # text, button, and the examples
        browser.switch_to.active_element.send_keys(Keys.TAB)
        seen.append(browser.switch_to.active_element.get_property("tagName"))
    assert seen == ["TEXTAREA", "BUTTON", "BUTTON", "BUTTON"]
    browser.switch_to.active_element.send_keys(Keys.ENTER)
    page.wait_for("^2 sentences")
    assert "She gets up at seven every morning." in page["translations"].text


def test_it_translates_the_other_way_too(browser, site):
    page = Page(browser, site.address)
    page.wait_for("Ready after")
    browser.execute_script("document.getElementById('status').textContent = ''")  # so that it must load again
    page["model"].send_keys(Keys.END)
    assert page["model"].get_property("value") == page["source-label"].text == "English to Japanese"
    page.wait_for("Ready after")
    (first, *_) = browser.find_elements(By.CSS_SELECTOR, "#examples button")
    first.click()
    page.wait_for("^1 sentence")
    source, target = (browser.find_element(By.CSS_SELECTOR, f"#translations .{side}") for side in ("source", "target"))
    assert (source.text, source.get_attribute("lang")) == ("He is good at swimming.", "en")
    model, tokenizer = load_translator(str(BACK))
    engine = TransformersEngine(model, tokenizer, DecodingArguments(num_beams=1, max_new_tokens=64))
    assert target.text == engine.translate_batch([tokenizer(source.text)["input_ids"]])[0][0]
    assert target.get_attribute("lang") == "ja"


@pytest.mark.parametrize(
    ("scenario", "found"),
    [
        # Without a service worker it goes on: after a forced reload, and where the worker's own start fails.
        ("forced_reload", 1),
        ("failed_install", 1),
        # Whether one may translate, and whether a problem is shown.
        (
            "errors",
            [
                ["translating", False, False],
                ["failed", True, True],
                ["again", False, False],
                ["not loaded", False, True],
                ["loading", False, False],
            ],
        ),
        # The bound on a translation's tokens, for sources of 40 and 200; one of 257 is refused, with all beside it.
        ("worker", {"asked": [112, 255], "said": ["error", "translate", TOO_LONG]}),
        # A file is answered before it is kept, and where there is no room; of which the page is told.
        ("store", [1, 1, False]),
    ],
)
def test_what_goes_wrong_does_not_stop_the_page(scenario, found):
    assert json.loads(run("node", "tests/web/page.mjs", scenario).stdout) == found


@pytest.fixture
def version(tmp_path):
    """Makes a version of the page, of two models of a line each; the second lies elsewhere in each version."""

    def make(name):
        folder = tmp_path / name
        (folder / "vendor").mkdir(parents=True)
        for file in web.PAGE_FILES:
            (folder / file).write_text((web.PAGE / file).read_text("utf-8").replace("unpublished", name), "utf-8")
        (folder / "vendor" / "transformers.web.min.js").write_text(STUB)
        models = []
        for source, target, place in (("ja", "en", "a"), ("ar", "ja", f"b-{name}")):
            (folder / "models" / place).mkdir(parents=True)
            (folder / "models" / place / "model.onnx").write_text(f"{place} of {name}")
            entry = {"source": source, "target": target, "folder": place, "files": [f"models/{place}/model.onnx"]}
            models.append(entry | {"examples": [], "license": "other", "parameters": 1, "bytes": 1})
        page = {"models": models, "program": ["vendor/transformers.web.min.js"], "program_bytes": 1}
        (folder / "models.json").write_text(json.dumps(page))
        return folder

    return make


def test_a_newer_version_works_offline_too_and_an_open_page_goes_over_to_it(browser, version):
    site = Site(version("v1"))
    page = Page(browser, site.address)
    page.wait_for("Ready after")
    assert page.works_offline()
    site.folder = version("v2")
    browser.get(site.address)  # the version before, until the newer one is there
    page.wait_for("Ready after")
    assert page.translate(["a"]) == ["a of v1"]
    WebDriverWait(browser, 30).until(lambda _: page["newer"].is_displayed())
    assert page.translate(["a"]) == ["a of v1"]
    browser.execute_script("document.getElementById('status').textContent = ''")
    page["model"].send_keys(Keys.END)  # which that page would look for where it is no more
    page.wait_for("Ready after")
    assert (page["source"].get_property("value"), page["source-label"].text) == ("a", "Arabic to Japanese")
    assert page.translate(["a"]) == ["b-v2 of v2"]
    assert not page["newer"].is_displayed()
    # Without having loaded the translator in the newer version.
    site.folder = version("v3")
    browser.get(site.address)
    page.wait_for("Ready after")
    page["source"].send_keys("a")
    WebDriverWait(browser, 30).until(lambda _: page["newer"].is_displayed())
    site.close()
    browser.get(site.address)
    page.wait_for("Ready after")
    assert page.translate(["a"]) == ["a of v3"]


def test_on_a_slow_line_all_is_kept_and_a_server_without_an_index_does(browser, version):
    site = Site(version("v1"), seconds=1.1)  # the service worker starts after more than three seconds
    page = Page(browser, site.address)
    page.wait_for("Ready after")
    assert page.works_offline()
    site.close()
    browser.get(f"{site.address}index.html")
    page.wait_for("Ready after")
    assert page.translate(["a"]) == ["a of v1"]


def test_texts_that_are_not_translated(browser, version):
    site = Site(version("v1"))
    page = Page(browser, site.address)
    page.wait_for("Ready after")
    submit = "document.getElementById('source').value = arguments[0]; document.getElementById('translate').click()"
    browser.execute_script(submit, "\u200b\n\u2800 \u3164\n")
    assert page["status"].text.startswith("Ready after")
    browser.execute_script(submit, "\u200b\n\u2800\na")
    page.wait_for("^1 sentence")
    browser.execute_script(submit, "a" * 2001)
    assert page["problem"].text == "The text has 2,001 characters, at most 2,000 are possible."
    browser.execute_script(submit, "שלום")
    page.wait_for("^1 sentence")
    assert browser.find_element(By.CSS_SELECTOR, "#translations .source").value_of_css_property("direction") == "rtl"
    site.close()


def test_what_is_visible_on_the_page_is_so_in_the_pipeline():
    ranges = ((0, 0xD800), (0xE000, 0x11000), (0x1F300, 0x1F700), (0xE0000, 0xE0200))
    lines = [chr(code) for start, end in ranges for code in range(start, end)]
    lines = [line for line in lines if not LINE_END.search(line) and unicodedata.category(line) != "Cn"]
    said = run("node", "tests/web/sentences.mjs", "visible", input="".join(f"{line}\n" for line in lines)).stdout
    assert [json.loads(line) for line in said.splitlines()] == [not is_blank_text(line) for line in lines]


def test_the_page_cuts_sentences_where_the_pipeline_does():
    lines = LINES.replace("|", "").strip().split("\n")
    lines += [
        "Dr. No said 「行こう！」 to J. R. R. Tolkien on p. 10. Then he left.",
        "A. " * 2000,
        "𠀀。𠀀𠀀！「𠀀？」と。",
    ]
    for split in ("test", "validation"):
        file = ROOT / "training" / "data" / "tanaka-excerpt-cased" / f"{split}.jsonl"
        pairs = [json.loads(line)["translation"] for line in file.read_text("utf-8").splitlines()]
        for language, blank in (("en", " "), ("ja", "")):
            texts = [pair[language] for pair in pairs]
            lines += map(blank.join, zip(texts[::3], texts[1::3], texts[2::3], strict=False))
    said = run("node", "tests/web/sentences.mjs", input="".join(f"{line}\n" for line in lines)).stdout.splitlines()
    assert [json.loads(line) for line in said] == [split_into_sentences(line) for line in lines]
    assert len(lines) > 600


@pytest.mark.parametrize(
    ("without", "said"),
    [
        ("WebAssembly = undefined", "has no WebAssembly"),
        ("WebAssembly.validate = () => false", "no SIMD instructions"),
    ],
)
def test_without_webassembly_it_says_so(browser, site, without, said):
    added = browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": f"window.{without}"})
    page = Page(browser, site.address)
    WebDriverWait(browser, 20).until(lambda _: page["problem"].text)
    browser.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", added)
    assert said in page["problem"].text
    assert not page["translate"].is_enabled()


def test_the_example_for_node_translates_as_python_does(folder, expected, tmp_path):
    blocks = re.findall(r"```js\n(.*?)```", (ROOT / "docs" / "export.md").read_text("utf-8"), flags=re.DOTALL)
    (code,) = (block for block in blocks if "pipeline(" in block)
    (tmp_path / "node_modules").symlink_to(web.PAGE / "node_modules")
    (tmp_path / "rs6-onnx").symlink_to(folder / "models" / "ja-en-depth2")
    (tmp_path / "translate.mjs").write_text(code.replace('"q8"', '"fp32"'))
    done = run("node", "translate.mjs", *SENTENCES, cwd=tmp_path)
    assert done.stdout.splitlines() == expected
    assert "warn" not in done.stderr.lower()


def test_it_becomes_a_static_space_in_one_commit(tmp_path, monkeypatch, capsys):
    asked = []

    class Hub:
        def __getattr__(self, name):
            return lambda *args, **options: asked.append((name, args, options)) or SimpleNamespace(commit_url="done")

        def list_repo_files(self, repo, **options):
            asked.append(("list_repo_files", (repo,), options))
            return [".gitattributes", "notes.md", "models/a.onnx", "models/depth6/b.onnx"]

    def lay_out_page(models, folder, quantization, depths):
        (folder / "models").mkdir()
        (folder / "models" / "a.onnx").write_text(f"{models} {quantization} {depths}")
        (folder / "index.html").write_text("")

    monkeypatch.setattr(commands_publish, "HfApi", Hub)
    monkeypatch.setattr(web, "lay_out_page", lay_out_page)
    options = [MODEL, "--repo", "org/rs-web", "--space", "web", "--decoder_depths", 2, 1]
    script("publish")(*options, "--dry_run", "true")
    assert not asked
    script("publish")(*options)
    (made, names, kind), (_, _, listed), (commit, (repo, files), its_kind) = asked
    assert (made, names[0], commit, repo) == ("create_repo", "org/rs-web", "create_commit", "org/rs-web")
    assert (kind["repo_type"], kind["space_sdk"], its_kind["repo_type"]) == ("space", "static", "space")
    assert listed["repo_type"] == "space"
    assert [(type(file).__name__.removeprefix("CommitOperation"), file.path_in_repo) for file in files] == [
        ("Add", "index.html"),
        ("Add", "models/a.onnx"),
        ("Delete", "models/depth6/b.onnx"),  # of a model that was there before
    ]
    assert "done" in capsys.readouterr().out
    with pytest.raises(ValueError, match="a Space has no model card"):
        script("publish")(*options, "--card", "true")


def test_a_page_names_the_licences_of_its_models(tmp_path):
    readme = shutil.copy(web.PAGE / "README.md", tmp_path / "README.md")
    damaged = tmp_path / "damaged.md"
    damaged.write_text("---\na: [\n---\n")
    pair = {("ja", "en"): web.licence_of("a", MODEL / "README.md"), ("en", "ja"): web.licence_of("b", None)}
    assert [*pair.values(), web.licence_of("c", damaged)] == ["cc-by-2.0", "other", "other"]
    web.write_licences(tmp_path / "README.md", {("ja", "en"): pair["ja", "en"]})
    assert "\nlicense: cc-by-2.0\n" in (tmp_path / "README.md").read_text("utf-8")
    shutil.copy(web.PAGE / "README.md", readme)
    web.write_licences(tmp_path / "README.md", pair, {("ja", "en"): "models/ja-en.md"})
    text = (tmp_path / "README.md").read_text("utf-8")
    assert "\nlicense: other\n" in text
    assert "\nsdk: static\n" in text
    assert text.endswith("- ja to en: cc-by-2.0 ([card](models/ja-en.md))\n- en to ja: other\n")


def test_what_a_page_cannot_be_made_of_is_said(tmp_path, monkeypatch):
    for name, kind, said in [("two", "separate", "a vocabulary for each side"), ("none", "joint", "does not name")]:
        tokenizer = odd_tokenizer(tmp_path / name, kind)
        tokenizer.source_lang = "aa" if name == "two" else None
        for part in (rs_model(**config_from_tokenizer(tokenizer)), tokenizer):
            part.save_pretrained(tmp_path / name)
        with pytest.raises(ValueError, match=said):
            web.lay_out_page([str(tmp_path / name)], tmp_path / "page")
    with pytest.raises(ValueError, match="translates ja to en, as another model of the page does"):
        web.lay_out_page([str(MODEL)] * 2, tmp_path / "page")
    with pytest.raises(ValueError, match="quantization must be one of float32, float16, int8, got 'int4'"):
        web.lay_out_page([str(MODEL)], tmp_path / "page", "int4")
    marian(**config_from_tokenizer(tokenizer)).save_pretrained(tmp_path / "none")
    with pytest.raises(ValueError, match="decoder_depths are for recurrently stacked models"):
        web.lay_out_page([str(tmp_path / "none")], tmp_path / "page", decoder_depths=[2])
    monkeypatch.setattr(web, "PAGE", tmp_path)
    with pytest.raises(ValueError, match="the page comes with a clone of rs-transformer"):
        web.lay_out_page([str(MODEL)], tmp_path / "page")
    (tmp_path / "package.json").write_text("{}")
    (tmp_path / "package-lock.json").write_text("{}")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match="from npm, which is not installed"):
        web.vendor(tmp_path / "vendor")
