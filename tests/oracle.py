"""The strongest oracle there is: a stock `MarianMTModel` whose layers are copies of the shared ones."""

import re

import torch
from transformers import MarianConfig, MarianMTModel

from rs_transformer import RSMarianConfig, RSMarianForConditionalGeneration

VOCABULARY = 48
PAD = VOCABULARY - 1


def rs_config(**overrides) -> RSMarianConfig:
    fields = {
        "vocab_size": VOCABULARY,
        "pad_token_id": PAD,
        "decoder_start_token_id": PAD,
        "d_model": 32,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_layers": 6,
        "decoder_layers": 6,
        "max_position_embeddings": 64,
        "dropout": 0.0,
        # Large enough for attention to be far from uniform, so that a mistake shows.
        "init_std": 0.3,
    }
    return RSMarianConfig(**{**fields, **overrides})


def rs_model(seed: int = 0, **overrides) -> RSMarianForConditionalGeneration:
    torch.manual_seed(seed)
    model = RSMarianForConditionalGeneration(rs_config(**overrides)).eval()
    with torch.no_grad():
        # At their initial values biases, norms, step embeddings and adapters would hide a mistake.
        for name, parameter in model.named_parameters():
            if re.search(r"\.(layers|step_\w+)\.", name) and (parameter.dim() == 1 or name.endswith(".up")):
                parameter.add_((0.2 if parameter.dim() == 1 else 0.05) * torch.randn_like(parameter))
    return model


def unrolled_marian(model: RSMarianForConditionalGeneration) -> MarianMTModel:
    """A `MarianMTModel` with a copy of the shared layer for each step; `deepnorm` folded into the weights."""
    fields = MarianConfig().to_dict().keys() - {"model_type", "architectures", "transformers_version"}
    config = MarianConfig(**{name: value for name, value in model.config.to_dict().items() if name in fields})
    marian = MarianMTModel(config).eval()
    state = {name: tensor for name, tensor in model.state_dict().items() if stack_tensor(name) is None}
    for name, tensor in model.state_dict().items():
        side = "encoder" if ".encoder." in name else "decoder"
        scale = getattr(model.config, f"{side}_residual_scale") if re.search(r"(out_proj|fc2)\.", name) else 1
        for step_name in names_by_step(name, model.config):
            # A step embedding is one more part of the bias before it, an adapter of the matrix.
            part = adapter_matrix(model, name) if name.endswith(".up") else tensor
            state[step_name] = state.get(step_name, 0) + part / scale
    marian.load_state_dict(state)
    return marian


def stack_tensor(name: str) -> re.Match | None:
    """Side, kind, index and rest of the name of a tensor of the stacks."""
    kinds = "layers|step_norms|step_embeddings|step_projections"
    return re.fullmatch(rf"model\.(encoder|decoder)\.({kinds})\.(\d+)\.(.+)", name)


def adapter_matrix(model: RSMarianForConditionalGeneration, name: str) -> torch.Tensor:
    """What a step adds to a shared matrix, by the name of one of the two factors."""
    factors = model.state_dict(keep_vars=True)
    up, down = (factors[f"{name.rpartition('.')[0]}.{part}"] for part in ("up", "down"))
    return up @ down


def names_by_step(name: str, config: RSMarianConfig) -> list[str]:
    """Where the unrolled model has a tensor of the stacks: once for each step that applies it."""
    if (match := stack_tensor(name)) is None or name.endswith(".down"):
        return []
    side, kind, index, rest = match.groups()
    steps = [int(index)]
    if kind == "layers":
        steps = [step for step, layer in enumerate(getattr(config, f"{side}_layer_map")) if layer == int(index)]
    if kind == "step_embeddings":
        rest = "final_layer_norm.bias"
    elif kind == "step_projections":
        rest = re.sub("^(self|encoder)_attn_", r"\1_attn.", rest).removeprefix("feed_forward_")
        rest = rest.replace(".up", ".weight")
    return [f"model.{side}.layers.{step}.{rest}" for step in steps]


def marian(seed: int = 0, **fields) -> MarianMTModel:
    """A stock model whose layers all differ."""
    return unrolled_marian(rs_model(seed=seed, encoder_unique_layers=6, decoder_unique_layers=6, **fields))


def with_own_weights(model: MarianMTModel, name: str = "lm_head.weight") -> MarianMTModel:
    """The model as if loaded from a file in which a matrix has values of its own, whatever the configuration says."""
    state = model.state_dict()
    state[name] = 0.3 * torch.randn(state[name].shape, generator=torch.Generator().manual_seed(7))
    return type(model).from_pretrained(None, config=model.config, state_dict=state).eval()


def batch(seed: int = 0) -> dict[str, torch.Tensor]:
    """Three sentence pairs of different lengths, padded."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(1, PAD, (3, 9), generator=generator)
    labels = torch.randint(1, PAD, (3, 7), generator=generator)
    input_ids[1, 5:], labels[2, 4:] = PAD, -100
    return {"input_ids": input_ids, "attention_mask": (input_ids != PAD).long(), "labels": labels}
