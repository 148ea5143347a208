"""Signs of life, and which process is where the others are not."""

import time

from nemoflow import hang


def test_patience_follows_the_median_iteration(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    pulse = hang.Pulse(20, 10)
    assert pulse.limit == 60, "a start takes longer"
    for n in range(5):
        pulse.beat(n)
        now[0] += 2
    pulse.beat()  # an evaluation: no iteration, and a sign of life
    assert pulse.limit == 40
    now[0] += 40
    assert pulse.still() is None
    now[0] += 1
    assert pulse.still() == 41
    pulse.beat(saved=30)
    assert pulse.limit == 150, "a save takes what it takes"
    pulse.longest_save = 0
    pulse.seconds.clear()
    pulse.seconds.append(0.01)
    assert pulse.limit == 10
    assert hang.Pulse(None, 10).limit == float("inf")


DUMP = """\
Process {pid}: python -m train
Python v3.12

Thread {pid} (idle): "MainThread"
    {frame} (module.py:{line})
    main (train.py:7)
Thread 99 (idle): "other"
    {pid} (elsewhere.py:1)
"""


def stacks(*processes: tuple[str, str, str]) -> str:
    return "".join(
        f"== {node} process {pid} ({state})\n{DUMP.format(pid=pid, frame=frame, line=pid)}\n"
        for pid, (node, state, frame) in enumerate(processes)
    )


def test_the_odd_one_out():
    waiting, busy = ("n1", "sleeping", "all_reduce"), ("n3", "running", "read_file")
    assert hang.suspect(stacks(waiting, ("n2", "sleeping", "all_reduce"), busy)) == "n3"
    assert hang.suspect(stacks(waiting, ("n2", "stopped", "all_reduce"))) == "n2"
    assert hang.suspect(stacks(waiting, busy)) is None, "of two nobody knows which"
    assert hang.suspect(stacks(waiting, waiting)) is None
    assert hang.suspect("py-spy is not installed here") is None
