"""From a recipe to frozen stages: identities, trajectories, states and names.

Everything here is known from the recipe and its lock alone: no job is run, no network reached, no Megatron imported.
"""

import difflib
import platform
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from types import ModuleType

from nemoflow import kinds
from nemoflow import recipe as grammar
from nemoflow.data import plan
from nemoflow.data.generate import arguments, check_arguments
from nemoflow.engines import engine, refuse
from nemoflow.errors import NemoflowError
from nemoflow.locks import Locks
from nemoflow.store import Stage, Store

POOL_TOKENS = 64_000_000
"""Tokens of a source from which validation and test are chosen: enough for both, few enough to sort in memory."""

PREFIX_TOKENS = 250_000_000_000
"""Tokens behind one prefix: Megatron numbers the documents of a prefix in 32 bits, and each prefix costs at every
sample."""

VIEWS = ("tokenizer", "data", "pretrain", "sft", "rl", "hf_export")
"""Kinds of name: KIND/RECIPE[@STAGE][:N]."""


@dataclass(frozen=True)
class Target:
    """An artifact, as the graph asks for it."""

    stage: Stage
    at: int | None = None

    @property
    def directory(self) -> Path:
        return self.stage.state(self.at)

    @property
    def artifact(self) -> str:
        return str(self.directory / "artifact.json")


@dataclass(frozen=True)
class Raw:
    """A source of a recipe, resolved.

    plan: the units each of its shards reads, in order. jobs: (first shard, shards) of each tokenizing job. tokens: an
    estimate from the files' bytes; None for a generated source, which nobody has counted yet.
    """

    identity: str
    spec: grammar.Generated | grammar.Files
    plan: list
    jobs: list[tuple[int, int]]
    tokens: int | None

    def field(self, usual: str) -> str:
        """The key or column that holds what is wanted, called `usual` unless the recipe says otherwise."""
        return usual if self.spec.field == "text" else self.spec.field


@dataclass
class Trained:
    """A stage of a recipe, resolved: its trajectory, where it starts and ends, and what stands outside its identity."""

    spec: grammar.Stage
    engine: ModuleType
    overrides: dict
    stage: Stage
    start: int
    until: int
    horizon: int
    data: str
    wanted: set[int] = field(default_factory=set)


class Recipe:
    """A recipe resolved against a store: its stages by name, and what each name points at today."""

    def __init__(
        self,
        name: str,
        directories: list[Path],
        store: Store,
        python: str | None = None,
    ):
        """Resolve recipe `name`.

        python: interpreter version generated sources are made with, this one by default.

        Raises NemoflowError naming file, key, value and fix.
        """
        self.name, self.store = name, store
        self.file, self.spec = grammar.load(name, directories)
        self.locks = Locks(name, directories, store)
        self._python = python or platform.python_version()
        self.raw: dict[str, Raw] = {}
        """The sources that are used, by name."""
        self.merges: dict[str, str] = {}
        """Identities of the tokenized sources, by name."""
        self.launch: dict[str, dict] = {}
        """Identity -> what its job is told besides: `paths` of raw files, the tokenizing `engine`, `max_epochs`."""
        self.tokenizer = self._tokenizer()
        self.stages: dict[str, Trained] = {}
        specs: dict[str, grammar.Stage] = {}
        for spec in self.spec.stages:
            if spec.name in specs:
                raise NemoflowError(f"{self.file}: stages[{spec.name}]: two stages have this name")
            specs[spec.name] = spec
        for spec in self.spec.stages:
            self._train(spec, specs, ())
        self.stages = {spec.name: self.stages[spec.name] for spec in self.spec.stages}
        self.datasets: dict[str, str] = {}
        """Identities of the data made for its own sake, by name."""
        for key, data in self.spec.datasets.items():
            if key in self.stages:
                raise NemoflowError(
                    f"{self.file}: datasets.{key}: a stage has this name; data/{name}@{key} is its data"
                )
            self.datasets[key] = self._data(data, f"datasets.{key}")

    # -- data ------------------------------------------------------------------------------------------------------

    def _add(self, kind: str, **settings) -> str:
        return self.store.add(kinds.payload(kind, **settings))

    def _source(self, name: str, where: str) -> Raw:
        if name not in self.raw:
            spec = self.spec.sources.get(name)
            if spec is None:
                raise NemoflowError(f"{self.file}: {where}: no source {name!r}{_near(name, self.spec.sources)}")
            self.raw[name] = (
                self._generated(name, spec) if isinstance(spec, grammar.Generated) else self._files(name, spec)
            )
        return self.raw[name]

    def _generated(self, name: str, spec: grammar.Generated) -> Raw:
        try:
            check_arguments(spec.generator, spec.args)
        except NemoflowError as error:
            raise NemoflowError(f"{self.file}: sources.{name}.args: {error}") from None
        defaults = arguments(spec.generator)
        identity = self._add(
            "source",
            generator=spec.generator,
            args={k: v for k, v in spec.args.items() if v != defaults[k]},
            seed=spec.seed,
            shards=spec.shards,
            python=self._python,
        )
        return Raw(identity, spec, [[[i]] for i in range(spec.shards)], [(0, spec.shards)], None)

    def _files(self, name: str, spec: grammar.Files) -> Raw:
        locked = self.locks.source(f"sources.{name}", spec, self.file)
        identity = self._add("source", **locked.payload)
        if locked.paths:
            self.launch[identity] = {"paths": locked.paths}
        jobs = plan.jobs(locked.plan, locked.payload["files"])
        return Raw(identity, spec, locked.plan, jobs, locked.estimated_tokens)

    def _tokenizer(self) -> str:
        spec = self.spec.tokenizer
        if isinstance(spec, grammar.LocalTokenizer):
            payload, paths = self.locks.tokenizer(spec, self.file)
            identity = self._add("tokenizer", **payload)
            if paths:
                self.launch[identity] = {"paths": paths}
            return identity
        raw = [self._source(s, f"tokenizer.train_on[{i}]") for i, s in enumerate(spec.train_on)]
        fields = [r.spec.field for r in raw]
        return self._add(
            "tokenizer",
            sources=[r.identity for r in raw],
            fields=fields if set(fields) != {"text"} else None,
            vocab_size=spec.vocab_size,
            chat_template=spec.chat_template,
        )

    def _merge(self, name: str, where: str) -> str:
        """The tokenized source, split and in few prefixes; what every stage that reads this source shares."""
        if name in self.merges:
            return self.merges[name]
        raw, held = self._source(name, where), self.spec.held_out
        if held.valid + held.test > POOL_TOKENS // 2:
            raise NemoflowError(
                f"{self.file}: held_out: valid and test want {held.valid + held.test:,} tokens of each source; at most "
                f"{POOL_TOKENS // 2:,} can be kept"
            )
        pool = Fraction(1, 2 ** max(0, ((raw.tokens or 0) // POOL_TOKENS).bit_length() - 1))
        parts = [
            self._add(
                "shards",
                source=raw.identity,
                tokenizer=self.tokenizer,
                text_field=raw.field("text"),
                control_strings=raw.spec.control_strings,
                max_broken=raw.spec.max_broken,
                pool=str(pool),
                first=first,
                shards=raw.plan[first : first + count],
            )
            for first, count in raw.jobs
        ]
        for part in parts:
            self.launch[part] = {"engine": self.spec.tokenizer.engine}
        self.merges[name] = self._add(
            "merge",
            parts=parts,
            source=raw.identity,
            valid=held.valid,
            test=held.test,
            cap=held.cap,
            prefixes=-(-(raw.tokens or 1) // PREFIX_TOKENS),
        )
        return self.merges[name]

    def _data(self, data, where: str) -> str:
        match data:
            case grammar.PretrainData():
                total = sum(map(Fraction, data.blend.values()))
                if total != 1:
                    raise NemoflowError(f"{self.file}: {where}.blend: the shares add up to {total}, not to 1")
                parts = [
                    {"merge": self._merge(name, f"{where}.blend"), "share": share} for name, share in data.blend.items()
                ]
                # Sorted: the order of the keys in a recipe's mapping means nothing.
                return self._add("blend", parts=sorted(parts, key=lambda part: part["merge"]))
            case grammar.SftData():
                parts = []
                for name, repeat in data.chats.items():
                    raw = self._source(name, f"{where}.chats")
                    part = {"source": raw.identity, "repeat": repeat, "field": raw.field("messages")}
                    parts.append(
                        {k: v for k, v in part.items() if (k, v) not in (("repeat", "1"), ("field", "messages"))}
                    )
                parts.sort(key=lambda part: part["source"])
                settings = data.model_dump(exclude={"chats", "template"})
                identity = self._add(
                    "chats",
                    parts=parts,
                    tokenizer=self.tokenizer,
                    template=self._template(data.template, where),
                    **settings,
                )
                self.launch[identity] = {"engine": self.spec.tokenizer.engine}
                return identity
            case grammar.RlData():
                parts = [{"source": self._source(name, f"{where}.prompts").identity} for name in data.prompts]
                placeholders = {
                    key: {
                        "source": self._source(p.source, f"{where}.placeholders.{key}").identity,
                        "template": p.template,
                    }
                    for key, p in data.placeholders.items()
                }
                settings = data.model_dump(include={"valid", "allow_unresolved", "max_broken"})
                return self._add("prompts", parts=parts, placeholders=placeholders, **settings)
            case grammar.PreferenceData():
                parts = [{"source": self._source(name, f"{where}.preferences").identity} for name in data.preferences]
                return self._add("preferences", parts=parts, **data.model_dump(exclude={"preferences"}))

    def _template(self, name: str | None, where: str) -> str | None:
        if name is None:
            return None
        path = self.file.parent / name
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise NemoflowError(f"{self.file}: {where}.template: {path}: cannot be read ({error})") from None

    def epochs(self, stage: str, until: int) -> dict[str, tuple[Fraction, bool]]:
        """How often a pretraining stage that ends at `until` reads each source of its blend, and whether that is exact.

        Exact once the source is tokenized, before that from its files' bytes; what nobody has counted is left out.
        """
        trained, found = self.stages[stage], {}
        if not isinstance(trained.spec, grammar.Pretrain):
            return {}
        per_iteration = trained.engine.tokens_per_iteration(trained.overrides)
        for name, share in trained.spec.data.blend.items():
            sealed = self.store.load(self.merges[name]).sealed()
            if sealed:
                tokens = sum(prefix["tokens"] for prefix in sealed["measures"]["prefixes"]["train"])
            else:
                tokens = self.raw[name].tokens
            if tokens and per_iteration:
                read = (until - trained.start) * per_iteration * Fraction(share)
                found[name] = read / tokens, sealed is not None
        return found

    # -- training --------------------------------------------------------------------------------------------------

    def _train(self, spec: grammar.Stage, specs: dict[str, grammar.Stage], chain: tuple[str, ...]) -> Trained:
        if spec.name in self.stages:
            return self.stages[spec.name]
        where = f"{self.file}: stages[{spec.name}]"
        if spec.name in chain:
            raise NemoflowError(f"{where}.init.from: a circle: {' -> '.join((*chain, spec.name))}")
        driver = engine(spec.engine, f"{where}.engine")
        overrides = {**self.spec.overrides.get(spec.engine, {}), **spec.overrides}
        refuse(overrides, driver.REFUSED, f"{where}.overrides")
        driver.check(overrides, f"{where}.overrides")
        parent = None
        if spec.init:
            if spec.init.stage not in specs:
                raise NemoflowError(f"{where}.init.from: no stage {spec.init.stage!r}{_near(spec.init.stage, specs)}")
            parent = self._train(specs[spec.init.stage], specs, (*chain, spec.name))
        start, init = self._init(spec, parent, driver, overrides, where)
        horizon = self._iterations(spec.horizon, start, driver, overrides, f"{where}.horizon")
        horizon = horizon or driver.schedule_horizon(overrides)
        if horizon is None:
            raise NemoflowError(
                f"{where}.horizon: is missing: say where the learning-rate schedule and the data order end "
                "(never taken from `until`, which may be raised later)"
            )
        until = self._iterations(spec.until, start, driver, overrides, f"{where}.until")
        for key, n in [("until", until), *(("milestones", m) for m in spec.milestones)]:
            if n > horizon:
                raise NemoflowError(f"{where}.{key}: {n} lies past the schedule's horizon {horizon}")
            if n <= start:
                raise NemoflowError(f"{where}.{key}: {n}: the stage starts at {start}, as init carries the counters")
        if isinstance(spec, grammar.Sft) and spec.data.pad_multiple % (wanted := driver.padding(overrides)):
            raise NemoflowError(
                f"{where}.data.pad_multiple: {spec.data.pad_multiple}: context parallelism needs a multiple of {wanted}"
            )
        data = reads = self._data(spec.data, f"stages[{spec.name}].data")
        if isinstance(spec, grammar.Pretrain):
            data = self._index(spec, driver, overrides, reads, (until - start, horizon - start), where)
        identity = self._add(
            spec.kind,
            engine=spec.engine,
            function=getattr(spec, "function", None),
            algorithm=getattr(spec, "algorithm", None),
            overrides={k: v for k, v in overrides.items() if not driver.outside(k)},
            tokenizer=self.tokenizer,
            data=data,
            horizon=horizon,
            init=init,
            version=spec.version,
        )
        trained = Trained(spec, driver, overrides, self.store.load(identity), start, until, horizon, data)
        trained.wanted = {until, *spec.milestones}
        self.stages[spec.name] = trained
        return trained

    def _index(self, spec, driver: ModuleType, overrides: dict, blend: str, iterations: tuple[int, int], where: str):
        """The order in which a stage reads its blend. iterations: of the stage itself, and to its horizon."""
        batch = overrides.get("train.global_batch_size")
        if batch is None:
            raise NemoflowError(f"{where}.overrides: train.global_batch_size is missing: it defines the data's order")
        identity = self._add(
            "index",
            engine=spec.engine,
            function=spec.function,
            overrides=driver.index_overrides(overrides),
            data=blend,
            tokenizer=self.tokenizer,
            samples=iterations[1] * batch,
        )
        self.launch[identity] = {"max_epochs": spec.data.max_epochs, "reads": iterations[0] * batch}
        return identity

    def _init(self, spec, parent: Trained | None, driver: ModuleType, overrides: dict, where: str):
        """(first iteration, the payload's `init`) of a stage."""
        if parent is None:
            return 0, None
        at = spec.init.at or parent.until
        if not parent.start < at <= parent.horizon:
            raise NemoflowError(
                f"{where}.init.at: {at}: {parent.spec.name} has states from {parent.start + 1} to {parent.horizon}"
            )
        parent.wanted.add(at)
        if spec.init.carry not in driver.CARRIES:
            raise NemoflowError(
                f"{where}.init.carry: {spec.init.carry!r}: engine {spec.engine} carries {' or '.join(driver.CARRIES)}"
            )
        if driver.STARTS_FROM == "export":
            return 0, {"export": self._export(parent, at), "carry": spec.init.carry}
        if parent.engine.STARTS_FROM == "export":
            raise NemoflowError(
                f"{where}.init.from: {parent.spec.name} is trained by engine {parent.spec.engine}, whose checkpoints "
                f"engine {spec.engine} cannot read"
            )
        if spec.init.carry == "all":
            ours, theirs = (
                {k: v for k, v in o.items() if k.startswith("scheduler.")} for o in (overrides, parent.overrides)
            )
            for key in sorted(ours.keys() | theirs.keys()):
                if ours.get(key) != theirs.get(key):
                    raise NemoflowError(
                        f"{where}.overrides.{key}: {ours.get(key)!r}, but {parent.spec.name} has {theirs.get(key)!r}: "
                        "under carry: all both go on one schedule; put it whole in the recipe's shared overrides"
                    )
        start = at if spec.init.carry == "all" else 0
        return start, {"from": parent.stage.identity, "at": at, "carry": spec.init.carry}

    @staticmethod
    def _iterations(steps, start: int, driver: ModuleType, overrides: dict, where: str) -> int | None:
        """A length as the trainer's counter: tokens of this stage become iterations, rounded up."""
        if isinstance(steps, grammar.TokenCount):
            per_iteration = driver.tokens_per_iteration(overrides)
            if per_iteration is None:
                raise NemoflowError(
                    f"{where}.tokens: needs train.global_batch_size and the sequence length in the recipe's overrides"
                )
            return start + -(-steps.tokens // per_iteration)
        return steps

    def _export(self, trained: Trained, at: int) -> str:
        return self._add(
            "hf_export",
            engine=trained.spec.engine,
            of={"trajectory": trained.stage.identity, "at": at},
            tokenizer=self.tokenizer,
            dtype=self.spec.export.dtype,
        )

    # -- names -----------------------------------------------------------------------------------------------------

    def view(self, kind: str, stage: str | None = None, at: int | None = None) -> dict[str, Target]:
        """What the name KIND/RECIPE[@STAGE][:N] shows: {"": target}, or for data/RECIPE a target per stage.

        Raises NemoflowError for a stage or state the recipe does not have.
        """
        name = f"{kind}/{self.name}" + (f"@{stage}" if stage else "") + (f":{at}" if at else "")
        if kind == "tokenizer":
            if stage or at:
                raise NemoflowError(f"{name}: a recipe has one tokenizer: tokenizer/{self.name}")
            return {"": Target(self.store.load(self.tokenizer))}
        if kind == "data" and stage in self.datasets:
            if at:
                raise NemoflowError(f"{name}: data has no states; write data/{self.name}@{stage}")
            return {"": Target(self.store.load(self.datasets[stage]))}
        if stage and stage not in self.stages:
            raise NemoflowError(f"{name}: {self.file} has no stage {stage!r}{_near(stage, self.stages)}")
        if kind == "data":
            if at:
                raise NemoflowError(f"{name}: data has no states; write data/{self.name}@STAGE")
            data = {n: t.data for n, t in self.stages.items()} | self.datasets
            shown = {n: Target(self.store.load(identity)) for n, identity in data.items()}
            return {"": shown[stage]} if stage else shown
        if stage:
            trained = self.stages[stage]
            if kind not in (trained.spec.kind, "hf_export"):
                raise NemoflowError(
                    f"{name}: stage {stage} is {trained.spec.kind}: {trained.spec.kind}/{self.name}@{stage}"
                )
        else:
            of_kind = [t for t in self.stages.values() if kind in (t.spec.kind, "hf_export")]
            if not of_kind:
                raise NemoflowError(f"{name}: {self.file} has no stage of kind {kind}")
            trained = of_kind[-1]
        at = at or trained.until
        if at not in trained.wanted:
            kept = sorted(trained.wanted | set(trained.stage.sealed_states()))
            if at not in kept:
                raise NemoflowError(
                    f"{name}: state {at} is neither `until` nor a milestone of {trained.spec.name}; there are "
                    f"{', '.join(map(str, kept))}; add it to milestones in {self.file}"
                )
        if kind == "hf_export":
            return {"": Target(self.store.load(self._export(trained, at)))}
        return {"": Target(trained.stage, at)}

    def names(self) -> list[str]:
        """The names this recipe offers, in the order of the chain."""
        found = [f"tokenizer/{self.name}", f"data/{self.name}"]
        found += [f"data/{self.name}@{stage}" for stage in (*self.stages, *self.datasets)]
        for kind in kinds.TRAINED:
            stages = [name for name, t in self.stages.items() if t.spec.kind == kind]
            found += [f"{kind}/{self.name}"] if stages else []
            found += [f"{kind}/{self.name}@{stage}" for stage in stages] if len(stages) > 1 else []
            found += [f"{kind}/{self.name}@{s}:{m}" for s in stages for m in self.stages[s].spec.milestones]
        return [*found, *(f"hf_export/{self.name}@{stage}" for stage in self.stages), f"hf_export/{self.name}"]


def _near(word: str, known) -> str:
    close = difflib.get_close_matches(word, list(known), 1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(known)}"
