"""The output folder of a preparation: which files are the preparation's own, and which it must leave alone.

A preparation writes and deletes its own files only: the fixed names of `data/format.py` in a folder that it created,
shards that carry its summary, and temporary files. Other files in the folder stay.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import re
import tempfile
from collections.abc import Iterator, Set
from pathlib import Path

import pyarrow as pa

from trainkit.data.files import (
    RemotePath,
    delete,
    is_temporary,
    make_folder,
    read_schema,
    read_text,
    remove_empty_folder,
    sizes,
    write_text,
)
from trainkit.data.format import (
    INFO_NAME,
    LOCK_NAME,
    PREPARATION_NAME,
    STATE_NAME,
    SUMMARY_KEY,
    VALIDATION_FOLDER,
    filters_of,
    read_preparation,
)
from trainkit.data.pairing import PairSettings, describe_pairs, pairs_of
from trainkit.data.preparation.filtering import FilterSettings
from trainkit.data.settings import PreparationSettings
from trainkit.errors import UserError, one_line

SHARD_NAME = re.compile(r"data-[0-9a-f]{16}(-[0-9a-f]{16}|-\d{5}|-\d-[0-9a-f]{16})?\.arrow")
JSON_NAMES = PREPARATION_NAME, STATE_NAME, INFO_NAME
EXAMPLES = 3
READ_ONLY_ERRORS = {errno.EACCES, errno.EPERM, errno.EROFS}
OUTPUT_ERRORS = READ_ONLY_ERRORS | {
    getattr(errno, name) for name in "ENOSPC EDQUOT EFBIG EIO ENOTDIR EEXIST ENOENT ENAMETOOLONG".split()
}


def check_output(
    output_dir: Path | RemotePath,
    settings: PreparationSettings,
    filters: FilterSettings,
    overwrite: bool,
    output_flag: str = "--output_dir",
) -> None:
    """Create the folder; refuse one that cannot be written or that holds something else.

    It is quick and needs no source, so a mistake is found before a long listing. A finished dataset in a folder that
    this user cannot write is accepted: it may be the one wanted.

    Raises:
        UserError: naming `output_flag`.
    """
    with output_errors(output_dir, output_flag):
        _claim_folder(output_dir, output_flag)
        if isinstance(output_dir, Path):  # at a URL, claiming it has written a file
            try:
                tempfile.TemporaryFile(dir=output_dir).close()
            except OSError as error:
                if error.errno not in READ_ONLY_ERRORS or read_preparation(output_dir) is None:
                    raise
    if filters.validation_fraction:
        _check_validation_folder(output_dir)
    if not overwrite:
        refuse_other_settings(read_preparation(output_dir), output_dir, settings, filters, output_flag)


def _claim_folder(folder: Path | RemotePath, output_flag: str) -> None:
    """Create the folder, or check that it is one that a preparation created."""
    make_folder(folder)
    names = sizes(folder).keys()
    held = _description(folder) if PREPARATION_NAME in names else None
    if "held_out_of" in (held or {}):
        raise UserError(
            f"{output_flag} {folder} is the held-out set of the dataset {folder.parent}; give another folder"
        )
    if names and held is None and (LOCK_NAME not in names or PREPARATION_NAME in names):
        shown = ", ".join(sorted(names)[:EXAMPLES]) + (", ..." if len(names) > EXAMPLES else "")
        raise UserError(f"{output_flag} {folder} holds other files ({shown}); give a new or empty folder")
    if isinstance(folder, RemotePath) and LOCK_NAME not in names:
        write_text(folder / LOCK_NAME, "")  # nothing is locked there, but this marks the folder as a preparation's


def _description(folder: Path | RemotePath) -> dict | None:
    """preparation.json if a preparation wrote it, also of a dataset that is not complete."""
    try:
        content = json.loads(read_text(folder / PREPARATION_NAME))
    except ValueError:
        return {}  # cut short
    except OSError:
        return None
    return content if isinstance(content, dict) and {"fingerprint", "shards"} <= content.keys() else None


def _check_validation_folder(output_dir: Path | RemotePath) -> None:
    folder = output_dir / VALIDATION_FOLDER
    foreign = sorted(name for name in sizes(folder) if not is_temporary(name) and not SHARD_NAME.fullmatch(name))
    if foreign and not owns_validation(output_dir):
        shown = ", ".join(foreign[:EXAMPLES])
        raise UserError(
            f"--validation_fraction writes {folder}, which holds files that this preparation did not make ({shown}): "
            "move them, or give another --output_dir"
        )


def owns_validation(output_dir: Path | RemotePath) -> bool:
    """Whether OUTPUT/validation was made together with OUTPUT, not by a separate preparation or by hand."""
    folder = output_dir / VALIDATION_FOLDER
    names = sizes(folder)
    if LOCK_NAME in names:  # a separate preparation locks its folder
        return False
    if PREPARATION_NAME not in names:  # interrupted, or not a preparation's
        return any(is_own_shard(folder / name) for name in names)
    held_out, whole = _description(folder) or {}, _description(output_dir) or {}
    return "held_out_of" in held_out or held_out.get("fingerprint") == held_out_mark(whole.get("fingerprint"))


def held_out_mark(fingerprint: str | None) -> str:
    """The fingerprint of the held-out set of the dataset with this fingerprint."""
    return hashlib.blake2b(f"{fingerprint} validation".encode(), digest_size=8).hexdigest()


def is_own_shard(path: Path | RemotePath) -> bool:
    """Return whether a preparation wrote the file: a shard's name and a summary inside; at a URL the name alone."""
    if not SHARD_NAME.fullmatch(path.name):
        return False
    if isinstance(path, RemotePath) or path.stat().st_size == 0:  # emptied by a machine that lost power
        return True
    try:
        return SUMMARY_KEY in (read_schema(path).metadata or {})
    except (OSError, pa.ArrowException):
        return False


def delete_own_files(folder: Path | RemotePath, keep: Set[str] = frozenset(), everything: bool = False) -> None:
    """Delete a preparation's shards and temporary files in `folder`, except the names in `keep`.

    With `everything`, its JSON files go too, and the folder if that leaves it empty.
    """
    for name in sizes(folder):
        is_json = everything and name in JSON_NAMES
        if name not in keep and (is_json or is_temporary(name) or is_own_shard(folder / name)):
            delete(folder / name)
    if everything:
        remove_empty_folder(folder)


def refuse_other_settings(
    held: dict | None,
    output_dir: Path | RemotePath,
    settings: PreparationSettings,
    filters: FilterSettings,
    output_flag: str,
) -> None:
    """Raise `UserError` if the folder holds a dataset (`held`) of other settings; it names those that differ."""
    if held is not None and (changed := other_settings(held, settings, filters)):
        raise replacing_error(output_dir, output_flag, f"a dataset of other settings ({'; '.join(changed)})")


def other_settings(held: dict, settings: PreparationSettings, filters: FilterSettings) -> list[str]:
    """The settings of the dataset `held` that are others now: name, value and new value of each."""
    before = held["settings"] | filters_of(held)
    now = json.loads(json.dumps(dataclasses.asdict(settings) | dataclasses.asdict(filters)))
    return [
        f"{name} {before[name]}, now {value}"
        for name, value in now.items()
        if before.get(name, value) != value and not name.startswith("train_")  # no stored byte depends on those
    ]


def refuse_other_pairs(
    held: dict | None, output_dir: Path | RemotePath, pairs: PairSettings | None, output_flag: str
) -> None:
    """Raise `UserError` if the folder holds a dataset (`held`) with other conditioning images, or without any."""
    before = None if held is None else pairs_of(held)
    if held is not None and before != pairs:
        what = f"a dataset with {describe_pairs(before)}, now with {describe_pairs(pairs)}"
        raise replacing_error(output_dir, output_flag, what)


def replacing_error(folder: Path | RemotePath, output_flag: str, held: str) -> UserError:
    return UserError(
        f"{output_flag} {folder} holds {held}: give another folder, or --overwrite_output_dir to replace it"
    )


@contextlib.contextmanager
def output_errors(folder: Path | RemotePath, output_flag: str) -> Iterator[None]:
    """Turn an error of writing (a full disk, a missing permission) into a `UserError` of one line."""
    try:
        yield
    except OSError as error:
        if error.errno not in OUTPUT_ERRORS:
            raise
        fix = "give a folder that you can write" if error.errno in READ_ONLY_ERRORS else (
            "free space there or give another folder: finished work is kept, and the same command continues it"
        )  # fmt: skip
        reason = one_line(error.strerror or error)
        raise UserError(f"{output_flag} {folder} cannot be written ({reason}); {fix}") from None


def is_among_images(output_dir: Path, source: Path | RemotePath) -> bool:
    """Whether `output_dir` is inside `source`, a local folder of images or of a prepared dataset."""
    if not isinstance(source, Path) or not source.is_dir():
        return False
    return output_dir.resolve().is_relative_to(source.resolve())
