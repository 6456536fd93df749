"""Line charts as inline SVG, with the values for the page's own script to show under the pointer."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from trainkit.report.metrics import Curve, envelope

WIDTH, HEIGHT = 480, 270  # of the viewBox; the page scales it
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 10, 42  # margins around the plot
COLOURS = 8  # --c0 to --c7 in report.css
CHOSEN_TICKS = 8
MARKED = 40  # a curve of at most as many values has a dot at each
FAINT_QUANTILES = 0.5, 99.5  # percent of a faint curve that the vertical axis must show


@dataclass(frozen=True)
class Series:
    """A curve of a chart. `colour` numbers the page's colours. A `faint` one is drawn thin, without legend or hover.

    `dashed` tells two curves of one colour apart, such as held-out and training loss of a run.
    """

    name: str
    curve: Curve
    colour: int = 0
    faint: bool = False
    dashed: bool = False


@dataclass(frozen=True)
class Chart:
    """A chart for the page's template. `svg` and `data` (JSON) are markup; the rest is text."""

    title: str
    svg: str
    data: str
    legend: list[tuple[str, int, bool, str]] = field(default_factory=list)  # name, colour, dashed, last value
    note: str = ""


def line_chart(
    title: str,
    series: Sequence[Series],
    x_label: str = "optimizer step",
    log: bool = False,
    log_x: bool = False,
    from_zero: bool = False,
    note: str = "",
) -> Chart | None:
    """A chart of `series`, or None if they have no value. On a log axis values that are not positive are left out.

    A logarithmic horizontal axis (`log_x`) has a tick at each value if they are few.
    """
    drawn = [each for each in map(lambda one: _drawable(one, log, log_x), series) if len(each.curve)]
    if not drawn:
        return None
    steps = np.unique(np.concatenate([each.curve.steps for each in drawn])).astype(float)
    x_axis = _axis(steps, log_x, padded=True) if log_x else Axis(0.0, float(steps[-1]) or 1.0, log=False)
    if log_x and len(steps) <= CHOSEN_TICKS:
        x_axis = replace(x_axis, chosen=tuple(steps))
    y_axis = _axis(_shown_values(drawn), log, padded=True, from_zero=from_zero)
    x_axis, y_axis = x_axis.spanning(LEFT, WIDTH - RIGHT), y_axis.spanning(HEIGHT - BOTTOM, TOP)
    parts = [*_grid(x_axis, y_axis, x_label), *(_path(each, x_axis, y_axis) for each in drawn)]
    svg = (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{_attribute(title)}">'
        f'{"".join(parts)}<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}" hidden></line></svg>'
    )
    named = [each for each in drawn if not each.faint]
    legend = [(each.name, each.colour, each.dashed, format_number(each.curve.last)) for each in named]
    return Chart(title, svg, _hover_data(named, x_axis, x_label), legend, note)


@dataclass(frozen=True)
class Axis:
    """Maps values from `low` to `high` to pixels from `start` to `end`."""

    low: float
    high: float
    log: bool
    start: float = 0.0
    end: float = 1.0
    chosen: tuple[float, ...] = ()

    def spanning(self, start: float, end: float) -> "Axis":
        return replace(self, start=start, end=end)

    def pixels(self, values: np.ndarray) -> np.ndarray:
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        given = np.log(np.maximum(values, 1e-300)) if self.log else values
        return self.start + (given - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        if self.chosen:
            return list(self.chosen)
        return log_ticks(self.low, self.high) if self.log else linear_ticks(self.low, self.high)


def linear_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers within [low, high], `about` as many as asked."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """1, 2 and 5 times powers of ten within [low, high]; fewer over many decades, linear ones within a part of one."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        found = [f * 10.0**d for d in decades for f in factors if low * 0.999 <= f * 10.0**d <= high * 1.001]
        if len(found) <= most:
            break
    if len(found) > most:
        found = found[:: math.ceil(len(found) / most)]
    return found if len(found) > 2 else linear_ticks(low, high, 4)


def format_number(value: float) -> str:
    """`1,234`, `12.3`, `0.0185`, `2e-05`: four digits."""
    size = abs(value)
    if size >= 10_000:
        return f"{value:,.0f}"
    if size and size < 1e-3:
        return f"{value:.3g}"
    return f"{value:,.4g}" if size < 1000 else f"{value:,.0f}"


def _tick_text(value: float) -> str:
    size = abs(value)
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= limit:
            return f"{value / limit:.4g}{letter}"
    return "0" if size < 1e-12 else f"{value:.3g}"


def _drawable(series: Series, log: bool, log_x: bool) -> Series:
    steps, values = series.curve.steps, series.curve.values
    kept = np.ones(len(steps), dtype=bool)
    if log:
        kept &= values > 0
    if log_x:
        kept &= steps > 0
    curve = envelope(Curve(steps[kept], values[kept]))
    return Series(series.name, curve, series.colour, series.faint, series.dashed)


def _shown_values(drawn: list[Series]) -> np.ndarray:
    parts = [np.percentile(s.curve.values, FAINT_QUANTILES) if s.faint else s.curve.values for s in drawn]
    return np.concatenate(parts)


def _axis(values: np.ndarray, log: bool, padded: bool, from_zero: bool = False) -> Axis:
    low, high = float(values.min()), float(values.max())
    if log:
        spread = max(high / low, 1.2) ** 0.06
        return Axis(low / spread, high * spread, log) if padded or high == low else Axis(low, high, log)
    if from_zero and low >= 0:
        return Axis(0.0, high * 1.06 or 1.0, log)
    pad = (high - low) * 0.06 if padded else 0.0
    if high == low:
        pad = abs(high) * 0.1 or 1.0
    return Axis(low - pad, high + pad, log)


def _grid(x_axis: Axis, y_axis: Axis, x_label: str) -> list[str]:
    """Grid lines, tick labels and the name of the horizontal axis."""
    parts = []
    for value, y in _placed(y_axis):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"></line>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_tick_text(value)}</text>')
    bottom = HEIGHT - BOTTOM
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"></line>')
    for value, x in _placed(x_axis):
        parts.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{_tick_text(value)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    label = f'<text class="label" x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{_attribute(x_label)}</text>'
    return [*parts, label]


def _placed(axis: Axis) -> list[tuple[float, float]]:
    ticks = axis.ticks()
    return list(zip(ticks, axis.pixels(np.array(ticks, dtype=float)).tolist(), strict=True))


def _path(series: Series, x_axis: Axis, y_axis: Axis) -> str:
    xs = x_axis.pixels(series.curve.steps.astype(float))
    ys = np.clip(y_axis.pixels(series.curve.values), TOP, HEIGHT - BOTTOM)
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(xs, ys, strict=True))
    style = "faint" if series.faint else "dashed" if series.dashed else "line"
    found = f'<polyline class="{style} c{series.colour % COLOURS}" points="{points}"></polyline>'
    if len(xs) <= MARKED and not series.faint:
        marks = (f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"></circle>' for x, y in zip(xs, ys, strict=True))
        found += f'<g class="dots c{series.colour % COLOURS}">{"".join(marks)}</g>'
    return found


def _hover_data(named: list[Series], x_axis: Axis, x_label: str) -> str:
    """What the script needs: the curves, and the ends of the horizontal axis, also as parts of the width."""
    return json.dumps(
        {
            "x": [x_axis.low, x_axis.high],
            "at": [round(x_axis.start / WIDTH, 5), round(x_axis.end / WIDTH, 5)],
            "log": x_axis.log,
            "label": x_label,
            "series": [
                {
                    "name": each.name,
                    "colour": each.colour % COLOURS,
                    "x": each.curve.steps.tolist(),
                    "y": [float(f"{value:.4g}") for value in each.curve.values],
                }
                for each in named
            ],
        },
        separators=(",", ":"),
    )


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
