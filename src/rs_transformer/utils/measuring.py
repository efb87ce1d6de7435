"""Time and memory: of several in turn, so that all suffer alike from what else the machine does."""

import platform
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def interleave(
    steps: dict[Any, Callable[[], Any]], rounds: int, warm_up: int = 2, calls: int = 1
) -> dict[Any, list[float]]:
    """Seconds of each step's calls, round by round; the order of the steps turns from round to round."""
    seconds: dict[Any, list[float]] = {name: [] for name in steps}
    for number in range(warm_up + rounds):
        names = list(steps) if number % 2 else list(reversed(steps))
        for name in names:
            for _ in range(calls):
                start = time.perf_counter()
                steps[name]()
                if number >= warm_up:
                    seconds[name].append(time.perf_counter() - start)
    return seconds


def memory(what: str, process: int | str = "self") -> float:
    """MiB of a process, this one by default, now (`"VmRSS"`) or at its peak (`"VmHWM"`). Linux."""
    # Not `getrusage`, whose peak a new process inherits from the one that started it.
    return int(re.search(rf"{what}:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text()).group(1)) / 1024


def processor() -> str:
    """What the CPU is called, as far as the system says."""
    file = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", file.read_text(), re.MULTILINE) if file.is_file() else []
    return names[0] if names else platform.processor() or platform.machine()
