"""The page: its fields, and what happens when they are used. Needs gradio; the rest of trainkit/app does not."""

import os
import random
from collections.abc import Iterator, Sequence
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before the import: the page calls nobody

import gradio as gr

from trainkit.app.gallery import STYLE, gallery
from trainkit.app.generation import Frame, frames
from trainkit.app.models import AppModel, describe, hint, table_rows
from trainkit.app.requests import (
    MAX_GUIDANCE,
    MAX_IMAGES,
    Job,
    Request,
    Setting,
    example_vector,
    make_job,
)
from trainkit.errors import UserError
from trainkit.sampling.conditions import ALL, NULL

SIDES = ("A", "B")
DEFAULT_IMAGES = 8
DEFAULT_GUIDANCE = 2.0  # of conditional models; students have theirs folded in
MAX_WAITING = 50  # visitors in the queue
EMPTY = '<div class="tk-empty">Press Generate.</div>'
CSS = (
    STYLE
    + """
.gradio-container { max-width: 1180px !important }
.tk-empty { padding: 48px 0; text-align: center; color: var(--body-text-color-subdued) }
.tk-hint p { margin: 0; font-size: 13px; color: var(--body-text-color-subdued) }
footer { display: none !important }
"""
)


def build_page(models: Sequence[AppModel]) -> gr.Blocks:
    """The page of one or two models."""
    theme = gr.themes.Default(
        primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
    page = gr.Blocks(title=" · ".join(model.name for model in models), theme=theme, css=CSS, analytics_enabled=False)
    with page:
        gr.Markdown(f"# {page.title}")
        for model in models:
            gr.Markdown(("" if len(models) == 1 else f"**{model.name}**: ") + describe(model), elem_classes="tk-hint")
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                shared = _shared_fields(models)
                compare = gr.Checkbox(len(models) > 1, label="Compare two settings", elem_id="compare")
                sides = [_side_fields(models, side) for side in range(2)]
                with gr.Row():
                    start = gr.Button("Generate", variant="primary", elem_id="generate")
                    stop = gr.Button("Stop", elem_id="stop")
            with gr.Column(scale=3, min_width=300), gr.Row():
                results = [_result(side) for side in range(2)]
        _tables(models)
        compare.change(_shown_sides, compare, [*(box for box, _ in sides), *(box for box, _, _ in results)])
        page.load(_shown_sides, compare, [*(box for box, _ in sides), *(box for box, _, _ in results)])
