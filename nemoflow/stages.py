"""From a recipe to frozen stages: identities, trajectories, states and names.

Everything here is known from the recipe and its lock alone: no job is run, no network reached, no Megatron imported.
"""

import difflib
import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

from nemoflow import environments, evaluation, kinds
from nemoflow import recipe as grammar
from nemoflow.cluster import Cluster
from nemoflow.data import plan
from nemoflow.data.generate import arguments, check_arguments
from nemoflow.data.sources import readable
from nemoflow.engines import engine, refuse
from nemoflow.errors import NemoflowError, NotLocked
from nemoflow.evaluation import tasks
from nemoflow.hub import RUN_CONFIG
from nemoflow.locks import LockedSource, Locks
from nemoflow.store import Stage, Store

POOL_TOKENS = 64_000_000
"""Tokens of a source from which validation and test are chosen: enough for both, few enough to sort in memory."""

PREFIX_TOKENS = 250_000_000_000
"""Tokens behind one prefix: Megatron numbers the documents of a prefix in 32 bits, and each prefix costs at every
sample."""

VIEWS = ("tokenizer", "data", "import", "average", "select", *kinds.TRAINED, "hf_export", "eval", "seal", "report")
"""Kinds of name: KIND/RECIPE[@STAGE][:N]."""

EDITABLE = ("optimizer", "train")
"""Sections that an edit may change: the rest is another model, other data or another schedule."""


@dataclass(frozen=True)
class Target:
    """An artifact, as the graph asks for it."""

    stage: Stage
    at: int | None = None
    file: str = "artifact.json"
    """What has to be there."""

    @property
    def directory(self) -> Path:
        return self.stage.state(self.at)

    @property
    def artifact(self) -> str:
        return str(self.directory / self.file)


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
class Model:
    """A stage of a recipe that is not trained, resolved: an imported, averaged or selected model."""

    spec: grammar.Import | grammar.Average | grammar.Select
    engine: ModuleType
    stage: Stage


@dataclass
class Trained:
    """A trajectory of a recipe's stage: where it starts and ends, and what stands outside its identity.

    consumed: samples of the counter at `start`. batch: global batch size, None where the engine has none or the recipe
    does not say. scheduled: the batch size by which the schedule's iterations count, that of the first stage under one
    schedule. stream: the counter's samples where the stream of its data began.
    """

    spec: grammar.Stage
    engine: ModuleType
    overrides: dict
    stage: Stage
    start: int
    until: int
    horizon: int
    data: str
    consumed: int
    batch: int | None
    scheduled: int | None
    stream: int
    skip: int = 0
    wanted: set[int] = field(default_factory=set)

    def samples(self, at: int) -> int:
        """The counter's samples at iteration `at`."""
        return self.consumed + (at - self.start) * (self.batch or 0)


class Recipe:
    """A recipe resolved against a store: its stages by name, and what each name points at today."""

    def __init__(
        self,
        name: str,
        directories: list[Path],
        store: Store,
        python: str | None = None,
        unlocked: bool = False,
        cluster: Cluster | None = None,
    ):
        """Resolve recipe `name`.

        python: interpreter version generated sources are made with, this one by default.
        unlocked: stand-ins take the place of what is not locked; the identities mean nothing then.
        cluster: where its jobs run, unless on this machine; it may give stages other resources.

        Raises NemoflowError naming file, key, value and fix.
        """
        self.name, self.store, self._directories = name, store, directories
        self.file, self.spec = grammar.load(name, directories)
        for stage in self.spec.stages if cluster else []:
            if isinstance(stage, grammar.Training):
                stage.resources = cluster.resources(name, stage.name, stage.resources)
        self.locks = Locks(name, directories, store)
        self.unlocked: list[str] | None = [] if unlocked else None
        """What is not locked, if that is allowed."""
        self._python = python or platform.python_version()
        self.raw: dict[str, Raw] = {}
        """The sources that are used, by name."""
        self.merges: dict[str, str] = {}
        """Identities of the tokenized sources, by name."""
        self.launch: dict[str, dict] = {}
        """Identity -> what its job is told besides: `paths` of raw files, the tokenizing `engine`, `max_epochs`."""
        self.tokenizer = self._tokenizer()
        self.models: dict[str, Model] = {}
        self.chains: dict[str, list[Trained]] = {}
        """The trajectories of each trained stage: one, and one more for each edit."""
        specs: dict[str, grammar.Stage] = {}
        for spec in self.spec.stages:
            if spec.name in specs:
                raise NemoflowError(f"{self.file}: stages[{spec.name}]: two stages have this name")
            specs[spec.name] = spec
        for spec in self.spec.stages:
            self._resolve(spec, specs, ())
        self.models = {spec.name: self.models[spec.name] for spec in self.spec.stages if spec.name in self.models}
        self.chains = {spec.name: self.chains[spec.name] for spec in self.spec.stages if spec.name in self.chains}
        self.stages = {name: chain[-1] for name, chain in self.chains.items()}
        self.datasets: dict[str, str] = {}
        """Identities of the data made for its own sake, by name."""
        for key, data in self.spec.datasets.items():
            if key in specs:
                raise NemoflowError(
                    f"{self.file}: datasets.{key}: a stage has this name; data/{name}@{key} is its data"
                )
            self.datasets[key] = self._data(data, f"datasets.{key}")
        self.evals = {key: self._eval(key, spec, directories) for key, spec in self.spec.eval.items()}
        """Settings of the evaluations, less the export they are of, by name."""

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
        key = f"sources.{name}"
        stand_in = LockedSource({"unlocked": key, "format": "jsonl", "files": []}, [], [[[0]]], 0, 0)
        locked = self._pinned(key, lambda: self.locks.source(key, spec, self.file), stand_in)
        identity = self._add("source", **locked.payload)
        if locked.paths:
            self.launch[identity] = {"paths": locked.paths}
        if locked is stand_in:
            return Raw(identity, spec, locked.plan, [(0, 1)], None)
        jobs = plan.jobs(locked.plan, readable(locked.payload["files"], locked.payload["format"]))
        return Raw(identity, spec, locked.plan, jobs, locked.estimated_tokens)

    def _pinned(self, key: str, find: Callable, stand_in: Any) -> Any:
        try:
            return find()
        except NotLocked:
            if self.unlocked is None:
                raise
            self.unlocked.append(key)
            return stand_in

    def _tokenizer(self) -> str:
        spec = self.spec.tokenizer
        if isinstance(spec, grammar.LocalTokenizer):
            payload, paths = self._pinned(
                "tokenizer", lambda: self.locks.tokenizer(spec, self.file), ({"unlocked": spec.files}, [])
            )
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
                agents = {each.agent: each.fields for each in self._environments(data, where).values()}
                return self._add("prompts", parts=parts, placeholders=placeholders, agents=agents, **settings)
            case grammar.PreferenceData():
                parts = [{"source": self._source(name, f"{where}.preferences").identity} for name in data.preferences]
                return self._add("preferences", parts=parts, **data.model_dump(exclude={"preferences"}))

    def _environments(self, data: grammar.RlData, where: str) -> dict[str, environments.Environment]:
        return environments.load(data.environments, self._directories, f"{self.file}: {where}.environments")

    def _template(self, name: str | None, where: str) -> str | None:
        if name is None:
            return None
        path = self.file.parent / name
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise NemoflowError(f"{self.file}: {where}.template: {path}: cannot be read ({error})") from None

    def epochs(self, trained: Trained, until: int) -> dict[str, tuple[Fraction, bool]]:
        """How often a pretraining that ends at `until` has read each source of its blend, and whether that is exact.

        Exact once the source is tokenized, before that from its files' bytes; what nobody has counted is left out.
        """
        found: dict[str, tuple[Fraction, bool]] = {}
        if not isinstance(trained.spec, grammar.Pretrain):
            return found
        length = trained.engine.sequence_length(trained.overrides)
        for name, share in self._blend_of(trained).items():
            sealed = self.store.load(self.merges[name]).sealed()
            if sealed:
                tokens = sum(prefix["tokens"] for prefix in sealed["measures"]["prefixes"]["train"])
            else:
                tokens = self.raw[name].tokens
            if tokens and length:
                read = (trained.samples(until) - trained.stream) * length * Fraction(share)
                found[name] = read / tokens, sealed is not None
        return found

    def _blend_of(self, trained: Trained) -> dict[str, str]:
        """Source -> share of what a trajectory reads."""
        edits = trained.spec.edits[: self.chains[trained.spec.name].index(trained)]
        return next((edit.data for edit in reversed(edits) if edit.data), trained.spec.data).blend

    # -- models ----------------------------------------------------------------------------------------------------

    def trajectories(self) -> list[Trained]:
        """Those of all stages."""
        return [trained for chain in self.chains.values() for trained in chain]

    def geometry(self, trained: Trained) -> tuple[str, list[str]]:
        """How a training is laid out over its GPUs, if several, and what is impossible about it."""
        spec, check = trained.spec, getattr(trained.engine, "geometry", None)
        one = spec.resources.nodes * spec.resources.gpus_per_node == 1
        if check is None:
            alone = getattr(trained.engine, "ONE_PROCESS", False) and not one
            return "", [] if not alone else [f"resources: engine {spec.engine} trains in one process; leave them out"]
        layout, problems = check(
            getattr(spec, "function", None),
            trained.overrides,
            spec.resources.model_dump(),
            self.spec.hf_config,
            spec.kind,
            spec.data.pack_size if isinstance(spec, grammar.Sft) else None,
            self._parents(spec),
            **({"payload": trained.stage.payload} if isinstance(spec, grammar.Rl) else {}),
        )
        return ("" if one else layout), problems

    def _parents(self, spec: grammar.Stage) -> list[tuple[str | None, dict]]:
        """Recipe functions and overrides of the trained stages that one starts from, first to last."""
        parents: list[tuple[str | None, dict]] = []
        while spec.init and spec.init.stage in self.chains:
            parent = self.chains[spec.init.stage][-1]
            spec = parent.spec
            parents.insert(0, (getattr(spec, "function", None), parent.overrides))
        return parents

    def checkpoint_needs(self, trained: Trained) -> int | None:
        """Bytes of a checkpoint of a training, None if unknown. Of adapters, which are small, nothing is said."""
        spec, ask = trained.spec, getattr(trained.engine, "checkpoint_needs", None)
        if ask is None or getattr(spec, "peft", None):
            return None
        return ask(spec.function, trained.overrides, self.spec.hf_config, spec.kind, self._parents(spec))

    def export_needs(self, export: Stage) -> tuple[int, int] | None:
        """Bytes of memory that an export of one of these stages holds, and of weights it writes; None if unknown."""
        for trained in self.trajectories():
            if trained.stage.identity == export.payload["of"]["trajectory"]:
                return self._export_needs(trained, kinds.complete(export.payload)["dtype"])
        return None

    def conversion_needs(self) -> int | None:
        """Bytes of memory that an import, average, export or evaluation of these models holds; None if unknown."""
        found = filter(None, (self._export_needs(trained, self.spec.export.dtype) for trained in self.trajectories()))
        return max((memory for memory, _ in found), default=None)

    def _export_needs(self, trained: Trained, dtype: str) -> tuple[int, int] | None:
        if not hasattr(trained.engine, "export_needs"):
            return None
        spec = trained.spec
        known = spec.function, trained.overrides, self.spec.hf_config, spec.kind, self._parents(spec)
        return trained.engine.export_needs(*known, dtype)

    def _resolve(self, spec, specs: dict[str, grammar.Stage], chain: tuple[str, ...]) -> Model | list[Trained]:
        """A stage and those it starts from: a model, or the trajectories of a training."""
        for known in (self.models, self.chains):
            if spec.name in known:
                return known[spec.name]
        where = f"{self.file}: stages[{spec.name}]"
        if spec.name in chain:
            raise NemoflowError(f"{where}.init.from: a circle: {' -> '.join((*chain, spec.name))}")

        def other(key: str, name: str) -> Model | list[Trained]:
            if name not in specs:
                raise NemoflowError(f"{where}.{key}: no stage {name!r}{_near(name, specs)}")
            return self._resolve(specs[name], specs, (*chain, spec.name))

        if isinstance(spec, grammar.Select):
            found = self.models[spec.name] = self._select(spec, other("of.stage", spec.of.stage), where)
            return found
        driver = engine(spec.engine, f"{where}.engine")
        match spec:
            case grammar.Import():
                found = self.models[spec.name] = self._import(spec, driver)
            case grammar.Average():
                found = self.models[spec.name] = self._average(spec, driver, other("of.stage", spec.of.stage), where)
            case _:
                parent = other("init.from", spec.init.stage) if spec.init else None
                found = self.chains[spec.name] = self._train(spec, parent, driver, other, where)
        return found

    def _import(self, spec: grammar.Import, driver: ModuleType) -> Model:
        payload, paths = self._pinned(
            f"models.{spec.name}",
            lambda: self.locks.model(spec, self.file),
            ({"model": {"repo": spec.model}, "unlocked": spec.name}, []),
        )
        source = self._add("source", **payload)
        if paths:
            self.launch[source] = {"paths": paths}
        megatron = any(file["path"] == RUN_CONFIG for file in payload.get("files", []))
        identity = self._add(
            "import",
            engine=spec.engine,
            model=source,
            tokenizer=self.tokenizer,
            # A Hugging Face checkpoint says itself what it is
            hf_config=self.spec.hf_config if megatron else None,
            version=spec.version,
        )
        return Model(spec, driver, self.store.load(identity))

    def _average(self, spec: grammar.Average, driver: ModuleType, of: Model | list[Trained], where: str) -> Model:
        if isinstance(of, Model) or of[-1].spec.engine != spec.engine or getattr(of[-1].spec, "peft", None):
            raise NemoflowError(
                f"{where}.of.stage: {spec.of.stage} has no whole states of engine {spec.engine}; "
                "name a pretrain stage, or an sft stage without adapters"
            )
        states = _states(of, spec.of.at, where)
        identity = self._add("average", engine=spec.engine, of=states, version=spec.version)
        return Model(spec, driver, self.store.load(identity))

    def _select(self, spec: grammar.Select, of: Model | list[Trained], where: str) -> Model:
        if isinstance(of, Model) or getattr(of[-1].spec, "peft", None):
            raise NemoflowError(
                f"{where}.of.stage: {spec.of.stage} has no whole states to choose from; name a stage that is trained, "
                "without adapters"
            )
        trained = of[-1]
        if getattr(trained.spec, "algorithm", None) in getattr(trained.engine, "NOT_EXPORTED", ()):
            raise NemoflowError(
                f"{where}.of.stage: {spec.of.stage} trains {trained.spec.algorithm}, from which nothing goes on here"
            )
        candidates = spec.of.at or [*trained.spec.milestones, trained.until]
        if len(set(candidates)) < 2:
            raise NemoflowError(
                f"{where}.of.at: is missing, and {spec.of.stage} keeps no state but its last: write the iterations to "
                "choose from, or the stage's milestones"
            )
        identity = self._add(
            "select",
            engine=trained.spec.engine,
            of=_states(of, sorted(set(candidates)), where),
            metric=spec.metric,
            best=spec.best,
            version=spec.version,
        )
        return Model(spec, trained.engine, self.store.load(identity))

    # -- training --------------------------------------------------------------------------------------------------

    def _train(
        self, spec, parent: Model | list[Trained] | None, driver: ModuleType, other: Callable, where: str
    ) -> list[Trained]:
        """The trajectories of a stage that starts from `parent`; other(key, name) resolves another stage it names."""
        overrides = {**self.spec.overrides.get(spec.engine, {}), **spec.overrides}
        refuse(overrides, driver.REFUSED, f"{where}.overrides")
        driver.check(overrides, f"{where}.overrides")
        start, consumed, scheduled, init = self._init(spec, parent, driver, overrides, where)
        batch = overrides.get("train.global_batch_size")
        scheduled = scheduled or batch
        horizon = self._iterations(spec.horizon, start, driver, overrides, f"{where}.horizon")
        if horizon is None and (horizon := driver.schedule_horizon(overrides)) and batch != scheduled:
            horizon = start + (horizon * scheduled - consumed) // batch
        if horizon is None:
            raise NemoflowError(
                f"{where}.horizon: is missing: say where the learning-rate schedule and the data order end "
                "(never taken from `until`, which may be raised later)"
            )
        until = self._iterations(spec.until, start, driver, overrides, f"{where}.until")
        if isinstance(spec, grammar.Sft) and spec.data.pad_multiple % (wanted := driver.padding(overrides)):
            raise NemoflowError(
                f"{where}.data.pad_multiple: {spec.data.pad_multiple}: context parallelism needs a multiple of {wanted}"
            )
        extra = self._rl(spec, driver, overrides, other, where) if isinstance(spec, grammar.Rl) else {}
        data = self._data(spec.data, f"stages[{spec.name}].data")
        if isinstance(spec, grammar.Pretrain):
            if batch is None:
                raise NemoflowError(
                    f"{where}.overrides: train.global_batch_size is missing: it defines the data's order"
                )
            data = self._index(spec, driver, overrides, data, (horizon - start) * batch)
        stage = self._frozen(
            spec, overrides, driver, scheduled, data=data, horizon=horizon, init=init, version=spec.version, **extra
        )
        trained = Trained(
            spec, driver, overrides, stage, start, until, horizon, data, consumed, batch, scheduled, consumed
        )
        if getattr(spec, "peft", None) and spec.edits:
            raise NemoflowError(f"{where}.edits: a stage of adapters has none; train it anew, it is short")
        chain = [trained]
        for number, edit in enumerate(getattr(spec, "edits", [])):
            chain.append(self._edited(chain, edit, f"{where}.edits[{number}]"))
        for key, n in [("until", chain[-1].until), *(("milestones", m) for m in spec.milestones)]:
            if n > chain[-1].horizon:
                raise NemoflowError(f"{where}.{key}: {n} lies past the schedule's horizon {chain[-1].horizon}")
            if n <= start:
                raise NemoflowError(f"{where}.{key}: {n}: the stage starts at {start}, as init carries the counters")
        if chain[-1].until <= (first := chain[-1].start + chain[-1].skip):
            raise NemoflowError(f"{where}.until: {chain[-1].until}: the last of the edits trains from {first} on")
        for n in [*spec.milestones, chain[-1].until]:
            _holder(chain, n, where).wanted.add(n)
        for each in chain:
            each.wanted.add(each.until)
            if isinstance(spec, grammar.Pretrain):
                reads = each.samples(each.until) - each.stream
                # One order may be read by several stages: the one that reads most of it decides
                before = self.launch.get(each.data, {}).get("reads", 0)
                self.launch[each.data] = {"max_epochs": spec.data.max_epochs, "reads": max(reads, before)}
        return chain

    def _rl(self, spec: grammar.Rl, driver: ModuleType, overrides: dict, other: Callable, where: str) -> dict:
        """What the payload of an rl stage has besides: its environments by agent, the export of its teacher."""
        prompts = isinstance(spec.data, grammar.RlData)
        if prompts == (spec.algorithm in ("dpo", "rm")):
            wanted = "{prompts: [...], environments: [...]}" if not prompts else "{preferences: [...]}"
            raise NemoflowError(f"{where}.data: {spec.algorithm} learns from other data; write data: {wanted}")
        if (spec.teacher is not None) != (spec.algorithm == "distillation"):
            raise NemoflowError(
                f"{where}.teacher: is missing; write teacher: {{from: STAGE}}, whose model is imitated"
                if spec.teacher is None
                else f"{where}.teacher: {spec.algorithm} has none; leave it out, or write algorithm: distillation"
            )
        driver.check_algorithm(spec.algorithm, overrides, where)
        found: dict = {}
        if prompts:
            chosen = self._environments(spec.data, f"stages[{spec.name}].data")
            found["environments"] = driver.environments(chosen, f"{where}.data.environments")
        if spec.teacher:
            model = other("teacher.from", spec.teacher.stage)
            at = spec.teacher.at
            if isinstance(model, Model):
                if at:
                    raise NemoflowError(f"{where}.teacher.at: {spec.teacher.stage} is a model without states")
            else:
                at = at or model[-1].until
                model = _holder(model, at, f"{where}.teacher.at")
                model.wanted.add(at)
            found["teacher"] = self._export(model, at)
        return found

    def _edited(self, chain: list[Trained], edit, where: str) -> Trained:
        """The trajectory that goes on from state `edit.at` of the last one of `chain`, which ends there."""
        before, driver = chain[-1], chain[-1].engine
        spec, at = before.spec, edit.at
        if not before.start < at < before.horizon:
            raise NemoflowError(
                f"{where}.at: {at}: the stage so far has states from {before.start + 1} to {before.horizon - 1} to go "
                "on from; edits stand in order"
            )
        refuse(edit.overrides, driver.REFUSED, f"{where}.overrides")
        driver.check(edit.overrides, f"{where}.overrides")
        for key in edit.overrides:
            if key.partition(".")[0] not in EDITABLE:
                raise NemoflowError(
                    f"{where}.overrides.{key}: an edit changes settings of {' and '.join(EDITABLE)}; "
                    "with another one make a stage of its own, with init: {from, at, carry}"
                )
        overrides = {**before.overrides, **edit.overrides}
        batch = overrides.get("train.global_batch_size")
        if batch is None:
            raise NemoflowError(f"{where}: needs train.global_batch_size in the recipe's overrides, to count samples")
        consumed, end = before.samples(at), before.samples(before.horizon)
        horizon = at + (end - consumed) // batch
        if edit.skip >= horizon - at:
            raise NemoflowError(f"{where}.skip: {edit.skip}: nothing would be left until the horizon, {horizon}")
        other = getattr(edit, "data", None)
        data, stream = before.data, before.stream
        if other:
            blend = self._data(other, f"{where}.data".removeprefix(f"{self.file}: "))
            data, stream = self._index(spec, driver, overrides, blend, (horizon - at) * batch), consumed
        elif isinstance(spec, grammar.Pretrain):
            index = self.store.load(before.data).payload  # the same order; only the validation set's size may differ
            data = self._index(spec, driver, overrides, index["data"], index["samples"])
        stage = self._frozen(
            spec,
            overrides,
            driver,
            before.scheduled,
            data=data,
            horizon=horizon,
            version=spec.version,
            init={"from": before.stage.identity, "at": at, "carry": "all"},
            skip=edit.skip,
            stream=None if other else stream,
        )
        until = before.until
        if isinstance(spec.until, grammar.TokenCount):
            length = driver.sequence_length(overrides)
            left = -(-spec.until.tokens // length) - (consumed - chain[0].consumed)
            until = at + -(-left // batch)
        before.until = at
        return Trained(
            spec,
            driver,
            overrides,
            stage,
            at,
            until,
            horizon,
            data,
            consumed,
            batch,
            before.scheduled,
            stream,
            edit.skip,
        )

    def _frozen(self, spec, overrides: dict, driver: ModuleType, scheduled: int | None, **settings) -> Stage:
        identity = self._add(
            spec.kind,
            engine=spec.engine,
            function=getattr(spec, "function", None),
            arguments=getattr(spec, "arguments", None),
            algorithm=getattr(spec, "algorithm", None),
            hf_config=self.spec.hf_config if isinstance(spec, grammar.Pretrain) else None,
            peft=getattr(spec, "peft", None),
            overrides={k: v for k, v in overrides.items() if not driver.outside(k)},
            tokenizer=self.tokenizer,
            schedule_batch=scheduled if scheduled != overrides.get("train.global_batch_size") else None,
            **settings,
        )
        return self.store.load(identity)

    def _index(self, spec, driver: ModuleType, overrides: dict, blend: str, samples: int) -> str:
        """The order in which a stage reads its blend."""
        return self._add(
            "index",
            engine=spec.engine,
            function=spec.function,
            arguments=spec.arguments,
            hf_config=self.spec.hf_config,
            overrides=driver.index_overrides(overrides),
            data=blend,
            tokenizer=self.tokenizer,
            samples=samples,
        )

    def _init(self, spec, parent: Model | list[Trained] | None, driver: ModuleType, overrides: dict, where: str):
        """Where a stage starts: iteration, samples of the counter, the schedule's batch size, the payload's `init`."""
        if parent is None:
            return 0, 0, None, None
        if spec.init.carry not in driver.CARRIES:
            raise NemoflowError(
                f"{where}.init.carry: {spec.init.carry!r}: engine {spec.engine} carries {' or '.join(driver.CARRIES)}"
            )
        if isinstance(parent, Model):
            if spec.init.at or spec.init.carry != "weights":
                raise NemoflowError(
                    f"{where}.init: {spec.init.stage} is a model without counters or optimizer: write "
                    f"{{from: {spec.init.stage}, carry: weights}}"
                )
            holder, at, start = parent, None, {"from": parent.stage.identity}
        else:
            at = spec.init.at or parent[-1].until
            holder = _holder(parent, at, f"{where}.init.at")
            holder.wanted.add(at)
            start = {"from": holder.stage.identity, "at": at}
        if driver.STARTS_FROM == "export":
            return 0, 0, None, {"export": self._export(holder, at), "carry": spec.init.carry}
        if holder.engine.STARTS_FROM == "export":
            raise NemoflowError(
                f"{where}.init.from: {holder.spec.name} is of engine {holder.stage.payload['engine']}, whose "
                f"checkpoints engine {spec.engine} cannot read"
            )
        if getattr(holder.spec, "peft", None):
            raise NemoflowError(
                f"{where}.init.from: the checkpoints of {holder.spec.name} hold adapters alone; its whole model is "
                f"hf_export/{self.name}@{holder.spec.name}, which an import stage can take"
            )
        if getattr(spec, "peft", None) and spec.init.carry != "weights":
            raise NemoflowError(f"{where}.init.carry: {spec.init.carry}: adapters are new; write carry: weights")
        init = {**start, "carry": spec.init.carry}
        if spec.init.carry != "all":
            return 0, 0, None, init
        ours, theirs = (
            {k: v for k, v in o.items() if k.startswith("scheduler.")} for o in (overrides, holder.overrides)
        )
        for key in sorted(ours.keys() | theirs.keys()):
            if ours.get(key) != theirs.get(key):
                raise NemoflowError(
                    f"{where}.overrides.{key}: {ours.get(key)!r}, but {holder.spec.name} has {theirs.get(key)!r}: "
                    "under carry: all both go on one schedule; put it whole in the recipe's shared overrides"
                )
        return at, holder.samples(at), holder.scheduled, init

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

    def _export(self, model: Model | Trained, at: int | None) -> str:
        """The export of a model. Raises NemoflowError for one that its engine has no export of."""
        algorithm = getattr(model.spec, "algorithm", None)
        if algorithm in getattr(model.engine, "NOT_EXPORTED", ()):
            raise NemoflowError(
                f"{self.file}: stages[{model.spec.name}]: engine {model.stage.payload['engine']} does not export what "
                f"{algorithm} trains; its state is rl/{self.name}@{model.spec.name}"
            )
        init = model.stage.payload["init"] if getattr(model.spec, "peft", None) else None
        return self._add(
            "hf_export",
            base=init and {"trajectory": init["from"], **({"at": init["at"]} if "at" in init else {})},
            engine=model.stage.payload["engine"],
            of={"trajectory": model.stage.identity, **({"at": at} if at else {})},
            tokenizer=self.tokenizer,
            dtype=self.spec.export.dtype,
        )

    def _eval(self, key: str, spec: grammar.Eval, directories: list[Path]) -> dict:
        """What defines an evaluation besides the export. Raises NemoflowError for an unknown task, a missing split."""
        where = f"eval.{key}"
        files = [directory.parent / "tasks" / f"{spec.task}.yaml" for directory in directories]
        own = next((f for f in files if f.is_file()), None)
        try:
            if own:
                text = own.read_text(encoding="utf-8")
                settings = tasks.parse(text, f"task: {own}")
                tasks.check_own(settings, f"task: {own}")
            else:
                text, settings = None, tasks.read(tasks.find(spec.task))
            tasks.check(settings, spec.fewshot, spec.data)
            evaluation.check_arguments(spec.backend, spec.arguments)
        except NemoflowError as error:
            raise NemoflowError(f"{self.file}: {where}.{error}") from None
        return {
            "task": {"name": spec.task, **({"text": text} if text else {})},
            "data": {split: self._source(name, f"{where}.data.{split}").identity for split, name in spec.data.items()},
            "fewshot": spec.fewshot,
            "limit": spec.limit,
            "chat": spec.chat,
            "harness": evaluation.HARNESS,
        }

    def _evaluated(self, export: str, name: str) -> dict[str, Target]:
        """The evaluations of an export, by name."""
        if not self.evals:
            raise NemoflowError(f"{name}: {self.file} has no section `eval`, which says what to evaluate exports with")
        found = {}
        for key, settings in self.evals.items():
            identity = self._add("eval", of=export, **settings)
            self.launch[identity] = self.spec.eval[key].model_dump(include={"backend", "batch_size", "arguments"})
            found[key] = Target(self.store.load(identity))
        return found

    def _of_export(self, kind: str, export: str, name: str) -> dict[str, Target]:
        """What a name shows that consists of an export's evaluations; a report has the export besides."""
        if kind == "eval":
            return self._evaluated(export, name)
        scores = self._evaluated(export, name) if self.evals else {}
        return {"hf_export": Target(self.store.load(export))} | {f"eval-{key}": t for key, t in scores.items()}

    # -- names -----------------------------------------------------------------------------------------------------

    def view(self, kind: str, stage: str | None = None, at: int | None = None) -> dict[str, Target]:
        """What the name KIND/RECIPE[@STAGE][:N] shows: {"": target}; for data/RECIPE a target per stage, for eval/...
        one per task, for report/... the export and its evaluations.

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
        if stage and stage not in self.stages and stage not in self.models:
            raise NemoflowError(
                f"{name}: {self.file} has no stage {stage!r}{_near(stage, (*self.models, *self.stages))}"
            )
        if kind == "data":
            if at:
                raise NemoflowError(f"{name}: data has no states; write data/{self.name}@STAGE")
            if stage in self.models:
                raise NemoflowError(f"{name}: stage {stage} is {self.models[stage].spec.kind}, which reads no data")
            data = {n: t.data for n, t in self.stages.items()} | self.datasets
            shown = {n: Target(self.store.load(identity)) for n, identity in data.items()}
            return {"": shown[stage]} if stage else shown
        model = self._meant(kind, stage, name)
        if isinstance(model, Model):
            if at:
                raise NemoflowError(f"{name}: stage {model.spec.name} is {model.spec.kind}, which has no states")
            if kind in ("eval", "report"):
                return self._of_export(kind, self._export(model, None), name)
            return {"": Target(self.store.load(self._export(model, None)) if kind == "hf_export" else model.stage)}
        at = at or model[-1].until
        trained = _holder(model, at, name)
        if at not in trained.wanted:
            kept = sorted(n for t in model for n in t.wanted | set(t.stage.sealed_states()))
            if at not in kept:
                raise NemoflowError(
                    f"{name}: state {at} is neither `until` nor a milestone of {trained.spec.name}; there are "
                    f"{', '.join(map(str, kept))}; add it to milestones in {self.file}"
                )
        if kind == "hf_export":
            return {"": Target(self.store.load(self._export(trained, at)))}
        if kind in ("eval", "report"):
            return self._of_export(kind, self._export(trained, at), name)
        return {"": Target(trained.stage, at, "digests.json" if kind == "seal" else "artifact.json")}

    def _meant(self, kind: str, stage: str | None, name: str) -> Model | list[Trained]:
        """The stage that a name means: the one it says, or the last of its kind."""
        whole = ("import", "average", "select", *kinds.TRAINED)
        views = {"hf_export": whole, "eval": whole, "report": whole, "seal": kinds.TRAINED}.get(kind, (kind,))
        if stage:
            model = self.models.get(stage) or self.chains[stage]
            own = model.spec.kind if isinstance(model, Model) else model[-1].spec.kind
            if own not in views:
                raise NemoflowError(f"{name}: stage {stage} is {own}: {own}/{self.name}@{stage}")
            return model
        trained = [chain for chain in self.chains.values() if chain[-1].spec.kind in views]
        models = [model for model in self.models.values() if model.spec.kind in views]
        if not trained and not models:
            raise NemoflowError(f"{name}: {self.file} has no stage of kind {kind}")
        return trained[-1] if trained else models[-1]

    def names(self) -> list[str]:
        """The names this recipe offers, in the order of the chain."""
        found = [f"tokenizer/{self.name}", f"data/{self.name}"]
        found += [f"data/{self.name}@{stage}" for stage in (*self.stages, *self.datasets)]
        found += [f"{model.spec.kind}/{self.name}@{stage}" for stage, model in self.models.items()]
        for kind in kinds.TRAINED:
            stages = [name for name, t in self.stages.items() if t.spec.kind == kind]
            found += [f"{kind}/{self.name}"] if stages else []
            found += [f"{kind}/{self.name}@{stage}" for stage in stages] if len(stages) > 1 else []
            found += [f"{kind}/{self.name}@{s}:{m}" for s in stages for m in self.stages[s].spec.milestones]
        for kind in ("hf_export", *(["eval"] if self.evals else []), "report") if self.models or self.stages else ():
            found += [f"{kind}/{self.name}@{stage}" for stage in (*self.models, *self.stages)]
            found += [f"{kind}/{self.name}"]
        return found


def _states(chain: list[Trained], iterations: list[int], where: str) -> list[dict]:
    """References to these states of a stage, which are kept from now on.

    Raises NemoflowError for one that the stage cannot have.
    """
    found = []
    for at in iterations:
        trained = _holder(chain, at, f"{where}.of.at")
        trained.wanted.add(at)
        found.append({"trajectory": trained.stage.identity, "at": at})
    return found


def _holder(chain: list[Trained], at: int, where: str) -> Trained:
    """The trajectory of a stage that state `at` belongs to. Raises NemoflowError when the stage has no such state."""
    for trained in chain:
        if trained.start + trained.skip < at <= (trained.until if trained is not chain[-1] else trained.horizon):
            return trained
    raise NemoflowError(
        f"{where}: {at}: {chain[-1].spec.name} has states from {chain[0].start + 1} to {chain[-1].horizon}"
    )


def _near(word: str, known) -> str:
    close = difflib.get_close_matches(word, list(known), 1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(known)}"
