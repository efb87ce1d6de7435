"""Plain transformers: the stock `MarianMTModel` that an RSMarian equals, for what knows Marian and not this package.

The layers are written out, so the file has the size of a vanilla model of the same depth.
"""

from pathlib import Path

import torch
from accelerate import PartialState
from transformers import MarianMTModel, PreTrainedTokenizerBase

from ..checkpoints import load_parent
from ..decoding import DecodingArguments, TransformersEngine
from ..layer_transfer import check_rs_marian, expand

QUANTIZATIONS = ("float32", "float16", "bfloat16")


def convert(model: str, output_dir: str | Path, quantization: str = "float32", revision: str = "main") -> None:
    """Write a `MarianMTModel` folder of an RSMarian checkpoint, with its tokenizer.

    Args:
        model: on the Hub or in a folder.
        output_dir: written to.
        quantization: type of the stored weights, one of `QUANTIZATIONS`.

    Raises:
        TypeError: not an RSMarian.
        ValueError: the model has `marian_positions`.
    """
    loaded, tokenizer = load_parent(model, revision, dtype=torch.float32)
    check_rs_marian(loaded)
    if loaded.config.marian_positions:
        raise ValueError(f"{model} has marian_positions, and a stock MarianMTModel that is loaded has transformers'")
    expanded = expand(loaded)
    expanded.to(getattr(torch, quantization)).save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)


def load(folder: str | Path, tokenizer: PreTrainedTokenizerBase, decoding: DecodingArguments) -> TransformersEngine:
    """The written model by stock transformers, computed in the type that it is stored in."""
    model = MarianMTModel.from_pretrained(folder).eval().to(PartialState().device)
    return TransformersEngine(model, tokenizer, decoding)
