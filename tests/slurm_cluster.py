"""A Slurm of one node on this machine, for as long as a test takes: munged, slurmctld and slurmd, started here."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel", "sinfo")
MARK = "# Made by a test, which a killed one leaves behind"
CONFIG = Path("/etc/slurm/slurm.conf")  # where jobs look: the variable SLURM_CONF does not reach them


def missing() -> list[str]:
    """What keeps a cluster from being started here."""
    lacking = [name for name in PROGRAMS if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")]
    lacking += [] if os.geteuid() == 0 else ["root"]
    foreign = CONFIG.exists() and MARK not in CONFIG.read_text()
    return lacking + ([f"a free {CONFIG}"] if foreign else [])


@contextmanager
def slurm(folder: Path, cores: int) -> Iterator[dict[str, str]]:
    """Start the cluster; yields the environment in which its commands find it."""
    munge, state = folder / "munge", folder / "slurm"
    munge.mkdir()
    state.mkdir()
    (munge / "key").write_bytes(os.urandom(128))
    (munge / "key").chmod(0o400)
    user = pwd.getpwnam("munge")
    for path in (munge, munge / "key"):
        os.chown(path, user.pw_uid, user.pw_gid)
    for parent in (folder, *folder.parents):  # munged, not being root, has to reach its socket
        if parent.stat().st_uid == os.getuid() and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o011)
    host = socket.gethostname().split(".")[0]
    CONFIG.parent.mkdir(exist_ok=True)
    CONFIG.write_text(f"""{MARK}
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={munge}/socket
SlurmctldPort={_port()}
SlurmdPort={_port()}
SlurmctldPidFile={state}/slurmctld.pid
SlurmdPidFile={state}/slurmd.pid
StateSaveLocation={state}/state
SlurmdSpoolDir={state}/spool
SlurmctldLogFile={state}/slurmctld.log
SlurmdLogFile={state}/slurmd.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
MinJobAge=3600
KillWait=60
NodeName={host} NodeAddr=127.0.0.1 CPUs={cores} RealMemory=16000 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
""")
    environment = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin"}
    files = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    options = [f"{name}={munge / file}" for name, file in files.items()]
    with ExitStack() as stack:
        stack.callback(CONFIG.unlink)
        for command in (
            ["runuser", "-u", "munge", "--", "munged", "--foreground", *(f"--{name}" for name in options)],
            ["slurmctld", "-D"],
            ["slurmd", "-D", "-N", host],
        ):
            log = stack.enter_context((folder / f"{Path(command[0]).name}.out").open("wb"))
            daemon = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, start_new_session=True
            )
            stack.callback(_end, daemon)
            if "munged" in command:
                _until(lambda: (munge / "socket").exists(), "munged made no socket")
        _until(
            lambda: "idle" in _output(["sinfo", "-h", "-o", "%t"], environment),
            f"the node did not come up: see {state}/slurmd.log",
        )
        yield environment


def _end(daemon: subprocess.Popen[bytes]) -> None:
    daemon.terminate()
    try:
        daemon.wait(20)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()


def _output(command: list[str], environment: dict[str, str]) -> str:
    return subprocess.run(command, env=environment, capture_output=True, text=True).stdout


def _until(there: object, otherwise: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not there():  # type: ignore[operator]
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.1)


def _port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
