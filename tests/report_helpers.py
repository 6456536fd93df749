"""Folders of runs as training leaves them, written in a moment, and a browser to look at pages with."""

import json
import math
import shutil
import subprocess

import numpy as np
from PIL import Image

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr",
)  # fmt: skip
TABLE = {
    "weights_sha256": "0" * 64,
    "settings": {
        "metrics": ["kid"], "num_images": 200, "num_reference": 400, "reference": "photos", "note": "not comparable",
        "feature_extractor": "efficientnet-lite0",
    },
    "cells": [
        {"scheduler": name, "steps": steps, "calls": steps, "order": 2, "stochastic": False, "in_stock_pipeline": True,
         "scores": {"kid": kid, "kid_se": 0.01}, "seconds_per_1000_images": 3.0 * steps}
        for name, steps, kid in (("ddim", 5, 0.5), ("dpmsolver", 5, 0.25), ("dpmsolver", 10, 0.125))
    ],
}  # fmt: skip


def write_run(folder, steps=400, validation=True, samples=3, batch=8, options=None, **record):
    """A run of `steps` optimizer steps with everything in its folder that a report reads."""
    (folder / "samples").mkdir(parents=True)
    rows = []
    for step in range(1, steps + 1):
        row = {"step": step, "images": batch * step, "loss": 0.02 + 1 / step, "lr": 1e-3, "grad_norm": 2 / step}
        if step % 10 == 0:
            row |= {"images_per_s": 40.0, "memory_peak_mib": 512.0}
        rows.append(row)
        if validation and step % 100 == 0:
            by_noise = {f"validation_loss_t{250 * n}_{250 * n + 250}": 0.1 / (n + 1) + 1 / step for n in range(4)}
            rows.append({"step": step, "validation_loss": 0.03 + 1 / step, **by_noise})
            rows.append({"step": step, "kid": 0.5 - step / 1000, "kid_std": 0.01, "kid_n": 50, "kid_reference_n": 99})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for number in range(1, samples + 1):
        pixels = np.full((64, 64, 3), 60 * number % 256, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "samples" / f"{number * steps // samples:07d}.png")
    options = {"learning_rate": 1e-3, "train_batch_size": batch, "seed": 0} | (options or {})
    about = {"name": folder.name, "max_train_steps": steps, "global_batch_size": batch, "options": options} | record
    (folder / "report.json").write_text(json.dumps(about))
    return folder


def open_in_browser(page, folder, picture=None, width=1200, height=2400, flags=()):
    """The page's DOM after its scripts have run, and what the browser reported; with `picture`, a screenshot too."""
    what = ["--dump-dom"] if picture is None else [f"--screenshot={picture}", f"--window-size={width},{height}"]
    done = subprocess.run(
        [CHROMIUM, *FLAGS, *flags, f"--user-data-dir={folder / 'profile'}", *what, page.resolve().as_uri()],
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def numbers_of(points):
    """The numbers of an SVG polyline."""
    found = [float(number) for pair in points.split() for number in pair.split(",")]
    assert all(math.isfinite(number) for number in found)
    return found
