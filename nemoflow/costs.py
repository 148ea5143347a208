"""What a plan costs before anything runs: GPU-hours, and whether the cluster's partitions can hold it."""

from dataclasses import dataclass

from nemoflow import recipe as grammar
from nemoflow import slots
from nemoflow.progress import seconds
from nemoflow.slurm import Partition
from nemoflow.store import Stage, read_json


@dataclass(frozen=True)
class Cost:
    """GPU-hours of a job; `measured`: from the seconds that its iterations took so far, else the most it may take."""

    gpu_hours: float
    measured: bool

    def __str__(self) -> str:
        return f"{'about' if self.measured else 'at most'} {rounded(self.gpu_hours)} GPU-hours"


def rounded(hours: float) -> str:
    """Two significant digits of large numbers: no plan knows more."""
    if hours < 10:
        return f"{hours:.2g}"
    digits = len(str(int(hours))) - 2
    return f"{round(hours, -digits):,.0f}"


def cost(stage: Stage, at: int, resources: grammar.Resources) -> Cost:
    """Of training a stage on to state `at`.

    Measured over all its attempts, whose GPU-seconds per iteration include start-up, evaluations and saves. Before the
    first checkpoint there is no measure: nodes x GPUs x time x slots.
    """
    path = stage.directory / "run.json"
    attempts = read_json(path)["attempts"] if path.exists() else []
    counted = [a for a in attempts if "gpus" in a and "seconds" in a and a.get("reached", 0) > a.get("from", 0)]
    left = max(0, at - slots.reached(stage))
    if counted:
        each = sum(a["seconds"] * a["gpus"] for a in counted) / sum(a["reached"] - a["from"] for a in counted)
        return Cost(each * left / 3600, True)
    gpus = resources.nodes * resources.gpus_per_node
    return Cost(gpus * seconds(resources.time) / 3600 * resources.slots, False)


def total(costs: list[Cost]) -> Cost:
    """Of a whole plan; measured if every part is."""
    return Cost(sum(c.gpu_hours for c in costs), all(c.measured for c in costs))


def problems(asked: dict[str, int | str], partitions: dict[str, Partition]) -> list[tuple[str, str]]:
    """What a job asks for and its partition cannot give: (resource of a recipe, what is wrong).

    asked: Session.submission's. Without a partition in it, Slurm's default one.
    """
    name = asked.get("slurm_partition") or next((p.name for p in partitions.values() if p.default), None)
    if name is None:
        return []
    if name not in partitions:
        return [("partition", f"{name}: Slurm has no such partition; it has {', '.join(sorted(partitions))}")]
    there, found = partitions[name], []

    def compare(key: str, wanted: int, limit: int | None, unit: str) -> None:
        if limit is not None and wanted > limit:
            found.append((key, f"{wanted:,} {unit}, and partition {name} has at most {limit:,}"))

    compare("time", int(asked.get("runtime", 0)), there.max_time and there.max_time // 60, "minutes")
    compare("nodes", int(asked.get("nodes", 1)), there.max_nodes, "nodes")
    compare("nodes", int(asked.get("nodes", 1)), there.nodes, "nodes")
    compare("memory", int(asked.get("mem_mb", 0)), there.memory, "MB a node")
    cpus = int(asked.get("tasks_per_node", 1)) * int(asked.get("cpus_per_task", 1))
    compare("gpus_per_node", cpus, there.cpus, "processors a node (cpus_per_gpu each)")
    if gres := str(asked.get("gres", "")):
        _, *kind, count = gres.split(":")
        if kind and kind[0] not in there.gpus:
            known = ", ".join(k for k in sorted(there.gpus) if k) or "none by type"
            found.append(("gpu", f"{kind[0]}: partition {name} has {known}"))
        else:
            most = there.gpus.get(kind[0], 0) if kind else max(there.gpus.values(), default=0)
            compare("gpus_per_node", int(count), most, "GPUs a node")
    return found
