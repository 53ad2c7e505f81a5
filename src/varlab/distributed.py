"""Splitting work over the processes of torchrun; the default device."""

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
        """From the environment variables of torchrun; all of the work without them."""
        return cls(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))


def default_device(device: str | None) -> str:
    """The given device, or this process's GPU, or the CPU if there is none."""
    import torch

    return device or (f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")


def wait_for_files(files: Sequence[Path]) -> None:
    """Returns once the other processes have written their files."""
    while missing := [file for file in files if not file.is_file()]:
        log.info("waiting for %d files of other processes, first %s", len(missing), missing[0].name)
        time.sleep(2)
