"""`nemoflow gc --optimizer`: the last state of a finished training without the optimizer, which is most of its bytes.

    checkpoints/weights_0000060/    what iter_0000060 held besides the optimizer, byte for byte; and stripped.json, the
                                    files with sizes and digests, in place of those that sealed.json lists

The state's link `checkpoint` then leads there, and iter_0000060 is deleted. Exports, evaluations, averages and
`init: {carry: weights}` work as before; training on is refused. The files are rewritten by a process of its own,
python -m nemoflow.strip CHECKPOINT OUT, which needs torch: item after item, in little memory.

The format is torch.distributed.checkpoint's: .metadata is a pickled Metadata, whose storage_data says in which file, at
which offset and how long each item is; items are independent of each other (torch 2.11, filesystem.py).
"""

import os
import shutil
import sys
from pathlib import Path

from nemoflow.conversion import converting, said
from nemoflow.errors import NemoflowError
from nemoflow.launch import HERE
from nemoflow.store import STRIPPED, Stage, dump, file_digest, write_atomically

PREFIX = "optimizer."
"""What the names of the optimizer's tensors and objects begin with, in Megatron-Core's checkpoints."""

_CHUNK = 16 << 20


def weights(checkpoint: Path) -> Path:
    """Where a checkpoint iter_<N> is without its optimizer."""
    return checkpoint.with_name(checkpoint.name.replace("iter_", "weights_"))


def last(checkpoints: Path) -> int | None:
    """The iteration of the newest state that was stripped; None where there is none."""
    found = (p.name.removeprefix("weights_") for p in checkpoints.glob("weights_*"))
    return max((int(n) for n in found if n.isdigit()), default=None)


def check(checkpoints: Path, reached: int) -> None:
    """Refuse to train on where the newest state has been stripped: with what is before it, it would be trained twice.

    reached: the newest state that can be gone on with, 0 when there is none.
    """
    at = last(checkpoints)
    if at is not None and at > reached:
        raise NemoflowError(
            f"{checkpoints}: the optimizer of state {at} was deleted by `nemoflow gc --optimizer`, so this training "
            f"cannot go on; begin another stage with init: {{from: ..., at: {at}, carry: weights}}, or raise its "
            "`version:`"
        )


def strip(stage: Stage, at: int, checkpoint: Path) -> int:
    """Strip a sealed state of the optimizer; returns the bytes that are free. For who holds the training's lock.

    Interrupted at any point it leaves a whole state, and is gone on with when it is called again.

    Raises NemoflowError for a damaged checkpoint, and a disk that is too small.
    """
    state, target = stage.state(at), weights(checkpoint)
    before = _bytes(checkpoint)
    if not target.exists():
        temporary = target.with_name(f".{target.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        converting("nemoflow.strip", checkpoint, checkpoint, temporary, cluster=HERE)
        files = [p for p in sorted(temporary.rglob("*")) if p.is_file()]
        contents = [
            {
                "name": f"checkpoint/{p.relative_to(temporary).as_posix()}",
                "size": p.stat().st_size,
                "sha256": file_digest(p),
            }
            for p in files
        ]
        write_atomically(
            temporary / STRIPPED, dump({"sealed": file_digest(state / "sealed.json"), "contents": contents})
        )
        temporary.rename(target)
    link = state / ".checkpoint"
    link.unlink(missing_ok=True)
    link.symlink_to(os.path.relpath(target, state))
    link.replace(state / "checkpoint")
    removed = checkpoint.with_name(f".{checkpoint.name}.removed")  # as the trainer deletes, and clears away
    checkpoint.rename(removed)
    shutil.rmtree(removed)
    return before - _bytes(target)


def _bytes(directory: Path) -> int:
    return sum(p.stat().st_size for p in directory.rglob("*") if p.is_file())


def main(checkpoint: Path, out: Path) -> None:
    """Copy a checkpoint without the optimizer; see the module."""
    import dataclasses
    import pickle

    from torch.distributed.checkpoint import FileSystemReader

    from nemoflow.export.convert import check_megatron

    check_megatron(checkpoint)
    metadata = FileSystemReader(checkpoint).read_metadata()
    kept = {index: info for index, info in metadata.storage_data.items() if not index.fqn.startswith(PREFIX)}
    if len(kept) == len(metadata.storage_data):
        raise NemoflowError(f"{checkpoint}: holds no optimizer")
    needed = sum(info.length for info in kept.values())
    if (free := shutil.disk_usage(out).free) < needed:
        raise NemoflowError(f"{out}: the weights take {needed:,} bytes, and {free:,} are free; make room")
    files: dict[str, list] = {}
    for index, info in kept.items():
        files.setdefault(info.relative_path, []).append((info.offset, index, info))
    moved = {}
    for name, items in files.items():
        with (checkpoint / name).open("rb") as source, (out / name).open("wb") as target:
            for offset, index, info in sorted(items, key=lambda item: item[0]):
                moved[index] = dataclasses.replace(info, offset=target.tell())
                source.seek(offset)
                left = info.length
                while left:
                    chunk = source.read(min(left, _CHUNK))
                    if not chunk:
                        raise NemoflowError(f"{checkpoint / name}: is cut off")
                    target.write(chunk)
                    left -= len(chunk)
            target.flush()
            os.fsync(target.fileno())
    metadata.storage_data = moved
    for part in ("state_dict_metadata", "planner_data", "mcore_data"):
        if isinstance(entries := getattr(metadata, part, None), dict):
            setattr(metadata, part, {name: one for name, one in entries.items() if not name.startswith(PREFIX)})
    (out / ".metadata").write_bytes(pickle.dumps(metadata))
    held = {info.relative_path for info in metadata.storage_data.values()} | {".metadata", "complete.json"}
    tensors = {info.relative_path for info in FileSystemReader(checkpoint).read_metadata().storage_data.values()}
    for path in checkpoint.iterdir():
        if path.is_file() and path.name not in held | tensors:
            shutil.copyfile(path, out / path.name)


if __name__ == "__main__":
    said(Path(sys.argv[2]), main, *map(Path, sys.argv[1:]))
