"""Configurations of NeMo-RL as its own loader reads them: a chain of `defaults`, values that refer to others.

NeMo-RL's grammar: `defaults` is a path or a list of them, relative to the file or absolute; later files win over
earlier ones and the file over its defaults; a section with `_override_: true` takes the place of the one below instead
of being merged with it; the resolvers mul, div and max compute. tests/test_nemo_rl.py compares with NeMo-RL's own code.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from nemoflow.errors import NemoflowError

if TYPE_CHECKING:
    from omegaconf import DictConfig


def load(file: Path) -> "DictConfig":
    """The configuration of `file` over its defaults, its references not yet resolved.

    Raises NemoflowError for a file that is missing or no mapping.
    """
    from omegaconf import DictConfig, OmegaConf

    try:
        content = OmegaConf.load(file)
    except OSError as error:
        raise NemoflowError(f"{file}: cannot be read: {error.strerror or error}") from None
    if not isinstance(content, DictConfig):
        raise NemoflowError(f"{file}: is no mapping")
    below = content.pop("defaults", [])
    merged = OmegaConf.create({})
    for each in [below] if isinstance(below, str) else below:
        merged = _over(merged, load(file.parent / each))
    return _over(merged, content)


def _over(below: "DictConfig", above: "DictConfig") -> "DictConfig":
    from omegaconf import DictConfig, OmegaConf

    for key in list(above):
        section = above._get_node(key)  # as it stands: a reference may not be resolvable yet
        if isinstance(section, DictConfig) and not section._is_none() and section.get("_override_", False):
            section.pop("_override_")
            below.pop(key, None)
    return OmegaConf.merge(below, above)


def plain(content: "DictConfig") -> dict:
    """`content` with its references resolved. Raises NemoflowError for one that points nowhere."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    for name, compute in (("mul", lambda a, b: a * b), ("div", lambda a, b: a / b), ("max", max)):
        if not OmegaConf.has_resolver(name):
            OmegaConf.register_new_resolver(name, compute)
    try:
        return OmegaConf.to_container(content, resolve=True)
    except OmegaConfBaseException as error:
        raise NemoflowError(f"configuration: {str(error).splitlines()[0]}") from None


def flat(content: dict, prefix: str = "") -> dict:
    """section.key -> value, of all that is no mapping or an empty one."""
    found = {}
    for name, value in content.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {f"{prefix}{name}": value}
    return found
