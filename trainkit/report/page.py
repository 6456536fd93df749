"""The parts of a report as values for its templates: charts, tables, pictures, settings."""

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from trainkit.options.training import HubOptions
from trainkit.report.charts import Chart, Series, format_number, line_chart
from trainkit.report.metrics import METRICS_FILE, Curve, names, smoothed
from trainkit.report.pictures import SHOWN_GRIDS, dataset_grid, sample_grids
from trainkit.report.record import RECORD_NAME, read_json
from trainkit.report.summary import (
    DISTILLATION_NAME,
    STAGES_FOLDER,
    RunSummary,
    best_scores,
    format_duration,
    format_energy,
    format_value,
    headline,
    read_run,
    split_settings,
)

BIN_PREFIX = "validation_loss_t"
LINKED = (
    "README.md", "samples.png", "sampling_table.png", "loss.png", METRICS_FILE, "config.yaml", "distillation.json",
    RECORD_NAME,
)  # fmt: skip
LISTED_CLASSES = 30
OF_THE_HUB = {field.name for field in fields(HubOptions)}
FILTER_WORDS = {"deduplicate": "duplicates removed", "validation_fraction": "held out for validation"}


def report_values(run: RunSummary) -> dict[str, Any]:
    """What templates/report.html shows of one run."""
    grids, num_grids = sample_grids(run.folder)
    changed, same = split_settings(run.record.get("options") or {})
    charts = [*quality_charts([run]), *steps_charts([run])]
    return {
        "title": run.name,
        "run": run,
        "facts": headline(run),
        "first_chart": charts[0] if charts else None,
        "charts": charts[1:],
        "speed_charts": speed_charts([run]),
        "grids": grids,
        "num_grids": num_grids,
        "shown_grids": SHOWN_GRIDS,
        "preview": run.record.get("preview") or {},
        "table": table_values(run),
        "scores": best_scores(run),
        "notes": score_notes(run),
        "students": students(run),
        "changed": changed,
        "same": same,
        "dataset": dataset_values(run),
        "about": about(run),
        "links": [name for name in LINKED if (run.folder / name).exists()],
    }


def comparison_values(runs: Sequence[RunSummary]) -> dict[str, Any]:
    """What templates/compare.html shows of several runs."""
    facts = [{what: (value, detail) for what, value, detail in headline(run)} for run in runs]
    options = [run.record.get("options") or {} for run in runs]
    every = list(dict.fromkeys(name for each in options for name in each))
    every.sort(key=lambda name: name in OF_THE_HUB)  # they change nothing in the model: last
    same_ignored = {"output_dir"}
    return {
        "title": " · ".join(run.name for run in runs),
        "runs": runs,
        "fact_names": list(dict.fromkeys(what for each in facts for what in each)),
        "facts": facts,
        "charts": [*quality_charts(runs), *steps_charts(runs), *speed_charts(runs)],
        "differing": [
            (name, [format_value(each[name]) if name in each else "–" for each in options])
            for name in every
            if name not in same_ignored and len({str(each.get(name)) for each in options if each}) > 1
        ],
        "without_settings": [run.name for run, each in zip(runs, options, strict=True) if not each],
        "grids": [next(iter(sample_grids(run.folder, 1)[0]), None) for run in runs],
        "datasets": len({run.dataset.get("fingerprint") for run in runs}) > 1,
    }


def quality_charts(runs: Sequence[RunSummary]) -> list[Chart]:
    """Loss, held-out loss and scores of one run in detail, or of several overlaid."""
    x_label, place = _horizontal(runs)
    loss, held_out = _loss_series(runs, place), _series(runs, place, "validation_loss")
    alone = len(runs) == 1
    found = [line_chart("Training loss", loss, x_label, log=True, note="Running mean over a 50th of the run.")]
    if alone:
        bins = names(runs[0].rows, BIN_PREFIX)
        by_noise = [Series(_bin_name(name), runs[0].curve(name), number) for number, name in enumerate(bins, 1)]
        whole = [Series("all noise levels", runs[0].curve("validation_loss"), 0)]
        note = "Averaged weights. Timestep 0 has the least noise."
        found.append(line_chart("Held-out loss by noise level", [*whole, *by_noise], x_label, log=True, note=note))
    else:
        found.append(line_chart("Held-out loss", held_out, x_label, log=True, note="Averaged weights."))
    found.append(line_chart("KID during training", _series(runs, place, "kid"), x_label, note="Lower is better."))
    return [chart for chart in found if chart is not None]


def speed_charts(runs: Sequence[RunSummary]) -> list[Chart]:
    """Learning rate, gradient norm, throughput and memory."""
    x_label, place = _horizontal(runs)
    norms = _smoothed_series(runs, place, "grad_norm", faint=len(runs) == 1)
    found = [
        line_chart("Learning rate", _series(runs, place, "lr"), x_label, from_zero=True),
        line_chart("Gradient norm", norms, x_label, log=True, note="Before clipping."),
        line_chart("Images per second", _series(runs, place, "images_per_s"), x_label, from_zero=True,
                   note="All processes. Previews, validation and saves do not count."),
        line_chart("Peak memory, MiB", _series(runs, place, "memory_peak_mib"), x_label, from_zero=True),
    ]  # fmt: skip
    return [chart for chart in found if chart is not None]


def steps_charts(runs: Sequence[RunSummary]) -> list[Chart]:
    """The first metric of the table of steps, a curve per scheduler; of several runs, the best scheduler of each."""
    with_table = [(number, run) for number, run in enumerate(runs) if run.table]
    if sum(len(run.table["cells"]) for _, run in with_table) < 2:
        return []
    metric = with_table[0][1].table["settings"]["metrics"][0]
    series = []
    for number, run in with_table:
        points: dict[str, dict[int, float]] = {}
        for cell in run.table["cells"]:
            name = cell["scheduler"] if len(runs) == 1 else run.name
            values = points.setdefault(name, {})
            if metric in cell["scores"]:
                values[cell["steps"]] = min(values.get(cell["steps"], float("inf")), cell["scores"][metric])
        for place, (name, values) in enumerate(points.items()):
            series.append(Series(name, _curve(values), place if len(runs) == 1 else number))
    note = "Lower is better." if len(runs) == 1 else "The best scheduler of each run. Lower is better."
    chart = line_chart(
        f"{metric.upper()} by sampling steps", series, "sampling steps", log=True, log_x=True, note=note
    )
    return [] if chart is None else [chart]


def _curve(values: dict[int, float]) -> Curve:
    steps = sorted(values)
    return Curve(np.array(steps), np.array([values[step] for step in steps]))


def _horizontal(runs: Sequence[RunSummary]) -> tuple[str, Callable[[RunSummary, Curve], Curve]]:
    """The name of the horizontal axis, and what places a curve on it: images where global batches differ."""
    sizes = {run.global_batch_size for run in runs}
    if len(sizes) == 1 or None in sizes:
        return "optimizer step", lambda run, curve: curve
    return "images seen", lambda run, curve: Curve(curve.steps * run.global_batch_size, curve.values)


def _series(runs: Sequence[RunSummary], place: Callable, name: str) -> list[Series]:
    label = "latest" if len(runs) == 1 else ""
    return [Series(label or run.name, place(run, run.curve(name)), number) for number, run in enumerate(runs)]


def _smoothed_series(runs: Sequence[RunSummary], place: Callable, name: str, faint: bool) -> list[Series]:
    found = []
    for number, run in enumerate(runs):
        whole = run.curve(name)
        if not len(whole):
            continue
        if faint:
            found.append(Series(name, place(run, whole), number, faint=True))
        found.append(Series("mean" if len(runs) == 1 else run.name, place(run, smoothed(whole)), number))
    return found


def _loss_series(runs: Sequence[RunSummary], place: Callable) -> list[Series]:
    """Training loss; with one run also the held-out loss in the same chart."""
    found = _smoothed_series(runs, place, "loss", faint=len(runs) == 1)
    if len(runs) == 1:
        found.append(Series("held-out", runs[0].curve("validation_loss"), 1, dashed=True))
    return found


def _bin_name(name: str) -> str:
    low, _, high = name.removeprefix(BIN_PREFIX).partition("_")
    return f"timesteps {low}–{high}"


def table_values(run: RunSummary) -> dict[str, Any]:
    """Columns, rows and the note of the table of steps; {} without one. The best row for each steps is marked."""
    if not run.table:
        return {}
    used = run.table["settings"]
    metrics = used["metrics"]
    cells = sorted(run.table["cells"], key=lambda cell: (cell["steps"], cell["scores"].get(metrics[0], 0.0)))
    best = {cell["steps"]: id(cell) for cell in reversed(cells)}
    rows = []
    for cell in cells:
        scores = [_with_error(cell["scores"], metric) for metric in metrics]
        values = [f"{cell['steps']:,}", cell["scheduler"], *scores, format_number(cell["seconds_per_1000_images"])]
        rows.append((id(cell) == best[cell["steps"]] and len(cells) > 1, values))
    return {
        "columns": ["steps", "scheduler", *(metric.upper() for metric in metrics), "s per 1,000 images"],
        "rows": rows,
        "note": f"{used['num_images']:,} samples per row against {used['num_reference']:,} real images. "
        f"{used['feature_extractor']}; {used['note']}.",
    }


def _with_error(scores: dict, metric: str) -> str:
    if metric not in scores:
        return "–"
    error = scores.get(f"{metric}_se")
    return f"{scores[metric]:.4g}" + ("" if error is None else f" ± {error:.2g}")


def score_notes(run: RunSummary) -> list[str]:
    """What must be known beside scores.json: comparability, noise floor, copies of training images."""
    notes = []
    if run.scores.get("note"):
        notes.append(f"{run.scores['note'][0].upper()}{run.scores['note'][1:]}.")
    memorization = (run.scores.get("memorization") or {}).get("features") or {}
    if "share_too_near" in memorization:
        notes.append(
            f"{memorization['share_too_near']:.1%} of the samples are nearer to a training image than 99 % of the "
            f"held-out images are (about 1 % is expected); {memorization['num_copies']} equal one."
        )
    return notes


def students(run: RunSummary) -> list[dict[str, Any]]:
    """The students of a distillation in the order of training: length, loss, scores, picture of each."""
    record = read_json(run.folder / DISTILLATION_NAME)
    if not record:
        return []
    folders = [folder for folder in (run.folder / STAGES_FOLDER).glob("*") if folder.is_dir()]
    folders = sorted(folders, key=lambda folder: -_steps_of(folder.name)) + [run.folder]
    found = []
    for folder in folders:
        stage = run if folder == run.folder else read_run(folder)
        grids, _ = sample_grids(folder, 1)
        losses = stage.curve("loss")
        found.append(
            {
                "name": f"steps-{record.get('num_steps')}" if folder == run.folder else folder.name,
                "link": None if folder == run.folder else f"{STAGES_FOLDER}/{folder.name}/report.html",
                "step": stage.step,
                "loss": format_number(smoothed(losses).last) if len(losses) else "–",
                "scores": best_scores(stage),
                "grid": grids[0] if grids else None,
            }
        )
    return found


def _steps_of(name: str) -> int:
    number = name.rpartition("-")[2]
    return int(number) if number.isdecimal() else 10**9  # the adapted teacher is the first


def dataset_values(run: RunSummary) -> dict[str, Any]:
    """Facts of the training images, their classes and a few of them."""
    about, settings = run.dataset, run.dataset.get("settings") or {}
    rejected = about.get("rejected") or {}
    classes = sorted((about.get("classes") or {}).items(), key=lambda item: -item[1])
    size = f"{settings['height']} × {settings['width']}, {settings['image_mode']}" if settings.get("height") else ""
    count, held_out = about.get("num_images"), (run.record.get("held_out") or {}).get("num_images")
    facts = [
        ("name", about.get("name") or about.get("description")),
        ("images", f"{count:,}" if count else None),
        ("size", size),
        ("held out", f"{held_out:,} images" if held_out else None),
        ("rejected", ", ".join(f"{number:,} {fault}" for fault, number in rejected.items()) or "none"),
        ("classes", f"{about['num_classes']:,}" if about.get("num_classes") else None),
        *((FILTER_WORDS.get(name, name), str(value)) for name, value in (about.get("filters") or {}).items()
          if name in FILTER_WORDS),
        ("fingerprint", about.get("fingerprint")),
    ]  # fmt: skip
    largest = max((number for _, number in classes), default=1)
    folder, fingerprint = about.get("folder"), about.get("fingerprint")
    return {
        "facts": [(name, value) for name, value in facts if value] if about else [],
        "classes": [(name, number, 100 * number / largest) for name, number in classes[:LISTED_CLASSES]],
        "more_classes": max(0, (about.get("num_classes") or 0) - LISTED_CLASSES),
        "picture": dataset_grid(folder, fingerprint) if folder and fingerprint else None,
        "folder": folder,
    }


def about(run: RunSummary) -> list[tuple[str, str]]:
    """Hardware, time, versions: what a person who repeats the run asks for."""
    record, hardware = run.record, run.record.get("hardware") or {}
    wall, commit = record.get("wall_time_s"), record.get("git_commit")
    facts = [
        ("model", f"{record['parameters'] / 1e6:.3g} M parameters" if record.get("parameters") else None),
        ("global batch", f"{run.global_batch_size:,} images" if run.global_batch_size else None),
        ("hardware", hardware.get("description")),
        ("wall-clock time", format_duration(wall) if wall else None),
        ("energy", format_energy(record["energy"]) if record.get("energy") else None),
        *((name, version) for name, version in (record.get("versions") or {}).items()),
        ("git commit", commit),
    ]
    return [(name, value) for name, value in facts if value]
