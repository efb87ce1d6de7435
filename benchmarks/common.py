"""What the benchmarks share: models of one size, interleaved timing, peak memory, and the table."""

import argparse
import json
import multiprocessing
import statistics
from collections.abc import Callable
from typing import Any

import torch
from transformers import MarianConfig, MarianMTModel, PreTrainedModel

from rs_transformer import RSMarianConfig, RSMarianForConditionalGeneration
from rs_transformer.utils.measuring import interleave, memory
from rs_transformer.utils.tables import markdown_table

VOCABULARY = 8000
SYSTEMS = ("RS 1x6", "Marian 6")
__all__ = ["SYSTEMS", "VOCABULARY", "build", "interleave", "memory", "parse_args", "peak_memory", "print_table"]
__all__ += ["report", "row", "run_twice", "source_batch", "training_step"]


def parse_args(description: str, **options: Any) -> argparse.Namespace:
    """The common options and a benchmark's own.

    Args:
        options: for an option of its own, or one in place of a common one, type, default (a list for several values)
            and help; or another default for a common one.
    """
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
        conflict_handler="resolve",
    )
    parser.add_argument("--d_model", type=int, nargs="+", default=[256, 512], help="Widths; ffn is four times it.")
    parser.add_argument("--threads", type=int, default=1, help="Threads of PyTorch.")
    parser.add_argument("--rounds", type=int, default=15, help="Measured rounds, each system once a round.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", help="Where to write the figures as JSON.")
    for name, option in options.items():
        if isinstance(option, tuple):
            kind, default, text = option
            several = "+" if isinstance(default, list) else None
            parser.add_argument(f"--{name}", type=kind, default=default, nargs=several, help=text)
        else:
            parser.set_defaults(**{name: option})
    return parser.parse_args()


def build(
    system: str,
    d_model: int,
    seed: int,
    depth: int = 6,
    vocab_size: int = VOCABULARY,
    decoder_depth: int | None = None,
) -> PreTrainedModel:
    """A random model: recurrently stacked ("RS …"), or stock Marian with as many layers as the other has steps."""
    fields = {
        "vocab_size": vocab_size,
        "pad_token_id": vocab_size - 1,
        "decoder_start_token_id": vocab_size - 1,
        "d_model": d_model,
        "encoder_ffn_dim": 4 * d_model,
        "decoder_ffn_dim": 4 * d_model,
        "encoder_attention_heads": 8,
        "decoder_attention_heads": 8,
        "encoder_layers": depth,
        "decoder_layers": decoder_depth or depth,
        "max_position_embeddings": 512,
        "activation_function": "swish",
        "scale_embedding": True,
    }
    torch.manual_seed(seed)
    if system.startswith("RS"):
        return RSMarianForConditionalGeneration(RSMarianConfig(**fields))
    return MarianMTModel(MarianConfig(**fields))


def source_batch(sentences: int, length: int, seed: int) -> dict[str, torch.Tensor]:
    """Random sources with as many labels, without padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY - 1, (2, sentences, length), generator=generator)
    return {"input_ids": ids[0], "attention_mask": torch.ones_like(ids[0]), "labels": ids[1]}


def training_step(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> Callable[[], None]:
    """Forward, backward and AdamW on one batch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        model(**inputs, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def run_twice(make_step: Callable[..., Callable[[], Any]], threads: int, *args: Any) -> None:
    """Two steps of what `make_step(*args)` makes, for `peak_memory`: the first one makes the optimiser's state."""
    torch.set_num_threads(threads)
    step = make_step(*args)
    step()
    step()


def peak_memory(work: Callable[..., Any], *args: Any) -> float:
    """MiB that a fresh process's peak grows by while it does the work."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measure_memory, (work, args))


def _measure_memory(work: Callable[..., Any], args: tuple) -> float:
    before = memory("VmHWM")
    work(*args)
    return memory("VmHWM") - before


def row(d_model: int, what: str, seconds: dict[str, list[float]], memory: dict[str, float]) -> dict[str, Any]:
    """Medians, the median of the round-by-round ratios, and peak memory."""
    ratios = [rs / marian for rs, marian in zip(*(seconds[name] for name in SYSTEMS), strict=True)]
    figures: dict[str, Any] = {"d_model": d_model, "what": what}
    figures |= {f"{name} ms": round(1000 * statistics.median(seconds[name]), 1) for name in SYSTEMS}
    figures |= {"time ratio": round(statistics.median(ratios), 3)}
    figures |= {f"{name} MiB": round(memory[name], 1) for name in SYSTEMS}
    return figures | {"memory ratio": round(memory[SYSTEMS[0]] / memory[SYSTEMS[1]], 3)}


def report(rows: list[dict[str, Any]], args: argparse.Namespace, ratio: str = "RS / Marian") -> None:
    """Print the rows as a Markdown table, and what their ratios are of, and write them as JSON if asked."""
    print(f"torch {torch.__version__}, {args.threads} thread(s), {args.rounds} rounds, seed {args.seed}; {ratio}")
    print_table(rows)
    if args.output:
        with open(args.output, "w", encoding="utf-8") as file:
            json.dump({"options": vars(args), "rows": rows}, file, indent=2)


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print rows of the same columns as a Markdown table."""
    print(markdown_table(list(rows[0]), [list(figures.values()) for figures in rows]))
