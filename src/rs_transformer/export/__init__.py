"""Other engines, a file for each, imported when it is needed, since it needs the engine's package.

Each has `QUANTIZATIONS` (the first changes nothing), `convert(model, output_dir, quantization, revision)`, which
writes a folder, and `load(folder, tokenizer, decoding)`, which gives a `decoding.Engine` of it. `commands/export.py`
chooses among them and verifies what they write.
"""

import importlib
import importlib.util
from types import ModuleType

# Each engine, and the package that it comes in.
TARGETS = {
    "ctranslate2": "ctranslate2",
    "onnx": "onnxruntime",
    "marian": "pymarian",
    "transformers": "transformers",
}


def load_engine(target: str, decodes: bool = True) -> ModuleType:
    """The module of an engine, or a `ValueError` that says what to install for it.

    Args:
        target: one of `TARGETS`.
        decodes: the engine itself must be there, not only what writes for it.
    """
    needs = f'to={target} needs: pip install "rs-transformer[{target}]"'
    try:
        module = importlib.import_module(f"rs_transformer.export.{target}")
    except ImportError as error:
        raise ValueError(f"{needs} ({error})") from error
    if decodes and importlib.util.find_spec(TARGETS[target]) is None:
        raise ValueError(f"{needs}, to verify what it writes; or verification=false")
    return module
