"""`nemoflow diff A B`: in which settings, data, code and results two artifacts or recipes differ, deepest cause first.

Two artifacts are compared with what they were made from, input by input. What differs only because an input does is
not said again.
"""

import json
from pathlib import Path

from nemoflow import kinds
from nemoflow.compare import Difference, Key, Side, Walk
from nemoflow.errors import NemoflowError
from nemoflow.lineage import address, found, load
from nemoflow.lineage.trace import made_with
from nemoflow.session import Session
from nemoflow.stages import Recipe


def run(a: str, b: str, session: Session, as_json: bool) -> None:
    """Print the differences; nothing differs: one line that says so.

    Raises NemoflowError for what is no name, and for a recipe compared with an artifact.
    """
    recipes = [_recipe(name, session) for name in (a, b)]
    if all(recipes):
        differences = between_recipes(*recipes)
    elif any(recipes):
        raise NemoflowError(f"{a}, {b}: one is a recipe and the other is not; write two recipes or two names")
    else:
        differences = between(*(_one(name, session) for name in (a, b)))
    if as_json:
        print(json.dumps([vars(d) for d in differences], indent=2, ensure_ascii=False))
    else:
        print("\n".join(map(str, differences)) or f"{a} and {b} are the same")


def _recipe(name: str, session: Session) -> Recipe | None:
    if Path(name).exists() or not any((place / f"{name}.yaml").exists() for place in session.directories):
        return None
    return Recipe(name, session.directories, session.store)


def _one(name: str, session: Session) -> Path:
    directories = found(name, session)
    if len(directories) != 1:
        listed = ", ".join(map(str, directories))
        raise NemoflowError(f"{name}: shows {len(directories)} artifacts; write one of {listed}")
    return directories[0]


def between(a: Path, b: Path) -> list[Difference]:
    """Of two finished artifacts. Raises NemoflowError where records are damaged, or the artifacts are of two kinds."""
    sides, roots = dict[Key, Side](), []
    for directory in (a, b):
        lineage = load(directory)
        roots.append(lineage.roots[0])
        for key, one in lineage.artifacts.items():
            code = made_with(one).get("code", [])
            record = one.record
            inputs = list(one.inputs())
            sides[key] = Side(key, one.address, record["payload"], inputs, record["measures"], code, record["label"])
        for key, (entry, _) in lineage.missing.items():
            sides.setdefault(key, Side(key, address(entry), {"kind": entry["kind"]}, [], label=entry["label"]))
    pair = [sides[key] for key in roots]
    if pair[0].payload["kind"] != pair[1].payload["kind"]:
        raise NemoflowError(f"{a} is of kind {pair[0].payload['kind']} and {b} of kind {pair[1].payload['kind']}")
    walk = Walk(sides.__getitem__)
    walk.compare(*pair)
    return walk.differences


def between_recipes(a: Recipe, b: Recipe) -> list[Difference]:
    """Of two recipes of one store: stage by stage what defines results, and where the stages end."""

    def look(key: Key) -> Side:
        stage = a.store.load(key[0])
        inputs = [(ref.role, (ref.identity, ref.at)) for ref in kinds.inputs(stage.payload)]
        title = f"{stage.kind} {stage.label}"
        return Side(key, title, stage.payload, inputs, label=title)

    walk = Walk(look)
    ends: list[dict[str, list[tuple[Key, int | None]]]] = []
    for recipe in (a, b):
        own = {"tokenizer": [((recipe.tokenizer, None), None)]}
        own |= {f"data {name}": [((key, None), None)] for name, key in recipe.datasets.items()}
        own |= {name: [((model.stage.identity, None), None)] for name, model in recipe.models.items()}
        own |= {name: [((t.stage.identity, t.until), t.until) for t in chain] for name, chain in recipe.chains.items()}
        ends.append(own)
    for name in dict.fromkeys([*ends[0], *ends[1]]):
        one, two = ends[0].get(name, []), ends[1].get(name, [])
        if len(one) != len(two):
            walk.differences.append(Difference(name, "trajectories", len(one), len(two)))
        for (left, n), (right, m) in zip(one, two, strict=False):
            walk.compare(look(left), look(right), name)
            if n != m:
                walk.differences.append(Difference(name, "until", n, m))
    return walk.differences
