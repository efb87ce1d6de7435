"""Layer transfer: `collapse` a trained deep model into a recurrently stacked one, `expand` it back, change its depth.

The paper's second contribution (Dabre & Fujita 2021, https://arxiv.org/abs/2106.10002): the shared layer starts from
a trained model's layers, and a shallower model from a deeper one. For models in memory; folders are the business of
`commands/collapse.py`.
"""

import copy
import dataclasses
import inspect
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import MarianConfig, MarianMTModel, PretrainedConfig

from .calibration import STACK_PARAMETER, calibrate
from .configuration_rs_marian import SIDES, RSMarianConfig
from .modeling_rs_marian import RSMarianForConditionalGeneration, keep_apart, step_projection_name

# What each step of a configuration has of its own, so that there are no more steps than it says.
OWN_TO_STEPS = ("step_layer_norms", "step_biases", "step_adapter_rank")
METHODS = ("first", "last", "average", "stepwise", "calibrated")
# A tensor that some step applies: of a stored layer, or the step's own LayerNorm or bias.
LAYER_TENSOR = re.compile(
    r"model\.(encoder|decoder)\.(layers|step_norms|step_projections)\.(\d+)\.(.+(?:weight|bias))"
)
# In a layer: what a step may have a bias of its own for, and what it may add a low-rank matrix to.
PROJECTION = re.compile(r"(.+_proj|fc[12])\.(weight|bias)")
# In a layer: what the sides share, if they do.
TIED_TENSOR = re.compile(r"(self_attn\..+_proj|fc[12])\.(weight|bias)")
# What a residual branch ends in: scaling it scales the branch.
BRANCH_OUTPUT = re.compile(r"(out_proj|fc2)\.(weight|bias)$")
# Belongs to a saved checkpoint or to one model class, and is made anew.
CLASS_FIELDS = ("model_type", "architectures", "auto_map", "custom_pipelines", "transformers_version", "_name_or_path")


@dataclasses.dataclass(frozen=True)
class TransferPlan:
    """Where each tensor of a collapsed model comes from.

    Attributes:
        layers: for `"encoder"` and `"decoder"`, the parent's steps that each unique layer is made from. A vanilla
            parent's steps are its layers.
        sources: child tensor -> the parent tensors that it is the mean of; one where it is a copy.
        adapters: low-rank matrix of a step -> the parent's matrix, and the shared one whose difference to it is what
            the adapter starts from.
        dropped: the parent's tensors that nothing is made from.
    """

    layers: dict[str, list[list[int]]]
    sources: dict[str, list[str]]
    adapters: dict[str, tuple[str, str]]
    dropped: list[str]


def source_steps(layer_map: Sequence[int], method: str | int, side: str = "decoder") -> list[list[int]]:
    """For each unique layer of a layer map, the parent's steps that it starts from.

    Args:
        layer_map: of the child; the parent is as deep.
        method: see `collapse`.
        side: `"encoder"` or `"decoder"`, for the error message.

    Raises:
        ValueError: an unknown method, or a step that the parent does not have.
    """
    depth, unique_layers = len(layer_map), max(layer_map) + 1
    mapped = [[step for step in range(depth) if layer_map[step] == layer] for layer in range(unique_layers)]
    if isinstance(method, int):
        if not 0 <= method < depth:
            raise ValueError(f"method as a number is a layer of the parent's {side}, 0..{depth - 1}, got {method}")
        return [[method]] * unique_layers
    if method == "first":
        return [steps[:1] for steps in mapped]
    if method == "last":
        return [steps[-1:] for steps in mapped]
    if method in ("average", "calibrated"):
        return mapped
    if method == "stepwise":
        if unique_layers == 1:
            return [[depth // 2]]
        return [[round(layer * (depth - 1) / (unique_layers - 1))] for layer in range(unique_layers)]
    raise ValueError(f"method must be one of {', '.join(METHODS)} or a number, got {method!r}")


def plan_collapse(model: MarianMTModel, config: RSMarianConfig, method: str | int) -> TransferPlan:
    """Account for every tensor of `model` in a collapse to `config`.

    Args:
        model: without adapters, see `fold_adapters`.

    Raises:
        ValueError: the model has tensors that a Marian model does not have, or lacks some, or as for `source_steps`.
    """
    parent_names = list(model.state_dict())
    steps = {side: source_steps(_layer_map(config, side), method, side) for side in SIDES}
    sources: dict[str, list[str]] = {name: [name] for name in parent_names if not LAYER_TENSOR.fullmatch(name)}
    adapters: dict[str, tuple[str, str]] = {}
    for name in parent_names:
        if (found := _of_first_layer(name)) is None:
            continue
        side, tensor = found
        if config.step_adapter_rank and _is_matrix(tensor):
            for step in range(getattr(config, f"{side}_layers")):
                adapters[_adapter(side, step, tensor)] = (
                    _tensor_of_step(model.config, side, step, tensor),
                    _tensor_of_step(config, side, step, tensor),
                )
        if _is_of_step(config, tensor):
            for step in range(getattr(config, f"{side}_layers")):
                sources[_tensor_of_step(config, side, step, tensor)] = [
                    _tensor_of_step(model.config, side, step, tensor)
                ]
            continue
        sides = SIDES if config.tie_encoder_decoder_layers and TIED_TENSOR.fullmatch(tensor) else (side,)
        for layer in range(len(steps[side])):
            sources[f"model.{side}.layers.{layer}.{tensor}"] = [
                _tensor_of_step(model.config, each, step, tensor) for each in sides for step in steps[each][layer]
            ]
    used = {name for names in sources.values() for name in names} | {theirs for theirs, _ in adapters.values()}
    if missing := sorted(used - set(parent_names)):
        raise ValueError(f"the model's layers are not alike: it has no {missing[0]}")
    with torch.device("meta"):
        wanted = RSMarianForConditionalGeneration(config).state_dict().keys()
    made = sources.keys() | {f"{adapter}.{part}" for adapter in adapters for part in ("down", "up")}
    if strange := sorted(made ^ wanted):
        raise ValueError(f"other tensors than Marian's: {strange[0]}; merge or unload adapters before a collapse")
    return TransferPlan(steps, sources, adapters, [name for name in parent_names if name not in used])


def collapse(
    model: MarianMTModel,
    *,
    encoder_unique_layers: int = 1,
    decoder_unique_layers: int = 1,
    layer_sharing: str = "cycle",
    encoder_layer_sharing: str | None = None,
    decoder_layer_sharing: str | None = None,
    step_layer_norms: bool | None = None,
    step_biases: bool | None = None,
    step_adapter_rank: int | None = None,
    tie_encoder_decoder_layers: bool | None = None,
    method: str | int = "average",
    calibration: Iterable[Mapping[str, torch.Tensor]] | None = None,
    **calibration_options: Any,
) -> RSMarianForConditionalGeneration:
    """Make a recurrently stacked model from a trained one of the same depth; the parent is not changed.

    Embeddings, positions, final bias and generation configuration are copied, layers as `method` says. With as many
    unique layers as steps `"first"`, `"last"`, `"average"` and `"stepwise"` give a copy of the parent: a vanilla
    RSMarian.

    Args:
        model: a `MarianMTModel`, or an RSMarian of any layer map.
        encoder_unique_layers: stored encoder layers of the result, 1 … depth.
        decoder_unique_layers: stored decoder layers of the result, 1 … depth.
        layer_sharing: how steps are mapped to unique layers, see `layer_map`.
        encoder_layer_sharing, decoder_layer_sharing: the same for one side, where it differs.
        step_layer_norms: each step keeps the parent's LayerNorms of that step, whatever the method, and only the rest
            is shared; default: as the parent has it. A parent's step embeddings always come along.
        step_biases: each step keeps the parent's biases of that step, likewise.
        step_adapter_rank: each step adds a low-rank matrix to each shared one. It starts from the largest singular
            values of what the parent's matrix of that step has and the shared one has not (Bae et al. 2024), so that
            at full rank, with norms and biases of the steps' own, the result is the parent; default: as the parent.
        tie_encoder_decoder_layers: the decoder's self-attention and feed-forward are the encoder's, and start from the
            mean of both; default: as the parent has it.
        method: what a unique layer starts from. `"first"` or `"last"`: the first or last of the parent layers that
            are mapped onto it. A number: that parent layer, counted from 0, on both sides and for each unique layer
            (the paper's way). `"average"`: the mean of the parent layers that are mapped onto it. `"stepwise"`:
            parent layers at even intervals from the first to the last (Bae et al. 2024,
            https://arxiv.org/abs/2410.20672), the middle one for a single unique layer. `"calibrated"`: the average,
            then trained for a few hundred updates to give the parent's hidden state after each step (`calibrate`).
        calibration: the batches for `"calibrated"`: `input_ids`, `attention_mask`, `labels`.
        calibration_options: passed to `calibrate`.

    Raises:
        TypeError: not a Marian model, or an argument that neither this nor `calibrate` knows, or one of `calibrate`
            without calibration.
        ValueError: an impossible number of layers, an unknown method or sharing, or a method without what it needs.
    """
    check_marian(model)
    if (method == "calibrated") != (calibration is not None):
        raise ValueError("method 'calibrated' and calibration batches go together; give both or neither")
    _check_calibration_options(calibration_options, calibration is not None)
    config = collapsed_config(
        model.config,
        encoder_unique_layers=encoder_unique_layers,
        decoder_unique_layers=decoder_unique_layers,
        layer_sharing=layer_sharing,
        encoder_layer_sharing=encoder_layer_sharing,
        decoder_layer_sharing=decoder_layer_sharing,
        step_layer_norms=step_layer_norms,
        step_biases=step_biases,
        step_adapter_rank=step_adapter_rank,
        tie_encoder_decoder_layers=tie_encoder_decoder_layers,
    )
    _tensors_of(model)
    model = fold_adapters(model)
    plan = plan_collapse(model, config, method)
    parent_state = model.state_dict()
    state = {name: _mean([parent_state[source] for source in sources]) for name, sources in plan.sources.items()}
    for adapter, (theirs, shared) in plan.adapters.items():
        difference = parent_state[theirs].float() - state[shared].float()
        factors = _low_rank(difference, config.step_adapter_rank, config.init_std)
        state |= {f"{adapter}.{part}": each.to(model.dtype) for part, each in factors.items()}
    child = build_like(RSMarianForConditionalGeneration, config, state, like=model)
    if calibration is not None:
        # In half precision Adam would lose most updates.
        parent = model if model.dtype == torch.float32 else copy.deepcopy(model).float()
        calibrate(child.float(), parent, calibration, **calibration_options)
    return child.to(model.dtype)


def _check_calibration_options(options: Collection[str], calibrated: bool) -> None:
    """Raise `TypeError` if there are options that `calibrate` does not know, or that nothing is done with."""
    known = inspect.signature(calibrate).parameters.values()
    known = {parameter.name for parameter in known if parameter.kind is inspect.Parameter.KEYWORD_ONLY}
    for name in options:
        if name not in known:
            raise TypeError(f"collapse() got an unexpected keyword argument {name!r}")
        if not calibrated:
            raise TypeError(f"{name} is for calibration: give method='calibrated' and calibration batches too")


def collapsed_config(
    config: MarianConfig,
    *,
    step_layer_norms: bool | None = None,
    step_biases: bool | None = None,
    step_adapter_rank: int | None = None,
    tie_encoder_decoder_layers: bool | None = None,
    **sharing: Any,
) -> RSMarianConfig:
    """The configuration of a Marian or RSMarian model with other unique layers and sharing.

    Args:
        config: of the parent.
        step_layer_norms, step_biases, step_adapter_rank, tie_encoder_decoder_layers: default: as the parent has it.
        sharing: fields of `RSMarianConfig`.
    """
    own = {"step_layer_norms": step_layer_norms, "step_biases": step_biases, "step_adapter_rank": step_adapter_rank}
    own["tie_encoder_decoder_layers"] = tie_encoder_decoder_layers
    sharing |= {name: value for name, value in own.items() if value is not None}
    return RSMarianConfig(**_fields(config) | sharing)


def fold_adapters(model: MarianMTModel) -> MarianMTModel:
    """An RSMarian with adapters as the equal one without, which stores every layer; another model as it is."""
    config = model.config
    if not getattr(config, "step_adapter_rank", 0):
        return model
    fields = {f"{side}_unique_layers": getattr(config, f"{side}_layers") for side in SIDES}
    sharing = {"layer_sharing": "cycle", "encoder_layer_sharing": None, "decoder_layer_sharing": None}
    # What the sides share stays one where their steps add nothing of their own, and these do.
    apart = {"step_adapter_rank": 0, "tie_encoder_decoder_layers": False}
    folded = RSMarianConfig(**_fields(config) | fields | sharing | apart)
    with torch.device("meta"):
        wanted = RSMarianForConditionalGeneration(folded).state_dict().keys()
    stored, state = _tensors_of(model), {}
    for name in wanted:
        match = LAYER_TENSOR.fullmatch(name)
        of_layer = match is not None and match[2] == "layers"
        state[name] = _applied(stored, config, match[1], int(match[3]), match[4]) if of_layer else stored[name]
    return build_like(RSMarianForConditionalGeneration, folded, state, like=model)


def stock_config(config: RSMarianConfig) -> MarianConfig:
    """The configuration of a stock `MarianMTModel` as deep as an RSMarian."""
    rs_only = {f.name for f in dataclasses.fields(RSMarianConfig)} - {f.name for f in dataclasses.fields(MarianConfig)}
    return MarianConfig(**{name: value for name, value in _fields(config).items() if name not in rs_only})


def expand(model: RSMarianForConditionalGeneration) -> MarianMTModel:
    """Make a stock `MarianMTModel` with a copy of the shared layer for each step, equal to the model.

    DeepNet's residual scale goes into the weights: LayerNorm is scale-free, LN(alpha x + f(x)) = LN(x + f(x) / alpha),
    but for its epsilon (1e-5 beside the variance of its input), so there equality is to rounding and that epsilon.
    A step embedding goes into the bias of the LayerNorm before it, to rounding, which is coarse in half precision:
    `expand(model.float())`. With `marian_positions` the result has them in memory, but does not keep them when it is
    saved: stock Marian makes its positions anew.

    Raises:
        TypeError: not an RSMarian.
        ValueError: the model is quantised, or has adapters of PEFT.
    """
    check_rs_marian(model)
    stored = _tensors_of(model)
    state = {name: tensor for name, tensor in stored.items() if not STACK_PARAMETER.match(name)}
    for found in filter(None, map(_of_first_layer, stored)):
        side, rest = found
        for step in range(getattr(model.config, f"{side}_layers")):
            copy_of = _applied(stored, model.config, side, step, rest)
            if BRANCH_OUTPUT.search(rest):
                copy_of = copy_of / getattr(model.config, f"{side}_residual_scale")
            elif rest == "final_layer_norm.bias":
                copy_of = copy_of + stored.get(f"model.{side}.step_embeddings.{step}.weight", 0)
            state[f"model.{side}.layers.{step}.{rest}"] = copy_of
    return build_like(MarianMTModel, stock_config(model.config), state, like=model)


def with_depth(
    model: RSMarianForConditionalGeneration, *, encoder_layers: int | None = None, decoder_layers: int | None = None
) -> RSMarianForConditionalGeneration:
    """Make a copy that applies its layers more or fewer times, as `from_pretrained(…, decoder_layers=k)` does.

    Steps that the model does not have start from step embeddings of zero.

    Args:
        model: an RSMarian.
        encoder_layers: depth of the copy's encoder, at least its unique layers; default: as it is.
        decoder_layers: depth of the copy's decoder, likewise.

    Raises:
        TypeError: not an RSMarian.
        ValueError: less depth than unique layers, or than 1; or more than there are steps with LayerNorms, biases or
            adapters of their own; or the model is quantised, or has adapters of PEFT.
    """
    check_rs_marian(model)
    config = depth_config(model.config, encoder_layers, decoder_layers)
    with torch.device("meta"):
        wanted = RSMarianForConditionalGeneration(config).state_dict()
    stored = _tensors_of(model)
    state = {name: stored[name] if name in stored else torch.zeros(like.shape) for name, like in wanted.items()}
    return build_like(RSMarianForConditionalGeneration, config, state, like=model)


def depth_config(config: RSMarianConfig, encoder_layers: int | None, decoder_layers: int | None) -> RSMarianConfig:
    """The configuration of an RSMarian at other depths; None: as it is.

    Raises:
        ValueError: as for `with_depth`.
    """
    depths = {"encoder_layers": encoder_layers, "decoder_layers": decoder_layers}
    given = {name: depth for name, depth in depths.items() if depth is not None}
    own = next((name for name in OWN_TO_STEPS if getattr(config, name)), "")
    for name, depth in given.items():
        if own and depth > getattr(config, name):
            raise ValueError(
                f"{name} must be at most {getattr(config, name)}, got {depth}: each step has parameters of its own "
                f"({own}), and there are no more of them"
            )
    return RSMarianConfig(**_fields(config) | given)


def count_parameters(model: MarianMTModel) -> dict[str, int]:
    """The trainable parameters of a model, and how many of them are in its layers; shared ones count once."""
    layers = sum(p.numel() for name, p in model.named_parameters() if STACK_PARAMETER.match(name))
    return {"total": model.num_parameters(only_trainable=True), "layers": layers}


def build_like(
    model_class: type[MarianMTModel], config: MarianConfig, state: Mapping[str, torch.Tensor], like: MarianMTModel
) -> Any:
    """A model with a copy of every tensor of `state`, with the type, device, mode and generation of `like`."""
    model = model_class._from_config(config, dtype=like.dtype, attn_implementation=like.config._attn_implementation)
    # What the configuration calls tied may have two values; loaded into one weight the last of them would win.
    apart = {name for name, tie in model.all_tied_weights_keys.items() if not torch.equal(state[name], state[tie])}
    keep_apart(model, apart)
    for name in apart:
        module, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(module), attribute, nn.Parameter(state[name].clone()))
    model.load_state_dict(state, strict=True)
    model.generation_config = copy.deepcopy(like.generation_config)
    return model.to(like.device).train(like.training)


def _tensors_of(model: MarianMTModel) -> dict[str, torch.Tensor]:
    """The tensors of a model, which are those that its configuration says.

    Raises:
        ValueError: it is quantised, or has others: adapters of PEFT, which also rename what they adapt.
    """
    stored = model.state_dict()
    for name, tensor in stored.items():
        if not tensor.is_floating_point() or type(tensor).__module__.startswith("torchao"):
            raise ValueError(f"{name} is quantised: transfer the layers first, and quantise what comes out")
    model_class = RSMarianForConditionalGeneration if _is_stacked(model) else MarianMTModel
    with torch.device("meta"):
        wanted = model_class(model.config).state_dict().keys()
    if strange := sorted(stored.keys() ^ wanted):
        raise ValueError(f"other tensors than Marian's: {strange[0]}; merge or unload adapters first")
    return stored


def _mean(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The mean, exact where the tensors are equal."""
    first = tensors[0]
    if len(tensors) == 1:
        return first
    precision = torch.promote_types(first.dtype, torch.float32)
    start = first.to(precision)
    difference = sum((tensor.to(precision) - start for tensor in tensors[1:]), torch.zeros_like(start))
    return (start + difference / len(tensors)).to(first.dtype)


def _layer_map(config: PretrainedConfig, side: str) -> list[int]:
    """For each step the index of the layer that it applies; of stock Marian 0, 1, 2 …"""
    return getattr(config, f"{side}_layer_map", None) or list(range(getattr(config, f"{side}_layers")))


def _of_first_layer(name: str) -> tuple[str, str] | None:
    """Side and name in the layer of a tensor that the first step applies, by the first index of its kind; or None."""
    match = LAYER_TENSOR.fullmatch(name)
    if match is None or match[3] != "0":
        return None
    side, kind, _, tensor = match.groups()
    if kind == "step_projections":
        tensor = re.sub("^(self|encoder)_attn_", r"\1_attn.", tensor).removeprefix("feed_forward_")
    return side, tensor


def _is_matrix(tensor: str) -> bool:
    return PROJECTION.fullmatch(tensor) is not None and tensor.endswith("weight")


def _is_of_step(config: PretrainedConfig, tensor: str) -> bool:
    """Whether a tensor of a layer belongs to the step and not to the stored layer."""
    if "layer_norm." in tensor:
        return getattr(config, "step_layer_norms", False)
    return getattr(config, "step_biases", False) and not _is_matrix(tensor)


def _tensor_of_step(config: PretrainedConfig, side: str, step: int, tensor: str) -> str:
    """The full name of a layer's tensor, as a step of the model applies it, but for its adapter."""
    if not _is_of_step(config, tensor):
        return f"model.{side}.layers.{_layer_map(config, side)[step]}.{tensor}"
    return (
        f"model.{side}.step_norms.{step}.{tensor}"
        if "layer_norm." in tensor
        else f"{_adapter(side, step, tensor)}.bias"
    )


def _adapter(side: str, step: int, tensor: str) -> str:
    """Where a step has what it adds to a projection of its layer."""
    return f"model.{side}.step_projections.{step}.{step_projection_name(tensor.rpartition('.')[0])}"


def _applied(
    stored: Mapping[str, torch.Tensor], config: PretrainedConfig, side: str, step: int, tensor: str
) -> torch.Tensor:
    """A layer's tensor as a step of the model applies it."""
    shared = stored[_tensor_of_step(config, side, step, tensor)]
    if not (getattr(config, "step_adapter_rank", 0) and _is_matrix(tensor)):
        return shared
    down, up = (stored[f"{_adapter(side, step, tensor)}.{part}"].float() for part in ("down", "up"))
    return (shared.float() + up @ down).to(shared.dtype)


def _low_rank(matrix: torch.Tensor, rank: int, init_std: float) -> dict[str, torch.Tensor]:
    """The two factors of the matrix of so low a rank that comes closest.

    Where there is nothing to come close to, one of them is zero and the other one as large as a new adapter's: with
    both at zero neither would have a gradient.
    """
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    roots = values[:rank].sqrt()
    nothing = roots <= 1e-4 * init_std
    new = init_std * matrix.shape[1] ** 0.5
    down = torch.where(nothing, new, roots)[:, None] * right[:rank]
    return {"down": down, "up": left[:, :rank] * roots.masked_fill(nothing, 0.0)}


def _fields(config: PretrainedConfig) -> dict[str, Any]:
    return {name: value for name, value in config.to_dict().items() if name not in CLASS_FIELDS}


def _is_stacked(model: MarianMTModel) -> bool:
    return getattr(model.config, "encoder_layer_map", None) is not None


def check_marian(model: Any) -> None:
    """Raise `TypeError` unless a model is Marian's, recurrently stacked or not."""
    if not isinstance(model, MarianMTModel):
        raise TypeError(f"expected a MarianMTModel or an RSMarian, got a {type(model).__name__}")


def check_rs_marian(model: Any) -> None:
    """Raise `TypeError` unless a model is recurrently stacked."""
    check_marian(model)
    if not _is_stacked(model):
        raise TypeError(
            f"{type(model).__name__} is not recurrently stacked; collapse(model, …) makes an RSMarian of it first"
        )
