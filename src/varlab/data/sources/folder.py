"""`source=folder`: a folder of images, one subfolder per class."""

import os
from collections import Counter
from pathlib import Path

from varlab.data.shard_files import EXTENSIONS
from varlab.data.sources.items import Item, check_share, extension_of, lines_of, split_off
from varlab.data.sources.labels import UNLABELED
from varlab.data.write_shards import Source

SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation", "test", "testing")}


def is_hidden(name: str) -> bool:
    """Whether a file or folder belongs to the system or an editor: `._x.png`, `.ipynb_checkpoints`, `__MACOSX`."""
    return name.startswith(".") or name == "__MACOSX"


def subfolders(folder: Path) -> list[Path]:
    """The folders in a folder, linked ones too. Names that are all numbers are sorted as numbers."""
    found = [sub for sub in folder.iterdir() if sub.is_dir() and not is_hidden(sub.name)]
    are_numbers = all(sub.name.isdecimal() for sub in found)
    return sorted(found, key=lambda sub: (int(sub.name) if are_numbers else 0, sub.name))


def files_below(folder: Path) -> list[Path]:
    """All files in a folder and its subfolders, linked ones too, sorted."""
    found: list[Path] = []
    seen: set[str] = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [] if os.path.realpath(root) in seen else [name for name in folders if not is_hidden(name)]
        if os.path.realpath(root) not in seen:
            found += [Path(root) / name for name in files if not is_hidden(name)]
        seen.add(os.path.realpath(root))
    return sorted(found)


def is_caption(file: Path) -> bool:
    """Whether a file is the text file of an image's name."""
    return file.suffix == ".txt" and any(file.with_suffix(f".{extension}").is_file() for extension in EXTENSIONS)


def class_tree(folder: Path, notes: list[str]) -> dict[str, list[Path]]:
    """Image files by class folder; what is left out is added to `notes`. Raises ValueError if there are none."""
    classes: dict[str, list[Path]] = {}
    flat = sorted(file for file in folder.iterdir() if file.is_file() and extension_of(file) in EXTENSIONS)
    if flat and not subfolders(folder):
        notes.append(f"{folder} has no class folders: its images have no labels, and are of one class")
        classes[UNLABELED[0]] = [file for file in flat if not is_hidden(file.name)]
    packed = set(flat) if classes else set()
    beside = (file for file in folder.iterdir() if file.is_file() and file not in packed and not is_hidden(file.name))
    others: Counter[str] = Counter(f".{extension_of(file)}" for file in beside if not is_caption(file))
    for sub in subfolders(folder):
        files = files_below(sub)
        classes[sub.name] = [file for file in files if extension_of(file) in EXTENSIONS]
        others.update(
            f".{extension_of(file)}" for file in files if extension_of(file) not in EXTENSIONS and not is_caption(file)
        )
    if not any(classes.values()):
        raise ValueError(
            f"{folder} holds no images: expected one folder for each class (or images without labels), with files of type"
            f" {' '.join(f'.{extension}' for extension in sorted(EXTENSIONS))}"
        )
    if empty := [name for name, files in classes.items() if not files]:
        notes.append(f"{folder}: classes without images are left out: {', '.join(empty)}")
    if others:
        kinds = ", ".join(f"{count} {kind}" for kind, count in others.most_common())
        notes.append(f"{folder}: files left out: {kinds}")
    return {name: files for name, files in classes.items() if files}


def captions_beside(image: Path) -> tuple[str, ...]:
    """The lines of the text file of an image's name, if there is one. Raises ValueError naming it if it is no UTF-8 text."""
    file = image.with_suffix(".txt")
    try:
        return lines_of(file.read_text(encoding="utf-8-sig")) if file.is_file() else ()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error}") from None


def split_folders(path: Path, notes: list[str]) -> dict[str, Path]:
    """The folders of the splits, by their usual names; the folder itself if it holds classes."""
    names = [sub.name for sub in subfolders(path)]
    found = {}
    for split, usual in SPLITS.items():
        present = [name for name in usual if name in names]
        if present:
            found[split] = path / present[0]
            notes += [f"{path / name} is left out: {present[0]} is the split {split}" for name in present[1:]]
    if "train" not in found:
        return {"train": path}
    notes += [f"{folder} is the split {split}" for split, folder in found.items()]
    if others := sorted(set(names) - {name for usual in SPLITS.values() for name in usual}):
        notes.append(f"{path}: folders left out beside the splits: {', '.join(others)}")
    return found


def folder_source(path: str | Path | None, val_share: float = 0.1, seed: int = 0) -> Source:
    """A folder of class folders, or of splits (`train`; `val`, `validation` or `test`) with class folders each. Labels
    number the sorted names. Instead of class folders, there may be images without labels. The lines of `NAME.txt` are captions
    of `NAME.png`.

    Without a validation split, `val_share` of each class (at least one image, if it has two) becomes one.
    """
    if path is None:
        raise ValueError("source=folder needs path=FOLDER with one subfolder per class")
    check_share(val_share)
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"path={path} is not a folder")
    notes: list[str] = []
    trees = {split: class_tree(folder, notes) for split, folder in split_folders(path, notes).items()}
    names = list(trees["train"])
    if unknown := [name for name in trees.get("val", {}) if name not in trees["train"]]:
        raise ValueError(f"the validation images have class {unknown[0]!r}, which the training images do not have")
    splits = {
        split: [
            Item(label, extension_of(file), file=file, captions=captions_beside(file))
            for label, name in enumerate(names)
            for file in tree.get(name, [])
        ]
        for split, tree in trees.items()
    }
    if num := sum(bool(item.captions) for items in splits.values() for item in items):
        notes.append(f"images with captions, in text files of their names: {num:,}")
    splits = splits if "val" in splits else split_off(splits["train"], val_share, seed)
    return Source("folder", path.name, names, splits, notes)
