"""Locks of stages: RECIPE.stages.json holds a recipe to what its stages are today.

`nemoflow lock RECIPE --stages` writes it beside the recipe, to be committed once a training is worth keeping. A later
edit that would make another stage of a locked one is then refused, with the setting that does it; a recipe of another
name is free to differ, and shares what is the same. What defines the stages is in the file, so that it can be said what
changed: their payloads and those of all they come from, long lists of files by their digest.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from nemoflow import kinds
from nemoflow.compare import Key, Side, Walk
from nemoflow.errors import NemoflowError
from nemoflow.stages import Recipe
from nemoflow.store import read_json, write_atomically

SCHEMA = 1
"""Version of the file's form."""

SUFFIX = ".stages.json"
"""What the file's name ends with."""

LONG = 20
"""Entries of a list of files or shards up to which it is written out."""

SHOWN = 3
"""Differences in a message."""


def file_of(recipe: Recipe) -> Path:
    return recipe.file.with_name(f"{recipe.name}{SUFFIX}")


def write(recipe: Recipe) -> Path:
    """Hold a recipe to its stages of today; returns the file."""
    stages = _stages(recipe)
    defined: dict[str, dict] = {}
    for identity in (identity for chain in stages.values() for identity in chain):
        for stage, _ in recipe.store.ancestors(identity):
            defined[stage.identity] = {"label": stage.label, "payload": _condensed(stage.payload)}
    lines = [f"  {json.dumps(k)}: {json.dumps(v, sort_keys=True, ensure_ascii=False)}" for k, v in defined.items()]
    listed = [f"  {json.dumps(name)}: {json.dumps(chain)}" for name, chain in stages.items()]
    text = f'{{\n "schema": {SCHEMA},\n "stages": {{\n{",\n".join(listed)}\n }},\n'
    text += f' "defined": {{\n{",\n".join(lines)}\n }}\n}}\n'
    write_atomically(file_of(recipe), text)
    return file_of(recipe)


def read(path: Path) -> tuple[dict[str, list[str]], dict[str, dict]]:
    """Stage -> identities of its trajectories, and identity -> label and payload.

    Raises NemoflowError for a damaged or newer file.
    """
    found = read_json(path)
    if isinstance(schema := found.get("schema"), int) and schema > SCHEMA:
        raise NemoflowError(f"{path}: schema: {schema}: this nemoflow reads up to {SCHEMA}; use a newer one")
    stages, defined = found.get("stages"), found.get("defined")
    whole = schema == SCHEMA and isinstance(stages, dict) and isinstance(defined, dict)
    if not whole or not all(identity in defined for chain in stages.values() for identity in chain):
        raise NemoflowError(f"{path}: damaged; restore it, or write it anew: nemoflow lock ... --stages")
    return stages, defined


def check(recipe: Recipe) -> None:
    """Raise NemoflowError when a locked stage would be another one, naming what makes it so."""
    path = file_of(recipe)
    if not path.exists():
        return
    stages, defined = read(path)
    today = _stages(recipe)

    def look(key: Key) -> Side:
        identity = key[0]
        if identity in defined:
            label, payload = defined[identity]["label"], defined[identity]["payload"]
        else:
            stage = recipe.store.load(identity)
            label, payload = stage.label, _condensed(stage.payload)
        inputs = [(ref.role, (ref.identity, ref.at)) for ref in kinds.inputs(payload)]
        return Side(key, f"{payload['kind']} {label}", payload, inputs, label=label)

    for name, chain in stages.items():
        if today.get(name) == chain:
            continue
        walk = Walk(look)
        now = today.get(name, [])
        if len(now) != len(chain):
            what = f"has {len(now)} trajectories, {len(chain)} are locked" if now else "is not there any more"
        else:
            for before, after in zip(chain, now, strict=True):
                walk.compare(look((before, None)), look((after, None)))
            listed = "; ".join(map(str, walk.differences[:SHOWN]))
            more = f" (and {len(walk.differences) - SHOWN} more)" if len(walk.differences) > SHOWN else ""
            what = f"would be another stage: {listed}{more}"
        raise NemoflowError(
            f"{recipe.file}: stages[{name}]: is locked by {path.name}, and {what}; bring it back, write it in a recipe "
            f"of another name (extends: {recipe.name}), or lock it anew: nemoflow lock {recipe.name} --stages"
        )


def _stages(recipe: Recipe) -> dict[str, list[str]]:
    """Name -> identities of a recipe's stages."""
    models = {name: [model.stage.identity] for name, model in recipe.models.items()}
    return models | {name: [t.stage.identity for t in chain] for name, chain in recipe.chains.items()}


def _condensed(payload: dict) -> dict:
    """The payload of a source or of shards without its thousands of files and units, elsewhere as it is."""
    if payload["kind"] not in ("source", "shards"):
        return payload
    return {key: _digest(value) for key, value in payload.items()}


def _digest(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _digest(item) for key, item in value.items()}
    if not isinstance(value, list) or len(value) <= LONG:
        return value
    digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
    return f"{len(value):,} entries, sha256 {digest[:12]}"
