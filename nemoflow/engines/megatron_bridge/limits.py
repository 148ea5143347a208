"""When a run must be left: what the loss says, and what the clock says. Imports no torch."""

import collections
import statistics
import time
from collections.abc import Iterable

GRACE = 30
"""Seconds between the planned leaving and the job's end for what nobody measures: taking the processes down."""


class Guard:
    """Tells a loss that ran away from one that is only noisy.

    spike       a loss above this multiple of the running median is high; None: never
    patience    so many high losses without one that is not mean that training has diverged
    losses      the latest losses of the stage so far, where it goes on

    The median is that of the last WINDOW losses that were not high, and says nothing before there are MINIMUM.
    """

    WINDOW = 128
    MINIMUM = 10

    def __init__(self, spike: float | None, patience: int, losses: Iterable[float] = ()):
        self.spike, self.patience = spike, patience
        self.usual: collections.deque[float] = collections.deque(maxlen=self.WINDOW)
        self.high = 0
        """How many losses in a row have been high."""
        for loss in losses:
            self.see(loss)

    @property
    def median(self) -> float:
        return statistics.median(self.usual)

    def see(self, loss: float) -> bool:
        """Whether training has diverged, now that this is the next loss."""
        if self.spike is not None and len(self.usual) >= self.MINIMUM and loss > self.spike * self.median:
            self.high += 1
        else:
            self.high = 0
            self.usual.append(loss)
        return self.high >= self.patience


class Clock:
    """Tells when there is just time enough for another iteration with its evaluation, and for two saves.

    deadline    when the job is ended from outside, in seconds since the epoch; None: never
    started     when this process began
    save        seconds of the longest save so far; None before one has been measured: then the time that starting took
                stands for it, in which as much is read or made

    Two, for the storage may be twice as slow when many jobs end at once.
    """

    def __init__(self, deadline: float | None, started: float, save: float | None = None):
        self.deadline, self.started, self.save = deadline, started, save
        self.first = self.longest = 0.0
        self._ended: float | None = None

    def iterated(self) -> None:
        """An iteration has ended. The time to the next end includes what is between: evaluations and saves."""
        now = time.time()
        if self._ended is None:
            self.first = now - self.started
        else:
            self.longest = max(self.longest, now - self._ended)
        self._ended = now

    def saved(self, seconds: float) -> None:
        self.save = max(self.save or 0.0, seconds)

    @property
    def margin(self) -> float:
        """Seconds before the deadline at which to leave."""
        return 2 * (self.first if self.save is None else self.save) + self.longest + GRACE

    def up(self) -> bool:
        """Whether to leave now."""
        return self.deadline is not None and time.time() + self.margin >= self.deadline
