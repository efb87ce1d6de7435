"""A model whose parameters lie shared out over processes (FSDP2): as a whole one, and back.

Made by all processes together.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from accelerate import FullyShardedDataParallelPlugin
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ..modeling_rs_marian import keep_apart

STACKS = {"RSMarianEncoder", "RSMarianDecoder"}  # embeddings are in both
EMBEDDINGS = ("get_input_embeddings", "get_output_embeddings")


@contextmanager
def shared_weights_in_one_group(model: PreTrainedModel, plugin: FullyShardedDataParallelPlugin) -> Iterator[None]:
    """Have accelerate shard the embeddings with what is outside of the layers; layers too, where the sides share them.

    It would make groups of the input embedding, of the output projection and, if it is told no classes, of what a
    model does not want split: of Marian nothing, of steps with parameters of their own whole stacks. The groups are to
    be the layers; one must have all the modules of a matrix, and Marian's embeddings share theirs with more.
    """
    policy, named = plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap
    layers = {type(module).__name__ for module in model.modules() if isinstance(module, GradientCheckpointingLayer)}
    groups = plugin.transformer_cls_names_to_wrap = named or sorted(layers)
    if getattr(model.config, "tie_encoder_decoder_layers", False) or not STACKS.isdisjoint(groups):
        plugin.auto_wrap_policy = None
    for name in EMBEDDINGS:
        setattr(model, name, lambda: None)
    try:
        yield
    finally:
        plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap = policy, named
        for name in EMBEDDINGS:
            delattr(model, name)


def whole_model(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """The model itself, or of a sharded one a copy, in evaluation mode, that each process can run by itself."""
    if not isinstance(model, FSDPModule):
        return model
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    with torch.device("meta"):
        copy = type(model)(model.config)  # of the class that sharding has derived from: see `FSDPModule.__new__`
    copy.load_state_dict(state, assign=True)
    for name, buffer in model.named_buffers():  # as M2M100's positions
        if name not in state:
            owner, _, attribute = name.rpartition(".")
            setattr(copy.get_submodule(owner), attribute, buffer.clone())
    keep_apart(copy, copy.all_tied_weights_keys.keys() - model.all_tied_weights_keys.keys())
    copy.tie_weights()
    copy.generation_config = model.generation_config
    return copy.to(device).eval()


def load_whole_state(model: PreTrainedModel, state: Mapping[str, torch.Tensor]) -> tuple[list[str], list[str]]:
    """`load_state_dict(strict=False)` of whole tensors, also into a sharded model."""
    if isinstance(model, FSDPModule):
        return set_model_state_dict(model, dict(state), options=StateDictOptions(full_state_dict=True, strict=False))
    return model.load_state_dict(state, strict=False)
