"""How long `import rs_transformer` takes, beside what any user of a Marian model imports.

    python benchmarks/import_time.py

Each import in a process of its own, in turn; the first round, which fills the disk's cache, is not counted. What
`import torch` takes of it stands beside.
"""

import statistics
import subprocess
import sys
import time

from common import parse_args, report

STATEMENTS = {
    "Marian": "from transformers import MarianMTModel",
    "rs_transformer": "import rs_transformer",
    "torch alone": "import torch",
}


def seconds(statement: str) -> float:
    """The time of a process that runs a statement."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    args = parse_args(__doc__)
    rounds = [{name: seconds(code) for name, code in STATEMENTS.items()} for _ in range(args.rounds + 1)][1:]
    rows = []
    for name, code in STATEMENTS.items():
        ratio = statistics.median(times[name] / times["Marian"] for times in rounds)
        rows.append(
            {
                "statement": f"`{code}`",
                "seconds": round(statistics.median(times[name] for times in rounds), 2),
                "times Marian": round(ratio, 2),
            }
        )
    report(rows, args, ratio="median of the rounds' ratios")


if __name__ == "__main__":
    main()
