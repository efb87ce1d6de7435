"""PyTorch's own int8: torchao's, and dynamic quantisation. The shared layer stays shared."""

import re

import pytest
import torch
from conftest import ROOT
from oracle import marian, rs_model
from reverse_task import reverse_pairs
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, TorchAoConfig

from rs_transformer.decoding import DecodingArguments, translate

# A layer's weights are most of a file.
SIZES = {"d_model": 64, "encoder_ffn_dim": 256, "decoder_ffn_dim": 256}


def by_torchao(folder, **options):
    from torchao.quantization import Int8WeightOnlyConfig

    return AutoModelForSeq2SeqLM.from_pretrained(
        folder, quantization_config=TorchAoConfig(Int8WeightOnlyConfig(version=2)), **options
    )


def dynamically(folder, **options):
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, **options).eval()
    return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)


quantizations = pytest.mark.parametrize("quantize", [by_torchao, dynamically])


def file_size(model, folder):
    torch.save(model.state_dict(), folder / "weights.pt")
    return (folder / "weights.pt").stat().st_size


@quantizations
def test_quantized_model_applies_one_layer_at_every_step_and_translates_nearly_the_same(trained, quantize):
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(trained), AutoTokenizer.from_pretrained(trained)
    quantized = quantize(trained)
    calls = []
    for stack in (quantized.model.encoder, quantized.model.decoder):
        (layer,) = stack.layers
        weight = layer.fc1.weight
        weight = weight() if callable(weight) else weight.qdata
        assert weight.dtype in (torch.int8, torch.qint8)
        layer.fc1.register_forward_hook(lambda module, *_: calls.append(module))
    with torch.inference_mode():
        quantized(**tokenizer("a b c", return_tensors="pt"), decoder_input_ids=torch.tensor([[0]]))
    assert len(calls) == 4  # two steps a side
    assert len(set(calls)) == 2
    sentences = [source for source, _ in reverse_pairs(50, seed=11)]
    decoding = DecodingArguments(num_beams=1, max_new_tokens=16)
    exact, found = (translate(each, tokenizer, sentences, decoding, progress=False) for each in (model, quantized))
    assert sum(map(str.__eq__, exact, found)) >= 45


@quantizations
def test_file_of_a_quantized_model_has_the_shared_layer_once(tmp_path, quantize):
    models = {"rs": rs_model(**SIZES), "marian": marian(**SIZES)}
    layers = [stack.layers for stack in (models["rs"].model.encoder, models["rs"].model.decoder)]
    linear = (module for stack in layers for module in stack.modules() if isinstance(module, torch.nn.Linear))
    weights = sum(module.weight.numel() for module in linear)
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    shared, deeper, stock = (
        file_size(quantize(tmp_path / name, **options), tmp_path)
        for name, options in (("rs", {}), ("rs", {"encoder_layers": 24, "decoder_layers": 24}), ("marian", {}))
    )
    assert abs(deeper - shared) < 0.01 * shared
    # Five more of each layer, a byte a weight, and what stays in single precision.
    assert 5 * weights < stock - shared < 2 * 5 * weights
    assert shared < 0.6 * file_size(models["rs"], tmp_path)


def test_quantized_weights_are_saved_and_loaded_as_documented(trained, tmp_path, monkeypatch):
    page = (ROOT / "docs" / "export.md").read_text().split("## PyTorch")[1]
    snippet = re.search(r"```python\n(.+?)```", page, re.DOTALL).group(1)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(snippet.replace('"runs/rs6"', repr(str(trained))), names)
    inputs = AutoTokenizer.from_pretrained(trained)("a b c", return_tensors="pt")
    assert torch.equal(names["loaded"].generate(**inputs), names["model"].generate(**inputs))
