"""The table keys.json: what settings the releases of NeMo-RL have, and of which types, read from checkouts of them.

    python -m nemoflow.engines.nemo_rl.survey v0.7.0=CHECKOUT v0.4.0.nemotron_3_nano=CHECKOUT

NeMo-RL accepts unknown settings in silence (TypedDict before 0.7, extra="allow" since), so that a typing error trains
with a default. Two things say what there is: the annotated classes behind each algorithm's MasterConfig, and the
examples, which hold more than the classes do. Both are read without importing anything of NeMo-RL.
"""

import ast
import json
import sys
from pathlib import Path

from omegaconf import OmegaConf

from nemoflow.engines.nemo_rl import releases
from nemoflow.engines.nemo_rl.loader import flat, load, plain

TABLE = Path(__file__).with_name("keys.json")

_SCALARS = {"bool": "bool", "int": "int", "float": "float", "str": "str", "None": "null", "PathLike": "str"}
_OPEN = {"dict", "Mapping", "Dict", "Any", "MutableMapping"}
_SPECIALISED = {"GenerationConfig": "VllmConfig", "PytorchOptimizerConfig": None}
"""Classes that stand for another one, which holds more; None: whose keys depend on what they configure."""


def classes(checkout: Path) -> dict[str, dict[str, tuple[str, bool]]]:
    """Class -> field -> (annotation, whether it must be given), of the annotated classes of a checkout; inherited ones
    too. Classes of equal names are one."""
    fields: dict[str, dict[str, tuple[str, bool]]] = {}
    bases: dict[str, list[str]] = {}
    for file in sorted((checkout / "nemo_rl").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ClassDef):
                continue
            if node.name == "MasterConfig":
                node.name = f"MasterConfig.{file.stem}"
            total = not any(k.arg == "total" and not getattr(k.value, "value", True) for k in node.keywords)
            bases.setdefault(node.name, []).extend(ast.unparse(base) for base in node.bases)
            own = fields.setdefault(node.name, {})
            for item in node.body:
                if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                    annotation = ast.unparse(item.annotation)
                    required = total and item.value is None and not annotation.startswith("NotRequired")
                    own[item.target.id] = (annotation, required)
    known = {"TypedDict", "BaseModel"}
    while more := {n for n, of in bases.items() if n not in known and any(b.split("[")[0] in known for b in of)}:
        known |= more

    def whole(name: str) -> dict[str, tuple[str, bool]]:
        inherited: dict[str, tuple[str, bool]] = {}
        for base in bases[name]:
            if base in fields and base in known:
                inherited |= whole(base)
        return inherited | fields[name]

    return {name: whole(name) for name in known & fields.keys()}


def kinds(annotation: str, found: dict) -> tuple[set[str], list[str]]:
    """Types of a setting by its annotation, and the classes it may be: ("int", "null"), ["DTensorConfig"]."""
    types: set[str] = set()
    nested: list[str] = []

    def visit(node: ast.expr) -> None:
        match node:
            case ast.Constant(value=None):
                types.add("null")
            case ast.Constant(value=str(text)):
                visit(ast.parse(text, mode="eval").body)
            case ast.BinOp():
                visit(node.left)
                visit(node.right)
            case ast.Subscript():
                name = ast.unparse(node.value).rpartition(".")[2]
                inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
                if name in ("Optional", "Union", "NotRequired", "Required", "Annotated"):
                    types.update({"null"} if name == "Optional" else ())
                    for each in inner[:1] if name == "Annotated" else inner:
                        visit(each)
                elif name == "Literal":
                    types.update(_literal(each) for each in inner)
                elif name in ("list", "List", "tuple", "Sequence"):
                    types.add("list")
                else:
                    types.add("dict" if name in _OPEN else "any")
            case _:
                name = ast.unparse(node).rpartition(".")[2]
                if name in found:
                    nested.append(_SPECIALISED.get(name, name) or "")
                    types.add("dict")
                elif name in ("list", "tuple"):
                    types.add("list")
                else:
                    types.add(_SCALARS.get(name, "dict" if name in _OPEN - {"Any"} else "any"))

    visit(ast.parse(annotation, mode="eval").body)
    return types, [name for name in nested if name]


def _literal(node: ast.expr) -> str:
    value = node.value if isinstance(node, ast.Constant) else None
    if isinstance(value, bool):
        return "bool"
    return {str: "str", int: "int", type(None): "null"}.get(type(value), "any")


def flattened(name: str, found: dict, prefix: str = "") -> dict[str, dict]:
    """Key -> {"types", "required"} of a class and the classes below it. A dictionary nothing is known of is "open"."""
    table: dict[str, dict] = {}
    for field, (annotation, required) in found[name].items():
        types, nested = kinds(annotation, found)
        key = f"{prefix}{field}"
        entry = table.setdefault(key, {"types": set(), "required": False})
        entry["types"] |= types - {"dict"} | ({"section"} if nested else {"open"} & {"open" * ("dict" in types)})
        entry["required"] |= required
        below: dict[str, dict] = {}
        for each in nested:
            for k, e in flattened(each, found, f"{key}.").items():
                known = below.setdefault(k, {"types": set(), "required": e["required"]})
                known["types"] |= e["types"]
        table |= below
    return table


def of_value(value) -> str:
    names = {bool: "bool", int: "int", float: "float", str: "str", list: "list", dict: "section", type(None): "null"}
    return names[type(value)]


def of_example(content: dict, prefix: str = "") -> dict[str, str]:
    """Key -> type of its value, for all keys of a resolved configuration."""
    table: dict[str, str] = {}
    for name, value in content.items():
        table[f"{prefix}{name}"] = of_value(value)
        if isinstance(value, dict):
            if value:
                table |= of_example(value, f"{prefix}{name}.")
            else:
                table[f"{prefix}{name}"] = "open"
    return table


def survey(release: str, checkout: Path) -> dict:
    """{"keys": key -> "type|type", "required": algorithm -> keys that the release itself insists on, "sections":
    algorithm -> its sections, "defaults": example -> the values of the settings that the checks of a layout read}."""
    found, keys, required, sections, defaults = classes(checkout), {}, {}, {}, {}
    for algorithm, entry in releases.RELEASES[release].items():
        master = f"MasterConfig.{entry.module}"
        table = flattened(master, found)
        sections[algorithm] = sorted(found[master])
        for example in entry.examples:
            loaded = load(checkout / example)
            raw, content = OmegaConf.to_container(loaded, resolve=False), plain(loaded)
            sections[algorithm] = sorted({*sections[algorithm], *content})
            for key, kind in of_example(content).items():
                known = table.setdefault(key, {"types": set(), "required": False})
                # What an example says more precisely than a class: "any" stays what it is
                known["types"].add("section" if kind == "section" else kind)
            values = flat(raw)  # with references: what they give depends on the recipe
            defaults[example] = {k: values[k] for k in releases.READ_BY_CHECKS if k in values}
        for key, known in table.items():
            keys.setdefault(key, set()).update(known["types"])
        insisted = release in releases.VALIDATED
        # What vLLM is given is no part of what is validated
        needed = {k for k, e in table.items() if e["required"] and ".generation.vllm_cfg." not in k}
        required[algorithm] = sorted(needed) if insisted else []
    for key, kind in releases.ELSEWHERE[release].items():
        keys.setdefault(key, set()).add(kind)
    listed = {key: "|".join(sorted(types)) for key, types in keys.items()}
    return {"keys": listed, "required": required, "sections": sections, "defaults": defaults}


def text(checkouts: dict[str, Path]) -> str:
    """The table's file, from a checkout of each release."""
    return json.dumps({r: survey(r, c) for r, c in sorted(checkouts.items())}, indent=1, sort_keys=True) + "\n"


def rows() -> list[str]:
    """The table of docs/compatibility.md, from keys.json."""
    lines = ["| release | algorithm | judged by | script | over the example | settings | required |", "|" + "---|" * 7]
    for release, entries in releases.RELEASES.items():
        known = json.loads(TABLE.read_text(encoding="utf-8"))[release]
        for algorithm, entry in entries.items():
            count = sum(key.partition(".")[0] in known["sections"][algorithm] for key in known["keys"])
            needed = len(known["required"][algorithm]) or "not checked"
            pairs = entry.section in ("dpo", "rm")
            for judge, pair in (("-" if pairs else "NeMo-RL's own", entry.own), ("NeMo-Gym", entry.gym)):
                if pair:
                    script, example = (f"`{path.removeprefix('examples/')}`" for path in pair)
                    lines.append(f"| {release} | {algorithm} | {judge} | {script} | {example} | {count} | {needed} |")
    return lines


if __name__ == "__main__":
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    TABLE.write_text(text({release: Path(path) for release, path in given.items()}), encoding="utf-8")
