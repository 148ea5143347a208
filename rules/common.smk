# What all rules share. The session reads recipes and lives in the main process only: a job that starts weeks later
# must not depend on what a recipe says then, so it knows frozen stages alone.

import logging
import re
import shlex
import sys
from pathlib import Path

from snakemake.logging import logger
from snakemake_interface_logger_plugins.common import LogEvent

BASE = Path(workflow.current_basedir).parent
sys.path.insert(0, str(BASE))

from nemoflow import cluster, plan
from nemoflow.errors import NemoflowError
from nemoflow.report import PICTURES
from nemoflow.session import Session
from nemoflow.stages import VIEWS

STORE = workflow.pathvars.apply("<store>")
RECIPES = [Path("config/recipes"), BASE / "config/recipes"]
TRIGGERS = {"mtime", "params"}

session = Session(STORE, RECIPES)


def fail(message):
    """End the run with one message. Not a WorkflowError: from an input function Snakemake would print a traceback."""
    logger.error(f"nemoflow: error: {message}")
    sys.exit(1)


def clearly(function, *args):
    """The function's result; what a person did wrong, or a full disk, ends the run with its message."""
    try:
        return function(*args)
    except NemoflowError as error:
        fail(error)
    except OSError as error:
        fail(f"{error.filename or STORE}: {error.strerror}")


def begin():
    """Before the first job of the graph is built: resolve what was asked for, drop links that show something else.

    Not at parse, when Snakemake does not know the targets yet; not in a job, which knows no recipes.
    """
    settings = workflow.dag_settings
    if session.begun or not workflow.is_main_process:
        return
    session.begun = True
    if settings.forceall or settings.forcerun:
        option = "--forceall" if settings.forceall else "--forcerun"
        fail(
            f"{option}: finished artifacts are not made again under the same address. To train a stage anew, raise "
            "its `version:` in the recipe; to have another artifact made again, delete its directory"
        )
    if other := {str(t).lower() for t in settings.rerun_triggers} - TRIGGERS:
        fail(
            f"--rerun-triggers {' '.join(sorted(other))}: only {' and '.join(sorted(TRIGGERS))} are safe here, "
            "as profiles/default sets them; do not drop that profile"
        )
    if launcher() == "slurm":
        session.cluster = clearly(cluster.load)
    clearly(session.request, settings.targets)


def launcher(wildcards=None):
    """Where jobs run: slurm, if the profile says so, or here. Known also under -n, whose executor is none of these."""
    settings = workflow.resource_settings.default_resources
    return "slurm" if settings and "launcher=slurm" in map(str, settings.args) else "here"


def number(wildcards):
    """The state a job is for; None for kinds without states."""
    return int(wildcards.n) if hasattr(wildcards, "n") else None


def program(name, *arguments):
    """The shell command of a script, by absolute path: a module's Snakefile lies elsewhere, and its rules' commands see
    no variable of this file."""
    words = [
        shlex.quote(str(word)).replace("{", "{{").replace("}", "}}")
        for word in (sys.executable, BASE / "scripts" / name)
    ]
    return " ".join([*words, *arguments])


def job(kind, *arguments):
    """The shell command that makes an artifact of this kind from its frozen stage."""
    stages = shlex.quote(f"{STORE}/.stages/").replace("{", "{{").replace("}", "}}")
    return program(f"{kind}.py", f"--stage {stages}{{wildcards.id}}.json", *arguments, "--log {log:q}")


def upstream(wildcards):
    """The artifacts a stage is made from. Ancient: their content is part of the identity, so no time stamp matters."""
    begin()
    return [ancient(path) for path in clearly(session.inputs, wildcards.id, number(wildcards))]


def state(wildcards):
    """The trained state whose digests are wanted."""
    begin()
    return ancient(f"{STORE}/{wildcards.kind}/{wildcards.label}-{wildcards.id}/at-{wildcards.n}/artifact.json")


def named(wildcards):
    """The artifacts that a name shows."""
    begin()
    name = f"{wildcards.view}/{wildcards.name}"
    return [ancient(target.artifact) for target in session.names[name].values()] if name in session.names else []


def links(wildcards):
    """The links a name consists of, as arguments."""
    return [f"{sub}={text}" for sub, text in session.links(f"{wildcards.view}/{wildcards.name}").items()]


def title(wildcards):
    """What people call the artifact."""
    return session.title(wildcards.id, number(wildcards))


def asked(resource, otherwise=None):
    """What a job asks Slurm for; `otherwise`, for Snakemake as good as nothing, where it runs here.

    sbatch is called by the main process; in the job itself only the plugin's form counts.
    """

    def of(wildcards):
        if launcher() == "here":
            return otherwise
        if not workflow.is_main_process:
            return "srun" if resource == "mpi" else otherwise
        begin()
        return clearly(session.submission, wildcards.id).get(resource, otherwise)

    return of


# Of jobs that make data, by the processors of one node. Memory and time of these are the profile's.
DATA_JOB = {
    "title": title,
    "launcher": launcher,
    **{key: asked(key) for key in ("slurm_account", "slurm_partition", "qos", "slurm_extra")},
}
# Of jobs that train or convert models: they launch processes of their own, so the script runs once, in the batch shell.
MODEL_JOB = (
    DATA_JOB
    | {key: asked(key) for key in ("mpi", "nodes", "tasks_per_node", "cpus_per_task", "gres")}
    | {key: asked(key, 0) for key in ("mem_mb", "runtime")}
)


class Plan(logging.Handler):
    """Before the first job, and under -n, shows what each job would do: make, train anew, resume or only seal."""

    shown = False

    def emit(self, record):
        if self.shown or getattr(record, "event", None) != LogEvent.RUN_INFO:
            return
        self.shown = True
        needed = [job for job in workflow.dag.needrun_jobs() if "id" in job.wildcards_dict]
        jobs = [plan.Job(j.wildcards.id, number(j.wildcards), j.rule.name == "seal") for j in needed]
        identities = list(dict.fromkeys(job.identity for job in jobs))
        if jobs:
            clearly(session.check_raw_files, identities)
            lines = clearly(plan.lines, session, jobs)
            unchecked = clearly(session.check_cluster, identities)
            text = plan.text(lines, workflow.output_settings.printshellcmds)
            logger.info("\n".join([text, *([f"  {unchecked}"] if unchecked else []), ""]))
            clearly(session.check_budget, [line.cost for line in lines if line.cost], config.get("approve", 0))
        # Here and not in onstart, which a workflow using this one as a module does not take over
        if not workflow.dryrun:
            clearly(session.check_queue, identities)
            clearly(session.check_room, identities)
            clearly(session.prepare)


if workflow.is_main_process:
    logger.addHandler(Plan(logging.INFO))
    # The scheduler announces each round of jobs; the jobs speak for themselves.
    logger.addFilter(lambda record: not re.match(r"Select jobs to execute|Execute \d+ jobs", str(record.msg)))


wildcard_constraints:
    label="[a-z0-9.-]+",
    id="[0-9a-f]{12}",
    n="[0-9]+",
    kind="pretrain|sft|rl",
    view="|".join(VIEWS),
    name=".+",


onsuccess:
    settings = workflow.dag_settings
    if not (settings.until or settings.omit_from) and (missing := session.broken()):
        fail(f"finished, yet these do not show today's artifact: {', '.join(missing)}")
    if session.names:
        print(session.summary(), file=sys.stderr)
