"""The settings that decide the result of a run, and what changes in them when it is resumed.

A run is a sequence of stretches: the first began at step 0, each further one where the run was resumed with other settings.
"""

from typing import Any

from varlab.files import flat

# what changes speed and memory only
SPEED = (
    *("module.recompute", "module.attention", "module.loss_chunks", "module.is_compiled"),
    *("data.num_workers", "data.keep", "data.storage"),
)
# what decides where and how a run is carried out and what is written, but not its result
ELSEWHERE = (
    *(
        "name",
        "run_dir",
        "ckpt_path",
        "branch",
        "trunk",
        "accumulate",
        "devices",
        "nodes",
        "compute",
        "logger",
        "trust_code",
    ),
    *("val_every", "save_every", "log_every", "plan", "dry_run", "tokenizer"),
    *(
        "resolution",
        "perceptual",
        "adversarial",
        "model",
        "schedule",
        "optimizer",
        "storage",
    ),  # they are part of `module`
    *("data.path", "data.max_skipped_share", "data.resolution"),
    *("module.tokenizer", "module.init_from", "module.reinitialized", "module.full_steps", "module.trust_code"),
    *SPEED,
    *(
        f"callbacks.{name}"
        for name in ("reseed", "collapse", "record", "last", "branches", "health", "signals", "best")
    ),
    *(f"callbacks.{name}" for name in ("pictures", "artifacts", "progress")),
)


def deciding(config: dict[str, Any]) -> dict[str, Any]:
    """The settings of a resolved config that decide the result of the run, with dotted names."""
    found = {name: value for name, value in flat(config).items() if not name.startswith(ELSEWHERE)}
    return {
        name: value for name, value in found.items() if not name.startswith("trainer.") or name == "trainer.precision"
    }


def changes(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """The settings whose value differs, with their new value; None for one that is gone."""
    names = [*now, *(name for name in before if name not in now)]
    return {name: now.get(name) for name in names if before.get(name) != now.get(name)}


def in_force(stretches: list[dict[str, Any]]) -> dict[str, Any]:
    """The settings after the last stretch; a stretch lists those that differ from the one before."""
    settings: dict[str, Any] = {}
    for stretch in stretches:
        settings |= stretch["settings"]
    return settings
