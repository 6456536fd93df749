"""What a folder holds that can be shared, and which of its files go to the Hub."""

from dataclasses import dataclass
from pathlib import Path

from trainkit.data.format import (
    INFO_NAME,
    PREPARATION_NAME,
    REJECTED_NAME,
    STATE_NAME,
    VALIDATION_FOLDER,
)
from trainkit.errors import UserError
from trainkit.hub.snapshot import LAST_CHECKPOINT
from trainkit.sampling.pipeline import PIPELINE_PARTS
from trainkit.sampling.record import GRID_NAME, METADATA_NAME, RECORD_NAME

# A run's folder. Everything else in it stays: checkpoints, averages, the tracker's files.
MODEL_FILES = (
    *PIPELINE_PARTS, "samples/*.png", "sampling_table.json", "sampling_table.png", "sampling_plot.png",
    "metrics.jsonl", "loss.png", "report.html", "report.json", "scores.json", "config.yaml", "distillation.json",
)  # fmt: skip
DATASET_FILES = (
    "README.md", "contact_sheet.html", "contact_sheet.png", "data-*.arrow", INFO_NAME, STATE_NAME, PREPARATION_NAME,
    REJECTED_NAME, f"{VALIDATION_FOLDER}/*.arrow", f"{VALIDATION_FOLDER}/*.json", f"{VALIDATION_FOLDER}/*.jsonl",
)  # fmt: skip
SAMPLE_FILES = ("README.md", RECORD_NAME, METADATA_NAME, GRID_NAME, "[0-9]*.*", "samples.npz", *DATASET_FILES[3:7])
# A push replaces these whole: a file of an earlier push that is not there any more would be read with the new ones.
REPLACED = {
    "model": [f"{part}/*" for part in (*PIPELINE_PARTS, LAST_CHECKPOINT) if "." not in part],
    "dataset": ["data-*.arrow", f"{VALIDATION_FOLDER}/*", "[0-9]*.*"],
}


@dataclass(frozen=True)
class Contents:
    """A kind of folder: what it is called, the type of its repository, and the files that are pushed."""

    name: str
    repo_type: str
    files: tuple[str, ...]


MODEL = Contents("model", "model", MODEL_FILES)
DATASET = Contents("prepared dataset", "dataset", DATASET_FILES)
SAMPLES = Contents("set of samples", "dataset", SAMPLE_FILES)
BY_MARK = {"model_index.json": MODEL, RECORD_NAME: SAMPLES, PREPARATION_NAME: DATASET}  # samples may be a dataset too


def contents_of(folder: Path) -> Contents:
    """What `folder` holds. Raises `UserError` if it is nothing that can be pushed."""
    if not folder.is_dir():
        raise UserError(f"{folder} {'is a file' if folder.exists() else 'does not exist'}; give a folder")
    for mark, contents in BY_MARK.items():
        if (folder / mark).is_file():
            return contents
    raise UserError(
        f"{folder} holds no saved model, dataset or samples (none of {', '.join(BY_MARK)}): give the --output_dir of "
        "a training script that has saved a pipeline, of prepare_dataset.py or of sample.py"
    )
