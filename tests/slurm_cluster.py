"""A real SLURM of one node for tests: munged, slurmctld and slurmd, started and stopped here.

All they write lies in one folder, on free ports. Of the machine itself only a link to their
configuration is made in /etc/slurm, and taken away again.
"""

from __future__ import annotations

import fcntl
import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol")
PATH = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])  # daemons are not on every path
ENVIRONMENT = {**os.environ, "PATH": PATH, "DEBIAN_FRONTEND": "noninteractive"}
# Where every command looks, those within jobs too: Snakemake's jobs drop the variable SLURM_CONF.
LINK = Path("/etc/slurm/slurm.conf")

MARK = "# Written by tests/slurm_cluster.py"
# CPUs=4 whatever the machine has: jobs here are small. The scheduler looks every second, and a job that
# is told to end has KillWait=5 seconds for it.
CONFIG = """\
{mark}
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmdParameters=config_overrides
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
MpiDefault=none
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
AccountingStorageType=accounting_storage/none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
MinJobAge=3600
KillWait=5
ReturnToService=2
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 RealMemory={memory} Gres=gpu:fake:2 State=UNKNOWN
PartitionName=cpu Nodes={host} Default=YES MaxTime=60 State=UP
PartitionName=gpu Nodes={host} MaxTime=60 State=UP
"""
# Two GPUs that are none: SLURM counts device files, whichever, and sets CUDA_VISIBLE_DEVICES.
GRES = "NodeName={host} Name=gpu Type=fake File=/dev/null,/dev/zero\n"


class Unavailable(Exception):
    """Why no SLURM can be had here."""


def command(*arguments: str) -> str:
    """Run a command and return what it prints."""
    done = subprocess.run(arguments, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise Unavailable(f"{' '.join(arguments)}: {(done.stderr or done.stdout).strip()[-300:]}")
    return done.stdout


def ensure_programs() -> None:
    """SLURM is installed, or is installed now: by root, by apt, where no init system starts its services."""
    missing = [name for name in PROGRAMS if not shutil.which(name, path=PATH)]
    if not missing:
        return
    if not shutil.which("apt-get") or Path("/run/systemd/system").exists():
        raise Unavailable(f"{missing[0]} is missing, and tests install it in Debian containers only")
    command("apt-get", "update")
    command("apt-get", "install", "-y", "--no-install-recommends", "slurm-wlm", "munge")


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def configure(folder: Path) -> None:
    """Write the configuration and a key for munge."""
    filled = dict(
        mark=MARK,
        host=socket.gethostname().split(".")[0],
        folder=folder,
        user=getpass.getuser(),
        ports=free_ports(2),
        memory=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2**20 * 9 // 10,  # MB
    )
    (folder / "slurm.conf").write_text(CONFIG.format(**filled))
    (folder / "gres.conf").write_text(GRES.format(**filled))
    for name in ("state", "spool"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o400)


def start(folder: Path) -> None:
    """Start the three daemons and wait until the node is idle."""
    files = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    # --force: a temporary folder of one user only is what munge takes for a mistake.
    command("munged", "--force", *(f"--{option}={folder}/munge.{end}" for option, end in files.items()))
    command("slurmctld", "-f", str(folder / "slurm.conf"))
    command("slurmd", "-f", str(folder / "slurm.conf"))
    for _ in range(60):
        with suppress(Unavailable):
            if command("sinfo", "-h", "-o", "%T").strip() == "idle":
                return
        time.sleep(0.5)
    raise Unavailable(f"the node isn't idle after 30 s: {(folder / 'slurmctld.log').read_text()[-500:]}")


def stop(folder: Path) -> None:
    """Cancel what is left, end the daemons by their pid files and take the link away."""
    with suppress(Unavailable):
        command("scancel", "--full", "--signal=KILL", "--user", getpass.getuser())
        command("scancel", "--user", getpass.getuser())
    for name in ("slurmd", "slurmctld", "munge"):
        with suppress(FileNotFoundError, ProcessLookupError):
            os.kill(int((folder / f"{name}.pid").read_text()), signal.SIGTERM)
    LINK.unlink(missing_ok=True)


@contextmanager
def cluster(folder: Path) -> Iterator[None]:
    """A running SLURM: partitions `cpu` and `gpu`, 4 CPUs, 2 fake GPUs, no accounting.

    Raises:
        Unavailable: it can't be had here, and why.
    """
    if os.getuid() != 0:
        raise Unavailable("only root may start SLURM's daemons here")
    if LINK.exists() and not LINK.read_text().startswith(MARK):
        raise Unavailable(f"{LINK}: this machine has a SLURM of its own")
    with (Path(tempfile.gettempdir()) / "ebdiff-tests-slurm.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Unavailable("other tests run one here at the moment") from None
        if LINK.is_symlink():
            stop(LINK.resolve().parent)  # left by tests that were killed
        ensure_programs()
        configure(folder)
        LINK.parent.mkdir(exist_ok=True)
        LINK.symlink_to(folder / "slurm.conf")
        try:
            start(folder)
            yield
        finally:
            stop(folder)
