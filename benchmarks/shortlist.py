"""What a lexical shortlist costs: its coverage, and CTranslate2's translations with and without it.

    python benchmarks/shortlist.py --model hub_cards/rs-marian-ja-en-tanaka --train_file data/tanaka/train.jsonl \\
        --test_file data/tatoeba/test.jsonl --lowercase 1
    python benchmarks/shortlist.py --model runs/mixed --aligner eflomal --train_file data/tanaka/train.jsonl \\
        data/tatoeba/train.jsonl --test_file data/tatoeba/test.jsonl --output lex.s2t

By the model's own cross-attention, each sentence by itself, greedily; or, of a folder that needs only a tokenizer, by
eflomal's alignments in both directions (`pip install eflomal`), for the coverage alone. `--output` gets the shortlist.
"""

import tempfile
from collections import Counter, defaultdict
from itertools import chain
from pathlib import Path

from common import parse_args
from transformers import AutoTokenizer

from rs_transformer.attention.alignment import count_links
from rs_transformer.checkpoints import load_translator
from rs_transformer.commands.export import compare_without
from rs_transformer.decoding import DecodingArguments
from rs_transformer.export import ctranslate2
from rs_transformer.shortlist import coverage, make_shortlist
from rs_transformer.tokenization import encode
from rs_transformer.utils.text_files import read_columns

DECODING = DecodingArguments(num_beams=1, length_penalty=0.0, max_new_tokens=128)


def read_pairs(files: list[str], lowercase: bool) -> tuple[list[str], list[str]]:
    columns = [("translation", "ja"), ("translation", "en")]
    rows = [row for file in files for row in read_columns(file, columns)]
    return [str(ja) for ja, _ in rows], [str(en).lower() if lowercase else str(en) for _, en in rows]


def eflomal_links(source_ids: list[list[int]], target_ids: list[list[int]]) -> dict[int, Counter[int]]:
    """Alignments of both directions, counted; the ends of sentence are aligned with nothing."""
    import eflomal

    pairs = [(s, t) for s, t in zip(source_ids, target_ids, strict=True) if len(s) > 1 and len(t) > 1]
    links: dict[int, Counter[int]] = defaultdict(Counter)
    with tempfile.TemporaryDirectory() as temporary:
        texts = [Path(temporary, name) for name in ("source", "target")]
        found = [str(Path(temporary, name)) for name in ("forward", "reverse")]
        for text, rows in zip(texts, zip(*pairs, strict=True), strict=True):
            text.write_text("".join(f"{' '.join(map(str, row[:-1]))}\n" for row in rows))
        with texts[0].open() as source, texts[1].open() as target:
            eflomal.Aligner().align(source, target, links_filename_fwd=found[0], links_filename_rev=found[1])
        for file in found:
            for (source, target), line in zip(pairs, Path(file).read_text().splitlines(), strict=True):
                for place in line.split():
                    first, second = map(int, place.split("-"))
                    links[source[first]][target[second]] += 1
    return links


def main() -> None:
    args = parse_args(
        __doc__,
        model=(str, "hub_cards/rs-marian-ja-en-tanaka", "A model's folder."),
        aligner=(str, "attention", "attention or eflomal."),
        train_file=(str, [], "Pairs that it is made of."),
        test_file=(str, [], "Pairs that it is tried on."),
        lowercase=(int, 0, "1: the model writes lower case."),
        candidates=(int, 100, "Target pieces of a source piece."),
        frequent=(int, 100, "Target pieces of every sentence."),
    )
    train, test = (read_pairs(files, bool(args.lowercase)) for files in (args.train_file, args.test_file))
    own = args.aligner == "attention"
    model, tokenizer = load_translator(args.model) if own else (None, AutoTokenizer.from_pretrained(args.model))
    sides = [encode(tokenizer, column, target=bool(side)) for side, column in enumerate(train)]
    links = count_links(model, tokenizer, *sides) if own else eflomal_links(*sides)
    frequencies = Counter(chain.from_iterable(sides[1]))
    sizes = {"candidates": args.candidates, "frequent": args.frequent}
    shortlist = make_shortlist(tokenizer, links, frequencies, **sizes)
    sources, targets = encode(tokenizer, test[0]), encode(tokenizer, test[1], target=True)
    print(coverage(tokenizer, shortlist, sources, targets), flush=True)
    if args.output:
        shortlist.save(args.output, tokenizer)
    if own:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary, "ct2")
            ctranslate2.convert(args.model, folder)
            ctranslate2.write_shortlist(shortlist, folder, tokenizer)
            whole = ctranslate2.load(folder, tokenizer, DECODING)
            print(
                compare_without(
                    whole, ctranslate2.load(folder, tokenizer, DECODING, use_shortlist=True), sources, test[1]
                )
            )


if __name__ == "__main__":
    main()
