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
from nemoflow.data.generate import arguments, check_arguments
from nemoflow.engines import engine, refuse
from nemoflow.errors import NemoflowError
from nemoflow.locks import Locks
from nemoflow.store import Stage, Store

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
        self._sources: dict[str, str] = {}
        self.paths: dict[str, list[str]] = {}
        """Identity -> paths of the raw files it is made from: where, not what."""
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

    # -- data ------------------------------------------------------------------------------------------------------

    def _add(self, kind: str, **settings) -> str:
        return self.store.add(kinds.payload(kind, **settings))

    def _source(self, name: str, where: str) -> str:
        if name not in self._sources:
            spec = self.spec.sources.get(name)
            if spec is None:
                raise NemoflowError(f"{self.file}: {where}: no source {name!r}{_near(name, self.spec.sources)}")
            if isinstance(spec, grammar.Generated):
                try:
                    check_arguments(spec.generator, spec.args)
                except NemoflowError as error:
                    raise NemoflowError(f"{self.file}: sources.{name}.args: {error}") from None
                defaults = arguments(spec.generator)
                args = {k: v for k, v in spec.args.items() if v != defaults[k]}
                settings = spec.model_dump() | {"args": args}
                self._sources[name] = self._add("source", python=self._python, **settings)
            else:
                settings = spec.model_dump(exclude={"files"})
                self._sources[name] = self._pinned("source", f"sources.{name}", spec.files, **settings)
        return self._sources[name]

    def _pinned(self, kind: str, key: str, pattern: str, **settings) -> str:
        identity = self._add(kind, files=self.locks.files(key, pattern, self.file), **settings)
        self.paths[identity] = self.locks.paths[key]
        return identity

    def _tokenizer(self) -> str:
        spec = self.spec.tokenizer
        if isinstance(spec, grammar.LocalTokenizer):
            return self._pinned("tokenizer", "tokenizer", spec.files)
        sources = [self._source(s, f"tokenizer.train_on[{i}]") for i, s in enumerate(spec.train_on)]
        return self._add("tokenizer", sources=sources, vocab_size=spec.vocab_size, chat_template=spec.chat_template)

    def _data(self, spec: grammar.Stage) -> str:
        where = f"stages[{spec.name}].data"
        match spec:
            case grammar.Pretrain():
                total = sum(map(Fraction, spec.data.blend.values()))
                if total != 1:
                    raise NemoflowError(f"{self.file}: {where}.blend: the shares add up to {total}, not to 1")
                parts = []
                for name, share in spec.data.blend.items():
                    shards = self._add(
                        "shards",
                        source=self._source(name, f"{where}.blend"),
                        tokenizer=self.tokenizer,
                        valid=spec.data.valid,
                        test=spec.data.test,
                    )
                    parts.append({"shards": shards, "share": share})
                # Sorted: the order of the keys in a recipe's mapping means nothing.
                return self._add("blend", parts=sorted(parts, key=lambda part: part["shards"]))
            case grammar.Sft():
                parts = [
                    {"source": self._source(name, f"{where}.chats"), **({"repeat": repeat} if repeat != 1 else {})}
                    for name, repeat in spec.data.chats.items()
                ]
                settings = spec.data.model_dump(exclude={"chats"})
                parts.sort(key=lambda part: part["source"])
                return self._add("chats", parts=parts, tokenizer=self.tokenizer, **settings)
            case grammar.Rl():
                sources = [self._source(name, f"{where}.prompts") for name in spec.data.prompts]
                return self._add("prompts", sources=sources, valid=spec.data.valid)

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
        identity = self._add(
            spec.kind,
            engine=spec.engine,
            function=getattr(spec, "function", None),
            algorithm=getattr(spec, "algorithm", None),
            overrides={k: v for k, v in overrides.items() if not driver.outside(k)},
            tokenizer=self.tokenizer,
            data=self._data(spec),
            horizon=horizon,
            init=init,
            version=spec.version,
        )
        trained = Trained(spec, driver, overrides, self.store.load(identity), start, until, horizon)
        trained.wanted = {until, *spec.milestones}
        self.stages[spec.name] = trained
        return trained

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
        if stage and stage not in self.stages:
            raise NemoflowError(f"{name}: {self.file} has no stage {stage!r}{_near(stage, self.stages)}")
        if kind == "data":
            if at:
                raise NemoflowError(f"{name}: data has no states; write data/{self.name}@STAGE")
            shown = {n: Target(self.store.load(t.stage.payload["data"])) for n, t in self.stages.items()}
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
        found += [f"data/{self.name}@{stage}" for stage in self.stages]
        for kind in kinds.TRAINED:
            stages = [name for name, t in self.stages.items() if t.spec.kind == kind]
            found += [f"{kind}/{self.name}"] if stages else []
            found += [f"{kind}/{self.name}@{stage}" for stage in stages] if len(stages) > 1 else []
            found += [f"{kind}/{self.name}@{s}:{m}" for s in stages for m in self.stages[s].spec.milestones]
        return [*found, *(f"hf_export/{self.name}@{stage}" for stage in self.stages), f"hf_export/{self.name}"]


def _near(word: str, known) -> str:
    close = difflib.get_close_matches(word, list(known), 1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(known)}"
