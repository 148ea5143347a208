"""Environments: what judges the answers in RL. One file each in config/environments; `Environment` is what it says.

A row names its environment by `agent_ref.name`, as NeMo-Gym's rows do. An engine takes from the file what it runs:
NeMo-Gym's server, NeMo-RL's own environment, or a verifier in Python, `(answer, row, **settings) -> reward`. The main
process reads these files; jobs get what they need of them with the stage.
"""

import difflib
import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from nemoflow import recipe as grammar
from nemoflow.errors import NemoflowError
from nemoflow.recipe import Model

Verifier = Callable[..., float]
"""(answer without control tokens, row, **settings) -> reward. Raises when it cannot judge; never for a wrong answer."""


class Environment(Model):
    """A file in config/environments."""

    description: str = ""
    agent: str
    """`agent_ref.name` of its rows. For NeMo-RL's own environments, whose rows need none, the file's name by custom."""
    fields: dict[str, Literal["text", "list", "mapping", "integer", "any"]] = {}
    """What a row must have: key, dotted where it lies deeper, or two places with | between -> type."""
    gym: str | None = None
    """NeMo-Gym's configuration, as a path inside that package."""
    nemo_rl: str | None = None
    """The name in NeMo-RL's own registry of environments."""
    verifier: str | None = None
    """What judges without a server: one of nemoflow/environments/verifiers, or MODULE:FUNCTION."""
    settings: dict[str, Any] = {}
    """Keyword arguments of the verifier."""
    runs_on: Literal["cpu", "gpu"] = "cpu"
    timeout: grammar.Time = "10s"
    """How long the verifier may take for one answer."""
    on_error: Literal["stop", "skip"] = "stop"
    """What becomes of an answer that the verifier cannot judge, as it raises, hangs or gives no number: the run stops,
    or the answer is counted and given the mean reward of the other answers to its prompt, so that nothing is learned
    from it."""
    max_skipped: grammar.Portion = "1/10"
    """Share of the answers of a step that may be skipped; more stops the run."""


def load(names: list[str], directories: list[Path], where: str) -> dict[str, Environment]:
    """The environments called `names`, in their order.

    directories: of recipes; environments are looked for beside each, in environments/NAME.yaml.

    Raises NemoflowError, starting with `where`, for one that is not there, or whose file is wrong.
    """
    folders = [directory.parent / "environments" for directory in directories]
    found: dict[str, Environment] = {}
    agents: dict[str, str] = {}
    for name in names:
        file = next((f for folder in folders if (f := folder / f"{name}.yaml").is_file()), None)
        if file is None:
            known = sorted({p.stem for folder in folders for p in folder.glob("*.yaml")})
            close = difflib.get_close_matches(name, known, 1, cutoff=0.5)
            hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known) or 'none'}"
            raise NemoflowError(f"{where}: no environment {name!r} in {', '.join(map(str, folders))}; {hint}")
        made = grammar.validated(Environment, grammar.read_yaml(file), file)
        if made.verifier and ":" not in made.verifier:  # others may need what the main process has not
            try:
                check_settings(verifier(made.verifier), made.settings)
            except NemoflowError as error:
                raise NemoflowError(f"{file}: {error}") from None
        if name in found:
            raise NemoflowError(f"{where}: {name} stands there twice")
        if agents.setdefault(made.agent, name) != name:
            raise NemoflowError(f"{where}: {agents[made.agent]} and {name} are both for rows of {made.agent}; keep one")
        found[name] = made
    return found


def verifier(name: str) -> Verifier:
    """The verifier called `name`. Raises NemoflowError when there is none."""
    module, _, function = name.partition(":")
    built_in = not function
    try:
        found = importlib.import_module(f"{__name__}.verifiers.{module}" if built_in else module)
        return getattr(found, function or "verify")
    except (ModuleNotFoundError, AttributeError) as error:
        known = sorted(p.stem for p in (Path(__file__).parent / "verifiers").glob("[a-z]*.py"))
        raise NemoflowError(
            f"verifier: {name!r}: {error}; write one of {', '.join(known)}, or MODULE:FUNCTION"
        ) from None


def check_settings(judge: Verifier, settings: dict) -> None:
    """Raise NemoflowError for a setting that the verifier does not take."""
    parameters = inspect.signature(judge).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    for key in settings:
        if key not in known:
            takes = ", ".join(known) or "no settings"
            raise NemoflowError(f"settings.{key}: is unknown to this verifier; it takes {takes}")
