"""Run by `test_modeling.py` in two processes: losses of training alone, then sharded by FSDP2 layer by layer."""

import json

import torch
import torch.distributed as dist
from oracle import batch, rs_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers.modeling_layers import GradientCheckpointingLayer


def losses(sharded: bool) -> list[float]:
    own = {"step_embeddings": True, "step_layer_norms": True, "step_biases": True, "step_adapter_rank": 2}
    model = rs_model(encoder_unique_layers=2, decoder_unique_layers=2, **own).train()
    # Where that and FSDP2 go together: see `training/arguments.py`.
    if "__call__" not in vars(GradientCheckpointingLayer):
        model.gradient_checkpointing_enable({"use_reentrant": True})
    if sharded:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in [*model.model.encoder.layers, *model.model.decoder.layers]:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    curve = []
    for seed in range(4):
        loss = model(**batch(seed), decoder_depth=6 - seed).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        curve.append(loss.item())
    return curve


dist.init_process_group("gloo")
curves = [losses(sharded=False), losses(sharded=True)]
if dist.get_rank() == 0:
    print(json.dumps(curves))
dist.destroy_process_group()
