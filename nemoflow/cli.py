"""The command `nemoflow`: what Snakemake cannot say. It reads recipes, locks and artifact records only."""

import argparse
import json
import sys
from pathlib import Path

from nemoflow import cluster, elsewhere, gc, locks, plan, squeue, stage_lock, verify
from nemoflow import recipe as grammar
from nemoflow.cluster import Cluster
from nemoflow.environments import Environment
from nemoflow.errors import NemoflowError, NotLocked
from nemoflow.lineage import diff as lineage_diff
from nemoflow.lineage import graph as lineage_graph
from nemoflow.lineage import shown as lineage_shown
from nemoflow.lineage import trace as lineage_trace
from nemoflow.session import Session
from nemoflow.stages import Recipe
from nemoflow.store import Stage, Store

CHECKOUT = Path(__file__).resolve().parents[1]
RECIPES = [Path("config/recipes"), CHECKOUT / "config/recipes"]
SCHEMAS = {
    CHECKOUT / "config/recipe.schema.json": grammar.Recipe,
    CHECKOUT / "config/blend.schema.json": grammar.Blend,
    CHECKOUT / "config/cluster.schema.json": Cluster,
    CHECKOUT / "config/environment.schema.json": Environment,
}


def print_targets(directories: list[Path]) -> None:
    """Print the names each recipe offers; a broken recipe is shown with its error and hides no other."""
    print("Ask for one of these: snakemake TARGET   (what would run: snakemake -n TARGET)\n")
    for name in grammar.known(directories):
        try:
            recipe = Recipe(name, directories, Store("artifacts"))
        except NemoflowError as error:
            print(f"{name}: {error}\n")
            continue
        print(f"{name}: {recipe.spec.description}" if recipe.spec.description else name)
        print("".join(f"  {target}\n" for target in recipe.names()))


def schema(model: type[grammar.Model] = grammar.Recipe) -> str:
    """The JSON Schema of a recipe, or of a blend file, from its types, for editors."""
    generated = model.model_json_schema(by_alias=True)
    # A recipe that extends another is checked whole, after merging: an editor sees only its part.
    for definition in [generated, *generated.get("$defs", {}).values()]:
        definition.pop("required", None)
    return json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema", **generated}, indent=2) + "\n"


def write_schemas(_: argparse.Namespace) -> None:
    for file, model in SCHEMAS.items():
        file.write_text(schema(model), encoding="utf-8")


def lock(args: argparse.Namespace) -> None:
    for name in [] if args.stages else args.recipe:
        file = locks.write(name, RECIPES, Store(args.store), lambda text: print(text, file=sys.stderr), args.only)
        print(f"{name}: wrote {file}; commit it" if file else f"{name}: nothing to lock: every source is generated")
    for name in args.recipe if args.stages else []:
        store = Store(args.store)
        try:
            recipe = Recipe(name, RECIPES, store)
        except NotLocked:  # what is locked already stays
            locks.write(name, RECIPES, store, lambda text: print(text, file=sys.stderr))
            recipe = Recipe(name, RECIPES, store)
        print(f"{name}: wrote {stage_lock.write(recipe)}; commit it")


def import_(args: argparse.Namespace) -> None:
    def show(text: str) -> None:
        print(text, file=sys.stderr)

    file, target = elsewhere.write(args.path, args.name, args.tokenizer, RECIPES, Store(args.store), show)
    print(f"wrote {file} and its lock; commit them. `snakemake {target}` makes the artifact; recipes that")
    print(f"say `extends: {args.name}` use it")


def check(args: argparse.Namespace) -> None:
    failed = False
    for name in args.recipe or grammar.known(RECIPES):
        try:
            recipe = Recipe(name, RECIPES, Store(args.store), unlocked=True)
            if not recipe.unlocked:
                stage_lock.check(recipe)
        except NemoflowError as error:
            print(f"nemoflow: error: {error}", file=sys.stderr)
            failed = True
            continue
        layouts = [(trained, *recipe.geometry(trained)) for trained in recipe.trajectories()]
        for trained, _, problems in layouts:
            for problem in problems:
                print(f"nemoflow: error: {recipe.file}: stages[{trained.spec.name}]: {problem}", file=sys.stderr)
                failed = True
        print(f"{recipe.file}: {'does not fit its resources' if any(p for *_, p in layouts) else 'fine'}")
        for source, raw in recipe.raw.items():
            if raw.tokens is not None:
                print(
                    f"  source {source}: about {raw.tokens:,} tokens, {len(raw.plan):,} shards in {len(raw.jobs)} jobs"
                )
        for stage, model in recipe.models.items():
            print(f"  {stage}: {model.spec.kind} by {model.stage.payload['engine']}{_place(recipe, model.stage)}")
        for trained, layout, _ in layouts:
            spec, span = trained.spec, f"iterations {trained.start + 1} to {trained.until} of {trained.horizon}"
            print(f"  {spec.name}: {spec.kind} by {spec.engine}, {span}{_place(recipe, trained.stage)}")
            if layout:
                print(f"    {layout}")
        if recipe.unlocked:
            count = len(recipe.unlocked)
            listed = f"{', '.join(recipe.unlocked[:3])}{f' and {count - 3} more' if count > 3 else ''}"
            print(f"  not locked yet: {listed}; run `nemoflow lock {name}` before anything is made of it")
    if failed:
        raise SystemExit(1)


def _place(recipe: Recipe, stage: Stage) -> str:
    """Where a stage's artifact is, which is known once everything is locked."""
    return "" if recipe.unlocked else f", {stage.directory}"


def show(args: argparse.Namespace) -> None:
    if jobs := [int(name) for name in args.name if name.isdigit()]:
        args.name = [name for name in args.name if not name.isdigit()]
        print(squeue.table([squeue.of_id(job, args.store) for job in jobs]))
    elif not args.name:
        print(squeue.table(squeue.waiting_and_running(args.store)))
    if args.reproduce:
        print("\n\n".join(lineage_shown.reproduce(name, Session(args.store, RECIPES)) for name in args.name))
    elif args.name:
        lineage_shown.run(args.name, Session(args.store, RECIPES), args.json)


def graph(args: argparse.Namespace) -> None:
    nodes = lineage_graph.asked(args.name, Session(args.store, RECIPES))
    form = lineage_graph.mermaid if args.mermaid else lineage_graph.described if args.json else None
    lineage_graph.write(nodes, ", ".join(args.name), args.output, form)


def show_plan(args: argparse.Namespace) -> None:
    session = Session(args.store, RECIPES)
    if args.profile:
        session.cluster = cluster.load()
    plan.run(args.name, session, args.json)


def trace(args: argparse.Namespace) -> None:
    lineage_trace.run(args.name, Session(args.store, RECIPES), args.files, args.json, args.all)


def diff(args: argparse.Namespace) -> None:
    lineage_diff.run(args.a, args.b, Session(args.store, RECIPES), args.json)


def check_sealed(args: argparse.Namespace) -> None:
    verify.run(args.name, Session(args.store, RECIPES), args.deep, args.threads, args.json)


def collect(args: argparse.Namespace) -> None:
    (gc.run_optimizer if args.optimizer else gc.run)(Store(args.store), RECIPES, args.delete, args.json)


def main(argv: list[str] | None = None) -> None:
    """Entry point. Bad input ends with one clear message and exit code 1."""
    parser = argparse.ArgumentParser(prog="nemoflow", description=__doc__)
    parser.add_argument("--store", type=Path, default=Path("artifacts"), help="where artifacts live (artifacts)")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for function, arguments, text in (
        (
            lock,
            "+",
            "pin what a recipe reads, on the hub and here: commits, files, sizes, digests and shards, into "
            "RECIPE.lock.json beside it",
        ),
        (check, "*", "read recipes and say what is wrong, or what they come to; all of them by default"),
    ):
        command = commands.add_parser(function.__name__, help=text, description=text)
        command.add_argument("recipe", nargs=arguments)
        command.set_defaults(run=function)
        if function is lock:
            command.add_argument("--only", nargs="+", metavar="SOURCE", help="pin these anew and keep the others")
            text = "hold the recipe to its stages of today: an edit that would change one is refused"
            command.add_argument("--stages", action="store_true", help=text)
    text = "a recipe for what was made elsewhere: a Hugging Face or Megatron checkpoint, Megatron's data, a blend of it"
    command = commands.add_parser("import", help=text, description=text)
    command.add_argument("path", help=elsewhere.ACCEPTED)
    command.add_argument("--as", dest="name", required=True, metavar="NAME", help="what it is called here")
    command.add_argument("--tokenizer", help="a directory or hf://ORGANISATION/NAME; that of a Hugging Face checkpoint")
    command.set_defaults(run=import_)
    for function, text in (
        (
            show,
            "what stands behind names such as sft/nano3-tiny: what it is, from what, measures, attempts, cost; of ids "
            "of Slurm jobs what they are for; without any, this directory's Slurm jobs that wait or run",
        ),
        (graph, "the lineage of names as one page to look at, without a network, or as a mermaid flowchart"),
    ):
        command = commands.add_parser(function.__name__, help=text, description=text)
        command.add_argument("name", nargs="*" if function is show else "+")
        command.set_defaults(run=function)
        if function is show:
            command.add_argument("--json", action="store_true", help="as data, with the whole records")
            text = "the commands that make it once more: checkout, environment, target"
            command.add_argument("--reproduce", action="store_true", help=text)
        if function is graph:
            command.add_argument("-o", "--output", type=Path, metavar="FILE", help="where to write it (lineage.html)")
            form = command.add_mutually_exclusive_group()
            form.add_argument("--mermaid", action="store_true", help="the flowchart; on the screen without -o")
            form.add_argument("--json", action="store_true", help="as data; on the screen without -o")
    text = "what snakemake would run for names: anew or resumed, on what, for how many GPU-hours; runs nothing"
    command = commands.add_parser("plan", help=text, description=text)
    command.add_argument("name", nargs="+")
    command.add_argument("--profile", choices=["slurm"], help="as jobs of the cluster that cluster.yaml describes")
    command.add_argument("--json", action="store_true", help="as data")
    command.set_defaults(run=show_plan)
    text = "what artifacts were made from, as a tree down to raw files, revisions and code"
    command = commands.add_parser("trace", help=text, description=text)
    command.add_argument("name", nargs="+", help="a name, or a directory: an artifact's, or a copy of it")
    command.add_argument("--files", action="store_true", help="list every raw file with its digest")
    command.add_argument("--all", action="store_true", help="a line for each of the shards of a source, too")
    command.add_argument("--json", action="store_true", help="as data, with all records and files")
    command.set_defaults(run=trace)
    text = "in what two artifacts, or two recipes, differ: deepest cause first"
    command = commands.add_parser("diff", help=text, description=text)
    command.add_argument("a")
    command.add_argument("b")
    command.add_argument("--json", action="store_true", help="as data, values in full")
    command.set_defaults(run=diff)
    text = "whether artifacts still are what was sealed, and all they come from"
    command = commands.add_parser("verify", help=text, description=text)
    command.add_argument("name", nargs="+")
    command.add_argument("--deep", action="store_true", help="read every file that has a digest; else sizes only")
    command.add_argument("--threads", type=int, default=8, help="files read at a time (8)")
    command.add_argument("--json", action="store_true", help="as data")
    command.set_defaults(run=check_sealed)
    text = "artifacts and states that no name, recipe or lock reaches; deletes nothing unless told"
    command = commands.add_parser("gc", help=text, description=text)
    command.add_argument("--delete", action="store_true", help="delete them, but for what a job works on")
    text = "instead the optimizers of finished trainings' last states, which nothing goes on with"
    command.add_argument("--optimizer", action="store_true", help=text)
    command.add_argument("--json", action="store_true", help="as data")
    command.set_defaults(run=collect)
    command = commands.add_parser("schema", help="write config/*.schema.json from the types")
    command.set_defaults(run=write_schemas)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except NemoflowError as error:
        print(f"nemoflow: error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except BrokenPipeError:
        raise SystemExit(0) from None
