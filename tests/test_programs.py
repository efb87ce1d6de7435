"""Programs that make a line of each line: what they may do, what is said of what they do wrong, and what is left."""

import logging
import os
import shlex
import sys
import time

import psutil
import pytest

from rs_transformer.utils.console import LOG_ONLY
from rs_transformer.utils.processes import environment_of_programs
from rs_transformer.utils.programs import check_program, map_lines, split_command


def run(code, lines, **options):
    return map_lines([sys.executable, "-S", "-c", f"import sys\n{code}"], lines, option="teacher_command", **options)


STREAM = "for line in sys.stdin: print(line.strip().upper(), flush=True)"
AT_THE_END = "lines = sys.stdin.read().split('\\n')[:-1]\nprint('\\n'.join(lines).upper())"
CHATTY = f"sys.stderr.write('loading …\\n' * 100_000)\n{STREAM}"
# More than a pipe holds, written before anything is read.
EARLY = "print('x' * 500_000, flush=True)\nlines = list(sys.stdin)\nprint(*lines[1:], sep='', end='')"


@pytest.mark.parametrize("code", [STREAM, AT_THE_END, CHATTY, EARLY], ids=["stream", "at the end", "chatty", "early"])
def test_each_line_has_its_own_whenever_the_program_reads_and_writes(code):
    lines, counted = [f"LINE {number} " + "AB" * 20 for number in range(5000)], []
    found = run(code, lines, advance=counted.append)
    assert found[1:] == lines[1:]
    assert sum(counted) == len(found) == 5000


def test_ends_of_lines_within_a_line_are_none():
    odd = ["a\rb", "c\u2028d", "e\x0bf\x85g", "h\r\ni\nj", "é 日本"]
    assert run(STREAM, odd) == ["A B", "C D", "E F G", "H I J", "É 日本"]
    # Of what it writes LF alone is one, with or without CR before it, and the last line needs none.
    assert run(r"sys.stdout.buffer.write('a\u2028b\rc\r\nd'.encode())", ["1", "2"]) == ["a\u2028b\rc", "d"]
    assert run("sys.exit(7)", []) == []  # there is nothing to run it for


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("print('\\n'.join(list(sys.stdin.read().split())[1:]))", "wrote 19 lines for 20: it must write one for each"),
        (f"{STREAM}\nprint('one more')", "wrote more than 20 lines for 20"),
        ("while True: print('y' * 100)", "wrote more than 20 lines for 20"),
        ("sys.stdin.close()\nprint('no more')", "wrote 1 lines for 20"),
        (f"{STREAM}\nsys.exit('first\\nno memory')", "ended with status 1: no memory$"),
        ("sys.exit(3)", "ended with status 3: it wrote nothing on standard error"),
        ("import os\nprint('a')\nos.kill(os.getpid(), 11)", "was ended by signal 11"),
        (r"sys.stdout.buffer.write(b'a\n' * 12 + b'caf\xe9\n' * 8)", "wrote what is not UTF-8, in line 13: b'caf"),
    ],
)
def test_what_a_program_does_wrong_is_said_with_its_name(code, message):
    with pytest.raises(ValueError, match=rf"teacher_command ['\"].*python.* {message}"):
        run(code, [f"w{number}" for number in range(20)])


def test_what_it_says_on_standard_error_is_in_the_log(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger(LOG_ONLY), "propagate", True)
    with caplog.at_level(logging.INFO, LOG_ONLY):
        run(f"print('3 threads', file=sys.stderr)\n{STREAM}", ["a"])
    assert "wrote on standard error:\n3 threads" in caplog.text


def test_an_interrupt_ends_it_and_what_it_has_started(tmp_path):
    inner = f"import os, time\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\nprint('a', flush=True)\n"
    outer = f"import subprocess\nsubprocess.run([sys.executable, '-S', '-c', {inner + 'time.sleep(60)'!r}])"

    def interrupt(done):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(outer, ["a", "b"], advance=interrupt)
    pid, until = int((tmp_path / "pid").read_text()), time.monotonic() + 10
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_command_is_cut_as_by_a_shell_and_looked_for(tmp_path):
    assert split_command("marian -c 'my models/a.yml'  --quiet | x", "o") == [
        *("marian", "-c", "my models/a.yml", "--quiet", "|", "x")
    ]
    for command, message in [
        ("a 'b", 'o "a \'b" cannot be cut into words: No closing quotation'),
        ("  ", "o is blank: name a program"),
        ("t.py --api_key 0123456789", "o has what looks like a password or token in it"),
        ("env API_KEY=0123456789 t.py", "o has what looks like a password or token in it"),
    ]:
        with pytest.raises(ValueError, match=message):
            split_command(command, "o")
    assert split_command("t.py --eos_token </s>", "o")
    check_program([sys.executable], "o")
    with pytest.raises(FileNotFoundError, match="o: there is no program 'no-such-program'"):
        check_program(["no-such-program"], "o")
    script = tmp_path / "t.py"
    script.write_text("print()")
    with pytest.raises(FileNotFoundError, match=r"t.py is no program that may be run: make it executable, or put"):
        check_program([str(script)], "o")
    script.chmod(0o755)
    check_program([str(script)], "o")
    with pytest.raises(OSError, match=r"o '.*t.py' cannot be run \(Exec format error\)"):
        map_lines(split_command(shlex.quote(str(script)), "o"), ["a"], option="o")


def test_a_program_does_not_know_of_the_group_of_processes(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "ACCELERATE_USE_CPU"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("MODEL_RANKING", "kept")
    seen = environment_of_programs()
    assert not [name for name in seen if name.startswith(("RANK", "LOCAL_", "WORLD", "MASTER", "TORCHEL", "ACCEL"))]
    assert seen["MODEL_RANKING"] == "kept"
    assert seen["PATH"] == os.environ["PATH"]
