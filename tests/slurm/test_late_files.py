"""A shared file system that shows to a machine only seconds later what another one has written."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from box import Box, wait

SECONDS = "15"
PROGRAM = Path(__file__).with_name("late_files.py")

IN_ITS_OWN_VIEW = """
umount -l "$4"
"$1" "$2" "$3" "$4" "$5" &
until mountpoint -q "$4"; do sleep 0.1; done
cd "$4"
shift 5
"$@"
code=$?
cd /
umount -l "$OLDPWD"
exit $code
"""


@contextmanager
def mounted(directory: Path, mountpoint: Path) -> Iterator[None]:
    command = [sys.executable, str(PROGRAM), str(directory), str(mountpoint), SECONDS]
    program = subprocess.Popen(command)
    try:
        wait(mountpoint.is_mount, "mount")
        yield
    finally:
        subprocess.run(["umount", "-l", str(mountpoint)], check=True)
        program.wait(20)


def test_the_controller_and_the_nodes_see_each_other_late(slurm: Box, demo, tmp_path):
    before = slurm.jobs()
    path, behind = demo.path, tmp_path / "behind"
    path.rename(behind)
    path.mkdir()
    command = demo._command("pretrain/demo@phase2")
    view = [sys.executable, str(PROGRAM), str(behind), str(path), SECONDS]
    unshare = ["unshare", "--mount", "--propagation", "private", "sh", "-c", IN_ITS_OWN_VIEW, "sh", *view]
    command |= {"args": [*unshare, *command["args"]], "cwd": "/"}
    with mounted(behind, path):  # for the nodes, which were started before; the controller has a view of its own
        done = subprocess.run(**command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=400)
        logs = "".join(p.read_text() for p in (path / "logs/slurm").rglob("*.log"))
    assert done.returncode == 0, done.stdout + logs
    assert "which the file system does not show yet" in logs
    assert len(slurm.jobs().keys() - before.keys()) == 2, done.stdout
    one, two = sorted((behind / "artifacts/pretrain").iterdir(), key=lambda p: max(demo.iterations(p)))
    assert demo.iterations(one) == list(range(1, 21))
    assert demo.iterations(two) == list(range(21, 41))
    assert (behind / "pretrain/demo@phase2").readlink().name == "at-40"
