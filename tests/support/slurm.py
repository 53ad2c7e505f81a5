"""A real SLURM on this machine: two nodes of eight CPUs, partitions `cpu` and `high`; needs root and Debian's packages."""

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

NODES = ("n1", "n2")
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort=16817
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
AuthType=auth/munge
AuthInfo=socket={folder}/munge/munge.sock,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
ReturnToService=2
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=30
SlurmdTimeout=30
SlurmdParameters=config_overrides
NodeName=n1,n2 NodeHostname={host} NodeAddr=127.0.0.1 Port=17001,17002 CPUs=8 RealMemory=2000 State=UNKNOWN
PartitionName=cpu Nodes=n1,n2 Default=YES MaxTime=60 DefaultTime=10 PriorityTier=1 OverSubscribe=FORCE:4
PartitionName=high Nodes=n1,n2 MaxTime=60 PriorityTier=10
"""


def reason_to_skip() -> str | None:
    """Why there can be no SLURM here."""
    if os.geteuid() != 0:
        return "a SLURM of its own needs root"
    missing = [name for name in ("slurmctld", "slurmd", "munged", "sbatch", "unshare") if shutil.which(name) is None]
    return (
        f"{', '.join(missing)} not installed: apt-get install slurmctld slurmd slurm-client munge" if missing else None
    )


class Slurm:
    """Starts the daemons in `folder`; `stop` ends them."""

    def __init__(self, folder: Path) -> None:
        self.folder, host = folder, socket.gethostname()
        for name in ("munge", "log", "state", "spool-n1", "spool-n2"):
            (folder / name).mkdir(parents=True)
        (folder / "hosts").write_text(f"127.0.0.1 localhost {host} {' '.join(NODES)}\n")
        (folder / "slurm.conf").write_text(CONF.format(folder=folder, host=host))
        (folder / "munge/munge.key").write_bytes(os.urandom(1024))
        (folder / "munge/munge.key").chmod(0o600)
        (folder / "munge").chmod(0o711)
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}
        munge = {"key-file": "munge.key", "socket": "munge.sock", "pid-file": "munged.pid", "seed-file": "seed"}
        options = [f"--{name}={folder}/munge/{file}" for name, file in munge.items()]
        self.call("munged", "--force", *options, f"--log-file={folder}/log/munged.log")
        self.call("slurmctld", "-i")
        for node in NODES:
            self.start_node(node)
        self.wait(lambda: self.call("sinfo", "-h", "-N", "-p", "cpu", "-o", "%T").split() == ["idle"] * 2, 60)

    def start_node(self, node: str) -> None:
        """In namespaces of its own, with its own host name."""
        script = f"hostname {node}; mount --bind {self.folder}/hosts /etc/hosts; exec slurmd -N {node}"
        self.call("unshare", "--uts", "--mount", "bash", "-c", script)

    def call(self, *command: str, **settings) -> str:
        """Output of a command; an error of the command is raised with what it printed."""
        environment = {**os.environ, **self.environment, **settings.pop("variables", {})}
        answer = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, **settings)
        assert answer.returncode == 0, f"{command}: {answer.stdout}{answer.stderr}"
        return answer.stdout

    def wait(self, is_done, seconds: float) -> None:
        """Until a condition holds."""
        end = time.monotonic() + seconds
        while not is_done():
            assert time.monotonic() < end, self.call("squeue", "-a", "-o", "%i %j %T %r") + self.call("sinfo", "-N")
            time.sleep(0.5)

    def state(self, job: str) -> str:
        """State of a job, as `scontrol` tells it."""
        shown = self.call("scontrol", "show", "job", job)
        return shown.partition("JobState=")[2].split()[0]

    def submit(self, script: str, folder: Path, *options: str, **variables: str) -> str:
        """Submits a batch script; its job id."""
        file = folder / "job.sh"
        file.write_text(f"#!/bin/bash\n{script}\n")
        answer = self.call("sbatch", "--parsable", *options, str(file), cwd=folder, variables=variables)
        return answer.strip().partition(";")[0]

    def stop(self) -> None:
        """Ends all jobs and daemons; returns when they have ended."""
        subprocess.run(["scancel", "-u", "root"], env={**os.environ, **self.environment}, check=False)
        time.sleep(1)
        for pattern in ("slurmd-*.pid", "slurmctld.pid", "munge/munged.pid"):
            for file in self.folder.glob(pattern):
                process = file.read_text().strip()
                subprocess.run(["kill", process], check=False)
                end = time.monotonic() + 30
                while Path(f"/proc/{process}").exists() and time.monotonic() < end:
                    time.sleep(0.1)
