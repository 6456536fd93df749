"""metrics.jsonl as curves: read in time that does not grow with the length of a long run, thinned for a page."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

METRICS_FILE = "metrics.jsonl"
LINES = 24_000  # of optimizer steps that are parsed; more than a curve can show
LINE_BYTES = 100  # the least that such a line has
SPEED_MARK, LOSS_MARK = b'"images_per_s"', b'"loss"'
POINTS = 400  # of a drawn curve
SMOOTHED_PART = 50  # a running mean covers this part of a run


@dataclass(frozen=True)
class Curve:
    """Values (N,) float64 over increasing optimizer steps (N,), both finite."""

    steps: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def last(self) -> float:
        return float(self.values[-1])


def read_rows(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl in order: every k-th of optimizer steps if there are many, and all others.

    Lines that are not JSON objects with a step are left out. Empty without the file.
    """
    path = folder / METRICS_FILE
    try:
        stride = max(1, path.stat().st_size // LINE_BYTES // LINES)
        with path.open("rb") as file:
            lines = list(_thinned(file, stride))
    except OSError:
        return []
    return [row for row in _parsed(lines) if isinstance(row, dict) and isinstance(row.get("step"), int)]


def _thinned(lines: Iterable[bytes], stride: int) -> Iterable[bytes]:
    """Every `stride`-th line with a speed, every `stride`-th other line of an optimizer step, and the last line."""
    counts = {True: 0, False: 0}
    left_out = None
    for line in lines:
        left_out = None
        if LOSS_MARK in line:
            speed = SPEED_MARK in line
            counts[speed] += 1
            if (counts[speed] - 1) % stride:
                left_out = line
                continue
        yield line
    if left_out is not None:
        yield left_out


def _parsed(lines: list[bytes]) -> list:
    try:
        return json.loads(b"[" + b",".join(line for line in lines if line.strip()) + b"]")  # faster than one by one
    except ValueError:
        return [row for line in lines if (row := _parsed_line(line)) is not None]


def _parsed_line(line: bytes) -> object:
    try:
        return json.loads(line)
    except ValueError:
        return None


def curve(rows: list[dict], name: str) -> Curve:
    """The values called `name`; of several at one step the last. Missing and non-finite values are left out."""
    found = {}
    for row in rows:
        value = row.get(name)
        if isinstance(value, int | float) and math.isfinite(value):
            found[row["step"]] = float(value)
    steps = sorted(found)
    return Curve(np.array(steps, dtype=np.int64), np.array([found[step] for step in steps], dtype=np.float64))


def names(rows: list[dict], prefix: str) -> list[str]:
    """The names of values that start with `prefix`, in the order in which they first occur."""
    return list(dict.fromkeys(name for row in rows if "loss" not in row for name in row if name.startswith(prefix)))


def envelope(whole: Curve, points: int = POINTS) -> Curve:
    """`whole` with at most 2 * `points` values: the least and the greatest of each of `points` parts, in order."""
    if len(whole) <= 2 * points:
        return whole
    kept = []
    for part in np.array_split(np.arange(len(whole)), points):
        kept += sorted({int(part[whole.values[part].argmin()]), int(part[whole.values[part].argmax()])})
    return Curve(whole.steps[kept], whole.values[kept])


def smoothed(whole: Curve, points: int = POINTS) -> Curve:
    """At most `points` values of the running mean of `whole` over `SMOOTHED_PART`-ths of it."""
    window = max(1, len(whole) // SMOOTHED_PART)
    sums = np.cumsum(np.insert(whole.values, 0, 0.0))
    ends = np.arange(1, len(whole) + 1)
    means = (sums[ends] - sums[np.maximum(ends - window, 0)]) / np.minimum(ends, window)
    kept = np.unique(np.linspace(0, len(whole) - 1, min(points, len(whole))).round().astype(int))
    return Curve(whole.steps[kept], means[kept])


def training_seconds(rows: list[dict]) -> float | None:
    """Seconds of training, without previews, validations and saves: from the speeds and the images between them."""
    images, speeds = curve(rows, "images"), curve(rows, "images_per_s")
    speeds = Curve(speeds.steps[speeds.values > 0], speeds.values[speeds.values > 0])
    if not len(speeds) or not len(images):
        return None
    per_step = images.last / images.steps[-1]
    return float((np.diff(speeds.steps, prepend=0) * per_step / speeds.values).sum())
