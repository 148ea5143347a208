"""Work in several processes that share what was loaded before, and the line that says how fast it goes."""

import mmap
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from nemoflow.errors import NemoflowError
from nemoflow.progress import EVERY, duration, human

if TYPE_CHECKING:  # not for those who need one process only
    from multiprocessing.connection import Connection

_PR_SET_PDEATHSIG = 1


class Speed:
    """Counts documents, bytes of text and tokens in any process, and shows a line now and then.

    pieces: how many pieces of work there are; `finished` of them were done before. `show` gets lines such as "3/16
    shards, 1,234,567 documents, 4.5 GB, 1.3 billion tokens; 7,410 documents/s, 118.3 MB/s, 35.2 Mtokens/s, 95 s left".
    """

    def __init__(self, show: Callable[[str], None], pieces: int, finished: int = 0):
        self._show, self._pieces, self._kept = show, pieces, finished
        self.finished = finished
        self._started = self._shown = time.monotonic()
        self._counts = np.zeros((1, 3), np.int64)

    def share(self, processes: int) -> None:
        """Count from now on in that many processes to be forked, each in its own row."""
        self._counts = np.frombuffer(mmap.mmap(-1, processes * 24), np.int64).reshape(processes, 3)

    def counter(self, process: int = 0) -> Callable[[int, int, int], None]:
        """A function that counts documents, bytes and tokens for one process."""
        own = self._counts[process]

        def count(documents: int, size: int, tokens: int) -> None:
            own[:] += documents, size, tokens
            self.tell()

        return count

    def tell(self) -> None:
        """Show a line when it is time to."""
        now = time.monotonic()
        if now - self._shown < EVERY:
            return
        self._shown = now
        documents, size, tokens = self._counts.sum(0).tolist()
        took = now - self._started
        done = self.finished - self._kept
        left = f", {duration(took / done * (self._pieces - self.finished))} left" if done else ""
        self._show(
            f"{self.finished}/{self._pieces} shards, {documents:,} documents, {human(size)}, {tokens:,} tokens; "
            f"{documents / took:,.0f} documents/s, {size / took / 1e6:.1f} MB/s, {tokens / took / 1e6:.1f} Mtokens/s"
            f"{left}"
        )


def in_processes(
    work: Callable[[int, Callable[[int, int, int], None]], None], pieces: Sequence[int], processes: int, speed: Speed
) -> Iterator[int]:
    """Do `work(piece, count)` for each piece, several at a time, and yield each piece that is done.

    The processes are forks of this one: what it has loaded is theirs for nothing. They end with it, even when it is
    killed. With one process, or one piece, this one does the work.

    Raises the first NemoflowError of any, and NemoflowError when a process dies.
    """
    processes = min(processes, len(pieces))
    if processes <= 1:
        for piece in pieces:
            work(piece, speed.counter())
            speed.finished += 1
            yield piece
        return
    yield from _in_forks(work, pieces, processes, speed)


def _in_forks(work: Callable, pieces: Sequence[int], processes: int, speed: Speed) -> Iterator[int]:
    import multiprocessing
    import warnings
    from multiprocessing.connection import wait

    context = multiprocessing.get_context("fork")
    speed.share(processes)
    waiting = list(reversed(pieces))
    children, busy = [], {}
    try:
        with warnings.catch_warnings():
            # numpy's linear algebra has threads, which wait for work that the children never give
            warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork", category=DeprecationWarning)
            for number in range(processes):
                ours, theirs = context.Pipe()
                child = context.Process(target=_child, args=(work, theirs, speed.counter(number), os.getpid()))
                child.start()
                theirs.close()
                children.append(child)
                busy[ours] = waiting.pop()
                ours.send(busy[ours])
        while busy:
            for connection in wait(list(busy), timeout=1):
                piece = busy.pop(connection)
                try:
                    error = connection.recv()
                except (EOFError, ConnectionResetError):
                    raise NemoflowError(
                        f"shard {piece}: the process that made it has died, perhaps for want of memory; run again, "
                        "with fewer threads"
                    ) from None
                if error:
                    raise error
                speed.finished += 1
                yield piece
                if waiting:
                    busy[connection] = waiting.pop()
                    connection.send(busy[connection])
            speed.tell()
    finally:
        for child in children:
            child.kill()
            child.join()


def _child(work: Callable, pieces: "Connection", count: Callable[[int, int, int], None], parent: int) -> None:
    import ctypes

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is told too, and ends this process
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    while True:
        piece = pieces.recv()
        try:
            work(piece, count)
        except Exception as error:
            pieces.send(error)
            return
        pieces.send(None)
