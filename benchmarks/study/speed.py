"""Decoding speed of a study's systems in one run: CTranslate2 int8, one thread, greedy, on the first test set.

    python benchmarks/study/speed.py benchmarks/study/tanaka.yaml --sentences 200 --rounds 5

Single sentences and batches of 16; the systems take turns, and a figure is the median of the rounds. Sentences per
second depend on how long the translations are, so tokens per second are recorded, too, and the size of the file. Of
each system it is the model of the first seed that is there.
"""

import statistics
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import ctranslate2
from run import Cell, Study, parse
from transformers import AutoTokenizer

from rs_transformer.tokenization import convert_source_ids_to_tokens, encode
from rs_transformer.utils.files import write_json

sys.path.append(str(Path(__file__).resolve().parents[1]))
from common import interleave

BATCH = 16


def load(study: Study, sentences: int) -> dict[str, tuple[ctranslate2.Translator, list[list[str]], int]]:
    """A translator for each system, the tokens that it reads, and the bytes of its file."""
    texts = study.pairs(next(iter(study.grid["tests"])))[0][:sentences]
    loaded = {}
    for system in study.grid["systems"]:
        cells = [Cell(system, seed) for seed in study.grid["seeds"]]
        cell = next((each for each in cells if (study.model(each) / "model.safetensors").is_file()), None)
        if cell is None:
            continue
        study.convert(cell)
        tokenizer = AutoTokenizer.from_pretrained(study.model(cell))
        tokens = [convert_source_ids_to_tokens(tokenizer, ids) for ids in encode(tokenizer, texts)]
        folder = str(study.int8(cell))
        loaded[system] = (
            ctranslate2.Translator(folder, compute_type="int8", intra_threads=1),
            tokens,
            Path(folder, "model.bin").stat().st_size,
        )
    return loaded


def translate(translator: ctranslate2.Translator, tokens: Sequence[list[str]], batch: int) -> int:
    """Translate all, so many at a time; returns how many tokens came out."""
    options = {"beam_size": 1, "max_decoding_length": 64}
    if batch == 1:
        results = [translator.translate_batch([source], **options)[0] for source in tokens]
    else:
        results = translator.translate_batch(tokens, max_batch_size=batch, **options)
    return sum(len(result.hypotheses[0]) for result in results)


def main() -> None:
    study, args = parse(
        sentences=(200, None, "Of the first test set, from its beginning."), rounds=(5, None, "Measured rounds.")
    )
    study.results.mkdir(parents=True, exist_ok=True)
    loaded = load(study, args.sentences)
    sentences = min(len(tokens) for _, tokens, _ in loaded.values())  # the test set may have fewer
    figures: dict[str, dict[str, float]] = {system: {"int8_bytes": size} for system, (*_, size) in loaded.items()}
    for name, batch in (("single", 1), ("batch", BATCH)):
        calls = {system: partial(translate, *each[:2], batch) for system, each in loaded.items()}
        seconds = interleave(calls, args.rounds, warm_up=1)
        for system, times in seconds.items():
            median = statistics.median(times)
            figures[system][name] = round(sentences / median, 1)
            figures[system][f"{name}_tokens"] = round(calls[system]() / median, 1)
    options = {"sentences": sentences, "rounds": args.rounds, "batch": BATCH, "threads": 1}
    write_json(
        {"options": options, "ctranslate2": ctranslate2.__version__, "systems": figures}, study.results / "speed.json"
    )
    for system, row in figures.items():
        print(system, row)


if __name__ == "__main__":
    main()
