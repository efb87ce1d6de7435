"""Checkpoints in: loaded strictly or not at all, with a plain word for what is wrong with one, whoever asks."""

import hashlib
import json
import pickle
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from logging import LogRecord
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
    MarianMTModel,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.marian.modeling_marian import MarianSinusoidalPositionalEmbedding
from transformers.utils import (
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    cached_file,
    logging,
)
from transformers.utils.hub import extract_commit_hash, has_file

from .configuration_rs_marian import SIDES
from .modeling_rs_marian import PAD_LOGIT_BIAS, keep_apart
from .pipeline_rs_marian import leading_code, target_codes
from .tokenization import check_tokenizer, entries_of, tell_languages, with_code

Translator = tuple[PreTrainedModel, PreTrainedTokenizerBase]
MODEL_TYPES = ("marian", "rs_marian")
SAFE_WEIGHTS = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
BIAS = "final_logits_bias"
RUN_RECORD = "run.json"  # of a training, in its folder


def load_translator(name_or_path: str, revision: str = "main", **options: Any) -> Translator:
    """A checkpoint's model, in evaluation mode on this process's device, and its tokenizer, checked.

    Args:
        options: see `load_checkpoint`.

    Raises:
        ValueError, OSError: as `load_with_tokenizer`.
    """
    model, tokenizer = load_with_tokenizer(name_or_path, revision, **options)
    bar_entries_without_token(model, tokenizer)
    return model.eval().to(PartialState().device), tokenizer


def load_parent(
    name_or_path: str, revision: str = "main", allow_pickle: bool = False, **options: Any
) -> tuple[MarianMTModel, PreTrainedTokenizerBase]:
    """A Marian or RSMarian checkpoint, to make something of: model and tokenizer, checked.

    Raises:
        ValueError, OSError: another kind of model, or as `load_with_tokenizer`.
    """
    config = load_config(name_or_path, revision)
    if config.model_type not in MODEL_TYPES:
        raise ValueError(f"{name_or_path} is a {config.model_type} model; it must be Marian or RSMarian")
    return load_with_tokenizer(name_or_path, revision, allow_pickle=allow_pickle, **options)


def load_with_tokenizer(name_or_path: str, revision: str = "main", **options: Any) -> Translator:
    """A checkpoint's model and its tokenizer.

    Args:
        options: see `load_checkpoint`.

    Raises:
        ValueError, OSError: as `load_checkpoint`; or no tokenizer, or one that does not belong to the model.
    """
    model = load_checkpoint(name_or_path, revision=revision, **options)
    tokenizer = load_tokenizer(name_or_path, revision)
    check_tokenizer(model, tokenizer)
    return model, tokenizer


def load_config(name_or_path: str, revision: str = "main") -> PretrainedConfig:
    """A checkpoint's configuration, as it is stored.

    Raises:
        ValueError: a folder without a model, or a configuration that cannot be used.
        OSError: there is no such checkpoint.
    """
    folder = Path(name_or_path)
    if folder.is_dir() and not (folder / CONFIG_NAME).is_file():
        raise ValueError(f"{name_or_path} is a folder without {CONFIG_NAME}: no training has finished there")
    try:
        if not folder.is_dir():
            validate_repo_id(str(name_or_path))
        elif (folder / GENERATION_CONFIG_NAME).is_file():
            GenerationConfig.from_pretrained(folder)  # a model loads without it, and decodes otherwise
        return AutoConfig.from_pretrained(name_or_path, revision=revision, trust_remote_code=False)
    except OSError as error:
        if folder.is_dir():
            raise ValueError(f"{name_or_path} cannot be used: {first_line(error)}") from error
        raise OSError(
            f"there is no folder {str(name_or_path)!r}, and the Hub does not give it at revision {revision!r}: "
            f"{first_line(error)}"
        ) from error
    except HFValidationError as error:
        raise FileNotFoundError(f"there is no model folder {str(name_or_path)!r}") from error
    except (StrictDataclassError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{CONFIG_NAME} of {name_or_path} cannot be used: {first_line(error)}") from error


def load_tokenizer(name_or_path: str, revision: str = "main") -> PreTrainedTokenizerBase:
    """A checkpoint's tokenizer, without what transformers notes in it of how it was loaded.

    Raises:
        ValueError: there is none, or it is not complete.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, revision=revision, trust_remote_code=False)
    except (OSError, TypeError, ValueError, KeyError, RuntimeError, AssertionError, AttributeError) as error:
        raise ValueError(
            f"{name_or_path} has no complete tokenizer (source.spm, target.spm, vocab.json): {first_line(error)}"
        ) from error
    for name in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(name, None)  # they would be saved
    return tokenizer


def load_checkpoint(
    name_or_path: str, *, revision: str = "main", allow_pickle: bool = False, **options: Any
) -> PreTrainedModel:
    """`AutoModelForSeq2SeqLM.from_pretrained` that loads what was saved, all of it, or says what is wrong.

    Stock Marian's sinusoidal positions come out of `from_pretrained` as trainable; here they are not, as they are
    never saved. Tensors of a quantised checkpoint are left to its quantiser.

    Args:
        allow_pickle: read `pytorch_model.bin` too, which can run code of whoever made it.
        options: for `from_pretrained`; fields of the configuration, such as `decoder_layers`, may leave tensors out.

    Raises:
        ValueError: no sequence-to-sequence model; or weights that are a pickle, truncated, not of the names and
            shapes that the configuration asks for, of integers, or not finite.
        OSError: there is no such checkpoint.
    """
    config = load_config(name_or_path, revision)
    if type(config) not in AutoModelForSeq2SeqLM._model_mapping:
        raise ValueError(f"{name_or_path} is a {config.model_type} model, no sequence-to-sequence model")
    # Asked of the Hub here: transformers would have a third party convert a pickle, and load that.
    stored = next((name for name in SAFE_WEIGHTS if has_file(name_or_path, name, revision=revision)), None)
    if stored is None and not allow_pickle:
        raise ValueError(
            f"{name_or_path} has no safetensors weights at revision {revision!r}. On the Hub look for a revision that "
            "has them (refs/pr/…); or, if you trust whoever made its pickle, save it anew by transformers, or read it "
            "by training/collapse.py with --allow_pickle true"
        )
    try:
        with _without_report():
            model, info = AutoModelForSeq2SeqLM.from_pretrained(
                name_or_path,
                revision=revision,
                trust_remote_code=False,
                use_safetensors=None if allow_pickle else True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **options,
            )
    except SafetensorError as error:
        raise ValueError(
            f"the weights of {name_or_path} are truncated or damaged ({first_line(error)}); copy or download them "
            "again"
        ) from error
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"the weights of {name_or_path} are missing, truncated or damaged ({first_line(error)})"
        ) from error
    if getattr(model.config, "quantization_config", None) is None:
        types = {} if stored is None else _stored_types(name_or_path, revision, stored)
        # To transformers Marian's bias may be missing; it is always saved, and the model is another without it.
        lost = {BIAS} if isinstance(model, MarianMTModel) and types and BIAS not in types else set()
        _check_names(name_or_path, config, {**info, "missing_keys": lost | set(info["missing_keys"])})
        _check_values(name_or_path, model, types)
    # What the file has twice stays apart: stock models forget it at the next `tie_weights`.
    ties = model.get_expanded_tied_weights_keys(all_submodels=True)
    keep_apart(model, ties.keys() - model.all_tied_weights_keys.keys())
    for module in model.modules():
        if isinstance(module, MarianSinusoidalPositionalEmbedding):
            module.weight.requires_grad_(False)
    return model


@contextmanager
def _without_report() -> Iterator[None]:
    """Without transformers' table of what is missing or left over, and its word on ties: here they are judged."""
    logger = logging.get_logger("transformers.modeling_utils")

    def only_errors(record: LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    logger.addFilter(only_errors)
    try:
        yield
    finally:
        logger.removeFilter(only_errors)


def _check_names(name_or_path: str, config: PretrainedConfig, info: dict[str, Any]) -> None:
    """Raise `ValueError` unless a file has the tensors of the model, in their shapes.

    Args:
        config: as it is stored; the model may have been loaded with other fields.
        info: what `from_pretrained` says of the loading.
    """
    if info["mismatched_keys"]:
        name, found, expected = sorted(info["mismatched_keys"])[0]
        raise ValueError(
            f"the weights of {name_or_path} do not fit its config.json: {name} is {tuple(found)}, by the "
            f"configuration it is {tuple(expected)}"
        )
    # Embeddings and adapters of steps that were never stored start from zero, which changes nothing.
    stored_steps = {s: getattr(config, f"{s}_layers") for s in SIDES if getattr(config, "step_embeddings", False)}
    added = re.compile(r"model\.(encoder|decoder)\.step_embeddings\.(\d+)\.weight")
    missing = {
        name
        for name in info["missing_keys"]
        if not (match := added.fullmatch(name)) or int(match[2]) + 1 < stored_steps.get(match[1], 0)
    }
    if not getattr(config, "step_adapter_rank", 0):
        adapter = re.compile(r"model\.(encoder|decoder)\.step_projections\.\d+\.\w+\.(down|up)")
        missing = {name for name in missing if not adapter.fullmatch(name)}
    if missing:
        raise ValueError(f"the weights of {name_or_path} lack {_some(missing)}")
    unexpected = set(info["unexpected_keys"])
    if unexpected:
        with torch.device("meta"):  # what the caller's options leave out
            unexpected -= AutoModelForSeq2SeqLM.from_config(config).state_dict().keys()
    if unexpected:
        raise ValueError(f"by its config.json {name_or_path} has no use for some of its weights: {_some(unexpected)}")


def _check_values(name_or_path: str, model: PreTrainedModel, types: Mapping[str, str]) -> None:
    """Raise `ValueError` for weights that are integers in the file, whose types are given, NaN or infinite."""
    tensors = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    if strange := [name for name in tensors if not types.get(name, "F").startswith(("F", "BF"))]:
        raise ValueError(f"the weights of {name_or_path} must be floating-point numbers, and {_some(strange)} are not")
    for name, tensor in tensors.items():
        if name == BIAS:
            tensor = tensor.clamp(min=0)  # minus infinity bars a token
        if not tensor.is_meta and not tensor.isfinite().all():
            raise ValueError(f"the weights of {name_or_path} must be finite, and {name} has NaN or inf")


def _stored_types(name_or_path: str, revision: str, stored: str) -> dict[str, str]:
    """The tensors of safetensors files and their types there; loading makes all of them floating-point numbers."""
    files = [stored]
    if stored == SAFE_WEIGHTS_INDEX_NAME:
        index = Path(cached_file(name_or_path, stored, revision=revision))
        files = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    types = {}
    for file in files:
        with safe_open(cached_file(name_or_path, file, revision=revision), "pt") as opened:
            types |= {name: opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118 (not a dict)
    return types


def _some(names: Iterable[str]) -> str:
    """The first of some names, and how many more there are."""
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def coded_sources(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    sources: Iterable[str],
    source_lang: str | None,
    target_lang: str | None,
    as_trained: bool = True,
) -> tuple[list[str], int | None]:
    """Sources with the target's code where a model needs it and they have none, and its `forced_bos_token_id`, if any.

    Args:
        as_trained: a Marian in the folder of a training by this package gets the sources as they stand, as it got them
            there.

    Raises:
        ValueError: as `tell_languages`.
    """
    sources = list(sources)
    if target_codes(tokenizer) and (
        (as_trained and _was_trained(name)) or all(leading_code(tokenizer, each) for each in sources)
    ):
        return sources, None
    prefix, first_token = tell_languages(name, tokenizer, source_lang, target_lang)
    return with_code(tokenizer, prefix, sources), first_token


def _was_trained(name: str) -> bool:
    """Whether a checkpoint, or the run that it is of, has the record of a training by this package."""
    if Path(name).is_dir():
        return any((folder / RUN_RECORD).is_file() for folder in (Path(name), Path(name).parent))
    there = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    return cached_file(name, RUN_RECORD, **there) is not None


def first_line(error: BaseException) -> str:
    """What an error of a library says, as one line; theirs go on with advice for their own options."""
    first, *more = str(error).strip().splitlines() or [type(error).__name__]
    return f"{first} {more[0].strip()}" if more and first.endswith(":") else first


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


def bar_entries_without_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Bar what fills a Marian model's output up to a multiple, and no token has: it could not be made a text."""
    bias = getattr(model, BIAS, None)
    if bias is not None and hasattr(tokenizer, "separate_vocabs"):
        without = torch.ones(bias.shape[-1], dtype=torch.bool)
        without[list(entries_of(tokenizer, "target").values())] = False
        bias[:, without] = PAD_LOGIT_BIAS
