"""A training step where glibc keeps freed memory, as the commands have it on a CPU, and where it does not.

    python benchmarks/allocator.py

A step is forward, backward and AdamW of RS 1x6 on one batch of random sentences. Processes with and without take
turns; the time is the median of all steps but the first two of each, memory the peak of a process.
"""

import multiprocessing
import statistics
import time

import torch
from common import build, memory, parse_args, report, source_batch, training_step

from rs_transformer.utils.memory import keep_freed_memory


def measure(
    kept: bool, d_model: int, threads: int, steps: int, shape: tuple[int, int, int]
) -> tuple[list[float], float]:
    """Seconds of each step, and MiB at the peak, of a process of its own."""
    if kept and not keep_freed_memory():
        raise SystemExit("This C library is not glibc.")
    torch.set_num_threads(threads)
    step = training_step(build("RS 1x6", d_model, shape[2]).train(), source_batch(*shape))
    seconds = []
    for _ in range(steps + 2):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return seconds[2:], memory("VmHWM")


def main() -> None:
    args = parse_args(
        __doc__,
        d_model=[128, 256],
        rounds=(int, 3, "Processes of each kind, in turn."),
        steps=(int, 8, "Measured steps of a process."),
        sentences=(int, 80, "Sentence pairs a batch."),
        length=(int, 16, "Tokens a side."),
    )
    rows = []
    for d_model in args.d_model:
        seconds: dict[bool, list[float]] = {False: [], True: []}
        peaks: dict[bool, list[float]] = {False: [], True: []}
        for number in range(args.rounds):
            for kept in (False, True) if number % 2 else (True, False):
                shape = (args.sentences, args.length, args.seed)
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    found, peak = pool.apply(measure, (kept, d_model, args.threads, args.steps, shape))
                seconds[kept] += found
                peaks[kept].append(peak)
        times = {kept: 1000 * statistics.median(seconds[kept]) for kept in seconds}
        rows.append(
            {
                "d_model": d_model,
                "given back ms": round(times[False], 1),
                "kept ms": round(times[True], 1),
                "time ratio": round(times[True] / times[False], 3),
                "given back MiB": round(max(peaks[False])),
                "kept MiB": round(max(peaks[True])),
            }
        )
    report(rows, args, ratio="kept / given back")


if __name__ == "__main__":
    main()
