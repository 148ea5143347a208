"""What the benchmarks run on, made from what the installation has: a real corpus, and a real tokenizer of 131,072 ids.

The corpus is documentation and code as they lie on the disk: the files of this Python environment, then of Python
itself, /usr/share/doc and the manual pages, each text once. It is denser in tokens than web text, and its boilerplate
repeats, as does that of the web.
"""

import base64
import gzip
import hashlib
import itertools
import json
import os
import random
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import msgspec

SUFFIXES = {".py", ".pyi", ".md", ".rst", ".txt", ".h", ".hpp", ".cuh", ".cpp", ".html", ".json", ".js", ".yaml"}
_LARGEST = 2_000_000
"""Bytes of a text: larger files are tables."""


def texts(root: Path) -> Iterator[bytes]:
    """Every text file below `root` whose name says so, and every gzip file's content below a man or doc directory."""
    for directory, names, files in os.walk(root):
        names.sort()
        for name in sorted(files):
            path = Path(directory, name)
            if path.is_symlink() or not path.is_file():
                continue
            packed = path.suffix == ".gz" and root.name in ("doc", "man")
            if not packed and path.suffix not in SUFFIXES:
                continue
            content = path.read_bytes()
            try:
                content = gzip.decompress(content) if packed else content
                content.decode()
            except (OSError, EOFError, UnicodeDecodeError):
                continue
            if 100 <= len(content) <= _LARGEST:
                yield content


def write_corpus(path: Path, size: int) -> dict[str, int]:
    """Write at least `size` bytes of text as JSON Lines of {"text"}, in an order that mixes what is alike.

    Returns {"documents", "bytes"}; fewer bytes than asked for when the installation has no more.
    """
    roots = [Path(sys.prefix), Path(sysconfig.get_paths()["stdlib"]), Path("/usr/share/doc"), Path("/usr/share/man")]
    roots += [Path("/usr/include"), Path("/usr/lib/python3/dist-packages"), Path("/usr/share")]
    seen: dict[bytes, bytes] = {}
    for content in itertools.chain.from_iterable(texts(root) for root in roots if root.is_dir()):
        seen.setdefault(hashlib.sha256(content).digest(), content)
    chosen = [seen[key] for key in sorted(seen)]
    random.Random(0).shuffle(chosen)
    total = {"documents": 0, "bytes": 0}
    with path.open("wb") as file:
        for content in chosen:
            file.write(msgspec.json.encode({"text": content.decode()}) + b"\n")
            total["documents"] += 1
            total["bytes"] += len(content)
            if total["bytes"] >= size:
                break
    return total


def write_slice(corpus: Path, path: Path, size: int) -> dict[str, int]:
    """Write the first `size` bytes of text of a corpus, in whole documents."""
    total = {"documents": 0, "bytes": 0}
    with corpus.open("rb") as lines, path.open("wb") as file:
        for line in lines:
            if total["bytes"] >= size:
                break
            file.write(line)
            total["documents"] += 1
            total["bytes"] += len(msgspec.json.decode(line)["text"].encode())
    return total


def _byte_characters() -> list[str]:
    """GPT-2's printable character for each byte, which byte-level vocabularies are written in."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = iter(range(256, 512))
    return [chr(b) if b in plain else chr(next(rest)) for b in range(256)]


def write_tokenizer(directory: Path) -> None:
    """Convert mistral-common's tekken_240911, of the lineage of Nemotron 3's tokenizer, to the files of an artifact.

    131,072 ids: 1,000 control tokens, then 130,072 tokens by rank. A pair merges into a token wherever both halves
    are tokens, in order of the token's rank.
    """
    import mistral_common

    data = json.loads((Path(mistral_common.__file__).parent / "data" / "tekken_240911.json").read_text())
    config = data["config"]
    specials = config["default_num_special_tokens"]
    named = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"]
    named += ["[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]"]
    named += ["[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"]
    named += [f"<SPECIAL_{i}>" for i in range(len(named), specials)]
    character = _byte_characters()
    tokens = [base64.b64decode(v["token_bytes"]) for v in data["vocab"][: config["default_vocab_size"] - specials]]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    spelled = ["".join(character[b] for b in token) for token in tokens]
    merges = []
    for token in tokens:
        cuts = [(ranks.get(token[:i]), ranks.get(token[i:])) for i in range(1, len(token))]
        merges += [[spelled[left], spelled[right]] for left, right in sorted(c for c in cuts if None not in c)]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
            | {"special": True}
            for i, text in enumerate(named)
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": config["pattern"]}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            ],
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": dict(zip(named, range(specials), strict=True))
            | {text: specials + rank for rank, text in enumerate(spelled)},
            "merges": merges,
        },
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False, indent=2), encoding="utf-8")
    settings = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False, "add_eos_token": False}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
