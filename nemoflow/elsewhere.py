"""`nemoflow import PATH --as NAME`: a recipe for what was made elsewhere, so that it becomes an artifact as any other.

The recipe's lock pins every file with its digest: that is where it came from. Other recipes extend it, or name its
files themselves. Nothing is copied before Snakemake is asked for it.
"""

import json
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import yaml

from nemoflow import hub, kinds, locks
from nemoflow import recipe as grammar
from nemoflow.errors import NemoflowError
from nemoflow.store import Store, write_atomically

ACCEPTED = (
    "a directory with a Hugging Face checkpoint (config.json, *.safetensors), hf://ORGANISATION/NAME, a "
    "Megatron-Bridge checkpoint (iter_*/run_config.yaml), Megatron's data (*.bin with *.idx), or a file with a blend "
    "of it"
)


def write(
    path: str, name: str, tokenizer: str | None, directories: list[Path], store: Store, show: Callable[[str], None]
) -> tuple[Path, str]:
    """Write config/recipes/NAME.yaml, the first of `directories`, for what `path` holds, and its lock.

    tokenizer: a directory, or hf://ORGANISATION/NAME; by default that of a Hugging Face checkpoint. show: gets lines of
    progress of the lock.

    Returns the recipe's file and the name to ask Snakemake for. Raises NemoflowError for a name that is taken, for what
    is nothing of the above, and for files that cannot be locked; then nothing is left behind.
    """
    if not re.fullmatch(grammar.NAME, name):
        raise NemoflowError(f"--as {name}: a name is letters, digits, dots, dashes and underscores")
    if name in grammar.known(directories):
        raise NemoflowError(f"--as {name}: there is a recipe of this name; choose another, or delete that one")
    content, target = _recipe(path, name)
    if tokenizer is None and _is_hf(path):
        tokenizer = path
    if tokenizer is None:
        raise NemoflowError(f"--tokenizer is missing: {path} does not say with which tokenizer it was made")
    head = {"description": f"imported from {path}", "tokenizer": {"files": _absolute(tokenizer)}}
    file = directories[0] / f"{name}.yaml"
    write_atomically(file, yaml.safe_dump(head | content, sort_keys=False, allow_unicode=True, width=120))
    try:
        locks.write(name, directories, store, show)
    except BaseException:
        file.unlink()
        raise
    return file, target


def _absolute(path: str) -> str:
    return path if path.startswith(hub.SCHEME) else str(Path(path).absolute())


def _is_hf(path: str) -> bool:
    return path.startswith(hub.SCHEME) or (Path(path) / "config.json").is_file()


def _recipe(path: str, name: str) -> tuple[dict, str]:
    """What a recipe says of `path`, and the name of what it makes."""
    place = Path(path)
    if _is_hf(path) or (place.is_dir() and hub.iteration(place)):
        return {"stages": [{"name": name, "kind": "import", "model": _absolute(path)}]}, f"import/{name}"
    if place.is_dir() and any(place.glob("*.bin")):
        parts = {name: (f"{_absolute(path)}/*.bin", Fraction(1))}
    elif (prefix := _prefix(path)) is not None:
        parts = {name: (prefix, Fraction(1))}
    elif place.is_file():
        parts = _blend(place)
    else:
        raise NemoflowError(f"{path}: is nothing that can be imported: {ACCEPTED}")
    sources = {key: {"files": files, "format": "megatron"} for key, (files, _) in parts.items()}
    blend = {key: str(share) for key, (_, share) in parts.items()}
    return {"sources": sources, "datasets": {name: {"blend": blend}}}, f"data/{name}"


def _prefix(path: str) -> str | None:
    """The .bin that PREFIX, PREFIX.bin or PREFIX.idx means; None where there is none."""
    place = Path(path)
    bin_ = place.with_suffix(".bin") if place.suffix in (".bin", ".idx") else Path(f"{path}.bin")
    return str(bin_.absolute()) if bin_.is_file() else None


def _blend(file: Path) -> dict[str, tuple[str, Fraction]]:
    """Source -> its .bin and its share, of a blend as Megatron takes it: weights and prefixes by turns, in a text or a
    JSON list, or under "train"."""
    text = file.read_text(encoding="utf-8", errors="replace")
    try:
        found = json.loads(text)
        found = found["train"] if isinstance(found, dict) else found
    except (ValueError, KeyError):
        found = text.split()
    wrong = f"{file}: is no blend: weights and prefixes by turns are wanted, 0.7 /data/web 0.3 /data/code"
    if not isinstance(found, list) or not found or len(found) % 2:
        raise NemoflowError(wrong)
    parts: dict[str, tuple[str, Fraction]] = {}
    try:
        pairs = [(Fraction(str(weight)), str(prefix)) for weight, prefix in zip(found[::2], found[1::2], strict=True)]
    except ValueError:
        raise NemoflowError(wrong) from None
    total = sum(weight for weight, _ in pairs)
    for weight, prefix in pairs:
        at = prefix if Path(prefix).is_absolute() else str(file.parent / prefix)
        if (bin_ := _prefix(at)) is None:
            raise NemoflowError(f"{file}: {prefix}: has no .bin; prefixes are absolute, or relative to this file")
        key = kinds.slug(Path(bin_).stem)
        if key in parts or weight <= 0:
            raise NemoflowError(f"{file}: {prefix}: {'stands twice' if weight > 0 else 'has no weight above 0'}")
        parts[key] = bin_, weight / total
    return parts
