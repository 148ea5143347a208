"""Archives of any size: sealed records as the workflow writes them, without the data behind them."""

import hashlib
import itertools
from pathlib import Path

from nemoflow import kinds
from nemoflow.store import Store, dump, record


class Archive:
    """A store in which artifacts are sealed without being made."""

    def __init__(self, path: Path):
        self.store = Store(path / "artifacts")
        self._count = itertools.count()

    def seal(self, kind: str, at: int | None = None, measures: dict | None = None, **settings) -> str:
        """Seal an artifact of this payload; returns its identity."""
        identity = self.store.add(kinds.payload(kind, **settings))
        stage = self.store.load(identity)
        directory = stage.state(at)
        directory.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256(str(next(self._count)).encode()).hexdigest()
        text = dump(record(stage, at, measures or {}, [{"name": "files/00000.bin", "size": 1000, "sha256": digest}]))
        for name in ("sealed.json", "artifact.json"):
            (directory / name).write_text(text, encoding="utf-8")
        return identity

    def directory(self, identity: str, at: int | None = None) -> Path:
        """Where an artifact lies."""
        return self.store.load(identity).state(at)


def pretraining(path: Path, sources: int, shards: int) -> tuple[Archive, Path]:
    """A pretraining and its export from `sources` sources, each tokenized in `shards` jobs; and the export's place."""
    archive = Archive(path)
    pinned = {"repo": "org/tokenizer", "commit": "0" * 40}
    tokenizer = archive.seal("tokenizer", hub=pinned, files=[])
    merges = []
    for number in range(sources):
        hub = {"repo": f"org/web-{number:03d}", "commit": f"{number:040x}"}
        source = archive.seal("source", measures={"documents": 50}, hub=hub, format="parquet", files=[])
        parts = [
            archive.seal(
                "shards",
                measures={"shards": [{"documents": 5, "tokens": 1000}]},
                source=source,
                tokenizer=tokenizer,
                first=first,
                shards=[[[0, first, first + 1]]],
            )
            for first in range(shards)
        ]
        merges.append(archive.seal("merge", measures={"tokens": 1000 * shards}, parts=parts, source=source))
    shares = [{"source": f"web-{number:03d}", "share": f"1/{sources}"} for number in range(sources)]
    parts = [{"merge": merge, "share": f"1/{sources}"} for merge in merges]
    blend = archive.seal("blend", measures={"parts": shares}, parts=parts)
    index = archive.seal("index", data=blend, tokenizer=tokenizer, samples=1000)
    trained = archive.seal(
        "pretrain",
        at=100,
        measures={"iterations": 100, "loss": 2.5, "tokens": 10**6},
        engine="megatron_bridge",
        function="recipes.nemotron_3_nano_pretrain_config",
        overrides={"optimizer.lr": 0.001},
        data=index,
        tokenizer=tokenizer,
        horizon=100,
    )
    export = archive.seal(
        "hf_export",
        measures={"parameters": 10**6},
        engine="megatron_bridge",
        of={"trajectory": trained, "at": 100},
        tokenizer=tokenizer,
    )
    return archive, archive.directory(export)
