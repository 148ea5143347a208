"""How fast chats become packed training data: python -m benchmarks.chats [--chats N] [--template FILE]

Chats of about 5.7 KB made from the text of what is installed (the standard library, /usr/share/doc): several turns, a
quarter with thoughts written down, a quarter with tools; a tokenizer of 131,072 ids; one process. Prints MB of chat
JSON per CPU-second of the whole of chats.make, without and with what importing takes; then fill and speed of packing
alone, on a million lengths.

NEMOTRON=CHECKOUT of github.com/NVIDIA-NeMo/Nemotron runs the cores of its chat_sft stage beside it, on the fewest chats
asked for, with the same template, which then is its own nano3 unless --template says otherwise. Loading its tokenizer
is not counted; ours is.
"""

import argparse
import inspect
import itertools
import json
import logging
import os
import random
import re
import resource
import sys
import sysconfig
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.corpus import texts, write_tokenizer
from benchmarks.data import measured
from nemoflow import kinds
from nemoflow.data.pack import best_fit
from nemoflow.data.packed import WINDOW
from nemoflow.store import Store, file_digest, seal

TEMPLATES = Path(__file__).resolve().parents[1] / "nemoflow/data/templates"
PACK_SIZE = 4096
_CONTROL = ["<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>"]
_SPELLS = re.compile(r"<|\[[A-Z/]|# Tools")
"""What might be a control token, or a declaration of tools that is none."""


def paragraphs() -> Iterator[str]:
    """Paragraphs of the installed documentation and code, each once, in an order that mixes what is alike."""
    roots = [Path("/usr/share/doc"), Path(sysconfig.get_paths()["stdlib"])]
    found: dict[str, None] = {}
    for content in itertools.chain.from_iterable(texts(root) for root in roots if root.is_dir()):
        for text in re.split(r"\n\s*\n", content.decode()):
            if 40 <= len(text) <= 2000 and not _SPELLS.search(text):
                found.setdefault(text.strip())
    chosen = sorted(found)
    random.Random(0).shuffle(chosen)
    return itertools.cycle(chosen)


def chats(count: int) -> Iterator[dict]:
    """Rows in OpenAI's form."""
    draw, text = random.Random(1), paragraphs()

    def said(characters: float) -> str:
        parts = [next(text)]
        wanted = draw.lognormvariate(np.log(characters), 0.6)
        while sum(map(len, parts)) < wanted:
            parts.append(next(text))
        return "\n\n".join(parts)[: int(wanted) + 40]

    for number in range(count):
        thinks, calls = number % 4 == 1, number % 4 == 2
        row = {"messages": [{"role": "system", "content": said(150)}] if draw.random() < 0.5 else []}
        if calls:
            properties = {name: {"type": "string", "description": said(60)} for name in ("path", "query")}
            parameters = {"type": "object", "properties": properties, "required": ["query"]}
            function = {"name": "look_up", "description": said(80), "parameters": parameters}
            row["tools"] = [{"type": "function", "function": function}]
        for _ in range(draw.choice((1, 2, 3, 4))):
            row["messages"].append({"role": "user", "content": said(300)})
            if calls:
                arguments = json.dumps({"path": "/usr/share/doc", "query": said(60)})
                call = {"id": f"{number}", "type": "function", "function": {"name": "look_up", "arguments": arguments}}
                row["messages"].append({"role": "assistant", "content": "", "tool_calls": [call]})
                row["messages"].append({"role": "tool", "tool_call_id": f"{number}", "content": said(500)})
            answer = {"role": "assistant", "content": said(950)}
            row["messages"].append(answer | ({"reasoning_content": said(800)} if thinks else {}))
        yield row


def write_inputs(work: Path, count: int, template: Path) -> None:
    """Write chats.jsonl and the tokenizer, with the control tokens of chats and the template, below `work`."""
    with (work / "chats.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in chats(count))
    tokenizer = work / "tokenizer"
    write_tokenizer(tokenizer)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        content = (tokenizer / name).read_text(encoding="utf-8")
        for number, token in enumerate(_CONTROL):
            content = content.replace(f"<SPECIAL_{20 + number}>", token)
        content = content.replace('"eos_token": "</s>"', '"eos_token": "<|im_end|>"')
        (tokenizer / name).write_text(content, encoding="utf-8")
    (tokenizer / "chat_template.jinja").write_text(template.read_text(encoding="utf-8"), encoding="utf-8")


def _seconds() -> float:
    """CPU-seconds of this process and of its children that ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def ours(work: Path) -> dict:
    """chats.make as a job calls it; {"seconds" of the call, and what it measured}."""
    from nemoflow.data import chats as kind
    from nemoflow.data.made import Made

    store, made = Store(work / "store"), {}
    tokenizer = [work / "tokenizer" / n for n in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")]
    for name, paths, more in (
        ("tokenizer", tokenizer, {}),
        ("source", [work / "chats.jsonl"], {"format": "jsonl"}),
    ):
        entries = [{"size": path.stat().st_size, "sha256": file_digest(path)} for path in paths]
        stage = store.load(store.add(kinds.payload(name, files=entries, **more)))
        names = [path.name if name == "tokenizer" else "files/00000.jsonl" for path in paths]
        for inside, path in zip(names, paths, strict=True):
            (target := stage.directory / inside).parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(path)
        contents = [{"name": inside, **entry} for inside, entry in zip(names, entries, strict=True)]
        seal(stage, None, {"vocab_size": 131072, "eod": 2}, contents)
        made[name] = stage
    settings = {
        "pack_size": PACK_SIZE,
        "valid": "0",
        "too_long": "truncate",
        "parts": [{"source": made["source"].identity}],
    }
    payload = kinds.complete(kinds.payload("chats", tokenizer=made["tokenizer"].identity, **settings))
    inputs = {"sources": [made["source"].directory], "tokenizer": made["tokenizer"].directory}
    (out := work / "packed").mkdir()
    offered = {"threads": 1, "launch": {}}
    more = {key: offered[key] for key in offered.keys() & inspect.signature(kind.make).parameters.keys()}
    begun = _seconds()
    told = kind.make(payload, inputs, out, lambda _: None, **more)
    return {"seconds": _seconds() - begun, "measures": told.measures if isinstance(told, Made) else told}


def nemotron(work: Path) -> dict:
    """The two cores of Nemotron's chat_sft stage, their packages' own __init__ (Ray, W&B) left out."""
    base = Path(os.environ["NEMOTRON"]) / "src"
    for name in ("nemotron", *(f"nemotron.data_prep{part}" for part in ("", ".core", ".packing", ".utils"))):
        package = types.ModuleType(name)
        package.__path__ = [str(base / name.replace(".", "/"))]
        sys.modules[name] = package
    from fsspec.implementations.local import LocalFileSystem
    from nemotron.data_prep.core import chat_sft_shard_core as core
    from transformers import AutoTokenizer

    logging.disable()
    tokenizer = AutoTokenizer.from_pretrained(work / "tokenizer")
    common = {"shard_index": 0, "output_dir": str(work / "peer"), "spool_dir": str(work / "peer/spool")}
    common |= {"output_fs": LocalFileSystem(), "pack_size": PACK_SIZE, "algorithm": "first_fit_shuffle"}
    common |= {"dtype": np.dtype("int32"), "seed": 0}
    path = work / "chats.jsonl"
    files = [{"path": str(path), "local_path": str(path), "size": path.stat().st_size}]
    begun = _seconds()
    core.process_chat_sft_spool_core(
        files=files,
        receipts_dir=str(work / "peer/receipts"),
        tokenizer=tokenizer,
        messages_field="messages",
        tools_field="tools",
        chat_template=str(work / "tokenizer/chat_template.jinja"),
        max_doc_tokens=None,
        max_rows=None,
        used_in_filter=None,
        used_in_field="used_in",
        **common,
    )
    stats, _ = core.process_chat_sft_parquet_from_spool_core(**common)
    return {"seconds": _seconds() - begun, "measures": {k: v for k, v in stats.items() if isinstance(v, (int, float))}}


def packing(count: int = 1_000_000) -> None:
    """Print fill and speed of packing lengths like those of chats: short ones, and one in seven long."""
    draw = np.random.default_rng(0)
    long = draw.random(count) < 0.15
    lengths = np.where(long, draw.lognormal(8, 1, count), draw.lognormal(6.2, 0.9, count)).astype(np.int64)
    print(
        f"packing {count:,} sequences of {lengths.mean():.0f} tokens on average, {np.median(lengths):.0f} in the middle"
    )
    fit = best_fit(count)
    fit(np.clip(lengths[:1000], 2, 64), 64)  # compiles
    window = WINDOW // int(lengths.mean())  # as many as chats.make packs at a time
    for size in (4096, 8192, 32768):
        clipped = np.clip(lengths, 2, size)
        begun = _seconds()
        packs = sum(len(fit(clipped[at : at + window], size)[1]) for at in range(0, count, window))
        speed = count / (_seconds() - begun)
        fill = clipped.sum() / (packs * size)
        print(f"  {size:6}: {fill:.3%} full, {speed / 1e6:.1f} million sequences/CPU-s")


def _run(tool: str, work: Path) -> dict:
    """Run a tool in a process of its own; what it says of itself, and "cpu" and "peak" of the process."""
    command = [sys.executable, "-m", "benchmarks.chats", "--only", tool, "--work", work]
    done = measured(command, PYTHONPATH=str(TEMPLATES.parents[2]))
    told = json.loads(done["output"].splitlines()[-1]) | {"cpu": done["cpu"]}
    size = (work / "chats.jsonl").stat().st_size / 1e6
    print(
        f"  {tool}: {told['seconds']:.2f} CPU-s, {size / told['seconds']:.2f} MB/CPU-s; with imports "
        f"{done['cpu']:.2f} CPU-s, {size / done['cpu']:.2f} MB/CPU-s; {done['peak'] / 1e6:.0f} MB memory"
    )
    print(f"    {json.dumps(told['measures'])}", flush=True)
    return told


def _template(parser: argparse.ArgumentParser, given: Path | None, peer: str | None) -> Path:
    """The template to use: the one asked for, the peer's, or the bundled one that writes tools and thoughts."""
    if given:
        return given
    if peer:
        return Path(peer) / "src/nemotron/data_prep/templates/nano3.jinja"
    for path in sorted(TEMPLATES.glob("*.jinja")):
        if "reasoning_content" in path.read_text(encoding="utf-8"):
            return path
    return parser.error(f"{TEMPLATES}: no template there writes thoughts; give one with --template")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chats", type=int, nargs="+", default=[2000, 10_000], help="how many (default: 2000 10000)")
    parser.add_argument("--template", type=Path, help="chat template (default: the bundled one with tools)")
    parser.add_argument("--only", choices=["ours", "nemotron"], help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print(json.dumps({"ours": ours, "nemotron": nemotron}[args.only](args.work)))
        return
    peer = os.environ.get("NEMOTRON")
    template = _template(parser, args.template, peer)
    points = []
    for count in sorted(args.chats):
        with tempfile.TemporaryDirectory() as directory:
            work = Path(directory)
            write_inputs(work, count, template)
            size = (work / "chats.jsonl").stat().st_size / 1e6
            print(f"{count:,} chats, {size:.1f} MB, template {template.name}, packs of {PACK_SIZE}", flush=True)
            points.append((size, _run("ours", work)["seconds"]))
            if peer and count == min(args.chats):
                _run("nemotron", work)
    if len(points) > 1:
        (small, begun), (large, done) = points[0], points[-1]
        print(f"ours, between the smallest and the largest: {(large - small) / (done - begun):.2f} MB/CPU-s")
    packing()


if __name__ == "__main__":
    main()
