"""Saved tiny models of each kind that the page opens."""

import copy
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from conditional_helpers import NAMES, class_unet, image_pipeline, text_parts, vector_unet
from diffusers import DDPMPipeline, DDPMScheduler
from sampling_helpers import tiny_model

from trainkit.diffusion.few_step import progressive_scheduler
from trainkit.sampling.pipeline import conditional_pipeline, save_pipeline
from trainkit.sampling.table import TABLE_NAME
from trainkit.sampling.weights import weights_digest


def save_models(folder: Path) -> Path:
    """Write plain (with a table), student, class, vector, both, text, stock, enlarge, fill, edges, other and maps."""
    scheduler = DDPMScheduler()
    student = progressive_scheduler(scheduler.alphas_cumprod.double(), 4, "epsilon")
    save_pipeline(folder / "plain", DDPMPipeline(tiny_model(), scheduler), "")
    save_pipeline(folder / "student", DDPMPipeline(tiny_model(), student), "")
    save_pipeline(folder / "class", conditional_pipeline(class_unet(), copy.deepcopy(scheduler), id2label=NAMES), "")
    save_pipeline(folder / "vector", conditional_pipeline(vector_unet(), copy.deepcopy(scheduler)), "")
    both = conditional_pipeline(vector_unet(4), copy.deepcopy(scheduler), id2label=NAMES)
    save_pipeline(folder / "both", both, "")
    unet, parts = text_parts(folder)
    save_pipeline(folder / "text", conditional_pipeline(unet, copy.deepcopy(scheduler), prompt_length=8, **parts), "")
    kinds = (
        ("enlarge", "downscale", 2, 0.2), ("fill", "mask"), ("edges", "edges"), ("other", "picture", 1, 0.0, 3, 3),
        ("maps", "labels", 1, 0.0, 3, None, 4),
    )  # fmt: skip
    for name, kind, *settings in kinds:
        of_classes = {"num_class_embeds": 4} if name == "edges" else {}
        made = image_pipeline(kind, *settings, **of_classes)
        parts = {"image_input": made.image_input, "id2label": NAMES if of_classes else None}
        save_pipeline(folder / name, conditional_pipeline(made.unet, copy.deepcopy(scheduler), **parts), "")
    DDPMPipeline(tiny_model(1), scheduler).save_pretrained(folder / "stock")
    write_table(folder / "plain")
    return folder


def open_models(folder: Path, kinds: Sequence[str]) -> dict:
    """The models of `save_models` that `kinds` names, as the page opens them, on the CPU."""
    from trainkit.app.models import open_model

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        return {kind: open_model(str(folder / kind)) for kind in kinds}


def write_table(folder: Path) -> None:
    rows = [("sde_dpmsolver", 20, 0.02, 80.0), ("dpmsolver", 20, 0.03, 80.0), ("dpmsolver", 8, 0.05, 30.0)]
    cells = [
        {"scheduler": name, "steps": steps, "calls": steps, "scores": {"kid": kid, "kid_se": kid / 10},
         "seconds_per_1000_images": seconds}
        for name, steps, kid, seconds in rows
    ]  # fmt: skip
    table = {"weights_sha256": weights_digest(folder), "settings": {"metrics": ["kid"]}, "cells": cells}
    (folder / TABLE_NAME).write_text(json.dumps(table))
