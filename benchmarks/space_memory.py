"""Memory of the web demo as visitors come: each translates twenty long sentences and looks at three pictures.

    python benchmarks/space_memory.py --requests 200

Starts `hub_cards/space/app.py` with the model beside it as a process of its own. Each visitor is a session with one of
the decoder's depths in turn, and four requests. What stays is to be judged after the first requests, which fill caches
once. Needs gradio (the extra `demo`). Linux.
"""

import argparse
import itertools
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from gradio_client import Client

from rs_transformer.utils.tables import markdown_table

ROOT = Path(__file__).resolve().parents[1]
SENTENCES = 20
LOOKED_AT = (0, 9, 19)
CHARACTERS = 95  # of a sentence


def texts() -> list[str]:
    """What visitors type, all different: each twenty sentences, made of many short ones."""
    file = ROOT / "training" / "data" / "tanaka-excerpt" / "train.jsonl"
    rows = (json.loads(line) for line in file.read_text(encoding="utf-8").splitlines())
    short = itertools.cycle(re.sub("[。．.！!？?]", "", row["translation"]["ja"]) for row in rows)
    long = ("、".join(itertools.islice(short, 8))[:CHARACTERS] + "。" for _ in range(40 * SENTENCES))
    return ["".join(itertools.islice(long, SENTENCES)) for _ in range(40)]


def start(app: Path) -> tuple[subprocess.Popen, str]:
    """The demo's process and its address, once it answers."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    environment = {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_SERVER_PORT": str(port), "HF_HUB_OFFLINE": "1"}
    server = subprocess.Popen([sys.executable, app], env={**os.environ, **environment}, stdout=subprocess.DEVNULL)
    while server.poll() is None:
        try:
            urllib.request.urlopen(address).close()
            return server, address
        except urllib.error.URLError:
            time.sleep(0.5)
    raise SystemExit(f"{app} ended with {server.returncode}")


def resident(process: int) -> float:
    """MiB of a process in memory."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+) kB", status).group(1)) / 1024


def visit(address: str, text: str, depth: int) -> None:
    """What one visitor does."""
    client = Client(address, verbose=False, analytics_enabled=False, download_files=False)
    client.predict(text, depth, api_name="/translate")
    for sentence in LOOKED_AT:
        client.predict(sentence, depth, api_name="/show_step")
    client.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--app", type=Path, default=ROOT / "hub_cards" / "space" / "app.py")
    parser.add_argument("--requests", type=int, default=200, help="A translation or a picture is one.")
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 2, 3, 4, 5, 6], help="Decoder depths.")
    parser.add_argument("--output", help="Where to write the figures as JSON.")
    args = parser.parse_args()
    server, address = start(args.app)
    figures = [{"requests": 0, "MiB": round(resident(server.pid))}]
    began = time.perf_counter()
    try:
        each = 1 + len(LOOKED_AT)
        for done, text in zip(range(each, args.requests + 1, each), itertools.cycle(texts())):
            visit(address, text, args.depths[done // each % len(args.depths)])
            if done % 20 == 0:
                figures.append({"requests": done, "MiB": round(resident(server.pid))})
                print(f"{done} requests: {figures[-1]['MiB']} MiB", file=sys.stderr, flush=True)
    finally:
        server.terminate()
        server.wait()
    base = figures[1]["MiB"]
    rows = [(row["requests"], row["MiB"], f"{100 * (row['MiB'] / base - 1):+.1f}%") for row in figures]
    print(f"{args.requests} requests in {time.perf_counter() - began:.0f} s")
    print(markdown_table(["requests", "MiB", "to that after 20"], rows))
    if args.output:
        Path(args.output).write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
