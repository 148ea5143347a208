"""Kind `chats`: chats rendered with the tokenizer's template, masked to what the assistant says, packed for SFT.

Written in Megatron-Bridge's packed schema: a row is one pack, several chats one after the other, with `input_ids`
list<int32>, `seq_start_id` list<int32> (where each chat begins) and `loss_mask` list<int8>.

The loss mask is shifted: loss_mask[k] says whether predicting token k + 1 from token k is learned. That is how
Megatron-Bridge's own packing stores it and its reader takes it: of each chat of n tokens, the reader feeds ids 0..n-2,
with ids 1..n-1 as labels and loss_mask 0..n-2 beside them. So the last token before an answer carries a 1, and the end
of the answer's turn, which is learned like its text, carries none. (The reader must run with answer_only_loss, its
default; else it ignores the mask.)
"""

import bisect
import json
import random
import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from itertools import batched
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nemoflow.data.rows import Broken, Split, encodable, read, shards_of
from nemoflow.data.tokenizer import Trained, load
from nemoflow.errors import NemoflowError

FILES = {"train": "training.idx.parquet", "valid": "validation.idx.parquet"}
SCHEMA = pa.schema([(name, pa.list_(pa.int32())) for name in ("input_ids", "seq_start_id")]).append(
    pa.field("loss_mask", pa.list_(pa.int8()))
)
_ROW_GROUP = 500
"""Packs in a row group: what the reader loads to get at one of them."""

_BATCH = 1000
_BEGIN, _END = "\ufdd0", "\ufdd1"
"""Marks around what the assistant says in a rendered chat: code points Unicode reserves for a program's own use."""


class _Generation(Extension):
    """The block {% generation %} ... {% endgeneration %} of chat templates, rendered with a mark at either end."""

    tags = {"generation"}  # noqa: RUF012 (declared so by jinja2)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begin, end = (jinja2.nodes.Output([jinja2.nodes.TemplateData(mark)], lineno=line) for mark in (_BEGIN, _END))
        return [begin, *body, end]


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """JSON without the HTML escapes of jinja2's own filter: what templates written for transformers expect."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


class Template:
    """A tokenizer's chat template, rendered as transformers' apply_chat_template does.

    Raises NemoflowError when it is no valid Jinja or lacks the {% generation %} marks that the loss mask is made from.
    """

    def __init__(self, tokenizer: Trained):
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise
        try:
            self._template = environment.from_string(tokenizer.chat_template)
        except jinja2.TemplateError as error:
            raise NemoflowError(f"{tokenizer.directory}: the chat template is not valid Jinja ({error})") from None
        if not re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", tokenizer.chat_template):
            raise NemoflowError(
                f"{tokenizer.directory}: the chat template does not mark what the assistant says; put "
                "{% generation %} and {% endgeneration %} around it"
            )
        roles = ("bos_token", "eos_token", "pad_token", "unk_token")
        self._tokens = {role: tokenizer.special(role) for role in roles if tokenizer.special(role)}

    def render(self, messages: list[dict], tools: list | None = None) -> tuple[str, list[tuple[int, int]]]:
        """The chat as text, and where in it the assistant speaks: (first character, one past the last).

        Raises ValueError with the reason when the template does not take these messages.
        """
        try:
            marked = self._template.render(
                messages=messages, tools=tools, documents=None, add_generation_prompt=False, **self._tokens
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise ValueError(f"the chat template refuses the messages ({error})") from None
        outside, *spoken = marked.split(_BEGIN)
        text, spans = outside, []
        for part in spoken:
            inside, _, outside = part.partition(_END)
            spans.append((len(text), len(text) + len(inside)))
            text += inside + outside
        return text, spans


def pack(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Indices of `lengths` put into bins of at most `size` by best fit decreasing, in the order the bins were opened.

    Longest first, each goes into the fullest bin that has room (Johnson 1973); equal lengths keep their order. The
    caller sees to it that no length exceeds `size`.
    """
    bins: list[list[int]] = []
    with_space: dict[int, list[list[int]]] = {}  # free space -> bins that have it
    spaces: list[int] = []  # keys of with_space, ascending
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        at = bisect.bisect_left(spaces, length)
        if at < len(spaces):
            space = spaces[at]
            chosen = with_space[space].pop()
            if not with_space[space]:
                del with_space[space], spaces[at]
        else:
            space, chosen = size, []
            bins.append(chosen)
        chosen.append(index)
        space -= length
        if space:
            if space not in with_space:
                with_space[space] = []
                bisect.insort(spaces, space)
            with_space[space].append(chosen)
    return bins


class _Chats:
    """The tokenized chats of one split: flat token and mask arrays, five bytes a token, and how often each is used."""

    def __init__(self) -> None:
        self.ids = array("i")
        self.mask = bytearray()
        self.starts = array("q", [0])
        self.repeats = array("i")

    def add(self, ids: list[int], mask: np.ndarray, repeat: int) -> None:
        self.ids.extend(ids)
        self.mask.extend(mask.tobytes())
        self.starts.append(len(self.ids))
        self.repeats.append(repeat)

    def write(self, path: Path, pack_size: int, seed: int) -> dict:
        """Pack, shuffle the packs and write them; the measures. Without chats no file is written."""
        ids, mask = np.frombuffer(self.ids, dtype=np.int32), np.frombuffer(self.mask, dtype=np.int8)
        starts = np.frombuffer(self.starts, dtype=np.int64)
        uses = np.repeat(np.arange(len(self.repeats)), np.frombuffer(self.repeats, dtype=np.int32)).tolist()
        order = random.Random(seed)
        order.shuffle(uses)  # so that the repeats of a chat, equally long, are not packed side by side
        sizes = np.diff(starts)
        lengths = sizes[uses].tolist() if uses else []
        packs = [[uses[i] for i in members] for members in pack(lengths, pack_size)]
        order.shuffle(packs)  # packing leaves the longest chats first
        if packs:
            with pq.ParquetWriter(path, SCHEMA, compression="zstd") as writer:
                for group in batched(packs, _ROW_GROUP):
                    writer.write_table(_table(group, ids, mask, starts), row_group_size=_ROW_GROUP)
        tokens = sum(lengths)
        return {
            "chats": len(uses),
            "tokens": tokens,
            "loss_tokens": int(sum(int(mask[starts[i] : starts[i + 1]].sum()) for i in uses)),
            "packs": len(packs),
            "fill": round(tokens / (len(packs) * pack_size), 6) if packs else 0,
        }


def _table(packs: Sequence[list[int]], ids: np.ndarray, mask: np.ndarray, starts: np.ndarray) -> pa.Table:
    """The rows of some packs, each a list of chats; chat i is ids[starts[i]:starts[i + 1]]."""
    members = [i for chats in packs for i in chats]
    lengths = np.diff(starts)[members]
    chat_offsets = np.cumsum([0, *(len(chats) for chats in packs)])
    token_ends = np.concatenate([[0], np.cumsum(lengths)])
    token_offsets = token_ends[chat_offsets]
    begins = token_ends[:-1] - np.repeat(token_offsets[:-1], np.diff(chat_offsets))

    def column(values: np.ndarray, offsets: np.ndarray, type_: pa.DataType) -> pa.Array:
        return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values, type_))

    def joined(flat: np.ndarray) -> np.ndarray:
        return np.concatenate([flat[starts[i] : starts[i + 1]] for i in members])

    return pa.Table.from_arrays(
        [
            column(joined(ids), token_offsets, pa.int32()),
            column(begins, chat_offsets, pa.int32()),
            column(joined(mask), token_offsets, pa.int8()),
        ],
        schema=SCHEMA,
    )


def _messages(row: dict) -> list[dict]:
    """The chat in a row; ValueError with the reason when there is none."""
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ValueError("'messages' is not a non-empty list")
    if not all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages):
        raise ValueError("'messages' has an entry without a role")
    return messages


class _Reader:
    """Reads, renders, tokenizes and masks chats, and counts what is left out."""

    def __init__(self, tokenizer: Trained, pack_size: int, too_long: str):
        self._template = Template(tokenizer)
        self._engine = tokenizer.engine
        # As they are spelled inside JSON, which is what is searched.
        reserved = [json.dumps(text, ensure_ascii=False)[1:-1] for text in (*tokenizer.control_strings, _BEGIN, _END)]
        self._reserved = re.compile("|".join(map(re.escape, reserved)))
        self._pack_size = pack_size
        self._too_long = too_long
        self.broken = Broken()
        self.rows = 0
        self.truncated = 0
        self.left_out = {"control_strings": 0, "nothing_to_learn": 0, "too_long": 0}

    def _rendered(self, source: Path) -> Iterator[tuple[bytes, str, list[tuple[int, int]]]]:
        for shard in shards_of(source):
            for place, _, row in read(shard, self.broken):
                try:
                    messages = _messages(row)
                    content = json.dumps([messages, row.get("tools")], ensure_ascii=False, sort_keys=True)
                    encodable(content, "messages")
                    control = self._reserved.search(content)
                    text, spans = self._template.render(messages, row.get("tools"))
                except ValueError as error:
                    self.broken.add(str(error), place)
                    continue
                self.rows += 1
                if control:
                    # Rendered, it became a control token: a turn that the user's text began or ended.
                    self.left_out["control_strings"] += 1
                else:
                    yield content.encode(), text, spans

    def chats(self, source: Path) -> Iterator[tuple[bytes, list[int], np.ndarray]]:
        """Each usable chat as (content, ids, shifted loss mask as int8 of the same length)."""
        for batch in batched(self._rendered(source), _BATCH):
            # The whole chat at once: pieces tokenized apart would meet at other token boundaries than at inference.
            encodings = self._engine.encode_batch([text for _, text, _ in batch], add_special_tokens=False)
            for (content, _, spans), encoding in zip(batch, encodings, strict=True):
                ids = encoding.ids
                mask = _shifted_mask(encoding.offsets, spans)
                if len(ids) > self._pack_size:
                    if self._too_long == "drop":
                        self.left_out["too_long"] += 1
                        continue
                    self.truncated += 1
                    ids, mask = ids[: self._pack_size], mask[: self._pack_size]
                    mask[-1] = 0  # its label was cut off
                if mask.any():
                    yield content, ids, mask
                else:
                    self.left_out["nothing_to_learn"] += 1


def _shifted_mask(offsets: list[tuple[int, int]], spans: list[tuple[int, int]]) -> np.ndarray:
    """int8 [tokens]: 1 where the *next* token has a character that the assistant says."""
    begin, end = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    spoken = np.zeros(len(offsets) + 1, dtype=np.int8)
    for first, past in spans:
        spoken[:-1] |= (begin < past) & (end > first)
    return spoken[1:]


def make(payload: dict, inputs: dict, out: Path, progress: Callable[[str], None]) -> dict:
    """Write training.idx.parquet and validation.idx.parquet from inputs["sources"], with inputs["tokenizer"].

    `payload` is {"pack_size": tokens, "valid": share as an exact fraction, "seed", "too_long": "drop" or "truncate",
    "max_broken", "parts": [{"source", "repeat"}]}, parts in the order of the sources. A chat's split depends on its
    content alone; repeats are for training, validation sees each chat once. A split without chats is not written.

    Returns {"train", "validation": {"chats", "tokens", "loss_tokens", "packs", "fill"}, "left_out": chats by reason,
    "truncated", "broken": rows by reason, "pack_size"}.

    Raises NemoflowError when more than `max_broken` of the rows are no chats, or nothing is left to train on.
    """
    tokenizer = load(inputs["tokenizer"])
    reader = _Reader(tokenizer, payload["pack_size"], payload["too_long"])
    split = Split(payload["valid"])
    chats = {name: _Chats() for name in FILES}
    for source, part in zip(inputs["sources"], payload["parts"], strict=True):
        for content, ids, mask in reader.chats(source):
            name = split.of(content)
            chats[name].add(ids, mask, part.get("repeat", 1) if name == "train" else 1)
        progress(f"{source.name}: {reader.rows:,} chats so far")
    reader.broken.check(reader.rows + reader.broken.count, payload["max_broken"])
    if not chats["train"].repeats:
        raise NemoflowError(
            f"{inputs['sources'][0]}: no chat to train on is left ({reader.left_out}); the corpus is empty"
        )
    train, validation = (
        chats[name].write(out / FILES[name], payload["pack_size"], payload["seed"]) for name in ("train", "valid")
    )
    progress(f"{train['chats']:,} chats in {train['packs']:,} packs, {train['fill']:.1%} full")
    return {
        "train": train,
        "validation": validation,
        "left_out": reader.left_out,
        "truncated": reader.truncated,
        "broken": reader.broken.measures(),
        "pack_size": payload["pack_size"],
    }
