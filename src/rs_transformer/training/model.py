"""A model for training, new or from a checkpoint, from a recipe's options. For inference use the Auto classes."""

from dataclasses import dataclass, field, fields

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.activations import ACT2FN
from transformers.utils import logging

from ..checkpoints import bar_entries_without_token, bar_padding, load_checkpoint, load_config
from ..configuration_rs_marian import LAYER_SHARINGS, SIDES, RSMarianConfig, layer_map
from ..layer_transfer import depth_config
from ..modeling_rs_marian import RSMarianForConditionalGeneration
from ..tokenization import check_tokenizer, vocabulary_size
from ..utils.ranges import check_range

logger = logging.get_logger(__name__)


@dataclass
class ModelArguments:
    """The model: a checkpoint to go on from, or what a new `RSMarianConfig` has other than its defaults."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A checkpoint on the Hub or in a folder. Without it a model is made anew."}
    )
    revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the checkpoint."})
    d_model: int | None = field(default=None, metadata={"help": "Width of the hidden states."})
    encoder_layers: int | None = field(default=None, metadata={"help": "Depth of the encoder."})
    decoder_layers: int | None = field(default=None, metadata={"help": "Depth of the decoder."})
    encoder_unique_layers: int | None = field(
        default=None, metadata={"help": "Stored encoder layers, 1 to its depth."}
    )
    decoder_unique_layers: int | None = field(
        default=None, metadata={"help": "Stored decoder layers, 1 to its depth."}
    )
    layer_sharing: str | None = field(
        default=None, metadata={"help": "How steps are mapped to layers.", "choices": list(LAYER_SHARINGS)}
    )
    encoder_layer_sharing: str | None = field(
        default=None, metadata={"help": "The same for the encoder alone.", "choices": list(LAYER_SHARINGS)}
    )
    decoder_layer_sharing: str | None = field(
        default=None, metadata={"help": "The same for the decoder alone.", "choices": list(LAYER_SHARINGS)}
    )
    deepnorm: bool | None = field(default=None, metadata={"help": "DeepNet's residual scale and initialisation."})
    step_embeddings: bool | None = field(
        default=None, metadata={"help": "A learned vector for each step, added to what the step starts from."}
    )
    step_layer_norms: bool | None = field(default=None, metadata={"help": "LayerNorms of its own for each step."})
    step_biases: bool | None = field(default=None, metadata={"help": "Biases of its own for each step."})
    step_adapter_rank: int | None = field(
        default=None, metadata={"help": "Rank of a matrix of its own that each step adds to each shared one; 0: none."}
    )
    tie_encoder_decoder_layers: bool | None = field(
        default=None, metadata={"help": "The decoder's self-attention and feed-forward are the encoder's."}
    )
    marian_positions: bool | None = field(
        default=None, metadata={"help": "Positions of Marian's own engine, for a model that is to run there."}
    )
    encoder_ffn_dim: int | None = field(default=None, metadata={"help": "Width of the encoder's feed-forward part."})
    decoder_ffn_dim: int | None = field(default=None, metadata={"help": "Width of the decoder's feed-forward part."})
    encoder_attention_heads: int | None = field(default=None, metadata={"help": "Heads of the encoder."})
    decoder_attention_heads: int | None = field(default=None, metadata={"help": "Heads of the decoder."})
    activation_function: str | None = field(default=None, metadata={"help": "Of the feed-forward part."})
    max_position_embeddings: int | None = field(default=None, metadata={"help": "Longest input, in tokens."})
    dropout: float | None = field(default=None, metadata={"help": "On embeddings and residual branches."})
    attention_dropout: float | None = field(default=None, metadata={"help": "On attention weights."})
    activation_dropout: float | None = field(default=None, metadata={"help": "Inside the feed-forward part."})
    init_std: float | None = field(default=None, metadata={"help": "Standard deviation of the initial weights."})
    attn_implementation: str | None = field(
        default=None,
        metadata={
            "help": "eager, sdpa or flash_attention_2; default: sdpa, and eager for bf16 on a CPU, which is faster."
        },
    )

    def __post_init__(self) -> None:
        sizes = ("layers", "unique_layers", "ffn_dim", "attention_heads")
        sided = [f"{side}_{size}" for side in SIDES for size in sizes]
        check_range(self, "d_model", "max_position_embeddings", *sided, least=1)
        check_range(self, "dropout", "attention_dropout", "activation_dropout", least=0, below=1)
        check_range(self, "init_std", above=0)
        check_range(self, "step_adapter_rank", least=0)
        name = self.activation_function
        if name is not None and name not in ACT2FN:
            raise ValueError(f"activation_function must be one of {', '.join(ACT2FN)}, got {name!r}")

    def config_fields(self) -> dict:
        """The fields of the configuration that were given."""
        skipped = ("model_name_or_path", "revision", "attn_implementation")
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in skipped}
        return {name: value for name, value in given.items() if value is not None}


def build_model(args: ModelArguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Make a new RSMarian for a `MarianTokenizer`, or load a checkpoint (RSMarian or any sequence-to-sequence model).

    Raises:
        ValueError: an impossible configuration, a field that the checkpoint does not have, or a tokenizer that has
            other ids than the checkpoint's embeddings.
    """
    if args.model_name_or_path is None:
        config = RSMarianConfig(**config_from_tokenizer(tokenizer), **args.config_fields())
        model = RSMarianForConditionalGeneration._from_config(config, attn_implementation=args.attn_implementation)
    else:
        config = load_config(args.model_name_or_path, args.revision)
        unknown = [name for name in args.config_fields() if not hasattr(config, name)]
        if unknown:
            raise ValueError(f"{args.model_name_or_path} is a {config.model_type} model, which has no {unknown[0]}")
        check_function(args, config)
        check_step_parameters(args, config)
        # In half precision, as OPUS-MT stores its models, Adam would lose most updates; `bf16` and `fp16` of the
        # training arguments cast where it is safe.
        options = args.config_fields() | {"attn_implementation": args.attn_implementation, "dtype": torch.float32}
        model = load_checkpoint(args.model_name_or_path, revision=args.revision, **options)
        check_tokenizer(model, tokenizer)
        bar_padding(model)
        bar_entries_without_token(model, tokenizer)
    trainable = model.num_parameters(only_trainable=True)
    logger.info(f"{type(model).__name__}: {trainable:,} trainable parameters")
    return model


def faster_attention(device: torch.device, bf16: bool) -> str | None:
    """The attention to train with where the usual one is slow; None: it is not.

    On a CPU in bfloat16 an update with PyTorch's fused attention takes 1.6 times as long as with the plain one
    (`benchmarks/train_attention.py`); in float32 it is 4% faster.
    """
    return "eager" if bf16 and device.type == "cpu" else None


def check_function(args: ModelArguments, config: PretrainedConfig) -> None:
    """Raise `ValueError` if the weights would fit, and the model that has learned them would be another function."""
    same = (*(f"{side}_attention_heads" for side in SIDES), "activation_function", "deepnorm", "step_embeddings")
    same += tuple(f"{side}_unique_layers" for side in SIDES)
    for name in same:
        stored, wanted = getattr(config, name, None), getattr(args, name)
        added = name == "step_embeddings" and not stored  # from zero
        alike = name == "activation_function" and wanted and _is_same_function(wanted, stored)
        if wanted not in (None, stored) and not added and not alike:
            mend = "; training/collapse.py makes models of other layers" if "unique" in name else ""
            raise ValueError(
                f"{args.model_name_or_path} has learned with {name}={stored} and would be spoiled by {name}={wanted}: "
                f"leave it out, or at {stored}{mend}"
            )
    schemes = [name for name in ("layer_sharing", *(f"{side}_layer_sharing" for side in SIDES)) if getattr(args, name)]
    for side in SIDES if schemes else ():
        depth = getattr(config, f"{side}_layers")  # that it has learned at
        scheme = getattr(args, f"{side}_layer_sharing") or getattr(config, f"{side}_layer_sharing")
        scheme = scheme or args.layer_sharing or config.layer_sharing
        stored = config.layer_map(side, depth)
        wanted = layer_map(depth, getattr(config, f"{side}_unique_layers"), scheme, side)
        if wanted != stored:
            raise ValueError(
                f"the {side} steps of {args.model_name_or_path} apply layers {' '.join(map(str, stored))}, and with "
                f"{schemes[0]}={getattr(args, schemes[0])} {' '.join(map(str, wanted))}: leave it out"
            )


def _is_same_function(*activations: str) -> bool:
    """Whether two names are of one activation, such as swish and silu."""
    first, second = (ACT2FN[name](torch.linspace(-4, 4, 33)) for name in activations)
    return torch.allclose(first, second)


def check_step_parameters(args: ModelArguments, config: PretrainedConfig) -> None:
    """Raise `ValueError` if steps, or sides, would need parameters of their own that the checkpoint does not have.

    New LayerNorms and biases spoil a model; new adapters start from zero, but two ranks are two models.
    """
    kept = _layer_options(config)
    for name, what in (("step_layer_norms", "LayerNorms"), ("step_biases", "biases")):
        stored, wanted = getattr(config, name, False), getattr(args, name)
        if wanted and not stored:
            raise ValueError(
                f"{args.model_name_or_path} has no {what} of the steps' own; training/collapse.py with "
                f"--{name} true{kept} makes a model of it that has"
            )
        if stored and wanted is False:
            raise ValueError(
                f"{args.model_name_or_path} has {what} of the steps' own and none to share; training/collapse.py with "
                f"--{name} false{kept} makes a model of it that shares them"
            )
    tied, wanted = getattr(config, "tie_encoder_decoder_layers", False), args.tie_encoder_decoder_layers
    if wanted not in (None, tied):
        raise ValueError(
            f"the decoder's layers of {args.model_name_or_path} are {'' if tied else 'not '}the encoder's; "
            f"training/collapse.py with --tie_encoder_decoder_layers {str(wanted).lower()}{kept} makes a model of it "
            f"whose are{' not' if tied else ''}"
        )
    rank, wanted = getattr(config, "step_adapter_rank", 0), args.step_adapter_rank
    if rank and wanted not in (None, rank):
        raise ValueError(
            f"{args.model_name_or_path} has adapters of rank {rank}; training/collapse.py with --step_adapter_rank "
            f"{wanted}{kept} makes a model of it that has others"
        )
    if getattr(config, "has_step_parameters", False):
        depth_config(config, args.encoder_layers, args.decoder_layers)


def _layer_options(config: PretrainedConfig) -> str:
    """What `training/collapse.py` has to be told for a model's layers to stay as they are."""
    layers = {f"{side}_unique_layers": getattr(config, f"{side}_unique_layers", 1) for side in SIDES}
    schemes = ("layer_sharing", *(f"{side}_layer_sharing" for side in SIDES)) if max(layers.values()) > 1 else ()
    options = {name: number for name, number in layers.items() if number > 1}
    options |= {name: value for name in schemes if (value := getattr(config, name)) not in (None, "cycle")}
    return "".join(f" --{name} {value}" for name, value in options.items())


def config_from_tokenizer(tokenizer: PreTrainedTokenizerBase) -> dict:
    """The fields of a Marian configuration that follow from a tokenizer, tokens that were added to it included."""
    return {
        "vocab_size": vocabulary_size(tokenizer, "source"),
        "decoder_vocab_size": vocabulary_size(tokenizer, "target"),
        "share_encoder_decoder_embeddings": not getattr(tokenizer, "separate_vocabs", False),
        "pad_token_id": tokenizer.pad_token_id,
        "decoder_start_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "forced_eos_token_id": tokenizer.eos_token_id,
    }
