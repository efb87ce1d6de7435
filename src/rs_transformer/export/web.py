"""A page that translates in the browser: transformers.js, models and `hub_cards/web/`, laid out as a static Space."""

import hashlib
import json
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from huggingface_hub import ModelCard
from transformers import MarianMTModel, PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, cached_file, logging

from ..checkpoints import load_parent
from ..layer_transfer import count_parameters, with_depth
from ..modeling_rs_marian import RSMarianForConditionalGeneration
from ..pipeline_rs_marian import split_code, target_codes
from ..utils.files import write_json, write_text
from . import onnx
from .examples import EXAMPLES
from .tokenizer_json import tokenizer_json

logger = logging.get_logger(__name__)

# Of the clone that this is installed from, or in which the command is run.
PAGES = [root / "hub_cards" / "web" for root in (Path(__file__).resolve().parents[3], Path.cwd())]
PAGE = next(filter(Path.is_dir, PAGES), PAGES[-1])
PAGE_FILES = ("README.md", "index.html", "style.css", "app.js", "sentences.js", "worker.js", "sw.js")
ONNX_RUNTIME_LICENCE = "LICENSE-onnxruntime"  # which npm's package does not bring along
OTHER = "other"  # licence, as the Hub calls it
LOCK_FILES = ("package.json", "package-lock.json")
# From npm's packages to `vendor/`. The page runs on one thread of WebAssembly: of ONNX Runtime's builds the smallest.
VENDORED = {
    "@huggingface/transformers": ("transformers.web.min.js",),
    "onnxruntime-web": ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"),
}
PROGRAM = tuple(f"vendor/{name}" for names in VENDORED.values() for name in names)
# What transformers.js imports by name, for which a page without a build step has the build that it brings.
IMPORTED = ("onnxruntime-web/webgpu", "onnxruntime-common")
DTYPES = {"float32": "fp32", "float16": "fp16", "int8": "q8"}
MODEL_FILES = (CONFIG_NAME, GENERATION_CONFIG_NAME, "tokenizer.json", "tokenizer_config.json")


def lay_out_page(
    model_names: Sequence[str],
    folder: Path,
    quantization: str = "int8",
    decoder_depths: Sequence[int] | None = None,
) -> None:
    """Write the page with some models into a folder, which any static server can serve.

    Args:
        model_names: RSMarian or Marian models, whose tokenizers name their languages, each pair once; a visitor
            chooses between them, the first at first.
        quantization: of the weights, one of `DTYPES`.
        decoder_depths: between which a visitor chooses, the first at first; default: each model's own.

    Raises:
        ValueError: there is no page, for this is no clone; npm is missing or fails; or a model does not fit: its
            tokenizer names no languages or those of another, has separate vocabularies or cannot be a
            `tokenizer.json`.
    """
    if not (PAGE / "index.html").is_file():
        raise ValueError(f"there is no {PAGE}: the page comes with a clone of rs-transformer, install it from one")
    if quantization not in DTYPES:
        raise ValueError(f"quantization must be one of {', '.join(DTYPES)}, got {quantization!r}")
    loaded: dict[tuple[str, str], tuple[MarianMTModel, PreTrainedTokenizerBase]] = {}
    licences: dict[tuple[str, str], str] = {}
    card_files: dict[tuple[str, str], str] = {}
    for model_name in model_names:
        model, tokenizer = load_parent(model_name)
        if decoder_depths and not isinstance(model, RSMarianForConditionalGeneration):
            raise ValueError(f"{model_name} has one decoder depth: decoder_depths are for recurrently stacked models")
        # As BCP 47 has them, which browsers know.
        source, target = (split_code(getattr(tokenizer, side, None))[0] for side in ("source_lang", "target_lang"))
        if not (source and target):
            raise ValueError(f"the tokenizer of {model_name} does not name its languages, which the page shows")
        if (source, target) in loaded:
            raise ValueError(f"{model_name} translates {source} to {target}, as another model of the page does")
        if getattr(tokenizer, "separate_vocabs", False):
            raise ValueError(f"{model_name} has a vocabulary for each side, and transformers.js one for a translator")
        if target_codes(tokenizer):
            raise ValueError(f"{model_name} has several target languages, and the page tells a model none")
        tokenizer_json(tokenizer, "source")  # raises where there can be none
        loaded[source, target] = model, tokenizer
        if card := cached_file(model_name, "README.md", _raise_exceptions_for_missing_entries=False):
            card_files[source, target] = card
        licences[source, target] = licence_of(model_name, card)
    for name in PAGE_FILES:
        shutil.copyfile(PAGE / name, folder / name)
    vendor(folder / "vendor")
    (folder / "models").mkdir()
    cards = {}
    for (source, target), card in card_files.items():  # which say whose work a model is of
        cards[source, target] = f"models/{source}-{target}.md"
        shutil.copyfile(card, folder / cards[source, target])
    models = [
        {
            "source": source,
            "target": target,
            "license": licences[source, target],
            "card": cards.get((source, target)),
            "examples": EXAMPLES.get(source, []),
        }
        | write_model(model, tokenizer, folder / "models", f"{source}-{target}", quantization, depth)
        for (source, target), (model, tokenizer) in loaded.items()
        for depth in decoder_depths or [model.config.decoder_layers]
    ]
    write_licences(folder / "README.md", licences, cards)
    program_bytes = sum((folder / name).stat().st_size for name in PROGRAM)
    write_json({"models": models, "program": PROGRAM, "program_bytes": program_bytes}, folder / "models.json")
    # Another store of the service worker for other files.
    digest = hashlib.sha256()
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        digest.update(file.read_bytes())
    worker = folder / "sw.js"
    write_text(worker.read_text("utf-8").replace("unpublished", digest.hexdigest()[:16]), worker)


def licence_of(model: str, card: str | Path | None) -> str:
    """What the card of a model says, or `other`."""
    try:
        licence = ModelCard.load(card).data.license if card else None
    except (ValueError, yaml.YAMLError):  # of a card that is damaged
        licence = None
    if not licence:
        logger.warning(f"{model} has no card that says its licence: the page says {OTHER!r}")
    return ", ".join(licence) if isinstance(licence, list) else licence or OTHER


def write_licences(
    readme: Path, licences: Mapping[tuple[str, str], str], cards: Mapping[tuple[str, str], str] | None = None
) -> None:
    """Say in a Space's README the licence of each model, and in its metadata the one that all of them have.

    Args:
        cards: of the models that have one, by the languages as `licences`, the file beside the README.
    """
    whole = set(licences.values())
    card = ModelCard.load(readme)
    card.data.license = whole.pop() if len(whole) == 1 else OTHER
    rows = []
    for (source, target), licence in licences.items():
        link = (cards or {}).get((source, target))
        rows.append(f"- {source} to {target}: {licence}{f' ([card]({link}))' if link else ''}")
    card.text = "\n".join(
        [
            card.text.rstrip(),
            "",
            "## Licences",
            "",
            "The page and transformers.js are Apache-2.0, ONNX Runtime is MIT (`vendor/` has the texts).",
            "The models have their own:",
            "",
            *rows,
            "",
        ]
    )
    card.save(readme)


def vendor(folder: Path) -> None:
    """Copy transformers.js and ONNX Runtime from npm, in the versions of the page's `package-lock.json`.

    Raises:
        ValueError: npm is missing or fails.
    """
    folder.mkdir()
    with TemporaryDirectory() as temporary:
        modules = PAGE / "node_modules"
        if not is_of_the_lock(modules):
            modules = Path(temporary, "node_modules")
            for name in LOCK_FILES:
                shutil.copyfile(PAGE / name, Path(temporary, name))
            if shutil.which("npm") is None:
                raise ValueError("the page needs transformers.js from npm, which is not installed: install Node.js")
            command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix", temporary]
            installed = subprocess.run(command, capture_output=True, text=True, check=False)
            if installed.returncode:
                raise ValueError(f"npm could not install transformers.js: {installed.stderr.strip()}")
        for package, names in VENDORED.items():
            for name in names:
                shutil.copyfile(modules / package / "dist" / name, folder / name)
        shutil.copyfile(modules / "@huggingface" / "transformers" / "LICENSE", folder / "LICENSE-transformers.js")
    shutil.copyfile(PAGE / ONNX_RUNTIME_LICENCE, folder / ONNX_RUNTIME_LICENCE)
    script = folder / "transformers.web.min.js"
    text = script.read_text("utf-8")
    for name in IMPORTED:
        if f'from"{name}"' not in text:
            raise ValueError(
                f"transformers.js does not import {name} as its pinned version does: npm gave another one"
            )
        text = text.replace(f'from"{name}"', 'from"./ort.wasm.bundle.min.mjs"')
    write_text(text, script)


def is_of_the_lock(modules: Path) -> bool:
    """Whether npm has installed there, to the end, the packages of the page's `package-lock.json`."""
    installed = modules / ".package-lock.json"  # what it writes last
    if not installed.is_file():
        return False
    here, wanted = (
        json.loads(file.read_text("utf-8"))["packages"] for file in (installed, PAGE / "package-lock.json")
    )
    return all(here.get(name) == wanted[name] for name in (f"node_modules/{package}" for package in VENDORED))


def write_model(
    model: MarianMTModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    languages: str,
    quantization: str,
    decoder_depth: int,
) -> dict[str, Any]:
    """Write what transformers.js loads, and return what `models.json` says of it: files, and sizes in bytes."""
    if decoder_depth != model.config.decoder_layers:
        model = with_depth(model, decoder_layers=decoder_depth)
    output = folder / f"{languages}-depth{decoder_depth}"
    with TemporaryDirectory() as temporary:
        for part in (model, tokenizer):
            part.save_pretrained(temporary)
        exported = Path(temporary, "onnx-model")
        exported.mkdir()
        onnx.convert(temporary, exported, quantization)
        names = [*MODEL_FILES, *(str(file.relative_to(exported)) for file in sorted(exported.glob("onnx/*")))]
        for name in names:
            (output / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(exported / name, output / name)
    return {
        "folder": output.name,
        "files": [f"models/{output.name}/{name}" for name in names],
        "dtype": DTYPES[quantization],
        "decoder_layers": decoder_depth,
        "parameters": count_parameters(model)["total"],
        "bytes": sum((output / name).stat().st_size for name in names),
    }
