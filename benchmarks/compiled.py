"""Greedy decoding in PyTorch: eager, compiled with a static cache, and with int8 weights by torchao.

    python benchmarks/compiled.py

RS 1x6 and stock Marian with 6 layers, random weights, every translation forced to the same number of tokens; all take
turns in one process. Medians; a speed-up is the median of the rounds' ratios to the same model's eager decoding.
Compilation is the time of the first call. Needs a C++ compiler, and torchao (the extra `torchao`).
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from common import SYSTEMS, build, interleave, parse_args, report, source_batch
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForSeq2SeqLM, PreTrainedModel, TorchAoConfig

BATCHES = (1, 16)


def variants(system: str, d_model: int, seed: int) -> dict[str, tuple[PreTrainedModel, dict[str, Any]]]:
    """The model as each variant has it, and what `generate` takes besides."""
    model = build(system, d_model, seed).eval()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        compiled = AutoModelForSeq2SeqLM.from_pretrained(folder)
        compiled.forward = torch.compile(compiled.forward, fullgraph=True)
        quantization = TorchAoConfig(Int8WeightOnlyConfig(version=2))
        quantized = AutoModelForSeq2SeqLM.from_pretrained(folder, quantization_config=quantization)
    static = {"cache_implementation": "static"}
    return {"eager": (model, {}), "compiled": (compiled, static), "int8": (quantized, {})}


def make_step(
    model: PreTrainedModel, options: dict[str, Any], sentences: int, length: int, new_tokens: int, seed: int
) -> Callable[[], None]:
    inputs = source_batch(sentences, length, seed)
    del inputs["labels"]
    options = options | {"num_beams": 1, "min_new_tokens": new_tokens, "max_new_tokens": new_tokens}
    return lambda: model.generate(**inputs, **options)


def measure(d_model: int, sentences: int, length: int, new_tokens: int, rounds: int, seed: int) -> list[dict]:
    """A row for each model and variant."""
    steps = {
        (system, variant): make_step(*parts, sentences, length, new_tokens, seed)
        for system in SYSTEMS
        for variant, parts in variants(system, d_model, seed).items()
    }
    first = {}
    for name, step in steps.items():
        start = time.perf_counter()
        step()
        first[name] = time.perf_counter() - start
    seconds = interleave(steps, rounds)
    rows = []
    for system, variant in steps:
        times, eager = seconds[system, variant], seconds[system, "eager"]
        figures = {"d_model": d_model, "batch": sentences, "model": system, "variant": variant}
        figures["ms"] = round(1000 * statistics.median(times), 1)
        figures["speed-up"] = round(statistics.median(e / t for e, t in zip(eager, times, strict=True)), 2)
        figures["compilation s"] = round(first[system, variant], 1) if variant == "compiled" else ""
        rows.append(figures)
    return rows


def main() -> None:
    args = parse_args(
        __doc__,
        d_model=[512],
        length=(int, 24, "Tokens of a source."),
        new_tokens=(int, 24, "Tokens of every translation."),
    )
    torch.set_num_threads(args.threads)
    rows = [
        row
        for d_model in args.d_model
        for sentences in BATCHES
        for row in measure(d_model, sentences, args.length, args.new_tokens, args.rounds, args.seed)
    ]
    report(rows, args, ratio="speed-up: eager / variant")


if __name__ == "__main__":
    main()
