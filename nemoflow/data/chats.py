"""Kind `chats`: chats in a tokenizer's ids, masked to what the assistant says and packed for SFT.

    training.idx.parquet, validation.idx.parquet    packs, as module pack says; none without chats
    packing.json                                    what Megatron-Bridge wants to know of the packs beforehand
    chats.json                                      what was counted

The sources are read in pieces, several at a time: files, small ones together, and row groups of large Parquet files.
What is made of a piece lies in spool/ until all is packed, with a receipt that is renamed into place last. An
interrupted job goes on from there, to the same bytes.

Each chat is one training sequence; one in which the assistant's thoughts are written down is one for each answered
question. All of them fall into the same split, by the hash of the chat.
"""

import json
import math
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
from blake3 import blake3
from xxhash import xxh3_64_intdigest

from nemoflow.data import conversation, plan
from nemoflow.data.encode import ENGINES, Sample
from nemoflow.data.lines import without_nulls
from nemoflow.data.made import Made
from nemoflow.data.masks import LEARNED, Masker
from nemoflow.data.packed import write_packs
from nemoflow.data.processes import Speed, in_processes
from nemoflow.data.rows import Broken, read
from nemoflow.data.shards import HashedFile
from nemoflow.data.sources import Source, Unit, open_source
from nemoflow.data.spool import SPLITS, SpoolWriter, sync
from nemoflow.data.template import Template, Unusable
from nemoflow.data.tokenizer import load
from nemoflow.errors import NemoflowError
from nemoflow.progress import EVERY, duration

RESUMES = True
"""The directory given to `make` may hold what an interrupted attempt finished."""

FILES = {"train": "training.idx.parquet", "valid": "validation.idx.parquet"}

_PIECE = 128 << 20
"""Bytes of raw files in a piece: some ten seconds of work, which is what an interruption costs at most."""

_SMALL = 256 << 10
"""Bytes of raw files that the reference has encoded before a fast engine is loaded."""

_BATCH = 1 << 20
"""Characters encoded at a time."""


class _Piece(NamedTuple):
    """part: number of the source. number: of the piece in it. units: what it reads."""

    part: int
    number: int
    units: list[Unit]


class _Rendered(NamedTuple):
    """A sequence that waits to be encoded; row: (file, row)."""

    text: str
    spans: list[tuple[int, int]]
    split: str
    uses: int
    row: tuple[int, int]


class _Dropped(Broken):
    """Rows left out: how many by reason, and for each reason [file, row, what is wrong] of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.firsts: dict[str, list] = {}
        self.file = 0  # which is being read
        self.unread = 0  # rows that are not even objects

    def add(self, reason: str, place: str) -> None:
        self.unread += 1
        self.at(int(place.rpartition(" ")[2].rpartition(":")[2]), reason, reason)

    def at(self, row: int, reason: str, detail: str) -> None:
        """Count one row of the file that is being read."""
        self.reasons[reason] = self.reasons.get(reason, 0) + 1
        self.firsts.setdefault(reason, [self.file, row, detail])


class _Counted:
    """Sequences on their way to the spool, cut to size and counted."""

    def __init__(self, spool: SpoolWriter, fits: int, too_long: str):
        self._spool, self._fits, self._too_long = spool, fits, too_long
        names = ("rows", "filtered", "unchosen", "chats", "too_long", "nothing_to_learn", "by_reference", "bytes")
        self.counts = dict.fromkeys(names, 0)
        self.splits = {name: {"chats": 0, "uses": 0, "tokens": 0} for name in SPLITS}
        self.lengths = np.zeros(32, np.int64)

    def add(self, tokens: np.ndarray, split: str, uses: int) -> None:
        """One sequence as it was encoded."""
        if len(tokens) <= self._fits:
            self._keep(tokens, split, uses)
            return
        self.counts["too_long"] += 1
        if self._too_long == "drop":
            return
        # A piece begins with the token that the one before ends with: so each token is predicted in one of them.
        step = self._fits - 1
        for first in range(0, len(tokens) - 1 if self._too_long == "split" else 1, step):
            piece = tokens[first : first + self._fits].copy()
            piece[-1] &= ~LEARNED  # what comes next is not in it
            self._keep(piece, split, uses)

    def _keep(self, tokens: np.ndarray, split: str, uses: int) -> None:
        if len(tokens) < 2 or not (tokens >= LEARNED).any():
            self.counts["nothing_to_learn"] += 1
            return
        self._spool.add(tokens, split, uses)
        self.splits[split]["uses"] += uses
        self.splits[split]["tokens"] += uses * len(tokens)


class _Work:
    """What the pieces of a job have in common, and how one is made."""

    def __init__(
        self,
        payload: dict,
        sources: list[Source],
        pieces: list[_Piece],
        template: Template,
        masker: Masker,
        spools: Path,
    ):
        self._payload, self._sources, self._pieces, self._spools = payload, sources, pieces, spools
        self._template, self._masker = template, masker
        self._valid_below = math.ceil(Fraction(payload["valid"]) * 2**64)
        self._repeats = [Fraction(part.get("repeat", "1")) for part in payload["parts"]]

    def make(self, number: int, count: Callable[[int, int, int], None]) -> None:
        """Write the spool of one piece, and its receipt. `count` is told of sequences, bytes of text and tokens."""
        piece = self._pieces[number]
        source = self._sources[piece.part]
        spool = SpoolWriter(self._spools, number, [self._payload["seed"], piece.part, piece.number])
        made = _Counted(spool, self._payload["pack_size"] + 1, self._payload["too_long"])
        dropped = _Dropped()
        sample = Sample()
        for batch in self._batches(piece, dropped, made):
            masked = self._masker.mask(
                [r.text for r in batch], [r.spans for r in batch], sample, lambda i, b=batch: b[i].row
            )
            at = 0
            for rendered, length in zip(batch, masked.lengths.tolist(), strict=True):
                made.add(masked.tokens[at : at + length], rendered.split, rendered.uses)
                at += length
            made.lengths += np.bincount(np.frexp(masked.lengths)[1].clip(1) - 1, minlength=32)
            made.counts["by_reference"] += masked.by_reference
            made.counts["bytes"] += masked.size
            count(len(batch), masked.size, at)
        if (row := self._masker.differing(sample)) is not None:
            raise NemoflowError(
                f"{source.place(*row)}: {self._masker.engine} gives this chat other ids than tokenizers does; set "
                "tokenizer.engine: tokenizers, and tell the makers"
            )
        receipt = {
            "piece": number,
            **made.counts,
            "splits": made.splits,
            "lengths": made.lengths.tolist(),
            "dropped": dropped.reasons,
            "firsts": dropped.firsts,
            "files": spool.finish(),
        }
        _write(_receipt_path(self._spools, number), receipt)

    def _batches(self, piece: _Piece, dropped: _Dropped, made: _Counted) -> Iterator[list[_Rendered]]:
        """The sequences of a piece, about _BATCH characters at a time."""
        batch, size = [], 0
        for rendered in self._sequences(piece, dropped, made):
            batch.append(rendered)
            size += len(rendered.text)
            if size >= _BATCH:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch

    def _sequences(self, piece: _Piece, dropped: _Dropped, made: _Counted) -> Iterator[_Rendered]:
        source, part = self._sources[piece.part], self._payload["parts"][piece.part]
        field, used_in = part.get("field", "messages"), self._payload.get("used_in")
        for unit in piece.units:
            dropped.file = unit[0]
            for file, at, row in read(source, [unit], dropped):
                made.counts["rows"] += 1
                if used_in is not None and not conversation.wanted(row, used_in):
                    made.counts["filtered"] += 1
                    continue
                if source.format == "parquet":
                    row = {key: without_nulls(row.get(key)) for key in (field, "tools")}
                try:
                    chat = conversation.conversation(row, field, self._template)
                    split, uses = self._share(chat.content, self._repeats[piece.part])
                    if not uses:
                        made.counts["unchosen"] += 1
                        continue
                    rendered = [
                        _Rendered(*self._template.render(s.messages, chat.tools, s.answers), split, uses, (file, at))
                        for s in conversation.sequences(chat.messages)
                    ]
                except Unusable as error:
                    dropped.at(at, error.reason, str(error))
                    continue
                made.splits[split]["chats"] += 1
                yield from rendered
        made.counts["rows"] += dropped.unread

    def _share(self, content: bytes, repeat: Fraction) -> tuple[str, int]:
        """The split a chat is in, and how often it is used there."""
        if xxh3_64_intdigest(content) < self._valid_below:
            return "valid", 1
        # By other bits than the split, or it would be the same chats that are left out and that are held out.
        return "train", int(repeat) + (xxh3_64_intdigest(content, 1) < math.ceil(repeat % 1 * 2**64))


def _write(path: Path, record: dict) -> dict:
    """Write JSON, whole or not at all; returns the file as HashedFile.finish does."""
    file = HashedFile(path)
    file.write((json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode())
    return file.finish()


def _receipt_path(spools: Path, number: int) -> Path:
    return spools / f"{number:05d}.json"


def _read(path: Path) -> dict | None:
    """A receipt, when it and the files it tells of are all there."""
    try:
        receipt = json.loads(path.read_bytes())
        whole = all((path.parent / file["name"]).stat().st_size == file["size"] for file in receipt["files"])
    except (OSError, ValueError):
        return None
    return receipt if whole else None


def _pieces(sources: list[Source]) -> list[_Piece]:
    """The work in pieces of about _PIECE bytes, which depend on the files alone."""
    found = []
    for part, source in enumerate(sources):
        sizes = [source.path(number).stat().st_size for number in range(source.count)]
        groups = {
            n: _row_groups(source, n) for n, size in enumerate(sizes) if source.format == "parquet" and size > _PIECE
        }
        shards = plan.shards(sizes, groups, _PIECE)
        found += [_Piece(part, number, [tuple(unit) for unit in units]) for number, units in enumerate(shards)]
    return found


def _row_groups(source: Source, number: int) -> list[tuple[int, int]]:
    """Rows and compressed bytes of each row group of a Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_metadata(source.path(number))
    except (OSError, pa.ArrowException) as error:
        raise NemoflowError(f"{source.origin(number)}: cannot be read as parquet ({error}); repair the file") from None
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    return [(g.num_rows, sum(g.column(i).total_compressed_size for i in range(g.num_columns))) for g in groups]


def _check_dropped(source: Source, receipts: list[dict], max_broken: str) -> None:
    """Raise NemoflowError naming the worst file when more than the share `max_broken` of a source's rows is unusable.

    Rows that `used_in` leaves out do not count.
    """
    rows = sum(r["rows"] - r["filtered"] for r in receipts)
    dropped = sum(sum(r["dropped"].values()) for r in receipts)
    if dropped <= Fraction(max_broken) * rows:
        return
    worst = max(receipts, key=lambda r: Fraction(sum(r["dropped"].values()), max(r["rows"] - r["filtered"], 1)))
    file, row, detail = worst["firsts"][max(worst["dropped"], key=worst["dropped"].get)]
    raise NemoflowError(
        f"{source.place(file, row)}: {detail} (of {rows:,} chats {dropped:,} are unusable; max_broken allows "
        f"{max_broken}; here is most of it: {', '.join(f'{n:,} {r}' for r, n in sorted(worst['dropped'].items()))}). "
        "Repair the data, or raise max_broken to leave such chats out"
    )


def _measures(payload: dict, by_part: list[list[dict]], packed: dict[str, dict]) -> dict:
    """What `make` returns."""

    def dropped(receipts: list[dict]) -> dict[str, int]:
        return dict(sorted(sum((Counter(r["dropped"]) for r in receipts), Counter()).items()))

    def total(receipts: list[dict], *names: str) -> dict[str, int]:
        return {name: sum(r[name] for r in receipts) for name in names}

    def chats(receipts: list[dict], split: str) -> int:
        return sum(r["splits"][split]["chats"] for r in receipts)

    every = [receipt for receipts in by_part for receipt in receipts]
    counted = ("rows", "filtered", "unchosen", "too_long", "nothing_to_learn")
    parts = []
    for receipts in by_part:
        firsts: dict[str, list] = {}
        for receipt in receipts:
            for reason, (file, row, _) in receipt["firsts"].items():
                firsts.setdefault(reason, [file, row])
        splits = {
            split: {
                "chats": chats(receipts, split),
                "sequences": sum(r["splits"][split]["uses"] for r in receipts),
                "tokens": sum(r["splits"][split]["tokens"] for r in receipts),
            }
            for split in SPLITS
        }
        parts.append(
            {
                **total(receipts, *counted),
                "dropped": dropped(receipts),
                "first_dropped": dict(sorted(firsts.items())),
                "train": splits["train"],
                "validation": splits["valid"],
            }
        )
    return {
        "train": {"chats": chats(every, "train"), **packed["train"]},
        "validation": {"chats": chats(every, "valid"), **packed["valid"]},
        "pack_size": payload["pack_size"],
        **total(every, *counted, "by_reference", "bytes"),
        "dropped": dropped(every),
        "lengths": np.sum([r["lengths"] for r in every], axis=0, dtype=int).tolist(),
        "sources": parts,
    }


def _said(progress: Callable[[str], None], tokens: int) -> Callable[[int], None]:
    """Shows now and then how much of `tokens` is packed, being told as it is."""
    begun = shown = time.monotonic()
    done = 0

    def say(more: int) -> None:
        nonlocal shown, done
        done += more
        now = time.monotonic()
        if now - shown >= EVERY:
            shown = now
            rate = done / (now - begun)
            left = duration((tokens - done) / rate)
            progress(f"{done:,}/{tokens:,} tokens packed; {rate / 1e6:.1f} Mtokens/s, {left} left")

    return say


def _packing(size: int, found: dict) -> dict:
    """What Megatron-Bridge's own packing writes down of a split (create_packing_strategy of 0.6.2)."""
    return {
        "dataset_max_seqlen": found["longest"],
        "max_samples_per_bin": found["most"],
        "packing_factor": round(found["sequences"] / found["packs"], 2),
        "packing_efficiency": round(100 * found["fill"], 2),
        "pack_size": size,
        "min_packed_seqlen": found["least"],
    }


def make(
    payload: dict,
    inputs: dict,
    out: Path,
    progress: Callable[[str], None],
    threads: int = 1,
    launch: dict | None = None,
) -> Made:
    """Write the packs of inputs["sources"] in the ids of inputs["tokenizer"], in up to `threads` processes.

    `payload` is {"parts": [{"source", "repeat": how often a chat is used in training, an exact fraction, "1" by
    default, "field": where the messages are, "messages" by default}], in the order of the sources; "pack_size" in
    positions; "valid": share of the chats held out, an exact fraction; "seed"; "too_long": what becomes of sequences
    that do not fit in a pack, "drop", "truncate" or "split"; "pad_multiple": of what each sequence's positions must be
    a multiple; "max_broken": share of the chats of a source that may be unusable}, and where wanted "template": the
    text of a chat template, in place of the tokenizer's; "used_in": only chats whose `used_in` names this; "window":
    sequences packed at a time. `launch` may name the "engine". Bytes depend on none but payload and inputs.

    Returns as measures {"train", "validation": {"chats", each once, and what packed.write_packs counts}, "pack_size",
    "rows" read, of these "filtered" by used_in, "unchosen" by a repeat below one, "dropped": {reason: rows};
    sequences "too_long" and with "nothing_to_learn" (pieces, where they were split), "by_reference"; "bytes" of text,
    "lengths": sequences of 2**k tokens or more but not 2**(k + 1), for k from 0 to 31, before they were cut;
    "sources": for each part the same, and "first_dropped": {reason: [file, row]}}.

    Raises NemoflowError when a file cannot be read, the template does not show where the assistant speaks, more than
    `max_broken` of a source's chats are unusable, nothing is left to train on, or the engine is found to differ from
    the reference.
    """
    size, multiple = payload["pack_size"], payload["pad_multiple"]
    if size % multiple:
        raise NemoflowError(
            f"pack_size: {size} is not a multiple of pad_multiple, {multiple}, to which context and sequence "
            f"parallelism need every sequence padded; {-(-size // multiple) * multiple} is"
        )
    spools, record = out / "spool", out / "chats.json"
    if (done := _read(record)) is None:
        spools.mkdir(exist_ok=True)
        for path in out.iterdir():
            if path != spools:
                path.unlink()
        measures, files = _make(payload, inputs, out, spools, progress, threads, launch or {})
        _write(record, {"measures": measures, "files": files})
        sync(out)
        done = _read(record)
    shutil.rmtree(spools, ignore_errors=True)
    content = record.read_bytes()
    own = {"name": record.name, "size": len(content), "blake3": blake3(content).hexdigest()}
    return Made(done["measures"], sorted([*done["files"], own], key=lambda file: file["name"]))


def _make(
    payload: dict, inputs: dict, out: Path, spools: Path, progress: Callable[[str], None], threads: int, launch: dict
) -> tuple[dict, list[dict]]:
    sources = [open_source(directory) for directory in inputs["sources"]]
    pieces = _pieces(sources)
    receipts, eod = _spool(payload, inputs, sources, pieces, spools, progress, threads, launch)
    by_part = [[receipts[n] for n, piece in enumerate(pieces) if piece.part == i] for i in range(len(sources))]
    for source, own in zip(sources, by_part, strict=True):
        _check_dropped(source, own, payload["max_broken"])
    packed, files, packing = {}, [], []
    for split, name in FILES.items():
        uses, tokens = (sum(receipt["splits"][split][key] for receipt in receipts) for key in ("uses", "tokens"))
        packed[split], made = write_packs(
            out / name, spools, range(len(pieces)), split, uses, tokens, payload, eod, _said(progress, tokens)
        )
        files += made
        packing += [_packing(payload["pack_size"], packed[split])] if made else []
    measures = _measures(payload, by_part, packed)
    if not packed["train"]["sequences"]:
        left = {k: measures[k] for k in ("rows", "filtered", "unchosen", "too_long", "nothing_to_learn", "dropped")}
        raise NemoflowError(f"{inputs['sources'][0]}: no chat to train on is left ({left})")
    files.append(_write(out / "packing.json", packing))
    train = measures["train"]
    progress(f"{train['sequences']:,} sequences in {train['packs']:,} packs, {train['fill']:.2%} full")
    return measures, files


def _spool(
    payload: dict,
    inputs: dict,
    sources: list[Source],
    pieces: list[_Piece],
    spools: Path,
    progress: Callable[[str], None],
    threads: int,
    launch: dict,
) -> tuple[list[dict], int]:
    """Make the spools that are not there yet. Returns all receipts, and the id that ends a document; what encoding
    took of memory is free again."""
    tokenizer = load(inputs["tokenizer"])
    receipts = {n: found for n in range(len(pieces)) if (found := _read(_receipt_path(spools, n)))}
    _remove_all_but(spools, receipts)
    todo = [n for n in range(len(pieces)) if n not in receipts]
    if todo:
        given = payload.get("template")
        origin = "template" if given else str(tokenizer.directory)
        template = Template(given or tokenizer.chat_template, tokenizer, origin)
        size = sum(source.path(n).stat().st_size for source in sources for n in range(source.count))
        engine = "tokenizers" if size < _SMALL else launch.get("engine", ENGINES[0])
        work = _Work(payload, sources, pieces, template, Masker(tokenizer, engine, progress), spools)
        try:
            for n in in_processes(work.make, todo, threads, Speed(progress, len(pieces), len(receipts))):
                receipts[n] = _read(_receipt_path(spools, n))
        except BaseException:
            _remove_all_but(spools, receipts)  # it may be what filled the disk
            raise
    return [receipts[n] for n in range(len(pieces))], tokenizer.eod


def _remove_all_but(spools: Path, receipts: dict[int, dict]) -> None:
    """Remove what belongs to no finished piece."""
    keep = {file["name"] for receipt in receipts.values() for file in receipt["files"]}
    keep.update(_receipt_path(spools, number).name for number in receipts)
    for path in spools.iterdir():
        if path.name not in keep:
            path.unlink()
