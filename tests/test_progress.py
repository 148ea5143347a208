"""Work on many files: order, errors, and lines that say how much, how fast and how long still."""

import threading
import time

import pytest

from nemoflow import progress
from nemoflow.progress import Progress, duration, human, in_threads


@pytest.fixture
def clock(monkeypatch):
    """Seconds as the test sets them."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_results_come_in_order_whoever_is_first():
    def work(number: int, seconds: float) -> int:
        time.sleep(seconds)
        return number

    done = in_threads(work, [(0, 0.05), (1, 0), (2, 0.02), (3, 0)], 3, Progress(print, 4, 0))
    assert done == [0, 1, 2, 3]


def test_the_first_error_ends_the_work_of_all_threads_at_once():
    started, added, begun = threading.Event(), [], []
    meter = Progress(lambda _: None, 5, 0)

    def work(number: int) -> None:
        begun.append(number)
        if number == 0:
            started.wait(10)
            raise ValueError("the reason")
        for _ in range(2000):  # for 20 s, unless it is stopped
            meter.add(1)
            added.append(1)
            started.set()
            time.sleep(0.01)

    with pytest.raises(ValueError, match="the reason"):
        in_threads(work, [(number,) for number in range(5)], 2, meter)
    assert len(added) < 2000
    assert len(begun) <= 3


def test_lines_are_rare_and_say_how_much_how_fast_and_how_long(clock):
    lines = []
    meter = Progress(lines.append, 4, 4_000_000)
    meter.add(1_000_000, kept=True, files=1)  # from an earlier attempt: says nothing of the speed
    clock[0] += 5
    meter.add(100_000)
    assert lines == []
    clock[0] += 5
    meter.add(900_000, files=1)
    assert lines == ["2/4 files, 2.0 MB of 4.0 MB, 0.1 MB/s, 20 s left"]
    clock[0] += 9
    meter.add(1_000_000)
    assert len(lines) == 1
    clock[0] += 1
    meter.add(-1_000_000, kept=True)  # it was broken and is fetched again
    assert lines[1:] == ["2/4 files, 2.0 MB of 4.0 MB, 0.1 MB/s, 20 s left"]


def test_work_without_bytes_is_measured_in_files(clock):
    lines = []
    meter = Progress(lines.append, 1000, 0)
    clock[0] += 10
    meter.add(files=40)
    assert lines == ["40/1,000 files, 4 min left"]


def test_sizes_and_times_for_people():
    assert [human(n) for n in (0, 999, 1000, 1_234_567, 5e9, 7.25e15)] == [
        "0 B", "999 B", "1.0 kB", "1.2 MB", "5.0 GB", "7250.0 TB"
    ]  # fmt: skip
    assert [duration(n) for n in (0.4, 119, 600, 7199, 9000)] == ["0 s", "119 s", "10 min", "120 min", "2.5 h"]
