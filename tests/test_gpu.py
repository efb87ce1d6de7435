"""What a GPU alone can show: `make test-gpu`, on a machine with one. Not part of `make test`.

Each test prints its figures.
"""

import json
import os
import statistics
import sys
import time

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from conftest import RECIPE, ROOT, losses, run, script, task_options
from oracle import batch, rs_model, unrolled_marian
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
OPTIONS = [RECIPE, "--max_steps", 12, "--logging_steps", 1, "--num_beams", 1, "--max_new_tokens", 8]
OPTIONS += ["--eval_strategy", "no", "--save_strategy", "steps", "--save_steps", 6]
SEVERAL = {"encoder_unique_layers": 2, "decoder_unique_layers": 2}
OWN = {"step_embeddings": True, "step_layer_norms": True, "step_biases": True, "step_adapter_rank": 2}


def on_gpu(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.to(DEVICE) for name, tensor in inputs.items()}


@pytest.fixture(scope="module")
def on_cpu(task, tmp_path_factory):
    """The run folder of a few updates on the CPU."""
    folder = tmp_path_factory.mktemp("cpu") / "run"
    script("train")(*OPTIONS, *task_options(task), "--use_cpu", "true", "--output_dir", folder)
    return folder


@pytest.mark.parametrize(
    "fields", [{}, SEVERAL, SEVERAL | OWN, {"deepnorm": True}], ids=["rs", "2", "own", "deepnorm"]
)
def test_on_the_gpu_too_a_model_equals_marian_with_copies_of_the_layers(fields):
    model = rs_model(**fields)
    marian = unrolled_marian(model)
    on_the_cpu = model(**batch()).logits
    inputs, model, marian = on_gpu(batch()), model.to(DEVICE), marian.to(DEVICE)
    with torch.no_grad():
        outputs, expected = model(**inputs), marian(**inputs)
    print(f"largest difference to Marian {(outputs.logits - expected.logits).abs().max():.1e}")
    torch.testing.assert_close(outputs.logits, expected.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(outputs.logits.cpu(), on_the_cpu, atol=1e-3, rtol=1e-3)
    del inputs["labels"]
    found, wanted = (each.generate(**inputs, num_beams=3, max_new_tokens=12) for each in (model, marian))
    assert found.tolist() == wanted.tolist()


@pytest.mark.parametrize(("precision", "tolerance"), [(None, 1e-3), ("bf16", 5e-2), ("fp16", 5e-2)])
def test_a_training_on_the_gpu_has_the_losses_of_the_cpu(on_cpu, task, tmp_path, precision, tolerance):
    options = [f"--{precision}", "true"] if precision else []
    script("train")(*OPTIONS, *task_options(task), *options, "--output_dir", tmp_path / "run")
    found, expected = losses(tmp_path / "run"), losses(on_cpu)
    difference = max(abs(one - other) for one, other in zip(found, expected, strict=True))
    print(f"{precision or 'float32'}: largest difference of 12 losses {difference:.1e}")
    assert found == pytest.approx(expected, abs=tolerance)
    assert all(tensor.dtype == torch.float32 for tensor in load_file(tmp_path / "run" / "model.safetensors").values())


def test_a_training_on_the_gpu_goes_on_where_it_was_stopped(task, tmp_path):
    options = [*OPTIONS, *task_options(task), "--dropout", 0.1]
    script("train")(*options, "--output_dir", tmp_path / "whole")
    script("train")(*options, "--max_steps", 6, "--output_dir", tmp_path / "parts")
    script("train")(*options, "--resume_from_checkpoint", "true", "--output_dir", tmp_path / "parts")
    difference = max(
        abs(a - b) for a, b in zip(*(losses(tmp_path / name) for name in ("whole", "parts")), strict=True)
    )
    print(f"resumed: largest difference of 12 losses {difference:.1e}")
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), abs=1e-4)


@pytest.mark.parametrize("config", ["ddp", "fsdp2"])
def test_one_process_under_nccl_trains_as_one_without(on_cpu, task, tmp_path, config):
    launched = launch_command_parser().parse_args(
        [
            "--config_file",
            str(ROOT / "training" / "accelerate" / f"{config}.yaml"),
            "--mixed_precision",
            "no",
            "train.py",
        ]
    )
    launched, *_ = _validate_launch_command(launched)
    environment = {name: value for name, value in prepare_multi_gpu_env(launched).items() if "FSDP" in name}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 1]
    train = ["training/train.py", *OPTIONS, *task_options(task), "--output_dir", tmp_path / "run"]
    run(*torchrun, *train, env=os.environ | environment)
    difference = max(abs(a - b) for a, b in zip(losses(tmp_path / "run"), losses(on_cpu), strict=True))
    print(f"{config}: largest difference of 12 losses {difference:.1e}")
    assert losses(tmp_path / "run") == pytest.approx(losses(on_cpu), abs=1e-3)
    assert "bleu" in json.loads((tmp_path / "run" / "results.json").read_text())["test"]


def test_eager_sdpa_and_flash_attention_agree():
    model = rs_model(**SEVERAL, d_model=64, encoder_attention_heads=4, decoder_attention_heads=4).to(DEVICE)
    inputs = on_gpu(batch())
    logits = {}
    for kind in ("eager", "sdpa"):
        model.set_attn_implementation(kind)
        logits[kind] = model(**inputs).logits
    difference = (logits["eager"] - logits["sdpa"]).abs().max()
    print(f"eager and sdpa differ by {difference:.1e}")
    torch.testing.assert_close(logits["sdpa"], logits["eager"], atol=1e-4, rtol=1e-4)
    # PyTorch's flash kernels take no mask but the causal one.
    whole = {"input_ids": inputs["input_ids"][:1], "decoder_input_ids": inputs["labels"][:1]}
    model = model.bfloat16()
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        flash = model(**whole).logits
    model.set_attn_implementation("eager")
    difference = (flash - model(**whole).logits).float().abs().max()
    print(f"eager and flash differ by {difference:.1e} in bfloat16")
    assert difference < 0.05 * flash.float().abs().max()


@pytest.mark.parametrize("fields", [SEVERAL, SEVERAL | OWN], ids=["2", "own"])
def test_a_compiled_model_with_a_static_cache_generates_the_same(fields):
    model = rs_model(**fields).to(DEVICE)
    inputs = on_gpu(batch())
    del inputs["labels"]
    length = {"min_new_tokens": 24, "max_new_tokens": 24}
    expected = model.generate(**inputs, **length)

    def seconds(**options) -> float:
        times = []
        for _ in range(5):
            torch.cuda.synchronize()
            start = time.perf_counter()
            found = model.generate(**inputs, **length, **options)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        assert found.tolist() == expected.tolist()
        return statistics.median(times)

    eager = seconds()
    model.generate(**inputs, **length, cache_implementation="static")
    compiled = seconds(cache_implementation="static")
    print(f"24 tokens: eager {1000 * eager:.0f} ms, compiled with a static cache {1000 * compiled:.0f} ms")
