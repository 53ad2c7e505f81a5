"""Samples of a VAR as a folder: PNG images or one .npz, class grid, filmstrip of scales, and a record of how they were made.

Image i has seed `seed + i`, so the set does not depend on batch size, devices or restarts; existing images are kept.
"""

import contextlib
import copy
import hashlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from varlab import image_grid
from varlab.checkpoints.export_folder import fingerprint, tokenizer_fingerprint
from varlab.data.manifests import cache_folders, is_token_cache, open_array
from varlab.data.resolutions import resolution_of
from varlab.data.shards import ShardReader
from varlab.distributed import WorkSplit, wait_for_files
from varlab.files import load_json, save_json
from varlab.models.conditioning import ConditionEmbedder, label_of
from varlab.models.msvqvae import MSVQVAE
from varlab.models.var import VAR
from varlab.sampling.acceleration import Precision, default_precision, use_bf16
from varlab.sampling.generate import check
from varlab.sampling.search import Scorer, draw_best
from varlab.sampling.token_sampling import SamplingSettings

ADDED = {"best_of": 1, "scorer": None}  # settings that older records lack
NUM_WRITERS = 8  # threads that encode PNG files


def labels_of(
    classes: int | str | Sequence[int | str] | None, num: int, class_names: Sequence[str], num_classes: int
) -> list[int]:
    """The class of each of `num` images: the given ones (names or numbers) in turn, so that all occur equally often. A
    number that is the name of a class is that class.

    `classes`: None uses all classes; "balanced" does too, but raises ValueError if `num` is not a multiple of their
    number.
    """
    if classes in (None, "balanced"):
        if classes == "balanced" and num % num_classes:
            raise ValueError(f"num={num} is not a multiple of {num_classes} classes, as classes=balanced requires")
        chosen = list(range(num_classes))
    else:
        given = [classes] if isinstance(classes, int | str) else list(classes or [])
        chosen = [label_of(str(label), class_names, num_classes) for label in given]
    return [chosen[i % len(chosen)] for i in range(num)]


def labels_like(data: str, split: str, num: int, num_classes: int) -> list[int]:
    """Classes of `num` images in the proportions of a packed set or token cache: evenly spaced among its sorted labels.
    Raises ValueError if the set has other classes than the network."""
    folders = cache_folders(Path(data)) if is_token_cache(data) else []
    found = [np.asarray(open_array(folder / f"{split}.labels.npy", (None,))) for folder in folders]
    labels = np.concatenate(found) if found else ShardReader(data, split).labels
    if len(labels) and int(max(labels)) >= num_classes:
        raise ValueError(f"{data} has class {int(max(labels))}, but the network has {num_classes} classes")
    return np.sort(np.asarray(labels))[((np.arange(num) + 0.5) * len(labels) / num).astype(int)].tolist()


def hash_of_row(row: np.ndarray) -> str:
    """What stands for a vector or an image in the record."""
    return hashlib.sha256(row.tobytes()).hexdigest()[:16]


def read_conditions(file: str, num: int, embedder: ConditionEmbedder) -> np.ndarray:
    """Conditions of `num` images, the rows of a .npy file in turn: vectors, or images as uint8 or in [-1, 1]. Raises ValueError if
    the rows are not what the network takes."""
    shape = embedder.condition_shape
    try:
        rows = np.load(file, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"condition={file} cannot be read: {error}") from None
    if not isinstance(rows, np.ndarray) or rows.ndim == 0 or rows.dtype.kind not in "iuf":
        raise ValueError(f"condition={file} is not an array of numbers with a row for each image")
    if not len(rows) or rows.shape[1:] != shape:
        raise ValueError(f"condition={file} has shape {rows.shape}, but the network takes rows of shape {shape}")
    rows = rows[np.arange(num) % len(rows)]
    is_uint8 = embedder.kind == "image" and rows.dtype == np.uint8
    rows = rows.astype(np.float32) / 127.5 - 1 if is_uint8 else rows.astype(np.float32)
    try:
        embedder.check(torch.from_numpy(rows))
    except ValueError as error:
        raise ValueError(f"condition={file}: {error}") from None
    return rows


def write_samples(
    out: Path,
    tokenizer: MSVQVAE,
    var: VAR,
    conditions: Sequence[int] | np.ndarray,
    settings: SamplingSettings,
    *,
    class_names: Sequence[str] = (),
    seed: int = 0,
    batch_size: int = 50,
    precision: Precision | None = None,
    compiled: str = "none",
    device: str = "cpu",
    npz: bool = False,
    grid: int = 100,
    film_rows: int = 8,
    best_of: int = 1,
    scorer: Scorer | None = None,
    scorer_settings: dict[str, Any] | None = None,
    texts: Sequence[str] | None = None,
) -> None:
    """Writes one image per condition (class labels, or rows of an array) into `out`; the images are split over the
    processes of torchrun.

    `precision`: None is bf16 on a GPU and fp32 elsewhere; samples.json names it. `compiled`: see `generate`. `best_of` and
    `scorer`: see `draw_best`; `scorer_settings` are recorded. `texts`: what conditions stand for, if they are vectors of texts. Images
    are written by threads while the next batch is generated: as PNG, or with `npz` as arrays of their pixels, which are
    removed once samples.npz holds them. Raises ValueError for a setting out of range, and if `out` holds images made
    with other settings.
    """
    work, num = WorkSplit.of_environment(), len(conditions)
    identity = f"{tokenizer_fingerprint(tokenizer)}-{fingerprint(var)}"
    precision = precision or default_precision(device)
    if precision == "bf16":
        tokenizer, var = copy.deepcopy((tokenizer, var))
        use_bf16(tokenizer, var)
    tokenizer, var = tokenizer.to(device), var.to(device)
    is_labels = not isinstance(conditions, np.ndarray)
    rows = torch.as_tensor(np.asarray(conditions)).to(device)
    check(var, tokenizer, rows, settings)  # before anything is written
    protocol = {"checkpoint": identity, **plain(settings), "seed": seed, "precision": precision, "rounding": "nearest"}
    protocol |= {"best_of": best_of, "scorer": scorer_settings}
    named = [int(label) for label in conditions] if is_labels else list(texts or map(hash_of_row, rows.cpu().numpy()))
    begin(out, {**protocol, "labels": named}, is_first=work.rank == 0)

    suffix = "npy" if npz else "png"
    names = [f"{i:06d}-class{label:04d}" if is_labels else f"{i:06d}" for i, label in enumerate(named)]
    files = [out / "images" / f"{name}.{suffix}" for name in names]
    if npz and is_complete(out, num):
        remove_arrays(out)
        return
    own = range(num)[work.rank :: work.num_ranks]  # by number, regardless of what the other ranks have written so far
    missing = [i for i in own if not files[i].is_file()]

    def draw(numbers: list[int]) -> np.ndarray:
        padding = 0 if compiled == "none" else batch_size - len(numbers)  # a smaller batch would be compiled anew
        padded = numbers + numbers[-1:] * padding
        seeds = [seed + i for i in padded]
        drawn = draw_best(var, tokenizer, rows[padded], settings, seeds, compiled, best_of, scorer)
        return image_grid.to_uint8(drawn.images[: len(numbers)])

    begun = time.perf_counter()
    write_images(files, missing, draw, batch_size, is_quiet=work.rank > 0)
    if work.rank > 0:
        return
    record = out / "samples.json"
    if missing:  # otherwise the figure of the call that made them stays
        protocol["seconds_per_image"] = round((time.perf_counter() - begun) / len(missing), 6)
    elif record.is_file() and (seconds := load_json(record, "varlab sample").get("seconds_per_image")) is not None:
        protocol["seconds_per_image"] = seconds
    wait_for_files(files)
    shown = rows[:film_rows]
    unsmoothed = SamplingSettings(**{**asdict(settings), "smooth": False})
    seeds = [seed + i for i in range(len(shown))]
    film = draw_best(var, tokenizer, shown, unsmoothed, seeds, "none", best_of, scorer).token_maps
    write_figures(out, tokenizer, film, files[:grid], named if is_labels or texts else None)
    if npz:
        image_grid.save_npz(files, out / "samples.npz")
    classes = {"classes": sorted(set(named)), "class_names": list(class_names)} if is_labels else {}
    place = "samples.npz" if npz else "images"
    protocol |= {"resolution": resolution_of(tokenizer.image_size)}
    save_json(record, {**protocol, "num": num, "images": place, **classes, "labels": named})
    if npz:
        remove_arrays(out)


def write_images(
    files: Sequence[Path],
    missing: list[int],
    draw: Callable[[list[int]], np.ndarray],
    batch_size: int,
    is_quiet: bool,
) -> None:
    """Writes the missing files; each batch is written by threads while the next one is drawn. `draw`: the pixels of images by
    number."""
    batches = [missing[first : first + batch_size] for first in range(0, len(missing), batch_size)]
    with ThreadPoolExecutor(NUM_WRITERS) as pool:
        writes: list[Future[None]] = []
        for numbers in tqdm(batches, desc="sample", unit="batch", disable=is_quiet):
            pixels = draw(numbers)
            for write in writes:  # of the batch before
                write.result()
            writes = [
                pool.submit(image_grid.save_pixels, image, files[i]) for i, image in zip(numbers, pixels, strict=True)
            ]
        for write in writes:
            write.result()


def is_complete(out: Path, num: int) -> bool:
    """Whether samples.npz holds `num` images, by the record that is written after it."""
    if not (out / "samples.npz").is_file() or not (out / "samples.json").is_file():
        return False
    record = load_json(out / "samples.json", "varlab sample")
    return record["num"] == num and record.get("images") == "samples.npz"


def remove_arrays(out: Path) -> None:
    """Removes the arrays that samples.npz holds; PNG images of an earlier call stay."""
    for file in (out / "images").glob("*.npy"):
        file.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # other files are in it, or it is gone
        (out / "images").rmdir()


def plain(settings: SamplingSettings) -> dict[str, Any]:
    """Sampling settings as JSON values."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(settings).items()}


@torch.no_grad()
def write_figures(
    out: Path, tokenizer: MSVQVAE, film: Sequence[Tensor], files: Sequence[Path], labels: Sequence[int | str] | None
) -> None:
    """Writes filmstrip.png, images after each scale of the token maps `film`, and grid.png, see `columns_for`."""
    strip = tokenizer.filmstrip(film) / 2 + 0.5
    image_grid.save(image_grid.grid(image_grid.columns_of(*strip), columns=len(strip)), out / "filmstrip.png")
    shown = torch.stack([image_grid.read(file) for file in files])
    image_grid.save(image_grid.grid(shown, columns_for(labels or [])), out / "grid.png")


def columns_for(labels: Sequence[int | str]) -> int:
    """The fewest columns, up to ten, of which each has one label, so that rows repeat the labels in the order they were given; ten
    for a single label, and where there is no such number."""
    if len(set(labels)) < 2:
        return 10
    fitting = (n for n in range(2, 11) if all(label == labels[i % n] for i, label in enumerate(labels)))
    return next(fitting, 10)


def begin(out: Path, protocol: dict[str, Any], is_first: bool) -> None:
    """Records the settings of a folder of samples. Raises ValueError if it holds samples made with other settings."""
    file = out / "begun.json"
    if file.is_file():
        before = load_json(file, "varlab sample")
        count = min(len(before["labels"]), len(protocol["labels"]))
        cut = [{**one, "labels": one["labels"][:count]} for one in (before, protocol)]
        changed = [key for key in protocol if cut[0].get(key, ADDED.get(key)) != cut[1][key]]
        if changed:
            raise ValueError(
                f"{out} holds images made with other settings ({', '.join(changed)}): choose another out=..."
            )
    if is_first:
        save_json(file, protocol)
