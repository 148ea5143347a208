"""A run of the trainer as several processes, forks of one that has Megatron imported: see megatron_server.py."""

import faulthandler
import os
import socket
import sys
import traceback
from pathlib import Path

from nemoflow.engines.megatron_bridge import train

SECONDS = 120
"""After this long a process shows where it stands and ends: a rank that waits for another would wait for ever."""


def run(argument: dict) -> int:
    """Train what {"request": file, "processes": N} says, as torchrun would: 0, or the first other exit code."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    size = str(argument["processes"])
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    children = set()
    for rank in range(argument["processes"]):
        pid = os.fork()
        if pid == 0:
            os._exit(_rank(rank, argument["request"]))
        children.add(pid)
    first = 0
    while children:
        pid, status = os.wait()
        children.discard(pid)
        if (code := os.waitstatus_to_exitcode(status)) and not first:
            first = code
            for other in children:
                os.kill(other, 9)
    return first


def export(argument: dict) -> None:
    """Convert {"checkpoint", "out"} to the files of a Hugging Face model, in single precision."""
    from nemoflow.export import convert

    Path(argument["out"]).mkdir()
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    convert.main("megatron_bridge", Path(argument["checkpoint"]), ids, "float32", Path(argument["out"]))


def _rank(rank: int, request: str) -> int:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    try:
        return train.main([request])
    except BaseException:
        traceback.print_exc()
        return 70
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
