"""A real Slurm on one machine: a controller and four nodes with eight GPUs each, whose device files are /dev/null.

To be started in a mount namespace of its own (`make test-slurm`): jobs find Slurm's configuration at /etc/slurm alone,
since Snakemake's plugin takes SLURM_CONF from their environment.
"""

import os
import platform
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol")
ETC = Path("/etc/slurm")

CONFIG = """\
ClusterName=box
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A job that is started again waits until its former credential has expired
AuthInfo=socket={dir}/run/munge.socket,cred_expire=6
StateSaveLocation={dir}/state
SlurmdSpoolDir={dir}/spool/%n
SlurmctldPidFile={dir}/run/slurmctld.pid
SlurmdPidFile={dir}/run/slurmd-%n.pid
SlurmctldLogFile={dir}/log/slurmctld.log
SlurmdLogFile={dir}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0,bf_interval=1,requeue_delay=0
SlurmdParameters=config_overrides
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
KillWait=3
SlurmdTimeout=10
MessageTimeout=5
MinJobAge=3600
JobFileAppend=1
"""
PARTITIONS = """\
PartitionName=batch Nodes=ALL Default=YES DefaultTime=30 MaxTime=4:00:00 PriorityTier=10
PartitionName=urgent Nodes=ALL MaxTime=1:00:00 PriorityTier=100 PreemptMode=OFF
"""


class Box:
    """A Slurm in `directory`. Ports from `port` on are taken."""

    nodes = ("n1", "n2", "n3", "n4")

    def __init__(self, directory: Path, port: int):
        self.dir, self.port = directory, port

    def start(self) -> None:
        """Start everything, and wait until all nodes are idle."""
        if missing := [p for p in PROGRAMS if shutil.which(p) is None]:
            raise RuntimeError(f"{', '.join(missing)}: not installed; make test-slurm installs them")
        if ETC.exists() and not os.path.ismount(ETC):
            raise RuntimeError(f"{ETC} is this machine's own; run make test-slurm, which hides it")
        host = platform.node().partition(".")[0]
        for name in ("state", "log", "run", "dev", "munge", *(f"spool/{n}" for n in self.nodes)):
            (self.dir / name).mkdir(parents=True, mode=0o755)
        (self.dir / "munge").chmod(0o700)
        key = self.dir / "munge/key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        for n in range(8):
            (self.dir / f"dev/gpu{n}").symlink_to("/dev/null")
        nodes = "".join(
            f"NodeName={n} NodeHostname={host} NodeAddr=127.0.0.1 Port={self.port + 1 + i} CPUs=64 RealMemory=512000 "
            "Gres=gpu:h100:8\n"
            for i, n in enumerate(self.nodes)
        )
        config = CONFIG.format(host=host, port=self.port, dir=self.dir)
        (self.dir / "slurm.conf").write_text(config + nodes + PARTITIONS)
        (self.dir / "gres.conf").write_text(f"AutoDetect=off\nName=gpu Type=h100 File={self.dir}/dev/gpu[0-7]\n")
        (self.dir / "cgroup.conf").touch()
        for name in ("slurm.conf", "gres.conf", "cgroup.conf"):
            (ETC / name).unlink(missing_ok=True)
            (ETC / name).symlink_to(self.dir / name)
        self.run(
            *("munged", f"--key-file={key}", f"--socket={self.dir}/run/munge.socket", "--force"),
            *(f"--pid-file={self.dir}/run/munged.pid", f"--log-file={self.dir}/log/munged.log"),
            f"--seed-file={self.dir}/munge/seed",
        )
        self.start_controller()
        for node in self.nodes:
            self.up(node)
        wait(lambda: self.run("sinfo", "-hN", "-p", "batch", "-t", "idle", "-o", "%N").count("\n") == 4, "idle nodes")

    def stop(self) -> None:
        """End everything: nothing here is wanted any more."""
        with suppress(subprocess.SubprocessError, AssertionError):
            self.run("scancel", "--user=root", timeout=5)
            wait(lambda: not self.run("squeue", "--noheader"), "end of all jobs", seconds=20)
        for pid in (self.dir / "run").glob("*.pid"):
            self._kill(pid)

    @staticmethod
    def run(*command: str, timeout: float = 30) -> str:
        """What a command printed. Raises CalledProcessError."""
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
        if done.returncode:
            raise subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)
        return done.stdout

    def start_controller(self) -> None:
        self.run("slurmctld")
        wait(lambda: "UP" in self.run("scontrol", "ping"), "a controller")

    def stop_controller(self) -> None:
        """The controller is away: what it keeps in its state directory stays."""
        self._kill(self.dir / "run/slurmctld.pid")

    def up(self, node: str) -> None:
        self.run("slurmd", "-N", node)

    def down(self, node: str) -> None:
        """A node fails: its daemon and all it started are gone."""
        pid = int((self.dir / f"run/slurmd-{node}.pid").read_text())
        for child in psutil.process_iter(["cmdline", "environ", "name"]):
            if (child.info["environ"] or {}).get("SLURMD_NODENAME") == node:
                with suppress(psutil.Error):
                    child.kill()
        os.kill(pid, signal.SIGKILL)
        self.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")

    def jobs(self) -> dict[int, str]:
        """Id -> state of all jobs that Slurm remembers."""
        lines = self.run("squeue", "--states=all", "--noheader", "--format=%A %T").splitlines()
        return {int(line.split()[0]): line.split()[1] for line in lines}

    @staticmethod
    def _kill(pid: Path) -> None:
        with suppress(FileNotFoundError, ValueError, psutil.Error):
            process = psutil.Process(int(pid.read_text()))
            process.kill()
            process.wait(10)
        pid.unlink(missing_ok=True)


def wait(what: Callable[[], object], name: str, seconds: float = 60) -> object:
    """Wait until `what()` is true; fails with `name` when it does not become so."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with suppress(subprocess.SubprocessError):
            if found := what():
                return found
        time.sleep(0.2)
    raise AssertionError(f"no {name} after {seconds} s")
