"""Runs generated Python where it can harm nothing: one process, no files, no network, limited time and memory.

The process locks itself in before it runs the code (cell.py), with what Linux gives to anyone: Landlock denies every
file but Python's own library and writes anywhere, seccomp denies sockets, other processes, programs and signals, and
limits bound memory and processor time. What was expected never enters it, so code cannot print it from there. Where
the kernel has not both, nothing is run.
"""

import json
import os
import selectors
import subprocess
import sys
import time
from pathlib import Path
from typing import BinaryIO

CELL = Path(__file__).with_name("cell.py")

START_SECONDS = 30.0
"""For the process to start and to lock itself in, before its own time begins."""

MAX_OUTPUT = 2**20
"""Bytes that a program may print; one that prints more has failed."""


def run(
    code: str, given: str, function: str | None, arguments: list | None, seconds: float, megabytes: int
) -> str | None:
    """What `code` prints when it reads `given`, or what its `function` returns for `arguments`, as JSON.

    None when it fails: ends in an error, takes longer than `seconds` or more than `megabytes`, prints too much.

    Raises RuntimeError when the process could not be locked in.
    """
    job = json.dumps({"code": code, "function": function, "arguments": arguments})
    limits = [str(seconds), str(megabytes)]
    told, tells = os.pipe()  # the cell says here that it is locked in
    try:
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", str(CELL), str(tells), *limits],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=(tells,),
            cwd="/",
            env={"LANG": "C.UTF-8"},
            start_new_session=True,
        )
    finally:
        os.close(tells)
    with os.fdopen(told, "rb") as locked, child:
        header = job.encode() + b"\n"
        streams = {child.stdout: bytearray(), child.stderr: bytearray()}
        locked_in, whole = _exchange(child, header + given.encode(), streams, locked, seconds)
        child.kill()
        code_ = child.wait()
        if not locked_in:
            why = streams[child.stderr].decode(errors="replace").strip() or f"exit code {code_}"
            raise RuntimeError(f"generated code cannot be kept apart from this machine: {why.splitlines()[-1]}")
        if not whole or code_ != 0:
            return None
        return streams[child.stdout].decode(errors="replace")


def _exchange(
    child: subprocess.Popen, given: bytes, streams: dict, locked: BinaryIO, seconds: float
) -> tuple[bool, bool]:
    """Write `given`, read the streams to their ends: whether the child was locked in, and ended as it should.

    The clock runs from when it is locked in. It has not ended as it should when it took too long or printed too much.
    """
    left = memoryview(given)
    os.set_blocking(child.stdin.fileno(), False)
    deadline, locked_in = time.monotonic() + START_SECONDS, False
    with selectors.DefaultSelector() as selector:
        selector.register(child.stdin, selectors.EVENT_WRITE)
        for stream in (*streams, locked):
            selector.register(stream, selectors.EVENT_READ)
        reading = len(streams)
        while reading:
            ready = selector.select(max(0, deadline - time.monotonic()))
            if not ready:
                return locked_in, False
            for key, _ in ready:
                if key.fileobj is child.stdin:
                    try:
                        left = left[os.write(key.fd, left[:65536]) :]
                    except BrokenPipeError:
                        left = left[:0]
                    if not left:
                        selector.unregister(child.stdin)
                        child.stdin.close()
                elif key.fileobj is locked:
                    locked_in = os.read(key.fd, 64) == b"locked in"
                    deadline = time.monotonic() + seconds
                    selector.unregister(locked)
                else:
                    found = os.read(key.fd, 65536)
                    streams[key.fileobj] += found
                    if not found:
                        selector.unregister(key.fileobj)
                        reading -= 1
                    if len(streams[key.fileobj]) > MAX_OUTPUT:
                        return locked_in, False
    try:
        child.wait(max(0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return locked_in, False
    return locked_in, True
