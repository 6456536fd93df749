"""The page: its fields, and what happens when they are used. Needs gradio; the rest of trainkit/app does not."""

import html
import os
import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before the import: the server reports to nobody

import gradio as gr

from trainkit.app.gallery import CELL, HALF_PAGE_CELL, STYLE, gallery, label_map
from trainkit.app.generation import frames
from trainkit.app.models import AppModel, describe, first_setting, hint, table_rows
from trainkit.app.pictures import picture_name, read_label_map
from trainkit.app.requests import (
    MAX_GUIDANCE,
    MAX_IMAGES,
    Job,
    Request,
    Setting,
    class_choices,
    example_vector,
    make_job,
)
from trainkit.errors import UserError

SIDES = ("A", "B")
DEFAULT_IMAGES = 8
MAX_WAITING = 50  # visitors in the queue; the next one is told to come back later
UPLOADS_S = 600, 3600  # how often uploaded pictures are looked through, and the age at which they are deleted
HIDDEN: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}  # of small events
EMPTY = '<div class="tk-empty">The images appear here.</div>'
CSS = (
    STYLE
    + """
.gradio-container { max-width: 1200px !important; margin: 0 auto }
.tk-empty { padding: 40px 0; text-align: center; color: var(--body-text-color); opacity: .65 }
.tk-about p { margin: 0 }
.tk-note { background: var(--block-background-fill) }
.tk-note p { margin: 0; font-size: 13px; line-height: 1.45; color: var(--body-text-color); opacity: .8 }
.tk-side p { margin: 0; font-weight: 600 }
footer { display: none !important }
"""
)


class Shared(NamedTuple):
    """The fields that both sides share."""

    seed: gr.Number
    random_seed: gr.Checkbox
    num_images: gr.Slider
    classes: gr.Dropdown
    vectors: gr.Textbox
    prompts: gr.Textbox
    picture: gr.Image
    mask: gr.Image
    fits: gr.Checkbox
    image_noise: gr.Slider


class Side(NamedTuple):
    """The fields of one setting, and where its images go."""

    box: gr.Column
    heading: gr.Markdown
    model: gr.Dropdown
    scheduler: gr.Dropdown
    steps: gr.Slider
    note: gr.Markdown
    guidance: gr.Slider

    @property
    def inputs(self) -> list:
        return [self.model, self.scheduler, self.steps, self.guidance]


def launch(models: Sequence[AppModel], host: str | None, port: int | None, share: bool) -> None:
    """Serve the page until it is stopped; None for gradio's own host and port."""
    theme = gr.themes.Default(
        primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
    page = build_page(models).queue(default_concurrency_limit=1, max_size=MAX_WAITING)
    page.launch(server_name=host, server_port=port, share=share, theme=theme, css=CSS, ssr_mode=False)


def build_page(models: Sequence[AppModel]) -> gr.Blocks:
    """The page of one or two models."""
    title = " and ".join(model.name for model in models)
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=UPLOADS_S) as page:
        lines = [describe(models[0])] if len(models) == 1 else [f"**{one.name}**: {describe(one)}" for one in models]
        gr.Markdown(f"# {title}")
        gr.Markdown("  \n".join(lines), elem_classes="tk-about")
        with gr.Row():
            with gr.Column(scale=1, min_width=320):
                shared = _shared_fields(models)
                compare = gr.Checkbox(len(models) > 1, label="Compare two settings", elem_id="compare")
                sides = [_side_fields(models, number, len(models) > 1) for number in range(2)]
            with gr.Column(scale=2, min_width=320):
                with gr.Row():
                    start = gr.Button("Generate", variant="primary", elem_id="generate", min_width=120)
                    stop = gr.Button("Stop", elem_id="stop", min_width=120)
                with gr.Row():
                    results = [_result(number, len(models) > 1) for number in range(2)]
        _tables(models)
        _react(models, compare, shared, sides, results)
        inputs = [compare, *shared, *sides[0].inputs, *sides[1].inputs]
        views = [view for _, view in results]
        making = start.click(
            _make_function(models), inputs, [shared.seed, *views], show_progress="minimal", show_progress_on=views[0],
            api_name="generate",
        )  # fmt: skip
        stop.click(None, cancels=[making])
    return page


def _shared_fields(models: Sequence[AppModel]) -> Shared:
    conditions = {name for model in models for name in model.conditions}
    vectors = next((example_vector(model) for model in models if "vectors" in model.conditions), "")
    choices = class_choices(models)
    classes = gr.Dropdown(
        choices, value=[], multiselect=True, allow_custom_value=True, label="Classes", elem_id="classes",
        info="The images cycle through them. Empty: all classes.", visible="class_labels" in conditions,
    )  # fmt: skip
    prompts = gr.Textbox(
        label="Prompt", info="One per line; the images cycle through them.", lines=2, elem_id="prompt",
        visible="prompt" in conditions,
    )  # fmt: skip
    numbers = gr.Textbox(
        vectors, label="Vector", info="One per line, numbers separated by commas. null: no vector.", lines=2,
        elem_id="vector", visible="vectors" in conditions,
    )  # fmt: skip
    pictures = _picture_fields(models)
    count = gr.Slider(1, MAX_IMAGES, DEFAULT_IMAGES, step=1, label="Images", elem_id="images")
    with gr.Row():
        seed = gr.Number(0, label="Seed", info="Image i has seed + i.", precision=0, elem_id="seed", min_width=120)
        fresh = gr.Checkbox(False, label="Random seed", min_width=120, elem_id="random-seed")
    return Shared(seed, fresh, count, classes, numbers, prompts, *pictures)


def _picture_fields(models: Sequence[AppModel]) -> tuple[gr.Image, gr.Image, gr.Checkbox, gr.Slider]:
    """The fields of models that are conditioned on images; hidden if there are none."""
    inputs = [model.image_input for model in models if model.image_input is not None]
    names = dict.fromkeys(picture_name(model) for model in models if model.image_input is not None)
    is_masked, noise = any(one.kind == "mask" for one in inputs), max([one.noise for one in inputs], default=0.0)
    with gr.Row(visible=bool(inputs)):
        picture = _upload(" or ".join(names) or "Image", "picture")
        mask = _upload("Mask, white: generated", "mask", is_masked)
    seen = gr.HTML(visible=False, elem_id="label-map")
    fits = gr.Checkbox(
        True, label="Fit to the size of training", info="Scales and crops. Off: keeps the size of the picture.",
        elem_id="fits", visible=bool(inputs),
    )  # fmt: skip
    level = gr.Slider(
        0, noise or 1, 0, step=0.01, label="Noise in the small image", info="Hides faults of the image.",
        elem_id="image-noise", visible=noise > 0,
    )  # fmt: skip
    of_maps = [model for model in models if model.image_input is not None and model.image_input.kind == "labels"]
    if of_maps:
        for event in (picture.change, fits.change):
            event(_label_map_function(of_maps[0]), [picture, fits], seen, **HIDDEN)
    return picture, mask, fits, level


def _label_map_function(model: AppModel):
    """The function that shows an uploaded label map in colours, as `model` gets it, or what is wrong with it."""

    def show(upload: str | None, fits: bool) -> dict:
        if upload is None:
            return gr.update(value="", visible=False)
        try:
            ids = read_label_map(model, upload, fits)
        except UserError as error:
            return gr.update(value=f'<div class="tk-map">{html.escape(str(error))}</div>', visible=True)
        assert model.image_input is not None  # of a model of label maps
        return gr.update(value=label_map(ids, model.image_input.classes), visible=True)

    return show


def _upload(label: str, elem_id: str, visible: bool = True) -> gr.Image:
    """A field for a picture. It gives the file as it is: what is wrong with one is found where it is read."""
    field = gr.Image(
        label=label, sources=["upload", "clipboard"], elem_id=elem_id, height=220, min_width=150, visible=visible
    )
    # on the object: for a class of its own Gradio would write a .pyi file beside this one
    field.preprocess = lambda payload: None if payload is None else payload.path
    return field


def _side_fields(models: Sequence[AppModel], number: int, compared: bool) -> Side:
    model, side = models[min(number, len(models) - 1)], SIDES[number]
    scheduler, steps = first_setting(model, number if len(models) == 1 else 0)
    with gr.Column(visible=number == 0 or compared) as box, gr.Group():
        heading = gr.Markdown(side, visible=compared or number > 0, elem_classes=["tk-note", "tk-side"], padding=True)
        chosen = gr.Dropdown(
            [(one.name, index) for index, one in enumerate(models)], value=models.index(model), label="Model",
            visible=len(models) > 1, elem_id=f"model-{side}",
        )  # fmt: skip
        schedulers = gr.Dropdown(
            model.schedulers, value=scheduler, label="Scheduler", visible=len(model.schedulers) > 1,
            elem_id=f"scheduler-{side}",
        )  # fmt: skip
        slider = gr.Slider(1, value=steps, step=1, label="Steps", elem_id=f"steps-{side}", **_range(model, scheduler))
        note = gr.Markdown(hint(model, scheduler, steps), elem_classes="tk-note", padding=True)
        guidance = gr.Slider(
            1, MAX_GUIDANCE, model.default_guidance, step=0.1, label="Guidance", info="1: none, half the time.",
            visible=model.is_conditional, elem_id=f"guidance-{side}",
        )  # fmt: skip
    return Side(box, heading, chosen, schedulers, slider, note, guidance)


def _range(model: AppModel, scheduler: str) -> dict[str, Any]:
    """The end of the slider of steps; it is fixed for a student of one step, as gradio wants two values at least."""
    end = model.slider_end(scheduler)
    return {"maximum": max(end, 2), "interactive": end > 1}


def _result(number: int, compared: bool) -> tuple[gr.Column, gr.HTML]:
    side = SIDES[number]
    with gr.Column(visible=number == 0 or compared, min_width=280) as box:
        view = gr.HTML(EMPTY, elem_id=f"result-{side}")
    return box, view


def _tables(models: Sequence[AppModel]) -> None:
    """The measured tables, closed at first."""
    for model in models:
        head, rows = table_rows(model)
        if rows:
            with gr.Accordion(f"Measured: quality and time of {model.name}", open=False):
                gr.Dataframe(rows, headers=head, interactive=False, wrap=True)


def _react(models: Sequence[AppModel], compare: gr.Checkbox, shared: Shared, sides: list[Side], results: list) -> None:
    """What changes on the page when a field changes."""
    compare.change(
        lambda compared: [gr.update(visible=compared)] * 3, compare, [sides[0].heading, sides[1].box, results[1][0]],
        **HIDDEN,
    )  # fmt: skip

    def changed_model(index: int) -> list:
        model = models[index]
        scheduler, steps = first_setting(model, 0)
        return [
            gr.update(choices=model.schedulers, value=scheduler, visible=len(model.schedulers) > 1),
            gr.update(value=steps, **_range(model, scheduler)),
            gr.update(visible=model.is_conditional),
            hint(model, scheduler, steps),
        ]

    def changed_scheduler(index: int, scheduler: str, steps: int | None) -> list:
        end = models[index].slider_end(scheduler)
        kept = min(int(steps or 1), end)
        return [gr.update(value=kept, **_range(models[index], scheduler)), hint(models[index], scheduler, kept)]

    def changed_steps(index: int, scheduler: str, steps: int | None) -> str:
        return hint(models[index], scheduler, int(steps or 1))

    for side in sides:
        fields = [side.model, side.scheduler, side.steps]
        side.model.input(changed_model, side.model, [side.scheduler, side.steps, side.guidance, side.note], **HIDDEN)
        side.scheduler.input(changed_scheduler, fields, [side.steps, side.note], **HIDDEN)
        side.steps.change(changed_steps, fields, side.note, **HIDDEN)


def _make_function(models: Sequence[AppModel]):
    """The function of the button: it yields the seed and the two results, with previews in between."""

    def make(compared: bool, *fields) -> Iterator:
        count = len(Shared._fields)
        seed, fresh, num_images, classes, vectors, prompts, *pictures = fields[:count]
        seed = random.randrange(2**31) if fresh else seed
        request = Request(seed, num_images, tuple(classes or ()), vectors or "", prompts or "", *pictures)
        settings = [fields[count : count + 4], fields[count + 4 :]][: 1 + compared]
        try:
            jobs = [make_job(Setting(models[index], *others), request) for index, *others in settings]
        except UserError as error:
            raise gr.Error(html.escape(str(error)), print_exception=False) from None
        yield seed, EMPTY, EMPTY
        for number, job in enumerate(jobs):
            for shown in _views(job, SIDES[number] if compared else ""):
                yield (gr.skip(), shown, gr.skip()) if number == 0 else (gr.skip(), gr.skip(), shown)

    return make


def _views(job: Job, side: str) -> Iterator[str]:
    """The HTML of each frame of a job; `side` is empty if it is the only one."""
    cell = HALF_PAGE_CELL if side else CELL
    for frame in frames(job):
        count = len(job.seeds)
        foot = f"{side}{side and ': '}{job.title}: {count} image{'s' * (count > 1)} in {frame.seconds:.1f} s"
        yield gallery(frame.images, job.seeds, job.captions, job.name, foot, frame.fraction, cell)
