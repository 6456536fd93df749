"""Turn finished shards into a dataset: the files that `datasets` reads, the description and the account."""

import dataclasses
import json
import platform
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from trainkit import __version__
from trainkit.data.account import Account, Kind
from trainkit.data.files import RemotePath, delete, exists, for_each, read_schema, sizes, write_json, write_text
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
from trainkit.data.preparation.output import delete_own_files, held_out_mark, owns_validation
from trainkit.data.preparation.shards import ShardWriter, read_summary, split_path, stats_path
from trainkit.data.sources.source import Source
from trainkit.errors import UserError

EARLY_FILES = 1000  # files to read before a run may stop early
EXAMPLES = 3  # rejected files named in the message


def finalize(
    source: Source,
    writer: ShardWriter,
    output_dir: Path | RemotePath,
    shards: list[Path | RemotePath],
    fingerprint: str,
    max_rejected_fraction: float,
) -> dict:
    """Write the files that make the shards a dataset, preparation.json last; then delete what is not part of it.

    Returns the contents of preparation.json.

    Raises:
        UserError: no image is left, or more than `max_rejected_fraction` of the files are rejected.
    """
    replaced = {name: _shard_names(output_dir / name if name else output_dir) for name in ("", VALIDATION_FOLDER)}
    had_validation = owns_validation(output_dir)
    parts, duplicates = _parts(writer, output_dir, shards)
    schemas = {split: for_each(read_schema, [part.path for part in parts[split]]) for split in parts}
    summaries = {split: [read_summary(schema) for schema in schemas[split]] for split in parts}
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
    account = _account(source, summaries, len(rejected))
    if VALIDATION in parts:  # first: if the rest is complete, so is this
        held_out = {"held_out_of": fingerprint, "rejected": {}}
        dataset = output_dir / VALIDATION_FOLDER, parts[VALIDATION], summaries[VALIDATION]
        _write_dataset(source, writer, *dataset, held_out_mark(fingerprint), held_out)
    about = {
        "rejected": dict(sorted(Counter(line["fault"] for line in rejected).items())),
        "ignored": {extension: count for extension, count in sorted(account.ignored.items()) if count > 0},
        "account": account.to_json(),
    }
    _write_dataset(source, writer, output_dir, parts[TRAIN], summaries[TRAIN], fingerprint, about)
    if isinstance(output_dir, RemotePath):
        _delete_replaced(output_dir, parts, shards, replaced)
    else:
        _delete_leftovers(writer, output_dir, parts, shards, had_validation)
    written = read_preparation(output_dir)
    assert written is not None  # just now
    return written


def _parts(
    writer: ShardWriter, output_dir: Path | RemotePath, shards: list[Path | RemotePath]
) -> tuple[dict[int, list[Part]], dict[Path | RemotePath, list[dict]]]:
    """Return the parts of each split in the source's order, and by shard the lines of rejected.jsonl on duplicates."""
    if writer.filters.deduplicate != "none":
        is_first = isinstance(output_dir, Path) and not exists(output_dir / PREPARATION_NAME)
        return drop_duplicates(writer, output_dir, shards, sweep_at_once=is_first)
    splits = writer.filters.splits
    return {split: [Part(split_path(shard, split), None) for shard in shards] for split in splits}, {}


def _account(source: Source, summaries: dict[int, list[dict]], num_rejected: int) -> Account:
    """Return the account of everything that was found: the source's, the units' and the totals."""
    account = Account()
    account.merge(source.account)
    for summary in summaries[TRAIN]:
        account.merge(Account.from_json(summary.get("account", {})))
    kinds = {TRAIN: Kind.IMAGES, VALIDATION: Kind.HELD_OUT}
    for split in summaries:
        account.add(kinds[split], count=sum(summary["num_rows"] for summary in summaries[split]))
    account.add(Kind.REJECTED, count=num_rejected)
    return account


def _shard_names(folder: Path | RemotePath) -> set[str]:
    return {shard["filename"] for shard in (read_preparation(folder) or {}).get("shards", ())}


def _check_images(
    source: Source, writer: ShardWriter, output_dir: Path | RemotePath, summaries: dict, rejections: "Rejections"
) -> None:
    counts = {split: sum(summary["num_rows"] for summary in summaries[split]) for split in summaries}
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
    source: Source,
    writer: ShardWriter,
    folder: Path | RemotePath,
    parts: list[Part],
    summaries: list[dict],
    fingerprint: str,
    about: dict,
) -> None:
    """Write the JSON files of a dataset; `about` holds further entries of its preparation.json."""
    classes: Counter[str] = Counter()
    present = sizes(folder)
    for summary in summaries:
        classes.update(summary["classes"])
    shard_files = [
        {"filename": part.path.name, "num_rows": summary["num_rows"], "num_bytes": present[part.path.name]}
        for part, summary in zip(parts, summaries, strict=True)
    ]
    total = sum_totals(summary["pixels"] for summary in summaries)
    preparation = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "settings": dataclasses.asdict(writer.settings),
        "filters": dataclasses.asdict(writer.filters),
        **({} if writer.pairs is None else {"pairs": dataclasses.asdict(writer.pairs)}),
        "source": {"name": source.name, "fingerprint": source.fingerprint},
        "num_images": sum(shard["num_rows"] for shard in shard_files),
        **about,
        "classes": {name: classes[str(label)] for label, name in enumerate(writer.label_names or [])},
        "pixels": mean_and_std(total, 2**writer.settings.bit_depth - 1) | {"num_pixels": total["num_pixels"]},
        "columns": list(writer.features),
        "shards": shard_files,
        "versions": {"python": platform.python_version(), "trainkit": __version__}
        | {package: version(package) for package in ("pillow", "numpy", "pyarrow")},
    }
    state: dict[str, Any] = {
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


def _delete_leftovers(
    writer: ShardWriter,
    output_dir: Path,
    parts: dict[int, list[Part]],
    shards: Sequence[Path | RemotePath],
    had_validation: bool,
) -> None:
    """Delete the shards that another run or other settings left in a local folder; no other file."""
    delete_own_files(output_dir, {part.path.name for part in parts[TRAIN]})
    if VALIDATION in parts:
        delete_own_files(output_dir / VALIDATION_FOLDER, {part.path.name for part in parts[VALIDATION]})
    elif had_validation:
        delete_own_files(output_dir / VALIDATION_FOLDER, everything=True)
    is_used = writer.filters.deduplicate != "none"
    dropped = {part.dropped.name for split in parts.values() for part in split if part.dropped is not None}
    kept = dropped | {stats_path(shard).name for shard in shards} if is_used else set()
    delete_own_files(output_dir / UNITS_FOLDER, kept, everything=not is_used)


def _delete_replaced(
    output_dir: RemotePath,
    parts: dict[int, list[Part]],
    shards: Sequence[Path | RemotePath],
    replaced: dict[str, set[str]],
) -> None:
    """Delete at a URL only the files of the dataset that is replaced, since no lock keeps other runs away."""
    wanted = {str(path) for split in parts.values() for part in split for path in part if path is not None}
    wanted |= {str(stats_path(shard)) for shard in shards}
    for name, split in (("", TRAIN), (VALIDATION_FOLDER, VALIDATION)):
        folder = output_dir / name if name else output_dir
        whole = {part.path.name.rpartition("-")[0] + ".arrow" for part in parts.get(split, ()) if part.dropped}
        for shard in whole | replaced[name]:
            if str(folder / shard) not in wanted:
                delete(folder / shard)
    units = output_dir / UNITS_FOLDER
    for name in sizes(units):
        if _belongs_to(name, replaced) and str(units / name) not in wanted:
            delete(units / name)


def _belongs_to(name: str, shards: dict[str, set[str]]) -> bool:
    """Whether a deduplication file, data-<unit>[-<split>-<mark>].arrow, belongs to one of these shards."""
    unit, _, dropped = name.removesuffix(".arrow").removeprefix("data-").partition("-")
    if dropped:
        split, _, mark = dropped.partition("-")
        return f"data-{unit}-{mark}.arrow" in shards["" if split == str(TRAIN) else VALIDATION_FOLDER]
    return any(shard.startswith((f"data-{unit}-", f"data-{unit}.")) for shard in shards[""])


def delete_after_kill(output_dir: Path | RemotePath) -> None:
    """Delete the files that a run killed at its very end left next to a finished local dataset."""
    if isinstance(output_dir, RemotePath):
        return
    delete_own_files(output_dir, _shard_names(output_dir))
    if read_preparation(output_dir / VALIDATION_FOLDER) is not None and owns_validation(output_dir):
        delete_own_files(output_dir / VALIDATION_FOLDER, _shard_names(output_dir / VALIDATION_FOLDER))


class Rejections:
    """Counts the rejected files, and stops a run if they are more than a fraction of all."""

    def __init__(self, max_fraction: float, num_files: int):
        self.max_fraction, self.num_files = max_fraction, num_files
        self.faults: Counter = Counter()
        self.examples: list[dict] = []

    def add(self, rejected: list[dict]) -> None:
        self.faults.update(line["fault"] for line in rejected)
        self.examples += rejected[: EXAMPLES - len(self.examples)]

    def check(self, num_seen: int, where: Path | RemotePath | None = None) -> None:
        """Raise `UserError` if too many of the `num_seen` files were rejected."""
        count = self.faults.total()
        if count <= self.max_fraction * num_seen:
            return
        of = f"{num_seen:,}" if num_seen == self.num_files else f"the first {num_seen:,}"
        faults = ", ".join(f"{number:,} {fault}" for fault, number in self.faults.most_common())
        examples = "; ".join(f"{line['source']} ({line['fault']}: {line['message']})" for line in self.examples)
        raise UserError(
            f"{count:,} of {of} files were rejected ({faults}), more than --max_rejected_fraction "
            f"{self.max_fraction:g}: {examples}{f'; see {where}' if where else ''}; check the data, "
            "or raise --max_rejected_fraction: finished work is kept"
        )
