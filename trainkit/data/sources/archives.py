"""Images inside .zip, .tar and .tar.gz files, or below a URL, read where they are: nothing is extracted to the disk.

Listing reads a .zip's directory, or a .tar's headers in one pass; workers read members by their offsets. A .tar.gz has
no offsets to jump to: each worker unpacks it once, from front to back, keeping only what it is asked for.
"""

import bz2
import gzip
import io
import posixpath
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from trainkit.data import faults
from trainkit.data.account import Account, Kind
from trainkit.data.faults import RejectedImage
from trainkit.data.format import NO_LABEL
from trainkit.data.sources import records
from trainkit.data.sources.entries import ReadOptions
from trainkit.data.sources.locations import DataFile, Location, open_file, opened, read_range, read_whole
from trainkit.data.sources.members import (
    CONTENT_EXTENSIONS,
    SAMPLE_EXTENSIONS,
    File,
    Member,
    Span,
    class_folders,
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

MAX_MEMBER_BYTES = 256 * 2**20  # a larger image file is rejected unread: memory stays bounded
MAX_CONTENT_BYTES = 2**20  # of a caption or a WebDataset .json
MAX_METADATA_BYTES = 2**30
ZIP_HEADER = struct.Struct("<4s22xHH")  # of a member: signature, lengths of its name and its extra field
BROKEN_HEADERS = (NotImplementedError, ValueError, IndexError, OverflowError, struct.error)
STORED, DEFLATED, BZIP2 = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2


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
        given = root or (files[0].location.path if len(files) == 1 else name)
        names = [file.name for file in files]
        rule = choose_split(lambda: names, options.split, given, self.account, are_images=root is not None)
        self.files = [file for file in files if rule is None or rule(file.name) == options.split]
        if root is not None:
            self.members = collect(_remote_files(self.files), 0, root, options, self.account)
        else:
            self.members = []
            for number, file in enumerate(self.files):
                self.members += collect(_listed(file), number, file.location.path, options, self.account)
            self._keep_split(options, given)
            self._read_metadata_beside(metadata, options)
        if all(member.fault for member in self.members):
            faults = [f"{member.path}: {member.fault[1]}" for member in self.members]
            found = f"{len(faults)} rejected, the first {faults[0]}" if faults else "no image file found inside"
            raise UserError(f"--train_data_dir {given} holds no image that can be read ({found})")
        if not any(member.label for member in self.members):
            paths = (member.path for member in self.members if not _is_damage(member))
            folders = class_folders(paths, options.label_from)
            self.members = [
                member._replace(label=folders.get(member.path.rpartition("/")[0])) for member in self.members
            ]
        names = {member.label for member in self.members} - {None}
        self.label_names = sorted_labels(names, self.account) if names else None
        self.has_text = any(member.text is not None or member.caption for member in self.members)
        self.vector_length = first_length(self.reader.vector(member) for member in self.members)
        self.fingerprint = digest(_identity(self.members))

    def _keep_split(self, options: ReadOptions, given: str) -> None:
        """Drop the images in folders of other splits inside the archives."""
        intact = [member for member in self.members if not _is_damage(member)]
        rule = choose_split(
            lambda: (member.path for member in intact), options.split, given, self.account, rules=(split_by_folder,)
        )
        if rule is not None:
            self.members = [m for m in self.members if _is_damage(m) or rule(m.path) == options.split]

    def _read_metadata_beside(self, metadata: Sequence[Path], options: ReadOptions) -> None:
        """Use the rows of metadata files next to the archives. Images without a row are dropped, and counted."""
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
        kept = []
        for name, member in names.items():
            if (row := about.get(name)) is None and not member.fault:
                self.account.add(Kind.IMAGE_WITHOUT_ROW, name)
                continue
            if row is not None:
                member = member._replace(
                    label=row.label or member.label, text=row.text or member.text, vector=row.vector or member.vector
                )
            kept.append(member)
        self.members = kept

    def __len__(self) -> int:
        return len(self.members)

    @property
    def reader(self) -> "ArchiveReader":
        label_ids = {name: number for number, name in enumerate(self.label_names or ())}
        return ArchiveReader(tuple(self.files), label_ids)

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

    def name(self, member: Member) -> str:
        is_prefixed = self._is_archive and len(self.files) > 1 and not _is_damage(member)
        return f"{self.files[member.container].name}/{member.path}" if is_prefixed else member.path

    def read(self, member: Member) -> Record:
        if member.fault:
            raise RejectedImage(*member.fault)
        # In the order in which they lie there: a packed stream cannot go back.
        wanted = [span for span in (member.span, member.caption, member.vector_file) if span]
        contents = {span: self._content(member.container, span) for span in sorted(wanted, key=lambda s: s.offset)}
        text, vector, notes = member.text, None, ()
        if member.caption and text is None:
            text, notes = read_caption(contents[member.caption], member.caption.path)
        if member.vector is not None:
            vector = np.frombuffer(member.vector, np.float32)
        elif member.vector_file:
            vector = parse_npy(contents[member.vector_file])
        return Record(contents[member.span], self.label_ids.get(member.label, NO_LABEL), text, vector, notes)

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


def _listed(archive: DataFile) -> Iterator[File]:
    """The files inside; where it breaks off, a last one that says so."""
    list_files = _list_zip if archive.kind == "zip" else _list_tar
    damage = None
    try:
        with open_file(archive.location) as file:
            yield from list_files(archive, file)
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, gzip.BadGzipFile, *BROKEN_HEADERS) as error:
        damage = faults.CORRUPT, f"no whole {archive.kind} file: {error}"
    except EOFError as error:
        damage = faults.TRUNCATED, f"it breaks off: {error}"
    except OSError as error:
        damage = "unreadable", error.strerror or str(error)
    if damage:
        yield File(Span(archive.name, "damage", archive.size), fault=damage, is_damage=True)


def _list_zip(archive: DataFile, file: BinaryIO) -> Iterator[File]:
    with zipfile.ZipFile(file) as opened_zip:
        for info in sorted(opened_zip.infolist(), key=lambda info: info.header_offset):
            if info.is_dir():
                continue
            fault, size = None, max(info.file_size, info.compress_size)
            if stat.S_ISLNK(info.external_attr >> 16):
                fault = faults.LINK, "a symbolic link, which is not followed"
            elif info.flag_bits & 1:
                fault = faults.ENCRYPTED, "it is encrypted; pack it without a password"
            elif info.compress_type not in (STORED, DEFLATED, BZIP2):
                fault = (
                    faults.UNSUPPORTED,
                    f"packed by method {info.compress_type}; stored, deflate and bzip2 are read",
                )
            path = clean_path(info.filename.replace("\\", "/"))
            stamp = f"{info.file_size} {info.CRC:08x}"
            span = Span(
                path, stamp, info.header_offset, info.compress_size, info.file_size, info.compress_type, info.CRC
            )
            fault = fault or _too_large(size)
            content = None
            if fault is None and _is_read_now(path, size, SAMPLE_EXTENSIONS):
                try:
                    content = _read_zip(archive, span)
                except RejectedImage as rejection:
                    fault = rejection.fault, str(rejection)
            yield File(span, content, fault)


def _too_large(size: int) -> tuple[str, str] | None:
    if 0 <= size <= MAX_MEMBER_BYTES:
        return None
    return faults.TOO_LARGE, f"{size:,} bytes; the limit is {MAX_MEMBER_BYTES:,}"


def _is_read_now(path: str, size: int, extensions: tuple[str, ...]) -> bool:
    if path.rpartition("/")[2].lower() in METADATA_NAMES:
        return size <= MAX_METADATA_BYTES
    return size <= MAX_CONTENT_BYTES and path.lower().endswith(extensions)


class _Bounded(io.RawIOBase):
    """A .tar's stream for its headers: a header that claims to be huge is not read into memory."""

    def __init__(self, file: BinaryIO):
        self._file = file

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_CONTENT_BYTES:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return self._file.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


def _list_tar(archive: DataFile, file: BinaryIO) -> Iterator[File]:
    is_packed = archive.kind == "tar.gz"
    stream = gzip.GzipFile(fileobj=file) if is_packed else file
    extensions = CONTENT_EXTENSIONS if is_packed else SAMPLE_EXTENSIONS  # once, now, rather than out of order later
    headers, place = tarfile.open(fileobj=_Bounded(stream), mode="r:", errorlevel=0), -1
    while (info := headers.next()) is not None:
        headers.members.clear()
        if headers.offset <= place:
            raise tarfile.ReadError("a header leads back")
        place = headers.offset
        if info.isdir():
            continue
        fault = _too_large(info.size)
        if info.issym() or info.islnk():
            fault = faults.LINK, f"a link to {info.linkname[:200]}, which is not followed"
        elif not info.isreg():
            fault = faults.NOT_A_FILE, "a device or a pipe"
        elif info.sparse is not None:
            fault = faults.UNSUPPORTED, "stored with holes (sparse); pack it without --sparse"
        path = clean_path(info.name)
        span = Span(path, f"{archive.stamp} {info.offset_data} {info.size}", info.offset_data, info.size, info.size)
        content = None
        if fault is None and _is_read_now(path, info.size, extensions):
            stream.seek(info.offset_data)
            content = stream.read(info.size)
        yield File(span, content, fault)
    stream.seek(headers.offset)
    if stream.read(tarfile.BLOCKSIZE).strip(b"\0"):
        raise tarfile.ReadError(f"no header at byte {headers.offset:,}")


def read_span(archive: DataFile, span: Span) -> bytes:
    """The unpacked bytes of a member. Raises `RejectedImage` where they are not what the archive says."""
    if archive.kind == "zip":
        return _read_zip(archive, span)
    if archive.kind == "tar":
        content = read_range(archive.location, span.offset, span.size)
    else:
        stream = opened(_open_packed, archive.location)
        stream.seek(span.offset)
        content = stream.read(span.size)
    if len(content) < span.size:
        raise RejectedImage(faults.TRUNCATED, f"the archive ends after {len(content)} of its {span.size} bytes")
    return content


def _open_packed(location: Location) -> gzip.GzipFile:
    return gzip.GzipFile(fileobj=open_file(location))


def _read_zip(archive: DataFile, span: Span) -> bytes:
    header = read_range(archive.location, span.offset, ZIP_HEADER.size)
    if len(header) < ZIP_HEADER.size or not header.startswith(b"PK\3\4"):
        raise RejectedImage(faults.CORRUPT, "the archive has no file where its directory says")
    _, name_length, extra_length = ZIP_HEADER.unpack(header)
    start = span.offset + ZIP_HEADER.size + name_length + extra_length
    packed = read_range(archive.location, start, span.stored)
    if len(packed) < span.stored:
        raise RejectedImage(faults.TRUNCATED, f"the archive ends after {len(packed)} of its {span.stored} bytes")
    try:
        # One byte more than was declared is enough to see that there would be more.
        if span.method == DEFLATED:
            content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, span.size + 1)
        elif span.method == BZIP2:
            content = bz2.BZ2Decompressor().decompress(packed, span.size + 1)
        else:
            content = packed
    except (zlib.error, OSError, EOFError) as error:
        raise RejectedImage(faults.CORRUPT, f"it cannot be unpacked: {error}") from None
    if len(content) != span.size or zlib.crc32(content) != span.crc:
        raise RejectedImage(
            faults.CORRUPT, f"it does not unpack to the {span.size:,} bytes and checksum that are declared"
        )
    return content
