"""What it costs that the first translation on an untested transformers checks its cache.

    python benchmarks/cache_check.py

The check runs once in a process, whatever is translated. Beside it a greedy translation of 24 tokens from 24, one
sentence; the weights are random. Medians. `error` is how far a cached step lies from the uncached one, `error, passed
over` how far it would if the cache were passed over, both in standard deviations of the logits: the tolerance of the
check lies between.
"""

import statistics

import torch
from common import build, interleave, parse_args, report, source_batch

from rs_transformer.generation_rs_marian import CheckedGenerationMixin

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def main() -> None:
    args = parse_args(__doc__, d_model=[128, 512], vocab_size=(int, [8000, 58101], "Entries of the vocabulary."))
    torch.set_num_threads(args.threads)
    inputs = source_batch(1, 24, args.seed)
    del inputs["labels"]
    rows = []
    for d_model in args.d_model:
        for vocab_size in args.vocab_size:
            model = build("RS 1x6", d_model, args.seed, vocab_size=vocab_size).eval()
            steps = {
                "check": model._judge_cache,
                "translation": lambda model=model: model.generate(**inputs, min_new_tokens=24, max_new_tokens=24),
            }
            seconds = interleave(steps, args.rounds)
            milliseconds = {f"{name} ms": round(1000 * statistics.median(seconds[name]), 1) for name in steps}
            for dtype in DTYPES:
                error, passed_over = (f"{value:.4f}" for value in model.to(dtype)._cached_step_errors())
                figures = {"dtype": str(dtype)[6:], "error": error, "error, passed over": passed_over}
                rows.append({"d_model": d_model, "vocabulary": vocab_size, **figures, **milliseconds})
                milliseconds = dict.fromkeys(milliseconds, "")
    report(rows, args, ratio=f"tolerance {CheckedGenerationMixin.cache_tolerance}")


if __name__ == "__main__":
    main()
