"""Finished shards -> a dataset: what `datasets` reads, what we say of it, and nothing else left in the folder."""

import dataclasses
import hashlib
import json
import platform
import re
from collections import Counter
from importlib.metadata import version
from pathlib import Path

from trainkit.data.account import Account
from trainkit.data.files import (
    RemotePath,
    delete,
    delete_folder,
    exists,
    for_each,
    read_schema,
    sizes,
    write_json,
    write_text,
)
from trainkit.data.format import (
    FORMAT,
    INFO_NAME,
    PREPARATION_NAME,
    REJECTED_NAME,
    STATE_NAME,
    UNITS_FOLDER,
    VALIDATION_FOLDER,
    read_preparation,
)
from trainkit.data.preparation.deduplication import Part, drop_duplicates
from trainkit.data.preparation.filtering import TRAIN, VALIDATION
from trainkit.data.preparation.image_stats import mean_and_std, sum_totals
from trainkit.data.preparation.shards import ShardWriter, read_summary, split_path, stats_path
from trainkit.errors import UserError

OURS = r"data-.*\.arrow|.*\.tmp"
EARLY_FILES, EXAMPLES = 1000, 3  # files that must be seen before a run is stopped; rejected ones that it tells then


def finalize(
    source,
    writer: ShardWriter,
    output_dir: Path | RemotePath,
    shards: list,
    fingerprint: str,
    max_rejected_fraction: float,
) -> dict:
    """Write what makes the shards a dataset, the mark of completeness last; then sweep out what is not part of it."""
    replaced = {name: _shard_names(output_dir / name if name else output_dir) for name in ("", VALIDATION_FOLDER)}
    duplicates = {}
    if writer.filters.deduplicate != "none":
        is_first = isinstance(output_dir, Path) and not exists(output_dir / PREPARATION_NAME)
        parts, duplicates = drop_duplicates(writer, output_dir, shards, sweep_at_once=is_first)
    else:
        parts = {side: [Part(split_path(shard, side), None) for shard in shards] for side in writer.filters.sides}
    schemas = {side: for_each(read_schema, [part.path for part in parts[side]]) for side in parts}
    summaries = {side: [read_summary(schema) for schema in schemas[side]] for side in parts}
    rejections = Rejections(max_rejected_fraction, len(source))
    for summary in summaries[TRAIN]:
        rejections.add(summary["rejected"])
    rejected = [
        line
        for shard, summary in zip(shards, summaries[TRAIN], strict=True)
        for line in (*summary["rejected"], *duplicates.get(shard, ()))
    ]
    write_text(output_dir / REJECTED_NAME, "".join(json.dumps(line) + "\n" for line in rejected))
    _check_images(source, writer, output_dir, summaries, rejections)
    rejections.check(len(source), output_dir / REJECTED_NAME)
    if VALIDATION in parts:  # before the rest: where that is complete, this is
        folder = output_dir / VALIDATION_FOLDER
        mark = hashlib.blake2b(f"{fingerprint} validation".encode(), digest_size=8).hexdigest()
        _write_dataset(source, writer, folder, parts[VALIDATION], summaries[VALIDATION], mark, [])
    _write_dataset(source, writer, output_dir, parts[TRAIN], summaries[TRAIN], fingerprint, rejected)
    _sweep(writer, output_dir, parts, shards, replaced)
    return read_preparation(output_dir)


def _shard_names(folder: Path | RemotePath) -> set[str]:
    return {shard["filename"] for shard in (read_preparation(folder) or {}).get("shards", ())}


def _check_images(
    source, writer: ShardWriter, output_dir: Path | RemotePath, summaries: dict, rejections: "Rejections"
) -> None:
    counts = {side: sum(summary["num_rows"] for summary in summaries[side]) for side in summaries}
    if not any(counts.values()):
        first = rejections.examples[0]
        raise UserError(
            f"no readable image in {source.name}: {rejections.faults.total()} files rejected, the first "
            f"{first['source']}: {first['fault']}, {first['message']}; "
            f"see {output_dir / REJECTED_NAME}"
        )
    if not all(counts.values()):
        flag = f"--validation_fraction {writer.filters.validation_fraction:g}"
        raise UserError(
            f"{flag} of {sum(counts.values()):,} images leaves {counts[TRAIN]:,} to train on and "
            f"{counts[VALIDATION]:,} for validation; give a {'smaller' if counts[VALIDATION] else 'larger'} fraction"
        )


def _write_dataset(
    source,
    writer: ShardWriter,
    folder: Path | RemotePath,
    parts: list[Part],
    summaries: list[dict],
    fingerprint: str,
    rejected: list[dict],
) -> None:
    classes, present = Counter(), sizes(folder)
    for summary in summaries:
        classes.update(summary["classes"])
    shard_files = [
        {"filename": part.path.name, "num_rows": summary["num_rows"], "num_bytes": present[part.path.name]}
        for part, summary in zip(parts, summaries, strict=True)
    ]
    total = sum_totals(summary["pixels"] for summary in summaries)
    account = Account()
    account.merge(source.account)
    for summary in summaries:
        account.merge(Account.from_json(summary.get("account", {})))
    preparation = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "settings": dataclasses.asdict(writer.settings),
        "filters": dataclasses.asdict(writer.filters),
        "source": {"name": source.name, "fingerprint": source.fingerprint},
        "num_images": sum(shard["num_rows"] for shard in shard_files),
        "rejected": dict(sorted(Counter(line["fault"] for line in rejected).items())),
        "ignored": {extension: count for extension, count in sorted(account.ignored.items()) if count > 0},
        "account": account.to_json(),
        "classes": {name: classes[str(label)] for label, name in enumerate(writer.label_names or [])},
        "pixels": mean_and_std(total, 2**writer.settings.bit_depth - 1) | {"num_pixels": total["num_pixels"]},
        "columns": list(writer.features),
        "shards": shard_files,
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in ("pillow", "numpy", "pyarrow")},
    }
    state = {
        "_data_files": [{"filename": shard["filename"]} for shard in shard_files],
        "_fingerprint": fingerprint,
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    info = {"citation": "", "description": "", "features": writer.features, "homepage": "", "license": ""}
    write_json(folder / INFO_NAME, info)
    write_json(folder / STATE_NAME, state)
    write_json(folder / PREPARATION_NAME, preparation)


def _sweep(
    writer: ShardWriter, output_dir: Path | RemotePath, parts: dict[int, list[Part]], shards: list, replaced: dict
) -> None:
    """Delete what another run, or other settings, left behind.

    At a URL, where no lock keeps others away, only what belonged to the dataset that was there before.
    """
    wanted = {str(path) for side in parts.values() for part in side for path in part if path is not None}
    wanted |= {str(stats_path(shard)) for shard in shards}
    for folder, is_used in (
        (output_dir, True),
        (output_dir / VALIDATION_FOLDER, VALIDATION in parts),
        (output_dir / UNITS_FOLDER, writer.filters.deduplicate != "none"),
    ):
        if isinstance(output_dir, RemotePath):
            side = VALIDATION if folder.name == VALIDATION_FOLDER else TRAIN
            divided = {part.path.name.rpartition("-")[0] + ".arrow" for part in parts.get(side, ()) if part.hidden}
            names = divided | replaced["" if side == TRAIN else folder.name]
            if folder.name == UNITS_FOLDER:
                names = {name for name in sizes(folder) if _belongs_to(name, replaced)}
        elif is_used:
            names = {name for name in sizes(folder) if re.fullmatch(OURS, name)}
        else:
            delete_folder(folder)
            continue
        for name in names:
            if str(folder / name) not in wanted:
                delete(folder / name)


def _belongs_to(name: str, shards: dict[str, set[str]]) -> bool:
    """Whether what deduplication keeps of a unit, data-<unit>[-<side>-<mark>].arrow, is of one of these shards."""
    unit, _, hidden = name.removesuffix(".arrow").removeprefix("data-").partition("-")
    if hidden:
        side, _, mark = hidden.partition("-")
        return f"data-{unit}-{mark}.arrow" in shards["" if side == str(TRAIN) else VALIDATION_FOLDER]
    return any(shard.startswith((f"data-{unit}-", f"data-{unit}.")) for shard in shards[""])


def sweep_current(output_dir: Path | RemotePath) -> None:
    """Delete what a run that was killed at its very end left beside a finished local dataset."""
    if isinstance(output_dir, RemotePath):
        return
    for folder in (output_dir, output_dir / VALIDATION_FOLDER):
        wanted = _shard_names(folder)
        for name in sizes(folder):
            if re.fullmatch(OURS, name) and name not in wanted:
                delete(folder / name)


class Rejections:
    """Counts the files that cannot be read, and stops a run where they are more than a fraction of all."""

    def __init__(self, max_fraction: float, num_files: int):
        self.max_fraction, self.num_files = max_fraction, num_files
        self.faults: Counter = Counter()
        self.examples: list[dict] = []

    def add(self, rejected: list[dict]) -> None:
        self.faults.update(line["fault"] for line in rejected)
        self.examples += rejected[: EXAMPLES - len(self.examples)]

    def check(self, num_seen: int, where: Path | RemotePath | None = None) -> None:
        """Raise a `UserError` where too many of the `num_seen` files were rejected."""
        count = self.faults.total()
        if count <= self.max_fraction * num_seen:
            return
        of = f"{num_seen:,}" if num_seen == self.num_files else f"the first {num_seen:,}"
        faults = ", ".join(f"{number:,} {fault}" for fault, number in self.faults.most_common())
        told = "; ".join(f"{line['source']} ({line['fault']}: {line['message']})" for line in self.examples)
        raise UserError(
            f"{count:,} of {of} files were rejected ({faults}), more than --max_rejected_fraction "
            f"{self.max_fraction:g}: {told}{f'; see {where}' if where else ''}; look whether this is the right data, "
            "or raise --max_rejected_fraction: what is done stays"
        )
