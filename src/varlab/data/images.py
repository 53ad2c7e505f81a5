"""Images from shards: decoding, the preprocessing of the VAR recipe, the data module."""

import logging
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from varlab.data.datamodule import OrderedDataModule
from varlab.data.decoding import open_image
from varlab.data.order import Order, SampleRequest
from varlab.data.resolutions import Resolution, height_and_width, nearest_shape
from varlab.data.shards import ConditionKind, ShardReader, fingerprint, load_manifest
from varlab.data.storage import Storage, is_remote
from varlab.models.conditioning import ConditionEmbedder

LANCZOS_RADIUS = 3
HAS_LANCZOS = hasattr(torch.ops.aten, "_upsample_lanczos2d_aa")
log = logging.getLogger(__name__)


class ImageBatch(NamedTuple):
    """Images in [-1, 1] with their conditions: class labels (B), or the vectors of the set. `weight` is 0 for padding;
    `skipped` is 1 for a replaced sample."""

    images: Float[Tensor, "B 3 H W"]
    condition: Tensor
    weight: Float[Tensor, " B"]
    skipped: Int[Tensor, " B"]


class Crop(NamedTuple):
    """Position of the crop, as fractions of the free space in each direction, and whether to mirror the image first."""

    top: float = 0.5
    left: float = 0.5
    is_flipped: bool = False


def preprocess(image: Image.Image, resolution: Resolution, resize_ratio: float, crop: Crop) -> np.ndarray:
    """An RGB image: flip, resize with Lanczos to the smallest size of its aspect ratio that covers resize_ratio * resolution (for a
    square: its shorter side), crop; uint8 (H, W, 3).

    torch's kernel (2.13 and later) takes a fifth of Pillow's time; they differ by at most two levels. Pillow resizes
    only the region of the crop; it is used for older versions, and for images so elongated that resizing all of one
    would exhaust memory.
    """
    out_height, out_width = height_and_width(resolution)
    covered = round(resize_ratio * out_width), round(resize_ratio * out_height)
    scale = max(new / old for new, old in zip(covered, image.size, strict=True))
    width, height = (max(new, round(old * scale)) for new, old in zip(covered, image.size, strict=True))
    top, left = round(crop.top * (height - out_height)), round(crop.left * (width - out_width))
    if crop.is_flipped:
        left = width - out_width - left
    if HAS_LANCZOS and max(width, height) <= 8 * min(covered):
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
        resized = F.interpolate(pixels, size=(height, width), mode="lanczos", antialias=True)[0].permute(1, 2, 0)
        cut = resized[top : top + out_height, left : left + out_width].numpy()
    else:
        cut = np.asarray(resize_part(image, (width, height), (left, top, left + out_width, top + out_height)))
    return cut[:, ::-1] if crop.is_flipped else cut


def resize_part(image: Image.Image, size: tuple[int, int], part: tuple[int, int, int, int]) -> Image.Image:
    """The region (left, top, right, bottom) of the image resized to `size`, computed without resizing the rest."""
    scales = [old / new for old, new in zip(image.size, size, strict=True)] * 2
    box = [edge * scale for edge, scale in zip(part, scales, strict=True)]
    margins = [
        LANCZOS_RADIUS * max(1.0, scale) + 1 for scale in scales
    ]  # source pixels that the filter reads beyond the region
    low = [max(0, int(edge - m)) for edge, m in zip(box[:2], margins[:2], strict=True)]
    high = [min(side, math.ceil(edge + m)) for side, edge, m in zip(image.size, box[2:], margins[2:], strict=True)]
    seen = image.crop((low[0], low[1], high[0], high[1]))
    within = (box[0] - low[0], box[1] - low[1], box[2] - low[0], box[3] - low[1])
    out = (part[2] - part[0], part[3] - part[1])
    return seen.resize(out, Image.Resampling.LANCZOS, box=within)


def block_means(pixels: np.ndarray, factor: int) -> np.ndarray:
    """uint8 images (..., H, W, 3), `factor` times smaller: the mean of each block, rounded."""
    *rest, height, width, channels = pixels.shape
    blocks = pixels.reshape(*rest, height // factor, factor, width // factor, factor, channels)
    return blocks.mean(axis=(-4, -2)).round().astype(np.uint8)


def to_tensor(images: list[np.ndarray]) -> Float[Tensor, "B 3 H W"]:
    """uint8 images as fp32 in [-1, 1]."""
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    return pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1)


def as_condition(rows: np.ndarray | Tensor, kind: ConditionKind) -> Tensor:
    """Labels as int64, vectors as fp32, uint8 images as fp32 in [-1, 1]."""
    if isinstance(rows, np.ndarray):
        rows = torch.from_numpy(rows.astype(np.int64 if kind == "label" else np.float32))
    return rows.float() / 127.5 - 1 if kind == "image" else rows


class ImageDataset(Dataset):
    """Decoded, preprocessed images of a split. Random crops and flips are a function of (seed, epoch, sample).

    An image that cannot be decoded is replaced by the next one, logged and counted, never silently dropped.
    `condition`: the condition that batches include, see `ShardReader.conditions`. `shapes`: several resolutions, of which each image
    has the one of the nearest aspect ratio, in place of `resolution`.
    """

    def __init__(
        self,
        reader: ShardReader,
        resolution: Resolution,
        resize_ratio: float,
        random_crop: bool,
        random_flip: bool,
        seed: int = 0,
        condition: ConditionKind = "label",
        shapes: Sequence[tuple[int, int]] = (),
    ) -> None:
        if resize_ratio < 1:
            raise ValueError(
                f"resize_ratio={resize_ratio}: must be at least 1, so that the resized image is not smaller than the crop"
            )
        self.reader, self.resize_ratio = reader, resize_ratio
        self.shapes = list(shapes) or [height_and_width(resolution)]
        self.random_crop, self.random_flip, self.seed = random_crop, random_flip, seed
        self.kind: ConditionKind = condition
        self.conditions = reader.conditions(condition)

    def __len__(self) -> int:
        return len(self.reader)

    def crop_of(self, request: SampleRequest) -> Crop:
        """The crop of this sample in this epoch."""
        top, left, flip = np.random.default_rng([self.seed, request.epoch, request.sample]).random(3)
        return Crop(
            *((top, left) if self.random_crop else (0.5, 0.5)), is_flipped=bool(self.random_flip and flip < 0.5)
        )

    def image(self, i: int, crop: Crop) -> np.ndarray:
        """Sample i as uint8 (H, W, 3). Raises ValueError naming it if it cannot be decoded."""
        image = open_image(self.reader.read(i), lambda: self.reader.name_of(i))
        return preprocess(image, nearest_shape((image.height, image.width), self.shapes), self.resize_ratio, crop)

    def readable(self, request: SampleRequest, crop: Crop | None = None) -> tuple[np.ndarray, int, bool]:
        """(image, its number, whether it replaces another one), cropped to `crop`, by default the request's crop."""
        for attempt in range(min(10, len(self))):
            i = (request.sample + attempt) % len(self)
            try:
                return self.image(i, crop or self.crop_of(request)), i, attempt > 0
            except ValueError as error:
                log.warning("%s; the next image replaces it", error)
        raise ValueError(
            f"ten images in a row, from number {request.sample} on, cannot be read: the shards are damaged, see the log"
        )

    def __getitems__(self, requests: list[SampleRequest]) -> ImageBatch:
        self.reader.prepare([request.sample for request in requests])
        images, numbers, replaced = zip(*(self.readable(request) for request in requests), strict=True)
        condition = as_condition(self.conditions[list(numbers)], self.kind)
        weight = torch.tensor([float(request.is_real) for request in requests])
        return ImageBatch(to_tensor(list(images)), condition, weight, torch.tensor(replaced).long())


class CenterCrops:
    """Center crops of images of a split, for evaluation: batches in [-1, 1] on `device`; can be iterated repeatedly.

    `num_images`: number of images, evenly spaced over the split; None uses all.
    """

    def __init__(
        self,
        reader: ShardReader,
        resolution: Resolution,
        resize_ratio: float,
        num_images: int | None,
        batch_size: int,
        device: torch.device,
    ) -> None:
        self.images = ImageDataset(reader, resolution, resize_ratio, random_crop=False, random_flip=False)
        num = min(len(reader), len(reader) if num_images is None else num_images)
        self.samples: list[int] = np.linspace(0, len(reader) - 1, num).round().astype(int).tolist()
        self.batch_size, self.device = batch_size, device

    def __len__(self) -> int:
        return -(-len(self.samples) // self.batch_size)

    def __iter__(self) -> Iterator[Float[Tensor, "B 3 H W"]]:
        for first in range(0, len(self.samples), self.batch_size):
            yield self.read(self.samples[first : first + self.batch_size])

    def read(self, samples: list[int]) -> Float[Tensor, "B 3 H W"]:
        """The images with these numbers."""
        self.images.reader.prepare(samples)
        return to_tensor([self.images.readable(SampleRequest(i, 0, True), Crop())[0] for i in samples]).to(self.device)

    def conditions(self, embedder: ConditionEmbedder) -> Tensor:
        """The conditions of all images, which the set holds; smaller versions are made of the images."""
        if embedder.kind != "image":
            return as_condition(self.images.reader.conditions(embedder.kind)[self.samples], embedder.kind)
        means = []
        for batch in self:
            pixels = ((batch + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
            means.append(block_means(pixels, pixels.shape[1] // embedder.condition_shape[1]))
        return as_condition(np.concatenate(means).transpose(0, 3, 1, 2), "image")

    def sample_images(self, num: int) -> Float[Tensor, "B 3 H W"]:
        """Some images, for a figure."""
        return self.read(self.samples[:: max(1, len(self.samples) // num)][:num])


class ImageDataModule(OrderedDataModule):
    """Images of any packed set (`varlab pack`), preprocessed as in the VAR recipe.

    `resolution`: side of the square images in pixels, or [height, width]. `resize_ratio`: size before the crop divided by the
    resolution (1.125 in the recipe). Validation uses the center crop. `path` may be a URL, see Storage. `condition`:
    `label`, or `vector` if the set holds a vector per image.
    """

    def __init__(
        self,
        path: str,
        resolution: Resolution,
        global_batch_size: int,
        num_workers: int = 8,
        resize_ratio: float = 1.125,
        random_crop: bool = True,
        random_flip: bool = False,
        seed: int = 0,
        lanes: int = 64,
        window: int | None = 4096,
        max_skipped_share: float = 0.001,
        storage: Storage | None = None,
        condition: ConditionKind = "label",
    ) -> None:
        super().__init__(global_batch_size, num_workers, seed, lanes, window, max_skipped_share)
        self.condition: ConditionKind = condition
        self.storage = storage or Storage()
        self.path, self.resolution, self.resize_ratio = path, resolution, resize_ratio
        self.random_crop, self.random_flip = random_crop, random_flip

    def declared_size(self) -> tuple[int, int]:
        manifest = load_manifest(self.path, self.storage)
        return manifest["splits"]["train"]["num_images"], len(manifest["class_names"])

    def setup(self, stage: str | None = None) -> None:
        train, val = (ShardReader(self.path, split, self.storage) for split in ("train", "val"))
        self.shard_counts, self.num_val, self.manifest = train.shard_counts, len(val), train.manifest
        self.class_names, self.data_fingerprint = train.manifest["class_names"], fingerprint(train.manifest)
        self.train_set = ImageDataset(
            train, self.resolution, self.resize_ratio, self.random_crop, self.random_flip, self.seed, self.condition
        )
        self.val_set = ImageDataset(
            val, self.resolution, self.resize_ratio, random_crop=False, random_flip=False, condition=self.condition
        )
        self.condition_shape = self.train_set.conditions.shape[1:]
        check_room(train, self.orders()[0], self.storage)


def check_room(reader: ShardReader, order: Order, storage: Storage) -> None:
    """Raises ValueError if the cache is too small for the shards that the order reads at the same time."""
    if not any(is_remote(shard.url) for shard in reader.shards):
        return
    largest = max(shard.num_bytes for shard in reader.shards)
    needed = min(order.num_shards_at_once(), len(reader.shards)) * largest / 1e9
    if needed > storage.cache_gb:
        raise ValueError(
            f"storage.cache_gb={storage.cache_gb} is too small for {reader.path}: with lanes={order.lanes} and"
            f" window={order.window} the order reads {needed:.3g} GB of shards at the same time: increase it, or use fewer"
            " lanes or a smaller window"
        )
