"""The computations behind the web page: a trained model, uploaded images, a sweep. Independent of the browser and
Gradio."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, ClassVar

import matplotlib
import numpy as np
import torch
from jaxtyping import Float
from matplotlib.colors import hsv_to_rgb
from PIL import Image
from torch import Tensor

from varlab import image_grid
from varlab.checkpoints.load import load
from varlab.data.decoding import open_image
from varlab.data.images import Crop, preprocess, to_tensor
from varlab.data.resolutions import Resolution
from varlab.models.conditioning import TextEmbedder, label_of
from varlab.models.msvqvae import MSVQVAE
from varlab.models.text_encoder import text_encoder_of
from varlab.models.var import VAR
from varlab.sampling.acceleration import default_precision, use_bf16
from varlab.sampling.editing import composite, edit, edit_errors, latent_mask
from varlab.sampling.generate import decode, generate_scales
from varlab.sampling.shapes import at_size
from varlab.sampling.token_sampling import SamplingSettings
from varlab.scaling.analysis import FitSettings, analyse
from varlab.scaling.plot import figures
from varlab.scaling.report import SHOWN, shown, summary_lines
from varlab.scaling.runs import Runs, collect

MAX_PIXELS = 50_000_000  # of an uploaded image
MAX_CHARACTERS = 1000  # of a text
SHOWN_SIDE = 256  # pixels to which small images are enlarged by integer factors


def enlarged(image: Image.Image, side: int = SHOWN_SIDE) -> Image.Image:
    """A small image with every pixel repeated, so that a browser does not blur it."""
    factor = max(1, side // max(image.size))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def to_images(batch: Float[Tensor, "B 3 H W"]) -> list[Image.Image]:
    """Images in [0, 1] as PIL images."""
    return [Image.fromarray(pixels) for pixels in image_grid.to_uint8(batch)]


def read_upload(path: str | Path, resolution: Resolution) -> Image.Image:
    """An image file resized and center-cropped to the resolution of the model.

    Raises ValueError, without the file's path, for a file that is not an image or is too large.
    """
    try:
        image = open_image(path, "this file", MAX_PIXELS)
    except ValueError as error:
        raise ValueError(f"{error}: upload a PNG, JPEG or WebP of at most 50 million pixels") from None
    return Image.fromarray(np.asarray(preprocess(image, resolution, 1.0, Crop())))


class Model:
    """One checkpoint, ready to sample images of one size, see `at_size`."""

    def __init__(self, path: str, device: str, trust_code: bool = False, image_size: Resolution | None = None) -> None:
        self.name = Path(path).parent.parent.name if Path(path).suffix == ".ckpt" else Path(path).name
        self.tokenizer: MSVQVAE
        self.var: VAR
        tokenizer, var, names = load(path, trust_code=trust_code)
        self.tokenizer, self.var = at_size(tokenizer, var, image_size)
        if self.var.embedder.kind not in ("label", "text"):
            raise ValueError(
                f"checkpoint={path}: the page draws classes and texts, and this network takes conditions of shape"
                f" {self.var.embedder.condition_shape}: use varlab edit upscale=2 for images, varlab sample condition=FILE.npy for vectors"
            )
        if default_precision(device) == "bf16":
            use_bf16(self.tokenizer, self.var)
        self.tokenizer, self.var, self.device = self.tokenizer.to(device), self.var.to(device), device
        self.class_names = names or [str(number) for number in range(self.var.num_classes)]
        self.size = self.tokenizer.image_size
        self.lock, self.encoder = Lock(), None

    @property
    def scales(self) -> list[str]:
        """Names of the scales: 1x1, 2x2, ..."""
        return [f"{h}x{w}" for h, w in self.tokenizer.quantizer.sides]

    @property
    def choices(self) -> list[str]:
        """Classes as "number: name"."""
        return [f"{number}: {name}" for number, name in enumerate(self.class_names)]

    @property
    def takes_text(self) -> bool:
        """Whether images are described by words, not chosen by class."""
        return isinstance(self.var.embedder, TextEmbedder)

    def label(self, choice: str | None) -> int:
        """The label of a selected or typed class; the null label for an empty one. Raises ValueError naming the nearest
        names."""
        if not choice or not str(choice).strip():
            return self.var.null_label
        if choice in self.choices:
            return self.choices.index(choice)
        return label_of(str(choice), self.class_names, self.var.num_classes)

    def condition(self, choice: str | None, num: int) -> Tensor:
        """The condition of `num` images of a class, or of a text of at most 1,000 characters; an empty one is none."""
        if not self.takes_text:
            return torch.full((num,), self.label(choice), device=self.device)
        text = str(choice or "")
        if len(text) > MAX_CHARACTERS:
            raise ValueError(f"this text has {len(text):,} characters: give at most {MAX_CHARACTERS:,}")
        with self.lock:
            self.encoder = self.encoder or text_encoder_of(self.var)
        return self.encoder([text]).to(self.device).repeat_interleave(num, dim=0)

    def sample(
        self, choice: str | None, num: int, seed: int, **drawing: Any
    ) -> Iterator[tuple[list[Image.Image], list[str]]]:
        """Yields, after each scale, the `num` images so far and the names of the finished scales."""
        condition = self.condition(choice, num)
        loop = generate_scales(self.var, self.tokenizer, condition, SamplingSettings(**drawing), seed=seed)
        for k, (f_hat, _) in enumerate(loop):
            yield to_images(decode(self.tokenizer, f_hat)), self.scales[: k + 1]

    def tensor(self, image: Image.Image) -> Float[Tensor, "1 3 H W"]:
        """One image as an input of the networks."""
        return to_tensor([np.asarray(image)]).to(self.device)

    def edit(
        self,
        image: Image.Image,
        region: np.ndarray,
        choice: str | None,
        num: int,
        seed: int,
        is_inverted: bool,
        **settings: Any,
    ) -> tuple[list[Image.Image], str]:
        """(`num` edits of `image`, summary as text). The region where `region` (H W, of any size) is above 0
        is generated, or with `is_inverted` everything else.

        Raises ValueError for an empty region."""
        height, width = self.size
        mask = Image.fromarray((region > 0).astype(np.uint8) * 255).resize((width, height), Image.Resampling.NEAREST)
        chosen = torch.from_numpy(np.asarray(mask) > 0).float().to(self.device)
        keep = chosen if is_inverted else 1 - chosen
        if not (keep == 0).any() or not chosen.any():
            raise ValueError("there is nothing to generate: paint over a part of the image")
        original = self.tensor(image).repeat(num, 1, 1, 1)
        condition = self.condition(choice, num)
        kept = latent_mask(keep, self.tokenizer.quantizer.sides[-1])
        edited = edit(self.var, self.tokenizer, original, kept, condition, seed=seed, **settings)
        pixels = original / 2 + 0.5
        errors = edit_errors(edited, pixels, keep)
        told = (
            f"{100 * float(1 - keep.mean()):.0f} % of the image was generated. Before the kept pixels were restored, the seam was"
            f" {errors.seam:.1f} levels of 255 (usual step {errors.usual:.1f})."
        )
        return to_images(composite(edited, pixels, keep)), told

    @torch.no_grad()
    def dissect(self, image: Image.Image) -> "Dissection":
        """The tokenizer's encoding of an image, scale by scale."""
        images = self.tensor(image)
        quantizer = self.tokenizer.quantizer
        features = self.tokenizer.features(images).float()
        token_maps = quantizer.encode(features)
        partial = quantizer.partial_sums(token_maps)
        whole = float(features.square().mean())
        energy = [float((features - f_hat).square().mean()) / whole for f_hat in partial]
        residuals = [(features - f_hat)[0].square().mean(dim=0).sqrt().cpu().numpy() for f_hat in partial]
        return Dissection(
            reconstructions=[to_images(decode(self.tokenizer, f_hat))[0] for f_hat in partial],
            residuals=[heatmap(residual, max(float(r.max()) for r in residuals)) for residual in residuals],
            indices=[
                indices_picture(tokens[0].cpu().numpy().reshape(sides))
                for tokens, sides in zip(token_maps, quantizer.sides, strict=True)
            ],
            rows=[
                [scale, len(tokens[0]), len(tokens[0].unique()), round(100 * share, 1)]
                for scale, tokens, share in zip(self.scales, token_maps, energy, strict=True)
            ],
        )


@dataclass(frozen=True)
class Dissection:
    """Images and numbers of each scale, coarse to fine; HEAD names the columns of `rows`."""

    HEAD: ClassVar = ("scale", "tokens", "codes", "energy left, %")
    reconstructions: Sequence[Image.Image]
    residuals: Sequence[Image.Image]
    indices: Sequence[Image.Image]
    rows: Sequence[Sequence[Any]]


def heatmap(values: np.ndarray, top: float) -> Image.Image:
    """A map of values from 0 to `top` as colors, dark to bright."""
    colours = matplotlib.colormaps["magma"](np.clip(values / max(top, 1e-12), 0, 1))[..., :3]
    return enlarged(Image.fromarray((colours * 255).astype(np.uint8)))


def indices_picture(indices: np.ndarray) -> Image.Image:
    """Codebook indices as colors: a code has the same color at every position and scale."""
    hue = (indices * 0.61803398875) % 1  # neighbors in the codebook get distinct colors
    value = 0.55 + 0.45 * ((indices * 0.7548776662) % 1)
    colors = hsv_to_rgb(np.stack([hue, np.full(indices.shape, 0.65), value], axis=-1))
    return enlarged(Image.fromarray((colors * 255).astype(np.uint8)))


@dataclass(frozen=True)
class View:
    """A snapshot of a sweep. `number` increases with each change."""

    number: int
    columns: list[str]
    rows: list[list[str]]
    figures: list[Image.Image]
    text: str


class Sweep:
    """Runs of a sweep, finished or still running, and their figures; fitted and plotted once for all visitors."""

    def __init__(self, source: str, folder: Path) -> None:
        self.source, self.folder = source, folder
        self.lock, self.rows = Lock(), None
        self.view = View(0, list(SHOWN), [], [], "")

    def look(self) -> View:
        """The current state of the runs. Failed fits are reported in the text, not raised."""
        with self.lock:
            try:
                runs = collect([self.source], use_unfinished=True)
            except (ValueError, OSError) as error:
                return View(0, list(SHOWN), [], [], f"No runs yet: {error}")
            if runs.rows != self.rows:
                self.rows, self.view = runs.rows, self.view_of(runs, self.view.number + 1)
            return self.view

    def view_of(self, runs: Runs, number: int) -> View:
        """Table, figures and text of these runs."""
        columns, told, images = ["state", *SHOWN], list(runs.left_out), []
        rows = [[shown(row.get(column)) for column in columns] for row in runs.rows]
        try:
            analysis = analyse(runs, FitSettings(floor=0.0, bootstraps=200))
            told = [*summary_lines(analysis), *told]
            files = [kinds[0].with_suffix(".png") for kinds in figures(analysis, self.folder).values()]
            images = [Image.open(file).convert("RGB") for file in files]
        except (ValueError, ZeroDivisionError) as error:
            told.append(f"Not fitted yet: {error}")
        return View(number, columns, rows, images, "\n".join(told))
