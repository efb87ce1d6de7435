"""transformers.js with a model: in Node against PyTorch, and in a page against Node.

    python benchmarks/web.py --models hub_cards/rs-marian-ja-en-tanaka hub_cards/marian-ja-en \\
        --sentences 500 --in_page 50

Greedy, at most 64 tokens, of the shipped excerpt's test set. Node: the share of translations that are PyTorch's, BLEU
of both, the median of a sentence's milliseconds. Page: Chromium without a window, WebAssembly on one thread; the share
that is Node's of the same `dtype`, the median of a sentence's milliseconds, and seconds until it is ready. Needs Node
and what `npm ci --ignore-scripts --prefix hub_cards/web` installs, Chromium and selenium.
"""

import functools
import http.server
import json
import shutil
import statistics
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Any

from common import parse_args, print_table
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from rs_transformer.checkpoints import load_translator
from rs_transformer.decoding import DecodingArguments, TransformersEngine, decode_all, encode_sources
from rs_transformer.export import web
from rs_transformer.metrics import corpus_scores

TEST = Path(__file__).resolve().parents[1] / "training" / "data" / "tanaka-excerpt" / "test.jsonl"
HEADLESS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic")
NODE = """
import { env, pipeline } from "@huggingface/transformers";
env.localModelPath = "./";
env.allowRemoteModels = false;
const [dtype, sentences] = [process.argv[2], JSON.parse(process.argv[3])];
const translator = await pipeline("translation", "model", { dtype, session_options: { intraOpNumThreads: 1 } });
await translator("1", { num_beams: 1, max_new_tokens: 1 });
const found = [];
for (const sentence of sentences) {
  const start = performance.now();
  const [{ translation_text }] = await translator(sentence, { num_beams: 1, max_new_tokens: 64 });
  found.push([translation_text, performance.now() - start]);
}
console.log(JSON.stringify(found));
"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        pass


def by_pytorch(model_name: str, sentences: list[str]) -> list[str]:
    model, tokenizer = load_translator(model_name)
    engine = TransformersEngine(model, tokenizer, DecodingArguments(num_beams=1, max_new_tokens=64))
    return [texts[0] for texts in decode_all(engine, encode_sources(model, tokenizer, sentences), 4096)]


def by_node(folder: Path, dtype: str, sentences: list[str]) -> tuple[list[str], list[float]]:
    """Translations, and milliseconds of each."""
    with tempfile.TemporaryDirectory() as temporary:
        Path(temporary, "node_modules").symlink_to(web.PAGE / "node_modules")
        Path(temporary, "model").symlink_to(folder)
        Path(temporary, "translate.mjs").write_text(NODE)
        command = ["node", "translate.mjs", dtype, json.dumps(sentences)]
        done = subprocess.run(command, cwd=temporary, stdout=subprocess.PIPE, text=True, check=True)
    texts, times = zip(*json.loads(done.stdout), strict=True)
    return list(texts), list(times)


def by_page(folder: Path, sentences: list[str]) -> tuple[list[str], list[float], float]:
    """Translations, milliseconds of each, and seconds until the page was ready."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    options = ChromeOptions()
    options.binary_location = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    for argument in HEADLESS:
        options.add_argument(argument)
    browser = Chrome(options, Service(shutil.which("chromedriver")))

    def wait(beginning: str) -> str:
        status = browser.find_element(By.ID, "status")
        WebDriverWait(browser, 300).until(lambda _: status.text.startswith(beginning))
        return status.text

    try:
        browser.get(f"http://localhost:{server.server_port}/")
        seconds = float(wait("Ready after").split()[2])
        box = browser.find_element(By.ID, "source")
        texts, times = [], []
        for sentence in sentences:
            browser.execute_script("arguments[0].value = arguments[1]", box, sentence)
            box.send_keys(Keys.CONTROL, Keys.ENTER)
            wait("1 sentence")
            texts.append(browser.find_element(By.CSS_SELECTOR, "#translations .target").text)
            times.append(float(browser.find_element(By.CSS_SELECTOR, "#translations .time").text.split()[0]))
            browser.execute_script("document.getElementById('status').textContent = ''")
    finally:
        browser.quit()
        server.shutdown()
    return texts, times, seconds


def same(first: list[str], second: list[str]) -> str:
    pairs = list(zip(first, second, strict=False))
    return f"{sum(one == other for one, other in pairs)} of {len(pairs)}"


def main() -> None:
    args = parse_args(
        __doc__,
        models=(str, ["hub_cards/rs-marian-ja-en-tanaka"], "Folders of Marian or RSMarian models."),
        quantizations=(str, ["float32", "int8"], f"Of {', '.join(web.DTYPES)}."),
        sentences=(int, 500, "Sentences in Node."),
        in_page=(int, 50, "The first of them in the page."),
    )
    pairs = [json.loads(line)["translation"] for line in TEST.read_text("utf-8").splitlines()[: args.sentences]]
    sources, references = [pair["ja"] for pair in pairs], [pair["en"] for pair in pairs]
    rows = []
    for name in args.models:
        expected = by_pytorch(name, sources)
        for quantization in args.quantizations:
            with tempfile.TemporaryDirectory() as temporary:
                folder = Path(temporary)
                web.lay_out_page([name], folder, quantization)
                page = json.loads((folder / "models.json").read_text("utf-8"))
                (model,) = page["models"]
                found, node_times = by_node(folder / "models" / model["folder"], model["dtype"], sources)
                shown, page_times, seconds = by_page(folder, sources[: args.in_page])
            rows.append(
                {
                    "model": Path(name).name,
                    "weights": quantization,
                    "model MB": f"{model['bytes'] / 1e6:.2f}",
                    "program MB": f"{page['program_bytes'] / 1e6:.1f}",
                    "Node is PyTorch": same(found, expected),
                    "BLEU": f"{corpus_scores(found, references, 'en')['bleu']:.2f}",
                    "PyTorch": f"{corpus_scores(expected, references, 'en')['bleu']:.2f}",
                    "Node ms": f"{statistics.median(node_times):.1f}",
                    "page is Node": same(shown, found),
                    "page ms": f"{statistics.median(page_times):.0f}",
                    "ready s": seconds,
                }
            )
            print(rows[-1], flush=True)
    print_table(rows)
    if args.output:
        Path(args.output).write_text(json.dumps({"options": vars(args), "rows": rows}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
