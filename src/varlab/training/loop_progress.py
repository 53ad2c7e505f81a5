"""Progress of Lightning's loops in a checkpoint, corrected so that a resumed run equals an uninterrupted one.

Lightning counts batches: `ready` when one is fetched, `completed` after the hooks of its end. A checkpoint saved in those
hooks has `completed = ready - 1`; one saved after a validation has equal counts.
"""

from typing import Any


def rescale(checkpoint: dict[str, Any], before: int, now: int) -> None:
    """Counts the batches in those of a run that accumulates `now` instead of `before` batches per step."""
    for count in batches(checkpoint):
        pending = count["ready"] - count["completed"]
        ready = count["ready"] // before * now
        count |= {"ready": ready, "started": ready, "processed": ready, "completed": ready - pending}


def repeat_validation(checkpoint: dict[str, Any], interval: int) -> None:
    """If the checkpoint was saved right before a validation (one every `interval` batches), lets the resumed run begin
    with it; Lightning would skip it."""
    total, _ = batches(checkpoint)
    if total["completed"] == total["ready"] or total["ready"] % interval:
        return
    loops = checkpoint["loops"]["fit_loop"]
    for counts in ("total", "current"):  # as if its first batch had been interrupted
        loops["epoch_loop.val_loop.batch_progress"][counts] |= {
            "ready": 1,
            "started": 1,
            "processed": 0,
            "completed": 0,
        }
    loops["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1  # counted again after the validation


def forget_validation(checkpoint: dict[str, Any]) -> None:
    """Turns a checkpoint saved in the middle of a validation into that of the step before it."""
    for count in batches(checkpoint):
        count["completed"] = count["ready"] - 1
    for count in ("total", "current"):
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"][count]
        progress |= dict.fromkeys(progress, 0)


def batches(checkpoint: dict[str, Any]) -> tuple[dict[str, int], dict[str, int]]:
    """Counts of training batches: of the run, of the epoch."""
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    return progress["total"], progress["current"]
