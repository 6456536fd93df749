"""What a report says of one run, gathered from its folder. Whatever is missing or unreadable there is left out."""

from dataclasses import dataclass, field, fields
from pathlib import Path

from trainkit.options.script import ConditionalTrainingOptions
from trainkit.report.charts import format_number
from trainkit.report.metrics import Curve, curve, read_rows, training_seconds
from trainkit.report.record import describe_preparation, read_json, read_record
from trainkit.report.scores import (
    Score,
    best_of_table,
    read_scores,
    readable_table,
    scores_of_file,
    scores_of_training,
)

DISTILLATION_NAME, STAGES_FOLDER = "distillation.json", "stages"


@dataclass
class RunSummary:
    """One run. `rows` are those of `read_rows`, `table` is sampling_table.json and `scores` is scores.json."""

    folder: Path
    name: str
    record: dict
    rows: list[dict]
    table: dict
    scores: dict
    curves: dict[str, Curve] = field(default_factory=dict)

    def curve(self, name: str) -> Curve:
        if name not in self.curves:
            self.curves[name] = curve(self.rows, name)
        return self.curves[name]

    @property
    def step(self) -> int:
        images = self.curve("images")
        return int(images.steps[-1]) if len(images) else int(self.record.get("step") or 0)

    @property
    def images(self) -> int:
        images = self.curve("images")
        return int(images.last) if len(images) else 0

    @property
    def global_batch_size(self) -> int | None:
        return self.record.get("global_batch_size") or (self.images // self.step if self.step else None)

    @property
    def state(self) -> str:
        """`finished`, `stopped` (by a signal), or `running or stopped`: nobody writes down that a run was killed."""
        total, known = self.record.get("max_train_steps"), self.record.get("state")
        if known in ("finished", "stopped"):
            return known
        return "finished" if known is None and total and self.step >= total else "running or stopped"

    @property
    def written(self) -> str:
        """When training wrote about itself last, if it is known."""
        updated = self.record.get("updated") or ""
        return f"last written {updated}" if updated and self.state == "running or stopped" else updated

    @property
    def dataset(self) -> dict:
        return self.record.get("dataset") or {}


def read_run(folder: Path, record: dict | None = None) -> RunSummary:
    """The run in `folder`; `record` is what training knows of it, by default what it wrote there."""
    record = dict(read_record(folder) if record is None else record)
    name = record.get("name") or folder.resolve().name
    dataset = record.get("dataset") or {}
    prepared = dataset.get("folder")
    if prepared and "num_images" not in dataset:
        record["dataset"] = dataset | describe_preparation(read_json(Path(prepared) / "preparation.json"))
    return RunSummary(folder, name, record, read_rows(folder), readable_table(folder), read_scores(folder))


def headline(run: RunSummary) -> list[tuple[str, str, str]]:
    """The facts at the top: what, value, detail."""
    scores = [(each.label, f"{each.value:.3g}", each.detail_with_error) for each in best_scores(run)[:2]]
    return progress(run) + scores


def progress(run: RunSummary) -> list[tuple[str, str, str]]:
    """How far, how fast and how well it trained: what, value, detail."""
    speeds, memory, total = run.curve("images_per_s"), run.curve("memory_peak_mib"), run.record.get("max_train_steps")
    facts = [("optimizer steps", f"{run.step:,}", f"of {total:,}" if total else "")]
    count = run.dataset.get("num_images")
    facts.append(("images seen", f"{run.images:,}", f"in {run.images / count:.3g} epochs" if count else ""))
    seconds = training_seconds(run.rows)
    if seconds is not None:
        facts.append(("training time", format_duration(seconds), "without sampling and saving"))
    if len(speeds):
        median = sorted(speeds.values.tolist())[len(speeds) // 2]
        facts.append(("throughput", format_number(median), "images/s, median"))
    if len(memory):
        facts.append(("peak memory", format_mib(float(memory.values.max())), "per device"))
    for name, label in (("loss", "training loss"), ("validation_loss", "held-out loss")):
        values = run.curve(name)
        if len(values):
            last = values.values[-max(1, len(values) // 50) :].mean() if name == "loss" else values.last
            facts.append((label, format_number(float(last)), f"at step {values.steps[-1]:,}"))
    return facts


def best_scores(run: RunSummary) -> list[Score]:
    """One score for each metric: from scores.json, else the best row of the table, else the last one of training."""
    extractor = (run.record.get("options") or {}).get("score_extractor")
    measured = [*scores_of_file(run.scores), *best_of_table(run.table), *scores_of_training(run.rows, extractor)]
    found: dict[str, Score] = {}
    for score in measured:
        found.setdefault(score.key, score)
    return list(found.values())


def split_settings(options: dict) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Name and text of the options that are not at their defaults, and of the others."""
    defaults = default_options()
    changed: list[tuple[str, str]] = []
    same: list[tuple[str, str]] = []
    for name, value in options.items():
        (same if name in defaults and _equal(defaults[name], value) else changed).append((name, format_value(value)))
    return changed, same


def default_options() -> dict:
    """The default of each option of the training scripts."""
    options = ConditionalTrainingOptions()
    return {each.name: getattr(options, each.name) for each in fields(options)}


def _equal(one, other) -> bool:
    return one == other or str(one) == str(other)


def format_value(value) -> str:
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def format_duration(seconds: float) -> str:
    """`42 s`, `12 min 5 s`, `3 h 20 min`, `2 d 4 h`."""
    seconds = round(seconds)
    for unit, length, smaller, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if seconds >= length:
            rest = seconds % length // part
            return f"{seconds // length} {unit}" + (f" {rest} {smaller}" if rest else "")
    return f"{seconds} s"


def format_energy(energy: dict) -> str:
    """`12.3 Wh (the GPU alone)`, `1.23 kWh (the GPU alone, since step 400)`: the `energy` of a record."""
    hours = energy["joules"] / 3600
    amount = f"{hours / 1000:.3g} kWh" if hours >= 1000 else f"{hours:.3g} Wh"
    since = f", since step {energy['since_step']:,}" if energy.get("since_step") else ""
    return f"{amount} ({energy['covers']}{since})"


def format_mib(mib: float) -> str:
    return f"{mib / 1024:.3g} GiB" if mib >= 1024 else f"{mib:.0f} MiB"
