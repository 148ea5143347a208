"""Engines: each turns (frozen stage, input artifacts, work directory) into a command, and its checkpoints into states.

An engine is a module of this package, or any importable module, with these members. It is
imported by the main process and must stay light: no torch, no Megatron; those belong to the program it starts.

    STARTS_FROM: "checkpoint" | "export"     what an `init` hands to it: its parent's checkpoint, or an HF export of it
    CARRIES: tuple[str, ...]                 what an `init` can take over: weights, weights+optimizer, all
    ONE_PROCESS: bool                        optional: whether it cannot train as several processes
    NOT_EXPORTED: tuple[str, ...]            optional: algorithms of kind `rl` whose models are not exported
    FORM: str                                optional: how its program is launched, "ray" (nemoflow/launch)
    REFUSED: dict[str, str]                  override -> why a recipe may not set it
    def check(overrides, where)              raise NemoflowError for overrides it refuses or does not know
    def outside(key) -> bool                 whether an override leaves the result unchanged, and so the identity too
    def tokens_per_iteration(overrides) -> int | None
    def schedule_horizon(overrides) -> int | None
    def sequence_length(overrides) -> int | None
    def index_overrides(overrides) -> dict   those that the order of pretraining data depends on
    def index_command(request: Path) -> list[str]   the program that makes this order (nemoflow/data/index.py)
    def padding(overrides) -> int            what lengths of packed sequences must be multiples of (kind `sft`)
    def geometry(function, overrides, resources, hf_config, kind, pack_size) -> tuple[str, list[str]]
                                             the layout over the GPUs in a line, and what is impossible about it;
                                             for kind `rl` also the payload
    def check_algorithm(algorithm, overrides, where)   raise NemoflowError for an algorithm it does not train, or for
                                             overrides of another one (kind `rl`)
    def environments(found, where) -> dict   what a stage freezes of its environments (nemoflow/environments), by
                                             agent; raise NemoflowError for one it cannot run (kind `rl`)
    def command(request: Path) -> list[str]  the program that trains what the request file says (nemoflow/training.py)
    def states(checkpoints: Path) -> dict[int, Path]   complete checkpoints by iteration

The index members and sequence_length are for kind `pretrain`, padding for `sft`, check_algorithm and environments for
`rl`; an engine without these kinds leaves them out. geometry may be left out.
"""

import difflib
import importlib
import pkgutil
from types import ModuleType

from nemoflow.errors import NemoflowError


def engine(name: str, where: str = "engine") -> ModuleType:
    """The engine called `name`. Raises NemoflowError, starting with `where`, when there is none."""
    for module in (f"{__name__}.{name}", name):
        try:
            found = importlib.import_module(module)
            if hasattr(found, "STARTS_FROM"):
                return found
        except ModuleNotFoundError as error:
            if not f"{module}.".startswith(f"{error.name}."):
                raise
    known = sorted(m.name for m in pkgutil.iter_modules(__path__))
    close = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}, or an importable module"
    raise NemoflowError(f"{where}: unknown engine {name!r}; {hint}")


def refuse(overrides: dict, refused: dict[str, str], where: str) -> None:
    """Raise NemoflowError for the first override that stands in `refused`, with the reason."""
    for key in overrides:
        if key in refused:
            raise NemoflowError(f"{where}.{key}: a recipe cannot set this: {refused[key]}")
