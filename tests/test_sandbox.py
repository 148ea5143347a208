"""The sandbox: what generated code can do, and what it cannot."""

import json
import time
from pathlib import Path

import psutil
import pytest

from nemoflow.environments import sandbox
from nemoflow.environments.verifiers import code


def run(program: str, given: str = "", seconds: float = 5, megabytes: int = 512) -> str | None:
    return sandbox.run(program, given, None, None, seconds, megabytes)


def test_ordinary_programs_run():
    assert run("print(sum(map(int, input().split())))", "1 2\n") == "3\n"
    used = "import collections, hashlib, heapq, json, math, random, re, threading\n"
    thread = "t = threading.Thread(target=print, args=(7,)); t.start(); t.join()"
    assert run(used + thread) == "7\n"
    assert run("import sys; print(len(sys.stdin.read()))", "x" * 300_000) == "300000\n"
    assert sandbox.run("def f(a, b): print('noise'); return [a, b]", "", "f", [1, "2"], 5, 512) == '[1, "2"]'
    assert sandbox.run("class Solution:\n def f(self, a): return a + 1", "", "f", [1], 5, 512) == "2"


@pytest.fixture
def secret(tmp_path) -> Path:
    file = tmp_path / "secret"
    file.write_text("planted")
    return file


@pytest.mark.parametrize(
    "program",
    [
        "print(open(SECRET).read())",
        "import os; os.open(SECRET, os.O_RDONLY)",
        "import os; print(os.listdir(os.path.dirname(SECRET)))",
        "open('/etc/passwd').read()",
        "open('/proc/self/environ').read()",
        "import os; open(f'/proc/{os.getppid()}/environ').read()",
        "open(SECRET, 'w').write('x')",
        "open(SECRET + '2', 'w')",
        "import os; os.remove(SECRET)",
        "import os; os.mkdir(SECRET + '3')",
        "import os; os.symlink('/etc', SECRET + '4')",
        "import socket; socket.socket()",
        "import socket; socket.socket(socket.AF_UNIX)",
        "import socket; socket.socketpair()",
        "import urllib.request; urllib.request.urlopen('http://127.0.0.1:1')",
        "import os; os.fork()",
        "import os; os.posix_spawn('/bin/true', ['true'], {})",
        "import subprocess; subprocess.run(['/bin/true'])",
        "import os; os.execv('/bin/true', ['true'])",
        "import os; os.kill(os.getppid(), 0)",
        "import os; os.kill(-1, 9)",
        "import ctypes; libc = ctypes.CDLL(None, use_errno=True); assert libc.ptrace(16, 1, 0, 0) == 0",
        "import ctypes; assert ctypes.CDLL(None).unshare(0x10000000) == 0",
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
        "bytearray(4 << 30)",
        "import os; os.write(9, b'x')",
    ],
)
def test_what_generated_code_cannot_do(secret, program):
    """It fails there: nothing it prints afterwards comes out. The same program without that line does print."""
    assert run(f"SECRET = {str(secret)!r}\nprint('here')\n") == "here\n"
    assert run(f"SECRET = {str(secret)!r}\n{program}\nprint('here')\n") is None
    assert secret.read_text() == "planted"
    assert [p.name for p in secret.parent.iterdir()] == ["secret"]


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time; time.sleep(60)",
        "import signal, time\nfor n in range(1, 32):\n try: signal.signal(n, signal.SIG_IGN)\n except Exception: pass\n"
        "while True: time.sleep(60)",
        "import threading, time\n[threading.Thread(target=time.sleep, args=(60,)).start() for _ in range(5)]",
        "import os, time\nos.close(1); os.close(2)\ntime.sleep(60)",
        "import sys\nwhile True: print('x' * 9999)",
    ],
)
def test_generated_code_does_not_outlive_its_time(program):
    begun = time.monotonic()
    assert run(program, seconds=1) is None
    assert time.monotonic() - begun < 4
    assert [p for p in psutil.Process().children(recursive=True) if "cell.py" in " ".join(p.cmdline())] == []


def test_where_it_cannot_be_locked_in_nothing_runs(monkeypatch, tmp_path):
    cell = tmp_path / "cell.py"
    cell.write_text(sandbox.CELL.read_text().replace("_CREATE_RULESET, _ADD_RULE", "_CREATE_RULESET, _ADD_RULE", 1))
    cell.write_text(cell.read_text().replace("= 444, 445, 446, 126", "= 9999, 445, 446, 126"))
    monkeypatch.setattr(sandbox, "CELL", cell)
    with pytest.raises(RuntimeError, match="cannot be kept apart from this machine: this kernel has no Landlock"):
        run(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert not (tmp_path / "ran").exists()


def fenced(program: str) -> str:
    return f"I think:\n```python\n{program}\n```\nThat is it."


def unit_tests(inputs: list[str], outputs: list[str], name: str | None = None) -> dict:
    return {
        "verifier_metadata": {
            "unit_tests": {"inputs": inputs, "outputs": outputs} | ({"fn_name": name} if name else {})
        }
    }


ADDS = "print(sum(map(int, input().split())))"


@pytest.mark.parametrize(
    ("answer", "row", "reward"),
    [
        (fenced(ADDS), unit_tests(["1 2", "3 4"], ["3", "7\n"]), 1),
        (fenced(ADDS), unit_tests(["1 2", "3 4"], ["3", "8"]), 0),
        (fenced("print(3)"), unit_tests(["1 2", "3 4"], ["3", "7"]), 0),
        (fenced("print('3.0')"), unit_tests(["1 2"], ["3"]), 1),
        (fenced("raise ValueError"), unit_tests(["1 2"], ["3"]), 0),
        (fenced("this is no Python"), unit_tests(["1 2"], ["3"]), 0),
        (ADDS, unit_tests(["1 2"], ["3"]), 0),
        ("", unit_tests(["1 2"], ["3"]), 0),
        (fenced("print(1)") + fenced(ADDS), unit_tests(["1 2"], ["3"]), 1),
        (fenced("def add(a, b): return a + b"), unit_tests(["1\n2"], ["3"], "add"), 1),
        (fenced("def add(a, b): return a - b"), unit_tests(["1\n2"], ["3"], "add"), 0),
        (fenced("def sub(a, b): return a - b"), unit_tests(["1\n2"], ["3"], "add"), 0),
    ],
)
def test_programs_are_judged_by_their_unit_tests(answer, row, reward):
    assert code.verify(answer, row) == reward


def test_what_a_test_expects_is_not_in_the_process():
    """A program that prints all it can find of itself does not find the answer."""
    program = "import sys, gc\nprint([o for o in gc.get_objects() if isinstance(o, (list, dict, str))], sys.argv)"
    printed = run(program, json.dumps([1, 2]))
    assert printed is None or "4711" not in printed
    assert code.verify(fenced(program), unit_tests(["1"], ["4711"])) == 0
