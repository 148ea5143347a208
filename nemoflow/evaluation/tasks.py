"""Tasks of lm-evaluation-harness as recipes name them: where they stand, which splits they need, what cannot be run.

Read when a recipe is, hence without importing lm_eval, which takes seconds: a task is found by its line `task: NAME`
among the harness's own files, and its settings are read as plain YAML.
"""

import difflib
import functools
import importlib.util
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from nemoflow.errors import NemoflowError

_NAMED = re.compile(rb"""^["']?(task|group)["']?:[ \t]*["']?([^\s"'#]+)""", re.M)


class Function(str):
    """What stands behind `!function` in a task's file: a Python function by dotted name."""


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
    pass


_Loader.add_constructor("!function", lambda loader, node: Function(loader.construct_scalar(node)))


def directory() -> Path:
    """Where the harness's own tasks stand. Raises NemoflowError where it is not installed."""
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or spec.origin is None:
        raise NemoflowError("task: lm-eval is not installed; see envs/README.md")
    return Path(spec.origin).parent / "tasks"


def find(name: str) -> Path:
    """The file of the harness's own task `name`.

    Raises NemoflowError for an unknown one, naming the nearest, and for a group of tasks, naming those.
    """
    root = directory()
    folders = sorted(p.name for p in root.iterdir() if p.is_dir())
    # Most tasks stand in a folder that is called like them; looking through all takes half a second
    for folder in sorted(folders, key=lambda folder: not name.startswith(folder)):
        if file := _index(root / folder).get(name):
            break
    else:
        known = [task for folder in folders for task in _index(root / folder)]
        close = difflib.get_close_matches(name, known, 1, cutoff=0.5)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise NemoflowError(f"task: lm-eval has no {name!r}, and config/tasks no {name}.yaml{hint}")
    if "group" in read(file):
        near = [task for task, other in _index(file.parent).items() if "group" not in read(other)]
        listed = f", such as {', '.join(sorted(near)[:3])}" if near else ""
        raise NemoflowError(
            f"task: {name!r} is a group of tasks, each with data of its own; write them one by one{listed}"
        )
    return file


@functools.cache
def _index(folder: Path) -> dict[str, Path]:
    """Tasks and groups in a folder's files, by name."""
    found = {}
    for place, _, files in sorted(folder.walk()):
        for file in sorted(files):
            if file.endswith(".yaml"):
                path = place / file
                names = {key: name.decode() for key, name in _NAMED.findall(path.read_bytes())}
                if name := names.get(b"group") or names.get(b"task"):
                    found.setdefault(name, path)
    return found


def parse(text: str, where: str) -> dict[str, Any]:
    """The settings in a task file's text. Raises NemoflowError, starting with `where`, when it is none."""
    try:
        settings = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise NemoflowError(f"{where}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise NemoflowError(f"{where}: a mapping is wanted, as lm-eval's task files are")
    return settings


def read(file: Path) -> dict[str, Any]:
    """The settings in one of the harness's own task files, with what it includes; functions are left as names."""
    settings = parse(file.read_text(encoding="utf-8"), str(file))
    includes = settings.pop("include", [])
    merged: dict[str, Any] = {}
    for include in [includes] if isinstance(includes, str) else includes:
        merged |= read(file.parent / include)
    return merged | settings


def check_own(settings: dict[str, Any], where: str) -> None:
    """Raise NemoflowError for a task file of one's own that needs more than its text, which is all that is kept."""
    if not isinstance(settings.get("task"), str):
        raise NemoflowError(f"{where}: task: is missing, the task's name")
    for key, value in settings.items():
        if key == "include" or (function := _function(value)):
            what = "include" if key == "include" else f"{key}: !function {function}"
            raise NemoflowError(f"{where}: {what}: a file in config/tasks stands alone; write it out, or as a template")


def _function(value: Any) -> Function | None:
    """The first function anywhere in a setting."""
    if isinstance(value, dict | list):
        inner = value.values() if isinstance(value, dict) else value
        return next(filter(None, map(_function, inner)), None)
    return value if isinstance(value, Function) else None


def shots(settings: dict[str, Any], fewshot: int | None) -> int:
    """Examples before each question: what the recipe says, or else the task."""
    return int((settings.get("num_fewshot") or 0) if fewshot is None else fewshot)


def splits(settings: dict[str, Any], examples: int) -> dict[str, str]:
    """Split of the task's dataset -> what it is for ("questions", "examples"), those that must be there.

    examples: shots of each question. Raises NemoflowError for a task that nothing can be asked of.
    """
    asked = settings.get("test_split") or settings.get("validation_split")
    if not asked:
        raise NemoflowError("has neither test_split nor validation_split: there is nothing to ask")
    found = {asked: "questions"}
    config = settings.get("fewshot_config") or {}
    if examples and not config.get("samples"):
        keys = ("fewshot_split", "training_split", "validation_split")
        split = config.get("split") or next((settings[key] for key in keys if settings.get(key)), asked)
        found.setdefault(split, "examples")
    return found


def known_splits(settings: dict[str, Any]) -> set[str]:
    """Every split that the task's settings name."""
    keys = ("training_split", "validation_split", "test_split", "fewshot_split")
    named = [settings.get(key) for key in keys] + [(settings.get("fewshot_config") or {}).get("split")]
    return {split for split in named if split}


def check(settings: dict[str, Any], fewshot: int | None, given: Iterable[str]) -> None:
    """Raise NemoflowError for a task that cannot be run here, and for splits that it lacks or does not know."""
    for key, reason in {
        "class": "is a Python program of lm-eval's that fetches its own data",
        "custom_dataset": "makes its own data by a program",
        "doc_to_image": "shows pictures, which no engine here trains with",
        "doc_to_audio": "plays sound, which no engine here trains with",
    }.items():
        if settings.get(key):
            raise NemoflowError(f"task: {settings.get('task')} {reason}; it cannot be run here")
    if settings.get("unsafe_code"):
        raise NemoflowError(f"task: {settings.get('task')} runs code that the model writes; it cannot be run here")
    given = set(given)
    try:
        wanted = splits(settings, shots(settings, fewshot))
    except NemoflowError as error:
        raise NemoflowError(f"task: {settings.get('task')} {error}") from None
    for split, use in wanted.items():
        if split not in given:
            raise NemoflowError(f"data.{split}: is missing: {settings['task']} takes its {use} from there")
    for split in sorted(given - set(wanted)):
        if split not in known_splits(settings):
            raise NemoflowError(
                f"data.{split}: {settings['task']} has no such split; it reads {', '.join(sorted(wanted))}"
            )
