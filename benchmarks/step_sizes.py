"""File sizes by engine of RS 1x6 with parameters of the steps' own, and of vanilla 6: what each engine can share.

    python benchmarks/step_sizes.py --d_model 128 --vocab_size 7000

MB of the files with weights, as `training/export.py` writes them. Weights are random, and all different.
"""

import re
import tempfile
from pathlib import Path

import torch
from common import build, parse_args, print_table
from decode import WEIGHTS, convert, write_tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rs_transformer import RSMarianForConditionalGeneration

SYSTEMS = {
    "vanilla 6": {"encoder_unique_layers": 6, "decoder_unique_layers": 6},
    "RS 1x6": {},
    "own LayerNorms": {"step_layer_norms": True},
    "own LayerNorms, biases": {"step_layer_norms": True, "step_biases": True},
    "one layer for both sides": {"tie_encoder_decoder_layers": True},
    "adapters of rank 4": {"step_adapter_rank": 4},
    "adapters of rank 16": {"step_adapter_rank": 16},
}
ENGINES = ("pytorch", "ctranslate2:int8", "onnx:int8", "marian")


def model_of(fields: dict, tokenizer: PreTrainedTokenizerBase, d_model: int, seed: int) -> PreTrainedModel:
    """A random model in which no two tensors are equal."""
    config = build("RS", d_model, seed, vocab_size=len(tokenizer)).config
    model = RSMarianForConditionalGeneration(type(config)(**config.to_dict() | fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if re.search(r"\.(layers|step_\w+)\.", name):
                parameter.add_(0.01 * torch.randn_like(parameter))
    return model.eval()


def main() -> None:
    args = parse_args(__doc__, d_model=(int, 128, "Width; ffn is four times it."), vocab_size=(int, 7000, "Entries."))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = write_tokenizer(Path(folder), args.vocab_size)
        for name, fields in SYSTEMS.items():
            model = model_of(fields, tokenizer, args.d_model, args.seed)
            checkpoint = Path(folder, re.sub(r"\W", "_", name))
            for part in (model, tokenizer):
                part.save_pretrained(checkpoint)
            row = {"model": name, "parameters": f"{model.num_parameters(only_trainable=True):,}"}
            for engine in ENGINES:
                output = convert(engine, checkpoint)
                size = sum(file.stat().st_size for file in output.rglob("*") if file.suffix in WEIGHTS)
                row[engine] = round(size / 1e6, 2)
            rows.append(row)
    print_table(rows)


if __name__ == "__main__":
    main()
