"""Kind `tokenizer`: a byte-level BPE trained on sources, or a tokenizer given as files. Also reads one, for the others.

The files are those transformers' AutoTokenizer reads. They are written here directly: importing transformers takes
seconds, and what it writes changes with its version.
"""

import contextlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from nemoflow.data.rows import Broken, read
from nemoflow.data.sources import open_source
from nemoflow.errors import NemoflowError

SPECIAL = ("<unk>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>")
"""Control tokens of a trained tokenizer, with ids 0 to 5. </s> ends a document, <|im_end|> a turn of a chat."""

_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORDS = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""What is never merged across: tekken's pattern, which gigatoken knows. Digits stand alone, so that numbers have one
spelling and sums can be learned."""

_SURROGATE = re.compile("[\ud800-\udfff]")

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Trained:
    """A tokenizer artifact as the data programs need it.

    directory: of the artifact. engine: the loaded tokenizers.Tokenizer. config: tokenizer_config.json.
    """

    directory: Path
    engine: Tokenizer
    config: dict

    @cached_property
    def vocab_size(self) -> int:
        """Largest token id plus one, as it was sealed, for counting takes a while; counted before that."""
        with contextlib.suppress(FileNotFoundError):
            return json.loads((self.directory / "sealed.json").read_text(encoding="utf-8"))["measures"]["vocab_size"]
        return max(self.engine.get_vocab(with_added_tokens=True).values()) + 1

    def special(self, role: str) -> str:
        """Text of the token with a role such as "eos_token"; empty when there is none."""
        token = self.config.get(role) or ""
        return token["content"] if isinstance(token, dict) else token

    @cached_property
    def eod(self) -> int:
        """Id of the token that ends a document, which is the tokenizer's eos_token.

        Raises NemoflowError when there is none.
        """
        found = self.engine.token_to_id(self.special("eos_token"))
        if found is None:
            raise NemoflowError(
                f"{self.directory}/tokenizer_config.json: eos_token: names no token that ends documents"
            )
        return found

    @cached_property
    def control_strings(self) -> list[str]:
        """The texts of all special tokens."""
        return sorted(t.content for t in self.engine.get_added_tokens_decoder().values() if t.special)

    @cached_property
    def chat_template(self) -> str:
        """The Jinja source of the chat template.

        Raises NemoflowError when there is none.
        """
        file = self.directory / "chat_template.jinja"
        template = file.read_text(encoding="utf-8") if file.exists() else self.config.get("chat_template")
        if not isinstance(template, str):
            raise NemoflowError(f"{self.directory}: no chat template; chats need a chat_template.jinja")
        return template


def load(directory: Path) -> Trained:
    """The tokenizer in a directory with tokenizer.json and tokenizer_config.json.

    Raises NemoflowError when one of them is missing or cannot be read.
    """
    try:
        config = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
        content = (directory / "tokenizer.json").read_bytes()
    except OSError as error:
        raise NemoflowError(f"{error.filename}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise NemoflowError(f"{directory}: tokenizer_config.json is not JSON ({error})") from None
    try:
        engine = Tokenizer.from_buffer(content)
    except Exception as error:  # tokenizers raises nothing narrower
        raise NemoflowError(
            f"{directory}/tokenizer.json: is no tokenizer of the tokenizers library ({error})"
        ) from None
    engine.no_truncation()
    engine.no_padding()
    return Trained(directory, engine, config)


def texts_of(row: dict, field: str = "text") -> list[str]:
    """Every text in a row: what is in `field`, the contents of its chat "messages", or of its RL prompt."""
    parameters = row.get("responses_create_params")
    messages = row.get("messages") or (parameters.get("input") if isinstance(parameters, dict) else None)
    found = [row.get(field)]
    if isinstance(messages, list):
        found += [message.get("content") for message in messages if isinstance(message, dict)]
    return [text for text in found if isinstance(text, str) and not _SURROGATE.search(text)]


def _corpus(sources: list[Path], fields: list[str], broken: Broken) -> Iterator[str]:
    for directory, field in zip(sources, fields, strict=True):
        source = open_source(directory)
        for _, _, row in read(source, source.units(), broken):
            yield from texts_of(row, field)


def _train(payload: dict, sources: list[Path], progress: Callable[[str], None]) -> tuple[Tokenizer, dict]:
    engine = Tokenizer(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    engine.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=payload["vocab_size"],
        special_tokens=[AddedToken(text, special=True, normalized=False) for text in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    broken = Broken()
    seen: dict[str, Any] = {"documents": 0, "bytes": 0}

    def counted() -> Iterator[str]:
        for text in _corpus(sources, payload.get("fields") or ["text"] * len(sources), broken):
            seen["documents"] += 1
            seen["bytes"] += len(text.encode())
            yield text

    engine.train_from_iterator(counted(), trainer)
    size = engine.get_vocab_size(with_added_tokens=True)
    if size != payload["vocab_size"]:
        raise NemoflowError(
            f"tokenizer: vocab_size: {payload['vocab_size']} asked for, but {seen['documents']:,} documents "
            f"({seen['bytes']:,} bytes) give only {size}; train on more text or lower vocab_size"
        )
    seen["broken"] = broken.measures()
    progress(f"{size:,} tokens from {seen['documents']:,} texts, {seen['bytes'] / 1e6:.2f} MB")
    return engine, seen


def make(payload: dict, inputs: dict, out: Path, progress: Callable[[str], None]) -> dict:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja, which AutoTokenizer.from_pretrained reads.

    `payload` is {"vocab_size", "chat_template": name of a template, "fields": where the text is in each source, "text"
    by default} with inputs["sources"] to train on; or {"files": [{"size", "sha256"}]} with inputs["files"], which are
    verified and copied; or what `download.fetch` takes, for a tokenizer of the hub.

    Returns {"vocab_size", "eod", "pad", "control_strings"} and for a trained one "trained_on": {"documents",
    "bytes", "broken": lines that are no JSON object, by reason}.

    Raises NemoflowError when the sources are too small for the vocabulary, no tokenizer is in the files, or they cannot
    be had.
    """
    measures = {}
    if "hub" in payload:
        from nemoflow.data.download import fetch  # not for shard jobs, which read this module for `load`

        fetch(payload, out, progress)
    elif "files" in payload:
        from nemoflow.data.local import check_file

        for entry, path in zip(payload["files"], inputs["files"], strict=True):
            check_file(entry, path)
            shutil.copyfile(path, out / path.name)
    else:
        template = TEMPLATES / f"{payload['chat_template']}.jinja"
        if not template.exists():
            known = ", ".join(sorted(p.stem for p in TEMPLATES.glob("*.jinja")))
            raise NemoflowError(f"tokenizer: chat_template: {payload['chat_template']!r} is unknown; known: {known}")
        engine, measures["trained_on"] = _train(payload, inputs["sources"], progress)
        (out / "tokenizer.json").write_text(engine.to_str(pretty=True) + "\n", encoding="utf-8")
        config = {
            "add_bos_token": False,
            "add_eos_token": False,
            "bos_token": "<s>",
            "clean_up_tokenization_spaces": False,
            "eos_token": "</s>",
            "pad_token": "<pad>",
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": "<unk>",
        }
        (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        shutil.copyfile(template, out / "chat_template.jinja")
    made = load(out)
    pad = made.engine.token_to_id(made.special("pad_token"))
    return {
        "vocab_size": made.vocab_size,
        "eod": made.eod,
        "pad": made.eod if pad is None else pad,
        "control_strings": made.control_strings,
        **measures,
    }
