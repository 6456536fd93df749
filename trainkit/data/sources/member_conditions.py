"""The conditioning images among the files of an archive: NAME.cond.png of WebDataset, or those that metadata names."""

import os
import posixpath
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from trainkit.data import faults
from trainkit.data.account import Account, Kind
from trainkit.data.faults import RejectedImage
from trainkit.data.sources.metadata import MetadataRow
from trainkit.errors import UserError

if TYPE_CHECKING:
    from trainkit.data.sources.members import File, Member

ENDING = re.compile(r"(.+)\.cond\.[^./]+", re.IGNORECASE | re.DOTALL)
NOT_THERE = RejectedImage(faults.MISSING, "")


def take_conditions(
    images: "dict[str, File]", about: Mapping[str, MetadataRow], is_wanted: bool, where: str, account: Account
) -> "dict[str, File | None]":
    """Image -> its conditioning image, None for one that is named and not there; taken out of `images`.

    Where they are not wanted, NAME.cond.png of an image is a further image of its sample. Raises `UserError` if
    metadata names some and none of them is there.
    """
    by_stem: dict[str, list[str]] = {}
    for path in images:
        by_stem.setdefault(os.path.splitext(path)[0], []).append(path)
    found: dict[str, File | None] = {}
    for path in list(images):
        match = ENDING.fullmatch(path)
        owners = by_stem.get(match[1], []) if match and path not in about else []
        if owners and not is_wanted:
            account.add(Kind.SAMPLE_PART, path)
            account.ignore(path)
            del images[path]
        elif owners:
            found |= dict.fromkeys(owners, images.pop(path))
            account.add(Kind.CONDITION_FILES)
    named = {path: row.condition for path, row in about.items() if row.condition is not None} if is_wanted else {}
    files = {path: images.get(condition) for path, condition in named.items()}
    if named and not any(files.values()):
        raise UserError(
            f"--train_data_dir {where}: none of the conditioning images that metadata names is there (the first is "
            f"{next(iter(named.values()))}): correct their names"
        )
    for path in {*named.values()} - about.keys():
        if images.pop(path, None) is not None:
            account.add(Kind.CONDITION_FILES)
    return found | files


def with_condition(member: "Member", conditions: "Mapping[str, File | None]") -> "Member":
    """The member with its conditioning image, or with the fault that this one has."""
    if member.fault or member.path not in conditions:
        return member
    file = conditions[member.path]
    if file is not None and not file.fault:
        return member._replace(condition=file.span)
    rejection = faults.of_condition(NOT_THERE)
    if file is not None and file.fault:
        rejection = faults.of_condition(RejectedImage(*file.fault), posixpath.basename(file.span.path))
    return member._replace(fault=(rejection.fault, str(rejection)))


def join_beside(
    members: "Sequence[tuple[str, Member]]", about: Mapping[str, MetadataRow], account: Account
) -> "list[Member]":
    """The members that metadata next to their archives lists, by name, with what it says about them.

    Images without a row are added to `account`, as are those that are the conditioning image of another.
    """
    by_name = dict(members)
    used = {row.condition for row in about.values() if row.condition is not None}
    kept = []
    for name, member in members:
        row = about.get(name)
        if row is None and not member.fault:
            if name in used:
                account.add(Kind.CONDITION_FILES)
            else:
                account.add(Kind.IMAGE_WITHOUT_ROW, name)
            continue
        if row is not None:
            member = member._replace(
                label=row.label or member.label, text=row.text or member.text, vector=row.vector or member.vector
            )
            if row.condition is not None:
                other = by_name.get(row.condition)
                is_there = other is not None and other.container == member.container and not other.fault
                member = member._replace(condition=other.span if is_there and other else None)
        kept.append(member)
    return kept
