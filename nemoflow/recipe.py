"""Recipes as typed data: reading, `extends`, and errors that name file, key, value and the fix.

The types below are the whole grammar of a recipe; config/recipe.schema.json is generated from them (`nemoflow schema`).
Nothing here knows of identities, artifacts or Megatron.
"""

import difflib
import re
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    WithJsonSchema,
)

from nemoflow.errors import NemoflowError

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
_NUMBER_IN_DISGUISE = re.compile(r"^([+-]?)(\d+)(\.\d*)?[eE]([+-]?\d+)$")
_SUFFIX = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def _share(value: Any) -> str:
    """An exact positive fraction as text: 3/10, 0.3 and 1 are accepted; 0.3 means exactly 3/10."""
    try:
        share = Fraction(str(value))
    except (ValueError, ZeroDivisionError):
        raise ValueError('give a fraction such as "3/10" or 0.3') from None
    if isinstance(value, bool) or not 0 < share <= 1:
        raise ValueError("give a fraction above 0 and at most 1")
    return str(share)


def _tokens(value: Any) -> int:
    """A whole number of tokens: 8_400_000_000 or 8.4B (K, M, B, T: powers of a thousand)."""
    if match := re.fullmatch(r"([0-9_]+(?:\.[0-9]+)?) ?([KMBT]?)", str(value)):
        count = Fraction(match[1].replace("_", "")) * _SUFFIX[match[2]]
        if count.denominator == 1 and count > 0:
            return int(count)
    raise ValueError("give a whole number of tokens such as 2_000_000 or 8.4B")


def _stage_name(value: str) -> str:
    if not re.fullmatch(NAME, value):
        raise ValueError("a name is letters, digits, dots, dashes and underscores, and starts with a letter or digit")
    return value


def _override_key(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", value):
        raise ValueError("an override is written section.key")
    return value


Share = Annotated[
    str,
    BeforeValidator(_share),
    WithJsonSchema(
        {"anyOf": [{"type": "string", "pattern": r"^\d+(/\d+|\.\d+)?$"}, {"type": "number", "exclusiveMinimum": 0}]}
    ),
]
Tokens = Annotated[
    int,
    BeforeValidator(_tokens),
    WithJsonSchema(
        {"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string", "pattern": r"^[\d_.]+ ?[KMBT]?$"}]}
    ),
]
Name = Annotated[str, AfterValidator(_stage_name)]
OverrideKey = Annotated[str, AfterValidator(_override_key)]
Overrides = dict[OverrideKey, Any]


class Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)


class TokenCount(Model):
    tokens: Tokens
    """Tokens trained in this stage; turned into iterations by the stage's batch size, rounded up."""


def _by_key(key: str, present: str, absent: str) -> Discriminator:
    """Chooses the member of a union by whether `key` stands in the mapping, so that errors speak of one member only."""
    return Discriminator(lambda v: present if (isinstance(v, dict) and key in v) or hasattr(v, key) else absent)


Steps = Annotated[
    Annotated[int, Field(gt=0), Tag("<int>")] | Annotated[TokenCount, Tag("<tokens>")],
    Discriminator(lambda v: "<tokens>" if isinstance(v, dict | TokenCount) else "<int>"),
]


class Generated(Model):
    generator: Literal["stdlib_topics", "stdlib_docstrings", "stdlib_chats", "arithmetic_chats", "arithmetic_rl"]
    """A program that writes this source; the texts come from the Python interpreter's own documentation."""
    args: dict[str, Any] = {}
    """Arguments of the generator."""
    seed: int = 0
    shards: Annotated[int, Field(gt=0)]
    """Files the source is written as; shards are tokenized independently."""


class Files(Model):
    files: str
    """A file or a glob of local raw files, relative to the directory Snakemake runs in. Pinned by `nemoflow lock`."""
    format: Literal["jsonl", "jsonl.gz", "jsonl.zst", "parquet", "txt"]
    field: str = "text"
    """The key or column that holds the text."""
    shards: Annotated[int, Field(gt=0)] = 2


class TrainedTokenizer(Model):
    train_on: Annotated[list[Name], Field(min_length=1)]
    """Sources the tokenizer is trained on."""
    vocab_size: Annotated[int, Field(gt=256)]
    chat_template: Literal["chatml"] = "chatml"


class LocalTokenizer(Model):
    files: str
    """A directory with tokenizer.json and tokenizer_config.json. Pinned by `nemoflow lock`."""


class PretrainData(Model):
    blend: Annotated[dict[Name, Share], Field(min_length=1)]
    """Source -> share of the tokens read; exact fractions that add up to 1."""
    valid: Share = "1/50"
    """Share of the documents kept for validation, chosen by content hash."""
    test: Share = "1/50"


class SftData(Model):
    chats: Annotated[dict[Name, Annotated[int, Field(gt=0)]], Field(min_length=1)]
    """Source of chats -> how often each chat is repeated."""
    pack_size: Annotated[int, Field(gt=0)]
    """Tokens in one packed sequence."""
    valid: Share = "1/20"
    too_long: Literal["drop", "truncate"] = "drop"
    """What becomes of a chat longer than pack_size; both are counted."""
    seed: int = 0


class RlData(Model):
    prompts: Annotated[list[Name], Field(min_length=1)]
    """Sources of rows in NeMo-Gym's layout."""
    valid: Share = "1/20"


class Init(Model):
    stage: Annotated[Name, Field(alias="from")]
    """The stage whose state this one starts from."""
    at: Annotated[int, Field(gt=0)] | None = None
    """Which state, as an iteration; by default where that stage ends (its `until`)."""
    carry: Literal["weights", "weights+optimizer", "all"]
    """What is taken over; `all` includes the counters and the schedule."""


class _Stage(Model):
    name: Name
    version: Annotated[int, Field(gt=0)] = 1
    """Raised to train this stage anew with unchanged settings."""
    init: Init | None = None
    until: Steps
    """Where the stage ends. Not part of its identity: raising it goes on from where it stopped."""
    horizon: Steps | None = None
    """Where the learning-rate schedule and the data order end; by default scheduler.lr_decay_iters."""
    milestones: list[Annotated[int, Field(gt=0)]] = []
    """Iterations whose states are kept and can be named, as KIND/RECIPE@STAGE:N."""
    save_interval: Annotated[int, Field(gt=0)] | None = None
    """Iterations between checkpoints. Not part of the identity."""
    overrides: Overrides = {}
    """Settings of the engine, in its own section.key names."""


class Pretrain(_Stage):
    kind: Literal["pretrain"]
    engine: Name = "megatron_bridge"
    function: str
    """The recipe function, by dotted name."""
    data: PretrainData


class Sft(_Stage):
    kind: Literal["sft"]
    engine: Name = "megatron_bridge"
    function: str
    """The recipe function, by dotted name."""
    data: SftData
    init: Init


class Rl(_Stage):
    kind: Literal["rl"]
    engine: Name = "trl"
    algorithm: Literal["grpo"]
    data: RlData
    init: Init


Stage = Annotated[
    Annotated[Pretrain, Tag("<pretrain>")] | Annotated[Sft, Tag("<sft>")] | Annotated[Rl, Tag("<rl>")],
    Discriminator(lambda v: f"<{v.get('kind') if isinstance(v, dict) else getattr(v, 'kind', None)}>"),
]


class Export(Model):
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of the exported weights."""


class Recipe(Model):
    """A model's whole training, from sources to the Hugging Face checkpoint."""

    extends: Name | None = None
    """A recipe this one changes: mappings are merged, stages by name; everything else is replaced."""
    description: str = ""
    tokenizer: Annotated[
        Annotated[TrainedTokenizer, Tag("<trained>")] | Annotated[LocalTokenizer, Tag("<local>")],
        _by_key("files", "<local>", "<trained>"),
    ]
    sources: dict[
        Name,
        Annotated[
            Annotated[Generated, Tag("<generated>")] | Annotated[Files, Tag("<files>")],
            _by_key("files", "<files>", "<generated>"),
        ],
    ]
    overrides: dict[Name, Overrides] = {}
    """Engine -> settings shared by all its stages; a stage's own win."""
    stages: Annotated[list[Stage], Field(min_length=1)]
    export: Export = Export()


class _Loader(yaml.SafeLoader):
    """YAML as data: a key given twice is an error instead of a silently lost setting, and keys are text."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                problem = f"the key {key!r} is {type(key).__name__}; put it in quotes"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            if key in seen:
                problem = f"the key {key!r} stands twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict:
    """The mapping in a YAML file. Raises NemoflowError naming file and line."""
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise NemoflowError(f"{path}:{mark.line + 1 if mark else '?'}: {error.problem}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise NemoflowError(f"{path}: not YAML in UTF-8: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise NemoflowError(f"{path}: a mapping is wanted, found {type(data).__name__}")
    return data


def find(name: str, directories: list[Path]) -> Path:
    """The file of recipe `name`, in the first directory that has it. Raises NemoflowError naming the known recipes."""
    if not re.fullmatch(NAME, name):
        raise NemoflowError(
            f"{name!r} cannot be a recipe's name: letters, digits, dots, dashes and underscores, "
            "the first a letter or digit"
        )
    for directory in directories:
        if (path := directory / f"{name}.yaml").is_file():
            return path
    known = sorted({p.stem for d in directories for p in d.glob("*.yaml")})
    raise NemoflowError(
        f"unknown recipe {name!r}: there is no {name}.yaml in {', '.join(map(str, directories))}{_nearest(name, known)}"
    )


def _nearest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, 1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


def _merge(base: Any, change: Any) -> Any:
    """`change` over `base`: mappings key by key, lists of named stages by name, everything else replaced."""
    if isinstance(base, dict) and isinstance(change, dict):
        return {**base, **{k: _merge(base[k], v) if k in base else v for k, v in change.items()}}
    named = [isinstance(s, list) and all(isinstance(x, dict) and "name" in x for x in s) for s in (base, change)]
    if all(named):
        changes = {stage["name"]: stage for stage in change}
        merged = [_merge(stage, changes.pop(stage["name"], {})) for stage in base]
        return merged + [stage for stage in change if stage["name"] in changes]
    return change


def _extended(name: str, directories: list[Path], chain: tuple[str, ...] = ()) -> tuple[Path, dict]:
    path = find(name, directories)
    if name in chain:
        raise NemoflowError(f"{path}: extends: a circle: {' -> '.join((*chain, name))}")
    data = read_yaml(path)
    parent = data.get("extends")
    if parent is None:
        return path, data
    if not isinstance(parent, str):
        raise NemoflowError(f"{path}: extends: {parent!r} is not a recipe's name")
    return path, _merge(_extended(parent, directories, (*chain, name))[1], data)


def chain(name: str, directories: list[Path]) -> list[Path]:
    """The files of recipe `name` and of what it extends, itself first."""
    files = []
    while name:
        files.append(find(name, directories))
        name = read_yaml(files[-1]).get("extends")
    return files


def _disguised(value: Any, key: str = ""):
    """Yield (key, text) for strings such as 1e-3, which YAML does not read as the number they look like."""
    if isinstance(value, str) and _NUMBER_IN_DISGUISE.match(value):
        yield key, value
    elif isinstance(value, dict):
        for k, v in value.items():
            yield from _disguised(v, f"{key}.{k}" if key else str(k))
    elif isinstance(value, list):
        for i, v in enumerate(value):
            yield from _disguised(v, f"{key}[{_item(v, i)}]")


def _item(value: Any, index: int) -> Any:
    return value["name"] if isinstance(value, dict) and "name" in value else index


_MEMBERS = {  # the tags of the unions above
    "<generated>": Generated,
    "<files>": Files,
    "<trained>": TrainedTokenizer,
    "<local>": LocalTokenizer,
    "<pretrain>": Pretrain,
    "<sft>": Sft,
    "<rl>": Rl,
    "<tokens>": TokenCount,
}


def _where(location: tuple, data: Any) -> tuple[str, Any]:
    """The key path of a pydantic error in the reader's terms (stages by name), and the value standing there."""
    key, value = "", data
    for step in location:
        if step == "[key]" or str(step).startswith("<"):
            continue  # pydantic's names of keys and union members
        if isinstance(step, int):
            value = value[step]
            key += f"[{_item(value, step)}]"
        else:
            value = value.get(step) if isinstance(value, dict) else None
            key += f".{step}" if key else step
    return key, value


def _aliases(model: type[Model]) -> dict[str, Any]:
    return {field.alias or name: field.annotation for name, field in model.model_fields.items()}


def _known_keys(location: tuple) -> list[str]:
    """The keys of the type that the parent of a pydantic error location has."""
    model: Any = Recipe
    for step in location[:-1]:
        if step in _MEMBERS:
            model = _MEMBERS[step]
        elif isinstance(step, str):
            annotation = _aliases(model).get(step)
            members = (annotation, *getattr(annotation, "__args__", ()))
            model = next((m for m in members if isinstance(m, type) and issubclass(m, Model)), model)
    return sorted(_aliases(model))


def _explain(error: ValidationError, data: dict, path: Path) -> str:
    """One error, in one line: file, key, value, fix. An unknown key first: it often is the one that is missing."""
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    key, value = _where(first["loc"], data)
    match first["type"]:
        case "extra_forbidden":
            return f"{path}: {key}: unknown key{_nearest(str(first['loc'][-1]), _known_keys(first['loc']))}"
        case "missing":
            return f"{path}: {key}: is missing"
        case "union_tag_invalid":
            found = value.get("kind") if isinstance(value, dict) else value
            return f"{path}: {key}.kind: {found!r} is no kind of stage; known: pretrain, sft, rl"
    message = first["msg"].removeprefix("Value error, ")
    return f"{path}: {key}: {value!r}: {message[0].lower()}{message[1:]}"


def _number(text: str) -> str:
    """The spelling that YAML reads as a number: 1e-3 -> 1.0e-3."""
    sign, digits, rest, exponent = _NUMBER_IN_DISGUISE.match(text).groups()
    return (
        f"{sign}{digits}{rest if rest and rest != '.' else '.0'}e{exponent if exponent[0] in '+-' else '+' + exponent}"
    )


def load(name: str, directories: list[Path]) -> tuple[Path, Recipe]:
    """Recipe `name` with what it extends, and its file.

    Raises NemoflowError naming file, key, value and fix for everything that is wrong with it.
    """
    path, data = _extended(name, directories)
    for key, text in _disguised(data):
        raise NemoflowError(f"{path}: {key}: {text} is a string in YAML, not a number; write {_number(text)}")
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise NemoflowError(_explain(error, data, path)) from None
    return path, recipe
