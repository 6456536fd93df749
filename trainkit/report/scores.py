"""The scores of a model wherever they were written: scores.json, sampling_table.json, metrics.jsonl."""

from dataclasses import dataclass
from pathlib import Path

from trainkit.errors import UserError
from trainkit.report.metrics import METRICS_FILE
from trainkit.report.record import read_json
from trainkit.sampling.table import TABLE_NAME, read_table

SCORES_NAME = "scores.json"
SHARES = ("precision", "recall", "density", "coverage")


def readable_table(folder: Path) -> dict:
    """sampling_table.json, or {} if there is none that can be read."""
    try:
        return read_table(folder)
    except UserError:  # the scripts that need it say so
        return {}


def read_scores(folder: Path) -> dict:
    """scores.json of evaluate_samples.py, or {}."""
    found = read_json(folder / SCORES_NAME)
    return found if isinstance(found.get("scores"), dict) and "num_generated" in found else {}


@dataclass(frozen=True)
class Score:
    """A score with what it depends on. `key` is its name in files, `label` the one to show."""

    key: str
    value: float
    error: float | None
    num_generated: int
    num_reference: int | None
    steps: int | None
    scheduler: str | None
    extractor: str
    source: str

    @property
    def label(self) -> str:
        return self.key.replace("_", " ") if self.key in SHARES else self.key.upper().replace("_", " ")

    @property
    def text(self) -> str:
        return f"{self.value:.4g}" + ("" if self.error is None else f" ± {self.error:.2g}")

    @property
    def detail(self) -> str:
        by = f", {self.steps} {'step' if self.steps == 1 else 'steps'}" if self.steps else ""
        by += f" of {self.scheduler}" if self.scheduler else ""
        return f"{self.num_generated:,} samples{by}"

    @property
    def detail_with_error(self) -> str:
        return self.detail if self.error is None else f"± {self.error:.2g}, {self.detail}"


def scores_of_file(scores: dict) -> list[Score]:
    """The scores of scores.json."""
    values, sampling = scores.get("scores", {}), scores.get("sampling") or {}
    return [
        Score(
            key=name,
            value=value,
            error=values.get(f"{name}_se", values.get(f"{name}_std")),
            num_generated=scores["num_generated"],
            num_reference=scores.get("num_reference"),
            steps=sampling.get("num_inference_steps"),
            scheduler=sampling.get("scheduler_name"),
            extractor=scores.get("feature_extractor", "unknown features"),
            source=SCORES_NAME,
        )
        for name, value in values.items()
        if not name.endswith(("_se", "_std")) and isinstance(value, int | float)
    ]


def best_of_table(table: dict) -> list[Score]:
    """The scores of the best row of sampling_table.json by its first metric."""
    cells = table.get("cells", [])
    if not cells:
        return []
    metric = table["settings"]["metrics"][0]
    return scores_of_cell(table, min(cells, key=lambda cell: cell["scores"].get(metric, float("inf"))))


def scores_of_cell(table: dict, cell: dict) -> list[Score]:
    used = table["settings"]
    return [
        Score(
            key=metric,
            value=cell["scores"][metric],
            error=cell["scores"].get(f"{metric}_se"),
            num_generated=used["num_images"],
            num_reference=used["num_reference"],
            steps=cell["steps"],
            scheduler=cell["scheduler"],
            extractor=used["feature_extractor"],
            source=TABLE_NAME,
        )
        for metric in used["metrics"]
        if metric in cell["scores"]
    ]


def scores_of_training(rows: list[dict], extractor: str | None) -> list[Score]:
    """The last score that `--score_steps` measured, of the lines of metrics.jsonl."""
    measured = [row for row in rows if isinstance(row.get("kid"), float)]
    if not measured:
        return []
    row = measured[-1]
    return [
        Score(
            key="kid",
            value=row["kid"],
            error=row.get("kid_std"),
            num_generated=row.get("kid_n", 0),
            num_reference=row.get("kid_reference_n"),
            steps=row.get("kid_num_inference_steps"),
            scheduler=row.get("kid_scheduler"),
            extractor=extractor or "unknown features",
            source=METRICS_FILE,
        )
    ]
