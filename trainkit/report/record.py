"""report.json of a run: what its report says that is in none of its other files. Training writes it beside the report.

A folder without one, of an earlier version or of a run that was killed early, is described by its last checkpoint.
"""

import json
from pathlib import Path

from trainkit.atomic import write_json
from trainkit.data.format import filters_of

RECORD_NAME, STATE_NAME = "report.json", "training_state.json"
KEPT_CLASSES = 200


def write_record(folder: Path, record: dict) -> None:
    write_json(folder / RECORD_NAME, record)


def read_record(folder: Path) -> dict:
    """report.json, or what the newest checkpoint says of the run; {} if there is neither.

    Keys, all optional: name, title, origin, state, step, max_train_steps, global_batch_size, parameters, wall_time_s,
    updated, repo_id, git_commit; hardware, energy, dataset, held_out, options, versions, preview (dictionaries).
    """
    found = read_json(folder / RECORD_NAME)
    return found or _record_of_checkpoint(folder)


def read_json(path: Path) -> dict:
    """A JSON object, or {} if there is none that can be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def describe_preparation(preparation: dict) -> dict:
    """What a report says of a prepared dataset, from its preparation.json."""
    settings, classes = preparation.get("settings", {}), preparation.get("classes") or {}
    return {
        "name": preparation.get("source", {}).get("name"),
        "fingerprint": preparation.get("fingerprint"),
        "num_images": preparation.get("num_images"),
        "rejected": preparation.get("rejected", {}),
        "num_classes": len(classes),
        "classes": dict(list(classes.items())[:KEPT_CLASSES]),
        "filters": {name: value for name, value in filters_of(preparation).items() if value not in ("none", 0, 0.0)},
        "settings": {
            name: settings.get(name)
            for name in ("height", "width", "image_mode", "resize_mode", "bit_depth", "storage")
        },
    }


def _record_of_checkpoint(folder: Path) -> dict:
    steps = [path.name.partition("-")[2] for path in folder.glob("checkpoint-*")]
    numbers = sorted(int(step) for step in steps if step.isdecimal())
    state = read_json(folder / f"checkpoint-{numbers[-1]}" / STATE_NAME) if numbers else {}
    options = state.get("options") or {}
    if not state:
        return {}
    return {
        "step": state.get("step"),
        "max_train_steps": options.get("max_train_steps"),
        "global_batch_size": state.get("global_batch_size"),
        "options": options,
        "versions": {"trainkit": state.get("trainkit")},
        "dataset": {"description": state.get("dataset_description"), "folder": options.get("train_data_dir")},
    }
