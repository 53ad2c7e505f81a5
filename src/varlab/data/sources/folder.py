"""`source=folder`: a folder of images, one subfolder per class."""

from pathlib import Path

from varlab.data.shards import EXTENSIONS
from varlab.data.sources.items import Item, check_share, extension_of, split_off
from varlab.data.write_shards import Source


def class_tree(folder: Path) -> dict[str, list[Path]]:
    """Image files by class folder, both sorted. Raises ValueError if there are none."""
    classes = {
        sub.name: sorted(file for file in sub.rglob("*") if extension_of(file) in EXTENSIONS)
        for sub in sorted(folder.iterdir())
        if sub.is_dir() and not sub.name.startswith(".")
    }
    if not any(classes.values()):
        raise ValueError(
            f"{folder} holds no images: expected one folder for each class with files of type"
            f" {' '.join(f'.{extension}' for extension in sorted(EXTENSIONS))}"
        )
    return {name: files for name, files in classes.items() if files}


def folder_source(path: str | Path | None, val_share: float = 0.1, seed: int = 0) -> Source:
    """A folder of class folders, or of `train` and `val` with class folders each. Labels number the sorted names.

    Without `val`, `val_share` of each class (at least one image, if it has two) becomes the validation set.
    """
    if path is None:
        raise ValueError("source=folder needs path=FOLDER with one subfolder per class")
    check_share(val_share)
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"path={path} is not a folder")
    has_splits = (path / "train").is_dir() and (path / "val").is_dir()
    trees = {
        split: class_tree(path / split if has_splits else path)
        for split in (("train", "val") if has_splits else ("train",))
    }
    names = sorted(trees["train"])
    if has_splits and (unknown := sorted(trees["val"].keys() - trees["train"].keys())):
        raise ValueError(f"{path / 'val'} has class {unknown[0]!r}, which {path / 'train'} does not have")
    splits = {
        split: [
            Item(label, extension_of(file), file=file)
            for label, name in enumerate(names)
            for file in tree.get(name, [])
        ]
        for split, tree in trees.items()
    }
    return Source("folder", path.name, names, splits if has_splits else split_off(splits["train"], val_share, seed))
