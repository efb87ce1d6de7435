"""The reverse task (after JoeyNMT): copy a sequence of letters backwards. A tiny model learns it in about a minute."""

import json
import random
from pathlib import Path

LETTERS = "abcdefghijkl"


def reverse_pairs(number: int, seed: int, longest: int = 7) -> list[tuple[str, str]]:
    """`number` different pairs such as ("a c b", "b c a")."""
    generator = random.Random(seed)
    pairs: dict[str, str] = {}
    while len(pairs) < number:
        letters = generator.choices(LETTERS, k=generator.randint(3, longest))
        pairs[" ".join(letters)] = " ".join(reversed(letters))
    return list(pairs.items())


def write_jsonl(file: Path, pairs: list[tuple[str, str]]) -> Path:
    rows = ({"translation": {"fw": source, "bw": target}} for source, target in pairs)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def write_task(folder: Path, train: int = 4000, held_out: int = 100) -> dict[str, Path]:
    """Train, validation and test files with no pair in common."""
    pairs = reverse_pairs(train + 2 * held_out, seed=0)
    splits = {
        "train": pairs[2 * held_out :],
        "validation": pairs[:held_out],
        "test": pairs[held_out : 2 * held_out],
    }
    return {split: write_jsonl(folder / f"{split}.jsonl", rows) for split, rows in splits.items()}
