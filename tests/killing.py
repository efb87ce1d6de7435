"""Scripts that are killed: not after some time, which another machine takes otherwise, but at a call of a function."""

import os
import pkgutil
import signal
from pathlib import Path

from forked import fork


def kill(script: str, *options: object, at: str, call: int = 1, moment: str = "before") -> None:
    """Run a script in a process that is killed, as by the system when memory is short; fail if it ends otherwise.

    Args:
        at: the function, such as "torch.save"; one that writes a file has it as its second argument.
        call: which of its calls.
        moment: "before" or "after" it, or "amid" it: half of the file is written.
    """
    done = fork(script, *options, check=False, prepare=(_arm, at, call, moment))
    assert done.returncode == -signal.SIGKILL, f"{at} was not called {call} times:\n{done.stdout}\n{done.stderr}"


def _arm(at: str, call: int, moment: str) -> None:
    owner, _, name = at.rpartition(".")
    owner = pkgutil.resolve_name(owner)
    function, calls = getattr(owner, name), []

    def deadly(*args, **kwargs):
        calls.append(args)
        if len(calls) < call:
            return function(*args, **kwargs)
        if moment != "before":
            function(*args, **kwargs)
        if moment == "amid":
            os.truncate(args[1], Path(args[1]).stat().st_size // 2)
        return os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name, deadly)
