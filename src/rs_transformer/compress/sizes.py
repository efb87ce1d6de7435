"""How large a model is, in memory and in an int8 file: known from its configuration, before it is made."""

import copy
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import MarianConfig, MarianMTModel

from ..configuration_rs_marian import RSMarianConfig
from ..layer_transfer import stock_config
from ..modeling_rs_marian import RSMarianForConditionalGeneration

POSITIONS = "embed_positions"  # computed by all but CTranslate2, which stores them once
# CTranslate2 writes names, shapes and links for the weights of every step: so many of each side's, so many bytes each.
NAMES, NAME_BYTES = {"encoder": 16, "decoder": 27}, 68


@dataclass(frozen=True)
class Sizes:
    """Of a model: `parameters`, and what its weights take in float32 and in CTranslate2's int8, in bytes."""

    parameters: int
    float32: int
    int8: int


def sizes_of(config: MarianConfig) -> Sizes:
    """The sizes of a model of this shape, Marian or RSMarian, tied weights counted once.

    The int8 file has a byte for each element of a matrix and a scale for each of its rows, all else in float32, among
    it the sinusoidal positions, which other formats leave out. The figure is up to 0.5% above the file's size.
    """
    kind = RSMarianForConditionalGeneration if isinstance(config, RSMarianConfig) else MarianMTModel
    with torch.device("meta"):
        model = kind(config)
    shapes = [tensor.shape for name, tensor in model.named_parameters() if POSITIONS not in name]
    bias = model.final_logits_bias.numel()
    parameters = sum(shape.numel() for shape in shapes)
    positions = config.max_position_embeddings * config.d_model
    if getattr(config, "step_adapter_rank", 0):  # CTranslate2 gets the matrices of each step, written out
        return Sizes(parameters, 4 * (parameters + bias), sizes_of(stock_config(config)).int8)
    int8 = sum(shape.numel() + 4 * shape[0] if len(shape) == 2 else 4 * shape.numel() for shape in shapes)
    names = sum(number * getattr(config, f"{side}_layers") for side, number in NAMES.items())
    return Sizes(parameters, 4 * (parameters + bias), int8 + 4 * (bias + positions) + NAME_BYTES * names)


def with_vocabulary(config: MarianConfig, source: int, target: int) -> MarianConfig:
    """The configuration with so many entries of the source's and of the target's vocabulary."""
    config = copy.deepcopy(config)
    config.vocab_size = source
    if config.decoder_vocab_size is not None:
        config.decoder_vocab_size = target
    for name in ("pad_token_id", "decoder_start_token_id"):  # must be an entry
        setattr(config, name, min(source, target) - 1)
    return config


def largest_vocabulary(config: MarianConfig, int8: int, needed: Mapping[str, int]) -> int:
    """The most entries, of each vocabulary where there are two, with which an int8 file has at most so many bytes.

    Args:
        needed: the entries that `"source"` and `"target"` have at most, if nothing bounds them.

    Returns:
        The number; 0 where the layers alone are larger.
    """

    def size(entries: int) -> int:
        return sizes_of(with_vocabulary(config, *(min(entries, needed[side]) for side in ("source", "target")))).int8

    return bisect_right(range(1, max(needed.values()) + 1), int8, key=size)
