"""What `srun` starts on each node for a program over Ray: head and program on the first node, workers on the others.

    python3 -m nemoflow.launch.ray GPUS PROGRAM ARGUMENT...

The program runs once all nodes have come, with RAY_ADDRESS set, and its exit code is that of the step. Whatever ends,
ends the others: the head's death that of its workers, the program's that of the cluster.

Environment, besides what nemoflow.launch.node reads: NEMOFLOW_STATE, a directory that all nodes see, for the address
and Ray's logs; NEMOFLOW_RAY_WAIT, seconds to wait for all nodes (600).
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

POLL_SECONDS = 0.5
STARTS = 3
"""How often the head is started, each time on another port: one that was free a moment ago may be taken."""


def main(arguments: list[str]) -> int:
    """The exit code of this node's part."""
    gpus, *program = arguments
    nodes, node = os.environ["NEMOFLOW_NODES"].split(","), int(os.environ["SLURM_NODEID"])
    state = Path(os.environ["NEMOFLOW_STATE"])
    state.mkdir(parents=True, exist_ok=True)
    # The step's exit code is its highest one, and that of the head is to count
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number if node == 0 else 0))
    # Ray and what runs in it must not take themselves for tasks of this step
    for name in [n for n in os.environ if n.startswith(("SLURM_", "PMI_", "PMIX_", "OMPI_"))]:
        del os.environ[name]
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
    if node == 0:
        return _head(nodes, int(gpus), state, program)
    return _worker(nodes[node], node, int(gpus), state)


def _ray(state: Path, name: str, address: str, gpus: int, *arguments: str) -> subprocess.Popen:
    """A node of Ray, which lives as long as this process's child does."""
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *arguments),
        *(f"--node-ip-address={address}", f"--num-gpus={gpus}", "--disable-usage-stats"),
    ]
    with (state / f"ray-{name}.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def _end(child: subprocess.Popen) -> None:
    """End a node of Ray with all its processes, which share its session."""
    for number, patience in ((signal.SIGTERM, 10), (signal.SIGKILL, 10)):
        try:
            os.killpg(child.pid, number)
            child.wait(patience)
        except ProcessLookupError:
            break
        except subprocess.TimeoutExpired:
            continue
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)  # what outlived its parent


def _head(nodes: list[str], gpus: int, state: Path, program: list[str]) -> int:
    run = os.environ["NEMOFLOW_RUN"]
    head, child = None, None
    try:
        address, head = _started(nodes[0], gpus, state)
        os.environ["RAY_ADDRESS"] = address
        _write(state / "ray.json", {"run": run, "address": address})
        if missing := _waited(nodes, gpus, head):
            print(f"nemoflow: error: {missing}; Ray's logs are in {state}", file=sys.stderr, flush=True)
            return 1
        _leave()  # the program attaches by itself
        print(f"Ray is ready: {len(nodes)} nodes with {gpus} GPUs each", flush=True)
        child = subprocess.Popen(program)
        while (code := child.poll()) is None:
            if head.poll() is not None:
                print(f"nemoflow: error: Ray's head ended; its logs are in {state}", file=sys.stderr, flush=True)
                return 1
            time.sleep(POLL_SECONDS)
        return code if code >= 0 else 128 - code
    finally:
        _write(state / "ray.json", {"run": run, "ended": True})
        if child is not None and child.poll() is None:
            child.terminate()
            try:
                child.wait(10)
            except subprocess.TimeoutExpired:
                child.kill()
        if head is not None:
            _end(head)


def _started(address: str, gpus: int, state: Path) -> tuple[str, subprocess.Popen]:
    """The head, answering, and its address. Exits with a word when it does not start."""
    port = int(os.environ["NEMOFLOW_PORT"])
    for _ in range(STARTS):
        head = _ray(state, "head", address, gpus, "--head", f"--port={port}", "--include-dashboard=false")
        end = time.monotonic() + 60
        while head.poll() is None and time.monotonic() < end:
            if _answers(f"{address}:{port}"):
                return f"{address}:{port}", head
            time.sleep(POLL_SECONDS)
        _end(head)
        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
    last = (state / "ray-head.log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    sys.exit(f"nemoflow: error: Ray's head did not start: {last[-1] if last else 'it said nothing'}")


def _answers(address: str) -> bool:
    """Whether a head of Ray is there. In a process of its own: attaching to what is none blocks for minutes."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    try:
        return subprocess.run(command, capture_output=True, timeout=10, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def _alive(address: str) -> list[dict] | None:
    """The nodes that Ray's head at `address` knows to be alive; None when it does not answer."""
    import ray

    try:
        if not ray.is_initialized():
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        return [node for node in ray.nodes() if node["Alive"]]
    except (ConnectionError, RuntimeError, OSError):
        return None


def _leave() -> None:
    import ray

    ray.shutdown()


def _waited(nodes: list[str], gpus: int, head: subprocess.Popen) -> str | None:
    """Wait until all nodes are there; what is missing, when they are not in time."""
    limit = float(os.environ.get("NEMOFLOW_RAY_WAIT", "600"))
    end, found = time.monotonic() + limit, []
    while time.monotonic() < end:
        if head.poll() is not None:
            return "Ray's head ended before all nodes had come"
        found = _alive(os.environ["RAY_ADDRESS"]) or []
        if len(found) == len(nodes) and sum(n["Resources"].get("GPU", 0) for n in found) == len(nodes) * gpus:
            return None
        time.sleep(POLL_SECONDS)
    here = [n["NodeManagerAddress"] for n in found]
    absent = sorted({n for n in nodes if n not in here}) or [f"{len(nodes) - len(here)} of them"]
    return f"{len(here)} of {len(nodes)} nodes joined Ray within {limit:.0f} s; missing: {', '.join(absent)}"


def _worker(address: str, node: int, gpus: int, state: Path) -> int:
    """Join the head's cluster, and stay until it ends."""
    run, worker = os.environ["NEMOFLOW_RUN"], None
    end = time.monotonic() + float(os.environ.get("NEMOFLOW_RAY_WAIT", "600"))
    try:
        while True:
            told = _read(state / "ray.json")
            if told.get("run") != run:
                if time.monotonic() > end:
                    print(f"nemoflow: error: node {node}: no word of Ray's head in {state}", file=sys.stderr)
                    return 1
            elif "ended" in told:
                return 0
            elif worker is None:
                worker = _ray(state, f"worker-{node}", address, gpus, f"--address={told['address']}")
            elif worker.poll() is not None:
                # The head has ended, and says so in a moment; or this node is lost, of which the head knows
                time.sleep(5)
                return 0 if "ended" in _read(state / "ray.json") else 1
            time.sleep(POLL_SECONDS)
    finally:
        if worker is not None:
            _end(worker)


def _write(path: Path, value: dict) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(json.dumps(value), encoding="utf-8")
    shutil.move(temporary, path)


def _read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
