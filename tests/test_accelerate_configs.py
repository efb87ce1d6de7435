"""The configurations in `training/accelerate/`: accelerate reads all; where a CPU can, they train as one process does.

Two processes of one machine (`cpu.yaml`) are in `test_trainer.py`.
"""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from conftest import CHECKPOINTING, RECIPE, ROOT, losses, script, task_options
from forked import fork, free_port
from oracle import rs_model, unrolled_marian
from safetensors.torch import load_file
from transformers.modeling_layers import GradientCheckpointingLayer

from rs_transformer.training.arguments import TranslationTrainingArguments
from rs_transformer.training.fsdp import shared_weights_in_one_group

CONFIGS = ROOT / "training" / "accelerate"
OPTIONS = ["--max_steps", 12, "--logging_steps", 1, "--max_tokens", 256, "--dropout", 0, "--num_beams", 1]
OPTIONS += ["--eval_strategy", "no", "--save_strategy", "no", "--max_new_tokens", 8]


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_accelerate_reads_each_configuration(file):
    config = load_config_from_file(str(file))
    expected = {"cpu": DistributedType.MULTI_CPU, "ddp": DistributedType.MULTI_GPU, "fsdp2": DistributedType.FSDP}
    assert config.distributed_type == expected[file.stem.split("_")[0]]
    assert config.num_machines == (2 if file.stem.endswith("2_machines") else 1)


def test_two_machines_train_as_one_process_does(task, tmp_path):
    address = ["--main_process_ip", "127.0.0.1", "--main_process_port", free_port()]
    options = [RECIPE, *task_options(task), *OPTIONS]
    script("train")(*options, "--max_tokens", 512, "--output_dir", tmp_path / "one")
    accelerate = Path(sys.executable).with_name("accelerate")
    launch = [accelerate, "launch", "--config_file", CONFIGS / "cpu_2_machines.yaml", *address, "--machine_rank"]
    train = ["training/train.py", *options, "--output_dir", tmp_path / "two"]
    machines, logs = [], [tmp_path / f"machine{rank}.txt" for rank in range(2)]
    for rank, log in enumerate(logs):
        with log.open("w") as file:
            command = [str(part) for part in (*launch, rank, *train)]
            machines.append(subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT))
    assert [machine.wait(timeout=300) for machine in machines] == [0, 0], [log.read_text() for log in logs]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-4)
    assert "bleu" in json.loads((tmp_path / "two" / "results.json").read_text())["test"]


@pytest.mark.parametrize(
    ("state_dict_type", "tied"), [("FULL_STATE_DICT", "false"), ("SHARDED_STATE_DICT", "true")], ids=["full", "tied"]
)
def test_sharded_by_fsdp2_it_trains_averages_and_saves_as_one_process_does(task, tmp_path, state_dict_type, tied):
    launched = launch_command_parser().parse_args(
        ["--config_file", str(CONFIGS / "fsdp2.yaml"), "--fsdp_state_dict_type", state_dict_type, "train.py"]
    )
    launched, *_ = _validate_launch_command(launched)
    sharding = {name: value for name, value in prepare_multi_gpu_env(launched).items() if "FSDP" in name}
    options = [RECIPE, *task_options(task), *OPTIONS[:-2], "--max_new_tokens", 16, "--average_checkpoints", 2]
    options += ["--save_strategy", "steps", "--save_steps", 6, "--warmup_steps", 6]
    options += ["--tie_encoder_decoder_layers", tied]
    script("train")(*options, "--max_tokens", 512, "--output_dir", tmp_path / "one")
    environment = {**sharding, "ACCELERATE_USE_CPU": "true"}
    fork("tests/fsdp_train.py", *options, "--output_dir", tmp_path / "two", processes=2, environment=environment)
    checkpoint = tmp_path / "two" / "checkpoint-12"
    assert (checkpoint / "optimizer.bin").exists() or (checkpoint / "optimizer_0").exists(), "it was not sharded"
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-4)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert two.keys() == one.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-3, rtol=1e-3)
    scores = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two")]
    assert scores[1]["test"]["loss"] == pytest.approx(scores[0]["test"]["loss"], abs=1e-4)
    assert scores[1]["test"]["bleu"] == pytest.approx(scores[0]["test"]["bleu"], abs=1)


def test_gradient_checkpointing_under_fsdp_is_refused_where_transformers_spoils_it(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    options = {"output_dir": str(tmp_path), "use_cpu": True}
    # As transformers had it before 5.23.
    monkeypatch.setattr(GradientCheckpointingLayer, "__call__", torch.nn.Module.__call__)
    with pytest.raises(ValueError, match="gradient_checkpointing under FSDP needs transformers 5"):
        TranslationTrainingArguments(**options, **{CHECKPOINTING: True})
    monkeypatch.setenv("FSDP_VERSION", "2")
    TranslationTrainingArguments(**options)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    TranslationTrainingArguments(**options, **{CHECKPOINTING: True})


def test_the_layers_that_fsdp2_shards_are_those_of_the_model():
    config = load_config_from_file(str(CONFIGS / "fsdp2.yaml"))
    assert "fsdp_transformer_layer_cls_to_wrap" not in config.fsdp_config  # so that other models' are found, too
    for model in (rs_model(), rs_model(step_layer_norms=True), unrolled_marian(rs_model())):
        plugin = SimpleNamespace(transformer_cls_names_to_wrap=None, auto_wrap_policy="by class")
        with shared_weights_in_one_group(model, plugin):
            stacks = (model.model.encoder, model.model.decoder)
            assert {type(stack.layers[0]).__name__ for stack in stacks} == set(plugin.transformer_cls_names_to_wrap)
            assert plugin.auto_wrap_policy == "by class"
        assert plugin.transformer_cls_names_to_wrap is None
