"""Other engines, a file for each, imported when it is needed, since it needs the engine's package.

Each has `QUANTIZATIONS` (the first changes nothing), `convert(model, output_dir, quantization, revision)`, which
writes a folder, and `load(folder, tokenizer, decoding)`, which gives a `decoding.Engine` of it; where the engine takes
a shortlist, also `write_shortlist`, `SHORTLIST_FILE` in the folder, and `use_shortlist` of `load`.
`commands/export.py` chooses among them and verifies what they write.
"""

import importlib
import importlib.util
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from types import ModuleType

# Each engine, and the package that it comes in.
TARGETS = {
    "ctranslate2": "ctranslate2",
    "onnx": "onnxruntime",
    "marian": "pymarian",
    "transformers": "transformers",
}
TITLES = {"ctranslate2": "CTranslate2", "onnx": "ONNX Runtime", "marian": "Marian", "transformers": "PyTorch"}


def is_installed(target: str) -> bool:
    """Whether the engine itself, one of `TARGETS`, is there; what writes for it may need more, or less."""
    return importlib.util.find_spec(TARGETS[target]) is not None


def load_engine(target: str, option: str = "to") -> ModuleType:
    """The module of an engine, or a `ValueError` that says what to install for it.

    Args:
        target: one of `TARGETS`.
        option: that names the engine, for the message.
    """
    try:
        return importlib.import_module(f"{__name__}.{target}")
    except ImportError as error:
        raise ValueError(f"{option}={target} needs: {install(target)} ({error})") from error


def version_of(package: str) -> str:
    """The version of a package, whichever distribution has brought it, as `onnxruntime-gpu` brings `onnxruntime`."""
    try:
        return version(package)
    except PackageNotFoundError:
        (distribution, *_) = packages_distributions().get(package, [package])
        return version(distribution)


def install(target: str) -> str:
    """The command that installs an engine."""
    return f'pip install "rs-transformer[{target}]"'
