"""One program as as many processes as a stage asks for: a process for each GPU, here or over the nodes of a Slurm job.

`launch` gives the command line and the environment that do it. On this machine that is the program itself, or torchrun
around it. In a Slurm job it is the one `srun` of the job, with torchrun on each node (nemoflow.launch.node), or the
program once for each GPU, or Ray (nemoflow.launch.ray); in a container, if the cluster has one. `reason` reads from the
output which process failed first, and why.

Everything about nodes, ports, containers and what processes find in their environment is in this package.
"""

import os
import re
import shlex
import signal
import socket
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

from nemoflow import cpu, slurm
from nemoflow.errors import NemoflowError
from nemoflow.store import dump, file_digest, read_json, write_atomically

HERE = {"launcher": "here"}
"""How programs are launched where no cluster is: launch.json's `cluster`, see nemoflow.cluster.Cluster.launch."""

CHECKOUT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Launch:
    """A command line, and what it finds in its environment besides this process's."""

    command: list[str]
    environment: dict[str, str]

    def __str__(self) -> str:
        return shlex.join(self.command)


def launch(
    program: list[str], resources: dict, cluster: dict = HERE, form: str | None = None, state: Path | None = None
) -> Launch:
    """`program` as resources["nodes"] x resources["gpus_per_node"] processes; in a Slurm job, on all nodes that it has.

    form: "torchrun" or "srun" (each process by itself, so that signals arrive) in a Slurm job; by default what the
    cluster says. "ray": the program once, on the first node of a Ray cluster over all of them, which keeps its address
    and logs in the directory `state`.

    With the device shim processes need no GPUs. Raises NemoflowError for more nodes or GPUs than this machine has.
    """
    if cluster["launcher"] == "here":
        return Launch(_here(program, resources, form), {})
    job = slurm.here()
    if job is None:
        raise NemoflowError(
            "this stage was prepared to run as a Slurm job, and this is none; run snakemake on its name"
        )
    if len(job.nodes) * resources["gpus_per_node"] == 1 and form != "ray":
        return once(program, cluster)
    form = form or cluster["processes"]
    environment = {
        "NEMOFLOW_NODES": ",".join(slurm.addresses(job.nodes)),
        "NEMOFLOW_PORT": str(_free_port()),  # this process is on the first node
        "NEMOFLOW_RUN": f"{job.id}.{job.restarts}",
    }
    if state:
        environment["NEMOFLOW_STATE"] = str(state.resolve())
    nodes = len(job.nodes)  # of a job that was submitted with others than the recipe's
    return Launch(_srun(program, {**resources, "nodes": nodes}, cluster, form), _environment(cluster, environment))


def once(program: list[str], cluster: dict = HERE) -> Launch:
    """`program` as one process, in the container if there is one; on the job's first node."""
    if cluster["launcher"] == "here":
        return Launch(program, {})
    if cluster["runtime"] is None:
        return Launch(program, cluster["env"])
    return Launch(_srun(program, {"nodes": 1, "gpus_per_node": 1}, cluster, "once"), _environment(cluster, {}))


def described(program: list[str], resources: dict, cluster: dict = HERE, form: str | None = None) -> str:
    """The command line that `launch` would give in a job with these resources; for people, before anything runs."""
    if cluster["launcher"] == "here":
        return shlex.join(program if form == "ray" else _torchrun(program, resources))
    if resources["nodes"] * resources["gpus_per_node"] == 1 and form != "ray":
        return str(once(program, cluster))
    return shlex.join(_srun(program, resources, cluster, form or cluster["processes"]))


# -- on this machine ------------------------------------------------------------------------------------------------


def _here(program: list[str], resources: dict, form: str | None) -> list[str]:
    nodes, processes = resources["nodes"], resources["gpus_per_node"]
    if nodes > 1:
        raise NemoflowError(
            f"resources.nodes: {nodes}: this machine is one node; run it on a cluster, with --profile slurm, or write "
            "resources: {nodes: 1, gpus_per_node: ...}"
        )
    if not cpu.needed() and processes > (there := _gpus()):
        raise NemoflowError(f"resources.gpus_per_node: {processes}: this machine has {there}")
    return program if form == "ray" else _torchrun(program, resources)  # Ray starts processes by itself


def _torchrun(program: list[str], resources: dict) -> list[str]:
    if resources["gpus_per_node"] == 1:
        return program
    return [
        *(sys.executable, "-m", "torch.distributed.run"),
        # A port of its own: two stages may train at once
        *("--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={resources['gpus_per_node']}"),
        *("--no-python", sys.executable, "-m", "nemoflow.launch.child", *program),
    ]


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


# -- in a Slurm job -------------------------------------------------------------------------------------------------


def _srun(program: list[str], resources: dict, cluster: dict, form: str) -> list[str]:
    """The one step of the job. Explicit in everything: Snakemake's plugin takes Slurm's variables from the environment,
    so that by itself srun would start one task per node, with one processor."""
    nodes, gpus = resources["nodes"], resources["gpus_per_node"]
    tasks = gpus if form == "srun" else 1
    cpus = cluster["cpus_per_gpu"] * (1 if form == "srun" else max(gpus, 2))
    # The image has its own Python; without one, python3 might be another than Snakemake's
    python = "python3" if cluster["runtime"] else sys.executable
    program = [python if word == sys.executable else word for word in program]
    part = {
        "once": program,
        "ray": [python, "-m", "nemoflow.launch.ray", str(gpus), *program],
    }.get(form, [python, "-m", "nemoflow.launch.node", form, str(gpus), *program])
    return [
        *("srun", f"--nodes={nodes}", f"--ntasks={nodes * tasks}", f"--ntasks-per-node={tasks}"),
        # Ranks pin themselves, if at all; one that fails ends all; no MPI, whose plugin may wait for its daemon
        *(f"--cpus-per-task={cpus}", "--cpu-bind=none", "--kill-on-bad-exit=1", "--mpi=none", "--unbuffered"),
        *_contained(cluster),
        *part,
    ]


def _contained(cluster: dict) -> list[str]:
    """The words that put what follows into the cluster's container; none without containers."""
    runtime, image = cluster["runtime"], cluster["image"]
    mounts = list(dict.fromkeys([_mount(m) for m in [str(Path.cwd()), str(CHECKOUT), *cluster["mounts"]]]))
    match runtime:
        case "pyxis":
            return [
                f"--container-image={image}",
                f"--container-mounts={','.join(mounts)}",
                f"--container-workdir={Path.cwd()}",
                "--no-container-mount-home",
                # Of these the image may have its own values, which would win
                f"--container-env={','.join(_OWN)}",
            ]
        case "apptainer":
            binds = [word for mount in mounts for word in ("--bind", mount)]
            return ["apptainer", "exec", "--nv", "--no-home", *binds, "--pwd", str(Path.cwd()), image]
    return []


_OWN = ("PYTHONPATH", "PYTHONUNBUFFERED", "NEMOFLOW_NODES", "NEMOFLOW_PORT", "NEMOFLOW_RUN", "NEMOFLOW_STATE")


def _mount(text: str) -> str:
    return text if ":" in text else f"{text}:{text}"


def identified(image: str, store: Path) -> str:
    """An image with the digest of its content, IMAGE@sha256:...: of a file, computed once; a reference's own, if it has
    one. A tag's digest is known to the registry alone.
    """
    if not (path := Path(image)).is_file():
        return image
    status = path.stat()
    key = f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"
    known = read_json(cache) if (cache := store / ".images.json").exists() else {}
    if key not in known:
        known = {**known, key: file_digest(path)}
        write_atomically(cache, dump(known))
    return f"{image}@sha256:{known[key]}"


def _environment(cluster: dict, own: dict[str, str]) -> dict[str, str]:
    """What processes find in their environment besides what this one has."""
    more = {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "TOKENIZERS_PARALLELISM": "false",
        **cluster["env"],
        **own,
    }
    if cluster["runtime"] == "apptainer":  # which else prefers the image's
        path = os.environ.get("PYTHONPATH", "")
        paths = os.pathsep.join(p for p in (str(CHECKOUT), path) if p)
        more |= {"APPTAINERENV_PYTHONPATH": paths, "APPTAINERENV_PYTHONUNBUFFERED": "1"}
    return more


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("", 0))
        return free.getsockname()[1]


# -- what went wrong ------------------------------------------------------------------------------------------------


def reason(lines: list[str]) -> str | None:
    """Which process failed first according to torchrun, whose output `lines` ends with, and what it said last.

    None when torchrun reports no failure. Of the others torchrun's own lines say nothing, nor does the end of what all
    processes wrote in turn: those that were waiting for the one that failed complain last.
    """
    starts = [n for n, line in enumerate(lines) if line.startswith("Root Cause (first observed failure)")]
    if not starts:
        return None
    # The torchrun of each node reports, those of the other nodes that their processes were ended
    first = min(starts, key=lambda n: next((line for line in lines[n : n + 4] if "time" in line), ""))
    summary = "\n".join(lines[first:])
    rank, code = (re.search(pattern, summary) for pattern in (r"rank\s*:\s*(\d+)", r"exitcode\s*:\s*(-?\d+)"))
    if not rank or not code:
        return None
    who = f"process {rank[1]}"
    if int(code[1]) < 0:
        name = signal.Signals(-int(code[1])).name
        return f"{who} was killed by {name}" + (", as when memory runs out" if name == "SIGKILL" else "")
    prefix = f"[rank{rank[1]}]: "  # what PyTorch puts before a traceback once the processes know each other
    own = [line.removeprefix(prefix) for line in lines[:first] if line.startswith(prefix)]
    last = next((line for line in reversed(own) if line.strip()), None)
    if last is None:
        # It failed before, and none waited for it: its traceback's last line is not indented, and names an exception.
        own = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Interrupt)\b", line)]
        last = next((line for line in own if not line.startswith("torch.distributed.elastic.")), None)
    return textwrap.shorten(f"{who} failed: {last}", 300) if last else f"{who} failed with exit code {code[1]}"
