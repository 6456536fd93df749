"""Images inside .zip, .tar and .tar.gz files, or below a URL, read where they are: nothing is extracted to the disk.

Listing reads a .zip's directory, or a .tar's headers in one pass; workers read members by their offsets. A .tar.gz has
no offsets to jump to: each worker unpacks it once, from front to back, keeping only what it is asked for.
"""

import gzip
import posixpath
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from trainkit.data import faults
from trainkit.data.account import Account, Kind
from trainkit.data.faults import RejectedImage
from trainkit.data.format import NO_LABEL
from trainkit.data.pairing import PairSettings
from trainkit.data.sources import records
from trainkit.data.sources.classes import FolderClasses
from trainkit.data.sources.containers import MAX_MEMBER_BYTES, list_archive, read_span
from trainkit.data.sources.entries import ReadOptions, folder_class
from trainkit.data.sources.locations import DataFile, read_whole
from trainkit.data.sources.member_conditions import join_beside
from trainkit.data.sources.members import (
    File,
    Member,
    Span,
    clean_path,
    collect,
    match_rows,
)
from trainkit.data.sources.metadata import METADATA_NAMES, read_folder_metadata
from trainkit.data.sources.records import Record, Unit, cut_by_name, digest, first_length, sorted_labels
from trainkit.data.sources.splits import choose_split, split_by_folder
from trainkit.data.sources.texts import read_caption
from trainkit.data.sources.vectors import parse_npy
from trainkit.errors import UserError


class Archives:
    """The images in archives, in their order there, or the files below a URL (`root`)."""

    def __init__(
        self,
        files: list[DataFile],
        name: str,
        options: ReadOptions,
        root: str | None = None,
        metadata: Sequence[Path] = (),
    ):
        self.name, self.account = name, Account()
        self.pairs: PairSettings | None = None
        given = root or (files[0].location.path if len(files) == 1 else name)
        self.files = files
        if root is not None:
            self.members = collect(_remote_files(self.files), 0, root, options, self.account)
        else:
            self.members = []
            for number, file in enumerate(self.files):
                self.members += collect(list_archive(file), number, file.location.path, options, self.account)
            self._keep_split(options, given)
            self._read_metadata_next_to_archives(metadata, options)
        if all(member.fault for member in self.members):
            faults = [f"{member.path}: {member.fault[1]}" for member in self.members if member.fault]
            found = f"{len(faults)} rejected, the first {faults[0]}" if faults else "no image file found inside"
            raise UserError(f"--train_data_dir {given} holds no image that can be read ({found})")
        if not any(member.label for member in self.members):
            self._label_by_folder(options.label_from)
        if any(member.condition for member in self.members):
            self.pairs = options.pairs
        names = {member.label for member in self.members if member.label is not None}
        self.label_names = sorted_labels(names, self.account) if names else None
        self.has_text = any(member.text is not None or member.caption for member in self.members)
        self.vector_length = first_length(self.reader.vector(member) for member in self.members)
        if self.vector_length == 0 and all(member.vector is None for member in self.members):
            self._drop_vector_files()
        self.fingerprint = digest(_identity(self.members))

    def _label_by_folder(self, label_from: str) -> None:
        folders = FolderClasses(label_from)
        for member in self.members:
            if not _is_damage(member):
                folders.note(member.path)
        folders.count(self.account)
        for number, member in enumerate(self.members if folders.are_classes else ()):
            if not _is_damage(member):
                label = folder_class(member.path.rpartition("/")[0], folders.rule) or None
                self.members[number] = member._replace(label=label)

    def _drop_vector_files(self) -> None:
        """The .npy files are not vectors but masks, depth maps or latents: read the images without them."""
        self.vector_length, members = None, self.members
        self.members = [member._replace(vector_file=None) for member in members]
        self.account.add(Kind.VECTOR_NOT_USED, count=sum(member.vector_file is not None for member in members))
        self._count_unused(members)

    def _keep_split(self, options: ReadOptions, given: str) -> None:
        """Drop the images in folders of other splits inside the archives."""
        intact = [member for member in self.members if not _is_damage(member)]
        rule = choose_split(
            lambda: (member.path for member in intact), options.split, given, self.account, rules=(split_by_folder,)
        )
        if rule is not None:
            members = self.members
            self.members = [m for m in members if _is_damage(m) or rule(m.path) == options.split]
            self._count_unused(members)

    def _read_metadata_next_to_archives(self, metadata: Sequence[Path], options: ReadOptions) -> None:
        """Use the rows of metadata files next to the archives. Images without a row are dropped, and counted."""
        self.account.add(Kind.FILES_FOUND, count=len(metadata))
        self.account.add(Kind.METADATA_FILES, count=len(metadata))
        rows = [
            row
            for path in metadata
            for row in read_folder_metadata(path.parent, path.name, options.columns, self.account)
        ]
        if not rows:
            return
        several = len(self.files) > 1
        stems = [f"{posixpath.splitext(file.name)[0]}/" if several else "" for file in self.files]
        names = {f"{stems[member.container]}{member.path}": member for member in self.members}
        about = match_rows(rows, names, names, str(metadata[0]), self.account)
        for path in about.keys() - names.keys():
            self.account.add(Kind.ROW_WITHOUT_IMAGE, f"{about[path].where}: {path}")
        members = self.members
        named = [(f"{stems[member.container]}{member.path}", member) for member in members]
        self.members = join_beside(named, about, self.account)
        self._count_unused(members)

    def _count_unused(self, before: list[Member]) -> None:
        """Move the captions and vectors of images that were dropped from used to not used in the account."""
        for kind, field in ((Kind.CAPTION_FILES, "caption"), (Kind.VECTOR_FILES, "vector_file")):
            used = (
                sum(getattr(member, field) is not None for member in members) for members in (before, self.members)
            )
            self.account.move(kind, Kind.SIDECAR_NOT_USED, next(used) - next(used))

    def __len__(self) -> int:
        return len(self.members)

    @property
    def reader(self) -> "ArchiveReader":
        label_ids = {name: number for number, name in enumerate(self.label_names or ())}
        return ArchiveReader(tuple(self.files), label_ids, self.has_text)

    def units(self) -> list[Unit]:
        cuts = cut_by_name(self.members, records.UNIT_ITEMS)
        return [Unit(digest(_identity(members)), members) for members in cuts]


def _identity(members: list[Member]) -> bytes:
    text = "\n".join(repr((member.container, member.identity)) for member in members)
    return text.encode("utf-8", "surrogateescape")


def _is_damage(member: Member) -> bool:
    return member.span.stamp == "damage"


class ArchiveReader(NamedTuple):
    files: tuple[DataFile, ...]
    label_ids: dict[str, int]
    has_text: bool = False

    def name(self, member: Member) -> str:
        is_prefixed = self._is_archive and len(self.files) > 1 and not _is_damage(member)
        return f"{self.files[member.container].name}/{member.path}" if is_prefixed else member.path

    def read(self, member: Member) -> Record:
        if member.fault:
            raise RejectedImage(*member.fault)
        # In the order in which they are stored: a compressed stream cannot go back.
        wanted = [span for span in (member.span, member.caption, member.vector_file, member.condition) if span]
        contents = {}
        for span in sorted(wanted, key=lambda s: s.offset):
            try:
                contents[span] = self._content(member.container, span)
            except RejectedImage as error:
                raise (faults.of_condition(error, span.path) if span is member.condition else error) from None
        text, vector = member.text, None
        notes: tuple[Kind, ...] = ()
        if member.caption and text is None:
            text, notes = read_caption(contents[member.caption], member.caption.path)
        if text is None and self.has_text:
            notes = (Kind.NO_CAPTION,)
        if member.vector is not None:
            vector = np.frombuffer(member.vector, np.float32)
        elif member.vector_file:
            vector = parse_npy(contents[member.vector_file])
        label = NO_LABEL if member.label is None else self.label_ids.get(member.label, NO_LABEL)
        condition = contents[member.condition] if member.condition else None
        return Record(contents[member.span], label, text, vector, notes, condition)

    def vector(self, member: Member):
        """A function that reads the member's vector; None where it has none."""
        if member.vector is not None:
            return lambda: np.frombuffer(member.vector, np.float32)
        span = member.vector_file
        return (lambda: parse_npy(self._content(member.container, span))) if span else None

    @property
    def _is_archive(self) -> bool:
        return self.files[0].kind in ("zip", "tar", "tar.gz")

    def _content(self, container: int, span: Span) -> bytes:
        try:
            if not self._is_archive:
                return _read_file(self.files[span.offset], span)
            return read_span(self.files[container], span)
        except (RejectedImage, UserError):
            raise
        except FileNotFoundError:
            raise RejectedImage(faults.MISSING, "it is not there any more") from None
        except (ValueError, OverflowError) as error:  # an offset that is none
            raise RejectedImage(faults.CORRUPT, f"the archive is damaged: {error}") from None
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise RejectedImage(faults.TRUNCATED, f"the archive is damaged: {error}") from None
        except Exception as error:  # each store raises its own; it may be gone the next time
            raise RejectedImage(
                faults.UNREADABLE, " ".join(f"{type(error).__name__}: {error}".split())[:300]
            ) from None


def _remote_files(files: list[DataFile]) -> Iterator[File]:
    """A folder below a URL: a span's offset is the number of its file."""
    for number, file in enumerate(files):
        span = Span(clean_path(file.name), file.stamp, number, file.size, file.size)
        is_metadata = file.name.rpartition("/")[2].lower() in METADATA_NAMES
        too_large = (faults.TOO_LARGE, f"{file.size:,} bytes") if file.size > MAX_MEMBER_BYTES else None
        yield File(span, read_whole(file.location) if is_metadata else None, too_large)


def _read_file(file: DataFile, span: Span) -> bytes:
    content = read_whole(file.location)
    if len(content) < span.size:
        raise RejectedImage(faults.TRUNCATED, f"{len(content)} of {span.size} bytes came")
    return content
