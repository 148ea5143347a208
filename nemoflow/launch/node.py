"""What `srun` starts, in the container where there is one: it becomes a node's part of the program.

    python3 -m nemoflow.launch.node torchrun GPUS PROGRAM ARGUMENT...   one per node
    python3 -m nemoflow.launch.node srun GPUS PROGRAM ARGUMENT...       one per GPU

Of where the others are, the launcher tells it through the environment: NEMOFLOW_NODES, the addresses of all nodes in
Slurm's order, NEMOFLOW_PORT, a port of the first one, and NEMOFLOW_RUN, the name of this very start. Nothing here needs
more than Python's own library.
"""

import os
import sys


def main(arguments: list[str]) -> None:
    """Become torchrun, or a rank of the program. Never returns."""
    form, gpus, *program = arguments
    nodes, port = os.environ["NEMOFLOW_NODES"].split(","), os.environ["NEMOFLOW_PORT"]
    node = int(os.environ["SLURM_NODEID"])
    if form == "srun":
        os.environ |= {
            "RANK": os.environ["SLURM_PROCID"],
            "LOCAL_RANK": os.environ["SLURM_LOCALID"],
            "WORLD_SIZE": str(len(nodes) * int(gpus)),
            "LOCAL_WORLD_SIZE": gpus,
            "MASTER_ADDR": nodes[0],
            "MASTER_PORT": port,
        }
        os.execvp(program[0], program)
    command = [
        *(sys.executable, "-m", "torch.distributed.run"),
        *(f"--nnodes={len(nodes)}", f"--nproc-per-node={gpus}", f"--node-rank={node}"),
        *("--rdzv-backend=c10d", f"--rdzv-id={os.environ['NEMOFLOW_RUN']}", f"--rdzv-endpoint={nodes[0]}:{port}"),
        # By names, torchrun could take a node for the first one that is not, or find an address others cannot reach
        *(f"--rdzv-conf=is_host={int(node == 0)},join_timeout=600", f"--local-addr={nodes[node]}"),
        *("--no-python", sys.executable, "-m", "nemoflow.launch.child", *program),
    ]
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
