"""`source=ilsvrc2012`: ImageNet-1k from the original archives."""

import io
import re
import tarfile
from pathlib import Path

from scipy.io import loadmat

from varlab.data.sources.items import Item
from varlab.data.write_shards import Source


def ilsvrc2012_source(train: str | Path | None, val: str | Path | None, devkit: str | Path | None) -> Source:
    """ImageNet-1k from the three original archives. Nothing is extracted: images are byte ranges of the archives.

    Labels number the sorted WordNet ids, as is standard; the ids and words come from the devkit.
    """
    if train is None or val is None or devkit is None:
        raise ValueError("source=ilsvrc2012 needs train=, val= and devkit=: the three archives as downloaded")
    train, val, devkit = Path(train), Path(val), Path(devkit)
    for file in (train, val, devkit):
        if not file.is_file():
            raise ValueError(f"{file} does not exist: source=ilsvrc2012 needs train=, val= and devkit= as downloaded")
    words, truth = read_devkit(devkit)
    ids = sorted(words)
    train_items: list[Item] = []
    with tarfile.open(train, "r:") as outer, open(train, "rb") as stream:
        for member in outer:
            wordnet_id = Path(member.name).stem
            if wordnet_id not in words:
                raise ValueError(f"{train} holds {member.name!r}, which is not in the devkit")
            stream.seek(member.offset_data)
            with tarfile.open(fileobj=stream, mode="r:") as inner:
                label = ids.index(wordnet_id)
                train_items += [
                    Item(label, "jpg", None, train, info.offset_data, info.size) for info in inner if info.isfile()
                ]
    val_items = []
    with tarfile.open(val, "r:") as tar:
        for info in tar:
            number = re.search(r"_val_(\d+)\.JPEG$", info.name)
            if number is None or not 1 <= int(number[1]) <= len(truth):
                raise ValueError(f"{val} holds {info.name!r}, for which the devkit has no label")
            val_items.append(Item(ids.index(truth[int(number[1]) - 1]), "jpg", None, val, info.offset_data, info.size))
    return Source(
        "ilsvrc2012", "ilsvrc2012", [f"{words[i]} ({i})" for i in ids], {"train": train_items, "val": val_items}
    )


def read_devkit(devkit: Path) -> tuple[dict[str, str], list[str]]:
    """(words by WordNet id of the leaf classes, WordNet id of each validation image in order)."""
    with tarfile.open(devkit) as tar:
        files = {Path(info.name).name: info for info in tar if info.isfile()}
        for name in ("meta.mat", "ILSVRC2012_validation_ground_truth.txt"):
            if name not in files:
                raise ValueError(f"{devkit} holds no {name}: give ILSVRC2012_devkit_t12.tar.gz")
        meta, truth = (tar.extractfile(files[name]) for name in ("meta.mat", "ILSVRC2012_validation_ground_truth.txt"))
        assert meta is not None and truth is not None
        synsets = loadmat(io.BytesIO(meta.read()), squeeze_me=True)["synsets"]
        numbers = [int(line) for line in truth.read().split()]
    leaves = [synset for synset in synsets if int(synset["num_children"]) == 0]
    by_number = {int(synset["ILSVRC2012_ID"]): str(synset["WNID"]) for synset in leaves}
    words = {str(synset["WNID"]): str(synset["words"]).split(",")[0] for synset in leaves}
    return words, [by_number[number] for number in numbers]
