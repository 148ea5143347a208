"""`nemoflow graph NAME -o lineage.html`: the lineage as one page that opens anywhere, without a network.

Artifacts are nodes, in a box for each training stage and one for the data they share, coloured by state. Everything
that a click shows is inside the page, and so are the libraries that draw it (page/vendor).
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from nemoflow import kinds, summary, training
from nemoflow.errors import NemoflowError
from nemoflow.lineage import Lineage, address, found, load
from nemoflow.store import read_json, write_atomically

if TYPE_CHECKING:  # the charts of model cards are drawn in a container, which has nothing that recipes are read with
    from nemoflow.session import Session

PAGE = Path(__file__).parent / "page"

GROUP = 5
"""Alike artifacts from this many on are drawn as one; page.js has the same number."""

POINTS = 300
"""At most so many points of a curve are in the page."""

FILES = 40
"""At most so many files of one artifact are in the page; all of them are counted."""

ATTEMPTS = 20
"""At most so many attempts, the newest."""

SHARED = "data"
"""The box of what several training stages come from."""

COMPLETE, RUNNING, STOPPED, MISSING = "complete", "running", "stopped", "missing"
"""State of an artifact: sealed; being worked on; begun and not worked on; not begun."""


@dataclass
class Node:
    """An artifact, finished or not. `directory` holds its sealed.json; `own` its run.json: the trajectory's for states.

    inputs: (role, key) of the artifacts it is made from.
    """

    key: str
    payload: dict
    label: str
    directory: Path
    at: int | None = None
    title: str = ""
    record: dict | None = None
    inputs: list[tuple[str, str]] = field(default_factory=list)

    @property
    def kind(self) -> str:
        return self.payload["kind"]

    @property
    def own(self) -> Path:
        return self.directory.parent if self.at is not None else self.directory


def key(identity: str, at: int | None) -> str:
    """A node's name: an identity, and for a state its iteration."""
    return identity if at is None else f"{identity}:{at}"


def planned(session: "Session") -> list[Node]:
    """The lineage of a session's names, as today's recipes have it, inputs before what consumes them."""
    nodes: dict[str, Node] = {}
    for view in session.names.values():
        for target in view.values():
            for stage, at in session.store.ancestors(target.stage.identity, target.at):
                if (name := key(stage.identity, at)) not in nodes:
                    nodes[name] = Node(
                        name,
                        stage.payload,
                        stage.label,
                        stage.state(at),
                        at,
                        session.title(stage.identity, at),
                        stage.sealed(at),
                        [(ref.role, key(ref.identity, ref.at)) for ref in kinds.inputs(stage.payload)],
                    )
    return list(nodes.values())


def kept(lineage: Lineage) -> list[Node]:
    """The lineage that records tell, inputs before what consumes them; what is missing is a node without a record."""
    nodes = {}
    for (identity, at), (entry, _) in lineage.missing.items():
        name = key(identity, at)
        nodes[name] = Node(name, {"kind": entry["kind"]}, entry["label"], Path(address(entry)), at)
    for (identity, at), artifact in lineage.artifacts.items():
        name, record = key(identity, at), artifact.record
        inputs = [(role, key(*upstream)) for role, upstream in artifact.inputs()]
        directory = artifact.directory or Path(artifact.address)
        node = nodes[name] = Node(name, record["payload"], record["label"], directory, at, "", record, inputs)
        if title := beside(node.own / "launch.json").get("title"):
            node.title = f"{title} to {at}" if at is not None else title
    return list(nodes.values())


def told(records: list[dict]) -> list[Node]:
    """Artifacts by their records alone, inputs before what consumes them; inputs without a record are left out."""
    nodes: dict[str, Node] = {}
    for record in records:
        name = key(record["identity"], record.get("at"))
        inputs = [(entry["role"], key(entry["identity"], entry.get("at"))) for entry in record["inputs"]]
        place = Path(f"{record['kind']}/{record['label']}-{record['identity']}")
        nodes[name] = Node(name, record["payload"], record["label"], place, record.get("at"), "", record)
        nodes[name].inputs = [(role, upstream) for role, upstream in inputs if upstream in nodes]
    return list(nodes.values())


def asked(names: list[str], session: "Session") -> list[Node]:
    """The lineage of names, inputs before what consumes them: as today's recipes have it, finished or not; where there
    is no such recipe, and for directories, as the records there tell it.

    Raises NemoflowError for a name that is neither, and for what is wrong with recipes and records.
    """
    directories = []
    for name in names:
        recipe = re.split("[@:]", name.partition("/")[2])[0]
        if not (recipe and any((place / f"{recipe}.yaml").exists() for place in session.directories)):
            directories += found(name, None)
        elif not session.resolve([name]):
            directories += found(name, session)
    nodes = {node.key: node for node in planned(session)}
    for node in kept(load(*directories)):
        nodes.setdefault(node.key, node)
    return list(nodes.values())


def write(nodes: list[Node], title: str, out: Path | None, form: Callable[[list[Node]], str] | None) -> None:
    """Print or write what `nemoflow graph` was asked for: the page, or with a `form` (mermaid, described) that."""
    if out is None and form:
        print(form(nodes))
        return
    out = out or Path("lineage.html")
    try:
        write_atomically(out, form(nodes) + "\n" if form else page(nodes, title))
    except OSError as error:
        raise NemoflowError(f"{out}: cannot be written: {error.strerror}") from None
    print(f"wrote {out}: {len(nodes):,} artifacts")


def described(nodes: list[Node]) -> str:
    """The artifacts as JSON, inputs before what consumes them: title, state, place and inputs, by their keys."""
    boxes, titles = _boxes(nodes)
    rows = [
        {
            "key": node.key,
            "title": _title(node),
            "kind": node.kind,
            "label": node.label,
            "at": node.at,
            "state": _state(node),
            "stage": titles[boxes[node.key]],
            "directory": str(node.directory),
            "inputs": [{"role": role, "key": name} for role, name in node.inputs],
        }
        for node in nodes
    ]
    return json.dumps({"artifacts": rows}, indent=2, ensure_ascii=False)


def page(nodes: list[Node], title: str) -> str:
    """The page of these artifacts, inputs before what consumes them."""
    boxes, titles = _boxes(nodes)
    runs, curves = cache(attempts), cache(_curves)
    index = {node.key: i for i, node in enumerate(nodes)}
    data = {
        "title": title,
        "boxes": titles,
        "nodes": [
            _shown(node, runs(node.own), curves(node.own) if node.kind in kinds.TRAINED else {})
            | {
                "box": boxes[node.key],
                "inputs": [[role, index[name], _behind(role, node.kind)] for role, name in node.inputs],
            }
            for node in nodes
        ],
    }
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    whole = (PAGE / "page.html").read_text(encoding="utf-8")
    for name in ("vendor/LICENSE.dagre", "vendor/cytoscape.min.js", "vendor/dagre.min.js", "page.css", "page.js"):
        content = (PAGE / name).read_text(encoding="utf-8").replace("//# sourceMappingURL=dagre.min.js.map", "")
        whole = whole.replace(f"{{{{{name}}}}}", content)
    return whole.replace("{{title}}", _escaped(title)).replace("{{data}}", text)


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")


def _behind(role: str, kind: str) -> bool:
    """Whether an arrow would only hide the chain: of the later kinds the tokenizer, and of merges the source, stand
    behind their other inputs."""
    return (role == "tokenizer" and kind != "shards") or (role == "source" and kind == "merge")


def mermaid(nodes: list[Node]) -> str:
    """The artifacts, inputs before what consumes them, as a mermaid flowchart in human names.

    From GROUP on, artifacts of one kind that the same ones are made from are drawn as one, as the page draws them.
    """
    place = {node.key: i for i, node in enumerate(nodes)}
    readers: list[list[int]] = [[] for _ in nodes]
    depth = [0] * len(nodes)
    for i in reversed(range(len(nodes))):
        for role, name in nodes[i].inputs:
            depth[place[name]] = max(depth[place[name]], depth[i] + 1)
            if not _behind(role, nodes[i].kind):
                readers[place[name]].append(i)
    drawn = [""] * len(nodes)
    titles: dict[str, str] = {}
    for level in range(max(depth, default=-1) + 1):
        alike: dict[tuple, list[int]] = {}
        for i in (i for i, d in enumerate(depth) if d == level):
            alike.setdefault((nodes[i].kind, *sorted({drawn[r] for r in readers[i]})), []).append(i)
        for members in alike.values():
            together = [members] if len(members) >= GROUP else [[i] for i in members]
            for shown in together:
                first = nodes[shown[0]]
                name = "s" + first.key.replace(":", "_")
                said = [_title(nodes[i]) for i in shown]
                titles[name] = said[0] if len(shown) == 1 else f"{_common(said, first.kind)}: {len(shown):,} artifacts"
                for i in shown:
                    drawn[i] = name
    edges: dict[str, None] = {}
    for i, node in enumerate(nodes):
        for role, name in node.inputs:
            if not _behind(role, node.kind):
                edges[f"    {drawn[place[name]]} --> {drawn[i]}"] = None
    shown = [f'    {name}["{titles[name]}"]' for name in dict.fromkeys(drawn)]
    return "\n".join(["flowchart TD", *shown, *edges])


def _title(node: Node) -> str:
    """What people call an artifact; its kind and label where no recipe's name for it is known."""
    said = node.title or f"{node.kind} {node.label}" + (f" to {node.at}" if node.at is not None else "")
    return said.replace('"', "'")


def _beginning(texts: list[str]) -> str:
    first, last = min(texts), max(texts)
    return first[: next((i for i, pair in enumerate(zip(first, last, strict=False)) if len(set(pair)) > 1), len(first))]


def _common(titles: list[str], kind: str) -> str:
    """What titles such as "shards of web, job 3 of 90" begin with alike; the kind where that is less than two words."""
    shared = re.sub(r",? job \d*$", "", _beginning(titles)).rstrip(" 0123456789,:.-")
    return shared if " " in shared else kind


def _boxes(nodes: list[Node]) -> tuple[dict[str, str], dict[str, str]]:
    """Key of an artifact -> its box, and box -> title: one for each trajectory, with what is made for it or of it."""
    consumers: dict[str, list[Node]] = {node.key: [] for node in nodes}
    for node in nodes:
        for _, name in node.inputs:
            consumers[name].append(node)
    boxes: dict[str, str] = {}
    titles = {SHARED: "shared data"}
    for node in nodes:  # forward: what is derived stays with what it is derived of
        if node.kind in (*kinds.TRAINED, "import", "average", "select"):
            name = boxes[node.key] = node.key.partition(":")[0]
            titles[name] = _title(node).partition(" to ")[0]
        elif node.kind in ("hf_export", "eval") and (
            of := next((boxes[n] for _, n in node.inputs if n in boxes), None)
        ):
            boxes[node.key] = of
    for node in reversed(nodes):  # backward: data goes with its only reader
        if node.key not in boxes:
            readers = {boxes[c.key] for c in consumers[node.key]}
            boxes[node.key] = readers.pop() if len(readers) == 1 else SHARED
    return boxes, {name: text for name, text in titles.items() if name in boxes.values()}


def _state(node: Node) -> str:
    if node.record is not None:
        return COMPLETE
    lock = node.own / "lock"
    if lock.exists() and lock.stat().st_size:
        return RUNNING
    return STOPPED if (node.own / "run.json").exists() else MISSING


def _shown(node: Node, attempts: list[dict], curves: dict) -> dict:
    """What the page says of an artifact."""
    contents = (node.record or {}).get("contents", [])
    state = _state(node)
    if node.at is not None:
        attempts = [a for a in attempts if a.get("at", node.at) == node.at] or attempts
    return {
        "key": node.key,
        "kind": node.kind,
        "label": node.label,
        "title": _title(node),
        "at": node.at,
        "state": state,
        "path": str(node.directory),
        "payload": _brief({k: v for k, v in node.payload.items() if k != "kind"}),
        "measures": _brief((node.record or {}).get("measures", {})),
        "said": summary.line(node.record) if node.record else "",
        "tokens": summary.tokens(node.record) if node.record else None,
        "files": [_file(entry) for entry in contents[:FILES]],
        "count": len(contents),
        "bytes": sum(entry["size"] for entry in contents),
        "attempts": attempts[-ATTEMPTS:],
        "curves": {name: [p for p in points if node.at is None or p[0] <= node.at] for name, points in curves.items()},
    }


def _file(entry: dict) -> list:
    algorithm = next((a for a in ("sha256", "blake3") if a in entry), None)
    return [entry["name"], entry["size"], f"{algorithm}:{entry[algorithm]}" if algorithm else ""]


def _brief(value: object, limit: int = 8) -> object:
    """A value with its long lists and texts cut, and told so: a source may name ten thousand files."""
    match value:
        case dict():
            kept = {k: _brief(v, limit) for k, v in list(value.items())[: 10 * limit]}
            return kept | ({"…": f"{len(value)} in all"} if len(value) > len(kept) else {})
        case list():
            kept = [_brief(v, limit) for v in value[:limit]]
            return kept + ([f"… {len(value):,} in all"] if len(value) > limit else [])
        case str() if len(value) > 600:
            return f"{value[:600]}… {len(value):,} characters"
    return value


def beside(path: Path) -> dict:
    """A record of how it went, for a picture: what is missing or damaged is left out."""
    try:
        return read_json(path) if path.exists() else {}
    except NemoflowError:
        return {}


def attempts(own: Path) -> list[dict]:
    """The attempts at an artifact or a training, with the GPU-hours of those on GPUs."""
    found = []
    for attempt in beside(own / "run.json").get("attempts", []):
        hours = summary.gpu_hours([attempt])
        told = {k: v for k, v in attempt.items() if k not in ("versions", "pid")}
        found.append(told | ({} if hours is None else {"gpu_hours": round(hours, 2)}))
    return found


def _curves(own: Path) -> dict[str, list]:
    """Name -> [[iteration, value], ...] of a trajectory's metrics, thinned to POINTS."""
    try:
        found = training.metrics(own / "metrics.jsonl")
    except (ValueError, KeyError):
        return {}
    series: dict[str, list] = {}
    for name in ("loss", "valid_loss", "reward", "accuracy"):
        points = [[n, float(f"{found[n][name]:.5g}")] for n in sorted(found) if found[n].get(name) is not None]
        step = -(-len(points) // POINTS)
        if points:
            series[name] = [*points[:-1:step], points[-1]] if len(points) > 1 else points
    return series
