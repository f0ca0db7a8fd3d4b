"""Start a Slurm of one node for a test: munged, slurmctld and slurmd on 127.0.0.1, with their files in one folder."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue")
# No cgroups and no accounting, which need a prepared machine; a job that is queued again may start after 5 s, not 120.
CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmctldPort={ctld_port}
SlurmdPort={d_port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=4000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> list[str]:
    """The programs that are not installed here (`apt install slurm-wlm munge`); daemons lie in sbin, which a user's PATH may lack."""
    return [p for p in PROGRAMS if shutil.which(p, path=_path()) is None]


def _path() -> str:
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


def free_ports(count: int) -> list[int]:
    held = [socket.socket() for _ in range(count)]
    for s in held:
        s.bind(("127.0.0.1", 0))
    numbers = [s.getsockname()[1] for s in held]
    for s in held:
        s.close()
    return numbers


@contextlib.contextmanager
def running(folder: Path, cpus: int = 2) -> Iterator[dict[str, str]]:
    """The environment variables with which sbatch, srun and scontrol find this Slurm, while it runs. Raises RuntimeError with its logs."""
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o600)
    host = socket.gethostname().split(".")[0]
    ctld_port, d_port = free_ports(2)
    text = CONFIG.format(host=host, user=getpass.getuser(), folder=folder, ctld_port=ctld_port, d_port=d_port, cpus=cpus)
    (folder / "slurm.conf").write_text(text, encoding="utf-8")
    (folder / "cgroup.conf").write_text("CgroupAutomount=no\n", encoding="utf-8")
    environment = {**os.environ, "PATH": _path(), "SLURM_CONF": str(folder / "slurm.conf")}
    munge = [f"--{key}={folder}/munge.{key.split('-')[0]}" for key in ("socket", "key-file", "pid-file", "log-file", "seed-file")]
    started: list[subprocess.Popen] = []

    def start(*command: str) -> None:
        with (folder / f"{command[0]}.said").open("wb") as said:
            started.append(subprocess.Popen(command, env=environment, stdout=said, stderr=said, start_new_session=True))

    try:
        start("munged", "--foreground", "--force", *munge)
        _wait(lambda: (folder / "munge.socket").exists(), folder, started)
        start("slurmctld", "-D", "-f", str(folder / "slurm.conf"))
        start("slurmd", "-D", "-f", str(folder / "slurm.conf"))
        idle = ["sinfo", "--noheader", "--format=%T"]
        _wait(lambda: subprocess.run(idle, env=environment, capture_output=True, text=True).stdout.strip() == "idle", folder, started)
        yield environment
    finally:
        if len(started) == 3:  # end the jobs of a failed test first, with their steps
            subprocess.run(["scancel", "--full", f"--user={getpass.getuser()}"], env=environment, capture_output=True, timeout=60)
            time.sleep(1)
        for process in reversed(started):
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(ready, folder: Path, started: list[subprocess.Popen], seconds: float = 60) -> None:
    deadline = time.time() + seconds
    while not ready():
        if time.time() > deadline or any(p.poll() is not None for p in started):
            logs = [f"{p.name}: {p.read_text(errors='replace')[-1500:]}" for p in sorted(folder.glob("*.log")) + sorted(folder.glob("*.said"))]
            raise RuntimeError("Slurm did not come up\n" + "\n".join(logs))
        time.sleep(0.2)
