"""cluster.yaml: what differs between clusters, beside the recipes and never part of an artifact's identity.

Only the main process reads it. What jobs need of it goes into the launch.json of each unfinished artifact.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from nemoflow import recipe as grammar
from nemoflow.errors import NemoflowError

FILE = Path("cluster.yaml")
IMAGES = Path(__file__).resolve().parents[1] / "envs/images.yaml"

_SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|(^|_)KEY(_|$)", re.IGNORECASE)


def _variable(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z_]\w*", name):
        raise ValueError("is no name of an environment variable")
    if _SECRET.search(name):
        raise ValueError(
            "secrets do not stand in files; export it in the shell that runs snakemake, whose environment jobs get"
        )
    return name


def _mount(text: str) -> str:
    if not re.fullmatch(r"/[^:,]*(:/[^:,]*(:(ro|rw))?)?", text):
        raise ValueError("write /PATH, or /HOST/PATH:/CONTAINER/PATH, or that with :ro behind it")
    return text


class Container(grammar.Model):
    runtime: Literal["pyxis", "apptainer"] | None = None
    """What starts containers: Slurm's plugin Pyxis, or Apptainer. null: there are none."""
    mounts: list[Annotated[str, AfterValidator(_mount)]] = []
    """/PATH, /HOST:/CONTAINER or /HOST:/CONTAINER:ro. The working directory is always there."""
    images: dict[grammar.Name, str] = {}
    """Image of each engine, where not that of envs/images.yaml: a file on the shared file system, or a reference."""


class Changes(grammar.Model):
    """Resources of a stage, in the place of its recipe's."""

    nodes: Annotated[int, Field(gt=0)] | None = None
    gpus_per_node: Annotated[int, Field(gt=0)] | None = None
    gpu: str | None = None
    time: grammar.Time | None = None
    slots: Annotated[int, Field(gt=0)] | None = None
    memory: Annotated[int, Field(gt=0)] | None = None


class Cluster(grammar.Model):
    """A Slurm cluster, as far as it differs from others."""

    account: str | None = None
    """What jobs are charged to; by default the one Slurm knows for the user."""
    partition: str | None = None
    """Where jobs run that train or convert models; by default Slurm's."""
    cpu_partition: str | None = None
    """Where the other jobs run, which make data; by default `partition`."""
    qos: str | None = None
    """Quality of service."""
    gpu: str | None = None
    """Type of the GPUs, as Slurm calls them, such as h100; by default what the recipe says."""
    gpus_per_node: Annotated[int, Field(ge=0)] | None = None
    """GPUs of a node: stages get as many nodes as hold the GPUs that their recipe asks for. 0: there are none, and
    processes run on CPUs."""
    cpus_per_gpu: Annotated[int, Field(gt=0)] = 4
    """Processors requested with each GPU."""
    processes: Literal["torchrun", "srun"] = "torchrun"
    """What starts the processes of a training: torchrun on each node, or srun each by itself."""
    container: Container = Container()
    env: dict[Annotated[str, AfterValidator(_variable)], str] = {}
    """Environment variables of training and converting processes, such as NCCL_SOCKET_IFNAME. No secrets."""
    stages: dict[str, Changes] = {}
    """STAGE or RECIPE@STAGE: its resources, in the place of the recipe's. Taken as they stand, not fitted to nodes."""
    budget: Annotated[int, Field(gt=0)] | None = None
    """GPU-hours that one run may plan without being approved (`--config approve=HOURS`)."""

    def resources(self, recipe: str, stage: str, asked: grammar.Resources) -> grammar.Resources:
        """What stage `stage` of `recipe`, which asks for `asked`, gets here: the same number of GPUs on nodes of this
        size, and what `stages` changes. Raises NemoflowError where GPUs do not fill nodes."""
        change: dict[str, Any] = {"gpu": self.gpu or asked.gpu}
        here, total = self.gpus_per_node, asked.nodes * asked.gpus_per_node
        own = {}
        for key in (stage, f"{recipe}@{stage}"):
            own |= self.stages[key].model_dump(exclude_none=True) if key in self.stages else {}
        if here and asked.gpus_per_node != here and not {"nodes", "gpus_per_node"} & own.keys():
            if total <= here:
                change |= {"nodes": 1, "gpus_per_node": total}
            elif total % here == 0:
                change |= {"nodes": total // here, "gpus_per_node": here}
            else:
                raise NemoflowError(
                    f"{FILE}: gpus_per_node: the {total} GPUs of {recipe}@{stage} do not fill nodes of {here}; "
                    f"say what it gets under stages.{recipe}@{stage}"
                )
        return asked.model_copy(update=change | own)

    def image(self, engine: str) -> str | None:
        """The image an engine's programs run in; None without containers. Raises NemoflowError where none is known."""
        if self.container.runtime is None:
            return None
        known = images() | self.container.images
        if engine not in known:
            raise NemoflowError(f"{FILE}: container.images.{engine}: is missing; give the image that has this engine")
        return known[engine]

    def launch(self, engine: str) -> dict:
        """What the launcher of a job of this engine is told, for launch.json."""
        return {
            "launcher": "slurm",
            "runtime": self.container.runtime,
            "image": self.image(engine),
            "mounts": self.container.mounts,
            "env": self.env,
            "cpus_per_gpu": self.cpus_per_gpu,
            "processes": self.processes,
        }


def images() -> dict[str, str]:
    """Image of each engine, by tag, as envs/images.yaml says."""
    return grammar.read_yaml(IMAGES) if IMAGES.exists() else {}


def load(path: Path = FILE) -> Cluster:
    """The cluster that `path` describes; without the file, what Slurm does by itself.

    Raises NemoflowError naming file, key, value and fix.
    """
    if not path.exists():
        return Cluster()
    text = path.read_text(encoding="utf-8", errors="replace").splitlines()
    empty = all(not line.strip() or line.lstrip().startswith("#") for line in text)  # all commented out
    return Cluster() if empty else grammar.validated(Cluster, grammar.read_yaml(path), path)
