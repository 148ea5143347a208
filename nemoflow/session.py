"""What the main process knows: the requested names, what they point at today, and what would have to run.

The Snakefile asks this module; it in turn knows nothing of Snakemake. Jobs, which may start weeks later on another
machine, know frozen stages only and never read a recipe.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterable
from fractions import Fraction
from pathlib import Path

from nemoflow import costs, report, slurm, stage_lock, strip, summary
from nemoflow import launch as launching
from nemoflow import recipe as grammar
from nemoflow.cluster import Cluster
from nemoflow.engines import engine
from nemoflow.errors import NemoflowError
from nemoflow.progress import human, seconds
from nemoflow.stages import VIEWS, Recipe, Target, Trained
from nemoflow.store import Stage, Store, dump, read_json, write_atomically
from nemoflow.writer import holder

LARGE = 8 * 10**9
"""Bytes of memory worth a word in the plan."""

HOURS = 4
"""Wall time of a job that converts a model, and of one that evaluates it."""

INDEX_BYTES = 20
"""Bytes of memory for each sample of an index: Megatron's tables of samples and of their order, while they are made. Of
nano3's first phase, 2.9 billion samples, 58 GB."""

_NAME = re.compile(rf"(?P<kind>{'|'.join(VIEWS)})/(?P<recipe>[^@:]*)(@(?P<stage>[^:]*))?(:(?P<at>.*))?")


class Session:
    """The names a run of Snakemake asks for, resolved."""

    def __init__(self, store: Path | str, recipes: list[Path]):
        self.store, self.directories = Store(store), recipes
        self.recipes: dict[str, Recipe] = {}
        self.names: dict[str, dict[str, Target]] = {}
        self._titles: dict[str, str] = {}
        self.cluster: Cluster | None = None
        """Where jobs run; None: on this machine. To be set before anything is resolved."""
        self.begun = False

    # -- before the graph --------------------------------------------------------------------------------------------

    def resolve(self, targets: Iterable[str]) -> list[str]:
        """Resolve the names among `targets`, writing nothing; returns them.

        Other targets, such as artifacts, are left alone. Raises NemoflowError for bad recipes and names.
        """
        found = []
        for target in targets:
            text = target if ".." in target else os.path.normpath(target)
            if match := _NAME.fullmatch(text):
                self.names[text] = self._resolve(text, **match.groupdict())
                found.append(text)
        return found

    def request(self, targets: Iterable[str]) -> None:
        """Resolve the names among `targets`, freeze what they need, and drop links that show something else."""
        self.resolve(targets)
        for name, view in self.names.items():
            for target in view.values():
                self.store.freeze(target.stage.identity)
            if shown(Path(name)) != self.links(name):
                remove(Path(name))

    def _resolve(self, text: str, kind: str, recipe: str, stage: str | None, at: str | None) -> dict[str, Target]:
        if stage == "" or (at is not None and not re.fullmatch("[1-9][0-9]*", at)):
            wrong = f"{at!r} is no state" if stage != "" else "there is no stage after the @"
            raise NemoflowError(f"{text}: {wrong}; write KIND/RECIPE[@STAGE][:ITERATION]")
        if recipe not in self.recipes:
            self.recipes[recipe] = Recipe(recipe, self.directories, self.store, cluster=self.cluster)
            stage_lock.check(self.recipes[recipe])
        return self.recipes[recipe].view(kind, stage, int(at) if at else None)

    def links(self, name: str) -> dict[str, str]:
        """What the name is today: {"": link text}, or for a directory of links their texts by name."""
        view, here = self.names[name], Path(name)
        depth = here.parent if "" in view else here
        return {sub: os.path.relpath(target.directory, depth) for sub, target in view.items()}

    # -- for rules ---------------------------------------------------------------------------------------------------

    def inputs(self, identity: str, at: int | None = None) -> list[str]:
        """The artifacts that a stage's rule waits for."""
        return [target.artifact for target in self.upstream(identity, at)]

    def upstream(self, identity: str, at: int | None = None) -> list[Target]:
        """What has to be there before a stage is made: what it reads, and the wanted state before `at`."""
        stage = self.store.load(identity)
        found = [Target(*read) for read in stage.reads()]
        earlier = [] if at is None else [n for n in self._requested_states(identity) if n < at]
        return [*found, Target(stage, max(earlier))] if earlier else found

    def _requested_states(self, identity: str) -> set[int]:
        wanted: set[int] = set()
        for target in self._targets():
            wanted |= {n for s, n in self.store.ancestors(target.stage.identity, target.at) if s.identity == identity}
        return wanted

    def _targets(self) -> list[Target]:
        return [target for view in self.names.values() for target in view.values()]

    def order(self) -> dict[tuple[str, int | None], int]:
        """(identity, state) -> place in the order of the chain, for listing."""
        keys = ((s.identity, n) for t in self._targets() for s, n in self.store.ancestors(t.stage.identity, t.at))
        return {key: place for place, key in enumerate(dict.fromkeys(keys))}

    def title(self, identity: str, at: int | None = None) -> str:
        """What people call an artifact: by a requested recipe's name for it, else by its label."""
        if not self._titles:
            self._titles = {i: t for recipe in reversed(self.recipes.values()) for i, t in _titles(recipe).items()}
        stage = self.store.load(identity)
        title = self._titles.get(identity, f"{stage.kind} {stage.label}")
        return f"{title} to {at}" if at is not None else title

    def submission(self, identity: str) -> dict[str, int | str]:
        """What a job asks Slurm for, as resources of Snakemake's Slurm plugin; {} where jobs run on this machine.

        Jobs that train or convert take the plugin's MPI form: the script runs once, on the first node and outside any
        container, and launches the processes itself.
        """
        if self.cluster is None:
            return {}
        stage, cluster = self.store.load(identity), self.cluster
        asked: dict[str, int | str | None] = {"slurm_account": cluster.account, "qos": cluster.qos}
        asked["slurm_extra"] = "--open-mode=append"  # a job's later slots write on in its log
        trained = self._trained(identity)
        gpus = trained.spec.resources.gpus_per_node if trained else int(stage.kind == "eval")
        if cluster.gpus_per_node == 0:
            gpus = 0
        asked["slurm_partition"] = cluster.partition if gpus or trained else cluster.cpu_partition or cluster.partition
        if _engine(stage):
            asked |= {"mpi": "srun", "nodes": 1, "tasks_per_node": 2, "cpus_per_task": cluster.cpus_per_gpu}
            asked |= {"runtime": HOURS * 60, "mem_mb": self._memory(stage)}
        if trained:
            resources = trained.spec.resources
            # The plugin takes no single task per node for MPI; of the tasks only their processors are used
            asked |= {"nodes": resources.nodes, "tasks_per_node": max(2, resources.gpus_per_node)}
            asked["runtime"] = max(1, seconds(resources.time) // 60)
            asked["mem_mb"] = resources.memory and resources.memory * 1000
        if gpus:
            gpu = trained.spec.resources.gpu if trained else cluster.gpu
            asked["gres"] = f"gpu:{gpu}:{gpus}" if gpu else f"gpu:{gpus}"
        return {key: value for key, value in asked.items() if value is not None}

    def _memory(self, stage: Stage) -> int | None:
        """MB for a job that works on a whole model, or indexes its data; None if unknown."""
        if stage.kind == "index":
            return 8_000 + stage.payload["samples"] * INDEX_BYTES // 10**6
        needs = [r.conversion_needs() for r in self.recipes.values() if stage.identity in _titles(r)]
        return max((8_000 + n * 5 // 4 // 10**6 for n in needs if n), default=None)

    def _trained(self, identity: str) -> Trained | None:
        for recipe in self.recipes.values():
            for trained in recipe.trajectories():
                if trained.stage.identity == identity:
                    return trained
        return None

    # -- before jobs -------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Before the first job: say beside each unfinished artifact what stands outside its identity.

        launch.json holds titles, paths, settings that leave the result unchanged, and how its programs are launched;
        wanted/<N> the states to keep.
        """
        needed = {s.identity for t in self._targets() for s, _ in self.store.ancestors(t.stage.identity, t.at)}
        for recipe in self.recipes.values():
            trained = {t.stage.identity: t for t in recipe.trajectories()}
            for identity in needed & (trained.keys() | recipe.launch.keys() | _titles(recipe).keys()):
                stage = self.store.load(identity)
                launch = {"title": self.title(identity), **recipe.launch.get(identity, {})}
                if engine_name := _engine(stage):
                    launch["cluster"] = self.cluster.launch(engine_name) if self.cluster else {"launcher": "here"}
                if "paths" in launch:
                    launch["paths"] = [str(Path(p).absolute()) for p in launch["paths"]]
                if found := trained.get(identity):
                    launch["overrides"] = {k: v for k, v in found.overrides.items() if found.engine.outside(k)}
                    launch |= found.spec.model_dump(include={"save_interval", "resources", "keep", "guard"})
                    for n in found.wanted:
                        if not (mark := stage.directory / "wanted" / str(n)).exists():
                            mark.parent.mkdir(parents=True, exist_ok=True)
                            mark.touch()
                elif stage.sealed() is not None:
                    continue
                text, path = dump(launch), stage.directory / "launch.json"
                if not path.exists() or path.read_text(encoding="utf-8") != text:
                    write_atomically(path, text)

    def check_room(self, needed: Iterable[str]) -> None:
        """Refuse to begin a training whose next two checkpoints do not fit. `needed`: identities of stages to be made.

        By an estimate from the settings; the job compares with its last checkpoint again.
        """
        for recipe in self.recipes.values():
            for trained in recipe.trajectories():
                stage = trained.stage
                if stage.identity not in needed or (one := recipe.checkpoint_needs(trained)) is None:
                    continue
                count = 1 if len(trained.engine.states(stage.directory / "checkpoints")) >= 2 else 2
                self.store.root.mkdir(parents=True, exist_ok=True)
                if (free := shutil.disk_usage(self.store.root).free) < count * one:
                    raise NemoflowError(
                        f"{recipe.file}: stages[{trained.spec.name}]: {count} checkpoints take about "
                        f"{human(count * one)}, and {human(free)} are free where {self.store.root} is; keep the store "
                        "on a larger disk"
                    )

    def check_raw_files(self, needed: Iterable[str]) -> None:
        """Refuse a plan that would read raw files that are not there. `needed`: identities of stages to be made."""
        for recipe in self.recipes.values():
            for identity in set(needed) & recipe.launch.keys():
                if gone := [p for p in recipe.launch[identity].get("paths", []) if not Path(p).exists()]:
                    raise NemoflowError(
                        f"{recipe.file}: {gone[0]} is missing, which its lock pins; restore it, "
                        f"or run `nemoflow lock {recipe.name}` to train on what is there now"
                    )

    def plan(self, identity: str, at: int | None) -> str:
        """What a job would do: make, train anew, resume or only seal. Raises NemoflowError for the impossible."""
        stage = self.store.load(identity)
        if stage.sealed(at) is not None:
            return "finished; only its record is written again"
        if not stage.trained:
            return f"new{self._needs(stage)}"
        layout = self._layout(identity)
        line = self._progress(stage, at) + (f"; {layout}" if layout else "")
        if (found := self.cost(identity, at)) is None:
            return line
        resources = self._trained(identity).spec.resources
        size = f"{resources.nodes} x {resources.gpus_per_node} {resources.gpu or 'GPUs'}"
        return f"{line}; {size}, slots of {resources.time}, {found}"

    def command(self, identity: str) -> str | None:
        """The command line with which a training's processes will be started; None for other jobs."""
        if (trained := self._trained(identity)) is None:
            return None
        program = trained.engine.command((trained.stage.directory / "request.json").absolute())
        cluster = self.cluster.launch(trained.spec.engine) if self.cluster else launching.HERE
        form = getattr(trained.engine, "FORM", None)
        return launching.described(program, trained.spec.resources.model_dump(), cluster, form)

    def cost(self, identity: str, at: int | None) -> costs.Cost | None:
        """What a training to `at` takes of a cluster's GPUs; None for other jobs, and where there are none."""
        if self.cluster is None or self.cluster.gpus_per_node == 0 or at is None:
            return None
        stage, trained = self.store.load(identity), self._trained(identity)
        return costs.cost(stage, at, trained.spec.resources) if trained and stage.sealed(at) is None else None

    def check_cluster(self, needed: Iterable[str]) -> str | None:
        """Refuse what no node of its partition can hold. `needed`: identities of stages to be made.

        Returns what could not be checked. Raises NemoflowError naming stage, resource and limit.
        """
        if self.cluster is None:
            return None
        try:
            there = slurm.partitions()
        except slurm.Unreachable as error:
            return f"not compared with the limits of partitions: {error}"
        for identity in needed:
            for key, wrong in costs.problems(self.submission(identity), there):
                trained = self._trained(identity)
                where = f"stages[{trained.spec.name}].resources.{key}" if trained else key
                raise NemoflowError(f"{self.title(identity)}: {where}: {wrong}; change it there or in cluster.yaml")
        return None

    def check_queue(self, needed: Iterable[str]) -> None:
        """Refuse to work on this machine on what a Slurm job is to do. `needed`: identities of stages to be made.

        How that job launches its processes stands in launch.json, which a run on this machine would write anew.
        """
        if self.cluster is not None or shutil.which("squeue") is None:
            return
        stages = [self.store.load(identity) for identity in needed]
        begun = [
            stage
            for stage in stages
            if (path := stage.directory / "launch.json").exists()
            and read_json(path).get("cluster", launching.HERE)["launcher"] == "slurm"
        ]
        if not begun:
            return
        queue = [job for job in slurm.mine() if os.path.realpath(job.workdir) == str(Path.cwd().resolve())]
        for stage in begun:
            for job in [job for job in queue if stage.identity in job.comment] or [holder(stage.directory)]:
                if job is not None:
                    raise NemoflowError(
                        f"{self.title(stage.identity)}: Slurm job {job.id} ({job.state.lower()}) is for this; wait for "
                        f"it with `--profile slurm`, or end it with `scancel {job.id}`"
                    )

    def check_budget(self, found: list[costs.Cost], approved: float | str) -> None:
        """Refuse to begin what takes more GPU-hours than the cluster's budget, and than `approved`."""
        try:
            approved = float(approved)
        except ValueError:
            raise NemoflowError(f"--config approve={approved}: write a number of GPU-hours") from None
        budget, planned = self.cluster and self.cluster.budget, costs.total(found)
        if budget is not None and planned.gpu_hours > max(budget, approved):
            hours = -(-int(planned.gpu_hours * 100) // 100)
            raise NemoflowError(
                f"{planned}, and the budget in cluster.yaml is {budget:,}; to begin all the same, add "
                f"--config approve={max(hours, 1)}"
            )

    def _needs(self, stage: Stage) -> str:
        """What an export takes, where that is more than any machine has."""
        found = [r.export_needs(stage) for r in self.recipes.values()] if stage.kind == "hf_export" else []
        needs = next(filter(None, found), None)
        if needs is None or needs[0] < LARGE:
            return ""
        return f", holds about {human(needs[0])} in memory and writes {human(needs[1])}"

    def _layout(self, identity: str) -> str:
        """How a training is laid out over its GPUs. Raises NemoflowError where that is impossible."""
        for recipe in self.recipes.values():
            for trained in recipe.trajectories():
                if trained.stage.identity == identity:
                    layout, problems = recipe.geometry(trained)
                    if problems:
                        raise NemoflowError(f"{recipe.file}: stages[{trained.spec.name}]: {'; '.join(problems)}")
                    return layout
        return ""

    def _progress(self, stage: Stage, at: int) -> str:
        init = stage.payload.get("init", {})
        start = init["at"] if init.get("carry") == "all" else 0
        complete = engine(stage.payload["engine"]).states(stage.directory / "checkpoints")
        if at in complete:
            return f"reached {at}; is sealed, without training"
        reached = max(complete, default=None)
        strip.check(stage.directory / "checkpoints", reached or 0)
        if reached is None:
            return f"new, iterations {start + 1} to {at}"
        if reached > at:
            raise NemoflowError(
                f"{self.title(stage.identity)}: state {at}: training has passed it, at {reached}, and kept "
                f"{', '.join(map(str, sorted(complete)))}; choose one of these, or raise `version:` to train anew"
            )
        return f"resume, {reached} of {at} done"

    def epochs(self, identity: str, at: int | None) -> str:
        """How often a pretraining to `at` reads each source, in one line; empty for other jobs.

        Raises NemoflowError where that is known to be more than the recipe's max_epochs.
        """
        for recipe in self.recipes.values():
            for trained in recipe.trajectories():
                if trained.stage.identity != identity or not (found := recipe.epochs(trained, at)):
                    continue
                limit = Fraction(trained.spec.data.max_epochs)
                for source, (epochs, exact) in found.items():
                    if exact and epochs > limit:
                        raise NemoflowError(
                            f"{recipe.file}: stages[{trained.spec.name}].data: {source} would be read "
                            f"{float(epochs):.2f} times, max_epochs allows {limit}; lower its share, raise max_epochs, "
                            "or train on fewer tokens"
                        )
                listed = sorted(found.items(), key=lambda item: -item[1][0])
                return "epochs: " + ", ".join(
                    f"{source} {'' if exact else 'about '}{float(epochs):.2g}" for source, (epochs, exact) in listed
                )
        return ""

    # -- after jobs --------------------------------------------------------------------------------------------------

    def broken(self) -> list[str]:
        """Requested names that do not show today's finished artifact."""
        return [
            name
            for name, view in self.names.items()
            if shown(Path(name)) != self.links(name) or not all(Path(t.artifact).exists() for t in view.values())
        ]

    def summary(self) -> str:
        """One screen: every artifact behind the requested names, with what it measured and how long it took."""
        rows, seen = [("artifact", "tokens", "result", "seconds", "path")], set()
        for target in self._targets():
            for stage, at in self.store.ancestors(target.stage.identity, target.at):
                if (stage.identity, at) not in seen and (sealed := stage.sealed(at)):
                    seen.add((stage.identity, at))
                    count = summary.tokens(sealed)
                    rows.append(
                        (
                            self.title(stage.identity, at),
                            "" if count is None else f"{count:,}",
                            summary.result(sealed),
                            _seconds(stage),
                            str(stage.state(at)),
                        )
                    )
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
        lines = [
            f"{r[0]:<{widths[0]}}  {r[1]:>{widths[1]}}  {r[2]:<{widths[2]}}  {r[3]:>{widths[3]}}  {r[4]}" for r in rows
        ]
        shown_names = [f"{name} -> {', '.join(self.links(name).values())}" for name in self.names]
        return "\n".join([*lines, "", *shown_names])


def _engine(stage: Stage) -> str | None:
    """The engine whose programs a stage's job launches; None for jobs that make data by themselves."""
    if stage.kind == "hf_export" and stage.payload["engine"] == "nemo_rl":
        return "megatron_bridge"  # it converts, and NeMo-RL's image has it for its workers alone
    return "lm_eval" if stage.kind == "eval" else stage.payload.get("engine")


def _titles(recipe: Recipe) -> dict[str, str]:
    """Identity -> human title, for everything a recipe names."""
    titles = {recipe.tokenizer: f"tokenizer of {recipe.name}"}
    for name, chain in recipe.chains.items():
        for trained in chain:
            kind = "" if name == trained.spec.kind else f"{trained.spec.kind} "
            titles[trained.stage.identity] = f"{kind}{name} of {recipe.name}"
            data = recipe.store.load(trained.data)
            if data.kind == "index":
                titles.setdefault(data.payload["data"], f"blend of {recipe.name}@{name}")
            titles.setdefault(trained.data, f"data of {recipe.name}@{name}")
            for at in trained.wanted:
                titles |= _derived(recipe, name, at)
    for name, model in recipe.models.items():
        kind = "" if name == model.spec.kind else f"{model.spec.kind} "
        titles[model.stage.identity] = f"{kind}{name} of {recipe.name}"
        titles |= _derived(recipe, name, None)
        if isinstance(model.spec, grammar.Import):
            titles.setdefault(model.stage.payload["model"], f"source of {recipe.name}@{name}")
    for name, identity in recipe.datasets.items():
        titles.setdefault(identity, f"data of {recipe.name}@{name}")
    for name, raw in recipe.raw.items():
        titles.setdefault(raw.identity, f"source {name}")
    for name, identity in recipe.merges.items():
        titles.setdefault(identity, f"merge of {name}")
        parts = [recipe.store.load(part) for part in recipe.store.load(identity).payload["parts"]]
        for number, part in enumerate(parts, 1):
            titles.setdefault(
                part.identity, f"shards of {name}" + (f", job {number} of {len(parts)}" if len(parts) > 1 else "")
            )
    return titles


def _derived(recipe: Recipe, stage: str, at: int | None) -> dict[str, str]:
    """Titles of what is made of a stage's state: its export, and the evaluations of that."""
    titles = {recipe.view("hf_export", stage, at)[""].stage.identity: f"hf_export of {recipe.name}@{stage}"}
    if recipe.evals:
        for name, target in recipe.view("eval", stage, at).items():
            titles[target.stage.identity] = f"eval {name} of {recipe.name}@{stage}"
    return titles


def _seconds(stage: Stage) -> str:
    """Wall time of all attempts; empty where no record of them is left."""
    path = stage.directory / "run.json"
    return f"{sum(a.get('seconds', 0) for a in read_json(path)['attempts']):.0f}" if path.exists() else ""


def shown(path: Path) -> dict[str, str] | None:
    """What a name shows now, in the form of `Session.links`; None when it shows nothing."""
    if path.is_symlink():
        return {"": str(path.readlink())}
    if path.is_dir():
        return {p.name: str(p.readlink()) for p in path.iterdir() if p.is_symlink()}
    return None


def remove(path: Path) -> None:
    """Remove a name: a link, or a directory of links and of a report's files.

    Raises NemoflowError where anything else stands.
    """
    if path.is_symlink():
        path.unlink()
        return
    if not path.exists():
        return
    strange = (
        [p for p in path.iterdir() if not p.is_symlink() and p.name not in (".snakemake_timestamp", *report.FILES)]
        if path.is_dir()
        else [path]
    )
    if strange:
        raise NemoflowError(f"{strange[0]}: stands where nemoflow keeps the name {path}; move it away")
    for link in path.iterdir():
        link.unlink()
    path.rmdir()


def show(path: Path, links: dict[str, str], fill: Callable[[Path], None] = lambda _: None) -> None:
    """Make a name show `links`, in one step: a reader sees the old or the new one.

    `fill` writes files of nemoflow.report into the directory of links first.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    remove(temporary)
    try:
        if "" in links:
            temporary.symlink_to(links[""])
        else:
            temporary.mkdir()
            for name, target in links.items():
                (temporary / name).symlink_to(target)
            fill(temporary)
        if not (path.is_symlink() and temporary.is_symlink()):
            remove(path)
        temporary.replace(path)
    finally:
        with contextlib.suppress(NemoflowError):
            remove(temporary)
