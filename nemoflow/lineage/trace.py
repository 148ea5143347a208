"""`nemoflow trace NAME...`: what artifacts were made from, as a tree down to raw files, from their records alone."""

import json
from collections.abc import Iterator

from nemoflow import summary
from nemoflow.lineage import Artifact, Key, Lineage, address, found, load
from nemoflow.progress import human
from nemoflow.session import Session

GROUP = 5
"""Alike inputs of one artifact from this many on are told in one line."""


def run(names: list[str], session: Session, files: bool, as_json: bool, each: bool = False) -> None:
    """Print the lineage of the names; `files` lists every raw file, `each` every artifact. What is missing is said, and
    is no error.

    Raises NemoflowError for names that are none, unfinished artifacts, and damaged records.
    """
    lineage = load(*(directory for name in names for directory in found(name, session)))
    print(json.dumps(described(lineage), indent=2, ensure_ascii=False) if as_json else tree(lineage, files, each))


def described(lineage: Lineage) -> dict:
    """The lineage as data: artifacts, inputs first, with what made them; every raw file; what is missing."""
    return {
        "roots": [lineage.artifacts[key].address for key in lineage.roots],
        "artifacts": [
            {"address": artifact.address, "record": artifact.record, **({"made_with": made} if made else {})}
            for artifact in lineage.artifacts.values()
            for made in [made_with(artifact)]
        ],
        "raw_files": [
            {"artifact": artifact.address, **origin(artifact), **file}
            for artifact in lineage.artifacts.values()
            for file in raw_files(artifact)
        ],
        "missing": [address(entry) for entry, _ in lineage.missing.values()],
    }


def tree(lineage: Lineage, files: bool = False, each: bool = False) -> str:
    """The lineage for people: each artifact above what it was made from, in full where it stands first.

    Shards of one source, and other inputs that differ only in their part of it, are one line unless `each` is told.
    """
    lines: list[str] = []
    seen: set[Key] = set()
    stack: list[tuple[int, str, list[Key]]] = [(0, "", [key]) for key in reversed(lineage.roots)]
    while stack:
        depth, role, (key, *others) = stack.pop()
        indent, said = "  " * depth, f"{role}: " if role else ""
        if others:
            lines.append(f"{indent}{said}{_alike_text(lineage, [key, *others])}")
            seen |= {key, *others}
            inputs = reversed(list(lineage.artifacts[key].inputs()))
            stack += [(depth + 1, role, [upstream]) for role, upstream in inputs]
            continue
        artifact = lineage.artifacts.get(key)
        if artifact is None:
            lines.append(f"{indent}{said}{address(lineage.missing[key][0])}: missing")
            continue
        if key in seen:
            lines.append(f"{indent}{said}{artifact.address} (above)")
            continue
        seen.add(key)
        told = ", ".join(filter(None, (summary.line(artifact.record), _origin_text(artifact), _made_text(artifact))))
        lines.append(f"{indent}{said}{artifact.address}" + (f": {told}" if told else ""))
        if files:
            lines += [f"{indent}  {_file_text(file)}" for file in raw_files(artifact)]
        alone = ((role, [upstream]) for role, upstream in artifact.inputs())
        below = list(alone if each else _alike(artifact, lineage, seen))
        stack += [(depth + 1, role, keys) for role, keys in reversed(below)]
    return "\n".join([*lines, *lineage.gaps()])


def _alike(artifact: Artifact, lineage: Lineage, seen: set[Key]) -> Iterator[tuple[str, list[Key]]]:
    """(role, artifacts) of an artifact's inputs: together those of one role and kind made from the same ones."""
    groups: dict[tuple, list[Key]] = {}
    for role, key in artifact.inputs():
        upstream = lineage.artifacts.get(key)
        if upstream is None or key in seen or not upstream.record["inputs"]:
            groups[role, key] = [key]
        else:
            groups.setdefault((role, upstream.kind, *upstream.inputs()), []).append(key)
    for (role, *_), keys in groups.items():
        yield from [(role, keys)] if len(keys) >= GROUP else [(role, [key]) for key in keys]


def _alike_text(lineage: Lineage, keys: list[Key]) -> str:
    """Such as: 1,204 shards of source/web-en-0123456789ab, 5,000,000 tokens; of the first input, else of the label."""
    members = [lineage.artifacts[key] for key in keys]
    first = members[0]
    of = next((lineage.artifacts[key].address for _, key in first.inputs() if key in lineage.artifacts), None)
    said = {summary.line(one.record) for one in members}
    counts = [count for one in members if (count := summary.tokens(one.record)) is not None]
    # Where nothing is counted, what they say if they all say the same
    told = [f"{sum(counts):,} tokens"] if counts else sorted(filter(None, said)) if len(said) == 1 else []
    told += dict.fromkeys(filter(None, map(_made_text, members)))
    return ", ".join([f"{len(members):,} {first.kind} of {of or first.record['label']}", *told])


def origin(artifact: Artifact) -> dict:
    """Where an artifact that is made from no other comes from: repository and commit, or the generator's settings."""
    payload = artifact.record["payload"]
    if isinstance(hub := payload.get("hub") or payload.get("model"), dict) and hub:
        return {k: hub[k] for k in ("repo", "config", "split", "commit") if hub.get(k) is not None}
    if artifact.kind != "source":
        return {}
    return {k: payload[k] for k in ("generator", "args", "seed", "shards", "python") if k in payload}


def raw_files(artifact: Artifact) -> list[dict]:
    """The files pinned from outside, as the payload has them: path where known, size in bytes, digest."""
    pinned = artifact.record["payload"].get("files", [])
    return [file for file in pinned if isinstance(file, dict)] if artifact.kind in ("source", "tokenizer") else []


def made_with(artifact: Artifact) -> dict:
    """Code revisions and images of the attempts that made it; empty where no record of them is kept."""
    attempts = artifact.beside("run.json").get("attempts", [])
    code = [a["code"] for a in attempts if a.get("code")]
    images = [a.get("image") for a in attempts] or []
    images.append(artifact.beside("launch.json").get("cluster", {}).get("image"))
    kept = {
        "code": [f"{c['commit']}{' with changes' if c.get('dirty') else ''}" for c in code],
        "images": [image if isinstance(image, str) else json.dumps(image) for image in images if image],
    }
    return {name: list(dict.fromkeys(found)) for name, found in kept.items() if found}


def _made_text(artifact: Artifact) -> str:
    made = made_with(artifact)
    code = [f"{c[:12]}{c[40:]}" for c in made.get("code", [])]
    return "; ".join([*(["code " + ", ".join(code)] if code else []), *made.get("images", [])])


def _origin_text(artifact: Artifact) -> str:
    files, told = raw_files(artifact), origin(artifact)
    said = " ".join(f"{k} {json.dumps(v) if isinstance(v, dict) else v}" for k, v in told.items())
    size = sum(file.get("size", 0) for file in files)
    return ", ".join(filter(None, (said, f"{len(files):,} raw files of {human(size)}" if files else "")))


def _file_text(file: dict) -> str:
    digest = next((f"{a}:{file[a]}" for a in ("sha256", "git_sha1", "blake3") if a in file), "no digest")
    return f"{digest}  {file.get('size', 0):,} B  {file.get('path', '')}".rstrip()
