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
    model_validator,
)

from nemoflow.errors import NemoflowError
from nemoflow.progress import seconds

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
_NUMBER_IN_DISGUISE = re.compile(r"^([+-]?)(\d+)(\.\d*)?[eE]([+-]?\d+)$")
_SUFFIX = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def _fraction(value: Any) -> Fraction:
    """An exact fraction: 3/10, 0.3 and 1 are accepted; 0.3 means exactly 3/10."""
    try:
        if isinstance(value, bool):
            raise ValueError
        return Fraction(str(value))
    except (ValueError, ZeroDivisionError):
        raise ValueError('give a fraction such as "3/10" or 0.3') from None


def _share(value: Any) -> str:
    """An exact fraction above 0 and at most 1, as text."""
    if not 0 < (share := _fraction(value)) <= 1:
        raise ValueError("give a fraction above 0 and at most 1")
    return str(share)


def _portion(value: Any) -> str:
    """An exact fraction from 0 to 1, as text."""
    if not 0 <= (share := _fraction(value)) <= 1:
        raise ValueError("give a fraction from 0 to 1")
    return str(share)


def _weight(value: Any) -> str:
    """An exact positive number, as text."""
    if (weight := _fraction(value)) <= 0:
        raise ValueError("give a number above 0")
    return str(weight)


def _bytes(value: Any) -> int:
    """A whole number of bytes: 1048576 or 512MiB (KiB, MiB, GiB, TiB; kB, MB, GB, TB)."""
    if match := re.fullmatch(r"([0-9]+)(?: ?(?:([KMGT])iB|([kMGT])B))?", str(value)):
        number, binary, decimal = match.groups()
        size = int(number) * (1024 ** (" KMGT".index(binary)) if binary else 1000 ** (" kMGT".index(decimal or " ")))
        if size > 0:
            return size
    raise ValueError("give a size such as 512MiB")


def _tokens(value: Any) -> int:
    """A whole number of tokens: 8_400_000_000 or 8.4B (K, M, B, T: powers of a thousand)."""
    if match := re.fullmatch(r"([0-9_]+(?:\.[0-9]+)?) ?([KMBT]?)", str(value)):
        count = Fraction(match[1].replace("_", "")) * _SUFFIX[match[2]]
        if count.denominator == 1 and count > 0:
            return int(count)
    raise ValueError("give a whole number of tokens such as 2_000_000 or 8.4B")


def _time(value: Any) -> str:
    """A time such as 4h, 90m or 1d12h."""
    if not isinstance(value, str) or seconds(value) <= 0:
        raise ValueError("give a time such as 4h, 90m or 1d12h")
    return value


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
_NUMBER = {"anyOf": [{"type": "string", "pattern": r"^\d+(/\d+|\.\d+)?$"}, {"type": "number", "minimum": 0}]}
Portion = Annotated[str, BeforeValidator(_portion), WithJsonSchema(_NUMBER)]
Weight = Annotated[str, BeforeValidator(_weight), WithJsonSchema(_NUMBER)]
Bytes = Annotated[
    int,
    BeforeValidator(_bytes),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 1},
                {"type": "string", "pattern": r"^\d+ ?([KMGT]iB|[kMGT]B)$"},
            ]
        }
    ),
]
Tokens = Annotated[
    int,
    BeforeValidator(_tokens),
    WithJsonSchema(
        {"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string", "pattern": r"^[\d_.]+ ?[KMBT]?$"}]}
    ),
]
Time = Annotated[
    str, BeforeValidator(_time), WithJsonSchema({"type": "string", "pattern": r"^(\d+d)?(\d+h)?(\d+m)?(\d+s)?$"})
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


class _Source(Model):
    field: str = "text"
    """The key or column that holds the text of a document; chats are looked for under "messages" by default."""
    max_broken: Portion = "1/1000"
    """Share of the rows that may be unusable; more is an error. In pretraining data."""
    control_strings: Literal["plain", "control"] = "plain"
    """Whether text that spells a control token stays text (plain) or becomes that token. In pretraining data."""


class Generated(_Source):
    generator: Literal[
        "stdlib_topics",
        "stdlib_docstrings",
        "stdlib_chats",
        "arithmetic_chats",
        "arithmetic_rl",
        "arithmetic_preferences",
        "comparison_chats",
        "comparison_rl",
        "object_chats",
        "object_rl",
    ]
    """A program that writes this source; the texts come from the Python interpreter's own documentation."""
    args: dict[str, Any] = {}
    """Arguments of the generator."""
    seed: int = 0
    shards: Annotated[int, Field(gt=0)]
    """Files the source is written as; each is tokenized as a shard of its own."""


class Files(_Source):
    files: str
    """A file or a glob of local raw files, relative to the directory Snakemake runs in, or hf://ORGANISATION/NAME: a
    dataset on the hub. Pinned by `nemoflow lock`."""
    config: str | None = None
    """The dataset's configuration (its subset); needed where it has several."""
    split: str = "train"
    """The dataset's split."""
    revision: str | None = None
    """A branch, tag or commit of the dataset; its main branch by default. The lock pins the commit."""
    format: Literal["jsonl", "jsonl.gz", "jsonl.zst", "parquet", "txt", "megatron"] | None = None
    """By default what the files' names say. megatron: .bin with .idx, which others made with the same tokenizer."""
    shard_size: Bytes = 512 * 2**20
    """Bytes of raw files tokenized as one shard; larger Parquet files are divided by row group."""


class BlendSource(Files):
    """A source of a blend file."""

    weight: Weight = "1"
    """Pretraining: the source's share of the tokens is its weight by the sum of all."""
    repeat: Weight = "1"
    """SFT: how often each chat is repeated."""
    reason: str = ""
    """Why it is there, with this weight."""


class TrainedTokenizer(Model):
    train_on: Annotated[list[Name], Field(min_length=1)]
    """Sources the tokenizer is trained on."""
    vocab_size: Annotated[int, Field(gt=256)]
    chat_template: Literal["chatml"] = "chatml"
    engine: Literal["gigatoken", "tokenizers"] = "gigatoken"
    """The program that tokenizes; the ids are the same, so it is not part of any identity."""


class LocalTokenizer(Model):
    files: str
    """A directory with tokenizer.json and tokenizer_config.json, or hf://ORGANISATION/NAME: a model on the hub. Pinned
    by `nemoflow lock`."""
    revision: str | None = None
    """A branch, tag or commit on the hub."""
    engine: Literal["gigatoken", "tokenizers"] = "gigatoken"
    """The program that tokenizes; the ids are the same, so it is not part of any identity."""


class HeldOut(Model):
    valid: Tokens = 8_000_000
    """Tokens of each source kept for validation: whole documents, chosen by content hash."""
    test: Tokens = 8_000_000
    cap: Share = "1/50"
    """Share of a source that validation, and test, may take at most."""


def _named(type_: Any) -> Any:
    """`type_`, or the name of a file in config/blends that lists it."""
    return Annotated[
        Annotated[type_, Tag("<given>")] | Annotated[Name, Tag("<blend>")],
        Discriminator(lambda v: "<blend>" if isinstance(v, str) else "<given>"),
    ]


class PretrainData(Model):
    blend: _named(Annotated[dict[Name, Share], Field(min_length=1)])
    """Source -> share of the tokens read, exact fractions that add up to 1; or the name of a file in config/blends."""
    max_epochs: Weight = "4"
    """How often a source may be read at most; more is an error. Not part of the identity."""


class SftData(Model):
    chats: _named(Annotated[dict[Name, Weight], Field(min_length=1)])
    """Source of chats -> how often each chat is repeated; or the name of a file in config/blends."""
    pack_size: Annotated[int, Field(gt=0)]
    """Tokens in one packed sequence."""
    valid: Share = "1/20"
    """Share of the chats kept for validation, chosen by content hash."""
    too_long: Literal["drop", "truncate", "split"] = "drop"
    """What becomes of a sequence longer than pack_size; all are counted."""
    template: str | None = None
    """A chat template's file, relative to the recipe's, in place of the tokenizer's own. Its content is identity."""
    used_in: str | None = None
    """Only chats whose `used_in` names this."""
    pad_multiple: Annotated[int, Field(gt=0)] = 1
    """Each sequence is padded to a multiple of this: lcm(2 CP, CP TP with SP) for context parallelism."""
    window: Annotated[int, Field(gt=0)] | None = None
    """Sequences packed at a time."""
    max_broken: Portion = "1/1000"
    """Share of the chats that may be unusable; more is an error."""
    seed: int = 0


class Placeholder(Model):
    source: Name
    """The source whose rows the placeholders number."""
    template: Literal["dapo", "skywork"]
    """How the question is put together."""


class RlData(Model):
    prompts: _named(Annotated[list[Name], Field(min_length=1)])
    """Sources of rows in NeMo-Gym's layout; or the name of a file in config/blends."""
    environments: list[Name] = []
    """What judges the answers: files in config/environments. Rows name them, by `agent_ref.name`; a row of another one
    is an error. By default rows are checked for what NeMo-Gym's own servers read, and the engine judges as it can."""
    valid: Share = "1/20"
    placeholders: dict[str, Placeholder] = {}
    """`dataset` of a placeholder row -> where its question stands."""
    allow_unresolved: list[str] = []
    """`dataset` values whose placeholders may stay unresolved: left out and counted."""
    max_broken: Portion = "0"


class PreferenceData(Model):
    preferences: Annotated[list[Name], Field(min_length=1)]
    """Sources of rows with a prompt, a chosen and a rejected answer."""
    valid: Share = "1/20"
    fields: dict[Literal["prompt", "chosen", "rejected"], str] = {}
    """What the columns are called, where not so."""
    max_broken: Portion = "1/1000"


def _kind_of_data(value: Any) -> str:
    keys = value if isinstance(value, dict) else vars(value)
    return f"<{next((k for k in ('chats', 'prompts', 'preferences') if k in keys), 'blend')} data>"


DataSet = Annotated[
    Annotated[PretrainData, Tag("<blend data>")]
    | Annotated[SftData, Tag("<chats data>")]
    | Annotated[RlData, Tag("<prompts data>")]
    | Annotated[PreferenceData, Tag("<preferences data>")],
    Discriminator(_kind_of_data),
]


class Teacher(Model):
    stage: Annotated[Name, Field(alias="from")]
    """The stage whose model is imitated."""
    at: Annotated[int, Field(gt=0)] | None = None
    """Which state, as an iteration; by default where that stage ends (its `until`)."""


class Init(Model):
    stage: Annotated[Name, Field(alias="from")]
    """The stage whose state this one starts from."""
    at: Annotated[int, Field(gt=0)] | None = None
    """Which state, as an iteration; by default where that stage ends (its `until`)."""
    carry: Literal["weights", "weights+optimizer", "all"]
    """What is taken over; `all` includes the counters and the schedule."""


class Resources(Model):
    """What a training job runs on. Not part of the identity."""

    nodes: Annotated[int, Field(gt=0)] = 1
    gpus_per_node: Annotated[int, Field(gt=0)] = 1
    """GPUs of a node; where there is none, processes on the CPU."""
    gpu: str | None = None
    """Type of the GPUs, such as h100; decides which precision they can compute in."""
    time: Time = "4h"
    """Wall time of one slot on a cluster. A training that is not done by then goes on in the next one."""
    slots: Annotated[int, Field(gt=0)] = 50
    """Slots after which it goes on no more by itself."""
    memory: Annotated[int, Field(gt=0)] | None = None
    """GB of main memory of each node; by default what the cluster gives."""


class Keep(Model):
    """Which checkpoints stay besides `until`, milestones and those that other stages start from."""

    last: Annotated[int, Field(ge=2)] = 2
    """The newest ones."""
    every: Annotated[int, Field(gt=0)] | None = None
    """Those at multiples of this many iterations."""


class Guard(Model):
    """When a training stops by itself. NaN and infinity always stop it."""

    spike: Weight | None = "3"
    """Times its running median that the loss may reach; null: no limit."""
    patience: Annotated[int, Field(gt=0)] = 20
    """Iterations in a row that it may stay above."""
    hang: Weight | None = "20"
    """Times its median iteration that a training may give no sign of life, before it counts as hung; null: no limit."""
    hang_least: Time = "10m"
    """How long it may be still in any case; six times that while it starts."""


class _Named(Model):
    name: Name
    version: Annotated[int, Field(gt=0)] = 1
    """Raised to make this stage anew with unchanged settings."""


class Import(_Named):
    """A model made elsewhere as a Megatron checkpoint, to start from."""

    kind: Literal["import"]
    engine: Name = "megatron_bridge"
    model: str
    """hf://ORGANISATION/NAME, or a directory with a Hugging Face or a Megatron-Bridge checkpoint (an iter_* directory,
    or one that holds some, of which the last is taken). Pinned by `nemoflow lock`."""
    revision: str | None = None
    """A branch, tag or commit on the hub."""


class States(Model):
    stage: Name
    at: Annotated[list[Annotated[int, Field(gt=0)]], Field(min_length=2)]
    """Iterations; these states are kept."""


class Average(_Named):
    """The mean of the weights of several states, to start from or to export."""

    kind: Literal["average"]
    engine: Name = "megatron_bridge"
    of: States


class Candidates(Model):
    stage: Name
    at: Annotated[list[Annotated[int, Field(gt=0)]], Field(min_length=2)] | None = None
    """Iterations; these states are kept. By default the stage's milestones and its end."""


class Select(_Named):
    """The one of several states of a stage that goes on, by what they measured; chosen when they are there."""

    kind: Literal["select"]
    of: Candidates
    metric: Annotated[str, Field(min_length=1)]
    """A measure of the states, as `nemoflow show --json` names it: valid_loss, reward, validation.val:accuracy. A state
    without it is an error."""
    best: Literal["highest", "lowest"]


class Training(_Named):
    """What all trained stages have."""

    init: Init | None = None
    until: Steps
    """Where the stage ends. Not part of its identity: raising it goes on from where it stopped."""
    horizon: Steps | None = None
    """Where the learning-rate schedule and the data order end; by default scheduler.lr_decay_iters."""
    milestones: list[Annotated[int, Field(gt=0)]] = []
    """Iterations whose states are kept and can be named, as KIND/RECIPE@STAGE:N."""
    save_interval: Annotated[int, Field(gt=0)] | None = None
    """Iterations between checkpoints. Not part of the identity."""
    resources: Resources = Resources()
    keep: Keep = Keep()
    guard: Guard = Guard()
    overrides: Overrides = {}
    """Settings of the engine, in its own section.key names."""


class _Edit(Model):
    at: Annotated[int, Field(gt=0)]
    """The state, as an iteration, from which on it holds. What was trained after it stays where it is, and is left."""
    skip: Annotated[int, Field(ge=0)] = 0
    """Iterations after `at` whose data is not trained on."""
    overrides: Overrides = {}
    """Settings from here on: learning rate, batch size, ..."""


class PretrainEdit(_Edit):
    data: PretrainData | None = None
    """Another blend from here on, read from its start."""


class _Function(Training):
    engine: Name = "megatron_bridge"
    function: str
    """The recipe function, by dotted name."""
    arguments: dict[Name, Any] = {}
    """Its keyword arguments, where it has some."""


class Pretrain(_Function):
    kind: Literal["pretrain"]
    data: PretrainData
    edits: list[PretrainEdit] = []
    """Changes under way, in order. Each goes on from a state of the stage so far, whose results stay."""


class Sft(_Function):
    kind: Literal["sft"]
    data: SftData
    init: Init
    edits: list[_Edit] = []
    """Changes under way, in order. Each goes on from a state of the stage so far, whose results stay."""
    peft: Literal["lora", "dora"] | None = None
    """Train adapters only; their settings are overrides such as peft.dim."""


class Rl(Training):
    kind: Literal["rl"]
    engine: Name = "trl"
    algorithm: Literal["grpo", "dapo", "dpo", "rm", "distillation"]
    """grpo, dapo and distillation learn from `data: {prompts, environments}`, dpo and rm (a reward model after Bradley
    and Terry) from `data: {preferences}`."""
    data: Annotated[
        Annotated[RlData, Tag("<prompts data>")] | Annotated[PreferenceData, Tag("<preferences data>")],
        _by_key("preferences", "<preferences data>", "<prompts data>"),
    ]
    init: Init
    teacher: Teacher | None = None
    """Of distillation: whose model is imitated."""


Stage = Annotated[
    Annotated[Import, Tag("<import>")]
    | Annotated[Average, Tag("<average>")]
    | Annotated[Select, Tag("<select>")]
    | Annotated[Pretrain, Tag("<pretrain>")]
    | Annotated[Sft, Tag("<sft>")]
    | Annotated[Rl, Tag("<rl>")],
    Discriminator(lambda v: f"<{v.get('kind') if isinstance(v, dict) else getattr(v, 'kind', None)}>"),
]


class Export(Model):
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of the exported weights."""


class Eval(Model):
    """A task that an export is evaluated with, by lm-evaluation-harness."""

    task: str
    """A task of lm-eval's, or a file in config/tasks in its format, whose text is identity."""
    data: Annotated[dict[str, Name], Field(min_length=1)]
    """Split of the task's dataset -> source with its rows. Takes the place of the dataset that the task names."""
    fewshot: Annotated[int, Field(ge=0)] | None = None
    """Examples before each question; by default what the task says."""
    limit: Annotated[int, Field(gt=0)] | None = None
    """Only the first questions, this many."""
    chat: bool = False
    """Ask in the export's chat template."""
    backend: Literal["hf", "vllm"] = "hf"
    """What runs the model: transformers or vLLM. Not part of the identity."""
    batch_size: Annotated[int, Field(gt=0)] = 8
    """Questions asked at once. Not part of the identity."""
    arguments: dict[Name, Any] = {}
    """Arguments of the backend that say where it computes, such as tensor_parallel_size. Not part of the identity."""


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
    ] = {}
    held_out: HeldOut = HeldOut()
    """What of each pretraining source is kept for validation and test, in every stage the same."""
    hf_config: dict[str, Any] = {}
    """Content of a Hugging Face config.json: the model of recipe functions that would ask the hub for one."""
    overrides: dict[Name, Overrides] = {}
    """Engine -> settings shared by all its stages; a stage's own win."""
    datasets: dict[Name, DataSet] = {}
    """Data made for its own sake: data/RECIPE@NAME."""
    stages: list[Stage] = []
    export: Export = Export()
    eval: dict[Name, Eval] = {}
    """What exports are evaluated with: eval/RECIPE[@STAGE][:N]."""

    @model_validator(mode="after")
    def _makes_something(self) -> "Recipe":
        if not self.stages and not self.datasets:
            raise ValueError("stages: are missing; a recipe has stages, or datasets, or both")
        return self


class Blend(Model):
    """A file in config/blends: sources that belong together, with their weights and the reason for each."""

    description: str = ""
    sources: Annotated[dict[Name, BlendSource], Field(min_length=1)]
    placeholder_sources: dict[Name, BlendSource] = {}
    """Sources that placeholder rows point into."""
    placeholders: dict[str, Placeholder] = {}


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
    "<import>": Import,
    "<average>": Average,
    "<select>": Select,
    "<pretrain>": Pretrain,
    "<sft>": Sft,
    "<rl>": Rl,
    "<tokens>": TokenCount,
    "<blend data>": PretrainData,
    "<chats data>": SftData,
    "<prompts data>": RlData,
    "<preferences data>": PreferenceData,
}


KINDS = ("import", "average", "select", "pretrain", "sft", "rl")
"""Kinds of stage."""


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


def _known_keys(location: tuple, model: Any) -> list[str]:
    """The keys of the type that the parent of a pydantic error location has, in a file of type `model`."""
    for step in location[:-1]:
        if step in _MEMBERS:
            model = _MEMBERS[step]
        elif isinstance(step, str):
            annotation = _aliases(model).get(step)
            members = (annotation, *getattr(annotation, "__args__", ()))
            model = next((m for m in members if isinstance(m, type) and issubclass(m, Model)), model)
    return sorted(_aliases(model))


def _explain(error: ValidationError, data: dict, path: Path, model: type[Model]) -> str:
    """One error, in one line: file, key, value, fix. An unknown key first: it often is the one that is missing."""
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    key, value = _where(first["loc"], data)
    match first["type"]:
        case "extra_forbidden":
            return f"{path}: {key}: unknown key{_nearest(str(first['loc'][-1]), _known_keys(first['loc'], model))}"
        case "missing":
            return f"{path}: {key}: is missing"
        case "union_tag_invalid":
            found = value.get("kind") if isinstance(value, dict) else value
            return f"{path}: {key}.kind: {found!r} is no kind of stage; known: {', '.join(KINDS)}"
    message = first["msg"].removeprefix("Value error, ")
    return f"{path}: {key}: {value!r}: {message[0].lower()}{message[1:]}"


def _number(text: str) -> str:
    """The spelling that YAML reads as a number: 1e-3 -> 1.0e-3."""
    sign, digits, rest, exponent = _NUMBER_IN_DISGUISE.match(text).groups()
    return (
        f"{sign}{digits}{rest if rest and rest != '.' else '.0'}e{exponent if exponent[0] in '+-' else '+' + exponent}"
    )


def validated(model: type[Model], data: dict, path: Path) -> Any:
    """`data`, read from `path`, as a `model`. Raises NemoflowError naming file, key, value and fix."""
    for key, text in _disguised(data):
        raise NemoflowError(f"{path}: {key}: {text} is a string in YAML, not a number; write {_number(text)}")
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise NemoflowError(_explain(error, data, path, model)) from None


def known(directories: list[Path]) -> list[str]:
    """Names of the recipes in `directories`."""
    return sorted({path.stem for directory in directories for path in directory.glob("*.yaml")})


def load(name: str, directories: list[Path]) -> tuple[Path, Recipe]:
    """Recipe `name` with what it extends and the blends it names, and its file.

    Raises NemoflowError naming file, key, value and fix for everything that is wrong with it.
    """
    path, data = _extended(name, directories)
    recipe = validated(Recipe, data, path)
    for where, part in [
        *((f"stages[{stage.name}].data", stage.data) for stage in recipe.stages if isinstance(stage, Training)),
        *(
            (f"stages[{stage.name}].edits[{i}].data", edit.data)
            for stage in recipe.stages
            if isinstance(stage, Pretrain)
            for i, edit in enumerate(stage.edits)
            if edit.data
        ),
        *((f"datasets.{key}", dataset) for key, dataset in recipe.datasets.items()),
    ]:
        _fill_in(recipe, part, f"{path}: {where}", directories)
    return path, recipe


def _fill_in(recipe: Recipe, data: Any, where: str, directories: list[Path]) -> None:
    """Put a blend file's sources, shares, repeats or placeholders in the place of its name."""
    key = next((k for k in ("blend", "chats", "prompts") if isinstance(getattr(data, k, None), str)), None)
    if key is None:
        return
    name = getattr(data, key)
    folders = [directory.parent / "blends" for directory in directories]
    file = next((f for folder in folders if (f := folder / f"{name}.yaml").is_file()), None)
    if file is None:
        known = sorted({p.stem for folder in folders for p in folder.glob("*.yaml")})
        raise NemoflowError(f"{where}.{key}: there is no {name}.yaml in {_listed(folders)}{_nearest(name, known)}")
    blend = validated(Blend, read_yaml(file), file)
    for source, spec in (blend.sources | blend.placeholder_sources).items():
        plain = Files(**spec.model_dump(include=Files.model_fields.keys()))
        if recipe.sources.setdefault(source, plain) != plain:
            raise NemoflowError(f"{where}.{key}: {file} and the recipe both have a source {source!r}, and they differ")
    if key == "blend":
        total = sum(Fraction(spec.weight) for spec in blend.sources.values())
        data.blend = {source: str(Fraction(spec.weight) / total) for source, spec in blend.sources.items()}
    elif key == "chats":
        data.chats = {source: spec.repeat for source, spec in blend.sources.items()}
    else:
        data.prompts = list(blend.sources)
        data.placeholders = blend.placeholders | data.placeholders


def _listed(paths: list[Path]) -> str:
    return ", ".join(map(str, paths))
