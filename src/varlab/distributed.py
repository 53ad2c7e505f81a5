"""Splitting work over the processes of torchrun or srun; the default device."""

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WorkSplit:
    """This process's part of the work: the items whose number is `rank` modulo `num_ranks`."""

    rank: int = 0
    num_ranks: int = 1

    @classmethod
    def of_environment(cls) -> "WorkSplit":
        """From the environment variables of torchrun, or of srun; all of the work without them."""
        for rank, num_ranks in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")):
            if num_ranks in os.environ:  # the batch script itself has a SLURM_PROCID, but is no task of a step
                return cls(int(os.environ[rank]), int(os.environ[num_ranks]))
        return cls()


def default_device(device: str | None) -> str:
    """The given device, or this process's GPU among those it sees, or the CPU if there is none. Raises ValueError for a
    device that torch does not know or that is not there, or if more processes run on this machine than it has GPUs."""
    import torch

    if device is not None:
        check_device(device)
        return device
    if not torch.cuda.is_available():
        return "cpu"
    local_rank, visible = (
        int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0))),
        torch.cuda.device_count(),
    )
    if visible == 1:  # the scheduler shows each process its own
        return "cuda:0"
    if local_rank >= visible:
        raise ValueError(
            f"process {local_rank} of this machine has no GPU: {visible} are visible; start {visible} processes"
        )
    return f"cuda:{local_rank}"


def check_device(device: str) -> None:
    """Raises ValueError for a device that torch does not know or that is not there."""
    import torch

    try:
        found = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device={device!r}: give cpu, cuda, cuda:1, mps, ...") from None
    present = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (count := present.get(found.type)) is not None and (found.index or 0) >= count:
        raise ValueError(f"device={device!r}: torch sees {count} devices of this kind")


def use_exact_fp32() -> None:
    """Products and convolutions of fp32 tensors in fp32 on a GPU, where cuDNN's default is TF32, which chooses other
    tokens."""
    import torch

    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def wait_for_files(files: Sequence[Path], timeout: float = 1800, every: float = 2.0) -> None:
    """Returns once the other processes have written their files. Raises ValueError if none appears for `timeout`
    seconds."""
    since, num_before = time.monotonic(), -1
    while missing := [file for file in files if not file.is_file()]:
        if len(missing) != num_before:
            log.info("waiting for %d files of other processes, first %s", len(missing), missing[0].name)
            since, num_before = time.monotonic(), len(missing)
        if time.monotonic() - since > timeout:
            raise ValueError(
                f"another process died or hangs: {len(missing)} of {len(files)} files are missing after {timeout / 60:g}"
                f" minutes without a new one, first {missing[0]}; the same command continues from what there is"
            )
        time.sleep(every)
