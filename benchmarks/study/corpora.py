"""Make the three corpora of the study from those that it is given: everyday, documentation and interface.

    python benchmarks/study/corpora.py --data data --output_dir data/study

- everyday: `tanaka`, its lower-case English brought to normal case, and `tatoeba`. The case is that of sacremoses'
  truecaser, which learns from tatoeba's training set; first letters of sentences are capitals. How well it does is
  printed, on tatoeba's validation set: the share of words and of sentences whose case is that of the original.
- excerpt: the pairs of `training/data/tanaka-excerpt` in that case, which is `training/data/tanaka-excerpt-cased`.
- documentation: `techdocs` and `lohelp`.
- interface: `gettext`, strings of three English words or more. Its own 1,000 test strings are few: 2,000 more are
  held out from the training set, with all that has a side in common with them.

`augmented.ja-en.jsonl`, and everyday's `augmented.en-ja.jsonl`, have more pairs to train with, variants of the others
by rule (`variants.py`). Validation and test sets are those of the corpora, tanaka's left aside (their English was
published in lower case).
"""

import argparse
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

from sacremoses import MosesTokenizer, MosesTruecaser
from variants import augmented

Pair = tuple[str, str]  # English, Japanese

EXCERPT = Path(__file__).resolve().parents[2] / "training" / "data" / "tanaka-excerpt"
HELD_OUT = 2_000
SEED = 20261127


class Truecaser:
    """Gives the words of lower-case sentences the case that they have most often; all else stays as it is.

    Args:
        sentences: text in normal case, to learn from.
    """

    def __init__(self, sentences: Iterable[str]):
        self.tokenizer, self.truecaser = MosesTokenizer("en"), MosesTruecaser()
        self.truecaser.train([self._tokens(sentence) for sentence in sentences], possibly_use_first_token=True)

    def __call__(self, sentence: str) -> str:
        cased, end = [], 0
        for token in self.truecaser.truecase(" ".join(self._tokens(sentence))):
            begin = sentence.lower().find(token.lower(), end)
            if begin < 0:  # The tokenizer has put something else in its place.
                continue
            cased += [sentence[end:begin], token]
            end = begin + len(token)
        return capitalized("".join(cased) + sentence[end:])

    def _tokens(self, sentence: str) -> list[str]:
        return self.tokenizer.tokenize(sentence, escape=False)


def capitalized(sentence: str) -> str:
    """With a capital where a sentence begins: at the first letter, and at one after a full stop, "?" or "!"."""
    letters, begins = list(sentence), True
    for i, letter in enumerate(letters):
        if letter.isalnum():
            letters[i] = letter.upper() if begins else letter
            begins = False
        elif letter in "?!" or (letter == "." and sentence[i + 1 : i + 2] == " " and not is_title(sentence[:i])):
            begins = True
    return "".join(letters)


def is_title(text: str) -> bool:
    """Whether a full stop after this text is that of an abbreviation before a name."""
    return text.rsplit(maxsplit=1)[-1].lower() in {"mr", "mrs", "ms", "dr", "st", "prof"} if text.split() else False


def pairs(file: Path) -> Iterator[Pair]:
    for line in file.read_text("utf-8").splitlines():
        translation = json.loads(line)["translation"]
        yield translation["en"], translation["ja"]


def write(rows: Iterable[Pair], file: Path) -> None:
    lines = [json.dumps({"translation": {"en": en, "ja": ja}}, ensure_ascii=False) for en, ja in rows]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{line}\n" for line in lines), "utf-8")
    print(f"{file}: {len(lines):,} pairs")


def held_out(rows: list[Pair]) -> tuple[list[Pair], list[Pair]]:
    """The training set without, and pairs for a test set, no side of which is in it (compared without case)."""
    chosen = set(random.Random(SEED).sample(sorted({(en.lower(), ja.lower()) for en, ja in rows}), HELD_OUT))
    sides = {side for pair in chosen for side in pair}
    out = {pair: None for pair in rows if (pair[0].lower(), pair[1].lower()) in chosen}
    kept = [(en, ja) for en, ja in rows if en.lower() not in sides and ja.lower() not in sides]
    return kept, list({(en.lower(), ja.lower()): (en, ja) for en, ja in out}.values())


def report(truecaser: Truecaser, sentences: list[str]) -> None:
    """Print how many words and sentences get their own case back."""
    words = right = whole = 0
    for sentence in sentences:
        cased = truecaser(sentence.lower())
        kinds = [(a, b) for a, b in zip(sentence.split(), cased.split(), strict=True) if a.lower() != a.upper()]
        words += len(kinds)
        right += sum(a == b for a, b in kinds)
        whole += cased == sentence
    print(f"truecaser: {right / words:.2%} of {words:,} words, {whole / len(sentences):.1%} of the sentences right")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"), help="Where the corpora are.")
    parser.add_argument("--output_dir", type=Path, default=Path("data/study"))
    args = parser.parse_args()

    def read(corpus: str, part: str) -> list[Pair]:
        return list(pairs(args.data / corpus / f"{part}.jsonl"))

    tatoeba = read("tatoeba", "train")
    truecaser = Truecaser(en for en, _ in tatoeba)
    report(truecaser, [en for en, _ in read("tatoeba", "validation")])
    tanaka = [(truecaser(en), ja) for en, ja in read("tanaka", "train")]
    write(tanaka + tatoeba, args.output_dir / "everyday" / "train.jsonl")
    for part in ("validation", "test"):
        write(read("tatoeba", part), args.output_dir / "everyday" / f"{part}.jsonl")
    for part in ("train", "validation", "test"):
        excerpt = pairs(EXCERPT / f"{part}.jsonl")
        write(((truecaser(en), ja) for en, ja in excerpt), args.output_dir / "excerpt" / f"{part}.jsonl")
        write(read("techdocs", part) + read("lohelp", part), args.output_dir / "documentation" / f"{part}.jsonl")

    strings = {
        part: [pair for pair in read("gettext", part) if len(pair[0].split()) >= 3]
        for part in ("train", "validation", "test")
    }
    train, more = held_out(strings["train"])
    write(train, args.output_dir / "interface" / "train.jsonl")
    write(strings["validation"], args.output_dir / "interface" / "validation.jsonl")
    write(strings["test"] + more, args.output_dir / "interface" / "test.jsonl")

    for corpus in ("everyday", "documentation", "interface"):
        rows = list(pairs(args.output_dir / corpus / "train.jsonl"))
        variants = augmented([(ja, en) for en, ja in rows], ("ja", "en"), SEED)
        write(((en, ja) for ja, en in variants), args.output_dir / corpus / "augmented.ja-en.jsonl")
        if corpus == "everyday":
            write(augmented(rows, ("en", "ja"), SEED), args.output_dir / corpus / "augmented.en-ja.jsonl")


if __name__ == "__main__":
    main()
