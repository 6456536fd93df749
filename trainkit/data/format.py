"""What a prepared dataset is on disk: its files, and how to read its description.

    FOLDER/data-*.arrow           the images, as Arrow streams (shards)
    FOLDER/state.json             the shards in order; `datasets.load_from_disk` reads this and the next one
    FOLDER/dataset_info.json      the columns
    FOLDER/preparation.json       settings, counts, account and versions; written last: it marks a whole dataset
    FOLDER/rejected.jsonl         one line per rejected file
    FOLDER/validation/            the held-out images, a dataset of the same form (--validation_fraction)
    FOLDER/.units/                what deduplication keeps of each work unit (--deduplicate)
    FOLDER/.lock, FOLDER/work     a preparation in progress

Writers (`data/preparation`) and readers (`data/loading`, `data/cache`) both stand on this module.
"""

import json
from pathlib import Path

from trainkit.data.files import RemotePath, read_text

FORMAT = 3  # raise it when the same file and settings would give other pixels or another layout
PREPARATION_NAME, STATE_NAME, INFO_NAME = "preparation.json", "state.json", "dataset_info.json"
REJECTED_NAME, LOCK_NAME = "rejected.jsonl", ".lock"
WORK_FOLDER, VALIDATION_FOLDER, UNITS_FOLDER = "work", "validation", ".units"
SUMMARY_KEY = b"preparation"  # of a shard's schema metadata: rows, classes, rejected files of its unit
CONDITION_COLUMN = "conditioning_image"  # of pairs; stored like `image`
NO_LABEL = -1  # the label of an image without a class


def read_preparation(folder: Path | RemotePath) -> dict | None:
    """Read preparation.json of a complete prepared dataset; None if there is none or it does not match state.json."""
    try:
        preparation = json.loads(read_text(folder / PREPARATION_NAME))
        state = json.loads(read_text(folder / STATE_NAME))
    except (OSError, ValueError):
        return None
    return preparation if state.get("_fingerprint") == preparation.get("fingerprint") else None


def filters_of(preparation: dict) -> dict:
    """Return the filters that a preparation applied (`FilterSettings` as a dictionary)."""
    return preparation.get("filters", preparation.get("hygiene", {}))  # the key's earlier name


def format_counts(preparation: dict) -> str:
    """Format the counts of a preparation: '1,998 images, 2 rejected (1 empty, 1 truncated; see rejected.jsonl)'."""
    text = f"{preparation['num_images']:,} images"
    rejected = preparation["rejected"]
    if rejected:
        faults = ", ".join(f"{count:,} {fault}" for fault, count in rejected.items())
        text += f", {sum(rejected.values()):,} rejected ({faults}; see {REJECTED_NAME})"
    return text
