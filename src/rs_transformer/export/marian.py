"""Marian's own format, written and read, and decoding with Marian's own engine, which the package `pymarian` carries.

A shared decoder layer is in the file once (`transformer-tied-layers`). Marian has no such option for the encoder: its
layers are written out. DeepNet's residual scale, step embeddings and the LayerNorms of steps are folded into the
weights of the steps, which then differ and are written out in the decoder too.
"""

import json
import logging as standard_logging
import re
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import yaml
from transformers import MarianMTModel, MarianTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from ..checkpoints import load_parent
from ..configuration_rs_marian import LAYER_SHARINGS, SIDES, RSMarianConfig, layer_map
from ..decoding import DecodingArguments
from ..layer_transfer import expand
from ..modeling_rs_marian import PAD_LOGIT_BIAS, RSMarianForConditionalGeneration
from ..shortlist import Shortlist
from ..tokenization import check_vocabulary, convert_source_ids_to_tokens, vocabulary, vocabulary_size

logger = logging.get_logger(__name__)

QUANTIZATIONS = ("float32",)
SHORTLIST_FILE = "lex.s2t"
CONFIG_KEY = "special:model.yml"
# The engine has the first of its vocabulary for every sentence, here the end of sentence, and so many candidates of a
# piece: all that the file has, and those that are less probable than nothing.
SHORTLIST_LIMITS = (1, 1_000_000, 0)
LONGEST_SOURCE = 1_000_000  # in tokens: what is too long is cut before
# Marian's "gelu" is x · sigmoid(1.702 x), transformers' "quick_gelu".
ACTIVATIONS = {"swish": "swish", "silu": "swish", "relu": "relu", "quick_gelu": "gelu"}
# What this code can read, beside sizes: a post-norm Transformer of Marian's defaults.
ARCHITECTURE = {
    "type": "transformer",
    "transformer-preprocess": "",
    "transformer-postprocess-emb": "d",
    "transformer-postprocess": "dan",
    "transformer-postprocess-top": "",
    "transformer-ffn-depth": 2,
    "transformer-decoder-ffn-depth": 0,  # as the encoder
    "transformer-decoder-autoreg": "self-attention",
    "transformer-train-position-embeddings": False,
    "transformer-no-projection": False,
    "transformer-depth-scaling": False,
    "output-omit-bias": False,
    "right-left": False,
    "ulr": False,
    "lemma-dim-emb": 0,
    "input-types": [],
}


def _layer_names(side: str) -> dict[str, str]:
    """Names of a layer's tensors in transformers, and in Marian after the layer's number."""
    names = {}
    for module, prefix in (("self_attn", "self"), ("encoder_attn", "context"))[: 1 if side == "encoder" else 2]:
        for projection, letter in (("q_proj", "q"), ("k_proj", "k"), ("v_proj", "v"), ("out_proj", "o")):
            names[f"{module}.{projection}.weight"] = f"{prefix}_W{letter}"
            names[f"{module}.{projection}.bias"] = f"{prefix}_b{letter}"
        names[f"{module}_layer_norm.weight"] = f"{prefix}_Wo_ln_scale"
        names[f"{module}_layer_norm.bias"] = f"{prefix}_Wo_ln_bias"
    for number in (1, 2):
        names[f"fc{number}.weight"], names[f"fc{number}.bias"] = f"ffn_W{number}", f"ffn_b{number}"
    return names | {"final_layer_norm.weight": "ffn_ffn_ln_scale", "final_layer_norm.bias": "ffn_ffn_ln_bias"}


def _numbers_of_distinct(layers: Sequence[Mapping[str, np.ndarray]]) -> list[int]:
    """For each layer its number among those that differ, from 0."""
    distinct: list[Mapping[str, np.ndarray]] = []
    numbers = []
    for layer in layers:
        is_equal = [all(np.array_equal(known[name], layer[name]) for name in layer) for known in distinct]
        if True not in is_equal:
            distinct.append(layer)
            is_equal.append(True)
        numbers.append(is_equal.index(True))
    return numbers


def convert(model: str, output_dir: str | Path, quantization: str = "float32", revision: str = "main") -> None:
    """Write `model.npz`, its vocabularies and `decoder.yml` of an RSMarian or Marian checkpoint, the tokenizer beside.

    Marian's engine computes its own positions, which are the model's with `marian_positions`; without, a warning says
    so. The package pymarian is not needed.

    Args:
        model: on the Hub or in a folder.
        output_dir: written to.
        quantization: `"float32"` alone.
        revision: branch, tag or commit of the model.

    Raises:
        ValueError: Marian has no such model; says what it lacks.
    """
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    loaded, tokenizer = load_parent(model, revision, dtype=torch.float32)
    if not getattr(loaded.config, "marian_positions", False):
        logger.warning(
            f"{model} computes positions as transformers does, and Marian's engine computes its own, so that some "
            "translations may differ: see marian_positions in docs/export.md"
        )
    stock = expand(loaded) if isinstance(loaded, RSMarianForConditionalGeneration) else loaded
    check_model(stock, tokenizer)
    tensors, options = _to_marian(stock, tokenizer)
    np.savez(folder / "model.npz", **tensors, **{CONFIG_KEY: _config_bytes(options)})
    search = loaded.generation_config
    settings = {
        "models": ["model.npz"],
        "vocabs": _write_vocabularies(tokenizer, folder),
        "relative-paths": True,
        "cpu-threads": 1,
        "allow-unk": True,
        "beam-size": search.num_beams or 1,
        "normalize": 1.0 if search.length_penalty is None else search.length_penalty,
    }
    (folder / "decoder.yml").write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    tokenizer.save_pretrained(folder)


def check_model(model: MarianMTModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `ValueError` for what Marian's engine cannot do."""
    config = model.config
    if config.activation_function not in ACTIVATIONS:
        raise ValueError(
            f"Marian has no activation_function {config.activation_function!r}, only {', '.join(ACTIVATIONS)}"
        )
    if config.encoder_attention_heads != config.decoder_attention_heads:
        raise ValueError(
            f"Marian has one number of heads, the model {config.encoder_attention_heads} in the encoder and "
            f"{config.decoder_attention_heads} in the decoder"
        )
    if not config.scale_embedding:
        raise ValueError("Marian scales embeddings by the root of d_model, the model does not (scale_embedding=false)")
    if not torch.equal(model.lm_head.weight, model.get_decoder().embed_tokens.weight):
        raise ValueError("the output has weights of its own, not those of the embeddings; only tied ones are written")
    start = model.config.decoder_start_token_id
    if model.get_decoder().embed_tokens.weight[start].any():
        raise ValueError(
            f"Marian starts a translation from an embedding of zeros, and the model's start token, {start}, has "
            "another"
        )
    tokens = vocabulary(tokenizer, "source") | vocabulary(tokenizer, "target")
    if cut := [token for token in tokens if " " in token]:
        raise ValueError(f"Marian's engine cuts text at spaces, and the tokenizer has the token {cut[0]!r}")


def _to_marian(model: MarianMTModel, tokenizer: PreTrainedTokenizerBase) -> tuple[dict[str, np.ndarray], dict]:
    """Tensors and options of Marian's: weights (inputs, outputs), other parameters (1, width); no padding."""
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    config = model.config
    languages = zip(SIDES, ("source", "target"), strict=True)
    rows = {side: list(vocabulary(tokenizer, language).values()) for side, language in languages}
    embeddings = {side: state[f"model.{side}.embed_tokens.weight"] for side in SIDES}
    # One matrix or two: by the weights, for the configuration may say what the checkpoint has not.
    shared = config.share_encoder_decoder_embeddings and np.array_equal(*embeddings.values())
    names = {"decoder": "Wemb"} if shared else {side: f"{side}_Wemb" for side in SIDES}
    tensors = {names[side]: embeddings[side][rows[side]] for side in names}
    tensors["decoder_ff_logit_out_b"] = state["final_logits_bias"][:, rows["decoder"]]
    depths = {side: getattr(config, f"{side}_layers") for side in SIDES}
    tied: list[int] = []
    for side, depth in depths.items():
        layers = [
            {
                marian: _to_matrix(state[f"model.{side}.layers.{layer}.{name}"])
                for name, marian in _layer_names(side).items()
            }
            for layer in range(depth)
        ]
        numbers = _numbers_of_distinct(layers) if side == "decoder" else list(range(depth))
        if side == "decoder" and len(set(numbers)) < depth:
            tied = [number + 1 for number in numbers]
        for number, layer in zip(numbers, layers, strict=True):
            tensors |= {f"{side}_l{number + 1}_{name}": tensor for name, tensor in layer.items()}
    options = ARCHITECTURE | {
        "dim-vocabs": [len(rows[side]) for side in SIDES],
        "dim-emb": config.d_model,
        "enc-depth": depths["encoder"],
        "dec-depth": depths["decoder"],
        "transformer-heads": config.encoder_attention_heads,
        "transformer-dim-ffn": config.encoder_ffn_dim,
        "transformer-decoder-dim-ffn": config.decoder_ffn_dim,
        "transformer-ffn-activation": ACTIVATIONS[config.activation_function],
        "transformer-tied-layers": tied,
        "tied-embeddings-all": shared,
        "tied-embeddings": not shared,
    }
    return tensors, options


def _to_matrix(tensor: np.ndarray) -> np.ndarray:
    """As Marian has it: weights (inputs, outputs), everything else (1, width)."""
    return np.ascontiguousarray(tensor.T) if tensor.ndim == 2 else tensor[None]


def _config_bytes(options: Mapping[str, Any]) -> np.ndarray:
    return np.frombuffer(yaml.safe_dump(dict(options)).encode() + b"\0", dtype=np.int8)


def _write_vocabularies(tokenizer: PreTrainedTokenizerBase, folder: Path) -> list[str]:
    """The source's and the target's, the same file if they are one."""
    separate = getattr(tokenizer, "separate_vocabs", False)
    files = ["vocab.source.yml", "vocab.target.yml"] if separate else ["vocab.yml"] * 2
    for file, side in zip(files, ("source", "target"), strict=True):
        entries = (f"{_quoted(name)}: {index}\n" for index, name in enumerate(vocabulary(tokenizer, side)))
        (folder / file).write_text("".join(entries), encoding="utf-8")
    return files


def _quoted(text: str) -> str:
    """A YAML scalar that every reader takes for this text."""
    return '"' + re.sub(r'[^ -~]|["\\]', lambda match: f"\\U{ord(match[0]):08x}", text) + '"'


def _read_vocabulary(file: str | Path) -> dict[str, int]:
    # The loader that takes everything for text: Marian does not quote `no` and `1`.
    entries = yaml.load(Path(file).read_text("utf-8"), Loader=yaml.CBaseLoader)
    return {token: int(index) for token, index in entries.items()}


def read(npz: str | Path, tokenizer: PreTrainedTokenizerBase | None = None) -> RSMarianForConditionalGeneration:
    """Make an RSMarian of a Transformer in Marian's format: one that `convert` wrote, or that Marian trained.

    Layers that are tied (decoder) or equal (encoder) are stored once if one of the sharing schemes has them where
    they are; otherwise every layer is stored, which is logged. The model has `marian_positions`.

    Args:
        npz: the model's file.
        tokenizer: says where padding stands in the vocabulary; without it, padding is added as the last entry.

    Raises:
        ValueError: no model of Marian's, another architecture than a post-norm Transformer with tied embeddings, or
            a tokenizer of another size; says which option.
    """
    tensors, options = _load(npz)
    for name, expected in ARCHITECTURE.items():
        found = options.get(name, expected)
        if found != expected and (name, found) != ("transformer-decoder-ffn-depth", 2):
            raise ValueError(f"{npz} has {name} {found!r}; only {expected!r} can be read")
    if not options.get("tied-embeddings-all") and not options.get("tied-embeddings"):
        raise ValueError(f"{npz} has neither tied-embeddings-all nor tied-embeddings: the output has other weights")
    embeddings = [tensors.get("Wemb", tensors.get(f"{side}_Wemb", ())) for side in SIDES]
    _check_tensors(npz, tensors, options, [len(embedding) for embedding in embeddings])
    if len(embeddings[0]) != len(embeddings[1]):
        raise ValueError(f"{npz} has vocabularies of different sizes ({len(embeddings[0])}, {len(embeddings[1])})")
    # The ids that Marian's entries have here: padding and gaps in the tokenizer's ids lie between them.
    ids = [list(range(len(embedding))) for embedding in embeddings]
    if tokenizer is not None:
        ids = [list(vocabulary(tokenizer, side).values()) for side in ("source", "target")]
        if [len(its) for its in ids] != [len(embedding) for embedding in embeddings]:
            raise ValueError(
                f"{npz} has a vocabulary of {len(embeddings[1])} entries, the tokenizer one of {len(ids[1])}: they do "
                "not belong together"
            )
    layers = {
        side: _layers(tensors, side, depth, options.get("transformer-tied-layers") if side == "decoder" else None)
        for side, depth in zip(SIDES, (options["enc-depth"], options["dec-depth"]), strict=True)
    }
    config = _rs_config(options, layers, "Wemb" in tensors, len(embeddings[1]), tokenizer)
    model = RSMarianForConditionalGeneration(config).eval()
    state = {}
    sizes = (config.vocab_size, config.decoder_vocab_size)
    for side, embedding, its, size in zip(SIDES, embeddings, ids, sizes, strict=True):
        rows = np.zeros((size, config.d_model), np.float32)
        rows[its] = embedding
        state[f"model.{side}.embed_tokens.weight"] = rows
        for layer, weights in zip(config.layer_map(side, len(layers[side])), layers[side], strict=True):
            state |= {f"model.{side}.layers.{layer}.{name}": _from_matrix(t, name) for name, t in weights.items()}
    bias = np.full((1, config.decoder_vocab_size), PAD_LOGIT_BIAS, np.float32)
    bias[:, ids[1]] = tensors["decoder_ff_logit_out_b"]
    state |= {"final_logits_bias": bias, "lm_head.weight": state["model.decoder.embed_tokens.weight"]}
    if config.share_encoder_decoder_embeddings:
        state["model.shared.weight"] = state["lm_head.weight"]
    positions = {name: tensor for name, tensor in model.state_dict().items() if "embed_positions" in name}
    model.load_state_dict({name: torch.from_numpy(array) for name, array in state.items()} | positions)
    return model


def _load(npz: str | Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Tensors and options of a model's file, all of it read.

    Raises:
        ValueError: there is no such file, or it is cut or damaged, or no model of Marian's.
    """
    try:
        with np.load(npz) as file:
            tensors = dict(file)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{npz} is missing, truncated or damaged ({error}): convert its model again") from error
    if CONFIG_KEY not in tensors:
        raise ValueError(f"{npz} is no model of Marian's: it has no {CONFIG_KEY}")
    return tensors, yaml.safe_load(tensors[CONFIG_KEY].tobytes().decode().rstrip("\0"))


def _check_tensors(
    npz: str | Path, tensors: Mapping[str, np.ndarray], options: Mapping[str, Any], entries: Sequence[int]
) -> None:
    """Raise `ValueError` unless a model's file has the tensors that its options ask for, in their shapes.

    Args:
        entries: of the vocabularies of source and target.
    """
    width = options["dim-emb"]
    shapes = {f"{side}_Wemb": (size, width) for side, size in zip(SIDES, entries, strict=True)}
    if "Wemb" in tensors:
        shapes = {"Wemb": (entries[1], width)}
    shapes["decoder_ff_logit_out_b"] = (1, entries[1])
    inner = options["transformer-dim-ffn"]
    depths = {"encoder": options["enc-depth"], "decoder": options["dec-depth"]}
    for side, depth in depths.items():
        if side == "decoder":
            inner = options.get("transformer-decoder-dim-ffn") or inner
        wide = {"ffn_W1": (width, inner), "ffn_b1": (1, inner), "ffn_W2": (inner, width)}
        numbers = (side == "decoder" and options.get("transformer-tied-layers")) or range(1, depth + 1)
        for number in set(numbers):
            for name in _layer_names(side).values():
                square = (width if re.fullmatch(r"\w+_W[qkvo]", name) else 1, width)
                shapes[f"{side}_l{number}_{name}"] = wide.get(name, square)
    for name, shape in shapes.items():
        if name not in tensors:
            raise ValueError(f"{npz} lacks {name}: convert its model again")
        if tensors[name].shape != shape:
            raise ValueError(f"{npz} has {name} in the shape {tensors[name].shape}, which must be {shape}")


def _layers(
    tensors: Mapping[str, np.ndarray], side: str, depth: int, tied: Sequence[int] | None
) -> list[dict[str, np.ndarray]]:
    """The tensors of each step's layer, by transformers' names."""
    names = _layer_names(side)
    return [
        {name: tensors[f"{side}_l{number}_{marian}"] for name, marian in names.items()}
        for number in tied or range(1, depth + 1)
    ]


def _rs_config(
    options: Mapping[str, Any],
    layers: Mapping[str, Sequence[Mapping[str, np.ndarray]]],
    shared: bool,
    entries: int,
    tokenizer: PreTrainedTokenizerBase | None,
) -> RSMarianConfig:
    padding = entries if tokenizer is None else tokenizer.pad_token_id
    end = 0 if tokenizer is None else tokenizer.eos_token_id
    activations = {marian: ours for ours, marian in reversed(ACTIVATIONS.items())}
    fields = {
        "vocab_size": entries + 1 if tokenizer is None else vocabulary_size(tokenizer, "source"),
        "decoder_vocab_size": entries + 1 if tokenizer is None else vocabulary_size(tokenizer, "target"),
        "share_encoder_decoder_embeddings": shared,
        "pad_token_id": padding,
        "decoder_start_token_id": padding,
        "eos_token_id": end,
        "forced_eos_token_id": end,
        "d_model": options["dim-emb"],
        "activation_function": activations[options["transformer-ffn-activation"]],
        "marian_positions": True,
    }
    for side in SIDES:
        fields[f"{side}_layers"] = len(layers[side])
        fields[f"{side}_attention_heads"] = options["transformer-heads"]
        fields[f"{side}_ffn_dim"] = layers[side][0]["fc1.bias"].shape[-1]
        fields |= _sharing(layers[side], side)
    return RSMarianConfig(**fields)


def _sharing(layers: Sequence[Mapping[str, np.ndarray]], side: str) -> dict[str, Any]:
    """Unique layers and sharing of a stack; all of them if no scheme has its equal layers where they are."""
    numbers = _numbers_of_distinct(layers)
    unique_layers = max(numbers) + 1
    for sharing in LAYER_SHARINGS:
        if numbers == layer_map(len(layers), unique_layers, sharing, side):
            return {f"{side}_unique_layers": unique_layers, f"{side}_layer_sharing": sharing}
    logger.warning(f"the {side}'s layers are shared as {numbers}, which no layer_sharing has: every layer is stored")
    return {f"{side}_unique_layers": len(layers)}


def _from_matrix(tensor: np.ndarray, name: str) -> np.ndarray:
    """The inverse of `_to_matrix`."""
    return np.ascontiguousarray(tensor.T) if ".weight" in name and "norm" not in name else tensor[0]


def convert_tokenizer(
    vocabularies: Sequence[str | Path],
    source_spm: str | Path,
    target_spm: str | Path,
    output_dir: str | Path,
    *,
    source_lang: str,
    target_lang: str,
) -> MarianTokenizer:
    """Write the tokenizer's folder of a model that Marian trained on text cut by SentencePiece; padding comes last.

    Args:
        vocabularies: Marian's `.yml` files, of the source and of the target, which may be the same.
        source_spm, target_spm: the SentencePiece models.
        output_dir: written to, for `from_pretrained`.
    """
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    sides = [_read_vocabulary(file) for file in vocabularies]
    separate = sides[0] != sides[-1]
    for entries, name in zip(sides, ["vocab.json", "target_vocab.json"][: 1 + separate], strict=False):
        entries = entries | {"<pad>": max(entries.values()) + 1}
        (folder / name).write_text(json.dumps(entries, ensure_ascii=False, indent=1), encoding="utf-8")
    tokenizer = MarianTokenizer(
        vocab=str(folder / "vocab.json"),
        target_vocab_file=str(folder / "target_vocab.json") if separate else None,
        source_spm=str(source_spm),
        target_spm=str(target_spm),
        source_lang=source_lang,
        target_lang=target_lang,
        separate_vocabs=separate,
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def _vocabulary_files(folder: Path) -> list[Path]:
    """The vocabularies of a folder that `convert` has written, of source and target."""
    try:
        return [folder / file for file in yaml.safe_load((folder / "decoder.yml").read_text("utf-8"))["vocabs"]]
    except (OSError, UnicodeDecodeError, yaml.YAMLError, TypeError, KeyError) as error:
        raise ValueError(f"{folder} has no decoder.yml that can be read: convert its model again") from error


def write_shortlist(shortlist: Shortlist, folder: str | Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write a shortlist into a converted model's folder; its `decoder.yml` uses it from then on."""
    shortlist.save(Path(folder, SHORTLIST_FILE), tokenizer)
    settings = yaml.safe_load(Path(folder, "decoder.yml").read_text("utf-8"))
    settings["shortlist"] = [SHORTLIST_FILE, *SHORTLIST_LIMITS]
    Path(folder, "decoder.yml").write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")


class MarianDecoder:
    """Decoding by Marian's engine on one CPU thread, from a folder that `convert` has written.

    The engine gives each thread a batch of its own, and a call is one batch.

    Args:
        folder: with `model.npz` and vocabularies.
        tokenizer: of the model that it was made from.
        decoding: how to decode. An empty source has an empty translation.
        use_shortlist: only the target tokens that the folder's shortlist has for a batch are looked at, filled up to
            a multiple of eight.

    Raises:
        ImportError: there is no pymarian.
        ValueError: the folder holds no model, or one of another vocabulary; or its path has a space; or its shortlist
            is to be used, and there is none.
    """

    def __init__(
        self,
        folder: str | Path,
        tokenizer: PreTrainedTokenizerBase,
        decoding: DecodingArguments,
        use_shortlist: bool = False,
    ):
        folder = Path(folder).resolve()
        check_path(folder)
        files = _vocabulary_files(folder)
        check_vocabulary(folder, tokenizer, *(list(_read_vocabulary(file)) for file in files))
        # The engine would end this process at what does not fit.
        tensors, options = _load(folder / "model.npz")
        entries = [len(vocabulary(tokenizer, side)) for side in ("source", "target")]
        _check_tensors(folder / "model.npz", tensors, options, entries)
        self.tokenizer, self.decoding = tokenizer, decoding
        self.entries = vocabulary(tokenizer, "target")
        options = {}
        if use_shortlist:
            Shortlist.load(folder / SHORTLIST_FILE, tokenizer)  # for what is wrong with it
            options["shortlist"] = [str(folder / SHORTLIST_FILE), *map(str, SHORTLIST_LIMITS)]
        self.engine = _pymarian().Translator(
            models=str(folder / "model.npz"),
            vocabs=[str(file) for file in files],
            beam_size=decoding.num_beams,
            normalize=decoding.length_penalty,
            allow_unk=True,
            max_length=LONGEST_SOURCE,
            cpu_threads=1,
            quiet=True,
            quiet_translation=True,
            **options,
        )

    def translate_batch(self, input_ids: Sequence[list[int]]) -> list[list[str]]:
        """The translation of each of a batch of source token ids."""
        # The engine adds the end of sentence to the source, and stops where a translation is as long as a multiple of
        # the longest source; half a token less, since the multiple is rounded.
        lines = [" ".join(convert_source_ids_to_tokens(self.tokenizer, ids[:-1])) for ids in input_ids]
        factor = max(0.0, self.decoding.max_new_tokens - 1.5) / max(len(ids) for ids in input_ids)
        found = self.engine.translate(
            lines, **{"max-length-factor": factor, "mini-batch": len(lines), "maxi-batch": 1}
        )
        found += [""] * (len(lines) - len(found))  # empty ones at the end are not there
        ids = [[self.entries[token] for token in text.split(" ")] if text else [] for text in found]
        return [[text] for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]


def check_path(folder: str | Path) -> None:
    """Raise `ValueError` for a folder with a space: the engine cuts its options there, and would end this process."""
    if re.search(r"\s", str(Path(folder).resolve())):
        raise ValueError(f"Marian's engine takes no path with a space: {folder}; rename or move the folder")


def _pymarian() -> ModuleType:
    """The package, whose import turns on the log of every library: put back as it was."""
    root = standard_logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    try:
        import pymarian
    finally:
        root.setLevel(level)
        root.handlers[:] = handlers
    return pymarian


def load(
    folder: str | Path, tokenizer: PreTrainedTokenizerBase, decoding: DecodingArguments, use_shortlist: bool = False
) -> MarianDecoder:
    """The written model in Marian's engine."""
    return MarianDecoder(folder, tokenizer, decoding, use_shortlist)
