"""Checkpoints in: loaded strictly or not at all, with a plain word for what is wrong with one, whoever asks."""

import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    MarianMTModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.marian.modeling_marian import MarianSinusoidalPositionalEmbedding
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import extract_commit_hash, has_file

from .modeling_rs_marian import PAD_LOGIT_BIAS

Translator = tuple[PreTrainedModel, PreTrainedTokenizerBase]
MODEL_TYPES = ("marian", "rs_marian")
SAFE_WEIGHTS = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)


def load_translator(name_or_path: str, revision: str = "main", **options: Any) -> Translator:
    """A checkpoint's model, in evaluation mode on this process's device, and its tokenizer.

    Raises:
        ValueError: a folder without a model, or weights that are truncated or damaged.
        OSError: there is no such checkpoint.
    """
    check_model_folder(name_or_path)
    tokenizer = AutoTokenizer.from_pretrained(name_or_path, revision=revision)
    model = load_checkpoint(name_or_path, revision=revision, **options)
    return model.eval().to(PartialState().device), tokenizer


def load_parent(
    name_or_path: str, revision: str = "main", allow_pickle: bool = False
) -> tuple[MarianMTModel, PreTrainedTokenizerBase]:
    """A checkpoint to collapse: model and tokenizer.

    Raises:
        ValueError: not a Marian model, no or another tokenizer, weights that are a pickle, truncated, or of other
            tensors or widths than `config.json` says.
        OSError: there is no such checkpoint.
    """
    config = AutoConfig.from_pretrained(name_or_path, revision=revision)
    if config.model_type not in MODEL_TYPES:
        raise ValueError(f"{name_or_path} is a {config.model_type} model; it must be Marian or RSMarian")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, revision=revision)
    except (OSError, TypeError, ValueError, KeyError, RuntimeError, AssertionError) as error:
        raise ValueError(
            f"{name_or_path} has no complete tokenizer (source.spm, target.spm, vocab.json): {error}"
        ) from error
    # Asked of the Hub here: transformers would have a third party convert a pickle, and load that.
    safetensors = [has_file(name_or_path, name, revision=revision) for name in SAFE_WEIGHTS]
    if not any(safetensors) and not allow_pickle:
        raise ValueError(
            f"{name_or_path} has no safetensors weights at revision {revision!r}. On the Hub look for a revision that "
            "has them (refs/pr/…); or read its pickle with allow_pickle, if you trust whoever made it"
        )
    try:
        model, info = load_checkpoint(
            name_or_path,
            revision=revision,
            use_safetensors=None if allow_pickle else True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"the weights of {name_or_path} are missing, truncated or damaged ({error})") from error
    if info["mismatched_keys"]:
        name, found, expected = sorted(info["mismatched_keys"])[0]
        raise ValueError(
            f"the weights of {name_or_path} do not fit its config.json: {name} is {tuple(found)}, by the "
            f"configuration it is {tuple(expected)}"
        )
    if info["missing_keys"]:
        raise ValueError(f"the weights of {name_or_path} lack {', '.join(sorted(info['missing_keys'])[:3])}")
    if info["unexpected_keys"]:
        unexpected = ", ".join(sorted(info["unexpected_keys"])[:3])
        raise ValueError(f"by its config.json {name_or_path} has no use for some of its weights: {unexpected}")
    check_tokenizer(model, tokenizer)
    return model, tokenizer


def check_model_folder(name_or_path: str) -> None:
    """Raise `ValueError` for a folder in which there is no model; transformers would speak of its tokenizer."""
    folder = Path(name_or_path)
    if folder.is_dir() and not (folder / CONFIG_NAME).is_file():
        raise ValueError(f"{name_or_path} is a folder without {CONFIG_NAME}: no training has finished there")


def load_checkpoint(name_or_path: str, **options: Any) -> Any:
    """`AutoModelForSeq2SeqLM.from_pretrained`, with a plain word for a file that is damaged.

    Stock Marian's sinusoidal positions come out of `from_pretrained` as trainable; here they are not, as they are
    never saved.

    Raises:
        ValueError: the weights are truncated or otherwise no safetensors file.
        OSError: there is no such checkpoint.
    """
    try:
        loaded = AutoModelForSeq2SeqLM.from_pretrained(name_or_path, **options)
    except SafetensorError as error:
        raise ValueError(
            f"the weights of {name_or_path} are truncated or damaged ({error}); copy or download them again"
        ) from error
    for module in (loaded[0] if isinstance(loaded, tuple) else loaded).modules():
        if isinstance(module, MarianSinusoidalPositionalEmbedding):
            module.weight.requires_grad_(False)
    return loaded


def commit_of(name_or_path: str, revision: str) -> str | None:
    """The Hub commit that a revision of a checkpoint is at, as its cached files tell; None for a plain folder."""
    return extract_commit_hash(cached_file(name_or_path, CONFIG_NAME, revision=revision), None)


def model_digest(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of weights, configuration and vocabulary, which tells a model from another of the same name."""
    config = model.config.to_diff_dict()
    for name in ("_name_or_path", "transformers_version", "_attn_implementation", "dtype"):
        config.pop(name, None)
    sha = hashlib.sha256(json.dumps([config, tokenizer.get_vocab()], sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        sha.update(name.encode())
        sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


def bar_padding(model: PreTrainedModel) -> None:
    """Bar the padding token of a Marian model through `final_logits_bias`, as a new RSMarian has it.

    OPUS-MT checkpoints come without: there training moves the start embedding, and other engines translate otherwise.
    """
    bias = getattr(model, "final_logits_bias", None)
    if bias is not None:
        bias[:, model.config.pad_token_id] = PAD_LOGIT_BIAS


def check_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `ValueError` if a tokenizer has ids that a model has not, or another padding token."""
    config = model.config
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} entries, the model's vocabulary {config.vocab_size}: they do not "
            "belong together"
        )
    targets = len(tokenizer.target_encoder) if getattr(tokenizer, "separate_vocabs", False) else 0
    if targets > config.decoder_vocab_size:
        raise ValueError(
            f"the tokenizer has {targets} target entries, the model's decoder vocabulary {config.decoder_vocab_size}: "
            "they do not belong together"
        )
    if tokenizer.pad_token_id != config.pad_token_id:
        raise ValueError(
            f"the tokenizer's padding token is {tokenizer.pad_token_id}, the model's {config.pad_token_id}: they do "
            "not belong together"
        )
