"""The web page, built on Gradio: its controls, its outputs, and the functions of `session` that compute them."""

import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from functools import wraps
from inspect import isgeneratorfunction
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import torch
from gradio import themes
from PIL import Image

from varlab import image_grid
from varlab.app.guard import check_uploads
from varlab.app.session import Dissection, Model, Sweep, enlarged, read_upload
from varlab.files import reason_of

log = logging.getLogger(__name__)
NETWORK = "network"  # all requests that run a network share one FIFO queue
CSS = """
.gradio-container { width: 100%; min-width: 0; max-width: 1200px !important; margin: 0 auto !important }
footer { display: none !important }
.pixels img { image-rendering: pixelated }
.grid-wrap { min-height: 0 !important; max-height: none !important; height: auto !important; padding-top: 2.2rem !important }
#film .image-container { padding-top: 2.2rem }
#figures .grid-container { grid-auto-rows: auto }
#figures .gallery-item, #figures .thumbnail-item { aspect-ratio: auto; height: auto; overflow-x: auto }
#figures img { height: auto; width: 100%; max-height: 36rem }
@media (max-width: 600px) {
  .grid-container { grid-template-columns: repeat(4, minmax(0, 1fr)) !important; grid-auto-rows: auto !important }
  .caption-label { font-size: 0.65rem !important; padding: 0 0.2rem !important }
  #figures .grid-container { grid-template-columns: minmax(0, 1fr) !important }
  #figures img { width: auto; max-width: none; height: 18rem }
}
#words pre, #words code { white-space: pre-wrap; overflow-wrap: anywhere }
"""
THEME = themes.Default(primary_hue="indigo", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])


def message(error: Exception) -> gr.Error:
    """A user error (ValueError) with its message, any other error as a generic sentence."""
    if isinstance(error, ValueError):
        return gr.Error(str(error), title="This did not work", duration=8, print_exception=False)
    log.exception("a request to the page failed")
    return gr.Error("Internal error: see the terminal for details.", title="Error", print_exception=False)


class Page(gr.Blocks):
    """Answers requests that did not come from its own controls in a sentence."""

    async def preprocess_data(self, block_fn: Any, inputs: list[Any], *args: Any, **kwargs: Any) -> list[Any]:
        try:
            check_uploads(inputs, Path(os.environ["GRADIO_TEMP_DIR"]))
            return await super().preprocess_data(block_fn, inputs, *args, **kwargs)
        except Exception as error:  # Gradio's components raise errors of many kinds for values of other types
            raise message(ValueError(f"this request cannot be read: {reason_of(error)}")) from None


def show_errors(run: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a handler: errors are shown as a sentence, never a traceback."""

    if isgeneratorfunction(run):

        @wraps(run)
        def step_by_step(*args: Any) -> Iterator[Any]:
            try:
                yield from run(*args)
            except Exception as error:
                raise message(error) from None

        return step_by_step

    @wraps(run)
    def at_once(*args: Any) -> Any:
        try:
            return run(*args)
        except Exception as error:
            raise message(error) from None

    return at_once


def number_within(name: str, value: Any, low: float, high: float) -> float:
    """The number. Raises ValueError if it is out of bounds, since the browser does not enforce its bounds."""
    if not isinstance(value, int | float) or not math.isfinite(value) or not low <= value <= high:
        raise ValueError(f"{name} must be between {low:g} and {high:g}, not {value}")
    return value


class Controls:
    """Sampling settings: guidance, filters, seed, number of images."""

    def __init__(self, model: Model, max_batch: int, num: int, cfg_scale: float) -> None:
        self.codes, self.max_batch = model.tokenizer.quantizer.codebook_size, max_batch
        with gr.Row():
            self.cfg = gr.Slider(0, 10, cfg_scale, step=0.1, label="guidance (cfg)", min_width=140)
            self.num = gr.Slider(1, max_batch, min(num, max_batch), step=1, label="images", min_width=140)
        with gr.Row():
            self.top_k = gr.Slider(0, self.codes, 0, step=1, label="top-k (0: off)", min_width=140)
            self.top_p = gr.Slider(0, 1, 0.95, step=0.01, label="top-p (0: off)", min_width=140)
        self.seed = gr.Number(0, label="seed", precision=0, minimum=0)

    @property
    def inputs(self) -> list[Any]:
        """The components, in the order of the arguments of `read`."""
        return [self.cfg, self.top_k, self.top_p, self.seed, self.num]

    def read(self, cfg: float, top_k: float, top_p: float, seed: float, num: float) -> dict[str, Any]:
        """The settings, validated."""
        return {
            "cfg_scale": float(number_within("guidance", cfg, 0, 10)),
            "top_k": int(number_within("top-k", top_k, 0, self.codes)),
            "top_p": float(number_within("top-p", top_p, 0, 1)),
            "seed": int(number_within("the seed", seed, 0, 2**31 - 1)),
            "num": int(number_within("the number of images", num, 1, self.max_batch)),
        }


def class_choice(model: Model, label: str, value: str | None) -> gr.Dropdown | gr.Textbox:
    """A dropdown of classes by number and name, with search; or a field for words, if the model was trained on captions."""
    if model.takes_text:
        return gr.Textbox("", label=label.replace("class", "words"), placeholder="a red heart")
    return gr.Dropdown(model.choices, value=value, label=label, info="type to search", allow_custom_value=True)


def gallery(label: str, name: str, columns: int = 4) -> gr.Gallery:
    """Images side by side, enlarged without smoothing."""
    return gr.Gallery(
        label=label,
        columns=columns,
        elem_id=name,
        elem_classes="pixels",
        height="auto",
        object_fit="contain",
        format="png",
    )


def upload_box(label: str, name: str, height: int) -> gr.Image:
    """An upload box for images. Handlers get the path of the file, since Gradio would open it itself and show only
    "Error" for an invalid one."""
    box = gr.Image(label=label, type="filepath", sources=["upload", "clipboard"], height=height, elem_id=name)
    box.preprocess = lambda payload: payload and payload.path
    return box


def paced(frames: Iterator[Any], seconds: float = 0.3) -> Iterator[Any]:
    """The same frames, at least `seconds` apart, so that the browser shows each one."""
    last = -seconds
    for frame in frames:
        time.sleep(max(0.0, last + seconds - time.monotonic()))
        last = time.monotonic()
        yield frame


def film(frames: list[list[Image.Image]]) -> Image.Image:
    """Rows of images, one column per finished scale."""
    columns = [
        torch.stack([torch.from_numpy(np.asarray(image) / 255).permute(2, 0, 1).float() for image in frame[:4]])
        for frame in frames
    ]
    return image_grid.grid(image_grid.columns_of(*columns), columns=len(columns), min_side=96)


def sample_tab(model: Model, max_batch: int) -> gr.State:
    """The tab that samples images of a class, scale by scale. Returns the state with the latest samples."""
    samples = gr.State([])
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            label = class_choice(model, "class", model.choices[0])
            controls = Controls(model, max_batch, 8, 1.5)
            button = gr.Button("Sample", variant="primary", elem_id="sample-button")
        with gr.Column(scale=2, min_width=300):
            status = gr.Markdown("The image appears scale by scale, coarse to fine.", elem_id="sample-status")
            images = gallery("samples", "samples")
            strip = gr.Image(label="scale by scale", elem_id="film", elem_classes="pixels", format="png", buttons=[])

    def sample(choice: str | None, *given: Any) -> Iterator[Any]:
        settings = controls.read(*given)
        frames: list[list[Image.Image]] = []
        for images_so_far, scales in paced(model.sample(choice, **settings)):
            frames.append(images_so_far)
            done = len(scales) == len(model.scales)
            text = f"**{' → '.join(scales)}**" + (f", seed {settings['seed']}" if done else " …")
            yield [enlarged(image) for image in images_so_far], film(frames), text, images_so_far

    button.click(
        show_errors(sample), [label, *controls.inputs], [images, strip, status, samples], concurrency_id=NETWORK,
        concurrency_limit=1, show_progress="minimal", api_visibility="private",
    )  # fmt: skip
    return samples


def edit_tab(model: Model, max_batch: int, samples: gr.State) -> None:
    """The tab that edits an image, given a painted region and a class."""
    current = gr.State(None)
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            upload = upload_box("your image", "edit-upload", 160)
            take = gr.Button("or use the first sample", elem_id="take-sample")
            editor = gr.ImageEditor(
                label="paint here", type="numpy", sources=[], layers=False, transforms=[], elem_id="editor",
                brush=gr.Brush(default_size=32, colors=["#ff3b30"], color_mode="fixed"), height=380, format="png",
                buttons=[], elem_classes="pixels",
            )  # fmt: skip
        with gr.Column(scale=1, min_width=300):
            label = class_choice(model, "new class (empty: none)", None)
            region = gr.Radio(
                ["inside", "outside"], value="inside", label="region to generate, relative to the painted area"
            )
            strength = gr.Slider(0.1, 1, 1, step=0.05, label="strength (below 1, the coarse scales are kept)")
            controls = Controls(model, max_batch, 4, 3.0)
            button = gr.Button("Edit", variant="primary", elem_id="edit-button")
            status = gr.Markdown("", elem_id="edit-status")
            results = gallery("edits", "edits")

    def show(image: Image.Image) -> tuple[Any, Image.Image]:
        large = enlarged(image, 360)
        return {"background": np.asarray(large), "layers": [], "composite": np.asarray(large)}, image

    def bring(path: str | None) -> tuple[Any, Any]:
        return (None, None) if path is None else show(read_upload(path, model.size))

    def take_sample(made: list[Image.Image]) -> tuple[Any, Image.Image]:
        if not made:
            raise ValueError("there is no sample yet: create one in the first tab")
        return show(made[0])

    def change(
        image: Image.Image | None,
        painted: dict[str, Any] | None,
        choice: str | None,
        where: str,
        strong: float,
        *given: Any,
    ) -> tuple[list[Image.Image], str]:
        settings = controls.read(*given)
        if image is None or not painted:
            raise ValueError("upload an image first, or use a sample")
        layers = painted["layers"]
        marked = np.max([layer[..., 3] for layer in layers], axis=0) if layers else np.zeros((1, 1), np.uint8)
        strong = number_within("strength", strong, 0.1, 1)
        edited, words = model.edit(image, marked, choice, is_inverted=where == "outside", strength=strong, **settings)
        return [enlarged(result) for result in edited], words

    shown = [editor, current]
    upload.change(show_errors(bring), upload, shown, show_progress="minimal", api_visibility="private")
    take.click(show_errors(take_sample), samples, shown, api_visibility="private")
    button.click(
        show_errors(change), [current, editor, label, region, strength, *controls.inputs], [results, status],
        concurrency_id=NETWORK, show_progress="minimal", api_visibility="private",
    )  # fmt: skip


def tokenizer_tab(model: Model) -> None:
    """The tab that shows what each scale of the tokenizer adds to an image."""
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            upload = upload_box("drop an image", "drop", 220)
            table = gr.Dataframe(
                headers=list(Dissection.HEAD), interactive=False, elem_id="scales", wrap=True, buttons=[],
                column_widths=["22%", "23%", "22%", "33%"],
            )  # fmt: skip
        with gr.Column(scale=2, min_width=300):
            reconstructions = gallery("reconstruction after each scale", "reconstructions", 6)
            residuals = gallery("residual after each scale (bright: large)", "residuals", 6)
            indices = gallery("codebook indices (one color per code)", "indices", 6)

    def dissect(path: str | None) -> tuple[Any, ...]:
        if path is None:
            return [], [], [], []
        seen = read_upload(path, model.size)
        found = model.dissect(seen)
        named = zip(found.reconstructions, model.scales, strict=True)
        return (
            [(enlarged(seen), "original"), *((enlarged(image), scale) for image, scale in named)],
            list(zip(found.residuals, model.scales, strict=True)),
            list(zip(found.indices, model.scales, strict=True)),
            [list(row) for row in found.rows],
        )

    upload.change(
        show_errors(dissect), upload, [reconstructions, residuals, indices, table], concurrency_id=NETWORK, show_progress="minimal",
        api_visibility="private",
    )  # fmt: skip


def scaling_tab(sweep: Sweep | None, every: float) -> None:
    """The tab with the sweep's runs and figures, refreshed while it runs."""
    if sweep is None:
        gr.Markdown("Start the page with `runs=FOLDER` to see the table and figures of a sweep here while it runs.")
        return
    gr.Markdown(f"Runs of `{sweep.source}`, refreshed every {every:g} seconds while this tab is open.")
    words = gr.Code(label="results", language=None, elem_id="words", interactive=False, lines=3, wrap_lines=True)
    figures = gr.Gallery(
        label="figures", columns=1, height="auto", object_fit="contain", elem_id="figures", format="png"
    )
    table = gr.Dataframe(interactive=False, elem_id="runs", label="runs", buttons=[])
    known = gr.State(-1)  # number of the view that this visitor sees

    def look(number: int) -> tuple[Any, ...]:
        view = sweep.look()
        if view.number == number:
            return (gr.skip(),) * 4
        return view.text, view.figures, {"headers": view.columns, "data": view.rows}, view.number

    outputs = [words, figures, table, known]
    gr.Timer(every).tick(show_errors(look), known, outputs, show_progress="hidden", api_visibility="private")
    gr.on(None, show_errors(look), known, outputs, show_progress="minimal", api_visibility="private")


def compare_tab(model: Model, other: Model | None, max_batch: int) -> None:
    """The tab that compares two checkpoints with the same class and seeds."""
    if other is None:
        gr.Markdown("Start the page with `compare=CHECKPOINT` to see two models side by side.")
        return
    label = class_choice(model, "class", model.choices[0])
    controls = Controls(model, max_batch, 8, 1.5)
    button = gr.Button("Sample both", variant="primary", elem_id="compare-button")
    with gr.Row():
        first, second = gallery(model.name, "first-model"), gallery(other.name, "second-model")

    def sample(choice: str | None, *given: Any) -> Iterator[Any]:
        settings = controls.read(*given)
        name = choice if model.takes_text or not choice else str(choice).split(": ", 1)[-1]
        for images_so_far, _ in paced(model.sample(choice, **settings)):
            yield [enlarged(image) for image in images_so_far], gr.skip()
        for images_so_far, _ in paced(other.sample(name, **settings)):
            yield gr.skip(), [enlarged(image) for image in images_so_far]

    button.click(
        show_errors(sample), [label, *controls.inputs], [first, second], concurrency_id=NETWORK, show_progress="minimal",
        api_visibility="private",
    )  # fmt: skip


def build(model: Model, other: Model | None, sweep: Sweep | None, max_batch: int, refresh_s: float) -> gr.Blocks:
    """The page."""
    with Page(title="varlab", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        sides = ", ".join(model.scales)
        gr.Markdown(
            f"# varlab\n`{model.name}`: VAR of depth {model.var.depth}, {model.size[0]} x {model.size[1]} px, token maps {sides}."
        )
        with gr.Tab("Sample"):
            samples = sample_tab(model, max_batch)
        with gr.Tab("Edit"):
            edit_tab(model, max_batch, samples)
        with gr.Tab("Tokenizer"):
            tokenizer_tab(model)
        with gr.Tab("Scaling"):
            scaling_tab(sweep, refresh_s)
        with gr.Tab("Compare"):
            compare_tab(model, other, max_batch)
    return page.queue(default_concurrency_limit=4, max_size=64, api_open=False)
