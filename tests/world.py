"""Runs of the trainer as several processes: forks of one that has Megatron imported, see megatron_server.py, or, where
CUDA does not let itself be forked, processes of their own, started as the workflow starts them.
"""

import faulthandler
import json
import os
import socket
import subprocess
import sys
import traceback
from pathlib import Path

from megatron_fixtures import Run, Server

from nemoflow import launch, training
from nemoflow.engines import megatron_bridge
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
    """Convert {"checkpoint", "out", "dtype"} to the files of a Hugging Face model."""
    from nemoflow.export import convert

    Path(argument["out"]).mkdir()
    about = {"tokens": {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}, "hf_config": None}
    convert.main("megatron_bridge", Path(argument["checkpoint"]), about, argument["dtype"], Path(argument["out"]))


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


class World(Run):
    """A trajectory of several processes."""

    def __init__(self, server: Server, directory: Path, processes: int, **request):
        super().__init__(server, directory, **request)
        self.processes = processes

    def begin(self, **changes) -> tuple[int, Path]:
        path = self.directory / "request.json"
        path.write_text(json.dumps(self.request | changes), encoding="utf-8")
        pid, log, _ = self.server.start("world:run", {"request": str(path), "processes": self.processes})
        return pid, log

    def fails(self, **changes) -> str:
        """The line with which they refuse; each of them may say it."""
        _, log = self.begin(**changes)
        code, text = self.server.end(), log.read_text()
        said = {line for line in text.splitlines() if line.startswith("nemoflow: error: ")}
        assert code == 1, text[-3000:]
        assert len(said) == 1, text[-3000:]
        return said.pop()


CALL = """\
import importlib, json, sys
target, argument, result = sys.argv[1:]
module, _, function = target.partition(":")
found = getattr(importlib.import_module(module), function)(json.loads(argument))
open(result, "w").write(json.dumps(found))
"""


class Programs(Server):
    """A server whose jobs are programs of their own, a trainer's as many processes as it asks for."""

    def __init__(self, directory: Path):
        self.directory, self.count = directory, 0
        self.process: subprocess.Popen | None = None

    def start(self, target: str, argument) -> tuple[int, Path, Path]:
        self.count += 1
        log, result = self.directory / f"{self.count}.log", self.directory / f"{self.count}.json"
        if target == "world:run":
            program = megatron_bridge.command(Path(argument["request"]))
            command = launch.launch(program, {"nodes": 1, "gpus_per_node": argument["processes"]}).command
        else:
            command = [sys.executable, "-c", CALL, target, json.dumps(argument), str(result)]
        environment = training.environment()
        environment["PYTHONPATH"] += os.pathsep + str(Path(__file__).parent)
        with log.open("w") as file:
            self.process = subprocess.Popen(
                command, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
        return self.process.pid, log, result

    def end(self) -> int:
        return self.process.wait()

    def close(self) -> None:
        if self.process and self.process.poll() is None:
            self.process.kill()
