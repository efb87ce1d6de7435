"""How many texts `tokenizer.json` segments otherwise than the `MarianTokenizer` that it is made from.

    python benchmarks/tokenizer_json.py --tokenizer hub_cards/rs-marian-ja-en-tanaka --corpus data/*/*.jsonl

Both sides of every pair are encoded as sources, by the tokenizers library and by transformers.js, which
`npm ci --ignore-scripts --prefix hub_cards/web` installs.
"""

import json
import subprocess
import tempfile
from pathlib import Path

from common import parse_args, print_table
from tqdm import tqdm
from transformers import MarianTokenizer, PreTrainedTokenizerFast

from rs_transformer.export.tokenizer_json import write_tokenizer_json

NODE = ["node", Path(__file__).resolve().parents[1] / "tests" / "web" / "tokenize.mjs"]


def transformers_js(folder: str, texts: list[str]) -> list[list[int]]:
    """The ids of texts by transformers.js."""
    questions = "".join(f"{json.dumps(text)}\n" for text in texts)
    answers = subprocess.run([*NODE, folder], input=questions, stdout=subprocess.PIPE, text=True, check=True).stdout
    return [json.loads(answer) for answer in answers.splitlines()]


def read_sides(file: str) -> list[str]:
    """Both sides of the pairs of a file of JSON lines."""
    with open(file, encoding="utf-8") as lines:
        return [text for line in lines for text in json.loads(line)["translation"].values() if text is not None]


def main() -> None:
    args = parse_args(
        __doc__,
        tokenizer=(str, "hub_cards/rs-marian-ja-en-tanaka", "Folder of a MarianTokenizer."),
        corpus=(str, ["training/data/tanaka-excerpt/test.jsonl"], "Files of pairs, in JSON lines."),
        batch=(int, 20000, "Texts at a time."),
    )
    marian = MarianTokenizer.from_pretrained(args.tokenizer)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer_json(marian, folder)
        fast = PreTrainedTokenizerFast.from_pretrained(folder)
        for file in tqdm(args.corpus, disable=None):
            sides = read_sides(file)
            row = {"corpus": file, "texts": len(sides), "tokenizers": 0, "transformers.js": 0}
            for start in range(0, len(sides), args.batch):
                texts = sides[start : start + args.batch]
                expected = marian(texts, verbose=False)["input_ids"]
                found = {
                    "tokenizers": fast(texts, verbose=False)["input_ids"],
                    "transformers.js": transformers_js(folder, texts),
                }
                for name, ids in found.items():
                    different = [i for i, pair in enumerate(zip(expected, ids, strict=True)) if pair[0] != pair[1]]
                    row[name] += len(different)
                    for i in different[:3]:
                        print(f"{name}: {texts[i]!r}\n  {expected[i]}\n  {ids[i]}")
            rows.append(row)
    print_table(rows)


if __name__ == "__main__":
    main()
